//! Decode and prefill of the Llama-3.1-8B shape, or the 70B one, with random weights, on one GPU or several, against the first GPU's
//! ceilings, measured in the same run.
//!
//! `cargo bench -p baton-cuda` where a GPU and cargo are on one machine; elsewhere copy the binary that
//! `cargo bench -p baton-cuda --no-run` names. Arguments choose parts (`ceilings`, `decode`, `prefill`, `engine`) and weights
//! (`bf16`, `fp8`, e4m3 with a scale a channel, and `fp8-block`, with one for each 128 × 128); none of a sort is all of it.
//! `engine` is decode as a worker runs it, with the next step submitted before the last is collected, and without that. `70b` takes
//! the larger shape, `tp=2` as many GPUs as ranks of one executor, `layers=8` fewer layers than the model has: what a layer
//! takes shows with two numbers of them. `tp=2 like=4` gives each of two ranks what one of four has.
//!
//! Floors: decode reads every matrix and the batch's KV once, at the read bandwidth of a sum over 4 GiB; prefill does
//! 2 · rows · weights + attention operations, at the rate of an 8192³ product of the same numbers. Both ceilings are the best of
//! several rounds after a warm-up, for a GPU that was idle runs at a fraction of its clocks. A ceiling that cannot be one ends the
//! run with a sentence: a read bandwidth under half or over all of what the memory's clock and width give, and any work that comes
//! out faster than its ceiling allows.

mod ceilings;

use std::borrow::Cow;
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use baton_cuda::{CudaError, CudaExecutor, CudaMemory, CudaModel, CudaOptions, Device, open_group};
use baton_engine::{
    Engine, EngineConfig, Executor, ExecutorError, ExecutorInfo, ResumedSequence, SampleRequest,
    SequenceStep, StepOutput, StepPlan, TokenMask, kv_geometry,
};
use baton_model::{
    Fp8Matrix, Fp8Scales, LayerKind, MatrixBytes, Mixer, ModelSpec, Rope, RopeScaling, TensorBytes,
    TensorSource, UniformSpec, WeightFormat, expected_tensors,
};
use baton_protocol::{CacheSalt, Generation, SequenceSpec};

use ceilings::{CODE_SCALE, codes, matmul_rate, middle, noise, read_bandwidth, share};

const FORMATS: [(&str, WeightFormat); 3] = [
    ("bf16", WeightFormat::Bf16),
    ("fp8", WeightFormat::Fp8Channel),
    ("fp8-block", WeightFormat::Fp8Block),
];
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

fn run() -> Result<(), Box<dyn Error>> {
    let parts: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let formats: Vec<_> = FORMATS
        .iter()
        .filter(|(name, _)| parts.iter().any(|p| p == name))
        .collect();
    let formats = match formats.is_empty() {
        true => FORMATS.iter().collect(),
        false => formats,
    };
    let number = |name: &str| {
        let of = parts.iter().find_map(|p| p.strip_prefix(name));
        of.map(|text| text.parse::<usize>()).transpose()
    };
    let (ranks, layers) = (number("tp=")?.unwrap_or(1), number("layers=")?);
    let like = number("like=")?.unwrap_or(ranks);
    let large = parts.iter().any(|p| p == "70b");
    let tables = ["ceilings", "decode", "prefill", "engine"];
    let parts: Vec<&String> = (parts.iter().filter(|p| tables.contains(&p.as_str()))).collect();
    let wants = |part: &str| parts.is_empty() || parts.iter().any(|p| *p == part);
    let devices = match ranks {
        1 => vec![Device::open(0)?],
        ranks => open_group(&(0..ranks as u32).collect::<Vec<_>>())?,
    };
    let device = devices[0].clone();
    println!(
        "{}, {} multiprocessors",
        device.name(),
        device.multiprocessors()
    );
    let bandwidth = read_bandwidth(&device)?;
    let bf16 = matmul_rate(&device, false)?;
    let fp8 = match device.capability() {
        (9, 0) => Some(matmul_rate(&device, true)?),
        _ => None,
    };
    print!(
        "ceilings: read {:.2} TB/s, 8192^3 BF16 {:.0} TFLOP/s",
        bandwidth / 1e12,
        bf16 / 1e12
    );
    println!(
        "{}",
        fp8.map_or(String::new(), |rate| format!(", FP8 {:.0}", rate / 1e12))
    );
    if !wants("decode") && !wants("prefill") && !wants("engine") {
        return Ok(());
    }
    let spec = llama(large, layers, (ranks, like));
    for (name, format) in formats {
        let started = Instant::now();
        let mut executor = executor(&devices, &spec, *format)?;
        println!(
            "\n{name}, {} layers of width {} on {ranks}: {:.2} GB of matrices on each loaded, kernels and graphs made in {:.1} s",
            spec.layers.len(),
            spec.hidden,
            executor.streamed_bytes() as f64 / 1e9,
            started.elapsed().as_secs_f64()
        );
        let rate = if *format == WeightFormat::Bf16 {
            bf16
        } else {
            fp8.unwrap_or(bf16)
        };
        if wants("decode") {
            decode_table(&mut executor, bandwidth, ranks)?;
        }
        if wants("prefill") {
            prefill_table(&mut executor, &spec, rate * ranks as f64)?;
        }
        if wants("engine") {
            engine_table(executor);
        }
    }
    Ok(())
}

fn decode_table(executor: &mut CudaExecutor, bandwidth: f64, ranks: usize) -> Result<(), String> {
    println!("\ndecode, context {CONTEXT}: batch, ms per step, share of the read bandwidth");
    for batch in [1, 8, 32, 64, 128] {
        let time = decode(executor, batch);
        let kv = batch * CONTEXT * (executor.info().kv.block_bytes() / BLOCK_TOKENS as usize);
        let floor = (executor.streamed_bytes() + kv / ranks) as f64 / bandwidth;
        let share = share(floor, time, &format!("decode of {batch} against the reads"))?;
        println!("{batch:6} {:8.3} {:5.1}%", time * 1e3, share * 100.0);
    }
    Ok(())
}

fn prefill_table(executor: &mut CudaExecutor, spec: &ModelSpec, rate: f64) -> Result<(), String> {
    println!("\nprefill: prompts x tokens, ms, share of the product rate");
    for (prompts, tokens) in [(1, 512), (1, 2048), (1, 8192), (16, 1024), (64, 512)] {
        let time = prefill(executor, prompts, tokens);
        let floor = operations(spec, prompts, tokens) / rate;
        let label = format!("{prompts}x{tokens}");
        let share = share(
            floor,
            time,
            &format!("prefill of {label} against the products"),
        )?;
        println!("{label:>8} {:8.2} {:5.1}%", time * 1e3, share * 100.0);
    }
    Ok(())
}

fn engine_table(executor: CudaExecutor) {
    println!(
        "\nengine, mean context {CONTEXT}: batch, ms per step one at a time, with the next submitted ahead"
    );
    let executor = Arc::new(Mutex::new(executor));
    for batch in [1, 8, 32, 64, 128] {
        let [alone, ahead] = [1, 2].map(|in_flight| engine(&executor, batch, in_flight) * 1e3);
        println!("{batch:6} {alone:8.3} {ahead:8.3}");
    }
}

/// An executor that engines use in turn, with so many steps in flight.
struct Turn(Arc<Mutex<CudaExecutor>>, ExecutorInfo);

impl Executor for Turn {
    fn info(&self) -> &ExecutorInfo {
        &self.1
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.0.lock().expect("one thread").submit(plan)
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        self.0.lock().expect("one thread").choose(masks)
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.0.lock().expect("one thread").collect()
    }
}

/// Seconds of a step of an engine in which `batch` sequences generate, from one step's events to the next one's.
fn engine(executor: &Arc<Mutex<CudaExecutor>>, batch: usize, steps_in_flight: usize) -> f64 {
    const STEPS: usize = 60;
    let info = ExecutorInfo {
        steps_in_flight,
        ..executor.lock().expect("one thread").info().clone()
    };
    let kv = info.kv.clone();
    let config = EngineConfig {
        step_tokens_max: STEP_TOKENS,
        sequences_max: BATCH_MAX,
        queue_max: BATCH_MAX,
        prefix_cache: false,
    };
    let mut engine = Engine::new(Box::new(Turn(executor.clone(), info)), config);
    for key in 0..batch as u64 {
        let tokens = vec![1; CONTEXT - STEPS / 2];
        let blocks = engine.pool().reserve(kv.blocks_for(tokens.len()));
        let resumed = ResumedSequence {
            key,
            spec: SequenceSpec {
                prompt_tokens: tokens.len() as u32,
                tokens: tokens.into(),
                generation: Generation {
                    max_tokens: STEPS as u32,
                    ..Generation::default()
                },
                cache_salt: CacheSalt::NONE,
                service: baton_protocol::Service::default(),
            },
            next: 2,
            blocks: blocks.expect("the arena holds them"),
            constraint: None,
        };
        engine.resume(resumed).unwrap_or_else(|r| panic!("{r}"));
    }
    let mut times = Vec::new();
    let mut last = Instant::now();
    while engine.has_work() {
        let events = engine.step().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(events.len(), batch);
        times.push(last.elapsed());
        last = Instant::now();
    }
    middle(times.split_off(5))
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
            sample: Some(
                SampleRequest {
                    position: end as u32,
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
    let scored = |layer: &Arc<LayerKind>| {
        let Mixer::Attention(attention) = &layer.mixer;
        attention.projected().0
    };
    let attention = pairs * spec.layers.iter().map(scored).sum::<usize>() as f64;
    2.0 * (rows * matrices as f64 + head) + 4.0 * attention
}

fn executor(
    devices: &[Arc<Device>],
    spec: &ModelSpec,
    format: WeightFormat,
) -> Result<CudaExecutor, CudaError> {
    let options = CudaOptions {
        step_tokens_max: STEP_TOKENS,
        step_sequences_max: BATCH_MAX,
    };
    let ranks = devices.len();
    let of_rank = spec.of_rank(ranks).map_err(CudaError::Unsupported)?;
    let largest = expected_tensors(&of_rank)
        .iter()
        .map(|t| t.elements())
        .max();
    let largest = largest.unwrap_or(0);
    let source = Noise {
        numbers: noise(largest * 2 + (1 << 20)),
        codes: codes(largest + (1 << 20)),
        format,
    };
    let sources: Vec<&dyn TensorSource> = devices.iter().map(|_| &source as _).collect();
    let started = Instant::now();
    let model = CudaModel::load(devices, spec, &sources, options)?;
    println!("loaded in {:.1} s", started.elapsed().as_secs_f64());
    let kv = kv_geometry(spec, BLOCK_TOKENS);
    let of_rank = kv_geometry(&of_rank, BLOCK_TOKENS);
    let memory = |device: &Arc<Device>| {
        // A prime number of blocks, so that multiples of another prime visit each once.
        let mut memory = CudaMemory::new(device, 4099 * of_rank.block_bytes())?;
        memory.fill_bytes(0x3c)?;
        Ok(Arc::new(memory) as _)
    };
    let memories = devices
        .iter()
        .map(memory)
        .collect::<Result<_, CudaError>>()?;
    CudaExecutor::new(model, memories, kv)
}

/// Every tensor is a piece of the same noise.
struct Noise {
    numbers: Vec<u8>,
    codes: Vec<u8>,
    format: WeightFormat,
}

impl TensorSource for Noise {
    fn bf16(&self, _name: &str) -> Result<TensorBytes<'_>, String> {
        Err("noise has any shape".to_owned())
    }

    fn shaped(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [u8]>, String> {
        Ok(piece(&self.numbers, name, shape.iter().product::<usize>() * 2).into())
    }

    fn projection(&self, name: &str, out: usize, inputs: usize) -> Result<MatrixBytes<'_>, String> {
        let scales = |count| vec![CODE_SCALE; count];
        let scales = match self.format {
            WeightFormat::Bf16 => return self.shaped(name, &[out, inputs]).map(MatrixBytes::Bf16),
            WeightFormat::Fp8Channel => Fp8Scales::Channel(scales(out)),
            WeightFormat::Fp8Block => {
                Fp8Scales::Block(scales(out.div_ceil(128) * inputs.div_ceil(128)))
            }
        };
        Ok(MatrixBytes::Fp8(Fp8Matrix {
            rows: out,
            columns: inputs,
            codes: piece(&self.codes, name, out * inputs).into(),
            scales,
        }))
    }
}

fn piece<'a>(noise: &'a [u8], name: &str, bytes: usize) -> &'a [u8] {
    let seed = name
        .bytes()
        .fold(0usize, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let at = seed % (noise.len() - bytes).max(1) / 2 * 2;
    &noise[at..at + bytes]
}

/// The shape of Llama-3.1-8B or 70B.
fn llama(large: bool, layers: Option<usize>, (ranks, like): (usize, usize)) -> ModelSpec {
    let (hidden, intermediate, all, heads) = match large {
        false => (4096, 14_336, 32, 32),
        true => (8192, 28_672, 80, 64),
    };
    let spec = UniformSpec {
        family: "llama".to_owned(),
        hidden,
        intermediate: intermediate * ranks / like,
        layers: layers.unwrap_or(all),
        heads: heads * ranks / like,
        kv_heads: 8 * ranks / like,
        head_dim: 128,
        vocab: 128_256 * ranks / like,
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
    };
    ModelSpec::try_from(spec).expect("a model")
}
