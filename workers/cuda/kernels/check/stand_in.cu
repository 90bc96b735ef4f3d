// Stands for the small kernels of a step between two attention kernels. For timing only.
#include "common.cuh"

extern "C" __global__ void stand_in(const int* header, const int* lengths) {
    dependency_trigger();
    dependency_wait();
    if (header[0] < 0 && lengths[threadIdx.x] == 12345678) __trap();
}
