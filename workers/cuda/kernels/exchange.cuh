// Partial results between the GPUs of a group: each rank has exchange memory that all its peers write. What is written is its
// own flag: a word holds MISSING, which no arithmetic makes, until a peer's word is there. The reader makes it MISSING again.
//
// Sums are counted by turns, alike on every rank. A turn uses one of two sets of slots, in alternation. A set that was read in
// turn n is written again in turn n + 2: a peer gets there after its turn n + 1, for which it needed this rank's part of
// n + 1, which this rank sent after its kernel of turn n had ended, and with it the resets. docs/cuda-ranks.md has it whole.
//
// So: one kernel a turn, a row of at most BLOCKS_MAX blocks, all resident at once; dependency_wait() before Turn; in every
// turn each rank receives from every peer, or from one who did.
#pragma once

#include "common.cuh"

#ifndef RANKS
#define RANKS 2
#endif

namespace exchange {

constexpr u32 MISSING = 0xffffffffu;  // two bf16, or a float, that no arithmetic makes: what is not written yet
constexpr u32 NOT_SENT = 0x7fffffffu; // NaN, of both kinds: for MISSING where it is data, and for what never came
constexpr u32 BLOCKS_MAX = 1024;      // a turn adds as much to `arrivals`, whatever its grid; divides 2^32
constexpr int HEADER_BYTES = 256;
constexpr u32 POLLS = 256; // between two looks at the clock

// As `Arguments` of src/ranks/exchange.rs. Memory: a header, then two sets, then what products push (pushed_sum.cuh).
struct Exchange {
    u8* memory[8]; // of each rank
    u64 set_bytes;
    u64 wait_ns; // for a peer
    u32* told;   // on the host: what `failed` says, for this rank's
    u32 rank;
};

// First in a rank's memory. Zero when the group is opened.
struct alignas(8) Header {
    u32 arrivals; // of blocks, at the ends of turns
    u32 failed;   // 1 + the rank whose part did not come; any rank may write it
};

DEVICE uint4 load_slot(const uint4* from) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
DEVICE void store_slot(uint4* to, uint4 v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// All four: 16 bytes need not arrive at once, a word does.
DEVICE bool written(uint4 v) { return v.x != MISSING && v.y != MISSING && v.z != MISSING && v.w != MISSING; }

// What may be sent: a NaN that looks like MISSING becomes another. To be used for a rank's own part of a sum too.
DEVICE uint4 sendable(uint4 v) {
    auto word = [](u32 w) { return w == MISSING ? NOT_SENT : w; };
    return make_uint4(word(v.x), word(v.y), word(v.z), word(v.w));
}

DEVICE u32 load_failed(const Exchange& e) {
    u32 failed;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(failed) : "l"(e.memory[e.rank] + 4) : "memory");
    return failed;
}
DEVICE void tell(const Exchange& e, u32 failed) { asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(e.told), "r"(failed) : "memory"); }

// One thread's waits for its peers.
struct Patience {
    u64 deadline = 0; // until a wait was long

    // 0 as long as waiting goes on; ends it on all ranks where the time is over.
    DEVICE u32 look_up(const Exchange& e, u32 from) {
        u64 now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (deadline == 0) deadline = now + e.wait_ns;
        u32 failed = load_failed(e);
        if (failed == 0 && now >= deadline) {
            failed = from + 1;
#pragma unroll
            for (int rank = 0; rank < RANKS; rank++)
                asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(e.memory[rank] + 4), "r"(failed) : "memory");
        }
        if (failed) tell(e, failed);
        return failed;
    }
};

struct Turn {
    const Exchange& e;
    u64 set;    // bytes from a rank's memory
    u32 failed; // as in the header; then nothing is sent or waited for
    Patience patience;

    DEVICE explicit Turn(const Exchange& exchange) : e(exchange) {
        u32 arrivals;
        asm volatile("ld.relaxed.sys.global.v2.u32 {%0,%1}, [%2];" : "=r"(arrivals), "=r"(failed) : "l"(e.memory[e.rank]) : "memory");
        // This block has not arrived yet, so that the quotient is this turn's.
        set = HEADER_BYTES + (arrivals / BLOCKS_MAX & 1) * e.set_bytes;
        if (failed) tell(e, failed);
    }

    // `index`: 16 bytes of a set.
    DEVICE uint4* slot(u32 rank, u32 index) const { return (uint4*)(e.memory[rank] + set) + index; }

    DEVICE void send(u32 to, u32 index, uint4 v) const {
        if (!failed) store_slot(slot(to, index), v);
    }

    // What `from` sent to this rank's slot, and the slot empty again; `first` was already read there. NaN if it does not come.
    DEVICE uint4 receive(u32 from, u32 index, uint4 first) {
        uint4* at = slot(e.rank, index);
        for (u32 polls = 1; !written(first) && !failed; polls++) {
            first = load_slot(at);
            if (polls % POLLS == 0 && !written(first)) failed = patience.look_up(e, from);
        }
        if (failed) return make_uint4(NOT_SENT, NOT_SENT, NOT_SENT, NOT_SENT);
        *at = make_uint4(MISSING, MISSING, MISSING, MISSING);
        return first;
    }

    // Between sends and receives. For tests, with HOLD_BACK: some blocks are late there, so that peers are a turn ahead.
    DEVICE void pause() const {
#ifdef HOLD_BACK
        const long long start = clock64();
        const u32 chance = ((u32)start >> 4) * 0x9e3779b9u >> 16;
        const long long cycles = chance % 8 == 0 ? chance : 0; // up to 33 µs
        while (clock64() - start < cycles) {
        }
#endif
    }

    // All threads of the block, after their last send and receive.
    DEVICE void end() const {
        __syncthreads();
        if (threadIdx.x != 0) return;
        const u32 weight = blockIdx.x == 0 ? BLOCKS_MAX - (gridDim.x - 1) : 1;
        asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(e.memory[e.rank]), "r"(weight) : "memory");
    }
};

} // namespace exchange
