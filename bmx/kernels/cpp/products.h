// Products of words: what linear layers and attention are made of.
//
// A 32-bit word holds two bfloat16 where the processor multiplies them, else one float; of integers, four bytes. The
// right-hand side of a product is first packed into panels of words [inner][columns]. The left-hand side is read in
// place, one word at a time for all columns of a panel.

#pragma once

#include <omp.h>

#include "vectors.h"

namespace {

constexpr long MANY_ROWS = 128;             // rows from which threads divide rows instead of columns
constexpr long CACHED_ROWS = 96;            // rows whose sums stay in the first cache
constexpr size_t CACHED_BYTES = 768 << 10;  // of left-hand sides that stay in the second cache

#if defined(__AMX_TILE__)
constexpr int ROWS = 8, WIDE = 2;
constexpr long DEPTH = 1024;
constexpr long LEAST_BAND = 512;  // rows for which weights are packed: fewer would not be worth it
#elif defined(__AVX512F__)
constexpr int ROWS = 8, WIDE = 3;  // rows, and registers of columns, of a tile of a product
constexpr long DEPTH = 1024;       // words of a panel's columns: what stays in the second cache
constexpr long LEAST_BAND = 192;
#elif defined(__AVX2__)
constexpr int ROWS = 6, WIDE = 2;
constexpr long DEPTH = 384;
constexpr long LEAST_BAND = 96;
#else
constexpr int ROWS = 6, WIDE = 4;
constexpr long DEPTH = 384;
constexpr long LEAST_BAND = 96;
#endif
constexpr int SIDE = WIDE * LANES;  // columns of a tile
#ifdef __AMX_TILE__
constexpr long STEP = 16;  // words that are multiplied together
#else
constexpr long STEP = 1;
#endif

#ifdef __AVX512BF16__
struct Halves {  // words of two bfloat16, summed in float
    using number = bf16;
    using sum = Real;
    static constexpr int PARTS = 2;
    static Real add(Real s, word a, Int b) {
        return _mm512_dpbf16_ps(s, reinterpret_cast<__m512bh>(splat(static_cast<int32_t>(a))),
                                reinterpret_cast<__m512bh>(b));
    }
    static Int words(const bf16* row, long k) { return load(reinterpret_cast<const int32_t*>(row) + k); }
};
using Plain = Halves;
#else
struct Floats {  // words of one float
    using number = float;
    using sum = Real;
    static constexpr int PARTS = 1;
    static Real add(Real s, word a, Int b) {  // as `fused`; in assembly for the reason that Bytes::add is
        float x;
        std::memcpy(&x, &a, sizeof x);
#if defined(__AVX512F__)
        asm("vfmadd231ps %2, %1, %0" : "+v"(s) : "v"(splat(x)), "v"(b));
        return s;
#elif defined(__AVX2__)
        asm("vfmadd231ps %2, %1, %0" : "+x"(s) : "x"(splat(x)), "x"(b));
        return s;
#else
        return fused(splat(x), reinterpret_cast<Real>(b), s);
#endif
    }
    static Int words(const bf16* row, long k) { return reinterpret_cast<Int>(load_bf16(row + k)); }
};
using Plain = Floats;
#endif
using Number = Plain::number;  // of left-hand sides in bfloat16 or float

// Words of int8 weights and of inputs that are rounded to 256 levels, the least of them LEAST; summed in 32 bits.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_NEON)
struct Bytes {  // four bytes
    using number = uint8_t;
    using sum = Int;
    static constexpr int PARTS = 4;
#if defined(__AVX512VNNI__)
    static constexpr int LEAST = 0;
    static Int add(Int s, word a, Int b) {  // as _mm512_dpbusd_epi32, for which compilers copy and spill s
        asm("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(splat(static_cast<int32_t>(a))), "v"(b));
        return s;
    }
#elif defined(__AVXVNNI__)
    static constexpr int LEAST = 0;
    static Int add(Int s, word a, Int b) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s) : "x"(splat(static_cast<int32_t>(a))), "x"(b));
        return s;
    }
#else
    static constexpr int LEAST = -128;  // both are signed
    static Int add(Int s, word a, Int b) {
        const int8x16_t x = reinterpret_cast<int8x16_t>(splat(static_cast<int32_t>(a)));
        const int8x16_t y = reinterpret_cast<int8x16_t>(b);
#ifdef __ARM_FEATURE_DOTPROD
        return vdotq_s32(s, x, y);
#else
        const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y)), high = vmull_high_s8(x, y);
        return vaddq_s32(s, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
#endif
    static Int words(const uint8_t* row, long k) { return load(reinterpret_cast<const int32_t*>(row) + k); }
};
using Codes = Bytes;
#else
struct Shorts {  // two numbers of 16 bits: instructions for bytes would add up products in 16 bits, which overflow
    using number = int16_t;
    using sum = Int;
    static constexpr int PARTS = 2, LEAST = 0;
#ifdef __AVX512F__
    static Int add(Int s, word a, Int b) {
        const Int x = splat(static_cast<int32_t>(a));
        return s + reinterpret_cast<Int>(_mm512_madd_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(b)));
    }
    static Int words(const uint8_t* row, long k) {
        return reinterpret_cast<Int>(
            _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + PARTS * k))));
    }
#else
    static Int add(Int s, word a, Int b) {
        const Int x = splat(static_cast<int32_t>(a));
        return s + reinterpret_cast<Int>(_mm256_madd_epi16(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(b)));
    }
    static Int words(const uint8_t* row, long k) {
        return reinterpret_cast<Int>(
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + PARTS * k))));
    }
#endif
};
using Codes = Shorts;
#endif

// Rows of weights that will be packed next: the first of them, or null, and bytes from one to the next. They are
// fetched little by little while others are multiplied; by AMX, which takes too short for that, while others are
// packed.
struct Ahead {
    const char* rows = nullptr;
    long stride = 0;
    // For each word that a tile multiplies: a cache line of some rows.
    void fetch_for_word(long k) const {
        const char* line = rows + (k % LANES) * stride + k / LANES * 64;
        for (int j = 0; j < WIDE; j++) prefetch(line + j * LANES * stride);
    }
    // A cache line of LANES rows, at `offset` bytes from their beginnings.
    void fetch_line(long first, long offset) const {
        for (long i = 0; rows && i < LANES; i++) prefetch(rows + (first + i) * stride + offset);
    }
};

// Packs `width` rows of `words` words into a panel [words][width]; null rows become zeros. `Source`: what rows hold.
// Within another function, compilers would keep a part of the words in memory.
template <class Kind, class Source>
[[gnu::noinline]] void pack(const Source* const* rows, long words, word* panel, int width, Ahead ahead = {}) {
    constexpr long BYTES = Kind::PARTS * sizeof(Source);  // of a row for each word
    for (int c = 0; c < width; c += LANES) {
        for (long k = 0; k < words; k += LANES) {
            const long left = std::min<long>(LANES, words - k);
            ahead.fetch_line(c, k * BYTES);
            Int r[LANES];
            for (int i = 0; i < LANES; i++) {
                const Source* row = rows[c + i];
                if (!row) {
                    r[i] = Int{};
                } else if (left == LANES) {
                    r[i] = Kind::words(row, k);
                } else {
                    Source some[LANES * Kind::PARTS] = {};
                    std::memcpy(some, row + k * Kind::PARTS, static_cast<size_t>(left * BYTES));
                    r[i] = Kind::words(some, 0);
                }
            }
            transpose(r);
            for (int i = 0; i < left; i++) store(reinterpret_cast<int32_t*>(panel) + (k + i) * width + c, r[i]);
        }
    }
}

inline void load_sum(const word* p, Real& s) {
    s = load(reinterpret_cast<const float*>(p));
}
inline void load_sum(const word* p, Int& s) {
    s = load(reinterpret_cast<const int32_t*>(p));
}
inline void store_sum(word* p, Real s) {
    store(reinterpret_cast<float*>(p), s);
}
inline void store_sum(word* p, Int s) {
    store(reinterpret_cast<int32_t*>(p), s);
}

// A tile of M rows x N registers: out[row][column] (+)= sum over words of a[row][word] times panel[word][column].
// Within another function, compilers would keep some of its sums in memory.
template <class Kind, int M, int N, bool Prefetch>
[[gnu::noinline]] void tile(const word* a, long stride, const word* panel, long words, bool begin, word* out,
                            long width, Ahead ahead) {
    typename Kind::sum s[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            s[i][j] = typename Kind::sum{};
            if (!begin) load_sum(out + i * width + j * LANES, s[i][j]);
        }
    for (long k = 0; k < words; k++) {
        Int b[N];
        for (int j = 0; j < N; j++) b[j] = load(reinterpret_cast<const int32_t*>(panel) + (k * N + j) * LANES);
        if (Prefetch) ahead.fetch_for_word(k);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) s[i][j] = Kind::add(s[i][j], a[i * stride + k], b[j]);
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) store_sum(out + i * width + j * LANES, s[i][j]);
}

// A tile of at most M rows.
template <class Kind, int M, int N, bool Prefetch>
void tile_of_rows(const word* a, long stride, long rows, const word* panel, long words, bool begin, word* out,
                  long width, Ahead ahead) {
    if constexpr (M > 1)
        if (rows < M)
            return tile_of_rows<Kind, M - 1, N, Prefetch>(a, stride, rows, panel, words, begin, out, width, ahead);
    tile<Kind, M, N, Prefetch>(a, stride, panel, words, begin, out, width, ahead);
}

// Tiles for any number of rows; the first one fetches what is ahead.
template <class Kind, int N>
void tiles(const word* a, long stride, long rows, const word* panel, long words, bool begin, word* out, long width,
           Ahead ahead) {
    for (long i = 0; i < rows; i += ROWS) {
        const long count = std::min<long>(ROWS, rows - i);
        if (i == 0 && ahead.rows)
            tile_of_rows<Kind, ROWS, N, true>(a, stride, count, panel, words, begin, out, width, ahead);
        else
            tile_of_rows<Kind, ROWS, N, false>(a + i * stride, stride, count, panel, words, begin, out + i * width,
                                               width, {});
    }
}

}  // namespace

#ifdef __AMX_TILE__
#include "products_amx.h"
#else
inline int ask_for_tiles() {
    return 0;
}
inline void release_tiles() {}
#endif

namespace {

// a[rows][words] times a panel of `registers` registers of columns, at most N.
template <class Kind, int N = WIDE>
void product(const word* a, long stride, long rows, const word* panel, int registers, long words, bool begin, word* out,
             long width, Ahead ahead = {}) {
    if constexpr (N > 1)
        if (registers < N)
            return product<Kind, N - 1>(a, stride, rows, panel, registers, words, begin, out, width, ahead);
#ifdef __AMX_TILE__
    if (words % TILE == 0) return amx_tiles<Kind, N>(a, stride, rows, panel, words, begin, out, width);
#endif
    tiles<Kind, N>(a, stride, rows, panel, words, begin, out, width, ahead);
}

}  // namespace
