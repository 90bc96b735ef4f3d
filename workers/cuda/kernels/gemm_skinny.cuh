// What both architectures of the skinny GEMM share: its parameters, the variants, e4m3 to bf16.
#pragma once

#include "pushed_sum.cuh"

// Weights: BF16; e4m3 with one scale per output channel; e4m3 with one scale per 128×128 block.
#define WEIGHT_BF16 0
#define WEIGHT_FP8_CHANNEL 1
#define WEIGHT_FP8_BLOCK 2

// Rows of x that one pass handles, a multiple of 8.
#ifndef N_TILE
#define N_TILE 8
#endif
#ifndef WEIGHT
#define WEIGHT WEIGHT_BF16
#endif

// k per pipeline stage: 128 bytes of a weight row.
#define K_STAGE (WEIGHT == WEIGHT_BF16 ? 64 : 128)

enum Epilogue { STORE, RESIDUAL, SWIGLU, LOGITS };

// By value, as the kernel's one parameter. Pointers that a variant does not use may be null.
struct SkinnyGemm {
    TensorMap w_map;       // sm_90: w as [out][k], box 64 rows × 128 bytes, 128-byte swizzle
    TensorMap x_map;       // sm_90: x as [rows][k] bf16, box N_TILE rows × 64 columns, 128-byte swizzle
    const void* w;         // [out][k] bf16, or e4m3 with each 16 of k in the order that `e4m3_pair` wants
    const bf16* x;         // [rows][k]
    const float* w_scale;  // FP8: [out], or [ceil(out/128)][ceil(k/128)]
    const bf16* bias;      // [out], or null
    const float* x_ssq;    // [rows][x_ssq_tiles]: partial sums of squares of the residual rows behind x, or null
    const bf16* gamma;     // residual: [out], weight of the RMSNorm that comes next
    void* y;               // store: bf16 [rows][out]; residual: the same, residual·gamma; swiglu: bf16 [rows][out/2]; logits: f32 [rows][out]
    float* residual;       // residual: f32 [rows][out], added to in place
    float* y_ssq;          // residual: [rows][ceil(out/64)], sums of squares of the new residual
    int out;
    int k;
    int rows;
    int x_ssq_tiles;
    float eps;
    PushedSlots slots;          // residual, with RANKS > 1: of this sum
    exchange::Exchange ranks;
};

// Four e4m3, two bf16 pairs: bytes 0 and 2, bytes 1 and 3. Exact, subnormals too (a NaN becomes 480). The four exponent
// and three mantissa bits go to where bf16 has its lowest exponent bits; 2^120 mends the bias.
DEVICE void e4m3_pair(u32 v, u32& even, u32& odd) {
    u32 e = ((v << 4) & 0x07f007f0u) | ((v << 8) & 0x80008000u);
    u32 o = ((v >> 4) & 0x07f007f0u) | (v & 0x80008000u);
    const u32 scale = 0x7b807b80u, minus_zero = 0x80008000u;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(even) : "r"(e), "r"(scale), "r"(minus_zero));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(odd) : "r"(o), "r"(scale), "r"(minus_zero));
}
