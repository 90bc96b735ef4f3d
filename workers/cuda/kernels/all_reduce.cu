// The sum of all ranks' partial results, on all ranks: added in the order of ranks, in f32, so that all hold the same bits.
//
// Bytes S of a partial, N ranks; a GPU sends at about 390 GB/s. One shot sends all of it to everybody: (N - 1) S / rate and one
// way through NVLink, 1 µs. Two shots send each rank its share, which it adds and sends to everybody: 2 (N - 1) / N S / rate and
// two ways. For two ranks one shot is never worse. Local memory: 5 S in one shot. No arithmetic worth counting.
//
// A thread makes 16 bytes of partials at a time, the same on all ranks, so that nothing waits for another block.
//
// Two shots of BF16 send sums as BF16; one shot adds to the residual stream what it has in f32.
//
// kernel one_shot_bf16 spill_bytes_max=0
// kernel one_shot_bf16_f32 spill_bytes_max=0
// kernel one_shot_f32 spill_bytes_max=0
// kernel two_shot_bf16 spill_bytes_max=0
// kernel two_shot_bf16_f32 spill_bytes_max=0
// kernel two_shot_f32 spill_bytes_max=0
//
// variant RANKS=2
// variant RANKS=3
// variant RANKS=4
// variant RANKS=8
// variant RANKS=4 HOLD_BACK=1
#include "exchange.cuh"

using exchange::Exchange;
using exchange::Turn;

#define THREADS 256

// What the host chooses grids and sizes by: threads of a block, BLOCKS_MAX, bytes of the header, blocks of a multiprocessor at once.
#define RESIDENT (RANKS > 4 ? 2 : 4)
extern "C" __constant__ int all_reduce_shape[4] = {THREADS, exchange::BLOCKS_MAX, exchange::HEADER_BYTES, RESIDENT};

// W numbers in 16 bytes: 8 bf16 or 4 floats.
DEVICE void unpack(float (&x)[8], uint4 v) {
    x[0] = bf16_low(v.x), x[1] = bf16_high(v.x), x[2] = bf16_low(v.y), x[3] = bf16_high(v.y);
    x[4] = bf16_low(v.z), x[5] = bf16_high(v.z), x[6] = bf16_low(v.w), x[7] = bf16_high(v.w);
}
DEVICE void unpack(float (&x)[4], uint4 v) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
DEVICE uint4 pack(const float (&x)[8]) {
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}
DEVICE uint4 pack(const float (&x)[4]) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}

template <int W> struct Numbers;
template <> struct Numbers<8> { typedef u16 Bits; };
template <> struct Numbers<4> { typedef u32 Bits; };

// The i-th 16 bytes of `count` numbers; zeros beyond.
template <int W> DEVICE uint4 load(const void* from, u32 i, u64 count) {
    typedef typename Numbers<W>::Bits Bits;
    if ((u64)(i + 1) * W <= count) return ((const uint4*)from)[i];
    u32 words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < W; j++)
        if ((u64)i * W + j < count) words[j * 4 / W] |= (u32)((const Bits*)from)[(u64)i * W + j] << (W == 8 ? j % 2 * 16 : 0);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <int W> DEVICE void store(void* to, u32 i, u64 count, uint4 v) {
    typedef typename Numbers<W>::Bits Bits;
    if ((u64)(i + 1) * W <= count) {
        ((uint4*)to)[i] = v;
        return;
    }
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < W; j++)
        if ((u64)i * W + j < count) ((Bits*)to)[(u64)i * W + j] = (Bits)(words[j * 4 / W] >> (W == 8 ? j % 2 * 16 : 0));
}

// Where sums go: as partials are, or to f32, added to a residual if there is one (which may be `out`).
template <int W, bool OUT_F32> struct Out {
    void* out;
    const float* residual;
    u64 count;

    // Before the wait, so that the two overlap.
    DEVICE void begin(float (&x)[W], u32 i) const {
        if constexpr (OUT_F32) {
            if (residual == nullptr) return;
#pragma unroll
            for (int j = 0; j < W / 4; j++) {
                const uint4 v = (u64)(i * (W / 4) + j) * 4 < count ? load<4>(residual, i * (W / 4) + j, count) : make_uint4(0, 0, 0, 0);
                x[4 * j] = __uint_as_float(v.x), x[4 * j + 1] = __uint_as_float(v.y);
                x[4 * j + 2] = __uint_as_float(v.z), x[4 * j + 3] = __uint_as_float(v.w);
            }
        }
    }
    DEVICE void end(const float (&begun)[W], const float (&sum)[W], u32 i) const {
        if constexpr (OUT_F32) {
#pragma unroll
            for (int j = 0; j < W / 4; j++) {
                float x[4];
#pragma unroll
                for (int k = 0; k < 4; k++) x[k] = residual == nullptr ? sum[4 * j + k] : begun[4 * j + k] + sum[4 * j + k];
                if ((u64)(i * (W / 4) + j) * 4 < count) store<4>(out, i * (W / 4) + j, count, pack(x));
            }
        } else {
            store<W>(out, i, count, pack(sum));
        }
    }
};

// The sum of what all ranks have at i; rank r's stands in slot r * stride + i, this rank's is `own`.
template <int W> DEVICE void gather(Turn& turn, float (&sum)[W], uint4 own, u32 stride, u32 i) {
    uint4 parts[RANKS];
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) parts[r] = r == turn.e.rank ? own : exchange::load_slot(turn.slot(turn.e.rank, r * stride + i));
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) {
        if (r != turn.e.rank) parts[r] = turn.receive(r, r * stride + i, parts[r]);
        float x[W];
        unpack(x, parts[r]);
#pragma unroll
        for (int j = 0; j < W; j++) sum[j] = r == 0 ? x[j] : sum[j] + x[j];
    }
}

// U times 16 bytes of a thread on their way at once.
template <int W, bool OUT_F32, int U> DEVICE void one_shot(const Exchange& e, const Out<W, OUT_F32>& to, const void* partial) {
    dependency_trigger();
    dependency_wait();
    Turn turn(e);
    const u32 vectors = (u32)((to.count + W - 1) / W), step = gridDim.x * THREADS, stride = (u32)(e.set_bytes / 16 / RANKS);
    for (u32 first = blockIdx.x * THREADS + threadIdx.x; first < vectors; first += step * U) {
        uint4 own[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (first + u * step < vectors) own[u] = exchange::sendable(load<W>(partial, first + u * step, to.count));
#pragma unroll
        for (int u = 0; u < U; u++)
            if (first + u * step < vectors) {
#pragma unroll
                for (u32 r = 0; r < RANKS; r++)
                    if (r != e.rank) turn.send(r, e.rank * stride + first + u * step, own[u]);
            }
        turn.pause();
#pragma unroll
        for (int u = 0; u < U; u++)
            if (first + u * step < vectors) {
                float begun[W], sum[W];
                to.begin(begun, first + u * step);
                gather(turn, sum, own[u], stride, first + u * step);
                to.end(begun, sum, first + u * step);
            }
    }
    turn.end();
}

// Rank r adds the 16 bytes r * share … (r + 1) * share. Slots: of partials [rank][share], then of sums [rank][share]. What a thread
// waits for was sent a round before: while it is on its way, the next round's partials are sent, and the last one's sums received.
template <int W, bool OUT_F32, int U> DEVICE void two_shot(const Exchange& e, const Out<W, OUT_F32>& to, const void* partial) {
    dependency_trigger();
    dependency_wait();
    Turn turn(e);
    const u32 vectors = (u32)((to.count + W - 1) / W), step = gridDim.x * THREADS, share = (vectors + RANKS - 1) / RANKS;
    const u32 sums = RANKS * share, round = step * U, start = blockIdx.x * THREADS + threadIdx.x;
    auto send_partials = [&](u32 first) {
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (u32 r = 0; r < RANKS; r++) {
                const u32 i = first + u * step;
                if (r != e.rank && i < share && r * share + i < vectors)
                    turn.send(r, e.rank * share + i, exchange::sendable(load<W>(partial, r * share + i, to.count)));
            }
    };
    auto add = [&](u32 first) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            const u32 i = first + u * step, at = e.rank * share + i;
            if (i >= share || at >= vectors) continue;
            float begun[W], sum[W];
            gather(turn, sum, exchange::sendable(load<W>(partial, at, to.count)), share, i);
            const uint4 packed = exchange::sendable(pack(sum));
#pragma unroll
            for (u32 r = 0; r < RANKS; r++)
                if (r != e.rank) turn.send(r, sums + at, packed);
            to.begin(begun, at);
            unpack(sum, packed); // what the others get
            to.end(begun, sum, at);
        }
    };
    auto take_sums = [&](u32 first) {
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (u32 r = 0; r < RANKS; r++) {
                const u32 i = first + u * step, at = r * share + i;
                if (r == e.rank || i >= share || at >= vectors) continue;
                float begun[W], sum[W];
                to.begin(begun, at);
                unpack(sum, turn.receive(r, sums + at, exchange::load_slot(turn.slot(e.rank, sums + at))));
                to.end(begun, sum, at);
            }
    };
    send_partials(start);
    u32 first = start;
    for (; first < share; first += round) {
        send_partials(first + round);
        turn.pause();
        add(first);
        if (first != start) take_sums(first - round);
    }
    if (first != start) take_sums(first - round);
    turn.end();
}

// out [count]; partial [count], of `count` numbers that may be odd; both begin at a multiple of 16 bytes. residual [count] f32 or
// null. Sizes: one shot at most set_bytes / RANKS of partials, two shots 2 * RANKS * 16 * share at most set_bytes. Grid: a row,
// at most RESIDENT blocks a multiprocessor; THREADS threads.
#define ALL_REDUCE(NAME, SHOT, W, OUT_F32, U)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)                                                                   \
        NAME(const __grid_constant__ Exchange e, void* out, const void* partial, const float* residual, u64 count) {                  \
        SHOT<W, OUT_F32, U>(e, Out<W, OUT_F32>{out, residual, count}, partial);                                                       \
    }

// More ranks have more on their way at once as it is, and no registers for more.
#define SOME (RANKS > 4 ? 1 : 2)
#define MANY (RANKS > 4 ? 1 : 4)
ALL_REDUCE(one_shot_bf16, one_shot, 8, false, MANY)
ALL_REDUCE(one_shot_bf16_f32, one_shot, 8, true, SOME)
ALL_REDUCE(one_shot_f32, one_shot, 4, true, MANY)
ALL_REDUCE(two_shot_bf16, two_shot, 8, false, SOME)
ALL_REDUCE(two_shot_bf16_f32, two_shot, 8, true, SOME)
ALL_REDUCE(two_shot_f32, two_shot, 4, true, SOME)
