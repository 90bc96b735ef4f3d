// bf16 rows of x as two e4m3 numbers each, for wgmma with e4m3 weights: x = (high + low / 32) · a power of two.
//
// The power of two is one for a row and 128 of k: it puts the largest number into 128 ... 256. High is x rounded to its four
// upper bits, low the four bits that are left. What is below 2^-14 of the largest loses bits to e4m3's subnormals, no more than
// 2^-17 of the largest (half a bf16 step of the largest is 2^-9 of it).
#pragma once

#include "gemm_skinny.cuh"

#if BATON_ARCH >= 890
constexpr float SPLIT_LOW = 1.f / 32.f;

// Two e4m3 numbers, a in the low byte.
DEVICE u32 e4m3x2(float a, float b) {
    u16 bytes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(b), "f"(a));
    return bytes;
}

// To four bits, ties away from zero. Converting to e4m3 and back would be many times slower.
DEVICE float four_bits(float x) { return __uint_as_float(__float_as_uint(x) + 0x80000u & 0xfff00000u); }

// N_TILE rows × 128 of k; one warp. `from`: two boxes of rows of 128 bytes, swizzled by 128; `to`: high numbers, [N_TILE] rows of 128
// bytes, swizzled, then low ones. Within each 16 of k they stand in the order that w has.
DEVICE void split_box(u32 from, u32 to, float* scales, int lane) {
#pragma unroll
    for (int first = 0; first < N_TILE; first += 4) {
        const int n = first + lane / 8, k = lane % 8; // eight lanes a row, each 16 of k
        const u32 row = from + k / 4 * (N_TILE * 128) + n * 128;
        u32 a[8];
#pragma unroll
        for (int i = 0; i < 2; i++)
            asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(a[4 * i]), "=r"(a[4 * i + 1]), "=r"(a[4 * i + 2]), "=r"(a[4 * i + 3])
                         : "r"(row + ((k % 4 * 2 + i ^ n & 7) << 4))
                         : "memory");
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) most = max(most, max(a[i] << 16 & 0x7fff0000u, a[i] & 0x7fff0000u));
#pragma unroll
        for (int d = 4; d > 0; d /= 2) most = max(most, __shfl_xor_sync(~0u, most, d));
        const u32 exponent = max(most >> 23, 8u);
        const float scale = __uint_as_float((261 - exponent) << 23);
        u32 high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) { // elements 2i and 2i + 8, 2i + 1 and 2i + 9
            const float x[4] = {bf16_low(a[i]) * scale, bf16_low(a[i + 4]) * scale, bf16_high(a[i]) * scale, bf16_high(a[i + 4]) * scale};
            float upper[4], rest[4];
#pragma unroll
            for (int e = 0; e < 4; e++) upper[e] = four_bits(x[e]), rest[e] = (x[e] - upper[e]) * (1 / SPLIT_LOW);
            high[i] = e4m3x2(upper[0], upper[1]) | e4m3x2(upper[2], upper[3]) << 16;
            low[i] = e4m3x2(rest[0], rest[1]) | e4m3x2(rest[2], rest[3]) << 16;
        }
        const u32 place = to + n * 128 + ((k ^ n & 7) << 4);
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(place), "r"(high[0]), "r"(high[1]), "r"(high[2]), "r"(high[3]) : "memory");
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(place + N_TILE * 128), "r"(low[0]), "r"(low[1]), "r"(low[2]), "r"(low[3]) : "memory");
        if (k == 0) scales[n] = __uint_as_float((exponent - 7) << 23);
    }
}
#endif
