// What sampling is made of: rows as the host describes them, a block's part of a row, weights, and sums, sorts and exchanges over
// a block and a cluster. sample.cu says how it goes together.
#pragma once

#include "cluster.cuh"
#include "ranks.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
#define GROUP 256     // logits a warp takes at a time
#define GROUPS_MAX 2048 // 2^19 logits: also what 64 bits hold of units
#define LIST_MAX 2048
#define LIST_GOAL 256
#define UNIT 17592186044416.0f // 2^44

// How a row is sampled; `sampling.rs` has the same.
struct Row {
    u64 bits;      // 53 random ones
    float inverse; // of the temperature; 0 takes the best token
    float top_p;   // 1: all
    float weight_min;
    u32 top_k; // 0: all
    float repetition, frequency, presence;
    u32 edits;                 // where its edits begin: biases, bans, counts
    u32 biases, bans, counts; // biases and counts in order of ids
    int pending;              // a row of the step whose token counts once more, or -1
    int given;                // the token that is asked about, or -1 for one to choose
    int top;                  // most likely tokens to report; -1: no log-probabilities
    int mask;                 // which mask says what tokens may be chosen, or -1 for all
    int unused;
};

struct Edit {
    u32 token, value; // value: bits of a bias, or times in the output
};

struct Head {
    float peak, logit; // the largest logit, the token's
    u64 total;         // sum of exp(logit - peak), in units
};

struct Top {
    u32 token;
    float logit;
};

namespace {

struct Shared {
    Row row;
    u64 list[LIST_MAX];
    u64 sums[GROUPS_MAX];
    u64 scratch[WARPS * 8];
    u32 scratch_counts[WARPS * 8];
    u64 box[2][16]; // what the cluster's other blocks read
    u64 all[16];    // box, over the cluster
    u64 before[16]; // box, over the blocks of lower rank
    u64 found, listed;
    u32 places;
};

// A block's part of a row.
struct Part {
    float* row;
    int vocab, first, end; // groups
    u32 rank, blocks;      // in the cluster
    int turn;              // which box is next
    bool aligned;
};

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

// In units.
DEVICE u64 weight_of(float logit, float peak, float scale, float weight_min) {
    float weight = exp_rounded(__fmul_rn(__fsub_rn(logit, peak), scale));
    return weight < weight_min ? 0 : __float2ull_rn(weight * UNIT);
}

// The place of a lane's j-th logit of 8: two runs of four.
DEVICE int place_of(int group, int j) { return group * GROUP + j / 4 * 128 + threadIdx.x % 32 * 4 + j % 4; }

// Logits as they are; NaN beyond the end.
DEVICE void load(const Part& part, int group, float (&x)[8]) {
    if (part.aligned && (group + 1) * GROUP <= part.vocab) {
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            float4 four = *(const float4*)(part.row + place_of(group, j));
            x[j] = four.x, x[j + 1] = four.y, x[j + 2] = four.z, x[j + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int i = place_of(group, j);
            x[j] = i < part.vocab ? part.row[i] : __int_as_float(0x7fffffff);
        }
    }
}

// Calls `use` with each of a warp's groups; the next one's logits are on their way meanwhile.
template <class Use> DEVICE void each_group(const Part& part, Use use) {
    float x[8], next[8];
    int group = part.first + threadIdx.x / 32;
    if (group < part.end) load(part, group, next);
    for (; group < part.end; group += WARPS) {
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = next[j];
        if (group + WARPS < part.end) load(part, group + WARPS, next);
        use(group, x);
    }
}

DEVICE u64 warp_sum_u64(u64 x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Over the block, on every thread.
DEVICE u64 block_sum_u64(u64 x, Shared& shared) {
    x = warp_sum_u64(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.scratch[threadIdx.x / 32] = x;
    __syncthreads();
    u64 sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared.scratch[w];
    return sum;
}

// Sorts n numbers, a power of two, descending. Barriers before and after are its own. Pairs up to 32 apart are of one warp.
DEVICE void sort(u64* a, int n) {
    __syncthreads();
    int last_step = 0;
#pragma unroll 1
    for (int span = 2; span <= n; span *= 2) {
#pragma unroll 1
        for (int step = span / 2; step > 0; step /= 2) {
            if (step > 32 || last_step > 32) __syncthreads();
            else __syncwarp();
            last_step = step;
#pragma unroll 1
            for (int i = threadIdx.x; i < n / 2; i += THREADS) {
                int low = 2 * i - (i & (step - 1)), high = low + step;
                u64 x = a[low], y = a[high];
                if ((x < y) == ((low & span) == 0)) a[low] = y, a[high] = x;
            }
        }
    }
    __syncthreads();
}

// Inclusive sums of the first n numbers, at most 4 * THREADS, in place. Barriers before and after are its own.
DEVICE void scan(u64* a, int n, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = threadIdx.x * 4;
    __syncthreads();
    u64 x[4], sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = sum += first + j < n ? a[first + j] : 0;
    u64 before = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        u64 other = __shfl_up_sync(~0u, before, d);
        if (lane >= d) before += other;
    }
    if (lane == 31) shared.scratch[warp] = before;
    __syncthreads();
    before -= sum;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        if (w < warp) before += shared.scratch[w];
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (first + j < n) a[first + j] = before + x[j];
    __syncthreads();
}

DEVICE int power_of_two(int n) { return n <= 2 ? 2 : 1 << (32 - __clz(n - 1)); }

// The point `bits` / 2^53 of a weight.
DEVICE u64 share(u64 bits, u64 weight) { return __umul64hi(bits << 11, weight); }

DEVICE u64 mass_of(u64 total, float top_p) {
    return top_p < 1.0f ? __double2ull_rz(__dmul_rn(__ull2double_rn(total), (double)top_p)) : total;
}

// Fills `all` with the sums of `box[turn]` over the cluster, or, of its first numbers, the largest. Every thread of the block has
// written what it has to its block's box. Boxes of two turns on end differ, so one barrier of the cluster is enough.
DEVICE void gather(Shared& shared, Part& part, int largest) {
    cluster_sync();
    if (threadIdx.x < 16) {
        u64 sum = 0, before = 0;
        for (u32 block = 0; block < part.blocks; block++) {
            u64 x = cluster_load(&shared.box[part.turn][threadIdx.x], block);
            sum = (int)threadIdx.x < largest ? larger(sum, x) : sum + x;
            if (block < part.rank) before += x;
        }
        shared.all[threadIdx.x] = sum;
        shared.before[threadIdx.x] = before;
    }
    part.turn ^= 1;
    __syncthreads();
}

} // namespace
