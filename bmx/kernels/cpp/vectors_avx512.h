// Registers of AVX512: see vectors.h.

#pragma once

#include <immintrin.h>

namespace {

constexpr int LANES = 16;
constexpr float LEAST_EXPONENT = -144.0f;  // a smaller power of two counts as this one

using Real = __m512;
using Int = int32_t __attribute__((vector_size(64)));
using Mask = __mmask16;
using Narrow = __m256i;  // bfloat16

inline Real splat(float x) {
    return _mm512_set1_ps(x);
}
inline Int splat(int32_t x) {
    return reinterpret_cast<Int>(_mm512_set1_epi32(x));
}
inline Real load(const float* p) {
    return _mm512_loadu_ps(p);
}
inline Int load(const int32_t* p) {
    return reinterpret_cast<Int>(_mm512_loadu_si512(p));
}
inline void store(float* p, Real x) {
    _mm512_storeu_ps(p, x);
}
inline void store(int32_t* p, Int x) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(x));
}
inline Real widened(Narrow x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Narrow narrowed(Real x) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i all = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
#endif
}
inline Real load_halves(const uint16_t* p) {  // float16
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Real from_halves(Int x) {  // float16 in the lowest bits
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
}
inline float from_half(uint16_t half) {
    return _cvtsh_ss(half);
}
inline uint16_t to_half(float x) {
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}
inline Int load_bytes(const uint8_t* p) {
    return reinterpret_cast<Int>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Int load_signed_bytes(const uint8_t* p) {
    return reinterpret_cast<Int>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_bytes(uint8_t* p, Int x) {  // their lowest bits
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
}

inline Real fused(Real a, Real b, Real c) {  // a * b + c
    return _mm512_fmadd_ps(a, b, c);
}
inline Real greater(Real a, Real b) {
    return _mm512_max_ps(a, b);
}
inline Real lesser(Real a, Real b) {
    return _mm512_min_ps(a, b);
}
inline Int greater(Int a, Int b) {
    return reinterpret_cast<Int>(_mm512_max_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline Int lesser(Int a, Int b) {
    return reinterpret_cast<Int>(_mm512_min_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline Real magnitude(Real x) {
    return _mm512_abs_ps(x);
}
inline Real nearest(Real x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Real scaled(Real x, Real n) {  // x * 2^n
    return _mm512_scalef_ps(x, n);
}
inline Real real(Int x) {
    return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x));
}
inline Int whole(Real x) {  // the nearest
    return reinterpret_cast<Int>(_mm512_cvtps_epi32(x));
}
inline float sum(Real x) {
    return _mm512_reduce_add_ps(x);
}
inline float greatest(Real x) {
    return _mm512_reduce_max_ps(x);
}
inline float least(Real x) {
    return _mm512_reduce_min_ps(x);
}
inline int32_t least(Int x) {
    return _mm512_reduce_min_epi32(reinterpret_cast<__m512i>(x));
}

inline Mask first_lanes(long count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : static_cast<Mask>((1u << count) - 1);
}
inline Mask none_of(const uint8_t* flags) {  // where a byte is 0
    return _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(flags)), _mm_setzero_si128());
}
inline Mask less(Real a, Real b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
inline Mask equal(Real a, Real b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
}
inline Mask less(Int a, Int b) {
    return _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
}
inline Real select(Mask where, Real a, Real b) {  // a, elsewhere b
    return _mm512_mask_mov_ps(b, where, a);
}
inline Int select(Mask where, Int a, Int b) {
    return reinterpret_cast<Int>(
        _mm512_mask_mov_epi32(reinterpret_cast<__m512i>(b), where, reinterpret_cast<__m512i>(a)));
}

// LANES rows of LANES words become columns.
inline void transpose(Int rows[LANES]) {
    auto* r = reinterpret_cast<__m512i*>(rows);
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// LANES registers -> a register of the sum of each.
inline Real sums_of(Real r[LANES]) {
    for (int i = 0; i < 8; i++) {
        const __m512 a = r[i], b = r[i + 8];
        const __m512 low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xee);
        r[i] = _mm512_add_ps(low, high);  // a's four sums of pairs of lanes in the lower half, b's in the upper
    }
    for (int i = 0; i < 4; i++) {
        const __m512 low = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        r[i] = _mm512_add_ps(low, _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd));  // i, i + 8, i + 4, i + 12
    }
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    const __m512 low = _mm512_shuffle_ps(a, b, 0x44), high = _mm512_shuffle_ps(a, b, 0xee);
    return _mm512_shuffle_f32x4(_mm512_add_ps(low, high), _mm512_add_ps(low, high), 0xd8);  // lanes 0, 8, 4, 12
}

inline void prefetch(const void* p) {  // into the second cache
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace
