// Products of packed activations and packed weights: single matrices, and mixtures of experts.

#pragma once

#include <vector>

#include "int4.h"
#include "team.h"

namespace {

// Bytes of input rows that stay in the second-level cache while panels pass by. Processors with
// matrix instructions have 2 MiB of it, others 1 MiB.
constexpr int64_t ROW_BLOCK_BYTES = (AMX ? 1024 : 512) << 10;
// Most bfloat16 inputs in one partial sum; a multiple of 32, as tiles are.
constexpr int64_t MOST_INPUTS = 2048;
// Bytes of sums that a thread works on at a time.
constexpr int64_t SUMS_BYTES = 1 << 20;
// From this many elements on, a result is written past the caches.
constexpr int64_t LARGE_RESULT = 1 << 20;
constexpr int64_t MOST_TILE_ROWS = 2 * AMX_ROWS;
// How far ahead a single tile prefetches its panel.
constexpr int64_t prefetch_bytes(int kind) { return kind == INT4 ? 6144 : 4096; }
// The tiles of dot products that prefetch the next panel.
constexpr int64_t MOST_PREFETCHING_TILES = 4;
// Two panels of up to this many bytes fit into the second-level cache beside the rows.
constexpr int64_t NEXT_PANEL_BYTES = 160 << 10;
// Up to this many rows read a panel of 4-bit integers directly. For more it is unpacked to bfloat16.
constexpr int64_t MOST_INT4_ROWS = BATCH_INVARIANT ? 0 : 8;

// ------------------------------------------------------------------------------------------ tiles

// What to prefetch while a tile is computed: from `at` on, `bytes` bytes in each step.
struct Prefetch {
    const char* at;
    int64_t bytes;
};

// The values of 16 channels from their integer sums. `low` is the sum of the low bytes, if there
// are two planes.
template <int KIND>
inline f32x16 scaled(i32x16 sums, i32x16 low, const Matrix& w, int64_t channel, float row_scale) {
    sums -= load<i32x16>(w.sums + channel) * 128;
    f32x16 v = __builtin_convertvector(sums, f32x16);
    if constexpr (KIND == W8A16) v = v * 256.0f + __builtin_convertvector(low, f32x16);
    return v * load<f32x16>(w.scales + channel) * row_scale;
}

// The R rows of a packed tile times one panel → float32 [R, 32], rows `ld` elements apart.
// `scales`: one for each row. With STRIDE (bfloat16 only) rows are not packed, but STRIDE pairs
// apart.
template <int KIND, int R, int STRIDE = 0>
void multiply(const Matrix& w, int64_t panel, const uint32_t* x, const float* scales,
              Prefetch ahead, float* out, int64_t ld) {
    const char* p = w.panel(KIND, panel);
    const char* next = ahead.at;
    if constexpr (KIND == INT4) {
        multiply_int4<R>(p, w.in, x, next, ahead.bytes * GROUP_BYTES / 128, out, ld);
    } else if constexpr (KIND == BF16) {
        // Each product waits for the previous one in its chain: few rows need more chains.
        constexpr int CHAINS = BATCH_INVARIANT || R >= 4 ? 1 : R >= 2 ? 2 : 4;
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
                store(out + r * ld + h * LANES,
                      scaled<KIND>(acc[0][0][r][h], acc[0][PLANES - 1][r][h], w,
                                   panel * PANEL + h * LANES, scales[r]));
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

#if AMX

// The rows of an AmxInput times one panel → float32 [rows, 32], rows `ld` elements apart.
template <int KIND>
void multiply_amx(AmxShapes& shapes, const Matrix& w, int64_t panel, const AmxInput& x,
                  const float* scales, Prefetch ahead, float* out, int64_t ld) {
    const int64_t bytes = panel_bytes(KIND, w.in);
    alignas(64) int32_t sums[2 * AMX_ROWS * PANEL];
    void* to = KIND == BF16 ? (void*)out : (void*)sums;
    const auto run = x.second ? amx_product<KIND == BF16, true> : amx_product<KIND == BF16, false>;
    run(shapes, x, w.panel(KIND, panel), bytes / PANEL, ahead.at, ahead.bytes * 16, to,
        KIND == BF16 ? ld : PANEL);
    if constexpr (KIND != BF16) {
        constexpr int PLANES = planes<KIND>();
        const int64_t rows = PLANES == 2 ? x.first : x.first + x.second;
        for (int c = 0; c < PANEL; c += LANES)
            for (int64_t r = 0; r < rows; r++) {
                const int32_t* row = sums + r * PANEL + c;
                store(out + r * ld + c,
                      scaled<KIND>(load<i32x16>(row),
                                   load<i32x16>(row + (PLANES - 1) * rows * PANEL), w,
                                   panel * PANEL + c, scales[r]));
            }
    }
}

template <int KIND>
inline AmxInput amx_input(const Tile& t, const char* packed, int64_t in) {
    const int64_t plane = t.rows * in * (KIND == BF16 ? 2 : 1), chunk = t.rows * AMX_BYTES;
    if (planes<KIND>() == 2) return {packed, t.rows, t.rows, chunk, AMX_BYTES, plane, plane};
    const int64_t first = std::min(t.rows, AMX_ROWS), rest = plane / t.rows % AMX_BYTES;
    return {packed, first, t.rows - first, chunk, AMX_BYTES, first * AMX_BYTES, first * rest};
}

#endif

// A packed tile times one panel → float32 [rows, 32], rows `ld` elements apart.
template <int KIND>
inline void multiply(AmxShapes& shapes, const Tile& t, const Matrix& w, int64_t panel,
                     const Input& input, Prefetch ahead, float* out, int64_t ld) {
    const char* packed = input.tile(t);
#if AMX
    if (t.is_amx)
        return multiply_amx<KIND>(shapes, w, panel, amx_input<KIND>(t, packed, w.in),
                                  input.scales + t.row, ahead, out, ld);
#endif
    multiply<KIND>(t.rows, w, panel, (const uint32_t*)packed, input.scales + t.row, ahead, out,
                   ld);
}

// What to prefetch during tile `i` of `count` tiles that a panel is multiplied with. A single tile is
// limited by memory, and prefetches its own panel a little ahead. More tiles have time to prefetch
// the next panel, if the second-level cache has room for both: the first few of them, or with matrix
// instructions all.
template <int KIND>
inline Prefetch prefetch_of(const Tile& t, int64_t i, int64_t count, const Matrix& w,
                            int64_t panel) {
    const int64_t bytes = panel_bytes(KIND, w.in);
    if (count == 1 || (i == 0 && bytes > NEXT_PANEL_BYTES))
        return {w.panel(KIND, panel) + prefetch_bytes(KIND), 128};
    const int64_t parts = t.is_amx ? count : std::min(count, MOST_PREFETCHING_TILES);
    if (i >= parts || bytes > NEXT_PANEL_BYTES) return {w.panel(KIND, panel), 0};
    return {w.panel(KIND, panel + 1) + bytes * i / parts, ceil_div(128, parts)};
}

// `count` tiles of an input times one panel. `emit(row, channels 0-15, channels 16-31)` gets the
// results of each row. An unpacked panel is in a cache already, and alone.
template <int KIND, bool UNPACKED = false, class Emit>
inline void tiles_times_panel(AmxShapes& shapes, Room& room, const Matrix& w, int64_t panel,
                              const Input& input, const Tile* tiles, int64_t count, Emit emit) {
    if constexpr (KIND == INT4) {
        const int64_t rows = tiles[count - 1].row + tiles[count - 1].rows - tiles->row;
        if (tiles->is_amx || rows > MOST_INT4_ROWS) {
            char* unpacked = room.of(panel_bytes(BF16, w.in));
            unpack_int4_panel(w.panel(INT4, panel), w.in, unpacked);
            const Matrix one{unpacked, nullptr, nullptr, w.in};
            return tiles_times_panel<BF16, true>(shapes, room, one, 0, input, tiles, count, emit);
        }
    }
    alignas(64) float out[MOST_TILE_ROWS * PANEL];
    for (int64_t i = 0; i < count; i++) {
        const Tile& t = tiles[i];
        const Prefetch ahead = UNPACKED ? Prefetch{w.panels, 0}
                                        : prefetch_of<KIND>(t, i, count, w, panel);
        multiply<KIND>(shapes, t, w, panel, input, ahead, out, PANEL);
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

inline void store_some(float* p, f32x16 v, int64_t count) {
    std::memcpy(p, &v, std::min<int64_t>(count, LANES) * sizeof(float));
}

// Panels that a thread takes at a time: few enough to balance the threads, enough to read memory in
// long runs.
inline int64_t panels_at_once(int64_t panels, int threads) {
    return std::clamp<int64_t>(panels / (threads * 8), 1, 16);
}

// --------------------------------------------------------------------------------------- products

// A part of the work: tiles `first` to `last`, all of one matrix, times `panels` panels from
// `panel` on.
struct Item {
    int64_t first, last, panel, panels;
};

// Cuts the tiles of each matrix into runs whose rows stay in the second-level cache.
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

// Working memory; the functions in kernels.cpp state the sizes.
struct Scratch {
    char* packed;
    float* scales;
    uint8_t* integers;
    bf16* hidden;
    float* sums;
};

// Packs the rows of x [rows, in] into `tiles`, which are complete when all threads return.
template <int KIND>
void pack_rows(Team& team, const bf16* x, int64_t rows, int64_t in,
               const std::vector<Tile>& tiles, const Scratch& s) {
    if constexpr (KIND != BF16) {
        team.share(rows, [&](int64_t r) {
            s.scales[r] =
                quantize_row<planes<KIND>()>(x + r * in, in, s.integers + r * in * planes<KIND>());
        });
        team.barrier();
    }
    team.share(tiles.size(), [&](int64_t i) {
        pack_tile<KIND>(tiles[i], in, s.packed, [&](int64_t r) -> const void* {
            if constexpr (KIND == BF16)
                return x + r * in;
            else
                return s.integers + r * in * planes<KIND>();
        });
    });
    team.barrier();
}

// `Result` is bf16 or float.
template <int KIND, class Result>
void linear(const bf16* x, int64_t rows, const Matrix& w, int64_t out, const bf16* bias, Result* y,
            int threads, const Scratch& s) {
    const int64_t panels = ceil_div(out, PANEL), step = panels_at_once(panels, threads);
    std::vector<Tile> tiles;
    std::vector<Item> items;
    constexpr int ROWS = rows_of(KIND);
    add_tiles<KIND>(tiles, 0, rows, 0);
    in_blocks<ROWS>(tiles, w.in, [&](int64_t first, int64_t last) {
        for (int64_t p = 0; p < panels; p += step)
            items.push_back({first, last, p, std::min(step, panels - p)});
    });
    const Input input{s.packed, s.scales, row_bytes<ROWS>(w.in)};
    // A normal store first reads the old contents of a line. A result that does not stay in the
    // caches anyway gains nothing from that.
    const bool past_caches = AMX && sizeof(Result) == sizeof(bf16) &&
                             rows * out >= LARGE_RESULT && out % PANEL == 0 &&
                             (uintptr_t)y % (PANEL * sizeof(bf16)) == 0;
    together(threads, [&](Team& team) {
        AmxShapes shapes;
        Room room;
        pack_rows<ROWS>(team, x, rows, w.in, tiles, s);
        team.each(items.size(), [&](int64_t i) {
            const Item& item = items[i];
            for (int64_t p = item.panel; p < item.panel + item.panels; p++) {
                const int64_t channel = p * PANEL, left = out - channel;
                alignas(64) float added[PANEL] = {};
                for (int c = 0; bias && c < std::min<int64_t>(PANEL, left); c++)
                    added[c] = to_float(bias[channel + c]);
                tiles_times_panel<KIND>(
                    shapes, room, w, p, input, &tiles[item.first], item.last - item.first,
                    [&](int64_t row, f32x16 a, f32x16 b) {
                        Result* to = y + row * out + channel;
                        a += load<f32x16>(added);
                        b += load<f32x16>(added + LANES);
                        if (past_caches) {
                            store_past_caches((bf16*)to, a, b);
                            return;
                        }
                        store_some(to, a, left);
                        if (left > LANES) store_some(to + LANES, b, left - LANES);
                    });
            }
            if (past_caches) finish_past_caches();
        });
    });
}

// Pairs of token and expert, sorted by expert: rows `ends[e]` to `ends[e + 1]` belong to expert e.
struct Groups {
    std::vector<int64_t> ends;
    std::vector<int64_t> pair_of;     // row → token * chosen + k

    Groups(const int32_t* ids, int64_t tokens, int64_t chosen, int64_t first, int64_t experts)
        : ends(experts + 1, 0) {
        for (int64_t i = 0; i < tokens * chosen; i++) {
            const int64_t e = ids[i] - first;
            if (e >= 0 && e < experts) ends[e + 1]++;
        }
        for (int64_t e = 0; e < experts; e++) ends[e + 1] += ends[e];
        pair_of.resize(ends[experts]);
        std::vector<int64_t> next(ends.begin(), ends.end() - 1);
        for (int64_t i = 0; i < tokens * chosen; i++) {
            const int64_t e = ids[i] - first;
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
        const int64_t bytes = panel_bytes(kind, in) * (out / PANEL);
        return {panels + e * bytes, scales ? scales + e * out : nullptr,
                sums ? sums + e * out : nullptr, in};
    }
};

template <int KIND>
void experts(const bf16* x, int64_t tokens, int64_t H, const float* weights,
             const int32_t* physical_ids, int64_t chosen, int64_t first, int64_t num_experts,
             const Bank& gate_up, const Bank& down, int64_t width, bf16* y, int threads,
             const Scratch& s) {
    constexpr int ROWS = rows_of(KIND), PLANES = planes<ROWS>();
    const Groups groups(physical_ids, tokens, chosen, first, num_experts);
    const int64_t rows = groups.pair_of.size();
    const int64_t up_panels = gate_up.out / PANEL, down_panels = down.out / PANEL;
    std::vector<Tile> tiles;
    for (int64_t e = 0; e < num_experts; e++)
        add_tiles<KIND>(tiles, groups.ends[e], groups.ends[e + 1] - groups.ends[e], e);
    std::vector<Item> items, blocks;
    const int64_t step = panels_at_once(up_panels * std::max<int64_t>(1, tiles.size()), threads);
    in_blocks<ROWS>(tiles, H, [&](int64_t from, int64_t to) {
        for (int64_t p = 0; p < up_panels; p += step)
            items.push_back({from, to, p, std::min(step, up_panels - p)});
    });
    // Long sums of many rows are cut into parts, so that a part of a panel stays in the cache while
    // rows pass by.
    const bool is_cut = ROWS == BF16 && width >= 2 * MOST_INPUTS &&
                        (BATCH_INVARIANT || rows > MOST_TILE_ROWS);
    const int64_t part = is_cut ? MOST_INPUTS : width;
    in_blocks<ROWS>(tiles, part,
                    [&](int64_t from, int64_t to) { blocks.push_back({from, to, 0, 0}); });
    // A thread sums some channels over all experts: sums have a fixed order and no races. The sums
    // lie together and stay in the second-level cache.
    const int64_t down_step =
        std::clamp<int64_t>(std::min(down_panels / (threads * 2),
                                     SUMS_BYTES / (tokens * PANEL * (int64_t)sizeof(float) + 1)),
                            1, 8);
    const Input input{s.packed, s.scales, row_bytes<ROWS>(H)};
    std::vector<float> token_scales(ROWS == BF16 ? 0 : tokens);
    together(threads, [&](Team& team) {
        AmxShapes shapes;
        Room room;
        if constexpr (ROWS != BF16) {
            team.share(tokens, [&](int64_t t) {
                token_scales[t] = quantize_row<PLANES>(x + t * H, H, s.integers + t * H * PLANES);
            });
            team.barrier();
        }
        team.share(tiles.size(), [&](int64_t i) {
            pack_tile<ROWS>(tiles[i], H, s.packed, [&](int64_t r) -> const void* {
                const int64_t token = groups.pair_of[r] / chosen;
                if constexpr (ROWS == BF16) return x + token * H;
                s.scales[r] = token_scales[token];
                return s.integers + token * H * PLANES;
            });
        });
        team.barrier();
        team.each(items.size(), [&](int64_t i) {
            const Item& item = items[i];
            const Matrix w = gate_up.expert(tiles[item.first].matrix, KIND);
            for (int64_t p = item.panel; p < item.panel + item.panels; p++)
                tiles_times_panel<KIND>(shapes, room, w, p, input, &tiles[item.first],
                                        item.last - item.first,
                                        [&](int64_t row, f32x16 gate, f32x16 up) {
                                            store_some(s.hidden + row * width + p * LANES,
                                                       silu(gate) * up, width - p * LANES);
                                        });
        });
        team.barrier();
        pack_rows<ROWS>(team, s.hidden, rows, width, tiles, s);
        team.each(ceil_div(down_panels, down_step), [&](int64_t part_of_down) {
            const int64_t p0 = part_of_down * down_step;
            const int64_t p1 = std::min(down_panels, p0 + down_step);
            const int64_t from = p0 * PANEL, to = std::min(H, p1 * PANEL), ld = (p1 - p0) * PANEL;
            float* sums = s.sums + tokens * from;
            std::memset(sums, 0, tokens * ld * sizeof(float));
            for (const Item& block : blocks) {
                const Matrix whole = down.expert(tiles[block.first].matrix, KIND);
                for (int64_t k = 0; k < width; k += part) {
                    const Matrix w = whole.part(KIND, k, std::min(part, width - k));
                    const Input some{s.packed, s.scales, row_bytes<ROWS>(width), row_bytes<ROWS>(k)};
                    for (int64_t p = p0; p < p1; p++)
                        tiles_times_panel<KIND>(
                            shapes, room, w, p, some, &tiles[block.first], block.last - block.first,
                            [&](int64_t row, f32x16 a, f32x16 b) {
                                const int64_t pair = groups.pair_of[row];
                                const float weight = weights ? weights[pair] : 1.0f;
                                float* at = sums + pair / chosen * ld + (p - p0) * PANEL;
                                store(at, load<f32x16>(at) + a * weight);
                                store(at + LANES, load<f32x16>(at + LANES) + b * weight);
                            });
                }
            }
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t c = from; c < to; c += LANES)
                    store_some(y + t * H + c, load<f32x16>(sums + t * ld + c - from), to - c);
        });
    });
}

}  // namespace
