// The choice of experts: logits of a router, and the most likely experts of each token.

#pragma once

#include "products.h"

namespace {

// x [tokens, H] times a router, transposed: float32 [H, experts] → logits [tokens, experts].
inline void router_logits(const bf16* x, const float* router, int64_t tokens, int64_t H,
                          int64_t experts, float* logits, int threads) {
    constexpr int TOKENS = 4, VECTORS = 4;
    together(threads, [&](Team& team) {
        std::vector<float> floats(TOKENS * H);
        team.share(ceil_div(tokens, TOKENS), [&](int64_t group) {
            const int64_t t0 = group * TOKENS;
            const int n = (int)std::min<int64_t>(TOKENS, tokens - t0);
            for (int t = 0; t < n; t++)
                for (int64_t k = 0; k < H; k++) floats[t * H + k] = to_float(x[(t0 + t) * H + k]);
            int64_t e0 = 0;
            for (; e0 + LANES * VECTORS <= experts; e0 += LANES * VECTORS) {
                f32x16 acc[TOKENS][VECTORS] = {};
                for (int64_t k = 0; k < H; k++)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) {
                        f32x16 w = load<f32x16>(router + k * experts + e0 + v * LANES);
#pragma GCC unroll 4
                        for (int t = 0; t < TOKENS; t++) acc[t][v] += w * floats[t * H + k];
                    }
                for (int t = 0; t < n; t++)
                    for (int v = 0; v < VECTORS; v++)
                        store(logits + (t0 + t) * experts + e0 + v * LANES, acc[t][v]);
            }
            for (; e0 < experts; e0++)
                for (int t = 0; t < n; t++) {
                    float s = 0;
                    for (int64_t k = 0; k < H; k++) s += floats[t * H + k] * router[k * experts + e0];
                    logits[(t0 + t) * experts + e0] = s;
                }
        });
    });
}

// The first of the vectors' lanes that holds `value`; 0 if none does, as where all are NaN.
inline int64_t first_lane(const f32x16* vectors, int64_t count, float value) {
    for (int64_t v = 0; v < count; v++) {
        const unsigned found = lanes_of(vectors[v] == splat(value));
        if (found) return v * LANES + __builtin_ctz(found);
    }
    return 0;
}

// softmax of logits [experts] → its `chosen` largest values, and their places. `room` holds
// ceil(experts / 16) vectors. Of equal values the first one comes first.
inline void choose(const float* logits, int64_t experts, int64_t chosen, bool renormalize,
                   f32x16* room, float* weights, int32_t* ids) {
    const int64_t count = ceil_div(experts, LANES), rest = experts - (count - 1) * LANES;
    std::memcpy(room, logits, experts * sizeof(float));
    // Lanes behind the last expert: they are not the largest, and count for nothing.
    for (int64_t i = rest; i < LANES; i++) room[count - 1][i] = logits[0];
    f32x16 most = room[0];
    for (int64_t v = 1; v < count; v++) most = vmax(most, room[v]);
    const f32x16 top = splat(largest(most));
    for (int64_t v = 0; v < count; v++) room[v] = vexp(room[v] - top);
    for (int64_t i = rest; i < LANES; i++) room[count - 1][i] = 0;
    f32x16 total = room[0];
    for (int64_t v = 1; v < count; v++) total += room[v];
    const float all = sum(total);
    for (int64_t i = rest; i < LANES; i++) room[count - 1][i] = -1;
    float kept = 0;
    for (int64_t c = 0; c < chosen; c++) {
        most = room[0];
        for (int64_t v = 1; v < count; v++) most = vmax(most, room[v]);
        const float best = largest(most);
        int64_t at = first_lane(room, count, best);
        if (at >= experts) at = 0;  // all experts are NaN
        weights[c] = best / all;
        kept += weights[c];
        ids[c] = (int32_t)at;
        room[at / LANES][at % LANES] = -1;
    }
    for (int64_t c = 0; renormalize && chosen > 1 && c < chosen; c++) weights[c] /= kept + 1e-20f;
}

}  // namespace
