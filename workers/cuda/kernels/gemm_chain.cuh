// Products of few rows that follow each other, in one kernel: what each CTA does. See gemm_chain.cu.
#pragma once

#include "gemm_epilogue.cuh"

namespace chain {

constexpr bool FP8 = WEIGHT != WEIGHT_BF16;
constexpr int COLUMNS = 8;            // of one mma
static_assert(ROWS <= COLUMNS, "a row of x is a column");
constexpr int WARPS = FP8 ? 16 : 8;   // that multiply; converting e4m3 takes twice as many
constexpr int LOADERS = 8;            // warps that bring x
constexpr int THREADS = (WARPS + LOADERS + 1) * 32;
constexpr int STAGE = 16384;          // of w: R outputs × (16384 / R) bytes of k
constexpr int BLOCK_K = FP8 ? 128 : 64; // k in 128 bytes
constexpr int GROUP_K = 256, GROUP = ROWS * GROUP_K * 2; // of x
constexpr int GROUPS = ROWS == 1 ? 32 : 128 / ROWS; // a product of no more is brought once for all tiles, another for each
// Stages of w on their way at a time: what keeps memory busy. More would only stand in its queues, and so would all that
// the products tell each other.
#ifndef FLIGHT
#define FLIGHT 4
#endif
// Sums of a warp, [row][output of 16]: pitches without bank conflicts.
constexpr int SUMS_ROW = 20, SUMS_WARP = COLUMNS * SUMS_ROW + 16;
constexpr int NORMS = 2;
constexpr int FIXED = GROUPS * GROUP + WARPS * SUMS_WARP * 4 + NORMS * COLUMNS * 4 + (2 * GROUPS + NORMS) * 8;
constexpr int SHARED_MAX = 227 * 1024;
constexpr int STAGES = (SHARED_MAX - FIXED) / (STAGE + 16);
constexpr int SHARED = STAGES * (STAGE + 16) + FIXED;
static_assert(STAGES > FLIGHT, "nothing to run ahead with");

constexpr u32 MISSING = 0xffffffffu; // two bf16, or a float, that no arithmetic makes: what is not written yet

#if BATON_ARCH >= 900

// --- what CTAs tell each other --------------------------------------------------------------------

DEVICE uint4 load_words(const void* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
DEVICE u32 load_word(const void* from) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
DEVICE void store_word(void* to, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory"); }
// Arrives once `sum` is there. What was read for it has then been read: nothing else keeps an arrival from overtaking ldmatrix,
// and with weights in L2 the next ones were seen to land 0.5 µs later, before slow warps had read the last.
DEVICE void arrive_after(float sum, u32 barrier) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0xffffffff;\n@p mbarrier.arrive.shared::cta.b64 _, [%1];\n}" ::"r"(__float_as_uint(sum)), "r"(barrier) : "memory");
}
DEVICE bool written(uint4 v) { return v.x != MISSING && v.y != MISSING && v.z != MISSING && v.w != MISSING; }

// --- one CTA's part -------------------------------------------------------------------------------

// Tiles of R outputs that this CTA has of a product: `tile`, `tile + stride`, … All CTAs have the same number, but the last ones.
// The order lets the next product begin with what all made first.
template <int R> struct Share {
    static constexpr int M_TILES = R / 16;                // of a tile, each a warp's
    static constexpr int SHARES = WARPS / M_TILES;        // of a stage's k, each a warp's 64
    static constexpr int BLOCKS = 128 / R;                // of 128 bytes of k in a stage
    static constexpr int STAGE_GROUPS = BLOCKS * BLOCK_K / GROUP_K;
    static_assert(SHARES * 64 == BLOCKS * BLOCK_K, "a warp has 16 outputs × 64 of k of each stage");

    int tile, stride, tiles, stages, groups;

    DEVICE explicit Share(const ChainProduct& p) {
        const int all = p.out / R, each = (all + (int)gridDim.x - 1) / (int)gridDim.x;
        tile = blockIdx.x;
        stride = each > 0 ? (all + each - 1) / each : 0;
        tiles = tile < stride ? (all - tile + stride - 1) / stride : 0;
        stages = (p.k + BLOCKS * BLOCK_K - 1) / (BLOCKS * BLOCK_K);
        groups = stages * STAGE_GROUPS;
    }
    DEVICE bool keeps_x() const { return groups <= GROUPS; } // for all of its tiles
};

template <int LENGTH> struct Ring {
    u32 at = 0, parity = 0;
    DEVICE void next() {
        if (++at == LENGTH) at = 0, parity ^= 1;
    }
};

struct Places {
    u32 w, x, sums, w_full, w_empty, x_full, x_empty, factor_full;
    float* factor; // [NORMS][COLUMNS]
};

// One thread: sends for w, stage by stage through all products, however far those are.
struct Feeder {
    Places at;
    Ring<STAGES> ring, landed;
    int sent = 0;

    template <int R> DEVICE void feed(const ChainProduct& p) {
        const Share<R> share(p);
        for (int t = 0; t < share.tiles; t++)
            for (int s = 0; s < share.stages; s++, ring.next(), sent++) {
                if (sent >= FLIGHT) mbarrier_wait(at.w_full + landed.at * 8, landed.parity), landed.next();
                mbarrier_wait(at.w_empty + ring.at * 8, ring.parity ^ 1);
                const u32 full = at.w_full + ring.at * 8;
                mbarrier_arrive_expect(full, STAGE);
                tma_load_3d(at.w + ring.at * STAGE, &p.w_map, full, 0, (share.tile + t * share.stride) * R, s * Share<R>::BLOCKS, EVICT_FIRST);
            }
    }
};

// A warp of those that bring x: every eighth group of 256 of k, of all rows.
struct Loader {
    Places at;
    int loader, lane, rows;
    u32 first = 0; // group of the product that comes next, counted through all products

    // EXCHANGED: other CTAs of this launch write x; what is MISSING is asked for again.
    template <int R, bool EXCHANGED> DEVICE void bring(const ChainProduct& p, const bf16* x, const float* squares, int norm, float eps) {
        const Share<R> share(p);
        if (share.tiles == 0) return;
        const int passes = share.keeps_x() ? 1 : share.tiles;
        for (int pass = 0; pass < passes; pass++, first += share.groups) {
            // A slot always has the same warp, or a slow one's turn would be taken for done.
            for (int g = (int)((loader - first) % LOADERS); g < share.groups; g += LOADERS) {
                const u32 index = first + g;
                mbarrier_wait(at.x_empty + index % GROUPS * 8, (index / GROUPS & 1) ^ 1);
                group<EXCHANGED>(x, g * GROUP_K + lane * 8, p.k, at.x + index % GROUPS * GROUP);
                __syncwarp();
                if (lane == 0) mbarrier_arrive(at.x_full + index % GROUPS * 8);
            }
            if (pass == 0 && squares != nullptr) factor(squares, p.k, norm, eps);
        }
    }

    template <bool EXCHANGED> DEVICE void group(const bf16* x, int k, int k_end, u32 to) const {
        uint4 v[ROWS];
        const bool inside = k < k_end;
        const bf16* from = x + (inside ? k : 0);
        if (EXCHANGED && inside) // one row alone until it is there, so that asking is no flood
            while (!written(load_words(from))) {
            }
#pragma unroll
        for (int n = 0; n < ROWS; n++)
            if (n < rows) v[n] = load_words(from + (size_t)n * k_end);
#pragma unroll
        for (int n = 0; n < ROWS; n++)
            if (n < rows) {
                if (EXCHANGED && inside)
                    while (!written(v[n])) v[n] = load_words(from + (size_t)n * k_end);
                if (!inside) v[n] = make_uint4(0, 0, 0, 0);
                const u32 place = to + lane / 8 * (ROWS * 128) + n * 128 + ((lane % 8 ^ n) << 4);
                asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(place), "r"(v[n].x), "r"(v[n].y), "r"(v[n].z), "r"(v[n].w) : "memory");
            }
    }

    // 1 / rms of a row of x; each warp has one. Always the same order.
    DEVICE void factor(const float* squares, int k, int norm, float eps) const {
        if (loader < rows) {
            const int parts = k / 32;
            float sum = 0.f;
            for (int i = lane; i < parts; i += 32) {
                u32 bits;
                do
                    bits = load_word(squares + loader * parts + i);
                while (bits == MISSING);
                sum += __uint_as_float(bits);
            }
            sum = warp_sum<32>(sum);
            if (lane == 0) at.factor[norm * COLUMNS + loader] = rsqrtf(sum / (float)k + eps);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(at.factor_full + norm * 8);
    }
};

// A warp of those that multiply.
struct Consumer {
    const Chain& c;
    Places at;
    int warp, lane;
    Ring<STAGES> w;
    u32 first = 0; // group of x, as the loaders count

    DEVICE static void sync() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }

    // Residual: z and squares of the norm that comes next go to `z`, `squares`; `pushed`: which of the two. Swiglu, store: to `z`.
    template <Epilogue E, int R> DEVICE void product(const ChainProduct& p, int norm, const bf16* gamma, bf16* z, float* squares, int pushed = 0) {
        using S = Share<R>;
        const S share(p);
        if (share.tiles == 0) return;
        const int part = warp / S::M_TILES, m_tile = warp % S::M_TILES, thread = warp * 32 + lane;
        const u32 w_rows = (FP8 ? part / 2 : part) * (R * 128) + (m_tile * 16 + lane % 16) * 128;
        const int x_row = min(lane % 8, ROWS - 1); // what stands in columns without a row is not looked at
        const u32 x_rows = part % 4 * (ROWS * 128) + x_row * 128;
        [[maybe_unused]] const int half = part % 2 * 4;
        for (int t = 0; t < share.tiles; t++) {
            const int tile = share.tile + t * share.stride, m0 = tile * R;
            const Early<E, R> early(c, p, gamma, m0, thread);
            const bool last = !share.keeps_x() || t + 1 == share.tiles;
            float sums[4] = {0.f, 0.f, 0.f, 0.f};
            for (int s = 0; s < share.stages; s++, w.next()) {
                const u32 group = first + s * S::STAGE_GROUPS + part / 4;
                const u32 w_at = at.w + w.at * STAGE + w_rows, x_at = at.x + group % GROUPS * GROUP + x_rows;
#if WEIGHT == WEIGHT_FP8_BLOCK
                const float2 scale = block_scales<E>(p, m0, min(s * S::BLOCKS + part / 2, p.k / 128 - 1));
                float products[4] = {0.f, 0.f, 0.f, 0.f};
#else
                float(&products)[4] = sums;
#endif
                mbarrier_wait(at.w_full + w.at * 8, w.parity);
                mbarrier_wait(at.x_full + group % GROUPS * 8, group / GROUPS & 1);
#pragma unroll
                for (int i = 0; i < 2; i++) { // 32 of k
                    u32 b[4];
                    ldmatrix_x4(b, x_at + (((i * 4 + lane / 8) ^ x_row) << 4));
                    u32 a[2][4];
                    if constexpr (FP8) {
                        u32 bytes[4];
                        ldmatrix_x4(bytes, w_at + (((half + i * 2 + lane / 16) ^ (lane & 7)) << 4));
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            e4m3_pair(bytes[2 * j], a[j][0], a[j][2]);
                            e4m3_pair(bytes[2 * j + 1], a[j][1], a[j][3]);
                        }
                    } else {
#pragma unroll
                        for (int j = 0; j < 2; j++) ldmatrix_x4(a[j], w_at + (((i * 4 + j * 2 + lane / 16) ^ (lane & 7)) << 4));
                    }
                    mma_bf16(products, a[0], b[0], b[1]);
                    mma_bf16(products, a[1], b[2], b[3]);
                }
#if WEIGHT == WEIGHT_FP8_BLOCK
                sums[0] = fmaf(products[0], scale.x, sums[0]), sums[1] = fmaf(products[1], scale.x, sums[1]);
                sums[2] = fmaf(products[2], scale.y, sums[2]), sums[3] = fmaf(products[3], scale.y, sums[3]);
#endif
                __syncwarp();
                if (lane == 0) arrive_after(sums[0], at.w_empty + w.at * 8);
                if (last && lane < S::STAGE_GROUPS) arrive_after(sums[0], at.x_empty + (first + s * S::STAGE_GROUPS + lane) % GROUPS * 8);
            }
            if (last) first += share.groups;
            __syncwarp();
            sync(); // the last tile's sums were read
            const u32 to = at.sums + (warp * SUMS_WARP + lane % 4 * 2 * SUMS_ROW + lane / 4) * 4;
            asm volatile("st.shared.f32 [%0], %1;\nst.shared.f32 [%0 + 80], %2;\nst.shared.f32 [%0 + 32], %3;\nst.shared.f32 [%0 + 112], %4;" ::"r"(to),
                         "f"(sums[0]), "f"(sums[1]), "f"(sums[2]), "f"(sums[3])
                         : "memory");
            sync();
            finish<E, R>(p, early, norm, tile, thread, z, squares, pushed);
        }
    }

    // What the end of a tile needs, on its way before the tile begins.
    template <Epilogue E, int R> struct Early {
        float residual = 0.f, gamma = 0.f, scale = 1.f, up_scale = 1.f, bias = 0.f;
        DEVICE Early(const Chain& c, const ChainProduct& p, const bf16* next_gamma, int m0, int thread) {
            const int m = m0 + output<E, R>(thread), n = row<E, R>(thread);
            if (n >= c.rows) return;
            if (WEIGHT == WEIGHT_FP8_CHANNEL) scale = p.w_scale[m];
            if (WEIGHT == WEIGHT_FP8_CHANNEL && E == SWIGLU) up_scale = p.w_scale[m + 8];
            if (E == RESIDUAL) residual = __uint_as_float(load_word(c.residual + (size_t)n * p.out + m)), gamma = __bfloat162float(next_gamma[m]);
            if (E == STORE && p.bias != nullptr) bias = __bfloat162float(p.bias[m]);
        }
    };
    // Which sum a thread ends: neighbours have neighbouring outputs of one row; swiglu: an output of gate, its up is 8 on.
    template <Epilogue E, int R> DEVICE static int row(int thread) { return thread / (E == SWIGLU ? R / 2 : R); }
    template <Epilogue E, int R> DEVICE static int output(int thread) {
        return E == SWIGLU ? thread % (R / 2) / 8 * 16 + thread % 8 : thread % R;
    }

    // A sum of all parts of k, in their order.
    template <int R> DEVICE float gather(int n, int m) const {
        using S = Share<R>;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < S::SHARES; i++) {
            float v;
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at.sums + ((i * S::M_TILES + m / 16) * SUMS_WARP + n * SUMS_ROW + m % 16) * 4) : "memory");
            sum += v;
        }
        return sum;
    }

    template <Epilogue E, int R>
    DEVICE void finish(const ChainProduct& p, const Early<E, R>& early, int norm, int tile, int thread, bf16* z, float* squares, int pushed) const {
        const int n = row<E, R>(thread), m = output<E, R>(thread);
        if (warp * 32 >= ROWS * (E == SWIGLU ? R / 2 : R)) return; // whole warps
        const bool mine = n < c.rows;
        if (E != RESIDUAL) mbarrier_wait(at.factor_full + norm * 8, 0);
        float v = 0.f;
        int width = p.out, column = tile * R + m;
        if (mine) {
            v = gather<R>(n, m) * early.scale;
            if (E != RESIDUAL) v *= at.factor[norm * COLUMNS + n];
            if (E == STORE) v += early.bias;
            if (E == SWIGLU) {
                const float up = gather<R>(n, m + 8) * early.up_scale * at.factor[norm * COLUMNS + n];
                v = silu(v) * up;
                width = p.out / 2, column = tile * (R / 2) + thread % (R / 2);
            }
            if (E == RESIDUAL) {
#if RANKS > 1
                v = pushed_sum::sum(c.ranks, c.slots[pushed], (u32)(n * p.out + column) * 4, v);
#endif
                v += early.residual;
                c.residual[(size_t)n * p.out + column] = v;
            }
        }
        if (E == RESIDUAL && R == 32) { // a warp has a row of the tile
            u32 sum = __float_as_uint(warp_sum<32>(v * v));
            if (lane == 0 && mine) store_word(squares + n * (p.out / 32) + tile, sum == MISSING ? 0x7fffffffu : sum);
        }
        if (E == RESIDUAL) v *= early.gamma;
        const float neighbour = __shfl_down_sync(~0u, v, 1);
        if (mine && lane % 2 == 0) store_word(z + (size_t)n * width + column, pack_bf16(v, neighbour));
    }

#if WEIGHT == WEIGHT_FP8_BLOCK
    // Of a fragment's outputs 0..8 and 8..16: one, or gate's and up's, whose scales stand one after the other.
    template <Epilogue E> DEVICE static float2 block_scales(const ChainProduct& p, int m0, int k_block) {
        const int k_blocks = p.k / 128;
        if (E == SWIGLU) {
            const float* gate = p.w_scale + m0 / 256 * k_blocks + k_block;
            return make_float2(gate[0], gate[(p.out / 2 + 127) / 128 * k_blocks]);
        }
        const float scale = p.w_scale[m0 / 128 * k_blocks + k_block];
        return make_float2(scale, scale);
    }
#endif

    // Makes the set of another launch's exchange as if nothing had been written.
    DEVICE void clear() const {
        const int all = gridDim.x * WARPS * 32;
        for (int i = blockIdx.x * WARPS * 32 + warp * 32 + lane; i < c.clear_count; i += all)
            c.clear[i] = make_uint4(MISSING, MISSING, MISSING, MISSING);
    }
};

DEVICE void run(const Chain& c) {
    extern __shared__ __align__(1024) u8 shared[];
    Places at;
    at.w = shared_address(shared), at.x = at.w + STAGES * STAGE, at.sums = at.x + GROUPS * GROUP;
    at.factor = (float*)(shared + STAGES * STAGE + GROUPS * GROUP + WARPS * SUMS_WARP * 4);
    at.w_full = shared_address(at.factor + NORMS * COLUMNS), at.w_empty = at.w_full + STAGES * 8;
    at.x_full = at.w_empty + STAGES * 8, at.x_empty = at.x_full + GROUPS * 8, at.factor_full = at.x_empty + GROUPS * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == (WARPS + LOADERS) * 32) {
        for (int i = 0; i < STAGES; i++) mbarrier_init(at.w_full + i * 8, 1), mbarrier_init(at.w_empty + i * 8, WARPS);
        for (int i = 0; i < GROUPS; i++) mbarrier_init(at.x_full + i * 8, 1), mbarrier_init(at.x_empty + i * 8, WARPS);
        for (int i = 0; i < NORMS; i++) mbarrier_init(at.factor_full + i * 8, LOADERS);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (warp == WARPS + LOADERS) {
        if (lane != 0) return;
        Feeder feeder{at};
        feeder.feed<32>(c.o), feeder.feed<32>(c.gate_up), feeder.feed<32>(c.down), feeder.feed<16>(c.qkv);
        dependency_trigger(); // the last bytes are under way: the next kernel's may follow
    } else if (warp >= WARPS) {
        Loader loader{at, warp - WARPS, lane, c.rows};
        dependency_wait();
        loader.bring<32, false>(c.o, c.attended, nullptr, 0, c.eps);
        loader.bring<32, true>(c.gate_up, c.z[0], c.squares[0], 0, c.eps);
        loader.bring<32, true>(c.down, c.inner, nullptr, 0, c.eps);
        loader.bring<16, true>(c.qkv, c.z[1], c.squares[1], 1, c.eps);
    } else {
        Consumer consumer{c, at, warp, lane};
        dependency_wait();
        consumer.product<RESIDUAL, 32>(c.o, 0, c.gamma[0], c.z[0], c.squares[0], 0);
        consumer.clear(); // the others' rows are waited for anyway
        consumer.product<SWIGLU, 32>(c.gate_up, 0, nullptr, c.inner, nullptr);
        consumer.product<RESIDUAL, 32>(c.down, 0, c.gamma[1], c.z[1], c.squares[1], 1);
        consumer.product<STORE, 16>(c.qkv, 1, nullptr, c.qkv_out, nullptr);
    }
}

#endif

} // namespace chain
