// The CUDA runtime on the CPU: qualifiers, errors, streams and events, memory, kernel launches, device queries.
// Every .cu file starts with this header, as with nvcc.
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
    X(cudaSuccess, 0, "no error") \
    X(cudaErrorInvalidValue, 1, "invalid argument") \
    X(cudaErrorMemoryAllocation, 2, "out of memory") \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument") \
    X(cudaErrorInvalidDeviceFunction, 98, "invalid device function") \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected") \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal") \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle") \
    X(cudaErrorNotReady, 600, "device not ready") \
    X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered") \
    X(cudaErrorHostMemoryAlreadyRegistered, 712, "part or all of the requested memory range is already mapped") \
    X(cudaErrorHostMemoryNotRegistered, 713, "pointer does not correspond to a registered memory region") \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure") \
    X(cudaErrorNotSupported, 801, "operation not supported") \
    X(cudaErrorUnknown, 999, "unknown error")
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
// A refused call gives its error code, as in CUDA. The program may not look at it, so that the reason is said on stderr too.
inline __attribute__((format(printf, 4, 5))) cudaError_t refuse(cudaError_t e, const char *file, int line, const char *format, ...) {
    va_list args;
    fflush(stdout);
    fprintf(stderr, "emu: %s: ", cudaGetErrorName(e));
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, ", %s:%d\n", file, line);
    return result(e);
}
}
inline cudaError_t cudaPeekAtLastError() { return emu::last_error; }
inline cudaError_t cudaGetLastError() { cudaError_t e = emu::last_error; emu::last_error = cudaSuccess; return e; }

// ---- streams. Work is queued, and EMU_ORDER says when it runs:
//   0              as late as the program permits: when somebody waits for it, and only what is waited for
//   1              at once, when it is queued
//   2, 4, 6 ...    late, and whoever waits for one stream finds all others finished before it
//   3, 5, 7 ...    pieces of any stream at random, some when new work is queued, the rest when somebody waits
// A program that lacks an event or a synchronisation gives other results (poison, old values) in one order than in another.
namespace emu {
struct Stream;
struct Moment { Stream *stream; size_t number; };          // the end of the stream's operation of that number
struct Op { std::function<void()> work; std::vector<Moment> after; };
struct Stream {
    bool blocking = true, destroyed = false;               // blocking: ordered with the legacy default stream
    std::deque<Op> queue;
    size_t issued = 0, done = 0;                           // operations count from 1; the queue holds done + 1 ... issued
    bool pending() const { return done < issued; }
};
inline std::recursive_mutex runtime_mutex;
typedef std::lock_guard<std::recursive_mutex> Lock;
// never freed: they must outlive every static object of the program. The first is the default stream.
inline std::vector<Stream *> &streams() { static auto *all = new std::vector<Stream *>{new Stream}; return *all; }
inline Stream *stream_of(Stream *s) { return s ? s : streams()[0]; }
inline Random &stream_random() { static Random r(order); return r; }

inline void run_to(Stream *s, size_t number) {             // runs this stream's operations in order, and only what they have to wait for
    while (s->done < number) {
        Op op = std::move(s->queue.front());
        s->queue.pop_front();
        for (Moment m : op.after) run_to(m.stream, m.number);
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
inline void synchronize(Moment m) {
    Lock l(runtime_mutex);
    if (order % 2) while (m.stream->done < m.number) run_one_at_random();
    else if (order) for (Stream *other : streams()) if (other != m.stream) run_to(other, other->issued);
    run_to(m.stream, m.number);
}
inline void synchronize(Stream *s) { synchronize(Moment{s, s->issued}); }
inline void synchronize_device() {             // the newest stream first: programs create, and fill, the consumer after the producer
    Lock l(runtime_mutex);
    for (size_t i = streams().size(); i-- > 0;) synchronize(streams()[i]);
}
// Queues work in a stream. What the legacy default stream gets waits for all blocking streams, and they wait for it.
inline Moment enqueue(Stream *stream, const char *what, std::function<void()> work, std::vector<Moment> after = {}) {
    Lock l(runtime_mutex);
    Stream *s = stream_of(stream), *legacy = streams()[0];
    if (s->destroyed) stop("%s in a stream that was destroyed", what);
    for (size_t i = streams().size(); i-- > 0;) {          // the newest first, see synchronize_device
        Stream *other = streams()[i];
        bool ordered = s == legacy ? other->blocking : s->blocking && other == legacy;
        if (other != s && ordered && other->pending()) after.push_back({other, other->issued});
    }
    s->queue.push_back({std::move(work), std::move(after)});
    Moment m = {s, ++s->issued};
    if (order == 1) run_to(s, m.number);
    if (order % 2) while (stream_random()() % 4 == 0 && run_one_at_random()) {}
    return m;
}
struct Event {
    Moment moment = {nullptr, 0};              // null: never recorded, which counts as complete
    std::shared_ptr<double> seconds;           // the time at which it was reached
};
inline double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
// A query lets a little time pass, so that a loop that polls comes to an end.
inline cudaError_t query(Moment m) {
    Lock l(runtime_mutex);
    if (!m.stream || m.stream->done >= m.number) return cudaSuccess;
    run_to(m.stream, m.stream->done + 1);
    return cudaErrorNotReady;
}
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
inline cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }
inline cudaError_t cudaStreamDestroy(cudaStream_t s, EMU_HERE) {     // queued work is done first
    if (!s || s->destroyed) return emu::refuse(cudaErrorInvalidResourceHandle, file, line, "cudaStreamDestroy: not a stream any more");
    emu::synchronize(s);
    s->destroyed = true;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) { emu::synchronize(emu::stream_of(s)); return cudaSuccess; }
inline cudaError_t cudaStreamQuery(cudaStream_t s) { return emu::query({emu::stream_of(s), emu::stream_of(s)->issued}); }
inline cudaError_t cudaDeviceSynchronize() { emu::synchronize_device(); return cudaSuccess; }
inline cudaError_t cudaDeviceReset() { return cudaDeviceSynchronize(); }
inline cudaError_t cudaLaunchHostFunc(cudaStream_t s, void (*function)(void *), void *data) {
    emu::enqueue(s, "cudaLaunchHostFunc", [=] { function(data); });
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { *e = new emu::Event; return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, cudaEventDefault); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = nullptr) {
    auto seconds = e->seconds = std::make_shared<double>(0);
    e->moment = emu::enqueue(s, "cudaEventRecord", [seconds] { *seconds = emu::now_seconds(); });
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    if (e->moment.stream) emu::enqueue(s, "cudaStreamWaitEvent", [] {}, {e->moment});
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) { if (e->moment.stream) emu::synchronize(e->moment); return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t e) { return emu::query(e->moment); }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to, EMU_HERE) {
    *ms = 0;
    for (auto e : {from, to}) {
        if (!e->moment.stream) return emu::refuse(cudaErrorInvalidResourceHandle, file, line, "cudaEventElapsedTime: not recorded");
        if (e->moment.stream->done < e->moment.number) return emu::result(cudaErrorNotReady);
    }
    *ms = (float)((*to->seconds - *from->seconds) * 1e3);
    return cudaSuccess;
}

// ---- memory: each allocation has its exact size between guards, starts as poison, and is remembered with the line that asked for it
enum cudaMemoryType { cudaMemoryTypeUnregistered = 0, cudaMemoryTypeHost = 1, cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3 };
enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0, cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4
};
namespace emu {
struct Allocation {
    size_t bytes;
    cudaMemoryType type;
    const char *function;                      // which call made it; null: memory of the program itself, made known to CUDA
    const char *file;
    int line;
};
constexpr size_t kAllocationAlign = 256, kDeviceBytes = (size_t)16 << 30;
inline std::map<uintptr_t, Allocation> &allocations() { static auto *all = new std::map<uintptr_t, Allocation>; return *all; }
inline size_t device_bytes_used = 0;

// the allocation that [p, p + bytes) lies in, or null
inline const Allocation *find_allocation(const void *p, size_t bytes = 0) {
    Lock l(runtime_mutex);
    auto it = allocations().upper_bound((uintptr_t)p);
    if (it == allocations().begin()) return nullptr;
    --it;
    return (uintptr_t)p + bytes <= it->first + it->second.bytes ? &it->second : nullptr;
}
inline bool is_device(const void *p, size_t bytes) { auto a = find_allocation(p, bytes); return a && a->type != cudaMemoryTypeHost; }

inline void report_leaks() {                   // EMU_LEAKS=1: what is still allocated at the end of the program
    bool any = false;
    fflush(stdout);
    for (auto &[address, a] : allocations()) if (a.function) {
        fprintf(stderr, "emu: error: leak of %zu bytes, %s at %s:%d\n", a.bytes, a.function, a.file, a.line);
        any = true;
    }
    if (any) end_program();
}
inline cudaError_t allocate(void **p, size_t bytes, cudaMemoryType type, const char *function, const char *file, int line) {
    Lock l(runtime_mutex);
    static const bool reporting = env_number("EMU_LEAKS", 0) && atexit(report_leaks) == 0;
    (void)reporting;
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    bool device = type != cudaMemoryTypeHost;
    if ((device && bytes > kDeviceBytes - device_bytes_used) || !(*p = guarded_new(bytes, kAllocationAlign))) {
        return refuse(cudaErrorMemoryAllocation, file, line, "%s of %zu bytes", function, bytes);
    }
    memset(*p, kPoison, bytes);
    allocations()[(uintptr_t)*p] = {bytes, type, function, file, line};
    if (device) device_bytes_used += bytes;
    return cudaSuccess;
}
inline cudaError_t release(void *p, bool host, const char *function, const char *file, int line) {
    if (!p) return cudaSuccess;
    Lock l(runtime_mutex);
    auto it = allocations().find((uintptr_t)p);
    if (it == allocations().end() || !it->second.function || (it->second.type == cudaMemoryTypeHost) != host) {
        return refuse(cudaErrorInvalidValue, file, line, "%s of a pointer that was not allocated so, or was freed before", function);
    }
    if (!host) device_bytes_used -= it->second.bytes;
    guarded_delete(p, it->second.bytes, kAllocationAlign);
    allocations().erase(it);
    return cudaSuccess;
}
// why [p, p + bytes) cannot be one side of a copy; null if it can
enum Side { kHost, kDevice, kEither };
inline const char *copy_problem(const void *p, size_t bytes, Side side) {
    const Allocation *start = find_allocation(p), *whole = find_allocation(p, bytes);
    if (!p) return "is null";
    if (start && !whole) return "reaches beyond the end of its allocation";
    if (side == kDevice && (!start || start->type == cudaMemoryTypeHost)) return "is no device memory";
    if (side == kHost && start && start->type == cudaMemoryTypeDevice) return "is device memory";
    return nullptr;
}
inline cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, Stream *stream, bool wait, const char *function,
                        const char *file, int line) {
    if (!bytes) return cudaSuccess;
    Side from_side = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice ? kDevice : kHost;
    Side to_side = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice ? kDevice : kHost;
    if (kind == cudaMemcpyDefault) from_side = to_side = kEither;
    const char *problem = copy_problem(to, bytes, to_side);
    if (problem) return refuse(cudaErrorInvalidValue, file, line, "%s of %zu bytes: the destination %s", function, bytes, problem);
    problem = copy_problem(from, bytes, from_side);
    if (problem) return refuse(cudaErrorInvalidValue, file, line, "%s of %zu bytes: the source %s", function, bytes, problem);
    if (!wait && !find_allocation(from)) {     // documented: pageable memory is staged at the call, so that it may be reused at once
        auto staged = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
        enqueue(stream, function, [=] { memcpy(to, staged->data(), bytes); });
    } else {
        enqueue(stream, function, [=] { memmove(to, from, bytes); });
    }
    if (wait || !find_allocation(to)) synchronize(stream_of(stream));    // documented: a copy to pageable memory is complete at the return
    return cudaSuccess;
}
}
#define EMU_ALLOCATION(NAME, TYPE, ...)        /* NAME(T **p, size_t bytes, ...) gives memory of that type */ \
    template<class T> inline cudaError_t NAME(T **p, size_t bytes, __VA_ARGS__) { \
        return emu::allocate((void **)p, bytes, TYPE, #NAME, file, line); \
    }
EMU_ALLOCATION(cudaMalloc, cudaMemoryTypeDevice, EMU_HERE)
EMU_ALLOCATION(cudaMallocAsync, cudaMemoryTypeDevice, cudaStream_t, EMU_HERE)
EMU_ALLOCATION(cudaMallocManaged, cudaMemoryTypeManaged, unsigned = 1, EMU_HERE)
EMU_ALLOCATION(cudaMallocHost, cudaMemoryTypeHost, unsigned = 0, EMU_HERE)
EMU_ALLOCATION(cudaHostAlloc, cudaMemoryTypeHost, unsigned, EMU_HERE)
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4 };
enum { cudaHostRegisterDefault = 0, cudaHostRegisterPortable = 1, cudaHostRegisterReadOnly = 8 };
inline cudaError_t cudaFree(void *p, EMU_HERE) { emu::synchronize_device(); return emu::release(p, false, __func__, file, line); }
inline cudaError_t cudaFreeHost(void *p, EMU_HERE) { emu::synchronize_device(); return emu::release(p, true, __func__, file, line); }
inline cudaError_t cudaFreeAsync(void *p, cudaStream_t s, EMU_HERE) {
    emu::enqueue(s, __func__, [=] { emu::release(p, false, "cudaFreeAsync", file, line); });
    return cudaSuccess;
}
inline cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned, EMU_HERE) {
    if (emu::find_allocation(p)) return emu::refuse(cudaErrorHostMemoryAlreadyRegistered, file, line, "cudaHostRegister");
    emu::Lock l(emu::runtime_mutex);
    emu::allocations()[(uintptr_t)p] = {bytes, cudaMemoryTypeHost, nullptr, file, line};
    return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void *p, EMU_HERE) {
    emu::synchronize_device();
    auto a = emu::find_allocation(p);
    if (!a || a->function) return emu::refuse(cudaErrorHostMemoryNotRegistered, file, line, "cudaHostUnregister");
    emu::allocations().erase((uintptr_t)p);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s = nullptr, EMU_HERE) {
    return emu::copy(to, from, bytes, kind, s, false, __func__, file, line);
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, EMU_HERE) {
    bool wait = kind != cudaMemcpyDeviceToDevice;          // documented: the host does not wait for a copy from device to device
    return emu::copy(to, from, bytes, kind, nullptr, wait, __func__, file, line);
}
inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                                     cudaMemcpyKind kind, cudaStream_t s = nullptr, EMU_HERE) {
    if (width > std::min(to_pitch, from_pitch)) return emu::refuse(cudaErrorInvalidValue, file, line, "cudaMemcpy2D: width over pitch");
    cudaError_t e = cudaSuccess;
    for (size_t y = 0; y < height && !e; y++) {
        e = emu::copy((char *)to + y * to_pitch, (const char *)from + y * from_pitch, width, kind, s, false, __func__, file, line);
    }
    return e;
}
inline cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                                cudaMemcpyKind kind, EMU_HERE) {
    cudaError_t e = cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, kind, nullptr, file, line);
    return e || kind == cudaMemcpyDeviceToDevice ? e : cudaStreamSynchronize(nullptr);
}
inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s = nullptr, EMU_HERE) {
    const char *problem = bytes ? emu::copy_problem(p, bytes, emu::kEither) : nullptr;
    if (bytes && !problem && !emu::find_allocation(p)) problem = "is no device memory";
    if (problem) return emu::refuse(cudaErrorInvalidValue, file, line, "cudaMemset of %zu bytes: the destination %s", bytes, problem);
    if (bytes) emu::enqueue(s, "cudaMemset", [=] { memset(p, value, bytes); });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void *p, int value, size_t bytes, EMU_HERE) { return cudaMemsetAsync(p, value, bytes, nullptr, file, line); }
// __device__ and __constant__ variables are plain globals, known as device memory from the first of these calls on
namespace emu {
template<class T> inline char *symbol(const T &variable) {
    Lock l(runtime_mutex);
    allocations()[(uintptr_t)&variable] = {sizeof(T), cudaMemoryTypeDevice, nullptr, "", 0};
    return (char *)&variable;
}
}
template<class T> inline cudaError_t cudaGetSymbolAddress(void **p, const T &variable) { *p = emu::symbol(variable); return cudaSuccess; }
template<class T> inline cudaError_t cudaMemcpyToSymbol(T &variable, const void *from, size_t bytes, size_t offset = 0,
                                                        cudaMemcpyKind kind = cudaMemcpyHostToDevice, EMU_HERE) {
    return emu::copy(emu::symbol(variable) + offset, from, bytes, kind, nullptr, true, __func__, file, line);
}
template<class T> inline cudaError_t cudaMemcpyFromSymbol(void *to, const T &variable, size_t bytes, size_t offset = 0,
                                                          cudaMemcpyKind kind = cudaMemcpyDeviceToHost, EMU_HERE) {
    return emu::copy(to, emu::symbol(variable) + offset, bytes, kind, nullptr, true, __func__, file, line);
}
inline cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = emu::kDeviceBytes;
    *free_bytes = emu::kDeviceBytes - emu::device_bytes_used;
    return cudaSuccess;
}
struct cudaPointerAttributes { cudaMemoryType type; int device; void *devicePointer, *hostPointer; };
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
    auto found = emu::find_allocation(p);
    *a = {cudaMemoryTypeUnregistered, -1, nullptr, (void *)p};
    if (found) *a = {found->type, 0, (void *)p, found->type == cudaMemoryTypeDevice ? nullptr : (void *)p};
    return cudaSuccess;
}

// ---- a fault in a kernel becomes a report (the sanitizers have their own)
namespace emu {
#if !defined(EMU_ASAN) && !defined(EMU_TSAN)
inline void on_fault(int number, siginfo_t *info, void *) {
    Worker *w = worker;
    if (!w || !w->current) { signal(number, SIG_DFL); return; }         // the host's own: it happens again, without us
    uintptr_t p = (uintptr_t)info->si_addr, stack = (uintptr_t)w->current->stack;
    auto distance = [p](const void *start, size_t bytes) { return p - (uintptr_t)start - bytes; };       // wraps around before the end
    auto past = [&](const void *start, size_t bytes) { return distance(start, bytes) < 2 * kPage; };
    if (info->si_code == SI_KERNEL) stop("misaligned access of a vector type (a float4 lies at a multiple of 16 bytes), or a wild pointer");
    const char *hint = ". If this is an extern __shared__ array: the launch gives it no bytes, they are the third number in <<<>>>";
    if (p < kPage) stop("null pointer (address %zu)%s", (size_t)p, w->dynamic_bytes ? "" : hint);
    if (p < stack && stack - p <= kPage) stop("the stack of a CUDA thread, %zu KB, is full", kStackBytes >> 10);
    for (auto &v : w->shared_variables) if (past(v.memory, v.bytes)) {
        stop("out of bounds: %zu bytes past the end of __shared__ %s, which has %zu bytes", distance(v.memory, v.bytes), v.name, v.bytes);
    }
    if (past(w->dynamic_shared, w->dynamic_bytes)) {
        stop("out of bounds: %zu bytes past the end of the %zu bytes of dynamic shared memory",
             distance(w->dynamic_shared, w->dynamic_bytes), w->dynamic_bytes);
    }
    for (auto &[start, a] : allocations()) if (a.function && (past((void *)start, a.bytes) || (p < start && start - p <= 2 * kPage))) {
        stop("out of bounds: %zu bytes %s of %zu bytes, %s at %s:%d", p < start ? start - p : distance((void *)start, a.bytes),
             p < start ? "before the start" : "past the end", a.bytes, a.function, a.file, a.line);
    }
    stop("illegal address %p: in no allocation (freed?)", (void *)p);
}
inline const bool faults_are_reported = [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    return sigaction(SIGSEGV, &action, nullptr) == 0 && sigaction(SIGBUS, &action, nullptr) == 0;
}();
#endif

// ---- kernel launches: cuda.sed turns kernel<<<grid, block, shared_bytes, stream>>>(args) into
// EMU_LAUNCH((kernel), grid, block, shared_bytes, stream)(args)
inline std::map<const void *, int> &dynamic_shared_limits() {           // set by cudaFuncSetAttribute
    static auto *all = new std::map<const void *, int>;
    return *all;
}
// The kernel's address; not known for a template whose arguments only the call deduces. Tag makes the attempt depend on a template
// argument, so that it may fail without being an error.
struct KernelAddress { bool known; const void *address; };
template<class Tag, class R, class... P> KernelAddress address_of(R (*kernel)(P...)) { return {true, (const void *)kernel}; }
template<class F> KernelAddress kernel_address(F find) {
    if constexpr (std::is_invocable_v<F, int>) return find(0); else return {false, nullptr};
}
// a literal 0 or NULL given for a pointer parameter
template<class I> struct Zero {
    I value;
    operator I() const { return value; }
    template<class T> operator T *() const { return nullptr; }
};
template<class T> inline decltype(auto) zero_or_value(T &v) { if constexpr (std::is_integral_v<T>) return Zero<T>{v}; else return (v); }

struct Config { dim3 grid, block; size_t shared_bytes; Stream *stream; };
inline Config config(dim3 grid, dim3 block, size_t shared_bytes = 0, Stream *stream = nullptr) {
    return {grid, block, shared_bytes, stream};
}

template<class Kernel, class... A> struct Call {           // a kernel and its arguments, copied at the launch; run() is one CUDA thread
    Kernel kernel;
    std::tuple<A...> arguments;
    static void run(void *call) { ((Call *)call)->invoke(std::index_sequence_for<A...>()); }
    template<size_t... I> EMU_INLINE void invoke(std::index_sequence<I...>) {
        constexpr bool direct = std::is_invocable_v<Kernel &, A &...>;
        static_assert(direct || std::is_invocable_v<Kernel &, decltype(zero_or_value(std::declval<A &>()))...>,
                      "the kernel does not take these arguments");
        if constexpr (direct) kernel(std::get<I>(arguments)...); else kernel(zero_or_value(std::get<I>(arguments))...);
    }
};
template<class Kernel> struct Launch {
    Kernel kernel;
    KernelAddress address;
    const char *name, *file;
    int line;
    Config c;
    template<class... A> cudaError_t operator()(A &&...args) const {
        cudaError_t e = check_config();
        if (e) {
            return refuse(e, file, line, "launch of %s, grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of dynamic shared memory", name,
                          c.grid.x, c.grid.y, c.grid.z, c.block.x, c.block.y, c.block.z, c.shared_bytes);
        }
        int i = 0;
        (check_argument(++i, args), ...);
        typedef Call<Kernel, std::decay_t<A>...> ThisCall;
        Grid grid = {name, file, line, c.grid, c.block, c.shared_bytes, ThisCall::run, nullptr};
        enqueue(c.stream, name, [grid, call = ThisCall{kernel, {std::forward<A>(args)...}}]() mutable {
            grid.arguments = &call;
            run_grid(grid);
        });
        return cudaSuccess;
    }
    cudaError_t check_config() const {
        const dim3 &g = c.grid, &b = c.block;
        if (address.known && !address.address) return cudaErrorInvalidDeviceFunction;
        if (!g.x || !g.y || !g.z || g.x > INT_MAX || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
        if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
        if (b.x * b.y * b.z > kMaxThreads) return cudaErrorInvalidConfiguration;
        size_t limit = kMaxStaticShared;
        for (auto &[function, bytes] : dynamic_shared_limits()) {
            if (!address.known || function == address.address) limit = std::max(limit, (size_t)bytes);
        }
        return c.shared_bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
    }
    template<class T> void check_argument(int number, const T &v) const {
        if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>) {
            if (!v || find_allocation(v)) return;
            stop("argument %d of %s is no device pointer (host memory, or freed): %p, %s:%d", number, name, (const void *)v, file, line);
        }
    }
};
template<class Kernel> Launch<Kernel> launch(Kernel kernel, KernelAddress address, const char *name, const char *file, int line, Config c) {
    return {kernel, address, name, file, line, c};
}
}
#define EMU_STRING(...) #__VA_ARGS__
#define EMU_ADDRESS(KERNEL) \
    [=](auto tag) -> decltype(emu::address_of<decltype(tag)>(KERNEL)) { return emu::address_of<decltype(tag)>(KERNEL); }
#define EMU_LAUNCH(KERNEL, ...) emu::launch([=](auto &&...a) -> decltype(KERNEL(a...)) { return KERNEL(a...); }, \
    emu::kernel_address(EMU_ADDRESS(KERNEL)), EMU_STRING KERNEL, __FILE__, __LINE__, emu::config(__VA_ARGS__))

namespace emu {
template<class... P, size_t... I>
cudaError_t launch_pointers(const Launch<void (*)(P...)> &launch, void **args, std::index_sequence<I...>) {
    return launch(*(std::decay_t<P> *)args[I]...);
}
}
template<class... P> inline cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **args, size_t shared_bytes = 0,
                                                         cudaStream_t s = nullptr, EMU_HERE) {
    emu::KernelAddress address = {true, (const void *)kernel};
    auto launch = emu::launch(kernel, address, "cudaLaunchKernel", file, line, emu::config(grid, block, shared_bytes, s));
    return emu::launch_pointers(launch, args, std::index_sequence_for<P...>());
}

// ---- the device: one pretended card of compute capability 8.0
#define EMU_PROPERTIES(X)                      /* field, value, name and number of its cudaDeviceAttr */ \
    X(maxThreadsPerBlock, emu::kMaxThreads, MaxThreadsPerBlock, 1) \
    X(sharedMemPerBlock, emu::kMaxStaticShared, MaxSharedMemoryPerBlock, 8) \
    X(warpSize, 32, WarpSize, 10) \
    X(regsPerBlock, 65536, MaxRegistersPerBlock, 12) \
    X(multiProcessorCount, 4, MultiProcessorCount, 16) \
    X(memoryBusWidth, 256, GlobalMemoryBusWidth, 37) \
    X(l2CacheSize, 1 << 20, L2CacheSize, 38) \
    X(maxThreadsPerMultiProcessor, 2048, MaxThreadsPerMultiProcessor, 39) \
    X(asyncEngineCount, 1, AsyncEngineCount, 40) \
    X(unifiedAddressing, 1, UnifiedAddressing, 41) \
    X(major, 8, ComputeCapabilityMajor, 75) \
    X(minor, 0, ComputeCapabilityMinor, 76) \
    X(sharedMemPerMultiprocessor, emu::kMaxDynamicShared + 1024, MaxSharedMemoryPerMultiprocessor, 81) \
    X(regsPerMultiprocessor, 65536, MaxRegistersPerMultiprocessor, 82) \
    X(managedMemory, 1, ManagedMemory, 83) \
    X(cooperativeLaunch, 0, CooperativeLaunch, 95) \
    X(sharedMemPerBlockOptin, emu::kMaxDynamicShared, MaxSharedMemoryPerBlockOptin, 97) \
    X(maxBlocksPerMultiProcessor, 32, MaxBlocksPerMultiprocessor, 106)
#define EMU_PROPERTY_FIELD(FIELD, VALUE, NAME, NUMBER) std::decay_t<decltype(VALUE)> FIELD;
#define EMU_PROPERTY_SET(FIELD, VALUE, NAME, NUMBER) p->FIELD = VALUE;
#define EMU_ATTRIBUTE(FIELD, VALUE, NAME, NUMBER) cudaDevAttr##NAME = NUMBER,
#define EMU_ATTRIBUTE_VALUE(FIELD, VALUE, NAME, NUMBER) case cudaDevAttr##NAME: *value = (int)(VALUE); return cudaSuccess;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, totalConstMem;
    int maxThreadsDim[3], maxGridSize[3], integrated, ECCEnabled;
    EMU_PROPERTIES(EMU_PROPERTY_FIELD)
};
enum cudaDeviceAttr { EMU_PROPERTIES(EMU_ATTRIBUTE) };
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device, EMU_HERE) {
    if (device != 0) return emu::refuse(cudaErrorInvalidDevice, file, line, "device %d, there is only device 0", device);
    *p = cudaDeviceProp();
    snprintf(p->name, sizeof p->name, "emulator");
    p->totalGlobalMem = emu::kDeviceBytes;
    p->totalConstMem = 64 << 10;
    int dim[3] = {1024, 1024, 64}, grid[3] = {INT_MAX, 65535, 65535};
    memcpy(p->maxThreadsDim, dim, sizeof dim);
    memcpy(p->maxGridSize, grid, sizeof grid);
    EMU_PROPERTIES(EMU_PROPERTY_SET)
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int, EMU_HERE) {
    switch (attribute) { EMU_PROPERTIES(EMU_ATTRIBUTE_VALUE) }
    return emu::refuse(cudaErrorInvalidValue, file, line, "device attribute %d is not known to the emulator", (int)attribute);
}
inline cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device, EMU_HERE) {
    return device == 0 ? cudaSuccess : emu::refuse(cudaErrorInvalidDevice, file, line, "device %d, there is only device 0", device);
}
inline cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaProfilerStart() { return cudaSuccess; }
inline cudaError_t cudaProfilerStop() { return cudaSuccess; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};
template<class F> inline cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute attribute, int value, EMU_HERE) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (value < 0 || (size_t)value > emu::kMaxDynamicShared) {
        size_t most = emu::kMaxDynamicShared;
        return emu::refuse(cudaErrorInvalidValue, file, line, "%d bytes of dynamic shared memory, a block has %zu", value, most);
    }
    emu::dynamic_shared_limits()[(const void *)kernel] = value;
    return cudaSuccess;
}
template<class F> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, F *kernel) {
    auto set = emu::dynamic_shared_limits().find((const void *)kernel);
    int limit = set == emu::dynamic_shared_limits().end() ? (int)emu::kMaxStaticShared : set->second;
    *a = {0, 0, 0, emu::kMaxThreads, 32, 80, 80, limit};
    return cudaSuccess;
}
// occupancy by threads and shared memory; the emulator knows of no registers
template<class F> inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, F *, int block, size_t shared_bytes, EMU_HERE) {
    if (block <= 0) return emu::refuse(cudaErrorInvalidValue, file, line, "occupancy of blocks of %d threads", block);
    size_t by_threads = block > emu::kMaxThreads ? 0 : 2048 / block;
    size_t by_shared = (emu::kMaxDynamicShared + 1024) / (shared_bytes + 1024);
    *n = (int)std::min<size_t>({32, by_threads, by_shared});
    return cudaSuccess;
}
template<class F> inline cudaError_t cudaOccupancyMaxPotentialBlockSize(int *grid, int *block, F *, size_t = 0, int limit = 0) {
    *block = limit ? std::min(limit, emu::kMaxThreads) : emu::kMaxThreads;
    *grid = 4 * (2048 / *block);
    return cudaSuccess;
}
