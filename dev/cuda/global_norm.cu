// The norm of all gradients.   make build/global_norm && build/global_norm
//
//    norm = sqrt(sum of grads[i]^2), in double
//
// Two operations for 4 bytes: memory is the bound, 4 bytes a parameter. 2^28 gradients are 1074 MB, 321 us at the 3350 GB/s of an H100
// SXM's data sheet. To keep such a memory busy about 2 MB must be under way at any time (3350 GB/s x 600 ns).
#include "bench.h"

enum { NORM_PARTS = 4096 };                        // as in gradient_norm of train_qwen.c
static int count;
static Array grads, grad_norm, result;

__global__ void norm_v1_sum_kernel(float *norm, const double *partials, int parts) {
    double sum = 0;
    for (int i = 0; i < parts; i++) sum += partials[i];
    *norm = (float)sqrt(sum);
}

// v1: the CPU's two loops, the part turned into a thread index.
__global__ void norm_v1_kernel(double *partials, const float *grads, size_t count) {
    size_t part = (size_t)blockIdx.x * blockDim.x + threadIdx.x, size = count / NORM_PARTS + 1, end = min((part + 1) * size, count);
    double sum = 0;
    for (size_t i = part * size; i < end; i++) sum += (double)grads[i] * (double)grads[i];
    partials[part] = sum;
}
void norm_v1(int block) {
    norm_v1_kernel<<<NORM_PARTS / block, block, 0, stream>>>((double *)scratch, grads.f, count);
    norm_v1_sum_kernel<<<1, 1, 0, stream>>>(grad_norm.f, (double *)scratch, NORM_PARTS);
}

// Sum over a block of whole warps; thread 0 gets it.
__device__ double block_sum_double(double x) {
    __shared__ double parts[WARP];
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, offset);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    for (unsigned warp = 1; threadIdx.x == 0 && warp < blockDim.x / WARP; warp++) x += parts[warp];
    return x;
}

// Limit of v1: threads read addresses far apart, and 4096 of them have 16 KB under way.
// Change:      many more threads, neighbours read neighbours; a block's sum goes into one number by atomicAdd.
// Limit now:   4 bytes a load. And atomics add up in the order in which blocks end: two equal runs differ in the last bits.
__global__ void norm_v2_kernel(double *sum, const float *grads, size_t count) {
    double mine = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x)
        mine += (double)grads[i] * (double)grads[i];
    mine = block_sum_double(mine);
    if (threadIdx.x == 0) atomicAdd(sum, mine);
}
void norm_v2(int block) {
    int blocks = 8 * device_properties()->multiProcessorCount;
    cudaCheck(cudaMemsetAsync(scratch, 0, sizeof(double), stream));
    norm_v2_kernel<<<blocks, block, 0, stream>>>((double *)scratch, grads.f, count);
    norm_v1_sum_kernel<<<1, 1, 0, stream>>>(grad_norm.f, (double *)scratch, 1);
}

// Limit of v2: the width of a load, and the order.
// Change:      16 bytes a load, a fixed number of blocks with a place each for their sums, which v1's second kernel adds up in order.
// Limit now:   memory; on cards with few units for double (all but the A100 and H100 kind) those units.
enum { NORM_BLOCKS = 1024 };
__global__ void norm_v3_kernel(double *partials, const float *grads, size_t count) {
    double sum = 0;
    size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x, step = (size_t)gridDim.x * blockDim.x, packs = count / 4;
    for (size_t i = first; i < packs; i += step) {
        float4 g = ((const float4 *)grads)[i];
        sum += (double)g.x * (double)g.x + (double)g.y * (double)g.y + (double)g.z * (double)g.z + (double)g.w * (double)g.w;
    }
    if (first < count % 4) sum += (double)grads[4 * packs + first] * (double)grads[4 * packs + first];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}
void norm_v3(int block) {
    int most = ceil_div(count, 4 * block), blocks = most < NORM_BLOCKS ? most : NORM_BLOCKS;
    norm_v3_kernel<<<blocks, block, 0, stream>>>((double *)scratch, grads.f, count);
    norm_v1_sum_kernel<<<1, 1, 0, stream>>>(grad_norm.f, (double *)scratch, blocks);
}

// Limit of v3: see there.
// Change:      the launcher of train_qwen.cu, which also decides how gradients are clipped. (Its result is converted here.)
// Limit now:   4 bytes a load, 256 blocks.
__global__ void take_norm_kernel(float *norm, const ResultGpu *result) { *norm = (float)result->norm; }
void norm_production(int) {
    gradient_norm_gpu((ResultGpu *)result.i, grads.f, scratch, count, 1, 1);
    take_norm_kernel<<<1, 1, 0, stream>>>(grad_norm.f, (ResultGpu *)result.i);
}

static Version versions[] = {{"v1 the CPU loops", norm_v1, {64, 256}}, {"v2 neighbours, atomics", norm_v2, {256, 1024}},
    {"v3 packs of 16 bytes, fixed order", norm_v3, {256, 1024}}, {"train_qwen.cu", norm_production}};

int main(void) {
    static const int sizes[][1] = {{1}, {1003}, {70001}, {1 << 28}};
    for (int s = 0; bench_next(s, sizes); s++) {
        count = sizes[s][0];
        const ResultGpu begin = {};
        grads = array_random("grads", FLOAT, count, 0.01f), grad_norm = array_output("norm", FLOAT, 1);
        result = array_of("result", INT, sizeof begin / sizeof(int), &begin);
        grad_norm.host[0] = (float)gradient_norm(grads.host, count);
        bench("global_norm", versions, 4.0 * count, 0, {{&grad_norm}});
    }
    return bench_close();
}
