// Every rank's columns of a matrix, on all ranks: logits, of which each rank has computed its part of the vocabulary.
//
// Bytes S of the whole, N ranks; a GPU sends at about 390 GB/s. (N - 1) / N S / rate and one way through NVLink, 1 µs. Local memory:
// 4 S.
//
// kernel all_gather spill_bytes_max=0
//
// variant RANKS=2
// variant RANKS=3
// variant RANKS=4
// variant RANKS=8
#include "exchange.cuh"

using exchange::Exchange;
using exchange::Turn;

#define THREADS 256
#define RESIDENT 4
#define SENT 4 // 16 bytes of a thread on their way at once

// For the host, as in all_reduce.cu.
extern "C" __constant__ int all_gather_shape[4] = {THREADS, exchange::BLOCKS_MAX, exchange::HEADER_BYTES, RESIDENT};

// out [rows][width] from numbers of rank r's part [rows][its columns]: the four from 4 i on.
DEVICE void place(float* out, int rows, int width, u32 first, u32 columns, u32 i, uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    if (columns % 4 == 0 && first % 4 == 0 && width % 4 == 0) {
        const u32 row = 4 * i / columns, column = 4 * i % columns;
        *(uint4*)(out + (u64)row * width + first + column) = v;
        return;
    }
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const u32 row = (4 * i + j) / columns, column = (4 * i + j) % columns;
        if (row < (u32)rows) out[(u64)row * width + first + column] = __uint_as_float(words[j]);
    }
}

// out [rows][width]; part [rows][columns of this rank], f32, readable to the next multiple of 16 bytes. Rank r has the columns
// width r / RANKS … width (r + 1) / RANKS. Sizes: 4 rows (columns + 1) at most set_bytes / RANKS. Grid: a row, the same on all ranks, at
// most RESIDENT blocks a multiprocessor; THREADS threads.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    all_gather(const __grid_constant__ Exchange e, float* out, const uint4* part, int rows, int width) {
    dependency_trigger();
    dependency_wait();
    Turn turn(e);
    const u32 step = gridDim.x * THREADS, stride = (u32)(e.set_bytes / 16 / RANKS);
    auto first_of = [&](u32 r) { return (u32)((u64)width * r / RANKS); };
    auto vectors_of = [&](u32 r) { return ((u32)rows * (first_of(r + 1) - first_of(r)) + 3) / 4; };
    const u32 mine = first_of(e.rank), columns = first_of(e.rank + 1) - mine, vectors = vectors_of(e.rank);
    const u32 most = ((u32)rows * ((u32)width / RANKS + 1) + 3) / 4;
    for (u32 at = blockIdx.x * THREADS + threadIdx.x; at < most; at += step * SENT) {
#pragma unroll
        for (u32 u = 0; u < SENT; u++) {
            const u32 i = at + u * step;
            if (i >= vectors) break;
            const uint4 v = part[i];
#pragma unroll
            for (u32 r = 0; r < RANKS; r++)
                if (r != e.rank) turn.send(r, e.rank * stride + i, exchange::sendable(v));
            place(out, rows, width, mine, columns, i, v);
        }
#pragma unroll
        for (u32 r = 0; r < RANKS; r++) {
            if (r == e.rank) continue;
            const u32 theirs = vectors_of(r), first = first_of(r);
#pragma unroll
            for (u32 u = 0; u < SENT; u++) {
                const u32 i = at + u * step;
                if (i >= theirs) break;
                const u32 slot = r * stride + i;
                place(out, rows, width, first, first_of(r + 1) - first, i, turn.receive(r, slot, exchange::load_slot(turn.slot(e.rank, slot))));
            }
        }
    }
    turn.end();
}
