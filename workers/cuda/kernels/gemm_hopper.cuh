// Skinny GEMM, sm_90a: one warp feeds, two or four warpgroups multiply.
//
// A tile is M_TILE outputs × N_TILE rows. A cluster takes whole tiles, its CTAs divide k; their sums meet through
// distributed shared memory, in the order of rank. w goes global → shared by TMA straight from the row-major matrix (boxes
// of 64 rows × 128 bytes), x likewise; wgmma has w as its M side, so 8 rows of x cost 8 columns and nothing is padded
// further.
//
// e4m3: w goes shared → registers → bf16 → wgmma from registers.
#pragma once

#include "gemm_epilogue.cuh"
#include "wgmma.cuh"

// Outputs per tile: 64, whose k the warpgroups share, or 128 where x is heavy, since every tile reads all of x.
#ifndef M_TILE
#define M_TILE 64
#endif
// Stages of w on their way at a time. What it takes to keep the memory busy is some 40 KB on each multiprocessor; more would only
// stand in its queues, and everything that the end of a kernel and the start of the next wait for stands behind it.
#ifndef FLIGHT
#define FLIGHT (W_STAGE > 16384 ? 3 : 4)
#endif

namespace hopper {

// Warpgroups that multiply. Converting e4m3 takes four to keep up: each waits for shared memory, converts, waits for wgmma.
constexpr int GROUPS = WEIGHT != WEIGHT_BF16 && N_TILE <= 16 ? 4 : 2;
constexpr int CONSUMERS = GROUPS * 128;
constexpr bool REBALANCE = GROUPS == 2; // registers: a whole warpgroup feeds, so that it can give up its share
constexpr int THREADS = CONSUMERS + (REBALANCE ? 128 : 32);
constexpr int K_SHARES = GROUPS * 64 / M_TILE; // warpgroups that share 64 outputs, each with its part of k
constexpr int K_CHUNK = K_STAGE * K_SHARES; // k per stage
constexpr int W_BOX = 64 * 128, X_BOX = N_TILE * 128;
constexpr int W_BOXES = GROUPS, X_BOXES = K_CHUNK / 64;
constexpr int W_STAGE = W_BOXES * W_BOX;
constexpr int X_STAGE = X_BOXES * X_BOX;
constexpr int STAGE = W_STAGE + X_STAGE;
constexpr int COLUMNS = N_TILE >= 32 && N_TILE % 16 == 0 ? 16 : 8; // rows of x that the epilogue takes at once
constexpr int PITCH = M_TILE + 4;
constexpr int FIXED = K_SHARES * COLUMNS * PITCH * 4 + N_TILE * 4 + 12 * (3 * 8);
constexpr int SHARED_MAX = 227 * 1024; // so one CTA on a multiprocessor: with two, the next kernel's would crowd onto some
constexpr int STAGES = (SHARED_MAX - FIXED) / STAGE < 12 ? (SHARED_MAX - FIXED) / STAGE : 12;
constexpr int SHARED = STAGES * STAGE + FIXED;
static_assert(M_TILE == 64 || M_TILE == 128 && GROUPS == 2, "a warpgroup has 64 outputs");
static_assert(STAGES >= 2 && K_SHARES * N_TILE * PITCH * 4 <= STAGES * STAGE, "tile too large");

DEVICE u32 cluster_rank() {
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
DEVICE u32 cluster_size() {
    u32 r;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE float4 load_remote(u32 address, u32 rank) {
    float4 v;
    asm volatile("{.reg .u32 a; mapa.shared::cluster.u32 a, %4, %5;\nld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [a];}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address), "r"(rank)
                 : "memory");
    return v;
}
DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
DEVICE void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// Where this CTA stands in its work: tiles `tile`, `tile + step`, ...; in each the chunks of k `first..end`.
struct Work {
    int tile, step, first, end, total;
    int chunk, done;
    DEVICE Work(const SkinnyGemm& p) {
        int split = (int)cluster_size(), rank = (int)cluster_rank();
        int tiles = (p.out + M_TILE - 1) / M_TILE, chunks = (p.k + K_CHUNK - 1) / K_CHUNK;
        tile = blockIdx.x / split, step = gridDim.x / split;
        first = chunks * rank / split, end = chunks * (rank + 1) / split;
        int mine = tile < tiles ? (tiles - tile + step - 1) / step : 0;
        total = mine * (end - first);
        chunk = first, done = 0;
    }
    DEVICE void next() {
        done += 1;
        if (++chunk == end) chunk = first, tile += step;
    }
};

struct Ring {
    u32 stage = 0, parity = 0;
    DEVICE void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

template <Epilogue EPILOGUE> DEVICE void gemm(const SkinnyGemm& p) {
    extern __shared__ __align__(1024) u8 shared[];
    float* tile = (float*)(shared + STAGES * STAGE); // [K_SHARES][COLUMNS][PITCH]
    float* factor = tile + K_SHARES * COLUMNS * PITCH; // [N_TILE]
    const u32 w_stages = shared_address(shared), x_stages = w_stages + STAGES * W_STAGE;
    const u32 w_full = shared_address(factor + N_TILE), x_full = w_full + STAGES * 8, empty = x_full + STAGES * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool feeds = threadIdx.x == CONSUMERS;
    const u32 split = cluster_size();
    Work work(p);

    auto load_w = [&](const Work& at, u32 stage) {
        mbarrier_arrive_expect(w_full + stage * 8, W_STAGE);
#pragma unroll
        for (int i = 0; i < W_BOXES; i++)
            tma_load_2d(w_stages + stage * W_STAGE + i * W_BOX, &p.w_map, w_full + stage * 8, at.chunk * K_CHUNK + i % K_SHARES * K_STAGE,
                        at.tile * M_TILE + i / K_SHARES * 64, EVICT_FIRST);
    };
    auto load_x = [&](const Work& at, u32 stage) {
        mbarrier_arrive_expect(x_full + stage * 8, X_STAGE);
#pragma unroll
        for (int i = 0; i < X_BOXES; i++)
            tma_load_2d(x_stages + stage * X_STAGE + i * X_BOX, &p.x_map, x_full + stage * 8, at.chunk * K_CHUNK + i * 64, 0);
    };

    Work ahead = work; // w goes before x: it depends on no kernel before this one
    u32 stage = 0;
    if (feeds) {
        for (int i = 0; i < STAGES; i++)
            mbarrier_init(w_full + i * 8, 1), mbarrier_init(x_full + i * 8, 1), mbarrier_init(empty + i * 8, CONSUMERS / 32);
        mbarrier_init_fence();
        for (; stage < FLIGHT && stage < STAGES && ahead.done < ahead.total; stage++, ahead.next()) load_w(ahead, stage);
        tma_prefetch_map(&p.x_map);
    }
    __syncthreads();

    if (warp >= CONSUMERS / 32) {
        if constexpr (REBALANCE) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (feeds) {
            for (; stage < STAGES && ahead.done < ahead.total; stage++, ahead.next()) {
                mbarrier_wait(w_full + (stage - FLIGHT) * 8, 0);
                load_w(ahead, stage);
            }
            dependency_wait();
            for (stage = 0; stage < STAGES && work.done < work.total; stage++, work.next()) load_x(work, stage);
            Ring landed;
            for (int i = 0; i < STAGES - FLIGHT; i++) landed.next();
            for (Ring ring; work.done < work.total; work.next(), ring.next(), landed.next()) {
                mbarrier_wait(empty + ring.stage * 8, ring.parity);
                load_x(work, ring.stage);
                if (FLIGHT < STAGES) mbarrier_wait(w_full + landed.stage * 8, landed.parity);
                load_w(work, ring.stage);
            }
            dependency_trigger(); // the last bytes are under way: the next kernel's may follow
        }
        __syncwarp();
        if (split > 1) cluster_arrive(), cluster_wait(), cluster_arrive(), cluster_wait();
        return;
    }

    if constexpr (REBALANCE) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    // With split > 1, the rows that this CTA ends.
    const int per_rank = (p.rows + split - 1) / split, row_first = cluster_rank() * per_rank;
    const int row_end = min(row_first + per_rank, p.rows);
    if (warp == 0) constants_early<EPILOGUE, M_TILE>(p, work.tile * M_TILE, lane);
    dependency_wait();
    float4 early;
    if (EPILOGUE == RESIDUAL && split > 1) early = residual_early<M_TILE>(p, work.tile * M_TILE, row_first, row_end, threadIdx.x);
    row_factors(p, factor, warp, CONSUMERS / 32, lane);

    const int group = warp / 4; // warpgroup: its boxes of w, so its outputs of the tile or its share of k
    const int share = group % K_SHARES, m_group = group / K_SHARES * 64;
    float sums[N_TILE / 2];
    Ring ring;
    int held = -1; // a stage that wgmma may still read
    auto release = [&](u32 stage) {
        if (lane == 0) mbarrier_arrive(empty + stage * 8);
    };
    auto spill = [&](float* to, int first, int count) { // sums of columns first..first + count, as [share][column][output]
        to += share * count * PITCH;
#pragma unroll
        for (int j = 0; j < N_TILE / 8; j++)
            if (j * 8 >= first && j * 8 < first + count) {
                float* at = to + (j * 8 - first + lane % 4 * 2) * PITCH + m_group + warp % 4 * 16 + lane / 4;
                at[0] = sums[4 * j], at[PITCH] = sums[4 * j + 1];
                at[8] = sums[4 * j + 2], at[PITCH + 8] = sums[4 * j + 3];
            }
    };

#pragma unroll
    for (int i = 0; i < N_TILE / 2; i++) sums[i] = 0.f; // for a CTA without a chunk

#if WEIGHT != WEIGHT_BF16
    u32 pieces[4]; // of 32 bytes of k: what this lane addresses for ldmatrix
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = warp % 4 * 16 + lane % 16;
        pieces[i] = row * 128 + (((i * 2 + lane / 16) ^ (row & 7)) << 4);
    }
#endif

    while (work.done < work.total) {
        const int m0 = work.tile * M_TILE;
#if WEIGHT == WEIGHT_FP8_BLOCK
        float whole[N_TILE / 2];
#pragma unroll
        for (int i = 0; i < N_TILE / 2; i++) whole[i] = 0.f;
#endif
        for (int chunk = work.first; chunk < work.end; chunk++, ring.next(), work.done++) {
            const u32 w = w_stages + ring.stage * W_STAGE + group * W_BOX;
            const u64 x = wgmma_descriptor(x_stages + ring.stage * X_STAGE + share * (X_STAGE / K_SHARES));
#if WEIGHT == WEIGHT_BF16
            mbarrier_wait(w_full + ring.stage * 8, ring.parity);
            mbarrier_wait(x_full + ring.stage * 8, ring.parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma(sums, wgmma_descriptor(w) + 2 * k, x + 2 * k, chunk > work.first || k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (held >= 0) release(held);
            held = ring.stage;
#else
#if WEIGHT == WEIGHT_FP8_BLOCK
            float scale[2]; // of the fragment's rows 0..8 and 8..16
            const int k_blocks = (p.k + 127) / 128, k_block = min(chunk * K_SHARES + share, k_blocks - 1);
            const int m = min(m0 + m_group, p.out - 1);
            if (EPILOGUE == SWIGLU) { // gate and up alternate by 8: two matrices' scales, one after the other
                const float* gate = p.w_scale + (m / 256) * k_blocks + k_block;
                scale[0] = gate[0], scale[1] = gate[(p.out / 2 + 127) / 128 * k_blocks];
            } else {
                scale[0] = scale[1] = p.w_scale[m / 128 * k_blocks + k_block];
            }
#endif
            mbarrier_wait(w_full + ring.stage * 8, ring.parity);
            mbarrier_wait(x_full + ring.stage * 8, ring.parity);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 a[4][4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 bytes[4];
                    ldmatrix_x4(bytes, w + pieces[half * 2 + i]);
                    e4m3_pair(bytes[0], a[2 * i][0], a[2 * i][2]);
                    e4m3_pair(bytes[1], a[2 * i][1], a[2 * i][3]);
                    e4m3_pair(bytes[2], a[2 * i + 1][0], a[2 * i + 1][2]);
                    e4m3_pair(bytes[3], a[2 * i + 1][1], a[2 * i + 1][3]);
                }
                wgmma_fence();
                const u64 x_half = x + half * (X_BOX >> 4);
#pragma unroll
                for (int k = 0; k < 4; k++)
                    wgmma(sums, a[k], x_half + 2 * k, (WEIGHT == WEIGHT_FP8_CHANNEL && chunk > work.first) || half > 0 || k > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (half == 0 && held >= 0) release(held); // the first half's wait covers all of the stage before
            }
            held = ring.stage;
#if WEIGHT == WEIGHT_FP8_BLOCK
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < N_TILE / 2; i++) whole[i] += sums[i] * scale[i / 2 % 2];
#endif
#endif
        }
        wgmma_wait<0>();
        if (held >= 0) release(held), held = -1;
#if WEIGHT == WEIGHT_FP8_BLOCK
#pragma unroll
        for (int i = 0; i < N_TILE / 2; i++) sums[i] = whole[i];
#endif
        if (split > 1) break; // one tile for each cluster, its sums are in parts
        auto load = [&](int first) { // the sums of rows first..first + COLUMNS, where `spill` has left them
            return [&, first](int n, int m) {
                const float* at = tile + (n - first) * PITCH + m;
                float4 v = *(const float4*)at;
#pragma unroll
                for (int i = 1; i < K_SHARES; i++) v = add(v, *(const float4*)(at + i * COLUMNS * PITCH));
                return v;
            };
        };
#if RANKS > 1
        if (EPILOGUE == RESIDUAL) // all is on its way before the first is waited for
            for (int first = 0; first < N_TILE && first < p.rows; first += COLUMNS) {
                consumers_sync();
                spill(tile, first, COLUMNS);
                consumers_sync();
                send_rows<M_TILE, CONSUMERS>(p, m0, first, min(first + COLUMNS, p.rows), factor, threadIdx.x, load(first));
            }
#endif
        for (int first = 0; first < N_TILE && first < p.rows; first += COLUMNS) {
            consumers_sync();
            spill(tile, first, COLUMNS);
            consumers_sync();
            finish_rows<EPILOGUE, M_TILE, CONSUMERS>(p, m0, first, min(first + COLUMNS, p.rows), factor, threadIdx.x, nullptr, load(first));
        }
        work.tile += work.step;
        if (warp == 0) constants_early<EPILOGUE, M_TILE>(p, work.tile * M_TILE, lane);
    }

    if (split > 1) { // the pipeline is empty: its memory holds the sums
        float* mine = (float*)shared;
        consumers_sync();
        spill(mine, 0, N_TILE);
        cluster_arrive();
        cluster_wait();
        const int tiles = (p.out + M_TILE - 1) / M_TILE, at = blockIdx.x / split;
        auto load = [&](int n, int m) {
            u32 address = w_stages + (n * PITCH + m) * 4;
            float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
            for (u32 r = 0; r < split; r++)
#pragma unroll
                for (int i = 0; i < K_SHARES; i++) v = add(v, load_remote(address + i * N_TILE * PITCH * 4, r));
            return v;
        };
#if RANKS > 1
        if (EPILOGUE == RESIDUAL && at < tiles) send_rows<M_TILE, CONSUMERS>(p, at * M_TILE, row_first, row_end, factor, threadIdx.x, load);
#endif
        if (at < tiles) finish_rows<EPILOGUE, M_TILE, CONSUMERS>(p, at * M_TILE, row_first, row_end, factor, threadIdx.x, &early, load);
        cluster_arrive(); // nobody leaves while its sums are read
        cluster_wait();
    }
}

} // namespace hopper
