// semantics.cu: what CUDA programs may rely on, by the programming guide and the PTX manual. Plain CUDA, so that a GPU can answer too:
//   dev/emu/emucc dev/emu/test/semantics.cu -o build/semantics && build/semantics         (EMU_ORDER=0, 1, 2, ...: all must pass)
//   nvcc -std=c++17 -arch=sm_80 dev/emu/test/semantics.cu -lcublasLt -lcublas -o build/semantics_gpu
#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <functional>
#include <vector>
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <unistd.h>
#define CHECK(condition, ...) do { if (!(condition)) { fprintf(stderr, __VA_ARGS__); exit(1); } } while (0)
#include "../../test/test.h"

namespace cg = cooperative_groups;
typedef __nv_bfloat16 bf16;
#define OK(call) CHECK((call) == cudaSuccess, "line %d: %s: %s\n", __LINE__, #call, cudaGetErrorString(cudaGetLastError()))

// n numbers on the device, freed with the variable.
template <class T> struct Array {
    T *p;
    size_t n;
    Array(size_t n_) : n(n_) { OK(cudaMalloc(&p, n * sizeof(T))); OK(cudaMemset(p, 0, n * sizeof(T))); }
    Array(const std::vector<T> &v) : n(v.size()) { OK(cudaMalloc(&p, n * sizeof(T)));
        OK(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }
    Array(const Array &) = delete;
    ~Array() { cudaFree(p); }
    std::vector<T> host() const {
        std::vector<T> v(n);
        OK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};
template <class T> bool equal(const Array<T> &a, const std::function<T(size_t)> &expected) {
    std::vector<T> v = a.host();
    for (size_t i = 0; i < v.size(); i++) if (!(v[i] == expected(i))) {
        printf("     at %zu: %g, should be %g\n", i, (double)v[i], (double)expected(i));
        return false;
    }
    return true;
}

// ---- threads, blocks, launches
__global__ void write_indices(int *out) {
    int in_block = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[block * (blockDim.x * blockDim.y * blockDim.z) + in_block] = threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * block;
}
template <class T> __global__ void fill(T *out, T value, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = value;
}
template <class T> __global__ void copy_or(T *out, const T *in, T otherwise) { out[threadIdx.x] = in ? in[threadIdx.x] : otherwise; }
struct Scale {
    int factor;
    __device__ int operator()(int i) const { return factor * i; }
};
template <class F> __global__ void map_indices(int *out, F f) { out[threadIdx.x] = f(threadIdx.x); }
struct Pair { int first; float *second; };
__global__ void by_value(Pair pair) { pair.second[threadIdx.x] = (float)pair.first; }

void test_launches(void) {
    Array<int> a(8 * 24);
    write_indices<<<dim3(2, 2, 2), dim3(4, 3, 2)>>>(a.p);
    check(equal<int>(a, [](size_t i) { return i % 4 + 10 * (i % 12 / 4) + 100 * (i % 24 / 12) + 1000 * (i / 24); }),
        "three-dimensional indices");
    Array<float> f(64);
    fill<float><<<2, 32>>>(f.p, 3.0f, 50);
    check(equal<float>(f, [](size_t i) { return i < 50 ? 3.0f : 0.0f; }), "template kernel, arguments given");
    fill<<<4, 16>>>(f.p, 4.0f, 64);
    check(equal<float>(f, [](size_t) { return 4.0f; }), "template kernel, arguments deduced");
    copy_or<float><<<1, 64>>>(f.p, NULL, 5.0f);
    check(equal<float>(f, [](size_t) { return 5.0f; }), "NULL as a kernel's argument");
    map_indices<<<1, 192>>>(a.p, Scale{3});
    check(equal<int>(a, [](size_t i) { return 3 * i; }), "functor as a kernel's argument");
    by_value<<<1, 64>>>(Pair{7, f.p});
    check(equal<float>(f, [](size_t) { return 7.0f; }), "struct by value");
    void (*pointer)(int *) = write_indices;
    pointer<<<3, 64>>>(a.p);
    check(a.host()[191] == 2063, "launch through a function pointer");
    std::vector<std::vector<std::vector<int>>> nested(2);
    check(nested.size() == 2, ">>> outside launches");
}

void test_errors(void) {
    Array<int> a(64);
    auto refused = [](const char *what, cudaError_t expected) {
        cudaError_t peeked = cudaPeekAtLastError(), error = cudaGetLastError();
        check(error == expected && peeked == error && cudaGetLastError() == cudaSuccess, "%s: %s", what, cudaGetErrorName(error));
    };
    write_indices<<<1, 1025>>>(a.p);
    refused("block of 1025 threads", cudaErrorInvalidConfiguration);
    write_indices<<<1, dim3(1, 1, 65)>>>(a.p);
    refused("block of depth 65", cudaErrorInvalidConfiguration);
    write_indices<<<0, 32>>>(a.p);
    refused("empty grid", cudaErrorInvalidConfiguration);
    write_indices<<<dim3(1, 65536), 32>>>(a.p);
    refused("grid of height 65536", cudaErrorInvalidConfiguration);
    write_indices<<<1, 32, 49 * 1024>>>(a.p);
    refused("49 KB dynamic shared memory without the attribute", cudaErrorInvalidValue);
    check(equal<int>(a, [](size_t) { return 0; }), "refused launches ran nothing");
    void *p = NULL;
    check(cudaMalloc(&p, (size_t)1 << 60) == cudaErrorMemoryAllocation, "cudaMalloc of 2^60 bytes");
    refused("the error is kept", cudaErrorMemoryAllocation);
    check(cudaFree(NULL) == cudaSuccess, "cudaFree(NULL)");
    check(cudaSetDevice(99) == cudaErrorInvalidDevice, "cudaSetDevice(99)");
    cudaGetLastError();
    cudaDeviceProp properties;
    OK(cudaGetDeviceProperties(&properties, 0));
    int blocks = 0;
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, write_indices, 256, 0));
    check(properties.warpSize == 32 && properties.multiProcessorCount > 0 && properties.maxThreadsPerBlock == 1024 && blocks >= 1,
          "device properties and occupancy");
}

// ---- shared memory and barriers
__global__ void reverse_static(int *out) {
    __shared__ int s[96];
    s[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = s[95 - threadIdx.x];
}
__global__ void reverse_dynamic(int *out, int n) {
    extern __shared__ int dynamic_ints[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) dynamic_ints[i] = i;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = dynamic_ints[n - 1 - i];
}
__global__ void sum_float4(float *out) {
    extern __shared__ __align__(16) float dynamic_floats[];
    __shared__ float s[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = dynamic_floats[i] = (float)i;
    __syncthreads();
    float4 x = ((float4 *)dynamic_floats)[threadIdx.x], y = ((const float4 *)s)[threadIdx.x];
    out[threadIdx.x] = x.x + x.y + x.z + x.w + 1000 * (y.x + y.w);
}
template <class T, int N> __device__ T block_sum(T x) {        // a __shared__ array for every instance of the template
    __shared__ T s[N];
    s[threadIdx.x] = x;
    __syncthreads();
    T sum = 0;
    for (int i = 0; i < N; i++) sum += s[i];
    __syncthreads();
    return sum;
}
template <class T, int N> __global__ void sum_twice(T *out) {
    T sum = block_sum<T, N>((T)threadIdx.x);
    sum += block_sum<T, N>((T)1);
    if (threadIdx.x == 0) out[blockIdx.x] = sum + (T)blockIdx.x;
}
__global__ void transpose_tile(int *out, const int *in) {
    __shared__ int tile[8][9];
    tile[threadIdx.y][threadIdx.x] = in[threadIdx.y * 8 + threadIdx.x];
    __syncthreads();
    out[threadIdx.y * 8 + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}
// Threads that have returned do not keep the others from a barrier.
__global__ void leave_early(int *out, int n) {
    __shared__ int s[64];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    s[threadIdx.x] = i;
    __syncthreads();
    out[i] = s[threadIdx.x ^ 1];
}
__global__ void vote_in_block(int *out) {
    int count = __syncthreads_count(threadIdx.x % 3 == 0), all = __syncthreads_and(threadIdx.x < 70),
        any = __syncthreads_or(threadIdx.x == 69);
    if (threadIdx.x == 33) out[0] = count, out[1] = all, out[2] = any;
}
__global__ void large_frame(float *out) {
    float local[2000];
    for (int i = 0; i < 2000; i++) local[i] = (float)(i % 7 + threadIdx.x);
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < 2000; i++) sum += local[i];
    out[threadIdx.x] = sum - 2000 * threadIdx.x;
}

void test_shared(void) {
    Array<int> a(96);
    reverse_static<<<1, 96>>>(a.p);
    check(equal<int>(a, [](size_t i) { return 95 - i; }), "static shared memory");
    reverse_dynamic<<<1, 32, 96 * sizeof(int)>>>(a.p, 96);
    check(equal<int>(a, [](size_t i) { return 95 - i; }), "dynamic shared memory");
    int large = 99 * 256;       // 99 KB
    OK(cudaFuncSetAttribute(reverse_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, large * (int)sizeof(int)));
    Array<int> b(large);
    reverse_dynamic<<<1, 1024, large * sizeof(int)>>>(b.p, large);
    check(equal<int>(b, [=](size_t i) { return large - 1 - (int)i; }), "99 KB dynamic shared memory, allowed by its attribute");
    Array<float> f(64);
    sum_float4<<<1, 64, 256 * sizeof(float)>>>(f.p);
    check(equal<float>(f, [](size_t i) { return (float)(16 * i + 6 + 1000 * (8 * i + 3)); }), "shared floats read as float4");
    Array<int> i(2);
    sum_twice<int, 64><<<2, 64>>>(i.p);
    sum_twice<float, 32><<<2, 32>>>(f.p);
    check(i.host()[1] == 2016 + 64 + 1 && f.host()[1] == 496 + 32 + 1, "__shared__ in a function template");
    Array<int> in(64), out(64);
    map_indices<<<1, 64>>>(in.p, Scale{1});
    transpose_tile<<<1, dim3(8, 8)>>>(out.p, in.p);
    check(equal<int>(out, [](size_t k) { return k % 8 * 8 + k / 8; }), "shared matrix");
    Array<int> e(130);
    leave_early<<<3, 64>>>(e.p, 130);
    check(equal<int>(e, [](size_t k) { return k ^ 1; }), "barrier after an early return");
    Array<int> v(3);
    vote_in_block<<<1, 70>>>(v.p);
    std::vector<int> votes = v.host();
    check(votes[0] == 24 && votes[1] && votes[2], "__syncthreads_count, _and, _or");
    Array<float> g(1024);
    large_frame<<<2, 1024>>>(g.p);
    check(equal<float>(g, [](size_t) { return 5995.0f; }), "1024 threads with 8 KB of locals each");
}

// ---- warps
enum : unsigned { FULL = 0xffffffffu };
__global__ void shuffle_all(int *out) {
    int lane = threadIdx.x % 32, x = 100 * (threadIdx.x / 32) + lane;
    int *o = out + threadIdx.x * 8;
    o[0] = __shfl_sync(FULL, x, 5), o[1] = __shfl_up_sync(FULL, x, 3), o[2] = __shfl_down_sync(FULL, x, 3),
        o[3] = __shfl_xor_sync(FULL, x, 9);
    o[4] = __shfl_sync(FULL, x, 5, 8), o[5] = __shfl_up_sync(FULL, x, 3, 8), o[6] = __shfl_down_sync(FULL, x, 3, 8),
        o[7] = __shfl_sync(FULL, x, 37);
}
int shuffle_expected(size_t at) {
    int t = (int)at / 8, lane = t % 32, base = t - lane, from = lane, group = lane / 8 * 8;
    switch (at % 8) {
        case 0: case 7: from = 5; break;                                  // 37 is taken modulo 32
        case 1: from = lane >= 3 ? lane - 3 : lane; break;                // out of range: the lane's own
        case 2: from = lane + 3 < 32 ? lane + 3 : lane; break;
        case 3: from = lane ^ 9; break;
        case 4: from = group + 5; break;
        case 5: from = lane - 3 >= group ? lane - 3 : lane; break;
        case 6: from = lane + 3 < group + 8 ? lane + 3 : lane; break;
    }
    return 100 * (base / 32) + from;
}
__global__ void half_warps(int *out) {          // each half has its own mask and its own code
    int lane = threadIdx.x % 32, x = lane;
    if (lane < 16) {
        for (int k = 8; k > 0; k /= 2) x += __shfl_xor_sync(0x0000ffffu, x, k);
    } else {
        for (int k = 8; k > 0; k /= 2) x = max(x, __shfl_xor_sync(0xffff0000u, x, k));
    }
    __syncwarp();
    out[threadIdx.x] = x;
}
__global__ void leave_warp(int *out) {          // lanes that have returned are not waited for
    if (threadIdx.x >= 20) return;
    unsigned mask = __ballot_sync(0xfffffu, threadIdx.x % 2);
    out[threadIdx.x] = __popc(mask) + __shfl_sync(0xfffffu, (int)threadIdx.x, 19);
}
__global__ void vote(unsigned *out) {
    unsigned b = __ballot_sync(FULL, threadIdx.x % 3 == 0);
    int all = __all_sync(FULL, threadIdx.x < 32), any = __any_sync(FULL, threadIdx.x == 7);
    unsigned sum = __reduce_add_sync(FULL, threadIdx.x), most = __reduce_max_sync(FULL, threadIdx.x),
        either = __reduce_or_sync(FULL, 1u << threadIdx.x);
    unsigned same = __match_any_sync(FULL, threadIdx.x / 4);
    if (threadIdx.x == 9) out[0] = b, out[1] = all, out[2] = any, out[3] = sum, out[4] = most, out[5] = either, out[6] = same,
        out[7] = __activemask();
}
__global__ void shuffle_types(double *d, long long *l, float *f) {
    d[threadIdx.x] = __shfl_xor_sync(FULL, 0.5 + threadIdx.x, 1);
    l[threadIdx.x] = __shfl_xor_sync(FULL, (1ll << 40) + threadIdx.x, 1);
    f[threadIdx.x] = __bfloat162float(__shfl_xor_sync(FULL, __float2bfloat16((float)threadIdx.x), 1));
}
__global__ void through_syncwarp(int *out) {    // __syncwarp orders the lanes' memory accesses
    __shared__ int s[64];
    for (int round = 0; round < 3; round++) {
        s[threadIdx.x] = threadIdx.x + round;
        __syncwarp();
        int x = s[threadIdx.x ^ 31];
        __syncwarp();
        out[threadIdx.x] = x;
    }
}
// Warps of a block need not meet: each calls its own number of collectives.
__global__ void uneven_warps(int *out) {
    int warp = threadIdx.x / 32, x = 1;
    for (int i = 0; i <= warp; i++) x += __shfl_xor_sync(FULL, x, 1);
    out[threadIdx.x] = x;
}

void test_warps(void) {
    Array<int> s(64 * 8);
    shuffle_all<<<1, 64>>>(s.p);
    check(equal<int>(s, shuffle_expected), "shuffles: indexed, up, down, xor, widths");
    Array<int> a(64);
    half_warps<<<1, 64>>>(a.p);
    check(equal<int>(a, [](size_t i) { return i % 32 < 16 ? 120 : 31; }), "halves of a warp with partial masks");
    Array<int> b(32);
    leave_warp<<<1, 32>>>(b.p);
    check(equal<int>(b, [](size_t i) { return i < 20 ? 29 : 0; }), "collectives after an early return");
    Array<unsigned> v(8);
    vote<<<1, 32>>>(v.p);
    std::vector<unsigned> r = v.host();
    check(r[0] == 0x49249249u && r[1] && r[2] && r[3] == 496 && r[4] == 31 && r[5] == ~0u && r[6] == 0xf00u,
        "ballot, all, any, reduce, match");
    Array<double> d(32);
    Array<long long> l(32);
    Array<float> f(32);
    shuffle_types<<<1, 32>>>(d.p, l.p, f.p);
    check(d.host()[4] == 5.5 && l.host()[4] == (1ll << 40) + 5 && f.host()[4] == 5.0f, "shuffles of double, 64 bit, bf16");
    through_syncwarp<<<1, 64>>>(a.p);
    check(equal<int>(a, [](size_t i) { return (int)(i ^ 31) + 2; }), "__syncwarp orders memory");
    uneven_warps<<<1, 64>>>(a.p);
    check(equal<int>(a, [](size_t i) { return i < 32 ? 2 : 4; }), "warps go their own ways");
}

// ---- constants, device variables, atomics
__constant__ float coefficients[4];
__device__ int counter;
__device__ float table[4] = {1, 2, 3, 4};
__global__ void use_symbols(float *out) {
    out[threadIdx.x] = coefficients[threadIdx.x] * table[threadIdx.x];
    atomicAdd(&counter, 2);
}
__global__ void use_atomics(int *i, unsigned *u, float *f, unsigned long long *l) {
    int t = threadIdx.x + blockIdx.x * blockDim.x;
    atomicAdd(&i[0], t), atomicSub(&i[1], 1), atomicMax(&i[2], t), atomicMin(&i[3], -t), atomicExch(&i[4], 5),
        atomicAnd(&i[5], ~(1 << t % 8)), atomicOr(&i[6], 1 << t % 8);
    atomicInc(&u[0], 9);        // counts 0 1 ... 9 0 1 ...
    atomicAdd(&f[0], 0.5f), atomicAdd(&l[0], 1ull << 33);
    for (int old = i[7], seen; ; old = seen) {      // the compare-and-swap loop
        seen = atomicCAS(&i[7], old, old + 3);
        if (seen == old) break;
    }
}
// The last block to finish adds up what all blocks wrote.
__global__ void sum_last_block(float *total, float *partial, unsigned *arrived, const float *in) {
    __shared__ bool is_last;
    __shared__ float s[64];
    s[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
    for (int k = 32; k > 0; k /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < k) s[threadIdx.x] += s[threadIdx.x + k];
    }
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = s[0];
        __threadfence();
        is_last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (is_last && threadIdx.x == 0) {
        float sum = 0;
        for (unsigned b = 0; b < gridDim.x; b++) sum += ((volatile float *)partial)[b];
        *total = sum;
    }
}

void test_memory(void) {
    float host[4] = {10, 20, 30, 40};
    Array<float> f(4);
    OK(cudaMemcpyToSymbol(coefficients, host, sizeof host));
    use_symbols<<<1, 4>>>(f.p);
    int count = 0;
    OK(cudaMemcpyFromSymbol(&count, counter, sizeof count));
    check(equal<float>(f, [](size_t i) { return 10.0f * (i + 1) * (i + 1); }) && count == 8, "__constant__ and __device__ variables");
    void *address = NULL;
    OK(cudaGetSymbolAddress(&address, counter));
    OK(cudaMemset(address, 0, sizeof count));
    OK(cudaMemcpyFromSymbol(&count, counter, sizeof count));
    check(count == 0, "address of a __device__ variable");

    Array<int> i(std::vector<int>{0, 0, 0, 0, 0, 255, 0, 0});
    Array<unsigned> u(1);
    Array<float> g(1);
    Array<unsigned long long> l(1);
    use_atomics<<<4, 32>>>(i.p, u.p, g.p, l.p);
    std::vector<int> r = i.host();
    check(r[0] == 8128 && r[1] == -128 && r[2] == 127 && r[3] == -127 && r[4] == 5 && r[5] == 0 && r[6] == 255 && r[7] == 384,
        "integer atomics");
    check(u.host()[0] == 8 && g.host()[0] == 64.0f && l.host()[0] == 128ull << 33, "atomicInc, float, 64 bit");
    Array<float> in(std::vector<float>(64 * 50, 1.0f)), partial(50), total(1);
    Array<unsigned> arrived(1);
    sum_last_block<<<50, 64>>>(total.p, partial.p, arrived.p, in.p);
    check(total.host()[0] == 3200.0f, "__threadfence and the last block");

    std::vector<int> square(12, -1);
    Array<int> m(std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});        // 3 rows of 4; the middle two columns
    OK(cudaMemcpy2D(square.data(), 2 * sizeof(int), m.p + 1, 4 * sizeof(int), 2 * sizeof(int), 3, cudaMemcpyDeviceToHost));
    check(square[0] == 1 && square[1] == 2 && square[2] == 5 && square[5] == 10 && square[6] == -1, "cudaMemcpy2D");
}

// ---- numbers: vectors, bf16, half
__global__ void use_vectors(float4 *out, const float4 *in, const float *scalars) {
    float4 a = __ldg(in), b = __ldcs(in + 1), c = make_float4(__ldg(scalars), scalars[1], 3, 4);
    __stcs(out, make_float4(a.x + b.x + c.x, a.y + b.y + c.y, a.z + b.z + c.z, a.w + b.w + c.w));
    int4 bits = *(const int4 *)in;
    float2 f2 = make_float2(1, 2);
    uint2 u2 = make_uint2(3, 4);
    __stwt(out + 1, make_float4(__int_as_float(bits.x), f2.y, (float)u2.x, __uint_as_float(__float_as_uint(9.0f))));
}
__global__ void round_all(uint16_t *out, const float *in, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        out[2 * i] = __bfloat16_as_ushort(__float2bfloat16(in[i]));
        out[2 * i + 1] = __half_as_ushort(__float2half(in[i]));
    }
}
// Nearest, ties to even, by searching: independent of any bit trick. exponent, mantissa bits and largest finite number of the format.
uint16_t round_by_rule(float x, int mantissa, int least_exponent, double largest, uint16_t infinity) {
    if (isnan(x)) return 0x7fff;
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    if (isinf(x)) return sign | infinity;
    double a = fabs((double)x);
    int e = a > 0 ? ilogb(a) : least_exponent;
    if (e < least_exponent) e = least_exponent;
    double step = ldexp(1.0, e - mantissa), units = nearbyint(a / step);        // nearbyint: ties to even
    if (units * step > largest) return sign | infinity;
    int bits = (e - least_exponent) * (1 << mantissa) + (int)units;              // a carry runs into the exponent by itself
    return sign | (uint16_t)bits;
}
__global__ void bf16_math(float *out) {
    bf16 a = __float2bfloat16(1.5f), b = __float2bfloat16(0.25f), c = __float2bfloat16(-3.0f);
    __nv_bfloat162 p = __floats2bfloat162_rn(1.0f, 2.0f), q = __bfloat162bfloat162(a);
    out[0] = __bfloat162float(a + b), out[1] = (float)(a * c), out[2] = __bfloat162float(__hmul(a, b)),
        out[3] = __bfloat162float(__hfma(a, b, c));
    float2 s = __bfloat1622float2(__hadd2(p, q));
    out[4] = s.x, out[5] = s.y, out[6] = a > b, out[7] = sizeof(p);
    out[8] = __half2float(__hadd(__float2half(1.5f), __float2half(2.25f))), out[9] = __low2float(p);
}

void test_numbers(void) {
    Array<float4> in(std::vector<float4>{make_float4(1, 2, 3, 4), make_float4(10, 20, 30, 40)}), out(2);
    Array<float> scalars(std::vector<float>{100, 200});
    use_vectors<<<1, 1>>>(out.p, in.p, scalars.p);
    std::vector<float4> v = out.host();
    check(v[0].x == 111 && v[0].y == 222 && v[0].z == 36 && v[0].w == 48 && v[1].x == 1 && v[1].y == 2 && v[1].z == 3 && v[1].w == 9,
        "vector types, cache hints");
    check(sizeof(float3) == 12 && alignof(float4) == 16 && alignof(float2) == 8 && sizeof(bf16) == 2, "sizes and alignments of vectors");

    std::vector<float> numbers = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 3.4e38f, -3.4e38f, 65504.0f, 65519.9f, 65520.0f, 1e-45f, 1e-40f,
        6e-8f, 2.9e-8f, 3e-8f};
    uint32_t seed = 1;
    for (int exponent = 0; exponent < 255; exponent++)
        for (int k = 0; k < 40; k++) {
            seed = seed * 1664525u + 1013904223u;
            // ties and near ties
            uint32_t low = k % 4 == 0 ? 0x8000 : k % 4 == 1 ? 0x1000 : k % 4 == 2 ? (seed & 0xfff) : (0x8000 + (seed >> 31) * 2 - 1);
            uint32_t bits = (seed & 0x80000000u) | (uint32_t)exponent << 23 | ((seed >> 8) & 0x7f0000u) | ((seed >> 3) & 0xe000u) | low;
            float x;
            memcpy(&x, &bits, 4);
            numbers.push_back(x);
        }
    int n = (int)numbers.size(), bad_bf16 = 0, bad_half = 0;
    Array<float> device_numbers(numbers);
    Array<uint16_t> rounded(2 * n);
    round_all<<<(n + 255) / 256, 256>>>(rounded.p, device_numbers.p, n);
    std::vector<uint16_t> r = rounded.host();
    for (int i = 0; i < n; i++) {
        bad_bf16 += r[2 * i] != round_by_rule(numbers[i], 7, -126, 3.3895313892515355e38, 0x7f80) ||
            r[2 * i] != __bfloat16_as_ushort(__float2bfloat16(numbers[i]));
        bad_half += r[2 * i + 1] != round_by_rule(numbers[i], 10, -14, 65504, 0x7c00) ||
            r[2 * i + 1] != __half_as_ushort(__float2half(numbers[i]));
    }
    check(bad_bf16 == 0, "bf16: nearest, ties to even, for %d numbers: %d differ", n, bad_bf16);
    check(bad_half == 0, "half: nearest, ties to even, for %d numbers: %d differ", n, bad_half);
    int bad_back = 0;
    for (int b = 0; b < 65536; b++) {
        float x = __bfloat162float(__ushort_as_bfloat16((unsigned short)b)), y = __half2float(__ushort_as_half((unsigned short)b));
        bad_back += !isnan(x) && __bfloat16_as_ushort(__float2bfloat16(x)) != b;
        bad_back += !isnan(y) && __half_as_ushort(__float2half(y)) != b;
    }
    check(bad_back == 0, "every bf16 and half to float and back");
    Array<float> f(10);
    bf16_math<<<1, 1>>>(f.p);
    std::vector<float> m = f.host(), expected = {1.75f, -4.5f, 0.375f, -2.625f, 2.5f, 3.5f, 1, 4, 3.75f, 1};
    check(m == expected, "bf16 and half arithmetic");
}

// ---- streams and events
__global__ void add_one(int *p) { atomicAdd(p, 1); }
__global__ void times_two(int *p) { *p = *p * 2; }
__global__ void move(int *to, const int *from) { *to = *from; }

void test_streams(void) {
    Array<int> a(2);
    cudaStream_t s, t, free_stream;
    cudaEvent_t event, unused, begin, end;
    OK(cudaStreamCreate(&s));
    OK(cudaStreamCreate(&t));
    OK(cudaStreamCreateWithFlags(&free_stream, cudaStreamNonBlocking));
    OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    OK(cudaEventCreate(&unused));
    OK(cudaEventCreate(&begin));
    OK(cudaEventCreate(&end));

    add_one<<<1, 5, 0, s>>>(a.p);
    times_two<<<1, 1, 0, s>>>(a.p);
    add_one<<<1, 1, 0, s>>>(a.p);
    OK(cudaStreamSynchronize(s));
    check(a.host()[0] == 11, "a stream keeps its order");

    OK(cudaMemsetAsync(a.p, 0, sizeof(int), s));
    add_one<<<1, 3, 0, s>>>(a.p);
    OK(cudaEventRecord(event, s));
    OK(cudaStreamWaitEvent(t, event, 0));
    move<<<1, 1, 0, t>>>(a.p + 1, a.p);
    OK(cudaStreamSynchronize(t));
    int pair[2];
    OK(cudaMemcpyAsync(pair, a.p, sizeof pair, cudaMemcpyDeviceToHost, free_stream));
    OK(cudaStreamSynchronize(free_stream));
    check(pair[1] == 3, "an event orders two streams");
    check(cudaEventQuery(event) == cudaSuccess && cudaStreamQuery(t) == cudaSuccess && cudaStreamWaitEvent(t, unused, 0) == cudaSuccess &&
          cudaEventSynchronize(unused) == cudaSuccess, "queries; events that were never recorded");

    // The legacy default stream waits for all blocking streams, and they for it.
    add_one<<<1, 1, 0, s>>>(a.p);
    times_two<<<1, 1>>>(a.p);
    add_one<<<1, 1, 0, t>>>(a.p);
    OK(cudaStreamSynchronize(t));
    check(a.host()[0] == 9, "default stream between two blocking streams");
    add_one<<<1, 1, 0, s>>>(a.p);
    check(a.host()[0] == 10, "cudaMemcpy waits for blocking streams");

    int *pinned;
    OK(cudaMallocHost(&pinned, 2 * sizeof(int)));
    pinned[0] = 40, pinned[1] = 2;
    OK(cudaMemcpyAsync(a.p, pinned, 2 * sizeof(int), cudaMemcpyHostToDevice, s));
    add_one<<<1, 2, 0, s>>>(a.p);
    OK(cudaMemcpyAsync(pinned + 1, a.p, sizeof(int), cudaMemcpyDeviceToHost, s));
    OK(cudaStreamSynchronize(s));
    check(pinned[1] == 42, "asynchronous copies of pinned memory");

    // An event stands for its latest record at the time of the wait.
    OK(cudaMemset(a.p, 0, 2 * sizeof(int)));
    OK(cudaEventRecord(event, s));
    add_one<<<1, 1, 0, s>>>(a.p);
    OK(cudaEventRecord(event, s));
    OK(cudaStreamWaitEvent(t, event, 0));
    times_two<<<1, 1, 0, t>>>(a.p);
    OK(cudaEventRecord(event, t));
    OK(cudaEventSynchronize(event));
    check(a.host()[0] == 2, "an event recorded again");

    OK(cudaEventRecord(begin, s));
    add_one<<<1, 1, 0, s>>>(a.p);
    OK(cudaEventRecord(end, s));
    OK(cudaEventSynchronize(end));
    float milliseconds = -1;
    OK(cudaEventElapsedTime(&milliseconds, begin, end));
    check(milliseconds >= 0, "elapsed time");
    OK(cudaDeviceSynchronize());
    for (cudaStream_t stream : {s, t, free_stream}) OK(cudaStreamDestroy(stream));
    for (cudaEvent_t e : {event, unused, begin, end}) OK(cudaEventDestroy(e));
    OK(cudaFreeHost(pinned));
}

// ---- tensor cores and asynchronous copies: one instruction each, fragments as the PTX manual draws them
#ifdef CUDA_EMU
#include "ptx.h"
#else
__device__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
        "=r"(r[3]) : "r"(shared_address(row)));
}
__device__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
        "=r"(r[3]) : "r"(shared_address(row)));
}
__device__ void ldmatrix_x2(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)));
}
__device__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)));
}
#define MMA(name, type) \
    __device__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
    }
MMA(mma_m16n8k16, "bf16")
MMA(mma_m16n8k16_half, "f16")
__device__ void cp_async_16(void *to_shared, const void *from_global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to_shared)), "l"(from_global),
        "r"(valid ? 16 : 0) : "memory");
}
__device__ void cp_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void cp_async_wait(void) { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
#endif

// Fragments of d (16, 8) += a (16, 16) b (16, 8), for lane 4 g + t. Two 16-bit numbers share a register, the lower index in the lower half.
//   a: register i holds row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next      b: register i holds rows 2 t + 8 i and the next,
//   column g
//   d: number i lies at row g + 8 (i / 2), column 2 t + i % 2
template <class T> __device__ uint32_t pack2(T low, T high) {
    uint16_t l, h;
    memcpy(&l, &low, 2), memcpy(&h, &high, 2);
    return l | (uint32_t)h << 16;
}
template <class T, bool IS_HALF> __global__ void mma_by_layout(float *d, const T *a, const T *b) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; i++) {
        const T *p = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
        fa[i] = pack2(p[0], p[1]);
    }
    for (int i = 0; i < 2; i++) fb[i] = pack2(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
    float fd[4];
    for (int i = 0; i < 4; i++) fd[i] = d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    if (IS_HALF) mma_m16n8k16_half(fd, fa, fb);
    else mma_m16n8k16(fd, fa, fb);
    for (int i = 0; i < 4; i++) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = fd[i];
}
// The same matrices through shared memory: ldmatrix delivers what the layout says.
__global__ void ldmatrix_gives_fragments(uint32_t *out, const uint16_t *a, const uint16_t *b) {
    __shared__ __align__(16) uint16_t sa[16][24];
    __shared__ __align__(16) uint16_t sb[16][8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) sb[i / 8][i % 8] = b[i];
    __syncwarp();
    uint32_t fa[4], ta[4], fb[2], nb[2];
    ldmatrix_x4(fa, &sa[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_trans(ta, &sa[lane % 16][lane / 16 * 8]);
    ldmatrix_x2_trans(fb, &sb[lane % 16][0]);
    ldmatrix_x2(nb, &sb[lane % 16][0]);
    for (int i = 0; i < 4; i++) out[lane * 12 + i] = fa[i], out[lane * 12 + 4 + i] = ta[i];
    for (int i = 0; i < 2; i++) out[lane * 12 + 8 + i] = fb[i], out[lane * 12 + 10 + i] = nb[i];
}
// Rows through two buffers of asynchronous copies, the last ones beyond the end: zeros.
__global__ void pipeline(float *out, const float *in, int rows) {
    __shared__ __align__(16) float s[2][128];
    float sum = 0;
    auto fetch = [&](int row) {
        cp_async_16(&s[row % 2][threadIdx.x * 4], in + (size_t)(row < rows ? row : 0) * 128 + threadIdx.x * 4, row < rows);
        cp_async_commit();
    };
    fetch(0);
    for (int row = 0; row < rows + 2; row++) {
        fetch(row + 1);
        cp_async_wait<1>();
        __syncthreads();
        sum += (row + 1) * s[row % 2][(threadIdx.x * 4 + 5) % 128];
        __syncthreads();
    }
    cp_async_wait<0>();
    out[threadIdx.x] = sum;
}
float number(int i) { return (float)((i * 7 + i / 5 * 3) % 17 - 8) / 4; }     // exact in bf16 and half, sums exact in float

template <class T, bool IS_HALF> bool mma_is_exact(T (*round)(float)) {
    std::vector<T> a(256), b(128);
    std::vector<float> d(128), expected(128);
    for (int i = 0; i < 256; i++) a[i] = round(number(i));
    for (int i = 0; i < 128; i++) b[i] = round(number(3 * i + 1)), d[i] = expected[i] = number(i + 5);
    for (int i = 0; i < 16; i++) for (int j = 0; j < 8; j++) for (int k = 0; k < 16;
        k++) expected[i * 8 + j] += number(i * 16 + k) * number(3 * (k * 8 + j) + 1);
    Array<T> da(a), db(b);
    Array<float> dd(d);
    mma_by_layout<T, IS_HALF><<<1, 32>>>(dd.p, da.p, db.p);
    return equal<float>(dd, [&](size_t i) { return expected[i]; });
}
bf16 round_bf16(float x) { return __float2bfloat16(x); }
__half round_half(float x) { return __float2half(x); }

void test_tensor_cores(void) {
    check(mma_is_exact<bf16, false>(round_bf16), "mma m16n8k16 bf16 by the documented layout");
    check(mma_is_exact<__half, true>(round_half), "mma m16n8k16 half by the documented layout");
    std::vector<uint16_t> a(256), b(128);
    for (int i = 0; i < 256; i++) a[i] = (uint16_t)(i + 1000);
    for (int i = 0; i < 128; i++) b[i] = (uint16_t)(i + 5000);
    Array<uint16_t> da(a), db(b);
    Array<uint32_t> out(32 * 12);
    ldmatrix_gives_fragments<<<1, 32>>>(out.p, da.p, db.p);
    std::vector<uint32_t> r = out.host();
    int bad[4] = {};
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        auto two = [](uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; };
        for (int i = 0; i < 4; i++) {
            int row = 8 * (i % 2), col = 8 * (i / 2);
            bad[0] += r[lane * 12 + i] != two(a[(row + g) * 16 + col + 2 * t], a[(row + g) * 16 + col + 2 * t + 1]);
            bad[1] += r[lane * 12 + 4 + i] != two(a[(row + 2 * t) * 16 + col + g], a[(row + 2 * t + 1) * 16 + col + g]);
        }
        for (int i = 0; i < 2; i++) {
            bad[2] += r[lane * 12 + 8 + i] != two(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
            bad[3] += r[lane * 12 + 10 + i] != two(b[(8 * i + g) * 8 + 2 * t], b[(8 * i + g) * 8 + 2 * t + 1]);
        }
    }
    check(bad[0] == 0 && bad[1] == 0, "ldmatrix x4, plain and transposed");
    check(bad[2] == 0 && bad[3] == 0, "ldmatrix x2, transposed and plain");
    std::vector<float> in(5 * 128);
    for (size_t i = 0; i < in.size(); i++) in[i] = number((int)i);
    Array<float> din(in), sums(32);
    pipeline<<<1, 32>>>(sums.p, din.p, 5);
    check(equal<float>(sums, [&](size_t t) {
        float sum = 0;
        for (int row = 0; row < 5; row++) sum += (row + 1) * in[row * 128 + (t * 4 + 5) % 128];
        return sum;
    }), "cp.async in two stages, zeros beyond the end");
}

// ---- cooperative groups
__global__ void use_tiles(int *out) {
    cg::thread_block block = cg::this_thread_block();
    cg::thread_block_tile<8> tile = cg::tiled_partition<8>(block);
    auto warp = cg::tiled_partition<32>(block);
    int *o = out + threadIdx.x * 8;
    o[0] = cg::reduce(tile, (int)threadIdx.x, cg::plus<int>()), o[1] = tile.meta_group_rank(), o[2] = tile.thread_rank(),
        o[3] = tile.shfl_xor((int)threadIdx.x, 4);
    o[4] = cg::reduce(warp, (int)threadIdx.x, cg::greater<int>()), o[5] = warp.shfl_down((int)threadIdx.x, 1),
        o[6] = block.thread_rank() + block.size();
    block.sync();
    o[7] = (int)tile.ballot(threadIdx.x % 2) + 1000 * warp.meta_group_size();
}
void test_groups(void) {
    Array<int> a(64 * 8);
    use_tiles<<<1, 64>>>(a.p);
    check(equal<int>(a, [](size_t i) {
        int t = (int)i / 8, lane = t % 32;
        int expected[8] = {t / 8 * 64 + 28, t / 8, t % 8, t ^ 4, t / 32 * 32 + 31, lane < 31 ? t + 1 : t, t + 64, 0xaa + 2000};
        return expected[i % 8];
    }), "cooperative groups: block, tiles of 8 and 32");
}

// ---- cublasLt and cublas against loops
struct Matrix { int rows, cols, ld; };
template <class T> void test_one_matmul(cublasLtHandle_t lt, cudaDataType_t in_type, bool transa, bool transb, int m, int n, int k,
    int batch, float beta, bool bias,
                                        bool own_c, T (*round)(float), const char *name, bool float_out) {
    Matrix a = {transa ? k : m, transa ? m : k, 0}, b = {transb ? n : k, transb ? k : n, 0};
    a.ld = a.rows + 3, b.ld = b.rows + 1;
    int ldc = m + 5, ldd = own_c ? m + 2 : ldc;
    cudaDataType_t out_type = float_out ? CUDA_R_32F : in_type;
    size_t size_a = (size_t)a.ld * a.cols, size_b = (size_t)b.ld * b.cols, size_c = (size_t)ldc * n, size_d = (size_t)ldd * n;
    std::vector<T> ha(size_a * batch), hb(size_b * batch), hc(size_c * batch), hbias(m);
    for (size_t i = 0; i < ha.size(); i++) ha[i] = round(number((int)i));
    for (size_t i = 0; i < hb.size(); i++) hb[i] = round(number((int)(5 * i + 2)));
    std::vector<float> fc(hc.size()), fbias(m);
    for (size_t i = 0; i < hc.size(); i++) fc[i] = number((int)(3 * i)), hc[i] = round(fc[i]);
    for (int i = 0; i < m; i++) fbias[i] = number(i + 4), hbias[i] = round(fbias[i]);
    Array<T> da(ha), db(hb), dc(hc), dbias(hbias), dd(size_d * batch);
    Array<float> dcf(fc), dbiasf(fbias), ddf(size_d * batch);
    const void *c = float_out ? (void *)dcf.p : (void *)dc.p, *bias_pointer = float_out ? (void *)dbiasf.p : (void *)dbias.p;
    void *d = !own_c ? (void *)c : float_out ? (void *)ddf.p : (void *)dd.p;

    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t la, lb, lc, ld;
    cublasLtMatmulPreference_t preference;
    bool ok = cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS;
    cublasOperation_t ta = transa ? CUBLAS_OP_T : CUBLAS_OP_N, tb = transb ? CUBLAS_OP_T : CUBLAS_OP_N;
    ok &= cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta) == CUBLAS_STATUS_SUCCESS;
    ok &= cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb) == CUBLAS_STATUS_SUCCESS;
    if (bias) {
        cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
        ok &= cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) == CUBLAS_STATUS_SUCCESS;
        ok &= cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_pointer,
            sizeof bias_pointer) == CUBLAS_STATUS_SUCCESS;
    }
    ok &= cublasLtMatrixLayoutCreate(&la, in_type, a.rows, a.cols, a.ld) == CUBLAS_STATUS_SUCCESS;
    ok &= cublasLtMatrixLayoutCreate(&lb, in_type, b.rows, b.cols, b.ld) == CUBLAS_STATUS_SUCCESS;
    ok &= cublasLtMatrixLayoutCreate(&lc, out_type, m, n, ldc) == CUBLAS_STATUS_SUCCESS;
    ok &= cublasLtMatrixLayoutCreate(&ld, out_type, m, n, ldd) == CUBLAS_STATUS_SUCCESS;
    cublasLtMatrixLayout_t layouts[4] = {la, lb, lc, ld};
    int64_t strides[4] = {(int64_t)size_a, (int64_t)size_b, (int64_t)size_c, (int64_t)size_d};
    for (int i = 0; batch > 1 && i < 4; i++) {
        ok &= cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
            sizeof batch) == CUBLAS_STATUS_SUCCESS;
        ok &= cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &strides[i],
            sizeof strides[i]) == CUBLAS_STATUS_SUCCESS;
    }
    size_t workspace_bytes = 1 << 20;
    ok &= cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS;
    ok &= cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
        sizeof workspace_bytes) == CUBLAS_STATUS_SUCCESS;
    cublasLtMatmulHeuristicResult_t found[4];
    int count = 0;
    ok &= cublasLtMatmulAlgoGetHeuristic(lt, op, la, lb, lc, ld, preference, 4, found, &count) == CUBLAS_STATUS_SUCCESS && count >= 1;
    Array<char> workspace(workspace_bytes);
    float alpha = 0.5f;
    ok = ok && cublasLtMatmul(lt, op, &alpha, da.p, la, db.p, lb, &beta, c, lc, d, ld, &found[0].algo, workspace.p, workspace_bytes,
        0) == CUBLAS_STATUS_SUCCESS;
    OK(cudaDeviceSynchronize());
    std::vector<float> result(size_d * batch), expected(size_d * batch);
    if (float_out) {
        OK(cudaMemcpy(result.data(), d, result.size() * sizeof(float), cudaMemcpyDeviceToHost));
    } else {
        std::vector<T> rounded(result.size());
        OK(cudaMemcpy(rounded.data(), d, result.size() * sizeof(T), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < result.size(); i++) result[i] = (float)rounded[i];
    }
    for (int t = 0; t < batch; t++) for (int j = 0; j < n; j++) for (int i = 0; i < ldd; i++) {
        size_t at = t * size_d + (size_t)j * ldd + i;
        if (i >= m) { expected[at] = own_c ? 0 : fc[at]; continue; }         // between the columns nothing is written
        float sum = 0;
        for (int l = 0; l < k; l++)
            sum += (float)ha[t * size_a + (transa ? l + (size_t)i * a.ld : i + (size_t)l * a.ld)] *
                   (float)hb[t * size_b + (transb ? j + (size_t)l * b.ld : l + (size_t)j * b.ld)];
        expected[at] = alpha * sum + (beta != 0 ? beta * fc[t * size_c + (size_t)j * ldc + i] : 0) + (bias ? fbias[i] : 0);
        if (!float_out) expected[at] = (float)round(expected[at]);
    }
    check(ok && result == expected, "cublasLt %s -> %s %c%c %dx%dx%d batch %d beta %g%s%s", name, float_out ? "float" : name,
        transa ? 'T' : 'N', transb ? 'T' : 'N', m, n, k, batch,
          beta, bias ? " bias" : "", own_c ? "" : " in place");
    cublasLtMatmulDescDestroy(op);
    for (cublasLtMatrixLayout_t l : layouts) cublasLtMatrixLayoutDestroy(l);
    cublasLtMatmulPreferenceDestroy(preference);
}
float round_float(float x) { return x; }

// What the library would refuse: the emulator says why on stderr. D (4, 3) = A (4, 5) B (5, 3)
void test_cublas_refusals(cublasLtHandle_t lt) {
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, d, short_ld, wide, half_d;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatrixLayoutCreate(&a, CUDA_R_32F, 4, 5, 4);
    cublasLtMatrixLayoutCreate(&b, CUDA_R_32F, 5, 3, 5);
    cublasLtMatrixLayoutCreate(&d, CUDA_R_32F, 4, 3, 4);
    cublasLtMatrixLayoutCreate(&short_ld, CUDA_R_32F, 4, 5, 3);
    cublasLtMatrixLayoutCreate(&wide, CUDA_R_32F, 4, 4, 4);
    cublasLtMatrixLayoutCreate(&half_d, CUDA_R_16F, 4, 3, 4);
    cublasLtMatmulPreferenceCreate(&preference);
    Array<float> pa(20), pb(16), pd(16);
    Array<char> workspace(4096);
    alignas(16) float one = 1;
    auto multiply = [&](const void *x, cublasLtMatrixLayout_t x_layout, void *y, cublasLtMatrixLayout_t y_layout,
        const cublasLtMatmulAlgo_t *algo, size_t bytes) {
        return cublasLtMatmul(lt, op, &one, x, x_layout, pb.p, b, &one, y, y_layout, y, y_layout, algo, workspace.p, bytes, 0);
    };
    check(multiply(pa.p, a, pd.p, d, NULL, 0) == CUBLAS_STATUS_SUCCESS, "cublasLt without an algorithm");
    check(multiply(pa.p, short_ld, pd.p, d, NULL, 0) == CUBLAS_STATUS_INVALID_VALUE,
        "cublasLt refuses a leading dimension that is too small");
    check(multiply(pa.p, wide, pd.p, d, NULL, 0) == CUBLAS_STATUS_INVALID_VALUE, "cublasLt refuses sizes that do not fit");
    check(multiply(pa.p, a, pd.p, half_d, NULL, 0) == CUBLAS_STATUS_NOT_SUPPORTED, "cublasLt refuses float times float to half");
    check(multiply(NULL, a, pd.p, d, NULL, 0) == CUBLAS_STATUS_INVALID_VALUE, "cublasLt refuses a NULL matrix");
#ifdef CUDA_EMU     // a GPU may hide these
    cublasLtMatmulHeuristicResult_t found[2];
    int count = 0;
    size_t bytes = 4096;
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    cublasLtMatmulAlgoGetHeuristic(lt, op, a, b, d, d, preference, 2, found, &count);
    check(count == 2 && found[0].workspaceSize > 0 && found[1].workspaceSize == 0, "cublasLt: an algorithm with workspace, one without");
    check(multiply(pa.p, a, pd.p, d, &found[0].algo, found[0].workspaceSize - 1) == CUBLAS_STATUS_INVALID_VALUE,
        "cublasLt refuses less workspace than needed");
    check(multiply(pa.p, a, pd.p, d, &found[1].algo, 0) == CUBLAS_STATUS_SUCCESS, "cublasLt takes no workspace where none is needed");
    check(multiply(pa.p, a, pd.p + 1, d, &found[1].algo, 0) == CUBLAS_STATUS_INVALID_VALUE,
        "cublasLt refuses a pointer that is not aligned as promised");
    check(multiply(pa.p, a, pa.p + 4, d, NULL, 0) == CUBLAS_STATUS_INVALID_VALUE, "cublasLt refuses a D that overlaps A");
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    const float *biases[2] = {pb.p, pb.p + 1};                   // the bias that is set when an algorithm is chosen tells its alignment
    cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    for (int i = 0; i < 2; i++) {
        cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &biases[i], sizeof biases[i]);
        cublasLtMatmulAlgoGetHeuristic(lt, op, a, b, d, d, preference, 2, found, &count);
        cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &biases[1], sizeof biases[1]);
        check(multiply(pa.p, a, pd.p, d, &found[1].algo, 0) == (i ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE),
            i ? "cublasLt takes a bias of 4 byte alignment" : "cublasLt refuses a bias less aligned than the one at the choice");
    }
    epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    check(multiply(&one, a, pd.p, d, NULL, 0) == CUBLAS_STATUS_INVALID_VALUE, "cublasLt refuses host memory");
    check(multiply(pa.p + 4, a, pd.p, d, NULL, 0) == CUBLAS_STATUS_INVALID_VALUE,
        "cublasLt refuses a matrix that ends beyond its allocation");
#endif
    OK(cudaDeviceSynchronize());
    for (cublasLtMatrixLayout_t l : {a, b, d, short_ld, wide, half_d}) cublasLtMatrixLayoutDestroy(l);
    cublasLtMatmulDescDestroy(op);
    cublasLtMatmulPreferenceDestroy(preference);
}

void test_cublas(void) {
    cublasLtHandle_t lt;
    CHECK(cublasLtCreate(&lt) == CUBLAS_STATUS_SUCCESS, "no cublasLt\n");
    for (int t = 0; t < 4; t++) {
        test_one_matmul<bf16>(lt, CUDA_R_16BF, t & 1, t & 2, 37, 21, 50, 1, t == 1 ? 1.0f : 0.0f, t == 2, t != 3, round_bf16, "bf16",
            false);
        test_one_matmul<float>(lt, CUDA_R_32F, t & 1, t & 2, 17, 9, 33, 1 + t % 2 * 2, 0.5f, t == 0, t % 2, round_float, "float", false);
    }
    test_one_matmul<bf16>(lt, CUDA_R_16BF, true, false, 64, 40, 24, 2, 1.0f, false, false, round_bf16, "bf16", true);
    test_one_matmul<__half>(lt, CUDA_R_16F, true, false, 16, 24, 40, 1, 0.0f, false, true, round_half, "half", false);
    test_one_matmul<float>(lt, CUDA_R_32F, false, true, 1, 1, 1, 1, 0.0f, false, true, round_float, "float", false);
    test_cublas_refusals(lt);
    cublasLtDestroy(lt);

    cublasHandle_t handle;
    CHECK(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS, "no cublas\n");
    Array<float> a(std::vector<float>{1, 2, 3, 4, 5, 6}), b(std::vector<float>{1, 0, 2, 1, 1, 1}), c(4);
    float one = 1, zero = 0;        // A (2,3), B (3,2) column major: A B = {{11, 9}, {14, 12}}
    bool ok = cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 3, &one, a.p, 2, b.p, 3, &zero, c.p, 2) == CUBLAS_STATUS_SUCCESS;
    std::vector<float> product = c.host();
    check(ok && product == (std::vector<float>{11, 14, 9, 12}), "cublasSgemm");
    check(cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 3, &one, a.p, 1, b.p, 3, &zero, c.p, 2) == CUBLAS_STATUS_INVALID_VALUE,
        "cublasSgemm refuses a leading dimension");
    cublasDestroy(handle);
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    test_launches();
    test_errors();
    test_shared();
    test_warps();
    test_memory();
    test_numbers();
    test_streams();
    test_tensor_cores();
    test_groups();
    test_cublas();
    return verdict();
}
