// Kernels for CPUs: linear layers, attention, and what stands between them.
//
// Knows pointers and sizes only. build.py compiles this file for an instruction set, compiled.py checks shapes and
// calls it, contract.py says what each function computes. The numbers of a row are computed in the same order whatever
// rows are computed with it, so that an answer does not depend on its batch. Threads are torch's own OpenMP threads. A
// function with working memory returns 0, or, if the memory is too small, the bytes that it needs: then it has done
// nothing else.

#include "chunk.h"
#include "eviction.h"
#include "linear.h"
#include "mixers.h"
#include "slot.h"

#include <cmath>
#include <functional>

namespace {

// A row of bytes stands for (code - zero) x step.
struct Steps {
    float step;
    int32_t zero;
};

// Vectors of bfloat16 -> bytes that span each row from its least to its greatest number, zero among them. Bytes have no
// NaN: a row with NaN or infinity gets NaN as its step.
void quantise(const bf16* x, uint8_t* codes, Steps* steps, long rows, long inner) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const bf16* from = x + row * inner;
        Real low = zeros(), high = zeros(), broken = zeros();
        for (long k = 0; k < inner; k += LANES) {
            const Real v = load_bf16(from + k);
            low = lesser(low, v), high = greater(high, v), broken = fused(v, zeros(), broken);
        }
        const float lowest = least(low), range = greatest(high) - lowest;
        const float step = std::max(range, 1e-30f) / 255.0f;
        const int32_t zero = static_cast<int32_t>(std::lrint(-lowest / step)) + Codes::LEAST;
        steps[row] = {step + sum(broken), zero};
        const Real factor = splat(1.0f / step);
        for (long k = 0; k < inner; k += LANES) {
            const Int code = whole(load_bf16(from + k) * factor) + splat(zero);
            store_bytes(codes + row * inner + k, lesser(greater(code, splat(Codes::LEAST)), splat(Codes::LEAST + 255)));
        }
    }
}

// Stores sums of a product with the bias added, rounded to bfloat16; with a gate, times SiLU(gate[at]).
inline void put(bf16* y, long at, long column, Real v, const bf16* bias, const bf16* gate) {
    if (bias) v = v + load_bf16(bias + column);
    if (gate) {
        v = rounded(silu(load_bf16(gate + at))) * rounded(v);
    }
    store_bf16(y + at, v);
}

// Linear layers in bfloat16: see bmx_linear.
template <class At>
void multiply_numbers(const bf16* x, const Layer* layers, int count, bool gated, bf16* y, long rows, long inner,
                      Work left, const At& at) {
    const auto finish = [=](const Layer& layer, int which, long row, long column, int registers, const word* sums) {
        for (int j = 0; j < registers; j++, column += LANES)
            put(y, at(layer, which, row, column), column, load(reinterpret_cast<const float*>(sums) + j * LANES),
                layer.bias, gated && which ? y : nullptr);
    };
    multiply<Plain>(x, {layers, count, gated}, rows, inner, left, finish);
}

// Linear layers in int8: see bmx_linear.
template <class At>
void multiply_bytes(const bf16* x, const Layer* layers, int count, bool gated, bf16* y, long rows, long inner,
                    Work left, const At& at) {
    uint8_t* codes = left.take<uint8_t>(rows * inner);
    Steps* steps = left.take<Steps>(rows);
    quantise(x, codes, steps, rows, inner);
    const auto finish = [=](const Layer& layer, int which, long row, long column, int registers, const word* sums) {
        const Real step = splat(steps[row].step);
        const Int zero = splat(steps[row].zero);
        for (int j = 0; j < registers; j++, column += LANES) {
            const Int all = load(reinterpret_cast<const int32_t*>(sums) + j * LANES) - load(layer.sums + column) * zero;
            put(y, at(layer, which, row, column), column, real(all) * step * load(layer.scales + column), layer.bias,
                gated && which ? y : nullptr);
        }
    };
    multiply<Codes>(static_cast<const uint8_t*>(codes), {layers, count, gated}, rows, inner, left, finish);
}

// y[rows][inner] = put(row, column, x / root of (mean of squares + epsilon)).
template <class Put>
void normed(const bf16* x, bf16* y, float epsilon, long rows, long inner, const Put& put) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const bf16* from = x + row * inner;
        Real squares = zeros();
        for (long i = 0; i < inner; i += LANES) {
            const Real v = load_bf16(from + i);
            squares = fused(v, v, squares);
        }
        const float mean = sum(squares) / static_cast<float>(inner);
        const Real factor = splat(1.0f / std::sqrt(mean + epsilon));
        for (long i = 0; i < inner; i += LANES)
            store_bf16(y + row * inner + i, put(row, i, load_bf16(from + i) * factor));
    }
}

}  // namespace

extern "C" {

// Asks the kernel of the system for what the instruction set needs; 0 if it is given.
int bmx_start() {
    return ask_for_tiles();
}

// Linear layers of one input x[rows][inner], all with int8 weights or none: outputs [rows][columns] one after another
// in y. If gated, there are two layers of one size, and y is SiLU(first output) times the second. Each row of x is
// rounded to bytes if weights are int8; everything else is bfloat16.
long bmx_linear(const bf16* x, const Layer* layers, int count, int gated, bf16* y, long rows, long inner, char* work,
                long size) {
    const bool bytes = layers[0].scales;
    const long words = inner / (bytes ? Codes::PARTS : Plain::PARTS);
    const size_t coded = bytes ? Work::bytes<uint8_t>(rows * inner) + Work::bytes<Steps>(rows) : 0;
    const long needed = ThreadWork(rows, words, bytes ? COPIES<Codes, uint8_t> : COPIES<Plain, bf16>).all_threads() +
                        static_cast<long>(coded);
    if (size < needed) return needed;
    const auto at = [=](const Layer& layer, int which, long row, long column) {
        return (gated && which ? 0 : rows * layer.offset) + row * layer.columns + column;
    };
    (bytes ? multiply_bytes<decltype(at)> : multiply_numbers<decltype(at)>)(x, layers, count, gated, y, rows, inner,
                                                                            Work{work}, at);
    return 0;
}

// y[rows][inner] = x / root of (mean of squares + epsilon), rounded, times weight[inner].
void bmx_rms_norm(const bf16* x, const bf16* weight, bf16* y, float epsilon, long rows, long inner) {
    normed(x, y, epsilon, rows, inner, [=](long, long i, Real v) { return rounded(v) * load_bf16(weight + i); });
}

// The same, rounded, times SiLU(gate[rows][inner]).
void bmx_gated_norm(const bf16* x, const bf16* gate, const bf16* weight, bf16* y, float epsilon, long rows,
                    long inner) {
    normed(x, y, epsilon, rows, inner, [=](long row, long i, Real v) {
        return rounded(rounded(v) * load_bf16(weight + i)) * silu(load_bf16(gate + row * inner + i));
    });
}

// y[rows][inner] = x / root of (mean of squares + epsilon) times (1 + weight[inner]).
void bmx_offset_norm(const bf16* x, const bf16* weight, bf16* y, float epsilon, long rows, long inner) {
    normed(x, y, epsilon, rows, inner, [=](long, long i, Real v) { return v * (splat(1.0f) + load_bf16(weight + i)); });
}

// y[rows][inner] = v / root of (mean of squares + epsilon) times weight[groups][inner], with v = x SiLU(gate). Rows of
// all groups in turn.
void bmx_norm_of_gated(const float* x, const bf16* gate, const bf16* weight, float* y, float epsilon, long rows,
                       long groups, long inner) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const bf16* factors = weight + row % groups * inner;
        float* to = y + row * inner;
        Real squares = zeros();
        for (long i = 0; i < inner; i += LANES) {
            const Real v = load(x + row * inner + i) * silu(load_bf16(gate + row * inner + i));
            store(to + i, v);
            squares = fused(v, v, squares);
        }
        const float mean = sum(squares) / static_cast<float>(inner);
        const Real factor = splat(1.0f / std::sqrt(mean + epsilon));
        for (long i = 0; i < inner; i += LANES) store(to + i, load(to + i) * factor * load_bf16(factors + i));
    }
}

// The rotary embedding: y[tokens][heads][dim] = x cos + (-second half, first half) sin, each product rounded.
// x by strides (token, head); cos and sin [tokens][dim].
void bmx_rotate(const bf16* x, long token, long head, const bf16* cos, const bf16* sin, bf16* y, long tokens,
                long heads, long dim) {
    const long half = dim / 2;
#pragma omp parallel for
    for (long t = 0; t < tokens; t++) {
        for (long h = 0; h < heads; h++) {
            const bf16* from = x + t * token + h * head;
            bf16* to = y + (t * heads + h) * dim;
            for (long d = 0; d < half; d += LANES) {
                const Real a = load_bf16(from + d), b = load_bf16(from + half + d);
                const auto turn = [=](Real straight, Real across, long at) {
                    return rounded(straight * load_bf16(cos + t * dim + at)) +
                           rounded(across * load_bf16(sin + t * dim + at));
                };
                store_bf16(to + d, turn(a, splat(-0.0f) - b, d));
                store_bf16(to + half + d, turn(b, a, half + d));
            }
        }
    }
}

// A prompt chunk attends to its slot and to itself: see attend_chunk in contract.py.
//
// views: q [tokens][heads][dim], k and v [tokens][kv_heads][dim or value_dim]; stored: keys and values of the slot,
// and those of a slot whose `shared` rows come before them; `past` rows of each kv head in all; hidden
// [kv_heads][tokens][past + tokens] or null; sinks [heads] or null; query_weights [ways][tokens]; past_places
// [kv_heads][past], or null if distance is 0; out [tokens][heads][value_dim]; sums [ways][kv_heads][past + tokens],
// zeros.
long bmx_attend_chunk(const Vectors* views, const Stored* stored, long tokens, long heads, long kv_heads, long past,
                      long shared, long ways, float scale, int distance, int power, const uint8_t* hidden,
                      const float* sinks, const float* query_weights, const int32_t* past_places, bf16* out,
                      float* sums, char* work, long size) {
    ChunkAttention chunk{views[0], views[1],      views[2],      stored[0], stored[1], tokens,    heads, kv_heads,
                         past,     stored[0].dim, stored[1].dim, ways,      scale,     distance,  power, hidden,
                         sinks,    query_weights, past_places,   out,       stored[2], stored[3], shared};
    const long needed = static_cast<long>(chunk.bytes());
    if (size < needed) return needed;
    chunk.take(Work{work});
#pragma omp parallel
    {
        const int threads = omp_get_num_threads(), me = omp_get_thread_num();
        ChunkAttention::Tile tile = chunk.tile_of(me);
        for (long task = me; task < kv_heads * chunk.blocks; task += threads)
            chunk.pack_block(task / chunk.blocks, task % chunk.blocks * ChunkAttention::BLOCK, tile);
        for (long turn = me; turn < ChunkAttention::TURNS; turn += threads)
            std::memset(chunk.sums_of(turn), 0, chunk.sums_size * sizeof(float));
#pragma omp barrier
        for (long task = me; task < kv_heads * ChunkAttention::TURNS; task += threads) {
            const long head = task % kv_heads, turn = task / kv_heads;
            for (long one = turn; one < chunk.tiles_of_head; one += ChunkAttention::TURNS) {
                const long first = one * QUERIES, rows = std::min(QUERIES, tokens * chunk.group - first);
                chunk.attend(head, first, rows, tile);
                chunk.add_up(head, first, rows, tile, chunk.sums_of(turn));
            }
        }
        release_tiles();
#pragma omp barrier
        for (long line = me; line < ways * kv_heads; line += threads)
            for (long turn = 0; turn < ChunkAttention::TURNS; turn++)
                for (long i = 0; i < chunk.total; i++)
                    sums[line * chunk.total + i] += chunk.sums_of(turn)[line * chunk.full + i];
    }
    return 0;
}

// One decoding token per slot attends to its slot: see attend_slots in contract.py.
//
// q [batch][heads][dim]; stored: keys and values [slots][kv_heads][capacity]; slots [batch], or null for 0, 1, ...;
// hidden bool by two strides (batch, head), or null; out [batch][heads][value_dim]; mass [batch][kv_heads][capacity]
// or null.
long bmx_attend_slots(const bf16* q, const Stored* stored, const int64_t* slots, long batch, long heads, long kv_heads,
                      long capacity, float scale, int power, const uint8_t* hidden, long hidden_batch, long hidden_head,
                      const float* sinks, bf16* out, float* mass, char* work, long size) {
    const Stored keys = stored[0], values = stored[1];
    const long group = heads / kv_heads;
    const size_t bytes_each = Slot::bytes({nullptr, keys, values, capacity, group});
    const long needed = static_cast<long>(bytes_each * omp_get_max_threads());
    if (size < needed) return needed;
#pragma omp parallel for schedule(static, 1)
    for (long task = 0; task < batch * kv_heads; task++) {
        const long token = task / kv_heads, head = task % kv_heads, first = token * heads + head * group;
        const long begin = ((slots ? slots[token] : token) * kv_heads + head) * capacity;
        Slot slot{q + first * keys.dim, keys.from(begin), values.from(begin), capacity, group, power};
        slot.take(Work{work + omp_get_thread_num() * bytes_each});
        slot.hidden = hidden ? hidden + token * hidden_batch + head * hidden_head : nullptr;
        slot.sinks = sinks ? sinks + head * group : nullptr;
        slot.attend(scale, out + first * values.dim);
        for (long i = 0; mass && i < capacity; i += LANES)
            store_first(mass + task * capacity + i, capacity - i, slot.mean(i));
    }
    return 0;
}

// The attention of a prompt chunk is added to the mass, and the best `limit` pairs of slot and chunk stay: see evict in
// reference.py.
//
// views: k and v [tokens][kv_heads][dim or value_dim]; stored: keys and values of the slot; positions and mass
// [kv_heads][capacity], `used` of them in use, mass may be null; start: position of the first token; sums
// [kv_heads][used + tokens] or null.
long bmx_evict(const Vectors* views, const Stored* stored, int32_t* positions, float* mass, const float* sums,
               long tokens, long kv_heads, long capacity, long limit, long used, long start, float decay,
               EvictionOrder order, char* work, long size) {
    const Vectors k = views[0], v = views[1];
    const long total = used + tokens, full = (total + LANES - 1) / LANES * LANES;
    const size_t each = 2 * Work::bytes<float>(full) + Work::bytes<int32_t>(full) + Work::bytes<float>(full);
    const long needed = static_cast<long>(each) * kv_heads;
    if (size < needed) return needed;
#pragma omp parallel for schedule(static, 1)
    for (long head = 0; head < kv_heads; head++) {
        Work own{work + head * each};
        float *scores = own.take<float>(full), *sorted = own.take<float>(full), *received = own.take<float>(full);
        int32_t* candidates = own.take<int32_t>(full);
        int32_t* row_positions = positions + head * capacity;
        float* own_mass = mass ? mass + head * capacity : nullptr;
        const float* own_sums = sums ? sums + head * total : nullptr;
        for (long i = 0; i < total; i++) {
            const float before = i < used && own_mass ? own_mass[i] : 0.0f;
            received[i] = own_sums ? (i < used ? before * decay : 0.0f) + own_sums[i] : before;
            candidates[i] = i < used ? row_positions[i] : static_cast<int32_t>(start + i - used);
        }
        for (long i = 0; own_mass && i < used; i++) own_mass[i] = received[i];
        const auto put = [&](long row, long i) {
            const long target = head * capacity + row;
            stored[0].put(target, k.at(i - used, head));
            stored[1].put(target, v.at(i - used, head));
            row_positions[row] = candidates[i];
            if (own_mass) own_mass[row] = received[i];
        };
        if (total <= limit) {
            for (long i = used; i < total; i++) put(i, i);
            continue;
        }
        const int now = static_cast<int>(start + tokens);
        for (long i = 0; i < total; i += LANES)
            store(scores + i, order.score(load(candidates + i), load(received + i), now));
        std::copy(scores, scores + total, sorted);
        std::nth_element(sorted, sorted + limit - 1, sorted + total, std::greater<float>());
        const float threshold = sorted[limit - 1];
        long ties = limit - std::count_if(scores, scores + total, [=](float s) { return s > threshold; });
        const auto stays = [&](long i) { return scores[i] > threshold || (scores[i] == threshold && ties-- > 0); };
        long row = 0;
        for (long i = 0; i < used; i++) sorted[i] = stays(i) ? 1.0f : 0.0f;
        for (long i = used; i < total; i++) {
            if (!stays(i)) continue;
            while (row < used && sorted[row] != 0.0f) row++;
            put(row++, i);
        }
    }
    return 0;
}

// The decoding tokens' part of a layer: see decode_step in contract.py.
//
// views: q [batch][heads][dim], k and v [batch][kv_heads][dim or value_dim]; stored: keys and values; they, positions
// and mass by row; those of a slot's kv heads begin at first [slots][kv_heads], capacity [slots][kv_heads] of them, at
// most `largest`; slots, token_positions and row_limits [batch]; mass may be null. shared_slots and shared_rows [batch]
// or null: the slots whose first rows, at most `longest`, are read before those of a token's own slot. Tokens of one kv
// head follow one another then, so that what they share stays in the cache.
long bmx_decode_step(const Vectors* views, const Stored* stored, int32_t* positions, float* mass, const int64_t* first,
                     const int64_t* capacity, const int64_t* slots, const int64_t* token_positions,
                     const int64_t* row_limits, const int64_t* shared_slots, const int64_t* shared_rows, long batch,
                     long heads, long kv_heads, long largest, long longest, float scale, float decay, int accumulate,
                     EvictionOrder order, const float* sinks, bf16* out, char* work, long size) {
    const Vectors q = views[0], k = views[1], v = views[2];
    const Stored keys = stored[0], values = stored[1];
    const long group = heads / kv_heads, dim = keys.dim;
    const size_t query_bytes = Work::bytes<bf16>(group * dim);
    const size_t bytes_each = query_bytes + Slot::bytes({nullptr, keys, values, largest + longest, group});
    const long needed = static_cast<long>(bytes_each * omp_get_max_threads());
    if (size < needed) return needed;
    const auto token_of = [=](long task) { return shared_slots ? task % batch : task / kv_heads; };
    const auto head_of = [=](long task) { return shared_slots ? task / batch : task % kv_heads; };
#pragma omp parallel for schedule(static, 1)
    for (long task = 0; task < batch * kv_heads; task++) {
        const long token = token_of(task), head = head_of(task), shared = shared_slots ? shared_rows[token] : 0;
        const long entry = slots[token] * kv_heads + head, slot_rows = capacity[entry], begin = first[entry];
        const long limit = std::min(static_cast<long>(row_limits[token]), slot_rows), position = token_positions[token];
        int32_t* row_positions = positions + begin;
        float* row_mass = mass ? mass + begin : nullptr;
        const long row = position - shared < limit
                             ? position - shared
                             : victim(order, row_positions, row_mass, limit, static_cast<int>(position));
        keys.put(begin + row, k.at(token, head));
        values.put(begin + row, v.at(token, head));
        row_positions[row] = static_cast<int32_t>(position);
        if (row_mass) row_mass[row] = 0.0f;
        Work own{work + omp_get_thread_num() * bytes_each};
        bf16* query = own.take<bf16>(group * dim);
        for (long g = 0; g < group; g++)
            std::memcpy(query + g * dim, q.at(token, head * group + g), dim * sizeof(bf16));
        const long used = std::min(position - shared + 1, limit);
        Slot slot{query, keys.from(begin), values.from(begin), shared + used, group, order.power};
        const long other = shared ? first[shared_slots[token] * kv_heads + head] : 0;
        if (shared) slot.shared_key = keys.from(other), slot.shared_value = values.from(other), slot.shared = shared;
        slot.take(own);
        const int32_t* of_rows = row_positions - shared;
        for (long i = 0; order.window && i < shared; i++)
            slot.flags[i] = positions[other + i] <= position - order.window;
        for (long i = shared; order.window && i < slot.rows; i++) slot.flags[i] = of_rows[i] <= position - order.window;
        slot.hidden = order.window ? slot.flags : nullptr;
        const long after = task + omp_get_num_threads();  // the next task of this thread
        if (after < batch * kv_heads) {
            const long next_entry = slots[token_of(after)] * kv_heads + head_of(after);
            const long next_begin = first[next_entry];
            const long before = shared_slots ? shared_rows[token_of(after)] : 0;
            const long filled = std::min(token_positions[token_of(after)] - before, capacity[next_entry]);
            slot.next = Stream{keys.at(next_begin), values.at(next_begin), filled * keys.bytes() / 64,
                               filled * values.bytes() / 64};
        }
        slot.sinks = sinks ? sinks + head * group : nullptr;
        slot.attend(scale, out + (token * heads + head * group) * values.dim);
        for (long i = 0; row_mass && accumulate && !shared && i < slot.rows; i += LANES) {
            float room[LANES];
            const Real before = load(padded(row_mass + i, slot.rows - i, room));
            store_first(row_mass + i, slot.rows - i, fused(before, splat(decay), slot.mean(i)));
        }
    }
    return 0;
}

// The decoding tokens' part of a layer whose keys are scaled by channel: see decode_by_channel in contract.py.
//
// views: q [batch][heads][dim], k and v [batch][kv_heads][dim or value_dim]; rows by slot and kv head; slots and
// positions [batch]; where a slot is -1 the output is zeros. Returns -1, with nothing done, if a slot has no row for a
// position.
long bmx_decode_by_channel(const Vectors* views, const ChannelRows* rows, const int64_t* slots,
                           const int64_t* positions, long batch, long heads, long kv_heads, float scale,
                           const float* sinks, bf16* out, char* work, long size) {
    long longest = 0;
    for (long token = 0; token < batch; token++) {
        if (slots[token] < 0) continue;
        if (positions[token] >= rows->capacity[slots[token] * kv_heads]) return -1;
        longest = std::max<long>(longest, positions[token]);
    }
    const Vectors q = views[0], k = views[1], v = views[2];
    const long group = heads / kv_heads, dim = rows->keys.dim, value_dim = rows->values.dim;
    const Stored key{nullptr, nullptr, MODEL, dim};  // its size
    const size_t query_bytes = Work::bytes<bf16>(group * dim);
    Slot largest{nullptr, key, rows->values, longest + 1, group};
    largest.set_channels(&rows->keys);
    const size_t bytes_each = query_bytes + Slot::bytes(largest);
    const long needed = static_cast<long>(bytes_each * omp_get_max_threads());
    if (size < needed) return needed;
#pragma omp parallel
    {
#pragma omp for schedule(static, 1)
        for (long task = 0; task < batch * kv_heads; task++) {
            const long token = task / kv_heads, head = task % kv_heads, position = positions[token];
            bf16* answer = out + (token * heads + head * group) * value_dim;
            if (slots[token] < 0) {
                std::memset(answer, 0, group * value_dim * sizeof(bf16));
                continue;
            }
            const ChannelRows own = rows->of(slots[token] * kv_heads + head);
            own.put(position, k.at(token, head), v.at(token, head));
            Work left{work + omp_get_thread_num() * bytes_each};
            bf16* query = left.take<bf16>(group * dim);
            for (long g = 0; g < group; g++)
                std::memcpy(query + g * dim, q.at(token, head * group + g), dim * sizeof(bf16));
            Slot slot{query, key, own.values, position + 1, group};
            slot.set_channels(&own.keys);
            slot.exact_key = {reinterpret_cast<uint8_t*>(own.exact_keys), nullptr, MODEL, dim};
            slot.exact_value = {reinterpret_cast<uint8_t*>(own.exact_values), nullptr, MODEL, value_dim};
            slot.take(left);
            const long after = task + omp_get_num_threads();  // the next task of this thread
            if (after < batch * kv_heads && slots[after / kv_heads] >= 0) {
                const ChannelRows then = rows->of(slots[after / kv_heads] * kv_heads + after % kv_heads);
                const long coded = std::max(0L, positions[after / kv_heads] + 1 - KEY_GROUP);
                slot.next = Stream{then.keys.at(0),
                                   then.values.at(0),
                                   coded * then.keys.bytes() / 64,
                                   coded * then.values.bytes() / 64,
                                   reinterpret_cast<uint8_t*>(then.keys.scales),
                                   coded / KEY_GROUP * dim / 16};
            }
            slot.sinks = sinks ? sinks + head * group : nullptr;
            slot.attend(scale, answer);
        }
        release_tiles();
    }
    return 0;
}

// Stores a prompt chunk in one slot whose keys are scaled by channel: see append_by_channel in contract.py.
//
// views: k and v [tokens][kv_heads][dim or value_dim]; rows of the slot, by kv head; start: row of the first token.
void bmx_append_by_channel(const Vectors* views, const ChannelRows* rows, long tokens, long kv_heads, long start) {
    const Vectors k = views[0], v = views[1];
    const long stop = start + tokens, first = start / KEY_GROUP, groups = (stop - 1) / KEY_GROUP + 1 - first;
#pragma omp parallel for schedule(static, 1)
    for (long task = 0; task < kv_heads * groups; task++) {
        const long head = task % kv_heads, group = first + task / kv_heads, begin = group * KEY_GROUP;
        const ChannelRows own = rows->of(head);
        for (long at = std::max(begin, start); at < std::min(begin + KEY_GROUP, stop); at++)
            own.values.put(at, v.at(at - start, head));
        if (begin + KEY_GROUP > stop) continue;
        const bf16* vectors[KEY_GROUP];
        for (long i = 0; i < KEY_GROUP; i++)
            vectors[i] = begin + i < start ? own.exact_key(i) : k.at(begin + i - start, head);
        own.keys.put(group, vectors);
    }
    for (long head = 0; head < kv_heads; head++)
        for (long at = std::max(start, stop - KEY_GROUP); at < stop; at++)
            rows->of(head).put_exact(at, k.at(at - start, head), v.at(at - start, head));
}

// Reads the first `count` rows, all that are in use, of one slot whose keys are scaled by channel: see read_by_channel
// in contract.py.
//
// rows of the slot, by kv head; keys [kv_heads][count][dim], values [kv_heads][count][value_dim].
void bmx_read_by_channel(const ChannelRows* rows, long kv_heads, long count, bf16* keys, bf16* values) {
    const long dim = rows->keys.dim, value_dim = rows->values.dim, coded = count - KEY_GROUP;
#pragma omp parallel for schedule(static)
    for (long task = 0; task < kv_heads * count; task++) {
        const long row = task % count;
        const ChannelRows own = rows->of(task / count);
        if (row < coded) {
            own.keys.read(row, keys + task * dim), own.values.read(row, values + task * value_dim);
        } else {
            std::memcpy(keys + task * dim, own.exact_key(row), dim * sizeof(bf16));
            std::memcpy(values + task * value_dim, own.exact_value(row), value_dim * sizeof(bf16));
        }
    }
}

// The functions of mixers: see mixer_contract.py. wide: the inputs are float, if not bfloat16; wide_states: the states.

// x by row; weight [channels][taps]; bias [channels] or null; windows [slots][taps - 1][channels]; y [rows][channels].
long bmx_convolve(const void* x, long row, int wide, const void* weight, const void* bias, void* windows,
                  const Sequences* all, int silu, long channels, long taps, void* y, char* work, long size) {
    const auto compute = [&](auto number) {
        using X = decltype(number);
        using Own = Convolution<X>;
        const size_t each = Own::bytes(taps);
        const long needed = static_cast<long>(each) * omp_get_max_threads();
        if (size < needed) return needed;
        Own{static_cast<const X*>(x),
            row,
            static_cast<const X*>(weight),
            static_cast<const X*>(bias),
            static_cast<X*>(windows),
            static_cast<X*>(y),
            channels,
            taps,
            silu != 0}
            .compute_all(*all, work, each);
        return 0L;
    };
    return wide ? compute(float{}) : compute(bf16{});
}

// views: query and key [rows][heads / group][dim], value [rows][heads][value_dim], decay [rows][heads][dim, or 1 unless
// by channel] and beta [rows][heads][1] in float; states [slots][heads][dim][value_dim]; y [rows][heads][value_dim].
long bmx_delta_rule(const Vectors* views, int wide, void* states, int wide_states, const Sequences* all, long heads,
                    long group, long dim, long value_dim, int by_channel, int normalise, void* y, char* work,
                    long size) {
    const auto compute = [&](auto number, auto stored) {
        using X = decltype(number);
        using Own = DeltaRule<X, decltype(stored)>;
        const size_t each = Own::bytes(dim);
        const long needed = static_cast<long>(each) * omp_get_max_threads();
        if (size < needed) return needed;
        Own{heads_of<X>(views[0]),
            heads_of<X>(views[1]),
            heads_of<X>(views[2]),
            heads_of<float>(views[3]),
            heads_of<float>(views[4]),
            static_cast<decltype(stored)*>(states),
            static_cast<X*>(y),
            heads,
            group,
            dim,
            value_dim,
            by_channel != 0,
            normalise != 0}
            .compute_all(*all, work, each);
        return 0L;
    };
    if (wide) return wide_states ? compute(float{}, float{}) : compute(float{}, bf16{});
    return wide_states ? compute(bf16{}, float{}) : compute(bf16{}, bf16{});
}

// x [rows][heads][dim]; step [rows][heads]; rate [heads], or by number [heads][numbers], where dim is 1; inputs and
// outputs [rows][groups][numbers]; skip [heads] or null; states [slots][heads][dim][numbers]; y [rows][heads][dim].
long bmx_state_space(const float* x, const float* step, const float* rate, const float* inputs, const float* outputs,
                     const float* skip, void* states, int wide_states, const Sequences* all, long heads, long groups,
                     long dim, long numbers, int by_number, float* y, char* work, long size) {
    const auto compute = [&](auto stored) {
        using Own = StateSpace<decltype(stored)>;
        const size_t each = Own::bytes(all->length, numbers);
        const long needed = static_cast<long>(each) * omp_get_max_threads();
        if (size < needed) return needed;
        Own{x, step,  rate,   inputs, outputs, skip,          static_cast<decltype(stored)*>(states),
            y, heads, groups, dim,    numbers, by_number != 0}
            .compute_all(*all, work, each);
        return 0L;
    };
    return wide_states ? compute(float{}) : compute(bf16{});
}

}  // extern "C"
