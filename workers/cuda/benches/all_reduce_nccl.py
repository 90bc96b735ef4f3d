"""NCCL's all-reduce, measured as all_reduce.rs measures ours: µs of one of 64 sums in a graph, BF16, the slowest rank's.

python3 all_reduce_nccl.py [RANKS]   needs torch with NCCL, and as many GPUs (2). NVLink multicast is left off.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SUMS, ROUNDS = 64, 9


def run(rank, ranks):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29511", rank=rank, world_size=ranks)
    if rank == 0:
        print(f"{ranks} × {torch.cuda.get_device_name()}, NCCL {torch.cuda.nccl.version()}: µs a sum", flush=True)
    for kib in (4, 16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 32 << 10, 64 << 10):
        x = torch.zeros(kib << 9, dtype=torch.bfloat16, device="cuda")
        replays = min(max((8 << 10) // kib, 2), 50)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                dist.all_reduce(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(SUMS):
                dist.all_reduce(x)
        graph.replay()
        times = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(replays):
                graph.replay()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        slowest = torch.tensor(times, dtype=torch.float64, device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if rank == 0:
            print(f"| {kib} | {slowest.median().item() * 1e6 / replays / SUMS:.2f} |", flush=True)
    torch.cuda.synchronize()
    os._exit(0)  # graphs hold the communicator; nothing is left to be tidied


if __name__ == "__main__":
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    mp.spawn(run, args=(ranks,), nprocs=ranks)
