// What cuBLASLt multiplies where weights are FP8: activations as e4m3 with a scale a row, made here from attention's output and
// (beside the operations that they follow) in rms_norm.cu and swiglu.cu; or, where a GPU or a format has no such product,
// the weights as BF16, made again for each product.
//
// Floors: quantise rows * count * (2 + 1) bytes, one block a row; dequantise outputs * inputs * (1 + 2) bytes, 16 numbers a thread.
//
// kernel quantise spill_bytes_max=0
// kernel dequantise spill_bytes_max=0
#include "e4m3.cuh"
#include "gemm_skinny.cuh"

// y [rows][count] e4m3; scale [rows], or [ceil(count / 128)][rows] where `groups` is not 0; x [rows][count] BF16; `count` a multiple
// of 16. Grid: rows; whole warps, at most 512 threads, 16 numbers each to stay in registers.
extern "C" __global__ void __launch_bounds__(512) quantise(uint2* y, float* scale, const uint4* x, int count, int groups) {
    __shared__ float scratch[32];
    dependency_trigger();
    dependency_wait();
    const long long row = blockIdx.x * (long long)(count / 8);
    auto load = [&](int i, float(&v)[8], bool) { f32x8_of(v, x[row + i]); };
    if (groups) {
        e4m3_groups(y + row, count, load, [&](int group, float most) { scale[group * gridDim.x + blockIdx.x] = most / 448.0f; });
    } else {
        float most = e4m3_row<2>(y + row, count, scratch, load);
        if (threadIdx.x == 0) scale[blockIdx.x] = most / 448.0f;
    }
}

// y [outputs][inputs] BF16 in the usual order from e4m3 weights; `inputs` a multiple of 16. `scale`: [outputs]; or with
// `blocks` 1 [ceil(outputs / 128)][ceil(inputs / 128)]; or with `blocks` 2, 8 rows of gate and of up in turn, gate's scales
// [ceil(outputs / 2 / 128)][ceil(inputs / 128)] and then up's. Grid: (outputs, ceil(inputs / 16 / 128)); 128 threads.
extern "C" __global__ void dequantise(uint4* y, const uint4* w, const float* scale, int inputs, int outputs, int blocks) {
    dependency_trigger();
    dependency_wait(); // whoever read y last
    const int i = blockIdx.y * 128 + threadIdx.x, row = blockIdx.x;
    if (i >= inputs / 16) return;
    const int column = i / 8, columns = (inputs + 127) / 128;
    float s;
    if (blocks == 0) {
        s = scale[row];
    } else if (blocks == 1) {
        s = scale[row / 128 * columns + column];
    } else {
        const int half = (outputs / 2 + 127) / 128;
        s = scale[((row & 8 ? half : 0) + (row / 16 * 8 + row % 8) / 128) * columns + column];
    }
    const long long at = (long long)row * (inputs / 16) + i;
    const uint4 bytes = w[at];
    const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    uint4 out[2]; // the first eight and the second
    u32* first = (u32*)&out[0];
    u32* second = (u32*)&out[1];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 even, odd;
        e4m3_pair(words[j], even, odd);
        first[j] = pack_bf16(bf16_low(even) * s, bf16_high(even) * s);
        second[j] = pack_bf16(bf16_low(odd) * s, bf16_high(odd) * s);
    }
    y[2 * at] = out[0];
    y[2 * at + 1] = out[1];
}
