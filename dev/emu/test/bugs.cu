// bugs.cu: one planted bug of each kind that the emulator finds, and its correct twin.   build/bugs CASE bug|fixed
// bugs.sh runs every case with the tool that must report it, and the twin, which must stay silent.
// It finds lines by the words after "line:".
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include "ptx.h"

enum { N = 128 };       // threads of a block: four warps
typedef void Kernel(float *out, const float *in, int n, bool fixed);

// ---- memory errors: the address sanitizer
__global__ void global_read_beyond(float *out, const float *in, int n, bool fixed) {
    int i = threadIdx.x + N + 1;
    out[threadIdx.x] = fixed && i >= n ? 0 : in[i];                     // line: global_read_beyond
}
__global__ void global_write_before(float *out, const float *in, int, bool fixed) {
    int i = (int)threadIdx.x - 1;
    if (!fixed || i >= 0) out[i] = in[threadIdx.x];                     // line: global_write_before
}
__global__ void shared_static_beyond(float *out, const float *in, int n, bool fixed) {
    __shared__ float s[N];
    int i = threadIdx.x + (fixed ? 0 : n - N + 1);
    s[i] = in[threadIdx.x];                                             // line: shared_static_beyond
    __syncthreads();
    out[threadIdx.x] = s[N - 1 - threadIdx.x];
}
__global__ void shared_dynamic_beyond(float *out, const float *in, int, bool fixed) {
    extern __shared__ float d[];
    d[threadIdx.x + !fixed] = in[threadIdx.x];                          // line: shared_dynamic_beyond
    __syncthreads();
    out[threadIdx.x] = d[fixed ? N - 1 - threadIdx.x : 1];
}
template <int SIZE> __global__ void shared_template_beyond(float *out, const float *in, int n, bool fixed) {
    __shared__ float s[SIZE];
    for (int i = threadIdx.x; i < SIZE + (fixed ? 0 : n / N); i += SIZE) s[i] = in[threadIdx.x];        // line: shared_template_beyond
    __syncthreads();
    out[threadIdx.x] = s[SIZE - 1 - threadIdx.x];
}
__global__ void local_beyond(float *out, const float *in, int n, bool fixed) {
    float r[4];
    for (int i = 0; i < n / 64 + !fixed; i++) r[i] = in[threadIdx.x];   // line: local_beyond
    out[threadIdx.x] = r[threadIdx.x % 4];
}
__global__ void global_misaligned(float *out, const float *in, int, bool fixed) {
    const float *p = in + (fixed ? 4 : 2);
    float4 x = *(const float4 *)p;                                      // line: global_misaligned
    out[threadIdx.x] = x.x;
}
__global__ void shared_misaligned(float *out, const float *in, int, bool fixed) {
    __shared__ float s[N + 4];
    s[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 4) s[N + threadIdx.x] = 0;
    __syncthreads();
    float2 x = *(const float2 *)(s + (fixed ? threadIdx.x / 2 * 2 : threadIdx.x));      // line: shared_misaligned
    out[threadIdx.x] = x.y;
}
__global__ void index_overflow(float *out, const float *in, int n, bool fixed) {
    int rows = 1 << 22;
    size_t i = fixed ? (size_t)rows * (n * 8) : (size_t)(rows * (n * 8));       // line: index_overflow
    out[threadIdx.x] = in[i % N];
}
__global__ void set_ones(float *out, const float *, int, bool) { out[threadIdx.x] = 1; }
struct Hidden { float *p; };
__global__ void set_hidden(Hidden hidden) {
    hidden.p[threadIdx.x] = 1;                                          // line: use_after_free_hidden
}

// ---- memory that was never written: NaN
__global__ void shared_uninitialised(float *out, const float *in, int, bool fixed) {
    __shared__ float s[N];
    if (fixed || threadIdx.x != 77) s[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[N - 1 - threadIdx.x];
}
__global__ void shared_dynamic_uninitialised(float *out, const float *in, int, bool fixed) {
    extern __shared__ float d[];
    if (fixed || threadIdx.x != 77) d[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = d[N - 1 - threadIdx.x];
}
__global__ void accumulate(float *out, const float *in, int, bool) { out[threadIdx.x] += in[threadIdx.x]; }

// ---- missing barriers: the outputs of some orders differ
__global__ void no_barrier_previous(float *out, const float *in, int, bool fixed) {
    __shared__ float s[N];
    s[threadIdx.x] = in[threadIdx.x];
    if (fixed) __syncthreads();
    out[threadIdx.x] = s[threadIdx.x > 0 ? threadIdx.x - 1 : 0];        // right in forward order; line: no_barrier_previous
}
__global__ void no_barrier_next(float *out, const float *in, int, bool fixed) {
    __shared__ float s[N];
    s[threadIdx.x] = in[threadIdx.x];
    if (fixed) __syncthreads();
    out[threadIdx.x] = s[min((int)threadIdx.x + 1, N - 1)];             // right in backward order
}
__global__ void no_barrier_before_reuse(float *out, const float *in, int, bool fixed) {
    __shared__ float s[N];
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        s[threadIdx.x] = in[threadIdx.x] + i;                           // line: no_barrier_before_reuse
        __syncthreads();
        sum += s[(threadIdx.x + 37) % N];
        if (fixed) __syncthreads();
    }
    out[threadIdx.x] = sum;
}
__device__ float warp_sum(float x) {
    for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(0xffffffff, x, k);
    return x;
}
__global__ void no_barrier_between_reductions(float *out, const float *in, int, bool fixed) {
    __shared__ float s[N / 32];
    float total = 0;
    for (int i = 0; i < 3; i++) {
        float x = warp_sum(in[threadIdx.x] * (i + 1));
        if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = x;             // line: no_barrier_between_reductions
        __syncthreads();
        total += warp_sum(threadIdx.x % 32 < N / 32 ? s[threadIdx.x % 32] : 0);
        if (fixed) __syncthreads();         // or a fast warp overwrites s while a slow one still reads it
    }
    out[threadIdx.x] = total;
}
__global__ void no_barrier_after_broadcast(float *out, const float *in, int, bool fixed) {
    __shared__ float s;
    if (threadIdx.x == 64) s = in[64];                                  // line: no_barrier_after_broadcast
    if (fixed) __syncthreads();
    out[threadIdx.x] = s;
}
__global__ void no_syncwarp(float *out, const float *in, int, bool fixed) {
    __shared__ float s[N];
    s[threadIdx.x] = in[threadIdx.x];
    if (fixed) __syncwarp();
    out[threadIdx.x] = s[threadIdx.x ^ 5];                              // line: no_syncwarp
}
// blocks run in any order; two launches are the cure
__global__ void block_reads_block(float *out, const float *in, int, bool fixed) {
    if (threadIdx.x > 0) return;
    out[blockIdx.x] = in[blockIdx.x] + (fixed || blockIdx.x == 0 ? 0 : out[blockIdx.x - 1]);       // line: block_reads_block
}
__global__ void double_buffer(float *out, const float *in, int n, bool fixed) {
    __shared__ __align__(16) float s[2][N];
    float sum = 0;
    if (threadIdx.x < N / 4) cp_async_16(&s[0][4 * threadIdx.x], in + 4 * threadIdx.x, true);
    cp_async_commit();
    for (int i = 0; i < 6; i++) {
        if (threadIdx.x < N / 4) cp_async_16(&s[(i + 1) % 2][4 * threadIdx.x], in + (i + 1) * (n / 16) + 4 * threadIdx.x, true);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        sum += s[i % 2][(threadIdx.x + 61) % N] * (i + 1);
        if (fixed) __syncthreads();         // or the next round's copy lands in a buffer that is still read
    }
    cp_async_wait<0>();
    out[threadIdx.x] = sum;
}
__global__ void no_async_wait(float *out, const float *in, int, bool fixed) {
    __shared__ __align__(16) float s[N];
    if (threadIdx.x < N / 4) cp_async_16(&s[4 * threadIdx.x], in + 4 * threadIdx.x, true);
    cp_async_commit();
    if (fixed) cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = s[N - 1 - threadIdx.x];
}
__global__ void async_wait_too_few(float *out, const float *in, int, bool fixed) {
    __shared__ __align__(16) float s[2][N];
    for (int i = 0; i < 2; i++) {
        if (threadIdx.x < N / 4) cp_async_16(&s[i][4 * threadIdx.x], in + 4 * threadIdx.x, true);
        cp_async_commit();
    }
    if (fixed) cp_async_wait<0>();
    else cp_async_wait<1>();                // the second copy may still be under way
    __syncthreads();
    out[threadIdx.x] = s[0][threadIdx.x] + s[1][N - 1 - threadIdx.x];
}

// ---- races that no order shows, or that need not change the result: the thread sanitizer
__global__ void sum_without_atomic(float *out, const float *in, int, bool fixed) {
    if (fixed) atomicAdd(&out[0], in[threadIdx.x]);
    else out[0] += in[threadIdx.x];                                     // line: sum_without_atomic
}
__global__ void blocks_write_one(float *out, const float *, int, bool fixed) {
    if (threadIdx.x == 0) out[fixed ? blockIdx.x : 0] = 1;              // line: blocks_write_one
}

// ---- threads that do not meet
__global__ void divergent_barrier(float *out, const float *in, int, bool fixed) {
    __shared__ float s[N];
    s[threadIdx.x] = in[threadIdx.x];
    if (fixed) __syncthreads();
    else if (threadIdx.x < 64) __syncthreads();                         // line: divergent_one
    else __syncthreads();                                               // line: divergent_other
    out[threadIdx.x] = s[N - 1 - threadIdx.x];
}
__global__ void deadlock(float *out, const float *in, int, bool fixed) {
    float x = in[threadIdx.x];
    if (fixed || threadIdx.x < 100) __syncthreads();                    // line: deadlock_barrier
    if (fixed || threadIdx.x >= 100) x += __shfl_xor_sync(0xffffffff, x, 1);    // line: deadlock_shuffle
    out[threadIdx.x] = x;
}
__global__ void not_in_own_mask(float *out, const float *in, int, bool fixed) {
    float x = in[threadIdx.x];
    out[threadIdx.x] = __shfl_sync(fixed ? 0xffffffff : 0x0000ffff, x, 0);      // line: not_in_own_mask
}
__global__ void different_collectives(float *out, const float *in, int, bool fixed) {
    float x = in[threadIdx.x];
    if (fixed || threadIdx.x % 2) out[threadIdx.x] = __shfl_sync(0xffffffff, x, 0);             // line: different_collectives
    else out[threadIdx.x] = (float)__ballot_sync(0xffffffff, x > 0);
}

// ---- host side: streams, events, copies, launches
__global__ void add_one_slowly(float *out, const float *in, int, bool) { out[threadIdx.x] = in[threadIdx.x] + 1; }

struct Buffers { float *out, *in, *extra, *pinned; std::vector<float> result; };
struct Case { const char *name; Kernel *kernel; int grid; size_t shared; };
const Case cases[] = {
    {"global_read_beyond", global_read_beyond, 1, 0},
    {"global_write_before", global_write_before, 1, 0},
    {"shared_static_beyond", shared_static_beyond, 1, 0},
    {"shared_dynamic_beyond", shared_dynamic_beyond, 1, N * sizeof(float)},
    {"shared_template_beyond", shared_template_beyond<N>, 1, 0},
    {"local_beyond", local_beyond, 1, 0},
    {"global_misaligned", global_misaligned, 1, 0},
    {"shared_misaligned", shared_misaligned, 1, 0},
    {"index_overflow", index_overflow, 1, 0},
    {"shared_uninitialised", shared_uninitialised, 1, 0},
    {"shared_dynamic_uninitialised", shared_dynamic_uninitialised, 1, N * sizeof(float)},
    {"no_barrier_previous", no_barrier_previous, 1, 0},
    {"no_barrier_next", no_barrier_next, 1, 0},
    {"no_barrier_before_reuse", no_barrier_before_reuse, 1, 0},
    {"no_barrier_between_reductions", no_barrier_between_reductions, 1, 0},
    {"no_barrier_after_broadcast", no_barrier_after_broadcast, 1, 0},
    {"no_syncwarp", no_syncwarp, 1, 0},
    {"block_reads_block", block_reads_block, 8, 0},
    {"double_buffer", double_buffer, 1, 0},
    {"no_async_wait", no_async_wait, 1, 0},
    {"async_wait_too_few", async_wait_too_few, 1, 0},
    {"sum_without_atomic", sum_without_atomic, 1, 0},
    {"blocks_write_one", blocks_write_one, 2, 0},
    {"divergent_barrier", divergent_barrier, 1, 0},
    {"deadlock", deadlock, 1, 0},
    {"not_in_own_mask", not_in_own_mask, 1, 0},
    {"different_collectives", different_collectives, 1, 0},
};
bool run_kernel(const char *name, bool fixed, Buffers &b) {
    for (const Case &c : cases) if (strcmp(name, c.name) == 0) {
        Kernel *kernel = c.kernel;
        kernel<<<c.grid, N, c.shared>>>(b.out, b.in, 2 * N, fixed);         // line: launch
        return true;
    }
    return false;
}
bool run_host(const char *name, bool fixed, Buffers &b) {
    cudaStream_t s, t;          // these two do not wait for the default stream, nor for each other
    cudaEvent_t event;
    cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    size_t bytes = N * sizeof(float);
    bool found = true;
    auto is = [&](const char *what) { return strcmp(name, what) == 0; };

    if (is("malloc_uninitialised")) {
        if (fixed) cudaMemset(b.out, 0, bytes);
        accumulate<<<1, N>>>(b.out, b.in, N, fixed);
    } else if (is("use_after_free")) {
        float *p = b.extra;
        if (!fixed) cudaFree(p), b.extra = NULL;
        set_ones<<<1, N>>>(p, b.in, N, fixed);                                  // line: use_after_free
    } else if (is("use_after_free_hidden")) {   // the launch cannot see the pointer
        float *p = b.extra;
        if (!fixed) cudaFree(p), b.extra = NULL;
        set_hidden<<<1, N>>>(Hidden{p});
    } else if (is("copy_beyond")) {
        std::vector<float> large(2 * N, 1.0f);
        cudaMemcpy(b.out, large.data(), fixed ? bytes : 2 * bytes, cudaMemcpyHostToDevice);     // line: copy_beyond
    } else if (is("copy_wrong_way")) {
        cudaMemcpy(b.out, b.pinned, bytes, fixed ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost);    // line: copy_wrong_way
    } else if (is("freed_twice")) {
        cudaFree(b.extra);
        if (!fixed) cudaFree(b.extra);                                          // line: freed_twice
        b.extra = NULL;
    } else if (is("leak")) {
        if (!fixed) b.extra = NULL;
    } else if (is("host_pointer")) {
        set_ones<<<1, N>>>(fixed ? b.out : b.result.data(), b.in, N, fixed);    // line: host_pointer
    } else if (is("launch_too_many_threads")) {
        set_ones<<<1, fixed ? N : 1025>>>(b.out, b.in, N, fixed);               // line: launch_too_many_threads
    } else if (is("launch_empty_grid")) {
        set_ones<<<fixed ? 1 : 0, N>>>(b.out, b.in, N, fixed);                  // line: launch_empty_grid
    } else if (is("launch_too_much_shared")) {
        set_ones<<<1, N, fixed ? 1024 : 300000>>>(b.out, b.in, N, fixed);       // line: launch_too_much_shared
    } else if (is("no_stream_wait")) {          // the default stream does not wait for s
        add_one_slowly<<<1, N, 0, s>>>(b.extra, b.in, N, fixed);
        if (fixed) cudaStreamSynchronize(s);
        add_one_slowly<<<1, N>>>(b.out, b.extra, N, fixed);
    } else if (is("no_event_wait")) {
        add_one_slowly<<<1, N, 0, s>>>(b.extra, b.in, N, fixed);
        cudaEventRecord(event, s);
        if (fixed) cudaStreamWaitEvent(t, event, 0);
        add_one_slowly<<<1, N, 0, t>>>(b.out, b.extra, N, fixed);
    } else if (is("event_recorded_too_early")) {
        if (!fixed) cudaEventRecord(event, s);
        add_one_slowly<<<1, N, 0, s>>>(b.extra, b.in, N, fixed);
        if (fixed) cudaEventRecord(event, s);
        cudaStreamWaitEvent(t, event, 0);
        add_one_slowly<<<1, N, 0, t>>>(b.out, b.extra, N, fixed);
    } else if (is("pinned_reused_early")) {
        for (int i = 0; i < N; i++) b.pinned[i] = (float)i;
        cudaMemcpyAsync(b.out, b.pinned, bytes, cudaMemcpyHostToDevice, s);
        if (fixed) cudaStreamSynchronize(s);
        for (int i = 0; i < N; i++) b.pinned[i] = -1;
    } else if (is("pinned_read_early")) {
        add_one_slowly<<<1, N, 0, s>>>(b.extra, b.in, N, fixed);
        cudaMemcpyAsync(b.pinned, b.extra, bytes, cudaMemcpyDeviceToHost, s);
        if (fixed) cudaStreamSynchronize(s);
        cudaMemcpy(b.out, b.pinned, bytes, cudaMemcpyHostToDevice);
    } else if (is("buffer_overwritten_early")) {        // t writes what s still reads
        add_one_slowly<<<1, N, 0, s>>>(b.out, b.in, N, fixed);
        cudaEventRecord(event, s);
        if (fixed) cudaStreamWaitEvent(t, event, 0);
        cudaMemsetAsync(b.in, 0, bytes, t);
    } else {
        found = false;
    }
    cudaStreamSynchronize(s), cudaStreamSynchronize(t);
    cudaStreamDestroy(s), cudaStreamDestroy(t), cudaEventDestroy(event);
    return found;
}

// Prints a digest of the output: bugs.sh compares those of several orders.
int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "usage: bugs CASE bug|fixed\n"), 2;
    bool fixed = strcmp(argv[2], "fixed") == 0;
    Buffers b;
    b.result.assign(N, 0.0f);
    std::vector<float> in(2 * N);
    for (int i = 0; i < 2 * N; i++) in[i] = (float)(i * 37 % 101);
    cudaMalloc(&b.out, N * sizeof(float)), cudaMalloc(&b.in, 2 * N * sizeof(float));
    cudaMalloc(&b.extra, N * sizeof(float));        // line: leak
    cudaMallocHost(&b.pinned, N * sizeof(float));
    for (int i = 0; i < N; i++) b.pinned[i] = 0;
    cudaMemcpy(b.in, in.data(), 2 * N * sizeof(float), cudaMemcpyHostToDevice);
    bool accumulates = strcmp(argv[1], "malloc_uninitialised") == 0;
    if (!accumulates) cudaMemset(b.out, 0, N * sizeof(float)), cudaMemset(b.extra, 0, N * sizeof(float));
    cudaDeviceSynchronize();        // from here on the streams of the cases are on their own
    if (!run_kernel(argv[1], fixed, b) && !run_host(argv[1], fixed, b)) return fprintf(stderr, "bugs: no case '%s'\n", argv[1]), 2;
    cudaDeviceSynchronize();
    cudaMemcpy(b.result.data(), b.out, N * sizeof(float), cudaMemcpyDeviceToHost);
    double digest = 0;
    for (float x : b.result) digest = digest * 1.001 + (double)x;
    if (isnan(digest)) printf("%s: NaN\n", argv[1]);
    else printf("%s: %.3f\n", argv[1], digest);
    cudaFree(b.out), cudaFree(b.in), cudaFree(b.extra), cudaFreeHost(b.pinned);
    return 0;
}
