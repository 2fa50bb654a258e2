// What mixers compute: layers that keep a state of their own for each sequence. See mixer_contract.py.
//
// A task is a part of a state that nothing else has to do with, with all tokens of its sequence one after another: so
// numbers do not depend on how a sequence is cut into steps, nor on what is computed beside it. While tokens are
// computed, a part is float and stays in the first cache. Without a decoding token's slot (-1) the output is zeros.

#pragma once

#include <omp.h>

#include "attention.h"

namespace {

// Sequences of equal length among packed rows.
struct Sequences {
    const int64_t *slots, *begins;  // the slot of each, and its first row: rows 0, 1, ... if null
    long count, length;
    int kept;  // whether the state after a sequence is stored in its slot
    long begin(long i) const { return begins ? begins[i] : i; }
};

// Vectors by row and head: address of the first, and strides in numbers.
template <class T>
struct Heads {
    const T* data;
    long row, head;
    const T* at(long r, long h) const { return data + r * row + h * head; }
};

template <class T>
Heads<T> heads_of(const Vectors& x) {
    return {reinterpret_cast<const T*>(x.data), x.row, x.head};
}

inline Real silu(Real x) {
    const Real e = exponential(zeros() - magnitude(x)), one = splat(1.0f);  // no power of e can overflow
    return x * select(less(x, zeros()), e, one) / (one + e);
}

constexpr int MOST_TAPS = 4;  // of a convolution

// A causal convolution of each channel, of 2 to MOST_TAPS taps: x by row; weight [channels][taps]; windows [slots][taps
// - 1][channels].
template <class X>
struct Convolution {
    static constexpr long BLOCK = 512;         // channels of a task
    static constexpr long ROWS_TOGETHER = 16;  // whose inputs stay in the first cache

    const X* x;
    long row;  // stride
    const X *weight, *bias;
    X *windows, *y;
    long channels, taps;
    bool with_silu;

    static size_t bytes(long taps) { return Work::bytes<float>((taps + 1) * BLOCK); }

    // `width` channels from `first` on, of one sequence.
    void compute(const Sequences& all, long which, long first, long width, const float* factors) const {
        const long begin = all.begin(which), slot = all.slots[which];
        if (slot < 0) return std::fill(y + begin * channels + first, y + begin * channels + first + width, X{});
        X* window = windows + slot * (taps - 1) * channels + first;
        const auto seen = [&](long i) {  // inputs from the first of the window on
            return i < taps - 1 ? window + i * channels : x + (begin + i - (taps - 1)) * row + first;
        };
        for (long from = 0; from < all.length; from += ROWS_TOGETHER) {
            const long rows = std::min(ROWS_TOGETHER, all.length - from);
            for (long c = 0; c < width; c += LANES)
                column(seen, from, rows, c, factors + c, y + (begin + from) * channels + first + c);
        }
        for (long i = 0; all.kept && i < taps - 1; i++)
            std::memmove(window + i * channels, seen(all.length + i), width * sizeof(X));
    }

    // LANES channels of some rows: the last inputs stay in registers. `seen`: see compute.
    template <int N = MOST_TAPS, class Seen>
    void column(const Seen& seen, long from, long rows, long c, const float* factors, X* to) const {
        if constexpr (N > 2)
            if (taps < N) return column<N - 1>(seen, from, rows, c, factors, to);
        Real last[N], weights[N];
        for (int i = 0; i < N; i++) weights[i] = load(factors + i * BLOCK);
        for (int i = 0; i + 1 < N; i++) last[i + 1] = load_number(seen(from + i) + c);
        const Real given = load(factors + N * BLOCK);
        for (long t = 0; t < rows; t++, to += channels) {
            for (int i = 0; i + 1 < N; i++) last[i] = last[i + 1];
            last[N - 1] = load_number(seen(from + t + N - 1) + c);
            Real sum = given;
            for (int i = 0; i < N; i++) sum = fused(last[i], weights[i], sum);
            store_number(to, with_silu ? silu(sum) : sum);
        }
    }

    // The weights of each tap, then the bias, of `width` channels from `first` on.
    void spread(float* factors, long first, long width) const {
        for (long c = 0; c < width; c += LANES)
            store(factors + taps * BLOCK + c, bias ? load_number(bias + first + c) : zeros());
        for (long tap = 0; tap < taps; tap++) {
            const X* from = weight + first * taps + tap;
            for (long c = 0; c < width; c++, from += taps) factors[tap * BLOCK + c] = number(*from);
        }
    }

    static float number(float x) { return x; }
    static float number(bf16 x) {
        const word bits = static_cast<word>(x) << 16;
        float y;
        std::memcpy(&y, &bits, sizeof y);
        return y;
    }

    void compute_all(const Sequences& all, char* memory, size_t each) const {
        const long blocks = (channels + BLOCK - 1) / BLOCK, parts = all.length > 1 ? all.count : 1;
#pragma omp parallel for
        for (long task = 0; task < parts * blocks; task++) {
            const long first = task % blocks * BLOCK, width = std::min(BLOCK, channels - first);
            float* factors = Work{memory + omp_get_thread_num() * each}.take<float>((taps + 1) * BLOCK);
            spread(factors, first, width);
            for (long which = task / blocks; which < all.count; which += parts)
                compute(all, which, first, width, factors);
        }
    }
};

// What a token does in the delta rule, for each of the D numbers of a key.
struct DeltaToken {
    float *left, *key;             // what is left of the state, and what is added to it times the change
    float *seen_key, *seen_query;  // key and query as they meet the state before the token
    float beta = 0, key_to_query = 0;

    DeltaToken(Work& work, long dim)
        : left(work.take<float>(dim)),
          key(work.take<float>(dim)),
          seen_key(work.take<float>(dim)),
          seen_query(work.take<float>(dim)) {}
};

// The gated delta rule. States [slots][heads][dim][value_dim] in Stored numbers.
template <class X, class Stored>
struct DeltaRule {
    static constexpr int WIDTH = 4;    // registers of columns of a task
    static constexpr long AHEAD = 16;  // rows of a state that are fetched before they are read

    Heads<X> query, key, value;
    Heads<float> decay, beta;
    Stored* states;
    X* y;
    long heads, group, dim, value_dim;  // group: heads of a key
    bool by_channel, normalise;

    static size_t bytes(long dim) { return Work::bytes<float>(dim * WIDTH * LANES) + 8 * Work::bytes<float>(dim); }

    void prepare(long row, long head, DeltaToken& token) const {
        const X *q = query.at(row, head / group), *k = key.at(row, head / group);
        const float* logarithm = decay.at(row, head);
        Real queries = zeros(), keys = zeros(), both = zeros();
        for (long d = 0; d < dim; d += LANES) {
            const Real a = load_number(q + d), b = load_number(k + d);
            queries = fused(a, a, queries), keys = fused(b, b, keys), both = fused(a, b, both);
        }
        float of_query = 1.0f / std::sqrt(static_cast<float>(dim)), of_key = 1.0f;
        if (normalise) of_query /= std::sqrt(sum(queries) + 1e-6f), of_key /= std::sqrt(sum(keys) + 1e-6f);
        token.key_to_query = sum(both) * of_query * of_key;
        token.beta = *beta.at(row, head);
        Real left = exponential(splat(*logarithm));
        for (long d = 0; d < dim; d += LANES) {
            if (by_channel) left = exponential(load(logarithm + d));
            const Real b = load_number(k + d) * splat(of_key);
            store(token.left + d, left), store(token.key + d, b), store(token.seen_key + d, b * left);
            store(token.seen_query + d, load_number(q + d) * splat(of_query) * left);
        }
    }

    // N registers of columns from `column` on, of one head of one sequence.
    template <int N>
    void columns(const Sequences& all, long which, long head, long column, Work work) const {
        const long row = all.begin(which), last = row + all.length - 1, slot = all.slots[which];
        X* to = y + (row * heads + head) * value_dim + column;
        if (slot < 0) return std::fill(to, to + N * LANES, X{});
        Stored* state = states + ((slot * heads + head) * dim) * value_dim + column;
        float* room = work.take<float>(dim * N * LANES);
        DeltaToken now(work, dim), next(work, dim);
        Real keys[N], queries[N], change[N];  // products of the state with the token's key and query
        prepare(row, head, now);
        begin<N>(state, room, now, keys, queries);
        for (long t = row;; t++, to += heads * value_dim) {
            const X* v = value.at(t, head) + column;
            for (int i = 0; i < N; i++) {
                change[i] = splat(now.beta) * (load_number(v + i * LANES) - keys[i]);
                store_number(to + i * LANES, fused(splat(now.key_to_query), change[i], queries[i]));
            }
            if (t == last) break;
            prepare(t + 1, head, next);
            advance<N>(room, now, next, change, keys, queries);
            std::swap(now, next);
        }
        if (all.kept) finish<N>(room, state, now, change);
    }

    // The state before the first token, and its products with that token's key and query.
    template <int N>
    void begin(const Stored* state, float* room, const DeltaToken& token, Real (&keys)[N], Real (&queries)[N]) const {
        const float *seen_key = token.seen_key, *seen_query = token.seen_query;
        const long rows = dim, stride = value_dim;
        Real k_sum[N], q_sum[N];
        for (int i = 0; i < N; i++) k_sum[i] = q_sum[i] = zeros();
        for (long d = 0; d < rows; d++, room += N * LANES, state += stride) {
            const Real k = splat(seen_key[d]), q = splat(seen_query[d]);
            for (int i = 0; i < N; i++) {
                prefetch(state + AHEAD * stride + i * LANES);
                const Real s = load_number(state + i * LANES);
                store(room + i * LANES, s);
                k_sum[i] = fused(k, s, k_sum[i]), q_sum[i] = fused(q, s, q_sum[i]);
            }
        }
        for (int i = 0; i < N; i++) keys[i] = k_sum[i], queries[i] = q_sum[i];
    }

    // The state after a token, and its products with the key and the query of the next one.
    template <int N>
    void advance(float* room, const DeltaToken& now, const DeltaToken& next, const Real (&given)[N], Real (&keys)[N],
                 Real (&queries)[N]) const {
        const float *left = now.left, *key = now.key, *seen_key = next.seen_key, *seen_query = next.seen_query;
        const long rows = dim;
        Real change[N], k_sum[N], q_sum[N];
        for (int i = 0; i < N; i++) change[i] = given[i], k_sum[i] = q_sum[i] = zeros();
        for (long d = 0; d < rows; d++, room += N * LANES) {
            const Real share = splat(left[d]), added = splat(key[d]), k = splat(seen_key[d]), q = splat(seen_query[d]);
            for (int i = 0; i < N; i++) {
                const Real s = fused(added, change[i], share * load(room + i * LANES));
                store(room + i * LANES, s);
                k_sum[i] = fused(k, s, k_sum[i]), q_sum[i] = fused(q, s, q_sum[i]);
            }
        }
        for (int i = 0; i < N; i++) keys[i] = k_sum[i], queries[i] = q_sum[i];
    }

    // The state after the last token.
    template <int N>
    void finish(const float* room, Stored* state, const DeltaToken& token, const Real (&given)[N]) const {
        const float *left = token.left, *key = token.key;
        const long rows = dim, stride = value_dim;
        Real change[N];
        for (int i = 0; i < N; i++) change[i] = given[i];
        for (long d = 0; d < rows; d++, room += N * LANES, state += stride) {
            const Real share = splat(left[d]), added = splat(key[d]);
            for (int i = 0; i < N; i++)
                store_number(state + i * LANES, fused(added, change[i], share * load(room + i * LANES)));
        }
    }

    template <int N = WIDTH>
    void some_columns(const Sequences& all, long which, long head, long column, Work work) const {
        if constexpr (N > 1)
            if (column + N * LANES > value_dim) return some_columns<N - 1>(all, which, head, column, work);
        columns<N>(all, which, head, column, work);
    }

    void compute_all(const Sequences& all, char* memory, size_t each) const {
        const long blocks = (value_dim + WIDTH * LANES - 1) / (WIDTH * LANES);
#pragma omp parallel for
        for (long task = 0; task < all.count * heads * blocks; task++)
            some_columns(all, task / (heads * blocks), task / blocks % heads, task % blocks * WIDTH * LANES,
                         Work{memory + omp_get_thread_num() * each});
    }
};

// State spaces. States [slots][heads][dim][numbers] in Stored numbers, the inputs float and contiguous.
template <class Stored>
struct StateSpace {
    const float *x, *step, *rate, *inputs, *outputs, *skip;
    Stored* states;
    float* y;
    long heads, groups, dim, numbers;
    bool by_number;  // the rates [heads][numbers], and dim is 1; if not, [heads]

    static size_t bytes(long length, long numbers) {
        return Work::bytes<float>(length) + Work::bytes<float>(LANES * numbers);
    }

    // At most LANES rows of a state, from `first` on of all heads' rows: of one group, and of one head unless by
    // number. left: what is left of the state at each token, unless by number.
    void rows(const Sequences& all, long which, long first, long count, const float* left, float* room) const {
        const long head = first / dim, own_group = head / (heads / groups), slot = all.slots[which];
        Stored* state = states + (slot * heads * dim + first) * numbers;
        for (long i = 0; i < LANES; i++)
            for (long n = 0; n < numbers; n += LANES)
                store(room + i * numbers + n, i < count ? load_number(state + i * numbers + n) : zeros());
        for (long t = 0; t < all.length; t++) {
            const long row = all.begin(which) + t;
            const float* in = inputs + (row * groups + own_group) * numbers;
            const float* out = outputs + (row * groups + own_group) * numbers;
            float some[LANES], steps[LANES];
            const Real own = load(padded(x + row * heads * dim + first, count, some));
            const float* of_rows = by_number ? padded(step + row * heads + head, count, steps) : nullptr;
            const Real moved = own * (by_number ? load(of_rows) : splat(step[row * heads + head]));
            Real sums[LANES];
            if (by_number)
                advance_by_number(room, moved, of_rows, rate + head * numbers, count, in, out, sums);
            else
                advance(room, moved, splat(left[t]), in, out, sums);
            Real total = sums_of(sums);
            if (skip) total = fused(own, by_number ? load(padded(skip + head, count, some)) : splat(skip[head]), total);
            float* to = y + row * heads * dim + first;
            count == LANES ? store(to, total) : store_first(to, count, total);
        }
        for (long i = 0; all.kept && i < count; i++)
            for (long n = 0; n < numbers; n += LANES)
                store_number(state + i * numbers + n, load(room + i * numbers + n));
    }

    void advance(float* room, Real moved, Real left, const float* in, const float* out, Real* sums) const {
        constexpr int TOGETHER = 4;  // rows
        const long stride = numbers;
        float own[LANES];
        store(own, moved);
        for (int i = 0; i < LANES; i += TOGETHER, room += TOGETHER * stride) {
            Real sum[TOGETHER];
            for (int j = 0; j < TOGETHER; j++) sum[j] = zeros();
            for (long n = 0; n < stride; n += LANES) {
                const Real b = load(in + n), c = load(out + n);
                for (int j = 0; j < TOGETHER; j++) {
                    float* at = room + j * stride + n;
                    const Real s = fused(splat(own[i + j]), b, left * load(at));
                    store(at, s);
                    sum[j] = fused(s, c, sum[j]);
                }
            }
            for (int j = 0; j < TOGETHER; j++) sums[i + j] = sum[j];
        }
    }

    void advance_by_number(float* room, Real moved, const float* steps, const float* rates, long count, const float* in,
                           const float* out, Real* sums) const {
        const long stride = numbers;
        float own[LANES];
        store(own, moved);
        for (int i = 0; i < LANES; i++) sums[i] = zeros();
        for (long i = 0; i < count; i++, room += stride, rates += stride) {
            for (long n = 0; n < stride; n += LANES) {
                const Real left = exponential(splat(steps[i]) * load(rates + n));
                const Real s = fused(splat(own[i]), load(in + n), left * load(room + n));
                store(room + n, s);
                sums[i] = fused(s, load(out + n), sums[i]);
            }
        }
    }

    // All rows of a head of one sequence; by number, LANES heads of a group.
    void unit(const Sequences& all, long which, long first, long count, Work work) const {
        if (all.slots[which] < 0) {
            float* to = y + all.begin(which) * heads * dim + first;
            return std::fill(to, to + count, 0.0f);
        }
        float *left = work.take<float>(all.length), *room = work.take<float>(LANES * numbers);
        for (long t = 0; !by_number && t < all.length; t++) {
            const long head = first / dim, row = all.begin(which) + t;
            left[t] = exponential(splat(step[row * heads + head] * rate[head]))[0];
        }
        for (long i = 0; i < count; i += LANES)
            rows(all, which, first + i, std::min<long>(LANES, count - i), left, room);
    }

    void compute_all(const Sequences& all, char* memory, size_t each) const {
        const long of_group = heads / groups, parts = by_number ? (of_group + LANES - 1) / LANES : of_group;
#pragma omp parallel for
        for (long task = 0; task < all.count * groups * parts; task++) {
            const long which = task / (groups * parts), part = task % parts, begin = task / parts % groups * of_group;
            const long first = by_number ? begin + part * LANES : (begin + part) * dim;
            const long count = by_number ? std::min<long>(LANES, of_group - part * LANES) : dim;
            unit(all, which, first, count, Work{memory + omp_get_thread_num() * each});
        }
    }
};

}  // namespace
