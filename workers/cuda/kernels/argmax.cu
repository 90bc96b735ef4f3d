// The greedy token of each row of logits, by the order of ranks.cuh; -1 for a row without any possible token.
//
// Floor: rows * vocab * 4 bytes. PARTS blocks of a row each find the best of their part; the
// last one to arrive takes the best of those.
//
// kernel argmax spill_bytes_max=0
#include "ranks.cuh"

#define PARTS 32 // a warp takes the best of them

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
    for (int i = blockIdx.x * 256 + threadIdx.x; i < vocab; i += PARTS * 256) top = larger(top, rank_of(clean(row[i]), i));
    top = warp_larger(top);
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
    top = warp_larger(((volatile u64*)best)[blockIdx.y * PARTS + threadIdx.x]);
    if (threadIdx.x == 0) {
        arrived[blockIdx.y] = 0;
        tokens[blockIdx.y] = possible(top) ? (int)token_of(top) : -1;
    }
}
