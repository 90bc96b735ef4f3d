//! CPU executors as the acceptance tests want them.

#![allow(dead_code)] // each test uses its part

use std::sync::Arc;

use baton_cpu::{CpuExecutor, CpuOptions, HeapMemory, Kernel};
use baton_engine::kv_geometry;
use baton_executor_tests::{Build, STEP_SEQUENCES_MAX, STEP_TOKENS_MAX};
use baton_kv_memory::KvMemory;
use baton_model::{RankSource, TensorSource};
use baton_protocol::KvShares;

/// Kernels of this CPU.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|k| k.available())
}

/// The kernel that a worker would take: `BATON_CPU_KERNEL`, or the best.
pub fn chosen() -> Kernel {
    Kernel::chosen().expect("a kernel that this CPU has")
}

/// An executor whose arena starts as NaN everywhere: what is read and was not written shows.
pub fn executor(kernel: Kernel, threads: usize, build: Build<'_>) -> CpuExecutor {
    ranks(kernel, threads, 1, build).0
}

/// The same of so many ranks, and their arenas.
pub fn ranks(
    kernel: Kernel,
    threads: usize,
    ranks: usize,
    build: Build<'_>,
) -> (CpuExecutor, Vec<Arc<dyn KvMemory>>) {
    let kv = kv_geometry(build.spec, build.block_tokens);
    let shares = KvShares::parallel(&kv, ranks as u32, 1);
    let memory = |rank| -> Arc<dyn KvMemory> {
        let bytes = build.blocks * shares.block_bytes(&kv, rank) as usize;
        let memory = HeapMemory::new(bytes);
        let base = memory.address().host().expect("host memory");
        // SAFETY: the arena is this function's alone until the executor takes it.
        unsafe { base.write_bytes(0xff, memory.len()) };
        Arc::new(memory)
    };
    let memories: Vec<_> = (0..ranks).map(memory).collect();
    let options = CpuOptions {
        threads,
        kernel: Some(kernel),
        step_tokens_max: STEP_TOKENS_MAX,
        step_sequences_max: STEP_SEQUENCES_MAX,
    };
    let source = |rank| RankSource::new(build.weights, build.spec, rank, ranks);
    let sources: Vec<_> = (0..ranks).map(source).collect();
    let sources: Vec<&dyn TensorSource> = sources.iter().map(|source| source as _).collect();
    let executor = CpuExecutor::load(build.spec, &sources, memories.clone(), kv, options);
    (executor.expect("it loads"), memories)
}
