//! CPU executors as the acceptance tests want them.

#![allow(dead_code)] // each test uses its part

use std::sync::Arc;

use baton_cpu::{CpuExecutor, CpuOptions, HeapMemory, Kernel};
use baton_engine::kv_geometry;
use baton_executor_tests::{Build, STEP_SEQUENCES_MAX, STEP_TOKENS_MAX};
use baton_kv_memory::KvMemory;

/// Kernels of this CPU.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|k| k.available())
}

/// An executor whose arena starts as NaN everywhere: what is read and was not written shows.
pub fn executor(kernel: Kernel, threads: usize, build: Build<'_>) -> CpuExecutor {
    let kv = kv_geometry(build.spec, build.block_tokens);
    let memory = HeapMemory::new(build.blocks * kv.block_bytes());
    let base = memory.address().host().expect("host memory");
    // SAFETY: the arena is this function's alone until the executor takes it.
    unsafe { base.write_bytes(0xff, memory.len()) };
    let options = CpuOptions {
        threads,
        kernel: Some(kernel),
        step_tokens_max: STEP_TOKENS_MAX,
        step_sequences_max: STEP_SEQUENCES_MAX,
    };
    CpuExecutor::load_from(build.spec, build.weights, Arc::new(memory), kv, options)
        .expect("it loads")
}
