// The attention of one decoding token to its slot.

#pragma once

#include "attention.h"
#include "formats.h"

namespace {

constexpr int FEW = 4;  // query heads that are multiplied with values together

// What a thread reads next, prefetched little by little, so that memory and arithmetic work side by side.
struct Stream {
    const uint8_t *key = nullptr, *value = nullptr;
    long keys = 0, values = 0;  // cache lines left of each
    void fetch(long lines) {
        for (; lines > 0 && keys > 0; lines--, keys--, key += 64) prefetch(key);
        for (; lines > 0 && values > 0; lines--, values--, value += 64) prefetch(value);
    }
};

}  // namespace

#ifdef __AVX512BF16__
#include "slot_words.h"
#else
#include "slot_floats.h"
#endif

namespace {

// Mean over the group of the powers of the attention probabilities of LANES keys from `at` on.
Real Slot::mean(long at) const {
    Real all = zeros();
    for (long g = 0; g < group; g++) {
        const float factor = (power == 2 ? over[g] * over[g] : over[g]) / static_cast<float>(group);
        all = fused(splat(factor), powered(load_number(weights + g * full + at), power), all);
    }
    return all;
}

// The weights of all rows, from their scores.
void Slot::weigh(float scale) const {
    for (long g = 0; g < group; g++)
        over[g] =
            softmax_row(scores + g * full, weights + g * full, full, rows, hidden, scale, sinks ? sinks + g : nullptr);
}

template <class Kind>
void Slot::answer(Kind, long lines, bf16* out) {
    for (long chunk = 0; chunk < value.dim / Kind::COLUMNS; chunk++) {
        for (long g = 0; g < group; g += FEW) {
            switch (std::min<long>(FEW, group - g)) {
                case 4: answer_of<Kind, 4>(g, chunk, lines, out); break;
                case 3: answer_of<Kind, 3>(g, chunk, lines, out); break;
                case 2: answer_of<Kind, 2>(g, chunk, lines, out); break;
                case 1: answer_of<Kind, 1>(g, chunk, lines, out); break;
            }
        }
    }
}

}  // namespace
