// How weights and activations lie in memory for the products.
//
// Packed weights. A matrix [out, in] is cut into panels of 32 output channels, padded with zeros. A
// step along `in` is what one dot-product instruction takes per lane: 2 bfloat16 or 4 int8. For
// each step a panel holds two vectors of 16 channels. One pass over a panel therefore reads memory
// in order, and keeps the results of up to MAX_ROWS input rows in registers until they are
// complete. The place of a row does not depend on other rows, so rows can be packed as they are
// read.
//
// In a packed gate-up matrix a panel holds 16 channels of gate and the same 16 channels of up, so
// that silu(gate) * up is computed in registers.
//
// 8-bit products need unsigned activations. A row is stored as integer + 128; then 128 times the
// sum of a channel's weights, kept beside its scale, is subtracted from the result. Activations of
// 16 bits (weight-only quantisation) are multiplied as high and low bytes separately: the high
// bytes carry the sign, and the two integer results are joined in float32.

#pragma once

#include <vector>

#include "amx.h"

namespace {

// A panel of 4-bit integers: see int4.h.
constexpr int GROUP = 32;                              // weights along `in` that share a scale
constexpr int64_t GROUP_INTEGERS = GROUP * PANEL / 2;  // bytes
constexpr int64_t GROUP_BYTES = GROUP_INTEGERS + PANEL * sizeof(bf16);

// From this many rows on, matrix instructions are faster, although the panel must first be unpacked
// to bfloat16 for them.
constexpr int64_t LEAST_INT4_AMX_ROWS = BATCH_INVARIANT ? 1 : 6;

// Rows whose results fill the registers, with 2 accumulators each.
constexpr int MAX_ROWS = WIDE ? 12 : 3;

enum Kind { BF16 = 0, W8A8 = 1, W8A16 = 2, INT4 = 3 };

// The kind in which input rows are packed for weights of `kind`.
constexpr int rows_of(int kind) { return kind == INT4 ? BF16 : kind; }

inline int64_t panel_bytes(int kind, int64_t in) {
    return kind == INT4 ? in / GROUP * GROUP_BYTES : in * PANEL * (kind == BF16 ? 2 : 1);
}

// A packed matrix [out, in], or one expert of a bank.
struct Matrix {
    const char* panels;
    const float* scales;      // [padded out], int8 only
    const int32_t* sums;      // [padded out], of a channel's integers, int8 only
    int64_t in;
    int64_t all = in;         // inputs of a whole panel, if only `in` of them are summed

    const char* panel(int kind, int64_t p) const { return panels + p * panel_bytes(kind, all); }

    // Inputs `first` to `first + count` of all panels.
    Matrix part(int kind, int64_t first, int64_t count) const {
        return {panels + panel_bytes(kind, first), scales, sums, count, all};
    }
};

// The channel of row `row` of a matrix [out, in], counted over all panels. In a gate-up matrix,
// whose gate and up have `half` channels each, a panel holds 16 channels of gate and the same 16 of
// up.
inline int64_t channel_of(int64_t row, int64_t out, bool gate_up) {
    if (!gate_up) return row;
    const int64_t half = out / 2, is_up = row >= half, i = row - is_up * half;
    return i / LANES * PANEL + is_up * LANES + i % LANES;
}

// Writes the `bytes` of one row to its channel, whose first four bytes are at `to`.
inline void pack_row(const char* from, int64_t bytes, char* to) {
    for (int64_t k = 0; k < bytes; k += 4)
        std::memcpy(to + k * PANEL, from + k, std::min<int64_t>(4, bytes - k));
}

// The same for 16 rows, `stride` bytes apart, with consecutive channels.
inline void pack_lanes(const char* from, int64_t stride, int64_t bytes, char* to) {
    constexpr int64_t BLOCK = 4 * LANES;
    int64_t k = 0;
    for (; k + BLOCK <= bytes; k += BLOCK) {
        u32x16 block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = load<u32x16>(from + i * stride + k);
        transpose(block);
        for (int i = 0; i < LANES; i++) store(to + (k + 4 * i) * PANEL, block[i]);
    }
    for (int i = 0; i < LANES; i++)
        pack_row(from + i * stride + k, bytes - k, to + k * PANEL + 4 * i);
}

// Rounds one row to int8, as `round_rows` in `checkpoint/rounding.py` does, and returns the scale.
// `largest` is the largest magnitude of the whole row; null means that of x.
inline float round_row(const bf16* x, int64_t n, const float* largest, int8_t* to) {
    // Magnitudes of bfloat16 have the order of their bits, with NaN above all others.
    bf16 most = 0;
    if (!largest)
        for (int64_t i = 0; i < n; i++) most = std::max(most, bf16(x[i] & 0x7fff));
    const float scale = (largest ? *largest : to_float(most)) / 127.0f;
    const float divisor = scale == 0 ? 1.0f : scale;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(to + i, __builtin_convertvector(round_to_int(load_bf16(x + i) / divisor), i8x16));
    for (; i < n; i++) to[i] = int8_t(std::nearbyintf(to_float(x[i]) / divisor));
    return scale;
}

// -------------------------------------------------------------------------------- activation tiles

// Input rows that are multiplied together. They are packed, so that a product reads them in order
// wherever they come from. For dot products a tile has up to MAX_ROWS rows and holds, for each step
// along `in`, four bytes of every row. For matrix instructions it has up to twice 16 rows and
// holds, for each 64 bytes along `in` (fewer at the end), those bytes of every row.
struct Tile {
    int64_t row;                      // the first row
    int64_t rows;
    int64_t matrix;                   // number in a bank
    bool is_amx;
};

// The packed tiles of one input, one after another.
struct Input {
    const char* packed;
    const float* scales;              // of each row; quantised only
    int64_t row_bytes;
    int64_t skipped = 0;              // bytes at the start of each row to leave out; bfloat16 only

    const char* tile(const Tile& t) const {
        return packed + t.row * row_bytes + t.rows * skipped;
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

// Appends tiles for rows `first` to `first + count`. Enough rows become tiles for matrix
// instructions, all full except the last; fewer rows become tiles for dot products, all of about
// the same height.
template <int KIND>
void add_tiles(std::vector<Tile>& tiles, int64_t first, int64_t count, int64_t matrix) {
    constexpr int64_t least = KIND == INT4 ? LEAST_INT4_AMX_ROWS : LEAST_AMX_ROWS;
    if (count >= least && has_amx()) {
        constexpr int64_t most = 2 * AMX_ROWS / planes<KIND>();
        for (int64_t r = 0; r < count; r += most)
            tiles.push_back({first + r, std::min(most, count - r), matrix, true});
        return;
    }
    const int64_t number = (count + max_rows<KIND>() - 1) / max_rows<KIND>();
    for (int64_t t = 0; t < number; t++) {
        const int64_t from = count * t / number, to = count * (t + 1) / number;
        tiles.push_back({first + from, to - from, matrix, false});
    }
}

// Rounds one row to integers + 128 and returns the scale. `PLANES` 1: 8 bits. `PLANES` 2: 16 bits,
// all high bytes before all low bytes.
template <int PLANES>
float quantize_row(const bf16* x, int64_t n, uint8_t* out) {
    f32x16 most = splat(0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) most = vmax(most, absolute(load_bf16(x + i)));
    float amax = largest(most);
    for (; i < n; i++) amax = std::max(amax, std::fabs(to_float(x[i])));
    const float scale = amax > 0 ? amax / (PLANES == 1 ? 127.0f : 32767.0f) : 1.0f;
    for (i = 0; i < n; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, n - i);
        alignas(64) bf16 some[LANES] = {};
        std::memcpy(some, x + i, count * sizeof(bf16));
        const i32x16 q = round_to_int(load_bf16(some) / scale);
        const u8x16 high = low_bytes(PLANES == 1 ? q : q >> 8) + 128, low = low_bytes(q);
        std::memcpy(out + i, &high, count);
        if (PLANES == 2) std::memcpy(out + n + i, &low, count);
    }
    return std::isfinite(amax) ? scale : NAN;
}

// The rows of one plane of a tile for dot products: 4 bytes of each in turn. Steps are `step` words
// apart.
template <class RowAt>
void pack_words(int64_t rows, int64_t words, int64_t step, uint32_t* to, RowAt row_at) {
    int64_t k = 0;
    for (; k + LANES <= words; k += LANES) {
        u32x16 block[LANES] = {};
        for (int64_t r = 0; r < rows; r++) block[r] = load<u32x16>(row_at(r) + 4 * k);
        transpose(block);
        for (int i = 0; i < LANES; i++) store_lanes(to + (k + i) * step, block[i], rows);
    }
    for (; k < words; k++)
        for (int64_t r = 0; r < rows; r++)
            std::memcpy(to + k * step + r, row_at(r) + 4 * k, sizeof *to);
}

// Packs one tile with `in` elements a row; row r begins at `row_at(r)`. Quantised rows are as
// quantize_row wrote them.
template <int KIND, class RowAt>
void pack_tile(const Tile& t, int64_t in, char* packed, RowAt row_at) {
    constexpr int PLANES = planes<KIND>();
    const int64_t plane_bytes = in * (KIND == BF16 ? 2 : 1), rows = t.rows;
    char* to = packed + t.row * row_bytes<KIND>(in);
    const char* from[2 * AMX_ROWS];
    for (int64_t r = 0; r < rows; r++) from[r] = (const char*)row_at(t.row + r);
    for (int plane = 0; plane < PLANES; plane++) {
        const int64_t at = plane * plane_bytes;
        if (!t.is_amx) {
            pack_words(rows, plane_bytes / 4, PLANES * rows, (uint32_t*)to + plane * rows,
                       [&](int64_t r) { return from[r] + at; });
            continue;
        }
        for (int64_t k = 0; k < plane_bytes; k += AMX_BYTES) {
            const int64_t bytes = std::min(AMX_BYTES, plane_bytes - k);
            for (int64_t r = 0; r < rows; r++)
                std::memcpy(to + rows * (at + k) + r * bytes, from[r] + at + k, bytes);
        }
    }
}

}  // namespace
