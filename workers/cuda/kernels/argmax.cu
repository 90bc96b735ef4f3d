// The greedy token of each row of logits, by the rule of every executor: NaN counts as minus infinity, plus infinity as the
// largest finite number, ties go to the lowest id, and a row without any possible token gives id 0.
//
// Floor: rows * vocab * 4 bytes. PARTS blocks of a row each find the best of their part; the
// last one to arrive takes the best of those.
//
// kernel argmax spill_bytes_max=0
#include "scalar.cuh"

#define PARTS 32 // a warp takes the best of them

// A number whose order as a number is (logit, lower id first).
DEVICE u64 rank_of(float logit, u32 id) {
    if (!(logit == logit)) logit = -__int_as_float(0x7f800000);
    if (logit == __int_as_float(0x7f800000)) logit = __int_as_float(0x7f7fffff);
    if (logit == 0.0f) logit = 0.0f; // minus zero ties with zero
    u32 bits = __float_as_uint(logit);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (0xffffffffu - id);
}

DEVICE u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// logits [rows][stride]; tokens [rows]; best [rows][PARTS]; arrived [rows], zero before and after. Grid: (PARTS, rows); 256
// threads.
extern "C" __global__ void argmax(
    int* tokens, const float* logits, int vocab, long long stride, u64* best, u32* arrived
) {
    __shared__ u64 scratch[8];
    __shared__ bool last;
    dependency_trigger();
    dependency_wait();
    const float* row = logits + blockIdx.y * stride;
    u64 top = 0;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < vocab; i += PARTS * 256) top = larger(top, rank_of(row[i], i));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) top = larger(top, __shfl_xor_sync(0xffffffffu, top, distance));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < 8; warp++) top = larger(top, scratch[warp]);
        best[blockIdx.y * PARTS + blockIdx.x] = top;
        __threadfence();
        last = atomicAdd(&arrived[blockIdx.y], 1) == PARTS - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last || threadIdx.x >= PARTS) return;
    top = ((volatile u64*)best)[blockIdx.y * PARTS + threadIdx.x];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) top = larger(top, __shfl_xor_sync(0xffffffffu, top, distance));
    if (threadIdx.x == 0) {
        arrived[blockIdx.y] = 0;
        bool possible = top >> 32 > rank_of(-__int_as_float(0x7f800000), 0) >> 32;
        tokens[blockIdx.y] = possible ? (int)(0xffffffffu - (u32)top) : 0;
    }
}
