// The attention of a prompt chunk to its slot and to itself.

#pragma once

#include "attention.h"
#include "formats.h"

namespace {

#ifdef __AMX_TILE__
constexpr long QUERIES = 32;  // query rows of a task: so many read a panel while it is in the first cache
#elif defined(__AVX512BF16__)
constexpr long QUERIES = 8;
#else
constexpr long QUERIES = 4 * ROWS;
#endif

// The attention of a prompt chunk to its slot and to itself: operands, sizes, and working memory.
//
// Keys and values of slot and chunk are packed into panels first: BLOCK keys, or two registers of value columns. Then
// every task is a tile of QUERIES query rows of one kv head; row r is token r / group, query head r % group of it.
struct ChunkAttention {
    static constexpr long BLOCK = SIDE, PARTS = Plain::PARTS;
    static constexpr long TURNS = 8;  // each adds up the attention of every eighth tile, whichever thread computes it

    Vectors q, k, v;
    Stored past_k, past_v;
    long tokens, heads, kv_heads, past, dim, value_dim, ways;
    float scale;
    int distance, power;  // what counts for the sums: queries so many tokens after a key, probabilities to this power
    const uint8_t* hidden;
    const float *sinks, *query_weights;
    const int32_t* past_places;  // [kv_heads][past], or null if distance is 0
    bf16* out;
    Stored shared_k, shared_v;  // of another slot: the first `shared` rows of those that are past are its
    long shared;

    long group = heads / kv_heads, total = past + tokens, blocks = (total + BLOCK - 1) / BLOCK, full = blocks * BLOCK;
    long words = dim / PARTS, lines = full / PARTS, halves = value_dim / (2 * LANES);
    long tiles_of_head = (tokens * group + QUERIES - 1) / QUERIES;
    size_t key_words = static_cast<size_t>(kv_heads) * full * words;
    size_t value_words = static_cast<size_t>(kv_heads) * lines * value_dim;
    size_t sums_size = static_cast<size_t>(ways) * kv_heads * full;
    size_t vectors = BLOCK * std::max(dim, value_dim) / 2;
    size_t tile_size = QUERIES * (full + lines + value_dim + words) + vectors;
    word *key_panels = nullptr, *value_panels = nullptr;
    float *sums_of_turns = nullptr, *tiles_of_threads = nullptr;

    struct Tile {             // a thread's
        float* scores;        // [QUERIES][full]
        Number* weights;      // [QUERIES][full]
        float* answers;       // [QUERIES][value_dim]
        word* queries;        // [QUERIES][words]
        bf16* vectors;        // [BLOCK][dim or value_dim], read from codes
        float over[QUERIES];  // 1 / sums of weights
    };

    struct Counted {            // the rows of a tile whose probabilities are added up
        const Number* weights;  // [rows][full]
        long rows;
        float factor[QUERIES];
        int32_t farthest[QUERIES];  // the last place that counts
    };

    size_t bytes() const {
        return Work::bytes<word>(key_words) + Work::bytes<word>(value_words) + Work::bytes<float>(TURNS * sums_size) +
               omp_get_max_threads() * Work::bytes<float>(tile_size);
    }
    void take(Work work) {
        key_panels = work.take<word>(key_words);
        value_panels = work.take<word>(value_words);
        sums_of_turns = work.take<float>(TURNS * sums_size);
        tiles_of_threads = work.take<float>(omp_get_max_threads() * tile_size);
    }
    float* sums_of(long turn) const { return sums_of_turns + turn * sums_size; }
    Tile tile_of(int thread) const {
        float* scores = tiles_of_threads + thread * tile_size;
        float* answers = scores + QUERIES * (full + lines);
        float* queries = answers + QUERIES * value_dim;
        return {scores, reinterpret_cast<Number*>(scores + QUERIES * full), answers, reinterpret_cast<word*>(queries),
                reinterpret_cast<bf16*>(queries + QUERIES * words)};
    }
    void find_block(const Stored& of_other, const Stored& of_slot, const Vectors& own, long head, long first,
                    const Tile& tile, const bf16** found) const;
    void pack_block(long head, long first, const Tile& tile) const;
    void attend(long head, long first, long rows, Tile& tile) const;
    Int places(long head, long at) const;
    template <bool All>
    void add_columns(long head, long begin, long end, const Counted& counted, float* to) const;
    void add_up(long head, long first, long rows, const Tile& tile, float* sums) const;
};

// Finds the vectors `first` .. `first + BLOCK` of one kv head, null after the last; codes are read into the tile's.
void ChunkAttention::find_block(const Stored& of_other, const Stored& of_slot, const Vectors& own, long head,
                                long first, const Tile& tile, const bf16** found) const {
    for (long i = 0; i < BLOCK; i++) {
        const long at = first + i;
        if (at >= past) {
            found[i] = at < total ? own.at(at - past, head) : nullptr;
            continue;
        }
        const Stored& stored = at < shared ? of_other : of_slot;
        const long row = head * stored.head + (at < shared ? at : at - shared);
        if (stored.format == MODEL) {
            found[i] = reinterpret_cast<const bf16*>(stored.at(row));
        } else {
            stored.read(row, tile.vectors + i * stored.dim);
            found[i] = tile.vectors + i * stored.dim;
        }
    }
}

// Packs the keys and values `first` .. `first + BLOCK` of one kv head.
void ChunkAttention::pack_block(long head, long first, const Tile& tile) const {
    const bf16* found[BLOCK];
    find_block(shared_k, past_k, k, head, first, tile, found);
    pack<Plain>(found, words, key_panels + (head * full + first) * words, static_cast<int>(BLOCK));
    find_block(shared_v, past_v, v, head, first, tile, found);
    for (long i = first; i < first + BLOCK; i += PARTS) {
        for (long e = 0; e < value_dim; e += LANES) {
            word* to = value_panels + ((head * halves + e / (2 * LANES)) * lines + i / PARTS) * 2 * LANES;
            const auto bits = [&](long part) {  // of a number in float: zeros follow its 16 bits
                const bf16* vector = found[i - first + part];
                return vector ? reinterpret_cast<Int>(load_bf16(vector + e)) : Int{};
            };
            const Int numbers = PARTS == 1 ? bits(0) : bits(1) | (bits(0) >> 16 & 0xffff);
            store(reinterpret_cast<int32_t*>(to) + e % (2 * LANES), numbers);
        }
    }
}

// The query rows `first` .. `first + rows` of one kv head: weights that are not divided yet, and outputs.
void ChunkAttention::attend(long head, long first, long rows, Tile& tile) const {
    const long width = past + (first + rows - 1) / group + 1, reach = (width + BLOCK - 1) / BLOCK * BLOCK;
    const long depth = (width + PARTS * STEP - 1) / (PARTS * STEP) * STEP;
    for (long r = 0; r < rows; r++) {
        const long token = (first + r) / group, query_head = head * group + (first + r) % group;
        copy_numbers(q.at(token, query_head), dim, reinterpret_cast<Number*>(tile.queries + r * words));
    }
    for (long b = 0; b < reach; b += BLOCK)
        product<Plain>(tile.queries, words, rows, key_panels + (head * full + b) * words, WIDE, words, true,
                       reinterpret_cast<word*>(tile.scores) + b, full);
    for (long r = 0; r < rows; r++) {
        const long token = (first + r) / group, query_head = head * group + (first + r) % group;
        const uint8_t* mask = hidden ? hidden + (head * tokens + token) * total : nullptr;
        tile.over[r] = softmax_row(tile.scores + r * full, tile.weights + r * full, reach, past + token + 1, mask,
                                   scale, sinks ? sinks + query_head : nullptr);
    }
    for (long h = 0; h < halves; h++)
        product<Plain>(reinterpret_cast<const word*>(tile.weights), lines, rows,
                       value_panels + (head * halves + h) * lines * 2 * LANES, 2, depth, true,
                       reinterpret_cast<word*>(tile.answers) + h * 2 * LANES, value_dim);
    for (long r = 0; r < rows; r++) {
        const long token = (first + r) / group, query_head = head * group + (first + r) % group;
        for (long e = 0; e < value_dim; e += LANES)
            store_bf16(out + (token * heads + query_head) * value_dim + e,
                       load(tile.answers + r * value_dim + e) * splat(tile.over[r]));
    }
}

// Where LANES keys of one kv head lie from column `at` on, in tokens after the chunk's first.
Int ChunkAttention::places(long head, long at) const {
    const Int own = lanes_from(at - past);
    if (at >= past) return own;
    int32_t room[LANES];
    return select(first_lanes(past - at), load(padded(past_places + head * past + at, past - at, room)), own);
}

// Adds the weighted powers of probabilities in the columns `begin` .. `end` of a tile, and in the rest of the last
// register; unless `All` count, those of keys that lie after `farthest` are left out.
template <bool All>
void ChunkAttention::add_columns(long head, long begin, long end, const Counted& counted, float* to) const {
    for (long i = begin; i < end; i += LANES) {
        const Int place = All ? Int{} : places(head, i);
        Real all = load(to + i);
        for (long r = 0; r < counted.rows; r++) {
            const Real weight = powered(load_number(counted.weights + r * full + i), power);
            const Real more = fused(splat(counted.factor[r]), weight, all);
            all = All ? more : select(less(splat(counted.farthest[r]), place), all, more);
        }
        store(to + i, all);
    }
}

// Adds the weighted powers of the probabilities of a tile's rows to the sums of its turn [ways][kv_heads][full]. First
// come columns that lie at least `distance` before all rows, then those that lie so far before some.
void ChunkAttention::add_up(long head, long first, long rows, const Tile& tile, float* sums) const {
    const long earliest = first / group - distance, latest = (first + rows - 1) / group - distance;
    const long end = past + std::max(latest + 1, 0L), all_far = earliest < -1 ? 0 : past + earliest + 1;
    const long plain = distance ? all_far / LANES * LANES : end;
    Counted counted{tile.weights, rows, {}, {}};
    for (long way = 0; way < ways; way++) {
        bool any = false;
        for (long r = 0; r < rows; r++) {
            const long token = (first + r) / group;
            const float weight = query_weights[way * tokens + token];
            const float over = power == 2 ? tile.over[r] * tile.over[r] : tile.over[r];
            counted.factor[r] = weight == 0.0f ? 0.0f : weight * over / static_cast<float>(group);
            counted.farthest[r] = static_cast<int32_t>(token) - distance;
            any = any || weight != 0.0f;
        }
        if (!any) continue;
        float* to = sums + (way * kv_heads + head) * full;
        add_columns<true>(head, 0, plain, counted, to);
        add_columns<false>(head, plain, end, counted, to);
    }
}

}  // namespace
