// The four products between a layer's attention and the next layer's, in one kernel, for up to 8 rows. sm_90.
//
//   residual += attended·oᵀ;  z = bf16(residual·gamma);  inner = swiglu(z·gate_upᵀ / rms);
//   residual += inner·downᵀ;  z' = bf16(residual·gamma');  qkv = z'·qkvᵀ / rms' + bias
//
// Floor: bytes of the four matrices / read bandwidth. As kernels of their own each product loses 3 to 5 µs at its ends: memory
// idles while sums meet, are finished, and the next kernel finds its x. Here one thread of each CTA sends for weights through
// all four, 140 KB ahead of what is multiplied (4 µs of reading), so what is between two products has that long.
//
// - No sums meet over CTAs: a tile is 32 outputs (qkv: 16) × all of k, whose shares are a CTA's warps.
// - x goes from CTA to CTA without flags: the memory for it is filled with what no arithmetic makes, and whoever needs it asks
//   until it is there. One way to L2 and one back, no fence. Each launch clears the memory of another (`clear`), which
//   nobody touches meanwhile: launches take sets in turn.
// - All CTAs must run at once: one on each multiprocessor, grid at most their number, nothing else that waits for them.
//
// -DROWS (1, 4 or 8): rows at most. Fewer have room for more of x, one for more weights ahead too.
// -DRANKS: GPUs of a group, each with its part of k of o and of down: what these add to the residual is the sum over all.
// One kernel for each -DROWS and -DWEIGHT (0 BF16, 1 FP8 with a scale per output channel, 2 FP8 with a scale per 128×128 block). All sizes:
// hidden a multiple of 32, intermediate of 16, q·k·v of 16, every k of 64 (FP8: 128). Deterministic.
// Launch: `gemm_chain_shape` = {threads, dynamic shared bytes, rows at most, k up to which x is brought once}; grid = multiprocessors, programmatic
// launch. Maps: the matrix as three dimensions {128 bytes of k, out, k / (128 bytes)}, strides {row, 128 bytes}, box {128 bytes, R,
// 128 / R}, R = 32, qkv 16; 128-byte swizzle.
//
// kernel gemm_chain spill_bytes_max=0
// variant WEIGHT=0 ROWS=1
// variant WEIGHT=0 ROWS=4
// variant WEIGHT=0 ROWS=8
// variant WEIGHT=1 ROWS=1
// variant WEIGHT=1 ROWS=4
// variant WEIGHT=1 ROWS=8
// variant WEIGHT=2 ROWS=1
// variant WEIGHT=2 ROWS=4
// variant WEIGHT=2 ROWS=8
// variant WEIGHT=0 ROWS=1 RANKS=2
// variant WEIGHT=0 ROWS=8 RANKS=8
// variant WEIGHT=1 ROWS=8 RANKS=4
// variant WEIGHT=2 ROWS=4 RANKS=2
#ifndef ROWS
#define ROWS 8
#endif
#include "gemm_skinny.cuh"

struct ChainProduct {
    TensorMap w_map;
    const float* w_scale; // FP8: [out], or [ceil(out/128)][ceil(k/128)]; gate·up: gate's and then up's
    const bf16* bias;     // qkv: [out], or null
    int out;              // 0: there is no such product (qkv of the last layer)
    int k;
};

// By value, as the kernel's one parameter.
struct Chain {
    ChainProduct o, gate_up, down, qkv;
    const bf16* attended;  // [rows][o.k]
    float* residual;       // [rows][hidden]
    const bf16* gamma[2];  // [hidden]: of the norm before gate·up, and of the one before qkv (or the output matrix)
    bf16* z[2];            // [8][hidden], after o and after down; all but the last layer's second one cleared before
    float* squares[2];     // [8][hidden/32]: sums of squares of 32 of the residual, with z
    bf16* inner;           // [8][intermediate], cleared before
    bf16* qkv_out;         // [rows][qkv.out]
    uint4* clear;          // what the next launch exchanges through, 16 bytes each
    int clear_count;
    int rows;
    float eps;
    PushedSlots slots[2];  // with RANKS > 1: of the sums after o and after down
    exchange::Exchange ranks;
};

#include "gemm_chain.cuh"

extern "C" __device__ const int gemm_chain_shape[4] = {chain::THREADS, chain::SHARED, ROWS, chain::GROUPS * chain::GROUP_K};

extern "C" __global__ void __launch_bounds__(chain::THREADS, 1) gemm_chain(const __grid_constant__ Chain c) {
#if BATON_ARCH >= 900
    chain::run(c);
#endif
}
