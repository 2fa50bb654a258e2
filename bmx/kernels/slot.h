// The attention of one decoding token to its slot, for CPUs with AVX512-BF16.

#pragma once

#include "attention.h"

namespace {

constexpr int FEW = 4;  // query heads that are multiplied with values together

// 16 registers -> a register of the sum of each.
inline __m512 sums_of(__m512 r[16]) {
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

// Keys and values of the next task, prefetched little by little, so that memory and arithmetic work side by side.
struct Stream {
    const bf16 *key = nullptr, *value = nullptr;
    long keys = 0, values = 0;  // numbers left of each
    void prefetch(long lines) {
        for (; lines > 0 && keys > 0; lines--, key += 2 * LANES, keys -= 2 * LANES)
            _mm_prefetch(reinterpret_cast<const char*>(key), _MM_HINT_T1);
        for (; lines > 0 && values > 0; lines--, value += 2 * LANES, values -= 2 * LANES)
            _mm_prefetch(reinterpret_cast<const char*>(value), _MM_HINT_T1);
    }
};

// The attention of a decoding token to one kv head of its slot: operands and working memory.
struct Slot {
    const bf16 *query, *key, *value;  // [group][dim], [rows][dim], [rows][value_dim]
    long rows, group, dim, value_dim;
    const uint8_t* hidden;  // [rows] or null
    const float* sinks;     // [group] or null
    int power;              // of the probabilities whose mean is asked for
    float *scores, *over;   // [rows], and [group]: one over the sums of weights
    bf16* weights;          // [group][full]
    Stream next;            // what the thread reads after this
    long full() const { return (rows + LANES - 1) / LANES * LANES; }

    static size_t bytes(long rows, long group) {
        const long full = (rows + LANES - 1) / LANES * LANES;
        return Work::bytes<float>(full) + Work::bytes<float>(group) + Work::bytes<bf16>(group * full) +
               Work::bytes<uint8_t>(full);
    }
    uint8_t* take(Work own) {  // returns memory for [rows] flags
        scores = own.take<float>(full());
        over = own.take<float>(group);
        weights = own.take<bf16>(group * full());
        return own.take<uint8_t>(full());
    }
    // Mean over the group of the powers of the attention probabilities of 16 keys from `at` on.
    __m512 mean(long at) const {
        __m512 sum = _mm512_setzero_ps();
        for (long g = 0; g < group; g++) {
            const float factor = (power == 2 ? over[g] * over[g] : over[g]) / static_cast<float>(group);
            const __m512 weight = powered(load_bf16(weights + g * full() + at), power);
            sum = _mm512_fmadd_ps(_mm512_set1_ps(factor), weight, sum);
        }
        return sum;
    }
    void attend(float scale, bf16* out);
};

void Slot::attend(float scale, bf16* out) {
    const long width = full(), lines = (next.keys + next.values) / (2 * LANES);
    const long in_scores = 2 * lines * LANES / (3 * group * width) + 1;  // two thirds of the time goes there
    const long in_values = 4 * LANES * lines / (3 * width * value_dim * ((group + FEW - 1) / FEW)) + 1;
    for (long g = 0; g < group; g++) {
        for (long i = 0; i < rows; i += LANES) {
            next.prefetch(in_scores);
            __m512 r[16];
            for (long j = 0; j < LANES; j++) {
                r[j] = _mm512_setzero_ps();
                const bf16* row = key + std::min(i + j, rows - 1) * dim;
                for (long d = 0; d < dim; d += 2 * LANES)
                    r[j] = _mm512_dpbf16_ps(r[j], reinterpret_cast<__m512bh>(_mm512_loadu_si512(query + g * dim + d)),
                                            reinterpret_cast<__m512bh>(_mm512_loadu_si512(row + d)));
            }
            _mm512_store_ps(scores + i, sums_of(r));
        }
        over[g] = softmax_row(scores, weights + g * width, width, rows, hidden, scale, sinks ? sinks + g : nullptr);
    }
    // Two rows of values are interleaved into words: columns 0-3 of every eight in one register, 4-7 in another.
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (long e = 0; e < value_dim; e += 2 * LANES) {
        for (long g = 0; g < group; g += FEW) {
            const long count = std::min<long>(FEW, group - g);
            __m512 low[FEW], high[FEW];
            for (long r = 0; r < FEW; r++) low[r] = high[r] = _mm512_setzero_ps();
            for (long i = 0; i < rows; i += 2) {
                next.prefetch(in_values);
                const __m512i a = _mm512_loadu_si512(value + i * value_dim + e);
                const __m512i b =
                    i + 1 < rows ? _mm512_loadu_si512(value + (i + 1) * value_dim + e) : _mm512_setzero_si512();
                const __m512i x = _mm512_unpacklo_epi16(a, b), y = _mm512_unpackhi_epi16(a, b);
                for (long r = 0; r < count; r++) {
                    word pair;
                    std::memcpy(&pair, weights + (g + r) * width + i, 4);
                    low[r] = Halves::add(low[r], pair, x);
                    high[r] = Halves::add(high[r], pair, y);
                }
            }
            for (long r = 0; r < count; r++) {
                bf16* to = out + (g + r) * value_dim + e;
                const __m512 factor = _mm512_set1_ps(over[g + r]);
                store_bf16(to, _mm512_mul_ps(factor, _mm512_permutex2var_ps(low[r], first, high[r])));
                store_bf16(to + LANES, _mm512_mul_ps(factor, _mm512_permutex2var_ps(low[r], second, high[r])));
            }
        }
    }
}

}  // namespace
