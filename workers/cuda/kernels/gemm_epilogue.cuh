// The end of a skinny GEMM tile: four neighbouring outputs of one row at a time, read from wherever the f32 sums lie.
//
// RMSNorm without a norm kernel: the residual variant leaves z = bf16(residual · gamma) and, per row and 64 outputs, the
// sum of squares. The next GEMM multiplies z as it stands, and since the norm's factor is one number per row, it is
// applied here, to the sums.
#pragma once

#include "gemm_skinny.cuh"

// 1 / rms of each row, or 1. A warp takes a row; the same order always, so the same bits.
DEVICE void row_factors(const SkinnyGemm& p, float* factor, int warp, int warps, int lane) {
#pragma unroll 4
    for (int n = warp; n < N_TILE; n += warps) {
        float sum = 0.f;
        if (p.x_ssq != nullptr && n < p.rows) {
            for (int i = lane; i < p.x_ssq_tiles; i += 32) sum += p.x_ssq[n * p.x_ssq_tiles + i];
            sum = warp_sum<32>(sum);
        }
        if (lane == 0) factor[n] = p.x_ssq == nullptr ? 1.f : rsqrtf(sum / (float)p.k + p.eps);
    }
}

DEVICE float4 bias_quad(const SkinnyGemm& p, int m) {
    uint2 b = *(const uint2*)(p.bias + m);
    return make_float4(bf16_low(b.x), bf16_high(b.x), bf16_low(b.y), bf16_high(b.y));
}

// Sums to values: the row's factor, the channel's scale, the bias.
DEVICE float4 value_quad(const SkinnyGemm& p, float4 v, float factor, int m) {
    float4 s = make_float4(factor, factor, factor, factor);
#if WEIGHT == WEIGHT_FP8_CHANNEL
    float4 c;
    if (p.out % 4 == 0) {
        c = *(const float4*)(p.w_scale + m);
    } else {
        c.x = p.w_scale[m];
        c.y = m + 1 < p.out ? p.w_scale[m + 1] : 0.f;
        c.z = m + 2 < p.out ? p.w_scale[m + 2] : 0.f;
        c.w = m + 3 < p.out ? p.w_scale[m + 3] : 0.f;
    }
    s.x *= c.x, s.y *= c.y, s.z *= c.z, s.w *= c.w;
#endif
    v.x *= s.x, v.y *= s.y, v.z *= s.z, v.w *= s.w;
    if (p.bias != nullptr) {
        float4 b = bias_quad(p, m);
        v.x += b.x, v.y += b.y, v.z += b.z, v.w += b.w;
    }
    return v;
}

DEVICE float silu(float x) { return x / (1.f + __expf(-x)); }

// The residual that this thread will need first, so that its way from memory is not at the end.
template <int TILE> DEVICE float4 residual_early(const SkinnyGemm& p, int m0, int first, int end, int thread) {
    int n = first + thread / (TILE / 4), m = m0 + thread % (TILE / 4) * 4;
    return n < end && m < p.out ? *(const float4*)(p.residual + (size_t)n * p.out + m) : make_float4(0.f, 0.f, 0.f, 0.f);
}

// Constants of outputs m0 ... + TILE on their way to L2: what streams through has driven them out. One warp.
template <Epilogue EPILOGUE, int TILE> DEVICE void constants_early(const SkinnyGemm& p, int m0, int lane) {
    auto fetch = [](const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); };
    const int m = m0 + lane * 32;
    if (lane * 32 >= TILE || m >= p.out) return;
    if (WEIGHT == WEIGHT_FP8_CHANNEL) fetch(p.w_scale + m);
    if (lane % 2 == 0 && EPILOGUE == RESIDUAL && p.gamma != nullptr) fetch(p.gamma + m);
    if (lane % 2 == 0 && p.bias != nullptr) fetch(p.bias + m);
}

#if RANKS > 1
DEVICE u32 pushed_place(const SkinnyGemm& p, int n, int m) { return (u32)(n * p.out + m) * 2; }

// The first half of sums over ranks: for every row before `finish_rows`, which waits for the peers'.
template <int TILE, int THREADS, class Load> DEVICE void send_rows(const SkinnyGemm& p, int m0, int first, int end, const float* factor, int thread, Load load) {
    for (int i = thread; i < (end - first) * (TILE / 4); i += THREADS) {
        const int n = first + i / (TILE / 4), at = i % (TILE / 4) * 4;
        if (m0 + at < p.out) pushed_sum::send(p.ranks, p.slots, pushed_place(p, n, m0 + at), value_quad(p, load(n, at), factor[n], m0 + at));
    }
}
#endif

// Rows `first..end` of the tile whose first output is m0. `load(n, m)` gives the sums of row n, outputs m0 + m ... + 3.
// All THREADS threads take part; out is a multiple of 8 (of 1 for logits without bias). `early`: null, or what
// `residual_early` fetched for the same rows.
template <Epilogue EPILOGUE, int TILE, int THREADS, class Load>
DEVICE void finish_rows(const SkinnyGemm& p, int m0, int first, int end, const float* factor, int thread, const float4* early, Load load) {
    constexpr int PER_ROW = EPILOGUE == SWIGLU ? TILE / 8 : TILE / 4;
    for (int i = thread; i < (end - first) * PER_ROW; i += THREADS) {
        int n = first + i / PER_ROW, q = i % PER_ROW;
        if constexpr (EPILOGUE == SWIGLU) {
            int at = q / 2 * 16 + q % 2 * 4, m = m0 + at;
            if (m < p.out) {
                float4 gate = value_quad(p, load(n, at), factor[n], m);
                float4 up = value_quad(p, load(n, at + 8), factor[n], m + 8);
                uint2 y;
                y.x = pack_bf16(silu(gate.x) * up.x, silu(gate.y) * up.y);
                y.y = pack_bf16(silu(gate.z) * up.z, silu(gate.w) * up.w);
                *(uint2*)((bf16*)p.y + (size_t)n * (p.out / 2) + (m / 16 * 8 + m % 8)) = y;
            }
        } else {
            int at = q * 4, m = m0 + at;
            if constexpr (EPILOGUE == RESIDUAL) {
                float sum = 0.f;
                if (m < p.out) {
                    float4* place = (float4*)(p.residual + (size_t)n * p.out + m);
                    float4 r = early != nullptr && i == thread ? *early : *place;
                    float4 v = value_quad(p, load(n, at), factor[n], m);
#if RANKS > 1
                    v = pushed_sum::receive(p.ranks, p.slots, pushed_place(p, n, m), v);
#endif
                    r.x += v.x, r.y += v.y, r.z += v.z, r.w += v.w;
                    *place = r;
                    sum = (r.x * r.x + r.y * r.y) + (r.z * r.z + r.w * r.w);
                    if (p.y != nullptr) {
                        uint2 g = *(const uint2*)(p.gamma + m);
                        uint2 z;
                        z.x = pack_bf16(r.x * bf16_low(g.x), r.y * bf16_high(g.x));
                        z.y = pack_bf16(r.z * bf16_low(g.y), r.w * bf16_high(g.y));
                        *(uint2*)((bf16*)p.y + (size_t)n * p.out + m) = z;
                    }
                }
                if (p.y_ssq != nullptr) { // half a warp holds 64 outputs of one row
                    const u32 half = 0xffffu << (thread & 16);
#pragma unroll
                    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(half, sum, d);
                    if (thread % 16 == 0 && m < p.out) p.y_ssq[n * ((p.out + 63) / 64) + m / 64] = sum;
                }
            } else if (m < p.out) {
                float4 v = value_quad(p, load(n, at), factor[n], m);
                size_t place = (size_t)n * p.out + m;
                if constexpr (EPILOGUE == STORE) {
                    *(uint2*)((bf16*)p.y + place) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
                } else if (p.out % 4 == 0) {
                    *(float4*)((float*)p.y + place) = v;
                } else {
                    float* y = (float*)p.y + place;
                    y[0] = v.x;
                    if (m + 1 < p.out) y[1] = v.y;
                    if (m + 2 < p.out) y[2] = v.z;
                    if (m + 3 < p.out) y[3] = v.w;
                }
            }
        }
    }
}
