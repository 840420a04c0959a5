// Vectors of 16 lanes: AVX-512 with bfloat16 and VNNI, or the compiler's generic vectors.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif

// With -DBATCH_INVARIANT=1 the result of a row does not depend on how many other rows a call has:
// each choice by a number of rows that changes an order of summation is then made in one way.
#ifndef BATCH_INVARIANT
#define BATCH_INVARIANT 0
#endif

namespace {

using bf16 = uint16_t;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

constexpr int LANES = 16;
constexpr int PANEL = 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline f32x16 splat(float x) { return f32x16{} + x; }

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
inline void store(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16(bits >> 16 | 64);  // NaN stays NaN
    return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline f32x16 load_bf16(const bf16* p) {
#if WIDE
    return (f32x16)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    return (f32x16)(__builtin_convertvector(load<u16x16>(p), u32x16) << 16);
#endif
}

inline void store_bf16(bf16* p, f32x16 v) {
#if WIDE
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    i32x16 is_nan = v != v;
    u32x16 out = ((u32x16)is_nan & (bits >> 16 | 64)) | (~(u32x16)is_nan & rounded);
    store(p, __builtin_convertvector(out, u16x16));
#endif
}

// Stores 32 elements at a multiple of 64 bytes; for data that is not read again soon.
inline void store_past_caches(bf16* p, f32x16 a, f32x16 b) {
#if WIDE
    _mm512_stream_si512((__m512i*)p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    store_bf16(p, a);
    store_bf16(p + LANES, b);
#endif
}

// Makes earlier stores past the caches visible to other threads.
inline void finish_past_caches() {
#if WIDE
    _mm_sfence();
#endif
}

inline f32x16 load_i8(const int8_t* p) {
#if WIDE
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    return __builtin_convertvector(load<i8x16>(p), f32x16);
#endif
}

inline f32x16 vmax(f32x16 a, f32x16 b) {
#if WIDE
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline float sum(f32x16 v) {
#if WIDE
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

inline float largest(f32x16 v) {
#if WIDE
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = std::max(m, v[i]);
    return m;
#endif
}

// A bit for each lane of a comparison.
inline unsigned lanes_of(i32x16 v) {
#if WIDE
    return _mm512_movepi32_mask((__m512i)v);
#else
    unsigned mask = 0;
    for (int i = 0; i < LANES; i++) mask |= (v[i] & 1u) << i;
    return mask;
#endif
}

inline f32x16 absolute(f32x16 v) { return (f32x16)((u32x16)v & 0x7fffffffu); }

inline i32x16 round_to_int(f32x16 v) {
#if WIDE
    return (i32x16)_mm512_cvtps_epi32((__m512)v);  // half to even
#else
    i32x16 r;
    for (int i = 0; i < LANES; i++) r[i] = (int32_t)std::nearbyintf(v[i]);
    return r;
#endif
}

inline u8x16 low_bytes(i32x16 v) {
#if WIDE
    return (u8x16)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, u8x16);
#endif
}

// Stores the first `count` lanes.
inline void store_lanes(void* p, u32x16 v, int64_t count) {
#if WIDE
    _mm512_mask_storeu_epi32(p, (__mmask16)((1u << count) - 1), (__m512i)v);
#else
    std::memcpy(p, &v, count * sizeof(uint32_t));
#endif
}

// Transposes a square of 16 × 16.
inline void transpose(u32x16 (&x)[LANES]) {
#if WIDE
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    // Each round interleaves the upper half of the rows with the lower one.
    for (int round = 0; round < 4; round++) {
        u32x16 next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            const __m512i a = (__m512i)x[i], b = (__m512i)x[i + LANES / 2];
            next[2 * i] = (u32x16)_mm512_permutex2var_epi32(a, low, b);
            next[2 * i + 1] = (u32x16)_mm512_permutex2var_epi32(a, high, b);
        }
        for (int i = 0; i < LANES; i++) x[i] = next[i];
    }
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const uint32_t one = x[i][j];
            x[i][j] = x[j][i];
            x[j][i] = one;
        }
#endif
}

// exp for arguments up to about 0: 2^n * 2^f with a polynomial for 2^f, |f| <= 1/2. Relative error
// 2e-7.
inline f32x16 vexp(f32x16 x) {
    x = vmax(splat(-87.3f), x);  // NaN stays NaN
    f32x16 t = x * 1.44269504f;
    i32x16 n = round_to_int(t);
#if WIDE
    f32x16 whole = (f32x16)_mm512_cvtepi32_ps((__m512i)n);
#else
    f32x16 whole = __builtin_convertvector(n, f32x16);
#endif
    f32x16 f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    return (f32x16)((i32x16)p + (n << 23));
}

inline f32x16 silu(f32x16 x) {
    // x / (1 + exp(-x)). The argument of exp is bounded where silu is 0 anyway.
    f32x16 e = vexp(-vmax(x, splat(-87.0f)) < 88.0f ? -vmax(x, splat(-87.0f)) : splat(88.0f));
    return x / (e + 1.0f);
}

// acc + w[lane][0] * x[0] + w[lane][1] * x[1], for 16 lanes of two bfloat16 each.
inline f32x16 dot2(f32x16 acc, const void* w, uint32_t x) {
#if WIDE
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w),
                                    (__m512bh)_mm512_set1_epi32((int)x));
#else
    u32x16 pairs = load<u32x16>((const uint32_t*)w);
    acc += (f32x16)(pairs << 16) * to_float(bf16(x));
    return acc + (f32x16)(pairs & 0xffff0000u) * to_float(bf16(x >> 16));
#endif
}

// acc + the sum over j < 4 of w[lane][j] * x[j], for 16 lanes of four int8 each; x is unsigned.
inline i32x16 dot4(i32x16 acc, const void* w, uint32_t x) {
#if WIDE
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32((int)x),
                                       _mm512_loadu_si512(w));
#else
    u32x16 quads = load<u32x16>((const uint32_t*)w);
    for (int j = 0; j < 4; j++) {
        i32x16 w_j = (i32x16)(quads << (24 - 8 * j)) >> 24;
        acc += w_j * (int32_t)(x >> 8 * j & 255);
    }
    return acc;
#endif
}

// ---------------------------------------------------------------------------- words of 16 bits
//
// Two per lane: bfloat16, or int16 with sums in int32. `dot_words` adds the product of both words
// of each lane.

// The first 32 elements at `p`, or 16 and zeros; int8 become int16.
template <bool HALF = false>
inline u32x16 load_words(const bf16* p) {
    u32x16 v{};
    std::memcpy(&v, p, HALF ? 32 : 64);
    return v;
}

template <bool HALF = false>
inline u32x16 load_words(const int8_t* p) {
    typedef int8_t i8x32 __attribute__((vector_size(32)));
    typedef int16_t i16x32 __attribute__((vector_size(64)));
    i8x32 v{};
    std::memcpy(&v, p, HALF ? 16 : 32);
#if WIDE
    return (u32x16)_mm512_cvtepi8_epi16((__m256i)v);
#else
    return (u32x16)__builtin_convertvector(v, i16x32);
#endif
}

inline f32x16 dot_words(f32x16 acc, u32x16 a, u32x16 b) {
#if WIDE
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc += (f32x16)(a << 16) * (f32x16)(b << 16);
    return acc + (f32x16)(a & 0xffff0000u) * (f32x16)(b & 0xffff0000u);
#endif
}

inline i32x16 dot_words(i32x16 acc, u32x16 a, u32x16 b) {
#if WIDE
    return (i32x16)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
    acc += ((i32x16)(a << 16) >> 16) * ((i32x16)(b << 16) >> 16);
    return acc + ((i32x16)a >> 16) * ((i32x16)b >> 16);
#endif
}

// Pairs of the words of a and b: `first` has half of them, `second` the others. `in_order` undoes
// the order of both.
inline u32x16 first_pairs(u32x16 a, u32x16 b) {
#if WIDE
    return (u32x16)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
#else
    return (a & 0xffffu) | b << 16;
#endif
}

inline u32x16 second_pairs(u32x16 a, u32x16 b) {
#if WIDE
    return (u32x16)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#else
    return a >> 16 | (b & 0xffff0000u);
#endif
}

inline void in_order(f32x16& first, f32x16& second) {
#if WIDE
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 a = (__m512)first, b = (__m512)second;
    first = (f32x16)_mm512_permutex2var_ps(a, low, b);
    second = (f32x16)_mm512_permutex2var_ps(a, high, b);
#else
    float out[2 * LANES];
    for (int i = 0; i < LANES; i++) {
        out[2 * i] = first[i];
        out[2 * i + 1] = second[i];
    }
    first = load<f32x16>(out);
    second = load<f32x16>(out + LANES);
#endif
}

inline f32x16 to_floats(i32x16 v) {
#if WIDE
    return (f32x16)_mm512_cvtepi32_ps((__m512i)v);
#else
    return __builtin_convertvector(v, f32x16);
#endif
}

inline f32x16 to_floats(f32x16 v) { return v; }

// Where `sums_of` expects vector `i`, whose sum becomes lane `i`.
constexpr int place_of_sum(int i) { return WIDE ? i / 4 + i % 4 * 4 : i; }

// The sums of 16 vectors.
inline f32x16 sums_of(f32x16 (&x)[LANES]) {
#if WIDE
    // Sums of neighbours are made where two vectors are interleaved, so that half of the vectors
    // are left each time.
    __m512 v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = (__m512)x[i];
#pragma GCC unroll 2
    for (int half = 8; half >= 4; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            v[i] = _mm512_unpacklo_ps(v[i], v[i + half]) + _mm512_unpackhi_ps(v[i], v[i + half]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88) +
               _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd);
    return (f32x16)(_mm512_shuffle_f32x4(v[0], v[1], 0x88) +
                    _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
#else
    f32x16 all;
    for (int i = 0; i < LANES; i++) all[i] = sum(x[i]);
    return all;
#endif
}

// 16 pairs of bfloat16, each from two float32.
inline u32x16 joined(f32x16 first, f32x16 second) {
#if WIDE
    // Interleaves the two halves of the vector.
    alignas(64) static constexpr uint16_t TURNS[32] = {
        0, 16, 1, 17, 2, 18, 3, 19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (u32x16)_mm512_permutexvar_epi16(_mm512_load_si512(TURNS), halves);
#else
    u32x16 pairs;
    for (int i = 0; i < LANES; i++)
        pairs[i] = uint32_t(to_bf16(second[i])) << 16 | to_bf16(first[i]);
    return pairs;
#endif
}

}  // namespace
