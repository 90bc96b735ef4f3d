// A token drawn by its weight exp((logit - peak) / temperature), as the engine's sampling rules draw it without top-k and
// top-p: bit for bit the same token from the same logits, whichever side draws.
//
// That takes exp by the engine's polynomial, without fused multiply-add, and weights as integers, whose sums do not depend
// on their order.
//
// Floor: rows * vocab * 4 bytes; the walk over the groups (501 of them at 128,256 logits) is some µs beside it.
//
// kernel draw spill_bytes_max=0
#include "common.cuh"

#define GROUP 256
#define LANES 16

struct Draw {
    float inverse;    // of the temperature; 0 leaves the row's token as it is
    float weight_min; // weights below are 0
    u64 bits;         // where in the sum of all weights, in 2^-53
};

DEVICE float clean(float x) {
    if (!(x == x)) return -__int_as_float(0x7f800000);
    return x == __int_as_float(0x7f800000) ? __int_as_float(0x7f7fffff) : x;
}

// The engine's `exp` for x <= 0.
DEVICE float exp_rounded(float x) {
    const float round = 12582912.0f;
    float bounded = x > -87.0f ? x : -87.0f;
    float shifted = __fadd_rn(__fmul_rn(bounded, 1.44269504088896340736f), round);
    float n = __fsub_rn(shifted, round);
    float r = __fsub_rn(__fsub_rn(bounded, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    float p = 1.0f / 720.0f;
    const float coefficients[6] = {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < 6; i++) p = __fadd_rn(__fmul_rn(p, r), coefficients[i]);
    float power = __uint_as_float((__float_as_uint(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : __fmul_rn(p, power);
}

// In units of 2^-44.
DEVICE u64 weight_of(float logit, float peak, const Draw& draw) {
    float weight = exp_rounded(__fmul_rn(__fsub_rn(clean(logit), peak), draw.inverse));
    return weight < draw.weight_min ? 0 : __float2ull_rn(weight * 17592186044416.0f);
}

// tokens [rows]: the best token of each row before, the drawn one after; logits [rows][vocab]; draws [rows]. Grid: rows; 512
// threads; shared memory 8 * ceil(vocab / 256).
extern "C" __global__ void draw(int* tokens, const float* logits, const Draw* draws, int vocab) {
    extern __shared__ u64 sums[];
    __shared__ u64 group[GROUP];
    __shared__ int chosen;
    __shared__ u64 goal;
    dependency_trigger();
    dependency_wait();
    const Draw mine = draws[blockIdx.x];
    if (mine.inverse == 0.0f) return;
    const float* row = logits + (size_t)blockIdx.x * vocab;
    float peak = clean(row[tokens[blockIdx.x]]);
    if (peak == -__int_as_float(0x7f800000)) return;
    int groups = (vocab + GROUP - 1) / GROUP, lane = threadIdx.x % LANES;
    // Both halves of a warp go round equally often, so that all of it meets at the shuffles.
    for (int first = 0; first < groups; first += 512 / LANES) {
        int g = first + threadIdx.x / LANES;
        u64 sum = 0;
#pragma unroll
        for (int chunk = 0; chunk < GROUP / LANES; chunk++) {
            int i = g * GROUP + chunk * LANES + lane;
            if (i < vocab) sum += weight_of(row[i], peak, mine);
        }
#pragma unroll
        for (int width = LANES / 2; width > 0; width /= 2) sum += __shfl_down_sync(~0u, sum, width, LANES);
        if (lane == 0 && g < groups) sums[g] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 total = 0;
        for (int g = 0; g < groups; g++) total += sums[g];
        u64 target = __umul64hi(mine.bits << 11, total);
        int g = 0;
        while (g + 1 < groups && target >= sums[g]) target -= sums[g++];
        chosen = g;
        goal = target;
    }
    __syncthreads();
    int base = chosen * GROUP;
    if (threadIdx.x < GROUP) {
        int i = base + threadIdx.x;
        group[threadIdx.x] = i < vocab ? weight_of(row[i], peak, mine) : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 target = goal;
        int i = 0;
        while (i + 1 < GROUP && target >= group[i]) target -= group[i++];
        tokens[blockIdx.x] = base + i;
    }
}
