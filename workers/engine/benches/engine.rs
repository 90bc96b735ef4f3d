//! What the engine itself costs per token, and what choosing a token costs.
//!
//! `cargo bench -p baton-engine`. Medians over interleaved rounds of one run: machines drift.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use baton_engine::{
    Engine, EngineConfig, Event, Executor, ExecutorError, ExecutorInfo, FakeConfig, FakeExecutor,
    NewSequence, ResumedSequence, SampleRequest, SampleRun, SampleState, Sampled, SequenceOutput,
    StepOutput, StepPlan, sample, uniform,
};
use baton_protocol::{CacheSalt, Generation, PackedTokens, Sampling, SequenceSpec};

const ROUNDS: usize = 9;
const PROMPT_TOKENS: usize = 130;
const OUTPUT_TOKENS: u32 = 64;
const BATCHES: [usize; 3] = [1, 32, 256];

fn main() {
    // Cargo passes its own flags; `cargo test --benches` asks only whether this runs.
    let quick = std::env::args().any(|arg| arg == "--test");
    let rounds = if quick { 1 } else { ROUNDS };

    println!(
        "engine, {OUTPUT_TOKENS} tokens after prompts of {PROMPT_TOKENS}; ns per decode token, median of {rounds}"
    );
    println!(
        "{:>8} {:>14} {:>14} {:>16}",
        "batch", "null executor", "fake executor", "fake, tokens/s"
    );
    let mut times = vec![[Vec::new(), Vec::new()]; BATCHES.len()];
    for _ in 0..rounds {
        for (batch, times) in BATCHES.iter().zip(&mut times) {
            let null = Null {
                info: FakeExecutor::new(FakeConfig::default()).info().clone(),
                submitted: VecDeque::new(),
            };
            times[0].push(decode_ns(Box::new(null), *batch));
            times[1].push(decode_ns(
                Box::new(FakeExecutor::new(FakeConfig::default())),
                *batch,
            ));
        }
    }
    for (batch, [null, fake]) in BATCHES.iter().zip(times) {
        let (null, fake) = (median(null), median(fake));
        println!("{batch:>8} {null:>14.0} {fake:>14.0} {:>16.0}", 1e9 / fake);
    }

    println!("\nsample(), microseconds per token, median of {rounds}");
    println!("{:>32} {:>10} {:>10}", "vocabulary", 49_152, 151_936);
    for (name, scale, sampling) in sampling_cases() {
        let of = |vocab| {
            let logits = logits(vocab, scale);
            median(
                (0..rounds)
                    .map(|_| sample_micros(&logits, &sampling))
                    .collect(),
            )
        };
        println!("{name:>32} {:>10.1} {:>10.1}", of(49_152), of(151_936));
    }
}

/// Chooses token 1 at no cost: what remains is the engine's.
struct Null {
    info: ExecutorInfo,
    submitted: VecDeque<StepOutput>,
}

impl Executor for Null {
    fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let choose = |sample: &SampleRun| {
            black_box(sample);
            Sampled {
                token: 1,
                logprobs: None,
            }
        };
        let output = |step: &baton_engine::SequenceStep| SequenceOutput {
            sampled: step.sample.as_ref().map(choose).into(),
            ..SequenceOutput::default()
        };
        self.submitted.push_back(StepOutput {
            sequences: plan.sequences.iter().map(output).collect(),
        });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.submitted
            .pop_front()
            .ok_or_else(ExecutorError::nothing_submitted)
    }
}

/// Nanoseconds per token while `batch` sequences generate.
fn decode_ns(executor: Box<dyn Executor>, batch: usize) -> f64 {
    let config = EngineConfig {
        step_tokens_max: 8192,
        sequences_max: 256,
        queue_max: 1024,
        prefix_cache: true,
    };
    let mut engine = Engine::new(executor, config);
    // Enough waves of sequences for some 30,000 tokens.
    let waves = 30_000 / (batch * OUTPUT_TOKENS as usize) + 1;
    let (mut nanos, mut tokens) = (0.0, 0);
    for wave in 0..waves {
        let specs: Vec<SequenceSpec> = (0..batch)
            .map(|i| spec((wave * batch + i) as u32))
            .collect();
        for (key, spec) in specs.iter().enumerate() {
            let new = NewSequence {
                key: key as u64,
                spec: spec.clone(),
                prompt_logprobs: None,
                constraint: None,
                stream: false,
            };
            engine.submit(new).expect("the queue is long enough");
        }
        let mut prefilled = Vec::new();
        while prefilled.len() < batch {
            prefilled.extend(engine.step().expect("no device to fail"));
        }
        for event in prefilled {
            let Event::Prefilled {
                key,
                blocks,
                sampled,
                ..
            } = event
            else {
                continue;
            };
            let resumed = ResumedSequence {
                key,
                spec: specs[key as usize].clone(),
                next: sampled.token,
                blocks,
                constraint: None,
            };
            engine.resume(resumed).expect("there is room");
        }
        let start = Instant::now();
        while engine.has_work() {
            tokens += black_box(engine.step().expect("no device to fail")).len();
        }
        nanos += start.elapsed().as_nanos() as f64;
    }
    nanos / tokens as f64
}

fn spec(seed: u32) -> SequenceSpec {
    SequenceSpec {
        tokens: PackedTokens(
            (0..PROMPT_TOKENS as u32)
                .map(|i| (seed * 977 + i * 31) % 32_000)
                .collect(),
        ),
        prompt_tokens: PROMPT_TOKENS as u32,
        generation: Generation {
            max_tokens: OUTPUT_TOKENS,
            ..Generation::default()
        },
        cache_salt: CacheSalt::NONE,
        service: baton_protocol::Service::default(),
    }
}

fn sampling_cases() -> Vec<(&'static str, f32, Sampling)> {
    let warm = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    vec![
        ("greedy", 3.0, Sampling::default()),
        (
            "greedy, 5 logprobs",
            3.0,
            Sampling {
                logprobs: Some(5),
                ..Sampling::default()
            },
        ),
        ("temperature", 3.0, warm.clone()),
        (
            "top-k 50",
            3.0,
            Sampling {
                top_k: 50,
                ..warm.clone()
            },
        ),
        (
            "top-k 50, top-p 0.9",
            3.0,
            Sampling {
                top_k: 50,
                top_p: 0.9,
                ..warm.clone()
            },
        ),
        (
            "top-p 0.9",
            3.0,
            Sampling {
                top_p: 0.9,
                ..warm.clone()
            },
        ),
        (
            "top-p 0.9, flat distribution",
            0.3,
            Sampling {
                top_p: 0.9,
                ..warm.clone()
            },
        ),
        (
            "min-p 0.05",
            3.0,
            Sampling {
                min_p: 0.05,
                ..warm
            },
        ),
    ]
}

/// Bell-shaped logits with this standard deviation, and a few likely tokens.
fn logits(vocab: u32, scale: f32) -> Vec<f32> {
    let bell = |i: u32| (0..12).map(|j| uniform(j, i) as f32).sum::<f32>() - 6.0;
    let mut logits: Vec<f32> = (0..vocab).map(|i| bell(i) * scale).collect();
    for i in 0..20 {
        logits[(i * 1009) as usize] += 6.0 * scale;
    }
    logits
}

fn sample_micros(logits: &[f32], sampling: &Sampling) -> f64 {
    const CALLS: u32 = 21;
    let state = Arc::new(SampleState {
        sampling: sampling.clone(),
        ..SampleState::default()
    });
    let call = |position| {
        // A forward step leaves fresh logits; copying them is not the sampler's cost.
        let mut row = logits.to_vec();
        let request = SampleRequest {
            position,
            state: Arc::clone(&state),
            ban_stop_ids: false,
            mask: None,
        };
        let start = Instant::now();
        black_box(sample(&mut row, &request));
        start.elapsed().as_nanos() as f64 / 1000.0
    };
    // The median and not the mean: a call is shorter than a time slice of a busy machine.
    median((0..CALLS).map(call).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
