// Kernels for CPUs: matrix products on packed weights, mixtures of experts, attention over a paged
// cache, norms, rotary embedding and routing, for bfloat16 activations.
//
// `moespan/ops/cpu/native.py` calls all of it through a plain C interface: no header of torch is
// needed, and any C++ compiler builds the library in seconds.
//
// vectors.h: vectors of 16 lanes. amx.h: matrix instructions. packing.h: how weights and
// activations lie in memory. int4.h: weights of 4 bits. products.h: matrix products and experts.
// routing.h: the choice of experts. attention.h: attention of prompts. decode.h: attention of single
// tokens. checksum.h: checksums of weights in files. team.h: threads. shared.h: collectives between
// the ranks of one machine.

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 9
#error "this is GCC older than 9, which lacks vector types that the kernels use; set CXX to GCC 9 or newer, or clang"
#endif

#include <numeric>
#include <vector>

#include "checksum.h"
#include "decode.h"
#include "routing.h"
#include "shared.h"

extern "C" {

// Packs rows `first` to `first + rows` of a matrix [out, in] with `in_bytes` bytes a row. Of each
// row the first `bytes` are packed; rows are `stride` bytes apart. Parts of `panels` that no row
// fills stay unchanged. `sums` [rows], for int8 only, gets the sum of each row. A call uses one
// thread: other threads pack other rows at the same time.
void moespan_pack(const void* from, int64_t stride, int64_t bytes, int64_t first, int64_t rows,
                  int64_t out, int64_t in_bytes, int gate_up, void* panels, int32_t* sums) {
    const int64_t half = gate_up ? out / 2 : out;
    for (int64_t r = 0; r < rows;) {
        const int64_t row = first + r, channel = channel_of(row, out, gate_up);
        const char* at = (const char*)from + r * stride;
        char* to = (char*)panels + channel / PANEL * PANEL * in_bytes + channel % PANEL * 4;
        const int64_t left = std::min(rows - r, (row < half ? half : out) - row);
        const bool are_lanes = channel % LANES == 0 && left >= LANES;
        if (are_lanes)
            pack_lanes(at, stride, bytes, to);
        else
            pack_row(at, bytes, to);
        for (const int64_t end = r + (are_lanes ? LANES : 1); r < end; r++, at += stride)
            if (sums) sums[r] = std::accumulate((int8_t*)at, (int8_t*)at + bytes, int32_t(0));
    }
}

// Packs `count` matrices [out, in] of 4-bit integers, stored as [out, in / 8] with eight to a word,
// and their scales [out, in / 32]. See int4.h for the result.
void moespan_pack_int4(const uint32_t* integers, const bf16* scales, char* to, int64_t count,
                       int64_t out, int64_t in, int gate_up, int threads) {
    const int64_t panels = gate_up ? ceil_div(out / 2, LANES) : ceil_div(out, PANEL);
    together(threads, [&](Team& team) {
        team.share(count * panels, [&](int64_t i) {
            const int64_t m = i / panels, p = i % panels;
            pack_int4_panel(integers + m * out * (in / 8), scales + m * out * (in / GROUP),
                            to + i * panel_bytes(INT4, in), p, out, in, gate_up);
        });
    });
}

// Rounds rows [rows, n], `stride` elements apart, to int8 `to` [rows, n] with scales [rows].
// `maxima` [rows] may be null; else these are parts of longer rows, whose largest magnitudes it
// holds.
void moespan_round(const bf16* x, int64_t stride, int64_t rows, int64_t n, const float* maxima,
                   int8_t* to, float* scales) {
    for (int64_t r = 0; r < rows; r++)
        scales[r] = round_row(x + r * stride, n, maxima ? maxima + r : nullptr, to + r * n);
}

// The checksum of memory, which may be a mapped file. `error` gets 0, or the number of the error for
// which pages cannot be read; the checksum then means nothing.
void moespan_checksum(const void* data, int64_t bytes, int threads, uint64_t* checksum,
                      int* error) {
    const int64_t chunks = ceil_div(bytes, CHECKED_CHUNK);
    std::vector<uint64_t> parts(chunks);
    std::atomic<int> failed{0};
    together(threads, [&](Team& team) {
        team.each(chunks, [&](int64_t c) {
            const char* at = (const char*)data + c * CHECKED_CHUNK;
            const int64_t count = std::min(CHECKED_CHUNK, bytes - c * CHECKED_CHUNK);
            if (const int found = ask_for_pages(at, count))
                failed = found;
            else
                parts[c] = chunk_checksum(at, count);
        });
    });
    *error = failed;
    *checksum = 0;
    for (uint64_t part : parts) *checksum = mixed(*checksum, part);
}

// A collective of `kind` over `size` ranks, of which this is number `place`; see shared.h.
//
//   kind                 data               result
//   0, 1 all_reduce      bytes, in place    -            of float32, bfloat16
//   2, 3 reduce_scatter  [size, bytes]      bytes        of float32, bfloat16
//   4 all_gather         bytes              [size, bytes]
//
// `late` gets -1, or the rank that did not come in time or has gone.
void moespan_collective(int kind, void* memory, int64_t place, int64_t size, int64_t slot_bytes,
                        int64_t timeout_ns, int threads, void* data, int64_t bytes,
                        void* result, int* late) {
    Party party{(char*)memory, place, size, slot_bytes, timeout_ns, threads};
    char *from = (char*)data, *to = (char*)result;
    if (kind == 0) all_reduce<float>(party, from, bytes);
    if (kind == 1) all_reduce<bf16>(party, from, bytes);
    if (kind == 2) reduce_scatter<float>(party, from, bytes, to);
    if (kind == 3) reduce_scatter<bf16>(party, from, bytes, to);
    if (kind == 4) all_gather(party, from, bytes, to);
    *late = party.late;
}

// x [rows, in] · Wᵀ + bias → y [rows, out].
// Scratch: packed [rows, in] times 2 bytes; for int8 row_scales [rows], integers like packed.
void moespan_linear(int kind, const bf16* x, int64_t rows, int64_t in, int64_t out,
                    const void* panels, const float* scales, const int32_t* sums, const bf16* bias,
                    bf16* y, int threads, void* packed, float* row_scales, uint8_t* integers) {
    const Matrix w{(const char*)panels, scales, sums, in};
    const Scratch s{(char*)packed, row_scales, integers, nullptr, nullptr};
    auto run = kind == BF16   ? linear<BF16, bf16>
               : kind == W8A8 ? linear<W8A8, bf16>
               : kind == INT4 ? linear<INT4, bf16>
                              : linear<W8A16, bf16>;
    run(x, rows, w, out, bias, y, threads, s);
}

// See `Ops.experts`. Both banks are packed: gate_up as a gate-up matrix, down with `down_out` >= H
// channels. `weights` null means 1 for all. Scratch for up to R = tokens · chosen rows: packed
// [R, max(H, width)] times 2 bytes; for int8 row_scales [R], integers [max(R · width, tokens · H)]
// times 2 bytes; hidden [R, width]; sums [tokens, down_out].
void moespan_experts(int kind, const bf16* x, int64_t tokens, int64_t H, const float* weights,
                     const int32_t* physical_ids, int64_t chosen, int64_t first,
                     int64_t num_experts, const void* up_panels, const float* up_scales,
                     const int32_t* up_sums, int64_t up_out, const void* down_panels,
                     const float* down_scales, const int32_t* down_sums, int64_t down_out,
                     int64_t width, bf16* y, int threads, void* packed, float* row_scales, uint8_t* integers, bf16* hidden,
                     float* sums) {
    const Bank gate_up{(const char*)up_panels, up_scales, up_sums, H, up_out};
    const Bank down{(const char*)down_panels, down_scales, down_sums, width, down_out};
    const Scratch s{(char*)packed, row_scales, integers, hidden, sums};
    auto run = kind == BF16   ? experts<BF16>
               : kind == W8A8 ? experts<W8A8>
               : kind == INT4 ? experts<INT4>
                              : experts<W8A16>;
    run(x, tokens, H, weights, physical_ids, chosen, first, num_experts, gate_up, down, width, y,
        threads, s);
}

// See `Ops.attention`. q and out [T, N, D]; tokens of q are `q_stride` elements apart. `is_int8`:
// the cache holds int8 and has scales.
void moespan_attention(const bf16* q, int64_t q_stride, bf16* out, int64_t num_heads,
                       int64_t head_size, int64_t num_kv_heads, const void* keys, const void* values,
                       const float* key_scales, const float* value_scales, int is_int8,
                       int64_t block_size, const int32_t* tables, int64_t table_width,
                       const int64_t* query_lens, const int64_t* context_lens,
                       int64_t num_sequences, float scale, int threads) {
    const Cache c{keys, values, key_scales, value_scales, block_size, num_kv_heads, head_size};
    const int64_t group = num_heads / num_kv_heads, stride = num_heads * head_size;
    const Heads n{num_heads, group, head_size};
    // Query tokens of a sequence from `first` on, for a key head; or, in decoding, a part of the
    // context, for all heads.
    struct Task {
        int64_t sequence, row, first, count, kv_head, part, work;
    };
    // A sequence that decodes, and the first of its parts.
    struct Whole {
        int64_t row, part, parts;
    };
    std::vector<Task> tasks;
    std::vector<Whole> wholes;
    const auto is_decode = [&](int64_t s) { return !BATCH_INVARIANT && query_lens[s] == 1; };
    int64_t decoded = 0;
    for (int64_t s = 0; s < num_sequences; s++)
        if (is_decode(s)) decoded += context_lens[s] + 1;
    int64_t row = 0, most_rows = 0, parts = 0;
    for (int64_t s = 0; s < num_sequences; row += query_lens[s], s++) {
        if (is_decode(s)) {
            const int64_t tokens = context_lens[s] + 1, number = parts_of(tokens, decoded, threads);
            wholes.push_back({row, parts, number});
            for (int64_t i = 0; i < number; i++, parts++) {
                const int64_t from = tokens * i / number, count = tokens * (i + 1) / number - from;
                tasks.push_back({s, row, from, count, 0, parts, count * num_heads});
            }
            continue;
        }
        // Blocks of about the same size, since each of them packs all keys before its end.
        const int64_t most = std::max<int64_t>(1, QUERY_BLOCK / group);
        const int64_t number = std::max<int64_t>(1, ceil_div(query_lens[s], most));
        const int64_t block = ceil_div(query_lens[s], number);
        for (int64_t i = 0; i < query_lens[s]; i += block)
            for (int64_t h = 0; h < num_kv_heads; h++) {
                const int64_t count = std::min(block, query_lens[s] - i);
                tasks.push_back({s, row + i, context_lens[s] + i, count, h, 0,
                                 (context_lens[s] + i + count) * count * group});
                most_rows = std::max(most_rows, count * group);
            }
    }
    // Largest tasks first, so that no thread ends up alone with a large one.
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.work > b.work; });
    // Kept, because fresh memory comes page by page.
    static thread_local Room kept, kept_scratch;
    char* partials = kept.of(parts * n.partial_bytes());
    const int64_t scratch_bytes =
        std::max(most_rows ? prefill_bytes(most_rows, head_size) : 0, n.scratch_bytes());
    const auto run_decode = head_size == 128 ? (is_int8 ? decode<int8_t, 128> : decode<bf16, 128>)
                                             : (is_int8 ? decode<int8_t, 0> : decode<bf16, 0>);
    const auto run_prefill = is_int8 ? prefill<int8_t> : prefill<bf16>;
    together(threads, [&](Team& team) {
        char* scratch = kept_scratch.of(scratch_bytes);
        team.each(tasks.size(), [&](int64_t i) {
            const Task& t = tasks[i];
            const int32_t* table = tables + t.sequence * table_width;
            const bf16* from = q + t.row * q_stride;
            if (is_decode(t.sequence))
                run_decode(from, c, table, t.first, t.first + t.count, n, scale, scratch,
                           Partial(partials + t.part * n.partial_bytes(), n));
            else
                run_prefill(from, q_stride, out + t.row * stride, stride, c, table, t.first, t.count,
                            t.kv_head, group, scale, scratch);
        });
        if (wholes.empty()) return;
        team.barrier();
        team.share(wholes.size(), [&](int64_t i) {
            combine(partials + wholes[i].part * n.partial_bytes(), wholes[i].parts, n,
                    out + wholes[i].row * stride);
        });
    });
}

// `residual` may be null. Else `total` gets x + residual, rounded, and the norm is of `total`.
void moespan_rms_norm(const bf16* x, const bf16* residual, const bf16* weight, int64_t rows,
                      int64_t width, float eps, bf16* total, bf16* y, int threads) {
    const auto of_row = [&](int64_t r) {
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
    };
    together(rows > 4 ? threads : 1, [&](Team& team) { team.share(rows, of_row); });
}

// Rotates the first `rotated` of the `heads` heads of each token in place, in the half-split form.
// cos and sin are float32 [tokens, D / 2].
void moespan_rope(bf16* qkv, int64_t tokens, int64_t heads, int64_t rotated, int64_t head_size,
                  const float* cos, const float* sin, int threads) {
    const int64_t half = head_size / 2;
    const auto of_token = [&](int64_t t) {
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
    };
    together(tokens > 8 ? threads : 1, [&](Team& team) { team.share(tokens, of_token); });
}

// Stores k or v [T, KV, D], tokens `stride` elements apart, at slots of a cache: unchanged, or,
// where `scales` is not null, as int8 with one scale for each head of a token.
void moespan_write_cache(const bf16* x, int64_t tokens, int64_t heads, int64_t head_size,
                         int64_t stride, const int32_t* slots, void* cache, float* scales,
                         int threads) {
    const auto of_token = [&](int64_t t) {
        const bf16* from = x + t * stride;
        const int64_t to = int64_t(slots[t]) * heads;
        if (!scales) {
            std::memcpy((bf16*)cache + to * head_size, from, heads * head_size * sizeof(bf16));
            return;
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
    };
    together(tokens > 8 ? threads : 1, [&](Team& team) { team.share(tokens, of_token); });
}

// See `Ops.route`. The router is float32 and transposed, [H, experts], or packed as a matrix of
// bfloat16, whose products with bfloat16 are exact in float32. Scratch: logits [tokens, experts];
// for a packed router packed [tokens, H].
void moespan_route(int is_packed, const bf16* x, int64_t tokens, int64_t H, const void* router,
                   int64_t experts, int64_t chosen, int renormalize, float* weights, int32_t* ids,
                   int threads, float* logits, void* packed) {
    if (tokens <= 4) threads = 1;
    if (is_packed)
        linear<BF16>(x, tokens, Matrix{(const char*)router, nullptr, nullptr, H}, experts, nullptr,
                     logits, threads, Scratch{(char*)packed, nullptr, nullptr, nullptr, nullptr});
    else
        router_logits(x, (const float*)router, tokens, H, experts, logits, threads);
    together(threads, [&](Team& team) {
        std::vector<f32x16> room(ceil_div(experts, LANES));
        team.share(tokens, [&](int64_t t) {
            choose(logits + t * experts, experts, chosen, renormalize, room.data(),
                   weights + t * chosen, ids + t * chosen);
        });
    });
}

}  // extern "C"
