// What the attention of prompt chunks and of decoding tokens share: vectors by strides, which keys a query sees, and
// the softmax of a row of scores. Words and panels are in products.h.

#pragma once

#include "products.h"

namespace {

// Which of LANES keys from `at` on a query sees: keys before `limit` that are not hidden.
inline Mask seen(long at, long limit, const uint8_t* hidden) {
    const Mask before = first_lanes(limit - at);
    if (!hidden || at >= limit) return before;
    uint8_t room[LANES];
    return before & none_of(padded(hidden + at, limit - at, room));
}

// Softmax of a row of scores: writes `width` weights that are not divided by their sum yet, and returns 1 / sum. Keys
// that are not seen get weight 0; the logit of a sink, if there is one, is part of the sum alone.
float softmax_row(const float* scores, Number* weights, long width, long limit, const uint8_t* hidden, float scale,
                  const float* sink) {
    const long plain = hidden ? 0 : limit / LANES * LANES;  // of these, all are seen
    Real most = splat(-INFINITY);
    for (long i = 0; i < plain; i += LANES) most = greater(most, load(scores + i));
    for (long i = plain; i < limit; i += LANES)
        most = select(seen(i, limit, hidden), greater(most, load(scores + i)), most);
    float top = greatest(most) * scale;
    if (sink) top = std::max(top, *sink);
    const Real factor = splat(scale * LOG2_E), offset = splat(-top * LOG2_E);
    Real total = zeros();
    const auto weigh = [&](long i) { return power_of_two(fused(load(scores + i), factor, offset)); };
    for (long i = 0; i < plain; i += LANES) {
        const Real weight = weigh(i);
        total = total + weight;
        store_number(weights + i, weight);
    }
    for (long i = plain; i < width; i += LANES) {
        const Real weight = i < limit ? select(seen(i, limit, hidden), weigh(i), zeros()) : zeros();
        total = total + weight;
        store_number(weights + i, weight);
    }
    const float all = sum(total);
    return 1.0f / (sink ? all + std::exp(*sink - top) : all);
}

// The power of attention probabilities that is added up: 1 or 2.
inline Real powered(Real x, int power) {
    return power == 2 ? x * x : x;
}

struct Vectors {  // bfloat16 vectors by row and head: address of the first, and strides in numbers
    const bf16* data;
    long row, head;
    const bf16* at(long r, long h) const { return data + r * row + h * head; }
};

}  // namespace
