//! Decode and prefill of the Llama-3.1-8B shape with random weights, against this GPU's ceilings, measured in the same run.
//!
//! `cargo bench -p baton-cuda` where a GPU and cargo are on one machine; elsewhere copy the binary that
//! `cargo bench -p baton-cuda --no-run` names. Arguments choose parts: `ceilings`, `decode`, `prefill`; none is all.
//!
//! Floors: decode reads every matrix and the batch's KV once, at the read bandwidth of a sum over 4 GiB; prefill does
//! 2 · rows · weights + attention operations, at the rate of an 8192³ product.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_cuda::{
    Blas, Buffer, Compiler, CudaError, CudaExecutor, CudaMemory, CudaModel, CudaOptions, Device,
    Module, Numbers, Output, Product, Shape, launch, sources::Source,
};
use baton_engine::{Executor, SampleRequest, SequenceStep, StepPlan, kv_geometry};
use baton_model::{ModelSpec, Rope, RopeScaling, TensorBytes, TensorSource, expected_tensors};

const CONTEXT: usize = 512;
const STEP_TOKENS: usize = 8192;
const BATCH_MAX: usize = 128;
const BLOCK_TOKENS: u32 = 32;

fn main() {
    if let Err(error) = run() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), CudaError> {
    let parts: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let wants = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let device = Device::open(0)?;
    println!(
        "{}, {} multiprocessors",
        device.name(),
        device.multiprocessors()
    );
    let bandwidth = read_bandwidth(&device)?;
    let rate = matmul_rate(&device)?;
    println!(
        "ceilings: read {:.2} TB/s, BF16 8192^3 {:.0} TFLOP/s",
        bandwidth / 1e12,
        rate / 1e12
    );
    if !wants("decode") && !wants("prefill") {
        return Ok(());
    }
    let spec = llama_8b();
    let started = Instant::now();
    let mut executor = executor(&device, &spec)?;
    println!(
        "{:.1} GB of matrices loaded, kernels and graphs made in {:.1} s",
        executor.streamed_bytes() as f64 / 1e9,
        started.elapsed().as_secs_f64()
    );
    if wants("decode") {
        println!("\ndecode, context {CONTEXT}: batch, ms per step, share of the read bandwidth");
        for batch in [1, 8, 32, 64, 128] {
            let time = decode(&mut executor, batch);
            let kv = batch * CONTEXT * (executor.info().kv.block_bytes() / BLOCK_TOKENS as usize);
            let floor = (executor.streamed_bytes() + kv) as f64 / bandwidth;
            println!("{batch:6} {:8.3} {:5.1}%", time * 1e3, floor / time * 100.0);
        }
    }
    if wants("prefill") {
        println!("\nprefill: prompts x tokens, ms, share of the product rate");
        for (prompts, tokens) in [(1, 512), (1, 2048), (1, 8192), (16, 1024), (64, 512)] {
            let time = prefill(&mut executor, prompts, tokens);
            let floor = operations(&spec, prompts, tokens) / rate;
            let label = format!("{prompts}x{tokens}");
            println!(
                "{label:>8} {:8.2} {:5.1}%",
                time * 1e3,
                floor / time * 100.0
            );
        }
    }
    Ok(())
}

/// Bytes per second of a kernel that reads 4 GiB.
fn read_bandwidth(device: &Arc<Device>) -> Result<f64, CudaError> {
    const BYTES: usize = 4 << 30;
    let source = Source {
        name: "read.cu",
        text: include_str!("read.cu"),
    };
    let image = Compiler::for_capability(device.capability())?.compile(&source, &[])?;
    let kernel = Module::load(device, &image)?.kernel("read_sum", 0)?;
    let mut data = Buffer::<u8>::uninitialized(device, BYTES, "4 GiB to read")?;
    data.fill_bytes(0x5a)?;
    let out = Buffer::<u32>::zeroed(device, 1, "a sum")?;
    let shape = Shape::row(device.multiprocessors() as usize * 8, 512);
    let time = median(device, 12, || {
        // SAFETY: the kernel's arguments, by its file.
        unsafe { launch!(kernel, shape, data.at(0), (BYTES / 16) as i64, out.at(0)) }
    })?;
    Ok(BYTES as f64 / time)
}

/// Operations per second of a BF16 product of 8192³ on random numbers.
fn matmul_rate(device: &Arc<Device>) -> Result<f64, CudaError> {
    const N: usize = 8192;
    let mut blas = Blas::new(device)?;
    let noise = noise(2 * N * N);
    let x = Buffer::<u8>::of(device, &noise, "a matrix")?;
    let w = Buffer::<u8>::of(device, &noise, "a matrix")?;
    let y = Buffer::<u16>::zeroed(device, N * N, "a matrix")?;
    let product = Product {
        x: x.at(0),
        w: w.at(0),
        y: y.at(0),
        rows: N,
        outputs: N,
        inputs: N,
        numbers: Numbers::Bf16,
        output: Output::Bf16,
    };
    let time = median(device, 12, || {
        // SAFETY: matrices of these sizes.
        unsafe { blas.multiply(&product) }
    })?;
    Ok(2.0 * (N as f64).powi(3) / time)
}

/// Seconds of one run, the median of some, after two that do not count.
fn median(
    device: &Device,
    runs: usize,
    mut run: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let mut times = Vec::new();
    for i in 0..runs + 2 {
        device.synchronize()?;
        let started = Instant::now();
        run()?;
        device.synchronize()?;
        if i >= 2 {
            times.push(started.elapsed());
        }
    }
    Ok(middle(times))
}

fn middle(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

/// Seconds of a step of `batch` sequences with `CONTEXT` tokens each.
fn decode(executor: &mut CudaExecutor, batch: usize) -> f64 {
    let tokens = vec![1; batch];
    let rows: Vec<_> = (0..batch).map(|s| (s, s..s + 1, CONTEXT - 1)).collect();
    let plan = plan(executor, tokens, &rows);
    repeat(executor, &[plan], 40)
}

/// Seconds of some prompts, in steps of at most `STEP_TOKENS`.
fn prefill(executor: &mut CudaExecutor, prompts: usize, tokens: usize) -> f64 {
    let each = STEP_TOKENS / tokens;
    let plans: Vec<_> = (0..prompts)
        .step_by(each)
        .map(|first| {
            let count = each.min(prompts - first);
            let ids = (0..count * tokens).map(|i| (i * 7 % 1000) as u32).collect();
            let rows: Vec<_> = (0..count)
                .map(|s| (first + s, s * tokens..(s + 1) * tokens, 0))
                .collect();
            plan(executor, ids, &rows)
        })
        .collect();
    repeat(executor, &plans, 8)
}

fn repeat(executor: &mut CudaExecutor, plans: &[StepPlan], runs: usize) -> f64 {
    let mut times = Vec::new();
    for i in 0..runs + 3 {
        let started = Instant::now();
        for plan in plans {
            executor
                .forward(plan)
                .unwrap_or_else(|error| panic!("{error}"));
        }
        if i >= 3 {
            times.push(started.elapsed());
        }
    }
    middle(times)
}

/// Sequences (number, rows, start), each in blocks of its own, all sampled greedily.
fn plan(
    executor: &CudaExecutor,
    tokens: Vec<u32>,
    rows: &[(usize, std::ops::Range<usize>, usize)],
) -> StepPlan {
    let mut plan = StepPlan {
        tokens,
        ..StepPlan::default()
    };
    for (sequence, rows, start) in rows {
        let end = start + rows.len();
        let need = executor.info().kv.blocks_for(end) as u32;
        let at = plan.blocks.len();
        // Blocks far apart, as after a while of serving.
        let total = executor.info().blocks;
        plan.blocks.extend((0..need).map(|i| {
            let n = u64::from(*sequence as u32 * need + i);
            (n * 7919 % u64::from(total)) as u32
        }));
        plan.sequences.push(SequenceStep {
            key: *sequence as u64,
            tokens: rows.clone(),
            follows: None,
            start: *start as u32,
            blocks: at..plan.blocks.len(),
            sample: Some(SampleRequest {
                position: end as u32,
                state: Arc::default(),
                ban_stop_ids: false,
            }),
            targets: 0..0,
            target_top: 0,
        });
    }
    plan
}

/// Multiplications and additions of all matrices and of causal attention.
fn operations(spec: &ModelSpec, prompts: usize, tokens: usize) -> f64 {
    let matrices: usize = expected_tensors(spec)
        .iter()
        .filter(|t| t.shape.len() == 2 && t.name.contains("layers"))
        .map(|t| t.elements())
        .sum();
    let rows = (prompts * tokens) as f64;
    let head = (prompts * spec.vocab * spec.hidden) as f64;
    let pairs = prompts as f64 * (tokens as f64).powi(2) / 2.0;
    let attention = pairs * (spec.heads * spec.head_dim * spec.layers) as f64;
    2.0 * (rows * matrices as f64 + head) + 4.0 * attention
}

fn executor(device: &Arc<Device>, spec: &ModelSpec) -> Result<CudaExecutor, CudaError> {
    let options = CudaOptions {
        step_tokens_max: STEP_TOKENS,
        step_sequences_max: BATCH_MAX,
    };
    let largest = expected_tensors(spec).iter().map(|t| t.elements()).max();
    let source = Noise(noise(largest.unwrap_or(0) * 2 + (1 << 20)));
    let model = CudaModel::load(device, spec, &source, options)?;
    let kv = kv_geometry(spec, BLOCK_TOKENS);
    // A prime number of blocks, so that multiples of another prime visit each once.
    let mut memory = CudaMemory::new(device, 4099 * kv.block_bytes())?;
    memory.fill_bytes(0x3c)?;
    CudaExecutor::new(model, Arc::new(memory), kv)
}

/// Every tensor is a piece of the same noise.
struct Noise(Vec<u8>);

impl TensorSource for Noise {
    fn bf16(&self, _name: &str) -> Result<TensorBytes<'_>, String> {
        Err("noise has any shape".to_owned())
    }

    fn shaped(&self, name: &str, shape: &[usize]) -> Result<&[u8], String> {
        let bytes = shape.iter().product::<usize>() * 2;
        let seed = name
            .bytes()
            .fold(0usize, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let at = seed % (self.0.len() - bytes).max(1) / 2 * 2;
        Ok(&self.0[at..at + bytes])
    }
}

/// BF16 numbers of either sign between 2^-7 and 2^-3.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = (state & 0x81ff_81ff_81ff_81ff) | 0x3c00_3c00_3c00_3c00;
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

fn llama_8b() -> ModelSpec {
    ModelSpec {
        family: "llama".to_owned(),
        hidden: 4096,
        intermediate: 14_336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 128_256,
        tokens_max: 131_072,
        rms_eps: 1e-5,
        rope: Rope {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_tokens_max: 8192.0,
            },
        },
        qkv_bias: false,
        qk_norm: false,
        tied_embeddings: false,
        sliding_window: None,
    }
}
