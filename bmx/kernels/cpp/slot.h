// The attention of one decoding token to its slot.

#pragma once

#include "attention.h"
#include "channels.h"
#include "products.h"

namespace {

constexpr int FEW = 4;  // query heads that are multiplied with values together

// What a thread reads next, prefetched little by little, so that memory and arithmetic work side by side.
struct Stream {
    const uint8_t *key = nullptr, *value = nullptr;
    long keys = 0, values = 0;  // cache lines left of each
    const uint8_t* scale = nullptr;
    long scales = 0;  // of channels
    void fetch(long lines) {
        for (; lines > 0 && scales > 0; lines--, scales--, scale += 64) prefetch(scale);
        for (; lines > 0 && keys > 0; lines--, keys--, key += 64) prefetch(key);
        for (; lines > 0 && values > 0; lines--, values--, value += 64) prefetch(value);
    }
};

// What a decoding token attends to in one kv head of its slot. Where keys are scaled by channel, rows that are read as
// they are exactly come first, then those of `channels` and `value`.
struct Operands {
    const bf16* query;  // [group][dim]
    Stored key, value;  // [rows]
    long rows, group;
    int power = 1;                    // of the probabilities whose mean is asked for
    const uint8_t* hidden = nullptr;  // [rows]
    const float* sinks = nullptr;     // [group]
    Stream next = {};
    const ChannelKeys* channels = nullptr;
    Stored exact_key = {}, exact_value = {};
    long exact = 0;  // rows
    // Rows of another slot that are read before those of `key` and `value`: a multiple of 32 of them.
    Stored shared_key = {}, shared_value = {};
    long shared = 0;
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

// The answers from the rows `begin` .. `end`, whose values are those of `vectors` from the first on: sums into
// `answers` if out is null; else, with these sums where there are any, divided and rounded.
template <class Kind, class Source>
void Slot::answer(Kind, const Source& vectors, long begin, long end, long lines, bf16* out) {
    for (long chunk = 0; chunk < value.dim / Kind::COLUMNS; chunk++) {
        for (long g = 0; g < group; g += FEW) {
            switch (std::min<long>(FEW, group - g)) {
                case 4: answer_of<Kind, 4>(vectors, begin, end, g, chunk, lines, out); break;
                case 3: answer_of<Kind, 3>(vectors, begin, end, g, chunk, lines, out); break;
                case 2: answer_of<Kind, 2>(vectors, begin, end, g, chunk, lines, out); break;
                case 1: answer_of<Kind, 1>(vectors, begin, end, g, chunk, lines, out); break;
            }
        }
    }
}

}  // namespace
