// The attention of one decoding token to its slot, for AVX512 with BF16 and VNNI: see slot.h.
//
// Vectors in bfloat16 are multiplied as they lie. Codes are multiplied as whole numbers of 16 bits, and their scales
// applied to the sums: queries become fractions of their largest number, and weights (times the scales of values)
// fractions of the largest in a span of rows. Fractions of 16 bits lose less than bfloat16 does.

#pragma once

namespace {

constexpr int WORDS = 2 * LANES;     // 16-bit numbers of a register
constexpr long SPAN = 32;            // rows whose weights are fractions of one number
constexpr long GROUPS = 4;           // of keys that are multiplied together: see slot_bytes.h
constexpr long ROWS_OF_PANEL = 256;  // of values in bytes: see slot_bytes.h
constexpr float LARGEST_WORD = 32767.0f;

// Codes of one byte as 16-bit words, those of `chunk`: 32 numbers in order.
struct Int8 {
    static __m512i words(const uint8_t* codes, long chunk) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + chunk * WORDS)));
    }
};

// Levels of four bits as 16-bit words, those of `chunk`: 16 numbers of the first half, then 16 of the second.
struct Int4 {
    static __m512i words(const uint8_t* codes, long chunk) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + chunk * LANES));
        const __m512i twice = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes));
        const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
        return _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi16(15));
    }
};

// Where the 16 numbers lie in a vector that a half of a register of words holds.
template <class Source>
inline long place(const Source& vectors, long half) {
    return vectors.format == INT4 ? half % 2 * (vectors.dim / 2) + half / 2 * LANES : half * LANES;
}

// The kinds of vectors: how words are read, multiplied and added up, and what the sums are as floats.
struct PlainWords {
    using sum = __m512;
    static constexpr bool coded = false;
    static constexpr long COLUMNS = WORDS;
    static sum zero() { return _mm512_setzero_ps(); }
    static __m512i words(const uint8_t* vector, long chunk) { return _mm512_loadu_si512(vector + chunk * 64); }
    static sum add(sum s, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(s, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static __m512 real(sum s) { return s; }
};

template <class Codes>
struct Coded {
    using sum = __m512i;
    static constexpr bool coded = true;
    static constexpr long COLUMNS = WORDS;
    static sum zero() { return _mm512_setzero_si512(); }
    static __m512i words(const uint8_t* vector, long chunk) { return Codes::words(vector, chunk); }
    static sum add(sum s, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(s, a, b); }
    static __m512 real(sum s) { return _mm512_cvtepi32_ps(s); }
};

// Calls `work` with the kind of vectors of a format.
template <class F>
void with_kind(long format, const F& work) {
    if (format == INT8) return work(Coded<Int8>{});
    if (format == INT4) return work(Coded<Int4>{});
    work(PlainWords{});
}

// 16 numbers as whole numbers of 16 bits.
inline void store_words(word* to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}

// The attention of a decoding token to one kv head of its slot: operands and working memory.
struct Slot : Operands {
    long full = (rows + SPAN - 1) / SPAN * SPAN, words = key.dim / 2;
    float *scores, *over;             // [group][full], and [group]: one over the sums of weights
    bf16* weights;                    // [group][full], not divided by their sums
    uint8_t* flags;                   // [full]
    word *block, *query_words;        // [LANES][words], [group][words]: of codes, in the order in which they lie
    float *query_steps, *query_sums;  // [group]: what a fraction of 1 stands for, and the sum of a query's numbers
    word* fractions;                  // [group][full / 2], of weights
    float *weight_steps, *offsets;    // [group][full / SPAN], and [group]: sums of weights times offsets of values
    float* answers;                   // [group][value.dim], of the exact rows
    // Where keys are scaled by channel; see slot_bytes.h.
    float *widened, *folded;              // queries [group][dim]; one times scales, scales and offsets [3][dim]
    uint8_t *query_bytes, *weight_bytes;  // [GROUPS][2 * group + 1][dim], [2 * group][full - KEY_GROUP]
    word *panel, *sums;                   // of codes; [GROUPS][2 * group + 1][KEY_GROUP]
    float* scaled;                        // [3][ROWS_OF_PANEL]
    float* columns;                       // [group][value.dim in whole chunks]

    void set_channels(const ChannelKeys* keys) {
        channels = keys, exact = std::min(rows, KEY_GROUP);
        full = KEY_GROUP + (rows - exact + 63) / 64 * 64;
    }
    Work take(Work own);
    static size_t bytes(Slot sizes) { return reinterpret_cast<size_t>(sizes.take(Work{nullptr}).at); }
    void attend(float scale, bf16* out);
    Real mean(long at) const;
    void weigh(float scale) const;
    void split_queries() const;
    template <class Source>
    void split_weights(const Source& values) const;
    template <long DIM>
    void fold_queries(long row, long member, long lines);
    void unpack_keys(long row, word* to, long lines);
    void finish_scores(long at, long member, long half) const;
    void pair_weights();
    template <class Kind>
    void unpack_values(Kind, long row, long count, long number, long lines);
    void answer_bytes(bf16* out);
    void finish_columns(long g, long wide, bf16* out) const;
    template <class Kind, class Source>
    void score(Kind, const Source& keys, long end, long lines);
    void score_channels();
    template <class Kind, class Source>
    void answer(Kind, const Source& vectors, long begin, long end, long lines, bf16* out);
    template <class Kind, int COUNT, class Source>
    void answer_of(const Source& vectors, long begin, long end, long head, long chunk, long lines, bf16* out);
};

Work Slot::take(Work own) {
    scores = own.take<float>(group * full), over = own.take<float>(group);
    weights = own.take<bf16>(group * full), flags = own.take<uint8_t>(full);
    block = own.take<word>(LANES * words), query_words = own.take<word>(group * words);
    query_steps = own.take<float>(group), query_sums = own.take<float>(group);
    fractions = own.take<word>(group * full / 2);
    weight_steps = own.take<float>(group * full / SPAN), offsets = own.take<float>(group);
    if (!channels) return own;
    answers = own.take<float>(group * value.dim), columns = own.take<float>(group * (value.dim + 63) / 64 * 64);
    widened = own.take<float>(group * key.dim), folded = own.take<float>(3 * key.dim);
    const long rows_of_bytes = GROUPS * (2 * group + 1);
    query_bytes = own.take<uint8_t>(rows_of_bytes * key.dim);
    query_steps = own.take<float>(GROUPS * group), query_sums = own.take<float>(GROUPS * group);
    weight_bytes = own.take<uint8_t>(2 * group * (full - KEY_GROUP)), scaled = own.take<float>(3 * ROWS_OF_PANEL);
    panel = own.take<word>(std::max(GROUPS * key.dim / 4 * KEY_GROUP, ROWS_OF_PANEL * LANES));
    sums = own.take<word>(std::max(rows_of_bytes * KEY_GROUP, 8 * group * LANES));
    return own;
}

// Queries as fractions of their largest number, in the order in which codes lie.
void Slot::split_queries() const {
    for (long g = 0; g < group; g++) {
        const bf16* from = query + g * key.dim;
        const Range range(from, key.dim);
        const float most = std::max(-range.least, range.greatest);
        const __m512 factor = _mm512_set1_ps(LARGEST_WORD / std::max(most, 1e-30f));
        __m512 sum = _mm512_setzero_ps();
        for (long half = 0; half < key.dim / LANES; half++) {
            const __m512 v = load_bf16(from + place(key, half));
            sum = _mm512_add_ps(sum, v);
            store_words(query_words + g * words + half * LANES / 2, _mm512_mul_ps(v, factor));
        }
        query_steps[g] = most / LARGEST_WORD, query_sums[g] = _mm512_reduce_add_ps(sum);
    }
}

// Weights times the scales of values, as fractions of the largest in a span; one that is no number makes all of its
// span none.
template <class Source>
void Slot::split_weights(const Source& values) const {
    for (long g = 0; g < group; g++) {
        __m512 offset = _mm512_setzero_ps();
        for (long i = exact; i < rows; i += SPAN) {
            __m512 scaled[2], broken = _mm512_setzero_ps();
            for (long half = 0; half < 2; half++) {
                const long at = i + half * LANES;
                const Scales scales = values.scales_of(at - exact, rows - at);
                const __m512 weight = load_bf16(weights + g * full + at);
                scaled[half] = _mm512_mul_ps(weight, scales.scale);
                broken = _mm512_fmadd_ps(scaled[half], _mm512_setzero_ps(), broken);
                offset = _mm512_fmadd_ps(weight, scales.offset, offset);
            }
            const float most = _mm512_reduce_max_ps(_mm512_max_ps(scaled[0], scaled[1]));
            const __m512 factor = _mm512_set1_ps(LARGEST_WORD / std::max(most, 1e-30f));
            word* to = fractions + (g * full + i) / 2;
            store_words(to, _mm512_mul_ps(scaled[0], factor));
            store_words(to + LANES / 2, _mm512_mul_ps(scaled[1], factor));
            weight_steps[(g * full + i) / SPAN] = most / LARGEST_WORD + _mm512_reduce_add_ps(broken);
        }
        offsets[g] = _mm512_reduce_add_ps(offset);
    }
}

// Dot products of the rows up to `end` with all queries; `lines` are prefetched for each query and block of rows.
template <class Kind, class Source>
void Slot::score(Kind, const Source& keys, long end, long lines) {
    const long vector = 4 * words, chunks = words / LANES;
    const word* queries = Kind::coded ? query_words : reinterpret_cast<const word*>(query);
    for (long i = 0; i < end; i += LANES) {
        const long last = std::min<long>(LANES, end - i) - 1;
        const uint8_t* from = keys.at(i);
        Scales scales;
        if (Kind::coded) {
            from = reinterpret_cast<const uint8_t*>(block);
            for (long j = 0; j <= last; j++)
                for (long c = 0; c < chunks; c++)
                    _mm512_store_si512(block + j * words + c * LANES, Kind::words(keys.at(i + j), c));
            scales = keys.scales_of(i, end - i);
        }
        for (long g = 0; g < group; g++) {
            next.fetch(lines);
            __m512 r[LANES];
            for (long j = 0; j < LANES; j++) {
                typename Kind::sum sum = Kind::zero();
                for (long c = 0; c < chunks; c++)
                    sum = Kind::add(sum, _mm512_loadu_si512(queries + g * words + c * LANES),
                                    _mm512_loadu_si512(from + std::min(j, last) * vector + c * 64));
                r[j] = Kind::real(sum);
            }
            __m512 result = sums_of(r);
            if (Kind::coded) {
                result = _mm512_mul_ps(result, _mm512_mul_ps(scales.scale, _mm512_set1_ps(query_steps[g])));
                result = _mm512_fmadd_ps(scales.offset, _mm512_set1_ps(query_sums[g]), result);
            }
            _mm512_store_ps(scores + g * full + i, result);
        }
    }
}

// The answers of `COUNT` query heads from `head` on, in the columns that one chunk of words holds.
template <class Kind, int COUNT, class Source>
void Slot::answer_of(const Source& vectors, long begin, long end, long head, long chunk, long lines, bf16* out) {
    // Two rows of values are interleaved: columns 0-3 of every eight in one register, 4-7 in another.
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const long span = Kind::coded ? SPAN : full;
    const word* factors = (Kind::coded ? fractions : reinterpret_cast<const word*>(weights)) + head * full / 2;
    const auto sums = [&](int r, long half) { return answers + (head + r) * value.dim + place(vectors, half); };
    __m512 low[COUNT], high[COUNT];
    for (int r = 0; r < COUNT; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (long at = begin; at < end; at += span) {
        typename Kind::sum x[COUNT], y[COUNT];
        for (int r = 0; r < COUNT; r++) x[r] = y[r] = Kind::zero();
        for (long i = at; i < std::min(at + span, end); i += 2) {
            next.fetch(lines);
            const __m512i a = Kind::words(vectors.at(i - begin), chunk);
            const __m512i b = i + 1 < end ? Kind::words(vectors.at(i + 1 - begin), chunk) : _mm512_setzero_si512();
            const __m512i lower = _mm512_unpacklo_epi16(a, b), upper = _mm512_unpackhi_epi16(a, b);
            for (int r = 0; r < COUNT; r++) {
                const __m512i pair = _mm512_set1_epi32(static_cast<int>(factors[r * full / 2 + i / 2]));
                x[r] = Kind::add(x[r], pair, lower), y[r] = Kind::add(y[r], pair, upper);
            }
        }
        for (int r = 0; r < COUNT; r++) {
            const __m512 step = _mm512_set1_ps(Kind::coded ? weight_steps[((head + r) * full + at) / SPAN] : 1.0f);
            low[r] = _mm512_fmadd_ps(Kind::real(x[r]), step, low[r]);
            high[r] = _mm512_fmadd_ps(Kind::real(y[r]), step, high[r]);
        }
    }
    for (int r = 0; r < COUNT; r++) {
        __m512 left = _mm512_permutex2var_ps(low[r], first, high[r]);
        __m512 right = _mm512_permutex2var_ps(low[r], second, high[r]);
        if (!out) {
            store(sums(r, 2 * chunk), left), store(sums(r, 2 * chunk + 1), right);
            continue;
        }
        if (begin) left = left + load(sums(r, 2 * chunk)), right = right + load(sums(r, 2 * chunk + 1));
        bf16* to = out + (head + r) * value.dim;
        const __m512 factor = _mm512_set1_ps(over[head + r]);
        const __m512 offset = _mm512_mul_ps(factor, _mm512_set1_ps(Kind::coded ? offsets[head + r] : 0.0f));
        store_bf16(to + place(vectors, 2 * chunk), _mm512_fmadd_ps(factor, left, offset));
        store_bf16(to + place(vectors, 2 * chunk + 1), _mm512_fmadd_ps(factor, right, offset));
    }
}

}  // namespace

#include "slot_bytes.h"

namespace {

void Slot::attend(float scale, bf16* out) {
    const long lines = next.keys + next.values, passes = value.dim / WORDS * ((group + FEW - 1) / FEW);
    const long scored = 2 * lines * LANES / (3 * group * full) + 1;  // two thirds of the time goes there
    if (channels) {
        score(PlainWords{}, exact_key, exact, scored);
        score_channels();
    } else {
        if (key.format != MODEL) split_queries();
        with_kind(key.format, [&](auto kind) {
            shared ? score(kind, Joined{shared_key, key, shared}, rows, scored) : score(kind, key, rows, scored);
        });
    }
    weigh(scale);
    const long answered = 2 * lines / (3 * full * passes) + 1;
    if (shared) {
        const Joined values{shared_value, value, shared};
        if (value.format != MODEL) split_weights(values);
        return with_kind(value.format, [&](auto kind) { answer(kind, values, 0, rows, answered, out); });
    }
    if (channels) answer(PlainWords{}, exact_value, 0, exact, answered, nullptr);
    if (channels && value.format != MODEL) return answer_bytes(out);
    if (value.format != MODEL) split_weights(value);
    with_kind(value.format, [&](auto kind) { answer(kind, value, exact, rows, answered, out); });
}

}  // namespace
