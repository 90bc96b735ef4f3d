// y = gate / (1 + exp(-gate)) * up, for columns that come as 8 of gate, 8 of up, 8 of gate … (Shazeer, arXiv:2002.05202).
//
// Floor: rows * inner * (4 + 2) bytes. A thread makes eight numbers: 32 bytes in, 16 out.
//
// Into e4m3 with a scale a row (e4m3.cuh): rows * inner * (4 + 1) bytes, one block a row.
//
// kernel swiglu spill_bytes_max=0
// kernel swiglu_e4m3 spill_bytes_max=0
#include "e4m3.cuh"

DEVICE u32 pair(u32 gates, u32 ups) {
    float2 gate = f32x2_of(gates), up = f32x2_of(ups);
    return pack_bf16(gate.x / (1.0f + __expf(-gate.x)) * up.x, gate.y / (1.0f + __expf(-gate.y)) * up.y);
}

// `count` numbers of y, a multiple of 8; gate_up has twice as many. Grid: ceil(count / 8 / 256); 256 threads.
extern "C" __global__ void swiglu(uint4* y, const uint4* gate_up, long long count) {
    dependency_trigger();
    dependency_wait();
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    if (i >= count / 8) return;
    uint4 gate = gate_up[2 * i], up = gate_up[2 * i + 1];
    y[i] = make_uint4(pair(gate.x, up.x), pair(gate.y, up.y), pair(gate.z, up.z), pair(gate.w, up.w));
}

// y [rows][inner] e4m3; scale [rows], or [ceil(inner / 128)][rows] where `groups` is not 0; gate_up [rows][2 * inner]; `inner` a
// multiple of 16. Grid: rows; whole warps, at most 512 threads, 32 numbers each to stay in registers.
extern "C" __global__ void __launch_bounds__(512) swiglu_e4m3(uint2* y, float* scale, const uint4* gate_up, int inner, int groups) {
    __shared__ float scratch[32];
    dependency_trigger();
    dependency_wait();
    const long long row = blockIdx.x * (long long)(inner / 8);
    auto load = [&](int i, float(&v)[8], bool) {
        float gate[8];
        f32x8_of(gate, gate_up[2 * (row + i)]);
        f32x8_of(v, gate_up[2 * (row + i) + 1]);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= __fdividef(gate[j], 1.0f + __expf(-gate[j])); // 0 where the exponential is over 2^126
    };
    if (groups) {
        e4m3_groups(y + row, inner, load, [&](int group, float most) { scale[group * gridDim.x + blockIdx.x] = most / 448.0f; });
    } else {
        float most = e4m3_row<4>(y + row, inner, scratch, load);
        if (threadIdx.x == 0) scale[blockIdx.x] = most / 448.0f;
    }
}
