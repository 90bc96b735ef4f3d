// Rows of activations to e4m3, a scale for each row or for each 128 of it: what cuBLASLt multiplies by FP8 weights.
//
// Within each 16 the bytes stand in the order 0, 8, 1, 9, 2, 10, … 7, 15, as those of the weights do (docs/cuda-gemm.md): a
// product is the same whatever order both sides have. scale = largest magnitude / 448, so the largest becomes 448, the largest
// that e4m3 has; to nearest, ties to even.
//
// A lane takes eight numbers at a time, and what two neighbours have is interleaved by one exchange.
#pragma once

#include <cuda_fp8.h>

#include "scalar.cuh"

// Maximum over a block of whole warps, the same on every thread. `scratch` holds 32 floats. No x is negative.
DEVICE float block_max(float x, float* scratch) {
    x = warp_max<32>(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float most = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.0f;
    return warp_max<32>(most);
}

// What numbers are multiplied by, from the largest magnitude. Zeros, and next to nothing, become zeros.
DEVICE float e4m3_factor(float most) { return most > 1e-30f ? 448.0f / most : 0.0f; }

DEVICE u32 e4m3_four(const float* v, float factor) {
    u32 low = __nv_cvt_float2_to_fp8x2(make_float2(v[0] * factor, v[1] * factor), __NV_SATFINITE, __NV_E4M3);
    u32 high = __nv_cvt_float2_to_fp8x2(make_float2(v[2] * factor, v[3] * factor), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
}

// Eight numbers of this lane, the first eight of a sixteen if its number is even and the second if odd, as the eight bytes that
// stand there. All lanes take part.
DEVICE uint2 e4m3_eight(const float (&v)[8], float factor) {
    const u32 first = e4m3_four(v, factor), second = e4m3_four(v + 4, factor);
    const bool odd = threadIdx.x & 1;
    const u32 theirs = __shfl_xor_sync(~0u, odd ? first : second, 1);
    const u32 a = odd ? theirs : first, b = odd ? second : theirs; // of the first eight and of the second
    return make_uint2(__byte_perm(a, b, 0x5140), __byte_perm(a, b, 0x7362));
}

DEVICE float most_of(const float (&v)[8]) {
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(v[j]));
    return most;
}

// One row of `count` numbers, a multiple of 16, with one scale: `load(i, v, again)` puts the i-th eight of them into v. A block takes
// a row; up to KEPT · 8 numbers a thread stay in registers, what is beyond is loaded again. The largest magnitude, on every thread.
template <int KEPT, class Load> DEVICE float e4m3_row(uint2* to, int count, float* scratch, Load load) {
    const int eights = count / 8, beyond = KEPT * blockDim.x;
    float kept[KEPT][8] = {};
    float most = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const int i = threadIdx.x + k * blockDim.x;
        if (i < eights) load(i, kept[k], false);
        most = fmaxf(most, most_of(kept[k]));
    }
    for (int i = threadIdx.x + beyond; i < eights; i += blockDim.x) {
        float v[8];
        load(i, v, false);
        most = fmaxf(most, most_of(v));
    }
    most = block_max(most, scratch);
    const float factor = e4m3_factor(most);
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const int i = threadIdx.x + k * blockDim.x;
        const uint2 bytes = e4m3_eight(kept[k], factor);
        if (i < eights) to[i] = bytes;
    }
    for (int first = beyond; first < eights; first += blockDim.x) {
        const int i = first + threadIdx.x;
        float v[8] = {};
        if (i < eights) load(i, v, true);
        const uint2 bytes = e4m3_eight(v, factor);
        if (i < eights) to[i] = bytes;
    }
    return most;
}

// The same with a scale for each 128: `scale(group, most)` is told each group's largest magnitude, by one lane. One pass.
template <class Load, class Scale> DEVICE void e4m3_groups(uint2* to, int count, Load load, Scale scale) {
    const int eights = count / 8;
    for (int first = 0; first < eights; first += blockDim.x) {
        const int i = first + threadIdx.x;
        float v[8] = {};
        if (i < eights) load(i, v, false);
        float most = warp_max<16>(most_of(v)); // 16 lanes have a group
        const uint2 bytes = e4m3_eight(v, e4m3_factor(most));
        if (i < eights) {
            to[i] = bytes;
            if (i % 16 == 0) scale(i / 16, most);
        }
    }
}

// Eight BF16 numbers.
DEVICE void f32x8_of(float* v, uint4 x) {
    const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) v[2 * i] = bf16_low(words[i]), v[2 * i + 1] = bf16_high(words[i]);
}
