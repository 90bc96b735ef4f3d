// Decode attention: one query row a sequence against its paged KV, the work split evenly over the chip.
//
// kernel attention_decode spill_bytes_max=0
//
// Idea. The KV of a step is one list of tiles of 32 tokens, ordered [sequence][KV head][tile]. CTA i of a
// persistent grid takes the i-th equal piece of the list, whatever the lengths: prefix sums of seq_kv_len,
// computed by every CTA for itself, say where the piece begins. So the grid does not depend on lengths (a graph
// can be replayed with any), and nobody waits for the longest sequence. A (sequence, KV head) that lies in one
// piece is finished there; one that is cut leaves partial sums in the workspace, and the CTA that comes last
// adds them in the list's order: who is last does not change a bit of the result.
//
// The product is transposed: Sᵀ = K·qᵀ has tokens as the 16 rows of m16n8k16 and the GQA group as its 8 columns,
// and Oᵀ = Vᵀ·Pᵀ head_dim as rows: with a group of 4, half of the matrix unit's work is waste, where rows of
// queries would waste three quarters and 4 times the registers. Pᵀ becomes an operand by movmatrix, in registers.
//
// Each warp streams tiles of its own through its own ring of stages (sm_90: TMA with 128-byte swizzle, one
// mbarrier a stage; before: cp.async into the same layout): no warp waits for another but where a head ends.
// What a step does not write (all tiles but a sequence's last) is requested before griddepcontrol.wait.
//
// Floor: KV bytes / read bandwidth; per tile of 32 tokens and head 4·32·head_dim bytes. Arithmetic is some 15% of it.
//
// Defines: HEAD_DIM (multiple of 16, to 256), GROUP (query heads per KV head, 1..16), BLOCK_TOKENS (16, 32, 64).
// Launch: grid = multiprocessors, at most ATTENTION_GRID_MAX (160); threads and dynamic shared memory in the
// module's `attention_decode_launch` = {threads, shared bytes, sequences at most, grid at most}. Same grid in every launch that
// shares a workspace. PDL attribute welcome; graphs capture it.
// Workspace: `partial` f32 [2·grid·GROUP·(HEAD_DIM+2)]; `counters` i32 [sequences·kv_heads], zero before the first
// launch; the kernel leaves it zero.
// Tensor map (`map`, sm_90; zeros elsewhere), the same for both attention kernels: cuTensorMapEncodeTiled(
//   BFLOAT16, rank 2, address = arena, dims {HEAD_DIM, blocks·kv_heads·layers·2·BLOCK_TOKENS},
//   strides {HEAD_DIM·2}, box {64, min(BLOCK_TOKENS, 32)}, element strides {1, 1}, INTERLEAVE_NONE, SWIZZLE_128B,
//   L2_PROMOTION_L2_256B, OOB_FILL_NONE).
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

#define TMA_ROAD (BATON_ARCH >= 900)

namespace {

constexpr int kDim = HEAD_DIM;
constexpr int kParts = (kDim + 63) / 64; // column parts of 64: a row of one is a swizzle span of 128 bytes
constexpr int kSteps = (kDim + 15) / 16;
constexpr int kGroup = GROUP;
constexpr int kColumns = (kGroup + 7) / 8; // MMA column tiles
constexpr int kTile = 32;
constexpr int kBox = BLOCK_TOKENS < kTile ? BLOCK_TOKENS : kTile;
[[maybe_unused]] constexpr int kBoxes = kTile / kBox;
constexpr int kPartBytes = kTile * 128;
constexpr int kStageBytes = 2 * kParts * kPartBytes; // K, then V

constexpr int kSequencesMax = 1024;
constexpr int kGridMax = 160;
constexpr int kSharedMax = BATON_ARCH >= 900 ? 232448 : BATON_ARCH == 800 || BATON_ARCH == 870 ? 166912 : 101376;
constexpr int kWarps = kParts <= 2 && kSharedMax > 150000 ? 4 : 2;
constexpr int kThreads = 32 * kWarps;
constexpr int kStride = kDim + 4; // floats; keeps the scattered stores of Oᵀ free of bank conflicts

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
// Other warps' sums, and later the partial sums' maxima and totals.
constexpr int kMergeBytes = larger(kWarps * kGroup * kStride * 4, kGridMax * kGroup * 8);
constexpr int kMetaBytes = (2 * kSequencesMax + 4) * 4 + kWarps * kGroup * 8 + 16 + kWarps * 8 * 8;
constexpr int kStages = smaller(8, (kSharedMax - 1024 - kMergeBytes - kMetaBytes) / (kWarps * kStageBytes));
constexpr int kSharedBytes = 1024 + kWarps * kStages * kStageBytes + kMergeBytes + kMetaBytes;
static_assert(kStages >= 1, "shared memory");
static_assert(kDim % 16 == 0, "HEAD_DIM");

// A place in the list of tiles.
struct Cursor {
    int sequence, head, tile;

    DEVICE void advance(int tiles, const int* prefix, int kv_heads) {
        tile += tiles;
        for (;;) {
            int here = prefix[sequence + 1] - prefix[sequence];
            if (tile < here || sequence >= kSequencesMax) return;
            tile -= here;
            if (++head == kv_heads) {
                head = 0;
                sequence++;
            }
        }
    }
};

DEVICE int first_tile(int kv_len, int window) { return window > 0 && kv_len > window ? (kv_len - window) / kTile : 0; }

} // namespace

extern "C" __constant__ const int attention_decode_launch[4] = {kThreads, kSharedBytes, kSequencesMax, kGridMax};

// q, out: [sequence][query head][HEAD_DIM]. `header[sequences_at]`: how many sequences. scale: of q·k. window: tokens seen, 0 all.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
attention_decode(const __grid_constant__ TensorMap map, const bf16* __restrict__ q, bf16* __restrict__ out,
                 const bf16* __restrict__ arena, const int* __restrict__ header, const int* __restrict__ seq_kv_len,
                 const int* __restrict__ seq_table, const int* __restrict__ tables, float* partial, int* counters,
                 int sequences_at, int layer, int layers, int kv_heads, float scale, int window) {
    extern __shared__ u8 shared_raw[];
    u32 raw = shared_address(shared_raw);
    u8* shared = shared_raw + (((raw + 1023) & ~1023u) - raw);
    float* merge = (float*)(shared + kWarps * kStages * kStageBytes);
    float2* merge_ml = (float2*)((u8*)merge + kMergeBytes);
    int* prefix = (int*)(merge_ml + kWarps * kGroup);
    int* lengths = prefix + kSequencesMax + 1;
    int* scratch = lengths + kSequencesMax; // 1 + warps rounded up by the slack of kMetaBytes
    u32 barriers = (shared_address(scratch) + 3 * 4 + 7) & ~7u;

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int g = lane / 4, t = lane % 4;
    const u32 ring = shared_address(shared) + warp * kStages * kStageBytes;
    [[maybe_unused]] const u32 ring_barriers = barriers + warp * 8 * 8;

#if TMA_ROAD
    if (tid == 0) tma_prefetch_map(&map);
    if (lane < kStages) mbarrier_init(ring_barriers + lane * 8, 1);
    mbarrier_init_fence();
#endif

    // Tiles before each sequence: warp 0 scans 32 sequences at a time.
    const int sequences = header[sequences_at];
    if (warp == 0) {
        int before = 0;
        for (int base = 0; base < sequences; base += 32) {
            int s = base + lane, len = s < sequences ? seq_kv_len[s] : 0;
            int tiles = (len + kTile - 1) / kTile - first_tile(len, window), sum = tiles;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                int other = __shfl_up_sync(~0u, sum, d);
                if (lane >= d) sum += other;
            }
            if (s < sequences) {
                prefix[s] = before + sum - tiles;
                lengths[s] = len;
            }
            before += __shfl_sync(~0u, sum, 31);
        }
        if (lane == 0) prefix[sequences] = before;
    }
    __syncthreads();
    const long long total = (long long)prefix[sequences] * kv_heads;
    const int grid = gridDim.x;
    const int begin = (int)(total * blockIdx.x / grid), end = (int)(total * (blockIdx.x + 1) / grid);
    if (begin == end) {
        dependency_wait();
        return;
    }

    // Where this CTA's piece begins.
    Cursor here{0, 0, 0};
    {
        int low = 0, high = sequences; // the last sequence that begins at or before `begin`, and has tiles
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if ((long long)prefix[middle] * kv_heads <= begin) low = middle;
            else high = middle;
        }
        here.sequence = low;
        int rest = begin - prefix[low] * kv_heads, tiles = prefix[low + 1] - prefix[low];
        here.head = rest / tiles;
        here.tile = rest % tiles;
    }

    // --- the ring -----------------------------------------------------------------------------
    Cursor load = here;
    int load_at = begin + warp;
    int load_stage = 0;
    if (load_at < end) load.advance(warp, prefix, kv_heads);

    auto tile_of = [&](const Cursor& c) { return first_tile(lengths[c.sequence], window) + c.tile; };
    auto last_of = [&](const Cursor& c) { return (lengths[c.sequence] - 1) / kTile; };
    // The arena row (of HEAD_DIM elements) of K of box `box` of a tile; V is BLOCK_TOKENS rows on.
    auto arena_row = [&](const Cursor& c, int box) {
        int token = min(tile_of(c) * kTile + box * kBox, lengths[c.sequence] - 1) / kBox * kBox;
        int block = tables[seq_table[c.sequence] + token / BLOCK_TOKENS];
        return ((long long)(block * (long long)kv_heads + c.head) * layers + layer) * 2 * BLOCK_TOKENS + token % BLOCK_TOKENS;
    };
    // Requests the tile at the load cursor, and moves on. All lanes.
    auto issue = [&]() {
        u32 stage = ring + load_stage * kStageBytes;
#if TMA_ROAD
        u32 barrier = ring_barriers + load_stage * 8;
        if (lane == 0) mbarrier_arrive_expect(barrier, kStageBytes);
        __syncwarp();
        if (lane < 2 * kParts * kBoxes) {
            int part = lane % kParts, box = lane / kParts % kBoxes, kv = lane / (kParts * kBoxes);
            int row = (int)arena_row(load, box) + kv * BLOCK_TOKENS;
            tma_load_2d(stage + (kv * kParts + part) * kPartBytes + box * kBox * 128, &map, barrier, part * 64, row);
        }
#else
        constexpr int kChunks = kParts * 8; // of 16 bytes a row
#pragma unroll 4
        for (int i = lane; i < 2 * kTile * kChunks; i += 32) {
            int chunk = i % kChunks, token = i / kChunks % kTile, kv = i / (kChunks * kTile);
            long long row = arena_row(load, token / kBox) + token % kBox + kv * BLOCK_TOKENS;
            int part = chunk / 8, inside = (chunk % 8) ^ (token % 8);
            bool valid = chunk * 8 < kDim;
            const bf16* from = arena + row * kDim + (valid ? chunk * 8 : 0);
            cp_async_16(stage + (kv * kParts + part) * kPartBytes + token * 128 + inside * 16, from, valid);
        }
        cp_async_commit();
#endif
        load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
        load_at += kWarps;
        if (load_at < end) load.advance(kWarps, prefix, kv_heads);
    };

    // Earlier steps' tiles need not wait for this step's kernels.
    int filled = 0;
    while (filled < kStages && load_at < end && tile_of(load) != last_of(load)) {
        issue();
        filled++;
    }
    dependency_wait();
    dependency_trigger();
    for (; filled < kStages; filled++) {
        if (load_at < end) issue();
#if !TMA_ROAD
        else cp_async_commit();
#endif
    }

    const float scale_log2 = scale * 1.4426950408889634f;
    int stage_at = 0, mine = begin + warp;
    u32 parity = 0;

    // --- one (sequence, KV head) after the other -----------------------------------------------
    for (int at = begin; at < end;) {
        const int tiles = prefix[here.sequence + 1] - prefix[here.sequence];
        const int segment = at - here.tile;
        const int stop = min(end, segment + tiles);
        const int length = lengths[here.sequence];
        const int tile_base = first_tile(length, window);

        // qᵀ as the B operand: 16 rows of head_dim by 8 heads.
        u32 qb[kSteps][kColumns][2];
#pragma unroll
        for (int n = 0; n < kColumns; n++) {
            int head = n * 8 + g;
            const u32* from = (const u32*)(q + ((long long)here.sequence * kv_heads + here.head) * kGroup * kDim + head * kDim);
#pragma unroll
            for (int k = 0; k < kSteps; k++) {
                qb[k][n][0] = head < kGroup ? from[k * 8 + t] : 0;
                qb[k][n][1] = head < kGroup ? from[k * 8 + 4 + t] : 0;
            }
        }

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

        for (; mine < stop; mine += kWarps) {
            const u32 keys = ring + stage_at * kStageBytes, values = keys + kParts * kPartBytes;
#if TMA_ROAD
            mbarrier_wait(ring_barriers + stage_at * 8, parity);
#else
            cp_async_wait<kStages - 1>();
            __syncwarp();
#endif
            const int token_base = (tile_base + mine - segment) * kTile;
            const bool ragged = token_base + kTile > length;
            if (ragged) {
                // What lies behind a sequence's end is not its own, perhaps not even a number: 0·NaN is NaN.
                for (int row = length - token_base; row < kTile; row++)
                    for (int i = lane; i < kParts * 8; i += 32)
                        *(int4*)(shared + (values - shared_address(shared)) + (i / 8) * kPartBytes + row * 128 + (i % 8) * 16) =
                            make_int4(0, 0, 0, 0);
#if TMA_ROAD
                fence_proxy_async();
#endif
                __syncwarp();
            }

            float s[2][kColumns][4];
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int n = 0; n < kColumns; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[r][n][i] = 0;
            const u32 key_row = keys + ((lane & 7) + (lane & 8)) * 128;
#pragma unroll
            for (int k = 0; k < kSteps; k++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    u32 a[4];
                    ldmatrix_x4(a, key_row + (k / 4) * kPartBytes + r * 16 * 128 + ((((k % 4) * 2 + (lane >> 4)) ^ (lane & 7)) << 4));
#pragma unroll
                    for (int n = 0; n < kColumns; n++) mma_bf16(s[r][n], a, qb[k][n][0], qb[k][n][1]);
                }
            }

#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int n = 0; n < kColumns; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[r][n][i] *= scale_log2;
            if (ragged || (window > 0 && token_base < length - window)) {
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int n = 0; n < kColumns; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int token = token_base + r * 16 + g + (i / 2) * 8;
                            bool seen = token < length && (window <= 0 || token >= length - window);
                            if (!seen) s[r][n][i] = -INFINITY;
                        }
            }

            u32 pb[2][kColumns][2];
#pragma unroll
            for (int n = 0; n < kColumns; n++) {
                float rescale[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float x = fmaxf(fmaxf(s[0][n][j], s[0][n][j + 2]), fmaxf(s[1][n][j], s[1][n][j + 2]));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 16));
                    x = fmaxf(x, m[n][j]);
                    rescale[j] = exp2_approx(m[n][j] - x);
                    m[n][j] = x;
                    float sum = 0;
#pragma unroll
                    for (int r = 0; r < 2; r++)
#pragma unroll
                        for (int i = j; i < 4; i += 2) {
                            s[r][n][i] = exp2_approx(s[r][n][i] - x);
                            sum += s[r][n][i];
                        }
                    l[n][j] = l[n][j] * rescale[j] + sum;
                }
#pragma unroll
                for (int k = 0; k < kSteps; k++)
#pragma unroll
                    for (int i = 0; i < 4; i++) o[k][n][i] *= rescale[i & 1];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    pb[r][n][0] = movmatrix_trans(pack_bf16(s[r][n][0], s[r][n][1]));
                    pb[r][n][1] = movmatrix_trans(pack_bf16(s[r][n][2], s[r][n][3]));
                }
            }

            const u32 value_row = values + ((lane & 7) + (lane >> 4) * 8) * 128;
#pragma unroll
            for (int k = 0; k < kSteps; k++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    u32 a[4];
                    ldmatrix_x4_trans(a, value_row + (k / 4) * kPartBytes + r * 16 * 128 +
                                             ((((k % 4) * 2 + ((lane >> 3) & 1)) ^ (lane & 7)) << 4));
#pragma unroll
                    for (int n = 0; n < kColumns; n++) mma_bf16(o[k][n], a, pb[r][n][0], pb[r][n][1]);
                }
            }

            __syncwarp();
            if (load_at < end) issue();
#if !TMA_ROAD
            else cp_async_commit();
#endif
            if (++stage_at == kStages) {
                stage_at = 0;
                parity ^= 1;
            }
        }

        // --- the warps' sums of this head become one -------------------------------------------
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
                    if (g == 0) merge_ml[warp * kGroup + head] = make_float2(m[n][j], sum);
                    float* to = merge + (warp * kGroup + head) * kStride + g;
#pragma unroll
                    for (int k = 0; k < kSteps; k++) {
                        to[k * 16] = o[k][n][j];
                        to[k * 16 + 8] = o[k][n][j + 2];
                    }
                }
            }
        __syncthreads();

        const bool whole = at == segment && stop == segment + tiles;
        const int slot = 2 * blockIdx.x + (at == begin ? 0 : 1);
        float2* partial_ml = (float2*)(partial + 2ll * grid * kGroup * kDim);
        bf16* out_row = out + ((long long)here.sequence * kv_heads + here.head) * kGroup * kDim;
        for (int i = tid; i < kGroup * kDim / 4; i += kThreads) {
            int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
            float top = -INFINITY, sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; w++) top = fmaxf(top, merge_ml[w * kGroup + head].x);
            float4 acc = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int w = 0; w < kWarps; w++) {
                float2 ml = merge_ml[w * kGroup + head];
                float weight = exp2_approx(ml.x - top);
                float4 x = *(const float4*)(merge + (w * kGroup + head) * kStride + d);
                sum += weight * ml.y;
                acc.x += weight * x.x, acc.y += weight * x.y, acc.z += weight * x.z, acc.w += weight * x.w;
            }
            if (whole) {
                float inverse = 1.0f / sum;
                *(uint2*)(out_row + head * kDim + d) =
                    make_uint2(pack_bf16(acc.x * inverse, acc.y * inverse), pack_bf16(acc.z * inverse, acc.w * inverse));
            } else {
                *(float4*)(partial + ((long long)slot * kGroup + head) * kDim + d) = acc;
                if (d == 0) partial_ml[slot * kGroup + head] = make_float2(top, sum);
            }
        }

        if (!whole) {
            // CTA of a tile x: the one whose piece holds it.
            auto owner = [&](long long x) { return (int)(((x + 1) * grid - 1) / total); };
            const int first = owner(segment), last = owner(segment + tiles - 1), parts = last - first + 1;
            __threadfence();
            __syncthreads();
            if (tid == 0) {
                int* counter = counters + here.sequence * kv_heads + here.head;
                int arrived = atomicAdd(counter, 1);
                if (arrived == parts - 1) *counter = 0;
                scratch[0] = arrived == parts - 1;
            }
            __syncthreads();
            if (scratch[0]) {
                __threadfence();
                // The first CTA's piece of this head is its second, unless its list begins with this head.
                const int first_slot = 2 * first + (total * first / grid >= segment ? 0 : 1);
                float2* all_ml = (float2*)merge;
                for (int i = tid; i < parts * kGroup; i += kThreads) {
                    int p = i / kGroup, from = p == 0 ? first_slot : 2 * (first + p);
                    all_ml[i] = __ldcg(partial_ml + from * kGroup + i % kGroup);
                }
                __syncthreads();
                for (int i = tid; i < kGroup * kDim / 4; i += kThreads) {
                    int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
                    float top = -INFINITY, sum = 0;
                    for (int p = 0; p < parts; p++) top = fmaxf(top, all_ml[p * kGroup + head].x);
                    float4 acc = make_float4(0, 0, 0, 0);
#pragma unroll 8
                    for (int p = 0; p < parts; p++) {
                        int from = p == 0 ? first_slot : 2 * (first + p);
                        float4 x = __ldcg((const float4*)(partial + ((long long)from * kGroup + head) * kDim + d));
                        float2 ml = all_ml[p * kGroup + head];
                        float weight = exp2_approx(ml.x - top);
                        sum += weight * ml.y;
                        acc.x += weight * x.x, acc.y += weight * x.y, acc.z += weight * x.z, acc.w += weight * x.w;
                    }
                    float inverse = 1.0f / sum;
                    *(uint2*)(out_row + head * kDim + d) =
                        make_uint2(pack_bf16(acc.x * inverse, acc.y * inverse), pack_bf16(acc.z * inverse, acc.w * inverse));
                }
            }
        }
        __syncthreads();

        here.tile += stop - at;
        at = stop;
        if (at < end) here.advance(0, prefix, kv_heads);
    }
}
