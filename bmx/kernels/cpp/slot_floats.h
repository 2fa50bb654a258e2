// The attention of one decoding token to its slot, in float: see slot.h.
//
// Keys become floats once for all query heads of the group. Scales of codes are applied to scores and to weights.

#pragma once

namespace {

// The attention of a decoding token to one kv head of its slot: operands and working memory.
struct Slot {
    const bf16* query;  // [group][dim]
    Stored key, value;  // [rows]
    long rows, group;
    int power;                        // of the probabilities whose mean is asked for
    const uint8_t* hidden = nullptr;  // [rows]
    const float* sinks = nullptr;     // [group]
    Stream next = {};

    long full = (rows + LANES - 1) / LANES * LANES;
    float *scores, *over;         // [group][full], and [group]: one over the sums of weights
    float* weights;               // [group][full], not divided by their sums: in place of the scores
    float* scaled;                // [group][full]: weights times the scales of values
    uint8_t* flags;               // [full]
    float *block, *queries;       // [LANES][dim], [group][dim]
    float *query_sums, *offsets;  // [group]: of the queries' numbers, and of weights times offsets of values

    Work take(Work own);
    static size_t bytes(Slot sizes) { return reinterpret_cast<size_t>(sizes.take(Work{nullptr}).at); }
    void attend(float scale, bf16* out);
    Real mean(long at) const;
    void weigh(float scale) const;
    void widen_queries() const;
    void scale_weights() const;
    template <class Codes>
    void score(Codes, long lines);
    template <class Kind>
    void answer(Kind, long lines, bf16* out);
    template <class Kind, int COUNT>
    void answer_of(long head, long chunk, long lines, bf16* out);
};

Work Slot::take(Work own) {
    scores = weights = own.take<float>(group * full), over = own.take<float>(group);
    scaled = own.take<float>(group * full), flags = own.take<uint8_t>(full);
    block = own.take<float>(LANES * key.dim), queries = own.take<float>(group * key.dim);
    query_sums = own.take<float>(group), offsets = own.take<float>(group);
    return own;
}

void Slot::widen_queries() const {
    for (long g = 0; g < group; g++) {
        Real all = zeros();
        for (long d = 0; d < key.dim; d += LANES) {
            const Real v = load_bf16(query + g * key.dim + d);
            all = all + v;
            store(queries + g * key.dim + d, v);
        }
        query_sums[g] = sum(all);
    }
}

void Slot::scale_weights() const {
    for (long g = 0; g < group; g++) {
        Real offset = zeros();
        for (long i = 0; i < full; i += LANES) {
            const Scales scales = value.scales_of(i, rows - i);
            const Real weight = load(weights + g * full + i);
            store(scaled + g * full + i, weight * scales.scale);
            offset = fused(weight, scales.offset, offset);
        }
        offsets[g] = sum(offset);
    }
}

// Dot products of all rows with all queries of the group; `lines` are prefetched for each query and block of rows.
template <class Codes>
void Slot::score(Codes codes, long lines) {
    const long dim = key.dim;
    for (long i = 0; i < rows; i += LANES) {
        const long count = std::min<long>(LANES, rows - i);
        for (long j = 0; j < count; j++)
            for (long d = 0; d < dim; d += LANES) store(block + j * dim + d, codes.numbers(key.at(i + j), d, dim));
        const Scales scales = key.scales_of(i, count);
        for (long g = 0; g < group; g++) {
            next.fetch(lines);
            Real r[LANES];
            for (long j = 0; j < LANES; j++) r[j] = zeros();
            for (long d = 0; d < dim; d += LANES) {
                const Real asked = load(queries + g * dim + d);
                for (long j = 0; j < LANES; j++) r[j] = fused(asked, load(block + j * dim + d), r[j]);
            }
            Real result = sums_of(r);
            if (key.format != MODEL) result = fused(result, scales.scale, scales.offset * splat(query_sums[g]));
            store(scores + g * full + i, result);
        }
    }
}

template <class Codes>
struct Columns : Codes {
    static constexpr long COLUMNS = 2 * LANES;
};

// The answers of `COUNT` query heads from `head` on, in two registers of columns.
template <class Kind, int COUNT>
void Slot::answer_of(long head, long chunk, long lines, bf16* out) {
    const long at = chunk * Kind::COLUMNS;
    const float* factors = (value.format == MODEL ? weights : scaled) + head * full;
    Real low[COUNT], high[COUNT];
    for (int r = 0; r < COUNT; r++) low[r] = high[r] = zeros();
    for (long i = 0; i < rows; i++) {
        next.fetch(lines);
        const Real a = Kind::numbers(value.at(i), at, value.dim);
        const Real b = Kind::numbers(value.at(i), at + LANES, value.dim);
        for (int r = 0; r < COUNT; r++) {
            const Real factor = splat(factors[r * full + i]);
            low[r] = fused(factor, a, low[r]), high[r] = fused(factor, b, high[r]);
        }
    }
    for (int r = 0; r < COUNT; r++) {
        bf16* to = out + (head + r) * value.dim + at;
        const Real factor = splat(over[head + r]);
        const Real offset = splat(value.format == MODEL ? 0.0f : offsets[head + r]);
        store_bf16(to, factor * (low[r] + offset));
        store_bf16(to + LANES, factor * (high[r] + offset));
    }
}

void Slot::attend(float scale, bf16* out) {
    const long lines = next.keys + next.values, passes = value.dim / (2 * LANES) * ((group + FEW - 1) / FEW);
    widen_queries();
    with_codes(key.format, [&](auto codes) {
        score(codes, 2 * lines * LANES / (3 * group * full) + 1);  // two thirds of the time goes there
    });
    weigh(scale);
    if (value.format != MODEL) scale_weights();
    with_codes(value.format,
               [&](auto codes) { answer(Columns<decltype(codes)>{}, lines / (3 * full * passes) + 1, out); });
}

}  // namespace
