// Attention over the paged arena, one warp per query row and head, KV token after KV token with a running maximum and sum
// (Milakov and Gimelshein, arXiv:1805.02867). Any even HEAD_DIM up to 256, any group, prefill and decode alike.
//
// This is the kernel for head sizes that the tensor-core kernels do not know, and what they are checked against. Every key and
// value is read by each row that sees it, so it is far from any floor on long prompts.
//
// kernel attention_plain spill_bytes_max=0
// variant HEAD_DIM=12
// variant HEAD_DIM=80
// variant HEAD_DIM=256
#include "scalar.cuh"

#define EACH ((HEAD_DIM + 31) / 32)

// q, out [rows][heads][HEAD_DIM]; arena [block][kv_head][layer][K,V][token][HEAD_DIM]; a row's sequence is found from
// seq_first_row and seq_rows. `scale` is log2(e) / sqrt(HEAD_DIM): weights are powers of two. `window` 0 sees everything.
// Grid: (ceil(heads / 4), rows); 128 threads.
extern "C" __global__ void attention_plain(
    const u16* q, const u16* arena, u16* out, const int* row_position, const int* seq_first_row, const int* seq_rows,
    const int* seq_table, const int* tables, int sequences, int heads, int kv_heads, int layers, int layer,
    int block_tokens, int window, float scale
) {
    dependency_trigger();
    dependency_wait();
    int head = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    int row = blockIdx.y;
    if (head >= heads) return;
    int before = 0, after = sequences; // the last sequence that begins at or before this row
    while (after - before > 1) {
        int middle = (before + after) / 2;
        if (seq_first_row[middle] <= row) before = middle; else after = middle;
    }
    u16* to = out + ((long long)row * heads + head) * HEAD_DIM;
    if (row - seq_first_row[before] >= seq_rows[before]) { // a row that is only there to fill a batch
        for (int i = lane; i < HEAD_DIM; i += 32) to[i] = 0;
        return;
    }
    const int* table = tables + seq_table[before];
    float query[EACH], sums[EACH], top = -__int_as_float(0x7f800000), total = 0.0f;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        int i = lane + k * 32;
        query[k] = i < HEAD_DIM ? f32_of(q[((long long)row * heads + head) * HEAD_DIM + i]) * scale : 0.0f;
        sums[k] = 0.0f;
    }
    int position = row_position[row];
    int from = window > 0 && position + 1 > window ? position + 1 - window : 0;
    long long kv_head = head / (heads / kv_heads);
    for (int token = from; token <= position; token++) {
        long long block = table[token / block_tokens];
        const u16* key = arena + ((((block * kv_heads + kv_head) * layers + layer) * 2) * block_tokens + token % block_tokens) * HEAD_DIM;
        const u16* value = key + block_tokens * HEAD_DIM;
        float score = 0.0f, values[EACH];
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            int i = lane + k * 32;
            score += i < HEAD_DIM ? query[k] * f32_of(key[i]) : 0.0f;
            values[k] = i < HEAD_DIM ? f32_of(value[i]) : 0.0f;
        }
        score = warp_sum<32>(score);
        if (score > top) {
            float decay = exp2f(top - score);
            top = score;
            total *= decay;
#pragma unroll
            for (int k = 0; k < EACH; k++) sums[k] *= decay;
        }
        float weight = exp2f(score - top);
        total += weight;
#pragma unroll
        for (int k = 0; k < EACH; k++) sums[k] += weight * values[k];
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        int i = lane + k * 32;
        if (i < HEAD_DIM) to[i] = bf16_of(sums[k] / total);
    }
}
