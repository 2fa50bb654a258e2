// Products of words, for CPUs with AVX512-BF16 and VNNI: what linear layers and attention are made of.
//
// A 32-bit word holds two bfloat16 (or four bytes); one instruction multiplies 16 words with 16 others and adds up. The
// right-hand side of a product is first packed into panels of words [inner][columns]. The left-hand side is read in
// place, one word at a time for all columns of a panel.

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;
using word = uint32_t;

constexpr int LANES = 16;          // 32-bit numbers of a register
constexpr int ROWS = 8;            // rows of a tile of a product
constexpr int WIDE = 3;            // registers of columns of such a tile
constexpr long DEPTH = 1024;       // words of a panel's columns: what stays in the second cache
constexpr long MANY_ROWS = 128;    // rows from which threads divide rows instead of columns
constexpr long CACHED_ROWS = 256;  // rows whose sums stay in the second cache

inline __m512 wide(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m512 load_bf16(const bf16* p) {
    return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256i narrow(__m512 x) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
}
inline void store_bf16(bf16* p, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x));
}

// e to the x for x <= 0, with an error in the seventh digit: 2^n times a polynomial on [-1/2, 1/2]. NaN stays NaN.
inline __m512 exponential(__m512 x) {
    const __m512 t = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-100.0f), x), _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// Hands out pieces of the working memory, each on a cache line of its own.
struct Work {
    char* at;
    template <class T>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(at);
        at += bytes<T>(count);
        return piece;
    }
    template <class T>
    static size_t bytes(size_t count) {
        return (count * sizeof(T) + 63) / 64 * 64;
    }
};

// 16 rows of 16 words become 16 columns.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Packs `width` rows of `words` words into a panel [words][width]; null rows become zeros.
void pack(const word* const* rows, long words, word* panel, int width) {
    for (int c = 0; c < width; c += LANES) {
        for (long k = 0; k < words; k += LANES) {
            const int left = static_cast<int>(std::min<long>(LANES, words - k));
            const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
            __m512i r[16];
            for (int i = 0; i < LANES; i++)
                r[i] = rows[c + i] ? _mm512_maskz_loadu_epi32(mask, rows[c + i] + k) : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < left; i++) _mm512_store_si512(panel + (k + i) * width + c, r[i]);
        }
    }
}

struct Halves {  // words of two bfloat16, summed in float
    using sum = __m512;
    static sum zero() { return _mm512_setzero_ps(); }
    static sum load(const void* p) { return _mm512_load_ps(p); }
    static void store(void* p, sum x) { _mm512_store_ps(p, x); }
    static sum add(sum s, word a, __m512i b) {
        return _mm512_dpbf16_ps(s, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                                reinterpret_cast<__m512bh>(b));
    }
};

struct Bytes {  // words of four bytes, unsigned x signed, summed in 32 bits
    using sum = __m512i;
    static sum zero() { return _mm512_setzero_si512(); }
    static sum load(const void* p) { return _mm512_load_si512(p); }
    static void store(void* p, sum x) { _mm512_store_si512(p, x); }
    static sum add(sum s, word a, __m512i b) {  // as _mm512_dpbusd_epi32, for which compilers copy and spill s
        asm("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(_mm512_set1_epi32(static_cast<int>(a))), "v"(b));
        return s;
    }
};

// Weights that will be read next: a tile prefetches three cache lines of their rows for each word it has multiplied.
struct Ahead {
    const word* rows = nullptr;
    long stride = 0;
    void prefetch(long k) const {
        const word* line = rows + (k % LANES) * stride + k / LANES * LANES;
        for (int j = 0; j < WIDE; j++)
            _mm_prefetch(reinterpret_cast<const char*>(line + j * LANES * stride), _MM_HINT_T1);
    }
};

// A tile of M rows x N registers: out[row][column] (+)= sum over words of a[row][word] times panel[word][column].
template <class Kind, int M, int N, bool Prefetch = false>
inline void tile(const word* a, long stride, const word* panel, long words, bool begin, void* out, long width,
                 Ahead ahead = {}) {
    typename Kind::sum s[M][N];
    auto* at = static_cast<word*>(out);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) s[i][j] = begin ? Kind::zero() : Kind::load(at + i * width + j * LANES);
    for (long k = 0; k < words; k++) {
        __m512i b[N];
        for (int j = 0; j < N; j++) b[j] = _mm512_load_si512(panel + (k * N + j) * LANES);
        if (Prefetch) ahead.prefetch(k);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) s[i][j] = Kind::add(s[i][j], a[i * stride + k], b[j]);
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) Kind::store(at + i * width + j * LANES, s[i][j]);
}

template <class Kind, int N, bool Prefetch = false>
void tile_of_rows(const word* a, long stride, long rows, const word* panel, long words, bool begin, void* out,
                  long width, Ahead ahead = {}) {
    switch (rows) {
        case 8: return tile<Kind, 8, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
        case 7: return tile<Kind, 7, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
        case 6: return tile<Kind, 6, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
        case 5: return tile<Kind, 5, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
        case 4: return tile<Kind, 4, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
        case 3: return tile<Kind, 3, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
        case 2: return tile<Kind, 2, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
        case 1: return tile<Kind, 1, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
    }
}

// Tiles for any number of rows; the first one prefetches what comes next.
template <class Kind, int N>
void tiles(const word* a, long stride, long rows, const word* panel, long words, bool begin, void* out, long width,
           Ahead ahead = {}) {
    auto* at = static_cast<word*>(out);
    for (long i = 0; i < rows; i += ROWS) {
        const long count = std::min<long>(ROWS, rows - i);
        if (i == 0 && ahead.rows)
            tile_of_rows<Kind, N, true>(a, stride, count, panel, words, begin, at, width, ahead);
        else
            tile_of_rows<Kind, N>(a + i * stride, stride, count, panel, words, begin, at + i * width, width);
    }
}

template <class Kind>
void product(const word* a, long stride, long rows, const word* panel, int registers, long words, bool begin, void* out,
             long width, Ahead ahead) {
    if (registers == 3) return tiles<Kind, 3>(a, stride, rows, panel, words, begin, out, width, ahead);
    if (registers == 2) return tiles<Kind, 2>(a, stride, rows, panel, words, begin, out, width);
    return tiles<Kind, 1>(a, stride, rows, panel, words, begin, out, width);
}

// The working memory of a thread in `multiply`: a panel of weights and sums, in words.
struct ThreadWork {
    size_t panel, sums;
    ThreadWork(long rows, long words)
        : panel(std::min(words, DEPTH) * WIDE * LANES),
          sums((words > DEPTH ? rows + ROWS : std::min(rows, CACHED_ROWS)) * WIDE * LANES) {}
    size_t bytes() const { return Work::bytes<word>(panel) + Work::bytes<word>(sums); }
    long all_threads() const { return static_cast<long>(bytes() * omp_get_max_threads()); }
};

// A linear layer: weights [columns][inner], int8 if it has scales; `offset` is where its output begins, in columns.
struct Layer {
    const void* weight;
    const float* scales;  // [columns], of int8 weights
    const int32_t* sums;  // [columns], of int8 weights
    const bf16* bias;     // [columns] or null
    long columns, offset;
};

// x[rows][words] times the weights of some layers; each row of a block of columns is handed to `finish(layer, row,
// column, registers, sums)`. Threads divide the rows if there are many, else the columns. Of paired layers, each block
// of the first is followed by the same block of the second, in the same thread.
template <class Kind, class Finish>
void multiply(const void* left, const Layer* layers, int count, bool paired, long rows, long words, Work work,
              const Finish& finish) {
    const word* x = static_cast<const word*>(left);
    const ThreadWork size(rows, words);
    constexpr long SIDE = WIDE * LANES;
    long blocks = 0;
    for (int i = 0; i < count; i++) blocks += (layers[i].columns + SIDE - 1) / SIDE;
    const auto find_block = [=](long block, int& which, long& column) {
        if (paired) {
            which = static_cast<int>(block % 2), column = block / 2 * SIDE;
            return;
        }
        for (which = 0; block >= (layers[which].columns + SIDE - 1) / SIDE; which++)
            block -= (layers[which].columns + SIDE - 1) / SIDE;
        column = block * SIDE;
    };
#pragma omp parallel
    {
        const int threads = omp_get_num_threads(), me = omp_get_thread_num();
        Work own{work.at + me * size.bytes()};
        word* panel = own.take<word>(size.panel);
        word* sums = own.take<word>(size.sums);
        int down = 1;
        for (int d = 1; d <= threads; d++)
            if (threads % d == 0 && rows >= d * MANY_ROWS) down = d;
        const int across = threads / down, mine = me % across;
        const long tall = (rows + ROWS * down - 1) / (ROWS * down) * ROWS;
        const long top = std::min(rows, (me / across) * tall), bottom = std::min(rows, top + tall);
        const long step = paired ? 2 : 1, stop = blocks / step * (mine + 1) / across * step;
        for (long block = blocks / step * mine / across * step; block < stop && bottom > top; block++) {
            int which, next_which;
            long column, next_column;
            find_block(block, which, column);
            find_block(block + 1 < stop ? block + 1 : block, next_which, next_column);
            const word* w = static_cast<const word*>(layers[which].weight);
            const int registers = static_cast<int>(std::min<long>(WIDE, (layers[which].columns - column) / LANES));
            const int width = registers * LANES;
            for (long k = 0; k < words; k += DEPTH) {
                const long depth = std::min(DEPTH, words - k);
                const bool last = k + depth == words;
                const word* lines[SIDE];
                for (int i = 0; i < width; i++) lines[i] = w + (column + i) * words + k;
                pack(lines, depth, panel, width);
                const word* next_weight = static_cast<const word*>(layers[next_which].weight) + next_column * words;
                const Ahead next{last ? next_weight : w + column * words + k + depth, words};
                for (long row = top; row < bottom; row += CACHED_ROWS) {
                    const long count_of_rows = std::min(CACHED_ROWS, bottom - row);
                    word* to = words > DEPTH ? sums + (row - top) * width : sums;
                    product<Kind>(x + row * words + k, words, count_of_rows, panel, registers, depth, k == 0, to, width,
                                  row == top ? next : Ahead{});
                    for (long i = 0; last && i < count_of_rows; i++)
                        finish(layers[which], which, row + i, column, registers, to + i * width);
                }
            }
        }
    }
}

}  // namespace
