// BF16 numbers one at a time, and sums over a block.
#pragma once

#include "common.cuh"

DEVICE float f32_of(u16 bits) { return __uint_as_float((u32)bits << 16); }
DEVICE float2 f32x2_of(u32 pair) { return make_float2(bf16_low(pair), bf16_high(pair)); }

// To nearest, ties to even; NaN stays NaN.
DEVICE u16 bf16_of(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Sum over a block of whole warps, the same on every thread, always in the same order. `scratch` holds 32 floats.
DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum<32>(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.0f;
    return warp_sum<32>(sum);
}
