//! Ceilings of this machine, products, and whole steps of a real model.
//!
//! `BATON_BENCH_MODEL=<prepared model directory> cargo bench -p baton-cpu`; without it, only the ceilings and
//! the products. `BATON_BENCH_THREADS` (default 2) sets the threads; with one, processor time is measured, which
//! programs beside it disturb less. `BATON_CPU_KERNEL` sets the kernel, `BATON_BENCH_CONTEXT` the tokens before a
//! decode step (default and most: 512). With `BATON_BENCH_PREFILL_ONLY` there is no decode.

use std::sync::Arc;
use std::time::Instant;

use baton_cpu::probe::{Gemm, peak_flops, read_bandwidth, seconds};
use baton_cpu::{CpuExecutor, CpuOptions, HeapMemory, Kernel};
use baton_engine::{Executor, SampleRequest, SequenceStep, StepPlan, kv_geometry};
use baton_model::ModelDir;

fn main() {
    let threads = std::env::var("BATON_BENCH_THREADS").map_or(2, |t| t.parse().expect("a number"));
    let kernel = Kernel::chosen().expect("a kernel that this CPU has");
    println!("kernel {kernel}, {threads} threads");
    let bandwidth = read_bandwidth(threads, 1 << 30, 5);
    println!("read bandwidth, 1 GiB       {:8.1} GB/s", bandwidth / 1e9);
    let peak = peak_flops(kernel) * threads as f64;
    println!("peak of its products        {:8.0} GFLOP/s", peak / 1e9);
    products(kernel, threads, peak, bandwidth);
    if let Ok(path) = std::env::var("BATON_BENCH_MODEL") {
        model(&path, kernel, threads, bandwidth, peak);
    } else {
        println!("BATON_BENCH_MODEL is not set: no model figures");
    }
}

/// The products of one SmolLM2-135M layer; weights in the caches for many rows, from memory for few.
fn products(kernel: Kernel, threads: usize, peak: f64, bandwidth: f64) {
    let shapes = [
        ("qkv", 576, 960),
        ("o", 576, 576),
        ("gate+up", 576, 3072),
        ("down", 1536, 576),
    ];
    for (name, k, columns) in shapes {
        let mut gemm = Gemm::new(kernel, threads, (512, k, columns), 4);
        let seconds = median(40, || gemm.run());
        let flops = 2.0 * (512 * k * columns) as f64 / seconds;
        println!(
            "{name:8} 512 rows            {:8.0} GFLOP/s  {:3.0}% of peak",
            flops / 1e9,
            100.0 * flops / peak
        );
    }
    for rows in [1, 8, 32] {
        let (k, columns) = (576, 3072);
        let mut gemm = Gemm::new(kernel, threads, (rows, k, columns), 80);
        let seconds = median(320, || gemm.run());
        let bytes = (2 * k * columns) as f64 / seconds;
        println!(
            "gate+up  {rows:3} rows            {:8.1} GB/s     {:3.0}% of bandwidth, {:3.0}% of peak",
            bytes / 1e9,
            100.0 * bytes / bandwidth,
            100.0 * bytes * rows as f64 / peak
        );
    }
}

fn model(path: &str, kernel: Kernel, threads: usize, bandwidth: f64, peak: f64) {
    let dir = ModelDir::open(path).expect("a prepared model directory");
    let spec = dir.spec().clone();
    let weights = dir.weights(0).expect("its weights");
    let kv = kv_geometry(&spec, 32);
    let memory = Arc::new(HeapMemory::new(kv.block_bytes() * 32 * 20));
    let options = CpuOptions {
        threads,
        kernel: Some(kernel),
        step_tokens_max: 512,
        step_sequences_max: 64,
    };
    let since = Instant::now();
    let mut executor = CpuExecutor::load(&spec, &[&weights], vec![memory], kv.clone(), options)
        .expect("the executor loads");
    println!(
        "load                        {:8.2} s",
        since.elapsed().as_secs_f64()
    );

    let seconds = best_and_median(15, || step(&mut executor, 1, 0, 512));
    let parameters = executor.streamed_bytes() as f64 / 2.0;
    let head = (spec.vocab * spec.hidden) as f64;
    let floor = 2.0 * (512.0 * (parameters - head) + head) / peak;
    report("prefill 512", 512.0, seconds, floor);
    if std::env::var_os("BATON_BENCH_PREFILL_ONLY").is_some() {
        return;
    }
    let context: u32 =
        std::env::var("BATON_BENCH_CONTEXT").map_or(512, |c| c.parse().expect("a number"));
    assert!(
        context <= 512,
        "the benchmark's sequences have room for 512 tokens"
    );
    for batch in [1usize, 8, 32] {
        for sequence in 0..batch {
            step_of(&mut executor, sequence, 1, 0, context as usize);
        }
        let seconds = best_and_median(25, || step(&mut executor, batch, context, 1));
        let kv_bytes = (batch * kv.blocks_for(context as usize) * kv.block_bytes()) as f64;
        let floor = (executor.streamed_bytes() as f64 + kv_bytes) / bandwidth;
        report(&format!("decode b={batch}"), batch as f64, seconds, floor);
    }
}

fn report(name: &str, tokens: f64, (best, median): (f64, f64), floor: f64) {
    println!(
        "{name:12} {:8.2} ms median, {:8.2} ms best: {:7.1} tok/s; floor {:7.2} ms, {:3.0}% of it",
        median * 1e3,
        best * 1e3,
        tokens / median,
        floor * 1e3,
        100.0 * floor / median
    );
}

fn step(executor: &mut CpuExecutor, batch: usize, start: u32, tokens: usize) -> f64 {
    step_of(executor, 0, batch, start, tokens)
}

/// One step of sequences `first ..`, each with 17 blocks of its own.
fn step_of(
    executor: &mut CpuExecutor,
    first: usize,
    batch: usize,
    start: u32,
    tokens: usize,
) -> f64 {
    const BLOCKS: usize = 17;
    let mut plan = StepPlan::default();
    for sequence in first..first + batch {
        let at = plan.tokens.len();
        plan.tokens
            .extend((0..tokens).map(|i| ((i * 31 + sequence * 7) % 1000 + 100) as u32));
        let blocks = plan.blocks.len();
        plan.blocks
            .extend((0..BLOCKS).map(|b| (sequence * BLOCKS + b) as u32));
        plan.sequences.push(SequenceStep {
            key: sequence as u64,
            tokens: at..at + tokens,
            follows: None,
            start,
            blocks: blocks..blocks + BLOCKS,
            sample: Some(
                SampleRequest {
                    position: start + tokens as u32,
                    state: Arc::default(),
                    ban_stop_ids: false,
                    mask: None,
                }
                .into(),
            ),
            targets: 0..0,
            target_top: 0,
        });
    }
    let since = seconds(executor.threads());
    executor.forward(&plan).expect("a step");
    seconds(executor.threads()) - since
}

fn sorted(tries: usize, mut run: impl FnMut() -> f64) -> Vec<f64> {
    run();
    let mut all: Vec<f64> = (0..tries).map(|_| run()).collect();
    all.sort_by(f64::total_cmp);
    all
}

fn median(tries: usize, run: impl FnMut() -> f64) -> f64 {
    sorted(tries, run)[tries / 2]
}

fn best_and_median(tries: usize, run: impl FnMut() -> f64) -> (f64, f64) {
    let all = sorted(tries, run);
    (all[0], all[tries / 2])
}
