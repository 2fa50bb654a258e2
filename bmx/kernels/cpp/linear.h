// Linear layers of one input: weights are packed into panels, block after block of columns, and multiplied.

#pragma once

#include <numeric>
#include <type_traits>
#include <utility>

#include "products.h"

namespace {

// Rows of so many words that weights are packed for: they stay in the second cache.
inline long band_of(long words) {
    const long fit = static_cast<long>(CACHED_BYTES / sizeof(word)) / words;
    return std::max(LEAST_BAND, fit / ROWS * ROWS);
}

// Whether left-hand sides are copied to be multiplied: processors multiply other numbers than those that are given.
template <class Kind, class Source>
constexpr bool COPIES = sizeof(typename Kind::number) != sizeof(Source);

// The working memory of a thread in `multiply`: a panel of weights, sums, and a band of the left-hand side, in words.
struct ThreadWork {
    size_t panel, sums, copy;
    ThreadWork(long rows, long words, bool copies)
        : panel(std::min(words, DEPTH) * SIDE),
          sums(std::min(rows, words > DEPTH ? band_of(words) : CACHED_ROWS) * SIDE),
          copy(copies ? std::min(rows, band_of(words)) * words : 0) {}
    size_t bytes() const { return Work::bytes<word>(panel) + Work::bytes<word>(sums) + Work::bytes<word>(copy); }
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

// Blocks of SIDE columns of some layers of one input, one layer after another. Of paired layers, each block of the
// first is followed by the same block of the second.
struct Blocks {
    const Layer* layers;
    int count;
    bool paired;

    static long of(const Layer& layer) { return (layer.columns + SIDE - 1) / SIDE; }
    long all() const {
        return std::accumulate(layers, layers + count, 0L, [](long sum, const Layer& one) { return sum + of(one); });
    }
    // The layer and the first column of a block.
    std::pair<int, long> find(long block) const {
        if (paired) return {static_cast<int>(block % 2), block / 2 * SIDE};
        int which = 0;
        for (; block >= of(layers[which]); which++) block -= of(layers[which]);
        return {which, block * SIDE};
    }
};

// What one thread computes of a product: rows top .. bottom in the blocks begin .. end. Threads divide the rows if
// there are many, else the blocks; paired blocks stay together.
struct Share {
    long top, bottom, begin, end;
    Share(long rows, long blocks, long step) {
        const int threads = omp_get_num_threads(), me = omp_get_thread_num();
        int down = 1;
        for (int d = 1; d <= threads; d++)
            if (threads % d == 0 && rows >= d * MANY_ROWS) down = d;
        const int across = threads / down, mine = me % across;
        const long tall = (rows + ROWS * down - 1) / (ROWS * down) * ROWS;
        top = std::min(rows, (me / across) * tall), bottom = std::min(rows, top + tall);
        begin = blocks / step * mine / across * step, end = blocks / step * (mine + 1) / across * step;
    }
};

// The words of a band of the left-hand side: in place, or copied.
template <class Kind, class Source>
const word* words_of(const Source* band, long count, word* copy) {
    if constexpr (!COPIES<Kind, Source>) return reinterpret_cast<const word*>(band);
    copy_numbers(band, count, reinterpret_cast<typename Kind::number*>(copy));
    return copy;
}

// x[rows][inner] times the weights [columns][inner] of some layers; each row of a block of columns is handed to
// `finish(layer, which, row, column, registers, sums)`.
template <class Kind, class Source, class Finish>
void multiply(const Source* x, const Blocks& blocks, long rows, long inner, Work work, const Finish& finish) {
    const long words = inner / Kind::PARTS, band = band_of(words), all = blocks.all();
    const ThreadWork size(rows, words, COPIES<Kind, Source>);
    const auto weights = [&](const std::pair<int, long>& at) {
        return static_cast<const Source*>(blocks.layers[at.first].weight) + at.second * inner;
    };
#pragma omp parallel
    {
        Work own{work.at + omp_get_thread_num() * size.bytes()};
        word* panel = own.take<word>(size.panel);
        word* sums = own.take<word>(size.sums);
        word* copy = own.take<word>(size.copy);
        const Share share(rows, all, blocks.paired ? 2 : 1);
        const auto multiply_block = [&](long block, const word* left, long first, long band_rows) {
            const auto at = blocks.find(block);
            const Layer& layer = blocks.layers[at.first];
            const int registers = static_cast<int>(std::min<long>(WIDE, (layer.columns - at.second) / LANES));
            const int width = registers * LANES;
            const Source* lines[SIDE];
            for (int i = 0; i < width; i++) lines[i] = weights(at) + i * inner;
            for (long k = 0; k < words; k += DEPTH) {
                const long depth = std::min(DEPTH, words - k);
                const bool last = k + depth == words;
                const bool more = block + 1 < share.end;
                const Source* next = !last  ? lines[0] + depth * Kind::PARTS
                                     : more ? weights(blocks.find(block + 1))
                                            : nullptr;
                const Ahead ahead{reinterpret_cast<const char*>(next), static_cast<long>(inner * sizeof(Source))};
                pack<Kind>(lines, depth, panel, width, STEP > 1 ? ahead : Ahead{});
                for (int i = 0; i < width; i++) lines[i] += depth * Kind::PARTS;
                for (long row = 0; row < band_rows; row += CACHED_ROWS) {
                    const long count = std::min(CACHED_ROWS, band_rows - row);
                    word* to = words > DEPTH ? sums + row * width : sums;
                    product<Kind>(left + row * words + k, words, count, panel, registers, depth, k == 0, to, width,
                                  STEP > 1 || row ? Ahead{} : ahead);
                    for (long i = 0; last && i < count; i++)
                        finish(layer, at.first, first + row + i, at.second, registers, to + i * width);
                }
            }
        };
        for (long row = share.top; row < share.bottom; row += band) {
            const long count = std::min(band, share.bottom - row);
            const word* left = words_of<Kind>(x + row * inner, count * inner, copy);
            for (long block = share.begin; block < share.end; block++) multiply_block(block, left, row, count);
        }
        release_tiles();
    }
}

}  // namespace
