// RMSNorm of rows of the f32 residual stream into BF16: y = x / sqrt(mean(x^2) + eps) * weight
// (Zhang and Sennrich, arXiv:1910.07467).
//
// Floor: rows * hidden * (4 + 2) bytes. One block a row; the row is read once and kept in registers up to 8192 numbers,
// read twice (the second time from L1) beyond.
//
// kernel rms_norm spill_bytes_max=0
#include "scalar.cuh"

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
