// AdamW over all parameters.   make build/adamw && build/adamw
//
//    g = grads * grad_scale          m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//    master = master (1 - lr decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps);  params = master in bf16;  grads = 0
//
// Some 15 operations for 34 bytes: memory is the bound. In bf16 a parameter's grads, master, m and v are read and written (32 bytes) and
// params written (2). The 196 million parameters below (Qwen2.5-0.5B with 4 of its 24 layers) are 6.66 GB: 1.99 ms at the 3350 GB/s of an
// H100 SXM's data sheet. Matrices decay, norms and biases don't, so a kernel that takes several tensors must know where they begin.
#include "bench.h"

typedef struct { size_t begin; Decay decay; } Border;                 // of a tensor, in the flat buffers
static Model model;                                // host pointers for the CPU function, and in .gpu device pointers for train_qwen.cu
static Gpu gpu;
static const AdamW adamw = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f};
static const float GRAD_SCALE = 0.7f;
static const long STEP = 3;
static Array params, master, ms, vs, grads, borders, chunks, result;

typedef struct { AdamW o; float correct1, correct2; } Constants;
static Constants constants(void) {
    Constants k = {adamw, (float)(1.0 / (1.0 - pow(adamw.beta1, (double)STEP))), (float)(1.0 / (1.0 - pow(adamw.beta2, (double)STEP)))};
    return k;
}
// One parameter. All versions do the same here, they differ in who does it.
__device__ void update(float *master, float *m, float *v, float *grad, float grad_scale, float keep, const Constants &k) {
    float g = *grad * grad_scale;
    *m = k.o.beta1 * *m + (1.0f - k.o.beta1) * g;
    *v = k.o.beta2 * *v + (1.0f - k.o.beta2) * g * g;
    *master = *master * keep - k.o.lr * (*m * k.correct1) / (sqrtf(*v * k.correct2) + k.o.eps);
    *grad = 0;
}
__device__ void write_param(floatX *params, size_t i, float master) {
    if (sizeof(floatX) != sizeof(float)) params[i] = to_floatX(master);         // in fp32 the masters are the parameters
}

// v1: the CPU loop, the element of a tensor turned into a thread index, a launch for each tensor.
__global__ void adamw_v1_kernel(floatX *params, float *master, float *ms, float *vs, float *grads, size_t begin, size_t count,
                                float grad_scale,
                                float keep, Constants k) {
    size_t i = begin + (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= begin + count) return;
    update(&master[i], &ms[i], &vs[i], &grads[i], grad_scale, keep, k);
    write_param(params, i, master[i]);
}
void adamw_v1(int block) {
    for (int t = 0; t < model.table.count; t++) {
        const TensorInfo *info = &model.table.list[t];
        size_t count = info->rows * info->cols;
        float keep = 1.0f - (info->decay == DECAY ? adamw.lr * adamw.weight_decay : 0.0f);
        adamw_v1_kernel<<<blocks_for(count, block), block, 0, stream>>>(params.x, master.f, ms.f, vs.f, grads.f, info->offset, count,
                                                                        GRAD_SCALE,
                                                                        keep, constants());
    }
}

// The decay of parameter i: that of the last tensor that begins at i or before.
__device__ float keep_of(const Border *borders, int num_borders, size_t i, const AdamW &o) {
    int low = 0, high = num_borders - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (borders[middle].begin <= i) low = middle;
        else high = middle - 1;
    }
    return 1.0f - (borders[low].decay == DECAY ? o.lr * o.weight_decay : 0.0f);
}

// Limit of v1: a launch for each tensor, most of them small (a norm has 896 numbers): some 3 us each with the card nearly idle. And the
//              host passes grad_scale, so it has waited for the norm before.
// Change:      one launch over the flat buffers, each thread looks up its tensor; grad_scale is read on the device.
// Limit now:   the search: 6 dependent loads for each parameter, though from the L1 cache.
__global__ void adamw_v2_kernel(floatX *params, float *master, float *ms, float *vs, float *grads, size_t count, const ResultGpu *result,
                                const Border *borders, int num_borders, Constants k) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    update(&master[i], &ms[i], &vs[i], &grads[i], result->grad_scale, keep_of(borders, num_borders, i, k.o), k);
    write_param(params, i, master[i]);
}
void adamw_v2(int block) {
    adamw_v2_kernel<<<blocks_for(master.count, block), block, 0, stream>>>(params.x, master.f, ms.f, vs.f, grads.f, master.count,
        (ResultGpu *)result.i, (Border *)borders.i, model.table.count, constants());
}

struct alignas(16) Four { float x[4]; };
__device__ Four load_four(const float *from) { Four four; *(float4 *)four.x = *(const float4 *)from; return four; }
__device__ void store_four(float *to, const Four &four) { *(float4 *)to = *(const float4 *)four.x; }

// Limit of v2: the search, and loads of 4 bytes.
// Change:      a thread takes 4 parameters, 16 bytes a load; two searches, more only where their answers differ (a border within).
// Limit now:   memory.
__global__ void adamw_v3_kernel(floatX *params, float *master, float *ms, float *vs, float *grads, size_t count, const ResultGpu *result,
                                const Border *borders, int num_borders, Constants k) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    float grad_scale = result->grad_scale;
    if (i + 4 > count) {                           // the end of the buffers
        for (; i < count; i++) {
            update(&master[i], &ms[i], &vs[i], &grads[i], grad_scale, keep_of(borders, num_borders, i, k.o), k);
            write_param(params, i, master[i]);
        }
        return;
    }
    Four p = load_four(master + i), m = load_four(ms + i), v = load_four(vs + i), g = load_four(grads + i);
    float keep_first = keep_of(borders, num_borders, i, k.o), keep_last = keep_of(borders, num_borders, i + 3, k.o);
    for (int j = 0; j < 4; j++) {
        float keep = keep_first == keep_last ? keep_first : keep_of(borders, num_borders, i + j, k.o);
        update(&p.x[j], &m.x[j], &v.x[j], &g.x[j], grad_scale, keep, k);
    }
    store_four(master + i, p), store_four(ms + i, m), store_four(vs + i, v), store_four(grads + i, g);
    for (int j = 0; j < 4; j++) write_param(params, i + j, p.x[j]);
}
void adamw_v3(int block) {
    adamw_v3_kernel<<<blocks_for(master.count / 4 + 1, block), block, 0, stream>>>(params.x, master.f, ms.f, vs.f, grads.f,
        master.count, (ResultGpu *)result.i, (Border *)borders.i, model.table.count, constants());
}

// Limit of v3: none but the search.
// Change:      the launcher of train_qwen.cu: the host cuts all tensors into chunks of one decay each, once; a block takes a chunk.
// Limit now:   memory; loads of 4 bytes, but many are under way.
void adamw_production(int) { adamw_gpu(&model, &adamw, STEP); }

static Version versions[] = {{"v1 the CPU loop, a launch for a tensor", adamw_v1, {128, 512}}, {"v2 one launch", adamw_v2, {128, 512}},
    {"v3 packs of 16 bytes", adamw_v3, {128, 512}}, {"train_qwen.cu: chunks", adamw_production}};

static void make_case(int V, int C, int L, int NH, int NKV, int HD, int I) {
    Config c = {V, C, L, NH, NKV, HD, I, 32, 1e6f, 1e-6f, true, true, true};
    free(model.table.list);
    model.config = c, model.table = tensor_table(&c), model.gpu = &gpu;
    size_t count = model.table.num_params;
    params = array_output("params", FLOATX, count), master = array_random("master", FLOAT, count, 1);
    ms = array_random("m", FLOAT, count, 1);
    vs = array_random("v", FLOAT, count, 1), grads = array_random("grads", FLOAT, count, 1);
    for (size_t i = 0; i < count; i++) vs.host[i] *= vs.host[i];                     // a mean of squares
    vs = array_of("v", FLOAT, count, vs.host);

    Border *list = (Border *)xcalloc(model.table.count, sizeof(Border));
    for (int t = 0; t < model.table.count; t++) list[t].begin = model.table.list[t].offset, list[t].decay = model.table.list[t].decay;
    borders = array_of("borders", INT, model.table.count * sizeof(Border) / sizeof(int), list);
    Chunk *pieces = make_chunks(&model.table, &gpu.num_chunks);
    chunks = array_of("chunks", INT, gpu.num_chunks * sizeof(Chunk) / sizeof(int), pieces);
    ResultGpu ready = {0, 1, GRAD_SCALE, true};
    result = array_of("result", INT, sizeof ready / sizeof(int), &ready);
    free(list), free(pieces);

    gpu.params_memory = sizeof(floatX) == 4 ? (floatX *)master.f : params.x, gpu.master = master.f;
    gpu.m_memory = ms.f, gpu.v_memory = vs.f;
    gpu.grads_memory = grads.f, gpu.chunks = (Chunk *)chunks.i, gpu.result = (ResultGpu *)result.i;
    model.params_memory = master.host, model.m_memory = ms.host, model.v_memory = vs.host, model.grads_memory = grads.host;
    adamw_step(&model, &adamw, GRAD_SCALE, STEP);
    memcpy(params.host, master.host, count * sizeof(float));
}

int main(void) {
    static const int sizes[][7] = {{5, 6, 1, 1, 1, 2, 3}, {11, 9, 2, 2, 1, 6, 7}, {700, 64, 2, 4, 2, 16, 72},
                                   {151936, 896, 4, 14, 2, 64, 4864}};
    for (int s = 0; bench_next(s, sizes); s++) {
        const int *n = sizes[s];
        make_case(n[0], n[1], n[2], n[3], n[4], n[5], n[6]);
        double bytes = (double)master.count * (sizeof(floatX) == 4 ? 32 : 34);
        Outputs outputs = {{&master, &ms, &vs, &grads, sizeof(floatX) == 4 ? NULL : &params}};
        bench("adamw", versions, bytes, 0, outputs);
    }
    return bench_close();
}
