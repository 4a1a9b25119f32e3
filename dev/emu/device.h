// What device code calls: vector types, barriers, warp shuffles, votes and reductions, atomics, accesses with cache hints, bits, math.
#pragma once
#include "scheduler.h"
#include <math.h>
#include <time.h>
#include <type_traits>

// ---- vector types with CUDA's alignments
#define EMU_VECTOR(T, NAME, ALIGN2, ALIGN4) \
    struct NAME##1 { T x; }; struct NAME##3 { T x, y, z; }; \
    struct alignas(ALIGN2) NAME##2 { T x, y; }; struct alignas(ALIGN4) NAME##4 { T x, y, z, w; }; \
    EMU_INLINE NAME##1 make_##NAME##1(T x) { return {x}; } \
    EMU_INLINE NAME##2 make_##NAME##2(T x, T y) { return {x, y}; } \
    EMU_INLINE NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; } \
    EMU_INLINE NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR(signed char, char, 2, 4) EMU_VECTOR(unsigned char, uchar, 2, 4)
EMU_VECTOR(short, short, 4, 8) EMU_VECTOR(unsigned short, ushort, 4, 8)
EMU_VECTOR(int, int, 8, 16) EMU_VECTOR(float, float, 8, 16) EMU_VECTOR(double, double, 16, 16)
EMU_VECTOR(long long, longlong, 16, 16) EMU_VECTOR(unsigned long long, ulonglong, 16, 16)
struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };                    // uint3 is in scheduler.h
EMU_INLINE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
EMU_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
EMU_INLINE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- barriers and fences
inline void __syncthreads(EMU_HERE) { emu::block_barrier(false, "__syncthreads", file, line); }
inline int __syncthreads_count(int p, EMU_HERE) {
    int phase = emu::block_barrier(p, "__syncthreads_count", file, line);
    return emu::worker->barrier.result[phase];
}
inline int __syncthreads_or(int p, EMU_HERE) {
    int phase = emu::block_barrier(p, "__syncthreads_or", file, line);
    return emu::worker->barrier.result[phase] != 0;
}
inline int __syncthreads_and(int p, EMU_HERE) {
    int phase = emu::block_barrier(p, "__syncthreads_and", file, line);
    return emu::worker->barrier.result[phase] == emu::worker->barrier.arrived[phase];
}
inline void __syncwarp(unsigned mask = ~0u, EMU_HERE) { emu::meet(mask, char(0), "__syncwarp", file, line, true); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned) { emu::yield(); }
[[noreturn]] inline void __trap() { emu::stop("__trap"); }
inline long long clock64() {                                          // nanoseconds stand in for cycles
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

// ---- warp collectives
namespace emu {
// The value of lane `source`, the own one if source < 0. A lane that is not in the mask or has returned has an undefined value: poison.
template<class T> inline T shuffle(unsigned mask, T value, int source, const char *what, const char *file, int line) {
    const Lanes &lanes = meet(mask, value, what, file, line);
    Unwatched u;
    if (source < 0) return value;
    if (lanes.present >> source & 1) return lanes.get<T>(source);
    memset((void *)&value, kPoison, sizeof(T));
    return value;
}
// fold of the values of all lanes, in lane order
template<class T, class F> inline T warp_fold(unsigned mask, T value, F f, const char *what, const char *file, int line) {
    return meet_and_compute<T>(mask, value, [f](const Lanes &lanes) {
        int lane = __builtin_ctz(lanes.present);
        T sum = lanes.get<T>(lane);
        while (++lane < kWarp) if (lanes.present >> lane & 1) sum = f(sum, lanes.get<T>(lane));
        return sum;
    }, what, file, line);
}
inline int first_lane(int width) { return lane_id() & -width; }      // of the calling lane's segment of `width` lanes
template<class T> struct Same { typedef T type; };                   // a parameter from which T is not deduced: atomicAdd(float *, 1)
template<class T> using same = typename Same<T>::type;
}
template<class T> inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMU_HERE) {
    return emu::shuffle(mask, value, emu::first_lane(width) + (lane & (width - 1)), "__shfl_sync", file, line);
}
template<class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMU_HERE) {
    int source = emu::lane_id() ^ bits;
    return emu::shuffle(mask, value, source < emu::first_lane(width) + width ? source : -1, "__shfl_xor_sync", file, line);
}
template<class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_HERE) {
    int source = emu::lane_id() + (int)delta;
    return emu::shuffle(mask, value, source < emu::first_lane(width) + width ? source : -1, "__shfl_down_sync", file, line);
}
template<class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_HERE) {
    int source = emu::lane_id() - (int)delta;
    return emu::shuffle(mask, value, source >= emu::first_lane(width) ? source : -1, "__shfl_up_sync", file, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_HERE) {
    return emu::warp_fold(mask, p ? 1u << emu::lane_id() : 0u, [](unsigned a, unsigned b) { return a | b; }, "__ballot_sync", file, line);
}
inline int __any_sync(unsigned mask, int p, EMU_HERE) {
    return emu::warp_fold(mask, p != 0, [](bool a, bool b) { return a || b; }, "__any_sync", file, line);
}
inline int __all_sync(unsigned mask, int p, EMU_HERE) {
    return emu::warp_fold(mask, p != 0, [](bool a, bool b) { return a && b; }, "__all_sync", file, line);
}
#define EMU_REDUCE(NAME, EXPRESSION) \
    template<class T> inline T __reduce_##NAME##_sync(unsigned mask, T value, EMU_HERE) { \
        static_assert(std::is_integral<T>::value && sizeof(T) == 4, "__reduce_" #NAME "_sync takes int and unsigned"); \
        return emu::warp_fold(mask, value, [](T a, T b) -> T { return EXPRESSION; }, "__reduce_" #NAME "_sync", file, line); \
    }
EMU_REDUCE(add, a + b) EMU_REDUCE(min, a < b ? a : b) EMU_REDUCE(max, a > b ? a : b)
EMU_REDUCE(and, a & b) EMU_REDUCE(or, a | b) EMU_REDUCE(xor, a ^ b)
template<class T> inline unsigned __match_any_sync(unsigned mask, T value, EMU_HERE) {
    const emu::Lanes &lanes = emu::meet(mask, value, "__match_any_sync", file, line);
    emu::Unwatched u;
    unsigned equal = 0;
    for (int i = 0; i < 32; i++) if (lanes.present >> i & 1 && lanes.get<T>(i) == value) equal |= 1u << i;
    return equal;
}
template<class T> inline unsigned __match_all_sync(unsigned mask, T value, int *all, EMU_HERE) {
    unsigned equal = __match_any_sync(mask, value, file, line);
    *all = __all_sync(mask, equal == mask, file, line);
    return *all ? mask : 0;
}
// Which lanes run together is unknowable here: all that have not returned, which is right outside of divergent branches.
inline unsigned __activemask() { return ~emu::worker->warps[emu::worker->current->thread / 32].returned; }

// ---- atomics. CUDA's are relaxed; these order memory as if a __threadfence stood before and after, because TSan knows of no fences.
// A missing fence goes unseen.
namespace emu {
template<size_t Bytes> struct Word;
template<> struct Word<2> { typedef uint16_t type; };
template<> struct Word<4> { typedef uint32_t type; };
template<> struct Word<8> { typedef uint64_t type; };
template<class T, class F> inline T atomic_update(T *p, F f) {
    typedef typename Word<sizeof(T)>::type W;
    W old = __atomic_load_n((W *)p, __ATOMIC_ACQUIRE), wanted;
    T value;
    do {
        memcpy((void *)&value, &old, sizeof(T));
        T next = f(value);
        memcpy(&wanted, (const void *)&next, sizeof(T));
    } while (!__atomic_compare_exchange_n((W *)p, &old, wanted, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    return value;
}
}
#define EMU_ATOMIC(NAME, EXPRESSION) \
    template<class T> inline T atomic##NAME(T *p, emu::same<T> v) { \
        return emu::atomic_update(p, [v](T old) -> T { (void)old; return EXPRESSION; }); \
    } \
    template<class T> inline T atomic##NAME##_block(T *p, emu::same<T> v) { return atomic##NAME(p, v); } \
    template<class T> inline T atomic##NAME##_system(T *p, emu::same<T> v) { return atomic##NAME(p, v); }
EMU_ATOMIC(Add, old + v) EMU_ATOMIC(Sub, old - v) EMU_ATOMIC(Exch, v) EMU_ATOMIC(Min, v < old ? v : old) EMU_ATOMIC(Max, v > old ? v : old)
EMU_ATOMIC(And, old & v) EMU_ATOMIC(Or, old | v) EMU_ATOMIC(Xor, old ^ v)
EMU_ATOMIC(Inc, old >= v ? 0 : old + 1) EMU_ATOMIC(Dec, old == 0 || old > v ? v : old - 1)
template<class T> inline T atomicCAS(T *p, emu::same<T> expected, emu::same<T> v) {
    typedef typename emu::Word<sizeof(T)>::type W;
    W bits, old_bits;
    T old;
    memcpy(&old_bits, (const void *)&expected, sizeof(T));
    memcpy(&bits, (const void *)&v, sizeof(T));
    bool done = __atomic_compare_exchange_n((W *)p, &old_bits, bits, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    memcpy((void *)&old, &old_bits, sizeof(T));
    if (!done) emu::yield();                                         // perhaps a lock: its holder has to go on
    return old;
}

// ---- accesses with cache hints
#define EMU_LOAD(NAME) template<class T> EMU_INLINE T NAME(const T *p) { return *p; }
#define EMU_STORE(NAME) template<class T> EMU_INLINE void NAME(T *p, emu::same<T> v) { *p = v; }
EMU_LOAD(__ldg) EMU_LOAD(__ldca) EMU_LOAD(__ldcg) EMU_LOAD(__ldcs) EMU_LOAD(__ldlu) EMU_LOAD(__ldcv)
EMU_STORE(__stwb) EMU_STORE(__stcg) EMU_STORE(__stcs) EMU_STORE(__stwt)

// ---- bits and math. The host's precise function stands in for the fast one: results differ from a GPU's in the last bits.
namespace emu {
template<class To, class From> EMU_INLINE To bits(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To r;
    memcpy(&r, &v, sizeof r);
    return r;
}
template<class T> EMU_INLINE T opaque(T v) { asm volatile("" : "+m"(v)); return v; }     // keeps a product out of a contracted fma
}
#define EMU_F1(R, NAME, A, EXPRESSION) EMU_INLINE R NAME(A x) { return EXPRESSION; }
#define EMU_F2(R, NAME, A, EXPRESSION) EMU_INLINE R NAME(A x, A y) { return EXPRESSION; }
EMU_F1(unsigned, __float_as_uint, float, emu::bits<unsigned>(x)) EMU_F1(int, __float_as_int, float, emu::bits<int>(x))
EMU_F1(float, __uint_as_float, unsigned, emu::bits<float>(x)) EMU_F1(float, __int_as_float, int, emu::bits<float>(x))
EMU_F1(long long, __double_as_longlong, double, emu::bits<long long>(x))
EMU_F1(double, __longlong_as_double, long long, emu::bits<double>(x))
EMU_F1(int, __popc, unsigned, __builtin_popcount(x)) EMU_F1(int, __popcll, unsigned long long, __builtin_popcountll(x))
EMU_F1(int, __clz, int, x ? __builtin_clz((unsigned)x) : 32)
EMU_F1(int, __clzll, long long, x ? __builtin_clzll((unsigned long long)x) : 64)
EMU_F1(int, __ffs, int, __builtin_ffs(x)) EMU_F1(int, __ffsll, long long, __builtin_ffsll(x))
EMU_F2(unsigned, __umulhi, unsigned, (unsigned)((unsigned long long)x * y >> 32)) EMU_F2(int, __mulhi, int, (int)((long long)x * y >> 32))
EMU_F2(unsigned long long, __umul64hi, unsigned long long, (unsigned long long)((unsigned __int128)x * y >> 64))
inline unsigned __brev(unsigned x) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return r; }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
    return (unsigned)((((unsigned long long)hi << 32 | lo) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
    return (unsigned)(((unsigned long long)hi << 32 | lo) >> (n & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long v = x | (unsigned long long)y << 32;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(v >> (8 * (selector >> 4 * i & 7)) & 255) << 8 * i;
    return r;
}
EMU_F1(float, rsqrtf, float, 1.0f / sqrtf(x)) EMU_F1(double, rsqrt, double, 1.0 / sqrt(x))
EMU_F1(float, __expf, float, expf(x)) EMU_F1(float, __exp10f, float, powf(10.0f, x))
EMU_F1(float, __logf, float, logf(x)) EMU_F1(float, __log2f, float, log2f(x)) EMU_F1(float, __log10f, float, log10f(x))
EMU_F1(float, __sinf, float, sinf(x)) EMU_F1(float, __cosf, float, cosf(x)) EMU_F1(float, __tanf, float, tanf(x))
EMU_F1(float, sinpif, float, sinf(3.14159265358979f * x)) EMU_F1(float, cospif, float, cosf(3.14159265358979f * x))
EMU_INLINE void __sincosf(float x, float *s, float *c) { *s = sinf(x); *c = cosf(x); }
EMU_F2(float, __powf, float, powf(x, y)) EMU_F2(float, __fdividef, float, x / y) EMU_F2(float, fdividef, float, x / y)
EMU_F1(float, __frcp_rn, float, 1.0f / x) EMU_F1(float, __fsqrt_rn, float, sqrtf(x)) EMU_F1(float, __frsqrt_rn, float, 1.0f / sqrtf(x))
EMU_F2(float, __fadd_rn, float, emu::opaque(x + y)) EMU_F2(float, __fsub_rn, float, emu::opaque(x - y))
EMU_F2(float, __fmul_rn, float, emu::opaque(x * y)) EMU_F2(float, __fdiv_rn, float, x / y)
EMU_INLINE float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
EMU_F1(float, __saturatef, float, x > 0 ? (x < 1 ? x : 1) : 0) EMU_F1(float, normcdff, float, 0.5f * erfcf(-x * 0.70710678f))
EMU_F1(int, __float2int_rn, float, (int)rintf(x)) EMU_F1(int, __float2int_rz, float, (int)x)
EMU_F1(int, __float2int_rd, float, (int)floorf(x)) EMU_F1(int, __float2int_ru, float, (int)ceilf(x))
EMU_F1(unsigned, __float2uint_rn, float, (unsigned)rintf(x)) EMU_F1(unsigned, __float2uint_rz, float, (unsigned)x)
EMU_F1(float, __int2float_rn, int, (float)x) EMU_F1(float, __uint2float_rn, unsigned, (float)x)
// min and max without std::, of two integer types too
#define EMU_MIN_MAX(T, LESS, MORE) EMU_INLINE T min(T a, T b) { return LESS; } EMU_INLINE T max(T a, T b) { return MORE; }
EMU_MIN_MAX(float, fminf(a, b), fmaxf(a, b)) EMU_MIN_MAX(double, fmin(a, b), fmax(a, b))
EMU_MIN_MAX(int, b < a ? b : a, a < b ? b : a) EMU_MIN_MAX(unsigned, b < a ? b : a, a < b ? b : a)
EMU_MIN_MAX(long, b < a ? b : a, a < b ? b : a) EMU_MIN_MAX(unsigned long, b < a ? b : a, a < b ? b : a)
EMU_MIN_MAX(long long, b < a ? b : a, a < b ? b : a) EMU_MIN_MAX(unsigned long long, b < a ? b : a, a < b ? b : a)
namespace emu {
template<class A, class B> using integer_mix = typename std::enable_if<std::is_integral<A>::value && std::is_integral<B>::value,
    typename std::common_type<A, B>::type>::type;
}
template<class A, class B, class M = emu::integer_mix<A, B>> EMU_INLINE M min(A a, B b) { return min((M)a, (M)b); }
template<class A, class B, class M = emu::integer_mix<A, B>> EMU_INLINE M max(A a, B b) { return max((M)a, (M)b); }
