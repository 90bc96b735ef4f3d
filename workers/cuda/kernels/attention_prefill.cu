// Prefill attention on any architecture from sm_80: causal flash attention over pages, mma.sync and cp.async.
//
// kernel attention_prefill spill_bytes_max=128
// variant HEAD_DIM=128 GROUP=4 BLOCK_TOKENS=32
// variant HEAD_DIM=64 GROUP=3 BLOCK_TOKENS=16
// variant HEAD_DIM=256 GROUP=8 BLOCK_TOKENS=64
//
// Idea. The GQA group is packed into the rows: a work unit is kTokens = 64/GROUP rows of one sequence times the GROUP
// query heads of one KV head, so K and V are read once for the group, and few rows of a sequence (a chunk of a
// prompt, one row of a decode) still fill the matrix unit. Four warps own 16 packed rows each, q in registers;
// tiles of K and V go through two stages of shared memory, 128-byte swizzled by hand, one being filled while
// the other is used. Softmax in base 2, running maximum and sum, f32.
//
// sm_90a has attention_prefill_sm90 (same arguments, other work units), which is several times faster; this one
// is for the rest, and for head sizes beyond that one.
//
// Floor: 4·head_dim·(pairs of row and key seen)·heads operations over the mma.sync rate.
//
// Defines: HEAD_DIM (multiple of 16, to 256), GROUP (1..16), BLOCK_TOKENS (16, 32, 64).
// Launch: `attention_prefill_launch` = {threads, dynamic shared bytes, rows of a sequence per work unit, 0}; grid =
// work_count·kv_heads. `work`: {sequence, first row within it} for every unit of launch[2] rows of every sequence, longest
// reach (position of the unit's last row) first. `map` and `query_map` are not used.
#include "attention.cuh"

namespace {

constexpr int kRows = 64; // packed rows
constexpr int kTokens = kRows / GROUP;
constexpr int kTile = kParts <= 2 ? 64 : 32; // keys
constexpr int kPartBytes = kTile * 128;
constexpr int kStageBytes = 2 * kParts * kPartBytes;
constexpr int kThreads = 128;
constexpr int kSharedBytes = 1024 + 2 * kStageBytes;

} // namespace

extern "C" __constant__ const int attention_prefill_launch[4] = {kThreads, kSharedBytes, kTokens, 0};

// q, out: [row][query head][HEAD_DIM]. A row at position p sees positions p-window+1 ..= p (window 0: all before).
extern "C" __global__ void __launch_bounds__(kThreads)
attention_prefill(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap query_map, const bf16* __restrict__ q, bf16* __restrict__ out,
                  const bf16* __restrict__ arena, const int2* __restrict__ work, const int* __restrict__ seq_first_row,
                  const int* __restrict__ seq_rows, const int* __restrict__ seq_kv_len, const int* __restrict__ seq_table,
                  const int* __restrict__ tables, int work_count, int layer, int layers, int kv_heads, float scale,
                  int window) {
    extern __shared__ u8 shared_raw[];
    const u32 ring = (shared_address(shared_raw) + 1023) & ~1023u;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const float scale_log2 = scale * kLog2E;

    dependency_wait();
    dependency_trigger();

    for (int item = blockIdx.x; item < work_count * kv_heads; item += gridDim.x) {
        const int2 unit = work[item / kv_heads];
        const int head = item % kv_heads, sequence = unit.x;
        const int length = seq_kv_len[sequence], rows = seq_rows[sequence];
        const int count = min(kTokens, rows - unit.y);
        const int start = length - rows + unit.y; // position of the unit's first row
        const long long row0 = seq_first_row[sequence] + unit.y;
        const int* table = tables + seq_table[sequence];
        const int tile_end = (start + count - 1) / kTile + 1;
        const int tile_begin = window > 0 ? max(0, start - window + 1) / kTile : 0;

        auto request = [&](int tile, int stage) {
            constexpr int kChunks = kParts * 8;
#pragma unroll 4
            for (int i = tid; i < 2 * kTile * kChunks; i += kThreads) {
                int chunk = i % kChunks, row = i / kChunks % kTile, kv = i / (kChunks * kTile);
                int token = tile * kTile + row;
                bool valid = token < length && chunk * 8 < kDim;
                int near = min(token, length - 1);
                int block = table[near / BLOCK_TOKENS];
                const long long from_row = Layer{kv_heads, layers, layer}.key_row(block, head, near) + kv * BLOCK_TOKENS;
                const bf16* from = arena + from_row * kDim + (valid ? chunk * 8 : 0);
                cp_async_16(ring + stage * kStageBytes + (kv * kParts + chunk / 8) * kPartBytes + row * 128 +
                                ((chunk % 8 ^ row % 8) * 16),
                            from, valid);
            }
            cp_async_commit();
        };
        request(tile_begin, 0);

        // Packed row → row of the step and query head; rows beyond the unit repeat its last and are not stored.
        int row_token[2];
        const bf16* row_q[2];
        u32 qa[kSteps][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int packed = warp * 16 + g + r * 8;
            row_token[r] = min(packed / GROUP, count - 1);
            row_q[r] = q + ((row0 + row_token[r]) * kv_heads + head) * (GROUP * kDim) + packed % GROUP * kDim;
        }
#pragma unroll
        for (int k = 0; k < kSteps; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) qa[k][i] = *(const u32*)(row_q[i & 1] + k * 16 + (i / 2) * 8 + 2 * t);

        float o[kSteps * 2][4], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < kSteps * 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] = 0;

        for (int tile = tile_begin; tile < tile_end; tile++) {
            const u32 keys = ring + ((tile - tile_begin) & 1) * kStageBytes, values = keys + kParts * kPartBytes;
            if (tile + 1 < tile_end) {
                request(tile + 1, (tile + 1 - tile_begin) & 1);
                cp_async_wait<1>();
            } else {
                cp_async_wait<0>();
            }
            __syncthreads();

            float s[kTile / 8][4];
#pragma unroll
            for (int n = 0; n < kTile / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[n][i] = 0;
#pragma unroll
            for (int k = 0; k < kSteps; k++)
#pragma unroll
                for (int n = 0; n < kTile / 16; n++) {
                    u32 b[4];
                    int row = n * 16 + (lane & 7) + (lane >> 4) * 8;
                    ldmatrix_x4(b, keys + (k / 4) * kPartBytes + row * 128 + ((((k % 4) * 2 + ((lane >> 3) & 1)) ^ (lane & 7)) << 4));
                    mma_bf16(s[2 * n], qa[k], b[0], b[1]);
                    mma_bf16(s[2 * n + 1], qa[k], b[2], b[3]);
                }

            const int first = tile * kTile;
            const bool edge = first + kTile - 1 > start || (window > 0 && first <= start + count - 1 - window);
#pragma unroll
            for (int n = 0; n < kTile / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[n][i] *= scale_log2;
                    if (edge) {
                        int token = first + n * 8 + 2 * t + (i & 1), position = start + row_token[i / 2];
                        if (token > position || (window > 0 && token <= position - window)) s[n][i] = -INFINITY;
                    }
                }

#pragma unroll
            for (int r = 0; r < 2; r++) {
                float top = m[r];
#pragma unroll
                for (int n = 0; n < kTile / 8; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
                top = warp_max<4>(top);
                float base = top == -INFINITY ? 0 : top; // nothing seen yet: window behind this tile
                float rescale = exp2_approx(m[r] - base), sum = 0;
                m[r] = top;
#pragma unroll
                for (int n = 0; n < kTile / 8; n++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++) {
                        s[n][i] = exp2_approx(s[n][i] - base);
                        sum += s[n][i];
                    }
                l[r] = l[r] * rescale + sum;
#pragma unroll
                for (int n = 0; n < kSteps * 2; n++) {
                    o[n][2 * r] *= rescale;
                    o[n][2 * r + 1] *= rescale;
                }
            }

#pragma unroll
            for (int k = 0; k < kTile / 16; k++) {
                u32 p[4] = {pack_bf16(s[2 * k][0], s[2 * k][1]), pack_bf16(s[2 * k][2], s[2 * k][3]),
                            pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]), pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
                for (int n = 0; n < kSteps; n++) {
                    u32 b[4];
                    int row = k * 16 + (lane & 15);
                    ldmatrix_x4_trans(b, values + (n / 4) * kPartBytes + row * 128 + ((((n % 4) * 2 + (lane >> 4)) ^ (lane & 7)) << 4));
                    mma_bf16(o[2 * n], p, b[0], b[1]);
                    mma_bf16(o[2 * n + 1], p, b[2], b[3]);
                }
            }
            __syncthreads();
        }

#pragma unroll
        for (int r = 0; r < 2; r++) {
            int packed = warp * 16 + g + r * 8;
            float inverse = 1.0f / warp_sum<4>(l[r]);
            if (packed < count * GROUP) {
                bf16* to = out + (row_q[r] - q);
#pragma unroll
                for (int n = 0; n < kSteps * 2; n++)
                    *(u32*)(to + n * 8 + 2 * t) = pack_bf16(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
            }
        }
    }
}
