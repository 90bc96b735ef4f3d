// Thread block clusters: blocks that run at once and read each other's shared memory. Before sm_90 a block is alone.
#pragma once

#include "common.cuh"

#if BATON_ARCH >= 900
DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE u32 cluster_blocks() {
    u32 blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}
// A barrier of all threads of the cluster; what they wrote to shared memory before is seen after.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
// A number in another block's shared memory, at the place where `own` is in this block's.
DEVICE u64 cluster_load(const u64* own, u32 rank) {
    u64 x;
    asm volatile("{\n.reg .u32 a;\nmapa.shared::cluster.u32 a, %1, %2;\nld.shared::cluster.u64 %0, [a];\n}"
                 : "=l"(x)
                 : "r"(shared_address(own)), "r"(rank)
                 : "memory");
    return x;
}
#else
DEVICE u32 cluster_rank() { return 0; }
DEVICE u32 cluster_blocks() { return 1; }
DEVICE void cluster_sync() { __syncthreads(); }
DEVICE u64 cluster_load(const u64* own, u32) { return *own; }
#endif
