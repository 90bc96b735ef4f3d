// Token embeddings into the f32 residual stream, and the angles of the rotary positions.
//
// Floor: rows * hidden * (2 + 4) bytes; microseconds at any step size. One block a row.
// The angles are taken in f64, as on every other executor: position 100,000 in f32 is off by 0.01 already.
//
// kernel embed spill_bytes_max=0
// kernel embed_scaled spill_bytes_max=0
// kernel angles spill_bytes_max=0
#include "scalar.cuh"

// The token of a row: its id, or -1 - i for what the step before chose as its i-th, which may be nothing (-1): then any will
// do, what follows it is thrown away. From then on it stands in row_token, for penalties. The whole block takes part.
DEVICE long long token_of(int* row_token, const int* chosen) {
    const int told = row_token[blockIdx.x];
    if (told >= 0) return told;
    const int token = max(chosen[-1 - told], 0);
    __syncthreads(); // all have read what they were told
    if (threadIdx.x == 0) row_token[blockIdx.x] = token;
    return token;
}

// The table [vocab][hidden], in parts one after the other; a part may lie on another GPU. As `Embedding` of model/weights.rs.
struct Table {
    const u16* parts[8];
    int vocab;
    int count;
};

DEVICE const u32* embedding_of(const Table& table, long long token, int hidden) {
    int part = 0;
    while (part + 1 < table.count && token >= (long long)table.vocab * (part + 1) / table.count) part++;
    return (const u32*)(table.parts[part] + (token - (long long)table.vocab * part / table.count) * hidden);
}

// x [rows][hidden]. `hidden` is even. Grid: rows.
extern "C" __global__ void embed(float* x, const __grid_constant__ Table table, int* row_token, const int* chosen, int hidden) {
    dependency_trigger();
    dependency_wait();
    const u32* from = embedding_of(table, token_of(row_token, chosen), hidden);
    float2* to = (float2*)(x + (long long)blockIdx.x * hidden);
    for (int i = threadIdx.x; i < hidden / 2; i += blockDim.x) to[i] = f32x2_of(from[i]);
}

// The same for a chain of skinny products, which divide by the norm at their ends: z = bf16(x * gamma), and the row's sum of
// squares in the first of its ceil(hidden / 64) places, zeros in the others. Grid: rows; 128 threads.
extern "C" __global__ void embed_scaled(
    float* x, u32* z, float* squares, const __grid_constant__ Table table, const u32* gamma, int* row_token, const int* chosen,
    int hidden
) {
    __shared__ float scratch[32];
    dependency_trigger();
    dependency_wait();
    const u32* from = embedding_of(table, token_of(row_token, chosen), hidden);
    long long row = blockIdx.x;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < hidden / 2; i += blockDim.x) {
        float2 v = f32x2_of(from[i]), g = f32x2_of(gamma[i]);
        ((float2*)x)[row * (hidden / 2) + i] = v;
        z[row * (hidden / 2) + i] = pack_bf16(v.x * g.x, v.y * g.y);
        sum += v.x * v.x + v.y * v.y;
    }
    sum = block_sum(sum, scratch);
    int places = (hidden + 63) / 64;
    for (int i = threadIdx.x; i < places; i += blockDim.x) squares[row * places + i] = i == 0 ? sum : 0.0f;
}

// rope_table [rows][half] of (cosine, sine); frequencies [half]. Grid: rows.
extern "C" __global__ void angles(float2* rope_table, const double* frequencies, const int* row_position, int half) {
    dependency_trigger();
    dependency_wait();
    double position = row_position[blockIdx.x];
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        double sine, cosine;
        sincos(position * frequencies[i], &sine, &cosine);
        rope_table[(long long)blockIdx.x * half + i] = make_float2((float)cosine, (float)sine);
    }
}
