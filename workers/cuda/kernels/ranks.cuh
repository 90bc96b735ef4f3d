// The order in which tokens are better than others, as the engine has it: the larger logit, the lower id among equals. NaN
// counts as minus infinity, plus infinity as the largest finite number.
#pragma once

#include "common.cuh"

#define LOGIT_MAX __int_as_float(0x7f7fffff)

DEVICE float clean(float x) {
    if (!(x == x)) return -INFINITY;
    return x > LOGIT_MAX ? LOGIT_MAX : x;
}

// A number whose order is that of cleaned logits; 0 is below all.
DEVICE u32 key_of(float logit) {
    u32 bits = __float_as_uint(logit + 0.0f); // minus zero ties with zero
    return (int)bits < 0 ? ~bits : bits | 0x80000000u;
}

DEVICE float logit_of(u32 key) { return __uint_as_float((int)key < 0 ? key & 0x7fffffffu : ~key); }

#define KEY_NONE 0x007fffffu // of minus infinity

DEVICE u64 rank_of(float logit, u32 id) { return (u64)key_of(logit) << 32 | ~id; }
DEVICE u32 token_of(u64 rank) { return ~(u32)rank; }
DEVICE bool possible(u64 rank) { return (u32)(rank >> 32) > KEY_NONE; }

DEVICE u64 larger(u64 a, u64 b) { return a > b ? a : b; }

DEVICE u64 warp_larger(u64 x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = larger(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}
