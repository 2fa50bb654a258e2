// Which pair is evicted first: see rank in reference.py.

#pragma once

#include "attention.h"

namespace {

enum By { AGE, MASS, AVERAGE };  // as RANKS in ranking.py

struct EvictionOrder {                              // which pair is evicted first: the lowest score
    int by, sink, recent, window, distance, power;  // window 0 for none

    // Scores of LANES pairs: inf for sink and recent tokens, -inf for empty rows, pairs out of the window, and NaN.
    Real score(Int position, Real mass, int now) const {
        Real score = by == AGE ? real(position) : mass;
        if (by == AVERAGE) {
            Int queries = greater(splat(now - distance) - position, splat(1));  // that counted
            if (window) queries = lesser(queries, splat(std::max(window - distance, 1)));
            score = score / real(queries);
        }
        const Mask stays = less(position, splat(sink)) | less(splat(now - recent - 1), position);
        score = select(stays, splat(INFINITY), score);
        Mask unseen = less(position, splat(0));
        if (window) unseen = unseen | less(position, splat(now - window + 1));
        score = select(unseen, splat(-INFINITY), score);
        return greater(score, splat(-INFINITY));
    }
};

// The row of a full slot whose pair is evicted: the lowest score, of equals the first.
long victim(const EvictionOrder& order, const int32_t* positions, const float* mass, long rows, int now) {
    Real lowest = splat(INFINITY);
    Int where = lanes_from(0);
    for (long i = 0; i < rows; i += LANES) {
        int32_t some_positions[LANES];
        float some_mass[LANES];
        const Int position = load(padded(positions + i, rows - i, some_positions));
        const Real received = mass ? load(padded(mass + i, rows - i, some_mass)) : zeros();
        const Real score = order.score(position, received, now);
        const Mask lower = less(score, lowest) & first_lanes(rows - i);
        lowest = select(lower, score, lowest);
        where = select(lower, lanes_from(i), where);
    }
    return least(select(equal(lowest, splat(least(lowest))), where, splat(INT32_MAX)));
}

}  // namespace
