// Matrix instructions (Intel AMX): products of two tiles of 16 rows by 64 bytes.

#pragma once

#include "vectors.h"

#if WIDE && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#else
#define AMX 0
#endif

namespace {

constexpr int64_t AMX_ROWS = 16;
constexpr int64_t AMX_BYTES = 64;
// From this many rows on, matrix instructions are faster than dot products.
constexpr int64_t LEAST_AMX_ROWS = BATCH_INVARIANT ? 1 : 2;

// Whether this process may use AMX. The kernel saves its registers only for processes that ask.
inline bool has_amx() {
#if AMX
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
    return granted;
#else
    return false;
#endif
}

// Input rows, in one tile or two. The sum runs over chunks of 64 bytes, `chunk` bytes apart. In a
// chunk rows are `row` bytes apart, and the second tile begins `offset` bytes after the first. A
// shorter remainder follows the chunks, with its rows next to each other.
struct AmxInput {
    const char* at;
    int64_t first, second;            // rows of each tile; second is 0 without a second tile
    int64_t chunk, row, offset, offset_of_rest;
};

#if AMX

// The compiler does not know that the instructions below read memory. Without this barrier it may
// delay or drop the stores that they read, at `p` and elsewhere.
inline void finish_stores(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// The tile shapes of this thread, from first use to the end of the scope: results in tiles 0 to 3,
// input in 4 and 5, weights in 6 and 7. They are set only when they change, because setting takes
// as long as a dozen products and empties the tiles.
class AmxShapes {
  public:
    ~AmxShapes() {
        if (bytes_) _tile_release();
    }

    // `bytes`: width of a row.
    void set(const AmxInput& x, int64_t bytes) {
        if (x.first == first_ && x.second == second_ && bytes == bytes_) return;
        first_ = x.first, second_ = x.second, bytes_ = bytes;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        const int64_t rows[8] = {first_, first_,  second_,    second_,
                                 first_, second_, bytes_ / 4, bytes_ / 4};
        for (int tile = 0; tile < 8; tile++) {
            config.rows[tile] = uint8_t(rows[tile]);
            config.bytes[tile] = !rows[tile] ? 0 : tile == 4 || tile == 5 ? bytes_ : 64;
        }
        finish_stores(&config);
        _tile_loadconfig(&config);
    }

  private:
    int64_t first_ = 0, second_ = 0, bytes_ = 0;
};

template <bool IS_BF16, bool TWO>
inline void amx_step(const char* x, int64_t row, int64_t offset, const char* panel) {
    _tile_loadd(4, x, row);
    _tile_loadd(6, panel, 128);
    _tile_loadd(7, panel + 64, 128);
    if constexpr (TWO) _tile_loadd(5, x + offset, row);
    if constexpr (IS_BF16) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (TWO) _tile_dpbf16ps(2, 5, 6);
        if constexpr (TWO) _tile_dpbf16ps(3, 5, 7);
    } else {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if constexpr (TWO) _tile_dpbusd(2, 5, 6);
        if constexpr (TWO) _tile_dpbusd(3, 5, 7);
    }
}

// The results of the second tile go `second` bytes after those of the first.
template <bool TWO>
inline void store_results(char* out, int64_t second, int64_t row) {
    _tile_stored(0, out, row);
    _tile_stored(1, out + 64, row);
    if constexpr (TWO) _tile_stored(2, out + second, row);
    if constexpr (TWO) _tile_stored(3, out + second + 64, row);
}

// Rows times a panel, with `bytes` along the sum → float32 or int32 [rows, 32], rows `ld` elements
// apart. Each step prefetches `ahead` bytes, starting at `next`.
template <bool IS_BF16, bool TWO>
void amx_product(AmxShapes& shapes, const AmxInput& x, const char* panel, int64_t bytes,
                 const char* next, int64_t ahead, void* results, int64_t ld) {
    char* out = (char*)results;
    const int64_t row = ld * 4, rest = bytes % AMX_BYTES;
    const char* from = x.at;
    finish_stores(x.at);
    shapes.set(x, std::min(bytes, AMX_BYTES));
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) _tile_zero(2);
    if constexpr (TWO) _tile_zero(3);
    for (int64_t k = 0; k + AMX_BYTES <= bytes; k += AMX_BYTES) {
        for (int64_t b = 0; b < ahead; b += 64) __builtin_prefetch(next + b, 0, 2);
        amx_step<IS_BF16, TWO>(from, x.row, x.offset, panel);
        from += x.chunk;
        panel += AMX_BYTES / 4 * 128;
        next += ahead;
    }
    if (rest && bytes > AMX_BYTES) {  // a change of width empties the tiles
        store_results<TWO>(out, x.first * row, row);
        shapes.set(x, rest);
        _tile_loadd(0, out, row);
        _tile_loadd(1, out + 64, row);
        if constexpr (TWO) _tile_loadd(2, out + x.first * row, row);
        if constexpr (TWO) _tile_loadd(3, out + x.first * row + 64, row);
    }
    if (rest) amx_step<IS_BF16, TWO>(from, rest, x.offset_of_rest, panel);
    store_results<TWO>(out, x.first * row, row);
}

#else

class AmxShapes {};

#endif

}  // namespace
