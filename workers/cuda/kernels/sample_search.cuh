// Where a prefix of the order ends that the list of the best tokens does not reach.
#pragma once

#include "sample_block.cuh"

namespace {

// Adds a token to the block's list. Tokens beyond LIST_MAX are counted only.
DEVICE void add_to_list(Shared& shared, u64 rank) {
    u32 place = atomicAdd(&shared.places, 1);
    if (place < LIST_MAX) shared.list[place] = rank;
}

// Puts the lists of the cluster's blocks together in its first block's and sorts it. All blocks have gathered since, and gather before
// they touch their lists again.
DEVICE void join_lists(Shared& shared, const Part& part, int listed) {
    __syncthreads();
    if (threadIdx.x < part.blocks) shared.scratch[threadIdx.x] = cluster_load(&shared.listed, threadIdx.x);
    __syncthreads();
    for (int i = (int)shared.scratch[0] + threadIdx.x; i < listed; i += THREADS) {
        int from = i;
        u32 block = 0;
        while (from >= (int)shared.scratch[block]) from -= (int)shared.scratch[block++];
        shared.list[i] = cluster_load(&shared.list[from], block);
    }
    const int padded = power_of_two(listed);
    for (int i = listed + threadIdx.x; i < padded; i += THREADS) shared.list[i] = 0;
    sort(shared.list, padded);
}

// The rank at which the shortest prefix ends that has `goal` tokens, or weight if `by_weight`; at least 1, and not more
// than there is. `kept`: the prefix's weight. `lowest`: no possible logit is lower. Uses the list and the sums.
//
// By weight: one pass sorts weights into 2048 buckets by their distance from the peak, and the bucket in which the prefix
// ends has few enough tokens to be listed and sorted. Where it has not (equal logits), and by number: ranks are cut in 8
// ranges, the one in which the prefix ends is cut again, until it has so few.
__device__ __noinline__ u64 search(
    Shared& shared, Part& part, u64 peak_rank, float lowest, float scale, bool by_weight, u64 goal, u64& kept
) {
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const float peak = logit_of(peak_rank >> 32);
    u64 base = 0, above = 0, above_weight = 0;
    int shift = 0, bucket = -1;

    const float farthest = fminf((peak - lowest) * scale, 31.0f); // beyond that there is no weight
    const float fineness = farthest > 0.0f ? (GROUPS_MAX - 1) / farthest : 0.0f;
    auto bucket_of = [&](float logit) { return (int)fminf((peak - logit) * scale * fineness, GROUPS_MAX - 1.0f); };

    // Lists the tokens of the bucket, or of the range of 2^shift ranks from `base`; how many they are.
    auto collect = [&]() {
        __syncthreads();
        if (tid == 0) shared.places = 0;
        __syncthreads();
        each_group(part, [&](int group, const float (&x)[8]) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int i = place_of(group, j);
                const float y = clean(x[j]);
                const u64 rank = rank_of(y, i);
                const bool inside = bucket >= 0 ? bucket_of(y) == bucket && weight_of(y, peak, scale, 0.0f) > 0
                                                : rank >= base && (rank - base) >> shift == 0 && i < part.vocab;
                if (inside) add_to_list(shared, rank);
            }
        });
        __syncthreads();
        if (tid == 0) shared.listed = shared.box[part.turn][0] = shared.places;
        gather(shared, part, 0);
        return (int)min(shared.all[0], (u64)LIST_MAX + 1);
    };

    int listed = LIST_MAX + 1;
    if (by_weight) {
        for (int i = tid; i < GROUPS_MAX; i += THREADS) shared.sums[i] = 0;
        __syncthreads();
        each_group(part, [&](int group, const float (&x)[8]) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float y = clean(x[j]);
                const u64 weight = weight_of(y, peak, scale, 0.0f);
                if (weight > 0) atomicAdd(&shared.sums[bucket_of(y)], weight);
            }
        });
        cluster_sync();
        for (int i = tid; i < GROUPS_MAX; i += THREADS) {
            u64 sum = 0;
            for (u32 block = 0; block < part.blocks; block++) sum += cluster_load(&shared.sums[i], block);
            shared.list[i] = sum;
        }
        scan(shared.list, GROUPS_MAX, shared);
        for (int i = tid; i < GROUPS_MAX; i += THREADS)
            if (shared.list[i] >= goal && (i == 0 || shared.list[i - 1] < goal)) shared.found = i;
        __syncthreads();
        bucket = (int)shared.found;
        above = above_weight = bucket > 0 ? shared.list[bucket - 1] : 0;
        listed = collect(); // and nobody clears sums before all have read them
    }
    if (listed > LIST_MAX) {
        // Below this logit there is no weight.
        base = by_weight ? (u64)key_of(peak - 40.0f / scale) << 32 : 0;
        shift = max(0, 61 - __clzll(peak_rank - base));
        above = above_weight = 0;
        bucket = -1;
    }
    while (listed > LIST_MAX) {
        u64 sums[8];
        u32 counts[8];
#pragma unroll
        for (int d = 0; d < 8; d++) sums[d] = counts[d] = 0;
        each_group(part, [&](int group, const float (&x)[8]) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int i = place_of(group, j);
                u64 rank = rank_of(clean(x[j]), i), digit = (rank - base) >> shift;
                if (rank >= base && digit < 8 && i < part.vocab) {
                    u64 weight = weight_of(clean(x[j]), peak, scale, 0.0f);
#pragma unroll
                    for (int d = 0; d < 8; d++) {
                        sums[d] += d == digit ? weight : 0;
                        counts[d] += d == digit;
                    }
                }
            }
        });
#pragma unroll
        for (int d = 0; d < 8; d++) {
            sums[d] = warp_sum_u64(sums[d]);
            counts[d] = __reduce_add_sync(~0u, counts[d]);
            if (lane == 0) shared.scratch[warp * 8 + d] = sums[d], shared.scratch_counts[warp * 8 + d] = counts[d];
        }
        __syncthreads();
        if (tid < 8) {
            u64 sum = 0, count = 0;
            for (int w = 0; w < WARPS; w++) {
                sum += shared.scratch[w * 8 + tid];
                count += shared.scratch_counts[w * 8 + tid];
            }
            shared.box[part.turn][tid] = sum;
            shared.box[part.turn][8 + tid] = count;
        }
        gather(shared, part, 0);
        int digit = 7;
        for (; digit > 0; digit--) {
            u64 more = above + shared.all[by_weight ? digit : 8 + digit];
            if (more >= goal) break;
            above = more;
            above_weight += shared.all[digit];
        }
        base += (u64)digit << shift;
        kept = above_weight + shared.all[digit];
        const u64 count = shared.all[8 + digit];
        if (!by_weight && above + count == goal) return base;
        if (count <= LIST_MAX) listed = collect(); // at 2^11 ranks at the latest
        else shift -= 3;
    }
    if (tid == 0) shared.box[part.turn][0] = shared.box[part.turn][1] = 0;
    if (part.rank == 0) {
        join_lists(shared, part, listed);
        for (int i = tid; i < listed; i += THREADS)
            shared.sums[i] = weight_of(logit_of(shared.list[i] >> 32), peak, scale, 0.0f);
        scan(shared.sums, listed, shared);
        auto reaches = [&](int i) { return above + (by_weight ? shared.sums[i] : i + 1) >= goal; };
        for (int i = tid; i < listed; i += THREADS) {
            if (reaches(i) && (i == 0 || !reaches(i - 1))) {
                shared.box[part.turn][0] = shared.list[i];
                shared.box[part.turn][1] = above_weight + shared.sums[i];
            }
        }
    }
    gather(shared, part, 0);
    kept = shared.all[1];
    return shared.all[0];
}

} // namespace
