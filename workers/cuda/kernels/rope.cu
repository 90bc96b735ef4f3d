// What happens between the query-key-value product and attention: bias (Qwen2), norm per head (Qwen3), rotary positions in
// the half-split form, rounding, and the new keys and values into the arena. In decode steps attention_decode does the same itself.
//
// Floor: rows * (heads + 2 kv_heads) * head_dim * 4 bytes. One warp a head of a row; a block has four.
// HEAD_DIM (even) is a define; the arena is [block][kv_head][layer][K,V][token][head_dim].
//
// kernel rope spill_bytes_max=0
// variant HEAD_DIM=12
// variant HEAD_DIM=64
// variant HEAD_DIM=128
// variant HEAD_DIM=256
#include "scalar.cuh"

#define HALF (HEAD_DIM / 2)
#define EACH ((HALF + 31) / 32)

// qkv [rows][(heads + 2 kv_heads) * HEAD_DIM]; bias of a row's length, or null; q_norm, k_norm [HEAD_DIM], or null;
// rope_table [rows][HALF]; q [rows][heads][HEAD_DIM]; row_slot: block * block_tokens + offset, or negative for a row that is
// only there to fill a batch. Grid: (ceil((heads + 2 kv_heads) / 4), rows); 128 threads.
extern "C" __global__ void rope(
    const u16* qkv, const u16* bias, const u16* q_norm, const u16* k_norm, float eps, const float2* rope_table,
    const int* row_slot, u16* q, u16* arena, int heads, int kv_heads, int layers, int layer, int block_tokens
) {
    dependency_trigger();
    dependency_wait();
    int head = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    long long row = blockIdx.y;
    int all = heads + 2 * kv_heads;
    int slot = row_slot[row];
    if (head >= all || slot < 0) return;
    const u16* from = qkv + (row * all + head) * HEAD_DIM;
    float low[EACH], high[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        int i = lane + k * 32;
        bool inside = i < HALF;
        low[k] = inside ? f32_of(from[i]) : 0.0f;
        high[k] = inside ? f32_of(from[i + HALF]) : 0.0f;
        if (bias && inside) {
            low[k] += f32_of(bias[head * HEAD_DIM + i]);
            high[k] += f32_of(bias[head * HEAD_DIM + i + HALF]);
        }
    }
    bool is_query = head < heads, is_value = head >= heads + kv_heads;
    const u16* norm = is_query ? q_norm : k_norm;
    if (norm && !is_value) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < EACH; k++) sum += low[k] * low[k] + high[k] * high[k];
        float scale = 1.0f / sqrtf(warp_sum<32>(sum) / HEAD_DIM + eps);
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            int i = lane + k * 32;
            if (i < HALF) {
                low[k] *= scale * f32_of(norm[i]);
                high[k] *= scale * f32_of(norm[i + HALF]);
            }
        }
    }
    u16* to;
    if (is_query) {
        to = q + (row * heads + head) * HEAD_DIM;
    } else {
        long long kv_head = is_value ? head - heads - kv_heads : head - heads;
        long long block = slot / block_tokens, token = slot % block_tokens;
        to = arena + ((((block * kv_heads + kv_head) * layers + layer) * 2 + is_value) * block_tokens + token) * HEAD_DIM;
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        int i = lane + k * 32;
        if (i < HALF) {
            float2 turn = is_value ? make_float2(1.0f, 0.0f) : rope_table[row * HALF + i];
            to[i] = bf16_of(low[k] * turn.x - high[k] * turn.y);
            to[i + HALF] = bf16_of(high[k] * turn.x + low[k] * turn.y);
        }
    }
}
