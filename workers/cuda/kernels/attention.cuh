// What the attention kernels of the tensor cores share: the sizes they are compiled for, and where keys and values lie.
#pragma once

#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef GROUP
#define GROUP 4
#endif
#ifndef BLOCK_TOKENS
#define BLOCK_TOKENS 32
#endif

namespace {

constexpr int kDim = HEAD_DIM;
constexpr int kGroup = GROUP; // query heads of a KV head
constexpr int kParts = (kDim + 63) / 64; // column parts of 64: a row of one is a swizzle span of 128 bytes
[[maybe_unused]] constexpr int kSteps = kDim / 16; // products along a head
[[maybe_unused]] constexpr int kBox = BLOCK_TOKENS < 32 ? BLOCK_TOKENS : 32; // rows the copy engine brings at once
constexpr float kLog2E = 1.4426950408889634f;
static_assert(kDim % 16 == 0 && kDim <= 256, "HEAD_DIM");
static_assert(kGroup >= 1 && kGroup <= 16, "GROUP");

// One layer of the arena, [block][KV head][layer][K, V][token][HEAD_DIM], in rows of HEAD_DIM numbers.
struct Layer {
    int kv_heads, layers, layer;

    // The row of a token's key; `block` holds the token. Its value lies BLOCK_TOKENS rows on.
    DEVICE long long key_row(int block, int head, int token) const {
        return (((long long)block * kv_heads + head) * layers + layer) * (2 * BLOCK_TOKENS) + token % BLOCK_TOKENS;
    }
};

} // namespace
