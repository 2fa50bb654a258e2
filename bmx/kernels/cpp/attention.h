// What the attention of prompt chunks and of decoding tokens share, for CPUs with AVX512-BF16: vectors by strides,
// which keys a query sees, and the softmax of a row of scores. Words and panels are in gemm.h.

#pragma once

#include "gemm.h"

#include <cmath>

namespace {

// Which of 16 keys from `at` on a query sees: keys before `limit` that are not hidden.
inline __mmask16 seen(long at, long limit, const uint8_t* hidden) {
    const long left = std::min<long>(LANES, limit - at);
    const __mmask16 mask = left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
    if (!hidden) return mask;
    const __m128i flags = _mm_maskz_loadu_epi8(mask, hidden + at);
    return _mm_mask_cmpeq_epi8_mask(mask, flags, _mm_setzero_si128());
}

// Softmax of a row of scores: writes `width` weights that are not divided by their sum yet, and returns 1 / sum. Keys
// that are not seen get weight 0; the logit of a sink, if there is one, is part of the sum alone.
float softmax_row(const float* scores, bf16* weights, long width, long limit, const uint8_t* hidden, float scale,
                  const float* sink) {
    const __m512 low = _mm512_set1_ps(-INFINITY);
    __m512 most = low;
    for (long i = 0; i < limit; i += LANES)
        most = _mm512_mask_max_ps(most, seen(i, limit, hidden), most, _mm512_load_ps(scores + i));
    float top = _mm512_reduce_max_ps(most) * scale;
    if (sink) top = std::max(top, *sink);
    const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_set1_ps(top);
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < width; i += LANES) {
        const __mmask16 mask = seen(i, limit, hidden);
        const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + i), factor, offset);
        const __m512 e = mask ? _mm512_maskz_mov_ps(mask, exponential(x)) : _mm512_setzero_ps();
        sum = _mm512_add_ps(sum, e);
        store_bf16(weights + i, e);
    }
    float total = _mm512_reduce_add_ps(sum);
    if (sink) total += std::exp(*sink - top);
    return 1.0f / total;
}

// The power of attention probabilities that is added up: 1 or 2.
inline __m512 powered(__m512 x, int power) {
    return power == 2 ? _mm512_mul_ps(x, x) : x;
}

struct Vectors {  // bfloat16 vectors by row and head: address of the first, and strides in numbers
    const bf16* data;
    long row, head;
    const bf16* at(long r, long h) const { return data + r * row + h * head; }
};

}  // namespace
