// A token of each row of logits by the engine's rules, whatever they are, and log-probabilities: token for token what
// `baton_engine::sample` chooses from the same logits.
//
// Bias, bans and penalties touch few logits: they are changed in place. A mask, a bit a token, gives all logits that it does not allow
// minus infinity: vocab / 8 bytes more are read, and up to vocab * 4 written. What then decides is order and sums. The order
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
#include "sample_search.cuh"

extern "C" __constant__ const int sample_launch[4] = {THREADS, LIST_GOAL, GROUPS_MAX * GROUP, 0};

namespace {

// Bias, bans, penalties, the mask, in this order, to the logits of this block's part.
DEVICE void edit(const Part& part, const Row& mine, const Edit* edits, const u32* masks, const int* row_token) {
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
    if (mine.mask >= 0) {
        const u32* mask = masks + (size_t)mine.mask * ((part.vocab + 31) / 32);
        for (u32 i = first + threadIdx.x; i < end; i += THREADS)
            if (!(mask[i / 32] >> (i % 32) & 1)) part.row[i] = -INFINITY;
        __syncthreads();
    }
}

} // namespace

// tokens [rows]: the best token of each row before (of logits that nobody has edited), the chosen one after, -1 if none is possible; logits
// [rows][vocab], which edits change; heads [rows] and tops [rows][tops_stride] of rows with log-probabilities; row_token: tokens
// of the step's rows; masks [..][ceil(vocab / 32)]: of the rows that have one.
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    int* tokens, float* logits, const Row* rows, const Edit* edits, const u32* masks, const int* row_token,
    Head* heads, Top* tops, int vocab, int tops_stride
) {
    __shared__ Shared shared;
    dependency_wait();
    const int at = blockIdx.y, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    if (tid < sizeof(Row) / 8) ((u64*)&shared.row)[tid] = ((const u64*)(rows + at))[tid];
    __syncthreads();
    const Row& mine = shared.row;
    const bool edited = mine.biases + mine.bans + mine.counts > 0 || mine.pending >= 0 || mine.mask >= 0;
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

    if (edited) edit(part, mine, edits, masks, row_token);

    // The peak, and a bound that at least `goal` tokens reach.
    u64 peak_rank = 0, bound = 0;
    float lowest = -INFINITY;
    if (edited || goal > 0) {
        float best = -INFINITY, worst = INFINITY;
        int best_at = 0;
        each_group(part, [&](int group, const float (&x)[8]) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float y = x[j] > LOGIT_MAX ? LOGIT_MAX : x[j];
                if (y > best) best = y, best_at = place_of(group, j); // ids ascend; false for NaN
                if (y < worst && y > -INFINITY) worst = y;
            }
        });
        u64 top = best > -INFINITY ? rank_of(best, best_at) : 0;
        shared.list[tid] = top;
        const int its = (goal + part.blocks - 1) / part.blocks;
        const u32 lowest_key = __reduce_min_sync(~0u, key_of(worst));
        if (lane == 0) shared.scratch_counts[warp] = lowest_key;
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
            u32 lowest_key = shared.scratch_counts[0];
            for (int w = 1; w < WARPS; w++) lowest_key = min(lowest_key, shared.scratch_counts[w]);
            shared.box[part.turn][3] = ~(u64)lowest_key;
        }
        gather(shared, part, 4);
        lowest = logit_of((u32)~shared.all[3]);
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
            // One thing for all eight after the other: eight chains of arithmetic beside each other. Beyond the end there is minus
            // infinity, which has no weight.
            float y[8];
#pragma unroll
            for (int j = 0; j < 8; j++) y[j] = clean(x[j]);
            if (sum) {
#pragma unroll
                for (int j = 0; j < 8; j++) sum_part += weight_of(y[j], peak, scale, 0.0f);
            }
            if (log) {
#pragma unroll
                for (int j = 0; j < 8; j++) log_part += weight_of(y[j], peak, 1.0f, 0.0f);
            }
            if (list) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const int i = place_of(group, j);
                    if (rank_of(y[j], i) >= bound && i < vocab) add_to_list(shared, rank_of(y[j], i));
                }
            }
            u64 group_part = 0;
            if (by_groups) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const u64 weight = weight_of(y[j], peak, scale, mine.weight_min);
                    group_part += rank_min == 0 || rank_of(y[j], place_of(group, j)) >= rank_min ? weight : 0;
                }
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
        rank_min = search(shared, part, peak_rank, lowest, scale, false, mine.top_k, weight);
        if (mine.top_p < 1.0f)
            rank_min = search(shared, part, peak_rank, lowest, scale, true, larger(mass_of(weight, mine.top_p), 1), weight);
    }
    if (goal > 0 || reports || by_groups) sweep(goal > 0, nucleus, reports, by_groups);
    if (listed > LIST_MAX) { // many equals: the best `goal` exactly
        u64 weight;
        bound = search(shared, part, peak_rank, lowest, scale, false, goal, weight);
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
            rank_min = search(shared, part, peak_rank, lowest, scale, true, mass_of(total, mine.top_p), weight);
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
