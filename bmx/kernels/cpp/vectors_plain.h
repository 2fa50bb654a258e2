// Registers of AVX2 and of NEON, mostly by the compilers' own vectors: see vectors.h.

#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace {

#ifdef __AVX2__
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr float LEAST_EXPONENT = -126.0f;  // a smaller power of two counts as this one

using Real = float __attribute__((vector_size(4 * LANES)));
using Int = int32_t __attribute__((vector_size(4 * LANES)));
using Bits = uint32_t __attribute__((vector_size(4 * LANES)));
using Mask = Int;                                                 // all bits of a lane or none
using Narrow = uint16_t __attribute__((vector_size(2 * LANES)));  // bfloat16

template <class V, class T>
inline V load_as(const T* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline Real splat(float x) {
    return x - Real{};
}
inline Int splat(int32_t x) {
    return x - Int{};
}
inline Real load(const float* p) {
    return load_as<Real>(p);
}
inline Int load(const int32_t* p) {
    return load_as<Int>(p);
}
inline void store(float* p, Real x) {
    std::memcpy(p, &x, sizeof x);
}
inline void store(int32_t* p, Int x) {
    std::memcpy(p, &x, sizeof x);
}
inline Real widened(Narrow x) {
    return reinterpret_cast<Real>(__builtin_convertvector(x, Bits) << 16);
}
inline Mask less(Real a, Real b) {
    return a < b;
}
inline Mask equal(Real a, Real b) {
    return a == b;
}
inline Mask less(Int a, Int b) {
    return a < b;
}
inline Real select(Mask where, Real a, Real b) {  // a, elsewhere b
    return where ? a : b;
}
inline Int select(Mask where, Int a, Int b) {
    return where ? a : b;
}
inline Narrow narrowed(Real x) {
    const Bits bits = reinterpret_cast<Bits>(x), near = bits + 0x7fff + (bits >> 16 & 1);
    const Bits all = (x == x ? near : bits | 0x400000) >> 16;
#ifdef __AVX2__
    const __m256i wide = reinterpret_cast<__m256i>(all);
    return reinterpret_cast<Narrow>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
    return __builtin_convertvector(all, Narrow);
#endif
}
inline Real load_halves(const uint16_t* p) {  // float16
#ifdef __AVX2__
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#endif
}
inline Real from_halves(Int x) {  // float16 in the lowest bits
    using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
    uint16_t halves[LANES];
    const Halves narrow = __builtin_convertvector(x & 0xffff, Halves);
    std::memcpy(halves, &narrow, sizeof halves);
    return load_halves(halves);
}
#ifdef __AVX2__
inline float from_half(uint16_t half) {
    return _cvtsh_ss(half);
}
inline uint16_t to_half(float x) {
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline float from_half(uint16_t half) {
    __fp16 x;
    std::memcpy(&x, &half, sizeof x);
    return x;
}
inline uint16_t to_half(float x) {
    const __fp16 narrow = static_cast<__fp16>(x);
    uint16_t half;
    std::memcpy(&half, &narrow, sizeof half);
    return half;
}
#endif
inline Int load_bytes(const uint8_t* p) {
    using Bytes = uint8_t __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load_as<Bytes>(p), Int);
}
inline Int load_signed_bytes(const uint8_t* p) {
    using Bytes = int8_t __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load_as<Bytes>(p), Int);
}
inline void store_bytes(uint8_t* p, Int x) {  // their lowest bits
    using Bytes = uint8_t __attribute__((vector_size(LANES)));
    const Bytes y = __builtin_convertvector(x, Bytes);
    std::memcpy(p, &y, sizeof y);
}

inline Real fused(Real a, Real b, Real c) {  // a * b + c
#ifdef __AVX2__
    return _mm256_fmadd_ps(a, b, c);
#else
    return vfmaq_f32(c, a, b);
#endif
}
inline Real greater(Real a, Real b) {
#ifdef __AVX2__
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
inline Real lesser(Real a, Real b) {
#ifdef __AVX2__
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}
inline Int greater(Int a, Int b) {
    return a > b ? a : b;
}
inline Int lesser(Int a, Int b) {
    return a < b ? a : b;
}
inline Real magnitude(Real x) {
    return reinterpret_cast<Real>(reinterpret_cast<Bits>(x) & 0x7fffffff);
}
inline Real nearest(Real x) {
#ifdef __AVX2__
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return vrndnq_f32(x);
#endif
}
inline Real real(Int x) {
    return __builtin_convertvector(x, Real);
}
inline Int whole(Real x) {  // the nearest
#ifdef __AVX2__
    return reinterpret_cast<Int>(_mm256_cvtps_epi32(x));
#else
    return vcvtnq_s32_f32(x);
#endif
}
inline Real scaled(Real x, Real n) {  // x * 2^n
    return x * reinterpret_cast<Real>((whole(n) + 127) << 23);
}
template <class V, class F>
inline auto folded(V x, F pair) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = pair(x[i], x[i + half]);
    return x[0];
}
inline float sum(Real x) {
    return folded(x, [](float a, float b) { return a + b; });
}
inline float greatest(Real x) {
    return folded(x, [](float a, float b) { return std::max(a, b); });
}
inline float least(Real x) {
    return folded(x, [](float a, float b) { return std::min(a, b); });
}
inline int32_t least(Int x) {
    return folded(x, [](int32_t a, int32_t b) { return std::min(a, b); });
}

inline Mask first_lanes(long count) {
    Int x;
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x < splat(static_cast<int32_t>(std::min<long>(count, LANES)));
}
inline Mask none_of(const uint8_t* flags) {  // where a byte is 0
    return load_bytes(flags) == 0;
}

#ifdef __AVX2__

// LANES rows of LANES words become columns.
inline void transpose(Int rows[LANES]) {
    auto* r = reinterpret_cast<__m256i*>(rows);
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

// LANES registers -> a register of the sum of each.
inline Real sums_of(Real r[LANES]) {
    for (int i = 0; i < 8; i += 2) r[i] = _mm256_hadd_ps(r[i], r[i + 1]);
    const __m256 a = _mm256_hadd_ps(r[0], r[2]), b = _mm256_hadd_ps(r[4], r[6]);
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#else

inline void transpose(Int r[LANES]) {
    const int32x4_t a = vzip1q_s32(r[0], r[2]), b = vzip2q_s32(r[0], r[2]);
    const int32x4_t c = vzip1q_s32(r[1], r[3]), d = vzip2q_s32(r[1], r[3]);
    r[0] = vzip1q_s32(a, c), r[1] = vzip2q_s32(a, c), r[2] = vzip1q_s32(b, d), r[3] = vzip2q_s32(b, d);
}

inline Real sums_of(Real r[LANES]) {
    return vpaddq_f32(vpaddq_f32(r[0], r[1]), vpaddq_f32(r[2], r[3]));
}

#endif

inline void prefetch(const void* p) {  // into the second cache
    __builtin_prefetch(p, 0, 2);
}

}  // namespace
