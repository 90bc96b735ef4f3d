// RMSNorm of rows of the f32 residual stream into BF16: y = x / sqrt(mean(x^2) + eps) * weight
// (Zhang and Sennrich, arXiv:1910.07467).
//
// Floor: rows * hidden * (4 + 2) bytes. One block a row; the row is read once and kept in registers up to 8192 numbers,
// read twice (the second time from L1) beyond.
//
// The same into e4m3 with a scale a row (e4m3.cuh), rows * hidden * (4 + 1) bytes: the norm's factor is one number a row, so it
// goes into the scale, and one pass finds both.
//
// kernel rms_norm spill_bytes_max=0
// kernel rms_norm_e4m3 spill_bytes_max=0
#include "e4m3.cuh"

// x [..][hidden]; weight [hidden]; y [rows][hidden]; `hidden` is even. Row r of y comes from row `chosen[r]` of x, or from
// row r if `chosen` is null. Grid: rows; 256 threads.
extern "C" __global__ void rms_norm(u16* y, const float* x, const u16* weight, const int* chosen, int hidden, float eps) {
    __shared__ float scratch[32];
    dependency_trigger();
    dependency_wait();
    int row = chosen ? chosen[blockIdx.x] : blockIdx.x;
    const float2* from = (const float2*)(x + (long long)row * hidden);
    u32* to = (u32*)(y + (long long)blockIdx.x * hidden);
    const int KEPT = 16;
    float2 kept[KEPT];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int i = threadIdx.x + k * 256;
        kept[k] = i < hidden / 2 ? from[i] : make_float2(0.0f, 0.0f);
        sum += kept[k].x * kept[k].x + kept[k].y * kept[k].y;
    }
    for (int i = threadIdx.x + KEPT * 256; i < hidden / 2; i += 256) sum += from[i].x * from[i].x + from[i].y * from[i].y;
    float scale = 1.0f / sqrtf(block_sum(sum, scratch) / hidden + eps);
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int i = threadIdx.x + k * 256;
        if (i < hidden / 2) {
            float2 w = f32x2_of(((const u32*)weight)[i]);
            to[i] = pack_bf16(kept[k].x * scale * w.x, kept[k].y * scale * w.y);
        }
    }
    for (int i = threadIdx.x + KEPT * 256; i < hidden / 2; i += 256) {
        float2 w = f32x2_of(((const u32*)weight)[i]);
        to[i] = pack_bf16(from[i].x * scale * w.x, from[i].y * scale * w.y);
    }
}

// y [rows][hidden] e4m3; scale [rows], or [ceil(hidden / 128)][rows] where `groups` is not 0; the rest as above, `hidden` a multiple
// of 16. Grid: rows; whole warps, at most 512 threads, 16 numbers each to stay in registers.
extern "C" __global__ void __launch_bounds__(512) rms_norm_e4m3(
    uint2* y, float* scale, const float4* x, const uint4* weight, const int* chosen, int hidden, float eps, int groups
) {
    __shared__ float scratch[2][32];
    extern __shared__ float group_most[]; // [ceil(hidden / 128)] where there are groups
    dependency_trigger();
    dependency_wait();
    int row = chosen ? chosen[blockIdx.x] : blockIdx.x;
    const float4* from = x + (long long)row * (hidden / 4);
    uint2* to = y + (long long)blockIdx.x * (hidden / 8);
    float sum = 0.0f;
    auto load = [&](int i, float(&v)[8], bool again) {
        f32x8_of(v, weight[i]);
        const float4 a = from[2 * i], b = from[2 * i + 1];
        if (!again) sum += (a.x * a.x + a.y * a.y) + (a.z * a.z + a.w * a.w) + (b.x * b.x + b.y * b.y) + (b.z * b.z + b.w * b.w);
        v[0] *= a.x, v[1] *= a.y, v[2] *= a.z, v[3] *= a.w;
        v[4] *= b.x, v[5] *= b.y, v[6] *= b.z, v[7] *= b.w;
    };
    if (groups) {
        e4m3_groups(to, hidden, load, [&](int group, float most) { group_most[group] = most; });
        const float factor = 1.0f / sqrtf(block_sum(sum, scratch[1]) / hidden + eps) / 448.0f;
        for (int i = threadIdx.x; i < (hidden + 127) / 128; i += blockDim.x) scale[i * gridDim.x + blockIdx.x] = group_most[i] * factor;
    } else {
        const float most = e4m3_row<2>(to, hidden, scratch[0], load);
        sum = block_sum(sum, scratch[1]);
        if (threadIdx.x == 0) scale[blockIdx.x] = most / 448.0f / sqrtf(sum / hidden + eps);
    }
}
