// Skinny GEMM, sm_80 and later: cp.async pipeline, mma.sync.
//
// A CTA has 8 warps of 16 outputs each, all rows of x and all of k; blockIdx.x is the tile. Shared memory is laid out as
// on sm_90 (rows of 128 bytes, their 16-byte pieces exchanged by row % 8).
#pragma once

#include "gemm_epilogue.cuh"

namespace ampere {

constexpr int THREADS = 256;
constexpr int TILE = 128;
constexpr int W_STAGE = TILE * 128;
constexpr int X_STAGE = N_TILE * K_STAGE * 2;
constexpr int STAGE = W_STAGE + X_STAGE;
constexpr int PITCH = TILE + 4;
constexpr int FIXED = N_TILE * 4;
constexpr int FIT = (99 * 1024 - FIXED) / STAGE; // what sm_89 has
constexpr int STAGES = FIT < 5 ? FIT : 5;
constexpr int SUMS = N_TILE * PITCH * 4;
constexpr int SHARED = (STAGES * STAGE > SUMS ? STAGES * STAGE : SUMS) + FIXED;

template <Epilogue EPILOGUE> DEVICE void gemm(const SkinnyGemm& p) {
    extern __shared__ __align__(1024) u8 shared[];
    float* factor = (float*)(shared + SHARED - FIXED);
    const u32 base = shared_address(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int m0 = blockIdx.x * TILE;
    const int chunks = (p.k + K_STAGE - 1) / K_STAGE;

    dependency_wait();
    row_factors(p, factor, warp, THREADS / 32, lane);

    auto load = [&](int chunk) {
        if (chunk < chunks) {
            const u32 w = base + chunk % STAGES * STAGE, x = w + W_STAGE;
            const int row_bytes = WEIGHT == WEIGHT_BF16 ? p.k * 2 : p.k;
#pragma unroll
            for (int i = 0; i < TILE * 8 / THREADS; i++) {
                int r = (i * THREADS + threadIdx.x) / 8, c = threadIdx.x % 8;
                bool inside = m0 + r < p.out && chunk * 128 + c * 16 < row_bytes;
                const u8* from = inside ? (const u8*)p.w + (size_t)(m0 + r) * row_bytes + chunk * 128 + c * 16 : (const u8*)p.w;
                cp_async_16(w + r * 128 + ((c ^ (r & 7)) << 4), from, inside);
            }
            for (int i = threadIdx.x; i < N_TILE * K_STAGE / 8; i += THREADS) {
                int box = i / (N_TILE * 8), n = i / 8 % N_TILE, c = i % 8;
                int k = chunk * K_STAGE + box * 64 + c * 8;
                bool inside = n < p.rows && k < p.k;
                cp_async_16(x + box * (N_TILE * 128) + n * 128 + ((c ^ (n & 7)) << 4), inside ? p.x + (size_t)n * p.k + k : p.x, inside);
            }
        }
        cp_async_commit();
    };

    float sums[N_TILE / 8][4] = {};
#if WEIGHT == WEIGHT_FP8_BLOCK
    float whole[N_TILE / 8][4] = {};
#endif
    for (int i = 0; i < STAGES - 1; i++) load(i);
    for (int chunk = 0; chunk < chunks; chunk++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        load(chunk + STAGES - 1);
        const u32 w = base + chunk % STAGES * STAGE, x = w + W_STAGE;
        const int row = warp * 16 + lane % 16;
#pragma unroll
        for (int k = 0; k < K_STAGE / 32; k++) { // 32 of k at a time
            u32 a[2][4];
#if WEIGHT == WEIGHT_BF16
#pragma unroll
            for (int i = 0; i < 2; i++) ldmatrix_x4(a[i], w + row * 128 + (((k * 4 + i * 2 + lane / 16) ^ (row & 7)) << 4));
#else
            u32 bytes[4];
            ldmatrix_x4(bytes, w + row * 128 + (((k * 2 + lane / 16) ^ (row & 7)) << 4));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                e4m3_pair(bytes[2 * i], a[i][0], a[i][2]);
                e4m3_pair(bytes[2 * i + 1], a[i][1], a[i][3]);
            }
#endif
#pragma unroll
            for (int j = 0; j < N_TILE / 8; j++) {
                u32 b[4];
                int n = j * 8 + lane % 8;
                ldmatrix_x4(b, x + k / 2 * (N_TILE * 128) + n * 128 + (((k % 2 * 4 + lane / 8) ^ (n & 7)) << 4));
                mma_bf16(sums[j], a[0], b[0], b[1]);
                mma_bf16(sums[j], a[1], b[2], b[3]);
            }
        }
#if WEIGHT == WEIGHT_FP8_BLOCK
        const int k_blocks = (p.k + 127) / 128, m = m0 + warp * 16;
        float low, high;
        if (EPILOGUE == SWIGLU) {
            const float* gate = p.w_scale + min(m, p.out - 1) / 256 * k_blocks + chunk;
            low = gate[0], high = gate[(p.out / 2 + 127) / 128 * k_blocks];
        } else {
            low = high = p.w_scale[min(m, p.out - 1) / 128 * k_blocks + chunk];
        }
#pragma unroll
        for (int j = 0; j < N_TILE / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) whole[j][i] += sums[j][i] * (i < 2 ? low : high), sums[j][i] = 0.f;
#endif
    }
    cp_async_wait<0>();
    __syncthreads();
    dependency_trigger();

    float* tile = (float*)shared;
#pragma unroll
    for (int j = 0; j < N_TILE / 8; j++) {
#if WEIGHT == WEIGHT_FP8_BLOCK
        const float(&s)[4] = whole[j];
#else
        const float(&s)[4] = sums[j];
#endif
        float* at = tile + (j * 8 + lane % 4 * 2) * PITCH + warp * 16 + lane / 4;
        at[0] = s[0], at[PITCH] = s[1], at[8] = s[2], at[PITCH + 8] = s[3];
    }
    __syncthreads();
    finish_rows<EPILOGUE, TILE, THREADS>(p, m0, 0, p.rows, factor, threadIdx.x, nullptr,
                                         [&](int n, int m) { return *(const float4*)(tile + n * PITCH + m); });
}

} // namespace ampere
