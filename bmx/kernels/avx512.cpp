// Kernels for CPUs with AVX512-BF16 and VNNI: linear layers, attention, and what stands between them.
//
// Knows pointers and sizes only; build.py compiles this file, avx512.py checks shapes and calls it, reference.py is its
// twin in torch. All of it rests on one idea: a 32-bit word holds two bfloat16 (or four bytes), one instruction
// multiplies 16 words with 16 others and adds up. So the right-hand side of a product is first laid out as panels of
// words [inner][columns], and the left-hand side is read as it lies, one word at a time for all columns.
//
// Every row's numbers are computed in the same order whatever rows stand beside it, so that an answer does not depend
// on its batch. Threads are torch's own OpenMP threads. Every function takes memory to work in, and does nothing but
// say how many bytes it needs (instead of 0) if that is too small.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

namespace {

using bf16 = uint16_t;
using word = uint32_t;

constexpr int LANES = 16;        // 32-bit numbers of a register
constexpr int ROWS = 8;          // rows of a tile of a product
constexpr int WIDE = 3;          // registers of columns of such a tile
constexpr long DEPTH = 1024;     // words of a panel's columns: what stays in the second cache
constexpr long SHARE = 128;      // rows from which threads divide rows instead of columns
constexpr long NEAR = 256;       // rows whose sums stay in the second cache
constexpr int FEW = 4;           // heads that are multiplied with values together

inline float to_float(bf16 x) {
    const word bits = static_cast<word>(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load_bf16(const bf16* p) { return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
inline void store_bf16(bf16* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }

// Cuts pieces off the memory to work in, each on a cache line of its own.
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

// Rows of so many words -> panel [words][width]; what a row that is none (null) or words that are missing give is zero.
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

// What is to be read next: rows of so many words, of which a tile asks for three lines with every word it is done with.
struct Ahead {
    const word* rows = nullptr;
    long stride = 0;
    void ask(long k) const {
        const word* line = rows + (k % LANES) * stride + k / LANES * LANES;
        for (int j = 0; j < WIDE; j++)
            _mm_prefetch(reinterpret_cast<const char*>(line + j * LANES * stride), _MM_HINT_T1);
    }
};

// A tile of M rows x N registers: sums over words of a[row][word] and panel[word][column], onto what out holds.
template <class Kind, int M, int N, bool Asks = false>
inline void tile(const word* a, long stride, const word* panel, long words, bool begin, void* out, long width,
                 Ahead ahead = {}) {
    typename Kind::sum s[M][N];
    auto* at = static_cast<word*>(out);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) s[i][j] = begin ? Kind::zero() : Kind::load(at + i * width + j * LANES);
    for (long k = 0; k < words; k++) {
        __m512i b[N];
        for (int j = 0; j < N; j++) b[j] = _mm512_load_si512(panel + (k * N + j) * LANES);
        if (Asks) ahead.ask(k);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) s[i][j] = Kind::add(s[i][j], a[i * stride + k], b[j]);
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) Kind::store(at + i * width + j * LANES, s[i][j]);
}

template <class Kind, int N, bool Asks = false>
void some(const word* a, long stride, long rows, const word* panel, long words, bool begin, void* out, long width,
          Ahead ahead = {}) {
    switch (rows) {
        case 8: return tile<Kind, 8, N, Asks>(a, stride, panel, words, begin, out, width, ahead);
        case 7: return tile<Kind, 7, N, Asks>(a, stride, panel, words, begin, out, width, ahead);
        case 6: return tile<Kind, 6, N, Asks>(a, stride, panel, words, begin, out, width, ahead);
        case 5: return tile<Kind, 5, N, Asks>(a, stride, panel, words, begin, out, width, ahead);
        case 4: return tile<Kind, 4, N, Asks>(a, stride, panel, words, begin, out, width, ahead);
        case 3: return tile<Kind, 3, N, Asks>(a, stride, panel, words, begin, out, width, ahead);
        case 2: return tile<Kind, 2, N, Asks>(a, stride, panel, words, begin, out, width, ahead);
        case 1: return tile<Kind, 1, N, Asks>(a, stride, panel, words, begin, out, width, ahead);
    }
}

// As many tiles as there are rows; the first one asks for what comes next.
template <class Kind, int N>
void tiles(const word* a, long stride, long rows, const word* panel, long words, bool begin, void* out, long width,
           Ahead ahead = {}) {
    auto* at = static_cast<word*>(out);
    for (long i = 0; i < rows; i += ROWS) {
        const long count = std::min<long>(ROWS, rows - i);
        if (i == 0 && ahead.rows)
            some<Kind, N, true>(a, stride, count, panel, words, begin, at, width, ahead);
        else
            some<Kind, N>(a + i * stride, stride, count, panel, words, begin, at + i * width, width);
    }
}

template <class Kind>
void product(const word* a, long stride, long rows, const word* panel, int registers, long words, bool begin, void* out,
             long width, Ahead ahead) {
    if (registers == 3) return tiles<Kind, 3>(a, stride, rows, panel, words, begin, out, width, ahead);
    if (registers == 2) return tiles<Kind, 2>(a, stride, rows, panel, words, begin, out, width);
    return tiles<Kind, 1>(a, stride, rows, panel, words, begin, out, width);
}

// What a thread of `multiply` works in.
struct Tile {
    size_t panel, sums;
    Tile(long rows, long words)
        : panel(std::min(words, DEPTH) * WIDE * LANES),
          sums((words > DEPTH ? rows + ROWS : std::min(rows, NEAR)) * WIDE * LANES) {}
    size_t bytes() const { return Work::bytes<word>(panel) + Work::bytes<word>(sums); }
    long all() const { return static_cast<long>(bytes() * omp_get_max_threads()); }
};

// A linear layer: weights [columns][inner], in bytes if it has scales, and where its output begins, in columns.
struct Layer {
    const void* weight;
    const float* scales;   // [columns], of weights in bytes
    const int32_t* sums;   // [columns], of weights in bytes
    const bf16* bias;      // [columns] or null
    long columns, offset;
};

// x[rows][words] times the weights of some layers; each row of a block of columns is handed to `finish(layer, row,
// column, registers, sums)`. Threads divide rows if there are many, else columns. Of paired layers each block of the
// first is followed by the same of the second, by the same thread.
template <class Kind, class Finish>
void multiply(const void* left, const Layer* layers, int count, bool paired, long rows, long words, Work work,
              const Finish& finish) {
    const word* x = static_cast<const word*>(left);
    const Tile size(rows, words);
    constexpr long SIDE = WIDE * LANES;
    long blocks = 0;
    for (int i = 0; i < count; i++) blocks += (layers[i].columns + SIDE - 1) / SIDE;
    const auto locate = [=](long block, int& which, long& column) {
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
            if (threads % d == 0 && rows >= d * SHARE) down = d;
        const int across = threads / down, mine = me % across;
        const long tall = (rows + ROWS * down - 1) / (ROWS * down) * ROWS;
        const long top = std::min(rows, (me / across) * tall), bottom = std::min(rows, top + tall);
        const long step = paired ? 2 : 1, stop = blocks / step * (mine + 1) / across * step;
        for (long block = blocks / step * mine / across * step; block < stop && bottom > top; block++) {
            int which, following;
            long column, there;
            locate(block, which, column);
            locate(block + 1 < stop ? block + 1 : block, following, there);
            const word* w = static_cast<const word*>(layers[which].weight);
            const int registers = static_cast<int>(std::min<long>(WIDE, (layers[which].columns - column) / LANES));
            const int width = registers * LANES;
            for (long k = 0; k < words; k += DEPTH) {
                const long depth = std::min(DEPTH, words - k);
                const bool last = k + depth == words;
                const word* lines[SIDE];
                for (int i = 0; i < width; i++) lines[i] = w + (column + i) * words + k;
                pack(lines, depth, panel, width);
                const word* then = static_cast<const word*>(layers[following].weight) + there * words;
                const Ahead next{last ? then : w + column * words + k + depth, words};
                for (long row = top; row < bottom; row += NEAR) {
                    const long some = std::min(NEAR, bottom - row);
                    word* to = words > DEPTH ? sums + (row - top) * width : sums;
                    product<Kind>(x + row * words + k, words, some, panel, registers, depth, k == 0, to, width,
                                  row == top ? next : Ahead{});
                    for (long i = 0; last && i < some; i++)
                        finish(layers[which], which, row + i, column, registers, to + i * width);
                }
            }
        }
    }
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

// Which of 16 keys from `at` on a query sees: those before `limit` that are not hidden.
inline __mmask16 seen(long at, long limit, const uint8_t* hidden) {
    const long left = std::min<long>(LANES, limit - at);
    const __mmask16 mask = left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
    if (!hidden) return mask;
    const __m128i flags = _mm_maskz_loadu_epi8(mask, hidden + at);
    return _mm_mask_cmpeq_epi8_mask(mask, flags, _mm_setzero_si128());
}

// A row's scores -> weights that are not yet divided by their sum, zero up to `width`; returns one over the sum. All
// that is not seen counts nothing; the sink's logit, if there is one, is only part of the sum.
float soften(const float* scores, bf16* weights, long width, long limit, const uint8_t* hidden, float scale,
             const float* sink) {
    const __m512 low = _mm512_set1_ps(-INFINITY);
    __m512 most = low;
    for (long i = 0; i < limit; i += LANES)
        most = _mm512_mask_max_ps(most, seen(i, limit, hidden), most, _mm512_load_ps(scores + i));
    float top = _mm512_reduce_max_ps(most) * scale;
    if (sink) top = std::max(top, *sink);
    const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_set1_ps(top);
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < width; i += LANES) {
        const __mmask16 mask = seen(i, limit, hidden);
        const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + i), factor, offset);
        const __m512 e = mask ? _mm512_maskz_mov_ps(mask, exponential(x)) : _mm512_setzero_ps();
        sum = _mm512_add_ps(sum, e);
        store_bf16(weights + i, e);
    }
    float total = _mm512_reduce_add_ps(sum);
    if (sink) total += std::exp(*sink - top);
    return 1.0f / total;
}

// 16 registers -> a register of the sum of each.
inline __m512 sums_of(__m512 r[16]) {
    for (int i = 0; i < 8; i++) {
        const __m512 a = r[i], b = r[i + 8];
        const __m512 low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xee);
        r[i] = _mm512_add_ps(low, high);  // a's four sums of pairs of lanes in the lower half, b's in the upper
    }
    for (int i = 0; i < 4; i++) {
        const __m512 low = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        r[i] = _mm512_add_ps(low, _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd));  // i, i + 8, i + 4, i + 12
    }
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    const __m512 low = _mm512_shuffle_ps(a, b, 0x44), high = _mm512_shuffle_ps(a, b, 0xee);
    return _mm512_shuffle_f32x4(_mm512_add_ps(low, high), _mm512_add_ps(low, high), 0xd8);  // lanes 0, 8, 4, 12
}

// Rows of bfloat16 -> bytes around 128, and a scale each.
void quantise(const bf16* x, uint8_t* codes, float* scales, long rows, long inner) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const bf16* from = x + row * inner;
        __m512 most = _mm512_setzero_ps();
        for (long k = 0; k < inner; k += LANES) most = _mm512_max_ps(most, _mm512_abs_ps(load_bf16(from + k)));
        const float scale = std::max(_mm512_reduce_max_ps(most), 1e-30f) / 127.0f;
        const __m512 factor = _mm512_set1_ps(1.0f / scale);
        scales[row] = scale;
        for (long k = 0; k < inner; k += LANES) {
            const __m512i near = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(from + k), factor));
            const __m512i code = _mm512_add_epi32(near, _mm512_set1_epi32(128));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + row * inner + k), _mm512_cvtusepi32_epi8(code));
        }
    }
}

struct Rows {  // bfloat16 vectors by row and head: where the first lies, and the steps between them
    const bf16* data;
    long row, head;
    const bf16* at(long r, long h) const { return data + r * row + h * head; }
};

// A number through bfloat16: what a model's own operators would have handed on.
inline __m512 rounded(__m512 x) { return wide(narrow(x)); }

// Where a product's sums go: rounded to bfloat16 with the bias, and times the SiLU of what is at the same place of the
// gate, if there is one.
inline void put(bf16* y, long at, long column, __m512 v, const bf16* bias, const bf16* gate) {
    if (bias) v = _mm512_add_ps(v, load_bf16(bias + column));
    if (gate) {
        const __m512 g = load_bf16(gate + at), one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
        const __m512 e = exponential(_mm512_sub_ps(zero, _mm512_abs_ps(g)));  // no power of e can overflow
        const __mmask16 negative = _mm512_cmp_ps_mask(g, zero, _CMP_LT_OQ);
        const __m512 share = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e));
        v = _mm512_mul_ps(rounded(_mm512_mul_ps(g, share)), rounded(v));
    }
    store_bf16(y + at, v);
}

// Keys and values that will be wanted: asked for little by little, so that memory and arithmetic work side by side.
struct Stream {
    const bf16 *key = nullptr, *value = nullptr;
    long keys = 0, values = 0;  // numbers left of each
    void ask(long lines) {
        for (; lines > 0 && keys > 0; lines--, key += 2 * LANES, keys -= 2 * LANES)
            _mm_prefetch(reinterpret_cast<const char*>(key), _MM_HINT_T1);
        for (; lines > 0 && values > 0; lines--, value += 2 * LANES, values -= 2 * LANES)
            _mm_prefetch(reinterpret_cast<const char*>(value), _MM_HINT_T1);
    }
};

// What a decoding token of one slot and kv head works with.
struct Slot {
    const bf16 *query, *key, *value;  // [group][dim], [rows][dim], [rows][breadth]
    long rows, group, dim, breadth;
    const uint8_t* hidden;  // [rows] or null
    const float* sinks;     // [group] or null
    float *scores, *over;   // [rows], and [group]: one over the sums of weights
    bf16* weights;          // [group][full]
    Stream next;            // what will be wanted after this
    long full() const { return (rows + LANES - 1) / LANES * LANES; }

    static size_t bytes(long rows, long group) {
        const long full = (rows + LANES - 1) / LANES * LANES;
        return Work::bytes<float>(full) + Work::bytes<float>(group) + Work::bytes<bf16>(group * full) +
               Work::bytes<uint8_t>(full);
    }
    uint8_t* take(Work own) {  // returns room for [rows] flags
        scores = own.take<float>(full());
        over = own.take<float>(group);
        weights = own.take<bf16>(group * full());
        return own.take<uint8_t>(full());
    }
    // The mean over the group of the probabilities of 16 keys from `at` on.
    __m512 mean(long at) const {
        __m512 sum = _mm512_setzero_ps();
        for (long g = 0; g < group; g++) {
            const __m512 factor = _mm512_set1_ps(over[g] / static_cast<float>(group));
            sum = _mm512_fmadd_ps(factor, load_bf16(weights + g * full() + at), sum);
        }
        return sum;
    }
    void attend(float scale, bf16* out);
};

void Slot::attend(float scale, bf16* out) {
    const long width = full(), lines = (next.keys + next.values) / (2 * LANES);
    const long in_scores = 2 * lines * LANES / (3 * group * width) + 1;  // two thirds of the time goes there
    const long in_values = 4 * LANES * lines / (3 * width * breadth * ((group + FEW - 1) / FEW)) + 1;
    for (long g = 0; g < group; g++) {
        for (long i = 0; i < rows; i += LANES) {
            next.ask(in_scores);
            __m512 r[16];
            for (long j = 0; j < LANES; j++) {
                r[j] = _mm512_setzero_ps();
                const bf16* row = key + std::min(i + j, rows - 1) * dim;
                for (long d = 0; d < dim; d += 2 * LANES)
                    r[j] = _mm512_dpbf16_ps(r[j], reinterpret_cast<__m512bh>(_mm512_loadu_si512(query + g * dim + d)),
                                            reinterpret_cast<__m512bh>(_mm512_loadu_si512(row + d)));
            }
            _mm512_store_ps(scores + i, sums_of(r));
        }
        over[g] = soften(scores, weights + g * width, width, rows, hidden, scale, sinks ? sinks + g : nullptr);
    }
    // Two rows of values are woven into words, their first four columns of every eight, then the others.
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (long e = 0; e < breadth; e += 2 * LANES) {
        for (long g = 0; g < group; g += FEW) {
            const long count = std::min<long>(FEW, group - g);
            __m512 low[FEW], high[FEW];
            for (long r = 0; r < FEW; r++) low[r] = high[r] = _mm512_setzero_ps();
            for (long i = 0; i < rows; i += 2) {
                next.ask(in_values);
                const __m512i a = _mm512_loadu_si512(value + i * breadth + e);
                const __m512i b = i + 1 < rows ? _mm512_loadu_si512(value + (i + 1) * breadth + e)
                                               : _mm512_setzero_si512();
                const __m512i x = _mm512_unpacklo_epi16(a, b), y = _mm512_unpackhi_epi16(a, b);
                for (long r = 0; r < count; r++) {
                    word pair;
                    std::memcpy(&pair, weights + (g + r) * width + i, 4);
                    low[r] = Halves::add(low[r], pair, x);
                    high[r] = Halves::add(high[r], pair, y);
                }
            }
            for (long r = 0; r < count; r++) {
                bf16* to = out + (g + r) * breadth + e;
                const __m512 factor = _mm512_set1_ps(over[g + r]);
                store_bf16(to, _mm512_mul_ps(factor, _mm512_permutex2var_ps(low[r], first, high[r])));
                store_bf16(to + LANES, _mm512_mul_ps(factor, _mm512_permutex2var_ps(low[r], second, high[r])));
            }
        }
    }
}

enum Rank { BY_AGE, BY_MASS, BY_AVERAGE };  // the lowest goes: the oldest, the least attended to, in all or a query

struct Ranking {
    int rank, sink, recent, window;  // window 0 for none

    // Scores of 16 pairs: infinite for sink and recent tokens, minus that for what no later query can see or is no
    // number.
    __m512 score(__m512i position, __m512 mass, int now) const {
        __m512 score = rank == BY_AGE ? _mm512_cvtepi32_ps(position) : mass;
        if (rank == BY_AVERAGE) {
            __m512i age = _mm512_max_epi32(_mm512_sub_epi32(_mm512_set1_epi32(now), position), _mm512_set1_epi32(1));
            if (window) age = _mm512_min_epi32(age, _mm512_set1_epi32(window));
            score = _mm512_div_ps(score, _mm512_cvtepi32_ps(age));
        }
        const __mmask16 kept = _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32(sink)) |
                               _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32(now - recent));
        score = _mm512_mask_mov_ps(score, kept, _mm512_set1_ps(INFINITY));
        __mmask16 gone = _mm512_cmplt_epi32_mask(position, _mm512_setzero_si512());
        if (window) gone |= _mm512_cmple_epi32_mask(position, _mm512_set1_epi32(now - window));
        score = _mm512_mask_mov_ps(score, gone, _mm512_set1_ps(-INFINITY));
        return _mm512_max_ps(score, _mm512_set1_ps(-INFINITY));
    }
};

// The row that a full slot gives up: the lowest-ranked.
long victim(const Ranking& ranking, const int32_t* positions, const float* mass, long rows, int now) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 least = _mm512_set1_ps(INFINITY);
    __m512i where = lanes;
    for (long i = 0; i < rows; i += LANES) {
        const __mmask16 some = seen(i, rows, nullptr);
        const __m512i position = _mm512_maskz_loadu_epi32(some, positions + i);
        const __m512 received = mass ? _mm512_maskz_loadu_ps(some, mass + i) : _mm512_setzero_ps();
        const __m512 score = ranking.score(position, received, now);
        const __mmask16 lower = _mm512_mask_cmp_ps_mask(some, score, least, _CMP_LT_OQ);
        least = _mm512_mask_mov_ps(least, lower, score);
        where = _mm512_mask_add_epi32(where, lower, lanes, _mm512_set1_epi32(static_cast<int>(i)));
    }
    const __mmask16 lowest = _mm512_cmp_ps_mask(least, _mm512_set1_ps(_mm512_reduce_min_ps(least)), _CMP_EQ_OQ);
    return _mm512_mask_reduce_min_epi32(lowest, where);
}

}  // namespace

extern "C" {

// What some linear layers, all in bytes or none, make of x[rows][inner]: one after the other in y, each [rows][columns].
// If gated there are two of a size, and y is the SiLU of the first one's output times the second's. x is rounded to
// bytes row by row where weights are bytes; all else is bfloat16.
long bmx_linear(const bf16* x, const Layer* layers, int count, int gated, bf16* y, long rows, long inner, char* work,
                long size) {
    const bool bytes = layers[0].scales;
    const size_t coded = bytes ? Work::bytes<uint8_t>(rows * inner) + Work::bytes<float>(rows) : 0;
    const long words = inner / (bytes ? 4 : 2), needed = Tile(rows, words).all() + static_cast<long>(coded);
    if (size < needed) return needed;
    Work left{work};
    const auto at = [=](const Layer& layer, int which, long row, long column) {
        return (gated && which ? 0 : rows * layer.offset) + row * layer.columns + column;
    };
    if (!bytes) {
        const auto finish = [=](const Layer& layer, int which, long row, long column, int registers, const word* sums) {
            for (int j = 0; j < registers; j++, column += LANES)
                put(y, at(layer, which, row, column), column, _mm512_load_ps(sums + j * LANES), layer.bias,
                    gated && which ? y : nullptr);
        };
        multiply<Halves>(x, layers, count, gated, rows, words, left, finish);
        return 0;
    }
    uint8_t* codes = left.take<uint8_t>(rows * inner);
    float* steps = left.take<float>(rows);
    quantise(x, codes, steps, rows, inner);
    const auto finish = [=](const Layer& layer, int which, long row, long column, int registers, const word* sums) {
        const __m512 step = _mm512_set1_ps(steps[row]);
        for (int j = 0; j < registers; j++, column += LANES) {
            const __m512i off = _mm512_slli_epi32(_mm512_loadu_si512(layer.sums + column), 7);  // 128 times the weights
            const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + j * LANES), off);
            const __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), step),
                                           _mm512_loadu_ps(layer.scales + column));
            put(y, at(layer, which, row, column), column, v, layer.bias, gated && which ? y : nullptr);
        }
    };
    multiply<Bytes>(codes, layers, count, gated, rows, words, left, finish);
    return 0;
}

// y[rows][inner] = x / root of (mean of squares + epsilon), rounded, times weight[inner].
void bmx_rms_norm(const bf16* x, const bf16* weight, bf16* y, float epsilon, long rows, long inner) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const bf16* from = x + row * inner;
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < inner; i += LANES) {
            const __m512 v = load_bf16(from + i);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(inner);
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
        for (long i = 0; i < inner; i += LANES) {
            const __m512 v = rounded(_mm512_mul_ps(load_bf16(from + i), factor));
            store_bf16(y + row * inner + i, _mm512_mul_ps(v, load_bf16(weight + i)));
        }
    }
}

// y[tokens][heads][dim] = x turned by its position: x cos + (-second half, first half) sin, each rounded as it comes.
// x by strides (token, head); cos and sin [tokens][dim].
void bmx_rotate(const bf16* x, long token, long head, const bf16* cos, const bf16* sin, bf16* y, long tokens, long heads,
                long dim) {
    const long half = dim / 2;
#pragma omp parallel for
    for (long t = 0; t < tokens; t++) {
        for (long h = 0; h < heads; h++) {
            const bf16* from = x + t * token + h * head;
            bf16* to = y + (t * heads + h) * dim;
            for (long d = 0; d < half; d += LANES) {
                const __m512 a = load_bf16(from + d), b = load_bf16(from + half + d);
                const auto turn = [=](__m512 straight, __m512 across, long at) {
                    return _mm512_add_ps(rounded(_mm512_mul_ps(straight, load_bf16(cos + t * dim + at))),
                                         rounded(_mm512_mul_ps(across, load_bf16(sin + t * dim + at))));
                };
                store_bf16(to + d, turn(a, _mm512_sub_ps(_mm512_set1_ps(-0.0f), b), d));
                store_bf16(to + half + d, turn(b, a, half + d));
            }
        }
    }
}

// A chunk of prompt tokens attends to a slot's rows and to itself: see reference.py.
//
// q [tokens][heads][dim], k [tokens][kv_heads][dim], v [tokens][kv_heads][breadth]; past_k [kv_heads][past][dim] and
// past_v, each as a pointer and two strides (row, head); hidden [kv_heads][tokens][past + tokens] or null; sinks
// [heads] or null; votes [ways][tokens]; out [tokens][heads][breadth]; sums [ways][kv_heads][past + tokens], zero.
long bmx_attend_chunk(const Rows* views, long tokens, long heads, long kv_heads, long past, long dim, long breadth,
                      float scale, const uint8_t* hidden, const float* sinks, const float* votes, long ways, bf16* out,
                      float* sums, char* work, long size) {
    const Rows q = views[0], k = views[1], v = views[2], past_k = views[3], past_v = views[4];
    const long group = heads / kv_heads, total = past + tokens, block = WIDE * LANES;
    const long blocks = (total + block - 1) / block, full = blocks * block, words = dim / 2;
    const long pairs = full / 2, halves = breadth / (2 * LANES);
    const long tiles_of_head = (tokens * group + ROWS - 1) / ROWS, most = omp_get_max_threads();
    const size_t panel = static_cast<size_t>(kv_heads) * full * words, other = kv_heads * full * (breadth / 2);
    const size_t seen_by_one = static_cast<size_t>(ways) * kv_heads * full;
    const size_t each = ROWS * (full + full / 2 + breadth + words);
    const size_t needed = Work::bytes<word>(panel) + Work::bytes<word>(other) +
                          most * (Work::bytes<float>(seen_by_one) + Work::bytes<float>(each));
    if (static_cast<size_t>(size) < needed) return static_cast<long>(needed);
    Work left{work};
    word *key_panels = left.take<word>(panel), *value_panels = left.take<word>(other);
    float* parts = left.take<float>(most * seen_by_one);
    float* tile = left.take<float>(most * each);
#pragma omp parallel
    {
        const int threads = omp_get_num_threads(), me = omp_get_thread_num();
        float* mine = parts + me * seen_by_one;
        std::memset(mine, 0, seen_by_one * sizeof(float));
        auto key = [&](long i, long h) { return i < past ? past_k.at(i, h) : i < total ? k.at(i - past, h) : nullptr; };
        auto value = [&](long i, long h) { return i < past ? past_v.at(i, h) : i < total ? v.at(i - past, h) : nullptr; };
        for (long task = me; task < kv_heads * blocks; task += threads) {
            const long head = task / blocks, first = task % blocks * block;
            const word* lines[WIDE * LANES];
            for (long i = 0; i < block; i++) lines[i] = reinterpret_cast<const word*>(key(first + i, head));
            pack(lines, words, key_panels + (head * full + first) * words, static_cast<int>(block));
            for (long i = first; i < first + block; i += 2) {
                const bf16 *a = value(i, head), *b = value(i + 1, head);
                for (long e = 0; e < breadth; e += LANES) {
                    auto half = [&](const bf16* p) {
                        return p ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + e)))
                                 : _mm512_setzero_si512();
                    };
                    word* to = value_panels + ((head * halves + e / (2 * LANES)) * pairs + i / 2) * 2 * LANES;
                    _mm512_store_si512(to + e % (2 * LANES), _mm512_or_si512(half(a), _mm512_slli_epi32(half(b), 16)));
                }
            }
        }
#pragma omp barrier
        float* scores = tile + me * each;
        bf16* weights = reinterpret_cast<bf16*>(scores + ROWS * full);
        float* answer = scores + ROWS * (full + full / 2);
        word* asked = reinterpret_cast<word*>(answer + ROWS * breadth);
        for (long task = me; task < kv_heads * tiles_of_head; task += threads) {
            const long head = task % kv_heads, first = task / kv_heads * ROWS;
            const long rows = std::min<long>(ROWS, tokens * group - first);
            const long width = past + (first + rows - 1) / group + 1, reach = (width + block - 1) / block * block;
            for (long r = 0; r < rows; r++) {
                const long token = (first + r) / group, which = head * group + (first + r) % group;
                std::memcpy(asked + r * words, q.at(token, which), dim * sizeof(bf16));
            }
            for (long b = 0; b < reach; b += block)
                tiles<Halves, WIDE>(asked, words, rows, key_panels + (head * full + b) * words, words, true, scores + b,
                                    full);
            float over[ROWS];
            for (long r = 0; r < rows; r++) {
                const long token = (first + r) / group, which = head * group + (first + r) % group;
                const uint8_t* mask = hidden ? hidden + (head * tokens + token) * total : nullptr;
                over[r] = soften(scores + r * full, weights + r * full, reach, past + token + 1, mask, scale,
                                 sinks ? sinks + which : nullptr);
            }
            for (long h = 0; h < halves; h++)
                tiles<Halves, 2>(reinterpret_cast<const word*>(weights), full / 2, rows,
                                 value_panels + (head * halves + h) * pairs * 2 * LANES, (width + 1) / 2, true,
                                 answer + h * 2 * LANES, breadth);
            for (long r = 0; r < rows; r++) {
                const long token = (first + r) / group, which = head * group + (first + r) % group;
                for (long e = 0; e < breadth; e += LANES)
                    store_bf16(out + (token * heads + which) * breadth + e,
                               _mm512_mul_ps(_mm512_load_ps(answer + r * breadth + e), _mm512_set1_ps(over[r])));
            }
            for (long way = 0; way < ways; way++) {
                __m512 weight[ROWS];
                bool any = false;
                for (long r = 0; r < ROWS; r++) {
                    const float vote = r < rows ? votes[way * tokens + (first + r) / group] : 0.0f;
                    weight[r] = _mm512_set1_ps(vote == 0.0f ? 0.0f : vote * over[r] / static_cast<float>(group));
                    any = any || vote != 0.0f;
                }
                float* to = mine + (way * kv_heads + head) * full;
                for (long i = 0; any && i < reach; i += LANES) {
                    __m512 sum = _mm512_load_ps(to + i);
                    for (long r = 0; r < rows; r++)
                        sum = _mm512_fmadd_ps(weight[r], load_bf16(weights + r * full + i), sum);
                    _mm512_store_ps(to + i, sum);
                }
            }
        }
#pragma omp barrier
        for (long line = me; line < ways * kv_heads; line += threads)
            for (int t = 0; t < threads; t++)
                for (long i = 0; i < total; i++) sums[line * total + i] += parts[t * seen_by_one + line * full + i];
    }
    return 0;
}

// A decoding token of each of some slots attends to its slot: see reference.py.
//
// q [batch][heads][dim] as it lies; keys and values [slots][kv_heads][capacity][dim or breadth] as they lie; slots
// [batch], or null for 0, 1, ...; hidden bool by two strides (batch, head), or null; out [batch][heads][breadth]; mass
// [batch][kv_heads][capacity] or null.
long bmx_attend_slots(const bf16* q, const bf16* keys, const bf16* values, const int64_t* slots, long batch, long heads,
                      long kv_heads, long capacity, long dim, long breadth, float scale, const uint8_t* hidden,
                      long hidden_batch, long hidden_head, const float* sinks, bf16* out, float* mass, char* work,
                      long size) {
    const long group = heads / kv_heads;
    const size_t each = Slot::bytes(capacity, group);
    const long needed = static_cast<long>(each * omp_get_max_threads());
    if (size < needed) return needed;
#pragma omp parallel for schedule(static, 1)
    for (long task = 0; task < batch * kv_heads; task++) {
        const long one = task / kv_heads, head = task % kv_heads, first = one * heads + head * group;
        const long place = ((slots ? slots[one] : one) * kv_heads + head) * capacity;
        Slot slot{q + first * dim, keys + place * dim, values + place * breadth, capacity, group, dim, breadth};
        slot.take(Work{work + omp_get_thread_num() * each});
        slot.hidden = hidden ? hidden + one * hidden_batch + head * hidden_head : nullptr;
        slot.sinks = sinks ? sinks + head * group : nullptr;
        slot.attend(scale, out + first * breadth);
        for (long i = 0; mass && i < capacity; i += LANES)
            _mm512_mask_storeu_ps(mass + task * capacity + i, seen(i, capacity, nullptr), slot.mean(i));
    }
    return 0;
}

// What follows a chunk's attention in one slot of a layer: what its queries saw is added to the mass, and the best
// `limit` pairs stay; survivors of the chunk take the rows of those that go, in order.
//
// k and v [tokens][kv_heads][dim or breadth] by strides in `views`; keys, values, positions, mass [kv_heads][capacity]
// ... of this slot, `used` rows of them in use; start: the position of the first token; sums [kv_heads][used + tokens]
// or null; mass or null.
long bmx_compress(const Rows* views, bf16* keys, bf16* values, int32_t* positions, float* mass, const float* sums,
                  long tokens, long kv_heads, long capacity, long limit, long used, long start, long dim, long breadth,
                  float old, Ranking ranking, char* work, long size) {
    const Rows k = views[0], v = views[1];
    const long total = used + tokens, full = (total + LANES - 1) / LANES * LANES;
    const size_t each = 2 * Work::bytes<float>(full) + Work::bytes<int32_t>(full) + Work::bytes<float>(full);
    const long needed = static_cast<long>(each) * kv_heads;
    if (size < needed) return needed;
#pragma omp parallel for schedule(static, 1)
    for (long head = 0; head < kv_heads; head++) {
        Work own{work + head * each};
        float *scores = own.take<float>(full), *order = own.take<float>(full), *received = own.take<float>(full);
        int32_t* lies = own.take<int32_t>(full);
        int32_t* at = positions + head * capacity;
        float* sum = mass ? mass + head * capacity : nullptr;
        const float* more = sums ? sums + head * total : nullptr;
        for (long i = 0; i < total; i++) {
            const float before = i < used && sum ? sum[i] : 0.0f;
            received[i] = more ? (i < used ? before * old : 0.0f) + more[i] : before;
            lies[i] = i < used ? at[i] : static_cast<int32_t>(start + i - used);
        }
        for (long i = 0; sum && i < used; i++) sum[i] = received[i];
        const auto put = [&](long row, long i) {
            const long place = head * capacity + row;
            std::memcpy(keys + place * dim, k.at(i - used, head), dim * sizeof(bf16));
            std::memcpy(values + place * breadth, v.at(i - used, head), breadth * sizeof(bf16));
            at[row] = lies[i];
            if (sum) sum[row] = received[i];
        };
        if (total <= limit) {
            for (long i = used; i < total; i++) put(i, i);
            continue;
        }
        const int now = static_cast<int>(start + tokens);
        for (long i = 0; i < total; i += LANES)
            _mm512_store_ps(scores + i, ranking.score(_mm512_load_si512(lies + i), _mm512_load_ps(received + i), now));
        std::copy(scores, scores + total, order);
        std::nth_element(order, order + limit - 1, order + total, std::greater<float>());
        const float least = order[limit - 1];
        long alike = limit - std::count_if(scores, scores + total, [=](float s) { return s > least; });
        const auto stays = [&](long i) { return scores[i] > least || (scores[i] == least && alike-- > 0); };
        long row = 0;
        for (long i = 0; i < used; i++) order[i] = stays(i) ? 1.0f : 0.0f;
        for (long i = used; i < total; i++) {
            if (!stays(i)) continue;
            while (row < used && order[row] != 0.0f) row++;
            put(row++, i);
        }
    }
    return 0;
}

// A whole decoding step of a layer: each token takes the next empty row of its slot or the lowest-ranked one's, attends
// to the slot, and what it attended to is added up. As bmx_attend_slots; k and v [batch][kv_heads][dim or breadth] and
// q by strides (batch, head) in `views`; positions [slots][kv_heads][capacity]; now [batch], the tokens' positions;
// limits [batch], rows that each may use, or null for all; mass as positions, faded by `old` before, or null where
// nothing is added up; window 0 for none.
long bmx_decode(const Rows* views, bf16* keys, bf16* values, int32_t* positions, float* mass, const int64_t* slots,
                const int64_t* now, const int64_t* limits, long batch, long heads, long kv_heads, long capacity,
                long dim, long breadth, float scale, float old, int count, Ranking ranking, const float* sinks, bf16* out, char* work, long size) {
    const Rows q = views[0], k = views[1], v = views[2];
    const long group = heads / kv_heads;
    const size_t asked = Work::bytes<bf16>(group * dim), each = Slot::bytes(capacity, group) + asked;
    const long needed = static_cast<long>(each * omp_get_max_threads());
    if (size < needed) return needed;
#pragma omp parallel for schedule(static, 1)
    for (long task = 0; task < batch * kv_heads; task++) {
        const long one = task / kv_heads, head = task % kv_heads;
        const long place = (slots[one] * kv_heads + head) * capacity, most = limits ? limits[one] : capacity;
        const long limit = std::min(most, capacity), position = now[one];
        int32_t* lies = positions + place;
        float* sum = mass ? mass + place : nullptr;
        const long row = position < limit ? position
                                          : victim(ranking, lies, sum, limit, static_cast<int>(position));
        std::memcpy(keys + (place + row) * dim, k.at(one, head), dim * sizeof(bf16));
        std::memcpy(values + (place + row) * breadth, v.at(one, head), breadth * sizeof(bf16));
        lies[row] = static_cast<int32_t>(position);
        if (sum) sum[row] = 0.0f;
        Work own{work + omp_get_thread_num() * each};
        bf16* query = own.take<bf16>(group * dim);
        for (long g = 0; g < group; g++) std::memcpy(query + g * dim, q.at(one, head * group + g), dim * sizeof(bf16));
        Slot slot{query, keys + place * dim, values + place * breadth, std::min(position + 1, limit), group, dim, breadth};
        uint8_t* flags = slot.take(own);
        for (long i = 0; ranking.window && i < slot.rows; i++) flags[i] = lies[i] <= position - ranking.window;
        slot.hidden = ranking.window ? flags : nullptr;
        const long after = task + omp_get_num_threads();  // the next task of this thread
        if (after < batch * kv_heads) {
            const long there = (slots[after / kv_heads] * kv_heads + after % kv_heads) * capacity;
            const long filled = std::min(now[after / kv_heads], capacity);
            slot.next = Stream{keys + there * dim, values + there * breadth, filled * dim, filled * breadth};
        }
        slot.sinks = sinks ? sinks + head * group : nullptr;
        slot.attend(scale, out + (one * heads + head * group) * breadth);
        for (long i = 0; sum && count && i < slot.rows; i += LANES) {
            const __mmask16 some = seen(i, slot.rows, nullptr);
            const __m512 before = _mm512_maskz_loadu_ps(some, sum + i);
            _mm512_mask_storeu_ps(sum + i, some, _mm512_fmadd_ps(before, _mm512_set1_ps(old), slot.mean(i)));
        }
    }
    return 0;
}

}  // extern "C"
