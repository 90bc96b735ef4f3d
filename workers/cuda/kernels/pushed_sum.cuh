// Sums over ranks at the ends of products of few rows: a tile's sums go to every peer as soon as they are there, and the same
// threads add what the peers' same tiles have sent. No kernel of its own, no barrier; a word is its own flag, as in exchange.cuh.
//
// Bytes: (RANKS - 1) rows · out · 4 (f32) or 2 (bf16) each way through NVLink, as tiles end; one way there, 1 to 1.5 µs, in which
// the weights of what comes next are on their way.
//
// Slots: of a sum [rank][rows][out], in every rank's exchange memory. The reader makes a slot MISSING again. A layer's two sums have
// slots of their own, and the next layer others: whoever writes slots again is two layers on. So it has had a part of the layer
// between from this rank, which sent that after its kernel of the first layer had ended, and with it the resets.
//
// All blocks of a launch are on the GPU at once, and each sends before it waits, so that nothing waits in a circle.
#pragma once

#ifndef RANKS
#define RANKS 1
#endif
#include "exchange.cuh"

// Which slots; as `Slots` of src/ranks/pushed.rs. No Exchange, and null, for a model on one GPU.
struct PushedSlots {
    u64 at;     // bytes from a rank's memory
    u32 stride; // bytes from one rank's to the next one's
};

namespace pushed_sum {

using exchange::Exchange;

DEVICE u32 sendable(u32 word) { return word == exchange::MISSING ? exchange::NOT_SENT : word; }

DEVICE u8* slot(const Exchange& e, const PushedSlots& slots, u32 to, u32 from, u32 offset) {
    return e.memory[to] + slots.at + (u64)from * slots.stride + offset;
}

// --- one word: an f32 -----------------------------------------------------------------------------

DEVICE u32 load_word_sys(const u8* from) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// The sum of all ranks' x, in the order of ranks; this thread's place is `offset` bytes on. All ranks call it for the same place.
DEVICE float sum(const Exchange& e, const PushedSlots& slots, u32 offset, float x) {
    const u32 own = sendable(__float_as_uint(x));
#pragma unroll
    for (u32 r = 0; r < RANKS; r++)
        if (r != e.rank) asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(slot(e, slots, r, e.rank, offset)), "r"(own) : "memory");
    u32 parts[RANKS];
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) parts[r] = r == e.rank ? own : load_word_sys(slot(e, slots, e.rank, r, offset));
    exchange::Patience patience;
    float total = 0.f;
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) {
        u8* at = slot(e, slots, e.rank, r, offset);
        u32 failed = 0;
        for (u32 polls = 1; parts[r] == exchange::MISSING && !failed; polls++) {
            parts[r] = load_word_sys(at);
            if (polls % exchange::POLLS == 0 && parts[r] == exchange::MISSING) failed = patience.look_up(e, r);
        }
        if (failed) parts[r] = exchange::NOT_SENT;
        if (r != e.rank && !failed) *(u32*)at = exchange::MISSING;
        total = r == 0 ? __uint_as_float(parts[r]) : total + __uint_as_float(parts[r]);
    }
    return total;
}

// --- two words: four bf16 -------------------------------------------------------------------------

DEVICE uint2 load_pair_sys(const u8* from) {
    uint2 v;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
    return v;
}
DEVICE bool written(uint2 v) { return v.x != exchange::MISSING && v.y != exchange::MISSING; }

DEVICE uint2 packed(float4 v) { return make_uint2(sendable(pack_bf16(v.x, v.y)), sendable(pack_bf16(v.z, v.w))); }

// The first half of a sum of four neighbouring numbers.
DEVICE void send(const Exchange& e, const PushedSlots& slots, u32 offset, float4 v) {
    const uint2 own = packed(v);
#pragma unroll
    for (u32 r = 0; r < RANKS; r++)
        if (r != e.rank) asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1,%2};" ::"l"(slot(e, slots, r, e.rank, offset)), "r"(own.x), "r"(own.y) : "memory");
}

// The second: `v` is what this rank has sent.
DEVICE float4 receive(const Exchange& e, const PushedSlots& slots, u32 offset, float4 v) {
    uint2 parts[RANKS];
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) parts[r] = r == e.rank ? packed(v) : load_pair_sys(slot(e, slots, e.rank, r, offset));
    exchange::Patience patience;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) {
        u8* at = slot(e, slots, e.rank, r, offset);
        u32 failed = 0;
        for (u32 polls = 1; !written(parts[r]) && !failed; polls++) {
            parts[r] = load_pair_sys(at);
            if (polls % exchange::POLLS == 0 && !written(parts[r])) failed = patience.look_up(e, r);
        }
        if (failed) parts[r] = make_uint2(exchange::NOT_SENT, exchange::NOT_SENT);
        if (r != e.rank && !failed) *(uint2*)at = make_uint2(exchange::MISSING, exchange::MISSING);
        const float4 x = make_float4(bf16_low(parts[r].x), bf16_high(parts[r].x), bf16_low(parts[r].y), bf16_high(parts[r].y));
        total = r == 0 ? x : make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
    }
    return total;
}

} // namespace pushed_sum
