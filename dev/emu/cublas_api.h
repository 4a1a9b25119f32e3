// cublas_api.h: what cublasLt.h and cublas_v2.h share: types, error messages, and the multiplication itself on the CPU.
#pragma once
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <vector>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasComputeType_t {
    CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_32F_FAST_16F = 74, CUBLAS_COMPUTE_32F_FAST_16BF = 75, CUBLAS_COMPUTE_32F_FAST_TF32 = 77,  // of float inputs; exact here
};
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;

namespace emu {
// Says on stderr why the library would refuse a call, and returns its error code.
__attribute__((format(printf, 2, 3))) inline cublasStatus_t blas_refuse(cublasStatus_t status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "emu: cublas: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    return status;
}
#define EMU_BLAS_INVALID(...) emu::blas_refuse(CUBLAS_STATUS_INVALID_VALUE, __VA_ARGS__)
#define EMU_BLAS_UNSUPPORTED(...) emu::blas_refuse(CUBLAS_STATUS_NOT_SUPPORTED, __VA_ARGS__)
inline size_t type_bytes(int type) { return type == CUDA_R_32F ? 4 : 2; }
inline float load_number(const void *p, size_t i, int type) {
    if (type == CUDA_R_32F) return ((const float *)p)[i];
    return type == CUDA_R_16BF ? __bfloat162float(((const __nv_bfloat16 *)p)[i]) : __half2float(((const __half *)p)[i]);
}
inline void store_number(void *p, size_t i, int type, float x) {
    if (type == CUDA_R_32F) ((float *)p)[i] = x;
    else if (type == CUDA_R_16BF) ((__nv_bfloat16 *)p)[i] = __float2bfloat16(x);
    else ((__half *)p)[i] = __float2half(x);
}

#if defined(__AVX512F__)
enum { WIDTH = 16 };        // floats of one vector register
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
enum { TILE_ROWS = WIDTH, TILE_COLS = 8 };
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

// One tile of op(A) op(B), its sums in 8 registers: out (TILE_COLS, TILE_ROWS) = sum over k of a (k, TILE_ROWS), b (k, TILE_COLS)
inline void multiply_tile(Vector *out, const Vector *a, const float *b, size_t k) {
    Vector s0 = {}, s1 = {}, s2 = {}, s3 = {}, s4 = {}, s5 = {}, s6 = {}, s7 = {};
    for (size_t l = 0; l < k; l++, b += TILE_COLS) {
        Vector x = a[l];
        s0 += x * b[0], s1 += x * b[1], s2 += x * b[2], s3 += x * b[3], s4 += x * b[4], s5 += x * b[5], s6 += x * b[6], s7 += x * b[7];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3, out[4] = s4, out[5] = s5, out[6] = s6, out[7] = s7;
}
// to (k, width): numbers first.. of the matrix's outer side as floats, zeros from `end` on.
// along: distance of neighbours on the outer side; across: distance from one k to the next.
template <int width> void pack_tile(float *to, const void *p, int type, size_t first, size_t end, size_t along, size_t across, size_t k) {
    for (size_t l = 0; l < k; l++)
        for (size_t i = 0; i < width; i++) to[l * width + i] = first + i < end ? load_number(p, (first + i) * along + l * across, type) : 0;
}

// D (m,n) = alpha op(A) (m,k) op(B) (k,n) + beta C (m,n) + bias (m), all column major: element (i, j) lies at i + j ld.
// Products and sums are floats, summed in the order of k and rounded once: equal inputs give equal bits for any number of threads.
struct Gemm {
    bool transa, transb;
    size_t m, n, k, lda, ldb, ldc, ldd;
    int type_ab, type_cd;
    float alpha, beta;          // beta 0: C is not read
    const void *a, *b, *c, *bias;
    void *d;
};
inline void gemm(const Gemm &g) {
    size_t row_tiles = (g.m + TILE_ROWS - 1) / TILE_ROWS, col_tiles = (g.n + TILE_COLS - 1) / TILE_COLS;
    std::vector<Vector> a(row_tiles * g.k);
    std::vector<float> b(col_tiles * g.k * TILE_COLS);
#ifdef _OPENMP
    #pragma omp parallel if (g.m * g.n * g.k > 200000)
#endif
    {
#ifdef _OPENMP
        #pragma omp for
#endif
        for (size_t t = 0; t < row_tiles; t++)
            pack_tile<TILE_ROWS>((float *)&a[t * g.k], g.a, g.type_ab, t * TILE_ROWS, g.m, g.transa ? g.lda : 1, g.transa ? 1 : g.lda, g.k);
#ifdef _OPENMP
        #pragma omp for
#endif
        for (size_t u = 0; u < col_tiles; u++)
            pack_tile<TILE_COLS>(&b[u * g.k * TILE_COLS], g.b, g.type_ab, u * TILE_COLS, g.n, g.transb ? 1 : g.ldb,
                                 g.transb ? g.ldb : 1, g.k);
#ifdef _OPENMP
        #pragma omp for
#endif
        for (size_t u = 0; u < col_tiles; u++)
            for (size_t t = 0; t < row_tiles; t++) {
                Vector sum[TILE_COLS];
                multiply_tile(sum, &a[t * g.k], &b[u * g.k * TILE_COLS], g.k);
                for (size_t j = u * TILE_COLS; j < std::min(g.n, (u + 1) * TILE_COLS); j++)
                    for (size_t i = t * TILE_ROWS; i < std::min(g.m, (t + 1) * TILE_ROWS); i++) {
                        float x = g.alpha * sum[j % TILE_COLS][i % TILE_ROWS];
                        if (g.beta != 0) x += g.beta * load_number(g.c, i + j * g.ldc, g.type_cd);
                        if (g.bias != nullptr) x += load_number(g.bias, i, g.type_cd);
                        store_number(g.d, i + j * g.ldd, g.type_cd, x);
                    }
            }
    }
}
}
