// Which tiles of a step's KV each warp of attention_decode takes: equal pieces of all of them, or whole heads.
#pragma once

#include "attention.cuh"

namespace {

constexpr int kSequencesMax = 1024;
constexpr int kSortMax = 256; // sequences that can be put in order; of more, a sum over the chip is a small part
constexpr int kRoundsMax = 32; // a lane looks at each

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
