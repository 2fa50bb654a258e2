// Keys that are scaled by channel, and the coded values beside them, for AVX512 with VNNI: see slot_words.h.
//
// Numbers of 16 bits without a sign, in two bytes, are multiplied with codes of one byte by the products of int8
// weights (products.h). A group's keys are four channels of each row in a word, and queries are multiplied with the
// channels' scales before; values are four rows of each column in a word.

#pragma once

namespace {

constexpr long QUAD = 4;                  // bytes of a word
constexpr float LARGEST_PAIR = 65535.0f;  // of two bytes
constexpr int HALF_PAIR = 32768;

// Stores 32 whole numbers from 0 to 65535 as their upper bytes and their lower bytes.
struct BytePairs {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    void store(Int a, Int b, uint8_t* upper, uint8_t* lower) const {
        const __m512i words = _mm512_permutexvar_epi64(
            order, _mm512_packus_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
        const auto put = [](uint8_t* to, __m512i bytes) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(bytes));
        };
        put(upper, _mm512_srli_epi16(words, 8)), put(lower, words);
    }
};

inline __mmask64 first_bytes(long count) {
    return count >= 64 ? ~0ull : (1ull << std::max(count, 0L)) - 1;
}

// Queries times the scales of the channels of a row's group, plus HALF_PAIR, in bytes [2 * group][dim]: two rows for
// each query. Beside them the steps, and what is left out: the queries' products with the channels' offsets.
template <long DIM>
void Slot::fold_queries(long row, long member, long lines) {
    const long dim = DIM ? DIM : key.dim;                           // known where loops are worth unrolling
    const float middle = channels->format == INT8 ? 128.0f : 0.0f;  // of the codes as they are multiplied
    float *scales = folded + dim, *offsets = scales + dim;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const uint16_t* halves = channels->scales + row / KEY_GROUP * 2 * dim;
    for (long d = 0; d < dim; d += LANES) {
        const Real a = load_halves(halves + 2 * d), b = load_halves(halves + 2 * d + LANES);
        const Real scale = _mm512_permutex2var_ps(a, even, b), offset = _mm512_permutex2var_ps(a, odd, b);
        store(scales + d, scale), store(offsets + d, fused(splat(middle), scale, offset));
    }
    const BytePairs pairs;
    for (long g = 0; g < group; g++) {
        const float* from = widened + g * dim;
        next.fetch(lines);
        Real most = splat(1e-30f), offset = zeros();
        for (long d = 0; d < dim; d += 2 * LANES) {
            const Real a = load(from + d), b = load(from + d + LANES);
            const Real x = a * load(scales + d), y = b * load(scales + d + LANES);
            most = greater(most, greater(magnitude(x), magnitude(y)));
            offset = fused(a, load(offsets + d), fused(b, load(offsets + d + LANES), offset));
            store(folded + d, x), store(folded + d + LANES, y);
        }
        const float largest = greatest(most);
        const Real factor = splat(LARGEST_WORD / largest);
        const auto number = [=](long d) { return whole(load(folded + d) * factor) + HALF_PAIR; };
        uint8_t* to = query_bytes + (member * (2 * group + 1) + 2 * g) * dim;
        for (long d = 0; d < dim; d += 2 * LANES) pairs.store(number(d), number(d + LANES), to + d, to + dim + d);
        query_steps[member * group + g] = largest / LARGEST_WORD, query_sums[member * group + g] = sum(offset);
    }
}

// Eight words of each of 16 rows become columns.
inline void transpose_half(const uint8_t* from, long stride, __mmask8 some, __m512i columns[8]) {
    __m512i r[8];
    for (int i = 0; i < 8; i++) {
        const uint8_t* row = from + (i % 4 + i / 4 * 8) * stride;
        r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi32(some, row)),
                                  _mm256_maskz_loadu_epi32(some, row + 4 * stride), 1);
    }
    for (int i = 0; i < 8; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        r[i] = _mm512_unpacklo_epi64(a, c), r[i + 1] = _mm512_unpackhi_epi64(a, c);
        r[i + 2] = _mm512_unpacklo_epi64(b, d), r[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        columns[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        columns[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    }
}

// The keys of the group that begins at a row, as a panel [dim / 4][KEY_GROUP] of signed bytes.
void Slot::unpack_keys(long row, word* panel, long lines) {
    const long bytes = channels->bytes();
    const __m512i low = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(-128);
    for (long half = 0; half < KEY_GROUP; half += LANES) {
        for (long at = 0; at < bytes; at += 32) {
            const long count = std::min(8L, (bytes - at) / QUAD);
            __m512i columns[8];
            next.fetch(lines);
            transpose_half(channels->at(row + half) + at, bytes, static_cast<__mmask8>((1 << count) - 1), columns);
            word* to = panel + at / QUAD * KEY_GROUP + half;
            for (long k = 0; k < count; k++, to += KEY_GROUP) {
                if (channels->format == INT8) {
                    _mm512_store_si512(to, _mm512_xor_si512(columns[k], middle));
                } else {
                    _mm512_store_si512(to, _mm512_and_si512(columns[k], low));
                    _mm512_store_si512(to + bytes / QUAD * KEY_GROUP,
                                       _mm512_and_si512(_mm512_srli_epi16(columns[k], 4), low));
                }
            }
        }
    }
}

// Dot products of the rows after the exact ones; `lines` are prefetched for each query and block of rows. Several
// groups are unpacked before they are multiplied, so that no instruction waits for what the last one has written.
void Slot::score_channels() {
    const long dim = key.dim, rows_of_bytes = 2 * group + 1, words_of_panel = dim / QUAD * KEY_GROUP;
    const long turns = (rows - exact) / KEY_GROUP * (group + channels->bytes() / LANES + 2) + 1;
    const long lines = (next.keys + next.values + next.scales) / (2 * turns) + 1;  // half of the time goes there
    for (long g = 0; g < group; g++)
        for (long d = 0; d < dim; d += LANES) store(widened + g * dim + d, load_bf16(query + g * dim + d));
    for (long m = 0; m < GROUPS; m++)  // the last row's products are the sums of codes
        std::memset(query_bytes + (m * rows_of_bytes + 2 * group) * dim, 1, dim);
    for (long begin = exact; begin < rows; begin += GROUPS * KEY_GROUP) {
        const long count = std::min(GROUPS, (rows - begin + KEY_GROUP - 1) / KEY_GROUP);
        for (long m = 0; m < count; m++) {
            const long row = begin - exact + m * KEY_GROUP;
            dim == 64    ? fold_queries<64>(row, m, lines)
            : dim == 128 ? fold_queries<128>(row, m, lines)
                         : fold_queries<0>(row, m, lines);
            unpack_keys(row, panel + m * words_of_panel, lines);
        }
        for (long m = 0; m < count; m++) {
            next.fetch(2 * lines);
            product<Bytes>(reinterpret_cast<const word*>(query_bytes + m * rows_of_bytes * dim), dim / QUAD,
                           rows_of_bytes, panel + m * words_of_panel, 2, dim / QUAD, true,
                           sums + m * rows_of_bytes * KEY_GROUP, KEY_GROUP);
        }
        for (long m = 0; m < count; m++)
            for (long half = 0; half < KEY_GROUP; half += LANES) finish_scores(begin + m * KEY_GROUP + half, m, half);
    }
}

// The scores of LANES rows from `at` on, those from `half` on in their group, from their sums of products.
void Slot::finish_scores(long at, long member, long half) const {
    const int32_t* from = reinterpret_cast<int32_t*>(sums) + member * (2 * group + 1) * KEY_GROUP + half;
    const Int surplus = load(from + 2 * group * KEY_GROUP) * (HALF_PAIR / 256);
    for (long g = 0; g < group; g++, from += 2 * KEY_GROUP) {
        const Real all = fused(real(load(from) - surplus), splat(256.0f), real(load(from + KEY_GROUP)));
        const long own = member * group + g;
        store(scores + g * full + at, fused(all, splat(query_steps[own]), splat(query_sums[own])));
    }
}

// Weights times the scales of values, as fractions of the largest in a panel's rows, in bytes [2 * group][full -
// exact]; one that is no number makes all of them none.
void Slot::pair_weights() {
    const long stride = full - KEY_GROUP;
    const BytePairs pairs;
    for (long g = 0; g < group; g++) offsets[g] = 0.0f;
    for (long begin = exact, part = 0; begin < rows; begin += ROWS_OF_PANEL, part++) {
        const long count = std::min(ROWS_OF_PANEL, full - begin);
        float *scales = scaled, *shifts = scaled + ROWS_OF_PANEL, *products = scaled + 2 * ROWS_OF_PANEL;
        for (long i = 0; i < count; i += LANES) {
            const Scales some = value.scales_of(begin - exact + i, rows - begin - i);
            store(scales + i, some.scale), store(shifts + i, some.offset);
        }
        for (long g = 0; g < group; g++) {
            Real most = splat(1e-30f), broken = zeros(), offset = zeros();
            next.fetch(8);
            for (long i = 0; i < count; i += LANES) {
                const Real weight = load_bf16(weights + g * full + begin + i), product = weight * load(scales + i);
                offset = fused(weight, load(shifts + i), offset);
                most = greater(most, product), broken = fused(product, zeros(), broken);
                store(products + i, product);
            }
            const float largest = greatest(most);
            const Real factor = splat(LARGEST_PAIR / largest);
            const auto number = [=](long i) { return whole(load(products + i) * factor); };
            uint8_t* to = weight_bytes + 2 * g * stride + begin - exact;
            for (long i = 0; i < count; i += 2 * LANES)
                pairs.store(number(i), number(i + LANES), to + i, to + stride + i);
            weight_steps[g * full / SPAN + part] = largest / LARGEST_PAIR + sum(broken);
            offsets[g] += sum(offset);
        }
    }
}

// 64 numbers of a value from chunk `chunk` on: of Int4, 32 of the first half and 32 of the second.
template <class Kind>
struct Chunk {
    static constexpr long BYTES = std::is_same_v<Kind, Int4> ? 32 : 64;
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i low = _mm512_set1_epi8(15);
    __mmask64 there;  // which bytes there are

    Chunk(long bytes, long chunk) : there(first_bytes(bytes - chunk * BYTES)) {}
    __m512i numbers(const uint8_t* from) const {
        if constexpr (BYTES == 64) return _mm512_maskz_loadu_epi8(there, from);
        const __m256i both = _mm256_maskz_loadu_epi8(static_cast<__mmask32>(there), from);
        return _mm512_and_si512(_mm512_srlv_epi16(_mm512_broadcast_i64x4(both), shifts), low);
    }
};

// A chunk's columns of up to ROWS_OF_PANEL values, in four panels [rows / 4][LANES], two interleaved: panel m has the
// columns 4 m .. 4 m + 3 of each quarter of the chunk.
template <class Kind>
void Slot::unpack_values(Kind, long row, long count, long number, long lines) {
    const long bytes = value.bytes();
    const Chunk<Kind> chunk(bytes, number);
    const uint8_t* from = value.at(row) + number * Chunk<Kind>::BYTES;
    const uint8_t* last = from + (count - 1) * bytes;
    word* to = panel;
    for (long i = 0; i < count; i += QUAD, from += QUAD * bytes, to += 2 * LANES) {
        next.fetch(lines);
        const __m512i w = chunk.numbers(from), x = chunk.numbers(std::min(from + bytes, last));
        const __m512i y = chunk.numbers(std::min(from + 2 * bytes, last));
        const __m512i z = chunk.numbers(std::min(from + 3 * bytes, last));
        const __m512i a = _mm512_unpacklo_epi8(w, x), b = _mm512_unpackhi_epi8(w, x);
        const __m512i c = _mm512_unpacklo_epi8(y, z), d = _mm512_unpackhi_epi8(y, z);
        word* second = to + ROWS_OF_PANEL / QUAD * 2 * LANES;
        _mm512_store_si512(to, _mm512_unpacklo_epi16(a, c));
        _mm512_store_si512(to + LANES, _mm512_unpackhi_epi16(a, c));
        _mm512_store_si512(second, _mm512_unpacklo_epi16(b, d));
        _mm512_store_si512(second + LANES, _mm512_unpackhi_epi16(b, d));
    }
}

// The answers from the rows after the exact ones, with the sums of those.
void Slot::answer_bytes(bf16* out) {
    const long stride = full - KEY_GROUP, chunks = (value.dim + 63) / 64, wide = chunks * 64;
    const long lines = QUAD * (next.keys + next.values) / ((rows - exact) * chunks + QUAD) + 1;
    pair_weights();
    std::fill(columns, columns + group * wide, 0.0f);
    for (long begin = exact, part = 0; begin < rows; begin += ROWS_OF_PANEL, part++) {
        const long words = std::min(ROWS_OF_PANEL, full - begin) / QUAD;
        const word* left = reinterpret_cast<const word*>(weight_bytes + begin - exact);
        for (long chunk = 0; chunk < chunks; chunk++) {
            const long count = std::min(ROWS_OF_PANEL, rows - begin);
            value.format == INT8 ? unpack_values(Int8{}, begin - exact, count, chunk, lines)
                                 : unpack_values(Int4{}, begin - exact, count, chunk, lines);
            for (long pair = 0; pair < 2; pair++) {
                const word* right = panel + pair * ROWS_OF_PANEL / QUAD * 2 * LANES;
                word* to = sums + pair * 4 * group * LANES;
                product<Bytes>(left, stride / QUAD, 2 * group, right, 2, words, true, to, 2 * LANES);
            }
            for (long g = 0; g < group; g++) {
                const Real step = splat(weight_steps[g * full / SPAN + part]);
                for (long m = 0; m < 4; m++) {
                    const long at = (m / 2 * group + g) * 4 * LANES + m % 2 * LANES;
                    const int32_t* from = reinterpret_cast<int32_t*>(sums) + at;
                    float* to = columns + g * wide + chunk * 64 + m * LANES;
                    const Real all = fused(real(load(from)), splat(256.0f), real(load(from + 2 * LANES)));
                    store(to, fused(all, step, load(to)));
                }
            }
        }
    }
    for (long g = 0; g < group; g++) finish_columns(g, wide, out + g * value.dim);
}

// One query's answer, from its columns as the panels have them.
void Slot::finish_columns(long g, long wide, bf16* out) const {
    const Real factor = splat(over[g]), offset = splat(offsets[g]);
    for (long chunk = 0; chunk < wide / 64; chunk++) {
        __m512i m[4], quarters[4];
        for (long j = 0; j < 4; j++) m[j] = _mm512_load_si512(columns + g * wide + chunk * 64 + j * LANES);
        const __m512i a = _mm512_shuffle_i32x4(m[0], m[1], 0x44), b = _mm512_shuffle_i32x4(m[0], m[1], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(m[2], m[3], 0x44), d = _mm512_shuffle_i32x4(m[2], m[3], 0xee);
        quarters[0] = _mm512_shuffle_i32x4(a, c, 0x88), quarters[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
        quarters[2] = _mm512_shuffle_i32x4(b, d, 0x88), quarters[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
        for (long j = 0; j < 4; j++) {
            const bool halved = value.format == INT4;
            const long at = halved ? j / 2 * (value.dim / 2) + chunk * 32 + j % 2 * LANES : chunk * 64 + j * LANES;
            if (at >= value.dim || (halved && chunk * 32 + j % 2 * LANES >= value.dim / 2)) continue;
            const Real all = reinterpret_cast<Real>(quarters[j]) + load(answers + g * value.dim + at);
            store_bf16(out + at, factor * (all + offset));
        }
    }
}

}  // namespace
