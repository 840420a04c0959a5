// Kernels for CPUs: matrix products on packed weights, mixtures of experts, attention over a paged
// cache, norms, rotary embedding and routing, for bfloat16 activations.
//
// Everything is called from `moespan/ops/native/ops.py` through a plain C interface, so that
// this file needs no header of torch and is built by any C++ compiler in seconds.
//
// Packed weights. A matrix [out, in] is cut into panels of 32 output channels, padded with zeros. A
// panel holds, for each step along `in` (2 bfloat16 or 4 int8, which one dot-product instruction
// takes per lane), two vectors of 16 channels. So one pass over a panel reads memory in order, and
// keeps the results of up to MAX_ROWS rows of the input in registers until they are complete. A
// panel takes the very bytes that its 32 rows took before, and is packed in their place.
//
// In a packed gate-up matrix a panel holds 16 channels of the gate and the same 16 of up, so that
// silu(gate) * up is applied to registers.
//
// 8-bit products need unsigned activations: a row is stored as integer + 128, and 128 times the sum
// of a channel's weights, kept beside its scale, is taken off again. Where activations have 16 bits
// (weight-only quantisation) their high and low bytes are multiplied apart: the high ones carry the
// sign, and the integer results are joined in float32.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif

namespace {

using bf16 = uint16_t;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

constexpr int LANES = 16;
constexpr int PANEL = 32;
// Rows whose results fill the registers: 2 accumulators each.
constexpr int MAX_ROWS = WIDE ? 12 : 3;
// Rows of the input that stay in the second-level cache while panels pass by, in bytes.
constexpr int64_t ROW_BLOCK_BYTES = 512 << 10;
constexpr int64_t PREFETCH_BYTES = 4096;
// Two panels of so many bytes have room in the second-level cache beside the rows.
constexpr int64_t NEXT_PANEL_BYTES = 160 << 10;

// ---------------------------------------------------------------------------------------- vectors

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

// exp for x <= 0 or so: 2^n * 2^f with a polynomial for 2^f, |f| <= 1/2; relative error 2e-7.
inline f32x16 vexp(f32x16 x) {
    x = vmax(x, splat(-87.3f));
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
    // x / (1 + exp(-x)); exp of large numbers is bounded, where silu is 0 anyway.
    f32x16 e = vexp(-vmax(x, splat(-87.0f)) < 88.0f ? -vmax(x, splat(-87.0f)) : splat(88.0f));
    return x / (e + 1.0f);
}

// acc + w[lane][0] * x[0] + w[lane][1] * x[1], for 16 lanes of two bfloat16.
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

// acc + the sum over j < 4 of w[lane][j] * x[j], for 16 lanes of four int8; x is unsigned.
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

// ---------------------------------------------------------------------------------------- weights

enum Kind { BF16 = 0, W8A8 = 1, W8A16 = 2 };

// A packed matrix [out, in], or one expert of a bank.
struct Matrix {
    const char* panels;
    const float* scales;      // [padded out], quantised only
    const int32_t* sums;      // [padded out], of a channel's integers, quantised only
    int64_t in;

    int64_t panel_bytes(int kind) const { return in * PANEL * (kind == BF16 ? 2 : 1); }
};

// Which row of a matrix is channel `c` of panel `p`; -1 is padding. In a gate-up matrix of `half`
// channels each, a panel is 16 of the gate and the same 16 of up.
inline int64_t source_row(int64_t p, int c, int64_t out, bool gate_up) {
    if (!gate_up) {
        int64_t row = p * PANEL + c;
        return row < out ? row : -1;
    }
    int64_t half = out / 2, row = p * LANES + c % LANES;
    return row >= half ? -1 : c < LANES ? row : half + row;
}

template <int STEP, class T>  // STEP elements of T make four bytes
void pack_panel(const T* source, T* panel, int64_t p, int64_t out, int64_t in, bool gate_up) {
    for (int c = 0; c < PANEL; c++) {
        int64_t row = source_row(p, c, out, gate_up);
        const T* from = row < 0 ? nullptr : source + row * in;
        for (int64_t k = 0; k < in / STEP; k++) {
            T* to = panel + (k * PANEL + c) * STEP;
            if (from)
                std::memcpy(to, from + k * STEP, 4);
            else
                std::memset(to, 0, 4);
        }
    }
}

// -------------------------------------------------------------------------------- activation tiles

// Up to MAX_ROWS rows of the input that are multiplied together, packed: for each step along `in`,
// the four bytes of every row. So a product reads them in order, whatever lies between the rows.
struct Tile {
    int64_t row;                      // the first
    int64_t rows;
    int64_t matrix;                   // of a bank
};

// Packed tiles of one input, one after the other.
struct Input {
    const char* packed;
    const float* scales;              // of each row, quantised only
    int64_t row_bytes;

    const uint32_t* tile(const Tile& t) const {
        return (const uint32_t*)(packed + t.row * row_bytes);
    }
};

template <int KIND>
constexpr int planes() {
    return KIND == W8A16 ? 2 : 1;
}

template <int KIND>
constexpr int max_rows() {
    // Two planes of activations have two results each.
    return KIND == W8A16 && WIDE ? 6 : MAX_ROWS;
}

template <int KIND>
inline int64_t row_bytes(int64_t in) {
    return KIND == W8A8 ? in : 2 * in;
}

// Appends tiles of equal height for rows `first` to `first + count`.
template <int KIND>
void add_tiles(std::vector<Tile>& tiles, int64_t first, int64_t count, int64_t matrix) {
    const int64_t number = (count + max_rows<KIND>() - 1) / max_rows<KIND>();
    for (int64_t t = 0; t < number; t++) {
        const int64_t from = count * t / number, to = count * (t + 1) / number;
        tiles.push_back({first + from, to - from, matrix});
    }
}

// One row to integers + 128: `PLANES` 1 → 8 bits, 2 → 16 bits, whose high bytes come before the low
// ones. Returns the scale.
template <int PLANES>
float quantize_row(const bf16* x, int64_t n, uint8_t* out) {
    f32x16 most = splat(0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) most = vmax(most, absolute(load_bf16(x + i)));
    float amax = largest(most);
    for (; i < n; i++) amax = std::max(amax, std::fabs(to_float(x[i])));
    const float scale = amax > 0 ? amax / (PLANES == 1 ? 127.0f : 32767.0f) : 1.0f;
    for (i = 0; i < n; i += LANES) {
        const int count = (int)std::min<int64_t>(LANES, n - i);
        alignas(64) bf16 some[LANES] = {};
        std::memcpy(some, x + i, count * sizeof(bf16));
        const i32x16 q = round_to_int(load_bf16(some) / scale);
        for (int j = 0; j < count; j++) {
            if (PLANES == 1) {
                out[i + j] = uint8_t(q[j] + 128);
            } else {
                out[i + j] = uint8_t((q[j] >> 8) + 128);
                out[n + i + j] = uint8_t(q[j] & 255);
            }
        }
    }
    return std::isfinite(amax) ? scale : NAN;
}

// Packs tiles of `in` elements each row; `row_at(r)` is where row r begins. Quantised rows are read
// from `integers`, as quantize_row left them, by the same number.
template <int KIND, class RowAt>
void pack_tile(const Tile& t, int64_t in, char* packed, RowAt row_at) {
    constexpr int PLANES = planes<KIND>();
    const int64_t steps = in * (KIND == BF16 ? 2 : 1) / 4;
    uint32_t* to = (uint32_t*)(packed + t.row * row_bytes<KIND>(in));
    for (int64_t r = 0; r < t.rows; r++) {
        const char* from = (const char*)row_at(t.row + r);
        for (int plane = 0; plane < PLANES; plane++)
            for (int64_t k = 0; k < steps; k++)
                std::memcpy(to + (k * PLANES + plane) * t.rows + r, from + (plane * steps + k) * 4,
                            4);
    }
}

// ------------------------------------------------------------------------------------------ tiles

// What to ask of memory while a tile is computed: a run of addresses, so many bytes each step.
struct Prefetch {
    const char* at;
    int64_t bytes;
};

// The R rows of a packed tile times one panel → float32 [R, 32], rows `ld` elements apart. `scales`
// are those of the rows. With STRIDE, of bfloat16, rows are not packed but so many pairs apart.
template <int KIND, int R, int STRIDE = 0>
void multiply(const Matrix& w, int64_t panel, const uint32_t* x, const float* scales,
              Prefetch ahead, float* out, int64_t ld) {
    const char* p = w.panels + panel * w.panel_bytes(KIND);
    const char* next = ahead.at;
    if constexpr (KIND == BF16) {
        // A result waits for the one before it: few rows need more chains to keep busy.
        constexpr int CHAINS = R >= 4 ? 1 : R >= 2 ? 2 : 4;
        constexpr int ROW = STRIDE ? STRIDE : 1, STEP = STRIDE ? 1 : R;
        f32x16 acc[CHAINS][R][2] = {};
        const int64_t steps = w.in / 2;
        int64_t k = 0;
        for (; k + CHAINS <= steps; k += CHAINS) {
#pragma GCC unroll 4
            for (int c = 0; c < CHAINS; c++, p += 128, x += STEP, next += ahead.bytes) {
                __builtin_prefetch(next, 0, 2);
                __builtin_prefetch(next + 64, 0, 2);
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    acc[c][r][0] = dot2(acc[c][r][0], p, x[r * ROW]);
                    acc[c][r][1] = dot2(acc[c][r][1], p + 64, x[r * ROW]);
                }
            }
        }
        for (; k < steps; k++, p += 128, x += STEP)
            for (int r = 0; r < R; r++) {
                acc[0][r][0] = dot2(acc[0][r][0], p, x[r * ROW]);
                acc[0][r][1] = dot2(acc[0][r][1], p + 64, x[r * ROW]);
            }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            for (int c = 1; c < CHAINS; c++) {
                acc[0][r][0] += acc[c][r][0];
                acc[0][r][1] += acc[c][r][1];
            }
            store(out + r * ld, acc[0][r][0]);
            store(out + r * ld + LANES, acc[0][r][1]);
        }
    } else {
        constexpr int PLANES = planes<KIND>();
        constexpr int CHAINS = R * PLANES >= 4 ? 1 : 2;
        i32x16 acc[CHAINS][PLANES][R][2] = {};
        const int64_t steps = w.in / 4;
        int64_t k = 0;
        for (; k + CHAINS <= steps; k += CHAINS) {
#pragma GCC unroll 2
            for (int c = 0; c < CHAINS; c++, p += 128, x += R * PLANES, next += ahead.bytes) {
                __builtin_prefetch(next, 0, 2);
                __builtin_prefetch(next + 64, 0, 2);
#pragma GCC unroll 2
                for (int b = 0; b < PLANES; b++)
#pragma GCC unroll 12
                    for (int r = 0; r < R; r++) {
                        acc[c][b][r][0] = dot4(acc[c][b][r][0], p, x[b * R + r]);
                        acc[c][b][r][1] = dot4(acc[c][b][r][1], p + 64, x[b * R + r]);
                    }
            }
        }
        for (; k < steps; k++, p += 128, x += R * PLANES)
            for (int b = 0; b < PLANES; b++)
                for (int r = 0; r < R; r++) {
                    acc[0][b][r][0] = dot4(acc[0][b][r][0], p, x[b * R + r]);
                    acc[0][b][r][1] = dot4(acc[0][b][r][1], p + 64, x[b * R + r]);
                }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                for (int c = 1; c < CHAINS; c++)
                    for (int b = 0; b < PLANES; b++) acc[0][b][r][h] += acc[c][b][r][h];
                const int64_t channel = panel * PANEL + h * LANES;
                i32x16 high = acc[0][0][r][h] - load<i32x16>(w.sums + channel) * 128;
                f32x16 v = __builtin_convertvector(high, f32x16);
                if constexpr (PLANES == 2)
                    v = v * 256.0f + __builtin_convertvector(acc[0][1][r][h], f32x16);
                store(out + r * ld + h * LANES,
                      v * load<f32x16>(w.scales + channel) * scales[r]);
            }
    }
}

template <int KIND, int STRIDE = 0>
void multiply(int64_t rows, const Matrix& w, int64_t panel, const uint32_t* x, const float* scales,
              Prefetch ahead, float* out, int64_t ld) {
    switch (rows) {
#define CASE(R) \
    case R:     \
        return multiply<KIND, R, STRIDE>(w, panel, x, scales, ahead, out, ld);
        CASE(1) CASE(2) CASE(3)
#if WIDE
        CASE(4) CASE(5) CASE(6)
        default:
            if constexpr (KIND != W8A16) switch (rows) {
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
            }
#endif
#undef CASE
    }
}

// Some tiles of an input times one panel; `emit(row, channels 0-15, channels 16-31)` gets each row's
// results. A single tile waits for memory, and asks for its own panel a little ahead. A few have time to bring the next panel, if the
// second-level cache has room for both. Many do not wait for memory.
template <int KIND, class Emit>
inline void tiles_times_panel(const Matrix& w, int64_t panel, const Input& input, const Tile* tiles,
                              int64_t count, Emit emit) {
    const int64_t bytes = w.panel_bytes(KIND);
    const char* at = w.panels + panel * bytes;
    alignas(64) float out[MAX_ROWS * PANEL];
    for (int64_t i = 0; i < count; i++) {
        const Tile& t = tiles[i];
        Prefetch ahead{at, 0};
        if (count == 1 || (i == 0 && bytes > NEXT_PANEL_BYTES))
            ahead = {at + PREFETCH_BYTES, 128};
        else if (count <= 4 && bytes <= NEXT_PANEL_BYTES)
            ahead = {at + bytes + bytes * i / count, 128 / count};
        multiply<KIND>(t.rows, w, panel, input.tile(t), input.scales + t.row, ahead, out, PANEL);
        for (int64_t r = 0; r < t.rows; r++)
            emit(t.row + r, load<f32x16>(out + r * PANEL), load<f32x16>(out + r * PANEL + LANES));
    }
}

inline void store_some(bf16* p, f32x16 v, int64_t count) {
    if (count >= LANES) {
        store_bf16(p, v);
    } else {
        for (int64_t i = 0; i < count; i++) p[i] = to_bf16(v[i]);
    }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Panels taken at a time: enough of them to balance the threads, few enough to stream.
inline int64_t panels_at_once(int64_t panels, int threads) {
    return std::clamp<int64_t>(panels / (threads * 8), 1, 16);
}

// --------------------------------------------------------------------------------------- products

// A part of the work: tiles `first` to `last`, all of one matrix, times some panels.
struct Item {
    int64_t first, last, panel, panels;
};

// Cuts runs of tiles of one matrix so that the rows of each part stay in the second-level cache.
template <int KIND, class Take>
void in_blocks(const std::vector<Tile>& tiles, int64_t in, Take take) {
    const int64_t most = std::max<int64_t>(ROW_BLOCK_BYTES / row_bytes<KIND>(in), 1);
    for (size_t first = 0; first < tiles.size();) {
        size_t last = first + 1;
        int64_t rows = tiles[first].rows;
        while (last < tiles.size() && tiles[last].matrix == tiles[first].matrix &&
               rows + tiles[last].rows <= most)
            rows += tiles[last++].rows;
        take((int64_t)first, (int64_t)last);
        first = last;
    }
}

// Memory to work in; see the functions below for how much of it.
struct Scratch {
    char* packed;
    float* scales;
    uint8_t* integers;
    bf16* hidden;
    float* sums;
};

// Packs rows of x [rows, in], each where `tiles` has it. Call it inside a parallel region.
template <int KIND>
void pack_rows(const bf16* x, int64_t rows, int64_t in, const std::vector<Tile>& tiles,
               const Scratch& s) {
    if constexpr (KIND != BF16) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            s.scales[r] =
                quantize_row<planes<KIND>()>(x + r * in, in, s.integers + r * in * planes<KIND>());
    }
#pragma omp for schedule(static)
    for (size_t i = 0; i < tiles.size(); i++)
        pack_tile<KIND>(tiles[i], in, s.packed, [&](int64_t r) -> const void* {
            if constexpr (KIND == BF16)
                return x + r * in;
            else
                return s.integers + r * in * planes<KIND>();
        });
}

template <int KIND>
void linear(const bf16* x, int64_t rows, const Matrix& w, int64_t out, const bf16* bias, bf16* y,
            int threads, const Scratch& s) {
    const int64_t panels = ceil_div(out, PANEL), step = panels_at_once(panels, threads);
    std::vector<Tile> tiles;
    std::vector<Item> items;
    add_tiles<KIND>(tiles, 0, rows, 0);
    in_blocks<KIND>(tiles, w.in, [&](int64_t first, int64_t last) {
        for (int64_t p = 0; p < panels; p += step)
            items.push_back({first, last, p, std::min(step, panels - p)});
    });
    const Input input{s.packed, s.scales, row_bytes<KIND>(w.in)};
#pragma omp parallel num_threads(threads)
    {
        pack_rows<KIND>(x, rows, w.in, tiles, s);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < items.size(); i++) {
            const Item& item = items[i];
            for (int64_t p = item.panel; p < item.panel + item.panels; p++) {
                const int64_t channel = p * PANEL, left = out - channel;
                alignas(64) float added[PANEL] = {};
                for (int c = 0; bias && c < std::min<int64_t>(PANEL, left); c++)
                    added[c] = to_float(bias[channel + c]);
                tiles_times_panel<KIND>(
                    w, p, input, &tiles[item.first], item.last - item.first,
                    [&](int64_t row, f32x16 a, f32x16 b) {
                        bf16* to = y + row * out + channel;
                        store_some(to, a + load<f32x16>(added), left);
                        if (left > LANES)
                            store_some(to + LANES, b + load<f32x16>(added + LANES), left - LANES);
                    });
            }
        }
    }
}

// Tokens' choices sorted by expert: rows `ends[e]` to `ends[e + 1]` are those of expert e.
struct Groups {
    std::vector<int64_t> ends;
    std::vector<int64_t> pair_of;     // row → token * chosen + place

    Groups(const int32_t* slots, int64_t tokens, int64_t chosen, int64_t first, int64_t experts)
        : ends(experts + 1, 0) {
        for (int64_t i = 0; i < tokens * chosen; i++) {
            const int64_t e = slots[i] - first;
            if (e >= 0 && e < experts) ends[e + 1]++;
        }
        for (int64_t e = 0; e < experts; e++) ends[e + 1] += ends[e];
        pair_of.resize(ends[experts]);
        std::vector<int64_t> next(ends.begin(), ends.end() - 1);
        for (int64_t i = 0; i < tokens * chosen; i++) {
            const int64_t e = slots[i] - first;
            if (e >= 0 && e < experts) pair_of[next[e]++] = i;
        }
    }
};

struct Bank {
    const char* panels;
    const float* scales;
    const int32_t* sums;
    int64_t in, out;                  // of one expert; out is padded to whole panels

    Matrix expert(int64_t e, int kind) const {
        const int64_t bytes = in * out * (kind == BF16 ? 2 : 1);
        return {panels + e * bytes, scales ? scales + e * out : nullptr,
                sums ? sums + e * out : nullptr, in};
    }
};

template <int KIND>
void experts(const bf16* x, int64_t tokens, int64_t H, const float* weights, const int32_t* slots,
             int64_t chosen, int64_t first, int64_t num_experts, const Bank& gate_up,
             const Bank& down, int64_t width, bf16* y, int threads, const Scratch& s) {
    constexpr int PLANES = planes<KIND>();
    const Groups groups(slots, tokens, chosen, first, num_experts);
    const int64_t rows = groups.pair_of.size();
    const int64_t up_panels = gate_up.out / PANEL, down_panels = down.out / PANEL;
    std::vector<Tile> tiles;
    for (int64_t e = 0; e < num_experts; e++)
        add_tiles<KIND>(tiles, groups.ends[e], groups.ends[e + 1] - groups.ends[e], e);
    std::vector<Item> items, blocks;
    const int64_t step = panels_at_once(up_panels * std::max<int64_t>(1, tiles.size()), threads);
    in_blocks<KIND>(tiles, H, [&](int64_t from, int64_t to) {
        for (int64_t p = 0; p < up_panels; p += step)
            items.push_back({from, to, p, std::min(step, up_panels - p)});
    });
    in_blocks<KIND>(tiles, width,
                    [&](int64_t from, int64_t to) { blocks.push_back({from, to, 0, 0}); });
    // A thread sums up its channels of all experts, so that sums have one order and no races.
    const int64_t down_step = std::clamp<int64_t>(down_panels / (threads * 2), 1, 8);
    const Input input{s.packed, s.scales, row_bytes<KIND>(H)};
    const Input hidden{s.packed, s.scales, row_bytes<KIND>(width)};
    std::vector<float> token_scales(KIND == BF16 ? 0 : tokens);
#pragma omp parallel num_threads(threads)
    {
        if constexpr (KIND != BF16) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t++)
                token_scales[t] = quantize_row<PLANES>(x + t * H, H, s.integers + t * H * PLANES);
        }
#pragma omp for schedule(static)
        for (size_t i = 0; i < tiles.size(); i++)
            pack_tile<KIND>(tiles[i], H, s.packed, [&](int64_t r) -> const void* {
                const int64_t token = groups.pair_of[r] / chosen;
                if constexpr (KIND == BF16) return x + token * H;
                s.scales[r] = token_scales[token];
                return s.integers + token * H * PLANES;
            });
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < items.size(); i++) {
            const Item& item = items[i];
            const Matrix w = gate_up.expert(tiles[item.first].matrix, KIND);
            for (int64_t p = item.panel; p < item.panel + item.panels; p++)
                tiles_times_panel<KIND>(w, p, input, &tiles[item.first], item.last - item.first,
                                        [&](int64_t row, f32x16 gate, f32x16 up) {
                                            store_some(s.hidden + row * width + p * LANES,
                                                       silu(gate) * up, width - p * LANES);
                                        });
        }
        pack_rows<KIND>(s.hidden, rows, width, tiles, s);
#pragma omp for schedule(dynamic, 1)
        for (int64_t p0 = 0; p0 < down_panels; p0 += down_step) {
            const int64_t p1 = std::min(down_panels, p0 + down_step);
            const int64_t from = p0 * PANEL, to = std::min(H, p1 * PANEL), ld = down.out;
            for (int64_t t = 0; t < tokens; t++)
                std::memset(s.sums + t * ld + from, 0, (p1 - p0) * PANEL * sizeof(float));
            for (const Item& block : blocks) {
                const Matrix w = down.expert(tiles[block.first].matrix, KIND);
                for (int64_t p = p0; p < p1; p++)
                    tiles_times_panel<KIND>(
                        w, p, hidden, &tiles[block.first], block.last - block.first,
                        [&](int64_t row, f32x16 a, f32x16 b) {
                            const int64_t pair = groups.pair_of[row];
                            const float weight = weights ? weights[pair] : 1.0f;
                            float* at = s.sums + pair / chosen * ld + p * PANEL;
                            store(at, load<f32x16>(at) + a * weight);
                            store(at + LANES, load<f32x16>(at + LANES) + b * weight);
                        });
            }
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t c = from; c < to; c += LANES)
                    store_some(y + t * H + c, load<f32x16>(s.sums + t * ld + c), to - c);
        }
    }
}

// -------------------------------------------------------------------------------------- attention

struct Cache {
    const void *keys, *values;        // [blocks, block size, KV, D]
    const float *key_scales, *value_scales;  // [blocks, block size, KV], int8 only
    int64_t block_size, heads, head_size;
};

inline int64_t slot_of(const int32_t* table, int64_t token, const Cache& c) {
    return table[token / c.block_size] * c.block_size + token % c.block_size;
}

// D elements of a key or value head, as float32 vectors' sources.
template <class T>
inline f32x16 load_cached(const T* p) {
    if constexpr (sizeof(T) == 1)
        return load_i8(p);
    else
        return load_bf16(p);
}

constexpr int CHUNK = 64;             // keys at a time
constexpr int MOST_HEAD_VECTORS = 16; // heads of up to 256

// A cached head of D elements as bfloat16: as it is, or computed into `room`.
inline const bf16* as_bf16(const bf16* x, float, int64_t, bf16*) { return x; }

inline const bf16* as_bf16(const int8_t* x, float scale, int64_t D, bf16* room) {
    for (int64_t d = 0; d < D; d += LANES) store_bf16(room + d, load_i8(x + d) * scale);
    return room;
}

// One query token of one sequence, query heads that read key heads h0 to h1.
template <class T>
void decode(const bf16* q, bf16* out, const Cache& c, const int32_t* table, int64_t length,
            int64_t h0, int64_t h1, int64_t group, float scale, float* scratch) {
    const int64_t D = c.head_size, vectors = D / LANES, heads = (h1 - h0) * group;
    float* query = scratch;                    // [heads, D]
    float* acc = query + heads * D;            // [heads, D]
    float* p = acc + heads * D;                // [heads, CHUNK]
    float* most = p + heads * CHUNK;           // [heads]
    float* total = most + heads;               // [heads]
    for (int64_t h = 0; h < heads; h++) {
        const bf16* from = q + (h0 * group + h) * D;
        for (int64_t d = 0; d < D; d += LANES) {
            store(query + h * D + d, load_bf16(from + d) * scale);
            store(acc + h * D + d, splat(0));
        }
        most[h] = -INFINITY;
        total[h] = 0;
    }
    const T* keys = (const T*)c.keys;
    const T* values = (const T*)c.values;
    for (int64_t start = 0; start < length; start += CHUNK) {
        const int count = (int)std::min<int64_t>(CHUNK, length - start);
        int64_t slot[CHUNK];
        for (int t = 0; t < count; t++) slot[t] = slot_of(table, start + t, c);
        for (int t = 0; t < count; t++) {
            const T* key = keys + (slot[t] * c.heads + h0) * D;
            const char* value = (const char*)(values + (slot[t] * c.heads + h0) * D);
            // Values are read by head, keys by token: these lines are asked for in memory's order.
            for (int64_t b = 0; b < (h1 - h0) * D * (int64_t)sizeof(T); b += 64)
                __builtin_prefetch(value + b, 0, 2);
            for (int64_t h = h0; h < h1; h++, key += D)
                for (int64_t g = 0; g < group; g++) {
                    const int64_t i = (h - h0) * group + g;
                    f32x16 dot[2] = {splat(0), splat(0)};
                    for (int64_t v = 0; v < vectors; v++)
                        dot[v & 1] += load_cached(key + v * LANES) *
                                      load<f32x16>(query + i * D + v * LANES);
                    float score = sum(dot[0] + dot[1]);
                    if (sizeof(T) == 1) score *= c.key_scales[slot[t] * c.heads + h];
                    p[i * CHUNK + t] = score;
                }
        }
        for (int64_t i = 0; i < heads; i++) {
            float* row = p + i * CHUNK;
            for (int t = count; t < CHUNK; t++) row[t] = -INFINITY;
            f32x16 m = load<f32x16>(row);
            for (int t = LANES; t < CHUNK; t += LANES) m = vmax(m, load<f32x16>(row + t));
            const float now = std::max(most[i], largest(m));
            // A first chunk has nothing to shrink; scores of -inf or NaN go the way that they must.
            const float shrink = most[i] == -INFINITY ? 0.0f : std::exp(most[i] - now);
            f32x16 s = splat(0);
            for (int t = 0; t < CHUNK; t += LANES) {
                f32x16 e = vexp(load<f32x16>(row + t) - now);
                store(row + t, e);
                s += e;
            }
            for (int t = count; t < CHUNK; t++) row[t] = 0;
            float partial = 0;
            for (int t = 0; t < count; t++) partial += row[t];
            most[i] = now;
            total[i] = total[i] * shrink + partial;
            f32x16 sums[MOST_HEAD_VECTORS];
            for (int64_t v = 0; v < vectors; v++)
                sums[v] = load<f32x16>(acc + i * D + v * LANES) * shrink;
            const int64_t h = h0 + i / group;
            if (vectors == 8) {
                f32x16 a[8];
                for (int v = 0; v < 8; v++) a[v] = sums[v];
                for (int t = 0; t < count; t++) {
                    const T* value = values + (slot[t] * c.heads + h) * D;
                    float weight = row[t];
                    if (sizeof(T) == 1) weight *= c.value_scales[slot[t] * c.heads + h];
#pragma GCC unroll 8
                    for (int v = 0; v < 8; v++) a[v] += load_cached(value + v * LANES) * weight;
                }
                for (int v = 0; v < 8; v++) sums[v] = a[v];
            } else {
                for (int t = 0; t < count; t++) {
                    const T* value = values + (slot[t] * c.heads + h) * D;
                    float weight = row[t];
                    if (sizeof(T) == 1) weight *= c.value_scales[slot[t] * c.heads + h];
                    for (int64_t v = 0; v < vectors; v++)
                        sums[v] += load_cached(value + v * LANES) * weight;
                }
            }
            for (int64_t v = 0; v < vectors; v++) store(acc + i * D + v * LANES, sums[v]);
        }
    }
    for (int64_t i = 0; i < heads; i++) {
        bf16* to = out + (h0 * group + i) * D;
        for (int64_t d = 0; d < D; d += LANES)
            store_bf16(to + d, load<f32x16>(acc + i * D + d) * (1.0f / total[i]));
    }
}

// `count` query tokens of one sequence from `position` on, all query heads of one key head. Queries
// of one token and the next are `q_stride` elements apart, results `stride`.
template <class T>
void prefill(const bf16* q, int64_t q_stride, bf16* out, int64_t stride, const Cache& c, const int32_t* table,
             int64_t position, int64_t count, int64_t kv_head, int64_t group, float scale,
             char* scratch) {
    const int64_t D = c.head_size, rows = count * group;
    // Panels of keys (channels are keys) and of values (channels are elements of the head).
    bf16* packed_keys = (bf16*)scratch;                       // [CHUNK / 32][D / 2][32][2]
    bf16* packed_values = packed_keys + CHUNK * D;            // [D / 32][CHUNK / 2][32][2]
    const int64_t width = ceil_div(D, PANEL) * PANEL;
    bf16* p = packed_values + CHUNK * width;                  // [MAX_ROWS, CHUNK]
    bf16* packed_queries = p + MAX_ROWS * CHUNK;              // tiles of [rows, D]
    float* acc = (float*)(packed_queries + rows * D);         // [rows, padded D]
    float* scores = acc + rows * width;                       // [MAX_ROWS, CHUNK]
    float* most = scores + MAX_ROWS * CHUNK;                  // [rows]
    float* total = most + rows;                               // [rows]
    std::vector<Tile> tiles;
    add_tiles<BF16>(tiles, 0, rows, 0);
    for (const Tile& t : tiles)
        pack_tile<BF16>(t, D, (char*)packed_queries, [&](int64_t r) {
            return q + r / group * q_stride + (kv_head * group + r % group) * D;
        });
    std::fill(most, most + rows, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    std::memset(acc, 0, rows * width * sizeof(float));
    const Matrix key_matrix{(const char*)packed_keys, nullptr, nullptr, D};
    const Matrix value_matrix{(const char*)packed_values, nullptr, nullptr, CHUNK};
    const Input queries{(const char*)packed_queries, nullptr, 2 * D};
    const Prefetch here_only{scratch, 0};  // all is in the cache
    const T* keys = (const T*)c.keys;
    const T* values = (const T*)c.values;
    const int64_t length = position + count;
    std::memset(packed_values, 0, CHUNK * width * sizeof(bf16));
    for (int64_t start = 0; start < length; start += CHUNK) {
        const int here = (int)std::min<int64_t>(CHUNK, length - start);
        for (int t = 0; t < CHUNK; t++) {
            uint32_t* to = (uint32_t*)packed_keys + t / PANEL * (D / 2) * PANEL + t % PANEL;
            alignas(64) bf16 floats[MOST_HEAD_VECTORS * LANES];
            const bf16* key = floats;
            if (t >= here) {  // what memory holds there may be NaN
                std::memset(floats, 0, D * sizeof(bf16));
            } else {
                const int64_t at = slot_of(table, start + t, c) * c.heads + kv_head;
                key = as_bf16(keys + at * D, sizeof(T) == 1 ? c.key_scales[at] : 1, D, floats);
            }
            for (int64_t d = 0; d < D / 2; d++) std::memcpy(to + d * PANEL, key + 2 * d, 4);
        }
        for (int t = 0; t < CHUNK; t += 2) {
            alignas(64) bf16 floats[2][MOST_HEAD_VECTORS * LANES];
            const bf16* pair[2] = {floats[0], floats[1]};
            for (int i = 0; i < 2; i++) {
                if (t + i >= here) {
                    std::memset(floats[i], 0, D * sizeof(bf16));
                    continue;
                }
                const int64_t at = slot_of(table, start + t + i, c) * c.heads + kv_head;
                pair[i] = as_bf16(values + at * D, sizeof(T) == 1 ? c.value_scales[at] : 1, D,
                                  floats[i]);
            }
            for (int64_t d = 0; d < D; d += LANES) {
                bf16* to = packed_values + (d / PANEL * (CHUNK / 2) + t / 2) * PANEL * 2;
                // A float is a bfloat16 above 16 zeros.
                const u32x16 low = (u32x16)load_bf16(pair[0] + d) >> 16;
                store(to + d % PANEL * 2, low | (u32x16)load_bf16(pair[1] + d));
            }
        }
        for (const Tile& tile : tiles) {
            const int64_t r0 = tile.row;
            const int n = (int)tile.rows;
            // Queries before the chunk see nothing of it.
            if (position + (r0 + n - 1) / group < start) continue;
            for (int panel = 0; panel < CHUNK / PANEL; panel++)
                multiply<BF16>(n, key_matrix, panel, queries.tile(tile), nullptr, here_only,
                               scores + panel * PANEL, CHUNK);
            float shrink[MAX_ROWS];
            for (int r = 0; r < n; r++) {
                float* row = scores + r * CHUNK;
                const int64_t seen = position + (r0 + r) / group + 1 - start;
                for (int64_t t = std::max<int64_t>(0, seen); t < CHUNK; t++) row[t] = -INFINITY;
                f32x16 m = load<f32x16>(row);
                for (int t = LANES; t < CHUNK; t += LANES) m = vmax(m, load<f32x16>(row + t));
                float& before = most[r0 + r];
                const float now = std::max(before, largest(m) * scale);
                shrink[r] = before == -INFINITY ? 0.0f : std::exp(before - now);
                // A query of this tile that sees nothing of the chunk has nothing to scale by.
                const float base = now == -INFINITY ? 0.0f : now;
                before = now;
                f32x16 s = splat(0);
                for (int t = 0; t < CHUNK; t += LANES) {
                    f32x16 e = vexp(load<f32x16>(row + t) * scale - base);
                    s += e;
                    store_bf16(p + r * CHUNK + t, e);
                }
                total[r0 + r] = total[r0 + r] * shrink[r] + sum(s);
            }
            for (int64_t panel = 0; panel < width / PANEL; panel++) {
                alignas(64) float part[MAX_ROWS * PANEL];
                multiply<BF16, CHUNK / 2>(n, value_matrix, panel, (const uint32_t*)p, nullptr,
                                          here_only, part, PANEL);
                for (int r = 0; r < n; r++)
                    for (int c = 0; c < PANEL; c += LANES) {
                        float* to = acc + (r0 + r) * width + panel * PANEL + c;
                        store(to, load<f32x16>(to) * shrink[r] + load<f32x16>(part + r * PANEL + c));
                    }
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        bf16* to = out + r / group * stride + (kv_head * group + r % group) * D;
        for (int64_t d = 0; d < D; d += LANES)
            store_bf16(to + d, load<f32x16>(acc + r * width + d) * (1.0f / total[r]));
    }
}

// Query tokens of a sequence that are attended together.
constexpr int64_t QUERY_BLOCK = 480;

}  // namespace

// -------------------------------------------------------------------------------------- interface

extern "C" {

// Packs a matrix, or a bank of `count`, [out, in] of `bytes` (2: bfloat16, 1: int8) per element.
// `to` may be `from` where out is a multiple of 32 and `gate_up` is 0. `sums` gets, for int8, the
// sum of each channel, [count, padded out], in packed order; `scales` [count, out] go to
// `packed_scales` in the same order.
void moespan_pack(const void* from, void* to, int64_t count, int64_t out, int64_t in, int bytes,
                  int gate_up, const float* scales, float* packed_scales, int32_t* sums,
                  int threads) {
    const int64_t panels = gate_up ? ceil_div(out / 2, LANES) : ceil_div(out, PANEL);
    const int64_t panel_bytes = in * PANEL * bytes;
#pragma omp parallel num_threads(threads)
    {
        std::vector<char> panel(panel_bytes);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * panels; i++) {
            const int64_t m = i / panels, p = i % panels;
            const char* source = (const char*)from + m * out * in * bytes;
            if (bytes == 2)
                pack_panel<2>((const bf16*)source, (bf16*)panel.data(), p, out, in, gate_up);
            else
                pack_panel<4>((const int8_t*)source, (int8_t*)panel.data(), p, out, in, gate_up);
            for (int c = 0; bytes == 1 && c < PANEL; c++) {
                const int64_t row = source_row(p, c, out, gate_up), at = i * PANEL + c;
                int32_t total = 0;
                if (row >= 0)
                    for (int64_t k = 0; k < in; k++)
                        total += ((const int8_t*)source)[row * in + k];
                sums[at] = total;
                packed_scales[at] = row >= 0 ? scales[m * out + row] : 0.0f;
            }
            std::memcpy((char*)to + i * panel_bytes, panel.data(), panel_bytes);
        }
    }
}

// x [rows, in] · Wᵀ + bias → y [rows, out].
// Scratch: packed [rows, in] times 2 bytes; for int8 row_scales [rows], integers like packed.
void moespan_linear(int kind, const bf16* x, int64_t rows, int64_t in, int64_t out,
                    const void* panels, const float* scales, const int32_t* sums, const bf16* bias,
                    bf16* y, int threads, void* packed, float* row_scales, uint8_t* integers) {
    const Matrix w{(const char*)panels, scales, sums, in};
    const Scratch s{(char*)packed, row_scales, integers, nullptr, nullptr};
    auto run = kind == BF16 ? linear<BF16> : kind == W8A8 ? linear<W8A8> : linear<W8A16>;
    run(x, rows, w, out, bias, y, threads, s);
}

// See `Ops.experts`. Banks are packed, gate_up as such, down with `down_out` >= H channels.
// weights null means 1 for all. Scratch for up to R = tokens · chosen rows: packed
// [R, max(H, width)] times 2 bytes; for int8 row_scales [R], integers [max(R · width, tokens · H)]
// times 2 bytes; hidden [R, width]; sums [tokens, down_out].
void moespan_experts(int kind, const bf16* x, int64_t tokens, int64_t H, const float* weights,
                     const int32_t* slots, int64_t chosen, int64_t first, int64_t num_experts,
                     const void* up_panels, const float* up_scales, const int32_t* up_sums,
                     int64_t up_out, const void* down_panels, const float* down_scales,
                     const int32_t* down_sums, int64_t down_out, int64_t width, bf16* y,
                     int threads, void* packed, float* row_scales, uint8_t* integers, bf16* hidden,
                     float* sums) {
    const Bank gate_up{(const char*)up_panels, up_scales, up_sums, H, up_out};
    const Bank down{(const char*)down_panels, down_scales, down_sums, width, down_out};
    const Scratch s{(char*)packed, row_scales, integers, hidden, sums};
    auto run = kind == BF16 ? experts<BF16> : kind == W8A8 ? experts<W8A8> : experts<W8A16>;
    run(x, tokens, H, weights, slots, chosen, first, num_experts, gate_up, down, width, y, threads,
        s);
}

// See `Ops.attention`; q and out [T, N, D], tokens of q `q_stride` elements apart. `is_int8` tells
// the cache's kind.
void moespan_attention(const bf16* q, int64_t q_stride, bf16* out, int64_t num_heads, int64_t head_size,
                       int64_t num_kv_heads, const void* keys, const void* values,
                       const float* key_scales, const float* value_scales, int is_int8,
                       int64_t block_size, const int32_t* tables, int64_t table_width,
                       const int64_t* query_lens, const int64_t* context_lens,
                       int64_t num_sequences, float scale, int threads) {
    const Cache c{keys, values, key_scales, value_scales, block_size, num_kv_heads, head_size};
    const int64_t group = num_heads / num_kv_heads, stride = num_heads * head_size;
    struct Task {
        int64_t sequence, row, position, count, h0, h1, work;
    };
    std::vector<Task> tasks;
    int64_t decodes = 0;
    for (int64_t s = 0; s < num_sequences; s++) decodes += query_lens[s] == 1;
    // Few sequences are shared by heads; but a task of many heads reads memory in longer pieces.
    const int64_t splits = std::clamp<int64_t>(
        ceil_div(4 * threads, std::max<int64_t>(decodes, 1)), 1, num_kv_heads);
    const int64_t heads_each =
        decodes >= 4 * threads ? num_kv_heads : ceil_div(num_kv_heads, splits);
    int64_t row = 0, most_rows = 0, most_heads = 0;
    for (int64_t s = 0; s < num_sequences; row += query_lens[s], s++) {
        if (query_lens[s] == 1) {
            for (int64_t h = 0; h < num_kv_heads; h += heads_each) {
                const int64_t h1 = std::min(num_kv_heads, h + heads_each);
                tasks.push_back({s, row, context_lens[s], 1, h, h1,
                                 (context_lens[s] + 1) * (h1 - h) * group});
                most_heads = std::max(most_heads, (h1 - h) * group);
            }
            continue;
        }
        const int64_t block = std::max<int64_t>(1, QUERY_BLOCK / group);
        for (int64_t i = 0; i < query_lens[s]; i += block)
            for (int64_t h = 0; h < num_kv_heads; h++) {
                const int64_t n = std::min(block, query_lens[s] - i);
                tasks.push_back({s, row + i, context_lens[s] + i, n, h, h + 1,
                                 (context_lens[s] + i + n) * n * group});
                most_rows = std::max(most_rows, n * group);
            }
    }
    // The largest first, so that no thread is left alone with one at the end.
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.work > b.work; });
    const int64_t D = head_size, width = ceil_div(D, PANEL) * PANEL;
    const int64_t prefill_bytes =
        (CHUNK * D + CHUNK * width + MAX_ROWS * CHUNK + most_rows * D) * 2 +
        (most_rows * (width + 2) + MAX_ROWS * CHUNK) * 4;
    const int64_t decode_bytes = most_heads * (2 * D + CHUNK + 2) * 4;
#pragma omp parallel num_threads(threads)
    {
        std::vector<char> memory(std::max(prefill_bytes, decode_bytes) + 64);
        char* scratch = (char*)(((uintptr_t)memory.data() + 63) & ~uintptr_t(63));
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) {
            const Task& t = tasks[i];
            const int32_t* table = tables + t.sequence * table_width;
            const bf16* from = q + t.row * q_stride;
            bf16* to = out + t.row * stride;
            if (query_lens[t.sequence] == 1) {
                auto run = is_int8 ? decode<int8_t> : decode<bf16>;
                run(from, to, c, table, t.position + 1, t.h0, t.h1, group, scale, (float*)scratch);
            } else {
                auto run = is_int8 ? prefill<int8_t> : prefill<bf16>;
                run(from, q_stride, to, stride, c, table, t.position, t.count, t.h0, group, scale, scratch);
            }
        }
    }
}

// residual may be null; else total gets x + residual, rounded, and is what is normalised.
void moespan_rms_norm(const bf16* x, const bf16* residual, const bf16* weight, int64_t rows,
                      int64_t width, float eps, bf16* total, bf16* y, int threads) {
#pragma omp parallel for num_threads(rows > 4 ? threads : 1) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16* from = x + r * width;
        f32x16 squares = splat(0);
        if (residual) {
            bf16* to = total + r * width;
            for (int64_t i = 0; i < width; i += LANES)
                store_bf16(to + i,
                           load_bf16(from + i) + load_bf16(residual + r * width + i));
            from = to;
        }
        for (int64_t i = 0; i < width; i += LANES) {
            f32x16 v = load_bf16(from + i);
            squares += v * v;
        }
        const float factor = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
        for (int64_t i = 0; i < width; i += LANES) {
            bf16 rounded[LANES];
            store_bf16(rounded, load_bf16(from + i) * factor);
            store_bf16(y + r * width + i, load_bf16(rounded) * load_bf16(weight + i));
        }
    }
}

// Rotates the first `rotated` of `heads` heads of each token in place, half-split; cos and sin
// float32 [tokens, D / 2].
void moespan_rope(bf16* qkv, int64_t tokens, int64_t heads, int64_t rotated, int64_t head_size,
                  const float* cos, const float* sin, int threads) {
    const int64_t half = head_size / 2;
#pragma omp parallel for num_threads(tokens > 8 ? threads : 1) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < rotated; h++) {
            bf16* a = qkv + (t * heads + h) * head_size;
            bf16* b = a + half;
            for (int64_t i = 0; i < half; i += LANES) {
                const f32x16 c = load<f32x16>(cos + t * half + i);
                const f32x16 s = load<f32x16>(sin + t * half + i);
                const f32x16 first = load_bf16(a + i), second = load_bf16(b + i);
                store_bf16(a + i, first * c - second * s);
                store_bf16(b + i, second * c + first * s);
            }
        }
}

// Stores heads of k or v, [T, KV, D] with tokens `stride` elements apart, at slots of a cache: as
// they are, or (scales not null) as integers with one scale for each head.
void moespan_write_cache(const bf16* x, int64_t tokens, int64_t heads, int64_t head_size,
                         int64_t stride, const int32_t* slots, void* cache, float* scales,
                         int threads) {
#pragma omp parallel for num_threads(tokens > 8 ? threads : 1) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const bf16* from = x + t * stride;
        const int64_t to = int64_t(slots[t]) * heads;
        if (!scales) {
            std::memcpy((bf16*)cache + to * head_size, from, heads * head_size * sizeof(bf16));
            continue;
        }
        for (int64_t h = 0; h < heads; h++, from += head_size) {
            float most = 0;
            for (int64_t d = 0; d < head_size; d++)
                most = std::max(most, std::fabs(to_float(from[d])));
            const float scale = most / 127.0f;
            scales[to + h] = scale;
            int8_t* out = (int8_t*)cache + (to + h) * head_size;
            for (int64_t d = 0; d < head_size; d++)
                out[d] = most > 0 ? int8_t(std::nearbyintf(to_float(from[d]) / scale)) : 0;
        }
    }
}

// See `Ops.route`; the router is transposed, float32 [H, experts].
void moespan_route(const bf16* x, const float* router, int64_t tokens, int64_t H, int64_t experts,
                   int64_t chosen, int renormalize, float* weights, int32_t* slots, int threads) {
    constexpr int TOKENS = 4, VECTORS = 4;
#pragma omp parallel num_threads(tokens > 4 ? threads : 1)
    {
        std::vector<float> logits(TOKENS * experts);
#pragma omp for schedule(static)
        for (int64_t t0 = 0; t0 < tokens; t0 += TOKENS) {
            const int n = (int)std::min<int64_t>(TOKENS, tokens - t0);
            int64_t e0 = 0;
            for (; e0 + LANES * VECTORS <= experts; e0 += LANES * VECTORS) {
                f32x16 acc[TOKENS][VECTORS] = {};
                for (int64_t k = 0; k < H; k++)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) {
                        f32x16 w = load<f32x16>(router + k * experts + e0 + v * LANES);
#pragma GCC unroll 4
                        for (int t = 0; t < TOKENS; t++)
                            acc[t][v] += w * to_float(x[std::min(t0 + t, tokens - 1) * H + k]);
                    }
                for (int t = 0; t < n; t++)
                    for (int v = 0; v < VECTORS; v++)
                        store(&logits[t * experts + e0 + v * LANES], acc[t][v]);
            }
            for (; e0 < experts; e0++)
                for (int t = 0; t < n; t++) {
                    float s = 0;
                    for (int64_t k = 0; k < H; k++)
                        s += to_float(x[(t0 + t) * H + k]) * router[k * experts + e0];
                    logits[t * experts + e0] = s;
                }
            for (int t = 0; t < n; t++) {
                float* row = &logits[t * experts];
                float most = row[0], total = 0, kept = 0;
                for (int64_t e = 1; e < experts; e++) most = std::max(most, row[e]);
                for (int64_t e = 0; e < experts; e++) total += row[e] = std::exp(row[e] - most);
                float* w = weights + (t0 + t) * chosen;
                int32_t* to = slots + (t0 + t) * chosen;
                for (int64_t c = 0; c < chosen; c++) {
                    int64_t best = 0;
                    for (int64_t e = 1; e < experts; e++)
                        if (row[e] > row[best]) best = e;
                    w[c] = row[best] / total;
                    kept += w[c];
                    to[c] = (int32_t)best;
                    row[best] = -1;
                }
                for (int64_t c = 0; renormalize && chosen > 1 && c < chosen; c++)
                    w[c] /= kept + 1e-20f;
            }
        }
    }
}

}  // extern "C"
