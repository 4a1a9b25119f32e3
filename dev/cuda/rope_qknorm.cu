// QK-norm and RoPE, forward and backward.   make build/rope_qknorm && build/rope_qknorm
//
// A row of qkv (N, QKV) holds NH + NKV heads of queries and keys, then NKV heads of values, HD channels each. For each query and key head:
//    y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps)          (Qwen3; without QK-norm y is x, and qk is qkv, in place)
//    qk[i] = y[i] cos - y[i + HD/2] sin,   qk[i + HD/2] = y[i + HD/2] cos + y[i] sin       the angle of pair i at the row's position
// Backward, in place on dqkv: turns back by the same angle, then RMSNorm's backward in each head; weight gradients += sums over all heads.
//
// Memory is the bound. Bytes in bf16, N = 8192, NH = 16, NKV = 8, HD = 128 (Qwen3-0.6B), W = (NH + NKV) HD = 3072 channels a row, and the
// time at the 3350 GB/s of an H100 SXM's data sheet (the table of cosines is read from the L2 cache):
//    forward    read and write:                     4 N W = 101 MB    30 us
//    backward   read dqkv and qkv, write dqkv:      6 N W = 151 MB    45 us
#include "bench.h"

static const float EPS = 1e-6f;
enum { LARGEST_HD = 256 };
static int N, T, NH, NKV, HD, QKV, past;
static bool has_norm;
static Array qkv, qk, rstd, q_norm, k_norm, table, start, dqkv, rstd_inp, dqk_norm;      // dqk_norm (2, HD): of q_norm, of k_norm
static const floatX *q_norm_or_null(void) { return has_norm ? q_norm.x : NULL; }
static const floatX *k_norm_or_null(void) { return has_norm ? k_norm.x : NULL; }
static const floatX *source(void) { return has_norm ? qkv.x : qk.x; }

__device__ const float *angles_of(const float *table, const int *start, int past, int n, int T, int HD) {
    return table + (size_t)(past + n % T - start[n]) * HD;
}

// v1: the CPU's loops, row and head turned into a thread index: one kernel for the norm, one for the turn.
__global__ void rmsnorm_heads_v1_kernel(floatX *out, float *rstd, const floatX *inp, const floatX *q_norm, const floatX *k_norm,
                                        int N, int NH, int heads, int HD, int QKV, float eps) {
    int at = blockIdx.x * blockDim.x + threadIdx.x, n = at / heads, h = at % heads;
    if (n >= N) return;
    const floatX *x = inp + (size_t)n * QKV + h * HD, *weight = h < NH ? q_norm : k_norm;
    float squares = 0;
    for (int i = 0; i < HD; i++) squares += to_float(x[i]) * to_float(x[i]);
    float r = 1.0f / sqrtf(squares / (float)HD + eps);
    for (int i = 0; i < HD; i++) out[(size_t)n * QKV + h * HD + i] = to_floatX(to_float(x[i]) * r * to_float(weight[i]));
    rstd[at] = r;
}
__global__ void rope_v1_kernel(floatX *x, const float *table, const int *start, int past, int N, int T, int heads, int HD, int QKV,
                               RopeDirection direction) {
    int at = blockIdx.x * blockDim.x + threadIdx.x, n = at / heads, h = at % heads;
    if (n >= N) return;
    const float *angles = angles_of(table, start, past, n, T, HD);
    floatX *a = x + (size_t)n * QKV + h * HD, *b = a + HD / 2;
    for (int i = 0; i < HD / 2; i++) {
        float c = angles[2 * i], s = angles[2 * i + 1] * (float)direction, a0 = to_float(a[i]), b0 = to_float(b[i]);
        a[i] = to_floatX(a0 * c - b0 * s);
        b[i] = to_floatX(b0 * c + a0 * s);
    }
}
void forward_v1(int block) {
    int heads = NH + NKV, grid = ceil_div(N * heads, block);
    if (has_norm) rmsnorm_heads_v1_kernel<<<grid, block, 0, stream>>>(qk.x, rstd.f, qkv.x, q_norm.x, k_norm.x, N, NH, heads, HD, QKV, EPS);
    rope_v1_kernel<<<grid, block, 0, stream>>>(qk.x, table.f, start.i, past, N, T, heads, HD, QKV, ROPE_FORWARD);
}

// Limit of v1: the normed heads go to memory and come back (twice the bytes, and one more rounding); lanes read HD channels apart.
// Change:      one kernel, a warp for each head; a lane holds both halves of its pairs, so the turn needs no other lane.
// Limit now:   loads of 2 bytes a lane; with HD = 64 a lane has one pair only.
__global__ void qknorm_rope_v2_kernel(floatX *qk, float *rstd, const floatX *qkv, const floatX *q_norm, const floatX *k_norm,
                                      const float *table, const int *start, int past, int N, int T, int NH, int heads, int HD, int QKV,
                                      float eps) {
    int at = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, n = at / heads, h = at % heads, lane = threadIdx.x % WARP;
    if (n >= N) return;
    size_t head = (size_t)n * QKV + h * HD;
    const floatX *weight = h < NH ? q_norm : k_norm;
    const float *angles = angles_of(table, start, past, n, T, HD);
    float a[LARGEST_HD / 2 / WARP], b[LARGEST_HD / 2 / WARP], squares = 0;
    #pragma unroll
    for (int j = 0; j < LARGEST_HD / 2 / WARP; j++) {
        int i = lane + WARP * j;
        a[j] = i < HD / 2 ? to_float(qkv[head + i]) : 0.0f, b[j] = i < HD / 2 ? to_float(qkv[head + i + HD / 2]) : 0.0f;
        squares += a[j] * a[j] + b[j] * b[j];
    }
    float r = weight ? 1.0f / sqrtf(warp_sum(squares) / (float)HD + eps) : 1.0f;
    #pragma unroll
    for (int j = 0; j < LARGEST_HD / 2 / WARP; j++) {
        int i = lane + WARP * j;
        if (i >= HD / 2) continue;
        float a0 = a[j] * r, b0 = b[j] * r, c = angles[2 * i], s = angles[2 * i + 1];
        if (weight) a0 *= to_float(weight[i]), b0 *= to_float(weight[i + HD / 2]);
        qk[head + i] = to_floatX(a0 * c - b0 * s);
        qk[head + i + HD / 2] = to_floatX(b0 * c + a0 * s);
    }
    if (weight && lane == 0) rstd[at] = r;
}
void forward_v2(int block) {
    int heads = NH + NKV;
    CHECK(HD <= LARGEST_HD, "HD = %d is more than %d", HD, LARGEST_HD);
    qknorm_rope_v2_kernel<<<ceil_div(N * heads * WARP, block), block, 0, stream>>>(qk.x, rstd.f, source(), q_norm_or_null(),
        k_norm_or_null(), table.f, start.i, past, N, T, NH, heads, HD, QKV, EPS);
}

// Limit of v2: the width of a load.
// Change:      a lane takes a pack of 8 channels from each half, so HD / 16 lanes work on a head (HD / 8 in fp32), a warp on several.
// Limit now:   memory; one head for each lane's lifetime means that its loads are not overlapped with another head's arithmetic.
__global__ void qknorm_rope_v3_kernel(floatX *qk, float *rstd, const floatX *qkv, const floatX *q_norm, const floatX *k_norm,
                                      const float *table, const int *start, int past, int N, int T, int NH, int heads, int HD, int QKV,
                                      float eps) {
    int lanes = HD / (2 * WIDE), thread = blockIdx.x * blockDim.x + threadIdx.x, at = thread / lanes, i = thread % lanes * WIDE;
    bool valid = at < N * heads;
    if (!valid) at = 0;                            // all lanes take part in the shuffles
    int n = at / heads, h = at % heads;
    size_t head = (size_t)n * QKV + h * HD + i;
    const floatX *weight = h < NH ? q_norm : k_norm;
    Pack<WIDE> a = *(const Pack<WIDE> *)(qkv + head), b = *(const Pack<WIDE> *)(qkv + head + HD / 2);
    float squares = 0, r = 1;
    for (int j = 0; j < WIDE; j++) squares += to_float(a.x[j]) * to_float(a.x[j]) + to_float(b.x[j]) * to_float(b.x[j]);
    if (q_norm) r = 1.0f / sqrtf(group_sum(squares, lanes) / (float)HD + eps);
    if (!valid) return;
    Pack<WIDE> wa = {}, wb = {};
    if (weight) wa = *(const Pack<WIDE> *)(weight + i), wb = *(const Pack<WIDE> *)(weight + i + HD / 2);
    const float2 *angles = (const float2 *)angles_of(table, start, past, n, T, HD) + i;
    for (int j = 0; j < WIDE; j++) {
        float a0 = to_float(a.x[j]) * r, b0 = to_float(b.x[j]) * r;
        float2 turn = angles[j];
        if (weight) a0 *= to_float(wa.x[j]), b0 *= to_float(wb.x[j]);
        a.x[j] = to_floatX(a0 * turn.x - b0 * turn.y);
        b.x[j] = to_floatX(b0 * turn.x + a0 * turn.y);
    }
    *(Pack<WIDE> *)(qk + head) = a, *(Pack<WIDE> *)(qk + head + HD / 2) = b;
    if (weight && i == 0) rstd[at] = r;
}
void forward_v3(int block) {
    int heads = NH + NKV, lanes = HD / (2 * WIDE);
    CHECK(head_is_wide(HD), "HD = %d is not %d times a power of two", HD, 2 * WIDE);
    qknorm_rope_v3_kernel<<<ceil_div(N * heads * lanes, block), block, 0, stream>>>(qk.x, rstd.f, source(), q_norm_or_null(),
        k_norm_or_null(), table.f, start.i, past, N, T, NH, heads, HD, QKV, EPS);
}

// Limit of v3: one head for each lane.
// Change:      the launcher of train_qwen.cu.
// Limit now:   see the comment there.
void forward_production(int) {
    qknorm_rope_forward_gpu(qk.x, rstd.f, source(), q_norm_or_null(), k_norm_or_null(), table.f, start.i, past, N, T, NH, NKV, HD, EPS);
}

// v1: the CPU's loops: the turn and dinp with row and head turned into a thread index, the weights' gradients with the channel.
__global__ void rmsnorm_heads_backward_v1_kernel(floatX *dqkv, const floatX *qkv, const float *rstd, const floatX *q_norm,
                                                 const floatX *k_norm, int N, int NH, int heads, int HD, int QKV) {
    int at = blockIdx.x * blockDim.x + threadIdx.x, n = at / heads, h = at % heads;
    if (n >= N) return;
    const floatX *x = qkv + (size_t)n * QKV + h * HD, *weight = h < NH ? q_norm : k_norm;
    floatX *d = dqkv + (size_t)n * QKV + h * HD;
    float r = rstd[at], sum = 0;
    for (int i = 0; i < HD; i++) sum += to_float(weight[i]) * to_float(d[i]) * to_float(x[i]);
    float back = sum / (float)HD * r * r * r;
    for (int i = 0; i < HD; i++) d[i] = to_floatX(to_float(weight[i]) * to_float(d[i]) * r - to_float(x[i]) * back);
}
__global__ void rmsnorm_heads_dweight_v1_kernel(float *dq_norm, float *dk_norm, const floatX *dqkv, const floatX *qkv, const float *rstd,
                                                int N, int NH, int heads, int HD, int QKV) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= HD) return;
    for (int n = 0; n < N; n++)
        for (int h = 0; h < heads; h++) {
            size_t at = (size_t)n * QKV + h * HD + i;
            (h < NH ? dq_norm : dk_norm)[i] += to_float(dqkv[at]) * to_float(qkv[at]) * rstd[n * heads + h];
        }
}
void backward_v1(int block) {
    int heads = NH + NKV, grid = ceil_div(N * heads, block);
    rope_v1_kernel<<<grid, block, 0, stream>>>(dqkv.x, table.f, start.i, 0, N, T, heads, HD, QKV, ROPE_BACKWARD);
    if (!has_norm) return;
    rmsnorm_heads_dweight_v1_kernel<<<ceil_div(HD, block), block, 0, stream>>>(dqk_norm.f, dqk_norm.f + HD, dqkv.x, qkv.x, rstd_inp.f,
                                                                               N, NH, heads, HD, QKV);
    rmsnorm_heads_backward_v1_kernel<<<grid, block, 0, stream>>>(dqkv.x, qkv.x, rstd_inp.f, q_norm.x, k_norm.x, N, NH, heads, HD, QKV);
}

// Limit of v1: HD threads add up N (NH + NKV) terms each, one after the other; three passes over dqkv.
// Change:      one kernel, packs as in the forward's v3; a lane walks over many heads with its part of the weights' gradients in registers,
//              a block adds up its lanes' parts in shared memory, a second kernel those of the blocks, always in the same order.
// Limit now:   memory; 32 registers a lane hold sums.
__global__ void qknorm_rope_backward_v2_kernel(floatX *dqkv, float *partial, const floatX *qkv, const float *rstd, const floatX *q_norm,
                                               const floatX *k_norm, const float *table, const int *start, int N, int T, int NH, int heads,
                                               int HD, int QKV) {
    extern __shared__ float sums[];                // (lane groups of the block, 2, HD): of q_norm and of k_norm
    int lanes = HD / (2 * WIDE), groups = blockDim.x / lanes, group = threadIdx.x / lanes, i = threadIdx.x % lanes * WIDE;
    float dweight[2][2][WIDE] = {};                // q or k, first or second half
    for (int first = blockIdx.x * groups; first < N * heads; first += gridDim.x * groups) {
        bool valid = first + group < N * heads;
        int at = valid ? first + group : 0, n = at / heads, h = at % heads, is_key = h >= NH;
        size_t head = (size_t)n * QKV + h * HD + i;
        const float2 *angles = (const float2 *)angles_of(table, start, 0, n, T, HD) + i;
        Pack<WIDE> da = load_pack<WIDE>(dqkv + head), db = load_pack<WIDE>(dqkv + head + HD / 2), a = {}, b = {}, wa = {}, wb = {};
        float ga[WIDE], gb[WIDE], sum = 0, r = 1, back = 0;
        if (q_norm) {
            const floatX *weight = is_key ? k_norm : q_norm;
            a = *(const Pack<WIDE> *)(qkv + head), b = *(const Pack<WIDE> *)(qkv + head + HD / 2);
            wa = *(const Pack<WIDE> *)(weight + i), wb = *(const Pack<WIDE> *)(weight + i + HD / 2), r = rstd[at];
        }
        for (int j = 0; j < WIDE; j++) {
            float2 turn = angles[j];
            float x = to_float(da.x[j]), y = to_float(db.x[j]);
            ga[j] = x * turn.x + y * turn.y, gb[j] = y * turn.x - x * turn.y;
            if (!q_norm) continue;
            float in_a = to_float(a.x[j]), in_b = to_float(b.x[j]);
            for (int k = 0; k < 2; k++) {          // no index at run time, so that the sums can stay in registers
                dweight[k][0][j] += valid && is_key == k ? ga[j] * in_a * r : 0.0f;
                dweight[k][1][j] += valid && is_key == k ? gb[j] * in_b * r : 0.0f;
            }
            ga[j] *= to_float(wa.x[j]), gb[j] *= to_float(wb.x[j]);
            sum += ga[j] * in_a + gb[j] * in_b;
        }
        if (q_norm) back = group_sum(sum, lanes) / (float)HD * r * r * r;
        for (int j = 0; j < WIDE; j++) {
            da.x[j] = to_floatX(ga[j] * r - to_float(a.x[j]) * back);
            db.x[j] = to_floatX(gb[j] * r - to_float(b.x[j]) * back);
        }
        if (valid) *(Pack<WIDE> *)(dqkv + head) = da, *(Pack<WIDE> *)(dqkv + head + HD / 2) = db;
    }
    if (!q_norm) return;
    for (int k = 0; k < 2; k++)
        for (int j = 0; j < WIDE; j++) {
            sums[(group * 2 + k) * HD + i + j] = dweight[k][0][j];
            sums[(group * 2 + k) * HD + i + j + HD / 2] = dweight[k][1][j];
        }
    __syncthreads();
    for (int c = threadIdx.x; c < 2 * HD; c += blockDim.x) {
        float sum = 0;
        for (int g = 0; g < groups; g++) sum += sums[g * 2 * HD + c];
        partial[(size_t)blockIdx.x * 2 * HD + c] = sum;
    }
}
__global__ void qknorm_rope_backward_v2_sum_kernel(float *dq_norm, float *dk_norm, const float *partial, int blocks, int HD) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= 2 * HD) return;
    float sum = 0;
    for (int b = 0; b < blocks; b++) sum += partial[(size_t)b * 2 * HD + c];
    (c < HD ? dq_norm : dk_norm)[c % HD] += sum;
}
void backward_v2(int block) {
    int heads = NH + NKV, groups = block / (HD / (2 * WIDE)), most = ceil_div(N * heads, groups), blocks = most < 512 ? most : 512;
    CHECK(head_is_wide(HD), "HD = %d is not %d times a power of two", HD, 2 * WIDE);
    qknorm_rope_backward_v2_kernel<<<blocks, block, groups * 2 * HD * sizeof(float), stream>>>(dqkv.x, scratch, qkv.x, rstd_inp.f,
        q_norm_or_null(), k_norm_or_null(), table.f, start.i, N, T, NH, heads, HD, QKV);
    if (!has_norm) return;
    qknorm_rope_backward_v2_sum_kernel<<<ceil_div(2 * HD, block), block, 0, stream>>>(dqk_norm.f, dqk_norm.f + HD, scratch, blocks, HD);
}

// Limit of v2: the second kernel, and registers.
// Change:      the launcher of train_qwen.cu.
// Limit now:   see the comment there.
void backward_production(int) {
    qknorm_rope_backward_gpu(dqkv.x, dqk_norm.f, dqk_norm.f + HD, qkv.x, rstd_inp.f, q_norm_or_null(), k_norm_or_null(), table.f, start.i,
                             scratch, N, T, NH, NKV, HD);
}

static Version forward[] = {{"v1 the CPU loops", forward_v1, {64, 256}}, {"v2 one kernel, a warp for a head", forward_v2, {64, 256}},
    {"v3 packs of 8", forward_v3, {64, 256}}, {"train_qwen.cu", forward_production, {}}};
static Version backward[] = {{"v1 the CPU loops", backward_v1, {64, 256}}, {"v2 one kernel, packs, sums of blocks", backward_v2, {64, 256}},
    {"train_qwen.cu", backward_production, {}}};

// What the CPU's two norms and the turn expect. Without QK-norm qk begins as qkv and rstd is not written.
static void make_case(void) {
    int heads = NH + NKV, *positions = (int *)xmalloc(sizeof(int) * N);
    size_t row = QKV, count = (size_t)N * row;
    float *angles = (float *)xmalloc(sizeof(float) * (past + T) * HD);
    float *q_rstd = (float *)xmalloc(sizeof(float) * N * heads), *k_rstd = q_rstd + N * NH;
    rope_table(angles, past + T, HD, 10000.0f);
    table = array_of("table", FLOAT, (size_t)(past + T) * HD, angles);
    for (int n = 0; n < N; n++) positions[n] = n % T / 5 * 5;                        // a document begins every 5 positions
    start = array_of("start", INT, N, positions);
    qkv = array_random("qkv", FLOATX, count, 1);
    q_norm = array_random("q_norm", FLOATX, HD, 1), k_norm = array_random("k_norm", FLOATX, HD, 1);
    qk = array_of("qk", FLOATX, count, qkv.host), rstd = array_output("rstd", FLOAT, (size_t)N * heads);
    dqkv = array_random("dqkv", FLOATX, count, 1);
    dqk_norm = array_random("dqk_norm", FLOAT, 2 * HD, 1);
    qk.roundings = dqkv.roundings = 2, dqk_norm.roundings = 3;                       // v1 rounds what lies between, and adds it up
    for (int n = 0; n < N; n++) positions[n] = past + n % T - start.host_i[n];
    if (has_norm) {
        rmsnorm_forward(qk.host, q_rstd, qkv.host, q_norm.host, N, NH, HD, QKV, EPS);
        rmsnorm_forward(qk.host + NH * HD, k_rstd, qkv.host + NH * HD, k_norm.host, N, NKV, HD, QKV, EPS);
        for (int n = 0; n < N; n++)
            for (int h = 0; h < heads; h++) rstd.host[n * heads + h] = h < NH ? q_rstd[n * NH + h] : k_rstd[n * NKV + h - NH];
    }
    rope(qk.host, positions, angles, N, heads, HD, QKV, ROPE_FORWARD);
    rstd_inp = array_of("rstd", FLOAT, (size_t)N * heads, rstd.host);
    for (int n = 0; n < N; n++) positions[n] -= past;                                // the backward has no past
    rope(dqkv.host, positions, angles, N, heads, HD, QKV, ROPE_BACKWARD);
    if (has_norm) {
        float *dq = dqkv.host, *dk = dq + NH * HD;
        rmsnorm_backward(dq, dqk_norm.host, dq, qkv.host, q_norm.host, q_rstd, N, NH, HD, QKV, OVERWRITE);
        rmsnorm_backward(dk, dqk_norm.host + HD, dk, qkv.host + NH * HD, k_norm.host, k_rstd, N, NKV, HD, QKV, OVERWRITE);
    }
    free(positions), free(angles), free(q_rstd);
}

int main(void) {
    static const int sizes[][7] = {{1, 1, 1, 1, 16, 1, 3}, {14, 7, 4, 2, 32, 0, 2}, {6, 3, 15, 5, 128, 1, 0},
                                   {22, 11, 3, 1, 128, 1, 0}, {8192, 2048, 16, 8, 128, 1, 0}};
    for (int s = 0; bench_next(s, sizes); s++) {
        N = sizes[s][0], T = sizes[s][1], NH = sizes[s][2], NKV = sizes[s][3], HD = sizes[s][4], has_norm = sizes[s][5], past = sizes[s][6];
        QKV = (NH + 2 * NKV) * HD;
        make_case();
        double bytes = (double)N * (NH + NKV) * HD * sizeof(floatX);
        Outputs forward_outputs = {{&qk, has_norm ? &rstd : NULL}};
        bench("qknorm_rope_forward", forward, 2 * bytes, 0, forward_outputs);
        bench("qknorm_rope_backward", backward, 3 * bytes, 0, {{&dqkv, &dqk_norm}});
    }
    return bench_close();
}
