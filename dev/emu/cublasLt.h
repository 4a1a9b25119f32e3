// cublasLt.h: cublasLtMatmul on the CPU.   D = alpha op(A) op(B) + beta C [+ bias]
//
// Column major matrices of float, bf16 or half in the combinations that NVIDIA documents for CUBLAS_COMPUTE_32F. A call that the library
// would refuse returns its error code, and a line on stderr says why. Two things are stricter than the library, to show mistakes that
// a GPU may hide: the workspace that an algorithm asks for is overwritten with NaN, and D must not overlap A or B.
#pragma once
#include <cublas_api.h>

enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };
enum cublasLtOrder_t { CUBLASLT_ORDER_COL = 0, CUBLASLT_ORDER_ROW = 1 };
enum cublasLtPointerMode_t { CUBLASLT_POINTER_MODE_HOST = 0, CUBLASLT_POINTER_MODE_DEVICE = 1 };
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2, CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7, CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26,
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_ORDER = 1, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6,
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};
enum cublasLtReductionScheme_t {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_INPLACE = 1, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4, CUBLASLT_REDUCTION_SCHEME_MASK = 7,
};

namespace emu {
struct LtDesc {
    cublasComputeType_t compute;
    int32_t pointer_mode, transa, transb, bias_type;            // bias_type -1: as D
    uint32_t epilogue;
    const void *bias;
};
struct LtLayout {
    cudaDataType_t type;
    size_t rows, cols;
    int64_t ld, stride;         // stride: numbers from one matrix of the batch to the next
    int32_t order, batch;
    int64_t count(void) const { return (batch - 1) * stride + ld * (int64_t)(cols - 1) + (int64_t)rows; }
};
struct LtPreference {
    uint64_t workspace;
    uint32_t alignment[4];      // of A, B, C, D in bytes, as the program promises
    uint32_t reductions;
};
}
typedef struct emu_LtHandle *cublasLtHandle_t;
typedef emu::LtDesc *cublasLtMatmulDesc_t;
typedef emu::LtLayout *cublasLtMatrixLayout_t;
typedef emu::LtPreference *cublasLtMatmulPreference_t;
struct emu_LtHandle { int unused; };
struct cublasLtMatmulAlgo_t { uint64_t workspace; uint32_t alignment[5]; };                     // of A, B, C, D and the bias
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; size_t workspaceSize; cublasStatus_t state; float wavesCount; };

namespace emu {
template <class T> cublasStatus_t set_attribute(T *to, const void *value, size_t bytes) {
    if (value == nullptr || bytes != sizeof(T))
        return EMU_BLAS_INVALID("an attribute of %zu bytes was given as %zu bytes at %p", sizeof(T), bytes, value);
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
// What types and shapes alone forbid.
inline cublasStatus_t check_problem(const LtDesc *op, const LtLayout *a, const LtLayout *b, const LtLayout *c, const LtLayout *d) {
    if (!op || !a || !b || !c || !d) return EMU_BLAS_INVALID("a descriptor is NULL");
    const LtLayout *layout[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        const LtLayout *x = layout[i];
        if (x->order != CUBLASLT_ORDER_COL) return EMU_BLAS_UNSUPPORTED("%c is not column major: not in this emulator", "ABCD"[i]);
        if (x->rows == 0 || x->cols == 0 || x->ld < (int64_t)x->rows)
            return EMU_BLAS_INVALID("%c is %zu x %zu with leading dimension %ld", "ABCD"[i], x->rows, x->cols, (long)x->ld);
        if (x->batch != d->batch) return EMU_BLAS_INVALID("batch of %c is %d, of D %d", "ABCD"[i], x->batch, d->batch);
    }
    if (d->batch > 1 && d->stride < d->ld * (int64_t)d->cols)
        return EMU_BLAS_INVALID("matrices of D overlap: %zu x %zu, stride %ld", d->rows, d->cols, (long)d->stride);
    size_t m = op->transa ? a->cols : a->rows, k = op->transa ? a->rows : a->cols;
    size_t n = op->transb ? b->rows : b->cols, k_of_b = op->transb ? b->cols : b->rows;
    if (k != k_of_b || d->rows != m || d->cols != n || c->rows != m || c->cols != n)
        return EMU_BLAS_INVALID("op(A) %zu x %zu, op(B) %zu x %zu, C %zu x %zu and D %zu x %zu do not fit", m, k, k_of_b, n,
                           c->rows, c->cols, d->rows, d->cols);
    int bias_type = op->bias_type == -1 ? d->type : op->bias_type;
    bool alike = a->type == b->type && c->type == d->type && bias_type == d->type;
    bool fast = op->compute >= CUBLAS_COMPUTE_32F_FAST_16F;     // takes floats only
    if (!alike || (d->type != a->type && d->type != CUDA_R_32F) || (fast && a->type != CUDA_R_32F))
        return EMU_BLAS_UNSUPPORTED("no kernel for types A %d, B %d, C %d, D %d, bias %d, compute %d: A and B must be alike; "
                           "C, D and bias too (A's type or float)", a->type, b->type, c->type, d->type, bias_type, op->compute);
    bool known_epilogue = op->epilogue == CUBLASLT_EPILOGUE_DEFAULT || op->epilogue == CUBLASLT_EPILOGUE_BIAS;
    if (op->pointer_mode != CUBLASLT_POINTER_MODE_HOST || !known_epilogue)
        return EMU_BLAS_UNSUPPORTED("pointer mode %d, epilogue %u: not in this emulator", op->pointer_mode, op->epilogue);
    return CUBLAS_STATUS_SUCCESS;
}
}

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { return *handle = new emu_LtHandle{}, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return delete handle, CUBLAS_STATUS_SUCCESS; }

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale) {
    if (scale != CUDA_R_32F) return EMU_BLAS_UNSUPPORTED("alpha and beta must be float, not type %d", scale);
    *desc = new emu::LtDesc{compute, CUBLASLT_POINTER_MODE_HOST, CUBLAS_OP_N, CUBLAS_OP_N, -1, CUBLASLT_EPILOGUE_DEFAULT, nullptr};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return delete desc, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t which,
                                                     const void *value, size_t bytes) {
    switch (which) {
        case CUBLASLT_MATMUL_DESC_POINTER_MODE: return emu::set_attribute(&desc->pointer_mode, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSA: return emu::set_attribute(&desc->transa, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB: return emu::set_attribute(&desc->transb, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE: return emu::set_attribute(&desc->epilogue, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return emu::set_attribute(&desc->bias, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return emu::set_attribute(&desc->bias_type, value, bytes);
    }
    return EMU_BLAS_UNSUPPORTED("matmul attribute %d: not in this emulator", which);
}

inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType_t type, uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
    return *layout = new emu::LtLayout{type, rows, cols, ld, 0, CUBLASLT_ORDER_COL, 1}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return delete layout, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t which,
                                                       const void *value, size_t bytes) {
    switch (which) {
        case CUBLASLT_MATRIX_LAYOUT_ORDER: return emu::set_attribute(&layout->order, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return emu::set_attribute(&layout->batch, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return emu::set_attribute(&layout->stride, value, bytes);
    }
    return EMU_BLAS_UNSUPPORTED("layout attribute %d: not in this emulator", which);
}

inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    return *preference = new emu::LtPreference{0, {256, 256, 256, 256}, CUBLASLT_REDUCTION_SCHEME_MASK}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return delete preference, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t which, const void *value, size_t bytes) {
    if (which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return emu::set_attribute(&preference->workspace, value, bytes);
    if (which == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) return emu::set_attribute(&preference->reductions, value, bytes);
    int matrix = which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    if (matrix >= 0 && matrix < 4) return emu::set_attribute(&preference->alignment[matrix], value, bytes);
    return EMU_BLAS_UNSUPPORTED("preference attribute %d: not in this emulator", which);
}

// Up to two algorithms: first one that splits k and so wants D as floats for workspace, if it may; then one that needs none. Both rely on
// the alignments that the preference promises, and on that of the bias that is set now (none: the best).
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
    cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int requested, cublasLtMatmulHeuristicResult_t *results,
    int *returned) {
    if (!handle || !preference || !results || !returned || requested < 1)
        return EMU_BLAS_INVALID("AlgoGetHeuristic: a pointer is NULL, or %d algorithms were requested", requested);
    *returned = 0;
    cublasStatus_t status = emu::check_problem(op, a, b, c, d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    size_t wanted = sizeof(float) * d->rows * d->cols * (size_t)d->batch;
    for (size_t workspace : {wanted, (size_t)0}) {
        bool allowed = workspace == 0 || preference->reductions & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        if (workspace > preference->workspace || !allowed || *returned == requested) continue;
        cublasLtMatmulHeuristicResult_t r = {{workspace, {}}, workspace, CUBLAS_STATUS_SUCCESS, 1.0f};
        for (int i = 0; i < 4; i++) r.algo.alignment[i] = std::min(16u, preference->alignment[i]);  // loads and stores: up to 16 bytes
        r.algo.alignment[4] = 1u << __builtin_ctzll((uintptr_t)op->bias | 16);
        results[(*returned)++] = r;
    }
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t op, const void *alpha, const void *a, cublasLtMatrixLayout_t a_layout,
    const void *b, cublasLtMatrixLayout_t b_layout, const void *beta, const void *c, cublasLtMatrixLayout_t c_layout,
    void *d, cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
    cudaStream_t stream) {
    if (handle == nullptr) return emu::blas_refuse(CUBLAS_STATUS_NOT_INITIALIZED, "the handle is NULL: call cublasLtCreate first");
    cublasStatus_t status = emu::check_problem(op, a_layout, b_layout, c_layout, d_layout);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    const void *bias = op->epilogue == CUBLASLT_EPILOGUE_BIAS ? op->bias : nullptr;
    if (!alpha || !beta || !a || !b || !c || !d || (op->epilogue == CUBLASLT_EPILOGUE_BIAS && !bias))
        return EMU_BLAS_INVALID("a pointer is NULL (without a C of its own, give D)");
    if (c == d && (c_layout->ld != d_layout->ld || c_layout->stride != d_layout->stride))
        return EMU_BLAS_INVALID("C is D, but their layouts differ");

    cublasLtMatmulAlgo_t chosen = {0, {16, 16, 16, 16, 16}};    // none given: as found with default preferences
    if (algo != nullptr) chosen = *algo;
    const void *pointer[4] = {a, b, c, d};
    const emu::LtLayout *layout[4] = {a_layout, b_layout, c_layout, d_layout};
    size_t bytes[4], step[4];
    for (int i = 0; i < 4; i++) {
        bytes[i] = (size_t)layout[i]->count() * emu::type_bytes(layout[i]->type);
        step[i] = (size_t)layout[i]->stride * emu::type_bytes(layout[i]->type);
        if ((uintptr_t)pointer[i] % chosen.alignment[i] != 0)
            return EMU_BLAS_INVALID("%c at %p: the algorithm relies on %u byte alignment (as the preference promised)", "ABCD"[i],
                                    pointer[i], chosen.alignment[i]);
        if (!emu::is_device(pointer[i], bytes[i]))
            return EMU_BLAS_INVALID("%c, %zu bytes at %p, is not (all) device memory", "ABCD"[i], bytes[i], pointer[i]);
    }
    for (int i = 0; i < 2; i++)
        if ((const char *)pointer[i] < (char *)d + bytes[3] && (char *)d < (const char *)pointer[i] + bytes[i])
            return EMU_BLAS_INVALID("D overlaps %c", "ABCD"[i]);
    if (chosen.workspace > 0 && (workspace == nullptr || workspace_bytes < chosen.workspace || (uintptr_t)workspace % 256 != 0))
        return EMU_BLAS_INVALID("the algorithm needs %zu bytes of workspace, 256 byte aligned; it got %zu at %p",
                                (size_t)chosen.workspace, workspace_bytes, workspace);
    if (bias != nullptr && !emu::is_device(bias, d_layout->rows * emu::type_bytes(d_layout->type)))
        return EMU_BLAS_INVALID("the bias, %zu numbers at %p, is not (all) device memory", d_layout->rows, bias);
    if ((uintptr_t)bias % chosen.alignment[4] != 0)
        return EMU_BLAS_INVALID("the bias at %p: the algorithm relies on the %u byte alignment of the one that was set when it was chosen",
                                bias, chosen.alignment[4]);

    bool transa = op->transa != CUBLAS_OP_N, transb = op->transb != CUBLAS_OP_N;
    emu::Gemm g = {transa, transb, d_layout->rows, d_layout->cols, transa ? a_layout->rows : a_layout->cols,
                   (size_t)a_layout->ld, (size_t)b_layout->ld, (size_t)c_layout->ld, (size_t)d_layout->ld, a_layout->type, d_layout->type,
                   *(const float *)alpha, *(const float *)beta, a, b, c, bias, d};
    int batch = d_layout->batch;
    emu::enqueue(stream, "cublasLtMatmul", [=] {
        if (chosen.workspace > 0) memset(workspace, 0xff, chosen.workspace);
        for (int t = 0; t < batch; t++) {
            emu::Gemm one = g;
            one.a = (const char *)a + t * step[0], one.b = (const char *)b + t * step[1];
            one.c = (const char *)c + t * step[2], one.d = (char *)d + t * step[3];
            emu::gemm(one);
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}
