// SwiGLU, forward and backward.   make build/swiglu && build/swiglu
//
//    act (N, I) = silu(gate) * up,   silu(x) = x s(x),   s(x) = 1 / (1 + exp(-x))              a row of gate_up (N, 2 I) is [gate | up]
//    dup = dact * silu(gate)         dgate = dact * up * s(gate) (1 + gate (1 - s(gate)))
//
// Some 10 operations for each number: memory is the bound. Bytes in bf16, N = 8192, I = 5504 (mini_llm_1.4b), and the time of these at the
// 3350 GB/s of an H100 SXM's data sheet:
//    forward    read gate, up, write act:                   6 N I = 271 MB     81 us
//    backward   read dact, gate, up, write dgate, dup:     10 N I = 451 MB    135 us
#include "bench.h"

static int N, I;
static Array gate_up, act, dact, dgate_up;

// v1: the CPU loop, the row turned into a thread index.
__global__ void swiglu_forward_v1_kernel(floatX *act, const floatX *gate_up, int N, int I) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const floatX *gate = gate_up + (size_t)n * 2 * I, *up = gate + I;
    for (int i = 0; i < I; i++) {
        float g = to_float(gate[i]);
        act[(size_t)n * I + i] = to_floatX(g * to_float(up[i]) / (1.0f + expf(-g)));
    }
}
void forward_v1(int block) { swiglu_forward_v1_kernel<<<ceil_div(N, block), block, 0, stream>>>(act.x, gate_up.x, N, I); }

// Limit of v1: neighbouring threads read addresses 2 I apart, and there are N threads only.
// Change:      a thread for each number, so that a warp reads 64 bytes in a row.
// Limit now:   2 bytes a load: twelve instructions of address arithmetic, with a division, for each number.
__global__ void swiglu_forward_v2_kernel(floatX *act, const floatX *gate_up, int N, int I) {
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = at / I, i = at % I;
    if (n >= (size_t)N) return;
    float g = to_float(gate_up[n * 2 * I + i]), u = to_float(gate_up[n * 2 * I + I + i]);
    act[at] = to_floatX(g * u / (1.0f + expf(-g)));
}
void forward_v2(int block) { swiglu_forward_v2_kernel<<<blocks_for((size_t)N * I, block), block, 0, stream>>>(act.x, gate_up.x, N, I); }

// Limit of v2: the width of a load, and the division.
// Change:      a block takes packs of one row (the grid's second dimension), so nothing is divided; 16 bytes a load.
// Limit now:   memory; the last block of each row is partly idle.
__global__ void swiglu_forward_v3_kernel(floatX *act, const floatX *gate_up, int I) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    if (i >= I) return;
    const floatX *gate = gate_up + (size_t)blockIdx.y * 2 * I + i;
    Pack<WIDE> g = load_pack<WIDE>(gate), u = load_pack<WIDE>(gate + I);
    for (int j = 0; j < WIDE; j++) u.x[j] = to_floatX(to_float(g.x[j]) * to_float(u.x[j]) / (1.0f + expf(-to_float(g.x[j]))));
    store_pack<WIDE>(act + (size_t)blockIdx.y * I + i, u);
}
dim3 row_grid(int block) {
    CHECK(I % WIDE == 0 && N <= 65535, "I = %d is not a multiple of %d, or N = %d is more than a grid's second dimension", I, WIDE, N);
    return dim3(ceil_div(I / WIDE, block), N);
}
void forward_v3(int block) { swiglu_forward_v3_kernel<<<row_grid(block), block, 0, stream>>>(act.x, gate_up.x, I); }

// Limit of v3: the grid's second dimension ends at 65535 rows.
// Change:      the launcher of train_qwen.cu: packs numbered through, one division for each pack of 8.
// Limit now:   memory.
void forward_production(int) { swiglu_forward_gpu(act.x, gate_up.x, N, I); }

// The gradients of one gate and up.
__device__ void gradients(float *dgate, float *dup, float d, float gate, float up) {
    float s = 1.0f / (1.0f + expf(-gate));
    *dgate = d * up * s * (1.0f + gate * (1.0f - s));
    *dup = d * gate * s;
}

// v1: the CPU loop, the row turned into a thread index.
__global__ void swiglu_backward_v1_kernel(floatX *dgate_up, const floatX *dact, const floatX *gate_up, int N, int I) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    for (int i = 0; i < I; i++) {
        size_t gate = (size_t)n * 2 * I + i, up = gate + I;
        float dgate, dup;
        gradients(&dgate, &dup, to_float(dact[(size_t)n * I + i]), to_float(gate_up[gate]), to_float(gate_up[up]));
        dgate_up[gate] = to_floatX(dgate), dgate_up[up] = to_floatX(dup);
    }
}
void backward_v1(int block) { swiglu_backward_v1_kernel<<<ceil_div(N, block), block, 0, stream>>>(dgate_up.x, dact.x, gate_up.x, N, I); }

// Limit of v1: as the forward's.
// Change:      a thread for each number.
// Limit now:   as the forward's v2.
__global__ void swiglu_backward_v2_kernel(floatX *dgate_up, const floatX *dact, const floatX *gate_up, int N, int I) {
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = at / I, gate = n * 2 * I + at % I, up = gate + I;
    if (n >= (size_t)N) return;
    float dgate, dup;
    gradients(&dgate, &dup, to_float(dact[at]), to_float(gate_up[gate]), to_float(gate_up[up]));
    dgate_up[gate] = to_floatX(dgate), dgate_up[up] = to_floatX(dup);
}
void backward_v2(int block) {
    swiglu_backward_v2_kernel<<<blocks_for((size_t)N * I, block), block, 0, stream>>>(dgate_up.x, dact.x, gate_up.x, N, I);
}

// Limit of v2: the width of a load, and the division.
// Change:      packs, a block for a piece of one row.
// Limit now:   memory.
__global__ void swiglu_backward_v3_kernel(floatX *dgate_up, const floatX *dact, const floatX *gate_up, int I) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
    if (i >= I) return;
    size_t gate = (size_t)blockIdx.y * 2 * I + i;
    Pack<WIDE> d = load_pack<WIDE>(dact + (size_t)blockIdx.y * I + i);
    Pack<WIDE> g = load_pack<WIDE>(gate_up + gate), u = load_pack<WIDE>(gate_up + gate + I);
    for (int j = 0; j < WIDE; j++) {
        float dgate, dup;
        gradients(&dgate, &dup, to_float(d.x[j]), to_float(g.x[j]), to_float(u.x[j]));
        g.x[j] = to_floatX(dgate), u.x[j] = to_floatX(dup);
    }
    store_pack<WIDE>(dgate_up + gate, g), store_pack<WIDE>(dgate_up + gate + I, u);
}
void backward_v3(int block) { swiglu_backward_v3_kernel<<<row_grid(block), block, 0, stream>>>(dgate_up.x, dact.x, gate_up.x, I); }

// Limit of v3: the grid's second dimension.
// Change:      the launcher of train_qwen.cu.
// Limit now:   memory.
void backward_production(int) { swiglu_backward_gpu(dgate_up.x, dact.x, gate_up.x, N, I); }

static Version forward[] = {{"v1 the CPU loop", forward_v1, {64, 256}}, {"v2 a thread for a number", forward_v2, {64, 256}},
    {"v3 packs of 16 bytes", forward_v3, {64, 256}}, {"train_qwen.cu", forward_production}};
static Version backward[] = {{"v1 the CPU loop", backward_v1, {64, 256}}, {"v2 a thread for a number", backward_v2, {64, 256}},
    {"v3 packs of 16 bytes", backward_v3, {64, 256}}, {"train_qwen.cu", backward_production}};

int main(void) {
    static const int sizes[][2] = {{1, 8}, {5, 72}, {67, 136}, {8192, 5504}};
    for (int s = 0; bench_next(s, sizes); s++) {
        N = sizes[s][0], I = sizes[s][1];
        size_t count = (size_t)N * I;
        double bytes = (double)count * sizeof(floatX);
        gate_up = array_random("gate_up", FLOATX, 2 * count, 2), act = array_output("act", FLOATX, count);
        swiglu_forward(act.host, gate_up.host, N, I);
        bench("swiglu_forward", forward, 3 * bytes, 0, {{&act}});
        dact = array_random("dact", FLOATX, count, 1), dgate_up = array_output("dgate_up", FLOATX, 2 * count);
        swiglu_backward(dgate_up.host, dact.host, gate_up.host, N, I);
        bench("swiglu_backward", backward, 5 * bytes, 0, {{&dgate_up}});
    }
    return bench_close();
}
