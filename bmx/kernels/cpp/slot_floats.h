// The attention of one decoding token to its slot, in float: see slot.h.
//
// Keys become floats once for all query heads of the group. Scales of codes are applied to scores and to weights.

#pragma once

namespace {

// The attention of a decoding token to one kv head of its slot: operands and working memory.
struct Slot : Operands {
    long full = (rows + LANES - 1) / LANES * LANES;
    float *scores, *over;         // [group][full], and [group]: one over the sums of weights
    float* weights;               // [group][full], not divided by their sums: in place of the scores
    float* scaled;                // [group][full]: weights times the scales of values
    uint8_t* flags;               // [full]
    float *block, *queries;       // [LANES][dim], [group][dim]
    float *query_sums, *offsets;  // [group]: of the queries' numbers, and of weights times offsets of values
    float* answers;               // [group][value.dim], of the exact rows

    void set_channels(const ChannelKeys* keys) { channels = keys, exact = std::min(rows, KEY_GROUP); }
    Work take(Work own);
    static size_t bytes(Slot sizes) { return reinterpret_cast<size_t>(sizes.take(Work{nullptr}).at); }
    void attend(float scale, bf16* out);
    Real mean(long at) const;
    void weigh(float scale) const;
    void widen_queries() const;
    void fold_queries(long row) const;
    template <class Source>
    void scale_weights(const Source& values) const;
    template <class Codes, class Keys, class Finish>
    void score_block(Codes, const Keys& keys, long row, long at, long end, long lines, const Finish& finish);
    template <class Codes, class Source>
    void score(Codes, const Source& keys, long end, long lines);
    template <class Codes>
    void score_channels(Codes, long lines);
    template <class Kind, class Source>
    void answer(Kind, const Source& vectors, long begin, long end, long lines, bf16* out);
    template <class Kind, int COUNT, class Source>
    void answer_of(const Source& vectors, long begin, long end, long head, long chunk, long lines, bf16* out);
};

Work Slot::take(Work own) {
    scores = weights = own.take<float>(group * full), over = own.take<float>(group);
    scaled = own.take<float>(group * full), flags = own.take<uint8_t>(full);
    block = own.take<float>(LANES * key.dim), queries = own.take<float>(group * key.dim);
    query_sums = own.take<float>(group), offsets = own.take<float>(group);
    answers = own.take<float>(group * value.dim);
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

// Queries times the scales of the channels of a row's group, and the queries' products with its offsets.
void Slot::fold_queries(long row) const {
    for (long g = 0; g < group; g++) {
        Real offset = zeros();
        for (long d = 0; d < key.dim; d += LANES) {
            const Real v = load_bf16(query + g * key.dim + d);
            const Scales scales = channels->scales_of(row, d);
            store(queries + g * key.dim + d, v * scales.scale);
            offset = fused(v, scales.offset, offset);
        }
        query_sums[g] = sum(offset);
    }
}

template <class Source>
void Slot::scale_weights(const Source& values) const {
    for (long g = 0; g < group; g++) {
        Real offset = zeros();
        for (long i = exact; i < rows; i += LANES) {
            const Scales scales = values.scales_of(i - exact, rows - i);
            const Real weight = load(weights + g * full + i);
            store(scaled + g * full + i, weight * scales.scale);
            offset = fused(weight, scales.offset, offset);
        }
        offsets[g] = sum(offset);
    }
}

// Dot products of `queries` with up to LANES rows from `at` on, whose keys are those from `row` on.
template <class Codes, class Keys, class Finish>
void Slot::score_block(Codes codes, const Keys& keys, long row, long at, long end, long lines, const Finish& finish) {
    const long dim = key.dim, count = std::min<long>(LANES, end - at);
    for (long j = 0; j < count; j++)
        for (long d = 0; d < dim; d += LANES) store(block + j * dim + d, codes.numbers(keys.at(row + j), d, dim));
    for (long g = 0; g < group; g++) {
        next.fetch(lines);
        Real r[LANES];
        for (long j = 0; j < LANES; j++) r[j] = zeros();
        for (long d = 0; d < dim; d += LANES) {
            const Real asked = load(queries + g * dim + d);
            for (long j = 0; j < LANES; j++) r[j] = fused(asked, load(block + j * dim + d), r[j]);
        }
        store(scores + g * full + at, finish(sums_of(r), g));
    }
}

// Dot products of the rows up to `end` with all queries; `lines` are prefetched for each query and block of rows.
template <class Codes, class Source>
void Slot::score(Codes codes, const Source& keys, long end, long lines) {
    widen_queries();
    for (long i = 0; i < end; i += LANES) {
        const Scales scales = keys.scales_of(i, end - i);
        score_block(codes, keys, i, i, end, lines, [&](Real result, long g) {
            if (keys.format == MODEL) return result;
            return fused(result, scales.scale, scales.offset * splat(query_sums[g]));
        });
    }
}

// Dot products of the rows after the exact ones, whose keys are scaled by channel.
template <class Codes>
void Slot::score_channels(Codes codes, long lines) {
    for (long i = exact; i < rows; i += LANES) {
        const long row = i - exact;
        if (row % KEY_GROUP == 0) fold_queries(row);
        score_block(codes, *channels, row, i, rows, lines,
                    [&](Real result, long g) { return result + splat(query_sums[g]); });
    }
}

template <class Codes>
struct Columns : Codes {
    static constexpr long COLUMNS = 2 * LANES;
};

// The answers of `COUNT` query heads from `head` on, in two registers of columns.
template <class Kind, int COUNT, class Source>
void Slot::answer_of(const Source& vectors, long begin, long end, long head, long chunk, long lines, bf16* out) {
    const long at = chunk * Kind::COLUMNS;
    const float* factors = (vectors.format == MODEL ? weights : scaled) + head * full;
    const auto sums = [&](int r) { return answers + (head + r) * value.dim + at; };
    Real low[COUNT], high[COUNT];
    for (int r = 0; r < COUNT; r++) {
        low[r] = begin ? load(sums(r)) : zeros();
        high[r] = begin ? load(sums(r) + LANES) : zeros();
    }
    for (long i = begin; i < end; i++) {
        next.fetch(lines);
        const Real a = Kind::numbers(vectors.at(i - begin), at, value.dim);
        const Real b = Kind::numbers(vectors.at(i - begin), at + LANES, value.dim);
        for (int r = 0; r < COUNT; r++) {
            const Real factor = splat(factors[r * full + i]);
            low[r] = fused(factor, a, low[r]), high[r] = fused(factor, b, high[r]);
        }
    }
    for (int r = 0; r < COUNT; r++) {
        if (!out) {
            store(sums(r), low[r]), store(sums(r) + LANES, high[r]);
            continue;
        }
        bf16* to = out + (head + r) * value.dim + at;
        const Real factor = splat(over[head + r]);
        const Real offset = splat(value.format == MODEL ? 0.0f : offsets[head + r]);
        store_bf16(to, factor * (low[r] + offset));
        store_bf16(to + LANES, factor * (high[r] + offset));
    }
}

void Slot::attend(float scale, bf16* out) {
    const long lines = next.keys + next.values, passes = value.dim / (2 * LANES) * ((group + FEW - 1) / FEW);
    const long scored = 2 * lines * LANES / (3 * group * full) + 1;  // two thirds of the time goes there
    if (channels) {
        score(ModelCodes{}, exact_key, exact, scored);
        channels->format == INT8 ? score_channels(Levels{}, scored) : score_channels(Int4Codes{}, scored);
    } else {
        with_codes(key.format, [&](auto codes) {
            shared ? score(codes, Joined{shared_key, key, shared}, rows, scored) : score(codes, key, rows, scored);
        });
    }
    weigh(scale);
    const long answered = lines / (3 * full * passes) + 1;
    if (shared) {
        const Joined values{shared_value, value, shared};
        if (value.format != MODEL) scale_weights(values);
        with_codes(value.format,
                   [&](auto codes) { answer(Columns<decltype(codes)>{}, values, 0, rows, answered, out); });
        return;
    }
    if (value.format != MODEL) scale_weights(value);
    if (channels) answer(Columns<ModelCodes>{}, exact_value, 0, exact, answered, nullptr);
    with_codes(value.format,
               [&](auto codes) { answer(Columns<decltype(codes)>{}, value, exact, rows, answered, out); });
}

}  // namespace
