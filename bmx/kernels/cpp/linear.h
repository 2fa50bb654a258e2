// Linear layers of one input: weights are packed into panels, block after block of columns, and multiplied.

#pragma once

#include "products.h"

namespace {

// The working memory of a thread in `multiply`: a panel of weights and sums, in words.
struct ThreadWork {
    size_t panel, sums;
    ThreadWork(long rows, long words)
        : panel(std::min(words, DEPTH) * SIDE),
          sums((words > DEPTH ? rows + ROWS : std::min(rows, CACHED_ROWS)) * SIDE) {}
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

// x[rows][inner] times the weights [columns][inner] of some layers; each row of a block of columns is handed to
// `finish(layer, row, column, registers, sums)`. Threads divide the rows if there are many, else the columns. Of paired
// layers, each block of the first is followed by the same block of the second, in the same thread.
template <class Kind, class Source, class Finish>
void multiply(const typename Kind::number* left, const Layer* layers, int count, bool paired, long rows, long inner,
              Work work, const Finish& finish) {
    const word* x = reinterpret_cast<const word*>(left);
    const long words = inner / Kind::PARTS, part = DEPTH * Kind::PARTS;
    const ThreadWork size(rows, words);
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
            const Source* weight = static_cast<const Source*>(layers[which].weight);
            const int registers = static_cast<int>(std::min<long>(WIDE, (layers[which].columns - column) / LANES));
            const int width = registers * LANES;
            for (long k = 0; k < words; k += DEPTH) {
                const long depth = std::min(DEPTH, words - k);
                const bool last = k + depth == words;
                const Source* lines[SIDE];
                for (int i = 0; i < width; i++) lines[i] = weight + (column + i) * inner + k * Kind::PARTS;
                pack<Kind>(lines, depth, panel, width);
                const Source* next = last ? static_cast<const Source*>(layers[next_which].weight) + next_column * inner
                                          : lines[0] + part;
                const Ahead ahead{reinterpret_cast<const char*>(next), static_cast<long>(inner * sizeof(Source))};
                for (long row = top; row < bottom; row += CACHED_ROWS) {
                    const long count_of_rows = std::min(CACHED_ROWS, bottom - row);
                    word* to = words > DEPTH ? sums + (row - top) * width : sums;
                    product<Kind>(x + row * words + k, words, count_of_rows, panel, registers, depth, k == 0, to, width,
                                  row == top ? ahead : Ahead{});
                    for (long i = 0; last && i < count_of_rows; i++)
                        finish(layers[which], which, row + i, column, registers, to + i * width);
                }
            }
        }
        release_tiles();
    }
}

// Bytes of a copy of `count` numbers that the processor can multiply; none if it multiplies bfloat16.
inline size_t widened_bytes(long count) {
    return sizeof(Number) == sizeof(bf16) ? 0 : Work::bytes<Number>(count);
}

// Numbers that the processor can multiply: bfloat16 in place, or a copy in working memory.
inline const bf16* multiplicable(const bf16* x, long, Work&, bf16) {
    return x;
}
inline const float* multiplicable(const bf16* x, long count, Work& work, float) {
    float* copy = work.take<float>(count);
#pragma omp parallel for
    for (long i = 0; i < count; i += LANES) store(copy + i, load_bf16(x + i));
    return copy;
}

}  // namespace
