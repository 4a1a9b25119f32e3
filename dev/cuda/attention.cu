// Causal attention, forward and backward.   make build/attention && build/attention
//
//    p_ij = softmax_j(q_i . k_j / sqrt(HD))      att_i = sum_j p_ij v_j      lse_i = log(sum_j exp(q_i . k_j / sqrt(HD)))
//    dv_j = sum_i p_ij datt_i     ds_ij = p_ij (datt_i . v_j - datt_i . att_i)     dq_i = sum_j ds_ij k_j / sqrt(HD)     dk_j alike
// over the keys j = start_i .. i of query i's document; NH query heads share NKV heads of keys and values.
//
// Of T x T products half are masked. With B = 4, T = 1024, NH = 16, NKV = 8, HD = 128 (Qwen3-0.6B), bf16, and an H100 SXM's data sheet
// (989 TFLOP/s, 3350 GB/s):
//    forward    2 products:    2 B NH HD T^2 = 17 GFLOP    17 us        read q, k, v, write att:                   50 MB    15 us
//    backward   5 products:    5 B NH HD T^2 = 43 GFLOP    43 us        read q, k, v, att, datt, write the d's:   101 MB    30 us
// Scores in memory would be B NH T^2 numbers: 268 MB of fp32, written once and read several times.
#include "bench.h"

static int B, T, NH, NKV, HD, QKV;
static Array qkv, start, att, lse, att_inp, lse_inp, datt, dqkv, delta;
static float *scores, *dscores;                   // (B, NH, T, T), for the versions that keep them

floatX *q_of(const Array &a) { return a.x; }
floatX *k_of(const Array &a) { return a.x + NH * HD; }
floatX *v_of(const Array &a) { return a.x + (NH + NKV) * HD; }

__device__ float dot_v1(const floatX *a, const floatX *b, int HD) {
    float sum = 0;
    for (int c = 0; c < HD; c++) sum += to_float(a[c]) * to_float(b[c]);
    return sum;
}

// v1: the CPU loops, batch row, head and query turned into a thread index.
__global__ void attention_forward_v1_kernel(floatX *att, float *lse, float *scores, const floatX *q, const floatX *k, const floatX *v,
                                            const int *start, int B, int T, int NH, int NKV, int HD, int stride) {
    size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;                              // as of (B, NH, T)
    int t = index % T, h = index / T % NH, b = index / T / NH;
    if (b >= B) return;
    size_t row = (size_t)b * T + t, kv = (size_t)b * T * stride + h / (NH / NKV) * HD;
    float *p = scores + index * T, scale = 1.0f / sqrtf((float)HD), largest = -INFINITY, sum = 0;
    for (int j = start[row]; j <= t; j++) {
        p[j] = scale * dot_v1(q + row * stride + h * HD, k + kv + (size_t)j * stride, HD);
        largest = fmaxf(largest, p[j]);
    }
    for (int j = start[row]; j <= t; j++) {
        p[j] = expf(p[j] - largest);
        sum += p[j];
    }
    for (int c = 0; c < HD; c++) {
        float out = 0;
        for (int j = start[row]; j <= t; j++) out += p[j] / sum * to_float(v[kv + (size_t)j * stride + c]);
        att[(row * NH + h) * HD + c] = to_floatX(out);
    }
    lse[index] = largest + logf(sum);
}
void forward_v1(int block) {
    attention_forward_v1_kernel<<<blocks_for((size_t)B * NH * T, block), block, 0, stream>>>(
        att.x, lse.f, scores, q_of(qkv), k_of(qkv), v_of(qkv), start.i, B, T, NH, NKV, HD, QKV);
}

// Limit of v1: (T, T) scores, written and read HD + 3 times, each thread in a row of its own; and long rows keep short ones waiting.
// Change:      a warp for each query, 32 keys at a time, the softmax online: no scores in memory. This is what train_qwen.cu does in fp32.
// Limit now:   every query reads all of its keys and values from the cache, one warp for one query; lanes read keys of different rows.
void forward_v2(int) {
    attention_forward_rows_kernel<<<dim3(ceil_div(T, ROW_WARPS), NH, B), ROW_WARPS * WARP, 0, stream>>>(
        att.x, lse.f, q_of(qkv), k_of(qkv), v_of(qkv), start.i, T, 0, NH, NKV, HD, QKV, QKV);
}

// Limit of v2: reading keys and values.
// Change:      the queries of a block share tiles of keys and values in shared memory; four lanes for each query, with a quarter of q
//              and att in registers. Four words from shared memory serve all eight queries of a warp.
// Limit now:   a load from shared memory for each multiplication, and these are fp32: a fifteenth of the tensor cores' rate on an H100.
const int V3_LANES = 4, V3_KEYS = 32;
template <int HD>
__global__ void attention_forward_v3_kernel(floatX *att, float *lse, const floatX *q, const floatX *k, const floatX *v, const int *start,
                                            int T, int NH, int NKV, int stride) {
    extern __shared__ float kv_tiles[];                          // V3_KEYS rows of K, then of V
    float *k_tile = kv_tiles, *v_tile = kv_tiles + V3_KEYS * HD, q_part[HD / V3_LANES], out[HD / V3_LANES] = {};
    int queries = blockDim.x / V3_LANES, lane = threadIdx.x % V3_LANES, h = blockIdx.y, b = blockIdx.z;
    int t0 = blockIdx.x * queries, last = min(t0 + queries, T) - 1, t = min(t0 + (int)threadIdx.x / V3_LANES, last);
    size_t batch_row = (size_t)b * T, row = batch_row + t, kv = batch_row * stride + h / (NH / NKV) * HD;
    float scale = 1.0f / sqrtf((float)HD), largest = -INFINITY, sum = 0;
    for (int i = 0; i < HD / V3_LANES; i++) q_part[i] = to_float(q[row * stride + h * HD + i * V3_LANES + lane]);
    for (int j0 = start[batch_row + t0]; j0 <= last; j0 += V3_KEYS) {
        __syncthreads();                                         // the tile before is no longer needed
        for (int i = threadIdx.x; i < V3_KEYS * HD; i += blockDim.x) {
            size_t from = kv + (size_t)min(j0 + i / HD, last) * stride + i % HD;
            k_tile[i] = to_float(k[from]), v_tile[i] = to_float(v[from]);
        }
        __syncthreads();
        for (int j = j0; j < j0 + V3_KEYS; j++) {
            float score = 0;
            for (int i = 0; i < HD / V3_LANES; i++) score += q_part[i] * k_tile[(j - j0) * HD + i * V3_LANES + lane];
            score = scale * group_sum(score, V3_LANES);
            if (j < start[row] || j > t) continue;
            if (score > largest) {
                float rescale = expf(largest - score);
                for (int i = 0; i < HD / V3_LANES; i++) out[i] *= rescale;
                sum *= rescale, largest = score;
            }
            float p = expf(score - largest);
            for (int i = 0; i < HD / V3_LANES; i++) out[i] += p * v_tile[(j - j0) * HD + i * V3_LANES + lane];
            sum += p;
        }
    }
    if (t0 + (int)threadIdx.x / V3_LANES > last) return;
    for (int i = 0; i < HD / V3_LANES; i++) att[(row * NH + h) * HD + i * V3_LANES + lane] = to_floatX(out[i] / sum);
    if (lane == 0) lse[((size_t)b * NH + h) * T + t] = largest + logf(sum);
}
void forward_v3(int block) {
    CHECK(HD == 32 || HD == 64 || HD == 128, "no instance for heads of %d channels", HD);
    auto kernel = HD == 32 ? attention_forward_v3_kernel<32>
                : HD == 64 ? attention_forward_v3_kernel<64> : attention_forward_v3_kernel<128>;
    dim3 grid(ceil_div(T, block / V3_LANES), NH, B);
    kernel<<<grid, block, 2 * V3_KEYS * HD * sizeof(float), stream>>>(
        att.x, lse.f, q_of(qkv), k_of(qkv), v_of(qkv), start.i, T, NH, NKV, QKV);
}

// Limit of v3: fp32 multiplications.
// Change:      the launcher of train_qwen.cu. In bf16: tensor cores, scores that stay in registers, the next tile copied in the background.
// Limit now:   by count, shared memory: with 16 queries a warp, 512 bytes read feed two mma, which take no longer than the reading.
void forward_production(int) {
    attention_forward_gpu(att.x, lse.f, q_of(qkv), k_of(qkv), v_of(qkv), start.i, B, T, 0, NH, NKV, HD, QKV, QKV);
}

// v1: the CPU loops. p and ds of all pairs go to memory, then each number of dq, dk and dv is a sum over them.
__global__ void attention_backward_v1_scores_kernel(float *scores, float *dscores, const floatX *datt, const floatX *att, const float *lse,
                                                    const floatX *q, const floatX *k, const floatX *v, const int *start,
                                                    int B, int T, int NH, int NKV, int HD, int stride) {
    size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;                              // as of (B, NH, T)
    int t = index % T, h = index / T % NH, b = index / T / NH;
    if (b >= B) return;
    size_t row = (size_t)b * T + t, kv = (size_t)b * T * stride + h / (NH / NKV) * HD, out_row = (row * NH + h) * HD;
    float scale = 1.0f / sqrtf((float)HD), back = dot_v1(datt + out_row, att + out_row, HD);
    for (int j = 0; j < T; j++) {
        bool visible = start[row] <= j && j <= t;
        size_t key = kv + (size_t)j * stride;
        float p = visible ? expf(scale * dot_v1(q + row * stride + h * HD, k + key, HD) - lse[index]) : 0;
        scores[index * T + j] = p;
        dscores[index * T + j] = visible ? scale * p * (dot_v1(datt + out_row, v + key, HD) - back) : 0;
    }
}
__global__ void attention_backward_v1_dq_kernel(floatX *dq, const float *dscores, const floatX *k,
                                                int B, int T, int NH, int NKV, int HD, int stride) {
    size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = index / (NH * HD);     // as of (B, T, NH, HD)
    int c = index % HD, h = index / HD % NH, t = row % T, b = row / T;
    if (b >= B) return;
    const float *ds = dscores + (((size_t)b * NH + h) * T + t) * T;
    float sum = 0;
    for (int j = 0; j < T; j++) sum += ds[j] * to_float(k[((size_t)b * T + j) * stride + h / (NH / NKV) * HD + c]);
    dq[row * stride + h * HD + c] = to_floatX(sum);
}
__global__ void attention_backward_v1_dkv_kernel(floatX *dk, floatX *dv, const float *scores, const float *dscores, const floatX *datt,
                                                 const floatX *q, int B, int T, int NH, int NKV, int HD, int stride) {
    size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = index / (NKV * HD);    // as of (B, T, NKV, HD)
    int c = index % HD, g = index / HD % NKV, j = row % T, b = row / T, group = NH / NKV;
    if (b >= B) return;
    float dkey = 0, dvalue = 0;
    for (int h = g * group; h < (g + 1) * group; h++)
        for (int t = 0; t < T; t++) {
            size_t pair = (((size_t)b * NH + h) * T + t) * T + j, query = (size_t)b * T + t;
            dkey += dscores[pair] * to_float(q[query * stride + h * HD + c]);
            dvalue += scores[pair] * to_float(datt[(query * NH + h) * HD + c]);
        }
    dk[row * stride + g * HD + c] = to_floatX(dkey), dv[row * stride + g * HD + c] = to_floatX(dvalue);
}
void backward_v1(int block) {
    size_t rows = (size_t)B * T;
    attention_backward_v1_scores_kernel<<<blocks_for(rows * NH, block), block, 0, stream>>>(
        scores, dscores, datt.x, att_inp.x, lse_inp.f, q_of(qkv), k_of(qkv), v_of(qkv), start.i, B, T, NH, NKV, HD, QKV);
    attention_backward_v1_dq_kernel<<<blocks_for(rows * NH * HD, block), block, 0, stream>>>(
        q_of(dqkv), dscores, k_of(qkv), B, T, NH, NKV, HD, QKV);
    attention_backward_v1_dkv_kernel<<<blocks_for(rows * NKV * HD, block), block, 0, stream>>>(
        k_of(dqkv), v_of(dqkv), scores, dscores, datt.x, q_of(qkv), B, T, NH, NKV, HD, QKV);
}

// Limit of v1: two (T, T) arrays in memory, and masked pairs take as long as others.
// Change:      p is made again from lse, by a warp for each query (dq) and a warp for each key (dk, dv, the sum over queries and heads
//              in one place, so no atomics). Seven products instead of five, but nothing of size (T, T). As train_qwen.cu does in fp32.
// Limit now:   as the forward's v2.
void backward_v2(int) {
    dim3 q_grid(ceil_div(T, ROW_WARPS), NH, B), kv_grid(ceil_div(T, ROW_WARPS), NKV, B);
    attention_dq_rows_kernel<<<q_grid, ROW_WARPS * WARP, 0, stream>>>(
        q_of(dqkv), delta.f, datt.x, att_inp.x, lse_inp.f, q_of(qkv), k_of(qkv), v_of(qkv), start.i, T, NH, NKV, HD, QKV);
    attention_dkv_rows_kernel<<<kv_grid, ROW_WARPS * WARP, 0, stream>>>(
        k_of(dqkv), v_of(dqkv), datt.x, lse_inp.f, delta.f, q_of(qkv), k_of(qkv), v_of(qkv), start.i, T, NH, NKV, HD, QKV);
}

// Limit of v2: reading, and fp32 multiplications.
// Change:      the launcher of train_qwen.cu. In bf16: tiles of 64 queries or keys, tensor cores.
// Limit now:   by count, shared memory as in the forward, and registers: at most two blocks, eight warps, on an SM for HD = 128.
void backward_production(int) {
    attention_backward_gpu(q_of(dqkv), k_of(dqkv), v_of(dqkv), delta.f, datt.x, att_inp.x, lse_inp.f, q_of(qkv), k_of(qkv), v_of(qkv),
                           start.i, B, T, NH, NKV, HD, QKV);
}

static Version forward[] = {{"v1 the CPU loops", forward_v1, {64, 256}}, {"v2 a warp for a query, online softmax", forward_v2},
    {"v3 tiles of keys in shared memory", forward_v3, {64, 128}}, {"train_qwen.cu", forward_production}};
static Version backward[] = {{"v1 the CPU loops", backward_v1, {64, 256}}, {"v2 a warp for a query or a key", backward_v2},
    {"train_qwen.cu", backward_production}};

int main(void) {
    // B, T, NH, NKV, HD, mean length of a document (0: one document a row)
    static const int sizes[][6] = {{1, 1, 2, 1, 64, 0}, {2, 65, 3, 1, 32, 9}, {1, 130, 2, 2, 128, 0}, {2, 100, 4, 2, 64, 40},
        {4, 1024, 16, 8, 128, 0}};
    for (int s = 0; bench_next(s, sizes); s++) {
        B = sizes[s][0], T = sizes[s][1], NH = sizes[s][2], NKV = sizes[s][3], HD = sizes[s][4], QKV = (NH + 2 * NKV) * HD;
        size_t N = (size_t)B * T, width = (size_t)NH * HD, pairs = (size_t)B * NH * T * T;
        int *starts = (int *)xcalloc(N, sizeof(int)), length = sizes[s][5];
        for (size_t n = 0; n < N; n++) {
            int t = (int)(n % T);
            if (t > 0) starts[n] = length && mix64(n) % length == 0 ? t : starts[n - 1];
        }
        start = array_of("start", INT, N, starts);
        free(starts);
        scores = device_alloc<float>(pairs), dscores = device_alloc<float>(pairs);
        double product = (double)pairs * HD, bytes = (double)N * sizeof(floatX);               // the visible half of 2 T^2 HD a head
        qkv = array_random("qkv", FLOATX, N * QKV, 1.5f), att = array_output("att", FLOATX, N * width);
        lse = array_output("lse", FLOAT, N * NH);
        att.roundings = 3;                        // of p, and sums of it
        float *q = qkv.host, *k = q + NH * HD, *v = k + NKV * HD;
        attention_forward(att.host, lse.host, q, k, v, start.host_i, B, T, NH, NKV, HD, QKV);
        bench("attention_forward", forward, bytes * (double)(QKV + width), 2 * product, {{&att, &lse}});

        att_inp = array_of("att", FLOATX, N * width, att.host), lse_inp = array_of("lse", FLOAT, N * NH, lse.host);
        datt = array_random("datt", FLOATX, N * width, 1), dqkv = array_output("dqkv", FLOATX, N * QKV);
        delta = array_output("delta", FLOAT, N * NH);                                          // scratch, not compared
        dqkv.roundings = 6;                       // of p and ds; a large ds times a large q has an error that stays when the sum cancels
        attention_backward(dqkv.host, dqkv.host + NH * HD, dqkv.host + (NH + NKV) * HD, datt.host, att_inp.host, lse_inp.host, q, k, v,
                           start.host_i, B, T, NH, NKV, HD, QKV);
        bench("attention_backward", backward, bytes * 2 * (double)(QKV + width), 5 * product, {{&dqkv}});
        cudaCheck(cudaFree(scores));
        cudaCheck(cudaFree(dscores));
    }
    return bench_close();
}
