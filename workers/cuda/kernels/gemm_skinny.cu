// Skinny GEMM: y[rows][out] = x[rows][k] · w[out][k]ᵀ for up to 64 rows, bound by reading w once.
//
// Floor: out·k·(2 or 1) bytes / read bandwidth. sm_90a: gemm_hopper.cuh (TMA, wgmma, clusters); anything else, or
// -DPORTABLE: gemm_ampere.cuh (cp.async, mma.sync). Deterministic: sums meet in a fixed order, no float atomics.
// Defines: N_TILE = rows per pass (8, 16, 24, 32, 48, 64; not under p.rows), WEIGHT = 0 BF16, 1 FP8 with a scale per output
// channel, 2 FP8 with a scale per 128×128 block, and on sm_90a M_TILE=128 for wide tiles (from 32 rows on, not with scales of
// blocks), RANKS = GPUs of a group, over which the residual's sums go (sm_90a alone). Shared memory: gemm_skinny_shape[3] (dynamic). Launch: docs/cuda-gemm.md.
//
// kernel gemm_skinny_store spill_bytes_max=0
// kernel gemm_skinny_residual spill_bytes_max=0
// kernel gemm_skinny_swiglu spill_bytes_max=0
// kernel gemm_skinny_logits spill_bytes_max=0
// variant N_TILE=8 WEIGHT=0
// variant N_TILE=64 WEIGHT=0
// variant N_TILE=64 WEIGHT=0 M_TILE=128
// variant N_TILE=8 WEIGHT=1
// variant N_TILE=32 WEIGHT=1
// variant N_TILE=64 WEIGHT=1
// variant N_TILE=64 WEIGHT=1 M_TILE=128
// variant N_TILE=16 WEIGHT=2
// variant N_TILE=64 WEIGHT=2
// variant N_TILE=16 WEIGHT=0 RANKS=2
// variant N_TILE=64 WEIGHT=1 RANKS=8
// variant N_TILE=64 WEIGHT=2 RANKS=4
#include "gemm_skinny.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(PORTABLE)
#include "gemm_hopper.cuh"
namespace arch = hopper;
#define TILE_OUT M_TILE
#else
#include "gemm_ampere.cuh"
namespace arch = ampere;
#define TILE_OUT 128
#endif

// For the host: outputs per tile, rows per pass, threads per CTA, dynamic shared memory in bytes.
extern "C" __device__ const int gemm_skinny_shape[4] = {TILE_OUT, N_TILE, arch::THREADS, arch::SHARED};

// y = bf16(x·wᵀ + bias)
extern "C" __global__ void __launch_bounds__(arch::THREADS, 1) gemm_skinny_store(const __grid_constant__ SkinnyGemm p) {
    arch::gemm<STORE>(p);
}
// residual += x·wᵀ + bias; y = bf16(residual·gamma); y_ssq
extern "C" __global__ void __launch_bounds__(arch::THREADS, 1) gemm_skinny_residual(const __grid_constant__ SkinnyGemm p) {
    arch::gemm<RESIDUAL>(p);
}
// y = bf16(silu(gate)·up), rows of w: 8 of gate, 8 of up, 8 of gate, ...
extern "C" __global__ void __launch_bounds__(arch::THREADS, 1) gemm_skinny_swiglu(const __grid_constant__ SkinnyGemm p) {
    arch::gemm<SWIGLU>(p);
}
// y = f32(x·wᵀ)
extern "C" __global__ void __launch_bounds__(arch::THREADS, 1) gemm_skinny_logits(const __grid_constant__ SkinnyGemm p) {
    arch::gemm<LOGITS>(p);
}
