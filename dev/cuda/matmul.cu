// Matrix multiplication, forward and backward.   make build/matmul && build/matmul
//
//    out (N, OC) = inp (N, C) weight (OC, C)^T
//    dinp (N, C) = dout (N, OC) weight (OC, C)         dweight (OC, C) += dout^T inp         dbias (OC) += column sums of dout
//
// 2 N C OC operations each; every number is used by a whole row or column of results, so arithmetic is the bound. In bf16 with N = 4096,
// C = 2048, OC = 6144 a matmul is 103 GFLOP: 104 us at the 989 TFLOP/s of an H100 SXM's data sheet (tensor cores, dense), 1.5 ms at its
// 67 TFLOP/s of fp32 without tensor cores. The matrices are 17 + 25 + 50 MB, 28 us at 3350 GB/s. Backward: twice the forward.
//
// What a level of memory must deliver falls with the size of the tile that is computed from it: a tile of (m, n) results takes m + n
// numbers for each step of the depth and does m n multiply-adds with them.
#include "bench.h"

static int N, C, OC;
static Array inp, weight, out, dout, dinp, dweight, dbias;

// v1: the CPU loops, n and o turned into thread indices. Threads of a warp share n and have neighbouring o.
__global__ void matmul_forward_v1_kernel(floatX *out, const floatX *inp, const floatX *weight, int N, int C, int OC) {
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)N * OC) return;
    const floatX *x = inp + at / OC * C, *w = weight + at % OC * C;
    float sum = 0;
    for (int c = 0; c < C; c++) sum += to_float(x[c]) * to_float(w[c]);
    out[at] = to_floatX(sum);
}
void forward_v1(int block) {
    matmul_forward_v1_kernel<<<(unsigned)(((size_t)N * OC + block - 1) / block), block, 0, stream>>>(out.x, inp.x, weight.x, N, C, OC);
}

// Limit of v1: two loads for each multiply-add, and lanes read C apart: the caches deliver a sector of 32 bytes for every 2.
// Change:      a block computes a (TILE, TILE) tile of out from tiles of inp and weight in shared memory, read there by all its threads.
// Limit now:   still two loads for each multiply-add, now from shared memory, which delivers one for each lane and cycle.
template <int TILE> __global__ void matmul_forward_v2_kernel(floatX *out, const floatX *inp, const floatX *weight, int N, int C, int OC) {
    __shared__ float inp_tile[TILE][TILE + 1];     // + 1: a column's numbers lie in different banks
    __shared__ float weight_tile[TILE][TILE + 1];
    int x = threadIdx.x % TILE, y = threadIdx.x / TILE, n = blockIdx.y * TILE + y, o = blockIdx.x * TILE + x;
    float sum = 0;
    for (int c0 = 0; c0 < C; c0 += TILE) {
        int c = c0 + x, o_load = blockIdx.x * TILE + y;
        inp_tile[y][x] = n < N && c < C ? to_float(inp[(size_t)n * C + c]) : 0.0f;
        weight_tile[y][x] = o_load < OC && c < C ? to_float(weight[(size_t)o_load * C + c]) : 0.0f;
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += inp_tile[y][i] * weight_tile[x][i];
        __syncthreads();
    }
    if (n < N && o < OC) out[(size_t)n * OC + o] = to_floatX(sum);
}
void forward_v2(int block) {
    int tile = block == 256 ? 16 : 32;
    dim3 grid(ceil_div(OC, tile), ceil_div(N, tile));
    if (tile == 16) matmul_forward_v2_kernel<16><<<grid, block, 0, stream>>>(out.x, inp.x, weight.x, N, C, OC);
    else matmul_forward_v2_kernel<32><<<grid, block, 0, stream>>>(out.x, inp.x, weight.x, N, C, OC);
}

// Limit of v2: shared memory's loads.
// Change:      each thread computes 8 x 8 results in registers: 16 loads from shared memory for 64 multiply-adds.
// Limit now:   fp32 arithmetic, one multiply-add for each lane and cycle: a fifteenth of what the tensor cores do.
__global__ void matmul_forward_v3_kernel(floatX *out, const floatX *inp, const floatX *weight, int N, int C, int OC) {
    enum { TILE = 128, DEPTH = 8, THREADS = 256, EACH = 8, ACROSS = TILE / EACH };
    __shared__ float inp_tile[DEPTH][TILE + 4];    // the depth first, so that lanes read neighbours; + 4: fewer conflicts when storing
    __shared__ float weight_tile[DEPTH][TILE + 4];
    int x = threadIdx.x % ACROSS, y = threadIdx.x / ACROSS, n0 = blockIdx.y * TILE, o0 = blockIdx.x * TILE;
    float sums[EACH][EACH] = {};
    for (int c0 = 0; c0 < C; c0 += DEPTH) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
            int row = i / DEPTH, c = i % DEPTH;
            inp_tile[c][row] = n0 + row < N && c0 + c < C ? to_float(inp[(size_t)(n0 + row) * C + c0 + c]) : 0.0f;
            weight_tile[c][row] = o0 + row < OC && c0 + c < C ? to_float(weight[(size_t)(o0 + row) * C + c0 + c]) : 0.0f;
        }
        __syncthreads();
        #pragma unroll
        for (int c = 0; c < DEPTH; c++) {
            float a[EACH], b[EACH];
            for (int i = 0; i < EACH; i++) a[i] = inp_tile[c][y + ACROSS * i], b[i] = weight_tile[c][x + ACROSS * i];
            for (int i = 0; i < EACH; i++)
                for (int j = 0; j < EACH; j++) sums[i][j] += a[i] * b[j];
        }
        __syncthreads();
    }
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++) {
            int n = n0 + y + ACROSS * i, o = o0 + x + ACROSS * j;
            if (n < N && o < OC) out[(size_t)n * OC + o] = to_floatX(sums[i][j]);
        }
}
void forward_v3(int block) {
    dim3 grid(ceil_div(OC, 128), ceil_div(N, 128));
    matmul_forward_v3_kernel<<<grid, block, 0, stream>>>(out.x, inp.x, weight.x, N, C, OC);
}

#ifndef QWEN_FP32            // the tensor cores have no fp32; train_qwen.cu's fp32 build leaves the choice to cublasLt
// One kernel for all three matmuls: D (M, N) = or += A (M, K) B (K, N). What differs is which index of A and B is the inner one in memory:
//    forward   A = inp     K inner     B = weight^T  K inner          (weight's rows are B's columns)
//    dinp      A = dout    K inner     B = weight    K outer
//    dweight   A = dout^T  K outer     B = inp       K outer
// Each tile of 128 x 32 numbers lies in shared memory as it lies in global memory, in chunks of 16 bytes, whose places within a row are
// permuted (chunk ^ something of the row), so that the 8 rows which ldmatrix reads at once lie in different banks:
//    K inner   128 rows of 4 chunks: two rows fill the 32 banks, so every second row moves on
//    K outer   32 rows of 16 chunks: every row moves on
enum Order { K_INNER, K_OUTER };
enum { TILE_MN = 128, TILE_K = 32, STAGES = 3, TILE_BYTES = TILE_MN * TILE_K * 2, MMA_THREADS = 256 };

template <Order ORDER> __device__ int chunk_at(int mn, int k) {      // of the chunk that holds element (mn, k), in numbers
    if (ORDER == K_INNER) return (mn * 4 + ((k / WIDE) ^ (mn / 2 % 4))) * WIDE;
    return (k * 16 + ((mn / WIDE) ^ (k % 8))) * WIDE;
}

// Starts the copies of the tile at (mn0, k0) of a matrix (MN, K); what lies beyond the matrix becomes 0.
template <Order ORDER> __device__ void load_tile(floatX *tile, const floatX *from, int mn0, int k0, int MN, int K) {
    for (int i = threadIdx.x; i < TILE_MN * TILE_K / WIDE; i += MMA_THREADS) {
        int mn = ORDER == K_INNER ? i / 4 : i % 16 * WIDE, k = ORDER == K_INNER ? i % 4 * WIDE : i / 16;
        bool valid = mn0 + mn < MN && k0 + k < K;
        size_t at = ORDER == K_INNER ? (size_t)(mn0 + mn) * K + k0 + k : (size_t)(k0 + k) * MN + mn0 + mn;
        cp_async_16(tile + chunk_at<ORDER>(mn, k), from + (valid ? at : 0), valid);
    }
}

// Four 8 x 8 matrices at (mn0, k0), (mn0 + 8, k0), (mn0, k0 + 8), (mn0 + 8, k0 + 8) of a tile: a lane's two numbers have the same mn and
// neighbouring k, which is what mma wants of A and of B. (ldmatrix gives neighbours within rows of memory; .trans, within columns.)
template <Order ORDER> __device__ void load_fragments(uint32_t (&r)[4], const floatX *tile, int mn0, int k0) {
    int lane = threadIdx.x % WARP, matrix = lane / 8, row = lane % 8;
    int mn = mn0 + matrix % 2 * 8 + (ORDER == K_INNER ? row : 0), k = k0 + matrix / 2 * 8 + (ORDER == K_OUTER ? row : 0);
    if (ORDER == K_INNER) ldmatrix_x4(r, tile + chunk_at<ORDER>(mn, k));
    else ldmatrix_x4_trans(r, tile + chunk_at<ORDER>(mn, k));
}

__device__ void store_pair(floatX *out, float x, float y) { out[0] = to_floatX(x), out[1] = to_floatX(y); }
__device__ void store_pair(float *out, float x, float y) { out[0] += x, out[1] += y; }           // gradients of parameters are sums

// Limit of v3: fp32 arithmetic.
// Change:      tensor cores. 8 warps compute 64 x 32 results each; while they work on one tile, cp.async brings the next two.
// Limit now:   mma.sync itself on Hopper (about 63 % of its peak; only wgmma reaches the rest), on an A100 the tail of the last blocks.
template <class T, Order A_ORDER, Order B_ORDER>
__global__ void matmul_v4_kernel(T *D, const floatX *A, const floatX *B, int M, int N, int K) {
    __shared__ __align__(16) floatX a_tiles[STAGES][TILE_MN * TILE_K];
    __shared__ __align__(16) floatX b_tiles[STAGES][TILE_MN * TILE_K];
    int m0 = blockIdx.x * TILE_MN, n0 = blockIdx.y * TILE_MN, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int warp_m = warp % 2 * 64, warp_n = warp / 2 * 32, steps = (K + TILE_K - 1) / TILE_K;
    float d[4][4][4] = {};                         // 4 x 4 results of mma, (16, 8) each
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            load_tile<A_ORDER>(a_tiles[s], A, m0, s * TILE_K, M, K);
            load_tile<B_ORDER>(b_tiles[s], B, n0, s * TILE_K, N, K);
        }
        cp_async_commit();                         // also an empty group, so that the count of groups is the count of steps
    }
    for (int s = 0; s < steps; s++) {
        cp_async_wait<STAGES - 2>();               // this thread's part of tile s is there,
        __syncthreads();                           // everybody's is, and everybody is done with tile s - 1, whose place comes next
        if (s + STAGES - 1 < steps) {
            load_tile<A_ORDER>(a_tiles[(s + STAGES - 1) % STAGES], A, m0, (s + STAGES - 1) * TILE_K, M, K);
            load_tile<B_ORDER>(b_tiles[(s + STAGES - 1) % STAGES], B, n0, (s + STAGES - 1) * TILE_K, N, K);
        }
        cp_async_commit();
        #pragma unroll
        for (int k = 0; k < TILE_K; k += 16) {
            uint32_t a[4][4], b[4];
            for (int i = 0; i < 4; i++) load_fragments<A_ORDER>(a[i], a_tiles[s % STAGES], warp_m + 16 * i, k);
            for (int j = 0; j < 4; j += 2) {
                load_fragments<B_ORDER>(b, b_tiles[s % STAGES], warp_n + 8 * j, k);
                uint32_t left[2] = {b[0], b[2]}, right[2] = {b[1], b[3]};
                for (int i = 0; i < 4; i++) {
                    mma_m16n8k16(d[i][j], a[i], left);
                    mma_m16n8k16(d[i][j + 1], a[i], right);
                }
            }
        }
    }
    for (int i = 0; i < 4; i++)                    // a lane holds (row, column), (row, column + 1) and the same 8 rows below
        for (int j = 0; j < 4; j++) {
            int m = m0 + warp_m + 16 * i + lane / 4, n = n0 + warp_n + 8 * j + lane % 4 * 2;
            if (m < M && n < N) store_pair(D + (size_t)m * N + n, d[i][j][0], d[i][j][1]);
            if (m + 8 < M && n < N) store_pair(D + (size_t)(m + 8) * N + n, d[i][j][2], d[i][j][3]);
        }
}
static dim3 tile_grid(int rows, int columns) { return dim3(ceil_div(rows, TILE_MN), ceil_div(columns, TILE_MN)); }
void forward_v4(int block) {
    CHECK(C % WIDE == 0 && OC % WIDE == 0, "C = %d and OC = %d must be multiples of %d", C, OC, WIDE);
    matmul_v4_kernel<floatX, K_INNER, K_INNER><<<tile_grid(N, OC), block, 0, stream>>>(out.x, inp.x, weight.x, N, OC, C);
}
#endif

// Limit of v4: mma.sync, and one shape of tile for all sizes.
// Change:      the launcher of train_qwen.cu: cublasLt, with the algorithm chosen for the size.
// Limit now:   the card's power and clocks.
void forward_production(int) { matmul_forward_gpu(out.x, NULL, inp.x, weight.x, NULL, N, C, OC); }

// v1: the CPU loops, an element of the result for each thread.
__global__ void matmul_backward_v1_dinp_kernel(floatX *dinp, const floatX *dout, const floatX *weight, int N, int C, int OC) {
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = at / C, c = at % C;
    if (at >= (size_t)N * C) return;
    float sum = 0;
    for (int o = 0; o < OC; o++) sum += to_float(dout[n * OC + o]) * to_float(weight[(size_t)o * C + c]);
    dinp[at] = to_floatX(sum);
}
__global__ void matmul_backward_v1_dweight_kernel(float *dweight, const floatX *dout, const floatX *inp, int N, int C, int OC) {
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, o = at / C, c = at % C;
    if (at >= (size_t)OC * C) return;
    float sum = 0;
    for (int n = 0; n < N; n++) sum += to_float(dout[(size_t)n * OC + o]) * to_float(inp[(size_t)n * C + c]);
    dweight[at] += sum;
}
__global__ void matmul_backward_v1_dbias_kernel(float *dbias, const floatX *dout, int N, int OC) {
    int o = blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= OC) return;
    float sum = 0;
    for (int n = 0; n < N; n++) sum += to_float(dout[(size_t)n * OC + o]);
    dbias[o] += sum;
}
void backward_v1(int block) {
    matmul_backward_v1_dinp_kernel<<<ceil_div(N * C, block), block, 0, stream>>>(dinp.x, dout.x, weight.x, N, C, OC);
    matmul_backward_v1_dweight_kernel<<<ceil_div(OC * C, block), block, 0, stream>>>(dweight.f, dout.x, inp.x, N, C, OC);
    matmul_backward_v1_dbias_kernel<<<ceil_div(OC, block), block, 0, stream>>>(dbias.f, dout.x, N, OC);
}

#ifndef QWEN_FP32
// Limit of v1: loads, as in the forward; and dbias has OC threads only, each with N steps one after the other.
// Change:      tensor cores, with the kernel of the forward; dbias by blocks of 8 columns of lanes that share the rows out.
// Limit now:   mma.sync; dbias reads dout (25 MB here) once more, alone.
__global__ void matmul_backward_v2_dbias_kernel(float *dbias, const floatX *dout, int N, int OC) {
    __shared__ float sums[8][WARP];                // a warp takes every eighth row, a lane a column: 64 bytes of a row at a time
    int o = blockIdx.x * WARP + threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float sum = 0;
    for (int n = warp; o < OC && n < N; n += 8) sum += to_float(dout[(size_t)n * OC + o]);
    sums[warp][threadIdx.x % WARP] = sum;
    __syncthreads();
    if (warp > 0 || o >= OC) return;
    for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
    dbias[o] += sum;
}
void backward_v2(int block) {
    matmul_v4_kernel<floatX, K_INNER, K_OUTER><<<tile_grid(N, C), block, 0, stream>>>(dinp.x, dout.x, weight.x, N, C, OC);
    matmul_v4_kernel<float, K_OUTER, K_OUTER><<<tile_grid(OC, C), block, 0, stream>>>(dweight.f, dout.x, inp.x, OC, C, N);
    matmul_backward_v2_dbias_kernel<<<ceil_div(OC, WARP), block, 0, stream>>>(dbias.f, dout.x, N, OC);
}
#endif

// Limit of v2: as in the forward.
// Change:      the launcher of train_qwen.cu.
// Limit now:   as in the forward.
void backward_production(int) {
    matmul_backward_gpu(dinp.x, dweight.f, dbias.f, dout.x, inp.x, weight.x, scratch, N, C, OC);
}

static Version forward[] = {{"v1 the CPU loop", forward_v1, {64, 256}}, {"v2 tiles in shared memory", forward_v2, {256, 1024}},
    {"v3 tiles in registers", forward_v3, {256}},
#ifndef QWEN_FP32
    {"v4 tensor cores, cp.async", forward_v4, {MMA_THREADS}},
#endif
    {"train_qwen.cu: cublasLt", forward_production, {}}};
static Version backward[] = {{"v1 the CPU loops", backward_v1, {64, 256}},
#ifndef QWEN_FP32
    {"v2 tensor cores, cp.async", backward_v2, {MMA_THREADS}},
#endif
    {"train_qwen.cu: cublasLt", backward_production, {}}};

int main(void) {
    static const int sizes[][3] = {{1, 8, 8}, {5, 40, 24}, {131, 72, 136}, {4096, 2048, 6144}};
    for (int s = 0; bench_next(s, sizes); s++) {
        N = sizes[s][0], C = sizes[s][1], OC = sizes[s][2];
        size_t n = N, c = C, oc = OC;
        double bytes = (double)(n * c + oc * c + n * oc) * sizeof(floatX), flops = 2.0 * N * C * OC;
        inp = array_random("inp", FLOATX, n * c, 1), weight = array_random("weight", FLOATX, oc * c, 1);
        out = array_output("out", FLOATX, n * oc);
        matmul_forward(out.host, inp.host, weight.host, NULL, N, C, OC, OVERWRITE);
        bench("matmul_forward", forward, bytes, flops, {{&out}});

        dout = array_random("dout", FLOATX, n * oc, 1);
        dinp = array_output("dinp", FLOATX, n * c), dweight = array_random("dweight", FLOAT, oc * c, 1);
        dbias = array_random("dbias", FLOAT, oc, 1);
        matmul_backward(dinp.host, dweight.host, dbias.host, dout.host, inp.host, weight.host, N, C, OC);
        bench("matmul_backward", backward, 2 * bytes, 2 * flops, {{&dinp, &dweight, &dbias}});
    }
    return bench_close();
}
