// Products by AMX, in tiles of 16 x 16 sums: see products.h for the words and panels that they are made of.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <type_traits>

namespace {

constexpr long TILE = 16;  // rows, and words, of a tile

// The kernel's permission to use tiles, for all threads that this process starts from now on; 0 if it is given.
inline int ask_for_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return static_cast<int>(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA));
}

// The tiles of this thread: 0 and 1 are sums of up to 16 rows, 2 and 3 of up to 16 more; 4 and 5 the rows' words; 6 and
// 7 words of a panel.
struct TileRows {
    long first = 0, second = 0;
};
thread_local TileRows tile_rows;

inline void shape_tiles(long first, long second) {
    if (tile_rows.first == first && tile_rows.second == second) return;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64;
    for (const int i : {0, 1, 4}) shapes.rows[i] = static_cast<uint8_t>(first);
    for (const int i : {2, 3, 5}) shapes.rows[i] = static_cast<uint8_t>(std::max(second, 1L));
    for (const int i : {6, 7}) shapes.rows[i] = TILE;
    _tile_loadconfig(&shapes);
    tile_rows = {first, second};
}

inline void release_tiles() {
    if (tile_rows.first) _tile_release();
    tile_rows = {};
}

// The numbers of tiles are parts of instructions, so that no function can take them.
#define MULTIPLY_TILES(to, rows, panel)            \
    do {                                           \
        if constexpr (std::is_same_v<Kind, Bytes>) \
            _tile_dpbusd(to, rows, panel);         \
        else                                       \
            _tile_dpbf16ps(to, rows, panel);       \
    } while (false)

// Up to 32 rows x N registers of columns: as `tile` in products.h; `words` is a multiple of 16.
template <class Kind, int N, bool Two>
void amx_tile(const word* a, long stride, const word* panel, long words, bool begin, word* out, long width) {
    constexpr long LINE = N * LANES * sizeof(word);
    const long rows = stride * static_cast<long>(sizeof(word)), line = width * static_cast<long>(sizeof(word));
    if (begin) {
        _tile_zero(0);
        if constexpr (N > 1) _tile_zero(1);
        if constexpr (Two) _tile_zero(2);
        if constexpr (Two && N > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, out, line);
        if constexpr (N > 1) _tile_loadd(1, out + LANES, line);
        if constexpr (Two) _tile_loadd(2, out + TILE * width, line);
        if constexpr (Two && N > 1) _tile_loadd(3, out + TILE * width + LANES, line);
    }
    for (long k = 0; k < words; k += TILE) {
        const word* b = panel + k * N * LANES;
        _tile_loadd(4, a + k, rows);
        _tile_loadd(6, b, LINE);
        MULTIPLY_TILES(0, 4, 6);
        if constexpr (N > 1) {
            _tile_loadd(7, b + LANES, LINE);
            MULTIPLY_TILES(1, 4, 7);
        }
        if constexpr (Two) {
            _tile_loadd(5, a + TILE * stride + k, rows);
            MULTIPLY_TILES(2, 5, 6);
            if constexpr (N > 1) MULTIPLY_TILES(3, 5, 7);
        }
    }
    _tile_stored(0, out, line);
    if constexpr (N > 1) _tile_stored(1, out + LANES, line);
    if constexpr (Two) _tile_stored(2, out + TILE * width, line);
    if constexpr (Two && N > 1) _tile_stored(3, out + TILE * width + LANES, line);
}

#undef MULTIPLY_TILES

template <class Kind, int N>
void amx_tiles(const word* a, long stride, long rows, const word* panel, long words, bool begin, word* out,
               long width) {
    for (long i = 0; i < rows; i += 2 * TILE) {
        const long first = std::min(TILE, rows - i), second = std::min(TILE, rows - i - first);
        shape_tiles(first, second);
        const word* from = a + i * stride;
        if (second)
            amx_tile<Kind, N, true>(from, stride, panel, words, begin, out + i * width, width);
        else
            amx_tile<Kind, N, false>(from, stride, panel, words, begin, out + i * width, width);
    }
}

}  // namespace
