// The CUDA runtime on the CPU: qualifiers, errors, memory, streams and events, kernel launches, device queries. Every .cu file starts with this header.
#pragma once
#ifndef CUDA_EMU
#define CUDA_EMU 1
#endif
#include "half.h"
#include <assert.h>
#include <limits.h>
#include <signal.h>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#if defined(EMU_ASAN) || defined(EMU_TSAN) || !defined(__OPTIMIZE__)
#define __forceinline__ inline
#else
#define __forceinline__ inline __attribute__((always_inline))
#endif
#define __shared__ static EMU_PER_THREAD __attribute__((aligned(16)))     // only what cuda.sed could not translate: no guards, no poison
#define CUDART_INF_F __builtin_huge_valf()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_VERSION 13000

// ---- errors
#define EMU_ERRORS(X) \
    X(cudaSuccess, 0, "no error") X(cudaErrorInvalidValue, 1, "invalid argument") X(cudaErrorMemoryAllocation, 2, "out of memory") \
    X(cudaErrorInitializationError, 3, "initialization error") X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument") \
    X(cudaErrorInvalidSymbol, 13, "invalid device symbol") X(cudaErrorInvalidDevicePointer, 17, "invalid device pointer") \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy") X(cudaErrorInvalidDeviceFunction, 98, "invalid device function") \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected") X(cudaErrorInvalidDevice, 101, "invalid device ordinal") \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle") X(cudaErrorNotReady, 600, "device not ready") \
    X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered") X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch") \
    X(cudaErrorHostMemoryAlreadyRegistered, 712, "part or all of the requested memory range is already mapped") \
    X(cudaErrorHostMemoryNotRegistered, 713, "pointer does not correspond to a registered memory region") \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure") X(cudaErrorNotSupported, 801, "operation not supported") X(cudaErrorUnknown, 999, "unknown error")
#define EMU_ERROR_VALUE(NAME, VALUE, TEXT) NAME = VALUE,
enum cudaError { EMU_ERRORS(EMU_ERROR_VALUE) };
typedef cudaError cudaError_t;
inline const char *cudaGetErrorName(cudaError_t e) {
#define EMU_ERROR_NAME(NAME, VALUE, TEXT) case NAME: return #NAME;
    switch (e) { EMU_ERRORS(EMU_ERROR_NAME) }
    return "unrecognized error code";
}
inline const char *cudaGetErrorString(cudaError_t e) {
#define EMU_ERROR_TEXT(NAME, VALUE, TEXT) case NAME: return TEXT;
    switch (e) { EMU_ERRORS(EMU_ERROR_TEXT) }
    return "unrecognized error code";
}
namespace emu {
inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t result(cudaError_t e) { if (e != cudaSuccess) last_error = e; return e; }
inline cudaError_t result(bool ok) { return result(ok ? cudaSuccess : cudaErrorInvalidValue); }
}
inline cudaError_t cudaPeekAtLastError() { return emu::last_error; }
inline cudaError_t cudaGetLastError() { cudaError_t e = emu::last_error; emu::last_error = cudaSuccess; return e; }

// ---- streams: work is queued and runs as late as the program permits, when a synchronisation asks for it. A missing event or synchronisation therefore
// reads what was there before (poison in fresh memory). EMU_ORDER says what happens at a synchronisation with one stream: 0 runs only what that stream
// needs, 1 runs everything in the other streams first, n >= 2 runs queued work of any stream at random, then and whenever new work is queued.
namespace emu {
struct Stream;
struct Op { const char *what; std::function<void()> work; std::vector<std::pair<Stream *, size_t>> after; };
struct Stream {
    bool blocking = true, destroyed = false;   // blocking: takes part in the legacy default stream's ordering
    std::deque<Op> queue;
    size_t issued = 0, done = 0;               // operations are numbered from 1; queue holds done + 1 .. issued
    bool pending() const { return done < issued; }
};
inline std::recursive_mutex runtime_mutex;
typedef std::lock_guard<std::recursive_mutex> Lock;
inline std::vector<Stream *> &streams() { static auto *all = new std::vector<Stream *>{new Stream}; return *all; }      // [0]: the default stream
inline Stream *stream_of(Stream *s) { return s ? s : streams()[0]; }
inline Random &stream_random() { static Random r(order); return r; }

inline void run_to(Stream *s, size_t number) {             // this stream's operations in order, and only what they have to wait for
    while (s->done < number) {
        Op op = std::move(s->queue.front());
        s->queue.pop_front();
        for (auto &dependency : op.after) run_to(dependency.first, dependency.second);
        op.work();
        s->done++;
    }
}
inline bool run_one_at_random() {
    std::vector<Stream *> ready;
    for (Stream *s : streams()) if (s->pending()) ready.push_back(s);
    if (ready.empty()) return false;
    Stream *s = ready[stream_random()() % ready.size()];
    run_to(s, s->done + 1);
    return true;
}
inline void synchronize(Stream *s, size_t number) {
    if (order == 1) for (Stream *other : streams()) if (other != s) run_to(other, other->issued);
    if (order >= 2) while (s->done < number) run_one_at_random();
    run_to(s, number);
}
inline void synchronize(Stream *s) { Lock l(runtime_mutex); synchronize(s, s->issued); }
inline void synchronize_device() {                         // order 0: the newest stream first, 1: the oldest
    Lock l(runtime_mutex);
    if (order >= 2) while (run_one_at_random()) {}
    auto &all = streams();
    for (size_t i = 0; i < all.size(); i++) { Stream *s = all[order == 0 ? all.size() - 1 - i : i]; run_to(s, s->issued); }
}
// Queues work in a stream. A legacy default stream operation waits for all blocking streams, and they wait for it.
inline size_t enqueue(Stream *stream, const char *what, std::function<void()> work, std::vector<std::pair<Stream *, size_t>> after = {}) {
    Lock l(runtime_mutex);
    Stream *s = stream_of(stream), *legacy = streams()[0];
    if (s->destroyed) stop("%s in a stream that was destroyed", what);
    for (Stream *other : streams()) {
        if (other != s && other->pending() && (s == legacy ? other->blocking : s->blocking && other == legacy)) after.push_back({other, other->issued});
    }
    s->queue.push_back({what, std::move(work), std::move(after)});
    size_t number = ++s->issued;
    if (order >= 2) while (stream_random()() % 4 == 0 && run_one_at_random()) {}
    return number;
}
struct Event {
    Stream *stream = nullptr;
    size_t number = 0;                         // complete when the stream has done this many operations
    std::shared_ptr<double> seconds = std::make_shared<double>(0);
};
inline double now_seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}
typedef emu::Stream *cudaStream_t;
typedef emu::Event *cudaEvent_t;
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    emu::Lock l(emu::runtime_mutex);
    emu::streams().push_back(*s = new emu::Stream);
    (*s)->blocking = !(flags & cudaStreamNonBlocking);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int) { return cudaStreamCreateWithFlags(s, flags); }
inline cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {     // queued work is done first
    if (!s || s->destroyed) return emu::result(cudaErrorInvalidResourceHandle);
    emu::synchronize(s);
    s->destroyed = true;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) { emu::synchronize(emu::stream_of(s)); return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { emu::synchronize_device(); return cudaSuccess; }
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {  // a query lets time pass, so that a loop that polls comes to an end
    emu::Lock l(emu::runtime_mutex);
    emu::Stream *s = emu::stream_of(stream);
    if (!s->pending()) return cudaSuccess;
    emu::run_to(s, s->done + 1);
    return cudaErrorNotReady;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { *e = new emu::Event; return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t *e, unsigned flags = cudaEventDefault) { return cudaEventCreateWithFlags(e, flags); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = nullptr) {
    e->stream = emu::stream_of(s);
    e->seconds = std::make_shared<double>(0);
    auto seconds = e->seconds;
    e->number = emu::enqueue(s, "cudaEventRecord", [seconds] { *seconds = emu::now_seconds(); });
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    if (e->stream) emu::enqueue(s, "cudaStreamWaitEvent", [] {}, {{e->stream, e->number}});
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    emu::Lock l(emu::runtime_mutex);
    if (e->stream) emu::synchronize(e->stream, e->number);
    return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t e) {
    emu::Lock l(emu::runtime_mutex);
    if (!e->stream || e->stream->done >= e->number) return cudaSuccess;
    emu::run_to(e->stream, e->stream->done + 1);
    return cudaErrorNotReady;
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = 0;
    if (!a->stream || !b->stream) return emu::result(cudaErrorInvalidResourceHandle);
    if (a->stream->done < a->number || b->stream->done < b->number) return emu::result(cudaErrorNotReady);
    *ms = (float)((*b->seconds - *a->seconds) * 1e3);
    return cudaSuccess;
}
typedef void (*cudaHostFn_t)(void *);
inline cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) { emu::enqueue(s, "cudaLaunchHostFunc", [=] { f(data); }); return cudaSuccess; }
inline cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return cudaSuccess; }

// ---- memory: each allocation has its exact size between guards, is filled with poison, and is remembered with the line that asked for it
enum cudaMemoryType { cudaMemoryTypeUnregistered = 0, cudaMemoryTypeHost = 1, cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3 };
enum cudaMemcpyKind { cudaMemcpyHostToHost = 0, cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
namespace emu {
struct Allocation { size_t bytes; cudaMemoryType type; const char *function, *file; int line; };    // function: null if the program owns the memory
constexpr size_t kAllocationAlign = 256, kDeviceBytes = (size_t)16 << 30;
inline std::map<uintptr_t, Allocation> &allocations() { static auto *all = new std::map<uintptr_t, Allocation>; return *all; }
inline size_t device_bytes_used = 0;
inline const bool report_leaks = env_number("EMU_LEAKS", 0) != 0;

// the allocation that [p, p + bytes) lies in, or null
inline const Allocation *find_allocation(const void *p, size_t bytes = 0) {
    Lock l(runtime_mutex);
    auto it = allocations().upper_bound((uintptr_t)p);
    if (it == allocations().begin()) return nullptr;
    --it;
    return (uintptr_t)p + bytes <= it->first + it->second.bytes ? &it->second : nullptr;
}
inline bool is_device(const void *p, size_t bytes) { auto a = find_allocation(p, bytes); return a && a->type != cudaMemoryTypeHost; }
inline bool is_pageable(const void *p) { return !find_allocation(p); }
inline void leak_report() {
    int n = 0;
    fflush(stdout);
    for (auto &a : allocations()) if (a.second.function) {
        fprintf(stderr, "emu: error: leak of %zu bytes, %s at %s:%d\n", a.second.bytes, a.second.function, a.second.file, a.second.line);
        n++;
    }
    if (n) _exit(1);
}
inline cudaError_t allocate(void **p, size_t bytes, cudaMemoryType type, const char *function, const char *file, int line) {
    Lock l(runtime_mutex);
    static int at_exit = report_leaks ? atexit(leak_report) : 0;
    (void)at_exit;
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    if (type != cudaMemoryTypeHost && device_bytes_used + bytes > kDeviceBytes) return result(cudaErrorMemoryAllocation);
    if (!(*p = guarded_new(bytes, kAllocationAlign))) return result(cudaErrorMemoryAllocation);
    memset(*p, kPoison, bytes);
    allocations()[(uintptr_t)*p] = {bytes, type, function, file, line};
    if (type != cudaMemoryTypeHost) device_bytes_used += bytes;
    return cudaSuccess;
}
inline cudaError_t release(void *p, bool host) {
    if (!p) return cudaSuccess;
    Lock l(runtime_mutex);
    auto it = allocations().find((uintptr_t)p);
    if (it == allocations().end() || !it->second.function || (it->second.type == cudaMemoryTypeHost) != host) return result(cudaErrorInvalidValue);
    if (!host) device_bytes_used -= it->second.bytes;
    guarded_delete(p, it->second.bytes, kAllocationAlign);
    allocations().erase(it);
    return cudaSuccess;
}
inline cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, Stream *stream, bool wait) {
    if (!bytes) return cudaSuccess;
    bool to_device = is_device(to, bytes), from_device = is_device(from, bytes);
    if (!to || !from || (int)kind < 0 || kind > cudaMemcpyDefault) return result(cudaErrorInvalidValue);
    bool wants_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice, wants_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && ((wants_to && !to_device) || (wants_from && !from_device))) return result(cudaErrorInvalidValue);
    if ((find_allocation(to) && !find_allocation(to, bytes)) || (find_allocation(from) && !find_allocation(from, bytes))) return result(cudaErrorInvalidValue);
    if (is_pageable(from) && !wait) {          // documented: staged at the call, so that the source may be reused at once
        auto staged = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
        enqueue(stream, "cudaMemcpyAsync", [=] { memcpy(to, staged->data(), bytes); });
    } else enqueue(stream, "cudaMemcpy", [=] { memmove(to, from, bytes); });
    if (wait || is_pageable(to)) synchronize(stream_of(stream));         // documented: a copy to pageable memory has completed at the return
    return cudaSuccess;
}
}
#define EMU_ALLOCATE(TYPE) emu::allocate((void **)p, bytes, TYPE, __func__, file, line)
template<class T> inline cudaError_t cudaMalloc(T **p, size_t bytes, EMU_HERE) { return EMU_ALLOCATE(cudaMemoryTypeDevice); }
template<class T> inline cudaError_t cudaMallocAsync(T **p, size_t bytes, cudaStream_t, EMU_HERE) { return EMU_ALLOCATE(cudaMemoryTypeDevice); }
template<class T> inline cudaError_t cudaMallocManaged(T **p, size_t bytes, unsigned = 1, EMU_HERE) { return EMU_ALLOCATE(cudaMemoryTypeManaged); }
template<class T> inline cudaError_t cudaMallocHost(T **p, size_t bytes, unsigned = 0, EMU_HERE) { return EMU_ALLOCATE(cudaMemoryTypeHost); }
template<class T> inline cudaError_t cudaHostAlloc(T **p, size_t bytes, unsigned, EMU_HERE) { return EMU_ALLOCATE(cudaMemoryTypeHost); }
inline cudaError_t cudaFree(void *p) { emu::synchronize_device(); return emu::release(p, false); }
inline cudaError_t cudaFreeHost(void *p) { emu::synchronize_device(); return emu::release(p, true); }
inline cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { emu::enqueue(s, "cudaFreeAsync", [=] { emu::release(p, false); }); return cudaSuccess; }
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4, cudaHostRegisterDefault = 0, cudaHostRegisterReadOnly = 8 };
inline cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned, EMU_HERE) {
    if (emu::find_allocation(p)) return emu::result(cudaErrorHostMemoryAlreadyRegistered);
    emu::Lock l(emu::runtime_mutex);
    emu::allocations()[(uintptr_t)p] = {bytes, cudaMemoryTypeHost, nullptr, file, line};
    return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void *p) {
    emu::synchronize_device();
    auto a = emu::find_allocation(p);
    if (!a || a->function) return emu::result(cudaErrorHostMemoryNotRegistered);
    emu::allocations().erase((uintptr_t)p);
    return cudaSuccess;
}
template<class T> inline cudaError_t cudaHostGetDevicePointer(T **device, void *host, unsigned) { *device = (T *)host; return cudaSuccess; }

inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s = nullptr) { return emu::copy(to, from, bytes, kind, s, false); }
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return emu::copy(to, from, bytes, kind, nullptr, kind != cudaMemcpyDeviceToDevice);      // documented: from device to device the host does not wait
}
inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t s = nullptr) {
    if (width > to_pitch || width > from_pitch) return emu::result(cudaErrorInvalidValue);
    for (size_t y = 0; y < height; y++) {
        cudaError_t e = emu::copy((char *)to + y * to_pitch, (const char *)from + y * from_pitch, width, kind, s, false);
        if (e) return e;
    }
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind) {
    cudaError_t e = cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, kind);
    return e || kind == cudaMemcpyDeviceToDevice ? e : cudaStreamSynchronize(nullptr);
}
inline cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t s = nullptr) { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, s); }
inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s = nullptr) {
    if (bytes && !emu::find_allocation(p, bytes)) return emu::result(cudaErrorInvalidValue);
    if (bytes) emu::enqueue(s, "cudaMemset", [=] { memset(p, value, bytes); });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes); }
inline cudaError_t cudaMemset2DAsync(void *p, size_t pitch, int value, size_t width, size_t height, cudaStream_t s = nullptr) {
    for (size_t y = 0; y < height; y++) { cudaError_t e = cudaMemsetAsync((char *)p + y * pitch, value, width, s); if (e) return e; }
    return cudaSuccess;
}
inline cudaError_t cudaMemset2D(void *p, size_t pitch, int value, size_t width, size_t height) { return cudaMemset2DAsync(p, pitch, value, width, height); }
// __device__ and __constant__ variables are plain globals; the first use by one of these makes them known as device memory
namespace emu {
template<class T> inline char *symbol(T &variable) {
    Lock l(runtime_mutex);
    allocations()[(uintptr_t)&variable] = {sizeof(T), cudaMemoryTypeDevice, nullptr, "", 0};
    return (char *)&variable;
}
}
template<class T> inline cudaError_t cudaGetSymbolAddress(void **p, const T &variable) { *p = emu::symbol(variable); return cudaSuccess; }
template<class T> inline cudaError_t cudaGetSymbolSize(size_t *bytes, const T &) { *bytes = sizeof(T); return cudaSuccess; }
template<class T> inline cudaError_t cudaMemcpyToSymbolAsync(T &variable, const void *from, size_t bytes, size_t offset, cudaMemcpyKind kind, cudaStream_t s = nullptr) {
    return emu::copy(emu::symbol(variable) + offset, from, bytes, kind, s, false);
}
template<class T> inline cudaError_t cudaMemcpyToSymbol(T &variable, const void *from, size_t bytes, size_t offset = 0, cudaMemcpyKind kind = cudaMemcpyHostToDevice) {
    return emu::copy(emu::symbol(variable) + offset, from, bytes, kind, nullptr, true);
}
template<class T> inline cudaError_t cudaMemcpyFromSymbol(void *to, const T &variable, size_t bytes, size_t offset = 0, cudaMemcpyKind kind = cudaMemcpyDeviceToHost) {
    return emu::copy(to, emu::symbol(variable) + offset, bytes, kind, nullptr, true);
}
inline cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = emu::kDeviceBytes;
    *free_bytes = emu::kDeviceBytes - emu::device_bytes_used;
    return cudaSuccess;
}
struct cudaPointerAttributes { cudaMemoryType type; int device; void *devicePointer, *hostPointer; };
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
    auto found = emu::find_allocation(p);
    a->type = found ? found->type : cudaMemoryTypeUnregistered;
    a->device = found ? 0 : -1;
    a->devicePointer = found ? (void *)p : nullptr;
    a->hostPointer = found && found->type == cudaMemoryTypeDevice ? nullptr : (void *)p;
    return cudaSuccess;
}

// ---- the report of a fault in a kernel (without sanitizers, which have their own)
namespace emu {
#if !defined(EMU_ASAN) && !defined(EMU_TSAN)
inline void on_fault(int signal_number, siginfo_t *info, void *) {
    Worker *w = worker;
    if (!w || !w->current) { signal(signal_number, SIG_DFL); return; }                       // the host's own: happens again, without us
    uintptr_t p = (uintptr_t)info->si_addr;
    if (info->si_code == SI_KERNEL || !p) stop("%s", p ? "invalid address" : "null pointer, or misaligned access of a vector type (float4 needs 16-byte alignment)");
    if (p < (uintptr_t)w->current->stack && p + kPage >= (uintptr_t)w->current->stack) stop("the stack of a CUDA thread, %zu KB, is full", kStackBytes >> 10);
    auto past = [=](const void *start, size_t bytes) { uintptr_t end = (uintptr_t)start + bytes; return p >= end && p < end + kPage + kAllocationAlign; };
    for (auto &v : w->shared_variables) if (past(v.memory, v.bytes)) {
        stop("out of bounds: %zu bytes past the end of __shared__ %s, which has %zu bytes", p - (uintptr_t)v.memory - v.bytes, v.name, v.bytes);
    }
    if (past(w->dynamic_shared, w->dynamic_bytes)) {
        stop("out of bounds: %zu bytes past the end of the %zu bytes of dynamic shared memory", p - (uintptr_t)w->dynamic_shared - w->dynamic_bytes, w->dynamic_bytes);
    }
    for (auto &a : allocations()) {
        const Allocation &m = a.second;
        if (past((void *)a.first, m.bytes)) stop("out of bounds: %zu bytes past the end of %zu bytes, %s at %s:%d", p - a.first - m.bytes, m.bytes, m.function, m.file, m.line);
        if (p < a.first && p + kPage + kAllocationAlign >= a.first) stop("out of bounds: %zu bytes before %zu bytes, %s at %s:%d", a.first - p, m.bytes, m.function, m.file, m.line);
    }
    stop("illegal address %p: in no allocation (freed?)", (void *)p);
}
inline const int fault_handler_installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    return sigaction(SIGSEGV, &action, nullptr) + sigaction(SIGBUS, &action, nullptr);
}();
#endif

// ---- kernel launches. cuda.sed turns kernel<<<grid, block, shared_bytes, stream>>>(args) into EMU_LAUNCH((kernel), grid, block, shared_bytes, stream)(args).
inline std::map<const void *, int> &dynamic_shared_limits() { static auto *all = new std::map<const void *, int>; return *all; }    // cudaFuncSetAttribute

// kernel_address: the kernel's address, or not known for a template whose arguments only the call deduces. Tag makes the attempt depend on a template
// argument, so that it may fail without being an error.
struct KernelAddress { bool known; const void *address; };
template<class Tag, class R, class... P> KernelAddress address_of(R (*kernel)(P...)) { return {true, (const void *)kernel}; }
template<class F> KernelAddress kernel_address(F find) { if constexpr (std::is_invocable_v<F, int>) return find(0); else return {false, nullptr}; }

inline cudaError_t check_launch(dim3 g, dim3 b, size_t shared_bytes, KernelAddress kernel) {
    if (kernel.known && !kernel.address) return cudaErrorInvalidDeviceFunction;
    if (!g.x || !g.y || !g.z || g.x > INT_MAX || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
    if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64 || (size_t)b.x * b.y * b.z > (size_t)kMaxThreads) return cudaErrorInvalidConfiguration;
    size_t limit = kMaxStaticShared;
    for (auto &l : dynamic_shared_limits()) if (!kernel.known || l.first == kernel.address) limit = std::max(limit, (size_t)l.second);
    return shared_bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}
// a literal 0 or NULL given for a pointer parameter
template<class I> struct Zero { I value; operator I() const { return value; } template<class T> operator T *() const { return nullptr; } };
template<class T> inline decltype(auto) zero_or_value(T &v) { if constexpr (std::is_integral_v<T>) return Zero<T>{v}; else return (v); }

struct Config { dim3 grid, block; size_t shared_bytes; Stream *stream; };
inline Config config(dim3 grid, dim3 block, size_t shared_bytes = 0, Stream *stream = nullptr) { return {grid, block, shared_bytes, stream}; }

template<class Kernel> struct Launch {
    Kernel kernel;
    KernelAddress address;
    const char *name, *file;
    int line;
    Config c;
    template<class... A> cudaError_t operator()(A &&...args) const {
        int i = 0;
        cudaError_t e = check_launch(c.grid, c.block, c.shared_bytes, address);
        if (e) return result(e);
        (check_argument(++i, args), ...);
        enqueue(c.stream, name, [self = *this, values = std::tuple<std::decay_t<A>...>(std::forward<A>(args)...)]() mutable {
            struct Call { Kernel *kernel; decltype(values) *arguments; } call = {&self.kernel, &values};
            auto body = [](void *p) {
                Call &k = *(Call *)p;
                std::apply([&](auto &...a) {
                    constexpr bool direct = std::is_invocable_v<Kernel &, decltype(a)...>;
                    static_assert(direct || std::is_invocable_v<Kernel &, decltype(zero_or_value(a))...>, "the kernel does not take these arguments");
                    if constexpr (direct) (*k.kernel)(a...); else (*k.kernel)(zero_or_value(a)...);
                }, *k.arguments);
            };
            run_grid({self.name, self.file, self.line, self.c.grid, self.c.block, self.c.shared_bytes, body, &call});
        });
        return cudaSuccess;
    }
    template<class T> void check_argument(int number, const T &v) const {
        if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>) {
            if (v && !find_allocation(v)) stop("argument %d of %s is no device pointer (host memory, or freed): %p, %s:%d", number, name, (const void *)v, file, line);
        }
    }
};
template<class Kernel> inline Launch<Kernel> launch(Kernel kernel, KernelAddress address, const char *name, const char *file, int line, Config c) {
    return {kernel, address, name, file, line, c};
}
}
#define EMU_STRING(...) #__VA_ARGS__
#define EMU_LAUNCH(KERNEL, ...) emu::launch([=](auto &&...a) -> decltype(KERNEL(a...)) { return KERNEL(a...); }, \
    emu::kernel_address([=](auto tag) -> decltype(emu::address_of<decltype(tag)>(KERNEL)) { return emu::address_of<decltype(tag)>(KERNEL); }), \
    EMU_STRING KERNEL, __FILE__, __LINE__, emu::config(__VA_ARGS__))
namespace emu {
template<class... P, size_t... I> inline cudaError_t launch_by_pointers(void (*kernel)(P...), dim3 grid, dim3 block, void **args, size_t shared_bytes, Stream *stream,
    std::index_sequence<I...>, const char *file, int line) {
    return launch(kernel, {true, (const void *)kernel}, "kernel", file, line, config(grid, block, shared_bytes, stream))(*(std::decay_t<P> *)args[I]...);
}
}
template<class... P> inline cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **args, size_t shared_bytes = 0, cudaStream_t s = nullptr, EMU_HERE) {
    return emu::launch_by_pointers(kernel, grid, block, args, shared_bytes, s, std::index_sequence_for<P...>(), file, line);
}

// ---- the device: one pretended card of compute capability 8.0
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor, reservedSharedMemPerBlock, totalConstMem;
    int major, minor, multiProcessorCount, maxThreadsPerMultiProcessor, maxThreadsPerBlock, maxBlocksPerMultiProcessor, warpSize, regsPerBlock, regsPerMultiprocessor;
    int l2CacheSize, persistingL2CacheMaxSize, memoryBusWidth, maxThreadsDim[3], maxGridSize[3], concurrentKernels, asyncEngineCount, ECCEnabled, integrated;
    int canMapHostMemory, unifiedAddressing, managedMemory, cooperativeLaunch, pciBusID, pciDeviceID, pciDomainID;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    if (device != 0) return emu::result(cudaErrorInvalidDevice);
    *p = cudaDeviceProp();
    snprintf(p->name, sizeof p->name, "emulator");
    p->totalGlobalMem = emu::kDeviceBytes; p->totalConstMem = 64 << 10;
    p->sharedMemPerBlock = emu::kMaxStaticShared; p->sharedMemPerBlockOptin = emu::kMaxDynamicShared;
    p->sharedMemPerMultiprocessor = emu::kMaxDynamicShared + 1024; p->reservedSharedMemPerBlock = 1024;
    p->major = 8; p->multiProcessorCount = 4; p->maxThreadsPerMultiProcessor = 2048; p->maxThreadsPerBlock = emu::kMaxThreads; p->maxBlocksPerMultiProcessor = 32;
    p->warpSize = 32; p->regsPerBlock = p->regsPerMultiprocessor = 65536; p->l2CacheSize = 1 << 20; p->memoryBusWidth = 256;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64; p->maxGridSize[0] = INT_MAX; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->concurrentKernels = p->asyncEngineCount = p->canMapHostMemory = p->unifiedAddressing = p->managedMemory = 1;
    return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10, cudaDevAttrClockRate = 13,
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMemoryClockRate = 36, cudaDevAttrGlobalMemoryBusWidth = 37, cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrCooperativeLaunch = 95, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
inline cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int device) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, device)) return cudaErrorInvalidDevice;
    switch (a) {
        case cudaDevAttrMaxThreadsPerBlock: *v = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *v = (int)p.sharedMemPerBlock; break;
        case cudaDevAttrWarpSize: *v = p.warpSize; break;
        case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: *v = 1000000; break;     // kHz
        case cudaDevAttrMultiProcessorCount: *v = p.multiProcessorCount; break;
        case cudaDevAttrGlobalMemoryBusWidth: *v = p.memoryBusWidth; break;
        case cudaDevAttrL2CacheSize: *v = p.l2CacheSize; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *v = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrComputeCapabilityMajor: *v = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *v = p.minor; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = (int)p.sharedMemPerMultiprocessor; break;
        case cudaDevAttrCooperativeLaunch: *v = p.cooperativeLaunch; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = (int)p.sharedMemPerBlockOptin; break;
        default: return emu::result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return emu::result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
inline cudaError_t cudaDeviceReset() { emu::synchronize_device(); return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaProfilerStart() { return cudaSuccess; }
inline cudaError_t cudaProfilerStop() { return cudaSuccess; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaFuncCache { cudaFuncCachePreferNone, cudaFuncCachePreferShared, cudaFuncCachePreferL1, cudaFuncCachePreferEqual };
struct cudaFuncAttributes { size_t sharedSizeBytes, constSizeBytes, localSizeBytes; int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes; };
template<class F> inline cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute a, int value) {
    if (!kernel) return emu::result(cudaErrorInvalidDeviceFunction);
    if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return emu::result(a == cudaFuncAttributePreferredSharedMemoryCarveout);
    if (value < 0 || (size_t)value > emu::kMaxDynamicShared) return emu::result(cudaErrorInvalidValue);
    emu::dynamic_shared_limits()[(const void *)kernel] = value;
    return cudaSuccess;
}
template<class F> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, F *kernel) {
    if (!kernel) return emu::result(cudaErrorInvalidDeviceFunction);
    auto set = emu::dynamic_shared_limits().find((const void *)kernel);
    int limit = set == emu::dynamic_shared_limits().end() ? (int)emu::kMaxStaticShared : set->second;
    *a = {0, 0, 0, emu::kMaxThreads, 32, 80, 80, limit};
    return cudaSuccess;
}
template<class F> inline cudaError_t cudaFuncSetCacheConfig(F *, cudaFuncCache) { return cudaSuccess; }
// occupancy by threads and shared memory; the emulator knows of no registers
template<class F> inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, F *, int block, size_t shared_bytes) {
    if (block <= 0) return emu::result(cudaErrorInvalidValue);
    *n = block > emu::kMaxThreads ? 0 : (int)std::min<size_t>({32, 2048 / (size_t)block, (emu::kMaxDynamicShared + 1024) / (shared_bytes + 1024)});
    return cudaSuccess;
}
template<class F> inline cudaError_t cudaOccupancyMaxPotentialBlockSize(int *grid, int *block, F *, size_t = 0, int limit = 0) {
    *block = limit ? std::min(limit, emu::kMaxThreads) : emu::kMaxThreads;
    *grid = 4 * (2048 / *block);
    return cudaSuccess;
}
