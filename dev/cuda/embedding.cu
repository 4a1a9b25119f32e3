// Embedding, forward and backward.   make build/embedding && build/embedding
//
//    out[n] = wte[tokens[n]]           dwte[tokens[n]] += dout[n]                           out, dout (N, C), wte, dwte (V, C)
//
// Nothing is computed, memory is the bound. Bytes in bf16 with N = 8192, C = 2048, and the time of these at the 3350 GB/s of an H100 SXM's
// data sheet:
//    forward    read rows of wte, write out:                                          4 N C = 67 MB    20 us
//    backward   read dout (2 N C), read and write each different token's row of dwte in fp32 (8 C for each); of the tokens below about 6200
//               are different, so 2 N C + 8 C 6200 = 135 MB    40 us
//
// The backward is the interesting one: a token may stand in many rows, and texts have very frequent ones. Floating-point sums depend on
// their order, (1e8 + 1) - 1e8 is 0 but (1e8 - 1e8) + 1 is 1; atomics add in the order in which they happen to arrive, so two equal runs
// of v2 below differ in the last bits. The order must come from the data.
#include "bench.h"

static int N, C, V;
static Array tokens, order, wte, out, dwte, dout;

// v1: the CPU loop, the row turned into a thread index.
__global__ void embedding_forward_v1_kernel(floatX *out, const int *tokens, const floatX *wte, int N, int C) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    for (int c = 0; c < C; c++) out[(size_t)n * C + c] = wte[(size_t)tokens[n] * C + c];
}
void forward_v1(int block) { embedding_forward_v1_kernel<<<ceil_div(N, block), block, 0, stream>>>(out.x, tokens.i, wte.x, N, C); }

// Limit of v1: neighbouring threads read addresses C or more apart.
// Change:      a thread for each number, so that a warp reads 64 bytes in a row.
// Limit now:   2 bytes a load.
__global__ void embedding_forward_v2_kernel(floatX *out, const int *tokens, const floatX *wte, int N, int C) {
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = at / C;
    if (n < (size_t)N) out[at] = wte[(size_t)tokens[n] * C + at % C];
}
void forward_v2(int block) {
    embedding_forward_v2_kernel<<<blocks_for((size_t)N * C, block), block, 0, stream>>>(out.x, tokens.i, wte.x, N, C);
}

// Limit of v2: the width of a load.
// Change:      the launcher of train_qwen.cu: packs of 16 bytes.
// Limit now:   memory.
void forward_production(int) { embedding_forward_gpu(out.x, tokens.i, wte.x, N, C); }

// v1: the CPU loop, the column turned into a thread index: every sum has one owner and the order of the rows.
__global__ void embedding_backward_v1_kernel(float *dwte, const floatX *dout, const int *tokens, int N, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    for (int n = 0; n < N; n++) dwte[(size_t)tokens[n] * C + c] += to_float(dout[(size_t)n * C + c]);
}
void backward_v1(int block) { embedding_backward_v1_kernel<<<ceil_div(C, block), block, 0, stream>>>(dwte.f, dout.x, tokens.i, N, C); }

// Limit of v1: C threads only, each with N loads and stores one after the other.
// Change:      a thread for each number of dout, which adds it by atomicAdd.
// Limit now:   the order of the sums is that of the moment (see above); rows of a frequent token wait for each other.
__global__ void embedding_backward_v2_kernel(float *dwte, const floatX *dout, const int *tokens, int N, int C) {
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = at / C;
    if (n < (size_t)N) atomicAdd(&dwte[(size_t)tokens[n] * C + at % C], to_float(dout[at]));
}
void backward_v2(int block) {
    embedding_backward_v2_kernel<<<blocks_for((size_t)N * C, block), block, 0, stream>>>(dwte.f, dout.x, tokens.i, N, C);
}

// Limit of v2: the order.
// Change:      a block for each row and some columns; that of a token's first row adds up all rows of the token, in their order.
// Limit now:   every block looks through the N tokens, N^2 looks in all, though mostly from the caches.
__global__ void embedding_backward_v3_kernel(float *dwte, const floatX *dout, const int *tokens, int N, int C) {
    int first = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x, token = tokens[first];
    if (c >= C) return;
    for (int n = 0; n < first; n++)
        if (tokens[n] == token) return;
    float sum = 0;
    for (int n = first; n < N; n++)
        if (tokens[n] == token) sum += to_float(dout[(size_t)n * C + c]);
    dwte[(size_t)token * C + c] += sum;
}
void backward_v3(int block) {
    CHECK(N <= 65535, "N = %d is more than a grid's second dimension", N);
    embedding_backward_v3_kernel<<<dim3(ceil_div(C, block), N), block, 0, stream>>>(dwte.f, dout.x, tokens.i, N, C);
}

// Limit of v3: the search.
// Change:      the launcher of train_qwen.cu: the host sorts the rows by token while the device computes the step before.
// Limit now:   the most frequent token, whose rows one block adds up alone.
void backward_production(int) { embedding_backward_gpu(dwte.f, dout.x, order.i, tokens.i, N, C); }

static Version forward[] = {{"v1 the CPU loop", forward_v1, {64, 256}}, {"v2 a thread for a number", forward_v2, {64, 256}},
    {"train_qwen.cu: packs of 16 bytes", forward_production}};
static Version backward[] = {{"v1 the CPU loop", backward_v1, {64, 256}}, {"v2 atomics, other bits in each run", backward_v2, {64, 256}},
    {"v3 the first row of a token", backward_v3, {64, 256}}, {"train_qwen.cu: sorted rows", backward_production}};

// Tokens as unevenly spread as words: a token below k has the probability (k / V)^(1/4), so token 0 is 5 % of all with V = 151936. Returns
// how many different ones there are.
static int make_tokens(void) {
    int *ids = (int *)xmalloc(sizeof(int) * N), *sorted = (int *)xmalloc(sizeof(int) * N), different = 0;
    for (int n = 0; n < N; n++) ids[n] = (int)(V * pow(random_uniform(1, n), 4));
    sort_rows(sorted, ids, N);
    for (int i = 0; i < N; i++) different += i == 0 || ids[sorted[i]] != ids[sorted[i - 1]];
    tokens = array_of("tokens", INT, N, ids), order = array_of("order", INT, N, sorted);
    free(ids), free(sorted);
    return different;
}

int main(void) {
    static const int sizes[][3] = {{1, 7, 1}, {40, 72, 9}, {65, 33, 700}, {8192, 2048, 151936}};
    for (int s = 0; bench_next(s, sizes); s++) {
        N = sizes[s][0], C = sizes[s][1], V = sizes[s][2];
        size_t count = (size_t)N * C, vocabulary = (size_t)V * C;
        double bytes = (double)count * sizeof(floatX), dwte_bytes = 2.0 * sizeof(float) * C * make_tokens();
        wte = array_random("wte", FLOATX, vocabulary, 1), out = array_output("out", FLOATX, count);
        out.roundings = 0;                         // copies
        embedding_forward(out.host, tokens.host_i, wte.host, N, C);
        bench("embedding_forward", forward, 2 * bytes, 0, {{&out}});
        dout = array_random("dout", FLOATX, count, 1), dwte = array_random("dwte", FLOAT, vocabulary, 1);
        embedding_backward(dwte.host, dout.host, tokens.host_i, N, C);
        bench("embedding_backward", backward, bytes + dwte_bytes, 0, {{&dwte}});
    }
    return bench_close();
}
