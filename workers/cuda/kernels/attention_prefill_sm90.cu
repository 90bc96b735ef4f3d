// Prefill attention on Hopper: causal flash attention over pages with wgmma and the copy engine.
//
// kernel attention_prefill_sm90 spill_bytes_max=80
// variant HEAD_DIM=128 GROUP=4 BLOCK_TOKENS=32
// variant HEAD_DIM=64 GROUP=3 BLOCK_TOKENS=16
// variant HEAD_DIM=256 GROUP=8 BLOCK_TOKENS=64
//
// Idea. As attention_prefill, the GQA group is packed into the rows: a work unit is kTokens = 128/GROUP rows of a
// sequence times the GROUP query heads of a KV head. A persistent CTA takes work units, longest first, forth and
// back over the grid so that every CTA gets about the same sum. Its first warpgroup loads: one warp K and one V by
// TMA, page by page (each lane one box of a page), one q, for the next unit while the last one runs.
// Two warpgroups compute 64 packed rows each. Tiles are visited from the diagonal down; while softmax works on the
// scores of tile j, the matrix unit adds tile j+1 (its q·K is issued with the P·V of the tile before), and the two
// warpgroups take turns at issuing, so that one's softmax lies beside the other's products.
//
// Floor: 4·HEAD_DIM·(pairs of row and key seen)·query heads operations at the wgmma rate. Pages come out of L2 mostly:
// per 128 keys and unit 512·HEAD_DIM bytes for 65536·HEAD_DIM operations.
//
// Defines: HEAD_DIM (multiple of 16, to 256), GROUP (1..16), BLOCK_TOKENS (16, 32, 64).
// Launch: `attention_prefill_sm90_launch` = {threads, dynamic shared bytes, rows of a sequence per work unit, 1}; grid =
// min(multiprocessors, work_count·kv_heads). `work` as for attention_prefill, with this kernel's unit. `map`: the
// arena's, see attention_decode.cu. `query_map`: of q, as that but rank 3, dims {HEAD_DIM, query heads, rows of the buffer},
// strides {HEAD_DIM·2, query heads·HEAD_DIM·2}, box {64, GROUP, launch[2]}.
#include "attention.cuh"
#include "attention_wgmma.cuh"

namespace {

constexpr int kRows = 128;
constexpr int kTokens = kRows / GROUP;
constexpr int kTile = kParts <= 2 ? 128 : 64; // keys
[[maybe_unused]] constexpr int kBoxes = kTile / kBox;
constexpr int kStages = 2;
constexpr int kPartBytes = kTile * 128;
constexpr int kTileBytes = kParts * kPartBytes; // K or V of a tile
constexpr int kQueryPartBytes = kRows * 128;
constexpr int kQueryBytes = kParts * kQueryPartBytes;
constexpr int kQueries = kParts <= 2 ? 2 : 1; // buffers of q
constexpr int kThreads = 384;
constexpr int kSharedBytes = 1024 + kQueries * kQueryBytes + 2 * kStages * kTileBytes + 256;
// P·V by column groups of 128 where they come out even.
[[maybe_unused]] constexpr int kWide = kParts % 2 == 0 ? 2 : 1;
static_assert(kSharedBytes <= 232448, "shared memory");

struct Unit {
    long long row0; // of the step
    int head, length, count, start, tile_begin, tile_end, table;
};
// Lane t of four holds x[k] of row k: afterwards it holds x[k] of lane k's row t.
[[maybe_unused]] DEVICE void quad_transpose(u32 (&x)[4], int t) {
    // 2×2 blocks between lanes t and t^1, then blocks of blocks between t and t^2.
#pragma unroll
    for (int d = 1; d <= 2; d *= 2)
#pragma unroll
        for (int k = 0; k < 4; k++)
            if ((k & d) == 0) {
                u32 give = t & d ? x[k] : x[k | d];
                u32 got = __shfl_xor_sync(~0u, give, d);
                if (t & d) x[k] = got;
                else x[k | d] = got;
            }
}
// Without a branch, so that what surrounds it is scheduled as one.
[[maybe_unused]] DEVICE void store_16_if(bool valid, void* to, const u32 (&x)[4]) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"((int)valid), "l"(to),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}
static_assert(2 * sizeof(Unit) <= 160, "shared memory");

} // namespace

extern "C" __constant__ const int attention_prefill_sm90_launch[4] = {kThreads, kSharedBytes, kTokens, 1};

// Arguments as attention_prefill. Rows of q behind the step's may be read, within the buffer.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
attention_prefill_sm90(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap query_map, const bf16* __restrict__ q, bf16* __restrict__ out,
                       const bf16* __restrict__ arena, const int2* __restrict__ work, const int* __restrict__ seq_first_row,
                       const int* __restrict__ seq_rows, const int* __restrict__ seq_kv_len,
                       const int* __restrict__ seq_table, const int* __restrict__ tables, int work_count, int layer,
                       int layers, int kv_heads, float scale, int window) {
#if BATON_ARCH >= 900
    extern __shared__ u8 shared_raw[];
    const u32 queries = (shared_address(shared_raw) + 1023) & ~1023u;
    const u32 keys = queries + kQueries * kQueryBytes, values = keys + kStages * kTileBytes;
    const u32 barriers = values + kStages * kTileBytes;
    const u32 key_full = barriers, key_empty = barriers + 16, value_full = barriers + 32, value_empty = barriers + 48;
    const u32 query_full = barriers + 64, query_empty = barriers + 80;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;

    if (tid == 0) {
        tma_prefetch_map(&map);
        tma_prefetch_map(&query_map);
        for (int s = 0; s < 2; s++) {
            mbarrier_init(key_full + s * 8, 1);
            mbarrier_init(value_full + s * 8, 1);
            mbarrier_init(key_empty + s * 8, 8);
            mbarrier_init(value_empty + s * 8, 8);
            mbarrier_init(query_full + s * 8, 1);
            mbarrier_init(query_empty + s * 8, 10);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    dependency_wait();
    dependency_trigger();

    const int items = work_count * kv_heads, grid = gridDim.x;
    const Layer in_layer{kv_heads, layers, layer};
    // The i-th unit of this CTA.
    auto item_at = [&](int i) { return i * grid + (i & 1 ? grid - 1 - (int)blockIdx.x : (int)blockIdx.x); };

    // What the loaders know of a unit in work; the other warpgroups read it beside q.
    Unit* units = (Unit*)(shared_raw + (barriers + 96 - shared_address(shared_raw)));
    auto unit_of = [&](int item) {
        int2 at = work[item / kv_heads];
        Unit u;
        u.head = item % kv_heads;
        u.length = seq_kv_len[at.x];
        int rows = seq_rows[at.x];
        u.count = min(kTokens, rows - at.y);
        u.start = u.length - rows + at.y;
        u.row0 = seq_first_row[at.x] + at.y;
        u.table = seq_table[at.x];
        u.tile_end = (u.start + u.count - 1) / kTile + 1;
        u.tile_begin = window > 0 ? max(0, u.start - window + 1) / kTile : 0;
        return u;
    };

    if (warp < 4) {
        registers_shrink<40>();
        if (warp < 2) {
            // --- K by the first warp, V by the second ----------------------------------------
            const int kv = warp;
            const u32 tiles = kv ? values : keys, full = kv ? value_full : key_full, empty = kv ? value_empty : key_empty;
            int at = 0; // tiles requested so far
            for (int i = 0; item_at(i) < items; i++) {
                const int buffer = i % kQueries;
                if (i > 0) mbarrier_wait(query_full + buffer * 8, i / kQueries & 1);
                const Unit u = i > 0 ? units[buffer] : unit_of(item_at(0));
                for (int tile = u.tile_end - 1; tile >= u.tile_begin; tile--, at++) {
                    const u32 stage = at % kStages;
                    // Each lane looks up one page.
                    const int token = tile * kTile + lane % kBoxes * kBox;
                    int row = 0x7fffff00; // beyond the arena: zeros
                    if (token < u.length)
                        row = (int)in_layer.key_row(tables[u.table + token / BLOCK_TOKENS], u.head, token) + kv * BLOCK_TOKENS;
                    mbarrier_wait(empty + stage * 8, (at / kStages & 1) ^ 1);
                    if (lane == 0) mbarrier_arrive_expect(full + stage * 8, kTileBytes);
#pragma unroll
                    for (int box = 0; box < kBoxes; box++) {
                        const int box_row = __shfl_sync(~0u, row, box);
                        if (lane == 0) {
#pragma unroll
                            for (int part = 0; part < kParts; part++)
                                tma_load_2d(tiles + stage * kTileBytes + part * kPartBytes + box * kBox * 128, &map, full + stage * 8,
                                            part * 64, box_row);
                        }
                    }
                }
                if (i == 0) mbarrier_wait(query_full, 0); // a parity alone does not tell a phase from the one after next
                __syncwarp();
                if (lane == 0) mbarrier_arrive(query_empty + buffer * 8);
            }
        } else if (warp == 2) {
            // --- q ----------------------------------------------------------------------------
            Unit next = unit_of(min(item_at(0), items - 1));
            for (int i = 0; item_at(i) < items; i++) {
                const Unit u = next;
                next = unit_of(min(item_at(i + 1), items - 1)); // in flight while a buffer comes free
                const int buffer = i % kQueries;
                const u32 full = query_full + buffer * 8;
                mbarrier_wait(query_empty + buffer * 8, (i / kQueries & 1) ^ 1);
                if (lane == 0) {
                    units[buffer] = u;
                    mbarrier_arrive_expect(full, kParts * kTokens * GROUP * 128);
                }
                __syncwarp();
                if (lane < kParts)
                    tma_load_3d(queries + buffer * kQueryBytes + lane * kQueryPartBytes, &query_map, full, lane * 64, u.head * GROUP, (int)u.row0);
            }
        }
        return;
    }

    // --- products and softmax -----------------------------------------------------------------
    registers_grow<232>();
    const int group = warp / 4 - 1; // of the two warpgroups
    const int turn = 1 + group, other_turn = 2 - group;
    const int g = lane / 4, t = lane % 4;
    const float scale_log2 = scale * kLog2E;
    if (group == 1) named_barrier_arrive(other_turn, 256);

    int key_at = 0, value_at = 0;
    for (int i = 0; item_at(i) < items; i++) {
        const int buffer = i % kQueries;
        mbarrier_wait(query_full + buffer * 8, i / kQueries & 1);
        const Unit& u = units[buffer]; // read when needed: registers are short
        const u32 my_queries = queries + buffer * kQueryBytes + group * 64 * 128;
        const int start = u.start, tile_begin = u.tile_begin;
        const int packed = group * 64 + warp % 4 * 16 + g;
        const int position[2] = {start + min(packed / GROUP, u.count - 1), start + min((packed + 8) / GROUP, u.count - 1)};

        float s[kTile / 2], o[kParts / kWide][32 * kWide], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, rescale[2];
        u32 p[kTile / 16][4];

        auto scores = [&]() {
            u32 tile = keys + key_at % kStages * kTileBytes;
            wgmma_pin(s);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kSteps; k++)
                wgmma(s, wgmma_descriptor(my_queries + k / 4 * kQueryPartBytes + k % 4 * 32),
                      wgmma_descriptor(tile + k / 4 * kPartBytes + k % 4 * 32), k > 0);
            wgmma_commit();
        };
        auto add_values = [&](bool accumulate) {
            u32 tile = values + value_at % kStages * kTileBytes;
#pragma unroll
            for (int c = 0; c < kParts / kWide; c++) wgmma_pin(o[c]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTile / 16; k++)
#pragma unroll
                for (int c = 0; c < kParts / kWide; c++)
                    wgmma_registers(o[c], p[k], wgmma_columns(tile + c * kWide * kPartBytes + k * 2048, kPartBytes),
                                    accumulate || k > 0);
            wgmma_commit();
        };
        // Scores → probabilities, in place.
        auto softmax = [&](int tile) {
            const int first = tile * kTile;
            if (first + kTile - 1 > start || (window > 0 && first <= start + u.count - 1 - window)) {
#pragma unroll
                for (int n = 0; n < kTile / 2; n++) {
                    int token = first + n / 4 * 8 + 2 * t + n % 2, row = position[n / 2 % 2];
                    if (token > row || (window > 0 && token <= row - window)) s[n] = -INFINITY;
                }
            }
            float top[4] = {m[0], m[0], m[1], m[1]}, sum[4] = {0, 0, 0, 0}, base[2];
#pragma unroll
            for (int n = 0; n < kTile / 2; n++) top[n % 4] = fmaxf(top[n % 4], s[n]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float most = warp_max<4>(fmaxf(top[2 * r], top[2 * r + 1]));
                base[r] = most == -INFINITY ? 0 : most * scale_log2; // nothing seen yet: the window begins further on
                rescale[r] = exp2_approx(m[r] * scale_log2 - base[r]);
                m[r] = most;
            }
#pragma unroll
            for (int n = 0; n < kTile / 2; n++) {
                s[n] = exp2_approx(s[n] * scale_log2 - base[n / 2 % 2]);
                sum[n % 4] += s[n];
            }
#pragma unroll
            for (int r = 0; r < 2; r++) l[r] = l[r] * rescale[r] + (sum[2 * r] + sum[2 * r + 1]);
        };
        auto pack = [&]() {
#pragma unroll
            for (int k = 0; k < kTile / 16; k++)
#pragma unroll
                for (int j = 0; j < 4; j++) p[k][j] = pack_bf16(s[k * 8 + 2 * j], s[k * 8 + 2 * j + 1]);
        };
        auto release = [&](u32 empty, int& at) {
            __syncwarp();
            if (lane == 0) mbarrier_arrive(empty + at % kStages * 8);
            at++;
        };
        // What lies behind the sequence's end in its last page is not its own, perhaps not even a number: 0·NaN is NaN.
        auto wipe = [&](int tile) {
            const int rows_end = min(kTile, (u.length - tile * kTile + kBox - 1) / kBox * kBox);
            const u32 base = values + value_at % kStages * kTileBytes;
            for (int row = u.length - tile * kTile; row < rows_end; row++)
                for (int c = tid % 128; c < kParts * 8; c += 128)
                    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(base + c / 8 * kPartBytes + row * 128 + c % 8 * 16), "r"(0)
                                 : "memory");
            fence_proxy_async();
            named_barrier_sync(3 + group, 128);
        };
        auto wait_full = [&](u32 full, int at) { mbarrier_wait(full + at % kStages * 8, at / kStages & 1); };

        int tile = u.tile_end - 1;
        const bool ragged = u.tile_end * kTile > u.length && u.length % kBox != 0;
        wait_full(key_full, key_at);
        scores();
        wgmma_wait<0>();
        wgmma_pin(s);
        release(key_empty, key_at);
        softmax(tile);
        pack();

        bool begun = false; // whether o holds anything yet
        for (; tile > tile_begin; tile--) {
            wait_full(key_full, key_at);
            named_barrier_sync(turn, 256);
            scores();
            wait_full(value_full, value_at);
            if (!begun && ragged) wipe(tile);
            add_values(begun);
            named_barrier_arrive(other_turn, 256);
            wgmma_wait<1>();
            wgmma_pin(s);
            release(key_empty, key_at);
            softmax(tile - 1);
            wgmma_wait<0>();
#pragma unroll
            for (int c = 0; c < kParts / kWide; c++) wgmma_pin(o[c]);
            release(value_empty, value_at);
#pragma unroll
            for (int c = 0; c < kParts / kWide; c++)
#pragma unroll
                for (int n = 0; n < 32 * kWide; n++) o[c][n] *= rescale[n / 2 % 2];
            pack();
            begun = true;
        }
        wait_full(value_full, value_at);
        if (!begun && ragged) wipe(tile);
        add_values(begun);

        float inverse[2] = {1.0f / warp_sum<4>(l[0]), 1.0f / warp_sum<4>(l[1])};
        wgmma_wait<0>();
#pragma unroll
        for (int c = 0; c < kParts / kWide; c++) wgmma_pin(o[c]);
        release(value_empty, value_at);
        // A row's four lanes hold 2 columns of each 8: exchanged, each has all 8 of every fourth, and stores 16 bytes.
        bf16* to[2];
        bool stored[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = packed + r * 8;
            to[r] = out + ((u.row0 + row / GROUP) * kv_heads + u.head) * (GROUP * kDim) + row % GROUP * kDim + t * 8;
            stored[r] = row < u.count * GROUP;
        }
#pragma unroll
        for (int n = 0; n < kSteps * 2; n += 4)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                u32 x[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float* from = &o[(n + k) / (8 * kWide)][(n + k) % (8 * kWide) * 4 + 2 * r];
                    x[k] = pack_bf16(from[0] * inverse[r], from[1] * inverse[r]);
                }
                quad_transpose(x, t);
                store_16_if(stored[r] && (n + 4 <= kSteps * 2 || n + t < kSteps * 2), to[r] + n * 8, x);
            }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(query_empty + buffer * 8);
    }
#endif
}
