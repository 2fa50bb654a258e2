// Which pair is evicted first, for CPUs with AVX512: see rank in reference.py.

#pragma once

#include "attention.h"

namespace {

enum By { AGE, MASS, AVERAGE };  // as RANKS in ranking.py

struct EvictionOrder {                              // which pair is evicted first: the lowest score
    int by, sink, recent, window, distance, power;  // window 0 for none

    // Scores of 16 pairs: inf for sink and recent tokens, -inf for empty rows, pairs out of the window, and NaN.
    __m512 score(__m512i position, __m512 mass, int now) const {
        __m512 score = by == AGE ? _mm512_cvtepi32_ps(position) : mass;
        if (by == AVERAGE) {
            __m512i queries = _mm512_sub_epi32(_mm512_set1_epi32(now - distance), position);  // that counted
            queries = _mm512_max_epi32(queries, _mm512_set1_epi32(1));
            if (window) queries = _mm512_min_epi32(queries, _mm512_set1_epi32(std::max(window - distance, 1)));
            score = _mm512_div_ps(score, _mm512_cvtepi32_ps(queries));
        }
        const __mmask16 stays = _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32(sink)) |
                                _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32(now - recent));
        score = _mm512_mask_mov_ps(score, stays, _mm512_set1_ps(INFINITY));
        __mmask16 unseen = _mm512_cmplt_epi32_mask(position, _mm512_setzero_si512());
        if (window) unseen |= _mm512_cmple_epi32_mask(position, _mm512_set1_epi32(now - window));
        score = _mm512_mask_mov_ps(score, unseen, _mm512_set1_ps(-INFINITY));
        return _mm512_max_ps(score, _mm512_set1_ps(-INFINITY));
    }
};

// The row of a full slot whose pair is evicted: the lowest score, of equals the first.
long victim(const EvictionOrder& order, const int32_t* positions, const float* mass, long rows, int now) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 least = _mm512_set1_ps(INFINITY);
    __m512i where = lanes;
    for (long i = 0; i < rows; i += LANES) {
        const __mmask16 valid = seen(i, rows, nullptr);
        const __m512i position = _mm512_maskz_loadu_epi32(valid, positions + i);
        const __m512 received = mass ? _mm512_maskz_loadu_ps(valid, mass + i) : _mm512_setzero_ps();
        const __m512 score = order.score(position, received, now);
        const __mmask16 lower = _mm512_mask_cmp_ps_mask(valid, score, least, _CMP_LT_OQ);
        least = _mm512_mask_mov_ps(least, lower, score);
        where = _mm512_mask_add_epi32(where, lower, lanes, _mm512_set1_epi32(static_cast<int>(i)));
    }
    const __mmask16 lowest = _mm512_cmp_ps_mask(least, _mm512_set1_ps(_mm512_reduce_min_ps(least)), _CMP_EQ_OQ);
    return _mm512_mask_reduce_min_epi32(lowest, where);
}

}  // namespace
