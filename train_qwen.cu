// train_qwen.cu: trains Qwen language models on an NVIDIA GPU. The mirror of train_qwen.c, in bf16 or fp32.
//
//   make train_qwencu && ./train_qwencu                      everything train_qwen does, same options, same files, same output
//   make train_qwencu PRECISION=fp32                         fp32 throughout instead of bf16
//   make test_qwencu && ./test_qwencu                        checks this file against train_qwen.c, number by number
//
// Without nvcc, or with EMULATE=1, `make` builds the same programs for dev/emu, which runs every kernel below on the CPU.
//
// This file includes train_qwen.c, where the model, checkpoints, options and the training loop stand, and has the sections that
// compute once more, under the same numbers and names (a layer's launcher ends in _gpu, its kernel in _kernel):
//    3  the GPU: errors, 16-byte loads, sums, tensor cores, matrix multiplication by cuBLASLt
//    4  layers          5  activations          6  the model          7  AdamW          9  the machine
// Read train_qwen.c first; the comments here say only what is different on a GPU.
//
// What differs in the numbers: weights, activations and their gradients are floatX, bf16 by default. AdamW updates fp32 masters of the
// weights; parameter gradients, moments, softmax, norms and all sums are fp32. Nothing depends on the order in which blocks happen to run
// (no atomics), so two equal runs agree to the last bit.
//
// All work is queued on one stream. The host waits once an update, to read loss and norm.

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define QWEN_GPU
#define PROGRAM "train_qwencu"
#ifdef QWEN_FP32
#define PRECISION "fp32"
typedef float floatX;
#else
#define PRECISION "bf16"
typedef __nv_bfloat16 floatX;
#endif
#include "train_qwen.c"

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 3. The GPU: errors, loads, sums, tensor cores, matrix multiplication

#define cudaCheck(call)                                                                                                          \
    do {                                                                                                                         \
        cudaError_t error = (call);                                                                                              \
        if (error != cudaSuccess) DIE("%s: %s (%s)", #call, cudaGetErrorString(error), cudaGetErrorName(error));                 \
    } while (0)
#define cublasCheck(call)                                                                                                        \
    do {                                                                                                                         \
        cublasStatus_t status = (call);                                                                                          \
        if (status != CUBLAS_STATUS_SUCCESS) DIE("%s: cuBLASLt status %d", #call, (int)status);                                  \
    } while (0)

// After each launch. With -DQWEN_SYNC every kernel is waited for, so that an error names the launcher that caused it.
#ifdef QWEN_SYNC
#define checkLaunch() do { cudaCheck(cudaGetLastError()); cudaCheck(cudaStreamSynchronize(stream)); } while (0)
#else
#define checkLaunch() cudaCheck(cudaGetLastError())
#endif

static cudaStream_t stream;                                      // everything runs on it, in the order in which it is queued

enum {
    WARP = 32,
    WIDE = 16 / sizeof(floatX),  // elements in 16 bytes, the largest load of a thread
    PARTS = 256,                 // partial sums of a reduction over rows; fixed, so that results don't depend on the card
};

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> __host__ __device__ inline T from_float(float x);
template <> __host__ __device__ inline float from_float<float>(float x) { return x; }
template <> __host__ __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
__host__ __device__ inline floatX to_floatX(float x) { return from_float<floatX>(x); }

// W elements that a thread loads and stores at once: WIDE of them, or 1 where rows are not multiples of 16 bytes.
template <int W> struct alignas(W * sizeof(floatX)) Pack { floatX x[W]; };
template <int W> __device__ inline Pack<W> load_pack(const floatX *p) {
    Pack<W> pack;
    if constexpr (W == WIDE) *(uint4 *)&pack = *(const uint4 *)p;
    else pack = *(const Pack<W> *)p;
    return pack;
}
template <int W> __device__ inline void store_pack(floatX *p, const Pack<W> &pack) {
    if constexpr (W == WIDE) *(uint4 *)p = *(const uint4 *)&pack;
    else *(Pack<W> *)p = pack;
}

bool is_aligned(const void *p) { return (uintptr_t)p % 16 == 0; }

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
unsigned blocks_for(size_t threads, int block) {
    size_t blocks = (threads + (size_t)block - 1) / (size_t)block;
    CHECK(blocks <= INT32_MAX, "%zu threads are more than one launch can have; a smaller --batch or --seq helps", threads);
    return (unsigned)blocks;
}
// Threads of a block that shares out a row of `count` items: whole warps, at most `most`.
int row_threads(int count, int most) { return count >= most ? most : ceil_div(count, WARP) * WARP; }

// Sums and maxima over the 32 threads of a warp, over groups of `width` of them (a power of 2), and over a one-dimensional block of whole
// warps. Every thread gets the result.
__device__ inline float group_sum(float x, int width) {
    for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}
__device__ inline float warp_sum(float x) { return group_sum(x, WARP); }
__device__ inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
    return x;
}
__device__ inline float block_sum(float x) {
    __shared__ float parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? parts[lane] : 0.0f);
    __syncthreads();                                             // the next call writes parts again
    return x;
}
__device__ inline float block_max(float x) {
    __shared__ float parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? parts[lane] : -INFINITY);
    __syncthreads();
    return x;
}

// The instructions that C++ has no words for. A warp executes each of them together.
//    ldmatrix_xK          K matrices of 8 x 8 bf16 from shared memory: lane 8 j + i gives the address of row i of matrix j (16 bytes,
//                         aligned); register j of lane l receives row l / 4, columns 2 (l % 4) and + 1 of matrix j, or with _trans of its
//                         transpose
//    mma_m16n8k16         d (16, 8) += a (16, 16) b (16, 8), bf16 in, fp32 out. With g = lane / 4 and t = lane % 4 a lane holds
//                         d: [0], [1] row g, columns 2 t and + 1;  [2], [3] row g + 8
//                         a: [0] row g, columns 2 t and + 1;  [1] row g + 8;  [2], [3] the same 8 columns further
//                         b: [0] rows 2 t and + 1 of column g;  [1] 8 rows further
//    cp_async_16          16 bytes from global to shared memory, in the background; zeros if not valid. commit closes a group of copies;
//                         wait<n> waits until at most n of this thread's groups are under way
#ifdef CUDA_EMU
#include "ptx.h"
#else
__device__ inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void cp_async_16(void *to_shared, const void *from_global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to_shared)), "l"(from_global), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void cp_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void cp_async_wait(void) { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
#endif

// Matrix multiplication. cuBLASLt thinks in columns: our row-major (rows, cols) is its column-major (cols, rows). A plan says how one shape
// is multiplied; making one takes the library a while, so plans are kept.
typedef struct {
    int M, N, K, a_transposed, b_transposed, has_bias, adds, fp32_out;      // all int: no gaps, so that memcmp may compare
    int alignment;                                               // bytes, of the least aligned operand
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulHeuristicResult_t chosen;
} GemmPlan;

static cublasLtHandle_t cublaslt;
static void *cublaslt_workspace;
enum { WORKSPACE_BYTES = 32 << 20 };                             // what NVIDIA recommends for Hopper

void gemm_plan_make(GemmPlan *p, int lda, int ldb, int ldd) {
    const cudaDataType_t in_type = sizeof(floatX) == 4 ? CUDA_R_32F : CUDA_R_16BF, out_type = p->fp32_out ? CUDA_R_32F : in_type;
    const cublasOperation_t transpose = CUBLAS_OP_T;
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    cublasCheck(cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    if (p->a_transposed)
        cublasCheck(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose));
    if (p->b_transposed)
        cublasCheck(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &transpose, sizeof transpose));
    if (p->has_bias) {                                           // the choice below depends on the alignment of the bias that is set now
        const void *as_aligned = (void *)(uintptr_t)p->alignment;
        cublasCheck(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
        cublasCheck(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &as_aligned, sizeof as_aligned));
    }
    uint64_t a_rows = (uint64_t)(p->a_transposed ? p->K : p->M), a_cols = (uint64_t)(p->a_transposed ? p->M : p->K);
    uint64_t b_rows = (uint64_t)(p->b_transposed ? p->N : p->K), b_cols = (uint64_t)(p->b_transposed ? p->K : p->N);
    cublasCheck(cublasLtMatrixLayoutCreate(&p->a, in_type, a_rows, a_cols, lda));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->b, in_type, b_rows, b_cols, ldb));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->d, out_type, (uint64_t)p->M, (uint64_t)p->N, ldd));
    cublasLtMatmulPreference_t preference;
    const size_t workspace = WORKSPACE_BYTES;
    const uint32_t alignment = (uint32_t)p->alignment;
    const uint32_t fp32_sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;                         // of parts, where K is split
    cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &fp32_sums,
                                                     sizeof fp32_sums));
    const cublasLtMatmulPreferenceAttributes_t operands[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; i++)
        cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, operands[i], &alignment, sizeof alignment));
    int found = 0;
    cublasCheck(cublasLtMatmulAlgoGetHeuristic(cublaslt, p->operation, p->a, p->b, p->d, p->d, preference, 1, &p->chosen, &found));
    CHECK(found > 0, "cuBLASLt has no way to multiply (%d, %d) by (%d, %d) in " PRECISION "; sizes that are multiples of 8 are safest",
          p->M, p->K, p->K, p->N);
    cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
}

// In cuBLASLt's columns: D (M, N) = A (M, K) B (K, N) [+ C] [+ bias], where C may be D itself. A and B as stored, or transposed. bias: one
// number for each row of D. D and C are floatX or float, everything else is floatX.
void gemm_gpu(void *D, const void *C, const floatX *A, bool a_transposed, const floatX *B, bool b_transposed, const floatX *bias,
              int M, int N, int K, bool fp32_out) {
    static GemmPlan *plans;
    static int count;
    uintptr_t addresses = (uintptr_t)D | (uintptr_t)C | (uintptr_t)A | (uintptr_t)B | (uintptr_t)bias | 256;
    GemmPlan wanted = {M, N, K, a_transposed, b_transposed, bias != NULL, C != NULL, fp32_out, (int)(addresses & (~addresses + 1)),
                       NULL, NULL, NULL, NULL, {}};
    GemmPlan *p = NULL;
    for (int i = 0; i < count && !p; i++)
        if (memcmp(&plans[i], &wanted, offsetof(GemmPlan, operation)) == 0) p = &plans[i];
    if (!p) {
        plans = (GemmPlan *)xrealloc(plans, (size_t)(count + 1) * sizeof(GemmPlan));
        p = &plans[count++];
        memcpy(p, &wanted, sizeof wanted);
        gemm_plan_make(p, a_transposed ? K : M, b_transposed ? N : K, M);
    }
    if (bias) cublasCheck(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    const float alpha = 1, beta = C ? 1 : 0;
    cublasCheck(cublasLtMatmul(cublaslt, p->operation, &alpha, A, p->a, B, p->b, &beta, C ? C : D, p->d, D, p->d, &p->chosen.algo,
                               cublaslt_workspace, WORKSPACE_BYTES, stream));
}

// Copies between host and device, in the order of the stream. (A plain cudaMemcpy may return before its last bytes are on the
// device, and our stream does not wait for it.)
void to_device(void *device, const void *host, size_t bytes) {
    cudaCheck(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream));
}
void to_host(void *host, const void *device, size_t bytes) {
    cudaCheck(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream));
    cudaCheck(cudaStreamSynchronize(stream));
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 4. Layers, forward and backward
//
// What a layer computes stands at the function of train_qwen.c. Most of them only read and write a few arrays: their cost is the bytes
// they move, which the comments count in floatX elements for each row.

// out[c] += the sum of partials (parts, columns) over parts, in a fixed order: threadIdx.y sums every 8th, then their 8 sums are added.
__global__ void sum_partials_kernel(float *out, const float *partials, int parts, int columns) {
    __shared__ float sums[8][WARP];
    int c = blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    for (int part = threadIdx.y; c < columns && part < parts; part += 8) sum += partials[(size_t)part * columns + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= columns) return;
    for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
    out[c] += sum;
}
void sum_partials_gpu(float *out, const float *partials, int parts, int columns) {
    sum_partials_kernel<<<ceil_div(columns, WARP), dim3(WARP, 8), 0, stream>>>(out, partials, parts, columns);
    checkLaunch();
}

// A thread copies one pack. Moves 2 C elements a row.
template <int W> __global__ void embedding_forward_kernel(floatX *out, const int *tokens, const floatX *wte, int N, int C) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W, n = i / C;
    if (n < N) store_pack<W>(out + i, load_pack<W>(wte + (size_t)tokens[n] * C + i % C));
}
void embedding_forward_gpu(floatX *out, const int *tokens, const floatX *wte, int N, int C) {
    bool wide = C % WIDE == 0 && is_aligned(wte);
    auto kernel = wide ? embedding_forward_kernel<WIDE> : embedding_forward_kernel<1>;
    kernel<<<blocks_for((size_t)N * C / (wide ? WIDE : 1), 256), 256, 0, stream>>>(out, tokens, wte, N, C);
    checkLaunch();
}

// A token may stand in many rows, and sums of unordered atomics would differ from run to run. So the host sorts the rows by token (order:
// rows, equal tokens side by side, see upload_batch); the block of a token's first row adds up all of its rows.
__global__ void embedding_backward_kernel(float *dwte, const floatX *dout, const int *order, const int *tokens, int N, int C) {
    int first = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x, token = tokens[order[first]];
    if (c >= C || (first > 0 && tokens[order[first - 1]] == token)) return;
    float sum = 0;
    for (int i = first; i < N && tokens[order[i]] == token; i++) sum += to_float(dout[(size_t)order[i] * C + c]);
    dwte[(size_t)token * C + c] += sum;
}
void embedding_backward_gpu(float *dwte, const floatX *dout, const int *order, const int *tokens, int N, int C) {
    int threads = row_threads(C, 256);
    embedding_backward_kernel<<<dim3(N, ceil_div(C, threads)), threads, 0, stream>>>(dwte, dout, order, tokens, N, C);
    checkLaunch();
}

// A warp takes a row, and reads it a second time from the L1 cache. Moves 2 C elements a row.
template <int W>
__global__ void rmsnorm_forward_kernel(floatX *out, float *rstd, const floatX *inp, const floatX *weight, int N, int C, float eps) {
    int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) return;
    const floatX *x = inp + (size_t)n * C;
    float sum = 0;
    for (int c = threadIdx.x * W; c < C; c += WARP * W) {
        Pack<W> px = load_pack<W>(x + c);
        for (int i = 0; i < W; i++) sum += to_float(px.x[i]) * to_float(px.x[i]);
    }
    float r = 1.0f / sqrtf(warp_sum(sum) / C + eps);
    for (int c = threadIdx.x * W; c < C; c += WARP * W) {
        Pack<W> px = load_pack<W>(x + c), pw = load_pack<W>(weight + c), y;
        for (int i = 0; i < W; i++) y.x[i] = to_floatX(to_float(px.x[i]) * r * to_float(pw.x[i]));
        store_pack<W>(out + (size_t)n * C + c, y);
    }
    if (threadIdx.x == 0) rstd[n] = r;
}
void rmsnorm_forward_gpu(floatX *out, float *rstd, const floatX *inp, const floatX *weight, int N, int C, float eps) {
    auto kernel = C % WIDE == 0 && is_aligned(weight) ? rmsnorm_forward_kernel<WIDE> : rmsnorm_forward_kernel<1>;
    kernel<<<ceil_div(N, 4), dim3(WARP, 4), 0, stream>>>(out, rstd, inp, weight, N, C, eps);
    checkLaunch();
}

// A block takes every PARTS-th row. Each thread owns some columns in all of them, so it can keep their sums for dweight in shared memory
// without waiting for others; they end in partials (PARTS, C). Moves 3 C elements a row, 4 C with ACCUMULATE.
template <int W>
__global__ void rmsnorm_backward_kernel(floatX *dinp, float *partials, const floatX *dout, const floatX *inp, const floatX *weight,
                                        const float *rstd, int N, int C, WriteMode mode) {
    extern __shared__ float sums[];
    int first = threadIdx.x * W, step = blockDim.x * W;
    for (int c = first; c < C; c += step)
        for (int i = 0; i < W; i++) sums[c + i] = 0;
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        const floatX *dy = dout + (size_t)n * C, *x = inp + (size_t)n * C;
        floatX *dx = dinp + (size_t)n * C;
        float sum = 0, r = rstd[n];
        for (int c = first; c < C; c += step) {
            Pack<W> pd = load_pack<W>(dy + c), px = load_pack<W>(x + c), pw = load_pack<W>(weight + c);
            for (int i = 0; i < W; i++) sum += to_float(pw.x[i]) * to_float(pd.x[i]) * to_float(px.x[i]);
        }
        float back = block_sum(sum) / C * r * r * r;
        for (int c = first; c < C; c += step) {
            Pack<W> pd = load_pack<W>(dy + c), px = load_pack<W>(x + c), pw = load_pack<W>(weight + c), old;
            if (mode == ACCUMULATE) old = load_pack<W>(dx + c);
            for (int i = 0; i < W; i++) {
                float d = to_float(pd.x[i]), v = to_float(px.x[i]), out = to_float(pw.x[i]) * d * r - v * back;
                old.x[i] = to_floatX(mode == ACCUMULATE ? to_float(old.x[i]) + out : out);
                sums[c + i] += d * v * r;
            }
            store_pack<W>(dx + c, old);
        }
    }
    for (int c = first; c < C; c += step)
        for (int i = 0; i < W; i++) partials[(size_t)blockIdx.x * C + c + i] = sums[c + i];
}
void rmsnorm_backward_gpu(floatX *dinp, float *dweight, const floatX *dout, const floatX *inp, const floatX *weight, const float *rstd,
                          float *scratch, int N, int C, WriteMode mode) {
    bool wide = C % WIDE == 0 && is_aligned(weight);
    int parts = N < PARTS ? N : PARTS, threads = row_threads(wide ? C / WIDE : C, 256);
    CHECK(C <= 12000, "RMSNorm's backward keeps %d sums in shared memory; there is room for 12000", C);
    auto kernel = wide ? rmsnorm_backward_kernel<WIDE> : rmsnorm_backward_kernel<1>;
    kernel<<<parts, threads, sizeof(float) * (size_t)C, stream>>>(dinp, scratch, dout, inp, weight, rstd, N, C, mode);
    checkLaunch();
    sum_partials_gpu(dweight, scratch, parts, C);
}

// out (N, OC) = [residual +] inp (N, C) weight (OC, C)^T [+ bias (OC)]. The residual is added to the sum in fp32, in the multiplication's
// last step: this saves a kernel and a rounding.
void matmul_forward_gpu(floatX *out, const floatX *residual, const floatX *inp, const floatX *weight, const floatX *bias,
                        int N, int C, int OC) {
    gemm_gpu(out, residual, weight, true, inp, false, bias, OC, N, C, sizeof(floatX) == 4);
}

// partials (PARTS, OC): sums of the columns of dout over every PARTS-th row
__global__ void column_sums_kernel(float *partials, const floatX *dout, int N, int OC) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0;
    if (c >= OC) return;
    for (int n = blockIdx.y; n < N; n += gridDim.y) sum += to_float(dout[(size_t)n * OC + c]);
    partials[(size_t)blockIdx.y * OC + c] = sum;
}
// dinp (N, C) = dout weight;  dweight (OC, C) += dout^T inp;  dbias += column sums of dout, where they are there
void matmul_backward_gpu(floatX *dinp, float *dweight, float *dbias, const floatX *dout, const floatX *inp, const floatX *weight,
                         float *scratch, int N, int C, int OC) {
    gemm_gpu(dinp, NULL, weight, false, dout, false, NULL, C, N, OC, sizeof(floatX) == 4);
    if (dweight) gemm_gpu(dweight, dweight, inp, false, dout, true, NULL, C, OC, N, true);
    if (!dbias) return;
    int parts = N < PARTS ? N : PARTS, threads = row_threads(OC, 128);
    column_sums_kernel<<<dim3(ceil_div(OC, threads), parts), threads, 0, stream>>>(scratch, dout, N, OC);
    checkLaunch();
    sum_partials_gpu(dbias, scratch, parts, OC);
}

// QK-norm and RoPE in one pass over the query and key heads of qkv (N, QKV): qk[head] = rope(rmsnorm(qkv[head]) * weight). Without QK-norm
// (q_norm NULL) it is RoPE alone, in place: qk is qkv. A group of lanes takes a head, a lane takes W channels of its first half and their
// partners in the second half. Position of row n: past + t - start[n], or past + t where start is NULL.
// Moves 2 (NH + NKV) HD elements a row. rstd (N, NH + NKV).
template <int W>
__global__ void qknorm_rope_forward_kernel(floatX *qk, float *rstd, const floatX *qkv, const floatX *q_norm, const floatX *k_norm,
                                           const float *table, const int *start, int past, int N, int T, int NH, int NKV, int HD,
                                           float eps, int lanes) {
    int heads = NH + NKV, half = HD / 2, lane = threadIdx.x % lanes;
    size_t vector = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    bool valid = vector < (size_t)N * heads;                     // lanes without a head go along for the shuffles
    int n = valid ? (int)(vector / heads) : 0, h = valid ? (int)(vector % heads) : 0;
    size_t at = (size_t)n * (heads + NKV) * HD + (size_t)h * HD;
    const float *angles = table + (size_t)(past + n % T - (start ? start[n] : 0)) * HD;
    const floatX *x = qkv + at, *weight = q_norm ? (h < NH ? q_norm : k_norm) : NULL;
    float r = 1;
    if (weight) {
        float sum = 0;
        for (int i = lane * W; i < half; i += lanes * W) {
            Pack<W> a = load_pack<W>(x + i), b = load_pack<W>(x + half + i);
            for (int j = 0; j < W; j++) sum += to_float(a.x[j]) * to_float(a.x[j]) + to_float(b.x[j]) * to_float(b.x[j]);
        }
        r = 1.0f / sqrtf(group_sum(sum, lanes) / HD + eps);
        if (lane == 0 && valid) rstd[vector] = r;
    }
    for (int i = lane * W; valid && i < half; i += lanes * W) {
        Pack<W> a = load_pack<W>(x + i), b = load_pack<W>(x + half + i);
        for (int j = 0; j < W; j++) {
            float a0 = to_float(a.x[j]) * r, b0 = to_float(b.x[j]) * r, c = angles[2 * (i + j)], s = angles[2 * (i + j) + 1];
            if (weight) a0 *= to_float(weight[i + j]), b0 *= to_float(weight[half + i + j]);
            a.x[j] = to_floatX(a0 * c - b0 * s);
            b.x[j] = to_floatX(b0 * c + a0 * s);
        }
        store_pack<W>(qk + at + i, a), store_pack<W>(qk + at + half + i, b);
    }
}

// How many lanes share a head: with packs exactly as many as half a head has packs, if that is a power of 2.
bool head_is_wide(int HD) { int packs = HD / 2 / WIDE; return HD % (2 * WIDE) == 0 && packs <= WARP && (packs & (packs - 1)) == 0; }

void qknorm_rope_forward_gpu(floatX *qk, float *rstd, const floatX *qkv, const floatX *q_norm, const floatX *k_norm, const float *table,
                             const int *start, int past, int N, int T, int NH, int NKV, int HD, float eps) {
    int wide = head_is_wide(HD), lanes = wide ? HD / 2 / WIDE : WARP;
    unsigned blocks = blocks_for((size_t)N * (NH + NKV) * lanes, 128);
    auto kernel = wide ? qknorm_rope_forward_kernel<WIDE> : qknorm_rope_forward_kernel<1>;
    kernel<<<blocks, 128, 0, stream>>>(qk, rstd, qkv, q_norm, k_norm, table, start, past, N, T, NH, NKV, HD, eps, lanes);
    checkLaunch();
}

// In place on the query and key heads of dqkv: gradients of qk -> gradients of qkv. A block takes every PARTS-th row (one row without
// QK-norm, which needs no sums over rows), each group of its lanes every so many heads. A lane owns the same channels in all of them, so it
// can keep their sums for dq_norm and dk_norm in its group's place in shared memory, sums (groups, 2, HD); they end in partials
// (PARTS, 2 HD). Moves 2 (NH + NKV) HD elements a row, 3 with QK-norm.
template <int W>
__global__ void qknorm_rope_backward_kernel(floatX *dqkv, float *partials, const floatX *qkv, const float *rstd, const floatX *q_norm,
                                            const floatX *k_norm, const float *table, const int *start, int N, int T, int NH,
                                            int NKV, int HD, int lanes) {
    extern __shared__ float sums[];
    int heads = NH + NKV, half = HD / 2, lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    int rounds = (heads + groups - 1) / groups;                  // the same for all lanes of a warp, because of the shuffles
    float *mine = sums + (size_t)group * 2 * HD;
    for (int i = lane * W; q_norm && i < half; i += lanes * W)
        for (int j = 0; j < W; j++)
            for (int part = 0; part < 4; part++) mine[part * half + i + j] = 0;
    for (int n = blockIdx.x; n < N; n += gridDim.x)
        for (int round = 0; round < rounds; round++) {
            int h = round * groups + group;
            bool valid = h < heads;
            if (!valid) h = 0;
            size_t at = (size_t)n * (heads + NKV) * HD + (size_t)h * HD;
            const float *angles = table + (size_t)(n % T - start[n]) * HD;
            const floatX *x = qkv + at, *weight = h < NH ? q_norm : k_norm;
            float *to = mine + (h < NH ? 0 : HD), sum = 0, r = q_norm ? rstd[(size_t)n * heads + h] : 1;
            for (int i = lane * W; valid && i < half; i += lanes * W) {                      // RoPE, and the sum of the norm's backward
                Pack<W> a = load_pack<W>(dqkv + at + i), b = load_pack<W>(dqkv + at + half + i);
                for (int j = 0; j < W; j++) {
                    float a0 = to_float(a.x[j]), b0 = to_float(b.x[j]), c = angles[2 * (i + j)], s = angles[2 * (i + j) + 1];
                    float da = a0 * c + b0 * s, db = b0 * c - a0 * s;
                    if (q_norm) {
                        float xa = to_float(x[i + j]), xb = to_float(x[half + i + j]);
                        to[i + j] += da * xa * r, to[half + i + j] += db * xb * r;
                        da *= to_float(weight[i + j]), db *= to_float(weight[half + i + j]);
                        sum += da * xa + db * xb;
                    }
                    a.x[j] = to_floatX(da), b.x[j] = to_floatX(db);
                }
                store_pack<W>(dqkv + at + i, a), store_pack<W>(dqkv + at + half + i, b);
            }
            if (!q_norm) continue;
            float back = group_sum(sum, lanes) / HD * r * r * r;
            for (int i = lane * W; valid && i < half; i += lanes * W) {                      // dqkv holds weight * dout by now
                Pack<W> a = load_pack<W>(dqkv + at + i), b = load_pack<W>(dqkv + at + half + i);
                for (int j = 0; j < W; j++) {
                    a.x[j] = to_floatX(to_float(a.x[j]) * r - to_float(x[i + j]) * back);
                    b.x[j] = to_floatX(to_float(b.x[j]) * r - to_float(x[half + i + j]) * back);
                }
                store_pack<W>(dqkv + at + i, a), store_pack<W>(dqkv + at + half + i, b);
            }
        }
    if (!q_norm) return;
    __syncthreads();
    for (int c = threadIdx.x; c < 2 * HD; c += blockDim.x) {
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += sums[(size_t)g * 2 * HD + c];
        partials[(size_t)blockIdx.x * 2 * HD + c] = sum;
    }
}
void qknorm_rope_backward_gpu(floatX *dqkv, float *dq_norm, float *dk_norm, const floatX *qkv, const float *rstd, const floatX *q_norm,
                              const floatX *k_norm, const float *table, const int *start, float *scratch, int N, int T, int NH, int NKV,
                              int HD) {
    int wide = head_is_wide(HD), lanes = wide ? HD / 2 / WIDE : WARP, parts = N < PARTS || !q_norm ? N : PARTS;
    size_t shared = q_norm ? sizeof(float) * (size_t)(128 / lanes) * 2 * (size_t)HD : 0;
    assert(dk_norm == dq_norm + (dq_norm ? HD : 0));             // neighbours in memory, so one sum serves both
    auto kernel = wide ? qknorm_rope_backward_kernel<WIDE> : qknorm_rope_backward_kernel<1>;
    kernel<<<parts, 128, shared, stream>>>(dqkv, scratch, qkv, rstd, q_norm, k_norm, table, start, N, T, NH, NKV, HD, lanes);
    checkLaunch();
    if (q_norm) sum_partials_gpu(dq_norm, scratch, parts, 2 * HD);
}

// Causal attention with grouped heads, as in train_qwen.c: for query position i and the visible keys j of its document
//    p_ij = softmax_j(q_i . k_j / sqrt(HD)),   att_i = sum_j p_ij v_j,   lse_i = log(sum_j exp(q_i . k_j / sqrt(HD)))
// Scores never reach memory. Keys come a tile at a time, and the softmax is made online: each row keeps the largest score so far and
// the sum of exp(score - largest); when a larger one comes, what was summed before is multiplied by exp(old largest - new largest).
// The backward makes p again from lse:
//    dv_j = sum_i p_ij datt_i      dp_ij = datt_i . v_j      dscore_ij = p_ij (dp_ij - delta_i) / sqrt(HD),   delta_i = datt_i . att_i
//    dq_i = sum_j dscore_ij k_j    dk_j = sum_i dscore_ij q_i
// in two kernels, one that owns queries (dq) and one that owns keys (dk, dv). Scores are made twice, seven products instead of five,
// but every sum has one owner and one order: no atomics, so equal runs give equal bits.
//
// Which keys a query sees: batch row b holds `past` earlier positions (of generation; 0 in training) and T queries, query t being
// position past + t. It sees keys start[b, t] .. past + t; start (NULL: all 0) is the first position of the query's document, so it
// never decreases along a row. Hence the queries that see key j are an interval too: j .. queries_end(...) - 1.
//
// Each kernel comes twice: `rows`, one warp for one row, for any type and any HD up to 256, plain; `tiles`, four warps for 64
// rows with tensor cores, for bf16 and HD 32, 64 or 128.

// The first query after those that see key j, given start of this batch row.
__device__ int queries_end(const int *start, int T, int j) {
    int low = j + 1, high = T;
    if (!start) return T;
    while (low < high) {
        int middle = (low + high) / 2;
        if (start[middle] <= j) low = middle + 1;
        else high = middle;
    }
    return low;
}

// ---- one warp for one row. In turn, lanes are 32 keys (or queries), each with a score of its own, and 32 channels.
const int ROW_WARPS = 4, MAX_HEAD = 256, LANE_CHANNELS = MAX_HEAD / WARP;

// The row that this warp owns, where all of its lanes can read all of it.
__device__ void share_row(float *to, const floatX *from, int HD) {
    for (int c = threadIdx.x % WARP; c < HD; c += WARP) to[c] = to_float(from[c]);
    __syncwarp();
}

__device__ float dot_row(const float *a, const floatX *b, int HD) {
    float sum = 0;
    for (int c = 0; c < HD; c++) sum += a[c] * to_float(b[c]);
    return sum;
}

// sums[i] += sum_j weights[j] rows[j][channel lane + 32 i]
__device__ void add_rows(float (&sums)[LANE_CHANNELS], const float *weights, const floatX *rows, size_t stride, int count, int HD) {
    #pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        int c = threadIdx.x % WARP + i * WARP;
        if (c < HD) for (int j = 0; j < count; j++) sums[i] += weights[j] * to_float(rows[j * stride + c]);
    }
}

__device__ void write_row(floatX *to, const float (&sums)[LANE_CHANNELS], float scale, int HD) {
    #pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
        int c = threadIdx.x % WARP + i * WARP;
        if (c < HD) to[c] = to_floatX(sums[i] * scale);
    }
}

__global__ void attention_forward_rows_kernel(floatX *att, float *lse, const floatX *q, const floatX *k, const floatX *v,
                                              const int *start, int T, int past, int NH, int NKV, int HD, int q_stride, int kv_stride) {
    __shared__ float q_rows[ROW_WARPS][MAX_HEAD];
    __shared__ float weights[ROW_WARPS][WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int t = blockIdx.x * ROW_WARPS + warp, h = blockIdx.y, b = blockIdx.z;
    if (t >= T) return;                                          // the whole warp; warps do not wait for each other
    size_t row = (size_t)b * T + t, kv = (size_t)b * (past + T) * kv_stride + h / (NH / NKV) * HD;
    share_row(q_rows[warp], q + row * q_stride + h * HD, HD);
    float scale = 1.0f / sqrtf((float)HD), largest = -INFINITY, sum = 0, out[LANE_CHANNELS] = {};
    for (int j0 = start ? start[row] : 0; j0 <= past + t; j0 += WARP) {
        int j = j0 + lane, count = min(WARP, past + t + 1 - j0);
        float score = lane < count ? scale * dot_row(q_rows[warp], k + kv + (size_t)j * kv_stride, HD) : -INFINITY;
        float new_largest = fmaxf(largest, warp_max(score)), rescale = expf(largest - new_largest);
        float p = expf(score - new_largest);
        weights[warp][lane] = p;
        __syncwarp();
        sum = sum * rescale + p;
        #pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) out[i] *= rescale;
        add_rows(out, weights[warp], v + kv + (size_t)j0 * kv_stride, kv_stride, count, HD);
        __syncwarp();
        largest = new_largest;
    }
    sum = warp_sum(sum);
    write_row(att + row * NH * HD + h * HD, out, 1.0f / sum, HD);
    if (lse && lane == 0) lse[((size_t)b * NH + h) * T + t] = largest + logf(sum);
}

// dq and delta of one query.
__global__ void attention_dq_rows_kernel(floatX *dq, float *delta, const floatX *datt, const floatX *att, const float *lse,
                                         const floatX *q, const floatX *k, const floatX *v, const int *start,
                                         int T, int NH, int NKV, int HD, int stride) {
    __shared__ float q_rows[ROW_WARPS][MAX_HEAD];
    __shared__ float datt_rows[ROW_WARPS][MAX_HEAD];
    __shared__ float weights[ROW_WARPS][WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int t = blockIdx.x * ROW_WARPS + warp, h = blockIdx.y, b = blockIdx.z;
    if (t >= T) return;
    size_t row = (size_t)b * T + t, kv = (size_t)b * T * stride + h / (NH / NKV) * HD, out_row = row * NH * HD + h * HD;
    size_t statistic = ((size_t)b * NH + h) * T + t;
    share_row(q_rows[warp], q + row * stride + h * HD, HD);
    share_row(datt_rows[warp], datt + out_row, HD);
    float back = 0;
    for (int c = lane; c < HD; c += WARP) back += datt_rows[warp][c] * to_float(att[out_row + c]);
    back = warp_sum(back);
    if (lane == 0) delta[statistic] = back;
    float scale = 1.0f / sqrtf((float)HD), dquery[LANE_CHANNELS] = {};
    for (int j0 = start ? start[row] : 0; j0 <= t; j0 += WARP) {
        int count = min(WARP, t + 1 - j0);
        size_t key = kv + (size_t)(j0 + lane) * stride;
        if (lane < count) {
            float p = expf(scale * dot_row(q_rows[warp], k + key, HD) - lse[statistic]);
            weights[warp][lane] = p * (dot_row(datt_rows[warp], v + key, HD) - back);
        }
        __syncwarp();
        add_rows(dquery, weights[warp], k + kv + (size_t)j0 * stride, stride, count, HD);
        __syncwarp();
    }
    write_row(dq + row * stride + h * HD, dquery, scale, HD);
}

// dk and dv of one key: all queries of its group of heads that see it.
__global__ void attention_dkv_rows_kernel(floatX *dk, floatX *dv, const floatX *datt, const float *lse, const float *delta,
                                          const floatX *q, const floatX *k, const floatX *v, const int *start,
                                          int T, int NH, int NKV, int HD, int stride) {
    __shared__ float k_rows[ROW_WARPS][MAX_HEAD];
    __shared__ float v_rows[ROW_WARPS][MAX_HEAD];
    __shared__ float weights[ROW_WARPS][WARP];
    __shared__ float dscores[ROW_WARPS][WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = NH / NKV;
    int j = blockIdx.x * ROW_WARPS + warp, g = blockIdx.y, b = blockIdx.z;
    if (j >= T) return;
    size_t kv = ((size_t)b * T + j) * stride + g * HD;
    share_row(k_rows[warp], k + kv, HD);
    share_row(v_rows[warp], v + kv, HD);
    float scale = 1.0f / sqrtf((float)HD), dkey[LANE_CHANNELS] = {}, dvalue[LANE_CHANNELS] = {};
    int end = queries_end(start ? start + (size_t)b * T : NULL, T, j);
    for (int h = g * group; h < (g + 1) * group; h++)
        for (int t0 = j; t0 < end; t0 += WARP) {
            int t = t0 + lane, count = min(WARP, end - t0);
            size_t row = (size_t)b * T + t, row0 = (size_t)b * T + t0, statistic = ((size_t)b * NH + h) * T + t;
            if (lane < count) {
                float p = expf(scale * dot_row(k_rows[warp], q + row * stride + h * HD, HD) - lse[statistic]);
                weights[warp][lane] = p;
                dscores[warp][lane] = p * (dot_row(v_rows[warp], datt + (row * NH + h) * HD, HD) - delta[statistic]);
            }
            __syncwarp();
            add_rows(dvalue, weights[warp], datt + (row0 * NH + h) * HD, (size_t)NH * HD, count, HD);
            add_rows(dkey, dscores[warp], q + row0 * stride + h * HD, stride, count, HD);
            __syncwarp();
        }
    write_row(dk + kv, dkey, scale, HD);
    write_row(dv + kv, dvalue, 1.0f, HD);
}

#ifndef QWEN_FP32
// ---- tiles of 64 rows: four warps, 16 rows a warp, products on tensor cores.
// mma_m16n8k16 is D (16, 8) += A (16, 16) B (16, 8) by one warp, the matrices spread over its lanes. With g = lane / 4, t = lane % 4,
// a lane holds (a and b are registers of two bf16 that are neighbours along the summed dimension, d are floats):
//
//    A       k = 2t,2t+1   2t+8,2t+9        B          column g        D        column 2t   2t+1
//    row g       a[0]         a[2]          k = 2t,2t+1    b[0]        row g       d[0]     d[1]
//    row g+8     a[1]         a[3]          k = 2t+8,2t+9  b[1]        row g+8     d[2]     d[3]
//
// Two facts carry all that follows. (1) Two D side by side are spread like one A: d[0], d[1] of the left one are its a[0], d[2], d[3]
// its a[1], the right one gives a[2], a[3]. So scores, rounded to bf16, enter the next product without leaving their registers.
// (2) ldmatrix gives lane (g, t) elements 2t, 2t+1 of row g of an 8x8 matrix in shared memory, for four matrices at once. Rows of
// memory can so be rows of A or columns of B; with _trans, rows of memory are rows of B.
// Arrays of fragments: a[k] is A's columns 16 k .. 16 k + 15, d[n] is D's columns 8 n .. 8 n + 7.
//
// A row of a tile in shared memory is HD + 8 elements long: 16-byte pieces of 8 consecutive rows then lie in 8 different groups of banks.
const int TILE = 64, TILE_THREADS = 128;
__host__ __device__ constexpr int tile_size(int rows, int HD) { return rows * (HD + 8); }

// Starts to copy ROWS rows into a tile. Only the first `valid` of them exist, the others become zeros.
template <int HD, int ROWS>
__device__ void fetch_tile(floatX *tile, const floatX *from, int stride, int valid) {
    #pragma unroll 2
    for (int i = 0; i < ROWS * (HD / 8) / TILE_THREADS; i++) {
        int piece = i * TILE_THREADS + threadIdx.x, row = piece / (HD / 8), c = piece % (HD / 8) * 8;
        bool exists = row < valid;
        cp_async_16(tile + tile_size(row, HD) + c, from + (exists ? (size_t)row * stride + c : 0), exists);
    }
}

// Two bf16 in one register, the lower in front.
__device__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
__device__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// 16 rows as A, from a tile.
template <int K16>
__device__ void load_a(uint32_t (&a)[K16][4], const floatX *rows) {
    int lane = threadIdx.x % WARP;
    #pragma unroll
    for (int k = 0; k < K16; k++) ldmatrix_x4(a[k], rows + tile_size(lane % 16, K16 * 16) + k * 16 + lane / 16 * 8);
}

// 16 rows as A, from global memory; only the first `valid` of them exist, the others are zeros.
template <int K16>
__device__ void load_a(uint32_t (&a)[K16][4], const floatX *rows, int stride, int valid) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    #pragma unroll
    for (int i = 0; i < K16 * 4; i++) {
        int row = g + i % 2 * 8, c = i / 2 * 8 + 2 * t;
        a[i / 4][i % 4] = row < valid ? *(const uint32_t *)(rows + (size_t)row * stride + c) : 0;
    }
}

// Writes 16 rows, of which only the first `valid` exist: row g of d times scale, row g + 8 times scale_8.
template <int HD8>
__device__ void write_d(floatX *rows, int stride, const float (&d)[HD8][4], float scale, float scale_8, int valid) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    #pragma unroll
    for (int n = 0; n < HD8; n++) {
        floatX *to = rows + (size_t)g * stride + n * 8 + 2 * t;
        if (g < valid) *(uint32_t *)to = pack_bf16(d[n][0] * scale, d[n][1] * scale);
        if (g + 8 < valid) *(uint32_t *)(to + (size_t)8 * stride) = pack_bf16(d[n][2] * scale_8, d[n][3] * scale_8);
    }
}

// d (16, 8 N8) += a (16, HD) tile^T, the tile having 8 N8 rows
template <int N8, int K16>
__device__ void multiply_transposed(float (&d)[N8][4], const uint32_t (&a)[K16][4], const floatX *tile) {
    int lane = threadIdx.x % WARP;
    #pragma unroll
    for (int k = 0; k < K16; k++)
        #pragma unroll
        for (int n = 0; n < N8; n += 2) {
            uint32_t b[4];                                       // k 0-7 and 8-15 of rows 0-7, then the same of rows 8-15
            ldmatrix_x4(b, tile + tile_size(n * 8 + lane / 16 * 8 + lane % 8, K16 * 16) + k * 16 + lane / 8 % 2 * 8);
            mma_m16n8k16(d[n], a[k], {b[0], b[1]});
            mma_m16n8k16(d[n + 1], a[k], {b[2], b[3]});
        }
}

// d (16, HD) += s (16, 8 K8) tile, the tile having 8 K8 rows; s is a D of before, by fact (1)
template <int HD8, int K8>
__device__ void multiply(float (&d)[HD8][4], const float (&s)[K8][4], const floatX *tile) {
    int lane = threadIdx.x % WARP;
    #pragma unroll
    for (int k = 0; k < K8; k += 2) {
        const uint32_t a[4] = {pack_bf16(s[k][0], s[k][1]), pack_bf16(s[k][2], s[k][3]),
                               pack_bf16(s[k + 1][0], s[k + 1][1]), pack_bf16(s[k + 1][2], s[k + 1][3])};
        #pragma unroll
        for (int n = 0; n < HD8; n += 2) {
            uint32_t b[4];                                       // rows 0-7 and 8-15 of channels 0-7, then of channels 8-15
            ldmatrix_x4_trans(b, tile + tile_size(k * 8 + lane % 16, HD8 * 8) + n * 8 + lane / 16 * 8);
            mma_m16n8k16(d[n], a, {b[0], b[1]});
            mma_m16n8k16(d[n + 1], a, {b[2], b[3]});
        }
    }
}

// Scores that a lane's two rows of queries do not see, with keys first_key ..., become -infinity: their exp is 0.
template <int N8>
__device__ void hide_keys(float (&s)[N8][4], int first_key, const int (&from)[2], const int (&to)[2]) {
    #pragma unroll
    for (int i = 0; i < N8 * 4; i++) {
        int j = first_key + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, row = i / 2 % 2;
        if (j < from[row] || j > to[row]) s[i / 4][i % 4] = -INFINITY;
    }
}

const float LOG2_E = 1.44269504f;                                // exp(x) = exp2f(x * LOG2_E): the hardware has exp2

// One block: 64 queries of one head. K and V have two places each in shared memory: while the warps work on one tile, the next comes.
// The one barrier of a turn says both that all copies of this tile have arrived and that the tile before may be overwritten.
template <int HD>
__global__ void __launch_bounds__(TILE_THREADS)
attention_forward_tiles_kernel(floatX *att, float *lse, const floatX *q, const floatX *k, const floatX *v, const int *start,
                               int T, int past, int NH, int NKV, int q_stride, int kv_stride) {
    extern __shared__ __align__(16) floatX tiles[];              // [2][K, V]
    int t0 = (gridDim.x - 1 - blockIdx.x) * TILE, h = blockIdx.y, b = blockIdx.z;              // the longest rows first
    int first_row = t0 + threadIdx.x / WARP * 16, last = min(t0 + TILE, T) - 1, g = threadIdx.x % WARP / 4;
    size_t batch_row = (size_t)b * T, kv = (size_t)b * (past + T) * kv_stride + h / (NH / NKV) * HD;
    auto fetch = [&](int tile) {
        floatX *to = tiles + tile % 2 * 2 * tile_size(TILE, HD);
        size_t from = kv + (size_t)tile * TILE * kv_stride;
        fetch_tile<HD, TILE>(to, k + from, kv_stride, past + T - tile * TILE);
        fetch_tile<HD, TILE>(to + tile_size(TILE, HD), v + from, kv_stride, past + T - tile * TILE);
        cp_async_commit();
    };
    int first_tile = start ? start[batch_row + t0] / TILE : 0, last_tile = (past + last) / TILE;
    fetch(first_tile);

    uint32_t q_rows[HD / 16][4];
    load_a(q_rows, q + (batch_row + first_row) * q_stride + h * HD, q_stride, T - first_row);
    int from[2], to[2];                                          // the keys that the lane's two rows see; rows after T do as the last
    for (int i = 0; i < 2; i++) {
        int t = min(first_row + g + i * 8, T - 1);
        from[i] = start ? start[batch_row + t] : 0;
        to[i] = past + t;
    }
    int seen_by_all = start ? start[batch_row + last] : 0;       // keys seen_by_all .. past + t0 are not masked for any row
    float out[HD / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, scale = LOG2_E / sqrtf((float)HD);
    for (int tile = first_tile; tile <= last_tile; tile++) {
        cp_async_wait<0>();
        __syncthreads();
        if (tile < last_tile) fetch(tile + 1);
        const floatX *k_tile = tiles + tile % 2 * 2 * tile_size(TILE, HD), *v_tile = k_tile + tile_size(TILE, HD);
        float s[TILE / 8][4] = {}, shift[2];
        multiply_transposed(s, q_rows, k_tile);
        if (tile * TILE < seen_by_all || tile * TILE + TILE - 1 > past + t0) hide_keys(s, tile * TILE, from, to);
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float new_largest = largest[i];
            #pragma unroll
            for (int n = 0; n < TILE / 8; n++) new_largest = fmaxf(new_largest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            new_largest = fmaxf(new_largest, __shfl_xor_sync(~0u, new_largest, 1));            // the row lies in four lanes
            new_largest = fmaxf(new_largest, __shfl_xor_sync(~0u, new_largest, 2));
            shift[i] = new_largest == -INFINITY ? 0 : new_largest * scale;                     // a row that has seen no key yet
            float rescale = exp2f(largest[i] * scale - shift[i]);
            sum[i] *= rescale;
            #pragma unroll
            for (int n = 0; n < HD / 8; n++) out[n][2 * i] *= rescale, out[n][2 * i + 1] *= rescale;
            largest[i] = new_largest;
        }
        #pragma unroll
        for (int i = 0; i < TILE / 2; i++) {
            float &p = s[i / 4][i % 4];
            p = exp2f(p * scale - shift[i / 2 % 2]);
            sum[i / 2 % 2] += p;
        }
        multiply(out, s, v_tile);
    }
    for (int i = 0; i < 2; i++) {
        int t = first_row + g + i * 8;
        sum[i] = group_sum(sum[i], 4);
        if (lse && threadIdx.x % 4 == 0 && t < T) lse[((size_t)b * NH + h) * T + t] = largest[i] / sqrtf((float)HD) + logf(sum[i]);
    }
    write_d(att + (batch_row + first_row) * NH * HD + h * HD, NH * HD, out, 1 / sum[0], 1 / sum[1], T - first_row);
}

// In the backward the first two products start not at zero but at what is to be subtracted from them: s = q k - lse sqrt(HD), so that
// p = exp(s / sqrt(HD)), and ds = datt v - delta. A query after T has s = -infinity, hence p = 0.

// One block: dq and delta of 64 queries of one head; else as in the forward.
template <int HD>
__global__ void __launch_bounds__(TILE_THREADS)
attention_dq_tiles_kernel(floatX *dq, float *delta, const floatX *datt, const floatX *att, const float *lse, const floatX *q,
                          const floatX *k, const floatX *v, const int *start, int T, int NH, int NKV, int stride) {
    extern __shared__ __align__(16) floatX tiles[];              // [2][K, V]
    int t0 = (gridDim.x - 1 - blockIdx.x) * TILE, h = blockIdx.y, b = blockIdx.z;
    int first_row = t0 + threadIdx.x / WARP * 16, last = min(t0 + TILE, T) - 1, valid = T - first_row;
    size_t batch_row = (size_t)b * T, kv = batch_row * stride + h / (NH / NKV) * HD;
    size_t out_row = (batch_row + first_row) * NH * HD + h * HD, q_row = (batch_row + first_row) * stride + h * HD;
    auto fetch = [&](int tile) {
        floatX *to = tiles + tile % 2 * 2 * tile_size(TILE, HD);
        size_t from = kv + (size_t)tile * TILE * stride;
        fetch_tile<HD, TILE>(to, k + from, stride, T - tile * TILE);
        fetch_tile<HD, TILE>(to + tile_size(TILE, HD), v + from, stride, T - tile * TILE);
        cp_async_commit();
    };
    int first_tile = start ? start[batch_row + t0] / TILE : 0, last_tile = last / TILE;
    fetch(first_tile);

    uint32_t q_rows[HD / 16][4], datt_rows[HD / 16][4];
    float back[2] = {0, 0}, s_start[2], root = sqrtf((float)HD), scale = LOG2_E / root;
    load_a(datt_rows, datt + out_row, NH * HD, valid);
    load_a(q_rows, att + out_row, NH * HD, valid);               // att needs its registers only for delta
    #pragma unroll
    for (int i = 0; i < HD / 4; i++) {
        uint32_t x = q_rows[i / 4][i % 4], dx = datt_rows[i / 4][i % 4];
        back[i % 2] += low_bf16(x) * low_bf16(dx) + high_bf16(x) * high_bf16(dx);
    }
    load_a(q_rows, q + q_row, stride, valid);
    int from[2], to[2];
    for (int i = 0; i < 2; i++) {
        int row = first_row + threadIdx.x % WARP / 4 + i * 8;
        size_t statistic = ((size_t)b * NH + h) * T + row;
        to[i] = min(row, T - 1);
        from[i] = start ? start[batch_row + to[i]] : 0;
        back[i] = group_sum(back[i], 4);
        s_start[i] = row < T ? -lse[statistic] * root : -INFINITY;
        if (row < T && threadIdx.x % 4 == 0) delta[statistic] = back[i];
    }
    int seen_by_all = start ? start[batch_row + last] : 0;
    float dq_rows[HD / 8][4] = {};
    for (int tile = first_tile; tile <= last_tile; tile++) {
        cp_async_wait<0>();
        __syncthreads();
        if (tile < last_tile) fetch(tile + 1);
        #pragma unroll
        for (int half = 0; half < TILE; half += 32) {            // 32 keys at a time, for the sake of registers
            int first_key = tile * TILE + half;
            const floatX *k_tile = tiles + tile_size(tile % 2 * 2 * TILE + half, HD), *v_tile = k_tile + tile_size(TILE, HD);
            float s[4][4], ds[4][4];
            #pragma unroll
            for (int i = 0; i < 16; i++) s[i / 4][i % 4] = s_start[i / 2 % 2], ds[i / 4][i % 4] = -back[i / 2 % 2];
            multiply_transposed(s, q_rows, k_tile);
            multiply_transposed(ds, datt_rows, v_tile);
            if (first_key < seen_by_all || first_key + 31 > t0) hide_keys(s, first_key, from, to);
            #pragma unroll
            for (int i = 0; i < 16; i++) ds[i / 4][i % 4] *= exp2f(s[i / 4][i % 4] * scale);
            multiply(dq_rows, ds, k_tile);
        }
    }
    write_d(dq + q_row, stride, dq_rows, 1 / root, 1 / root, valid);
}

// One block: dk and dv of 64 keys of one KV head. Its turns are the tiles of queries, of every head of the group, that see one of the
// keys. Scores are made transposed, keys being the rows: so p^T and ds^T leave the first products as A of the second ones.
const int QUERIES = 32;                                          // of a tile here; with 64, HD 128 would need more than 255 registers
template <int HD>
__global__ void __launch_bounds__(TILE_THREADS)
attention_dkv_tiles_kernel(floatX *dk, floatX *dv, const floatX *datt, const float *lse, const float *delta, const floatX *q,
                           const floatX *k, const floatX *v, const int *start, int T, int NH, int NKV, int stride) {
    extern __shared__ __align__(16) floatX tiles[];              // K, V, [2][Q, datt]
    int j0 = blockIdx.x * TILE, kv_head = blockIdx.y, b = blockIdx.z, group = NH / NKV;
    int first_row = threadIdx.x / WARP * 16, g = threadIdx.x % WARP / 4, column = threadIdx.x % 4 * 2;
    size_t batch_row = (size_t)b * T, kv = (batch_row + j0) * stride + kv_head * HD;
    if (start) start += batch_row;
    int first_tile = j0 / QUERIES, head_tiles = ceil_div(queries_end(start, T, min(j0 + TILE, T) - 1), QUERIES) - first_tile;
    auto fetch = [&](int turn) {
        int h = kv_head * group + turn / head_tiles, t0 = (first_tile + turn % head_tiles) * QUERIES;
        floatX *to = tiles + tile_size(2 * TILE + turn % 2 * 2 * QUERIES, HD);
        fetch_tile<HD, QUERIES>(to, q + (batch_row + t0) * stride + h * HD, stride, T - t0);
        fetch_tile<HD, QUERIES>(to + tile_size(QUERIES, HD), datt + (batch_row + t0) * NH * HD + h * HD, NH * HD, T - t0);
        cp_async_commit();
    };
    fetch_tile<HD, TILE>(tiles, k + kv, stride, T - j0);
    fetch_tile<HD, TILE>(tiles + tile_size(TILE, HD), v + kv, stride, T - j0);
    fetch(0);                                                    // its commit is also that of K and V

    float root = sqrtf((float)HD), scale = LOG2_E / root, dk_rows[HD / 8][4] = {}, dv_rows[HD / 8][4] = {};
    for (int turn = 0; turn < group * head_tiles; turn++) {
        cp_async_wait<0>();
        __syncthreads();
        if (turn + 1 < group * head_tiles) fetch(turn + 1);
        const floatX *q_tile = tiles + tile_size(2 * TILE + turn % 2 * 2 * QUERIES, HD), *datt_tile = q_tile + tile_size(QUERIES, HD);
        int h = kv_head * group + turn / head_tiles, t0 = (first_tile + turn % head_tiles) * QUERIES;
        size_t statistics = ((size_t)b * NH + h) * T;
        float s[QUERIES / 8][4], ds[QUERIES / 8][4];
        uint32_t rows[HD / 16][4];
        #pragma unroll
        for (int i = 0; i < QUERIES / 4; i++) {
            int t = t0 + i / 2 * 8 + column + i % 2;
            s[i / 2][i % 2] = s[i / 2][i % 2 + 2] = t < T ? -lse[statistics + t] * root : -INFINITY;
        }
        load_a(rows, tiles + tile_size(first_row, HD));
        multiply_transposed(s, rows, q_tile);
        if (t0 < j0 + TILE - 1 || (start && start[min(t0 + QUERIES, T) - 1] > j0))
            #pragma unroll
            for (int i = 0; i < QUERIES / 2; i++) {
                int j = j0 + first_row + g + i / 2 % 2 * 8, t = t0 + i / 4 * 8 + column + i % 2;
                if (j > t || (start && t < T && start[t] > j)) s[i / 4][i % 4] = -INFINITY;
            }
        #pragma unroll
        for (int i = 0; i < QUERIES / 2; i++) s[i / 4][i % 4] = exp2f(s[i / 4][i % 4] * scale);
        multiply(dv_rows, s, datt_tile);
        #pragma unroll
        for (int i = 0; i < QUERIES / 4; i++) {
            int t = t0 + i / 2 * 8 + column + i % 2;
            ds[i / 2][i % 2] = ds[i / 2][i % 2 + 2] = t < T ? -delta[statistics + t] : 0;
        }
        load_a(rows, tiles + tile_size(TILE + first_row, HD));
        multiply_transposed(ds, rows, datt_tile);
        #pragma unroll
        for (int i = 0; i < QUERIES / 2; i++) ds[i / 4][i % 4] *= s[i / 4][i % 4];
        multiply(dk_rows, ds, q_tile);
    }
    kv += (size_t)first_row * stride;
    write_d(dk + kv, stride, dk_rows, 1 / root, 1 / root, T - j0 - first_row);
    write_d(dv + kv, stride, dv_rows, 1, 1, T - j0 - first_row);
}

// The kernels for tiles exist for these sizes. All offsets being multiples of HD, 16-byte pieces are aligned if the arrays are.
bool has_tiles(int HD) { return HD == 32 || HD == 64 || HD == 128; }
#endif

// att (N, NH * HD) and lse (B, NH, T), which may be NULL, of T queries a batch row, in rows of q_stride elements. k and v hold past + T
// positions a batch row, in rows of kv_stride elements. Products: 4 T NH HD FLOPs a query, half of them masked when past is 0.
void attention_forward_gpu(floatX *att, float *lse, const floatX *q, const floatX *k, const floatX *v, const int *start,
                           int B, int T, int past, int NH, int NKV, int HD, int q_stride, int kv_stride) {
#ifndef QWEN_FP32
    if (has_tiles(HD)) {
        assert(is_aligned(k) && is_aligned(v) && kv_stride % WIDE == 0 && "attention copies 16 bytes at a time");
        auto kernel = HD == 32 ? attention_forward_tiles_kernel<32>
                    : HD == 64 ? attention_forward_tiles_kernel<64> : attention_forward_tiles_kernel<128>;
        int bytes = tile_size(4 * TILE, HD) * (int)sizeof(floatX);                             // more than 48 KB must be asked for
        cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        dim3 grid(ceil_div(T, TILE), NH, B);
        kernel<<<grid, TILE_THREADS, bytes, stream>>>(att, lse, q, k, v, start, T, past, NH, NKV, q_stride, kv_stride);
        checkLaunch();
        return;
    }
#endif
    CHECK(HD <= MAX_HEAD, "attention heads of %d channels; at most %d are supported", HD, MAX_HEAD);
    dim3 grid(ceil_div(T, ROW_WARPS), NH, B);
    attention_forward_rows_kernel<<<grid, ROW_WARPS * WARP, 0, stream>>>(att, lse, q, k, v, start, T, past, NH, NKV, HD,
                                                                         q_stride, kv_stride);
    checkLaunch();
}

// dq, dk, dv = (rows of `stride` elements, laid out as q, k, v). delta (B, NH, T) is scratch: the first kernel makes it for the second.
void attention_backward_gpu(floatX *dq, floatX *dk, floatX *dv, float *delta, const floatX *datt, const floatX *att, const float *lse,
                            const floatX *q, const floatX *k, const floatX *v, const int *start,
                            int B, int T, int NH, int NKV, int HD, int stride) {
#ifndef QWEN_FP32
    if (has_tiles(HD)) {
        assert(is_aligned(q) && is_aligned(k) && is_aligned(v) && is_aligned(datt) && stride % WIDE == 0 &&
               "attention copies 16 bytes at a time");
        auto dq_kernel = HD == 32 ? attention_dq_tiles_kernel<32>
                       : HD == 64 ? attention_dq_tiles_kernel<64> : attention_dq_tiles_kernel<128>;
        auto dkv_kernel = HD == 32 ? attention_dkv_tiles_kernel<32>
                        : HD == 64 ? attention_dkv_tiles_kernel<64> : attention_dkv_tiles_kernel<128>;
        int dq_bytes = tile_size(4 * TILE, HD) * (int)sizeof(floatX);
        int dkv_bytes = tile_size(2 * TILE + 4 * QUERIES, HD) * (int)sizeof(floatX);
        cudaCheck(cudaFuncSetAttribute(dq_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dq_bytes));
        cudaCheck(cudaFuncSetAttribute(dkv_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dkv_bytes));
        dim3 q_grid(ceil_div(T, TILE), NH, B), kv_grid(ceil_div(T, TILE), NKV, B);
        dq_kernel<<<q_grid, TILE_THREADS, dq_bytes, stream>>>(dq, delta, datt, att, lse, q, k, v, start, T, NH, NKV, stride);
        dkv_kernel<<<kv_grid, TILE_THREADS, dkv_bytes, stream>>>(dk, dv, datt, lse, delta, q, k, v, start, T, NH, NKV, stride);
        checkLaunch();
        return;
    }
#endif
    CHECK(HD <= MAX_HEAD, "attention heads of %d channels; at most %d are supported", HD, MAX_HEAD);
    dim3 q_grid(ceil_div(T, ROW_WARPS), NH, B), kv_grid(ceil_div(T, ROW_WARPS), NKV, B);
    attention_dq_rows_kernel<<<q_grid, ROW_WARPS * WARP, 0, stream>>>(dq, delta, datt, att, lse, q, k, v, start, T, NH, NKV, HD, stride);
    attention_dkv_rows_kernel<<<kv_grid, ROW_WARPS * WARP, 0, stream>>>(dk, dv, datt, lse, delta, q, k, v, start, T, NH, NKV, HD, stride);
    checkLaunch();
}

// A thread takes one pack. Moves 3 I elements a row.
template <int W> __global__ void swiglu_forward_kernel(floatX *act, const floatX *gate_up, int N, int I) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W, n = i / I;
    if (n >= N) return;
    const floatX *gate = gate_up + n * 2 * I + i % I;
    Pack<W> pg = load_pack<W>(gate), pu = load_pack<W>(gate + I);
    for (int j = 0; j < W; j++) {
        float g = to_float(pg.x[j]);
        pu.x[j] = to_floatX(g * to_float(pu.x[j]) / (1.0f + expf(-g)));
    }
    store_pack<W>(act + i, pu);
}
void swiglu_forward_gpu(floatX *act, const floatX *gate_up, int N, int I) {
    bool wide = I % WIDE == 0;
    auto kernel = wide ? swiglu_forward_kernel<WIDE> : swiglu_forward_kernel<1>;
    kernel<<<blocks_for((size_t)N * I / (wide ? WIDE : 1), 256), 256, 0, stream>>>(act, gate_up, N, I);
    checkLaunch();
}

// Moves 5 I elements a row.
template <int W> __global__ void swiglu_backward_kernel(floatX *dgate_up, const floatX *dact, const floatX *gate_up, int N, int I) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W, n = i / I;
    if (n >= N) return;
    size_t at = n * 2 * I + i % I;
    Pack<W> pd = load_pack<W>(dact + i), pg = load_pack<W>(gate_up + at), pu = load_pack<W>(gate_up + at + I);
    for (int j = 0; j < W; j++) {
        float d = to_float(pd.x[j]), g = to_float(pg.x[j]), u = to_float(pu.x[j]), s = 1.0f / (1.0f + expf(-g));
        pg.x[j] = to_floatX(d * u * s * (1.0f + g * (1.0f - s)));
        pu.x[j] = to_floatX(d * g * s);
    }
    store_pack<W>(dgate_up + at, pg), store_pack<W>(dgate_up + at + I, pu);
}
void swiglu_backward_gpu(floatX *dgate_up, const floatX *dact, const floatX *gate_up, int N, int I) {
    bool wide = I % WIDE == 0;
    auto kernel = wide ? swiglu_backward_kernel<WIDE> : swiglu_backward_kernel<1>;
    kernel<<<blocks_for((size_t)N * I / (wide ? WIDE : 1), 256), 256, 0, stream>>>(dgate_up, dact, gate_up, N, I);
    checkLaunch();
}

// A block takes a row of logits (V). Each thread keeps the maximum and the sum of exp(logit - maximum) of its part (online softmax: when
// the maximum grows, the sum shrinks to match), the block joins them. With gradient the row becomes its own gradient,
// (softmax - onehot) * weight * scale, read a second time, from the L2 cache as far as the rows under way fit into it. Blocks begin with
// the last rows, which the matrix multiplication before has just written. Moves 2 to 3 V elements a row.
template <int W>
__global__ void __launch_bounds__(1024)
cross_entropy_kernel(float *losses, floatX *logits, const int *targets, const float *weights, float scale, int N, int V,
                                     bool gradient) {
    size_t n = N - 1 - blockIdx.x;
    floatX *row = logits + n * V;
    int target = targets[n];
    float target_logit = to_float(row[target]), max = -INFINITY, sum = 0;
    for (int j = threadIdx.x * W; j < V; j += blockDim.x * W) {
        Pack<W> p = load_pack<W>(row + j);
        float higher = max;
        for (int i = 0; i < W; i++) higher = fmaxf(higher, to_float(p.x[i]));
        sum *= expf(max - higher);
        max = higher;
        for (int i = 0; i < W; i++) sum += expf(to_float(p.x[i]) - max);
    }
    float highest = block_max(max);                              // no thread writes the row before all have read the target's logit
    sum = block_sum(max == -INFINITY ? 0.0f : sum * expf(max - highest));
    if (threadIdx.x == 0) losses[n] = highest + logf(sum) - target_logit;
    if (!gradient) return;
    float w = weights[n] * scale, factor = w / sum;
    for (int j = threadIdx.x * W; j < V; j += blockDim.x * W) {
        Pack<W> p = load_pack<W>(row + j);
        for (int i = 0; i < W; i++) p.x[i] = to_floatX(expf(to_float(p.x[i]) - highest) * factor - (j + i == target ? w : 0.0f));
        store_pack<W>(row + j, p);
    }
}
void cross_entropy_gpu(float *losses, floatX *logits, const int *targets, const float *weights, float scale, int N, int V, bool gradient) {
    bool wide = V % WIDE == 0;
    auto kernel = wide ? cross_entropy_kernel<WIDE> : cross_entropy_kernel<1>;
    kernel<<<N, row_threads(wide ? V / WIDE : V, 1024), 0, stream>>>(losses, logits, targets, weights, scale, N, V, gradient);
    checkLaunch();
}

// As classifier of train_qwen.c, `most_rows` rows at a time.
void classifier_gpu(float *losses, floatX *dh, float *dhead, const floatX *h, const floatX *head, const int *targets, const float *weights,
                    float scale, floatX *logits, int most_rows, int N, int C, int V) {
    for (int n0 = 0; n0 < N; n0 += most_rows) {
        int rows = N - n0 < most_rows ? N - n0 : most_rows;
        const floatX *h_block = h + (size_t)n0 * C;
        matmul_forward_gpu(logits, NULL, h_block, head, NULL, rows, C, V);
        cross_entropy_gpu(losses + n0, logits, targets + n0, weights + n0, scale, rows, V, dh != NULL);
        if (dh) matmul_backward_gpu(dh + (size_t)n0 * C, dhead, NULL, logits, h_block, head, NULL, rows, C, V);
    }
}

// *sum += sum of weights * losses, by one block, in double
__global__ void loss_sum_kernel(double *sum, const float *losses, const float *weights, int N) {
    __shared__ double parts[256];
    double mine = 0;
    for (int n = threadIdx.x; n < N; n += 256) mine += (double)weights[n] * (double)losses[n];
    parts[threadIdx.x] = mine;
    __syncthreads();
    for (int i = 1; threadIdx.x == 0 && i < 256; i++) mine += parts[i];
    if (threadIdx.x == 0) *sum += mine;
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 5. Activations
//
// As in train_qwen.c; each buffer is explained there. QK-norm's rstd of queries and keys are one buffer, (N, NH + NKV).

typedef struct {
    floatX *x, *h1, *qkv, *qk, *att, *x_mid, *h2, *gate_up, *act;
    float *rstd1, *qk_rstd, *lse, *rstd2;
} LayerActsGpu;

typedef struct {
    LayerActsGpu *layers;
    floatX *x_last, *h, *logits;
    float *rstd, *losses;
    floatX *dx, *dh, *dqkv, *datt, *dgate_up, *dact;
    float *delta;                    // (B, NH, T)   of attention's backward
    float *scratch;                  // partial sums of reductions
    char *memory;
} ActivationsGpu;

// Rows of logits that exist at a time: 1.2 GB of them for Qwen's vocabulary, enough for the multiplication to run at full speed.
// (A variable, because tests make it small.)
static int classifier_rows_gpu = 4096;

typedef struct { char *memory; size_t bytes; } CursorGpu;         // memory NULL: only counts
template <typename T> void carve_gpu(T **p, CursorGpu *cursor, size_t count) {
    *p = cursor->memory ? (T *)(cursor->memory + cursor->bytes) : NULL;
    cursor->bytes += (count * sizeof(T) + 255) / 256 * 256;
}
// A layer's own buffer, or below the level that is kept the one of layer 0.
#define KEEP_GPU(field, level, size)                                                                     \
    if (recompute >= (level) && l > 0) acts->field = a->layers[0].field;                                 \
    else carve_gpu(&acts->field, cursor, (size))
void activations_layout_gpu(ActivationsGpu *a, const Config *c, int B, int T, Recompute recompute, bool with_backward, CursorGpu *cursor) {
    size_t N = (size_t)B * (size_t)T, C = (size_t)c->C, I = (size_t)c->I, att = (size_t)c->NH * (size_t)c->HD, QKV = (size_t)qkv_width(c);
    for (int l = 0; l < c->L; l++) {
        LayerActsGpu *acts = &a->layers[l];
        KEEP_GPU(x,       with_backward ? KEEP_ALWAYS : RECOMPUTE_LAYERS, N * C);
        KEEP_GPU(rstd1,   RECOMPUTE_LAYERS, N);
        KEEP_GPU(h1,      RECOMPUTE_CHEAP,  N * C);
        KEEP_GPU(qkv,     RECOMPUTE_LAYERS, N * QKV);
        KEEP_GPU(qk_rstd, RECOMPUTE_LAYERS, c->qk_norm ? N * (size_t)(c->NH + c->NKV) : 0);
        KEEP_GPU(qk,      RECOMPUTE_LAYERS, c->qk_norm ? N * QKV : 0);
        KEEP_GPU(lse,     RECOMPUTE_LAYERS, N * (size_t)c->NH);
        KEEP_GPU(att,     RECOMPUTE_LAYERS, N * att);
        KEEP_GPU(x_mid,   RECOMPUTE_LAYERS, N * C);
        KEEP_GPU(rstd2,   RECOMPUTE_LAYERS, N);
        KEEP_GPU(h2,      RECOMPUTE_CHEAP,  N * C);
        KEEP_GPU(gate_up, RECOMPUTE_LAYERS, N * 2 * I);
        KEEP_GPU(act,     RECOMPUTE_CHEAP,  N * I);
        if (!c->qk_norm) acts->qk = acts->qkv;
    }
    size_t rows = N < (size_t)classifier_rows_gpu ? N : (size_t)classifier_rows_gpu;
    carve_gpu(&a->x_last, cursor, N * C), carve_gpu(&a->rstd, cursor, N), carve_gpu(&a->h, cursor, N * C);
    carve_gpu(&a->logits, cursor, rows * (size_t)c->V), carve_gpu(&a->losses, cursor, N);
    if (!with_backward) return;
    size_t widest = QKV > C ? QKV : C;
    if (widest < 2 * (size_t)c->HD) widest = 2 * (size_t)c->HD;
    carve_gpu(&a->scratch, cursor, PARTS * widest + 4 * PARTS);
    carve_gpu(&a->dx, cursor, N * C), carve_gpu(&a->dh, cursor, N * C);
    carve_gpu(&a->dqkv, cursor, N * QKV), carve_gpu(&a->datt, cursor, N * att), carve_gpu(&a->delta, cursor, N * (size_t)c->NH);
    carve_gpu(&a->dgate_up, cursor, N * 2 * I), carve_gpu(&a->dact, cursor, N * I);
}

size_t activations_bytes_gpu(const Config *c, int B, int T, Recompute recompute, bool with_backward) {
    ActivationsGpu a = {};
    CursorGpu counting = {NULL, 0};
    a.layers = (LayerActsGpu *)xcalloc((size_t)c->L, sizeof(LayerActsGpu));
    activations_layout_gpu(&a, c, B, T, recompute, with_backward, &counting);
    free(a.layers);
    return counting.bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 6. The model's forward and backward

#define AS_FIELD_GPU(field, ...) floatX *field;
typedef struct { LAYER_TENSORS(AS_FIELD_GPU) } LayerParamsGpu;
typedef struct { MODEL_TENSORS(AS_FIELD_GPU) LayerParamsGpu *layers; floatX *head; } ParamsGpu;

void params_point_gpu(ParamsGpu *p, const Config *c, floatX *memory) {
    {   ParamsGpu *fields = p; MODEL_TENSORS(AS_POINTER) }
    if (!p->layers) p->layers = (LayerParamsGpu *)xcalloc((size_t)c->L, sizeof(LayerParamsGpu));
    for (int l = 0; l < c->L; l++) { LayerParamsGpu *fields = &p->layers[l]; LAYER_TENSORS(AS_POINTER) }
    p->head = c->tied ? p->wte : p->lm_head;
}

// A batch on the device, and `order` for embedding_backward_gpu: its rows (of the micro-batch) sorted by token.
typedef struct { int *tokens, *targets, *start, *order; float *weights; } BatchGpu;

// What an update tells the host.
typedef struct { double loss, norm; float grad_scale; int finite; } ResultGpu;

typedef struct { size_t offset; int count; Decay decay; } Chunk;  // a piece of one tensor, the work of a block in AdamW

typedef struct Gpu {
    ParamsGpu params;
    floatX *params_memory;
    float *master, *grads_memory, *m_memory, *v_memory;          // of what is trained. In fp32, master is params_memory itself without LoRA
    Params grads;                                                // device pointers
    floatX *base;                                                // LoRA: as Lora.base, in floatX, which is exact for checkpoints in bf16
    float *layer_grads, *lora_scratch;                           // (layer_floats), partial sums
    ActivationsGpu acts;
    float *rope;
    Chunk *chunks;
    int num_chunks;
    BatchGpu batch, staging;                                     // `rows` rows on the device, and in pinned memory of the host
    ResultGpu *result, *result_host;
    floatX *cache_k, *cache_v;                                   // (L, positions, NKV HD), as KVCache
    int cache_length, *decode_tokens;
    float *logits_host;                                          // (V)
    float *losses_host;                                          // (B T)   for dpo_weights
} Gpu;

// Attention of T new tokens after `past` others, whose keys and values join the cache of the layer.
void attention_cached_gpu(floatX *att, const floatX *q, const floatX *k, const floatX *v, const Model *m, int layer, int T, int past) {
    const Config *c = &m->config;
    int width = c->NKV * c->HD, QKV = qkv_width(c);
    size_t row = sizeof(floatX) * (size_t)width, pitch = sizeof(floatX) * (size_t)QKV;
    floatX *keys = m->gpu->cache_k + (size_t)layer * m->positions * width, *values = m->gpu->cache_v + (size_t)layer * m->positions * width;
    cudaCheck(cudaMemcpy2DAsync(keys + (size_t)past * width, row, k, pitch, row, (size_t)T, cudaMemcpyDeviceToDevice, stream));
    cudaCheck(cudaMemcpy2DAsync(values + (size_t)past * width, row, v, pitch, row, (size_t)T, cudaMemcpyDeviceToDevice, stream));
    attention_forward_gpu(att, NULL, q, keys, values, NULL, 1, T, past, c->NH, c->NKV, c->HD, QKV, width);
}

// past < 0: a batch of whole rows. past >= 0: T tokens that follow `past` others in the cache.
enum { NO_CACHE = -1 };
void layer_forward_gpu(Model *m, int l, floatX *next_x, const int *start, int B, int T, int past) {
    const Config *c = &m->config;
    const LayerParamsGpu *p = &m->gpu->params.layers[l];
    LayerActsGpu *a = &m->gpu->acts.layers[l];
    int N = B * T, C = c->C, I = c->I, NH = c->NH, NKV = c->NKV, HD = c->HD, QKV = qkv_width(c);

    rmsnorm_forward_gpu(a->h1, a->rstd1, a->x, p->norm1, N, C, c->norm_eps);
    matmul_forward_gpu(a->qkv, NULL, a->h1, p->wq, p->bq, N, C, QKV);
    qknorm_rope_forward_gpu(a->qk, a->qk_rstd, a->qkv, p->q_norm, p->k_norm, m->gpu->rope, start, past < 0 ? 0 : past,
                            N, T, NH, NKV, HD, c->norm_eps);
    floatX *q = a->qk, *k = a->qk + NH * HD, *v = a->qkv + (NH + NKV) * HD;
    if (past >= 0) attention_cached_gpu(a->att, q, k, v, m, l, T, past);
    else attention_forward_gpu(a->att, a->lse, q, k, v, start, B, T, 0, NH, NKV, HD, QKV, QKV);
    matmul_forward_gpu(a->x_mid, a->x, a->att, p->wo, NULL, N, NH * HD, C);

    rmsnorm_forward_gpu(a->h2, a->rstd2, a->x_mid, p->norm2, N, C, c->norm_eps);
    matmul_forward_gpu(a->gate_up, NULL, a->h2, p->w_gate, NULL, N, C, 2 * I);
    swiglu_forward_gpu(a->act, a->gate_up, N, I);
    matmul_forward_gpu(next_x, a->x_mid, a->act, p->w_down, NULL, N, I, C);
}

void model_forward_gpu(Model *m, const int *tokens, const int *start, int B, int T, int past) {
    const Config *c = &m->config;
    ActivationsGpu *a = &m->gpu->acts;
    embedding_forward_gpu(a->layers[0].x, tokens, m->gpu->params.wte, B * T, c->C);
    for (int l = 0; l < c->L; l++) layer_forward_gpu(m, l, l + 1 < c->L ? a->layers[l + 1].x : a->x_last, start, B, T, past);
    rmsnorm_forward_gpu(a->h, a->rstd, a->x_last, m->gpu->params.norm, B * T, c->C, c->norm_eps);
}

void layer_backward_gpu(Model *m, int l, const int *start, int B, int T) {
    const Config *c = &m->config;
    const LayerParamsGpu *p = &m->gpu->params.layers[l];
    const LayerParams *dp = &m->gpu->grads.layers[l];
    const LayerActsGpu *a = &m->gpu->acts.layers[l];
    ActivationsGpu *g = &m->gpu->acts;
    int N = B * T, C = c->C, I = c->I, NH = c->NH, NKV = c->NKV, HD = c->HD, QKV = qkv_width(c);

    if (m->recompute == RECOMPUTE_CHEAP) {
        rmsnorm_forward_gpu(a->h1, a->rstd1, a->x, p->norm1, N, C, c->norm_eps);
        rmsnorm_forward_gpu(a->h2, a->rstd2, a->x_mid, p->norm2, N, C, c->norm_eps);
        swiglu_forward_gpu(a->act, a->gate_up, N, I);
    } else if (m->recompute == RECOMPUTE_LAYERS) {
        layer_forward_gpu(m, l, g->dh, start, B, T, NO_CACHE);
    }

    matmul_backward_gpu(g->dact, dp->w_down, NULL, g->dx, a->act, p->w_down, g->scratch, N, I, C);
    swiglu_backward_gpu(g->dgate_up, g->dact, a->gate_up, N, I);
    matmul_backward_gpu(g->dh, dp->w_gate, NULL, g->dgate_up, a->h2, p->w_gate, g->scratch, N, C, 2 * I);
    rmsnorm_backward_gpu(g->dx, dp->norm2, g->dh, a->x_mid, p->norm2, a->rstd2, g->scratch, N, C, ACCUMULATE);

    floatX *dq = g->dqkv, *dk = dq + NH * HD, *dv = dk + NKV * HD;
    matmul_backward_gpu(g->datt, dp->wo, NULL, g->dx, a->att, p->wo, g->scratch, N, NH * HD, C);
    attention_backward_gpu(dq, dk, dv, g->delta, g->datt, a->att, a->lse, a->qk, a->qk + NH * HD, a->qkv + (NH + NKV) * HD, start,
                           B, T, NH, NKV, HD, QKV);
    qknorm_rope_backward_gpu(g->dqkv, dp->q_norm, dp->k_norm, a->qkv, a->qk_rstd, p->q_norm, p->k_norm, m->gpu->rope, start, g->scratch,
                             N, T, NH, NKV, HD);
    matmul_backward_gpu(g->dh, dp->wq, dp->bq, g->dqkv, a->h1, p->wq, g->scratch, N, C, QKV);
    rmsnorm_backward_gpu(g->dx, dp->norm1, g->dh, a->x, p->norm1, a->rstd1, g->scratch, N, C, ACCUMULATE);
}

// LoRA: see train_qwen.c. dB (outputs, rank) += dW A^T: a warp takes a row of dW, LORA_RANKS ranks at a time.
enum { LORA_RANKS = 8, LORA_PARTS = 32 };
__global__ void lora_db_kernel(float *dB, const float *dW, const float *A, int outputs, int inputs, int rank) {
    int o = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP, k0 = blockIdx.y * LORA_RANKS;
    if (o >= outputs) return;
    float sum[LORA_RANKS] = {};
    for (int c = lane; c < inputs; c += WARP) {
        float d = dW[(size_t)o * inputs + c];
        for (int k = 0; k < LORA_RANKS; k++) if (k0 + k < rank) sum[k] += d * A[(size_t)(k0 + k) * inputs + c];
    }
    for (int k = 0; k < LORA_RANKS; k++) {
        float all = warp_sum(sum[k]);
        if (lane == 0 && k0 + k < rank) dB[(size_t)o * rank + k0 + k] += all;
    }
}
// partials (parts, rank, inputs): B^T dW over every parts-th row; their sum is added to dA. A thread takes a column.
__global__ void lora_da_kernel(float *partials, const float *dW, const float *B, int outputs, int inputs, int rank) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, k0 = blockIdx.y * LORA_RANKS;
    if (c >= inputs) return;
    float sum[LORA_RANKS] = {};
    for (int o = blockIdx.z; o < outputs; o += gridDim.z) {
        float d = dW[(size_t)o * inputs + c];
        for (int k = 0; k < LORA_RANKS; k++) if (k0 + k < rank) sum[k] += d * B[(size_t)o * rank + k0 + k];
    }
    for (int k = 0; k < LORA_RANKS; k++)
        if (k0 + k < rank) partials[((size_t)blockIdx.z * rank + k0 + k) * inputs + c] = sum[k];
}
void lora_backward_gpu(Model *m, int l) {
    const Lora *lora = m->lora;
    Gpu *g = m->gpu;
    int rank = lora->options.rank, groups = ceil_div(rank, LORA_RANKS);
    for (int k = l * lora->per_layer; k < (l + 1) * lora->per_layer; k++) {
        const LoraMatrix *x = &lora->matrices[k];
        const float *dW = g->layer_grads + x->in_layer, *A = g->master + x->a, *B = g->master + x->b;
        float *dA = g->grads_memory + x->a, *dB = g->grads_memory + x->b;
        int outputs = x->outputs, inputs = x->inputs, parts = outputs < LORA_PARTS ? outputs : LORA_PARTS;
        lora_db_kernel<<<dim3(ceil_div(outputs, 8), groups), 8 * WARP, 0, stream>>>(dB, dW, A, outputs, inputs, rank);
        checkLaunch();
        lora_da_kernel<<<dim3(ceil_div(inputs, 128), groups, parts), 128, 0, stream>>>(g->lora_scratch, dW, B, outputs, inputs, rank);
        checkLaunch();
        sum_partials_gpu(dA, g->lora_scratch, parts, rank * inputs);
    }
    cudaCheck(cudaMemsetAsync(g->layer_grads, 0, layer_floats(&m->table) * sizeof(float), stream));
}

// W = base + scale B A. A block takes LORA_ROWS rows, a thread one column of them.
enum { LORA_ROWS = 8 };
__global__ void lora_merge_kernel(floatX *W, const floatX *base, const float *A, const float *B, float scale, int outputs, int inputs,
                                  int rank) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, o0 = blockIdx.y * LORA_ROWS;
    if (c >= inputs) return;
    float sum[LORA_ROWS] = {};
    for (int k = 0; k < rank; k++) {
        float a = A[(size_t)k * inputs + c];
        for (int i = 0; i < LORA_ROWS; i++) if (o0 + i < outputs) sum[i] += B[(size_t)(o0 + i) * rank + k] * a;
    }
    for (int i = 0; i < LORA_ROWS && o0 + i < outputs; i++) {
        size_t at = (size_t)(o0 + i) * inputs + c;
        W[at] = to_floatX(to_float(base[at]) + scale * sum[i]);
    }
}
void lora_merge_gpu(Model *m) {
    const Lora *lora = m->lora;
    Gpu *g = m->gpu;
    for (int k = 0; k < lora->count; k++) {
        const LoraMatrix *x = &lora->matrices[k];
        floatX *W = g->params_memory + x->weight, *base = g->base + x->base;
        const float *A = g->master + x->a, *B = g->master + x->b;
        int outputs = x->outputs, inputs = x->inputs, rank = lora->options.rank;
        dim3 grid(ceil_div(inputs, 128), ceil_div(outputs, LORA_ROWS));
        lora_merge_kernel<<<grid, 128, 0, stream>>>(W, base, A, B, lora->scale, outputs, inputs, rank);
        checkLaunch();
    }
}

void model_backward_gpu(Model *m, const BatchGpu *batch, int B, int T) {
    const Config *c = &m->config;
    ActivationsGpu *a = &m->gpu->acts;
    rmsnorm_backward_gpu(a->dx, m->gpu->grads.norm, a->dh, a->x_last, m->gpu->params.norm, a->rstd, a->scratch, B * T, c->C, OVERWRITE);
    for (int l = c->L - 1; l >= 0; l--) {
        layer_backward_gpu(m, l, batch->start, B, T);
        if (m->lora) lora_backward_gpu(m, l);
    }
    if (!m->lora) embedding_backward_gpu(m->gpu->grads.wte, a->dx, batch->order, batch->tokens, B * T, c->C);
}

// Adds the sum of weight * loss of a batch on the device to result->loss, and with TRAIN the gradient of scale times it to the gradients.
// In DPO the host makes the weights, in its copy of the batch, as on the CPU: it waits for the losses, and returns the pairs' losses.
double model_loss_gpu(Model *m, const Batch *host, const BatchGpu *batch, int B, int T, float scale, Pass pass) {
    ActivationsGpu *a = &m->gpu->acts;
    const Config *c = &m->config;
    double pair_losses = 0;
    size_t bytes = sizeof(float) * (size_t)B * (size_t)T;
    model_forward_gpu(m, batch->tokens, batch->start, B, T, NO_CACHE);
    if (m->dpo || pass == EVALUATE)
        classifier_gpu(a->losses, NULL, NULL, a->h, m->gpu->params.head, batch->targets, batch->weights, 0, a->logits, classifier_rows_gpu,
                       B * T, c->C, c->V);
    if (m->dpo) {
        to_host(m->gpu->losses_host, a->losses, bytes);
        pair_losses = dpo_weights(m->dpo, host, m->gpu->losses_host, B, T);
        to_device(batch->weights, host->weights, bytes);
    }
    if (pass == TRAIN) {
        if (m->lora) scale *= m->lora->scale;
        classifier_gpu(a->losses, a->dh, m->gpu->grads.head, a->h, m->gpu->params.head, batch->targets, batch->weights, scale, a->logits,
                       classifier_rows_gpu, B * T, c->C, c->V);
        model_backward_gpu(m, batch, B, T);
    }
    loss_sum_kernel<<<1, 256, 0, stream>>>(&m->gpu->result->loss, a->losses, batch->weights, B * T);
    checkLaunch();
    return pair_losses;
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 7. Gradient norm, clipping, AdamW

// partials[block]: sum of squares of every so many gradients, in double
__global__ void sum_squares_kernel(double *partials, const float *grads, size_t count) {
    __shared__ double parts[256];
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < count; i += (size_t)gridDim.x * 256)
        sum += (double)grads[i] * (double)grads[i];
    parts[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    if (threadIdx.x == 0) partials[blockIdx.x] = parts[0];
}
// The norm, and what clipping makes of it. The loss becomes a mean; if it or the norm is not finite, AdamW will leave everything as it is.
__global__ void norm_kernel(ResultGpu *result, const double *partials, int parts, double targets, double clip) {
    double sum = 0;
    for (int i = 0; i < parts; i++) sum += partials[i];
    double norm = sqrt(sum), loss = result->loss / targets;
    result->norm = norm, result->loss = loss;
    result->grad_scale = clip > 0 && norm > clip ? (float)(clip / (norm + 1e-6)) : 1.0f;
    result->finite = isfinite(norm) && isfinite(loss);
}
void gradient_norm_gpu(ResultGpu *result, const float *grads, float *scratch, size_t count, double targets, double clip) {
    double *partials = (double *)scratch;
    sum_squares_kernel<<<PARTS, 256, 0, stream>>>(partials, grads, count);
    checkLaunch();
    norm_kernel<<<1, 1, 0, stream>>>(result, partials, PARTS, targets, clip);
    checkLaunch();
}

// A block takes a chunk of a tensor. Moves 32 bytes a parameter, 34 with bf16 weights.
enum { CHUNK = 1 << 16 };
__global__ void adamw_kernel(floatX *params, float *master, float *ms, float *vs, float *grads, const Chunk *chunks,
                             const ResultGpu *result, AdamW o, float correct1, float correct2) {
    if (!result->finite) return;
    Chunk chunk = chunks[blockIdx.x];
    float keep = 1.0f - (chunk.decay == DECAY ? o.lr * o.weight_decay : 0.0f), grad_scale = result->grad_scale;
    for (int j = threadIdx.x; j < chunk.count; j += blockDim.x) {
        size_t i = chunk.offset + j;
        float g = grads[i] * grad_scale;
        float m = ms[i] = o.beta1 * ms[i] + (1.0f - o.beta1) * g;
        float v = vs[i] = o.beta2 * vs[i] + (1.0f - o.beta2) * g * g;
        float p = master[i] * keep - o.lr * (m * correct1) / (sqrtf(v * correct2) + o.eps);
        master[i] = p;
        if (params) params[i] = to_floatX(p);
        grads[i] = 0;
    }
}
void adamw_gpu(Model *m, const AdamW *o, long step) {
    Gpu *g = m->gpu;
    float correct1 = (float)(1.0 / (1.0 - pow(o->beta1, (double)step))), correct2 = (float)(1.0 / (1.0 - pow(o->beta2, (double)step)));
    float *masters = g->master, *grads = g->grads_memory, *ms = g->m_memory, *vs = g->v_memory;
    floatX *rounded = sizeof(floatX) == sizeof(float) || m->lora ? NULL : g->params_memory;      // NULL: there are no others
    adamw_kernel<<<g->num_chunks, 512, 0, stream>>>(rounded, masters, ms, vs, grads, g->chunks, g->result, *o, correct1, correct2);
    checkLaunch();
}

// Chunks cover all tensors, none crosses a border.
Chunk *make_chunks(const TensorTable *table, int *count) {
    Chunk *chunks = NULL;
    *count = 0;
    for (int k = 0; k < table->count; k++) {
        const TensorInfo *t = &table->list[k];
        size_t size = t->rows * t->cols;
        for (size_t i = 0; i < size; i += CHUNK) {
            chunks = (Chunk *)xrealloc(chunks, (size_t)(*count + 1) * sizeof(Chunk));
            Chunk chunk = {t->offset + i, (int)(size - i < CHUNK ? size - i : CHUNK), t->decay};
            chunks[(*count)++] = chunk;
        }
    }
    return chunks;
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 9. The machine: the GPU's answers

// What the datasheets of common cards promise for dense bf16, in FLOP/s. For other cards, and for fp32, the fastest large multiplication
// that cuBLASLt does here is the peak.
static const struct { const char *name; double flops; } KNOWN_CARDS[] = {
    {"A100", 312e12}, {"A800", 312e12}, {"H100 PCIe", 756e12}, {"H100 NVL", 835e12}, {"H100", 989.4e12}, {"H800", 989.4e12},
    {"H200", 989.4e12}, {"H20", 148e12}, {"B200", 2250e12}, {"L40S", 362e12}, {"RTX 4090", 165.2e12}, {"RTX 3090", 71e12},
    {"A10G", 70e12}, {"A10", 125e12}, {"A6000", 154.8e12},
};

const cudaDeviceProp *device_properties(void) {
    static cudaDeviceProp properties;
    static bool known;
    if (known) return &properties;
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    CHECK(error == cudaSuccess && count > 0, "no GPU that CUDA can use here (%s); ./train_qwen does the same on the processor",
          error == cudaSuccess ? "none found" : cudaGetErrorString(error));
    cudaCheck(cudaSetDevice(0));
    cudaCheck(cudaGetDeviceProperties(&properties, 0));
    CHECK(properties.major >= 8, "%s has compute capability %d.%d; this program needs 8.0 (Ampere) or newer", properties.name,
          properties.major, properties.minor);
    return known = true, &properties;
}

// The stream and cuBLASLt, once.
void device_open(void) {
    if (cublaslt) return;
    device_properties();
    cudaCheck(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cublasCheck(cublasLtCreate(&cublaslt));
    cudaCheck(cudaMalloc(&cublaslt_workspace, WORKSPACE_BYTES));
}

template <typename T> T *device_alloc(size_t count) {
    T *p = NULL;
    cudaError_t error = cudaMalloc((void **)&p, (count > 0 ? count : 1) * sizeof(T));
    if (error == cudaSuccess) return p;
    size_t left = 0, all = 0;
    cudaMemGetInfo(&left, &all);
    DIE("%.2f GB more do not fit into the GPU's memory (%.2f of %.2f GB are free); a smaller --batch or --seq, or --recompute 2, needs "
        "less (./" PROGRAM " info)", (double)count * sizeof(T) * 1e-9, (double)left * 1e-9, (double)all * 1e-9);
}
template <typename T> T *pinned_alloc(size_t count) {
    T *p = NULL;
    cudaCheck(cudaMallocHost((void **)&p, (count > 0 ? count : 1) * sizeof(T)));
    return p;
}

size_t lora_scratch_floats(const Lora *lora) {
    size_t most = 0;
    for (int k = 0; k < lora->count; k++) if ((size_t)lora->matrices[k].inputs > most) most = (size_t)lora->matrices[k].inputs;
    return (size_t)LORA_PARTS * most * (size_t)lora->options.rank;
}

// Keys, or values, of a sequence of `positions` tokens, in all layers.
size_t cache_floats(const Config *c, int positions) { return (size_t)c->L * (size_t)positions * (size_t)(c->NKV * c->HD); }

MemoryPlan machine_plan(const Config *c, int B, int T, Recompute recompute, const LoraOptions *options) {
    TensorTable table = tensor_table(c);
    double params = (double)table.num_params;
    MemoryPlan plan = {(sizeof(floatX) == 4 ? 4.0 : 4.0 + sizeof(floatX)) * params, 4 * params, 8 * params,
                       (double)activations_bytes_gpu(c, B, T, recompute, true) + WORKSPACE_BYTES +
                           2.0 * (double)sizeof(floatX) * (double)cache_floats(c, T)};
    if (options->rank > 0) {
        Lora lora = lora_layout(c, &table, options);
        double adapters = 4.0 * (double)lora.table.num_params;
        plan.weights = sizeof(floatX) * (params + (double)lora.base_floats) + adapters;
        plan.gradients = 4.0 * (double)(layer_floats(&table) + lora_scratch_floats(&lora)) + adapters, plan.moments = 2 * adapters;
        lora_free(&lora);
    }
    free(table.list);
    return plan;
}
// What is free now: neither CUDA's own half gigabyte nor what other programs hold.
double machine_memory(void) {
    size_t left = 0, all = 0;
    device_open();
    cudaCheck(cudaMemGetInfo(&left, &all));
    return (double)left;
}

// Ever larger multiplications, until one takes 2 ms.
double measured_peak_flops(void) {
    device_open();
    cudaEvent_t begin, end;
    cudaCheck(cudaEventCreate(&begin));
    cudaCheck(cudaEventCreate(&end));
    double best = 0;
    float ms = 0;
    for (int n = 256; n <= 8192 && ms < 2; n *= 2) {
        floatX *memory = device_alloc<floatX>((size_t)3 * n * n);
        cudaCheck(cudaMemsetAsync(memory, 0, sizeof(floatX) * 3 * (size_t)n * n, stream));
        for (int run = 0; run < 3; run++) {
            cudaCheck(cudaEventRecord(begin, stream));
            matmul_forward_gpu(memory, NULL, memory + (size_t)n * n, memory + (size_t)2 * n * n, NULL, n, n, n);
            cudaCheck(cudaEventRecord(end, stream));
            cudaCheck(cudaEventSynchronize(end));
            cudaCheck(cudaEventElapsedTime(&ms, begin, end));
            if (2.0 * n * n * n / (ms * 1e-3) > best) best = 2.0 * n * n * n / (ms * 1e-3);
        }
        cudaCheck(cudaFree(memory));
    }
    cudaCheck(cudaEventDestroy(begin));
    cudaCheck(cudaEventDestroy(end));
    return best;
}
double machine_peak_flops(void) {
    static double flops;
    for (size_t i = 0; flops == 0 && sizeof(floatX) == 2 && i < sizeof KNOWN_CARDS / sizeof KNOWN_CARDS[0]; i++)
        if (strstr(device_properties()->name, KNOWN_CARDS[i].name)) flops = KNOWN_CARDS[i].flops;
    if (flops == 0) flops = measured_peak_flops();
    return flops;
}

const char *machine_text(void) {
    const cudaDeviceProp *d = device_properties();
    return path_of("%s: %d multiprocessors, %.1f GB; " PRECISION ", peak %.3g TFLOP/s", d->name, d->multiProcessorCount,
                   (double)d->totalGlobalMem * 1e-9, machine_peak_flops() * 1e-12);
}

__global__ void convert_kernel(floatX *out, const float *inp, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = to_floatX(inp[i]);
}

BatchGpu batch_alloc_gpu(size_t rows, bool pinned) {
    BatchGpu b;
    int *ints = pinned ? pinned_alloc<int>(4 * rows) : device_alloc<int>(4 * rows);
    b.tokens = ints, b.targets = ints + rows, b.start = ints + 2 * rows, b.order = ints + 3 * rows;
    b.weights = pinned ? pinned_alloc<float>(rows) : device_alloc<float>(rows);
    return b;
}
BatchGpu batch_from_gpu(const BatchGpu *b, size_t at) {
    BatchGpu rest = {b->tokens + at, b->targets + at, b->start + at, b->order + at, b->weights + at};
    return rest;
}

int compare_keys(const void *a, const void *b) { return *(uint64_t *)a < *(uint64_t *)b ? -1 : *(uint64_t *)a > *(uint64_t *)b; }
// The rows 0 .. N - 1 of tokens, sorted by token, equal ones in their order.
void sort_rows(int *order, const int *tokens, int N) {
    uint64_t *keys = (uint64_t *)xmalloc((size_t)N * sizeof(uint64_t));
    for (int n = 0; n < N; n++) keys[n] = (uint64_t)tokens[n] << 32 | (uint64_t)n;
    qsort(keys, (size_t)N, sizeof(uint64_t), compare_keys);
    for (int n = 0; n < N; n++) order[n] = (int)(keys[n] & 0xFFFFFFFFu);
    free(keys);
}

// Queues the copy of a micro-batch of N positions into place `at` of the device's batch. The pinned copy stays untouched until the host has
// waited for the update, so the GPU may still work on earlier micro-batches meanwhile.
BatchGpu upload_batch(Gpu *g, const Batch *batch, size_t at, int N) {
    BatchGpu host = batch_from_gpu(&g->staging, at), device = batch_from_gpu(&g->batch, at);
    size_t bytes = sizeof(int) * (size_t)N;
    memcpy(host.tokens, batch->tokens, bytes), memcpy(host.targets, batch->targets, bytes), memcpy(host.start, batch->start, bytes);
    memcpy(host.weights, batch->weights, bytes);
    sort_rows(host.order, batch->tokens, N);
    to_device(device.tokens, host.tokens, bytes);
    to_device(device.targets, host.targets, bytes);
    to_device(device.start, host.start, bytes);
    to_device(device.order, host.order, bytes);
    to_device(device.weights, host.weights, bytes);
    return device;
}

enum { UPLOAD_FLOATS = 1 << 24 };                                // fp32 weights that are on the device at a time where it keeps only bf16
void machine_open(Model *m, int B, int T, int rows, int positions, Recompute recompute, Pass pass) {
    device_open();
    CHECK(B <= 65535, "--batch %d: a GPU takes at most 65535 rows; use --accum", B);           // attention's grid has a z for each
    const Config *c = &m->config;
    Gpu *g = m->gpu = (Gpu *)xcalloc(1, sizeof(Gpu));
    size_t params = m->table.num_params, tokens = (size_t)(rows > B ? rows : B) * (size_t)T;
    bool training = pass == TRAIN;
    m->B = B, m->T = T, m->positions = positions, m->recompute = recompute;

    bool has_master = training && !m->lora;                      // fp32 weights for AdamW
    if (has_master || sizeof(floatX) == sizeof(float)) {
        g->master = device_alloc<float>(params);
        to_device(g->master, m->params_memory, params * sizeof(float));
    }
#ifdef QWEN_FP32
    g->params_memory = g->master;
#else
    g->params_memory = device_alloc<floatX>(params);
    float *piece = has_master ? NULL : device_alloc<float>(UPLOAD_FLOATS);
    for (size_t i = 0; i < params; i += UPLOAD_FLOATS) {
        size_t count = params - i < UPLOAD_FLOATS ? params - i : UPLOAD_FLOATS;
        if (piece) to_device(piece, m->params_memory + i, count * sizeof(float));
        convert_kernel<<<blocks_for(count, 256), 256, 0, stream>>>(g->params_memory + i, piece ? piece : g->master + i, count);
        checkLaunch();
    }
    cudaCheck(cudaStreamSynchronize(stream));
    cudaCheck(cudaFree(piece));
#endif
    params_point_gpu(&g->params, c, g->params_memory);
    if (training) {
        Trained host = trained(m);
        size_t count = host.table->num_params, bytes = count * sizeof(float);
        if (m->lora) {
            g->base = device_alloc<floatX>(m->lora->base_floats);
            for (int k = 0; k < m->lora->count; k++) {
                const LoraMatrix *x = &m->lora->matrices[k];
                size_t weight_bytes = sizeof(floatX) * (size_t)x->outputs * (size_t)x->inputs;
                floatX *W = g->params_memory + x->weight;
                cudaCheck(cudaMemcpyAsync(g->base + x->base, W, weight_bytes, cudaMemcpyDeviceToDevice, stream));
            }
            g->master = device_alloc<float>(count);
            to_device(g->master, host.params, bytes);
            g->layer_grads = device_alloc<float>(layer_floats(&m->table));
            g->lora_scratch = device_alloc<float>(lora_scratch_floats(m->lora));
            cudaCheck(cudaMemsetAsync(g->layer_grads, 0, layer_floats(&m->table) * sizeof(float), stream));
            lora_merge_gpu(m);
        }
        g->grads_memory = device_alloc<float>(count), g->m_memory = device_alloc<float>(count), g->v_memory = device_alloc<float>(count);
        cudaCheck(cudaMemsetAsync(g->grads_memory, 0, bytes, stream));
        to_device(g->m_memory, host.m, bytes);
        to_device(g->v_memory, host.v, bytes);
        if (m->lora) grads_point_shared(&g->grads, c, g->layer_grads);
        else params_point(&g->grads, c, g->grads_memory);
        Chunk *chunks = make_chunks(host.table, &g->num_chunks);
        g->chunks = device_alloc<Chunk>((size_t)g->num_chunks);
        to_device(g->chunks, chunks, (size_t)g->num_chunks * sizeof(Chunk));
        free(chunks);
    }

    CursorGpu cursor = {device_alloc<char>(activations_bytes_gpu(c, B, T, recompute, training)), 0};
    g->acts.memory = cursor.memory;
    g->acts.layers = (LayerActsGpu *)xcalloc((size_t)c->L, sizeof(LayerActsGpu));
    activations_layout_gpu(&g->acts, c, B, T, recompute, training, &cursor);
    float *table = (float *)xmalloc((size_t)positions * (size_t)c->HD * sizeof(float));
    rope_table(table, positions, c->HD, c->rope_base);
    g->rope = device_alloc<float>((size_t)positions * (size_t)c->HD);
    g->cache_k = device_alloc<floatX>(cache_floats(c, positions)), g->cache_v = device_alloc<floatX>(cache_floats(c, positions));
    g->decode_tokens = device_alloc<int>(PROMPT_CHUNK), g->logits_host = pinned_alloc<float>((size_t)c->V);
    to_device(g->rope, table, (size_t)positions * (size_t)c->HD * sizeof(float));
    g->batch = batch_alloc_gpu(tokens, false), g->staging = batch_alloc_gpu(tokens, true);
    g->result = device_alloc<ResultGpu>(1), g->result_host = pinned_alloc<ResultGpu>(1);
    g->losses_host = pinned_alloc<float>((size_t)B * (size_t)T);
    cudaCheck(cudaStreamSynchronize(stream));
    free(table);
}

void machine_close(Model *m) {
    Gpu *g = m->gpu;
    void *on_device[] = {g->params_memory, g->grads_memory, g->m_memory, g->v_memory, g->chunks, g->acts.memory, g->rope, g->batch.tokens,
                         g->batch.weights, g->result, g->cache_k, g->cache_v, g->decode_tokens, g->base, g->layer_grads, g->lora_scratch,
                         (void *)((float *)g->params_memory == g->master ? NULL : g->master)};
    void *pinned[] = {g->staging.tokens, g->staging.weights, g->result_host, g->logits_host, g->losses_host};
    cudaCheck(cudaStreamSynchronize(stream));
    for (void *p : on_device) cudaCheck(cudaFree(p));
    for (void *p : pinned) cudaCheck(cudaFreeHost(p));
    free(g->acts.layers), free(g->params.layers), free(g->grads.layers), free(g);
    model_free(m);
}

void machine_download(Model *m) {
    Trained host = trained(m);
    size_t bytes = host.table->num_params * sizeof(float);
    to_host(host.params, m->gpu->master, bytes);
    to_host(host.m, m->gpu->m_memory, bytes);
    to_host(host.v, m->gpu->v_memory, bytes);
}

// Where the host waits for the GPU, once an update; in DPO also in each micro-batch.
ResultGpu fetch_result(Gpu *g) {
    to_host(g->result_host, g->result, sizeof(ResultGpu));
    return *g->result_host;
}

// Forward and backward of all micro-batches: adds to the gradients and to result->loss. Returns DPO's loss.
double update_gradients_gpu(Model *m, const Batch *batch, int rows, double targets) {
    double pair_losses = 0;
    cudaCheck(cudaMemsetAsync(m->gpu->result, 0, sizeof(ResultGpu), stream));
    for (int i = 0; i < rows; i += m->B) {
        Batch micro = batch_from(batch, i, m->T);
        BatchGpu device = upload_batch(m->gpu, &micro, (size_t)i * (size_t)m->T, m->B * m->T);
        pair_losses += model_loss_gpu(m, &micro, &device, m->B, m->T, (float)(1.0 / targets), TRAIN);
    }
    return pair_losses / targets;
}

Update machine_update(Model *m, const Batch *batch, int rows, double targets, const AdamW *adamw, double clip, long step) {
    Gpu *g = m->gpu;
    double pair_loss = update_gradients_gpu(m, batch, rows, targets);
    gradient_norm_gpu(g->result, g->grads_memory, g->acts.scratch, trained(m).table->num_params, targets, clip);
    adamw_gpu(m, adamw, step);
    if (m->lora) lora_merge_gpu(m);
    ResultGpu result = fetch_result(g);
    Update u = {m->dpo ? pair_loss : result.loss, result.norm};
    return u;
}

double machine_loss(Model *m, const Batch *batch, int B, int T) {
    cudaCheck(cudaMemsetAsync(m->gpu->result, 0, sizeof(ResultGpu), stream));
    BatchGpu device = upload_batch(m->gpu, batch, 0, B * T);
    double pair_losses = model_loss_gpu(m, batch, &device, B, T, 0, EVALUATE);
    double loss = fetch_result(m->gpu).loss;
    return m->dpo ? pair_losses : loss;
}

void machine_rewind(Model *m, int length) { m->gpu->cache_length = length; }

float *machine_decode(Model *m, const int *tokens, int count) {
    const Config *c = &m->config;
    Gpu *g = m->gpu;
    int chunk_rows = m->B * m->T < PROMPT_CHUNK ? m->B * m->T : PROMPT_CHUNK, last = 0;
    assert(count > 0 && g->cache_length + count <= m->positions);
    for (int done = 0; done < count; done += last, g->cache_length += last) {
        last = count - done < chunk_rows ? count - done : chunk_rows;
        to_device(g->decode_tokens, tokens + done, sizeof(int) * (size_t)last);
        model_forward_gpu(m, g->decode_tokens, NULL, 1, last, g->cache_length);
    }
    matmul_forward_gpu(g->acts.logits, NULL, g->acts.h + (size_t)(last - 1) * c->C, g->params.head, NULL, 1, c->C, c->V);
    floatX *logits = (floatX *)g->logits_host;                   // its front half; widened from behind
    to_host(logits, g->acts.logits, sizeof(floatX) * (size_t)c->V);
    for (int i = c->V - 1; i >= 0; i--) g->logits_host[i] = to_float(logits[i]);
    return g->logits_host;
}
