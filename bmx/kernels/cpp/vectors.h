// Vectors of 32-bit numbers, as wide as the registers of the instruction set that this is compiled for.
//
// Real: LANES floats, with operators + - * /. Int: LANES int32, with operators + - * & | << >>. Mask: a flag for each.
// Of `greater` and `lesser`, the second operand is the result where one is NaN.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;
using word = uint32_t;

}  // namespace

#ifdef __AVX512F__
#include "vectors_avx512.h"
#else
#include "vectors_plain.h"
#endif

namespace {

inline Real zeros() {
    return splat(0.0f);
}

// Numbers rounded to bfloat16, as the model's own operators would have stored them.
inline Real rounded(Real x) {
    return widened(narrowed(x));
}

inline Real load_bf16(const bf16* p) {
    Narrow x;
    std::memcpy(&x, p, sizeof x);
    return widened(x);
}
inline void store_bf16(bf16* p, Real x) {
    const Narrow y = narrowed(x);
    std::memcpy(p, &y, sizeof y);
}

// What left-hand sides of products are made of, beside bytes: bfloat16 where processors multiply it.
inline Real load_number(const bf16* p) {
    return load_bf16(p);
}
inline Real load_number(const float* p) {
    return load(p);
}
inline void store_number(bf16* p, Real x) {
    store_bf16(p, x);
}
inline void store_number(float* p, Real x) {
    store(p, x);
}
inline void copy_numbers(const bf16* from, long count, bf16* to) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(bf16));
}
inline void copy_numbers(const bf16* from, long count, float* to) {
    for (long i = 0; i < count; i += LANES) store(to + i, load_bf16(from + i));
}
inline void copy_numbers(const uint8_t* from, long count, uint8_t* to) {
    std::memcpy(to, from, static_cast<size_t>(count));
}
inline void copy_numbers(const uint8_t* from, long count, int16_t* to) {
    std::copy(from, from + count, to);
}

// Where LANES numbers can be read of which `count` lie at p: p itself, or a copy with zeros after them.
template <class T>
inline const T* padded(const T* p, long count, T (&room)[LANES]) {
    if (count >= LANES) return p;
    std::memset(room, 0, sizeof room);
    if (count > 0) std::memcpy(room, p, static_cast<size_t>(count) * sizeof(T));
    return room;
}

// Stores the first `count` numbers.
template <class T, class V>
inline void store_first(T* p, long count, V x) {
    T all[LANES];
    std::memcpy(all, &x, sizeof all);
    std::memcpy(p, all, static_cast<size_t>(std::min<long>(count, LANES)) * sizeof(T));
}

// `first` and the numbers after it.
inline Int lanes_from(long first) {
    Int x;
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x + splat(static_cast<int32_t>(first));
}

// 2 to the x for x <= 0, with an error in the seventh digit: 2^n times a polynomial on [-1/2, 1/2]. NaN stays NaN.
inline Real power_of_two(Real x) {
    const Real t = greater(splat(LEAST_EXPONENT), x);
    const Real n = nearest(t);
    const Real f = t - n;
    Real p = splat(1.3333558e-3f);
    p = fused(p, f, splat(9.6181291e-3f));
    p = fused(p, f, splat(5.5504109e-2f));
    p = fused(p, f, splat(2.4022651e-1f));
    p = fused(p, f, splat(6.9314718e-1f));
    p = fused(p, f, splat(1.0f));
    return scaled(p, n);
}

constexpr float LOG2_E = 1.44269504f;

// e to the x for x <= 0.
inline Real exponential(Real x) {
    return power_of_two(x * splat(LOG2_E));
}

// Hands out pieces of the working memory, each on a cache line of its own.
struct Work {
    char* at;
    template <class T>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(at);
        at += bytes<T>(count);
        return piece;
    }
    template <class T>
    static size_t bytes(size_t count) {
        return (count * sizeof(T) + 63) / 64 * 64;
    }
};

}  // namespace
