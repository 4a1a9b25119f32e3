// __nv_bfloat16 and __half, their pairs, conversions and arithmetic. Arithmetic is float arithmetic rounded once more, to nearest
// even. For + - * / and sqrt that is what a GPU gives: 24 bits keep enough of the exact result of operands of 8 or 11 bits for the
// second rounding to do no harm.
#pragma once
#include "device.h"

namespace emu {
struct Bfloat {                                            // 1 sign, 8 exponent, 7 mantissa bits: the upper half of a float
    static uint16_t from_float(float f) {
        uint32_t u = bits<uint32_t>(f);
        if (f != f) return 0x7fff;
        return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    static float to_float(uint16_t h) { return bits<float>((uint32_t)h << 16); }
};
struct Half {                                              // 1 sign, 5 exponent, 10 mantissa bits
    static uint16_t from_float(float f) {
        uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
        if (f != f) return 0x7fff;
        if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);                                      // >= 65520: infinity
        if (a < 0x38800000) return (uint16_t)(sign | (uint32_t)rintf(bits<float>(a) * 0x1p24f));    // subnormal: multiples of 2^-24
        return (uint16_t)(sign | (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13);
    }
    static float to_float(uint16_t h) {
        uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
        if (exponent == 0) return bits<float>(sign | bits<uint32_t>((float)mantissa * 0x1p-24f));
        return bits<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
    }
};

template<class Format> struct Float16 {
    struct raw { unsigned short x; };
    unsigned short x;
    Float16() = default;
    template<class T, class = typename std::enable_if<std::is_arithmetic<T>::value>::type> Float16(T v) : x(Format::from_float((float)v)) {}
    Float16(raw r) : x(r.x) {}
    operator float() const { return Format::to_float(x); }
    operator raw() const { return raw{x}; }
    Float16 operator-() const { return raw{(unsigned short)(x ^ 0x8000)}; }
#define EMU_OPERATOR(OP) \
    friend Float16 operator OP(Float16 a, Float16 b) { return (float)a OP (float)b; } \
    Float16 &operator OP##=(Float16 b) { return *this = *this OP b; }
    EMU_OPERATOR(+) EMU_OPERATOR(-) EMU_OPERATOR(*) EMU_OPERATOR(/)
#define EMU_COMPARE(OP) friend bool operator OP(Float16 a, Float16 b) { return (float)a OP (float)b; }
    EMU_COMPARE(<) EMU_COMPARE(>) EMU_COMPARE(<=) EMU_COMPARE(>=) EMU_COMPARE(==) EMU_COMPARE(!=)
};
template<class Format> struct alignas(4) Float16Pair {
    typedef Float16<Format> F;
    F x, y;
    Float16Pair() = default;
    Float16Pair(F a, F b) : x(a), y(b) {}
#define EMU_PAIR_OPERATOR(OP) \
    friend Float16Pair operator OP(Float16Pair a, Float16Pair b) { return {a.x OP b.x, a.y OP b.y}; } \
    Float16Pair &operator OP##=(Float16Pair b) { return *this = *this OP b; }
    EMU_PAIR_OPERATOR(+) EMU_PAIR_OPERATOR(-) EMU_PAIR_OPERATOR(*) EMU_PAIR_OPERATOR(/)
};
}
typedef emu::Float16<emu::Bfloat> __nv_bfloat16, nv_bfloat16;
typedef emu::Float16<emu::Half> __half, half;
typedef emu::Float16Pair<emu::Bfloat> __nv_bfloat162, nv_bfloat162;
typedef emu::Float16Pair<emu::Half> __half2, half2;
typedef __nv_bfloat16::raw __nv_bfloat16_raw;
typedef __half::raw __half_raw;

// ---- conversions, under both families of names: NAME is bfloat16 or half, PAIR is bfloat162 or half2
#define EMU_CONVERSIONS(T, T2, NAME, PAIR) \
    EMU_INLINE T __float2##NAME(float v) { return v; } \
    EMU_INLINE T __float2##NAME##_rn(float v) { return v; } \
    EMU_INLINE T __double2##NAME(double v) { return v; } \
    EMU_INLINE T __int2##NAME##_rn(int v) { return v; } \
    EMU_INLINE T __uint2##NAME##_rn(unsigned v) { return v; } \
    EMU_INLINE float __##NAME##2float(T v) { return v; } \
    EMU_INLINE int __##NAME##2int_rn(T v) { return (int)rintf(v); } \
    EMU_INLINE unsigned short __##NAME##_as_ushort(T v) { return v.x; } \
    EMU_INLINE short __##NAME##_as_short(T v) { return (short)v.x; } \
    EMU_INLINE T __ushort_as_##NAME(unsigned short v) { return T::raw{v}; } \
    EMU_INLINE T __short_as_##NAME(short v) { return T::raw{(unsigned short)v}; } \
    EMU_INLINE T2 make_##PAIR(T a, T b) { return {a, b}; } \
    EMU_INLINE T2 __halves2##PAIR(T a, T b) { return {a, b}; } \
    EMU_INLINE T2 __floats2##PAIR##_rn(float a, float b) { return {a, b}; } \
    EMU_INLINE T2 __float2##PAIR##_rn(float a) { return {a, a}; } \
    EMU_INLINE T2 __float22##PAIR##_rn(float2 v) { return {v.x, v.y}; } \
    EMU_INLINE T2 __##NAME##2##PAIR(T a) { return {a, a}; } \
    EMU_INLINE float2 __##PAIR##2float2(T2 v) { return {v.x, v.y}; } \
    EMU_INLINE T __low2##NAME(T2 v) { return v.x; } \
    EMU_INLINE T __high2##NAME(T2 v) { return v.y; } \
    EMU_INLINE float __low2float(T2 v) { return v.x; } \
    EMU_INLINE float __high2float(T2 v) { return v.y; }
EMU_CONVERSIONS(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162)
EMU_CONVERSIONS(__half, __half2, half, half2)
EMU_INLINE __nv_bfloat16 __float2bfloat16_rz(float v) { return __nv_bfloat16_raw{(unsigned short)(__float_as_uint(v) >> 16)}; }

// ---- arithmetic: __hadd(a, b) and __hadd2 for pairs, and so on
#define EMU_H1(NAME, EXPRESSION) \
    template<class F> EMU_INLINE emu::Float16<F> __##NAME(emu::Float16<F> a) { return EXPRESSION(a); } \
    template<class F> EMU_INLINE emu::Float16Pair<F> __##NAME##2(emu::Float16Pair<F> a) { return {__##NAME(a.x), __##NAME(a.y)}; }
#define EMU_H2(NAME, EXPRESSION) \
    template<class F> EMU_INLINE emu::Float16<F> __##NAME(emu::Float16<F> a, emu::Float16<F> b) { return EXPRESSION; } \
    template<class F> EMU_INLINE emu::Float16Pair<F> __##NAME##2(emu::Float16Pair<F> a, emu::Float16Pair<F> b) { \
        return {__##NAME(a.x, b.x), __##NAME(a.y, b.y)}; \
    }
EMU_H1(hneg, -) EMU_H1(habs, fabsf)
EMU_H2(hadd, a + b) EMU_H2(hsub, a - b) EMU_H2(hmul, a * b) EMU_H2(hmax, fmaxf(a, b)) EMU_H2(hmin, fminf(a, b))
template<class F> EMU_INLINE emu::Float16<F> __hdiv(emu::Float16<F> a, emu::Float16<F> b) { return a / b; }
template<class F> EMU_INLINE emu::Float16Pair<F> __h2div(emu::Float16Pair<F> a, emu::Float16Pair<F> b) { return a / b; }
template<class F> EMU_INLINE emu::Float16<F> __hfma(emu::Float16<F> a, emu::Float16<F> b, emu::Float16<F> c) { return fmaf(a, b, c); }
template<class F> EMU_INLINE emu::Float16Pair<F> __hfma2(emu::Float16Pair<F> a, emu::Float16Pair<F> b, emu::Float16Pair<F> c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
#define EMU_H_COMPARE(NAME, OP) template<class F> EMU_INLINE bool __##NAME(emu::Float16<F> a, emu::Float16<F> b) { return a OP b; }
EMU_H_COMPARE(heq, ==) EMU_H_COMPARE(hne, !=) EMU_H_COMPARE(hlt, <) EMU_H_COMPARE(hle, <=) EMU_H_COMPARE(hgt, >) EMU_H_COMPARE(hge, >=)
template<class F> EMU_INLINE bool __hisnan(emu::Float16<F> a) { return a != a; }
#define EMU_H_MATH(NAME, FUNCTION) \
    template<class F> EMU_INLINE emu::Float16<F> h##NAME(emu::Float16<F> a) { return FUNCTION(a); } \
    template<class F> EMU_INLINE emu::Float16Pair<F> h2##NAME(emu::Float16Pair<F> a) { return {h##NAME(a.x), h##NAME(a.y)}; }
EMU_H_MATH(exp, expf) EMU_H_MATH(exp2, exp2f) EMU_H_MATH(log, logf) EMU_H_MATH(log2, log2f)
EMU_H_MATH(sqrt, sqrtf) EMU_H_MATH(rsqrt, rsqrtf) EMU_H_MATH(rcp, 1.0f / float)
EMU_H_MATH(sin, sinf) EMU_H_MATH(cos, cosf) EMU_H_MATH(tanh, tanhf)
EMU_H_MATH(floor, floorf) EMU_H_MATH(ceil, ceilf) EMU_H_MATH(rint, rintf)
