// A token of each row of logits by the engine's rules, whatever they are, and log-probabilities: token for token what
// `baton_engine::sample` chooses from the same logits.
//
// Bias, bans and penalties touch few logits: they are changed in place. What then decides is order and sums. The order
// is that of ranks.cuh; weights are exp((logit - peak) / temperature) by the engine's polynomial, without fused
// multiply-add, in units of 2^-44: sums of integers need no order of their own. Kept is a prefix of the order:
//
//   top-k, top-p, the best few for log-probabilities: a list of the best tokens, sorted in shared memory. Which logit
//     has LIST_GOAL tokens at least above it is seen from each thread's best token: the LIST_GOAL-th of those is a bound.
//   where the list does not reach (top-k over LIST_GOAL, a nucleus of more tokens, thousands of equal logits): the rank
//     at which the prefix ends is searched digit by digit, 3 bits a pass over the row.
//
// Of the kept weights in order of ids, the one that holds the point bits/2^53 of their sum is drawn.
//
// Floor: rows * vocab * 4 bytes. Passes: the peak and threads' bests; weights and the list; one more for a search's draw.
// Some 25 instructions an exponential make a pass of one block 13 µs at 128,256 logits, so few rows get a cluster of blocks each.
//
// Grid: (blocks of a row, rows), on sm_90 in clusters of a row's blocks, else one block a row; THREADS threads.
//
// kernel sample spill_bytes_max=0
#include "cluster.cuh"
#include "ranks.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
#define GROUP 256     // logits a warp takes at a time
#define GROUPS_MAX 2048 // 2^19 logits: also what 64 bits hold of units
#define LIST_MAX 2048
#define LIST_GOAL 256
#define UNIT 17592186044416.0f // 2^44

// How a row is sampled; `sampling.rs` has the same.
struct Row {
    u64 bits;      // 53 random ones
    float inverse; // of the temperature; 0 takes the best token
    float top_p;   // 1: all
    float weight_min;
    u32 top_k; // 0: all
    float repetition, frequency, presence;
    u32 edits;                 // where its edits begin: biases, bans, counts
    u32 biases, bans, counts; // biases and counts in order of ids
    int pending;              // a row of the step whose token counts once more, or -1
    int given;                // the token that is asked about, or -1 for one to choose
    int top;                  // most likely tokens to report; -1: no log-probabilities
};

struct Edit {
    u32 token, value; // value: bits of a bias, or times in the output
};

struct Head {
    float peak, logit; // the largest logit, the token's
    u64 total;         // sum of exp(logit - peak), in units
};

struct Top {
    u32 token;
    float logit;
};

extern "C" __constant__ const int sample_launch[4] = {THREADS, LIST_GOAL, GROUPS_MAX * GROUP, 0};

namespace {

struct Shared {
    Row row;
    u64 list[LIST_MAX];
    u64 sums[GROUPS_MAX];
    u64 scratch[WARPS * 8];
    u32 scratch_counts[WARPS * 8];
    u64 box[2][16]; // what the cluster's other blocks read
    u64 all[16];    // box, over the cluster
    u64 before[16]; // box, over the blocks of lower rank
    u64 found, listed;
    u32 places;
};

// A block's part of a row.
struct Part {
    float* row;
    int vocab, first, end; // groups
    u32 rank, blocks;      // in the cluster
    int turn;              // which box is next
    bool aligned;
};

// The engine's `exp` for x <= 0.
DEVICE float exp_rounded(float x) {
    const float round = 12582912.0f;
    float bounded = x > -87.0f ? x : -87.0f;
    float shifted = __fadd_rn(__fmul_rn(bounded, 1.44269504088896340736f), round);
    float n = __fsub_rn(shifted, round);
    float r = __fsub_rn(__fsub_rn(bounded, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    float p = 1.0f / 720.0f;
    const float coefficients[6] = {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < 6; i++) p = __fadd_rn(__fmul_rn(p, r), coefficients[i]);
    float power = __uint_as_float((__float_as_uint(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : __fmul_rn(p, power);
}

// In units.
DEVICE u64 weight_of(float logit, float peak, float scale, float weight_min) {
    float weight = exp_rounded(__fmul_rn(__fsub_rn(logit, peak), scale));
    return weight < weight_min ? 0 : __float2ull_rn(weight * UNIT);
}

// The place of a lane's j-th logit of 8: two runs of four.
DEVICE int place_of(int group, int j) { return group * GROUP + j / 4 * 128 + threadIdx.x % 32 * 4 + j % 4; }

// Logits as they are; NaN beyond the end.
DEVICE void load(const Part& part, int group, float (&x)[8]) {
    if (part.aligned && (group + 1) * GROUP <= part.vocab) {
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            float4 four = *(const float4*)(part.row + place_of(group, j));
            x[j] = four.x, x[j + 1] = four.y, x[j + 2] = four.z, x[j + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int i = place_of(group, j);
            x[j] = i < part.vocab ? part.row[i] : __int_as_float(0x7fffffff);
        }
    }
}

// Calls `use` with each of a warp's groups; the next one's logits are on their way meanwhile.
template <class Use> DEVICE void each_group(const Part& part, Use use) {
    float x[8], next[8];
    int group = part.first + threadIdx.x / 32;
    if (group < part.end) load(part, group, next);
    for (; group < part.end; group += WARPS) {
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = next[j];
        if (group + WARPS < part.end) load(part, group + WARPS, next);
        use(group, x);
    }
}

DEVICE u64 warp_sum_u64(u64 x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Over the block, on every thread.
DEVICE u64 block_sum_u64(u64 x, Shared& shared) {
    x = warp_sum_u64(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.scratch[threadIdx.x / 32] = x;
    __syncthreads();
    u64 sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared.scratch[w];
    return sum;
}

// Sorts n numbers, a power of two, descending. Barriers before and after are its own. Pairs up to 32 apart are of one warp.
DEVICE void sort(u64* a, int n) {
    __syncthreads();
    int last_step = 0;
#pragma unroll 1
    for (int span = 2; span <= n; span *= 2) {
#pragma unroll 1
        for (int step = span / 2; step > 0; step /= 2) {
            if (step > 32 || last_step > 32) __syncthreads();
            else __syncwarp();
            last_step = step;
#pragma unroll 1
            for (int i = threadIdx.x; i < n / 2; i += THREADS) {
                int low = 2 * i - (i & (step - 1)), high = low + step;
                u64 x = a[low], y = a[high];
                if ((x < y) == ((low & span) == 0)) a[low] = y, a[high] = x;
            }
        }
    }
    __syncthreads();
}

// Inclusive sums of the first n numbers, at most 4 * THREADS, in place. Barriers before and after are its own.
DEVICE void scan(u64* a, int n, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = threadIdx.x * 4;
    __syncthreads();
    u64 x[4], sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = sum += first + j < n ? a[first + j] : 0;
    u64 before = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        u64 other = __shfl_up_sync(~0u, before, d);
        if (lane >= d) before += other;
    }
    if (lane == 31) shared.scratch[warp] = before;
    __syncthreads();
    before -= sum;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        if (w < warp) before += shared.scratch[w];
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (first + j < n) a[first + j] = before + x[j];
    __syncthreads();
}

DEVICE int power_of_two(int n) { return n <= 2 ? 2 : 1 << (32 - __clz(n - 1)); }

// The point `bits` / 2^53 of a weight.
DEVICE u64 share(u64 bits, u64 weight) { return __umul64hi(bits << 11, weight); }

DEVICE u64 mass_of(u64 total, float top_p) {
    return top_p < 1.0f ? __double2ull_rz(__dmul_rn(__ull2double_rn(total), (double)top_p)) : total;
}

// Fills `all` with the sums of `box[turn]` over the cluster, or, of its first numbers, the largest. Every thread of the block has
// written what it has to its block's box. Boxes of two turns on end differ, so one barrier of the cluster is enough.
DEVICE void gather(Shared& shared, Part& part, int largest) {
    cluster_sync();
    if (threadIdx.x < 16) {
        u64 sum = 0, before = 0;
        for (u32 block = 0; block < part.blocks; block++) {
            u64 x = cluster_load(&shared.box[part.turn][threadIdx.x], block);
            sum = (int)threadIdx.x < largest ? larger(sum, x) : sum + x;
            if (block < part.rank) before += x;
        }
        shared.all[threadIdx.x] = sum;
        shared.before[threadIdx.x] = before;
    }
    part.turn ^= 1;
    __syncthreads();
}

// Bias, bans, penalties, in this order, to the logits of this block's part.
DEVICE void edit(const Part& part, const Row& mine, const Edit* edits, const int* row_token) {
    const u32 first = part.first * GROUP, end = min(part.end * GROUP, part.vocab);
    auto inside = [&](u32 token) { return token >= first && token < end; };
    const Edit* biases = edits + mine.edits;
    for (u32 i = threadIdx.x; i < mine.biases; i += THREADS) {
        const u32 token = biases[i].token;
        // The first of a token's biases adds them all, in their order.
        if (!inside(token) || (i > 0 && biases[i - 1].token == token)) continue;
        float x = part.row[token];
        for (u32 k = i; k < mine.biases && biases[k].token == token; k++)
            x = __fadd_rn(x, __uint_as_float(biases[k].value));
        part.row[token] = x;
    }
    __syncthreads();
    const Edit* bans = biases + mine.biases;
    for (u32 i = threadIdx.x; i < mine.bans; i += THREADS)
        if (inside(bans[i].token)) part.row[bans[i].token] = -INFINITY;
    __syncthreads();
    const Edit* counts = bans + mine.bans;
    auto punish = [&](u32 token, u32 output) {
        if (!inside(token)) return;
        float x = part.row[token];
        x = x > 0.0f ? __fdiv_rn(x, mine.repetition) : __fmul_rn(x, mine.repetition);
        if (output > 0) {
            x = __fsub_rn(x, __fmul_rn(mine.frequency, __uint2float_rn(output)));
            x = __fsub_rn(x, mine.presence);
        }
        part.row[token] = x;
    };
    const u32 pending = mine.pending >= 0 ? (u32)row_token[mine.pending] : ~0u;
    bool counted = false;
    for (u32 i = threadIdx.x; i < mine.counts; i += THREADS) {
        const Edit count = counts[i];
        counted |= count.token == pending;
        punish(count.token, count.value + (count.token == pending));
    }
    if (!__syncthreads_or(counted) && threadIdx.x == 0 && mine.pending >= 0) punish(pending, 1);
    __syncthreads();
}

// Adds a token to the block's list. Tokens beyond LIST_MAX are counted only.
DEVICE void add_to_list(Shared& shared, u64 rank) {
    u32 place = atomicAdd(&shared.places, 1);
    if (place < LIST_MAX) shared.list[place] = rank;
}

// Puts the lists of the cluster's blocks together in its first block's and sorts it. All blocks have gathered since, and gather before
// they touch their lists again.
DEVICE void join_lists(Shared& shared, const Part& part, int listed) {
    __syncthreads();
    if (threadIdx.x < part.blocks) shared.scratch[threadIdx.x] = cluster_load(&shared.listed, threadIdx.x);
    __syncthreads();
    for (int i = (int)shared.scratch[0] + threadIdx.x; i < listed; i += THREADS) {
        int from = i;
        u32 block = 0;
        while (from >= (int)shared.scratch[block]) from -= (int)shared.scratch[block++];
        shared.list[i] = cluster_load(&shared.list[from], block);
    }
    const int padded = power_of_two(listed);
    for (int i = listed + threadIdx.x; i < padded; i += THREADS) shared.list[i] = 0;
    sort(shared.list, padded);
}

// The rank at which the shortest prefix ends that has `goal` tokens, or weight if `by_weight`; at least 1, and not more
// than there is. `kept`: the prefix's weight. Uses the list and the sums.
//
// Ranks from `base` on are cut in 8, the range in which the prefix ends is cut again, until it has so few tokens that they can be sorted.
__device__ __noinline__ u64
search(Shared& shared, Part& part, u64 peak_rank, float scale, bool by_weight, u64 goal, u64& kept) {
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const float peak = logit_of(peak_rank >> 32);
    // Below this logit there is no weight.
    u64 base = by_weight ? (u64)key_of(peak - 40.0f / scale) << 32 : 0, above = 0, above_weight = 0;
    int shift = max(0, 61 - __clzll(peak_rank - base));
    for (;;) {
        u64 sums[8];
        u32 counts[8];
#pragma unroll
        for (int d = 0; d < 8; d++) sums[d] = counts[d] = 0;
        each_group(part, [&](int group, const float (&x)[8]) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int i = place_of(group, j);
                u64 rank = rank_of(clean(x[j]), i), digit = (rank - base) >> shift;
                if (rank >= base && digit < 8 && i < part.vocab) {
                    u64 weight = weight_of(clean(x[j]), peak, scale, 0.0f);
#pragma unroll
                    for (int d = 0; d < 8; d++) {
                        sums[d] += d == digit ? weight : 0;
                        counts[d] += d == digit;
                    }
                }
            }
        });
#pragma unroll
        for (int d = 0; d < 8; d++) {
            sums[d] = warp_sum_u64(sums[d]);
            counts[d] = __reduce_add_sync(~0u, counts[d]);
            if (lane == 0) shared.scratch[warp * 8 + d] = sums[d], shared.scratch_counts[warp * 8 + d] = counts[d];
        }
        __syncthreads();
        if (tid < 8) {
            u64 sum = 0, count = 0;
            for (int w = 0; w < WARPS; w++) {
                sum += shared.scratch[w * 8 + tid];
                count += shared.scratch_counts[w * 8 + tid];
            }
            shared.box[part.turn][tid] = sum;
            shared.box[part.turn][8 + tid] = count;
        }
        gather(shared, part, 0);
        int digit = 7;
        for (; digit > 0; digit--) {
            u64 more = above + shared.all[by_weight ? digit : 8 + digit];
            if (more >= goal) break;
            above = more;
            above_weight += shared.all[digit];
        }
        base += (u64)digit << shift;
        kept = above_weight + shared.all[digit];
        const u64 count = shared.all[8 + digit];
        if (!by_weight && above + count == goal) return base;
        if (count <= LIST_MAX) break; // at 2^11 ranks at the latest
        shift -= 3;
    }
    if (tid == 0) shared.places = 0;
    __syncthreads();
    each_group(part, [&](int group, const float (&x)[8]) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int i = place_of(group, j);
            u64 rank = rank_of(clean(x[j]), i);
            if (rank >= base && (rank - base) >> shift == 0 && i < part.vocab) add_to_list(shared, rank);
        }
    });
    __syncthreads();
    if (tid == 0) shared.listed = shared.box[part.turn][0] = shared.places;
    gather(shared, part, 0);
    const int listed = (int)shared.all[0];
    if (tid == 0) shared.box[part.turn][0] = shared.box[part.turn][1] = 0;
    if (part.rank == 0) {
        join_lists(shared, part, listed);
        for (int i = tid; i < listed; i += THREADS)
            shared.sums[i] = weight_of(logit_of(shared.list[i] >> 32), peak, scale, 0.0f);
        scan(shared.sums, listed, shared);
        auto reaches = [&](int i) { return above + (by_weight ? shared.sums[i] : i + 1) >= goal; };
        for (int i = tid; i < listed; i += THREADS) {
            if (reaches(i) && (i == 0 || !reaches(i - 1))) {
                shared.box[part.turn][0] = shared.list[i];
                shared.box[part.turn][1] = above_weight + shared.sums[i];
            }
        }
    }
    gather(shared, part, 0);
    kept = shared.all[1];
    return shared.all[0];
}

} // namespace

// tokens [rows]: the best token of each row before (of logits that nobody has edited), the chosen one after, -1 if none is possible; logits
// [rows][vocab], which edits change; heads [rows] and tops [rows][tops_stride] of rows with log-probabilities; row_token: tokens
// of the step's rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    int* tokens, float* logits, const Row* rows, const Edit* edits, const int* row_token, Head* heads, Top* tops,
    int vocab, int tops_stride
) {
    __shared__ Shared shared;
    dependency_wait();
    const int at = blockIdx.y, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    if (tid < sizeof(Row) / 8) ((u64*)&shared.row)[tid] = ((const u64*)(rows + at))[tid];
    __syncthreads();
    const Row& mine = shared.row;
    const bool edited = mine.biases + mine.bans + mine.counts > 0 || mine.pending >= 0;
    const bool draws = mine.given < 0 && mine.inverse > 0.0f, reports = mine.top >= 0;
    if (!edited && !draws && !reports) return; // the best token is there

    Part part;
    part.rank = cluster_rank(), part.blocks = cluster_blocks(), part.turn = 0;
    part.row = logits + (size_t)at * vocab, part.vocab = vocab;
    part.aligned = vocab % 4 == 0;
    const int groups = (vocab + GROUP - 1) / GROUP, each = (groups + part.blocks - 1) / part.blocks;
    part.first = min((int)part.rank * each, groups), part.end = min(part.first + each, groups);

    // How many of the best tokens are listed.
    const bool top_k_listed = draws && mine.top_k > 0 && mine.top_k <= LIST_GOAL;
    const bool nucleus = draws && mine.top_k == 0 && mine.top_p < 1.0f;
    int goal = reports ? mine.top : 0;
    if (top_k_listed) goal = max(goal, (int)mine.top_k);
    if (nucleus) goal = LIST_GOAL;
    goal = min(goal, vocab);

    if (edited) edit(part, mine, edits, row_token);

    // The peak, and a bound that at least `goal` tokens reach.
    u64 peak_rank = 0, bound = 0;
    if (edited || goal > 0) {
        float best = -INFINITY;
        int best_at = 0;
        each_group(part, [&](int group, const float (&x)[8]) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float y = x[j] > LOGIT_MAX ? LOGIT_MAX : x[j];
                if (y > best) best = y, best_at = place_of(group, j); // ids ascend; false for NaN
            }
        });
        u64 top = best > -INFINITY ? rank_of(best, best_at) : 0;
        shared.list[tid] = top;
        const int its = (goal + part.blocks - 1) / part.blocks;
        if (goal > 0) {
            sort(shared.list, THREADS);
        } else {
            top = warp_larger(top);
            if (lane == 0) shared.scratch[warp] = top;
            __syncthreads();
            if (tid == 0) {
                for (int w = 1; w < WARPS; w++) top = larger(top, shared.scratch[w]);
                shared.list[0] = top;
            }
            __syncthreads();
        }
        // Each block has its share of `goal` tokens over the first bound, one block all of them over the second.
        if (tid == 0) {
            shared.box[part.turn][0] = shared.list[0];
            shared.box[part.turn][1] = goal > 0 ? ~(shared.list[its - 1] >> 32) : 0;
            shared.box[part.turn][2] = goal > 0 ? shared.list[goal - 1] >> 32 : 0;
        }
        gather(shared, part, 3);
        peak_rank = shared.all[0];
        bound = larger(~shared.all[1], shared.all[2]) << 32;
    } else {
        int token = tokens[at];
        peak_rank = token < 0 ? 0 : rank_of(clean(part.row[token]), token);
    }
    const float peak = logit_of(peak_rank >> 32);
    if (!possible(peak_rank)) {
        if (part.rank == 0 && tid == 0) {
            tokens[at] = -1;
            if (reports) heads[at] = Head{-INFINITY, -INFINITY, 0};
        }
        cluster_sync(); // nobody leaves while others read its memory
        return;
    }

    const float scale = draws ? mine.inverse : 1.0f;
    u64 rank_min = 0; // draws by groups are over all tokens of this rank and better
    u64 own = 0, total = 0, log_total = 0;
    int listed = 0;
    // Weights and the list, of which `own` is what this block's groups weigh.
    auto sweep = [&](bool list, bool sum, bool log, bool by_groups) {
        __syncthreads();
        if (tid == 0) shared.places = 0;
        __syncthreads();
        u64 sum_part = 0, log_part = 0;
        each_group(part, [&](int group, const float (&x)[8]) {
            u64 group_part = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int i = place_of(group, j);
                const float y = clean(x[j]); // beyond the end minus infinity: no weight
                if (sum) sum_part += weight_of(y, peak, scale, 0.0f);
                if (log) log_part += weight_of(y, peak, 1.0f, 0.0f);
                if (by_groups) {
                    const u64 weight = weight_of(y, peak, scale, mine.weight_min);
                    group_part += rank_min == 0 || rank_of(y, i) >= rank_min ? weight : 0;
                }
                if (list && rank_of(y, i) >= bound && i < vocab) add_to_list(shared, rank_of(y, i));
            }
            if (by_groups) {
                group_part = warp_sum_u64(group_part);
                if (lane == 0) shared.sums[group - part.first] = group_part, sum_part += group_part;
            }
        });
        sum_part = block_sum_u64(sum_part, shared);
        log_part = block_sum_u64(log_part, shared);
        if (tid == 0) {
            shared.listed = shared.places;
            shared.box[part.turn][0] = shared.places;
            shared.box[part.turn][1] = sum_part;
            shared.box[part.turn][2] = log_part;
        }
        gather(shared, part, 0);
        own = sum_part;
        if (list) listed = (int)min(shared.all[0], (u64)LIST_MAX + 1);
        if (sum || by_groups) total = shared.all[1];
        if (log) log_total = shared.all[2];
    };

    bool by_groups = draws && !top_k_listed && !nucleus;
    if (draws && mine.top_k > LIST_GOAL) {
        u64 weight;
        rank_min = search(shared, part, peak_rank, scale, false, mine.top_k, weight);
        if (mine.top_p < 1.0f)
            rank_min = search(shared, part, peak_rank, scale, true, larger(mass_of(weight, mine.top_p), 1), weight);
    }
    if (goal > 0 || reports || by_groups) sweep(goal > 0, nucleus, reports, by_groups);
    if (listed > LIST_MAX) { // many equals: the best `goal` exactly
        u64 weight;
        bound = search(shared, part, peak_rank, scale, false, goal, weight);
        sweep(true, false, false, by_groups);
    }

    int token = mine.given >= 0 ? mine.given : draws ? -1 : (int)token_of(peak_rank);
    if (goal > 0 && part.rank == 0) {
        join_lists(shared, part, listed);
        if (reports) {
            for (int i = tid; i < min(mine.top, vocab); i += THREADS)
                tops[(size_t)at * tops_stride + i] = Top{token_of(shared.list[i]), logit_of(shared.list[i] >> 32)};
        }
    }
    if (top_k_listed || nucleus) {
        if (part.rank == 0) {
            int kept = top_k_listed ? (int)mine.top_k : listed;
            auto weight_at = [&](int i, float weight_min) {
                return weight_of(logit_of(shared.list[i] >> 32), peak, scale, weight_min);
            };
            for (int i = tid; i < kept; i += THREADS) shared.sums[i] = weight_at(i, 0.0f);
            scan(shared.sums, kept, shared);
            if (mine.top_p < 1.0f) {
                const u64 mass = mass_of(nucleus ? total : shared.sums[kept - 1], mine.top_p);
                if (tid == 0) shared.found = 0;
                __syncthreads();
                for (int i = tid; i < kept; i += THREADS)
                    if (shared.sums[i] >= mass && (i == 0 || shared.sums[i - 1] < mass)) shared.found = i + 1;
                __syncthreads();
                kept = (int)shared.found;
            }
            __syncthreads();
            if (kept > 0) {
                // In order of ids: those descend in the upper bits.
                const int padded = power_of_two(kept);
                for (int i = tid; i < padded; i += THREADS) {
                    const u64 id = i < kept ? token_of(shared.list[i]) : 0;
                    shared.sums[i] = i < kept ? (0x7ffff - id) << 45 | weight_at(i, mine.weight_min) : 0;
                }
                sort(shared.sums, padded);
                for (int i = tid; i < kept; i += THREADS) {
                    const u64 both = shared.sums[i];
                    shared.list[i] = 0x7ffff - (both >> 45);
                    shared.sums[i] = both & ((1ull << 45) - 1);
                }
                scan(shared.sums, kept, shared);
                const u64 target = share(mine.bits, shared.sums[kept - 1]);
                for (int i = tid; i < kept; i += THREADS)
                    if (target < shared.sums[i] && (i == 0 || target >= shared.sums[i - 1])) shared.found = shared.list[i];
                __syncthreads();
                token = (int)shared.found;
            }
        }
    }
    if (nucleus) {
        if (tid == 0) shared.box[part.turn][0] = part.rank == 0 && token < 0;
        gather(shared, part, 0);
        if (shared.all[0]) { // the list does not reach
            u64 weight;
            rank_min = search(shared, part, peak_rank, scale, true, mass_of(total, mine.top_p), weight);
            by_groups = true;
            sweep(false, false, false, true);
        }
    }
    if (by_groups) {
        token = -1;
        u64 target = share(mine.bits, total);
        const u64 before = shared.before[1];
        if (target >= before && target - before < own) { // in this block's part
            target -= before;
            const int count = part.end - part.first;
            scan(shared.sums, count, shared);
            for (int i = tid; i < count; i += THREADS)
                if (target < shared.sums[i] && (i == 0 || target >= shared.sums[i - 1])) shared.found = i;
            __syncthreads();
            const int group = (int)shared.found;
            if (group > 0) target -= shared.sums[group - 1];
            if (warp == 0) {
                const int first = (part.first + group) * GROUP + lane * (GROUP / 32);
                u64 weights[GROUP / 32], sum = 0;
#pragma unroll
                for (int j = 0; j < GROUP / 32; j++) {
                    const int i = first + j;
                    const float x = i < vocab ? clean(part.row[i]) : -INFINITY;
                    const u64 weight = weight_of(x, peak, scale, mine.weight_min);
                    weights[j] = rank_of(x, i) >= rank_min ? weight : 0;
                    sum += weights[j];
                }
                u64 end = sum;
#pragma unroll
                for (int d = 1; d < 32; d *= 2) {
                    u64 other = __shfl_up_sync(~0u, end, d);
                    if (lane >= d) end += other;
                }
                if (target < end && target >= end - sum) {
                    target -= end - sum;
                    int j = 0;
#pragma unroll
                    for (int k = 0; k < GROUP / 32; k++) {
                        if (j == k && target >= weights[k]) target -= weights[k], j++;
                    }
                    shared.found = first + j;
                }
            }
            __syncthreads();
            token = (int)shared.found;
        }
    }
    // One block knows the token, or all of them do.
    const bool mine_to_tell = token >= 0 && (by_groups || part.rank == 0);
    if (tid == 0 && mine_to_tell) {
        tokens[at] = token;
        if (reports) heads[at] = Head{peak, clean(part.row[token]), log_total};
    }
    cluster_sync(); // nobody leaves while others read its memory
}
