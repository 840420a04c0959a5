// Weights of 4 bits: how their panels lie in memory, and products of bfloat16 rows with them.
//
// A panel of 32 channels holds, for each group of 32 along `in`, 512 bytes of integers and then 32
// bfloat16 scales: 4.5 bits a weight, read in order. The integers of 8 elements along `in` are two
// vectors of 16 channels with 32 bits each. The even elements of a channel are the four nibbles of
// its lower 16 bits, the odd elements those of its upper 16 bits. One table lookup of 16-bit words
// therefore turns one nibble of each half into a pair of bfloat16, as a dot product takes them.
//
// Few rows are multiplied with the integers, which bfloat16 holds exactly, and the sum of a group
// is scaled in float32. For many rows a panel is unpacked once to bfloat16, each weight rounded
// from integer times scale, into memory that stays in the second-level cache.

#pragma once

#include "packing.h"

namespace {

// The row of a matrix at channel `c` of panel `p`; -1 for padding.
inline int64_t source_row(int64_t p, int c, int64_t out, bool gate_up) {
    if (!gate_up) {
        const int64_t row = p * PANEL + c;
        return row < out ? row : -1;
    }
    const int64_t half = out / 2, row = p * LANES + c % LANES;
    return row >= half ? -1 : c < LANES ? row : half + row;
}

// Packs panel `p` from integers [out, in / 8] and scales [out, in / 32]. A word has eight integers,
// each plus 8, the first in the lowest bits.
inline void pack_int4_panel(const uint32_t* integers, const bf16* scales, char* panel, int64_t p,
                            int64_t out, int64_t in, bool gate_up) {
    const int64_t groups = in / GROUP;
    for (int c = 0; c < PANEL; c++) {
        const int64_t row = source_row(p, c, out, gate_up);
        char* to = panel;
        for (int64_t g = 0; g < groups; g++, to += GROUP_BYTES) {
            const bf16 scale = row < 0 ? 0 : scales[row * groups + g];
            std::memcpy(to + GROUP_INTEGERS + c * sizeof scale, &scale, sizeof scale);
            for (int k = 0; k < GROUP / 8; k++) {
                uint32_t packed = 0;
                for (int i = 0; row >= 0 && i < 8; i++) {
                    const uint32_t nibble = integers[(row * groups + g) * (GROUP / 8) + k] >> 4 * i;
                    packed |= (nibble & 15) << (i / 2 * 4 + i % 2 * 16);
                }
                std::memcpy(to + (k * PANEL + c) * sizeof packed, &packed, sizeof packed);
            }
        }
    }
}

// The integers -8 to 7 as bfloat16, twice, because a lookup uses one bit more than a nibble has.
alignas(64) constexpr bf16 INTEGERS[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

// Eight elements of 16 channels, as four vectors of pairs.
struct Pairs {
    u32x16 of[4];

    explicit Pairs(const char* p) {
#if WIDE
        const __m512i table = _mm512_load_si512(INTEGERS);
        // Loading one byte further shifts all words by 8 bits without an instruction. The last load
        // of a group reaches into its scales.
        const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 1);
        of[0] = (u32x16)_mm512_permutexvar_epi16(low, table);
        of[1] = (u32x16)_mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4), table);
        of[2] = (u32x16)_mm512_permutexvar_epi16(high, table);
        of[3] = (u32x16)_mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4), table);
#else
        const u32x16 words = load<u32x16>((const uint32_t*)p);
        for (int j = 0; j < 4; j++) {
            const u32x16 even = words >> 4 * j & 15, odd = words >> (16 + 4 * j) & 15;
            // For integers this small the upper half of the float32 is the exact bfloat16.
            const f32x16 first = __builtin_convertvector((i32x16)even - 8, f32x16);
            const f32x16 second = __builtin_convertvector((i32x16)odd - 8, f32x16);
            of[j] = (u32x16)first >> 16 | (u32x16)second;
        }
#endif
    }
};

// acc + w[lane][0] * x[0] + w[lane][1] * x[1], for 16 lanes of two bfloat16 each.
inline f32x16 dot2(f32x16 acc, u32x16 w, uint32_t x) {
#if WIDE
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
    return dot2(acc, (const void*)&w, x);
#endif
}

// The R rows of a tile, packed as for BF16, times one panel → float32 [R, 32], rows `ld` elements
// apart. Each group prefetches `ahead` bytes, starting at `next`.
template <int R>
void multiply_int4(const char* p, int64_t in, const uint32_t* x, const char* next, int64_t ahead,
                   float* out, int64_t ld) {
    // Each product waits for the previous one in its chain: few rows need more chains.
    constexpr int CHAINS = R >= 4 ? 1 : 2;
    f32x16 acc[R][2] = {};
    for (int64_t g = 0; g < in / GROUP; g++, p += GROUP_BYTES, x += GROUP / 2 * R, next += ahead) {
        for (int64_t b = 0; b < ahead; b += 64) __builtin_prefetch(next + b, 0, 2);
        f32x16 sums[CHAINS][R][2] = {};
#pragma GCC unroll 4
        for (int k = 0; k < GROUP / 8; k++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const Pairs pairs(p + (k * 2 + h) * 64);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
#pragma GCC unroll 12
                    for (int r = 0; r < R; r++)
                        sums[j % CHAINS][r][h] =
                            dot2(sums[j % CHAINS][r][h], pairs.of[j], x[(k * 4 + j) * R + r]);
            }
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const f32x16 scale = load_bf16((const bf16*)(p + GROUP_INTEGERS) + h * LANES);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                for (int c = 1; c < CHAINS; c++) sums[0][r][h] += sums[c][r][h];
                acc[r][h] += sums[0][r][h] * scale;
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        store(out + r * ld, acc[r][0]);
        store(out + r * ld + LANES, acc[r][1]);
    }
}

// Memory of one thread for an unpacked panel.
struct Room {
    std::vector<char> memory;

    char* of(int64_t bytes) {
        memory.resize(std::max<size_t>(memory.size(), bytes + 64));
        return (char*)(((uintptr_t)memory.data() + 63) & ~uintptr_t(63));  // whole cache lines
    }
};

// Unpacks a panel to bfloat16 and prefetches the next one.
inline void unpack_int4_panel(const char* p, int64_t in, char* to) {
    const char* next = p + in / GROUP * GROUP_BYTES;
    for (int64_t g = 0; g < in / GROUP; g++, p += GROUP_BYTES, next += GROUP_BYTES) {
        for (int64_t b = 0; b < GROUP_BYTES; b += 64) __builtin_prefetch(next + b, 0, 2);
        for (int h = 0; h < 2; h++) {
            const f32x16 scale = load_bf16((const bf16*)(p + GROUP_INTEGERS) + h * LANES);
            for (int k = 0; k < GROUP / 8; k++) {
                const Pairs pairs(p + (k * 2 + h) * 64);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    store(to + (g * GROUP / 2 + k * 4 + j) * 128 + h * 64,
                          joined((f32x16)(pairs.of[j] << 16) * scale,
                                 (f32x16)(pairs.of[j] & 0xffff0000u) * scale));
            }
        }
    }
}

}  // namespace
