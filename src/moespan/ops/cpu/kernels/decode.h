// Attention of one query token over the paged cache: all heads of a part of the context at a time,
// in the order of memory. Parts of a sequence are combined afterwards, so that threads can share it.
//
// Keys: for each token the dot products with the queries of 16 heads become one vector of scores.
// So a softmax over tokens needs no sums across lanes. Values: few tokens of a head at a time, two
// of them in each dot product.
//
// bfloat16 is multiplied as it is, with weights rounded to bfloat16. int8 is multiplied as int16,
// with queries and weights rounded to 16 bits.

#pragma once

#include <type_traits>

#include "attention.h"

namespace {

constexpr int CHUNK = 256;            // tokens between two looks at the maximum; more than twice as
                                      // many products of int16 would overflow their sum
constexpr int WORDS = 2 * LANES;      // elements in a vector of words
constexpr int64_t LEAST_PART = 64;    // tokens; fewer take longer to combine than they save
constexpr int64_t MOST_PARTS = 256;   // of a sequence

// Tokens whose values are read together; the cache is asked for the same number of tokens ahead.
template <class T>
constexpr int TOGETHER = 4 / sizeof(T);

template <class T>
using Sum = std::conditional_t<sizeof(T) == 1, i32x16, f32x16>;

// Sizes of a decode step.
struct Heads {
    int64_t heads, group, size;       // query heads, those of a key head, elements of a head
    int64_t lanes = ceil_div(heads, LANES) * LANES;
    int64_t width = ceil_div(size, WORDS) * WORDS;

    int64_t partial_bytes() const { return (heads * width + 2 * lanes) * sizeof(float); }
    int64_t scratch_bytes() const {
        return lanes * width * 2 + (heads * width + 4 * lanes + 2 * CHUNK * lanes) * 4;
    }
};

// The softmax over a part of the context, and the sums of values, whose elements lie in the order
// of `first_pairs` and `second_pairs`.
struct Partial {
    float *acc, *most, *total;        // [heads, width], [lanes], [lanes]

    Partial(char* memory, const Heads& n)
        : acc((float*)memory), most(acc + n.heads * n.width), total(most + n.lanes) {}
};

// The query of one token as words [lanes, width], and what a dot product with it is multiplied by.
template <class T>
void query_words(const bf16* q, const Heads& n, float scale, bf16* words, float* factors) {
    std::memset(words, 0, n.lanes * n.width * sizeof(bf16));
    std::memset(factors, 0, n.lanes * sizeof(float));
    for (int64_t h = 0; h < n.heads; h++, q += n.size, words += n.width) {
        factors[h] = scale;
        if constexpr (sizeof(T) == 2) {
            std::memcpy(words, q, n.size * sizeof(bf16));
        } else {
            f32x16 m = splat(0);
            for (int64_t d = 0; d < n.size; d += LANES) m = vmax(m, absolute(load_bf16(q + d)));
            const float most = largest(m), step = most > 0 ? most / 32767.0f : 1.0f;
            for (int64_t d = 0; d < n.size; d += LANES)
                store(words + d, __builtin_convertvector(round_to_int(load_bf16(q + d) / step), u16x16));
            factors[h] *= std::isfinite(most) ? step : NAN;
        }
    }
}

template <class T>
inline void prefetch_head(const T* x, int64_t size) {
#pragma GCC unroll 4
    for (int64_t d = 0; d < size; d += 64 / sizeof(T)) __builtin_prefetch(x + d, 0, 3);
}

// The sum over 32 elements at a time of a key times a query.
template <class T>
inline Sum<T> dot(const T* key, const bf16* query, int64_t size) {
    Sum<T> sums{};
#pragma GCC unroll 4
    for (int64_t d = 0; d < size; d += WORDS)
        sums = dot_words(sums, load_words(query + d),
                         d + WORDS <= size ? load_words(key + d) : load_words<true>(key + d));
    return sums;
}

// sums [width of up to 128 elements] + the values of pairs of tokens times their weights.
template <class T>
inline void weigh_values(const T* const (&values)[TOGETHER<T>], int64_t at, int64_t size,
                         const uint32_t* weights, int64_t stride, float* sums) {
    constexpr int MOST = 4;
    Sum<T> acc[MOST][2];
    const int vectors = int(ceil_div(size, WORDS));
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) acc[v][i] = load<Sum<T>>(sums + v * WORDS + i * LANES);
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER<T> / 2; j++) {
        const u32x16 weight = u32x16{} + weights[j * stride];
        const T *x = values[2 * j] + at, *y = values[2 * j + 1] + at;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const bool is_whole = (v + 1) * WORDS <= size;
            const u32x16 a = is_whole ? load_words(x + v * WORDS) : load_words<true>(x + v * WORDS);
            const u32x16 b = is_whole ? load_words(y + v * WORDS) : load_words<true>(y + v * WORDS);
            acc[v][0] = dot_words(acc[v][0], first_pairs(a, b), weight);
            acc[v][1] = dot_words(acc[v][1], second_pairs(a, b), weight);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) store(sums + v * WORDS + i * LANES, acc[v][i]);
}

// Values of the heads from `first` on, times the scales that a token has for its key heads.
inline f32x16 scaled(f32x16 x, const float* scales, const Heads& n, int64_t first) {
    if (n.group == 1 && first + LANES <= n.heads) return x * load<f32x16>(scales + first);
    for (int64_t i = 0; i < LANES && first + i < n.heads; i++)
        x[i] *= scales[(first + i) / n.group];
    return x;
}

// The scores [tokens, lanes] of a chunk become its weights, pairs of words [tokens / 2, lanes].
// The result of the chunk has to be multiplied by `factors`, the previous one by `shrinks`.
template <class T>
void weights_of(float* scores, int count, const int64_t* slots, const Cache& c, const Heads& n,
                const Partial& to, uint32_t* weights, float* factors, float* shrinks) {
    for (int64_t l = 0; l < n.lanes; l += LANES) {
        const f32x16 before = load<f32x16>(to.most + l);
        f32x16 most = before, total = splat(0), largest = splat(0);
        for (int t = 0; t < count; t++) most = vmax(most, load<f32x16>(scores + t * n.lanes + l));
        for (int t = 0; t < count; t++) {
            float* at = scores + t * n.lanes + l;
            f32x16 e = vexp(load<f32x16>(at) - most);
            total += e;
            if constexpr (sizeof(T) == 1) {
                e = scaled(e, c.value_scales + slots[t] * c.heads, n, l);
                largest = vmax(largest, e);
            }
            store(at, e);
        }
        for (int t = count; t < ceil_div(count, TOGETHER<T>) * TOGETHER<T>; t++)
            store(scores + t * n.lanes + l, splat(0));
        const f32x16 factor = sizeof(T) == 1 ? largest / 32767.0f : splat(1);
        for (int t = 0; t < count; t += 2) {
            const f32x16 a = load<f32x16>(scores + t * n.lanes + l);
            const f32x16 b = load<f32x16>(scores + (t + 1) * n.lanes + l);
            uint32_t* pair = weights + t / 2 * n.lanes + l;
            if constexpr (sizeof(T) == 2) {
                store(pair, joined(a, b));
            } else {
                const f32x16 by = largest > 0.0f ? 1.0f / factor : splat(0);
                store(pair, (u32x16)round_to_int(a * by) | (u32x16)round_to_int(b * by) << 16);
            }
        }
        for (int t = count + count % 2; t < ceil_div(count, TOGETHER<T>) * TOGETHER<T>; t += 2)
            store(weights + t / 2 * n.lanes + l, u32x16{});
        const f32x16 shrink = vexp(before - most);
        store(to.most + l, most);
        store(to.total + l, load<f32x16>(to.total + l) * shrink + total);
        store(shrinks + l, shrink);
        store(factors + l, factor);
    }
}

// Tokens `first` to `last` of a sequence. SIZE: elements of a head; 0 if they vary.
template <class T, int SIZE>
void decode(const bf16* q, const Cache& c, const int32_t* table, int64_t first, int64_t last,
            const Heads& n, float scale, char* scratch, const Partial& to) {
    const int64_t size = SIZE ? SIZE : n.size, row = c.heads * size;
    const int64_t width = ceil_div(size, WORDS) * WORDS;
    float* sums = (float*)scratch;                     // [heads, width]
    float* scores = sums + n.heads * width;          // [CHUNK, lanes]
    uint32_t* weights = (uint32_t*)(scores + CHUNK * n.lanes);  // [CHUNK / 2, lanes]
    float* query_factors = (float*)(weights + CHUNK * n.lanes);
    float *factors = query_factors + n.lanes, *shrinks = factors + n.lanes;
    int32_t* head_at = (int32_t*)(shrinks + n.lanes);  // [lanes], where a token has a head's key
    bf16* query = (bf16*)(head_at + n.lanes);          // [lanes, width]
    query_words<T>(q, n, scale, query, query_factors);
    for (int64_t i = 0; i < n.lanes; i++)
        head_at[i] = int32_t(std::min(i, n.heads - 1) / n.group * size);
    std::memset(to.acc, 0, n.heads * width * sizeof(float));
    std::fill(to.most, to.most + n.lanes, -INFINITY);
    std::fill(to.total, to.total + n.lanes, 0.0f);
    const T *keys = (const T*)c.keys, *values = (const T*)c.values;
    for (int64_t start = first; start < last; start += CHUNK) {
        const int count = (int)std::min<int64_t>(CHUNK, last - start);
        int64_t slots[CHUNK + TOGETHER<T>];
        for (int t = 0; t < std::min(count, CHUNK - TOGETHER<T>) + 2 * TOGETHER<T>; t++)
            slots[t] = slot_of(table, std::min(start + t, last - 1), c);
        for (int t = 0; t < count; t++) {
            const T* key = keys + slots[t] * row;
            const T* next = keys + slots[t + TOGETHER<T>] * row;
            for (int64_t l = 0; l < n.lanes; l += LANES) {
                f32x16 x[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) {
                    const int64_t at = head_at[l + i];
                    prefetch_head(next + at, size);
                    x[place_of_sum(i)] =
                        to_floats(dot(key + at, query + (l + i) * width, size));
                }
                f32x16 score = sums_of(x) * load<f32x16>(query_factors + l);
                if constexpr (sizeof(T) == 1)
                    score = scaled(score, c.key_scales + slots[t] * c.heads, n, l);
                store(scores + t * n.lanes + l, score);
            }
        }
        weights_of<T>(scores, count, slots, c, n, to, weights, factors, shrinks);
        std::memset(sums, 0, n.heads * width * sizeof(float));
        for (int t = 0; t < count; t += TOGETHER<T>) {
            const T* at[TOGETHER<T>];
            const T* next[TOGETHER<T>];
            for (int j = 0; j < TOGETHER<T>; j++) {
                at[j] = values + slots[t + j] * row;
                next[j] = values + slots[t + TOGETHER<T> + j] * row;
            }
            for (int64_t h = 0; h < n.heads; h++) {
                for (int64_t d = 0; d < size; d += 4 * WORDS)
                    weigh_values(at, head_at[h] + d, std::min<int64_t>(size - d, 4 * WORDS),
                                 weights + t / 2 * n.lanes + h, n.lanes, sums + h * width + d);
                for (int j = 0; j < TOGETHER<T>; j++) prefetch_head(next[j] + head_at[h], size);
            }
        }
        for (int64_t h = 0; h < n.heads; h++)
            for (int64_t d = h * width; d < (h + 1) * width; d += LANES)
                store(to.acc + d, load<f32x16>(to.acc + d) * shrinks[h] +
                                      to_floats(load<Sum<T>>(sums + d)) * factors[h]);
    }
}

// How many parts a sequence is cut into, so that `threads` have about the same to do. `all`: tokens
// of all sequences.
inline int64_t parts_of(int64_t tokens, int64_t all, int threads) {
    const int64_t each = std::max(LEAST_PART, ceil_div(all, 8 * threads));
    int64_t parts = ceil_div(tokens, each);
    if (tokens == all && parts > 1) parts = ceil_div(parts, threads) * threads;
    return std::min(parts, MOST_PARTS);
}

// The heads' results, from the memory of all parts of a sequence.
inline void combine(char* parts, int64_t count, const Heads& n, bf16* out) {
    for (int64_t h = 0; h < n.heads; h++, out += n.size) {
        float most = -INFINITY, total = 0;
        for (int64_t i = 0; i < count; i++)
            most = std::max(most, Partial(parts + i * n.partial_bytes(), n).most[h]);
        float shares[MOST_PARTS];
        for (int64_t i = 0; i < count; i++) {
            const Partial part(parts + i * n.partial_bytes(), n);
            shares[i] = count == 1 ? 1 : std::exp(part.most[h] - most);
            total += part.total[h] * shares[i];
        }
        for (int64_t d = 0; d < n.size; d += WORDS) {
            f32x16 first = splat(0), second = splat(0);
            for (int64_t i = 0; i < count; i++) {
                const float* acc = Partial(parts + i * n.partial_bytes(), n).acc + h * n.width + d;
                first += load<f32x16>(acc) * (shares[i] / total);
                second += load<f32x16>(acc + LANES) * (shares[i] / total);
            }
            in_order(first, second);
            store_bf16(out + d, first);
            if (d + LANES < n.size) store_bf16(out + d + LANES, second);
        }
    }
}

}  // namespace
