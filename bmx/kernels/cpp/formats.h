// Vectors as they are stored, for CPUs with AVX512: in bfloat16, or as codes with a scale each. See formats.py.

#pragma once

#include "gemm.h"

#include <cmath>

namespace {

enum Format { MODEL, INT8, INT4 };  // as FORMATS in avx512.py

constexpr int WORDS = 2 * LANES;  // 16-bit numbers of a register
constexpr float LARGEST_HALF = 65504.0f, SMALLEST_SCALE = 1e-7f;

inline float from_half(uint16_t half) {
    return _cvtsh_ss(half);
}
inline uint16_t to_half(float x) {
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

// Codes of one byte as 16-bit words, those of `chunk`: 32 numbers in order.
struct Int8 {
    static __m512i words(const uint8_t* codes, long chunk) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + chunk * WORDS)));
    }
};

// Levels of four bits as 16-bit words, those of `chunk`: 16 numbers of the first half, then 16 of the second.
struct Int4 {
    static __m512i words(const uint8_t* codes, long chunk) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + chunk * LANES));
        const __m512i twice = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes));
        const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
        return _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi16(15));
    }
};

struct Scales {  // of 16 vectors: numbers = code * scale + offset
    __m512 scale, offset;
};

// Stored vectors, by row; `head` rows lie between the first rows of two kv heads.
struct Stored {
    uint8_t* data;
    uint16_t* scales;  // [rows][1 or 2] float16, null for bfloat16
    long format, dim, head;

    long bytes() const { return format == MODEL ? 2 * dim : format == INT8 ? dim : dim / 2; }
    long parts() const { return format == INT4 ? 2 : 1; }
    const uint8_t* at(long row) const { return data + row * bytes(); }
    Stored from(long row) const {
        return {data + row * bytes(), scales ? scales + row * parts() : nullptr, format, dim, head};
    }
    // Where the 16 numbers lie in a vector that a half of a register of words holds.
    long place(long half) const { return format == INT4 ? half % 2 * (dim / 2) + half / 2 * LANES : half * LANES; }
    Scales scales_of(long row, __mmask16 valid) const {
        if (format == INT8)
            return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, scales + row)), _mm512_setzero_ps()};
        const __m512i both = _mm512_maskz_loadu_epi32(valid, scales + 2 * row);
        return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)),
                _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)))};
    }
    void put(long row, const bf16* vector) const;
    void read(long row, bf16* vector) const;
};

// The least and greatest numbers of a vector, NaN if there is one in it.
struct Range {
    float least, greatest;
    Range(const bf16* vector, long dim) {
        __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
        __mmask16 broken = 0;
        for (long d = 0; d < dim; d += LANES) {
            const __m512 v = load_bf16(vector + d);
            low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v);
            broken |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        }
        least = broken ? NAN : _mm512_reduce_min_ps(low), greatest = broken ? NAN : _mm512_reduce_max_ps(high);
    }
};

// A number within the bounds; NaN stays NaN.
inline float within(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;
}

// Stores a vector, with exactly the codes and scales of formats.py.
void Stored::put(long row, const bf16* vector) const {
    uint8_t* to = data + row * bytes();
    if (format == MODEL) {
        std::memcpy(to, vector, dim * sizeof(bf16));
        return;
    }
    const Range range(vector, dim);
    const bool symmetric = format == INT8;
    const float spread =
        symmetric ? std::max(-range.least, range.greatest) / 127.0f : (range.greatest - range.least) / 15.0f;
    const uint16_t half = to_half(within(spread, SMALLEST_SCALE, LARGEST_HALF));
    const uint16_t least = to_half(within(range.least, -LARGEST_HALF, LARGEST_HALF));
    const __m512 scale = _mm512_set1_ps(from_half(half)), offset = _mm512_set1_ps(symmetric ? 0.0f : from_half(least));
    const __m512 low = _mm512_set1_ps(symmetric ? -127.0f : 0.0f), high = _mm512_set1_ps(symmetric ? 127.0f : 15.0f);
    const auto codes = [=](long d) {
        const __m512 code = _mm512_div_ps(_mm512_sub_ps(load_bf16(vector + d), offset), scale);
        return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(code, low), high));
    };
    scales[row * parts()] = half;
    if (!symmetric) scales[row * parts() + 1] = least;
    for (long d = 0; d < bytes(); d += LANES) {
        __m512i code = codes(d);
        if (!symmetric) code = _mm512_or_si512(code, _mm512_slli_epi32(codes(dim / 2 + d), 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d), _mm512_cvtepi32_epi8(code));
    }
}

// Reads a vector, rounded to bfloat16.
void Stored::read(long row, bf16* vector) const {
    const uint8_t* from = at(row);
    if (format == MODEL) {
        std::memcpy(vector, from, dim * sizeof(bf16));
        return;
    }
    const __m512 scale = _mm512_set1_ps(from_half(scales[row * parts()]));
    const __m512 offset = _mm512_set1_ps(format == INT4 ? from_half(scales[row * parts() + 1]) : 0.0f);
    for (long chunk = 0; chunk < dim / WORDS; chunk++) {
        const __m512i words = format == INT8 ? Int8::words(from, chunk) : Int4::words(from, chunk);
        for (long half = 0; half < 2; half++) {
            const __m256i codes = half ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words);
            const __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(codes));
            store_bf16(vector + place(2 * chunk + half), _mm512_fmadd_ps(numbers, scale, offset));
        }
    }
}

}  // namespace
