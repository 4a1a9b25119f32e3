// cublas_v2.h: the two matrix multiplications that most CUDA programs call, on the CPU.   C = alpha op(A) op(B) + beta C, column major
#pragma once
#include <cublas_api.h>

struct emu_BlasHandle { cudaStream_t stream; };
typedef emu_BlasHandle *cublasHandle_t;
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 };
enum cublasMath_t { CUBLAS_DEFAULT_MATH = 0, CUBLAS_PEDANTIC_MATH = 2, CUBLAS_TF32_TENSOR_OP_MATH = 3 };       // all alike here: float

inline cublasStatus_t cublasCreate(cublasHandle_t *handle) { return *handle = new emu_BlasHandle{0}, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasDestroy(cublasHandle_t handle) { return delete handle, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) { return handle->stream = stream, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

inline cublasStatus_t cublasGemmEx(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k, const void *alpha,
    const void *a, cudaDataType_t a_type, int lda, const void *b, cudaDataType_t b_type, int ldb, const void *beta,
    void *c, cudaDataType_t c_type, int ldc, cublasComputeType_t, cublasGemmAlgo_t) {
    if (m < 0 || n < 0 || k < 0 || lda < std::max(1, transa ? k : m) || ldb < std::max(1, transb ? n : k) || ldc < std::max(1, m))
        return EMU_BLAS_INVALID("m %d, n %d, k %d with leading dimensions %d, %d, %d", m, n, k, lda, ldb, ldc);
    if (!alpha || !beta || !a || !b || !c) return EMU_BLAS_INVALID("a pointer is NULL");
    if (a_type != b_type || (c_type != a_type && c_type != CUDA_R_32F))
        return EMU_BLAS_UNSUPPORTED("no kernel for types A %d, B %d, C %d", a_type, b_type, c_type);
    emu::Gemm g = {transa != CUBLAS_OP_N, transb != CUBLAS_OP_N, (size_t)m, (size_t)n, (size_t)k,
                   (size_t)lda, (size_t)ldb, (size_t)ldc, (size_t)ldc, a_type, c_type,
                   *(const float *)alpha, *(const float *)beta, a, b, c, nullptr, c};
    emu::enqueue(handle->stream, "cublasGemmEx", [=] { emu::gemm(g); });
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSgemm(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k, const float *alpha,
    const float *a, int lda, const float *b, int ldb, const float *beta, float *c, int ldc) {
    return cublasGemmEx(handle, transa, transb, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c, CUDA_R_32F, ldc,
                        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}
