// y = gate / (1 + exp(-gate)) * up, for gate and up columns that alternate (Shazeer, arXiv:2002.05202).
//
// Floor: rows * inner * (4 + 2) bytes. A thread makes four numbers: 16 bytes in, 8 out.
//
// kernel swiglu spill_bytes_max=0
#include "scalar.cuh"

// gate_up [count / inner][inner][gate, up]; y [count / inner][inner]; `count` numbers of y, a multiple of 4.
// Grid: ceil(count / 4 / 256); 256 threads.
extern "C" __global__ void swiglu(bf16* y, const bf16* gate_up, long long count) {
    let_successor_start();
    wait_for_predecessor();
    long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    if (i >= count / 4) return;
    uint4 pairs = ((const uint4*)gate_up)[i];
    unsigned in[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    float out[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float2 pair = f32x2_of(in[k]);
        out[k] = pair.x / (1.0f + expf(-pair.x)) * pair.y;
    }
    ((uint2*)y)[i] = make_uint2(bf16x2_of(out[0], out[1]), bf16x2_of(out[2], out[3]));
}
