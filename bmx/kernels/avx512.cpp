// Kernels for CPUs with AVX512-BF16 and VNNI: linear layers, attention, and what stands between them.
//
// Knows pointers and sizes only; build.py compiles this file, avx512.py checks shapes and calls it, reference.py is its
// twin in torch. Every row's numbers are computed in the same order whatever rows stand beside it, so that an answer
// does not depend on its batch. Threads are torch's own OpenMP threads. A function that takes memory to work in does
// nothing but say how many bytes it needs (instead of 0) if that is too small.

#include "attention.h"
#include "gemm.h"

#include <cmath>
#include <functional>

namespace {

// A row of bytes stands for (code - zero) x step.
struct Steps {
    float step;
    int32_t zero;
};

// Rows of bfloat16 -> bytes from the least to the greatest number of each, or to zero. No byte says that something is no
// number: then the step is none.
void quantise(const bf16* x, uint8_t* codes, Steps* steps, long rows, long inner) {
#pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        const bf16* from = x + row * inner;
        const __m512 nothing = _mm512_setzero_ps();
        __m512 low = nothing, high = nothing, broken = nothing;
        for (long k = 0; k < inner; k += LANES) {
            const __m512 v = load_bf16(from + k);
            low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v), broken = _mm512_fmadd_ps(v, nothing, broken);
        }
        const float least = _mm512_reduce_min_ps(low), range = _mm512_reduce_max_ps(high) - least;
        const float step = std::max(range, 1e-30f) / 255.0f;
        const int32_t zero = static_cast<int32_t>(std::lrint(-least / step));
        steps[row] = {step + _mm512_reduce_add_ps(broken), zero};
        const __m512 factor = _mm512_set1_ps(1.0f / step);
        for (long k = 0; k < inner; k += LANES) {
            const __m512i near = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(from + k), factor));
            const __m512i code = _mm512_max_epi32(_mm512_add_epi32(near, _mm512_set1_epi32(zero)), _mm512_setzero_si512());
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + row * inner + k), _mm512_cvtusepi32_epi8(code));
        }
    }
}

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

}  // namespace

extern "C" {

// What some linear layers, all in bytes or none, make of x[rows][inner]: one after the other in y, each [rows][columns].
// If gated there are two of a size, and y is the SiLU of the first one's output times the second's. x is rounded to
// bytes row by row where weights are bytes; all else is bfloat16.
long bmx_linear(const bf16* x, const Layer* layers, int count, int gated, bf16* y, long rows, long inner, char* work,
                long size) {
    const bool bytes = layers[0].scales;
    const size_t coded = bytes ? Work::bytes<uint8_t>(rows * inner) + Work::bytes<Steps>(rows) : 0;
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
    Steps* steps = left.take<Steps>(rows);
    quantise(x, codes, steps, rows, inner);
    const auto finish = [=](const Layer& layer, int which, long row, long column, int registers, const word* sums) {
        const __m512 step = _mm512_set1_ps(steps[row].step);
        const __m512i zero = _mm512_set1_epi32(steps[row].zero);
        for (int j = 0; j < registers; j++, column += LANES) {
            const __m512i off = _mm512_mullo_epi32(_mm512_loadu_si512(layer.sums + column), zero);
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
long bmx_evict(const Rows* views, bf16* keys, bf16* values, int32_t* positions, float* mass, const float* sums,
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
// q by strides (batch, head) in `views`; keys, values, positions and mass by row, a slot's head by head from row
// `first` of it on, `capacity` of it each; now [batch], the tokens' positions; limits [batch], rows that each may use;
// mass faded by `old` before, or null where nothing is added up; window 0 for none. No slot has more than `largest`.
long bmx_decode_step(const Rows* views, bf16* keys, bf16* values, int32_t* positions, float* mass, const int64_t* first,
                const int64_t* capacity, const int64_t* slots, const int64_t* now, const int64_t* limits, long batch,
                long heads, long kv_heads, long largest, long dim, long breadth, float scale, float old, int count, Ranking ranking, const float* sinks, bf16* out, char* work, long size) {
    const Rows q = views[0], k = views[1], v = views[2];
    const long group = heads / kv_heads;
    const size_t asked = Work::bytes<bf16>(group * dim), each = Slot::bytes(largest, group) + asked;
    const long needed = static_cast<long>(each * omp_get_max_threads());
    if (size < needed) return needed;
#pragma omp parallel for schedule(static, 1)
    for (long task = 0; task < batch * kv_heads; task++) {
        const long one = task / kv_heads, head = task % kv_heads;
        const long slot_rows = capacity[slots[one]], place = first[slots[one]] + head * slot_rows;
        const long limit = std::min(static_cast<long>(limits[one]), slot_rows), position = now[one];
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
            const long next = slots[after / kv_heads], there = first[next] + after % kv_heads * capacity[next];
            const long filled = std::min(now[after / kv_heads], capacity[next]);
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
