// The attention of a prompt chunk to its slot and to itself, for CPUs with AVX512-BF16.

#pragma once

#include "attention.h"
#include "formats.h"

namespace {

// The attention of a prompt chunk to its slot and to itself: operands, sizes, and working memory.
//
// Keys and values of slot and chunk are packed into panels first: BLOCK keys, or two registers of value columns. Then
// every task is a tile of ROWS query rows of one kv head; row r is token r / group, query head r % group of it.
struct ChunkAttention {
    static constexpr long BLOCK = WIDE * LANES;

    Vectors q, k, v;
    Stored past_k, past_v;
    long tokens, heads, kv_heads, past, dim, value_dim, ways;
    float scale;
    int distance, power;  // what counts for the sums: queries so many tokens after a key, probabilities to this power
    const uint8_t* hidden;
    const float *sinks, *query_weights;
    const int32_t* past_places;  // [kv_heads][past], or null if distance is 0
    bf16* out;

    long group = heads / kv_heads, total = past + tokens, blocks = (total + BLOCK - 1) / BLOCK, full = blocks * BLOCK;
    long words = dim / 2, pairs = full / 2, halves = value_dim / (2 * LANES);
    long tiles_of_head = (tokens * group + ROWS - 1) / ROWS;
    size_t key_words = static_cast<size_t>(kv_heads) * full * words;
    size_t value_words = static_cast<size_t>(kv_heads) * full * (value_dim / 2);
    size_t sums_size = static_cast<size_t>(ways) * kv_heads * full;
    size_t vectors = BLOCK * std::max(dim, value_dim) / 2;
    size_t tile_size = ROWS * (full + full / 2 + value_dim + words) + vectors;
    word *key_panels = nullptr, *value_panels = nullptr;
    float *sums_of_threads = nullptr, *tiles_of_threads = nullptr;

    struct Tile {          // a thread's
        float* scores;     // [ROWS][full]
        bf16* weights;     // [ROWS][full]
        float* answers;    // [ROWS][value_dim]
        word* queries;     // [ROWS][words]
        bf16* vectors;     // [BLOCK][dim or value_dim], read from codes
        float over[ROWS];  // 1 / sums of weights
    };

    struct Counted {          // the rows of a tile whose probabilities are added up
        const bf16* weights;  // [rows][full]
        long rows;
        __m512 factor[ROWS];
        __m512i farthest[ROWS];  // the last place that counts
    };

    size_t bytes() const {
        return Work::bytes<word>(key_words) + Work::bytes<word>(value_words) +
               omp_get_max_threads() * (Work::bytes<float>(sums_size) + Work::bytes<float>(tile_size));
    }
    void take(Work work) {
        key_panels = work.take<word>(key_words);
        value_panels = work.take<word>(value_words);
        sums_of_threads = work.take<float>(omp_get_max_threads() * sums_size);
        tiles_of_threads = work.take<float>(omp_get_max_threads() * tile_size);
    }
    float* sums_of(int thread) const { return sums_of_threads + thread * sums_size; }
    Tile tile_of(int thread) const {
        float* scores = tiles_of_threads + thread * tile_size;
        float* answers = scores + ROWS * (full + full / 2);
        float* queries = answers + ROWS * value_dim;
        return {scores, reinterpret_cast<bf16*>(scores + ROWS * full), answers, reinterpret_cast<word*>(queries),
                reinterpret_cast<bf16*>(queries + ROWS * words)};
    }
    void find_block(const Stored& of_slot, const Vectors& own, long head, long first, const Tile& tile,
                    const bf16** lines) const;
    void pack_block(long head, long first, const Tile& tile) const;
    void attend(long head, long first, long rows, Tile& tile) const;
    __m512i places(long head, long at) const;
    template <bool All>
    void add_columns(long head, long begin, long end, const Counted& counted, float* to) const;
    void add_up(long head, long first, long rows, const Tile& tile, float* sums) const;
};

// Finds the vectors `first` .. `first + BLOCK` of one kv head, null after the last; codes are read into the tile's.
void ChunkAttention::find_block(const Stored& of_slot, const Vectors& own, long head, long first, const Tile& tile,
                                const bf16** lines) const {
    for (long i = 0; i < BLOCK; i++) {
        const long at = first + i, row = head * of_slot.head + at;
        if (at >= past) {
            lines[i] = at < total ? own.at(at - past, head) : nullptr;
        } else if (of_slot.format == MODEL) {
            lines[i] = reinterpret_cast<const bf16*>(of_slot.at(row));
        } else {
            of_slot.read(row, tile.vectors + i * of_slot.dim);
            lines[i] = tile.vectors + i * of_slot.dim;
        }
    }
}

// Packs the keys and values `first` .. `first + BLOCK` of one kv head.
void ChunkAttention::pack_block(long head, long first, const Tile& tile) const {
    const bf16* lines[BLOCK];
    find_block(past_k, k, head, first, tile, lines);
    pack(reinterpret_cast<const word* const*>(lines), words, key_panels + (head * full + first) * words,
         static_cast<int>(BLOCK));
    find_block(past_v, v, head, first, tile, lines);
    for (long i = first; i < first + BLOCK; i += 2) {
        const bf16 *a = lines[i - first], *b = lines[i + 1 - first];
        for (long e = 0; e < value_dim; e += LANES) {
            const auto half = [&](const bf16* p) {
                return p ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + e)))
                         : _mm512_setzero_si512();
            };
            word* to = value_panels + ((head * halves + e / (2 * LANES)) * pairs + i / 2) * 2 * LANES;
            _mm512_store_si512(to + e % (2 * LANES), _mm512_or_si512(half(a), _mm512_slli_epi32(half(b), 16)));
        }
    }
}

// The query rows `first` .. `first + rows` of one kv head: weights that are not divided yet, and outputs.
void ChunkAttention::attend(long head, long first, long rows, Tile& tile) const {
    const long width = past + (first + rows - 1) / group + 1, reach = (width + BLOCK - 1) / BLOCK * BLOCK;
    for (long r = 0; r < rows; r++) {
        const long token = (first + r) / group, query_head = head * group + (first + r) % group;
        std::memcpy(tile.queries + r * words, q.at(token, query_head), dim * sizeof(bf16));
    }
    for (long b = 0; b < reach; b += BLOCK)
        tiles<Halves, WIDE>(tile.queries, words, rows, key_panels + (head * full + b) * words, words, true,
                            tile.scores + b, full);
    for (long r = 0; r < rows; r++) {
        const long token = (first + r) / group, query_head = head * group + (first + r) % group;
        const uint8_t* mask = hidden ? hidden + (head * tokens + token) * total : nullptr;
        tile.over[r] = softmax_row(tile.scores + r * full, tile.weights + r * full, reach, past + token + 1, mask,
                                   scale, sinks ? sinks + query_head : nullptr);
    }
    for (long h = 0; h < halves; h++)
        tiles<Halves, 2>(reinterpret_cast<const word*>(tile.weights), full / 2, rows,
                         value_panels + (head * halves + h) * pairs * 2 * LANES, (width + 1) / 2, true,
                         tile.answers + h * 2 * LANES, value_dim);
    for (long r = 0; r < rows; r++) {
        const long token = (first + r) / group, query_head = head * group + (first + r) % group;
        for (long e = 0; e < value_dim; e += LANES) {
            const __m512 answer = _mm512_load_ps(tile.answers + r * value_dim + e);
            store_bf16(out + (token * heads + query_head) * value_dim + e,
                       _mm512_mul_ps(answer, _mm512_set1_ps(tile.over[r])));
        }
    }
}

// Where 16 keys of one kv head lie from column `at` on, in tokens after the chunk's first.
__m512i ChunkAttention::places(long head, long at) const {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i own = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(at - past)));
    return _mm512_mask_loadu_epi32(own, seen(at, past, nullptr), past_places + head * past + at);
}

// Adds the weighted powers of probabilities in the columns `begin` .. `end` of a tile, and in the rest of the last
// register; unless `All` count, those of keys that lie after `farthest` are left out.
template <bool All>
void ChunkAttention::add_columns(long head, long begin, long end, const Counted& counted, float* to) const {
    for (long i = begin; i < end; i += LANES) {
        const __m512i place = All ? _mm512_setzero_si512() : places(head, i);
        __m512 sum = _mm512_load_ps(to + i);
        for (long r = 0; r < counted.rows; r++) {
            const __m512 weight = powered(load_bf16(counted.weights + r * full + i), power);
            const __mmask16 far = All ? -1 : _mm512_cmple_epi32_mask(place, counted.farthest[r]);
            sum = _mm512_mask3_fmadd_ps(counted.factor[r], weight, sum, far);
        }
        _mm512_store_ps(to + i, sum);
    }
}

// Adds the weighted powers of the probabilities of a tile's rows to this thread's sums [ways][kv_heads][full]. First
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
            counted.factor[r] = _mm512_set1_ps(weight == 0.0f ? 0.0f : weight * over / static_cast<float>(group));
            counted.farthest[r] = _mm512_set1_epi32(static_cast<int>(token) - distance);
            any = any || weight != 0.0f;
        }
        if (!any) continue;
        float* to = sums + (way * kv_heads + head) * full;
        add_columns<true>(head, 0, plain, counted, to);
        add_columns<false>(head, plain, end, counted, to);
    }
}

}  // namespace
