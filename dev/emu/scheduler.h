// The scheduler: runs a grid on the CPU. A block runs on one OS thread; its CUDA threads are fibers that take turns there.
// OpenMP spreads the blocks over cores.
//
// A fiber takes the next thread that has not started yet whenever its own returns, so that a kernel without barriers runs as a
// plain loop on one fiber. A thread that has to wait (barrier, warp collective) leaves its fiber suspended, and the next thread
// starts on another one. Who goes first is free, as on a GPU, and the output of a correct program does not depend on it.
// EMU_ORDER chooses: 0 forward; 1 backward (the last thread starts first, the one that became ready last goes on first);
// n >= 2 is the seed of a random order of blocks, warps and threads. Streams have orders too: see cuda_runtime.h.
#pragma once
#include "fiber.h"
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <algorithm>
#include <atomic>
#include <deque>
#include <new>
#include <numeric>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#define EMU_INLINE inline __attribute__((always_inline))
#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()    // as last parameters: the caller's source line
#if defined(EMU_ASAN) || defined(EMU_TSAN)
#define EMU_PER_THREAD                         // one OS thread runs everything
#else
#define EMU_PER_THREAD thread_local
#endif

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return uint3{x, y, z}; }
};

// The built-in variables belong to the OS thread: set at every switch. Plain data, so that an access is one instruction.
namespace emu { struct Dim { unsigned x, y, z; operator dim3() const { return dim3(x, y, z); } }; }
inline __thread uint3 threadIdx, blockIdx;
inline __thread emu::Dim blockDim, gridDim;
static constexpr int warpSize = 32;

namespace emu {
constexpr int kWarp = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxDynamicShared = 227 << 10, kMaxStaticShared = 48 << 10;
constexpr int kPoison = 0xff;                  // fills memory that was never written: NaN as float, half and bfloat16, -1 as an integer

inline unsigned env_number(const char *name, unsigned otherwise) {
    const char *value = getenv(name);
    return value ? (unsigned)strtoul(value, nullptr, 10) : otherwise;
}
inline const unsigned order = env_number("EMU_ORDER", 0);

struct Random {                                // xorshift64*
    uint64_t state;
    uint64_t operator()() { state ^= state >> 12; state ^= state << 25; state ^= state >> 27; return state * 0x2545F4914F6CDD1Dull >> 16; }
    explicit Random(uint64_t seed) : state((seed + 1) * 0x9E3779B97F4A7C15ull) {}
};

struct Grid {                                  // one launch
    const char *name, *file;
    int line;
    dim3 grid, block;
    size_t shared_bytes;
    void (*body)(void *arguments);             // runs one CUDA thread
    void *arguments;
};

// ---- memory with guards: an access beyond either end is a fault (or ASan's report). The end lies as close to its guard page as
// the alignment permits.
#ifdef EMU_ASAN
inline void *guarded_new(size_t bytes, size_t align) { void *p; return posix_memalign(&p, align, bytes) ? nullptr : p; }
inline void guarded_delete(void *p, size_t, size_t) { free(p); }
#else
inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline void *guarded_new(size_t bytes, size_t align) {
    size_t used = round_up(bytes, align), whole = round_up(used, kPage);
    char *p = (char *)mmap(nullptr, whole + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p + kPage, whole, PROT_READ | PROT_WRITE)) return nullptr;
    return p + kPage + whole - used;
}
inline void guarded_delete(void *p, size_t bytes, size_t align) {
    size_t used = round_up(bytes, align), whole = round_up(used, kPage);
    munmap((char *)p + used - whole - kPage, whole + 2 * kPage);
}
#endif

// ---- the state of a block in flight
struct AsyncCopy { void *to; const void *from; bool valid; int group; };     // cp.async in flight, see ptx.h
struct Fiber : Context {
    int thread = 0;                            // the CUDA thread it runs: its rank in the block
    std::vector<AsyncCopy> copies;
    int copy_groups = 0;                       // committed
};

struct Meeting {                               // where threads wait, for the reports
    const char *what = nullptr, *file = nullptr;
    int line = 0, waiting = 0;
    int phase = 0;                             // flips at each completion: a fast thread may be at the next meeting while others still read
    char edge[2] = {};                         // addresses that stand for the phases' happens-before edges
};
struct Barrier : Meeting {
    int votes = 0, result[2] = {}, arrived[2] = {};        // of __syncthreads_count, _and, _or
    Fiber *fiber[kMaxThreads];
};
struct Lanes {                                 // what the lanes of one collective gave: value i at data + i * size of the type
    uint32_t present;                          // lanes that took part: those of the mask that had not returned
    bool computed;                             // result holds what the first lane that went on has computed for all
    alignas(16) unsigned char data[kWarp * 64], result[512];
    template<class T> T get(int lane) const { T v; memcpy((void *)&v, data + lane * sizeof(T), sizeof(T)); return v; }
};
struct Group : Meeting {                       // lanes of a warp that meet under one mask
    uint32_t mask = 0, arrived = 0;
    Fiber *fiber[kWarp];
    Lanes lanes[2];
};
struct Warp {
    uint32_t returned = 0;
    int used = 0;                              // groups that this block has used
    std::vector<Group *> groups;
};

struct Worker {                                // one per OS thread
    Context main;
    Fiber *current = nullptr;
    const Grid *grid = nullptr;
    size_t launch_serial = 0, block_serial = 0;            // the latter tells static shared memory that a new block has begun
    int threads = 0, started = 0, returned = 0;
    uint16_t start_order[kMaxThreads];
    uint3 index[kMaxThreads];                  // threadIdx of each rank
    std::vector<Fiber *> idle;
    int num_fibers = 0;
    Fiber *ready[kMaxThreads];                 // a ring: a fiber is in it at most once
    unsigned head = 0, tail = 0;
    enum Policy { kFirst, kLast, kAny } policy = kFirst;   // which ready fiber goes on
    Random random{0};
    Barrier barrier;
    Warp warps[kMaxWarps];
    void *dynamic_shared = nullptr;
    size_t dynamic_bytes = 0;
    struct SharedVariable { const char *name; void *memory; size_t bytes; };
    std::vector<SharedVariable> shared_variables;          // for the report of a fault
    std::deque<void *> tsan_fibers;            // of the latest threads: TSan can tell the stacks of those that live
    int tsan_next = 0;
    char launch_edge = 0, return_edge = 0;
};
inline __thread Worker *worker;

// ---- reports
inline const char *place(char *text, size_t size) {       // where the current CUDA thread is
    const Worker *w = worker;
    if (!w || !w->current) return "";
    snprintf(text, size, "\n  in %s launched at %s:%d, block (%u,%u,%u), thread (%u,%u,%u)", w->grid->name, w->grid->file, w->grid->line,
        blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    return text;
}
inline void begin_report() {
    static std::atomic<bool> reported{false};
    if (reported.exchange(true)) for (;;) pause();         // another OS thread is at it and will end the program
    fflush(stdout);
}
[[noreturn]] inline void end_program() {
#ifdef EMU_TSAN
    syscall(SYS_exit_group, 1);                            // _exit would make TSan complain of threads that did not end
#endif
    _exit(1);
}
// One report ends the program, with exit code 1. In gdb: break emu::stop
[[noreturn]] inline __attribute__((noinline, format(printf, 1, 2))) void stop(const char *format, ...) {
    char text[512];
    va_list args;
    begin_report();
    fprintf(stderr, "emu: error: ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "%s\n", place(text, sizeof text));
    end_program();
}
[[noreturn]] inline void report_deadlock() {
    Worker *w = worker;
    begin_report();
    fprintf(stderr, "emu: error: deadlock in %s launched at %s:%d, block (%u,%u,%u): %d of %d threads have returned, no other can go on\n",
            w->grid->name, w->grid->file, w->grid->line, blockIdx.x, blockIdx.y, blockIdx.z, w->returned, w->threads);
    const Barrier &b = w->barrier;
    if (b.waiting) {
        fprintf(stderr, "  %d threads (thread %d first) wait at %s, %s:%d\n", b.waiting, b.fiber[0]->thread, b.what, b.file, b.line);
    }
    for (int i = 0; i < kMaxWarps; i++) for (int k = 0; k < w->warps[i].used; k++) {
        const Group &g = *w->warps[i].groups[k];
        if (!g.waiting) continue;
        fprintf(stderr, "  warp %d: lanes %08x of mask %08x wait at %s, %s:%d\n", i, g.arrived, g.mask, g.what, g.file, g.line);
    }
    end_program();
}

// ---- who runs next
// Field by field: one wide load of three fresh narrow stores would stall (16 instead of 3 ns).
EMU_INLINE void set_thread_index(Worker *w, int thread) {
    const uint3 &t = w->index[thread];
    threadIdx.x = t.x; threadIdx.y = t.y; threadIdx.z = t.z;
}
inline void wake(Worker *w, Fiber *const *f, int n) { for (int i = 0; i < n; i++) w->ready[w->tail++ % kMaxThreads] = f[i]; }
void fiber_main(void *fiber);

inline Fiber *fresh_fiber(Worker *w) {
    Fiber *f;
#ifdef EMU_TSAN
    // Each CUDA thread is a thread of its own to TSan, on a stack whose past TSan forgets because it is mapped anew. The newest idle
    // fiber is left alone: it may still be leaving.
    if (w->idle.size() > 1) {
        f = w->idle.front();
        w->idle.erase(w->idle.begin());
        mmap(f->stack, f->stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    } else {
        f = new Fiber;
        w->num_fibers++;
    }
    context_prepare(*f, 0, fiber_main, f);
    f->tsan_fiber = w->tsan_fibers[w->tsan_fibers.size() - w->threads + w->tsan_next++];
#else
    if (!w->idle.empty()) { f = w->idle.back(); w->idle.pop_back(); return f; }
    f = new Fiber;
    context_prepare(*f, w->num_fibers++, fiber_main, f);
#endif
    return f;
}
inline Fiber *next_fiber(Worker *w) {
    unsigned n = w->tail - w->head;
    if (n && !(w->policy == Worker::kAny && w->started < w->threads && w->random() % 4 == 0)) {
        if (w->policy == Worker::kLast) return w->ready[--w->tail % kMaxThreads];
        if (w->policy == Worker::kAny) std::swap(w->ready[w->head % kMaxThreads], w->ready[(w->head + w->random() % n) % kMaxThreads]);
        return w->ready[w->head++ % kMaxThreads];
    }
    if (w->started < w->threads) return fresh_fiber(w);
    report_deadlock();
}
// The caller has filed the current fiber where somebody will find and wake it.
inline __attribute__((noinline)) void suspend() {
    Worker *w = worker;
    Fiber *self = w->current, *to;
    { Unwatched u; to = next_fiber(w); }
    if (to != self) { w->current = to; context_switch(*self, *to); }
    set_thread_index(w, self->thread);
}
inline void yield() {                          // let every other thread of the block go first: for loops that poll
    Unwatched u;
    Worker *w = worker;
    Fiber *to = w->current;
    if (w->policy == Worker::kLast) w->ready[--w->head % kMaxThreads] = to; else wake(w, &to, 1);
    if (w->started == w->threads) return suspend();
    w->current = fresh_fiber(w);
    context_switch(*to, *w->current);
    set_thread_index(w, to->thread);
}

// ---- barriers and warp collectives. A thread that has returned counts as arrived, the rule since compute capability 7.0.
inline void complete(Worker *w, Barrier &b) {
    b.result[b.phase] = b.votes;
    b.arrived[b.phase] = w->threads - w->returned;
    if (order >= 2) {                          // whole warps in random order, so that one can run far ahead
        uint64_t salt = w->random();
        auto key = [=](const Fiber *f) { return Random(salt + f->thread / kWarp)(); };
        std::stable_sort(b.fiber, b.fiber + b.waiting, [=](const Fiber *x, const Fiber *y) { return key(x) < key(y); });
    }
    wake(w, b.fiber, b.waiting);
    b.waiting = b.votes = 0;
    b.phase ^= 1;
}
inline void complete(Worker *w, const Warp &warp, Group &g) {
    g.lanes[g.phase].present = g.mask & ~warp.returned;
    g.lanes[g.phase].computed = false;
    wake(w, g.fiber, g.waiting);
    g.waiting = 0;
    g.arrived = 0;
    g.phase ^= 1;
}
// Waits for all threads of the block. Gives the phase under which barrier.result and .arrived hold the votes.
inline int block_barrier(bool vote, const char *what, const char *file, int line) {
    Unwatched u;
    Worker *w = worker;
    Barrier &b = w->barrier;
    int phase = b.phase;
    if (!b.waiting) { b.what = what; b.file = file; b.line = line; }
    else if (b.line != line || strcmp(b.file, file)) {
        stop("divergent barrier: thread %d waits at %s, %s:%d, while thread %d has come to %s, %s:%d", b.fiber[0]->thread, b.what, b.file,
             b.line, w->current->thread, what, file, line);
    }
    b.votes += vote;
    happens_before(&b.edge[phase]);
    b.fiber[b.waiting++] = w->current;
    if (b.waiting + w->returned == w->threads) {
        if (order == 0) b.waiting--;           // the last to arrive goes on without a switch
        complete(w, b);
        if (order != 0) suspend();
    } else suspend();
    happens_after(&b.edge[phase]);
    return phase;
}
inline __attribute__((noinline)) Group &add_group(Warp &warp, uint32_t mask) {
    if (warp.used == (int)warp.groups.size()) warp.groups.push_back(new Group);
    Group &g = *warp.groups[warp.used++];
    g.mask = mask;
    return g;
}
EMU_INLINE Group &find_group(Warp &warp, uint32_t mask) {
    for (int i = 0; i < warp.used; i++) if (warp.groups[i]->mask == mask) return *warp.groups[i];
    return add_group(warp, mask);
}
EMU_INLINE int lane_id() { return worker->current->thread % kWarp; }
// The one primitive under all warp collectives: the lanes of mask meet, each gives a value, all see all values.
template<class T> inline Lanes &meet(uint32_t mask, const T &value, const char *what, const char *file, int line,
                                     bool orders_memory = false) {
    static_assert(sizeof(T) <= 64, "a lane may give 64 bytes at most");
    Unwatched u;
    Worker *w = worker;
    Fiber *self = w->current;
    uint32_t bit = 1u << self->thread % kWarp;
    Warp &warp = w->warps[self->thread / kWarp];
    if (!(mask & bit)) stop("%s with mask %08x, which lacks the calling lane %d, %s:%d", what, mask, self->thread % kWarp, file, line);
    Group &g = find_group(warp, mask);
    Lanes &lanes = g.lanes[g.phase];
    char *edge = &g.edge[g.phase];
    memcpy(lanes.data + self->thread % kWarp * sizeof(T), (const void *)&value, sizeof(T));
    if (!g.arrived) { g.what = what; g.file = file; g.line = line; }
    else if (g.what != what && strcmp(g.what, what)) {
        stop("lanes of one warp meet in different collectives: %s, %s:%d and %s, %s:%d", g.what, g.file, g.line, what, file, line);
    }
    if (orders_memory) happens_before(edge);
    g.arrived |= bit;
    if (((g.arrived | warp.returned) & mask) == mask) complete(w, warp, g);
    else { g.fiber[g.waiting++] = self; suspend(); }
    if (orders_memory) happens_after(edge);
    return lanes;
}
// The same, but a function of all values is wanted: the first lane to go on computes f(lanes) for all.
template<class R, class T, class F> inline const R &meet_and_compute(uint32_t mask, const T &value, F f, const char *what,
                                                                     const char *file, int line) {
    static_assert(sizeof(R) <= sizeof(Lanes::result));
    Lanes &lanes = meet(mask, value, what, file, line);
    Unwatched u;
    if (!lanes.computed) { new (lanes.result) R(f(lanes)); lanes.computed = true; }
    return *(const R *)lanes.result;
}

// ---- the life of a CUDA thread
inline void finish_copy(const AsyncCopy &c) { if (c.valid) memcpy(c.to, c.from, 16); else memset(c.to, 0, 16); }
inline void finish_copies(Fiber *f, int groups) {         // performs the cp.async copies of the first `groups` committed groups
    for (;;) {
        AsyncCopy c;
        {
            Unwatched u;
            if (f->copies.empty() || f->copies.front().group >= groups) return;
            c = f->copies.front();
            f->copies.erase(f->copies.begin());
        }
        finish_copy(c);
    }
}
inline void thread_returned(Worker *w, Fiber *f) {
    w->returned++;
    Warp &warp = w->warps[f->thread / kWarp];
    warp.returned |= 1u << f->thread % kWarp;
    for (int i = 0; i < warp.used; i++) {
        Group &g = *warp.groups[i];
        if (g.waiting && ((g.arrived | warp.returned) & g.mask) == g.mask) complete(w, warp, g);
    }
    Barrier &b = w->barrier;
    if (b.waiting && b.waiting + w->returned == w->threads) complete(w, b);
}
EMU_NO_TSAN inline void fiber_main(void *fiber) {
    context_entered();
    Fiber *self = (Fiber *)fiber;
    for (;;) {
        Worker *w = worker;
        Context *to;
        do {
            { Unwatched u; self->thread = w->start_order[w->started++]; set_thread_index(w, self->thread); }
            happens_after(&w->launch_edge);
            w->grid->body(w->grid->arguments);
            Unwatched u;
            if (__builtin_expect(self->copy_groups || !self->copies.empty(), 0)) {
                finish_copies(self, self->copy_groups + 1);
                self->copy_groups = 0;
            }
            happens_before(&w->return_edge);
            happens_before(&w->barrier.edge[0]);
            happens_before(&w->barrier.edge[1]);
            thread_returned(w, self);
#ifdef EMU_TSAN
            break;
#endif
        } while (w->started < w->threads && w->head == w->tail);
        { Unwatched u;
            w->idle.push_back(self);
            w->current = w->returned == w->threads ? nullptr : next_fiber(w);
            to = w->current ? (Context *)w->current : &w->main;
        }
        if (to != self) context_switch(*self, *to);
    }
}

// ---- blocks and grids
inline Worker *get_worker() {
    if (worker) return worker;
    Worker *w = worker = new Worker;
#ifdef EMU_ASAN
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, (void **)&w->main.stack, &w->main.stack_bytes);
    pthread_attr_destroy(&attributes);
#endif
#ifdef EMU_TSAN
    w->main.tsan_fiber = __tsan_get_current_fiber();
#endif
    static __thread char handler_stack[1 << 16];           // for the report of a CUDA thread whose own stack is full
    stack_t handler = {};
    handler.ss_sp = handler_stack;
    handler.ss_size = sizeof handler_stack;
    sigaltstack(&handler, nullptr);
    return w;
}
// A static __shared__ variable: memory of its own, poisoned when a block first comes to the declaration.
template<class T> struct Shared {
    static_assert(sizeof(T) <= kMaxStaticShared, "static shared memory of more than 48 KB: use dynamic shared memory");
    T *memory;
    size_t block_serial;
    EMU_INLINE T &get(const char *name) {
        if (block_serial != worker->block_serial) fresh(name);
        return *memory;
    }
    __attribute__((noinline)) void fresh(const char *name) {
        Unwatched u;
#ifdef EMU_TSAN
        if (memory) guarded_delete(memory, sizeof(T), 16);       // see run_block
        memory = nullptr;
#endif
        if (!memory) {
            memory = (T *)guarded_new(sizeof(T), 16);
            worker->shared_variables.push_back({name, memory, sizeof(T)});
        }
        memset((void *)memory, kPoison, sizeof(T));
        block_serial = worker->block_serial;
    }
};
inline void *dynamic_shared() { return worker->dynamic_shared; }
inline void new_dynamic_shared(Worker *w, size_t bytes) {
    if (w->dynamic_bytes) guarded_delete(w->dynamic_shared, w->dynamic_bytes, 16);
    w->dynamic_shared = bytes ? guarded_new(bytes, 16) : nullptr;
    w->dynamic_bytes = bytes;
}

inline void run_block(Worker *w, const Grid &k, size_t block) {
    int n = w->threads;
    blockIdx = uint3{(unsigned)(block % k.grid.x), (unsigned)(block / k.grid.x % k.grid.y), (unsigned)(block / k.grid.x / k.grid.y)};
    w->block_serial++;
    w->started = w->returned = 0;
    if (order >= 2) {
        w->random = Random((order * 1000003ull + w->launch_serial) * 1000003ull + block);     // whatever the number of OS threads
        w->policy = (Worker::Policy)(w->random() % 3);
        unsigned turn = (unsigned)(w->random() % n) / kWarp * kWarp;              // start with any warp, or all threads in random order
        for (int i = 0; i < n; i++) w->start_order[i] = (uint16_t)((i + turn) % n);
        if (w->random() & 1) for (int i = n - 1; i > 0; i--) std::swap(w->start_order[i], w->start_order[w->random() % (i + 1)]);
    }
    for (int i = 0; i < n; i += kWarp) {
        Warp &warp = w->warps[i / kWarp];
        warp.returned = n - i >= kWarp ? 0 : ~0u << (n - i);                      // lanes that the block does not have
        warp.used = 0;
    }
#ifdef EMU_TSAN
    new_dynamic_shared(w, k.shared_bytes);     // to TSan, another block's shared memory is another memory
    auto &q = w->tsan_fibers;                  // made here, because a thread knows what its maker knows
    while (q.size() + n > 3000) { __tsan_destroy_fiber(q.front()); q.pop_front(); }
    for (int i = 0; i < n; i++) q.push_back(__tsan_create_fiber(0));
    w->tsan_next = 0;
#endif
    if (k.shared_bytes) memset(w->dynamic_shared, kPoison, k.shared_bytes);
    w->current = fresh_fiber(w);
    context_switch(w->main, *w->current);
}
inline void prepare_worker(Worker *w, const Grid &k, size_t serial) {
    w->grid = &k;
    w->threads = (int)(k.block.x * k.block.y * k.block.z);
    w->launch_serial = serial;
    w->policy = order == 1 ? Worker::kLast : Worker::kFirst;
    blockDim = {k.block.x, k.block.y, k.block.z};
    gridDim = {k.grid.x, k.grid.y, k.grid.z};
    int i = 0;
    for (unsigned z = 0; z < k.block.z; z++) for (unsigned y = 0; y < k.block.y; y++) for (unsigned x = 0; x < k.block.x; x++, i++) {
        w->index[i] = {x, y, z};
        w->start_order[i] = (uint16_t)(order == 1 ? w->threads - 1 - i : i);
    }
    if (k.shared_bytes != w->dynamic_bytes) new_dynamic_shared(w, k.shared_bytes);
    happens_before(&w->launch_edge);
}
inline void run_grid(const Grid &k) {
    static size_t num_launches = 0;
    size_t serial = num_launches++, num_blocks = (size_t)k.grid.x * k.grid.y * k.grid.z;
    // order >= 2: block i is block (i * stride + start) mod num_blocks
    Random random(order * 7919ull + serial);
    size_t stride = 1, start = 0;
    if (order >= 2) {
        start = random() % num_blocks;
        do stride = random() % num_blocks + 1; while (std::gcd(stride, num_blocks) != 1);
    }
    auto block_at = [&](size_t i) { return order == 1 ? num_blocks - 1 - i : (i * stride + start) % num_blocks; };
#if defined(_OPENMP) && !defined(EMU_ASAN) && !defined(EMU_TSAN)
    // at most 16 OS threads: each may hold 1024 stacks of two mappings, and Linux allows 65530
    static const size_t max_workers = env_number("EMU_THREADS", (unsigned)std::min(omp_get_max_threads(), 16));
    size_t num_workers = std::min(max_workers, num_blocks);
    if (num_workers > 1 && num_blocks * k.block.x * k.block.y * k.block.z > 4096) {
        #pragma omp parallel num_threads((int)num_workers)
        {
            Worker *w = get_worker();
            prepare_worker(w, k, serial);
            #pragma omp for schedule(dynamic, 1)
            for (long long i = 0; i < (long long)num_blocks; i++) run_block(w, k, block_at((size_t)i));
            w->grid = nullptr;
        }
        return;
    }
#endif
    Unwatched u;
    Worker *w = get_worker();
    prepare_worker(w, k, serial);
    for (size_t i = 0; i < num_blocks; i++) run_block(w, k, block_at(i));
    happens_after(&w->return_edge);
    w->grid = nullptr;
}
}  // namespace emu
