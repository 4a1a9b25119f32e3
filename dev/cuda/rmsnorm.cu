// RMSNorm, forward and backward, and where to add the residual.   make build/rmsnorm && build/rmsnorm
//
//    rstd = 1 / sqrt(mean(x^2) + eps)    out = x * rstd * weight                                              x, out (N, C), rstd (N)
//    dweight += sum over rows of dout * x * rstd,   dinp = or += rstd * (weight * dout - x * rstd^2 * mean(weight * dout * x))
//
// Every number is used a handful of times, so memory is the bound. Bytes in bf16, N = 8192, C = 2048, and the time of these at the
// 3350 GB/s of an H100 SXM's data sheet:
//    forward    read x, write out:                        4 N C =  67 MB    20 us
//    backward   read dout, x, dinp, write dinp:           8 N C = 134 MB    40 us
//    residual   matmul with the sum in its epilogue, which reads the residual (2 N C), writes x (2 N C), then the forward (4 N C):
//               8 N C; with the sum in the norm's kernel the matmul's output is written, then read: 10 N C = 168 MB, 10 us more
#include "bench.h"

static const float EPS = 1e-6f;
static int N, C;
static WriteMode mode;
static Array inp, weight, out, rstd, dout, rstd_inp, dinp, dweight;
static Array att, matrix, residual, product, sum;   // for the residual: sum = residual + att matrix^T, out = norm(sum)

// v1: the CPU loop, n turned into a thread index.
__global__ void rmsnorm_forward_v1_kernel(floatX *out, float *rstd, const floatX *inp, const floatX *weight, int N, int C, float eps) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const floatX *x = inp + (size_t)n * C;
    float squares = 0;
    for (int c = 0; c < C; c++) squares += to_float(x[c]) * to_float(x[c]);
    float r = 1.0f / sqrtf(squares / (float)C + eps);
    for (int c = 0; c < C; c++) out[(size_t)n * C + c] = to_floatX(to_float(x[c]) * r * to_float(weight[c]));
    rstd[n] = r;
}
void forward_v1(int block) {
    rmsnorm_forward_v1_kernel<<<ceil_div(N, block), block, 0, stream>>>(out.x, rstd.f, inp.x, weight.x, N, C, EPS);
}

// Limit of v1: neighbouring threads read addresses C apart: each 2 bytes cost a sector of 32; and N threads don't fill the card.
// Change:      a warp for each row; lanes take neighbouring columns, and shuffles add up their sums.
// Limit now:   loads of 2 bytes a lane: too few bytes are on their way at a time to keep the memory busy.
__global__ void rmsnorm_forward_v2_kernel(floatX *out, float *rstd, const floatX *inp, const floatX *weight, int N, int C, float eps) {
    int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    const floatX *x = inp + (size_t)n * C;
    float squares = 0;
    for (int c = lane; c < C; c += WARP) squares += to_float(x[c]) * to_float(x[c]);
    float r = 1.0f / sqrtf(warp_sum(squares) / (float)C + eps);
    for (int c = lane; c < C; c += WARP) out[(size_t)n * C + c] = to_floatX(to_float(x[c]) * r * to_float(weight[c]));
    if (lane == 0) rstd[n] = r;
}
void forward_v2(int block) {
    rmsnorm_forward_v2_kernel<<<ceil_div(N * WARP, block), block, 0, stream>>>(out.x, rstd.f, inp.x, weight.x, N, C, EPS);
}

// Limit of v2: the width of a load.
// Change:      packs of 8 numbers: 16 bytes a lane in bf16, the widest load there is.
// Limit now:   the row is read twice; the second time it comes from the L1 cache, but it takes instructions and their latency again.
__global__ void rmsnorm_forward_v3_kernel(floatX *out, float *rstd, const floatX *inp, const floatX *weight, int N, int C, float eps) {
    int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    const Pack<WIDE> *x = (const Pack<WIDE> *)(inp + (size_t)n * C), *w = (const Pack<WIDE> *)weight;
    Pack<WIDE> *y = (Pack<WIDE> *)(out + (size_t)n * C);
    float squares = 0;
    for (int c = lane; c < C / WIDE; c += WARP) {
        Pack<WIDE> p = x[c];
        for (int i = 0; i < WIDE; i++) squares += to_float(p.x[i]) * to_float(p.x[i]);
    }
    float r = 1.0f / sqrtf(warp_sum(squares) / (float)C + eps);
    for (int c = lane; c < C / WIDE; c += WARP) {
        Pack<WIDE> p = x[c], scale = w[c];
        for (int i = 0; i < WIDE; i++) p.x[i] = to_floatX(to_float(p.x[i]) * r * to_float(scale.x[i]));
        y[c] = p;
    }
    if (lane == 0) rstd[n] = r;
}
void forward_v3(int block) {
    CHECK(C % WIDE == 0, "C = %d is not a multiple of %d", C, WIDE);
    rmsnorm_forward_v3_kernel<<<ceil_div(N * WARP, block), block, 0, stream>>>(out.x, rstd.f, inp.x, weight.x, N, C, EPS);
}

// Limit of v3: the second reading, and shared use of the weight by few rows.
// Change:      the launcher of train_qwen.cu.
// Limit now:   see the comment there.
void forward_production(int) { rmsnorm_forward_gpu(out.x, rstd.f, inp.x, weight.x, N, C, EPS); }

// v1: the two CPU loops, one with the row and one with the column turned into a thread index.
__global__ void rmsnorm_backward_v1_dinp_kernel(floatX *dinp, const floatX *dout, const floatX *inp, const floatX *weight,
                                                const float *rstd, int N, int C, WriteMode mode) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    size_t at = (size_t)n * C;
    float r = rstd[n], sum = 0;
    for (int c = 0; c < C; c++) sum += to_float(weight[c]) * to_float(dout[at + c]) * to_float(inp[at + c]);
    float back = sum / (float)C * r * r * r;
    for (int c = 0; c < C; c++) {
        float d = to_float(weight[c]) * to_float(dout[at + c]) * r - to_float(inp[at + c]) * back;
        dinp[at + c] = to_floatX(mode == ACCUMULATE ? to_float(dinp[at + c]) + d : d);
    }
}
__global__ void rmsnorm_backward_v1_dweight_kernel(float *dweight, const floatX *dout, const floatX *inp, const float *rstd, int N, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0;
    for (int n = 0; n < N; n++) sum += to_float(dout[(size_t)n * C + c]) * to_float(inp[(size_t)n * C + c]) * rstd[n];
    dweight[c] += sum;
}
void backward_v1(int block) {
    rmsnorm_backward_v1_dinp_kernel<<<ceil_div(N, block), block, 0, stream>>>(dinp.x, dout.x, inp.x, weight.x, rstd_inp.f, N, C, mode);
    rmsnorm_backward_v1_dweight_kernel<<<ceil_div(C, block), block, 0, stream>>>(dweight.f, dout.x, inp.x, rstd_inp.f, N, C);
}

// Limit of v1: as the forward's v1, and dweight has C threads only, each with N steps.
// Change:      a warp for each row, which also adds its part of dweight, by atomicAdd.
// Limit now:   N additions to each dweight[c], one after the other. Their order changes from run to run, and with it the last bits.
__global__ void rmsnorm_backward_v2_kernel(floatX *dinp, float *dweight, const floatX *dout, const floatX *inp, const floatX *weight,
                                           const float *rstd, int N, int C, WriteMode mode) {
    int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    size_t at = (size_t)n * C;
    float r = rstd[n], sum = 0;
    for (int c = lane; c < C; c += WARP) sum += to_float(weight[c]) * to_float(dout[at + c]) * to_float(inp[at + c]);
    float back = warp_sum(sum) / (float)C * r * r * r;
    for (int c = lane; c < C; c += WARP) {
        float dy = to_float(dout[at + c]), x = to_float(inp[at + c]), d = to_float(weight[c]) * dy * r - x * back;
        dinp[at + c] = to_floatX(mode == ACCUMULATE ? to_float(dinp[at + c]) + d : d);
        atomicAdd(&dweight[c], dy * x * r);
    }
}
void backward_v2(int block) {
    rmsnorm_backward_v2_kernel<<<ceil_div(N * WARP, block), block, 0, stream>>>(dinp.x, dweight.f, dout.x, inp.x, weight.x, rstd_inp.f,
                                                                                N, C, mode);
}

// Limit of v2: atomics on few addresses.
// Change:      few blocks, each walks over many rows with its sum of dweight in shared memory (a column has one owner, so no atomics);
//              packs of 8; a second kernel adds the sums of the blocks in a fixed order, so equal runs give equal bits.
// Limit now:   two barriers a row for the sum over the block.
__global__ void rmsnorm_backward_v3_kernel(floatX *dinp, float *partial, const floatX *dout, const floatX *inp, const floatX *weight,
                                           const float *rstd, int N, int C, WriteMode mode) {
    extern __shared__ float dweight_sums[];
    for (int c = threadIdx.x * WIDE; c < C; c += blockDim.x * WIDE)
        for (int i = 0; i < WIDE; i++) dweight_sums[c + i] = 0;
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        size_t at = (size_t)n * C;
        float r = rstd[n], sum = 0;
        for (int c = threadIdx.x * WIDE; c < C; c += blockDim.x * WIDE) {
            Pack<WIDE> w = load_pack<WIDE>(weight + c), dy = load_pack<WIDE>(dout + at + c), x = load_pack<WIDE>(inp + at + c);
            for (int i = 0; i < WIDE; i++) sum += to_float(w.x[i]) * to_float(dy.x[i]) * to_float(x.x[i]);
        }
        float back = block_sum(sum) / (float)C * r * r * r;
        for (int c = threadIdx.x * WIDE; c < C; c += blockDim.x * WIDE) {
            Pack<WIDE> w = load_pack<WIDE>(weight + c), dy = load_pack<WIDE>(dout + at + c), x = load_pack<WIDE>(inp + at + c);
            Pack<WIDE> dx = {};
            if (mode == ACCUMULATE) dx = *(const Pack<WIDE> *)(dinp + at + c);
            for (int i = 0; i < WIDE; i++) {
                float gradient = to_float(dy.x[i]), input = to_float(x.x[i]);
                dx.x[i] = to_floatX(to_float(dx.x[i]) + to_float(w.x[i]) * gradient * r - input * back);
                dweight_sums[c + i] += gradient * input * r;
            }
            *(Pack<WIDE> *)(dinp + at + c) = dx;
        }
    }
    for (int c = threadIdx.x * WIDE; c < C; c += blockDim.x * WIDE)
        for (int i = 0; i < WIDE; i++) partial[(size_t)blockIdx.x * C + c + i] = dweight_sums[c + i];
}
__global__ void rmsnorm_backward_v3_sum_kernel(float *dweight, const float *partial, int blocks, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0;
    for (int b = 0; b < blocks; b++) sum += partial[(size_t)b * C + c];
    dweight[c] += sum;
}
void backward_v3(int block) {
    int blocks = N < 256 ? N : 256;
    CHECK(C % WIDE == 0 && blocks * C <= SCRATCH_FLOATS, "C = %d is not a multiple of %d, or too large", C, WIDE);
    rmsnorm_backward_v3_kernel<<<blocks, block, C * sizeof(float), stream>>>(dinp.x, scratch, dout.x, inp.x, weight.x, rstd_inp.f,
                                                                             N, C, mode);
    rmsnorm_backward_v3_sum_kernel<<<ceil_div(C, block), block, 0, stream>>>(dweight.f, scratch, blocks, C);
}

// Limit of v3: the barriers.
// Change:      the launcher of train_qwen.cu.
// Limit now:   see the comment there.
void backward_production(int) { rmsnorm_backward_gpu(dinp.x, dweight.f, dout.x, inp.x, weight.x, rstd_inp.f, scratch, N, C, mode); }

// The residual, fused into the norm: the matmul writes its product, this kernel adds, writes the sum and its norm. A warp for a row.
__global__ void residual_rmsnorm_kernel(floatX *sum, floatX *out, float *rstd, const floatX *residual, const floatX *product,
                                        const floatX *weight, int N, int C, float eps) {
    int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    size_t row = (size_t)n * C;
    float squares = 0;
    for (int c = lane * WIDE; c < C; c += WARP * WIDE) {
        Pack<WIDE> x = *(const Pack<WIDE> *)(residual + row + c), y = *(const Pack<WIDE> *)(product + row + c);
        for (int i = 0; i < WIDE; i++) {
            x.x[i] = to_floatX(to_float(x.x[i]) + to_float(y.x[i]));
            squares += to_float(x.x[i]) * to_float(x.x[i]);
        }
        *(Pack<WIDE> *)(sum + row + c) = x;
    }
    float r = 1.0f / sqrtf(warp_sum(squares) / (float)C + eps);
    for (int c = lane * WIDE; c < C; c += WARP * WIDE) {
        Pack<WIDE> x = *(const Pack<WIDE> *)(sum + row + c), w = *(const Pack<WIDE> *)(weight + c);      // what this lane wrote itself
        for (int i = 0; i < WIDE; i++) x.x[i] = to_floatX(to_float(x.x[i]) * r * to_float(w.x[i]));
        *(Pack<WIDE> *)(out + row + c) = x;
    }
    if (lane == 0) rstd[n] = r;
}
void residual_in_norm(int block) {
    matmul_forward_gpu(product.x, NULL, att.x, matrix.x, NULL, N, C, C);
    residual_rmsnorm_kernel<<<ceil_div(N * WARP, block), block, 0, stream>>>(sum.x, out.x, rstd.f, residual.x, product.x, weight.x,
                                                                             N, C, EPS);
}

// Limit of the above: 10 N C bytes beside the matmul's own reading, and the product is rounded once more before the sum.
// Change:      the matmul adds the residual in its epilogue, as train_qwen.cu does.
// Limit now:   8 N C bytes, of which the residual's 2 N C are read while other tiles compute.
void residual_in_matmul(int) {
    matmul_forward_gpu(sum.x, residual.x, att.x, matrix.x, NULL, N, C, C);
    rmsnorm_forward_gpu(out.x, rstd.f, sum.x, weight.x, N, C, EPS);
}

static Version forward[] = {{"v1 the CPU loop", forward_v1, {64, 256}}, {"v2 a warp for a row", forward_v2, {64, 256}},
    {"v3 packs of 8", forward_v3, {64, 256}}, {"train_qwen.cu", forward_production}};
static Version backward[] = {{"v1 the CPU loops", backward_v1, {64, 256}}, {"v2 a warp for a row, atomics", backward_v2, {64, 256}},
    {"v3 sums of blocks, packs", backward_v3, {64, 256}}, {"train_qwen.cu", backward_production}};
static Version residuals[] = {{"matmul, then residual + norm", residual_in_norm, {128, 256}},
    {"train_qwen.cu: in the matmul, then norm", residual_in_matmul}};

int main(void) {
    static const int sizes[][2] = {{1, 8}, {33, 72}, {3, 2312}, {70, 264}, {8192, 2048}};
    for (int s = 0; bench_next(s, sizes); s++) {
        N = sizes[s][0], C = sizes[s][1], mode = s == 1 ? OVERWRITE : ACCUMULATE;
        size_t count = (size_t)N * C;
        double bytes = (double)count * sizeof(floatX);
        inp = array_random("inp", FLOATX, count, 1), weight = array_random("weight", FLOATX, C, 1);
        out = array_output("out", FLOATX, count), rstd = array_output("rstd", FLOAT, N);
        rmsnorm_forward(out.host, rstd.host, inp.host, weight.host, N, 1, C, C, EPS);
        bench("rmsnorm_forward", forward, 2 * bytes, 0, {{&out, &rstd}});

        dout = array_random("dout", FLOATX, count, 1), rstd_inp = array_of("rstd", FLOAT, N, rstd.host);
        dinp = array_random("dinp", FLOATX, count, 1), dweight = array_random("dweight", FLOAT, C, 1);
        rmsnorm_backward(dinp.host, dweight.host, dout.host, inp.host, weight.host, rstd_inp.host, N, 1, C, C, mode);
        bench("rmsnorm_backward", backward, 4 * bytes, 0, {{&dinp, &dweight}});

        att = array_random("att", FLOATX, count, 1), matrix = array_random("matrix", FLOATX, (size_t)C * C, 1 / sqrtf((float)C));
        residual = array_random("residual", FLOATX, count, 1);
        product = array_output("product", FLOATX, count), sum = array_output("sum", FLOATX, count);
        memcpy(sum.host, residual.host, count * sizeof(float));
        matmul_forward(sum.host, att.host, matrix.host, NULL, N, C, C, ACCUMULATE);
        rmsnorm_forward(out.host, rstd.host, sum.host, weight.host, N, 1, C, C, EPS);
        sum.roundings = 2, out.roundings = 3, rstd.roundings = 1;        // of the product, of the sum, of out
        bench("residual and rmsnorm", residuals, 4 * bytes, 2.0 * (double)count * C, {{&sum, &out, &rstd}});
    }
    return bench_close();
}
