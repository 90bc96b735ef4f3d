// What lies between the query-key-value product and attention, on pairs of numbers as attention_decode holds them: bias, norm of
// a head, rotary positions. rope.cu does the same by rows.
#pragma once

#include "attention.cuh"

namespace {

constexpr int kQuads = kDim / 4; // pairs of numbers in half a head
constexpr int kPairs = (kQuads + 31) / 32; // of those, a lane's
constexpr int kColumns = (kGroup + 7) / 8; // of products: 8 query heads each

// Two numbers of the lower half of a head and the two that they turn with.
struct Quad {
    float lx, ly, hx, hy;

    // `pair`: which of the lower half; bias of the head, or null.
    DEVICE Quad(u32 low, u32 high, const u32* bias, int pair)
        : lx(bf16_low(low)), ly(bf16_high(low)), hx(bf16_low(high)), hy(bf16_high(high)) {
        if (!bias) return;
        low = bias[pair], high = bias[pair + kQuads];
        lx += bf16_low(low), ly += bf16_high(low), hx += bf16_low(high), hy += bf16_high(high);
    }
    DEVICE float squares() const { return lx * lx + ly * ly + hx * hx + hy * hy; }
    DEVICE void norm(float squares, float eps, const u32* weights, int pair) {
        const float scale = 1.0f / sqrtf(squares / kDim + eps);
        const u32 low = weights[pair], high = weights[pair + kQuads];
        lx *= scale * bf16_low(low), ly *= scale * bf16_high(low), hx *= scale * bf16_low(high), hy *= scale * bf16_high(high);
    }
    // By (cosine, sine) of the pair's two positions.
    DEVICE void turn(float4 by) {
        *this = Quad{lx * by.x - hx * by.y, ly * by.z - hy * by.w, hx * by.x + lx * by.y, hy * by.z + ly * by.w};
    }
    DEVICE u32 low() const { return pack_bf16(lx, ly); }
    DEVICE u32 high() const { return pack_bf16(hx, hy); }

private:
    DEVICE Quad(float lx, float ly, float hx, float hy) : lx(lx), ly(ly), hx(hx), hy(hy) {}
};

// What the product left, and what is made of it how: attention_decode's arguments.
struct FromProduct {
    const u32 *qkv, *bias, *q_norm, *k_norm;
    const float4* rope_table;
    int kv_heads;
    float eps;
};

// Of one sequence and KV head, by a warp.
struct Made {
    u32 q[kSteps][kColumns][2]; // qᵀ as the B operand: 16 rows of head_dim by 8 heads, read as pairs of numbers
    u32 key[kPairs][2], value[kPairs][2]; // the new ones: a lane has pairs of both halves

    // `last`: the key and value too.
    DEVICE void make(const FromProduct& from, int sequence, int kv_head, bool last, int lane) {
        const int g = lane / 4, t = lane % 4;
        const u32* const row = from.qkv + (long long)sequence * (kGroup + 2) * from.kv_heads * (kDim / 2);
        const float4* const turn = from.rope_table + sequence * kQuads;
        const int first_head = kv_head * kGroup, key_head = from.kv_heads * kGroup + kv_head, value_head = key_head + from.kv_heads;
        auto at_head = [&](const u32* row, int head) { return row ? row + head * (kDim / 2) : nullptr; };
        // All that is waited for is on its way before anything is used, as far as there are registers.
        constexpr bool kAhead = kDim <= 128;
        float4 by[kSteps];
#pragma unroll
        for (int h = 0; h < kSteps; h++)
            if (kAhead) by[h] = turn[h * 4 + t];
#pragma unroll
        for (int n = 0; n < kColumns; n++) {
            const u32* head = at_head(row, first_head + min(n * 8 + g, kGroup - 1));
#pragma unroll
            for (int h = 0; h < 2 * kSteps; h++) q[h / 2][n][h % 2] = head[h * 4 + t];
        }
        float4 key_by[kPairs];
        if (last) {
#pragma unroll
            for (int c = 0; c < kPairs; c++) {
                const int pair = min(lane + c * 32, kQuads - 1);
                if (kAhead) key_by[c] = turn[pair];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    key[c][half] = at_head(row, key_head)[pair + half * kQuads];
                    value[c][half] = at_head(row, value_head)[pair + half * kQuads];
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kColumns; n++) {
            const int head = n * 8 + g;
            const u32* own_bias = at_head(from.bias, first_head + min(head, kGroup - 1));
            float squares = 0;
            if (from.q_norm) {
#pragma unroll
                for (int h = 0; h < kSteps; h++)
                    squares += Quad(q[h / 2][n][h % 2], q[(h + kSteps) / 2][n][(h + kSteps) % 2], own_bias, h * 4 + t).squares();
                squares = warp_sum<4>(squares);
            }
#pragma unroll
            for (int h = 0; h < kSteps; h++) {
                u32 &low = q[h / 2][n][h % 2], &high = q[(h + kSteps) / 2][n][(h + kSteps) % 2];
                Quad quad(low, high, own_bias, h * 4 + t);
                if (from.q_norm) quad.norm(squares, from.eps, from.q_norm, h * 4 + t);
                quad.turn(kAhead ? by[h] : turn[h * 4 + t]);
                low = head < kGroup ? quad.low() : 0;
                high = head < kGroup ? quad.high() : 0;
            }
        }
        if (!last) return;
        float squares = 0;
#pragma unroll
        for (int c = 0; c < kPairs; c++) {
            const int pair = min(lane + c * 32, kQuads - 1);
            Quad quad(key[c][0], key[c][1], at_head(from.bias, key_head), pair);
            if (lane + c * 32 < kQuads) squares += quad.squares();
        }
        squares = warp_sum<32>(squares);
#pragma unroll
        for (int c = 0; c < kPairs; c++) {
            const int pair = min(lane + c * 32, kQuads - 1);
            Quad quad(key[c][0], key[c][1], at_head(from.bias, key_head), pair);
            if (from.k_norm) quad.norm(squares, from.eps, from.k_norm, pair);
            quad.turn(kAhead ? key_by[c] : turn[pair]);
            key[c][0] = quad.low(), key[c][1] = quad.high();
            Quad plain(value[c][0], value[c][1], at_head(from.bias, value_head), pair);
            value[c][0] = plain.low(), value[c][1] = plain.high();
        }
    }
};

} // namespace
