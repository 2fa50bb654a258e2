// Vectors as they are stored: in bfloat16, or as codes with a scale each. See formats.py.

#pragma once

#include "vectors.h"

namespace {

enum Format { MODEL, INT8, INT4 };  // as FORMATS in compiled.py

constexpr float LARGEST_HALF = 65504.0f, SMALLEST_SCALE = 1e-7f;
constexpr long KEY_GROUP = 32;  // rows of keys that share a scale and an offset per channel

// How LANES numbers of a vector are read, without their scale: those from `at` on, of `dim`.
struct ModelCodes {
    static Real numbers(const uint8_t* vector, long at, long) {
        return load_bf16(reinterpret_cast<const bf16*>(vector) + at);
    }
};
struct Int8Codes {
    static Real numbers(const uint8_t* vector, long at, long) { return real(load_signed_bytes(vector + at)); }
};
struct Levels {  // bytes from 0 to 255
    static Real numbers(const uint8_t* vector, long at, long) { return real(load_bytes(vector + at)); }
};
struct Int4Codes {  // the first half of the numbers is in the low bits
    static Real numbers(const uint8_t* vector, long at, long dim) {
        return at < dim / 2 ? real(load_bytes(vector + at) & 15) : real(load_bytes(vector + at - dim / 2) >> 4);
    }
};

// Calls `work` with how numbers of a format are read.
template <class F>
inline auto with_codes(long format, const F& work) {
    if (format == INT8) return work(Int8Codes{});
    if (format == INT4) return work(Int4Codes{});
    return work(ModelCodes{});
}

struct Scales {  // of LANES vectors, or channels: numbers = code * scale + offset
    Real scale, offset;
    static Scales from(Int both) { return {from_halves(both), from_halves(both >> 16)}; }  // two float16 in each
};

// Stored vectors, by row; `head` rows lie between the first rows of two kv heads.
struct Stored {
    uint8_t* data;
    uint16_t* scales;  // [rows][1 or 2] float16, null for bfloat16
    long format, dim, head;

    long bytes() const { return format == MODEL ? 2 * dim : format == INT8 ? dim : dim / 2; }
    long parts() const { return format == INT4 ? 2 : 1; }
    const uint8_t* at(long row) const { return data + row * bytes(); }
    Stored from(long row) const {
        return {data + row * bytes(), scales ? scales + row * parts() : nullptr, format, dim, head};
    }
    // Of the vectors from `row` on, of which `count` are there.
    Scales scales_of(long row, long count) const {
        if (format == MODEL) return {splat(1.0f), zeros()};
        if (format == INT8) {
            uint16_t room[LANES];
            return {load_halves(padded(scales + row, count, room)), zeros()};
        }
        int32_t room[LANES];
        const Int both = load(padded(reinterpret_cast<const int32_t*>(scales) + row, count, room));
        return Scales::from(both);
    }
    void put(long row, const bf16* vector) const;
    void read(long row, bf16* vector) const;
};

// Stored vectors of another slot, which come first, and behind them those of one's own. `border` is a multiple of 32,
// so that no register of rows has some of both.
struct Joined {
    Stored other, own;
    long border;  // rows of the other
    long format = own.format, dim = own.dim;

    const uint8_t* at(long row) const { return row < border ? other.at(row) : own.at(row - border); }
    Scales scales_of(long row, long count) const {
        return row < border ? other.scales_of(row, LANES) : own.scales_of(row - border, count);
    }
};

// The least and greatest numbers of a vector, NaN if there is one in it.
struct Range {
    float least, greatest;
    Range(const bf16* vector, long dim) {
        Real low = splat(INFINITY), high = splat(-INFINITY), broken = zeros();
        for (long d = 0; d < dim; d += LANES) {
            const Real v = load_bf16(vector + d);
            low = lesser(low, v), high = ::greater(high, v);
            broken = broken + select(equal(v, v), zeros(), v);
        }
        const float none = sum(broken);
        least = ::least(low) + none, greatest = ::greatest(high) + none;
    }
};

// A number within the bounds; NaN stays NaN.
inline float within(float x, float low, float high) {
    return x < low ? low : x > high ? high : x;
}

// Stores a vector, with exactly the codes and scales of formats.py.
void Stored::put(long row, const bf16* vector) const {
    uint8_t* to = data + row * bytes();
    if (format == MODEL) {
        std::memcpy(to, vector, dim * sizeof(bf16));
        return;
    }
    const Range range(vector, dim);
    const bool symmetric = format == INT8;
    const float spread =
        symmetric ? std::max(-range.least, range.greatest) / 127.0f : (range.greatest - range.least) / 15.0f;
    const uint16_t half = to_half(within(spread, SMALLEST_SCALE, LARGEST_HALF));
    const uint16_t least = to_half(within(range.least, -LARGEST_HALF, LARGEST_HALF));
    const Real scale = splat(from_half(half)), offset = splat(symmetric ? 0.0f : from_half(least));
    const Real low = splat(symmetric ? -127.0f : 0.0f), high = splat(symmetric ? 127.0f : 15.0f);
    const auto codes = [=](long d) {
        return whole(lesser(greater((load_bf16(vector + d) - offset) / scale, low), high));
    };
    scales[row * parts()] = half;
    if (!symmetric) scales[row * parts() + 1] = least;
    for (long d = 0; d < bytes(); d += LANES)
        store_bytes(to + d, symmetric ? codes(d) : codes(d) | codes(dim / 2 + d) << 4);
}

// Keys with a scale and an offset per channel for each group of KEY_GROUP rows: see ByChannel in stores.py.
struct ChannelKeys {
    uint8_t* data;     // [groups][KEY_GROUP][bytes]
    uint16_t* scales;  // [groups][dim][2] float16
    long format, dim;

    long bytes() const { return format == INT8 ? dim : dim / 2; }
    uint8_t* at(long row) const { return data + row * bytes(); }
    ChannelKeys from(long group) const { return {at(group * KEY_GROUP), scales + group * 2 * dim, format, dim}; }
    // Of LANES channels from `d` on, in the group of a row.
    Scales scales_of(long row, long d) const {
        return Scales::from(load(reinterpret_cast<const int32_t*>(scales + row / KEY_GROUP * 2 * dim) + d));
    }
    void put(long group, const bf16* const* vectors) const;
    void read(long row, bf16* vector) const;
};

// Reads a vector, rounded to bfloat16.
void ChannelKeys::read(long row, bf16* vector) const {
    const uint8_t* from = at(row);
    for (long d = 0; d < dim; d += LANES) {
        const Real level = format == INT8 ? Levels::numbers(from, d, dim) : Int4Codes::numbers(from, d, dim);
        const Scales scales = scales_of(row, d);
        store_bf16(vector + d, fused(level, scales.scale, scales.offset));
    }
}

// Stores a group of vectors, with exactly the codes and scales of formats.py.
void ChannelKeys::put(long group, const bf16* const* vectors) const {
    const float highest = format == INT8 ? 255.0f : 15.0f;
    const long row = group * KEY_GROUP;
    for (long d = 0; d < dim; d += LANES) {
        Real low = splat(INFINITY), high = splat(-INFINITY), broken = zeros();
        for (long i = 0; i < KEY_GROUP; i++) {
            const Real v = load_bf16(vectors[i] + d);
            low = lesser(low, v), high = greater(high, v);
            broken = broken + select(equal(v, v), zeros(), v);
        }
        float lows[LANES], spreads[LANES];
        store(lows, low + broken), store(spreads, (high - low) / splat(highest) + broken);
        uint16_t* to = scales + (group * dim + d) * 2;
        for (long i = 0; i < LANES; i++) {
            to[2 * i] = to_half(within(spreads[i], SMALLEST_SCALE, LARGEST_HALF));
            to[2 * i + 1] = to_half(within(lows[i], -LARGEST_HALF, LARGEST_HALF));
        }
    }
    for (long d = 0; d < bytes(); d += LANES) {
        const long other = format == INT8 ? d : dim / 2 + d;
        const Scales first = scales_of(row, d), second = scales_of(row, other);
        const auto codes = [=](const bf16* vector, Scales s) {
            return whole(lesser(greater((load_bf16(vector) - s.offset) / s.scale, zeros()), splat(highest)));
        };
        for (long i = 0; i < KEY_GROUP; i++) {
            const Int low = codes(vectors[i] + d, first);
            store_bytes(at(row + i) + d, format == INT8 ? low : low | codes(vectors[i] + other, second) << 4);
        }
    }
}

// Reads a vector, rounded to bfloat16.
void Stored::read(long row, bf16* vector) const {
    const uint8_t* from = at(row);
    if (format == MODEL) {
        std::memcpy(vector, from, dim * sizeof(bf16));
        return;
    }
    const Real scale = splat(from_half(scales[row * parts()]));
    const Real offset = splat(format == INT4 ? from_half(scales[row * parts() + 1]) : 0.0f);
    with_codes(format, [=](auto codes) {
        for (long d = 0; d < dim; d += LANES) store_bf16(vector + d, fused(codes.numbers(from, d, dim), scale, offset));
    });
}

}  // namespace
