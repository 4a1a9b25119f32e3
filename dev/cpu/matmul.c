// matmul.c: from three nested loops to the matrix product of train_qwen.c, one idea at a time.
//
//    make build/cpu_matmul && build/cpu_matmul            checks every version, then prints its speed on one thread and on all
//    build/cpu_matmul 1024 1024 4096                      rows, inputs, outputs of your own
//
// The product is the forward one: out (N, O) = inp (N, C) weight (O, C)^T, 2 N C O operations. It is the same work for the backward ones;
// in train_qwen.c all three are one function that takes either operand transposed. What is counted: an AVX2 core can start two
// multiply-adds of 8 floats a cycle, 32 operations; to keep that up, both operands of each have to be in registers already. A load gives
// 8 floats, two or three loads can start in a cycle, from the L1 cache. From L2 it is about half, from L3 or memory a tenth. So speed is
// reuse: how many operations are done with a number each time it is brought one level closer.

#define QWEN_NO_MAIN
#include "../../train_qwen.c"
#include "bench.h"

// v1: the definition.
// Limit: a sum waits for the addition before it (4 cycles), one float at a time; the compiler may not reorder it, since floating-point
// addition is not associative. 1 multiply-add in 4 cycles of the 64 that fit.
void matmul_v1(float *out, const float *inp, const float *weight, int N, int C, int O) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int o = 0; o < O; o++) {
            float sum = 0;
            for (int c = 0; c < C; c++) sum += inp[n * C + c] * weight[o * C + c];
            out[n * O + o] = sum;
        }
}

// v2. Before: additions waited for one another.
// Change: two vectors of partial sums (dot in train_qwen.c), 2 VL additions under way at a time.
// Limit now: two loads for each multiply-add, and every row of inp reads the whole of weight again, from L2 or beyond.
void matmul_v2(float *out, const float *inp, const float *weight, int N, int C, int O) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int o = 0; o < O; o++) out[n * O + o] = dot(inp + n * C, weight + o * C, C);
}

// v3. Before: a number was loaded for a single multiply-add.
// Change: a tile of 3 x 4 dot products at a time: 7 loads for 12 multiply-adds, and weight is read N / 3 times instead of N times.
// Limit now: each sum is a whole vector that has to be added up in the end, which costs much when C is small; and weight still comes from
// L2 or L3, N / 3 times.
void matmul_v3(float *out, const float *inp, const float *weight, int N, int C, int O) {
    enum { ROWS = 3, COLS = 4 };
    #pragma omp parallel for
    for (int n0 = 0; n0 < N; n0 += ROWS)
        for (int o0 = 0; o0 < O; o0 += COLS) {
            int rows = N - n0 < ROWS ? N - n0 : ROWS, cols = O - o0 < COLS ? O - o0 : COLS, done = 0;
            float sum[ROWS][COLS] = {{0}};
            if (rows == ROWS && cols == COLS) {
                vec sums[ROWS][COLS] = {{{0}}};
                for (; done + VL <= C; done += VL) {
                    vec x[ROWS];
                    UNROLL
                    for (int i = 0; i < ROWS; i++) x[i] = *(const vec_at *)(inp + (n0 + i) * C + done);
                    UNROLL
                    for (int j = 0; j < COLS; j++) {
                        vec w = *(const vec_at *)(weight + (o0 + j) * C + done);
                        UNROLL
                        for (int i = 0; i < ROWS; i++) sums[i][j] += x[i] * w;
                    }
                }
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < COLS; j++)
                        for (int v = 0; v < VL; v++) sum[i][j] += sums[i][j][v];
            }
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < cols; j++) {
                    for (int c = done; c < C; c++) sum[i][j] += inp[(n0 + i) * C + c] * weight[(o0 + j) * C + c];
                    out[(n0 + i) * O + o0 + j] = sum[i][j];
                }
        }
}

// c (m, NR) = a (m, kc) b (kc, NR), m <= MR, b packed, a where it is in inp: element (i, k) is a[i * lda + k]. What v4 and v5 have in
// common.
void outer_product_tile(float *c, int ldc, const float *a, int lda, const float *b, int m, int n, int kc, WriteMode mode) {
    vec sum[MR][2];
    UNROLL
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int k = 0; k < kc; k++) {
        vec b0 = *(const vec_at *)(b + k * NR), b1 = *(const vec_at *)(b + k * NR + VL);
        UNROLL
        for (int i = 0; i < MR; i++) {
            float x = a[(i < m ? i : 0) * lda + k];
            sum[i][0] += x * b0, sum[i][1] += x * b1;
        }
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) c[i * ldc + j] = (mode == ACCUMULATE ? c[i * ldc + j] : 0) + sum[i][j / VL][j % VL];
}

// v4. Before: sums lay across vectors, and had to be added up.
// Change: an outer product at a time. A tile of MR x NR sums stays in registers; each step takes one column of inp (MR numbers, each
// spread over a vector) and one row of weight^T (two vectors): 2 + MR loads for 2 MR multiply-adds. weight^T's rows don't lie in memory as
// rows, so NR columns are first copied into a panel that can be read in order.
// Limit now: when C is large, a panel (C, NR) doesn't fit into the L1 cache, and all of inp is read from memory for each panel.
void matmul_v4(float *out, const float *inp, const float *weight, int N, int C, int O) {
    #pragma omp parallel for
    for (int o0 = 0; o0 < O; o0 += NR) {
        float *panel = thread_buffer(BUFFER_B, (size_t)C * NR);
        int n = O - o0 < NR ? O - o0 : NR;
        for (int k = 0; k < C; k++)
            for (int j = 0; j < NR; j++) panel[k * NR + j] = j < n ? weight[(o0 + j) * C + k] : 0;
        for (int i = 0; i < N; i += MR)
            outer_product_tile(out + i * O + o0, O, inp + i * C, C, panel, N - i < MR ? N - i : MR, n, C, OVERWRITE);
    }
}

// v5. Before: panels and inp came from far away.
// Change: blocks. KC of the C columns at a time, so that a panel of weight (KC, NR) stays in L1, and MC rows of inp, (MC, KC), in L2,
// while all panels of the block pass by; out is added to, C / KC times. Limit now: MR rows of inp are MR streams a whole row apart, which
// share few cache sets when C is a power of two; a tile of out is waited for at its end; packing weight goes element by element.
void matmul_v5(float *out, const float *inp, const float *weight, int N, int C, int O) {
    #pragma omp parallel for
    for (int o0 = 0; o0 < O; o0 += NC) {
        float *panels = thread_buffer(BUFFER_B, (size_t)KC * NC);
        int nc = O - o0 < NC ? O - o0 : NC;
        for (int k0 = 0; k0 < C; k0 += KC) {
            int kc = C - k0 < KC ? C - k0 : KC;
            for (int j0 = 0; j0 < nc; j0 += NR)
                for (int k = 0; k < kc; k++)
                    for (int j = 0; j < NR; j++) panels[j0 * kc + k * NR + j] = j0 + j < nc ? weight[(o0 + j0 + j) * C + k0 + k] : 0;
            for (int i0 = 0; i0 < N; i0 += MC)
                for (int j0 = 0; j0 < nc; j0 += NR)
                    for (int i = i0; i < N && i < i0 + MC; i += MR)
                        outer_product_tile(out + i * O + o0 + j0, O, inp + i * C + k0, C, panels + j0 * kc, N - i < MR ? N - i : MR,
                                           nc - j0 < NR ? nc - j0 : NR, kc, k0 > 0 ? ACCUMULATE : OVERWRITE);
        }
    }
}

// v6, in train_qwen.c. Before: see v5.
// Change: inp is packed too, both through registers, VL x VL numbers at a time, and the rows that come next are asked for meanwhile; of the
// blocks, a panel of inp (MR, KC) stays in L1 and weight's in L2, so that tiles of out follow each other along its rows; a tile is prefetched
// before its sums begin, and has 4 or 8 rows where out ends; the loop over k is unrolled by 4; threads share out as a grid of tiles that
// needs the least packing. Limit now: 75 to 95 % of the multiply-adds there are. The rest is packing, and waiting for
// inp and out when C is small.
// Tried without gain on two cores (Zen 4): packing weight once for both threads, or inp too, and handing out tiles as threads get free
// (barriers and another core's cache cost what is saved, or up to 12 % more); packing inp once for all columns (weight then comes from L3
// each time); prefetching weight's panel in the loop over k; other KC and NC, and MC above 200.
void matmul_v6(float *out, const float *inp, const float *weight, int N, int C, int O) {
    gemm(out, O, view(inp, C, 1), view(weight, 1, C), N, O, C, OVERWRITE);
}

typedef void Matmul(float *out, const float *inp, const float *weight, int N, int C, int O);
static const struct { const char *name; Matmul *run; } VERSIONS[] = {
    {"v1 three loops", matmul_v1}, {"v2 vectors", matmul_v2}, {"v3 tiles of dot products", matmul_v3},
    {"v4 outer products", matmul_v4}, {"v5 cache blocks", matmul_v5}, {"v6 train_qwen.c", matmul_v6},
};
enum { NUM_VERSIONS = sizeof VERSIONS / sizeof VERSIONS[0] };

typedef struct { Matmul *run; float *out, *inp, *weight; int N, C, O; } Case;
void run_case(void *argument) {
    Case *c = (Case *)argument;
    c->run(c->out, c->inp, c->weight, c->N, c->C, c->O);
}
Case make_case(int N, int C, int O) {
    Case c = {NULL, (float *)xmalloc(sizeof(float) * (size_t)N * O), (float *)xmalloc(sizeof(float) * (size_t)N * C),
              (float *)xmalloc(sizeof(float) * (size_t)O * C), N, C, O};
    for (int i = 0; i < N * C; i++) c.inp[i] = random_normal(1, (uint64_t)i);
    for (int i = 0; i < O * C; i++) c.weight[i] = random_normal(2, (uint64_t)i);
    return c;
}
void free_case(Case *c) { free(c->out), free(c->inp), free(c->weight); }

// Every version against the definition in double, at sizes that fit no tile.
bool check_versions(void) {
    static const int sizes[][3] = {{1, 1, 1}, {7, 3, 5}, {65, 300, 37}, {130, 257, 530}};
    bool all = true;
    for (int v = 0; v < NUM_VERSIONS; v++) {
        double worst = 0;
        for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
            Case c = make_case(sizes[s][0], sizes[s][1], sizes[s][2]);
            VERSIONS[v].run(c.out, c.inp, c.weight, c.N, c.C, c.O);
            for (int n = 0; n < c.N; n++)
                for (int o = 0; o < c.O; o++) {
                    double sum = 0;
                    for (int i = 0; i < c.C; i++) sum += (double)c.inp[n * c.C + i] * (double)c.weight[o * c.C + i];
                    double error = fabs((double)c.out[n * c.O + o] - sum) / sqrt((double)c.C);
                    if (!(error <= worst)) worst = error;
                }
            free_case(&c);
        }
        bool ok = worst <= 5e-6;
        printf("%s %-26s largest error / sqrt(C) %.1e\n", ok ? "ok  " : "FAIL", VERSIONS[v].name, worst);
        all &= ok;
    }
    return all;
}

int main(int argc, char **argv) {
    static const int usual[][3] = {{1024, 256, 768}, {1024, 1024, 4096}};
    int own[1][3] = {{0, 0, 0}}, threads = 1;
    CHECK(argc == 1 || argc == 2 || argc == 4, "give nothing, \"check\", or rows, inputs and outputs; found %d words", argc - 1);
    if (!check_versions()) return 1;
    if (argc == 2) return 0;
    for (int i = 1; i < argc; i++) CHECK((own[0][i - 1] = atoi(argv[i])) > 0, "%s should be a size of at least 1", argv[i]);
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    printf("\n%s, vectors of %d floats, tiles of %d x %d\n", processor_name(), VL, MR, NR);
    for (int s = 0; s < (argc == 4 ? 1 : 2); s++) {
        const int *size = argc == 4 ? own[0] : usual[s];
        Case c = make_case(size[0], size[1], size[2]);
        printf("\n  %d rows, %d -> %d %15s 1 thread          %d threads\n", c.N, c.C, c.O, "", threads);
        for (int v = 0; v < NUM_VERSIONS; v++) {
            printf("  %-28s", VERSIONS[v].name);
            c.run = VERSIONS[v].run;
            for (int t = 1; t <= threads; t = t < threads ? threads : threads + 1) {
                double flops = 2.0 * c.N * c.C * c.O, seconds, fraction = measure_flops(run_case, &c, flops, t, 7, 1.0, &seconds);
                printf("  %7.1f GFLOP/s %5.1f %%", flops / seconds / 1e9, 100 * fraction);
                fflush(stdout);
            }
            printf("\n");
        }
        free_case(&c);
    }
    return 0;
}
