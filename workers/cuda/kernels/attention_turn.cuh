// What lies between the query-key-value product and attention, on pairs of numbers as attention_decode holds them: bias, norm of
// a head, rotary positions. rope.cu does the same by rows.
#pragma once

#include "attention.cuh"

namespace {

constexpr int kQuads = kDim / 4; // pairs of numbers in half a head

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

} // namespace
