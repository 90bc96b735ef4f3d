// Which tiles of a step's KV each warp of attention_decode takes: equal pieces of all of them, or whole heads.
#pragma once

#include "attention.cuh"

#ifndef DEAL_LAST
#define DEAL_LAST 0 // 1: the last rounds of whole heads are dealt by a counter (sm_90)
#endif
#ifndef HEAD_ROUNDS_MAX
#define HEAD_ROUNDS_MAX 32 // 1: whole heads only where each CTA has at most one
#endif

namespace {

constexpr int kSequencesMax = 1024;
constexpr int kSortMax = 256; // sequences that can be put in order; of more, a sum over the chip is a small part
constexpr int kRoundsMax = HEAD_ROUNDS_MAX; // a lane looks at each
static_assert(kRoundsMax <= 32, "HEAD_ROUNDS_MAX");

// A place in the list of tiles that a warp goes along.
struct Cursor {
    int sequence, head, tile;
    int round; // whole heads: how many of the CTA's come before
};

// Equal pieces: the list is [sequence][KV head][tile], the chip's. Whole heads: the list is those that the CTA has, in its rounds.
// Heads are dealt longest first, forth and back over the CTAs, so that whoever had the longest of a round has the shortest of the next.
struct Deal {
    const int* prefix; // tiles of a head in the sequences before each
    const u8* order;   // sequences, longest first
    int kv_heads;
    bool by_head;

    DEVICE int tiles(int sequence) const { return prefix[sequence + 1] - prefix[sequence]; }

    // In the order of all heads, longest first, the one that this CTA has in a round.
    DEVICE int rank(int round) const { return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x); }

    // There are so many tiles before the end of the list, and one more.
    DEVICE void advance(Cursor& c, int by) const {
        c.tile += by;
        for (;;) {
            const int here = tiles(c.sequence);
            if (c.tile < here) return;
            c.tile -= here;
            if (by_head) {
                const int next = rank(++c.round), at = next / kv_heads;
                c.sequence = order[at];
                c.head = next - at * kv_heads;
            } else if (++c.head == kv_heads) {
                c.head = 0;
                c.sequence++;
            }
        }
    }
};

#if DEAL_LAST
constexpr int kUnasked = -1, kAsking = -2, kNone = -3;
constexpr int kMerged = 1 << 16;

// The heads of the last rounds, which CTAs take as they come to them: a counter says whose is the next. A head's share of each warp
// is fixed, so who takes it changes no bit. Nobody asks before all of the launch before has ended: the counter is its own then.
struct Counted {
    int* given;   // shared, one for each head that might be this CTA's, in turn: its rank; kNone for the end
    int* come;    // shared, the same: warps whose share of it is summed; kMerged when they are added up
    int* counter; // global, the first of those that count who has come with a part of a cut head: there are none
    int first, heads;

    // The rank of this CTA's i-th, or kNone; the first warp that wants to know asks. All lanes.
    DEVICE int ask(int i) const {
        int rank = 0;
        if (threadIdx.x % 32 == 0) {
            rank = atomicCAS(given + i, kUnasked, kAsking);
            if (rank == kUnasked) {
                // Every CTA is told once that there is none: the last of these answers is the last of all.
                const int next = atomicAdd(counter, 1), left = heads - first;
                if (next == left + (int)gridDim.x - 1) *counter = 0;
                rank = next < left ? first + next : kNone;
                *(volatile int*)(given + i) = rank;
            }
            while (rank == kAsking) rank = *(volatile int*)(given + i);
        }
        return __shfl_sync(~0u, rank, 0);
    }
    // Two heads' sums have room: until the one before the last is added up. All lanes.
    DEVICE void wait_for_room(int i) const {
        if (i >= 2) {
            while ((*(volatile int*)(come + i - 2) & kMerged) == 0) {
            }
        }
        __threadfence_block();
        __syncwarp();
    }
    // Whether all other warps' shares are there. All lanes.
    DEVICE bool last_to_come(int i, int shares) const {
        __threadfence_block();
        __syncwarp();
        int before = 0;
        if (threadIdx.x % 32 == 0) before = atomicAdd(come + i, 1);
        __threadfence_block();
        return __shfl_sync(~0u, before, 0) == shares - 1;
    }
    DEVICE void merged(int i) const {
        __threadfence_block();
        __syncwarp();
        if (threadIdx.x % 32 == 0) atomicAdd(come + i, kMerged);
    }
};
#endif

// Differs for every sequence, larger for more tiles; below 0 for none. `sequence` < kSortMax.
DEVICE int sort_key(int sequence, int tiles) { return tiles * kSortMax + kSortMax - 1 - sequence; }

// Puts sequences in order by their keys, [sequences rounded up to a multiple of 4]. All threads of the CTA, which is then to meet.
DEVICE void sort_longest_first(const int* keys, int sequences, u8* order) {
    for (int s = threadIdx.x; s < sequences; s += blockDim.x) {
        const int own = keys[s];
        int before = 0;
#pragma unroll 4
        for (int at = 0; at < sequences; at += 4) {
            const int4 key = *(const int4*)(keys + at);
            before += (key.x > own) + (key.y > own) + (key.z > own) + (key.w > own);
        }
        order[before] = s;
    }
}

} // namespace
