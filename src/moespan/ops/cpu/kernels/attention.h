// Attention of many query tokens over the paged cache, a key head at a time, as matrix products.

#pragma once

#include <vector>

#include "products.h"

namespace {

struct Cache {
    const void *keys, *values;        // [blocks, block size, KV, D]
    const float *key_scales, *value_scales;  // [blocks, block size, KV], int8 only
    int64_t block_size, heads, head_size;
};

inline int64_t slot_of(const int32_t* table, int64_t token, const Cache& c) {
    return table[token / c.block_size] * c.block_size + token % c.block_size;
}

constexpr int KEYS = 256;             // keys at a time, a multiple of PANEL
constexpr int MOST_HEAD_VECTORS = 16; // heads have up to 256 elements

// A cached head of D elements as bfloat16: in place, or dequantised into `room`.
inline const bf16* as_bf16(const bf16* x, float, int64_t, bf16*) { return x; }

inline const bf16* as_bf16(const int8_t* x, float scale, int64_t D, bf16* room) {
    for (int64_t d = 0; d < D; d += LANES) store_bf16(room + d, load_i8(x + d) * scale);
    return room;
}

// Keys `start` to `start + count` of one head → panels whose channels are keys. The last panel is
// padded with zeros, because memory past the last key may hold NaN.
template <class T>
void pack_keys(const T* keys, const Cache& c, const int32_t* table, int64_t start, int64_t count,
               int64_t head, bf16* packed) {
    const int64_t D = c.head_size;
    alignas(64) bf16 room[LANES][MOST_HEAD_VECTORS * LANES];
    for (int64_t t = 0; t < ceil_div(count, PANEL) * PANEL; t += LANES) {
        const char* from[LANES];
        for (int i = 0; i < LANES; i++) {
            from[i] = (const char*)room[i];
            if (t + i >= count) {
                std::memset(room[i], 0, D * sizeof(bf16));
                continue;
            }
            const int64_t at = slot_of(table, start + t + i, c) * c.heads + head;
            from[i] = (const char*)as_bf16(keys + at * D, sizeof(T) == 1 ? c.key_scales[at] : 1, D,
                                           room[i]);
        }
        uint32_t* to = (uint32_t*)packed + t / PANEL * (D / 2) * PANEL + t % PANEL;
        pack_words(LANES, D / 2, PANEL, to, [&](int64_t i) { return from[i]; });
    }
}

// Asks for keys and values `start` to `start + count` of one head.
template <class T>
void prefetch_heads(const Cache& c, const int32_t* table, int64_t start, int64_t count,
                    int64_t head) {
    for (int64_t t = start; t < start + count; t++) {
        const int64_t at = (slot_of(table, t, c) * c.heads + head) * c.head_size * sizeof(T);
        for (int64_t b = 0; b < c.head_size * (int64_t)sizeof(T); b += 64) {
            __builtin_prefetch((const char*)c.keys + at + b, 0, 2);
            __builtin_prefetch((const char*)c.values + at + b, 0, 2);
        }
    }
}

// Values `start` to `start + count` → panels with KEYS along the sum, whose channels are elements
// of the head.
template <class T>
void pack_values(const T* values, const Cache& c, const int32_t* table, int64_t start,
                 int64_t count, int64_t head, bf16* packed) {
    const int64_t D = c.head_size;
    for (int64_t t = 0; t < ceil_div(count, PANEL) * PANEL; t += 2) {
        alignas(64) bf16 room[2][MOST_HEAD_VECTORS * LANES];
        const bf16* pair[2] = {room[0], room[1]};
        for (int i = 0; i < 2; i++) {
            if (t + i >= count) {
                std::memset(room[i], 0, D * sizeof(bf16));
                continue;
            }
            const int64_t at = slot_of(table, start + t + i, c) * c.heads + head;
            pair[i] = as_bf16(values + at * D, sizeof(T) == 1 ? c.value_scales[at] : 1, D, room[i]);
        }
        for (int64_t d = 0; d < D; d += LANES) {
            bf16* to = packed + (d / PANEL * (KEYS / 2) + t / 2) * PANEL * 2;
            // A bfloat16 is the upper half of a float32.
            const u32x16 low = (u32x16)load_bf16(pair[0] + d) >> 16;
            store(to + d % PANEL * 2, low | (u32x16)load_bf16(pair[1] + d));
        }
    }
}

// Attention weights bfloat16 [rows of a tile, KEYS], of which the first w.in are used, times a
// panel of values → [rows, 32].
inline void weigh(AmxShapes& shapes, const Tile& tile, const Matrix& w, const bf16* weights,
                  float* out) {
    const Prefetch nothing{w.panels, 0};
#if AMX
    if (tile.is_amx) {
        constexpr int64_t ROW = KEYS * sizeof(bf16);
        const int64_t first = std::min(tile.rows, AMX_ROWS);
        const AmxInput rows{(const char*)weights, first, tile.rows - first, AMX_BYTES, ROW,
                            first * ROW,          0};
        return multiply_amx<BF16>(shapes, w, 0, rows, nullptr, nothing, out, PANEL);
    }
#endif
    multiply<BF16, KEYS / 2>(tile.rows, w, 0, (const uint32_t*)weights, nullptr, nothing, out,
                             PANEL);
}

// `count` query tokens of one sequence from `position` on, and all query heads of one key head.
// Tokens are `q_stride` elements apart in q and `stride` in out.
template <class T>
void prefill(const bf16* q, int64_t q_stride, bf16* out, int64_t stride, const Cache& c,
             const int32_t* table, int64_t position, int64_t count, int64_t kv_head, int64_t group,
             float scale, char* scratch) {
    const int64_t D = c.head_size, rows = count * group;
    // Panels of keys (channels are keys) and of values (channels are elements of the head).
    bf16* packed_keys = (bf16*)scratch;                       // [KEYS / 32][D / 2][32][2]
    bf16* packed_values = packed_keys + KEYS * D;             // [D / 32][KEYS / 2][32][2]
    const int64_t width = ceil_div(D, PANEL) * PANEL;
    bf16* p = packed_values + KEYS * width;                   // [MOST_TILE_ROWS, KEYS]
    bf16* packed_queries = p + MOST_TILE_ROWS * KEYS;         // tiles of [rows, D]
    float* acc = (float*)(packed_queries + rows * D);         // [rows, padded D]
    float* scores = acc + rows * width;                       // [MOST_TILE_ROWS, KEYS]
    float* most = scores + MOST_TILE_ROWS * KEYS;             // [rows]
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
    const Input queries{(const char*)packed_queries, nullptr, 2 * D};
    const T* keys = (const T*)c.keys;
    const T* values = (const T*)c.values;
    const int64_t length = position + count;
    AmxShapes shapes;
    // Each tile asks for a part of the next block of keys, whose heads lie far apart in memory.
    const int64_t ahead = ceil_div(KEYS, tiles.size());
    for (int64_t start = 0; start < length; start += KEYS) {
        const int64_t here = std::min<int64_t>(KEYS, length - start);
        pack_keys(keys, c, table, start, here, kv_head, packed_keys);
        pack_values(values, c, table, start, here, kv_head, packed_values);
        for (const Tile& tile : tiles) {
            const int64_t r0 = tile.row, n = tile.rows;
            const int64_t next = start + KEYS + (&tile - tiles.data()) * ahead;
            prefetch_heads<T>(c, table, next, std::min(ahead, length - next), kv_head);
            // Keys of this block that the last query of the tile sees, rounded up to whole panels.
            const int64_t last = position + (r0 + n - 1) / group + 1 - start;
            if (last <= 0) continue;
            const int64_t seen_by_tile = std::min<int64_t>(KEYS, ceil_div(last, PANEL) * PANEL);
            for (int64_t panel = 0; panel < seen_by_tile / PANEL; panel++)
                multiply<BF16>(shapes, tile, key_matrix, panel, queries, {scratch, 0},
                               scores + panel * PANEL, KEYS);
            float shrink[MOST_TILE_ROWS];
            for (int64_t r = 0; r < n; r++) {
                float* row = scores + r * KEYS;
                const int64_t seen = position + (r0 + r) / group + 1 - start;
                for (int64_t t = std::max<int64_t>(0, seen); t < seen_by_tile; t++)
                    row[t] = -INFINITY;
                f32x16 m = load<f32x16>(row);
                for (int64_t t = LANES; t < seen_by_tile; t += LANES)
                    m = vmax(m, load<f32x16>(row + t));
                float& before = most[r0 + r];
                const float now = std::max(before, largest(m) * scale);
                shrink[r] = before == -INFINITY ? 0.0f : std::exp(before - now);
                // A query that has seen no key yet has no maximum.
                const float base = now == -INFINITY ? 0.0f : now;
                before = now;
                f32x16 s = splat(0);
                for (int64_t t = 0; t < seen_by_tile; t += LANES) {
                    const f32x16 e = vexp(load<f32x16>(row + t) * scale - base);
                    s += e;
                    store_bf16(p + r * KEYS + t, e);
                }
                // The exponential of -inf is not quite 0, and rows beside this one decide how many
                // such keys there are.
                for (int64_t t = std::max<int64_t>(0, seen); BATCH_INVARIANT && t < seen_by_tile; t++)
                    p[r * KEYS + t] = 0;
                total[r0 + r] = total[r0 + r] * shrink[r] + sum(s);
            }
            for (int64_t panel = 0; panel < width / PANEL; panel++) {
                alignas(64) float part[MOST_TILE_ROWS * PANEL];
                const Matrix value_matrix{(const char*)(packed_values + panel * KEYS * PANEL),
                                          nullptr, nullptr, seen_by_tile};
                weigh(shapes, tile, value_matrix, p, part);
                for (int64_t r = 0; r < n; r++)
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

// Most query rows (tokens × query heads of a key head) of one task.
constexpr int64_t QUERY_BLOCK = 576;

// What `prefill` needs for `rows` of them.
inline int64_t prefill_bytes(int64_t rows, int64_t D) {
    const int64_t width = ceil_div(D, PANEL) * PANEL;
    return (KEYS * D + KEYS * width + MOST_TILE_ROWS * KEYS + rows * D) * 2 +
           (rows * (width + 2) + MOST_TILE_ROWS * KEYS) * 4;
}

}  // namespace
