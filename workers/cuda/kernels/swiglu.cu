// y = gate / (1 + exp(-gate)) * up, for columns that come as 8 of gate, 8 of up, 8 of gate … (Shazeer, arXiv:2002.05202).
//
// Floor: rows * inner * (4 + 2) bytes. A thread makes eight numbers: 32 bytes in, 16 out.
//
// kernel swiglu spill_bytes_max=0
#include "scalar.cuh"

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
