// The loss: softmax, cross-entropy and their gradient, in the place of the logits; and the whole classifier.
// make build/classifier && build/classifier
//
//    losses[n] = log(sum_j exp(logits[n][j])) - logits[n][target]          logits (N, V)
//    dlogits = (softmax(logits) - onehot(target)) * weights[n] * scale     written over logits
//    classifier: logits = h head^T, the above, dh = dlogits head, dhead += dlogits^T h          h, dh (N, C), head, dhead (V, C)
//
// A row of Qwen's vocabulary (151936) has 304 KB in bf16: more than the shared memory of a multiprocessor (227 KB on an H100), and 256 rows
// at a time, one or two for each multiprocessor, are more than the L2 cache (50 MB). So a second pass over a row is a second reading from
// memory at worst, from L2 at best. Bytes in bf16 with N = 2048, at the 3350 GB/s of an H100 SXM's data sheet:
//    cross-entropy   read once, write once:      4 N V = 1245 MB     372 us       each further reading: 186 us
// The classifier's three matmuls with C = 1024 are 6 N C V = 1.91 TFLOP: 1.93 ms at its 989 TFLOP/s of dense bf16.
#include "bench.h"

enum { FACTORS = 8 };                              // see make_logits
static int N, C, V;
static float scale = 0.25f;
static Array logits, losses, targets, weights, head, h, dh, dhead, chunk, logits_inp;

// v1: the CPU loop, the row turned into a thread index: maximum, sum, gradient.
__global__ void cross_entropy_v1_kernel(float *losses, floatX *logits, const int *targets, const float *weights, float scale,
                                        int N, int V) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    floatX *row = logits + (size_t)n * V;
    float max = -INFINITY, sum = 0, w = weights[n] * scale, target_logit = to_float(row[targets[n]]);
    for (int j = 0; j < V; j++) max = fmaxf(max, to_float(row[j]));
    for (int j = 0; j < V; j++) sum += expf(to_float(row[j]) - max);
    losses[n] = max + logf(sum) - target_logit;
    for (int j = 0; j < V; j++) row[j] = to_floatX(expf(to_float(row[j]) - max) * w / sum - (j == targets[n] ? w : 0.0f));
}
void cross_entropy_v1(int block) {
    cross_entropy_v1_kernel<<<ceil_div(N, block), block, 0, stream>>>(losses.f, logits.x, targets.i, weights.f, scale, N, V);
}

// Limit of v1: N threads, V apart in memory.
// Change:      a block for each row; block_max and block_sum join what its threads found.
// Limit now:   three readings of the row, from memory.
__global__ void cross_entropy_v2_kernel(float *losses, floatX *logits, const int *targets, const float *weights, float scale, int V) {
    int n = blockIdx.x, target = targets[n];
    floatX *row = logits + (size_t)n * V;
    float max = -INFINITY, sum = 0, w = weights[n] * scale, target_logit = to_float(row[target]);
    for (int j = threadIdx.x; j < V; j += blockDim.x) max = fmaxf(max, to_float(row[j]));
    max = block_max(max);                          // its barriers also keep the target's logit from being overwritten too early
    for (int j = threadIdx.x; j < V; j += blockDim.x) sum += expf(to_float(row[j]) - max);
    sum = block_sum(sum);
    if (threadIdx.x == 0) losses[n] = max + logf(sum) - target_logit;
    for (int j = threadIdx.x; j < V; j += blockDim.x)
        row[j] = to_floatX(expf(to_float(row[j]) - max) * w / sum - (j == target ? w : 0.0f));
}
void cross_entropy_v2(int block) {
    cross_entropy_v2_kernel<<<N, block, 0, stream>>>(losses.f, logits.x, targets.i, weights.f, scale, V);
}

// Limit of v2: the third reading.
// Change:      the online softmax: maximum and sum in one pass; when a larger logit comes, the sum so far is multiplied by
//              exp(old maximum - new maximum).
// Limit now:   2 bytes a load; two exp for each logit in the first pass.
__global__ void cross_entropy_v3_kernel(float *losses, floatX *logits, const int *targets, const float *weights, float scale, int V) {
    int n = blockIdx.x, target = targets[n];
    floatX *row = logits + (size_t)n * V;
    float max = -INFINITY, sum = 0, w = weights[n] * scale, target_logit = to_float(row[target]);
    for (int j = threadIdx.x; j < V; j += blockDim.x) {
        float x = to_float(row[j]), higher = fmaxf(max, x);
        sum = sum * expf(max - higher) + expf(x - higher);
        max = higher;
    }
    float highest = block_max(max);
    sum = block_sum(sum > 0 ? sum * expf(max - highest) : 0.0f);         // a thread without a logit has -INFINITY - -INFINITY, a NaN
    if (threadIdx.x == 0) losses[n] = highest + logf(sum) - target_logit;
    for (int j = threadIdx.x; j < V; j += blockDim.x)
        row[j] = to_floatX(expf(to_float(row[j]) - highest) * w / sum - (j == target ? w : 0.0f));
}
void cross_entropy_v3(int block) {
    cross_entropy_v3_kernel<<<N, block, 0, stream>>>(losses.f, logits.x, targets.i, weights.f, scale, V);
}

// Limit of v3: the width of a load, and exp.
// Change:      packs of 16 bytes, with one correction of the sum for each; an odd V has rows that begin between packs, so the
//              numbers before the first whole pack and after the last go one by one.
// Limit now:   the second reading.
__device__ void add_logit(float *max, float *sum, float x) {
    float higher = fmaxf(*max, x);
    *sum = *sum * expf(*max - higher) + expf(x - higher);
    *max = higher;
}
__global__ void cross_entropy_v4_kernel(float *losses, floatX *logits, const int *targets, const float *weights, float scale, int V) {
    int n = blockIdx.x, target = targets[n];
    size_t begin = (size_t)n * V, end = begin + V, packs_begin = (begin + WIDE - 1) / WIDE * WIDE, packs_end = end / WIDE * WIDE;
    float max = -INFINITY, sum = 0, w = weights[n] * scale, target_logit = to_float(logits[begin + target]);
    if (packs_begin > packs_end) packs_begin = packs_end = end;          // not even one whole pack
    size_t edges = packs_begin - begin + end - packs_end, at = threadIdx.x < packs_begin - begin ? begin + threadIdx.x
                                                             : packs_end + threadIdx.x - (packs_begin - begin);
    bool has_edge = threadIdx.x < edges;           // fewer than 2 * WIDE numbers, one for a thread
    if (has_edge) add_logit(&max, &sum, to_float(logits[at]));
    for (size_t j = packs_begin + threadIdx.x * WIDE; j < packs_end; j += blockDim.x * WIDE) {
        Pack<WIDE> p = load_pack<WIDE>(logits + j);
        float higher = max, part = 0;
        for (int i = 0; i < WIDE; i++) higher = fmaxf(higher, to_float(p.x[i]));
        for (int i = 0; i < WIDE; i++) part += expf(to_float(p.x[i]) - higher);
        sum = sum * expf(max - higher) + part;
        max = higher;
    }
    float highest = block_max(max);
    sum = block_sum(sum > 0 ? sum * expf(max - highest) : 0.0f);
    if (threadIdx.x == 0) losses[n] = highest + logf(sum) - target_logit;
    float factor = w / sum;
    if (has_edge) logits[at] = to_floatX(expf(to_float(logits[at]) - highest) * factor - (at == begin + target ? w : 0.0f));
    for (size_t j = packs_begin + threadIdx.x * WIDE; j < packs_end; j += blockDim.x * WIDE) {
        Pack<WIDE> p = load_pack<WIDE>(logits + j);
        for (int i = 0; i < WIDE; i++)
            p.x[i] = to_floatX(expf(to_float(p.x[i]) - highest) * factor - (j + i == begin + target ? w : 0.0f));
        store_pack<WIDE>(logits + j, p);
    }
}
void cross_entropy_v4(int block) {
    cross_entropy_v4_kernel<<<N, block, 0, stream>>>(losses.f, logits.x, targets.i, weights.f, scale, V);
}

// Limit of v4: the second reading.
// Change:      the launcher of train_qwen.cu: the rows in reverse, so that the last ones, which the matmul has just left in L2, come first.
// Limit now:   the second reading still; a cluster of blocks that keeps the row in its shared memories would save it (sm_90).
void cross_entropy_production(int) { cross_entropy_gpu(losses.f, logits.x, targets.i, weights.f, scale, N, V, true); }
void losses_production(int) { cross_entropy_gpu(losses.f, logits_inp.x, targets.i, weights.f, scale, N, V, false); }

// The whole, with all rows' logits at once, or a third of them: 622 or 207 MB here.
void classifier_rows(int rows) {
    classifier_gpu(losses.f, dh.x, dhead.f, h.x, head.x, targets.i, weights.f, scale, chunk.x, rows, N, C, V);
}
void classifier_whole(int) { classifier_rows(N); }
void classifier_thirds(int) { classifier_rows(ceil_div(N, 3)); }

static Version cross_entropy[] = {{"v1 the CPU loop", cross_entropy_v1, {64, 256}}, {"v2 a block for a row", cross_entropy_v2, {256, 1024}},
    {"v3 online softmax", cross_entropy_v3, {256, 1024}}, {"v4 packs of 16 bytes", cross_entropy_v4, {256, 1024}},
    {"train_qwen.cu", cross_entropy_production}};
static Version losses_only[] = {{"train_qwen.cu", losses_production}};
static Version whole[] = {{"train_qwen.cu, all rows at once", classifier_whole}, {"train_qwen.cu, a third of the rows", classifier_thirds}};

// Logits, and in logits.host and losses.host what is expected. The CPU has only the whole classifier, which leaves dlogits in its buffer
// for 256 rows. So the logits here are such that it makes them without rounding: row n is column n % 8 of a random head (V, 8), times 2^k.
static void make_logits(void) {
    size_t count = (size_t)N * V;
    float *values = (float *)xmalloc(count * sizeof(float)), *rows = (float *)xcalloc((size_t)N * FACTORS, sizeof(float));
    float *unused = (float *)xcalloc((size_t)(N + V) * FACTORS, sizeof(float));
    Array columns = array_random("columns", FLOATX, (size_t)V * FACTORS, 2);
    for (int n = 0; n < N; n++) rows[n * FACTORS + n % FACTORS] = ldexpf(1, n / FACTORS % 3 - 1);
    #pragma omp parallel for
    for (size_t i = 0; i < count; i++) {
        size_t n = i / V, factor = n % FACTORS;
        values[i] = rows[n * FACTORS + factor] * columns.host[i % V * FACTORS + factor];
    }
    logits = array_of("logits", FLOATX, count, values), logits_inp = array_of("logits", FLOATX, count, values);
    for (int n = 0; n < N; n += CLASSIFIER_ROWS)
        classifier(losses.host + n, unused, unused + (size_t)N * FACTORS, rows + (size_t)n * FACTORS, columns.host, targets.host_i + n,
                   weights.host + n, scale, logits.host + (size_t)n * V, N - n < CLASSIFIER_ROWS ? N - n : CLASSIFIER_ROWS, FACTORS, V);
    free(values), free(rows), free(unused);
}

int main(void) {
    static const int sizes[][3] = {{1, 8, 8}, {7, 16, 1003}, {2, 8, 3001}, {2, 8, 20008}, {25, 72, 2056}, {2048, 1024, 151936}};
    for (int s = 0; bench_next(s, sizes); s++) {
        N = sizes[s][0], C = sizes[s][1], V = sizes[s][2];
        size_t count = (size_t)N * V;
        double bytes = (double)count * sizeof(floatX);
        int *ids = (int *)xmalloc(sizeof(int) * N);
        for (int n = 0; n < N; n++) ids[n] = (int)(V * random_uniform(2, n));
        targets = array_of("targets", INT, N, ids), weights = array_random("weights", FLOAT, N, 1);
        losses = array_output("losses", FLOAT, N);
        free(ids);
        make_logits();
        bench("cross_entropy", cross_entropy, 2 * bytes, 0, {{&losses, &logits}});
        bench("losses alone", losses_only, bytes, 0, {{&losses, &logits_inp}});

        h = array_random("h", FLOATX, (size_t)N * C, 1), head = array_random("head", FLOATX, (size_t)V * C, 1 / sqrtf((float)C));
        chunk = array_output("chunk", FLOATX, count), dh = array_output("dh", FLOATX, (size_t)N * C);
        dhead = array_random("dhead", FLOAT, (size_t)V * C, 0.01f);
        losses.roundings = 1, dh.roundings = dhead.roundings = 3;        // logits and dlogits are rounded
        classifier(losses.host, dh.host, dhead.host, h.host, head.host, targets.host_i, weights.host, scale, chunk.host, N, C, V);
        bench("classifier", whole, 2 * bytes, 6.0 * (double)count * C, {{&losses, &dh, &dhead}});
    }
    return bench_close();
}
