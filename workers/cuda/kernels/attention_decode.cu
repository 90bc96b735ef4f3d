// Decode attention: one query row a sequence against its paged KV, the work split evenly over the chip; and what lies
// between the query-key-value product and it: bias, norm per head, rotary positions, the new key and value into the arena.
//
// kernel attention_decode spill_bytes_max=96 (72 with head_dim 256; a group of 16 has some 600, once a head, of what tiles do not need)
// variant HEAD_DIM=128 GROUP=4 BLOCK_TOKENS=32
// variant HEAD_DIM=64 GROUP=3 BLOCK_TOKENS=16
// variant HEAD_DIM=256 GROUP=8 BLOCK_TOKENS=64
//
// Idea. The KV of a step is one list of tiles of 32 tokens (64 where head_dim is at most 64), ordered
// [sequence][KV head][tile]. Warp i of a persistent grid takes the i-th equal piece of the list, whatever the lengths:
// prefix sums of seq_kv_len, computed by every CTA for itself, say where the piece begins. So the grid does not depend
// on lengths (a graph can be replayed with any), and nobody waits for the longest sequence. Where it costs little, CTAs have
// whole heads instead (attention_deal.cuh), divided evenly among their warps: nothing is summed over the chip then. A
// (sequence, KV head) that lies in one warp's piece is finished there. One that is cut is summed over the CTA's warps once all are done,
// and if it goes on in other CTAs their partial sums meet in the workspace, where the CTA that comes last adds
// them in the list's order: who is last does not change a bit of the result.
//
// The product is transposed: Sᵀ = K·qᵀ has tokens as the 16 rows of m16n8k16 and the GQA group as its 8 columns,
// and Oᵀ = Vᵀ·Pᵀ head_dim as rows: with a group of 4, half of the matrix unit's work is waste, where rows of
// queries would waste three quarters and 4 times the registers. Pᵀ becomes an operand by movmatrix, in registers.
//
// Queries are turned where they are read, by every warp that has a share of their head: a thread's elements of B are both
// halves of its pairs. The new key and value are made by the warp that has the sequence's last tile: it puts them into
// its tile in shared memory and into the arena. So nothing in the arena is read that this step writes, and all tiles are
// requested before griddepcontrol.wait.
//
// Each warp streams tiles of its own through its own ring of stages (sm_90: TMA with 128-byte swizzle, one
// mbarrier a stage; elsewhere: cp.async into the same layout), and meets the others only at the end.
//
// Floor: KV bytes / read bandwidth; a tile of 32 tokens of a head is 128·head_dim bytes. Arithmetic is some 15% of it.
//
// Defines: HEAD_DIM (multiple of 16, to 256), GROUP (query heads per KV head, 1..16), BLOCK_TOKENS (16, 32, 64).
// Launch: threads and dynamic shared memory in the module's `attention_decode_launch` = {threads, shared bytes,
// sequences at most, grid at most}; grid = min(multiprocessors, launch[3]), the same in every launch that shares a
// workspace. PDL attribute welcome; graphs capture it.
// Workspace: `partial` f32 [2·grid·GROUP·(HEAD_DIM+2)]; `counters` i32 [sequences·kv_heads], zero before the first
// launch; the kernel leaves it zero.
// Tensor map (`map`, sm_90; zeros elsewhere), the same for both attention kernels: cuTensorMapEncodeTiled(
//   BFLOAT16, rank 2, address = arena, dims {HEAD_DIM, blocks·kv_heads·layers·2·BLOCK_TOKENS},
//   strides {HEAD_DIM·2}, box {64, min(BLOCK_TOKENS, 32)}, element strides {1, 1}, INTERLEAVE_NONE, SWIZZLE_128B,
//   L2_PROMOTION_L2_256B, OOB_FILL_NONE).
#include "attention_deal.cuh"
#include "attention_sums.cuh"
#include "attention_turn.cuh"

#define TMA_ROAD (BATON_ARCH == 900) // where the host makes a map; later ones are as any other

namespace {

constexpr int smaller(int a, int b) { return a < b ? a : b; }

constexpr int kTile = kParts == 1 ? 64 : 32;
constexpr int kSlices = kTile / 16;
[[maybe_unused]] constexpr int kBoxes = kTile / kBox;
constexpr int kPartBytes = kTile * 128;
constexpr int kStageBytes = 2 * kParts * kPartBytes; // K, then V

constexpr int kGridMax = 160;
constexpr int kSharedMax = TMA_ROAD ? 232448 : BATON_ARCH == 800 || BATON_ARCH == 870 ? 166912 : 101376;
constexpr int kWarps = kParts <= 2 && kSharedMax > 150000 ? 4 : 2;
constexpr int kThreads = 32 * kWarps;
constexpr int kHeadExcess = 5 * kWarps; // tiles that a CTA may have above the mean, for having whole heads
constexpr int kStride = kDim + 4; // floats; keeps the scattered stores of Oᵀ free of bank conflicts

// Each warp's sum of the head that its piece begins with, when another warp has a share in it. (The sum of the head that
// it ends with goes where its ring was.)
constexpr int kSumBytes = kWarps * kGroup * kStride * 4;
constexpr int kTotalBytes = kWarps * 2 * kGroup * 8;
constexpr int kMetaBytes = (3 * kSequencesMax + 4) * 4;
constexpr int kFixedBytes = 1024 + kSumBytes + kTotalBytes + kMetaBytes + kWarps * 64;
constexpr int kStages = smaller(8, (kSharedMax - kFixedBytes) / (kWarps * kStageBytes));
constexpr int kSharedBytes = kFixedBytes + kWarps * kStages * kStageBytes;
static_assert(kStages >= 1, "shared memory");
static_assert(kGroup * kStride * 4 <= kStageBytes, "GROUP");

DEVICE int first_tile(int kv_len, int window) { return window > 0 && kv_len > window ? (kv_len - window) / kTile : 0; }

} // namespace

extern "C" __constant__ const int attention_decode_launch[4] = {kThreads, kSharedBytes, kSequencesMax, kGridMax};

// qkv: [sequence][(GROUP + 2)·kv_heads heads][HEAD_DIM], queries, keys, values, as the product left them; bias of a row's length, or
// null; q_norm, k_norm [HEAD_DIM], or null; rope_table [sequence][HEAD_DIM/2] of (cosine, sine). out: [sequence][query
// head][HEAD_DIM]. `header[sequences_at]`: how many sequences; seq_kv_len and seq_table have room for sequences_room, at least one.
// scale: of q·k. window: tokens seen, 0 all.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
attention_decode(const __grid_constant__ TensorMap map, const u32* __restrict__ qkv, const u32* __restrict__ bias,
                 const u32* __restrict__ q_norm, const u32* __restrict__ k_norm, const float4* __restrict__ rope_table,
                 bf16* __restrict__ out, bf16* arena, const int* __restrict__ header, const int* __restrict__ seq_kv_len,
                 const int* __restrict__ seq_table, const int* __restrict__ tables, float* partial, int* counters,
                 int sequences_at, int sequences_room, int layer, int layers, int kv_heads, float scale, int window, float eps) {
    extern __shared__ u8 shared_raw[];
    __shared__ Cut cuts[2];
    __shared__ int turn[2], scans[2 * kWarps], pieces[kWarps + 1];
    u32 raw = shared_address(shared_raw);
    u8* shared = shared_raw + (((raw + 1023) & ~1023u) - raw);
    float* sums = (float*)(shared + kWarps * kStages * kStageBytes);
    float2* totals = (float2*)((u8*)sums + kSumBytes); // {maximum, sum of weights} [warp][first, last][head]
    int* prefix = (int*)((u8*)totals + kTotalBytes);
    int* lengths = prefix + kSequencesMax + 4;
    int* offsets = lengths + kSequencesMax;
    // For the order of sequences, where there are few enough: behind their lengths.
    int* keys = lengths + kSortMax;
    u8* order = (u8*)(lengths + 2 * kSortMax);
    static_assert(3 * kSortMax <= kSequencesMax, "keys and order");

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int g = lane / 4, t = lane % 4;
    u8* const ring_memory = shared + warp * kStages * kStageBytes;
    const u32 ring = shared_address(ring_memory);
    [[maybe_unused]] const u32 barriers = shared_address(offsets + kSequencesMax) + warp * 64;

#if TMA_ROAD
    if (tid == 0) tma_prefetch_map(&map);
    if (lane < kStages) mbarrier_init(barriers + lane * 8, 1);
    mbarrier_init_fence();
#endif
    if (tid < 2) cuts[tid].parts = 0;

    // Tiles before each sequence. The first are read together with their count.
    const int first = min(tid, sequences_room - 1);
    int next_length = seq_kv_len[first], next_offset = seq_table[first];
    const int sequences = header[sequences_at];
    int list = 0;
#pragma unroll 1
    for (int base = 0; base < sequences; base += kThreads) {
        int* scan = scans + (base / kThreads & 1) * kWarps;
        const int s = base + tid, length = s < sequences ? next_length : 0, offset = next_offset;
        if (s + kThreads < sequences) next_length = seq_kv_len[s + kThreads], next_offset = seq_table[s + kThreads];
        int tiles = (length + kTile - 1) / kTile - first_tile(length, window), sum = tiles;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(~0u, sum, d);
            if (lane >= d) sum += other;
        }
        if (lane == 31) scan[warp] = sum;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
            if (w < warp) sum += scan[w];
        }
        if (s < sequences) {
            prefix[s] = list + sum - tiles;
            lengths[s] = length;
            offsets[s] = offset;
        }
        if (sequences <= kSortMax && s < kSortMax) {
            keys[s] = s < sequences ? sort_key(s, tiles) : -1;
            order[s] = s;
        }
#pragma unroll
        for (int w = 0; w < kWarps; w++) list += scan[w];
    }
    if (tid == 0) prefix[sequences] = list;
    __syncthreads();

    const int grid = gridDim.x, total = list * kv_heads, heads = sequences * kv_heads;
    // Whole heads where there are enough for most CTAs, unless a CTA might have much more than the mean: its share of each round
    // is at most the round's longest.
    Deal deal{prefix, order, kv_heads, heads * 3 >= grid && heads <= kRoundsMax * grid && sequences <= kSortMax};
    if (deal.by_head) {
        int most = 0;
        if (heads <= grid) {
            for (int s = lane; s < sequences; s += 32) most = max(most, deal.tiles(s));
            most = __reduce_max_sync(~0u, most);
        } else {
            sort_longest_first(keys, sequences, order);
            __syncthreads();
            most = __reduce_add_sync(~0u, lane * grid < heads ? deal.tiles(order[lane * grid / kv_heads]) : 0);
        }
        deal.by_head = (most - kHeadExcess) * grid <= total;
    }
    // Else equal pieces: the first `longer` warps have one tile more.
    const int active = min(total, grid * kWarps);
    if (deal.by_head ? (int)blockIdx.x >= heads : (int)blockIdx.x * kWarps >= active) {
        dependency_wait();
        return;
    }
    const int share = total / active, longer = total - share * active;
    auto owner = [&](int x) {
        int edge = longer * (share + 1);
        bool early = x < edge;
        return (early ? 0 : longer) + (early ? x : x - edge) / (early ? share + 1 : share);
    };
    const int me = blockIdx.x * kWarps + warp;
    int my_heads = 0; // of whole heads: tiles up to the end of the one of this lane's round
    if (deal.by_head) {
        const int rank = deal.rank(lane), tiles = rank < heads ? deal.tiles(order[rank / kv_heads]) : 0;
        my_heads = tiles;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int other = __shfl_up_sync(~0u, my_heads, d);
            if (lane >= d) my_heads += other;
        }
        const int all = __shfl_sync(~0u, my_heads, 31), each = (all + kWarps - 1) / kWarps;
        if (tid <= kWarps) pieces[tid] = min(tid * each, all);
    } else if (tid <= kWarps) {
        const int w = me - warp + tid;
        pieces[tid] = w >= active ? total : w * share + min(w, longer);
    }
    __syncthreads();
    // Where the pieces of this CTA's warps begin, and where its last one ends.
    auto piece = [&](int w) { return pieces[w]; };
    const int begin = piece(warp), end = piece(warp + 1);
    const int cta_begin = piece(0), cta_end = piece(kWarps);

    Cursor here{0, 0, 0, 0};
    if (deal.by_head && begin < end) {
        here.round = __popc(__ballot_sync(~0u, my_heads <= begin));
        const int before = __shfl_sync(~0u, my_heads, max(here.round - 1, 0)), rank = deal.rank(here.round);
        here.sequence = order[rank / kv_heads];
        here.head = rank % kv_heads;
        here.tile = begin - (here.round > 0 ? before : 0);
    }
    if (!deal.by_head && begin < end) {
        int low = -1; // the last sequence that begins at or before `begin`
#pragma unroll 2
        for (int base = 0; base < sequences; base += 32)
            low += __popc(__ballot_sync(~0u, base + lane < sequences && prefix[base + lane] * kv_heads <= begin));
        here.sequence = low;
        int rest = begin - prefix[low] * kv_heads, tiles = prefix[low + 1] - prefix[low];
#pragma unroll 1
        for (int base = 0; base < kv_heads; base += 32)
            here.head += __popc(__ballot_sync(~0u, base + lane < kv_heads && (base + lane + 1) * tiles <= rest));
        here.tile = rest - here.head * tiles;
    }

    // --- the ring -----------------------------------------------------------------------------
    Cursor load = here;
    int load_at = begin, load_stage = 0;

    auto tile_of = [&](const Cursor& c) { return first_tile(lengths[c.sequence], window) + c.tile; };
    auto block_of = [&](const Cursor& c, int token) {
        return tables[offsets[c.sequence] + min(token, lengths[c.sequence] - 1) / BLOCK_TOKENS];
    };
    const Layer in_layer{kv_heads, layers, layer};
    auto arena_row = [&](const Cursor& c, int block, int token) { return in_layer.key_row(block, c.head, token); };
#if TMA_ROAD
    const int my_box = lane % kBoxes; // each lane looks up one block of a tile
    int next_block = begin < end ? block_of(load, tile_of(load) * kTile + my_box * kBox) : 0;
#endif
    // Requests the tile at the load cursor, and moves on. `free`: its stage has been read; true, but known only then. All lanes.
    auto issue = [&]([[maybe_unused]] bool free) {
        u32 stage = ring + load_stage * kStageBytes;
#if TMA_ROAD
        u32 barrier = barriers + load_stage * 8;
        const int row = (int)arena_row(load, next_block, tile_of(load) * kTile + my_box * kBox);
        if (lane == 0 && free) mbarrier_arrive_expect(barrier, kStageBytes);
#pragma unroll
        for (int box = 0; box < kBoxes; box++) {
            const int box_row = __shfl_sync(~0u, row, box);
            if (lane == 0 && free) {
#pragma unroll
                for (int part = 0; part < 2 * kParts; part++) {
                    const u32 to = stage + part * kPartBytes + box * kBox * 128;
                    const int x = part % kParts * 64, y = box_row + part / kParts * BLOCK_TOKENS;
                    tma_load_2d(to, &map, barrier, x, y, EVICT_FIRST); // once a step; what others read again may stay
                }
            }
        }
#else
        constexpr int kChunks = kParts * 8; // of 16 bytes a row
#pragma unroll 4
        for (int i = lane; i < 2 * kTile * kChunks; i += 32) {
            int chunk = i % kChunks, row = i / kChunks % kTile, kv = i / (kChunks * kTile);
            int token = tile_of(load) * kTile + row, inside = (chunk % 8) ^ (row % 8);
            bool valid = chunk * 8 < kDim;
            const bf16* from = arena + (arena_row(load, block_of(load, token), token) + kv * BLOCK_TOKENS) * kDim + (valid ? chunk * 8 : 0);
            cp_async_16(stage + (kv * kParts + chunk / 8) * kPartBytes + row * 128 + inside * 16, from, valid);
        }
        cp_async_commit();
#endif
        load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
        if (++load_at < end) {
            deal.advance(load, 1);
#if TMA_ROAD
            next_block = block_of(load, tile_of(load) * kTile + my_box * kBox);
#endif
        }
    };

#pragma unroll 1
    for (int filled = 0; filled < kStages; filled++) {
#if TMA_ROAD
        if (load_at >= end) break;
        issue(true);
#else
        if (load_at < end) issue(true);
        else cp_async_commit();
#endif
    }
    dependency_wait();
    dependency_trigger();

    const float scale_log2 = scale * kLog2E;
    const FromProduct from_product{qkv, bias, q_norm, k_norm, rope_table, kv_heads, eps};
    int stage_at = 0;
    u32 parity = 0;

    // Where this warp's sum of its piece's first or last head lies.
    auto sum_of = [&](int which) { return which == 0 ? sums + warp * kGroup * kStride : (float*)ring_memory; };

    // Of the piece's first and last head, if cut: where they begin in the list, how long they are, which they are.
    int cut_begin[2] = {0, 0}, cut_tiles[2] = {0, 0}, cut_head[2] = {0, 0};

    // --- one (sequence, KV head) after the other -----------------------------------------------
    int at = begin;
#pragma unroll 1
    while (at < end) {
        const int tiles = deal.tiles(here.sequence);
        const int segment = at - here.tile;
        const int stop = min(end, segment + tiles);
        const int length = lengths[here.sequence];
        const int tile_base = first_tile(length, window);
        const int head_index = here.sequence * kv_heads + here.head;

        const bool has_last = stop == segment + tiles;
        const int last_block = block_of(here, length - 1); // on its way with all that queries are made of
        Made made;
        made.make(from_product, here.sequence, here.head, has_last, lane);
        bf16* to_arena = nullptr; // of the new key
        if (has_last) to_arena = arena + arena_row(here, last_block, length - 1) * kDim;

        float o[kSteps][kColumns][4];
        float m[kColumns][2], l[kColumns][2];
#pragma unroll
        for (int n = 0; n < kColumns; n++) {
            m[n][0] = m[n][1] = -INFINITY;
            l[n][0] = l[n][1] = 0;
#pragma unroll
            for (int k = 0; k < kSteps; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[k][n][i] = 0;
        }

        int tile = at;
#pragma unroll 1
        for (; tile < stop; tile++) {
            const u32 keys = ring + stage_at * kStageBytes, values = keys + kParts * kPartBytes;
#if TMA_ROAD
            mbarrier_wait(barriers + stage_at * 8, parity);
#else
            cp_async_wait<kStages - 1>();
            __syncwarp();
#endif
            const int token_base = (tile_base + tile - segment) * kTile;
            const bool ragged = token_base + kTile > length;
            if (token_base + kTile >= length) {
                // The last row is this step's. What lies behind is not the sequence's own, perhaps not even a number: 0·NaN is NaN.
                u8* const tile_memory = ring_memory + stage_at * kStageBytes;
                const int own_row = length - 1 - token_base;
#pragma unroll
                for (int c = 0; c < kPairs; c++) {
                    if (lane + c * 32 >= kQuads) break;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int d = (lane + c * 32 + half * kQuads) * 2;
                        u8* to = tile_memory + d / 64 * kPartBytes + own_row * 128 + ((d % 64 / 8) ^ (own_row % 8)) * 16 + d % 8 * 2;
                        *(u32*)to = made.key[c][half];
                        *(u32*)(to + kParts * kPartBytes) = made.value[c][half];
                        *(u32*)(to_arena + d) = made.key[c][half];
                        *(u32*)(to_arena + BLOCK_TOKENS * kDim + d) = made.value[c][half];
                    }
                }
                u8* rows = tile_memory + kParts * kPartBytes;
#pragma unroll 1
                for (int i = lane; i < (kTile - (length - token_base)) * kParts * 8; i += 32) {
                    int row = length - token_base + i / (kParts * 8), chunk = i % (kParts * 8);
                    *(int4*)(rows + chunk / 8 * kPartBytes + row * 128 + chunk % 8 * 16) = make_int4(0, 0, 0, 0);
                }
#if TMA_ROAD
                fence_proxy_async();
#endif
                __syncwarp();
            }

            float s[kSlices][kColumns][4];
#pragma unroll
            for (int r = 0; r < kSlices; r++)
#pragma unroll
                for (int n = 0; n < kColumns; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[r][n][i] = 0;
            const u32 key_row = keys + ((lane & 7) + (lane & 8)) * 128;
#pragma unroll
            for (int k = 0; k < kSteps; k++) {
#pragma unroll
                for (int r = 0; r < kSlices; r++) {
                    u32 a[4];
                    ldmatrix_x4(a, key_row + (k / 4) * kPartBytes + r * 16 * 128 + ((((k % 4) * 2 + (lane >> 4)) ^ (lane & 7)) << 4));
#pragma unroll
                    for (int n = 0; n < kColumns; n++) mma_bf16(s[r][n], a, made.q[k][n][0], made.q[k][n][1]);
                }
            }

            if (ragged || (window > 0 && token_base < length - window)) {
#pragma unroll
                for (int r = 0; r < kSlices; r++)
#pragma unroll
                    for (int n = 0; n < kColumns; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int token = token_base + r * 16 + g + (i / 2) * 8;
                            bool seen = token < length && (window <= 0 || token >= length - window);
                            if (!seen) s[r][n][i] = -INFINITY;
                        }
            }

            u32 pb[kSlices][kColumns][2];
#pragma unroll
            for (int n = 0; n < kColumns; n++) {
                float rescale[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float x = fmaxf(s[0][n][j], s[0][n][j + 2]);
#pragma unroll
                    for (int r = 1; r < kSlices; r++) x = fmaxf(x, fmaxf(s[r][n][j], s[r][n][j + 2]));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 16));
                    x = fmaxf(x * scale_log2, m[n][j]);
                    rescale[j] = exp2_approx(m[n][j] - x);
                    m[n][j] = x;
                    float sum = 0;
#pragma unroll
                    for (int r = 0; r < kSlices; r++)
#pragma unroll
                        for (int i = j; i < 4; i += 2) {
                            s[r][n][i] = exp2_approx(s[r][n][i] * scale_log2 - x);
                            sum += s[r][n][i];
                        }
                    l[n][j] = l[n][j] * rescale[j] + sum;
                }
#pragma unroll
                for (int k = 0; k < kSteps; k++)
#pragma unroll
                    for (int i = 0; i < 4; i++) o[k][n][i] *= rescale[i & 1];
#pragma unroll
                for (int r = 0; r < kSlices; r++) {
                    pb[r][n][0] = movmatrix_trans(pack_bf16(s[r][n][0], s[r][n][1]));
                    pb[r][n][1] = movmatrix_trans(pack_bf16(s[r][n][2], s[r][n][3]));
                }
            }

            const u32 value_row = values + ((lane & 7) + (lane >> 4) * 8) * 128;
#pragma unroll
            for (int r = 0; r < kSlices; r++) {
#pragma unroll
                for (int k = 0; k < kSteps; k++) {
                    u32 a[4];
                    ldmatrix_x4_trans(a, value_row + (k / 4) * kPartBytes + r * 16 * 128 +
                                             ((((k % 4) * 2 + ((lane >> 3) & 1)) ^ (lane & 7)) << 4));
#pragma unroll
                    for (int n = 0; n < kColumns; n++) mma_bf16(o[k][n], a, pb[r][n][0], pb[r][n][1]);
                }
            }

            // The stage is free once its products are there. Nothing else keeps a request to the copy engine from overtaking ldmatrix,
            // so it is made to depend on every chain of them. (No sum has all its bits set: a NaN is 0x7fffffff.)
            u32 bits = ~0u;
#pragma unroll
            for (int k = 0; k < kSteps; k++) bits &= __float_as_uint(o[k][0][0]);
            __syncwarp();
            if (load_at < end) issue(bits != ~0u);
#if !TMA_ROAD
            else cp_async_commit();
#endif
            if (++stage_at == kStages) {
                stage_at = 0;
                parity ^= 1;
            }
        }

        // Finished, or one of the two that are cut.
        const bool whole = at == segment && stop == segment + tiles;
        const int which = at == begin ? 0 : 1;
        if (!whole) {
#pragma unroll
            for (int w = 0; w < 2; w++)
                if (w == which) cut_begin[w] = segment, cut_tiles[w] = tiles, cut_head[w] = head_index;
        }
        float* to = sum_of(which);
        float2* to_total = totals + (warp * 2 + which) * kGroup;
        bf16* out_row = out + (long long)head_index * kGroup * kDim;
#pragma unroll
        for (int n = 0; n < kColumns; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int head = n * 8 + 2 * t + j;
                float sum = l[n][j];
                sum += __shfl_xor_sync(~0u, sum, 4);
                sum += __shfl_xor_sync(~0u, sum, 8);
                sum += __shfl_xor_sync(~0u, sum, 16);
                if (head < kGroup) {
                    float inverse = whole ? 1.0f / sum : 1.0f;
                    if (g == 0) to_total[head] = make_float2(m[n][j], sum);
#pragma unroll
                    for (int k = 0; k < kSteps; k++)
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            float x = o[k][n][j + 2 * i] * inverse;
                            int d = k * 16 + i * 8 + g;
                            if (whole) out_row[head * kDim + d] = __float2bfloat16(x);
                            else to[head * kStride + d] = x;
                        }
                }
            }

        here.tile += stop - at;
        at = stop;
        if (at < end) deal.advance(here, 0);
    }

    // --- cut heads, over the CTA ----------------------------------------------------------------
    __syncthreads();
    float2* partial_totals = (float2*)(partial + 2ll * grid * kGroup * kDim);
#pragma unroll
    for (int which = 0; which < 2; which++) {
        const int segment = cut_begin[which], tiles = cut_tiles[which];
        // The first warp of the CTA that has a share adds.
        if (tiles == 0 || (which == 0 && segment < begin && warp != 0)) continue;
        int last = warp;
#pragma unroll
        for (int w = 1; w < kWarps; w++)
            if (w > warp && piece(w) < min(segment + tiles, cta_end)) last = w;
        const bool inside = segment >= cta_begin && segment + tiles <= cta_end;
        const int slot = 2 * blockIdx.x + (segment < cta_begin ? 0 : 1);
        if (!inside) {
            // The first CTA's share of a head is in its second slot: its piece does not begin inside the head.
            const int cta = owner(lane == 0 ? segment : segment + tiles - 1) / kWarps, end_cta = __shfl_sync(~0u, cta, 1);
            if (lane == 0) cuts[slot & 1] = Cut{end_cta - cta + 1, cta, 2 * cta + 1, cut_head[which]};
        }
        const float* own = sum_of(which);
        bf16* out_row = out + (long long)cut_head[which] * kGroup * kDim;
#pragma unroll 4
        for (int i = lane; i < kGroup * kDim / 4; i += 32) {
            int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
            const float2 mine = totals[(warp * 2 + which) * kGroup + head];
            float2 others[kWarps];
            float top = mine.x;
#pragma unroll
            for (int w = 1; w < kWarps; w++) {
                others[w] = w > warp && w <= last ? totals[w * 2 * kGroup + head] : make_float2(-INFINITY, 0);
                top = fmaxf(top, others[w].x);
            }
            float4 acc = make_float4(0, 0, 0, 0);
            float weight = exp2_approx(mine.x - top), sum = weight * mine.y;
            add_scaled(acc, weight, *(const float4*)(own + head * kStride + d));
#pragma unroll
            for (int w = 1; w < kWarps; w++) {
                // A slot without a share holds anything.
                bool share_of = w > warp && w <= last;
                float4 x = *(const float4*)(sums + (w * kGroup + head) * kStride + d);
                if (!share_of) x = make_float4(0, 0, 0, 0);
                weight = exp2_approx(others[w].x - top);
                sum += weight * others[w].y;
                add_scaled(acc, weight, x);
            }
            if (inside) {
                store_scaled(out_row + head * kDim + d, 1.0f / sum, acc);
            } else {
                *(float4*)(partial + ((long long)slot * kGroup + head) * kDim + d) = acc;
                if (d == 0) partial_totals[slot * kGroup + head] = make_float2(top, sum);
            }
        }
    }

    // --- cut heads, over the chip ---------------------------------------------------------------
    __syncthreads();
    if (cuts[0].parts == 0 && cuts[1].parts == 0) return;
    if (lane == 0 && warp < 2) {
        bool last = false;
        if (cuts[warp].parts > 0) {
            int* counter = counters + cuts[warp].counter;
            last = atomic_add_acq_rel(counter, 1) == cuts[warp].parts - 1;
            if (last) *counter = 0;
        }
        turn[warp] = last;
    }
    __syncthreads();
#pragma unroll 1
    for (int c = 0; c < 2; c++) {
        if (!turn[c]) continue;
        add_parts<kThreads>(cuts[c], partial, partial_totals, out);
    }
}
