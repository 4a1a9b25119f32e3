// train_qwen.c: trains Qwen language models, from random weights or from a Hugging Face checkpoint. Plain C, fp32, one file.
//
//   make train_qwen && ./train_qwen                          trains a small model on a Chinese corpus, about 3 minutes
//   ./train_qwen --model DIR --data DIR                      continues from a Hugging Face checkpoint
//   ./train_qwen generate --model DIR --prompt "..."         samples from one
//   ./train_qwen info --model mini_llm_1.4b                  parameters, FLOPs and memory, without allocating any
//   ./train_qwen export --model DIR --out NEW                any model it reads as a Hugging Face directory of today
//
// Where things are (search for "SECTION n"). A first reading takes 2, 4, the two structs of 5, 6, 7 and machine_update in
// 9, some 750 lines:
//    1  errors, memory, files                     8  checkpoints: safetensors, Hugging Face directories
//    2  the model: Config, parameter table        9  the machine: all that differs between CPU and GPU
//    3  vectors, exp, matrix multiplication      10  sampling
//    4  layers, forward and backward             11  options
//    5  activations: what is kept                12  a run: logs, checkpoints, evaluation, samples
//    6  the model's forward and backward         13  training
//    7  AdamW, clipping, schedules               14  info, generate, export, main
// train_qwen.cu includes this file and has sections 3 to 6 and 9 once more, for the GPU.
//
// Letters used throughout, and their values in Qwen3-0.6B:
//    B  rows of a micro-batch                    V    vocabulary (151936)          NH   query heads (16)
//    T  tokens of a row                          C    channels, the width (1024)   NKV  key and value heads (8)
//    N  B * T: positions are rows of matrices    L    layers (28)                  HD   channels of a head (128)
//                                                I    MLP width (3072)             QKV  (NH + 2 NKV) HD, one fused row
//
// One layer, x being the residual stream (N, C). Every matrix is stored (outputs, inputs) and used as x W^T:
//
//    x --+-- rmsnorm --> h1 --Wqkv (+b)--> qkv --(QK-norm)--rope--> attention --> att --Wo--> (+) --> x_mid
//        |                                                                                     |
//        +-------------------------------------------------------------------------------------+
//    x_mid --+-- rmsnorm --> h2 --Wgate,Wup--> gate, up --> silu(gate) * up --> act --Wdown--> (+) --> next x
//            |                                                                                  |
//            +----------------------------------------------------------------------------------+

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1        // POSIX functions under -std=c11
#endif
#include <assert.h>
#include <dirent.h>          // opendir: finding checkpoints
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>          // Ctrl-C saves before it stops
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>        // flock: one run for one directory
#include <sys/mman.h>        // madvise
#include <sys/resource.h>    // getrusage: peak memory
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 1. Errors, memory, files

// What a user or a machine can get wrong: one line on stderr, exit code 1. (assert is for programmers' errors.)
#define CHECK(condition, ...) do { if (!(condition)) fail(__FILE__, __LINE__, __VA_ARGS__); } while (0)
#define DIE(...) fail(__FILE__, __LINE__, __VA_ARGS__)

#if defined(__GNUC__)
__attribute__((noreturn, format(printf, 3, 4)))
#endif
void fail(const char *file, int line, const char *format, ...) {
    va_list arguments;
    fflush(stdout);
    fprintf(stderr, "error: ");
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    const char *base = strrchr(file, '/');
    fprintf(stderr, " [%s:%d]\n", base ? base + 1 : file, line);
    exit(1);
}

void *xrealloc(void *old, size_t bytes) {
    void *p = realloc(old, bytes ? bytes : 1);
    CHECK(p != NULL, "out of memory: could not get %zu MiB", bytes >> 20);
    return p;
}
// Asks Linux for pages of 2 MiB where a large array covers them. Looking up the addresses of 4 KiB ones makes an update 2 to 4 % slower.
void *with_huge_pages(void *p, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const size_t page = 1 << 21, skipped = (page - (uintptr_t)p % page) % page;
    if (bytes >= skipped + page) madvise((char *)p + skipped, (bytes - skipped) / page * page, MADV_HUGEPAGE);   // if not, it works too
#else
    (void)bytes;
#endif
    return p;
}
void *xmalloc(size_t bytes) { return with_huge_pages(xrealloc(NULL, bytes), bytes); }
void *xcalloc(size_t count, size_t bytes) {
    void *p = calloc(count ? count : 1, bytes ? bytes : 1);
    CHECK(p != NULL, "out of memory: could not get %zu MiB", (count * bytes) >> 20);
    return with_huge_pages(p, count * bytes);
}

// The whole file, with a NUL after its last byte; *size (may be NULL) receives the number of bytes.
char *read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    CHECK(f != NULL, "cannot open %s: %s", path, strerror(errno));
    struct stat st;
    CHECK(fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode), "%s is not a regular file", path);
    char *data = (char *)xmalloc((size_t)st.st_size + 1);
    size_t n = fread(data, 1, (size_t)st.st_size, f);
    CHECK(n == (size_t)st.st_size, "cannot read %s: %zu of %lld bytes came", path, n, (long long)st.st_size);
    fclose(f);
    data[n] = 0;
    if (size) *size = n;
    return data;
}

bool file_exists(const char *path) { return access(path, F_OK) == 0; }

// A path made like printf makes text. Paths are short and few, so nobody frees them.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
const char *path_of(const char *format, ...) {
    char path[4096];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(path, sizeof path, format, arguments);
    va_end(arguments);
    CHECK(length < (int)sizeof path, "the path is too long: %.80s...", path);
    return strcpy((char *)xmalloc((size_t)length + 1), path);
}

// Everything written, also to the disk (pipes and terminals have none).
bool flush_to_disk(FILE *f) {
    return !ferror(f) && fflush(f) == 0 && (fsync(fileno(f)) == 0 || errno == EINVAL || errno == EROFS || errno == ENOTSUP);
}

// A file that is written completely or reported: close_file checks every byte up to the disk.
FILE *create_file(const char *path) {
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL, "cannot write %s: %s", path, strerror(errno));
    return f;
}
void close_file(FILE *f, const char *path) {
    bool written = flush_to_disk(f);
    int reason = errno;
    written = (fclose(f) == 0) && written;
    CHECK(written, "cannot write %s: %s", path, strerror(reason));
}

void sync_directory(const char *path) {                          // so that new names in it survive a power failure
    int directory = open(path, O_RDONLY);
    if (directory >= 0) fsync(directory), close(directory);
}

double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#include "tokenizer.h"       // Json, Tokenizer
#include "dataloader.h"      // Loader, Batch, TokenFileHeader; mix64

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 2. The model
//
// Qwen v1, Qwen1.5/2/2.5 and Qwen3 (dense) are one architecture with three switches.

typedef struct {
    int V, C, L, NH, NKV, HD, I;
    int max_T;               // longest sequence the model was made for
    float rope_base;         // 10000 or 1000000: the wavelength of the slowest RoPE pair is about 2 pi rope_base positions
    float norm_eps;
    bool qkv_bias;           // Qwen v1 to Qwen2.5
    bool qk_norm;            // Qwen3
    bool tied;               // the classifier uses the embedding matrix
} Config;

// Every tensor of the model is one line here: its field in the C structs, its size, whether weight decay applies, how it
// begins, and its name in checkpoints of qwen2/qwen3 and of qwen (v1). A tensor of 0 rows is absent.
//   - wq, wk, wv lie one behind the other in memory, so wq is also the fused matrix (QKV, C); so do bq, bk, bv, and
//     w_gate, w_up. That is why the order of the lines matters.
//   - Lines with the same v1 name are slices of one v1 tensor, in this order.
//   - Output projections begin smaller by sqrt(2L), so that the residual stream's size doesn't grow with depth (GPT-2).
// The X-macro is expanded three times: into struct fields, into the list that everything else loops over, and into the
// code which points the fields into one block of memory.

#define LAYER_TENSORS(X) /* field, rows, columns, decay, init, qwen2/qwen3 name, qwen (v1) name */                           \
    X(norm1,    1,                         c->C,          NO_DECAY, ONES,   "input_layernorm.weight",          "ln_1.weight")         \
    X(wq,       c->NH * c->HD,             c->C,          DECAY,    NORMAL, "self_attn.q_proj.weight",         "attn.c_attn.weight")  \
    X(wk,       c->NKV * c->HD,            c->C,          DECAY,    NORMAL, "self_attn.k_proj.weight",         "attn.c_attn.weight")  \
    X(wv,       c->NKV * c->HD,            c->C,          DECAY,    NORMAL, "self_attn.v_proj.weight",         "attn.c_attn.weight")  \
    X(bq,       c->qkv_bias,               c->NH * c->HD, NO_DECAY, ZEROS,  "self_attn.q_proj.bias",           "attn.c_attn.bias")    \
    X(bk,       c->qkv_bias,               c->NKV * c->HD, NO_DECAY, ZEROS, "self_attn.k_proj.bias",           "attn.c_attn.bias")    \
    X(bv,       c->qkv_bias,               c->NKV * c->HD, NO_DECAY, ZEROS, "self_attn.v_proj.bias",           "attn.c_attn.bias")    \
    X(q_norm,   c->qk_norm,                c->HD,         NO_DECAY, ONES,   "self_attn.q_norm.weight",         "")                    \
    X(k_norm,   c->qk_norm,                c->HD,         NO_DECAY, ONES,   "self_attn.k_norm.weight",         "")                    \
    X(wo,       c->C,                      c->NH * c->HD, DECAY,    SCALED, "self_attn.o_proj.weight",         "attn.c_proj.weight")  \
    X(norm2,    1,                         c->C,          NO_DECAY, ONES,   "post_attention_layernorm.weight", "ln_2.weight")         \
    X(w_gate,   c->I,                      c->C,          DECAY,    NORMAL, "mlp.gate_proj.weight",            "mlp.w2.weight")       \
    X(w_up,     c->I,                      c->C,          DECAY,    NORMAL, "mlp.up_proj.weight",              "mlp.w1.weight")       \
    X(w_down,   c->C,                      c->I,          DECAY,    SCALED, "mlp.down_proj.weight",            "mlp.c_proj.weight")

#define MODEL_TENSORS(X)                                                                                                     \
    X(wte,      c->V,                      c->C,          DECAY,    NORMAL, "model.embed_tokens.weight",       "transformer.wte.weight")  \
    X(norm,     1,                         c->C,          NO_DECAY, ONES,   "model.norm.weight",               "transformer.ln_f.weight") \
    X(lm_head,  c->tied ? 0 : c->V,        c->C,          DECAY,    NORMAL, "lm_head.weight",                  "lm_head.weight")

#define AS_FIELD(field, ...) float *field;
typedef struct { LAYER_TENSORS(AS_FIELD) } LayerParams;
typedef struct { MODEL_TENSORS(AS_FIELD) LayerParams *layers; float *head; } Params;     // head: lm_head, or wte if tied

typedef enum { NO_DECAY, DECAY } Decay;
typedef enum { ZEROS, ONES, NORMAL, SCALED } Init;

typedef struct {
    char name[96], name_v1[96];      // in checkpoints
    int layer;                       // -1: not in a layer
    size_t rows, cols, offset;       // the tensor is memory[offset .. offset + rows * cols)
    bool is_vector;                  // norms and biases: stored with shape [cols], not [1, cols], and never decayed
    Decay decay;
    Init init;
} TensorInfo;

// The tensors in the order of memory: embedding, final norm, head, then layer by layer.
typedef struct { TensorInfo *list; int count; size_t num_params; } TensorTable;

void table_add(TensorTable *t, int layer, int rows, int cols, Decay decay, Init init, const char *name, const char *name_v1) {
    if (rows == 0) return;
    t->list = (TensorInfo *)xrealloc(t->list, (size_t)(t->count + 1) * sizeof(TensorInfo));
    TensorInfo *info = &t->list[t->count++];
    char prefix[32] = "", prefix_v1[32] = "";
    if (layer >= 0)
        snprintf(prefix, sizeof prefix, "model.layers.%d.", layer), snprintf(prefix_v1, sizeof prefix_v1, "transformer.h.%d.", layer);
    snprintf(info->name, sizeof info->name, "%s%s", prefix, name);
    snprintf(info->name_v1, sizeof info->name_v1, "%s%s", prefix_v1, name_v1);
    info->layer = layer, info->rows = (size_t)rows, info->cols = (size_t)cols, info->offset = t->num_params;
    info->is_vector = decay == NO_DECAY, info->decay = decay, info->init = init;
    t->num_params += info->rows * info->cols;
}

#define AS_TABLE_ROW(field, rows, cols, decay, init, name, name_v1) table_add(&table, layer, rows, cols, decay, init, name, name_v1);
TensorTable tensor_table(const Config *c) {
    TensorTable table = {NULL, 0, 0};
    int layer = -1;
    MODEL_TENSORS(AS_TABLE_ROW)
    for (layer = 0; layer < c->L; layer++) { LAYER_TENSORS(AS_TABLE_ROW) }
    return table;
}

// Points all fields into memory of num_params floats, in the order of the table. Absent tensors become NULL.
#define AS_POINTER(field, rows, cols, ...) fields->field = (rows) > 0 ? memory : NULL; memory += (size_t)(rows) * (size_t)(cols);
float *layer_point(LayerParams *fields, const Config *c, float *memory) {
    LAYER_TENSORS(AS_POINTER)
    return memory;
}
void params_point(Params *p, const Config *c, float *memory) {
    {   Params *fields = p; MODEL_TENSORS(AS_POINTER) }
    if (!p->layers) p->layers = (LayerParams *)xcalloc((size_t)c->L, sizeof(LayerParams));
    for (int l = 0; l < c->L; l++) memory = layer_point(&p->layers[l], c, memory);
    p->head = c->tied ? p->wte : p->lm_head;
}

// A normal random number for index i of stream `seed`, whatever was asked for before (on another machine it may differ in the last bit,
// as log and cos do). Box-Muller on the two halves of mix64.
float random_normal(uint64_t seed, uint64_t i) {
    uint64_t bits = mix64(mix64(seed) + i);
    double u = ((double)(bits >> 32) + 1.0) / 4294967296.0, v = (double)(bits & 0xFFFFFFFFu) / 4294967296.0;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}
double random_uniform(uint64_t seed, uint64_t i) { return (double)(mix64(mix64(seed) + i) >> 11) / 9007199254740992.0; }

void init_params(float *params, const Config *c, const TensorTable *table, uint64_t seed) {
    for (int k = 0; k < table->count; k++) {
        const TensorInfo *t = &table->list[k];
        float scale = t->init == SCALED ? 0.02f / sqrtf(2.0f * (float)c->L) : 0.02f;
        #pragma omp parallel for
        for (size_t i = t->offset; i < t->offset + t->rows * t->cols; i++)
            params[i] = t->init == ZEROS ? 0.0f : t->init == ONES ? 1.0f : scale * random_normal(seed, i);
    }
}

typedef struct { const char *name; Config config; } Preset;
static const Preset PRESETS[] = {
    //                    V      C     L   NH  NKV  HD    I  max_T  rope_base    eps  bias  qk_norm tied
    {"tiny",          {     0,  128,   5,   2,  1,  64,   384,  1024,   10000, 1e-6f, false, true,  true }},   // V: from the data
    {"mini_llm_1.4b", {151936, 2048,  16,  16, 16, 128,  5504,  8192,   10000, 1e-6f, true,  false, false}},
    {"qwen2.5-0.5b",  {151936,  896,  24,  14,  2,  64,  4864, 32768, 1000000, 1e-6f, true,  false, true }},
    {"qwen2.5-1.5b",  {151936, 1536,  28,  12,  2, 128,  8960, 32768, 1000000, 1e-6f, true,  false, true }},
    {"qwen2.5-3b",    {151936, 2048,  36,  16,  2, 128, 11008, 32768, 1000000, 1e-6f, true,  false, true }},
    {"qwen2.5-7b",    {152064, 3584,  28,  28,  4, 128, 18944, 32768, 1000000, 1e-6f, true,  false, false}},
    {"qwen3-0.6b",    {151936, 1024,  28,  16,  8, 128,  3072, 40960, 1000000, 1e-6f, false, true,  true }},
    {"qwen3-1.7b",    {151936, 2048,  28,  16,  8, 128,  6144, 40960, 1000000, 1e-6f, false, true,  true }},
    {"qwen3-4b",      {151936, 2560,  36,  32,  8, 128,  9728, 40960, 1000000, 1e-6f, false, true,  true }},
};
enum { NUM_PRESETS = sizeof PRESETS / sizeof PRESETS[0] };

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 3. Vectors, exp, matrix multiplication
//
// All that is fast on a CPU stands here; a first reader can take these three facts and go on to section 4:
//    exp_row(out, inp, scale, shift, n)        out[i] = exp(scale * inp[i] - shift), returns the sum of out
//    gemm(C, ldc, A, B, M, N, K, mode)         C (M, N) = or += A (M, K) B (K, N)
//    gemm_block(...)                           the same on one thread, for use inside a parallel region
//    dot, dot_half, row_max                    sum of products, the same with bf16 weights, largest element
// A and B are Views: gemm(C, N, view(A, K, 1), view(B, N, 1), ...) takes both as they are, view(B, 1, K) takes B transposed.
//
// Vectors are those of GCC and Clang: + - * work on all elements, and the compiler picks the instructions.

// VL: floats in a vector. MR: rows of C that the micro-kernel keeps in registers, two vectors each; a few registers are left for B and A.
// LOW_HALVES takes elements of the first halves of two vectors in turn, HIGH_HALVES of the second halves.
#if defined(__AVX512F__)
enum { VL = 16, MR = 14 };       // 28 of 32 registers
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { VL = 8, MR = 6 };         // 12 of 16
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#ifdef __ARM_NEON
enum { VL = 4, MR = 8 };         // 16 of 32
#else
enum { VL = 4, MR = 4 };         // 8 of 16
#endif
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif
enum {
    NR = 2 * VL,                 // columns of C in the micro-kernel
    KC = 256,                    // depth of a block: a panel of A (MR, KC) stays in the L1 cache
    NC = 512,                    // columns of B (KC, NC) that are packed at a time, and stay in the L2 cache meanwhile
    MC = (192 + MR - 1) / MR * MR,   // rows of A that are packed at a time, to the L2 cache too
};
typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t veci __attribute__((vector_size(VL * 4)));
typedef float vec_at __attribute__((vector_size(VL * 4), aligned(4), may_alias));    // a vector anywhere in memory
typedef uint16_t half_at __attribute__((vector_size(VL * 2), aligned(2), may_alias));

#ifdef __CUDACC__
#define UNROLL               // nvcc does not know the pragmas of the host compiler
#define UNROLL_4
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

// A matrix somewhere in memory: element (i, j) is data[i * row + j * col]. Transposing swaps row and col.
typedef struct { const float *data; ptrdiff_t row, col; } View;
View view(const float *data, ptrdiff_t row, ptrdiff_t col) { View v = {data, row, col}; return v; }

typedef enum { OVERWRITE, ACCUMULATE } WriteMode;

// c (m, n) = or += a (m, kc) b (kc, n), m <= rows, n <= NR. Both are packed: column k of a is a[k * MR ..], row k of b is b[k * NR ..].
// Always whole vectors and sums of the same order, so that an element of C doesn't depend on where its tile begins; at the border the
// surplus is dropped. C is asked for first, as it comes from far away and is needed last. (Loops to MR, not to rows: Clang unrolls those.)
#if defined(__GNUC__)
__attribute__((always_inline))                                   // so that rows is a constant
#endif
static inline void multiply_tile(float *c, ptrdiff_t ldc, const float *a, const float *b, int kc, int m, int n, int rows, WriteMode mode) {
    vec sum[MR][2];
    UNROLL
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int i = 0; i < m; i++) __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + n - 1, 1);
    UNROLL_4
    for (int k = 0; k < kc; k++, a += MR, b += NR) {
        vec b0 = *(const vec_at *)b, b1 = *(const vec_at *)(b + VL);
        UNROLL
        for (int i = 0; i < MR; i++) if (i < rows) sum[i][0] += a[i] * b0, sum[i][1] += a[i] * b1;
    }
    float border[MR][NR];
    bool whole = m == rows && n == NR;
    UNROLL
    for (int i = 0; i < MR; i++) {
        if (i >= rows) continue;
        float *to = whole ? c + i * ldc : border[i];
        vec_at *c0 = (vec_at *)to, *c1 = (vec_at *)(to + VL);
        if (whole && mode == ACCUMULATE) sum[i][0] += *c0, sum[i][1] += *c1;
        *c0 = sum[i][0], *c1 = sum[i][1];
    }
    for (int i = 0; !whole && i < m; i++)
        for (int j = 0; j < n; j++) c[i * ldc + j] = mode == ACCUMULATE ? c[i * ldc + j] + border[i][j] : border[i][j];
}

// The micro-kernel: MR rows, or fewer where C ends.
void micro_kernel(float *c, ptrdiff_t ldc, const float *a, const float *b, int kc, int m, int n, WriteMode mode) {
    if (m <= 4) multiply_tile(c, ldc, a, b, kc, m, n, 4, mode);
    else if (m <= 8 && MR > 8) multiply_tile(c, ldc, a, b, kc, m, n, 8, mode);
    else multiply_tile(c, ldc, a, b, kc, m, n, MR, mode);
}

// out[k * width + w] = from(w, k), w < count <= width, from k on to kc; zeros for the other w. Whole panels whose rows are contiguous
// (col == 1) go through registers, VL x VL at a time: interleaving row i with row i + VL / 2 moves each element's index bits (row, column)
// round by one, so after log2(VL) times row and column have changed places. The next panel's rows are asked for meanwhile, but only up to
// the L2 cache (the 2): in the L1 cache they push out what is packed, which takes twice the time. A panel narrower than a vector is
// written with vectors all the same, in ascending order; what is too much is overwritten by what comes next, and needs room for VL - width
// floats behind the last panel. (One that is wider, but no whole number of vectors, goes element by element.)
#if defined(__GNUC__)
__attribute__((always_inline))                                   // so that width is a constant
#endif
static inline void pack_panel(float *out, View from, int count, int width, int k, int kc) {
#if defined(__has_builtin) && !defined(__CUDACC__)
#if __has_builtin(__builtin_shufflevector)
    if (from.col == 1 && count == width && (width < VL || width % VL == 0))
        for (; k + VL <= kc; k += VL)
            for (int w0 = 0; w0 < width; w0 += VL) {
                vec rows[VL], next[VL];
                UNROLL
                for (int i = 0; i < VL; i++) {
                    rows[i] = *(const vec_at *)(from.data + (w0 + i < width ? w0 + i : 0) * from.row + k);
                    __builtin_prefetch(from.data + (w0 + i + width) * from.row + k, 0, 2);
                }
                for (int times = 1; times < VL; times *= 2) {
                    UNROLL
                    for (int i = 0; i < VL / 2; i++) {
                        next[2 * i] = __builtin_shufflevector(rows[i], rows[i + VL / 2], LOW_HALVES);
                        next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + VL / 2], HIGH_HALVES);
                    }
                    UNROLL
                    for (int i = 0; i < VL; i++) rows[i] = next[i];
                }
                UNROLL
                for (int i = 0; i < VL; i++) *(vec_at *)(out + (k + i) * width + w0) = rows[i];
            }
#endif
#endif
    for (; k < kc; k++)
        for (int w = 0; w < width; w++) out[k * width + w] = w < count ? from.data[w * from.row + k * from.col] : 0;
}

// The same for any count: panel p begins at out[p * width * depth], depth >= kc. What lies side by side in memory is copied by vectors, in
// the order of the memory.
#if defined(__GNUC__)
__attribute__((always_inline))                                   // likewise
#endif
static inline void pack(float *out, ptrdiff_t depth, View from, int count, int width, int kc) {
    int whole = count - count % width, copied = 0;
    if (from.row == 1)
        for (; copied < kc - 1; copied++)                        // (the last k may end with the memory, and a vector be longer)
            for (int w0 = 0; w0 < whole; w0 += width)
                for (int w = w0; w < w0 + width; w += VL) {
                    __builtin_prefetch(from.data + (copied + 8) * from.col + w, 0, 2);
                    *(vec_at *)(out + w0 * (depth - 1) + copied * width + w) = *(const vec_at *)(from.data + copied * from.col + w);
                }
    for (int w = 0; w < count; w += width)
        pack_panel(out + w * depth, view(from.data + w * from.row, from.row, from.col), w < whole ? width : count - whole, width,
                   w < whole ? copied : 0, kc);
}

// A buffer of the calling thread, kept for its next call; 64-byte aligned. Slots are used independently.
float *thread_buffer(int slot, size_t floats) {
    static __thread float *buffers[4];
    static __thread size_t sizes[4];
    if (sizes[slot] < floats) {
        free(buffers[slot]);
        buffers[slot] = (float *)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        CHECK(buffers[slot] != NULL, "out of memory: could not get %zu MiB", floats * sizeof(float) >> 20);
        sizes[slot] = floats;
    }
    return buffers[slot];
}
enum { BUFFER_A, BUFFER_B, BUFFER_ATTENTION, BUFFER_ROW };

// Packs A (m, kc) as the panels of MR rows that the micro-kernel reads. Panel p begins at out[p * MR * depth]; depth >= kc leaves room for
// more columns. Likewise B (kc, n) as panels of NR columns.
void pack_rows(float *out, int depth, View a, int m, int kc) { pack(out, depth, a, m, MR, kc); }
void pack_columns(float *out, int depth, View b, int n, int kc) { pack(out, depth, view(b.data, b.col, b.row), n, NR, kc); }

// C (m, n) = or += A (m, kc) B (kc, n), both packed.
void multiply_packed(float *C, ptrdiff_t ldc, const float *a, int a_depth, const float *b, int b_depth, int m, int n, int kc,
                     WriteMode mode) {
    for (int i = 0; i < m; i += MR)                              // (the other way round takes 1 to 4 % longer)
        for (int j = 0; j < n; j += NR)
            micro_kernel(C + i * ldc + j, ldc, a + (ptrdiff_t)i * a_depth, b + (ptrdiff_t)j * b_depth, kc, m - i < MR ? m - i : MR,
                         n - j < NR ? n - j : NR, mode);
}

// C (M, N) = or += A (M, K) B (K, N), on the calling thread.
void gemm_block(float *C, ptrdiff_t ldc, View A, View B, int M, int N, int K, WriteMode mode) {
    float *a = thread_buffer(BUFFER_A, (size_t)MC * KC + VL), *b = thread_buffer(BUFFER_B, (size_t)NC * KC);
    for (int j0 = 0; j0 < N; j0 += NC)
        for (int k0 = 0; k0 < K; k0 += KC) {
            int nc = N - j0 < NC ? N - j0 : NC, kc = K - k0 < KC ? K - k0 : KC;
            pack_columns(b, kc, view(B.data + k0 * B.row + j0 * B.col, B.row, B.col), nc, kc);
            for (int i0 = 0; i0 < M; i0 += MC) {
                int mc = M - i0 < MC ? M - i0 : MC;
                pack_rows(a, kc, view(A.data + i0 * A.row + k0 * A.col, A.row, A.col), mc, kc);
                multiply_packed(C + i0 * ldc + j0, ldc, a, kc, b, kc, mc, nc, kc, k0 > 0 ? ACCUMULATE : mode);
            }
        }
    if (K == 0 && mode == OVERWRITE)
        for (int i = 0; i < M; i++) memset(C + i * ldc, 0, sizeof(float) * (size_t)N);
}

// The same on all threads: each computes one tile of C. An element is always summed in the same order by one thread, so the
// result does not depend on the number of threads, to the last bit.
void gemm(float *C, ptrdiff_t ldc, View A, View B, int M, int N, int K, WriteMode mode) {
#ifdef _OPENMP
    int threads = omp_get_max_threads(), across = 1;
    int row_tiles = (M + MR - 1) / MR, column_tiles = (N + NR - 1) / NR;
    double least = 1e30;
    for (int q = 1; q <= threads; q++) {                         // threads / q rows of q tiles: the least work for the slowest
        if (threads % q != 0) continue;
        int down = threads / q;
        double m = (row_tiles + down - 1) / down * MR, n = (column_tiles + q - 1) / q * NR;
        double work = m * n + 10 * (m * ceil(n / NC) + n);       // packing an element costs about 10 multiply-adds
        if (work < least) least = work, across = q;
    }
    #pragma omp parallel for
    for (int tile = 0; tile < threads; tile++) {
        int down = threads / across, y = tile / across, x = tile % across;
        int i0 = (int)((long)row_tiles * y / down) * MR, i1 = (int)((long)row_tiles * (y + 1) / down) * MR;
        int j0 = (int)((long)column_tiles * x / across) * NR, j1 = (int)((long)column_tiles * (x + 1) / across) * NR;
        if (i1 > M) i1 = M;
        if (j1 > N) j1 = N;
        if (i0 < i1 && j0 < j1)
            gemm_block(C + i0 * ldc + j0, ldc, view(A.data + i0 * A.row, A.row, A.col), view(B.data + j0 * B.col, B.row, B.col),
                       i1 - i0, j1 - j0, K, mode);
    }
#else
    gemm_block(C, ldc, A, B, M, N, K, mode);
#endif
}

vec select_vector(veci mask, vec yes, vec no) { return (vec)((mask & (veci)yes) | (~mask & (veci)no)); }

// exp of every element, within 2 units in the last place for -87 <= x <= 88; beyond, exp of the nearer end. NaN stays NaN.
// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where seven terms of Taylor's series suffice.
vec vector_exp(vec x) {
    const vec low = (vec){} - 87.0f, high = (vec){} + 88.0f;
    x = select_vector(x < low, low, select_vector(x > high, high, x));
    vec shifted = x * 1.44269504f + 12582912.0f;                 // 1.5 * 2^23 pushes the fraction out: rounds to an integer,
    vec n = shifted - 12582912.0f;                               // which is also in the low bits of `shifted`
    vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;         // ln 2 in two parts, the first exact in 15 bits
    vec r2 = r * r, r4 = r2 * r2;                                // pairs of terms first: less waiting than term by term
    vec p = (1.0f + r) + r2 * (0.5f + r * (1 / 6.0f)) + r4 * ((1 / 24.0f + r * (1 / 120.0f)) + r2 * (1 / 720.0f + r * (1 / 5040.0f)));
    return p * (vec)(((veci)shifted - 0x4B400000 + 127) << 23);  // 0x4B400000 are the bits of 1.5 * 2^23; 2^n by its exponent
}

// out[i] = exp(scale * inp[i] - shift); returns the sum of out.
float exp_row(float *out, const float *inp, float scale, float shift, int n) {
    vec sums = {0};
    int i = 0;
    for (; i + VL <= n; i += VL) {
        vec e = vector_exp(scale * *(const vec_at *)(inp + i) - shift);
        *(vec_at *)(out + i) = e;
        sums += e;
    }
    float sum = 0;
    for (int j = 0; j < VL; j++) sum += sums[j];
    for (; i < n; i++) sum += out[i] = vector_exp((vec){} + (scale * inp[i] - shift))[0];
    return sum;
}

float row_max(const float *x, int n) {
    vec highest = (vec){} + x[0];
    int i = 1;
    for (; i + VL <= n; i += VL) highest = select_vector(*(const vec_at *)(x + i) > highest, *(const vec_at *)(x + i), highest);
    float max = highest[0];
    for (int j = 1; j < VL; j++) if (highest[j] > max) max = highest[j];
    for (; i < n; i++) if (x[i] > max) max = x[i];
    return max;
}

// What is left of a dot product, n < 2 VL elements, is filled up with zeros: the compiler may fuse a multiplication and an addition of
// single floats or not as it likes, and dot and dot_half have to round alike.
float dot_end(vec sums0, vec sums1, const float *a, const float *b, int n) {
    float x[2 * VL] = {0}, y[2 * VL] = {0}, sum = 0;
    for (int j = 0; j < n; j++) x[j] = a[j], y[j] = b[j];
    if (n > 0) sums0 += *(const vec_at *)x * *(const vec_at *)y, sums1 += *(const vec_at *)(x + VL) * *(const vec_at *)(y + VL);
    for (int j = 0; j < VL; j++) sum += sums0[j] + sums1[j];
    return sum;
}
float dot(const float *a, const float *b, int n) {
    vec sums0 = {0}, sums1 = {0};
    int i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        sums0 += *(const vec_at *)(a + i) * *(const vec_at *)(b + i);
        sums1 += *(const vec_at *)(a + i + VL) * *(const vec_at *)(b + i + VL);
    }
    return dot_end(sums0, sums1, a + i, b + i, n - i);
}

uint32_t float_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
float bits_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }
uint16_t float_to_bf16(float x) {                                // rounds to nearest, ties to even
    uint32_t bits = float_bits(x);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);            // NaN stays NaN
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Generating reads every weight once a token, and memory is slower than arithmetic. Where all weights of a model are bf16 numbers, as in
// most published checkpoints, reading a copy of 2 bytes a weight gives the same bits in half of the time. Not for training: weights
// change there.
typedef struct { const float *weights; size_t count; uint16_t *halves; } HalfWeights;
static HalfWeights half_weights;         // of one model

void half_weights_free(const float *weights) {
    if (half_weights.weights != weights) return;
    free(half_weights.halves);
    memset(&half_weights, 0, sizeof half_weights);
}
void half_weights_make(const float *weights, size_t count) {
    bool exact = true;
    #pragma omp parallel for reduction(&&:exact)
    for (size_t i = 0; i < count; i++) exact = exact && (float_bits(weights[i]) & 0xFFFF) == 0;
    half_weights_free(half_weights.weights);
    uint16_t *halves = exact ? (uint16_t *)malloc(count * sizeof(uint16_t)) : NULL;  // if there is no room for it, it goes without
    if (!halves) return;
    with_huge_pages(halves, count * sizeof(uint16_t));
    #pragma omp parallel for
    for (size_t i = 0; i < count; i++) halves[i] = (uint16_t)(float_bits(weights[i]) >> 16);
    half_weights.weights = weights, half_weights.count = count, half_weights.halves = halves;
}
const uint16_t *half_of(const float *weight) {                   // the copy of this weight, or NULL
    bool inside = weight >= half_weights.weights && weight < half_weights.weights + half_weights.count;
    return inside ? half_weights.halves + (weight - half_weights.weights) : NULL;
}

// The sum of dot, in the same order, with bf16 numbers.
float dot_half(const float *a, const uint16_t *b, int n) {
    vec sums0 = {0}, sums1 = {0};
    int i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        veci b0 = __builtin_convertvector(*(const half_at *)(b + i), veci) << 16;
        veci b1 = __builtin_convertvector(*(const half_at *)(b + i + VL), veci) << 16;
        sums0 += *(const vec_at *)(a + i) * (vec)b0;
        sums1 += *(const vec_at *)(a + i + VL) * (vec)b1;
    }
    float rest[2 * VL];
    for (int j = 0; i + j < n; j++) rest[j] = bf16_to_float(b[i + j]);
    return dot_end(sums0, sums1, a + i, rest, n - i);
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 4. Layers, forward and backward
//
// Arguments: outputs, inputs, sizes. Of a backward, d_x is the gradient of the loss with respect to x; gradients of parameters are
// added to (+=), gradients of activations are written (=) unless the comment says +=.
// Every sum over rows runs in a fixed order, whatever the number of threads. gemm, gemm_block, exp_row, row_max and dot are
// those of section 3, where a list says what each computes.

// out (N, C): out[n] = wte[tokens[n]]
void embedding_forward(float *out, const int *tokens, const float *wte, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) memcpy(out + (size_t)n * C, wte + (size_t)tokens[n] * C, sizeof(float) * (size_t)C);
}

// out = inp, both (N, C)
void copy_rows(float *out, const float *inp, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) memcpy(out + (size_t)n * C, inp + (size_t)n * C, sizeof(float) * (size_t)C);
}

// dwte[tokens[n]] += dout[n]. A token may stand in many rows, so threads share the columns, COLUMNS at a time, not the rows.
enum { COLUMNS = 64 };
void embedding_backward(float *dwte, const float *dout, const int *tokens, int N, int C) {
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += COLUMNS) {
        int width = C - c0 < COLUMNS ? C - c0 : COLUMNS;
        for (int n = 0; n < N; n++) {
            float *to = dwte + (size_t)tokens[n] * C + c0;
            const float *from = dout + (size_t)n * C + c0;
            for (int c = 0; c < width; c++) to[c] += from[c];
        }
    }
}

// Each row of inp holds G vectors of C channels, one behind the other; the next row is `stride` floats on. (G = 1 for the norms
// of the residual stream; for QK-norm the heads are the vectors.) For each vector x:
//    rstd = 1 / sqrt(mean(x^2) + eps),  out = x * rstd * weight            rstd (N, G) is kept for the backward
void rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int N, int G, int C, int stride, float eps) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int g = 0; g < G; g++) {
            size_t at = (size_t)n * stride + (size_t)g * C;
            const float *x = inp + at;
            float *y = out + at, r = 1.0f / sqrtf(dot(x, x, C) / (float)C + eps);
            for (int c = 0; c < C; c++) y[c] = x[c] * r * weight[c];
            rstd[(size_t)n * G + g] = r;
        }
}

// dweight += sum over vectors of dout * x * rstd
// dinp = or += rstd * (weight * dout - x * rstd^2 * mean(weight * dout * x));  with OVERWRITE dinp may be dout itself
void rmsnorm_backward(float *dinp, float *dweight, const float *dout, const float *inp, const float *weight, const float *rstd,
                      int N, int G, int C, int stride, WriteMode mode) {
    #pragma omp parallel
    {
        #pragma omp for
        for (int c0 = 0; c0 < C; c0 += COLUMNS) {                // columns are shared out, as in embedding_backward
            float sum[COLUMNS] = {0};
            int width = C - c0 < COLUMNS ? C - c0 : COLUMNS;
            for (int n = 0; n < N; n++)
                for (int g = 0; g < G; g++) {
                    size_t at = (size_t)n * stride + (size_t)g * C + (size_t)c0;
                    const float *dy = dout + at, *x = inp + at;
                    float r = rstd[(size_t)n * G + g];
                    for (int c = 0; c < width; c++) sum[c] += dy[c] * x[c] * r;
                }
            for (int c = 0; c < width; c++) dweight[c0 + c] += sum[c];
        }
        #pragma omp for
        for (int n = 0; n < N; n++)
            for (int g = 0; g < G; g++) {
                size_t at = (size_t)n * stride + (size_t)g * C;
                const float *dy = dout + at, *x = inp + at;
                float *dx = dinp + at, r = rstd[(size_t)n * G + g], sum = 0;
                #pragma omp simd reduction(+:sum)
                for (int c = 0; c < C; c++) sum += weight[c] * dy[c] * x[c];
                float back = sum / (float)C * r * r * r;
                for (int c = 0; c < C; c++) {
                    float d = weight[c] * dy[c] * r - x[c] * back;
                    dx[c] = mode == ACCUMULATE ? dx[c] + d : d;
                }
            }
    }
}

// out (N, OC) = or += inp (N, C) weight (OC, C)^T + bias (OC). bias may be NULL.
// One or few rows (sampling) are dot products with the rows of weight: then reading weight from memory is all that counts.
void matmul_forward(float *out, const float *inp, const float *weight, const float *bias, int N, int C, int OC, WriteMode mode) {
    if (N < 4) {
        const uint16_t *half = half_of(weight);
        #pragma omp parallel for
        for (int o = 0; o < OC; o++)
            for (int n = 0; n < N; n++) {
                const float *x = inp + (size_t)n * C;
                float *to = out + (size_t)n * OC + o, sum = half ? dot_half(x, half + (size_t)o * C, C) : dot(x, weight + (size_t)o * C, C);
                *to = (mode == ACCUMULATE ? *to : 0) + sum + (bias ? bias[o] : 0);
            }
        return;
    }
    gemm(out, OC, view(inp, C, 1), view(weight, 1, C), N, OC, C, mode);
    if (!bias) return;
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int o = 0; o < OC; o++) out[(size_t)n * OC + o] += bias[o];
}

// dinp (N, C) = dout weight;  dweight (OC, C) += dout^T inp;  dbias += column sums of dout
void matmul_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp, const float *weight,
                     int N, int C, int OC) {
    gemm(dinp, C, view(dout, OC, 1), view(weight, C, 1), N, C, OC, OVERWRITE);
    gemm(dweight, C, view(dout, 1, OC), view(inp, C, 1), OC, C, N, ACCUMULATE);
    if (!dbias) return;
    #pragma omp parallel for
    for (int o0 = 0; o0 < OC; o0 += COLUMNS) {
        float sum[COLUMNS] = {0};
        int width = OC - o0 < COLUMNS ? OC - o0 : COLUMNS;
        for (int n = 0; n < N; n++) {
            const float *dy = dout + (size_t)n * OC + o0;
            for (int o = 0; o < width; o++) sum[o] += dy[o];
        }
        for (int o = 0; o < width; o++) dbias[o0 + o] += sum[o];
    }
}

// cos and sin of every position's angles: table (T, HD / 2, 2), angle = position * base^(-2 i / HD), computed in double.
void rope_table(float *table, int T, int HD, float base) {
    for (int t = 0; t < T; t++)
        for (int i = 0; i < HD / 2; i++) {
            double angle = t * pow((double)base, -2.0 * i / HD);
            table[((size_t)t * (HD / 2) + i) * 2] = (float)cos(angle);
            table[((size_t)t * (HD / 2) + i) * 2 + 1] = (float)sin(angle);
        }
}

// Turns, in place, each pair (x[i], x[i + HD/2]) of each of the first `heads` heads of a row by the angles of its position.
// (Easy to get wrong: Qwen pairs i with i + HD/2, not with i + 1.) The backward turns gradients the other way round.
typedef enum { ROPE_FORWARD = 1, ROPE_BACKWARD = -1 } RopeDirection;
void rope(float *x, const int *positions, const float *table, int N, int heads, int HD, int stride, RopeDirection direction) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *angles = table + (size_t)positions[n] * HD;
        for (int h = 0; h < heads; h++) {
            float *a = x + (size_t)n * stride + (size_t)h * HD, *b = a + HD / 2;
            for (int i = 0; i < HD / 2; i++) {
                float c = angles[2 * i], s = angles[2 * i + 1] * (float)direction, a0 = a[i], b0 = b[i];
                a[i] = a0 * c - b0 * s;
                b[i] = b0 * c + a0 * s;
            }
        }
    }
}

// Causal attention with grouped heads: query head h reads key and value head h / (NH / NKV). For query position t and the keys
// j = start[t] .. t of its document:   p_j = softmax_j(q . k_j / sqrt(HD)),   att = sum_j p_j v_j
// q, k, v are heads inside rows of `stride` floats; att is (N, NH * HD); lse (B, NH, T) keeps log(sum(exp(scores))), from which the
// backward makes p again. (T, T) is never stored: a panel of NR queries meets KEY_ROWS keys at a time.
//
// Scores are computed transposed, S^T = K Q^T: a query is a lane of a vector, so softmax runs down the columns without ever adding up
// across a vector, and a block of S^T (keys, NR) is as it stands the packed right operand of the next product, att^T = V^T P^T.
enum { KEY_ROWS = 24 * MR };

// What a panel of queries knows of itself, a lane for each: the keys it may see, and in the forward max and sum of its scores so far.
typedef struct { veci from, to; vec max, sum; } Lanes;

// Lanes of the queries at positions t .. t + n - 1; lanes beyond see no key.
void lanes_begin(Lanes lanes[2], const int *start, int t, int n) {
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < VL; i++) {
            int query = half * VL + i;
            lanes[half].from[i] = query < n ? start[query] : 1, lanes[half].to[i] = query < n ? t + query : 0;
            lanes[half].max[i] = -1e30f, lanes[half].sum[i] = 0;
        }
}
veci lanes_see(const Lanes *lanes, int key) { return (lanes->from <= (veci){} + key) & (lanes->to >= (veci){} + key); }

// Online softmax (Milakov and Gimelshein 2018). scores (count, NR) of keys `key` ... become exp(scale * score - max), 0 where a query may
// not see the key; max and sum go on from the blocks before, whose weights in out (HD, NR) are scaled to the new maximum.
void softmax_block(float *scores, Lanes lanes[2], float *out, float scale, int key, int count, int HD) {
    for (int half = 0; half < 2; half++) {
        const Lanes l = lanes[half];
        const vec zero = {0}, masked = zero - 1e30f;
        vec max = l.max, sum = zero;
        for (int j = 0; j < count; j++) {
            vec_at *s = (vec_at *)(scores + j * NR + half * VL);
            vec x = select_vector(lanes_see(&l, key + j), *s * scale, masked);
            max = select_vector(x > max, x, max);
            *s = x;
        }
        for (int j = 0; j < count; j++) {
            vec_at *s = (vec_at *)(scores + j * NR + half * VL);
            vec p = select_vector(*s == masked, zero, vector_exp(*s - max));
            sum += p;
            *s = p;
        }
        vec shrink = vector_exp(l.max - max);
        lanes[half].max = max, lanes[half].sum = l.sum * shrink + sum;
        for (int i = 0; i < HD; i++) *(vec_at *)(out + i * NR + half * VL) *= shrink;
    }
}

// The first key that any of n queries sees, and the block of KEY_ROWS it is in.
int first_block(const int *start, int n) {
    int first = start[0];
    for (int i = 1; i < n; i++) if (start[i] < first) first = start[i];
    return first / KEY_ROWS * KEY_ROWS;
}

// One head: queries at positions past .. past + n - 1 against keys 0 .. past + n - 1. start, lse (may be NULL) begin with the first query.
void attention_head(float *att, float *lse, const float *q, const float *k, const float *v, const int *start, int past, int n, int HD,
                    int q_stride, int kv_stride, int att_stride) {
    int total = past + n, depth = HD + MR;
    float *keys = thread_buffer(BUFFER_ATTENTION,
                                (size_t)(total + MR) * HD + (size_t)total * depth + (size_t)NR * (2 * HD + KEY_ROWS + MR) + VL);
    float *values = keys + (size_t)(total + MR) * HD, *queries = values + (size_t)total * depth, *out = queries + NR * HD;
    float *p = out + NR * (HD + MR);
    pack_rows(keys, HD, view(k, kv_stride, 1), total, HD);                           // K (total, HD)
    pack_rows(values, total, view(v, 1, kv_stride), HD, total);                      // V^T (HD, total)
    for (int t0 = 0; t0 < n; t0 += NR) {
        int rows = n - t0 < NR ? n - t0 : NR, end = past + t0 + rows, begin = first_block(start + t0, rows);
        Lanes lanes[2];
        lanes_begin(lanes, start + t0, past + t0, rows);
        pack_columns(queries, HD, view(q + (ptrdiff_t)t0 * q_stride, 1, q_stride), rows, HD);          // Q^T (HD, NR)
        memset(out, 0, sizeof(float) * NR * (size_t)HD);                             // att^T (HD, NR)
        for (int key = begin; key < end; key += KEY_ROWS) {
            int count = end - key < KEY_ROWS ? end - key : KEY_ROWS;
            multiply_packed(p, NR, keys + (ptrdiff_t)key * HD, HD, queries, HD, count, NR, HD, OVERWRITE);
            softmax_block(p, lanes, out, 1.0f / sqrtf((float)HD), key, count, HD);
            multiply_packed(out, NR, values + (ptrdiff_t)key * MR, total, p, count, HD, NR, count, ACCUMULATE);
        }
        pack_panel(queries, view(out, NR, 1), HD, HD, 0, NR);                        // att (NR, HD)
        for (int i = 0; i < rows; i++) {
            float sum = lanes[i / VL].sum[i % VL], inverse = 1.0f / sum;
            for (int c = 0; c < HD; c++) att[(ptrdiff_t)(t0 + i) * att_stride + c] = queries[i * HD + c] * inverse;
            if (lse) lse[t0 + i] = lanes[i / VL].max[i % VL] + logf(sum);
        }
    }
}

void attention_forward(float *att, float *lse, const float *q, const float *k, const float *v, const int *start,
                       int B, int T, int NH, int NKV, int HD, int stride) {
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++) {
            size_t row = (size_t)b * T, head = (size_t)h * HD, kv_head = (size_t)(h / (NH / NKV)) * HD;
            attention_head(att + row * NH * HD + head, lse + row * NH + (size_t)h * T, q + row * stride + head, k + row * stride + kv_head,
                           v + row * stride + kv_head, start + row, 0, T, HD, stride, stride, NH * HD);
        }
}

// The one query of a generated token against `count` keys: no more than reading keys and values once.
void attention_row(float *att, const float *q, const float *k, const float *v, int count, int HD, int kv_stride) {
    float *p = thread_buffer(BUFFER_ATTENTION, (size_t)count);
    for (int j = 0; j < count; j++) p[j] = dot(q, k + (ptrdiff_t)j * kv_stride, HD);
    float scale = 1.0f / sqrtf((float)HD), sum = exp_row(p, p, scale, scale * row_max(p, count), count);
    memset(att, 0, sizeof(float) * (size_t)HD);
    for (int j = 0; j < count; j++)
        for (int c = 0; c < HD; c++) att[c] += p[j] / sum * v[(ptrdiff_t)j * kv_stride + c];
}

// Keys and values of one sequence so far, so that generating a token needs the forward pass of that token only.
typedef struct { float *k, *v; int *zeros; int capacity, length; } KVCache;      // k, v: (L, capacity, NKV HD)

// Room for a sequence of at most T tokens; prompts are processed PROMPT_CHUNK tokens at a time.
enum { PROMPT_CHUNK = 256 };
KVCache cache_alloc(int L, int NKV, int HD, int T) {
    size_t floats = (size_t)L * (size_t)T * (size_t)(NKV * HD);
    KVCache cache = {(float *)xmalloc(floats * sizeof(float)), (float *)xmalloc(floats * sizeof(float)),
                     (int *)xcalloc(PROMPT_CHUNK, sizeof(int)), T, 0};
    return cache;
}
void cache_free(KVCache *cache) { free(cache->k), free(cache->v), free(cache->zeros); }

// Attention of T new tokens, which follow cache->length others; their keys and values are put into the cache of this layer.
void attention_cached(float *att, const float *q, const float *k, const float *v, const KVCache *cache, int layer,
                      int T, int NH, int NKV, int HD, int stride) {
    int width = NKV * HD, past = cache->length;
    float *keys = cache->k + (size_t)layer * cache->capacity * width, *values = cache->v + (size_t)layer * cache->capacity * width;
    for (int t = 0; t < T; t++) {
        memcpy(keys + (size_t)(past + t) * width, k + (size_t)t * stride, sizeof(float) * (size_t)width);
        memcpy(values + (size_t)(past + t) * width, v + (size_t)t * stride, sizeof(float) * (size_t)width);
    }
    #pragma omp parallel for
    for (int h = 0; h < NH; h++) {
        const float *q_head = q + (size_t)h * HD, *k_head = keys + (size_t)(h / (NH / NKV)) * HD,
            *v_head = values + (size_t)(h / (NH / NKV)) * HD;
        float *att_head = att + (size_t)h * HD;
        if (T == 1) attention_row(att_head, q_head, k_head, v_head, past + 1, HD, width);
        else attention_head(att_head, NULL, q_head, k_head, v_head, cache->zeros, past, T, HD, stride, width, NH * HD);
    }
}

// With lse and back = datt . att of each lane: scores become p = exp(scale * score - lse), dp becomes ds = p (dp - back) scale.
void softmax_backward_block(float *scores, float *dp, const Lanes lanes[2], const vec lse[2], const vec back[2], float scale, int key,
                            int count) {
    const vec zero = {0};
    for (int j = 0; j < count; j++)
        for (int half = 0; half < 2; half++) {
            vec_at *s = (vec_at *)(scores + j * NR + half * VL), *d = (vec_at *)(dp + j * NR + half * VL);
            *s = select_vector(lanes_see(&lanes[half], key + j), vector_exp(*s * scale - lse[half]), zero);
            *d = *s * (*d - back[half]) * scale;
        }
}

// dq, dk, dv = (rows of `stride` floats, laid out as q, k, v). With p_ij of query i and key j, datt of att:
//    dv_j = sum_i p_ij datt_i      dp_ij = datt_i . v_j      ds_ij = p_ij (dp_ij - datt_i . att_i) / sqrt(HD)
//    dq_i = sum_j ds_ij k_j        dk_j = sum_i ds_ij q_i
// One task is one key/value head with all of its query heads, so dk and dv have one writer. QUERY_ROWS queries, some panels of NR, meet
// KEY_ROWS keys at a time; p and ds are transposed as in the forward, (keys, NR) for each panel.
enum { QUERY_ROWS = 64 };
typedef struct { float *keys, *values, *keys_t, *queries, *datts, *queries_t, *datts_t, *dq_t, *p, *ds, *left; } AttentionBuffers;

void attention_backward_block(float *dq, float *dk, float *dv, const float *datt, const float *att, const float *lse, const float *q,
                              const int *start, const AttentionBuffers *a, int t0, int n, int T, int HD, int stride, int att_stride) {
    float scale = 1.0f / sqrtf((float)HD);
    Lanes lanes[QUERY_ROWS / VL];
    vec lses[QUERY_ROWS / VL] = {{0}}, backs[QUERY_ROWS / VL] = {{0}};
    for (int i = 0; i < n; i += NR) lanes_begin(lanes + i / VL, start + i, t0 + i, n - i);
    for (int i = 0; i < n; i++) {
        lses[i / VL][i % VL] = lse[i];
        backs[i / VL][i % VL] = dot(datt + (ptrdiff_t)i * att_stride, att + (ptrdiff_t)i * att_stride, HD);
    }
    pack_columns(a->queries_t, HD, view(q, 1, stride), n, HD);                       // Q^T (HD, n)
    pack_columns(a->datts_t, HD, view(datt, 1, att_stride), n, HD);
    pack_columns(a->queries, n, view(q, stride, 1), HD, n);                          // Q (n, HD)
    pack_columns(a->datts, n, view(datt, att_stride, 1), HD, n);
    memset(a->dq_t, 0, sizeof(float) * (size_t)QUERY_ROWS * (size_t)HD);                // dQ^T, (HD, NR) for each panel
    for (int key = first_block(start, n); key < t0 + n; key += KEY_ROWS) {
        int count = t0 + n - key < KEY_ROWS ? t0 + n - key : KEY_ROWS;
        for (int i = 0; i < n; i += NR) {
            int end = t0 + (i + NR < n ? i + NR : n) - key, seen = end < 0 ? 0 : end < count ? end : count;
            float *p = a->p + i * KEY_ROWS, *ds = a->ds + i * KEY_ROWS;
            multiply_packed(p, NR, a->keys + (ptrdiff_t)key * HD, HD, a->queries_t + i * HD, HD, seen, NR, HD, OVERWRITE);
            multiply_packed(ds, NR, a->values + (ptrdiff_t)key * HD, HD, a->datts_t + i * HD, HD, seen, NR, HD, OVERWRITE);
            softmax_backward_block(p, ds, lanes + i / VL, lses + i / VL, backs + i / VL, scale, key, seen);
            memset(p + seen * NR, 0, sizeof(float) * (size_t)((count - seen) * NR));
            memset(ds + seen * NR, 0, sizeof(float) * (size_t)((count - seen) * NR));
            multiply_packed(a->dq_t + i * HD, NR, a->keys_t + (ptrdiff_t)key * MR, T, ds, seen, HD, NR, seen, ACCUMULATE);
        }
        for (int which = 0; which < 2; which++) {                // dV += P^T dAtt, dK += dS^T Q; P^T (count, n) has to be packed as rows
            const float *panels = which ? a->ds : a->p;
            for (int j = 0; j < count; j += MR)
                for (int i = 0; i < n; i += NR)
                    pack_panel(a->left + j * n + i * MR, view(panels + i * KEY_ROWS + j * NR, NR, 1), count - j < MR ? count - j : MR, MR, 0,
                               n - i < NR ? n - i : NR);
            multiply_packed((which ? dk : dv) + (ptrdiff_t)key * stride, stride, a->left, n, which ? a->queries : a->datts, n, count, HD, n,
                            ACCUMULATE);
        }
    }
    for (int i = 0; i < n; i++) {
        if (i % NR == 0) pack_panel(a->queries_t, view(a->dq_t + i * HD, NR, 1), HD, HD, 0, NR);       // dQ (NR, HD)
        memcpy(dq + (ptrdiff_t)i * stride, a->queries_t + i % NR * HD, sizeof(float) * (size_t)HD);
    }
}

void attention_backward(float *dq, float *dk, float *dv, const float *datt, const float *att, const float *lse, const float *q,
                        const float *k, const float *v, const int *start, int B, int T, int NH, int NKV, int HD, int stride) {
    int group = NH / NKV;
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int g = 0; g < NKV; g++) {
            size_t row = (size_t)b * T, kv = row * stride + (size_t)g * HD, rows = (size_t)T + MR, width = (size_t)HD + NR;
            float *at = thread_buffer(BUFFER_ATTENTION, 3 * rows * width + 5 * QUERY_ROWS * width + QUERY_ROWS * (3 * KEY_ROWS + 2 * MR));
            AttentionBuffers a;
            a.keys = at, a.values = at += rows * width, a.keys_t = at += rows * width, a.queries = at += rows * width;
            a.datts = at += QUERY_ROWS * width, a.queries_t = at += QUERY_ROWS * width, a.datts_t = at += QUERY_ROWS * width,
                a.dq_t = at += QUERY_ROWS * width;
            a.p = at += QUERY_ROWS * width, a.ds = at += QUERY_ROWS * KEY_ROWS, a.left = at += QUERY_ROWS * KEY_ROWS;
            pack_rows(a.keys, HD, view(k + kv, stride, 1), T, HD);                   // K (T, HD)
            pack_rows(a.values, HD, view(v + kv, stride, 1), T, HD);                 // V (T, HD)
            pack_rows(a.keys_t, T, view(k + kv, 1, stride), HD, T);                  // K^T (HD, T)
            for (int t = 0; t < T; t++) {
                memset(dk + kv + (size_t)t * stride, 0, sizeof(float) * (size_t)HD);
                memset(dv + kv + (size_t)t * stride, 0, sizeof(float) * (size_t)HD);
            }
            for (int h = g * group; h < (g + 1) * group; h++)
                for (int t0 = 0; t0 < T; t0 += QUERY_ROWS) {
                    size_t in = (row + t0) * stride + (size_t)h * HD, out = (row + t0) * NH * HD + (size_t)h * HD;
                    attention_backward_block(dq + in, dk + kv, dv + kv, datt + out, att + out, lse + row * NH + (size_t)h * T + t0, q + in,
                                             start + row + t0, &a, t0, T - t0 < QUERY_ROWS ? T - t0 : QUERY_ROWS, T, HD, stride, NH * HD);
                }
        }
}

// A row of gate_up (N, 2 I) is [gate | up]; act (N, I) = silu(gate) * up, silu(x) = x * sigmoid(x) = x / (1 + exp(-x))
void swiglu_forward(float *act, const float *gate_up, int N, int I) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *gate = gate_up + (size_t)n * 2 * I, *up = gate + I;
        float *out = act + (size_t)n * I;
        exp_row(out, gate, -1.0f, 0.0f, I);
        for (int i = 0; i < I; i++) out[i] = gate[i] * up[i] / (1.0f + out[i]);
    }
}

// dup = dact * silu(gate);  dgate = dact * up * silu'(gate), silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x)
void swiglu_backward(float *dgate_up, const float *dact, const float *gate_up, int N, int I) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *gate = gate_up + (size_t)n * 2 * I, *up = gate + I, *d = dact + (size_t)n * I;
        float *dgate = dgate_up + (size_t)n * 2 * I, *dup = dgate + I;
        exp_row(dup, gate, -1.0f, 0.0f, I);
        for (int i = 0; i < I; i++) {
            float s = 1.0f / (1.0f + dup[i]);
            dgate[i] = d[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
            dup[i] = d[i] * gate[i] * s;
        }
    }
}

// The classifier and its loss, CLASSIFIER_ROWS rows of logits at a time, so that (N, V) logits never exist together.
//    logits = h head^T,   losses[n] = log(sum(exp(logits))) - logits[target] = -log p(target)
// With dh, the gradient goes back at once: dlogits = (softmax - onehot(target)) * weights[n] * scale, in the place of logits, then
//    dh (N, C) = dlogits head,   dhead (V, C) += dlogits^T h
// Every task is this loss; tasks differ in the weights. dh = dhead = NULL computes the losses only, dhead = NULL leaves the head alone.
enum { CLASSIFIER_ROWS = 256 };
void classifier(float *losses, float *dh, float *dhead, const float *h, const float *head, const int *targets, const float *weights,
                float scale, float *logits, int N, int C, int V) {
    for (int n0 = 0; n0 < N; n0 += CLASSIFIER_ROWS) {
        int rows = N - n0 < CLASSIFIER_ROWS ? N - n0 : CLASSIFIER_ROWS;
        const float *h_block = h + (size_t)n0 * C;
        gemm(logits, V, view(h_block, C, 1), view(head, 1, C), rows, V, C, OVERWRITE);
        #pragma omp parallel for
        for (int i = 0; i < rows; i++) {
            float *row = logits + (size_t)i * V, target_logit = row[targets[n0 + i]], max = row_max(row, V);
            float sum = exp_row(row, row, 1.0f, max, V), w = dh ? weights[n0 + i] * scale : 0;
            losses[n0 + i] = max + logf(sum) - target_logit;
            if (!dh) continue;
            for (int j = 0; j < V; j++) row[j] *= w / sum;
            row[targets[n0 + i]] -= w;
        }
        if (!dh) continue;
        gemm(dh + (size_t)n0 * C, C, view(logits, V, 1), view(head, C, 1), rows, C, V, OVERWRITE);
        if (dhead) gemm(dhead, C, view(logits, 1, V), view(h_block, C, 1), V, C, rows, ACCUMULATE);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 5. Activations: what the forward pass leaves for the backward pass

typedef struct {                 // of one layer
    float *x;                    // (N, C)        the residual stream on entry
    float *rstd1, *h1;           // (N), (N, C)   first norm
    float *qkv;                  // (N, QKV)      queries, keys, values as the matrix gave them
    float *q_rstd, *k_rstd;      // (N, NH), (N, NKV)   QK-norm
    float *qk;                   // (N, QKV)      queries and keys after QK-norm and RoPE; without QK-norm this is qkv itself
    float *lse, *att;            // (B, NH, T), (N, NH HD)
    float *x_mid;                // (N, C)        the residual stream between attention and MLP
    float *rstd2, *h2;           // (N), (N, C)   second norm
    float *gate_up, *act;        // (N, 2 I), (N, I)
} LayerActs;

typedef struct {
    LayerActs *layers;
    float *x_last, *rstd, *h;    // (N, C), (N), (N, C)   after the last layer, final norm
    float *logits, *losses;      // (CLASSIFIER_ROWS, V), (N)
    float *dx, *dh;              // (N, C)        gradients: of the residual stream, of a norm's output
    float *dqkv, *datt;          // (N, QKV), (N, NH HD)
    float *dgate_up, *dact;      // (N, 2 I), (N, I)
    int *positions;              // (N)           of each token in its document
    float *memory;
} Activations;

// --recompute trades time for memory. A buffer whose level is reached is shared by all layers, and the backward pass fills it
// again just before it needs it.
typedef enum {
    KEEP_ALL,
    RECOMPUTE_CHEAP,             // outputs of norms and SwiGLU: no matrix multiplication is repeated
    RECOMPUTE_LAYERS,            // keeps each layer's input only: a second forward pass, a third more time
    KEEP_ALWAYS
} Recompute;

typedef struct { float *memory; size_t floats; } Cursor;         // memory NULL: only counts
float *carve(Cursor *cursor, size_t floats) {
    float *p = cursor->memory ? cursor->memory + cursor->floats : NULL;
    cursor->floats += (floats + 15) / 16 * 16;                   // every buffer begins on a cache line
    return p;
}

int qkv_width(const Config *c) { return (c->NH + 2 * c->NKV) * c->HD; }

#define KEEP(field, level, size) acts->field = recompute >= (level) && l > 0 ? a->layers[0].field : carve(cursor, (size))
void activations_layout(Activations *a, const Config *c, int B, int T, Recompute recompute, bool with_backward, Cursor *cursor) {
    size_t N = (size_t)B * (size_t)T, C = (size_t)c->C, I = (size_t)c->I, att = (size_t)c->NH * (size_t)c->HD, QKV = (size_t)qkv_width(c);
    for (int l = 0; l < c->L; l++) {
        LayerActs *acts = &a->layers[l];
        KEEP(x,       with_backward ? KEEP_ALWAYS : RECOMPUTE_LAYERS, N * C);
        KEEP(rstd1,   RECOMPUTE_LAYERS, N);
        KEEP(h1,      RECOMPUTE_CHEAP,  N * C);
        KEEP(qkv,     RECOMPUTE_LAYERS, N * QKV);
        KEEP(q_rstd,  RECOMPUTE_LAYERS, c->qk_norm ? N * (size_t)c->NH : 0);
        KEEP(k_rstd,  RECOMPUTE_LAYERS, c->qk_norm ? N * (size_t)c->NKV : 0);
        KEEP(qk,      RECOMPUTE_LAYERS, c->qk_norm ? N * QKV : 0);
        KEEP(lse,     RECOMPUTE_LAYERS, N * (size_t)c->NH);
        KEEP(att,     RECOMPUTE_LAYERS, N * att);
        KEEP(x_mid,   RECOMPUTE_LAYERS, N * C);
        KEEP(rstd2,   RECOMPUTE_LAYERS, N);
        KEEP(h2,      RECOMPUTE_CHEAP,  N * C);
        KEEP(gate_up, RECOMPUTE_LAYERS, N * 2 * I);
        KEEP(act,     RECOMPUTE_CHEAP,  N * I);
        if (!c->qk_norm) acts->qk = acts->qkv;
    }
    a->x_last = carve(cursor, N * C), a->rstd = carve(cursor, N), a->h = carve(cursor, N * C);
    a->logits = carve(cursor, (N < CLASSIFIER_ROWS ? N : (size_t)CLASSIFIER_ROWS) * (size_t)c->V), a->losses = carve(cursor, N);
    a->positions = (int *)carve(cursor, N);
    if (!with_backward) return;
    a->dx = carve(cursor, N * C), a->dh = carve(cursor, N * C);
    a->dqkv = carve(cursor, N * QKV), a->datt = carve(cursor, N * att);
    a->dgate_up = carve(cursor, N * 2 * I), a->dact = carve(cursor, N * I);
}

size_t activations_floats(const Config *c, int B, int T, Recompute recompute, bool with_backward) {
    Activations a = {};
    Cursor counting = {NULL, 0};
    a.layers = (LayerActs *)xcalloc((size_t)c->L, sizeof(LayerActs));
    activations_layout(&a, c, B, T, recompute, with_backward, &counting);
    free(a.layers);
    return counting.floats;
}

void activations_alloc(Activations *a, const Config *c, int B, int T, Recompute recompute, bool with_backward) {
    Cursor cursor = {(float *)xmalloc(activations_floats(c, B, T, recompute, with_backward) * sizeof(float)), 0};
    a->layers = (LayerActs *)xcalloc((size_t)c->L, sizeof(LayerActs));
    a->memory = cursor.memory;
    activations_layout(a, c, B, T, recompute, with_backward, &cursor);
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 6. The model's forward and backward

typedef struct {
    Config config;
    TensorTable table;
    Params params, grads;
    float *params_memory, *grads_memory, *m_memory, *v_memory;   // num_params each; the last three only while training
    Activations acts;
    int B, T;                        // room in acts
    int positions;                   // rows of the rope table: the longest sequence
    Recompute recompute;
    float *rope;                     // (positions, HD / 2, 2): cos, sin
    KVCache cache;                   // of the sequence that machine_decode goes on with
    struct Lora *lora;               // NULL: all parameters are trained
    struct Dpo *dpo;                 // NULL: the batch brings the loss weights; else they come of its losses, see dpo_weights
    struct Gpu *gpu;                 // train_qwen.cu: the same on the device
} Model;

// LoRA (Hu et al. 2021): some matrices of the layers are W = base + scale B A, with A (rank, inputs) and B (outputs, rank), and only A and
// B are trained. No layer knows of it: forward and backward run on W as always, and by the chain rule
//    dB = scale dW A^T,   dA = scale B^T dW
// So a layer's gradient is needed only until it has been projected onto its A and B: all layers share the memory for one layer's, and
// there are moments of A and B only. After each update W is made again, always from the base, which is kept: adding to W the change of
// B A instead would leave in it the rounding errors of all updates. Embedding, head, norms and biases stay as they are.
typedef struct { int rank; float alpha; unsigned targets; } LoraOptions;             // targets: bit i for LORA_TARGETS[i]; rank 0: no LoRA
static const char *const LORA_TARGETS[] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};     // PEFT's names
enum { NUM_LORA_TARGETS = 7, MOST_LORA_RANK = 1024 };

typedef struct {
    size_t weight, in_layer;         // where W begins in the model's parameters, and in those of its layer
    size_t base, a, b;               // where its base begins in Lora.base, and A and B in Lora.memory
    int outputs, inputs;
} LoraMatrix;
typedef struct Lora {
    LoraOptions options;
    float scale;                     // alpha / rank
    TensorTable table;               // A and B of each matrix, layer by layer, under PEFT's names
    LoraMatrix *matrices;
    int count, per_layer;
    size_t base_floats;
    float *base;                     // (base_floats): the matrices as they were, one behind the other
    float *memory, *grads, *m, *v;   // table.num_params each
} Lora;

// Parameters of one layer.
size_t layer_floats(const TensorTable *table) {
    size_t floats = 0;
    for (int k = 0; k < table->count; k++) if (table->list[k].layer == 0) floats += table->list[k].rows * table->list[k].cols;
    return floats;
}

// Without memory, to know the sizes.
Lora lora_layout(const Config *c, const TensorTable *model, const LoraOptions *o) {
    Lora lora = {};
    lora.options = *o, lora.scale = o->alpha / (float)o->rank;
    size_t first = 0;                                            // the layer's first parameter
    for (int k = 0, layer = -1; k < model->count; k++) {
        const TensorInfo *t = &model->list[k];
        if (t->layer != layer) layer = t->layer, first = t->offset;
        for (int i = 0; i < NUM_LORA_TARGETS && layer >= 0; i++) {
            const char *at = strstr(t->name, LORA_TARGETS[i]);
            if (!(o->targets >> i & 1) || !at || strcmp(at + strlen(LORA_TARGETS[i]), ".weight") != 0) continue;
            LoraMatrix matrix = {t->offset, t->offset - first, lora.base_floats, lora.table.num_params, 0, (int)t->rows, (int)t->cols};
            char name[2][96];
            int stem = (int)(strlen(t->name) - strlen("weight"));
            for (int j = 0; j < 2; j++) snprintf(name[j], sizeof name[j], "base_model.model.%.*slora_%c.weight", stem, t->name, "AB"[j]);
            table_add(&lora.table, -1, o->rank, (int)t->cols, DECAY, NORMAL, name[0], "");
            matrix.b = lora.table.num_params;
            table_add(&lora.table, -1, (int)t->rows, o->rank, DECAY, ZEROS, name[1], "");
            lora.matrices = (LoraMatrix *)xrealloc(lora.matrices, (size_t)(lora.count + 1) * sizeof(LoraMatrix));
            lora.matrices[lora.count++] = matrix;
            lora.base_floats += t->rows * t->cols;
        }
    }
    lora.per_layer = lora.count / c->L;
    return lora;
}
void lora_free(Lora *lora) {
    free(lora->table.list), free(lora->matrices), free(lora->base), free(lora->memory), free(lora->grads), free(lora->m), free(lora->v);
}

// Gives the model adapters that change nothing yet: A is uniform in +-1 / sqrt(inputs), as PEFT begins, and B is 0.
void lora_attach(Model *m, const LoraOptions *o, uint64_t seed) {
    Lora *lora = m->lora = (Lora *)xmalloc(sizeof(Lora));
    *lora = lora_layout(&m->config, &m->table, o);
    lora->memory = (float *)xcalloc(lora->table.num_params, sizeof(float));
    lora->m = (float *)xcalloc(lora->table.num_params, sizeof(float)), lora->v = (float *)xcalloc(lora->table.num_params, sizeof(float));
    for (int k = 0; k < lora->count; k++) {
        const LoraMatrix *x = &lora->matrices[k];
        for (size_t i = x->a; i < x->b; i++) lora->memory[i] = (float)(2 * random_uniform(seed, i) - 1) / sqrtf((float)x->inputs);
    }
}

// W = base + scale B A, for all adapted matrices. The first call takes what is in W for the base.
void lora_merge(Model *m) {
    Lora *lora = m->lora;
    int rank = lora->options.rank;
    bool first = lora->base == NULL;
    if (first) lora->base = (float *)xmalloc(lora->base_floats * sizeof(float));
    for (int k = 0; k < lora->count; k++) {
        const LoraMatrix *x = &lora->matrices[k];
        float *W = m->params_memory + x->weight, *base = lora->base + x->base;
        size_t bytes = (size_t)x->outputs * (size_t)x->inputs * sizeof(float), b_count = (size_t)x->outputs * (size_t)rank;
        float *scaled_b = (float *)xmalloc(b_count * sizeof(float));
        for (size_t i = 0; i < b_count; i++) scaled_b[i] = lora->scale * lora->memory[x->b + i];
        memcpy(first ? base : W, first ? W : base, bytes);
        gemm(W, x->inputs, view(scaled_b, rank, 1), view(lora->memory + x->a, x->inputs, 1), x->outputs, x->inputs, rank, ACCUMULATE);
        free(scaled_b);
    }
}

// Adds layer l's part of the gradient to those of its A and B, and sets the memory that the layers share to zero for the next one. What is
// in it has the factor `scale` already, from model_loss.
void lora_backward(Model *m, int l) {
    Lora *lora = m->lora;
    int rank = lora->options.rank;
    for (int k = l * lora->per_layer; k < (l + 1) * lora->per_layer; k++) {
        const LoraMatrix *x = &lora->matrices[k];
        const float *dW = m->grads_memory + x->in_layer, *A = lora->memory + x->a, *B = lora->memory + x->b;
        gemm(lora->grads + x->b, rank, view(dW, x->inputs, 1), view(A, 1, x->inputs), x->outputs, rank, x->inputs, ACCUMULATE);
        gemm(lora->grads + x->a, x->inputs, view(B, 1, rank), view(dW, x->inputs, 1), rank, x->inputs, x->outputs, ACCUMULATE);
    }
    memset(m->grads_memory, 0, layer_floats(&m->table) * sizeof(float));
}

// x of the next layer = x + attention + MLP, leaving everything in acts. With a cache, the T tokens (of one sequence, B = 1) follow
// those in the cache.
void layer_forward(Model *m, int l, float *next_x, const int *start, int B, int T, KVCache *cache) {
    const Config *c = &m->config;
    const LayerParams *p = &m->params.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int N = B * T, C = c->C, I = c->I, NH = c->NH, NKV = c->NKV, HD = c->HD, QKV = qkv_width(c);

    rmsnorm_forward(a->h1, a->rstd1, a->x, p->norm1, N, 1, C, C, c->norm_eps);
    matmul_forward(a->qkv, a->h1, p->wq, p->bq, N, C, QKV, OVERWRITE);               // wq and bq are Wqkv and bqkv
    float *q = a->qk, *k = a->qk + NH * HD, *v = a->qkv + (NH + NKV) * HD;
    if (c->qk_norm) {
        rmsnorm_forward(q, a->q_rstd, a->qkv, p->q_norm, N, NH, HD, QKV, c->norm_eps);
        rmsnorm_forward(k, a->k_rstd, a->qkv + NH * HD, p->k_norm, N, NKV, HD, QKV, c->norm_eps);
    }
    rope(q, m->acts.positions, m->rope, N, NH + NKV, HD, QKV, ROPE_FORWARD);         // queries and keys lie side by side
    if (cache) attention_cached(a->att, q, k, v, cache, l, T, NH, NKV, HD, QKV);
    else attention_forward(a->att, a->lse, q, k, v, start, B, T, NH, NKV, HD, QKV);
    copy_rows(a->x_mid, a->x, N, C);
    matmul_forward(a->x_mid, a->att, p->wo, NULL, N, NH * HD, C, ACCUMULATE);

    rmsnorm_forward(a->h2, a->rstd2, a->x_mid, p->norm2, N, 1, C, C, c->norm_eps);
    matmul_forward(a->gate_up, a->h2, p->w_gate, NULL, N, C, 2 * I, OVERWRITE);      // w_gate is [Wgate; Wup]
    swiglu_forward(a->act, a->gate_up, N, I);
    copy_rows(next_x, a->x_mid, N, C);
    matmul_forward(next_x, a->act, p->w_down, NULL, N, I, C, ACCUMULATE);
}

// tokens, start (B, T) -> acts.h (B * T, C), from which the classifier goes on. start: see Batch.
void model_forward(Model *m, const int *tokens, const int *start, int B, int T, KVCache *cache) {
    const Config *c = &m->config;
    Activations *a = &m->acts;
    for (int n = 0; n < B * T; n++) a->positions[n] = cache ? cache->length + n : n % T - start[n];
    embedding_forward(a->layers[0].x, tokens, m->params.wte, B * T, c->C);
    for (int l = 0; l < c->L; l++) layer_forward(m, l, l + 1 < c->L ? a->layers[l + 1].x : a->x_last, start, B, T, cache);
    rmsnorm_forward(a->h, a->rstd, a->x_last, m->params.norm, B * T, 1, c->C, c->C, c->norm_eps);
}

// acts.dx: gradient of x of layer l + 1 -> gradient of x of layer l; adds to the gradients of the layer's parameters.
// The lines of layer_forward in reverse order. Each x + f(x) passes its gradient on twice: dx itself is the part along the skip, and the
// norm's backward adds the part that went through f.
void layer_backward(Model *m, int l, const int *start, int B, int T) {
    const Config *c = &m->config;
    const LayerParams *p = &m->params.layers[l], *dp = &m->grads.layers[l];
    const LayerActs *a = &m->acts.layers[l];
    Activations *g = &m->acts;                                                       // holds the gradient buffers
    int N = B * T, C = c->C, I = c->I, NH = c->NH, NKV = c->NKV, HD = c->HD, QKV = qkv_width(c);

    if (m->recompute == RECOMPUTE_CHEAP) {
        rmsnorm_forward(a->h1, a->rstd1, a->x, p->norm1, N, 1, C, C, c->norm_eps);
        rmsnorm_forward(a->h2, a->rstd2, a->x_mid, p->norm2, N, 1, C, C, c->norm_eps);
        swiglu_forward(a->act, a->gate_up, N, I);
    } else if (m->recompute == RECOMPUTE_LAYERS) {
        layer_forward(m, l, g->dh, start, B, T, NULL);                               // dh takes the output, which nobody needs
    }

    matmul_backward(g->dact, dp->w_down, NULL, g->dx, a->act, p->w_down, N, I, C);
    swiglu_backward(g->dgate_up, g->dact, a->gate_up, N, I);
    matmul_backward(g->dh, dp->w_gate, NULL, g->dgate_up, a->h2, p->w_gate, N, C, 2 * I);
    rmsnorm_backward(g->dx, dp->norm2, g->dh, a->x_mid, p->norm2, a->rstd2, N, 1, C, C, ACCUMULATE);

    float *dq = g->dqkv, *dk = dq + NH * HD, *dv = dk + NKV * HD;
    matmul_backward(g->datt, dp->wo, NULL, g->dx, a->att, p->wo, N, NH * HD, C);
    attention_backward(dq, dk, dv, g->datt, a->att, a->lse, a->qk, a->qk + NH * HD, a->qkv + (NH + NKV) * HD, start,
                       B, T, NH, NKV, HD, QKV);
    rope(dq, g->positions, m->rope, N, NH + NKV, HD, QKV, ROPE_BACKWARD);
    if (c->qk_norm) {
        rmsnorm_backward(dq, dp->q_norm, dq, a->qkv, p->q_norm, a->q_rstd, N, NH, HD, QKV, OVERWRITE);
        rmsnorm_backward(dk, dp->k_norm, dk, a->qkv + NH * HD, p->k_norm, a->k_rstd, N, NKV, HD, QKV, OVERWRITE);
    }
    matmul_backward(g->dh, dp->wq, dp->bq, g->dqkv, a->h1, p->wq, N, C, QKV);
    rmsnorm_backward(g->dx, dp->norm1, g->dh, a->x, p->norm1, a->rstd1, N, 1, C, C, ACCUMULATE);
}

// acts.dh (from the classifier) -> all gradients, added to m->grads. With a tied head, grads.head is grads.wte: both uses add up there.
void model_backward(Model *m, const int *tokens, const int *start, int B, int T) {
    const Config *c = &m->config;
    Activations *a = &m->acts;
    rmsnorm_backward(a->dx, m->grads.norm, a->dh, a->x_last, m->params.norm, a->rstd, B * T, 1, c->C, c->C, OVERWRITE);
    for (int l = c->L - 1; l >= 0; l--) {
        layer_backward(m, l, start, B, T);
        if (m->lora) lora_backward(m, l);
    }
    if (!m->lora) embedding_backward(m->grads.wte, a->dx, tokens, B * T, c->C);
}

// Direct preference optimisation (Rafailov et al. 2023). Of a pair of answers to one prompt, log p being the sum over the answer's tokens:
//    reward = beta (log p - log p under the reference model),   margin = reward of the chosen - reward of the rejected
//    loss = -(1 - smoothing) log sigmoid(margin) - smoothing log sigmoid(-margin)
// smoothing is the share of pairs that may be labelled the wrong way round. Since log p is minus the sum of the tokens' losses,
//    d loss / d (loss of a token) = beta (sigmoid(-margin) - smoothing) for the chosen answer, minus that for the rejected
// is the same for all tokens of an answer: a loss weight, positive where the answer shall become likelier. So DPO needs no layers,
// classifier or backward of its own; only, its weights are known after the losses.
typedef struct { double pairs, loss, chosen, rejected, correct; } Preferences;       // sums over pairs: loss, rewards, margins above 0
typedef struct Dpo {
    double beta, smoothing;
    double *reference;               // (documents): log p of each answer under the reference model
    bool measuring;                  // the model is the reference model: dpo_weights fills `reference` and does nothing else
    Preferences seen;                // of all batches since it was set to zero
} Dpo;

double log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

// Turns weights of 0 and 1 into those of DPO, from the losses of a batch whose rows hold whole pairs, chosen then rejected. Returns the sum
// of the pairs' losses.
double dpo_weights(Dpo *dpo, const Batch *batch, const float *losses, int B, int T) {
    double loss = 0;
    for (int n = 0; n < B * T;) {
        int document = batch->document[n], begin = n, border = n, side = 0;
        if (document < 0) { n++; continue; }                     // padding
        double log_p[2] = {0, 0}, reward[2];
        assert(document % 2 == 0);
        for (; side < 2; side++) {
            if (side == 1) border = n;
            for (int end = (begin / T + 1) * T; n < end && batch->document[n] == document + side; n++)
                log_p[side] -= (double)batch->weights[n] * (double)losses[n];
            if (dpo->measuring) dpo->reference[document + side] = log_p[side];
            reward[side] = dpo->beta * (log_p[side] - dpo->reference[document + side]);
        }
        double margin = reward[0] - reward[1], weight = dpo->beta * (exp(log_sigmoid(-margin)) - dpo->smoothing);
        for (int i = begin; i < n; i++) batch->weights[i] *= (float)(i < border ? weight : -weight);
        double pair_loss = -(1 - dpo->smoothing) * log_sigmoid(margin) - dpo->smoothing * log_sigmoid(-margin);
        dpo->seen.pairs++, dpo->seen.loss += pair_loss, dpo->seen.correct += margin > 0;
        dpo->seen.chosen += reward[0], dpo->seen.rejected += reward[1];
        loss += pair_loss;
    }
    return loss;
}

// Sum of weight * loss over rows of a batch, in DPO of the pairs' losses. With TRAIN, also adds the gradient of `scale` times that sum to
// m->grads. In DPO the classifier runs twice, first for the losses only: keeping (N, V) logits instead would take far more memory than
// everything else, and the repeated multiplication is 2 V C of some 6 times all parameters.
typedef enum { EVALUATE, TRAIN } Pass;
double model_loss(Model *m, const Batch *batch, int B, int T, float scale, Pass pass) {
    Activations *a = &m->acts;
    const Config *c = &m->config;
    assert(B <= m->B && T <= m->T);
    double sum = 0;
    model_forward(m, batch->tokens, batch->start, B, T, NULL);
    if (m->dpo || pass == EVALUATE)
        classifier(a->losses, NULL, NULL, a->h, m->params.head, batch->targets, batch->weights, 0, a->logits, B * T, c->C, c->V);
    if (m->dpo) sum = dpo_weights(m->dpo, batch, a->losses, B, T);
    if (pass == TRAIN) {
        if (m->lora) scale *= m->lora->scale;                    // only A and B are trained, and all of their gradients have this factor
        classifier(a->losses, a->dh, m->grads.head, a->h, m->params.head, batch->targets, batch->weights, scale, a->logits, B * T,
                   c->C, c->V);
        model_backward(m, batch->tokens, batch->start, B, T);
    }
    for (int n = 0; n < B * T && !m->dpo; n++) sum += (double)batch->weights[n] * (double)a->losses[n];
    return sum;
}

// Appends tokens to the sequence in the cache. Returns the logits (V) after the last one, valid until the model is used again.
float *model_decode(Model *m, KVCache *cache, const int *tokens, int count) {
    const Config *c = &m->config;
    int chunk_rows = m->B * m->T < PROMPT_CHUNK ? m->B * m->T : PROMPT_CHUNK, last = 0;
    assert(count > 0 && cache->length + count <= cache->capacity && cache->capacity <= m->positions);
    for (int done = 0; done < count; done += last, cache->length += last) {
        last = count - done < chunk_rows ? count - done : chunk_rows;
        model_forward(m, tokens + done, NULL, 1, last, cache);
    }
    matmul_forward(m->acts.logits, m->acts.h + (size_t)(last - 1) * c->C, m->params.head, NULL, 1, c->C, c->V, OVERWRITE);
    return m->acts.logits;
}

// Parameters of the config's shape, not yet initialised.
void model_alloc(Model *m, const Config *c) {
    m->config = *c;
    m->table = tensor_table(c);
    m->params_memory = (float *)xmalloc(m->table.num_params * sizeof(float));
    params_point(&m->params, c, m->params_memory);
}

void model_alloc_moments(Model *m) {
    if (m->m_memory || m->lora) return;
    m->m_memory = (float *)xcalloc(m->table.num_params, sizeof(float));
    m->v_memory = (float *)xcalloc(m->table.num_params, sizeof(float));
}

// For LoRA: the gradients of all layers in the same place. That of the last norm, which nobody needs, goes there too.
void grads_point_shared(Params *grads, const Config *c, float *memory) {
    grads->layers = (LayerParams *)xcalloc((size_t)c->L, sizeof(LayerParams));
    for (int l = 0; l < c->L; l++) layer_point(&grads->layers[l], c, memory);
    grads->norm = memory, grads->wte = grads->lm_head = grads->head = NULL;
}

// What AdamW updates: the model's parameters, or with LoRA its adapters.
typedef struct { const TensorTable *table; float *params, *grads, *m, *v; } Trained;
Trained trained(const Model *m) {
    const Lora *lora = m->lora;
    Trained all = {&m->table, m->params_memory, m->grads_memory, m->m_memory, m->v_memory};
    if (!lora) return all;
    Trained adapters = {&lora->table, lora->memory, lora->grads, lora->m, lora->v};
    return adapters;
}

// Room for (B, T) batches of sequences up to `positions` long, and with TRAIN for gradients and AdamW's moments.
void model_alloc_run(Model *m, int B, int T, int positions, Recompute recompute, Pass pass) {
    m->B = B, m->T = T, m->positions = positions, m->recompute = recompute;
    activations_alloc(&m->acts, &m->config, B, T, recompute, pass == TRAIN);
    m->rope = (float *)xmalloc((size_t)positions * (size_t)m->config.HD * sizeof(float));
    rope_table(m->rope, positions, m->config.HD, m->config.rope_base);
    if (pass != TRAIN) return;
    model_alloc_moments(m);
    size_t floats = m->lora ? layer_floats(&m->table) : m->table.num_params;
    m->grads_memory = (float *)xcalloc(floats, sizeof(float));
    if (m->lora) {
        m->lora->grads = (float *)xcalloc(m->lora->table.num_params, sizeof(float));
        grads_point_shared(&m->grads, &m->config, m->grads_memory);
    } else {
        params_point(&m->grads, &m->config, m->grads_memory);
    }
}

void model_free(Model *m) {
    cache_free(&m->cache);
    half_weights_free(m->params_memory);
    if (m->lora) lora_free(m->lora), free(m->lora);
    free(m->params_memory), free(m->grads_memory), free(m->m_memory), free(m->v_memory), free(m->rope);
    free(m->acts.memory), free(m->acts.layers), free(m->params.layers), free(m->grads.layers), free(m->table.list);
    memset(m, 0, sizeof *m);
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 7. AdamW, clipping, schedules

// sqrt(sum of squares). Partial sums have fixed borders, so the result doesn't depend on the number of threads.
double gradient_norm(const float *grads, size_t count) {
    enum { PARTS = 4096 };
    static double partial[PARTS];
    size_t size = count / PARTS + 1;
    #pragma omp parallel for
    for (int part = 0; part < PARTS; part++) {
        size_t end = (size_t)(part + 1) * size < count ? (size_t)(part + 1) * size : count;
        double sum = 0;
        #pragma omp simd reduction(+:sum)
        for (size_t i = (size_t)part * size; i < end; i++) sum += (double)grads[i] * (double)grads[i];
        partial[part] = sum;
    }
    double sum = 0;
    for (int part = 0; part < PARTS; part++) sum += partial[part];
    return sqrt(sum);
}

// AdamW (Loshchilov and Hutter 2019), step = 1, 2, ...:
//    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2         g: the gradient times grad_scale (clipping)
//    p = p (1 - lr decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
// Matrices decay, norms and biases don't. The gradients are set to zero for the next step.
typedef struct { float lr, beta1, beta2, eps, weight_decay; } AdamW;
void adamw_step(Model *model, const AdamW *o, float grad_scale, long step) {
    float correct1 = (float)(1.0 / (1.0 - pow(o->beta1, (double)step)));
    float correct2 = (float)(1.0 / (1.0 - pow(o->beta2, (double)step)));
    Trained all = trained(model);
    float *params = all.params, *grads = all.grads, *ms = all.m, *vs = all.v;
    #pragma omp parallel
    for (int k = 0; k < all.table->count; k++) {                 // every thread goes through all tensors and takes its part of each
        const TensorInfo *t = &all.table->list[k];
        float keep = 1.0f - (t->decay == DECAY ? o->lr * o->weight_decay : 0.0f);
        #pragma omp for simd nowait
        for (size_t i = t->offset; i < t->offset + t->rows * t->cols; i++) {
            float g = grads[i] * grad_scale;
            float m = ms[i] = o->beta1 * ms[i] + (1.0f - o->beta1) * g;
            float v = vs[i] = o->beta2 * vs[i] + (1.0f - o->beta2) * g * g;
            params[i] = params[i] * keep - o->lr * (m * correct1) / (sqrtf(v * correct2) + o->eps);
            grads[i] = 0;
        }
    }
}

// The learning rate of step 1 .. steps. It rises linearly over `warmup` steps to `peak`, then follows the schedule down to
// peak * floor at the last step. wsd (warm-up, stable, decay) stays at the peak and falls over the last fifth.
typedef enum { COSINE, LINEAR, WSD, CONSTANT } Schedule;
static const char *const SCHEDULE_NAMES[] = {"cosine", "linear", "wsd", "constant", NULL};
double learning_rate(Schedule schedule, long step, long steps, long warmup, double peak, double floor) {
    if (step <= warmup) return peak * (double)step / (double)warmup;
    double begin = schedule == WSD ? (double)warmup + 0.8 * (double)(steps - warmup) : (double)warmup;
    double progress = ((double)step - begin) / ((double)steps - begin);              // 0 .. 1 over the decay
    if (schedule == CONSTANT || progress <= 0) return peak;
    if (progress > 1) progress = 1;
    double high = schedule == COSINE ? 0.5 * (1 + cos(3.141592653589793 * progress)) : 1 - progress;
    return peak * (floor + (1 - floor) * high);
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 8. Checkpoints: Hugging Face directories
//
// A safetensors file is: 8 bytes, the length of a header; the header, JSON: {"name": {"dtype", "shape", "data_offsets"}, ...}; the data.

typedef enum { F32, BF16, F16 } Dtype;
static const char *const DTYPE_NAMES[] = {"F32", "BF16", "F16", NULL};
size_t dtype_bytes(Dtype d) { return d == F32 ? 4 : 2; }

float f16_to_float(uint16_t h) {                                 // 1 sign, 5 exponent, 10 mantissa bits
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7FFF) << 13;
    if ((h & 0x7C00) == 0x7C00) return bits_float(sign | 0x7F800000 | magnitude);    // infinity, NaN
    return bits_float(sign | float_bits(bits_float(magnitude) * 5.192296858534828e33f));   // 2^112: the exponents' biases
}

typedef struct {
    char *name, *path;               // path: the file it is in
    Dtype dtype;
    int num_dims;
    size_t shape[4], elements, taken;            // taken: elements that load_tensors has read
    uint64_t begin;                  // byte in the file
} StoredTensor;
typedef struct { StoredTensor *list; int count; } StoredTensors;

int compare_begin(const void *a, const void *b) {
    const StoredTensor *x = (const StoredTensor *)a, *y = (const StoredTensor *)b;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

// One tensor's entry in a header. data_bytes: how many bytes follow the header.
StoredTensor stored_tensor(const Json *entry, const char *path, uint64_t data_begin, uint64_t data_bytes) {
    StoredTensor t = {};
    const Json *dtype = json_get(entry, "dtype"), *shape = json_get(entry, "shape"), *offsets = json_get(entry, "data_offsets");
    CHECK(dtype && dtype->type == JSON_STRING && shape && shape->type == JSON_ARRAY && offsets && offsets->type == JSON_ARRAY,
          "%s: the header's entry for %s lacks dtype, shape or data_offsets; the file is damaged", path, entry->key);
    t.name = strdup(entry->key), t.path = strdup(path), t.elements = 1;
    while (DTYPE_NAMES[t.dtype] && strcmp(DTYPE_NAMES[t.dtype], dtype->text) != 0) t.dtype = (Dtype)(t.dtype + 1);
    CHECK(DTYPE_NAMES[t.dtype], "%s: tensor %s has dtype %s; this program reads F32, BF16 and F16", path, t.name, dtype->text);
    for (const Json *d = shape->child; d; d = d->next) {
        CHECK(d->type == JSON_NUMBER && d->number >= 0 && d->number * (double)t.elements < 1e15 && t.num_dims < 4,
              "%s: tensor %s has a shape that is no weight's; the file is damaged", path, t.name);
        t.shape[t.num_dims++] = (size_t)d->number;
        t.elements *= (size_t)d->number;
    }
    const Json *first = offsets->child, *last = first ? first->next : NULL;
    CHECK(last && first->type == JSON_NUMBER && last->type == JSON_NUMBER && first->number == floor(first->number) && first->number >= 0
          && last->number >= first->number && last->number <= (double)data_bytes,
          "%s: tensor %s ends at byte %.0f of the data, but only %" PRIu64 " are there; the file is truncated or damaged", path, t.name,
          last ? last->number : 0.0, data_bytes);
    CHECK((size_t)(last->number - first->number) == t.elements * dtype_bytes(t.dtype),
          "%s: tensor %s has %zu elements but %.0f bytes of data; the file is damaged", path, t.name, t.elements,
          last->number - first->number);
    t.begin = data_begin + (uint64_t)first->number;
    return t;
}

// Adds the tensors of one file to the list.
void safetensors_header(StoredTensors *s, const char *path) {
    FILE *f = fopen(path, "rb");
    CHECK(f != NULL, "cannot open %s: %s", path, strerror(errno));
    struct stat st;
    CHECK(fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode), "%s is not a regular file", path);
    uint64_t length = 0, size = (uint64_t)st.st_size;
    CHECK(size >= 8 && fread(&length, 8, 1, f) == 1, "%s is %" PRIu64 " bytes: too short for a safetensors file", path, size);
    CHECK(length <= size - 8, "%s: its header should be %" PRIu64 " bytes long, but the file has only %" PRIu64
          "; it is truncated or not a safetensors file", path, length, size);
    char *text = (char *)xmalloc(length + 1);
    CHECK(fread(text, 1, length, f) == length, "cannot read %s: %s", path, strerror(errno));
    fclose(f);
    JsonError error = {};
    Json *header = json_parse(text, length, &error);
    CHECK(header && header->type == JSON_OBJECT, "%s: its header is not JSON (%s at byte %zu); the file is damaged", path,
          error.message ? error.message : "not an object", error.position + 8);
    int before = s->count;
    for (const Json *entry = header->child; entry; entry = entry->next) {
        if (strcmp(entry->key, "__metadata__") == 0) continue;
        s->list = (StoredTensor *)xrealloc(s->list, (size_t)(s->count + 1) * sizeof(StoredTensor));
        s->list[s->count++] = stored_tensor(entry, path, 8 + length, size - 8 - length);
    }
    qsort(s->list + before, (size_t)(s->count - before), sizeof(StoredTensor), compare_begin);
    for (int i = before + 1; i < s->count; i++) {
        const StoredTensor *a = &s->list[i - 1], *b = &s->list[i];
        CHECK(a->begin + a->elements * dtype_bytes(a->dtype) <= b->begin, "%s: tensors %s and %s overlap; the file is damaged",
              path, a->name, b->name);
    }
    json_free(header);
    free(text);
}

Json *read_json(const char *path) {
    size_t size;
    char *text = read_file(path, &size);
    JsonError error = {};
    Json *json = json_parse(text, size, &error);
    CHECK(json != NULL, "%s is not JSON: %s at byte %zu", path, error.message, error.position);
    CHECK(json->type == JSON_OBJECT, "%s should hold a JSON object", path);
    free(text);
    return json;
}

StoredTensor *safetensors_find(StoredTensors *s, const char *name) {
    for (int i = 0; i < s->count; i++) if (strcmp(s->list[i].name, name) == 0) return &s->list[i];
    return NULL;
}

// The tensors of directory/name.safetensors, or of the files which directory/name.safetensors.index.json lists.
StoredTensors safetensors_open(const char *directory, const char *name) {
    StoredTensors s = {NULL, 0};
    const char *single = path_of("%s/%s.safetensors", directory, name);
    if (file_exists(single)) {
        safetensors_header(&s, single);
        return s;
    }
    const char *index_path = path_of("%s/%s.safetensors.index.json", directory, name);
    const char *pickle = path_of("%s/pytorch_model.bin", directory);
    bool pickled = file_exists(pickle) || file_exists(path_of("%s.index.json", pickle));
    CHECK(file_exists(index_path), "%s holds neither %s.safetensors nor %s.safetensors.index.json%s", directory, name, name,
          pickled ? "; load and save_pretrained its pytorch_model.bin once with transformers, which writes them" : "");
    Json *index = read_json(index_path);
    const Json *map = json_get(index, "weight_map");
    CHECK(map && map->type == JSON_OBJECT, "%s lacks \"weight_map\"", index_path);
    for (const Json *entry = map->child; entry; entry = entry->next) {
        CHECK(entry->type == JSON_STRING && !strchr(entry->text, '/'), "%s: the file of %s is not a file name", index_path, entry->key);
        bool seen = false;
        for (const Json *e = map->child; e != entry && !seen; e = e->next) seen = strcmp(e->text, entry->text) == 0;
        if (!seen) safetensors_header(&s, path_of("%s/%s", directory, entry->text));
    }
    for (int i = 0; i < s.count; i++)
        CHECK(safetensors_find(&s, s.list[i].name) == &s.list[i], "%s: tensor %s is in two files", directory, s.list[i].name);
    json_free(index);
    return s;
}

void safetensors_close(StoredTensors *s) {
    for (int i = 0; i < s->count; i++) free(s->list[i].name), free(s->list[i].path);
    free(s->list);
}

// The next `count` elements of t as floats.
void read_elements(StoredTensor *t, float *out, size_t count) {
    static unsigned char chunk[1 << 18];
    FILE *f = fopen(t->path, "rb");
    size_t width = dtype_bytes(t->dtype);
    CHECK(f && fseeko(f, (off_t)(t->begin + t->taken * width), SEEK_SET) == 0, "cannot read %s: %s", t->path, strerror(errno));
    for (size_t done = 0, n; done < count; done += n) {
        n = count - done < sizeof chunk / width ? count - done : sizeof chunk / width;
        CHECK(fread(chunk, width, n, f) == n, "%s ends inside tensor %s", t->path, t->name);
        const uint16_t *half = (const uint16_t *)chunk;
        if (t->dtype == F32) memcpy(out + done, chunk, n * 4);
        else for (size_t i = 0; i < n; i++) out[done + i] = t->dtype == BF16 ? bf16_to_float(half[i]) : f16_to_float(half[i]);
    }
    t->taken += count;
    fclose(f);
}

// "[5]" or "[4,5]"; buffer has 64 characters.
const char *shape_text(char *buffer, bool is_vector, size_t rows, size_t cols) {
    if (is_vector) snprintf(buffer, 64, "[%zu]", rows * cols);
    else snprintf(buffer, 64, "[%zu,%zu]", rows, cols);
    return buffer;
}

// A head stored beside tied embeddings must be their copy; transformers would take another one in spite of "tie_word_embeddings".
void check_tied_head(StoredTensor *head, const char *from, const float *wte, size_t count) {
    const size_t room = 1 << 16;
    float *chunk = (float *)xmalloc(sizeof(float) * room);
    bool same = head->elements == count;
    for (size_t done = 0, n; same && done < count; done += n) {
        n = count - done < room ? count - done : room;
        read_elements(head, chunk, n);
        same = memcmp(chunk, wte + done, sizeof(float) * n) == 0;
    }
    free(chunk);
    CHECK(same, "%s: \"tie_word_embeddings\" is true, but lm_head.weight is no copy of the embeddings; if the head is right, write false "
          "into config.json, else delete it", from);
}

// Reads every tensor of the table from s into `memory`. `prefix` stands before the names. Missing, extra and mis-shaped tensors are
// errors, except what transformers itself ignores: a stored copy of a tied head, and buffers of RoPE and masks in old files.
void load_tensors(StoredTensors *s, const char *from, const TensorTable *table, float *memory, const char *prefix, bool v1_names) {
    char name[128];
    for (int k = 0; k < table->count; k++) {
        const TensorInfo *t = &table->list[k];
        const char *own = v1_names ? t->name_v1 : t->name;
        snprintf(name, sizeof name, "%s%s", prefix, own);
        StoredTensor *stored = safetensors_find(s, name);
        CHECK(stored, "%s: tensor %s is missing; these weights don't belong to this model", from, name);
        size_t rows = 0, elements = 0;                           // of all lines of the table that share the stored tensor
        for (int j = 0; j < table->count; j++) {
            const TensorInfo *other = &table->list[j];
            if (j == k || (v1_names && strcmp(other->name_v1, own) == 0)) rows += other->rows, elements += other->rows * other->cols;
        }
        bool fits = t->is_vector ? stored->num_dims == 1 && stored->shape[0] == elements
                                 : stored->num_dims == 2 && stored->shape[0] == rows && stored->shape[1] == t->cols;
        char found[64], needed[64];
        CHECK(stored->num_dims <= 2, "%s: tensor %s has %d dimensions, at most 2 were expected", from, name, stored->num_dims);
        CHECK(fits, "%s: tensor %s has shape %s, the model needs %s", from, name,
              shape_text(found, stored->num_dims == 1, stored->shape[0], stored->num_dims == 1 ? 1 : stored->shape[1]),
              shape_text(needed, t->is_vector, t->is_vector ? elements : rows, t->is_vector ? 1 : t->cols));
        read_elements(stored, memory + t->offset, t->rows * t->cols);
    }
    for (int i = 0; i < s->count; i++) {
        StoredTensor *t = &s->list[i];
        if (strncmp(t->name, prefix, strlen(prefix)) != 0) continue;
        bool ignored = strstr(t->name, "rotary_emb.inv_freq") || strstr(t->name, ".masked_bias");
        for (int k = 0; k < table->count && t->taken == 0 && strcmp(t->name, "lm_head.weight") == 0; k++)
            if (strcmp(table->list[k].name, "model.embed_tokens.weight") == 0)
                check_tied_head(t, from, memory + table->list[k].offset, table->list[k].rows * table->list[k].cols);
        CHECK(t->taken == t->elements || ignored, "%s: tensor %s is not part of this model; config.json and weights don't fit",
              from, t->name);
    }
}

void write_elements(FILE *f, const float *data, size_t count, Dtype dtype) {
    static uint16_t chunk[1 << 16];
    if (dtype == F32) fwrite(data, 4, count, f);
    else for (size_t i = 0, n; i < count; i += n) {
        n = count - i < (1 << 16) ? count - i : (1 << 16);
        for (size_t j = 0; j < n; j++) chunk[j] = float_to_bf16(data[i + j]);
        fwrite(chunk, 2, n, f);
    }
}

// Writes one safetensors file: tensors [first, last) of the table from each block of memory, the block's prefix before their names.
typedef struct { const char *prefix; const float *memory; } Block;
void write_safetensors(const char *path, const TensorTable *table, int first, int last, const Block *blocks, int num_blocks, Dtype dtype) {
    FILE *f = create_file(path);
    size_t room = 256 * ((size_t)(last - first) * (size_t)num_blocks + 1), length = 0, offset = 0, width = dtype_bytes(dtype);
    char *header = (char *)xmalloc(room), shape[64];
    length += (size_t)snprintf(header, room, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int b = 0; b < num_blocks; b++)
        for (int k = first; k < last; k++) {
            const TensorInfo *t = &table->list[k];
            size_t end = offset + t->rows * t->cols * width;
            length += (size_t)snprintf(header + length, room - length,
                                       ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", blocks[b].prefix,
                                       t->name, DTYPE_NAMES[dtype], shape_text(shape, t->is_vector, t->rows, t->cols), offset, end);
            offset = end;
        }
    length += (size_t)snprintf(header + length, room - length, "}");
    while (length % 8 != 0) header[length++] = ' ';              // the data begins at a multiple of 8
    uint64_t length64 = length;
    fwrite(&length64, 8, 1, f);
    fwrite(header, 1, length, f);
    free(header);
    for (int b = 0; b < num_blocks; b++)
        for (int k = first; k < last; k++)
            write_elements(f, blocks[b].memory + table->list[k].offset, table->list[k].rows * table->list[k].cols, dtype);
    close_file(f, path);
}

// config.json -> Config. What this program cannot represent is refused by its key.
double config_number(const Json *json, const char *path, const char *key) {
    const Json *value = json_get(json, key);
    CHECK(value != NULL, "%s lacks \"%s\"", path, key);
    CHECK(value->type == JSON_NUMBER, "%s: \"%s\" should be a number", path, key);
    return value->number;
}
double config_whole(const Json *json, const char *path, const char *key, double least, double most) {
    double value = config_number(json, path, key);
    CHECK(value >= least && value <= most && value == floor(value), "%s: \"%s\" is %g, it should be a whole number from %.0f to %.0f", path,
          key, value, least, most);
    return value;
}
int config_size(const Json *json, const char *path, const char *key) { return (int)config_whole(json, path, key, 1, 1 << 24); }
bool config_true(const Json *json, const char *path, const char *key) {
    const Json *value = json_get(json, key);
    CHECK(!value || value->type <= JSON_TRUE, "%s: \"%s\" should be true or false", path, key);
    return value && value->type == JSON_TRUE;
}
bool config_given(const Json *json, const char *key) { const Json *value = json_get(json, key); return value && value->type != JSON_NULL; }

// Keys that change what the model computes in ways this program doesn't know.
void config_refuse(const Json *json, const char *path) {
    static const char *const unknown[] = {"quantization_config",   "num_experts",   "num_local_experts",
                                          "moe_intermediate_size", "vision_config", NULL};
    for (int i = 0; unknown[i]; i++)
        CHECK(!config_given(json, unknown[i]), "%s: \"%s\" is not supported; this program trains dense, unquantised Qwen models", path,
              unknown[i]);
    CHECK(!config_true(json, path, "use_sliding_window"),
          "%s: \"use_sliding_window\" is true; sliding-window attention is not supported", path);
    const Json *layer_types = json_get(json, "layer_types");
    for (const Json *type = layer_types ? layer_types->child : NULL; type; type = type->next)
        CHECK(type->type == JSON_STRING && strcmp(type->text, "full_attention") == 0,
              "%s: \"layer_types\" holds %s; only full_attention is supported", path, type->text ? type->text : "no name");
    const char *const scaling_keys[] = {"rope_scaling", "rope_parameters"};
    for (int i = 0; i < 2; i++) {
        const Json *scaling = json_get(json, scaling_keys[i]), *type = json_get(scaling, "rope_type");
        if (!type) type = json_get(scaling, "type");
        bool plain =
            !scaling || scaling->type == JSON_NULL || (type ? type->type == JSON_STRING && strcmp(type->text, "default") == 0 : i == 1);
        CHECK(plain, "%s: \"%s\" of type %s is not supported; set it to null to train within the original length", path, scaling_keys[i],
              type && type->text ? type->text : "unknown");
    }
    const Json *activation = json_get(json, "hidden_act");
    CHECK(!activation || (activation->type == JSON_STRING && strcmp(activation->text, "silu") == 0), "%s: \"hidden_act\" is not silu",
          path);
}

Config config_load(const char *path, bool *v1_names) {
    Json *json = read_json(path);
    const Json *type = json_get(json, "model_type");
    CHECK(type && type->type == JSON_STRING, "%s lacks \"model_type\"", path);
    bool v1 = strcmp(type->text, "qwen") == 0, v2 = strcmp(type->text, "qwen2") == 0, v3 = strcmp(type->text, "qwen3") == 0;
    CHECK(v1 || v2 || v3, "%s: \"model_type\" is %s; this program trains qwen, qwen2 and qwen3", path, type->text);
    config_refuse(json, path);
    Config c = {};
    c.V = config_size(json, path, "vocab_size"), c.C = config_size(json, path, "hidden_size"),
    c.I = config_size(json, path, "intermediate_size");
    c.L = config_size(json, path, "num_hidden_layers"), c.NH = config_size(json, path, "num_attention_heads");
    c.tied = config_true(json, path, "tie_word_embeddings"), c.qkv_bias = v1 || v2, c.qk_norm = v3;
    if (v1) {                                                    // intermediate_size counts both w1 and w2
        CHECK(c.I % 2 == 0, "%s: \"intermediate_size\" is %d, it should be even", path, c.I);
        c.I /= 2, c.NKV = c.NH, c.HD = config_size(json, path, "kv_channels"), c.max_T = config_size(json, path, "seq_length");
        c.norm_eps = (float)config_number(json, path, "layer_norm_epsilon"),
        c.rope_base = (float)config_number(json, path, "rotary_emb_base");
        const Json *no_bias = json_get(json, "no_bias"), *rotary = json_get(json, "rotary_pct");
        CHECK(!no_bias || no_bias->type == JSON_TRUE, "%s: \"no_bias\" is not true; other biases than QKV's are not supported", path);
        CHECK(!rotary || rotary->number == 1.0, "%s: \"rotary_pct\" is not 1; partial rotary embeddings are not supported", path);
    } else {
        const Json *rope = json_get(json, "rope_parameters");    // transformers 5 moved rope_theta there
        c.NKV = config_size(json, path, "num_key_value_heads"), c.max_T = config_size(json, path, "max_position_embeddings");
        c.norm_eps = (float)config_number(json, path, "rms_norm_eps");
        c.rope_base = (float)config_number(json_get(rope, "rope_theta") ? rope : json, path, "rope_theta");
        if (config_given(json, "head_dim")) c.HD = config_size(json, path, "head_dim");
        else CHECK(v2 && c.C % c.NH == 0, "%s lacks \"head_dim\"", path);
        if (!c.HD) c.HD = c.C / c.NH;
        CHECK(!v3 || !config_true(json, path, "attention_bias"), "%s: \"attention_bias\" is true; it is not supported for qwen3", path);
    }
    CHECK((double)c.NH * c.HD <= 1 << 20 && c.L <= 1024 && c.C <= 1 << 20 && c.I <= 1 << 20,
          "%s: %d layers of width %d with %d heads of %d and an "
          "MLP of %d: no Qwen is that large",
          path, c.L, c.C, c.NH, c.HD, c.I);
    CHECK(c.NH % c.NKV == 0, "%s: \"num_attention_heads\" (%d) is not a multiple of \"num_key_value_heads\" (%d)", path, c.NH, c.NKV);
    CHECK(c.HD % 2 == 0, "%s: the head size is %d; RoPE needs an even number", path, c.HD);
    CHECK(c.norm_eps > 0 && c.norm_eps < 1 && c.rope_base > 1 && isfinite(c.rope_base),
          "%s: the norm's epsilon (%g) and RoPE's base (%g) are out of range", path, c.norm_eps, c.rope_base);
    if (v1_names) *v1_names = v1;
    json_free(json);
    return c;
}

// The same for transformers: a model with QK-norm is a qwen3, every other a qwen2 (Qwen v1 included: the arithmetic is equal).
void config_save(const Config *c, const char *path, Dtype dtype, int end_id) {
    FILE *f = create_file(path);
    const char *dtype_name = dtype == BF16 ? "bfloat16" : "float32";
    fprintf(f, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n", c->qk_norm ? "Qwen3ForCausalLM" : "Qwen2ForCausalLM",
            c->qk_norm ? "qwen3" : "qwen2");
    fprintf(f, "  \"vocab_size\": %d,\n  \"hidden_size\": %d,\n  \"intermediate_size\": %d,\n  \"num_hidden_layers\": %d,\n", c->V,
            c->C, c->I, c->L);
    fprintf(f, "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n  \"head_dim\": %d,\n", c->NH, c->NKV, c->HD);
    fprintf(f, "  \"max_position_embeddings\": %d,\n  \"rope_theta\": %.9g,\n  \"rms_norm_eps\": %.9g,\n", c->max_T, c->rope_base,
            c->norm_eps);
    fprintf(f, "  \"hidden_act\": \"silu\",\n  \"attention_bias\": %s,\n  \"attention_dropout\": 0.0,\n  \"use_sliding_window\": false,\n",
            c->qkv_bias ? "true" : "false");
    fprintf(f, "  \"tie_word_embeddings\": %s,\n  \"initializer_range\": 0.02,\n  \"use_cache\": true,\n  \"torch_dtype\": \"%s\",\n",
            c->tied ? "true" : "false", dtype_name);
    if (end_id < 0) fprintf(f, "  \"eos_token_id\": null\n}\n");
    else fprintf(f, "  \"eos_token_id\": %d\n}\n", end_id);
    close_file(f, path);
}

// A hash of all weights, whatever the number of threads.
uint64_t weights_fingerprint(const Model *m) {
    uint64_t sum = 0;
    #pragma omp parallel for reduction(+:sum)
    for (size_t i = 0; i < m->table.num_params; i++) sum += mix64(mix64(i) ^ float_bits(m->params_memory[i]));
    return sum;
}

// A LoRA adapter is a directory as PEFT writes it: adapter_config.json, which names the model that it belongs to, and
// adapter_model.safetensors. It may stand wherever a model's directory may, and means that model with the adapter merged.
bool is_adapter(const char *directory) {
    return file_exists(path_of("%s/adapter_config.json", directory)) && !file_exists(path_of("%s/config.json", directory));
}

// Its base model's directory, and its options. What this program cannot merge is refused by its key.
const char *adapter_config(const char *directory, LoraOptions *options) {
    const char *path = path_of("%s/adapter_config.json", directory);
    Json *json = read_json(path);
    const Json *type = json_get(json, "peft_type"), *base = json_get(json, "base_model_name_or_path");
    const Json *names = json_get(json, "target_modules");
    CHECK(type && type->type == JSON_STRING && strcmp(type->text, "LORA") == 0, "%s: \"peft_type\" is not LORA", path);
    CHECK(base && base->type == JSON_STRING, "%s lacks \"base_model_name_or_path\"", path);
    CHECK(file_exists(path_of("%s/config.json", base->text)), "%s: \"base_model_name_or_path\" is %s, but there is no model of that name "
          "here; write the directory of the base model there", path, base->text);
    static const char *const unknown[] = {"use_rslora", "use_dora", "fan_in_fan_out", "use_qalora", "lora_bias", NULL};
    for (int i = 0; unknown[i]; i++)
        CHECK(!config_true(json, path, unknown[i]), "%s: \"%s\" is true; it is not supported", path, unknown[i]);
    static const char *const lists[] = {"modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "target_parameters",
                                        NULL};
    for (int i = 0; lists[i]; i++) {
        const Json *list = json_get(json, lists[i]);
        CHECK(!list || !list->child, "%s: \"%s\" is not empty; it is not supported", path, lists[i]);
    }
    // These begin with A and B from the base, which they change; LoRA of PEFT's other kinds begins with B = 0.
    static const char *const changes_base[] = {"pissa", "olora", "corda", "loftq", NULL};
    const Json *init = json_get(json, "init_lora_weights"), *invocation = json_get(json, "alora_invocation_tokens");
    for (int i = 0; changes_base[i] && init && init->type == JSON_STRING; i++)
        CHECK(strncmp(init->text, changes_base[i], strlen(changes_base[i])) != 0, "%s: \"init_lora_weights\" is %s, which changes the base; "
              "it is not supported (PEFT's save_pretrained can convert it to plain LoRA)", path, init->text);
    CHECK(!invocation || !invocation->child, "%s: \"alora_invocation_tokens\" is not empty; it is not supported", path);
    options->rank = (int)config_whole(json, path, "r", 1, MOST_LORA_RANK), options->alpha = (float)config_number(json, path, "lora_alpha");
    options->targets = 0;
    CHECK(names && names->type == JSON_ARRAY, "%s: \"target_modules\" should be a list", path);
    for (const Json *name = names->child; name; name = name->next) {
        int i = 0;
        while (i < NUM_LORA_TARGETS && name->type == JSON_STRING && strcmp(LORA_TARGETS[i], name->text) != 0) i++;
        CHECK(name->type == JSON_STRING && i < NUM_LORA_TARGETS, "%s: \"target_modules\" holds %s, which is not supported", path,
              name->text ? name->text : "what is no name");
        options->targets |= 1u << i;
    }
    return base->text;
}
const char *base_directory(const char *directory) {
    LoraOptions options;
    return is_adapter(directory) ? adapter_config(directory, &options) : directory;
}
Config model_config(const char *directory, bool *v1_names) {
    return config_load(path_of("%s/config.json", base_directory(directory)), v1_names);
}

void adapter_save(const Model *m, const char *base, const char *directory) {
    const LoraOptions *o = &m->lora->options;
    const char *path = path_of("%s/adapter_config.json", directory);
    FILE *f = create_file(path);
    fprintf(f, "{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n  \"base_model_name_or_path\": ");
    json_write_string(f, base, strlen(base));
    fprintf(f, ",\n  \"r\": %d,\n  \"lora_alpha\": %.9g,\n  \"lora_dropout\": 0.0,\n  \"bias\": \"none\",\n", o->rank, (double)o->alpha);
    fprintf(f, "  \"target_modules\": [");
    for (int i = 0, some = 0; i < NUM_LORA_TARGETS; i++)
        if (o->targets >> i & 1) fprintf(f, "%s\"%s\"", some++ ? ", " : "", LORA_TARGETS[i]);
    fprintf(f, "],\n  \"fan_in_fan_out\": false,\n  \"use_rslora\": false,\n  \"use_dora\": false,\n  \"modules_to_save\": null,\n"
               "  \"init_lora_weights\": true,\n  \"inference_mode\": true\n}\n");
    close_file(f, path);
    Block block = {"", m->lora->memory};
    const TensorTable *t = &m->lora->table;
    write_safetensors(path_of("%s/adapter_model.safetensors", directory), t, 0, t->count, &block, 1, F32);
}

// Into m->lora, of a model with the base's weights. A run of this program left a fingerprint of the base beside the adapter.
void adapter_load(Model *m, const char *directory) {
    const char *path = path_of("%s/trainer.json", directory);
    Json *json = file_exists(path) ? read_json(path) : NULL;
    const Json *wanted = json ? json_get(json, "base_model") : NULL;
    CHECK(!wanted || wanted->type != JSON_STRING || strtoull(wanted->text, NULL, 16) == weights_fingerprint(m),
          "the adapter %s was trained on another base than %s now is", directory, base_directory(directory));
    json_free(json);
    StoredTensors stored = safetensors_open(directory, "adapter_model");
    load_tensors(&stored, directory, &m->lora->table, m->lora->memory, "", false);
    safetensors_close(&stored);
}

// Weights of a Hugging Face directory, in fp32, whatever they are stored in; an adapter's are merged.
void model_load(Model *m, const char *directory) {
    bool v1;
    LoraOptions adapter;
    const char *base = is_adapter(directory) ? adapter_config(directory, &adapter) : directory;
    Config c = config_load(path_of("%s/config.json", base), &v1);
    if (!m->params_memory) model_alloc(m, &c);
    StoredTensors stored = safetensors_open(base, "model");
    load_tensors(&stored, base, &m->table, m->params_memory, "", v1);
    safetensors_close(&stored);
    if (base == directory) return;
    lora_attach(m, &adapter, 0);
    adapter_load(m, directory);
    lora_merge(m);
    lora_free(m->lora), free(m->lora);
    m->lora = NULL;
}

// model.safetensors, or above 5 GB several files and their index, as transformers writes them. (A variable, because tests make it small.)
static size_t largest_file_bytes = 5000000000u;
void model_save(const Model *m, const char *directory, Dtype dtype) {
    const size_t most = largest_file_bytes;
    const TensorTable *t = &m->table;
    Block block = {"", m->params_memory};
    if (t->num_params * dtype_bytes(dtype) <= most) {
        write_safetensors(path_of("%s/model.safetensors", directory), t, 0, t->count, &block, 1, dtype);
        return;
    }
    int num_files = 0;
    int *file_of = (int *)xmalloc((size_t)t->count * sizeof(int));
    size_t bytes = most;
    for (int k = 0; k < t->count; k++) {
        size_t size = t->list[k].rows * t->list[k].cols * dtype_bytes(dtype);
        if (bytes + size > most) num_files++, bytes = 0;
        bytes += size, file_of[k] = num_files;
    }
    const char *index_path = path_of("%s/model.safetensors.index.json", directory);
    FILE *index = create_file(index_path);
    fprintf(index, "{\"metadata\":{\"total_size\":%zu},\"weight_map\":{", t->num_params * dtype_bytes(dtype));
    for (int k = 0, first = 0; k < t->count; k++) {
        char name[64];
        snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", file_of[k], num_files);
        fprintf(index, "%s\n\"%s\":\"%s\"", k ? "," : "", t->list[k].name, name);
        if (k + 1 < t->count && file_of[k + 1] == file_of[k]) continue;
        write_safetensors(path_of("%s/%s", directory, name), t, first, k + 1, &block, 1, dtype);
        first = k + 1;
    }
    fprintf(index, "}}\n");
    close_file(index, index_path);
    free(file_of);
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 9. The machine
//
// All that differs between CPU and GPU for the rest of this file: what training and sampling ask of the machine that does the arithmetic.
// Below are the CPU's answers. train_qwen.cu defines QWEN_GPU and gives the GPU's. On both, params_memory, m_memory and v_memory of a
// Model are the host's, which load and save them.

// What a training run needs, in bytes: weights (with their fp32 masters, or with LoRA the adapted matrices' bases), gradients, AdamW's
// moments, activations. LoRA of rank 0 is none.
typedef struct { double weights, gradients, moments, activations; } MemoryPlan;
MemoryPlan machine_plan(const Config *c, int B, int T, Recompute recompute, const LoraOptions *lora);
double machine_memory(void);                     // bytes that the machine has, 0: unknown
double machine_peak_flops(void);                 // what "% of peak" refers to
const char *machine_text(void);                  // one line about it

// Room for micro-batches of (B, T), updates of `rows` rows and sequences of `positions` tokens. Takes over the host's weights, with TRAIN
// its moments, and with m->lora the adapters and theirs, merging them.
void machine_open(Model *m, int B, int T, int rows, int positions, Recompute recompute, Pass pass);
void machine_close(Model *m);                    // frees all of the model, the host's part too
void machine_download(Model *m);                 // brings weights and moments back to the host, with LoRA those of the adapters

// One update from `rows` rows (micro-batches of m->B each) that have `targets` targets in all, or pairs in DPO: forward, backward, clip,
// AdamW. Every target counts the same in whatever micro-batch it is. A loss or norm that is not finite changes nothing.
// With m->dpo, both functions overwrite the batch's weights, and add to m->dpo->seen.
typedef struct { double loss, norm; } Update;
Update machine_update(Model *m, const Batch *batch, int rows, double targets, const AdamW *adamw, double clip, long step);
double machine_loss(Model *m, const Batch *batch, int B, int T);                     // sum of weight * loss, in DPO of the pairs' losses

void machine_rewind(Model *m, int length);       // back to the first `length` tokens of the sequence; 0: a new one, of at most m->positions
float *machine_decode(Model *m, const int *tokens, int count);                       // appends to it: the logits (V) after the last token

#ifndef QWEN_GPU
#define PROGRAM "train_qwen"
#define PRECISION "fp32"
MemoryPlan machine_plan(const Config *c, int B, int T, Recompute recompute, const LoraOptions *options) {
    TensorTable table = tensor_table(c);
    double weights = 4.0 * (double)table.num_params;
    MemoryPlan plan = {weights, weights, 2 * weights, 4.0 * (double)activations_floats(c, B, T, recompute, true)};
    if (options->rank > 0) {
        Lora lora = lora_layout(c, &table, options);
        double adapters = 4.0 * (double)lora.table.num_params;
        plan.weights += 4.0 * (double)lora.base_floats + adapters;
        plan.gradients = 4.0 * (double)layer_floats(&table) + adapters, plan.moments = 2 * adapters;
        lora_free(&lora);
    }
    free(table.list);
    return plan;
}
double machine_memory(void) { return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE); }

const char *machine_text(void) {
#ifdef _OPENMP
    int threads = omp_get_max_threads();
    return path_of("%d thread%s, vectors of %d floats", threads, threads == 1 ? "" : "s", VL);
#else
    return path_of("1 thread, vectors of %d floats; built without OpenMP", VL);
#endif
}

// Floating-point operations per second of the micro-kernel on data in the L1 cache, on all threads. It is
// within a few percent of what the processor can do at all. The best of ten short runs, in case other programs are busy.
double machine_peak_flops(void) {
    double flops = 0;
    #pragma omp parallel reduction(+:flops)
    {
        float *a = thread_buffer(BUFFER_A, (size_t)MC * KC), *b = thread_buffer(BUFFER_B, (size_t)NC * KC);
        float *c = thread_buffer(BUFFER_ROW, MR * NR);
        double best = 0;
        memset(a, 0, sizeof(float) * MR * KC), memset(b, 0, sizeof(float) * NR * KC), memset(c, 0, sizeof(float) * MR * NR);
        for (int run = 0; run < 10; run++) {
            double begin = now_s();
            for (int i = 0; i < 2000; i++) micro_kernel(c, NR, a, b, KC, MR, NR, ACCUMULATE);
            double rate = 2000.0 * 2 * MR * NR * KC / (now_s() - begin);
            if (rate > best) best = rate;
        }
        flops += best;
    }
    return flops;
}

void machine_open(Model *m, int B, int T, int rows, int positions, Recompute recompute, Pass pass) {
    (void)rows;                                                  // only micro-batches need room here
    model_alloc_run(m, B, T, positions, recompute, pass);
    if (m->lora) lora_merge(m);
}
void machine_close(Model *m) { model_free(m); }
void machine_download(Model *m) { (void)m; }

Update machine_update(Model *m, const Batch *batch, int rows, double targets, const AdamW *adamw, double clip, long step) {
    Update u = {};
    for (int i = 0; i < rows; i += m->B) {
        Batch micro = batch_from(batch, i, m->T);
        u.loss += model_loss(m, &micro, m->B, m->T, (float)(1.0 / targets), TRAIN) / targets;
    }
    u.norm = gradient_norm(trained(m).grads, trained(m).table->num_params);
    if (!isfinite(u.loss) || !isfinite(u.norm)) return u;
    adamw_step(m, adamw, clip > 0 && u.norm > clip ? (float)(clip / (u.norm + 1e-6)) : 1.0f, step);
    if (m->lora) lora_merge(m);
    return u;
}
double machine_loss(Model *m, const Batch *batch, int B, int T) { return model_loss(m, batch, B, T, 0, EVALUATE); }

void machine_rewind(Model *m, int length) {
    const Config *c = &m->config;
    if (m->cache.capacity != m->positions) {                     // the first time
        cache_free(&m->cache), m->cache = cache_alloc(c->L, c->NKV, c->HD, m->positions);
        if (!m->grads_memory && !m->lora) half_weights_make(m->params_memory, m->table.num_params);
    }
    assert(length <= m->cache.length);
    m->cache.length = length;
}
float *machine_decode(Model *m, const int *tokens, int count) { return model_decode(m, &m->cache, tokens, count); }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 10. Sampling

typedef struct { float probability; int id; } Candidate;
int compare_candidates(const void *a, const void *b) {           // falling probability, then rising id
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    if (x->probability != y->probability) return x->probability > y->probability ? -1 : 1;
    return x->id - y->id;
}

// How the next token is chosen, in the order in which this is applied, as in transformers. Off: a penalty of 1, top_k 0, top_p 1, min_p 0.
typedef struct { double repetition_penalty, temperature; long top_k; double top_p, min_p; bool greedy; } Sampler;

// Makes the ids among `tokens` less likely: positive logits are divided by the penalty, negative ones multiplied (Keskar et al. 2019).
void penalize_repetition(float *logits, int V, const int *tokens, int count, double penalty) {
    if (penalty == 1) return;
    bool *seen = (bool *)xcalloc((size_t)V, sizeof(bool));       // each id counts once
    for (int i = 0; i < count; i++) {
        float *logit = &logits[tokens[i]];
        if (!seen[tokens[i]]) *logit = (float)(*logit < 0 ? *logit * penalty : *logit / penalty);
        seen[tokens[i]] = true;
    }
    free(seen);
}

// The ids below `count` that may be chosen and what their probabilities are proportional to, most likely first; returns how many. They come
// from softmax(logits / temperature), cut to the top_k most likely ones (and those equal to the last of them), then to the smallest set
// whose share of these reaches top_p, then to those at least min_p times as likely as the first. Overwrites the logits. Below temperature
// 1e-3 it is greedy. The result is valid until the next call.
int sample_candidates(const Candidate **result, float *logits, int count, const Sampler *s) {
    static Candidate *candidates;
    static int room;
    int best = 0, n = 0, kept = 0;
    if (room < count) candidates = (Candidate *)xrealloc(candidates, (size_t)(room = count) * sizeof(Candidate));
    *result = candidates;
    for (int i = 1; i < count; i++) if (logits[i] > logits[best]) best = i;
    CHECK(isfinite(logits[best]), "the model's logits are not finite; its weights are damaged");
    if (s->greedy || s->temperature < 1e-3) return candidates[0].id = best, candidates[0].probability = 1, 1;
    float scale = (float)(1.0 / s->temperature), sum = exp_row(logits, logits, scale, logits[best] * scale, count);
    CHECK(isfinite(sum), "the model's logits are not finite; its weights are damaged");
    // Impossible ids (logit -inf) are dropped, and without top_k also those that can't be in the top_p set: sorting less takes less.
    float least = s->top_k == 0 && s->top_p < 1 ? (float)((1 - s->top_p) / count) * sum : 1e-30f;
    for (int i = 0; i < count; i++)
        if (logits[i] >= least) candidates[n].probability = logits[i], candidates[n++].id = i;
    qsort(candidates, (size_t)n, sizeof(Candidate), compare_candidates);
    double all = (double)sum, reached = 0;
    if (s->top_k > 0 && s->top_k < n) {
        int k = (int)s->top_k;
        while (k < n && candidates[k].probability == candidates[k - 1].probability) k++;
        n = k, all = 0;
        for (int i = 0; i < n; i++) all += (double)candidates[i].probability;
    }
    double enough = s->top_p * all, likely = s->min_p * (double)candidates[0].probability;
    while (kept < n && (kept == 0 || (reached < enough && (double)candidates[kept].probability >= likely)))
        reached += (double)candidates[kept++].probability;
    return kept;
}

// Chooses one of the first `count` ids; `coin` in [0, 1) picks. Overwrites the logits.
int sample(float *logits, int count, const Sampler *s, double coin) {
    const Candidate *candidates;
    int kept = sample_candidates(&candidates, logits, count, s);
    double sum = 0;
    for (int i = 0; i < kept; i++) sum += (double)candidates[i].probability;
    double aim = coin * sum;
    for (int i = 0; i < kept - 1; i++) {
        aim -= (double)candidates[i].probability;
        if (aim < 0) return candidates[i].id;
    }
    return candidates[kept - 1].id;
}

// The tokens of one text. The machine has processed the first `cached` of them and need not do so again.
typedef struct { int *tokens; int count, cached, room; } Sequence;

void sequence_push(Sequence *s, int id) {
    if (s->count == s->room) s->tokens = (int *)xrealloc(s->tokens, (size_t)(s->room = 2 * s->room + 256) * sizeof(int));
    s->tokens[s->count++] = id;
}

// Replaces the tokens. What the old and the new ones have in common at the beginning is not processed again.
void sequence_set(Sequence *s, const int *tokens, int count) {
    int same = 0;
    while (same < count && same < s->cached && s->tokens[same] == tokens[same]) same++;
    s->cached = same, s->count = 0;
    for (int i = 0; i < count; i++) sequence_push(s, tokens[i]);
}

// The logits (V) after the last token, of at most m->positions.
float *sequence_logits(Model *m, Sequence *s) {
    int from = s->cached < s->count ? s->cached : s->count - 1;
    machine_rewind(m, from);
    s->cached = s->count;
    return machine_decode(m, s->tokens + from, s->count - from);
}

// Continues s by at most max_tokens sampled tokens, until an end token, the model's last position, or emit, which receives each token but
// the end token, returns false. Returns how many were added, the end token included.
typedef bool (*Emit)(void *context, int id);
int generate(Model *m, Sequence *s, const Tokenizer *tokenizer, int max_tokens, const Sampler *sampler, uint64_t seed, Emit emit,
             void *context) {
    int made = 0, ids = tokenizer->vocab_size < m->config.V ? tokenizer->vocab_size : m->config.V;
    while (made < max_tokens && s->count < m->positions) {
        float *logits = sequence_logits(m, s);
        for (int id = tokenizer->num_ranks; id < ids; id++) {    // never an id without a token
            size_t len;
            tokenizer_bytes(tokenizer, (uint32_t)id, &len);
            if (len == 0) logits[id] = -INFINITY;
        }
        penalize_repetition(logits, m->config.V, s->tokens, s->count, sampler->repetition_penalty);
        int id = sample(logits, ids, sampler, random_uniform(seed, (uint64_t)made));
        sequence_push(s, id);
        made++;
        if (id == tokenizer->im_end || id == tokenizer->endoftext || !emit(context, id)) break;
    }
    return made;
}

// An Emit that prints text as it comes, whole characters only.
typedef struct { const Tokenizer *tokenizer; Utf8Stream stream; FILE *to; } Printer;
bool print_token(void *context, int id) {
    Printer *p = (Printer *)context;
    char text[1024];
    size_t len;
    const char *bytes = tokenizer_bytes(p->tokenizer, (uint32_t)id, &len);
    fwrite(text, 1, utf8_stream(&p->stream, bytes, len, text), p->to);
    fflush(p->to);
    return true;
}
bool print_id(void *context, int id) { return fprintf((FILE *)context, "%d ", id) > 0; }

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 11. Options: one table says how they are read, explained and remembered

typedef enum { OPTION_INT, OPTION_FLOAT, OPTION_STRING, OPTION_FLAG, OPTION_CHOICE } OptionType;
typedef struct {
    const char *name;                // without the two dashes
    unsigned commands;               // bit mask: which commands know it
    OptionType type;
    void *value;                     // long, double, const char *, bool, int
    double least;                    // smallest value of numbers
    const char *const *choices;      // NULL-terminated; for OPTION_CHOICE
    const char *meaning;
} Option;                            // a table ends with a name of NULL

// The value as text, as it would be given.
const char *option_text(const Option *o, char *buffer, size_t size) {
    if (o->type == OPTION_INT) snprintf(buffer, size, "%ld", *(long *)o->value);
    else if (o->type == OPTION_FLOAT) {
        snprintf(buffer, size, "%g", *(double *)o->value);
        if (strtod(buffer, NULL) != *(double *)o->value) snprintf(buffer, size, "%.17g", *(double *)o->value);
    }
    else if (o->type == OPTION_STRING) snprintf(buffer, size, "%s", *(const char **)o->value);
    else if (o->type == OPTION_FLAG) snprintf(buffer, size, "%s", *(bool *)o->value ? "on" : "off");
    else snprintf(buffer, size, "%s", o->choices[*(int *)o->value]);
    return buffer;
}

void print_options(const Option *table, unsigned command) {
    for (const Option *o = table; o->name; o++) {
        if (!(o->commands & command)) continue;
        char text[64], left[96];
        snprintf(left, sizeof left, "--%s%s", o->name, o->type == OPTION_FLAG ? "" : o->type == OPTION_STRING ? " X" : " N");
        if (o->type == OPTION_CHOICE) {
            snprintf(left, sizeof left, "--%s ", o->name);
            for (int i = 0; o->choices[i]; i++)
                snprintf(left + strlen(left), sizeof left - strlen(left), "%s%s", i ? "|" : "", o->choices[i]);
        }
        printf("  %-42s %s", left, o->meaning);
        if (o->type != OPTION_FLAG && option_text(o, text, sizeof text)[0]) printf(" (%s)", text);
        printf("\n");
    }
}

int edit_distance(const char *a, const char *b) {                // Levenshtein, for short words
    int row[64], la = (int)strlen(a), lb = (int)strlen(b);
    if (la > 60 || lb > 60) return 100;
    for (int j = 0; j <= lb; j++) row[j] = j;
    for (int i = 1; i <= la; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= lb; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = row[j], row[j] = best;
        }
    }
    return row[lb];
}

const Option *find_option(const Option *table, unsigned command, const char *name) {
    const Option *nearest = NULL;
    int least = 4;                                               // farther names are no guesses
    bool elsewhere = false;
    for (const Option *o = table; o->name; o++) {
        bool known = (o->commands & command) != 0, equal = strcmp(o->name, name) == 0;
        if (known && equal) return o;
        if (equal) elsewhere = true;
        int distance = strncmp(o->name, name, strlen(name)) == 0 ? 0 : edit_distance(name, o->name);
        if (known && distance < least) least = distance, nearest = o;
    }
    CHECK(!elsewhere, "--%s is an option of another command; --help lists which", name);
    CHECK(!nearest, "unknown option --%s; did you mean --%s? --help lists all", name, nearest ? nearest->name : "");
    DIE("unknown option --%s; --help lists all", name);
}

void set_option(const Option *o, const char *text) {
    char *end = NULL;
    double number = 0;
    if (o->type == OPTION_INT || o->type == OPTION_FLOAT) {
        number = strtod(text, &end);
        CHECK(end != text && *end == 0 && isfinite(number), "--%s needs a number, not '%s'", o->name, text);
        CHECK(number >= o->least, "--%s is %s, it must be at least %g", o->name, text, o->least);
        CHECK(o->type == OPTION_FLOAT || number <= INT32_MAX, "--%s is %s, it must be at most %d", o->name, text, INT32_MAX);
    }
    if (o->type == OPTION_INT) {
        CHECK(number == floor(number), "--%s needs a whole number, not '%s'", o->name, text);
        *(long *)o->value = (long)number;
    } else if (o->type == OPTION_FLOAT) {
        *(double *)o->value = number;
    } else if (o->type == OPTION_STRING) {
        *(const char **)o->value = text;
    } else if (o->type == OPTION_CHOICE) {
        int i = 0;
        while (o->choices[i] && strcmp(o->choices[i], text) != 0) i++;
        char all[128] = "";
        for (int k = 0; o->choices[k]; k++) snprintf(all + strlen(all), sizeof all - strlen(all), "%s%s", k ? ", " : "", o->choices[k]);
        CHECK(o->choices[i], "--%s is '%s', it must be one of %s", o->name, text, all);
        *(int *)o->value = i;
    }
}

static const void *given[64];            // the variables of the options that stood on the command line
static int num_given;
bool was_given(const void *variable) {
    for (int i = 0; i < num_given; i++) if (given[i] == variable) return true;
    return false;
}

// Reads --name value, --name=value and flags from argv[first] on. Words without dashes are collected in `words` (may be NULL: then
// they are errors); returns how many.
int parse_options(const Option *table, unsigned command, int argc, char **argv, int first, const char **words) {
    int num_words = 0;
    for (int i = first; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) != 0) {
            CHECK(words != NULL, "'%s' is not an option; options begin with --, --help lists them", argv[i]);
            words[num_words++] = argv[i];
            continue;
        }
        char name[64];
        const char *equals = strchr(argv[i], '=');
        int length = equals ? (int)(equals - argv[i]) - 2 : (int)strlen(argv[i]) - 2;
        snprintf(name, sizeof name, "%.*s", length < 63 ? length : 63, argv[i] + 2);
        const Option *o = find_option(table, command, name);
        if (!was_given(o->value)) given[num_given++] = o->value;
        if (o->type == OPTION_FLAG) {
            CHECK(!equals, "--%s is a flag and takes no value", name);
            *(bool *)o->value = true;
        } else {
            CHECK(equals || i + 1 < argc, "--%s needs a value; --help explains it", name);
            set_option(o, equals ? equals + 1 : argv[++i]);
        }
    }
    return num_words;
}

enum { COMMAND_TRAIN = 1, COMMAND_GENERATE = 2, COMMAND_INFO = 4, COMMAND_EXPORT = 8 };
typedef enum { AUTO, ON, OFF } OnOff;
static const char *const ON_OFF_NAMES[] = {"auto", "on", "off", NULL};
static const char *const SAVE_DTYPES[] = {"fp32", "bf16", NULL};         // in the order of Dtype
static const char *const RECOMPUTE_NAMES[] = {"0", "1", "2", NULL};      // in the order of Recompute
static const char *const TRAIN_TASKS[] = {"pretrain", "sft", "dpo", NULL};       // in the order of Task

// 0 or "" where a comment says auto: resolve_options replaces it by what fits the model and the data.
static struct {
    const char *model, *data, *val, *out, *prompt, *lora_targets;
    int task, schedule, save_dtype, doc_mask, recompute;
    long steps, epochs, batch, seq, accum, total_batch;
    long warmup, eval_every, eval_tokens, sample_every, save_every, keep, seed, log_every;
    long max_tokens, top_k, lora_rank;
    double lr, min_lr, weight_decay, clip;
    double beta1, beta2, eps, beta, label_smoothing, lora_alpha;
    double temperature, top_p, min_p, repetition_penalty;
    bool resume, greedy, ids, json;
} opt = {                            // the defaults, line by line
    "", "", "", "out", "", "all",
    TASK_PRETRAIN, COSINE, F32, AUTO, KEEP_ALL,
    0, 1, 2, 128, 1, 0,
    -1, 1000, 65536, 1000, 0, 2, 1337, 50,
    128, 0, 0,
    0, 0.1, 0.1, 1.0,
    0.9, 0.99, 1e-8, 0.1, 0, 0,
    0.7, 0.9, 0, 1,
    false, false, false, false,
};

// Shared with dev/chat.c.
#define SAMPLING_OPTIONS(c) \
    {"greedy",       c,        OPTION_FLAG,   &opt.greedy,       0, NULL, "always take the most likely token"}, \
    {"temperature",  c,        OPTION_FLOAT,  &opt.temperature,  0, NULL, "below 1 plays safe, above 1 is adventurous"}, \
    {"top-k",        c,        OPTION_INT,    &opt.top_k,        0, NULL, "only the k most likely tokens; 0: all"}, \
    {"top-p",        c,        OPTION_FLOAT,  &opt.top_p,        0, NULL, "only the likely tokens that together reach this probability"}, \
    {"min-p",        c,        OPTION_FLOAT,  &opt.min_p,        0, NULL, "only tokens at least so many times as likely as the first"}, \
    {"repetition-penalty", c,  OPTION_FLOAT,  &opt.repetition_penalty, 0, NULL, "above 1 makes tokens that were there less likely"}
Sampler sampler_of_options(void) {
    CHECK(opt.top_p <= 1 && opt.min_p <= 1, "--top-p %g and --min-p %g are probabilities, at most 1", opt.top_p, opt.min_p);
    CHECK(opt.repetition_penalty > 0, "--repetition-penalty is 0, it must be above; 1 is none");
    Sampler s = {opt.repetition_penalty, opt.temperature, opt.top_k, opt.top_p, opt.min_p, opt.greedy};
    return s;
}

#define T_ COMMAND_TRAIN
#define G_ COMMAND_GENERATE
#define I_ COMMAND_INFO
#define E_ COMMAND_EXPORT
static const Option OPTIONS[] = {
    {"model",        T_|G_|I_|E_, OPTION_STRING, &opt.model,        0, NULL, "a preset, a Hugging Face directory, or a run's directory"},
    {"data",         T_,       OPTION_STRING, &opt.data,         0, NULL, "training tokens: a file, 'pattern*.bin', or a directory"},
    {"val",          T_,       OPTION_STRING, &opt.val,          0, NULL, "validation tokens; default: val*.bin in the directory --data"},
    {"out",          T_|E_,    OPTION_STRING, &opt.out,          0, NULL, "checkpoints and logs, or the exported model, go here"},
    {"task",         T_,       OPTION_CHOICE, &opt.task,         0, TRAIN_TASKS, "what the data was prepared for"},
    {"steps",        T_,       OPTION_INT,    &opt.steps,        0, NULL, "updates; 0: as many as --epochs have"},
    {"epochs",       T_,       OPTION_INT,    &opt.epochs,       1, NULL, "passes over the data"},
    {"batch",        T_|I_,    OPTION_INT,    &opt.batch,        1, NULL, "rows of a micro-batch"},
    {"seq",          T_|I_,    OPTION_INT,    &opt.seq,          1, NULL, "tokens of a row"},
    {"accum",        T_,       OPTION_INT,    &opt.accum,        1, NULL, "micro-batches of an update (gradient accumulation)"},
    {"total-batch",  T_,       OPTION_INT,    &opt.total_batch,  0, NULL, "tokens of an update; sets --accum; 0: use --accum"},
    {"lr",           T_,       OPTION_FLOAT,  &opt.lr,           0, NULL,
        "peak rate; 0: 1e-4, tiny 2.5e-3, checkpoints 1e-5, dpo 1e-6, lora x 10"},
    {"schedule",     T_,       OPTION_CHOICE, &opt.schedule,     0, SCHEDULE_NAMES, "how the rate falls after warm-up"},
    {"warmup",       T_,       OPTION_INT,    &opt.warmup,      -1, NULL, "updates over which the rate rises; -1: 5 %, at most 1000"},
    {"min-lr",       T_,       OPTION_FLOAT,  &opt.min_lr,       0, NULL, "the last update's rate as a fraction of --lr"},
    {"weight-decay", T_,       OPTION_FLOAT,  &opt.weight_decay, 0, NULL, "AdamW's decay of matrices; norms and biases have none"},
    {"beta1",        T_,       OPTION_FLOAT,  &opt.beta1,        0, NULL, "AdamW's mean of gradients"},
    {"beta2",        T_,       OPTION_FLOAT,  &opt.beta2,        0, NULL, "AdamW's mean of their squares"},
    {"eps",          T_,       OPTION_FLOAT,  &opt.eps,          0, NULL, "AdamW's epsilon"},
    {"clip",         T_,       OPTION_FLOAT,  &opt.clip,         0, NULL, "largest norm of the gradient; 0: no clipping"},
    {"beta",         T_,       OPTION_FLOAT,  &opt.beta,         0, NULL, "dpo: how closely the model is held to the reference"},
    {"label-smoothing", T_,    OPTION_FLOAT,  &opt.label_smoothing, 0, NULL, "dpo: share of pairs that may be labelled wrongly"},
    {"lora-rank",    T_|I_,    OPTION_INT,    &opt.lora_rank,    0, NULL, "train only adapters of this rank; 0: train everything"},
    {"lora-alpha",   T_|I_,    OPTION_FLOAT,  &opt.lora_alpha,   0, NULL, "adapters count alpha / rank; 0: twice the rank"},
    {"lora-targets", T_|I_,    OPTION_STRING, &opt.lora_targets, 0, NULL, "what has adapters: all, or some of q_proj,k_proj,...,down_proj"},
    {"doc-mask",     T_,       OPTION_CHOICE, &opt.doc_mask,     0, ON_OFF_NAMES, "attention ends at document borders; auto: sft, dpo"},
    {"recompute",    T_|I_,    OPTION_CHOICE, &opt.recompute,    0, RECOMPUTE_NAMES, "0 keeps all, 1 no norms and SwiGLU, 2 layer inputs"},
    {"eval-every",   T_,       OPTION_INT,    &opt.eval_every,   0, NULL, "validate every so many updates, and at the end; 0: only there"},
    {"eval-tokens",  T_,       OPTION_INT,    &opt.eval_tokens,  1, NULL, "at most so many tokens of the validation data"},
    {"sample-every", T_,       OPTION_INT,    &opt.sample_every, 0, NULL, "print a sample every so many updates; 0: never"},
    {"save-every",   T_,       OPTION_INT,    &opt.save_every,   0, NULL, "save every so many updates, and at the end; 0: only there"},
    {"keep",         T_,       OPTION_INT,    &opt.keep,         0, NULL, "checkpoints to keep; the oldest are deleted; 0: keep all"},
    {"save-dtype",   T_|E_,    OPTION_CHOICE, &opt.save_dtype,   0, SAVE_DTYPES, "number format of saved weights"},
    {"resume",       T_,       OPTION_FLAG,   &opt.resume,       0, NULL, "go on from the newest checkpoint in --out"},
    {"log-every",    T_,       OPTION_INT,    &opt.log_every,    1, NULL, "print their mean loss every so many updates; log.jsonl has all"},
    {"prompt",       G_,       OPTION_STRING, &opt.prompt,       0, NULL, "text to continue; <|im_start|> is special; default: stdin"},
    {"max-tokens",   G_,       OPTION_INT,    &opt.max_tokens,   1, NULL, "stop after so many tokens"},
    SAMPLING_OPTIONS(G_),
    {"ids",          G_,       OPTION_FLAG,   &opt.ids,          0, NULL, "print token ids instead of text"},
    {"seed",         T_|G_,    OPTION_INT,    &opt.seed,         0, NULL, "of initialisation, data order and sampling"},
    {"json",         I_,       OPTION_FLAG,   &opt.json,         0, NULL, "machine-readable"},
    {NULL, 0, OPTION_FLAG, NULL, 0, NULL, NULL},
};

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 12. A run: its directory, logs, checkpoints, evaluation, samples

static volatile sig_atomic_t stop_requested;
void request_stop(int signal_number) {
    stop_requested = 1;
    signal(signal_number, signal_number == SIGPIPE ? SIG_IGN : SIG_DFL);     // a second Ctrl-C stops at once
}

// Ctrl-C, kill, a closed terminal (unless nohup is there) and a reader that went away (`| tee` at Ctrl-C, `| head`) let a run save first.
void stop_by_signals(void) {
    signal(SIGINT, request_stop), signal(SIGTERM, request_stop), signal(SIGPIPE, request_stop);
    if (signal(SIGHUP, request_stop) == SIG_IGN) signal(SIGHUP, SIG_IGN);
}

// TensorBoard's event file: records of (length, crc, data, crc), each datum a protobuf message Event, written by hand.
// Field numbers: Event 1 wall_time, 2 step, 3 file_version, 5 summary; Summary 1 value; Value 1 tag, 2 simple_value.
uint32_t masked_crc32c(const unsigned char *data, size_t bytes) {
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < bytes; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);      // Castagnoli's polynomial, reversed
    }
    crc = ~crc;
    return ((crc >> 15) | (crc << 17)) + 0xA282EAD8u;
}

void event_write(FILE *f, const unsigned char *event, size_t bytes) {
    uint64_t length = bytes;
    uint32_t crc = masked_crc32c((const unsigned char *)&length, 8);
    fwrite(&length, 8, 1, f), fwrite(&crc, 4, 1, f), fwrite(event, 1, bytes, f);
    crc = masked_crc32c(event, bytes);
    fwrite(&crc, 4, 1, f);
}

size_t event_begin(unsigned char *event) {                       // wall_time
    double seconds = (double)time(NULL);
    event[0] = 1 << 3 | 1;
    memcpy(event + 1, &seconds, 8);
    return 9;
}

void event_scalar(FILE *f, const char *tag, long step, double value) {
    unsigned char event[160];
    size_t n = event_begin(event), tag_bytes = strlen(tag);
    float number = (float)value;
    event[n++] = 2 << 3 | 0;
    uint64_t varint = (uint64_t)step;
    for (; varint >= 128; varint >>= 7) event[n++] = (unsigned char)(varint | 128);
    event[n++] = (unsigned char)varint;
    event[n++] = 5 << 3 | 2, event[n++] = (unsigned char)(tag_bytes + 9);                    // Summary
    event[n++] = 1 << 3 | 2, event[n++] = (unsigned char)(tag_bytes + 7);                    // Value
    event[n++] = 1 << 3 | 2, event[n++] = (unsigned char)tag_bytes;
    memcpy(event + n, tag, tag_bytes), n += tag_bytes;
    event[n++] = 2 << 3 | 5, memcpy(event + n, &number, 4), n += 4;
    event_write(f, event, n);
}

typedef struct { FILE *json, *events; } Log;                     // out/log.jsonl and out/events.out.tfevents.*

void log_flush(const Log *log) {
    CHECK(fflush(log->json) == 0 && fflush(log->events) == 0, "cannot write the logs: %s", strerror(errno));
}

// With resume_step > 0 the lines of later steps, from before a crash, are dropped.
Log log_open(const char *out, long resume_step) {
    const char *path = path_of("%s/log.jsonl", out);
    if (resume_step > 0 && file_exists(path)) {
        char *text = read_file(path, NULL);
        AtomicFile a = open_atomic(path);
        for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
            const char *step = strstr(line, "\"step\":");
            if (step && atoll(step + 7) <= resume_step) fprintf(a.file, "%s\n", line);
        }
        close_atomic(&a);
        free(text);
    }
    Log log = {fopen(path, "a"), NULL};
    CHECK(log.json != NULL, "cannot write %s: %s", path, strerror(errno));
    char host[64] = "host";
    gethostname(host, sizeof host - 1);
    path = path_of("%s/events.out.tfevents.%lld.%s", out, (long long)time(NULL), host);
    log.events = fopen(path, "wb");
    CHECK(log.events != NULL, "cannot write %s: %s", path, strerror(errno));
    unsigned char event[64];
    size_t n = event_begin(event);
    event[n++] = 3 << 3 | 2, event[n++] = 13, memcpy(event + n, "brain.Event:2", 13);
    event_write(log.events, event, n + 13);
    return log;
}

int compare_strings(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// The checkpoints step_NNNNNNNN of a run's directory, oldest first.
typedef struct { char **names; int count; } Names;
Names list_checkpoints(const char *out) {
    Names found = {NULL, 0};
    DIR *directory = opendir(out);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        if (strncmp(entry->d_name, "step_", 5) != 0 || strlen(entry->d_name) != 13) continue;
        found.names = (char **)xrealloc(found.names, (size_t)(found.count + 1) * sizeof(char *));
        found.names[found.count++] = strdup(entry->d_name);
    }
    if (directory) closedir(directory);
    if (found.count > 0) qsort(found.names, (size_t)found.count, sizeof(char *), compare_strings);
    return found;
}

// The newest checkpoint of a run's directory, or NULL.
const char *newest_checkpoint(const char *out) {
    Names names = list_checkpoints(out);
    return names.count > 0 ? path_of("%s/%s", out, names.names[names.count - 1]) : NULL;
}

// A directory that holds a model: `path` itself, or the newest checkpoint of the run `path`. NULL if neither.
const char *find_checkpoint(const char *path) {
    return file_exists(path_of("%s/config.json", path)) || is_adapter(path) ? path : newest_checkpoint(path);
}

void delete_directory(const char *path) {                        // and the files in it; ours hold no directories
    DIR *directory = opendir(path);
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) unlink(path_of("%s/%s", path, entry->d_name));
    if (directory) closedir(directory);
    rmdir(path);
}

void make_directory(const char *path) {                          // and the ones above it
    char partial[4096];
    for (const char *p = path; *p; p++) {
        bool ends = p[1] == '/' || p[1] == 0;
        if (!ends || *p == '/') continue;
        snprintf(partial, sizeof partial, "%.*s", (int)(p + 1 - path), path);
        CHECK(mkdir(partial, 0777) == 0 || errno == EEXIST, "cannot make the directory %s: %s", partial, strerror(errno));
    }
}

typedef struct {
    Model model;
    Tokenizer *tokenizer;
    const char *tokenizer_files;     // the directory that it comes from, if it has come with the model
    Loader train, val;
    bool has_val;
    Dpo dpo;                         // --task dpo; the arrays are reference of training and validation data
    double *train_reference, *val_reference;
    uint64_t reference_model;        // fingerprint of the reference model's weights
    const char *base;                // LoRA: the directory of the base model
    uint64_t base_model;             // and the fingerprint of its weights
    Log log;
    long step, steps;                // updates done, updates in all
    uint64_t position;               // rows of the training data used so far
    double loss_sum, loss_count;     // of the updates since the last printed line
    Preferences preferences;         // likewise
    char last_saved[4096];
} Run;

void trainer_json(const Run *run, const char *path) {
    FILE *f = create_file(path);
    fprintf(f, "{\n  \"step\": %ld,\n  \"steps\": %ld,\n  \"position\": %" PRIu64 ",\n", run->step, run->steps, run->position);
    fprintf(f, "  \"data_fingerprint\": \"%016" PRIx64 "\",\n", run->train.fingerprint);
    if (opt.task == TASK_DPO) fprintf(f, "  \"reference_model\": \"%016" PRIx64 "\",\n", run->reference_model);
    if (run->model.lora) fprintf(f, "  \"base_model\": \"%016" PRIx64 "\",\n", run->base_model);
    fprintf(f, "  \"options\": {");
    bool first = true;
    for (const Option *o = OPTIONS; o->name; o++) {
        char text[4096];
        if (!(o->commands & COMMAND_TRAIN) || o->type == OPTION_FLAG) continue;
        option_text(o, text, sizeof text);
        fprintf(f, "%s\n    \"%s\": ", first ? "" : ",", o->name);
        json_write_string(f, text, strlen(text));
        first = false;
    }
    fprintf(f, "\n  }\n}\n");
    close_file(f, path);
}

// Tokenizer files for transformers. Those of the directory `from` are taken as they are, so that a model keeps its chat template; where it
// has none (NULL, or Qwen v1's qwen.tiktoken, which needs code of its own) they are made from t.
void save_tokenizer(const Tokenizer *t, const char *from, const char *to) {
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                                        "special_tokens_map.json", "chat_template.jinja", NULL};
    bool whole = from && file_exists(path_of("%s/%s", from, names[1])) &&
                 (file_exists(path_of("%s/%s", from, names[0])) || file_exists(path_of("%s/%s", from, names[2])));
    if (!whole) tokenizer_save_hf(t, to);
    for (int i = 0; whole && names[i]; i++) {
        const char *path = path_of("%s/%s", from, names[i]);
        if (!file_exists(path)) continue;
        size_t size;
        char *data = read_file(path, &size);
        path = path_of("%s/%s", to, names[i]);
        FILE *f = create_file(path);
        fwrite(data, 1, size, f);
        close_file(f, path);
        free(data);
    }
}

// Configuration, weights and tokenizer for transformers. t may be NULL: no tokenizer.
void save_model(const Model *m, const Tokenizer *t, const char *tokenizer_from, int end_id, const char *to, Dtype dtype) {
    config_save(&m->config, path_of("%s/config.json", to), dtype, end_id);
    if (t) {
        const char *path = path_of("%s/generation_config.json", to);
        FILE *f = create_file(path);
        fprintf(f,
                "{\n  \"eos_token_id\": [%d, %d],\n  \"pad_token_id\": %d,\n  \"do_sample\": true,\n"
                "  \"temperature\": %g,\n  \"top_p\": %g\n}\n",
                t->im_end, t->endoftext, t->endoftext, opt.temperature, opt.top_p);
        close_file(f, path);
        save_tokenizer(t, tokenizer_from, to);
    }
    model_save(m, to, dtype);
}

// out/step_NNNNNNNN, a Hugging Face directory (with LoRA an adapter's), and beside it AdamW's moments (and fp32 weights, if the saved ones
// are bf16) and trainer.json.
// It is written under another name, flushed to the disk and renamed: a kill or a full disk leaves the checkpoints before it whole.
void save_checkpoint(Run *run) {
    Model *m = &run->model;
    Dtype dtype = (Dtype)opt.save_dtype;
    char final[4096], unfinished[4096];
    snprintf(final, sizeof final, "%s/step_%08ld", opt.out, run->step);
    if (strcmp(final, run->last_saved) == 0) return;
    machine_download(m);
    Trained t = trained(m);
    CHECK(isfinite(gradient_norm(t.params, t.table->num_params)), "the weights are not finite after update %ld; not saved. "
          "Last checkpoint: %s", run->step, run->last_saved[0] ? run->last_saved : "none");
    snprintf(unfinished, sizeof unfinished, "%s/unfinished", opt.out);
    delete_directory(unfinished);
    make_directory(unfinished);
    const char *tokenizer_from = run->last_saved[0] ? run->last_saved : run->tokenizer_files;
    if (m->lora) {
        adapter_save(m, run->base, unfinished);
        save_tokenizer(run->tokenizer, tokenizer_from, unfinished);
    } else {
        save_model(m, run->tokenizer, tokenizer_from, (int)run->train.shards[0].header->end_id, unfinished, dtype);
    }
    Block blocks[] = {{"m.", t.m}, {"v.", t.v}, {"master.", t.params}};
    bool is_exact = m->lora || dtype == F32;
    write_safetensors(path_of("%s/optimizer.safetensors", unfinished), t.table, 0, t.table->count, blocks, is_exact ? 2 : 3, F32);
    trainer_json(run, path_of("%s/trainer.json", unfinished));
    sync_directory(unfinished);
    delete_directory(final);                                     // only there if this step is reached a second time
    CHECK(rename(unfinished, final) == 0, "cannot rename %s to %s: %s", unfinished, final, strerror(errno));
    sync_directory(opt.out);
    memcpy(run->last_saved, final, sizeof final);
    Names names = list_checkpoints(opt.out);
    for (int i = 0; opt.keep > 0 && i < names.count - opt.keep; i++) delete_directory(path_of("%s/%s", opt.out, names.names[i]));
    printf("saved %s\n", final);
}

// Puts weights, moments, step and position back, and says which options differ from those of the interrupted run.
void resume_checkpoint(Run *run, const char *from) {
    Model *m = &run->model;
    const char *path = path_of("%s/trainer.json", from);
    Json *json = read_json(path);
    StoredTensors stored = safetensors_open(from, "optimizer");
    Trained t = trained(m);
    load_tensors(&stored, from, t.table, t.m, "m.", false);
    load_tensors(&stored, from, t.table, t.v, "v.", false);
    char master[128];
    snprintf(master, sizeof master, "master.%s", m->table.list[0].name);
    if (safetensors_find(&stored, master)) load_tensors(&stored, from, &m->table, m->params_memory, "master.", false);
    safetensors_close(&stored);
    run->step = (long)config_whole(json, path, "step", 1, INT32_MAX);
    run->position = (uint64_t)config_whole(json, path, "position", 0, 9e15);
    const Json *print = json_get(json, "data_fingerprint"), *options = json_get(json, "options");
    const Json *reference = json_get(json, "reference_model");
    char fingerprint[32];
    snprintf(fingerprint, sizeof fingerprint, "%016" PRIx64, run->train.fingerprint);
    CHECK((opt.task == TASK_DPO) == (reference != NULL),
          "%s comes from another --task; to go on with this one, start from its weights: --model %s", from, from);
    if (reference && reference->type == JSON_STRING) run->reference_model = strtoull(reference->text, NULL, 16);
    CHECK(print && print->type == JSON_STRING && strcmp(print->text, fingerprint) == 0,
          "%s was trained on other data than %s; to go on with other data, start from its weights: --model %s", from, opt.data, from);
    for (const Option *o = OPTIONS; o->name; o++) {
        const Json *before = json_get(options, o->name);
        char text[4096];
        if (!before || before->type != JSON_STRING || strcmp(option_text(o, text, sizeof text), before->text) == 0) continue;
        CHECK(strcmp(o->name, "seq") != 0 && strcmp(o->name, "seed") != 0, "--%s was %s in %s, it must stay so on --resume", o->name,
              before->text, from);
        printf("resume: --%s was %s, is now %s\n", o->name, before->text, text);
    }
    json_free(json);
    snprintf(run->last_saved, sizeof run->last_saved, "%s", from);
    printf("resumed %s at update %ld\n", from, run->step);
}

// DPO's reference model is the one that training begins with, and all that is needed of it is log p of every answer. This is computed once
// and kept in a file beside the data, so that no second model stays in memory and the next run with the same model and data begins at
// once. The file is named by all that its numbers depend on.
typedef struct { char magic[8]; uint64_t model, data, documents, T, checksum; char precision[8]; } ReferenceHeader;

// The numbers in the file `path` if they are those that `wanted` names, else NULL.
double *reference_read(const char *path, ReferenceHeader wanted) {
    if (!file_exists(path)) return NULL;
    size_t size, bytes = wanted.documents * sizeof(double);
    char *data = read_file(path, &size);
    double *log_p = (double *)xmalloc(bytes);
    bool fits = size == sizeof wanted + bytes;
    if (fits) {
        memcpy(log_p, data + sizeof wanted, bytes);
        wanted.checksum = fnv1a(FNV_START, data + sizeof wanted, bytes);
        fits = memcmp(data, &wanted, sizeof wanted) == 0;
    }
    free(data);
    if (fits) return log_p;
    printf("note: %s is damaged, or of another model or other data; computing it again\n", path);
    free(log_p);
    return NULL;
}

double *reference_compute(Run *run, const Loader *l) {
    Model *m = &run->model;
    Batch batch;
    batch_alloc(&batch, m->B, m->T);
    run->dpo.measuring = true;
    run->dpo.reference = (double *)xmalloc(l->num_documents * sizeof(double));
    double last_line = now_s();
    for (uint64_t row = 0; row < l->num_rows; row += (uint64_t)m->B) {
        CHECK(!stop_requested, "stopped by a signal while the reference model's log-probabilities were computed; nothing was trained yet");
        int B = l->num_rows - row < (uint64_t)m->B ? (int)(l->num_rows - row) : m->B;
        loader_rows(l, row, B, &batch);
        machine_loss(m, &batch, B, m->T);
        if (now_s() - last_line < 5) continue;
        last_line = now_s();
        printf("reference %" PRIu64 " of %" PRIu64 " rows\n", row + (uint64_t)B, l->num_rows);
        fflush(stdout);
    }
    run->dpo.measuring = false;
    batch_free(&batch);
    for (uint64_t d = 0; d < l->num_documents; d++)
        CHECK(isfinite(run->dpo.reference[d]), "the model gives answer %" PRIu64 " of %s a log-probability of %g; its weights are damaged",
              d, l->shards[0].path, run->dpo.reference[d]);
    return run->dpo.reference;
}

// Reads or computes the numbers for all documents of the loader. A resumed run's model is no longer the reference: then the file must
// be there.
double *reference_open(Run *run, const Loader *l) {
    uint64_t T = l->num_cut + l->num_dropped > 0 ? (uint64_t)l->T : 0;               // where rows end matters if something is cut there
    ReferenceHeader header = {"QWENREF", run->reference_model, l->fingerprint, l->num_documents, T, 0, PRECISION};
    const char *slash = strrchr(l->shards[0].path, '/');
    const char *path = path_of("%.*sreference_%016" PRIx64 ".f64", slash ? (int)(slash + 1 - l->shards[0].path) : 0, l->shards[0].path,
                               fnv1a(FNV_START, (const char *)&header, sizeof header));
    double *log_p = reference_read(path, header);
    if (log_p) return printf("reference from %s\n", path), log_p;
    CHECK(!opt.resume, "%s is gone: the reference model's log-probabilities. A fresh run with the same --model, --data, --val and --seq "
          "and another --out makes it again; then resume", path);
    const char *directory = path_of("%.*s", slash ? (int)(slash - l->shards[0].path) : 1, slash ? l->shards[0].path : ".");
    CHECK(access(directory[0] ? directory : "/", W_OK) == 0, "cannot write into %s (%s), where %s is to be kept, the reference model's "
          "log-probabilities; copy the data into a directory of yours", directory, strerror(errno), path);
    printf("reference log-probabilities of %" PRIu64 " answers, once for this model and data: %s\n", l->num_documents, path);
    fflush(stdout);
    log_p = reference_compute(run, l);
    AtomicFile a = open_atomic(path);
    header.checksum = fnv1a(FNV_START, (const char *)log_p, l->num_documents * sizeof(double));
    fwrite(&header, sizeof header, 1, a.file), fwrite(log_p, sizeof(double), l->num_documents, a.file);
    close_atomic(&a);
    return log_p;
}

void dpo_open(Run *run) {
    run->model.dpo = &run->dpo;
    run->dpo.beta = opt.beta, run->dpo.smoothing = opt.label_smoothing;
    run->train_reference = reference_open(run, &run->train);
    if (run->has_val) run->val_reference = reference_open(run, &run->val);
}

// Mean loss over the validation data, at most --eval-tokens of it. Changes nothing that training depends on.
double evaluate(Run *run) {
    Model *m = &run->model;
    uint64_t rows = (uint64_t)opt.eval_tokens / (uint64_t)m->T + 1;
    if (rows > run->val.num_rows) rows = run->val.num_rows;
    Batch batch;
    batch_alloc(&batch, m->B, m->T);
    double loss = 0, counted = 0;
    run->dpo.reference = run->val_reference;
    memset(&run->dpo.seen, 0, sizeof run->dpo.seen);
    for (uint64_t row = 0; row < rows && !stop_requested; row += (uint64_t)m->B) {
        int B = rows - row < (uint64_t)m->B ? (int)(rows - row) : m->B;
        counted += loader_rows(&run->val, row, B, &batch);
        loss += machine_loss(m, &batch, B, m->T);
    }
    batch_free(&batch);
    CHECK(counted > 0 || stop_requested, "%s holds no token to be judged on, only prompts", run->val.shards[0].path);
    CHECK(isfinite(loss), "the validation loss is not finite after update %ld. Last checkpoint: %s", run->step,
          run->last_saved[0] ? run->last_saved : "none");
    return loss / counted;
}

// Continues the beginnings of `count` documents of the validation (or training) data, to show what the model has learnt.
void print_samples(Run *run, int count) {
    const Loader *l = run->has_val ? &run->val : &run->train;
    Sampler sampler = sampler_of_options();
    Sequence sequence = {};
    for (int i = 0; i < count && !stop_requested; i++) {
        uint64_t seed = mix64((uint64_t)opt.seed ^ 0x5A3B1E) + (uint64_t)(run->step * 16 + i);
        int room = l->packed || run->model.T < 16 ? run->model.T / 2 : 8, *tokens = (int *)xmalloc((size_t)(room + 1) * sizeof(int));
        int n = loader_document_start(l, mix64(seed), tokens, room);
        if (n == 0) return;                                      // rows too short for a prompt and an answer
        Printer printer = {run->tokenizer, {}, stdout};
        printf("sample: ");
        for (int k = 0; k < n; k++) print_token(&printer, tokens[k]);
        printf(" | ");
        sequence_set(&sequence, tokens, n);
        generate(&run->model, &sequence, run->tokenizer, 100, &sampler, seed, print_token, &printer);
        printf("\n");                                            // a character cut at the end is not shown
        free(tokens);
    }
    free(sequence.tokens);
}

// Matrix multiplications of forward (2 per weight) and backward (4 per weight), and causal attention: 6 T NH HD a layer.
size_t matmul_params(const Config *c) {
    return (size_t)c->L * ((size_t)(qkv_width(c) + c->NH * c->HD) * (size_t)c->C + 3 * (size_t)c->C * (size_t)c->I) +
           (size_t)c->V * (size_t)c->C;
}
double flops_per_token(const Config *c, int T) { return 6.0 * (double)matmul_params(c) + 6.0 * c->L * (double)T * c->NH * c->HD; }

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 13. Training

const Preset *find_preset(const char *name) {
    for (int i = 0; i < NUM_PRESETS; i++) if (strcmp(PRESETS[i].name, name) == 0) return &PRESETS[i];
    return NULL;
}

Config config_of_model(const char *model, const char **checkpoint) {
    const Preset *preset = find_preset(model);
    *checkpoint = preset ? NULL : find_checkpoint(model);
    if (preset) return preset->config;
    char names[512] = "";
    for (int i = 0; i < NUM_PRESETS; i++)
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "", PRESETS[i].name);
    CHECK(*checkpoint, "--model %s is neither a directory with a config.json nor a preset (%s)", model, names);
    return model_config(*checkpoint, NULL);
}

LoraOptions lora_options(void) {
    LoraOptions o = {(int)opt.lora_rank, (float)(opt.lora_alpha > 0 ? opt.lora_alpha : 2.0 * (double)opt.lora_rank), 0};
    CHECK(opt.lora_rank <= MOST_LORA_RANK, "--lora-rank is %ld, it must be at most %d", opt.lora_rank, MOST_LORA_RANK);
    if (strcmp(opt.lora_targets, "all") == 0) o.targets = (1u << NUM_LORA_TARGETS) - 1;
    else
        for (const char *at = opt.lora_targets; *at;) {
            size_t length = strcspn(at, ",");
            int i = 0;
            while (i < NUM_LORA_TARGETS && (strlen(LORA_TARGETS[i]) != length || strncmp(at, LORA_TARGETS[i], length) != 0)) i++;
            CHECK(i < NUM_LORA_TARGETS, "--lora-targets: '%.*s' is none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
                  (int)length, at);
            o.targets |= 1u << i;
            at += length + (at[length] == ',');
        }
    CHECK(o.rank == 0 || o.targets != 0, "--lora-targets is empty; there must be something to train");
    return o;
}

// The default run makes its own data: a small corpus about Chinese geography, history, science and words (dev/data/tiny_baike).
#define DEFAULT_DATA "data/tiny_baike"
void make_default_data(void) {
    if (file_exists(DEFAULT_DATA "/train.bin")) return;
    CHECK(file_exists("Makefile") && file_exists("dev/data/tiny_baike"),
          "there is no %s here; run ./" PROGRAM " in its source directory, or name your data with --data", DEFAULT_DATA);
    printf("no %s yet: making it (make tiny_baike)\n", DEFAULT_DATA);
    fflush(stdout);
    CHECK(system("make -s tiny_baike") == 0 && file_exists(DEFAULT_DATA "/train.bin"), "'make tiny_baike' failed; its message is above");
}

bool has_tokenizer(const char *directory) {
    static const char *const names[] = {"tokenizer.json", "tokenizer.bin", "qwen.tiktoken", "vocab.json", NULL};
    for (int i = 0; names[i]; i++) if (file_exists(path_of("%s/%s", directory, names[i]))) return true;
    return false;
}

// Special tokens are those that the directory's tokenizer names; qwen.tiktoken comes with Qwen v1, whose own are others.
Tokenizer *model_tokenizer(const char *directory) {
    Tokenizer *t = tokenizer_load(directory);
    bool v1_only = !file_exists(path_of("%s/tokenizer.json", directory)) && file_exists(path_of("%s/qwen.tiktoken", directory));
    if (v1_only) tokenizer_use_specials(t, "v1");
    return t;
}

// The tokenizer that made the data stands beside it; else the model's own is used. All must agree.
Tokenizer *open_tokenizer(const Shard *shard, const char *checkpoint) {
    const char *slash = strrchr(shard->path, '/');
    const char *beside = path_of("%.*stokenizer.bin", slash ? (int)(slash + 1 - shard->path) : 0, shard->path);
    bool model_has_one = checkpoint && has_tokenizer(checkpoint);
    const char *from = model_has_one ? checkpoint : file_exists(beside) ? beside : "dev/data/qwen.bin";
    CHECK(file_exists(from), "no tokenizer for %s: there is none beside it, none with the model, and no %s here", shard->path, from);
    Tokenizer *t = model_has_one ? model_tokenizer(from) : tokenizer_load(from);
    CHECK(t->hash == shard->header->tokenizer_hash, "%s was not made with the tokenizer of %s; prepare it again, with --tokenizer %s",
          shard->path, from, from);
    if (checkpoint && !model_has_one) printf("note: %s has no tokenizer files; taking the data's for the model's\n", checkpoint);
    return t;
}

void open_val(Run *run, Task task, int vocab_size, bool doc_mask) {
    const char *from = opt.val[0] ? opt.val : opt.data;
    struct stat st;
    if (!opt.val[0] && !(stat(opt.data, &st) == 0 && S_ISDIR(st.st_mode))) return;
    run->has_val = loader_find(&run->val, from, "val") > 0;
    CHECK(run->has_val || !opt.val[0], "--val %s: no such token files", opt.val);
    if (!run->has_val) return;
    CHECK(run->val.shards[0].header->tokenizer_hash == run->train.shards[0].header->tokenizer_hash,
          "%s and %s come from different tokenizers; prepare both with the same one", run->val.shards[0].path, run->train.shards[0].path);
    loader_open(&run->val, task, (int)opt.seq, vocab_size, doc_mask, false, 0);
    CHECK(run->val.num_rows > 0, "%s has %" PRIu64 " tokens, one row of --seq %ld needs %ld", run->val.shards[0].path,
          run->val.num_tokens, opt.seq, opt.seq + 1);
}

// Replaces automatic options by numbers, and refuses combinations that can't work. Sizes are known once the loader is open.
void resolve_options(Run *run, bool from_checkpoint) {
    long micro_tokens = opt.batch * opt.seq;
    if (opt.total_batch > 0) {
        CHECK(opt.total_batch % micro_tokens == 0, "--total-batch %ld is not a multiple of --batch x --seq = %ld", opt.total_batch,
              micro_tokens);
        opt.accum = opt.total_batch / micro_tokens;
    }
    uint64_t have = run->train.num_rows;
    double needed = (double)opt.batch * (double)opt.accum;
    CHECK(needed <= (double)have,
          "%s has %" PRIu64 " tokens, enough for %" PRIu64 " rows of --seq %ld; one update of --batch %ld x --accum %ld needs %.0f "
          "rows, so it needs %.0f tokens or more",
          opt.data, run->train.num_tokens, have, opt.seq, opt.batch, opt.accum, needed, needed * (double)opt.seq + 1);
    double updates = floor((double)have * (double)opt.epochs / needed);
    CHECK(updates <= INT32_MAX, "--epochs %ld would be %.0f updates; at most %d are possible", opt.epochs, updates, INT32_MAX);
    run->steps = opt.steps > 0 ? opt.steps : (long)updates;
    if (opt.warmup < 0) opt.warmup = run->steps / 20 < 1000 ? run->steps / 20 : 1000;
    CHECK(opt.warmup < run->steps, "--warmup %ld leaves nothing of the %ld updates", opt.warmup, run->steps);
    CHECK(opt.min_lr <= 1, "--min-lr %g is a fraction of --lr, at most 1", opt.min_lr);
    CHECK((float)opt.beta1 < 1 && (float)opt.beta2 < 1, "--beta1 %g and --beta2 %g must be below 1", opt.beta1, opt.beta2);
    CHECK((float)opt.eps > 0, "--eps is %g; as a 32-bit number it must be above 0", opt.eps);
    CHECK(isfinite((float)opt.lr) && isfinite((float)opt.weight_decay), "--lr %g or --weight-decay %g is beyond 32-bit numbers", opt.lr,
          opt.weight_decay);
    CHECK(opt.task == TASK_DPO || (!was_given(&opt.beta) && !was_given(&opt.label_smoothing)),
          "--beta and --label-smoothing are part of --task dpo; this is --task %s", TRAIN_TASKS[opt.task]);
    CHECK(opt.lora_rank == 0 || opt.save_dtype == F32, "--save-dtype bf16: adapters are kept in fp32, they are small");
    CHECK(opt.beta > 0, "--beta is %g, it must be above 0", opt.beta);
    CHECK(opt.label_smoothing < 0.5, "--label-smoothing is %g, it must be below 0.5: then no label says anything", opt.label_smoothing);
    if (opt.lr != 0) return;
    if (strcmp(opt.model, "tiny") == 0) opt.lr = 2.5e-3;
    else if (!from_checkpoint) opt.lr = 1e-4;
    else opt.lr = (opt.task == TASK_DPO ? 1e-6 : 1e-5) * (opt.lora_rank > 0 ? 10 : 1);
}

// --model, --data and --val of the interrupted run, where they are not given again.
void resume_paths(const char *checkpoint) {
    const char *path = path_of("%s/trainer.json", checkpoint);
    CHECK(file_exists(path), "%s has no trainer.json, so it can't be resumed; to start from its weights use --model %s", checkpoint,
          checkpoint);
    const Json *options = json_get(read_json(path), "options");
    const char *names[] = {"model", "data", "val"}, **values[] = {&opt.model, &opt.data, &opt.val};
    const Json *model = json_get(options, "model");
    CHECK(!was_given(&opt.model) || !model || model->type != JSON_STRING || strcmp(model->text, opt.model) == 0, "--resume goes on with the "
          "weights in %s, which began as %s; leave out --model %s", checkpoint, model->text, opt.model);
    for (int i = 0; i < 3; i++) {
        const Json *stored = json_get(options, names[i]);
        if (*values[i][0] == 0 && stored && stored->type == JSON_STRING) *values[i] = stored->text;
    }
}

// More than the machine's memory is refused at once, not killed later.
void check_memory(const Config *c) {
    LoraOptions lora = lora_options();
    MemoryPlan plan = machine_plan(c, (int)opt.batch, (int)opt.seq, (Recompute)opt.recompute, &lora);
    double bytes = plan.weights + plan.gradients + plan.moments + plan.activations, machine = machine_memory();
    CHECK(machine <= 0 || bytes < machine, "this run needs %.1f GB, the machine has %.1f; a smaller --batch or --seq, --recompute 2, "
          "--lora-rank 16 or a smaller model needs less (./" PROGRAM " info)", bytes * 1e-9, machine * 1e-9);
}

// With --lora-rank, or where an adapter is resumed: finds the base. A resumed adapter brings its own options.
void run_lora(Run *run, const char *checkpoint) {
    bool given = was_given(&opt.lora_rank) || was_given(&opt.lora_alpha) || was_given(&opt.lora_targets);
    CHECK(!given || opt.lora_rank > 0 || opt.resume, "--lora-alpha and --lora-targets need --lora-rank; without it all weights are trained");
    if (!opt.resume && opt.lora_rank == 0) return;
    CHECK(checkpoint, "--lora-rank needs a trained model: name a checkpoint with --model");
    if (!opt.resume) {
        bool v1;
        model_config(checkpoint, &v1);
        CHECK(!is_adapter(checkpoint), "--model %s is itself an adapter; --resume goes on with it, or ./" PROGRAM " export merges it first",
              opt.model);
        CHECK(!v1, "--model %s is a Qwen v1 model, for which PEFT has no names; ./" PROGRAM " export makes it a qwen2 first", opt.model);
        char *base = realpath(checkpoint, NULL);
        CHECK(base, "%s: %s", checkpoint, strerror(errno));
        run->base = base;
        opt.lora_alpha = (double)lora_options().alpha;
        return;
    }
    CHECK(is_adapter(checkpoint) || !given, "%s is no adapter, but an option of --lora is given", checkpoint);
    if (!is_adapter(checkpoint)) return;
    LoraOptions wanted = lora_options(), o;
    run->base = adapter_config(checkpoint, &o);
    bool rank_fits = !was_given(&opt.lora_rank) || wanted.rank == o.rank;
    bool alpha_fits = !was_given(&opt.lora_alpha) || (float)opt.lora_alpha == o.alpha;
    CHECK(rank_fits && alpha_fits && (!was_given(&opt.lora_targets) || wanted.targets == o.targets),
          "%s has adapters of rank %d and alpha %g; they and their targets must stay so on --resume", checkpoint, o.rank, (double)o.alpha);
    char targets[128] = "";
    bool all = o.targets == (1u << NUM_LORA_TARGETS) - 1;
    for (int i = 0; i < NUM_LORA_TARGETS && !all; i++)
        if (o.targets >> i & 1)
            snprintf(targets + strlen(targets), sizeof targets - strlen(targets), "%s%s", targets[0] ? "," : "", LORA_TARGETS[i]);
    opt.lora_rank = o.rank, opt.lora_alpha = (double)o.alpha, opt.lora_targets = all ? "all" : path_of("%s", targets);
}

// Opens data, tokenizer and model; allocates; initialises, loads or resumes. Whatever can be refused is refused before memory is taken.
void run_open(Run *run) {
    const char *checkpoint = opt.resume ? newest_checkpoint(opt.out) : NULL;         // where weights come from, NULL: random
    CHECK(!opt.resume || checkpoint, "--resume: %s holds no checkpoint", opt.out);
    if (opt.resume) resume_paths(checkpoint);
    bool is_default = opt.model[0] == 0 && opt.data[0] == 0;
    if (opt.model[0] == 0) opt.model = "tiny";
    if (opt.data[0] == 0) {
        CHECK(is_default, "--model is given, but not --data; prepare some with ./prepare, or take --data " DEFAULT_DATA);
        make_default_data();
        opt.data = DEFAULT_DATA;
    }
    Config config = opt.resume ? model_config(checkpoint, NULL) : config_of_model(opt.model, &checkpoint);
    run_lora(run, checkpoint);
    CHECK(loader_find(&run->train, opt.data, "train") > 0, "--data %s: no such token files; make some with ./prepare", opt.data);
    run->tokenizer = open_tokenizer(&run->train.shards[0], checkpoint);
    run->tokenizer_files = checkpoint;
    if (config.V == 0) config.V = (run->tokenizer->vocab_size + 63) / 64 * 64;
    CHECK(opt.seq <= config.max_T, "--seq %ld is longer than the model's %d positions", opt.seq, config.max_T);
    CHECK(opt.batch * opt.seq < INT32_MAX / 8, "--batch x --seq is %ld: too large", opt.batch * opt.seq);

    Task task = (Task)opt.task;
    bool doc_mask = opt.doc_mask == AUTO ? task != TASK_PRETRAIN : opt.doc_mask == ON;
    CHECK(task != TASK_DPO || doc_mask, "--doc-mask off: in dpo the rejected answer would see the chosen one");
    CHECK(task != TASK_DPO || checkpoint, "--task dpo needs a trained model: name a checkpoint with --model");
    loader_open(&run->train, task, (int)opt.seq, config.V, doc_mask, true, (uint64_t)opt.seed);
    open_val(run, task, config.V, doc_mask);
    resolve_options(run, !find_preset(opt.model));
    check_memory(&config);
    Model *m = &run->model;
    model_alloc(m, &config);
    if (checkpoint) model_load(m, run->base ? run->base : checkpoint);
    else init_params(m->params_memory, &config, &m->table, (uint64_t)opt.seed);
    if (task == TASK_DPO && !opt.resume) run->reference_model = weights_fingerprint(m);
    if (run->base) {
        LoraOptions lora = lora_options();
        run->base_model = weights_fingerprint(m);
        lora_attach(m, &lora, (uint64_t)opt.seed);
        if (opt.resume) adapter_load(m, checkpoint);
    }
    model_alloc_moments(m);
    if (opt.resume) resume_checkpoint(run, checkpoint);
    CHECK(run->step < run->steps, "%s is complete: %ld updates; a larger --steps or --epochs goes on", opt.out, run->step);
    machine_open(m, (int)opt.batch, (int)opt.seq, (int)(opt.batch * opt.accum), (int)opt.seq, (Recompute)opt.recompute, TRAIN);
}

// Two runs in one directory would destroy each other, so a run holds a lock on it, which the system releases when it ends.
void lock_out(void) {
    const char *path = path_of("%s/lock", opt.out);
    int file = open(path, O_RDWR | O_CREAT, 0666);
    CHECK(file >= 0, "cannot write into --out %s: %s", opt.out, strerror(errno));
    CHECK(flock(file, LOCK_EX | LOCK_NB) == 0, "another run is writing into %s; wait for it, or choose another --out", opt.out);
}

// --out without slashes at its end.
void check_out(void) {
    char *out = strcpy((char *)xmalloc(strlen(opt.out) + 1), opt.out);
    for (size_t n = strlen(out); n > 1 && out[n - 1] == '/'; n--) out[n - 1] = 0;
    opt.out = out;
    CHECK(out[0] && strcmp(out, ".") != 0 && strcmp(out, "..") != 0 && strcmp(out, "/") != 0, "--out '%s': name a directory of its own",
          out);
}

bool is_inside(const char *path, const char *directory) {
    char *a = realpath(path, NULL), *b = realpath(directory, NULL);
    size_t n = b ? strlen(b) : 0;
    bool inside = a && b && strncmp(a, b, n) == 0 && (a[n] == '/' || a[n] == 0);
    free(a), free(b);
    return inside;
}

// Makes --out this run's own. What is already there is moved aside, never written over.
void claim_out(void) {
    const char *out = opt.out;
    make_directory(out);
    lock_out();
    static const char *const files[] = {"log.jsonl", "config.json", "adapter_config.json", NULL};
    bool in_use = newest_checkpoint(out) != NULL;
    for (int i = 0; files[i]; i++) in_use = in_use || file_exists(path_of("%s/%s", out, files[i]));
    if (opt.resume || !in_use) return;
    CHECK(!is_inside(opt.model, out) && !is_inside(opt.data, out), "--model %s or --data %s lies in --out %s, which a new run moves aside; "
          "choose another --out", opt.model, opt.data, out);
    int n = 1;
    while (file_exists(path_of("%s.%d", out, n))) n++;
    const char *aside = path_of("%s.%d", out, n);
    CHECK(rename(out, aside) == 0, "cannot rename %s to %s: %s", out, aside, strerror(errno));
    printf("%s held an earlier run; moved to %s\n", out, aside);
    make_directory(out);
    lock_out();
}

const char *count_text(uint64_t count) {                         // 12345, 1.23M; two results may be in use
    static char text[2][32];
    static int next;
    char *to = text[next ^= 1];
    if (count < 100000) snprintf(to, sizeof text[0], "%" PRIu64, count);
    else snprintf(to, sizeof text[0], "%.2fM", (double)count / 1e6);
    return to;
}

void print_run(const Run *run) {
    const Config *c = &run->model.config;
    const Loader *l = &run->train;
    printf("model     %s: %d layers, width %d, %d/%d heads x %d, MLP %d, vocabulary %d: %.1fM parameters\n", opt.model, c->L, c->C,
           c->NH, c->NKV, c->HD, c->I, c->V, (double)run->model.table.num_params / 1e6);
    if (run->model.lora)
        printf("adapters  rank %ld, alpha %g on %s: %s parameters are trained\n", opt.lora_rank, opt.lora_alpha, opt.lora_targets,
               count_text(run->model.lora->table.num_params));
    printf("data      %s: %s tokens in %d file%s, %" PRIu64 " rows of %d", opt.data, count_text(l->num_tokens), l->num_shards,
           l->num_shards == 1 ? "" : "s", l->num_rows, l->T);
    if (run->has_val) printf("; validation %s tokens", count_text(run->val.num_tokens));
    if (l->num_cut > 0)
        printf("\n          %" PRIu64 " documents are longer than %d tokens and are cut there", l->num_cut, document_room(l));
    if (l->num_dropped > 0)
        printf("\n          %" PRIu64 " %s have no answer within %d tokens and are dropped", l->num_dropped,
               l->task == TASK_DPO ? "pairs" : "documents", document_room(l));
    printf("\nupdates   %ld of %ld tokens (--accum %ld x --batch %ld x --seq %ld); rate %g %s, warm-up %ld\n", run->steps,
           opt.accum * opt.batch * opt.seq, opt.accum, opt.batch, opt.seq, opt.lr, SCHEDULE_NAMES[opt.schedule], opt.warmup);
    printf("machine   %s\n\n", machine_text());
}

const char *time_text(double seconds) {
    static char text[32];
    int s = (int)(seconds + 0.5);
    if (s >= 3600) snprintf(text, sizeof text, "%dh%02dm", s / 3600, s / 60 % 60);
    else snprintf(text, sizeof text, "%dm%02ds", s / 60, s % 60);
    return text;
}

// One update. Without any target it changes nothing.
typedef struct { double loss, norm, lr, targets; } StepResult;
StepResult train_step(Run *run, const Batch *update) {
    Model *m = &run->model;
    StepResult r = {};
    int rows = m->B * (int)opt.accum;
    r.targets = loader_rows(&run->train, run->position, rows, update);
    r.lr = learning_rate((Schedule)opt.schedule, run->step + 1, run->steps, opt.warmup, opt.lr, opt.min_lr);
    AdamW adamw = {(float)r.lr, (float)opt.beta1, (float)opt.beta2, (float)opt.eps, (float)opt.weight_decay};
    Update u = {};
    run->dpo.reference = run->train_reference;
    memset(&run->dpo.seen, 0, sizeof run->dpo.seen);
    if (r.targets > 0) u = machine_update(m, update, rows, r.targets, &adamw, opt.clip, run->step + 1);
    r.loss = u.loss, r.norm = u.norm;
    if (!isfinite(r.loss) || !isfinite(r.norm))
        DIE("update %ld: the loss is %g and the gradient's norm %g, at row %" PRIu64 " of the data; stopped before they reach the weights. "
            "Last checkpoint: %s. Try a lower --lr, or look at the data there", run->step + 1, r.loss, r.norm, run->position,
            run->last_saved[0] ? run->last_saved : "none");
    run->step++;
    run->position += (uint64_t)rows;
    return r;
}

// In DPO: what validation or an update saw of its pairs, into the logs.
void log_preferences(Run *run, const char *prefix, const char *group) {
    const Preferences *p = &run->dpo.seen;
    if (p->pairs == 0) return;
    double means[] = {p->chosen / p->pairs, p->rejected / p->pairs, (p->chosen - p->rejected) / p->pairs, p->correct / p->pairs};
    static const char *const names[] = {"reward_chosen", "reward_rejected", "margin", "accuracy"};
    for (int i = 0; i < 4; i++) {
        fprintf(run->log.json, ",\"%s%s\":%.9g", prefix, names[i], means[i]);
        event_scalar(run->log.events, path_of("%s/%s", group, names[i]), run->step, means[i]);
    }
}

const char *preferences_text(const Preferences *p) {
    return path_of("rewards %.3f %.3f, margin %.3f, accuracy %.0f %%", p->chosen / p->pairs, p->rejected / p->pairs,
                   (p->chosen - p->rejected) / p->pairs, 100 * p->correct / p->pairs);
}

void report_step(Run *run, const StepResult *r, double seconds, double left_s, double peak) {
    double tokens = (double)(opt.batch * opt.accum * opt.seq), per_s = tokens / seconds;
    const Config *c = &run->model.config;
    double flops = flops_per_token(c, run->model.T) - (run->model.lora ? 2.0 * c->V * c->C : 0);         // no gradient of the head
    double percent = 100 * per_s * flops / peak;
    fprintf(run->log.json,
            "{\"step\":%ld,\"loss\":%.9g,\"norm\":%.9g,\"lr\":%.9g,\"%s\":%.0f", run->step, r->loss, r->norm, r->lr,
            opt.task == TASK_DPO ? "pairs" : "targets", r->targets);
    log_preferences(run, "", "train");
    fprintf(run->log.json, ",\"ms\":%.1f,\"tokens_per_s\":%.1f}\n", seconds * 1e3, per_s);
    event_scalar(run->log.events, "train/loss", run->step, r->loss);
    event_scalar(run->log.events, "train/grad_norm", run->step, r->norm);
    event_scalar(run->log.events, "train/learning_rate", run->step, r->lr);
    event_scalar(run->log.events, "train/tokens_per_s", run->step, per_s);
    log_flush(&run->log);
    if (r->targets == 0) printf("note: update %ld had no target to learn from, only prompts; nothing was changed\n", run->step);
    run->loss_sum += r->loss, run->loss_count++;
    Preferences *mean = &run->preferences, *seen = &run->dpo.seen;
    mean->pairs += seen->pairs, mean->chosen += seen->chosen, mean->rejected += seen->rejected, mean->correct += seen->correct;
    bool line = run->step % opt.log_every == 0 || run->step == 1 || run->step == run->steps, terminal = isatty(STDOUT_FILENO);
    if (!line && !terminal) return;
    printf("%supdate %*ld/%ld | loss %.4f | norm %6.3f | lr %.2e | ", terminal ? "\r" : "", run->steps < 1000 ? 3 : 6, run->step,
           run->steps, run->loss_sum / run->loss_count, r->norm, r->lr);
    if (mean->pairs > 0) printf("%s | ", preferences_text(mean));
    printf("%5.0f ms | %6.0f tok/s | %2.0f %% of peak | %s left%s", seconds * 1e3, per_s, percent, time_text(left_s),
           line ? "\n" : "\033[K");
    fflush(stdout);
    if (!line) return;
    run->loss_sum = run->loss_count = 0;
    memset(mean, 0, sizeof *mean);
}

void report_val(Run *run) {
    if (!run->has_val) return;
    double loss = evaluate(run);
    if (stop_requested) return;                                  // half a validation says nothing
    const char *terminal = isatty(STDOUT_FILENO) ? "\r\033[K" : "";
    if (run->dpo.seen.pairs > 0) printf("%svalidation loss %.4f, %s", terminal, loss, preferences_text(&run->dpo.seen));
    else printf("%svalidation loss %.4f (perplexity %.2f)", terminal, loss, exp(loss));
    float bigram = run->val.shards[0].header->bigram_loss;
    if (bigram > 0) printf("; a bigram model of the training data has %.4f", bigram);
    printf("\n");
    fprintf(run->log.json, "{\"step\":%ld,\"val_loss\":%.9g", run->step, loss);
    log_preferences(run, "val_", "val");
    fprintf(run->log.json, "}\n");
    event_scalar(run->log.events, "val/loss", run->step, loss);
    log_flush(&run->log);
}

void print_farewell(const Run *run, double seconds) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    double memory_mb = (double)usage.ru_maxrss / 1e6;
#else
    double memory_mb = (double)usage.ru_maxrss / 1e3;
#endif
    printf("\n%s in all, %.0f MB of memory at most. Try next:\n", time_text(seconds), memory_mb);
    if (run->step < run->steps) printf("  the same command with --resume                        # go on where this run stopped\n");
    const char *prompt = opt.task != TASK_PRETRAIN ? "$'<|im_start|>user\\n你好！<|im_end|>\\n<|im_start|>assistant\\n'" : "\"长江\"";
    printf("  ./" PROGRAM " generate --model %s --prompt %s        # continue a text of yours\n", opt.out, prompt);
    if (strcmp(opt.data, DEFAULT_DATA) == 0)
        printf("  ./" PROGRAM " --epochs 4 --out longer                  # train longer: the facts come later than the grammar\n");
    if (strcmp(opt.data, DEFAULT_DATA) == 0)
        printf("  ./prepare --out data/mine my_texts.jsonl              # token files of your own texts, then --data data/mine\n");
}

void train(void) {
    Run *run = (Run *)xcalloc(1, sizeof(Run));
    check_out();
    run_open(run);
    claim_out();
    run->log = log_open(opt.out, run->step);
    print_run(run);
    stop_by_signals();
    if (opt.task == TASK_DPO) dpo_open(run);
    double peak = machine_peak_flops(), begin = now_s();
    long first = run->step;
    Batch update;
    batch_alloc(&update, (int)(opt.batch * opt.accum), (int)opt.seq);
    while (run->step < run->steps && !stop_requested) {
        double start = now_s();
        StepResult r = train_step(run, &update);
        double now = now_s();
        report_step(run, &r, now - start, (now - begin) / (double)(run->step - first) * (double)(run->steps - run->step), peak);
        bool last = run->step == run->steps;
        if (!last && opt.eval_every > 0 && run->step % opt.eval_every == 0) report_val(run);
        if (!last && opt.sample_every > 0 && run->step % opt.sample_every == 0) print_samples(run, 1);
        if (!last && opt.save_every > 0 && run->step % opt.save_every == 0) save_checkpoint(run);
    }
    bool stopped = run->step < run->steps;
    CHECK(run->step > 0, "stopped by a signal before the first update; nothing was trained");
    if (stopped) printf("\nstopped by a signal after update %ld; go on with --resume\n", run->step);
    save_checkpoint(run);
    if (!stopped) report_val(run);
    if (!stopped && opt.sample_every > 0) print_samples(run, 3);
    print_farewell(run, now_s() - begin);
}

// ---------------------------------------------------------------------------------------------------------------------
// SECTION 14. info, generate, export, main

void print_info(void) {
    const char *checkpoint;
    if (opt.model[0] == 0) opt.model = "mini_llm_1.4b";
    Config c = config_of_model(opt.model, &checkpoint);
    bool assumed = c.V == 0;                                     // tiny: the data decides
    if (assumed) c.V = 4096;
    int B = (int)opt.batch, T = (int)opt.seq;
    CHECK(opt.batch * opt.seq < INT32_MAX / 8, "--batch x --seq is %ld: too large", opt.batch * opt.seq);
    TensorTable table = tensor_table(&c);
    double flops = flops_per_token(&c, T);
    LoraOptions lora = lora_options(), none = {};
    MemoryPlan plan = machine_plan(&c, B, T, (Recompute)opt.recompute, &lora);
    MemoryPlan all = machine_plan(&c, B, T, (Recompute)opt.recompute, &none);
    double saved = all.weights + all.gradients + all.moments - plan.weights - plan.gradients - plan.moments;
    double fixed = plan.weights + plan.gradients + plan.moments;
    if (opt.json) {
        printf("{\"model\":");
        json_write_string(stdout, opt.model, strlen(opt.model));
        printf(",\"parameters\":%zu,\"flops_per_token\":%.0f,\"batch\":%d,\"seq\":%d,\"recompute\":%d,",
               table.num_params, flops, B, T, opt.recompute);
        printf("\"parameters_bytes\":%.0f,\"gradients_bytes\":%.0f,\"optimizer_bytes\":%.0f,"
               "\"activations_bytes\":%.0f,\"total_bytes\":%.0f}\n",
               plan.weights, plan.gradients, plan.moments, plan.activations, fixed + plan.activations);
        return;
    }
    printf("%s\n\n  %-46s %-16s %12s  %s\n", opt.model, "tensor", "shape", "parameters", "decay");
    for (int k = 0; k < table.count; k++) {
        const TensorInfo *t = &table.list[k];
        char shape[64];
        if (t->layer > 0) continue;                              // layers are alike
        printf("  %-46s %-16s %12zu  %s\n", t->name, shape_text(shape, t->is_vector, t->rows, t->cols), t->rows * t->cols,
               t->decay == DECAY ? "yes" : "no");
    }
    printf("  %d layers like layer 0%s\n\n", c.L, assumed ? "; a vocabulary of 4096 is assumed, the data decides" : "");
    printf("parameters        %zu\n", table.num_params);
    printf(
        "FLOPs per token   %.4g  (forward and backward at --seq %d: 6 x %zu weights in matrices + attention 6 x %d x %d x %d x %d)\n",
        flops, T, matmul_params(&c), c.L, T, c.NH, c.HD);
    printf("\nmemory of ./" PROGRAM " (" PRECISION ") at --batch %d --seq %d, GB\n", B, T);
    printf("  weights     %8.3f    gradients  %8.3f    AdamW's m and v  %8.3f\n", plan.weights / 1e9, plan.gradients / 1e9,
           plan.moments / 1e9);
    for (int level = 0; level < 3; level++) {
        double activations = machine_plan(&c, B, T, (Recompute)level, &lora).activations;
        printf("  activations %8.3f    --recompute %d: %8.3f in all%s\n", activations / 1e9, level, (fixed + activations) / 1e9,
               level == opt.recompute ? "   <- chosen" : "");
    }
    if (lora.rank > 0) {
        Lora l = lora_layout(&c, &table, &lora);
        printf("adapters of rank %d on %s: %s parameters are trained, which takes %.3f GB less than to train all\n", lora.rank,
               opt.lora_targets, count_text(l.table.num_params), saved / 1e9);
        lora_free(&l);
    }
    free(table.list);
}

char *read_prompt_text(void) {
    size_t size = 0, room = 4096, n;
    char *text = (char *)xmalloc(room);
    while ((n = fread(text + size, 1, room - size - 1, stdin)) > 0)
        if ((size += n) + 1 == room) text = (char *)xrealloc(text, room *= 2);
    text[size] = 0;
    CHECK(!ferror(stdin), "cannot read the prompt from standard input: %s", strerror(errno));
    CHECK(strlen(text) == size, "the prompt on standard input has a NUL byte at %zu; expected text", strlen(text));
    return text;
}

// Loads the checkpoint --model (without one: out) and its tokenizer, for programs that only read it.
Tokenizer *open_checkpoint(Model *m) {
    const char *checkpoint;
    if (opt.model[0] == 0) opt.model = "out";
    CHECK(find_preset(opt.model) == NULL, "--model %s is a preset without weights; name a checkpoint", opt.model);
    config_of_model(opt.model, &checkpoint);
    Tokenizer *t = model_tokenizer(has_tokenizer(checkpoint) ? checkpoint : base_directory(checkpoint));
    model_load(m, checkpoint);
    CHECK(t->vocab_size <= m->config.V, "%s: the tokenizer has ids up to %d, but the model's vocabulary ends at %d; are these tokenizer "
          "files the model's?", checkpoint, t->vocab_size - 1, m->config.V - 1);
    return t;
}

void generate_text(void) {
    Sampler sampler = sampler_of_options();
    Model m = {};
    Tokenizer *tokenizer = open_checkpoint(&m);
    const char *prompt = was_given(&opt.prompt) ? opt.prompt : read_prompt_text();
    TokenList list = {NULL, 0, 0};
    tokenizer_encode(tokenizer, prompt, strlen(prompt), SPECIALS_PARSED, &list);
    CHECK(list.count > 0, "the prompt is empty; give some text with --prompt or on standard input");
    Sequence sequence = {};
    int max_T = m.config.max_T, count = (int)list.count;
    for (int i = 0; i < count; i++) sequence_push(&sequence, (int)list.ids[i]);
    CHECK(list.count < (size_t)max_T, "the prompt has %zu tokens, the model has %d positions", list.count, max_T);
    int positions = count + opt.max_tokens < max_T ? count + (int)opt.max_tokens : max_T;
    machine_open(&m, 1, positions < PROMPT_CHUNK ? positions : PROMPT_CHUNK, 1, positions, RECOMPUTE_LAYERS, EVALUATE);
    Printer printer = {tokenizer, {}, stdout};
    for (int i = 0; i < count && !opt.ids; i++) print_token(&printer, sequence.tokens[i]);
    generate(&m, &sequence, tokenizer, (int)opt.max_tokens, &sampler, (uint64_t)opt.seed, opt.ids ? print_id : print_token,
             opt.ids ? (void *)stdout : &printer);
    printf("\n");
}

// Any model that this program reads, as a directory that transformers reads without code of the model's own.
void export_model(void) {
    const char *checkpoint;
    if (opt.model[0] == 0) DIE("export: name a model with --model and a new directory with --out");
    check_out();
    CHECK(find_preset(opt.model) == NULL, "--model %s is a preset without weights; name a checkpoint", opt.model);
    CHECK(!file_exists(opt.out), "--out %s exists; export writes a new directory", opt.out);
    config_of_model(opt.model, &checkpoint);
    Model m = {};
    model_load(&m, checkpoint);
    const char *tokenizer_from = has_tokenizer(checkpoint) ? checkpoint : base_directory(checkpoint);
    Tokenizer *t = has_tokenizer(tokenizer_from) ? model_tokenizer(tokenizer_from) : NULL;
    const char *unfinished = path_of("%s.unfinished", opt.out);
    delete_directory(unfinished);
    make_directory(unfinished);
    save_model(&m, t, tokenizer_from, !t ? -1 : t->im_end >= 0 ? t->im_end : t->endoftext, unfinished, (Dtype)opt.save_dtype);
    sync_directory(unfinished);
    CHECK(rename(unfinished, opt.out) == 0, "cannot rename %s to %s: %s", unfinished, opt.out, strerror(errno));
    printf("wrote %s: %.1fM parameters in %s%s\n", opt.out, (double)m.table.num_params / 1e6, SAVE_DTYPES[opt.save_dtype],
           t ? "" : "; the model has no tokenizer files");
}

void print_help(void) {
    printf(PROGRAM " trains Qwen language models.\n\n"
           "  ./" PROGRAM " [train] [options]     train; without options a small model on a Chinese corpus\n"
           "  ./" PROGRAM " generate [options]    continue a text with a trained model\n"
           "  ./" PROGRAM " info [options]        parameters, FLOPs, memory\n"
           "  ./" PROGRAM " export [options]      write a model as a Hugging Face directory\n\nOptions of train (defaults in brackets):\n");
    print_options(OPTIONS, COMMAND_TRAIN);
    printf("\nOptions of generate:\n");
    print_options(OPTIONS, COMMAND_GENERATE);
    printf("\nOptions of info:\n");
    print_options(OPTIONS, COMMAND_INFO);
    printf("\nOptions of export:\n");
    print_options(OPTIONS, COMMAND_EXPORT);
    printf("\nPresets:");
    for (int i = 0; i < NUM_PRESETS; i++) printf(" %s", PRESETS[i].name);
    printf("\n");
}

// Idle OpenMP threads spin by default. Beside one busy program that makes an update twice as slow, beside several 20 times. Going to sleep
// at once costs the small default model a quarter of its speed; after 1000 rounds, some 20 us, it costs nothing, and a sixth beside a busy
// program. The runtime reads its settings before main, so the program starts itself once more (on Linux).
void sleep_when_idle(char **argv) {
    char self[4096];
    ssize_t length = getenv("OMP_WAIT_POLICY") ? -1 : readlink("/proc/self/exe", self, sizeof self - 1);
    if (length <= 0 || setenv("GOMP_SPINCOUNT", "1000", 0) != 0 || setenv("OMP_WAIT_POLICY", "passive", 1) != 0) return;
    self[length] = 0;
    execv(self, argv);
}

#ifndef QWEN_NO_MAIN
int main(int argc, char **argv) {
    sleep_when_idle(argv);
    bool has_command = argc > 1 && argv[1][0] != '-';
    const char *command = has_command ? argv[1] : "train";
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return print_help(), 0;
    if (strcmp(command, "train") == 0) {
        parse_options(OPTIONS, COMMAND_TRAIN, argc, argv, 1 + has_command, NULL);
        train();
    } else if (strcmp(command, "generate") == 0) {
        parse_options(OPTIONS, COMMAND_GENERATE, argc, argv, 2, NULL);
        generate_text();
    } else if (strcmp(command, "info") == 0) {
        parse_options(OPTIONS, COMMAND_INFO, argc, argv, 2, NULL);
        print_info();
    } else if (strcmp(command, "export") == 0) {
        parse_options(OPTIONS, COMMAND_EXPORT, argc, argv, 2, NULL);
        export_model();
    } else {
        DIE("unknown command '%s'; there are train, generate, info and export, and --help", command);
    }
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "cannot write the output: %s", strerror(errno));
    return 0;
}
#endif
