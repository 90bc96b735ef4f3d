//! The probe at a worker's start: what it says a step costs is about what such a step takes.
//!
//! Nothing here depends on how fast a device is: predictions are compared with steps of the same device, in the same second. Neighbours on a
//! machine may slow either side down, so the quickest of some runs counts, the bounds are wide, and one good attempt of several is enough. What
//! is found out is a term that is missing, or in another unit: then no attempt is good.

use std::time::Instant;

use baton_engine::{
    Engine, EngineConfig, Executor, SampleRun, SampleState, SequenceStep, StepPlan,
};
use baton_model::{Rope, RopeScaling, UniformSpec};
use baton_protocol::{StepCost, StepShape};

use crate::{Build, Builder, STEP_TOKENS_MAX, Tiny};

/// Probes, each with the steps that it is compared with.
const ATTEMPTS: usize = 10;

/// Times that each step is run. The quickest counts, as in the probe.
const RUNS: usize = 5;

/// Sequences that generate together.
const ROWS: usize = 12;

/// Tokens that each of them has: few, and many.
const CONTEXTS: [usize; 2] = [8, 300];

/// Prompts by the tokens of the step and those before them. No step of the probe is one of them.
const PROMPTS: [(usize, usize); 4] = [(40, 0), (150, 0), (450, 0), (100, 400)];

const BLOCK_TOKENS: usize = 16;
/// Blocks of each sequence, and of the arena.
const EACH: usize = STEP_TOKENS_MAX / BLOCK_TOKENS;
const BLOCKS: usize = (ROWS + 1) * EACH;

/// Sizes of the random model.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Layers.
    pub layers: usize,
    /// Width; heads are of 64.
    pub hidden: usize,
    /// Tokens that there are: what a row costs.
    pub vocab: usize,
}

/// Steps of prompts and of generating sequences against what the probe predicts. `terms`: "row", "KV", "attention of prompts", those which are a good
/// part of one of the steps on such a device.
///
/// # Panics
/// If in every attempt one of them takes more than `times_off_max` times as long, or less than that part of it, or one of `terms` is nothing.
pub fn the_probe_predicts_steps(
    label: &str,
    sizes: Sizes,
    terms: &[&str],
    times_off_max: f32,
    builder: Builder<'_>,
) {
    let model = Tiny::new(sizes.spec(), 5);
    let executor = || {
        builder(Build {
            spec: &model.spec,
            weights: &model,
            block_tokens: BLOCK_TOKENS as u32,
            blocks: BLOCKS,
        })
    };
    let mut wrong = Vec::new();
    for attempt in 0..ATTEMPTS {
        let cost = probe(executor());
        if let Err(why) = cost.check() {
            panic!("{label}: {why}: {cost:?}");
        }
        let told = [
            ("row", cost.row_us),
            ("KV", cost.kv_token_us),
            ("attention of prompts", cost.pair_us),
        ];
        let missing = told
            .iter()
            .filter(|(term, us)| *us == 0.0 && terms.contains(term));
        wrong = missing.map(|(term, _)| (*term).to_owned()).collect();
        let mut steps = executor();
        for (what, shape, took) in measure(steps.as_mut()) {
            let predicted = cost.step_us(shape);
            println!("{label} {attempt}: {what}: {predicted:.0} us predicted, {took:.0} us taken");
            if !(took / times_off_max..=took * times_off_max).contains(&predicted) {
                wrong.push(what);
            }
        }
        if wrong.is_empty() {
            return;
        }
        println!("{label} {attempt}: not good: {wrong:?}, {cost:?}");
    }
    panic!("{label}: badly predicted {ATTEMPTS} times, the last time {wrong:?}");
}

/// What an engine finds out before its first sequence.
fn probe(executor: Box<dyn Executor>) -> StepCost {
    let config = EngineConfig {
        step_tokens_max: STEP_TOKENS_MAX,
        sequences_max: ROWS,
        queue_max: ROWS,
        prefix_cache: false,
    };
    let mut engine = Engine::new(executor, config);
    engine.probe().expect("the executor works");
    engine.cost().expect("it was measured").clone()
}

/// Some steps, and the microseconds that each takes.
fn measure(executor: &mut dyn Executor) -> Vec<(String, StepShape, f32)> {
    let mut taken = Vec::new();
    for (tokens, before) in PROMPTS {
        // What is before them is there, and no NaN.
        fill(executor, 0, before);
        let shape = StepShape::default().and_prompt(tokens as u64, before as u64);
        let shape = StepShape { rows: 1, ..shape };
        let took = quickest(executor, &plan(&[(0, before..before + tokens)]));
        taken.push((format!("{tokens} tokens behind {before}"), shape, took));
    }
    for context in CONTEXTS {
        for sequence in 0..ROWS {
            fill(executor, sequence, context - 1);
        }
        let parts: Vec<_> = (0..ROWS).map(|row| (row, context - 1..context)).collect();
        let shape = StepShape::decode(ROWS as u64, (ROWS * context) as u64);
        let took = quickest(executor, &plan(&parts));
        taken.push((format!("{ROWS} sequences of {context}"), shape, took));
    }
    taken
}

/// Computes the KV of a sequence's first tokens.
fn fill(executor: &mut dyn Executor, sequence: usize, tokens: usize) {
    if tokens > 0 {
        let plan = plan(&[(sequence, 0..tokens)]);
        executor.forward(&plan).expect("a step");
    }
}

fn quickest(executor: &mut dyn Executor, plan: &StepPlan) -> f32 {
    let run = |_| {
        let begun = Instant::now();
        executor.forward(plan).expect("a step");
        begun.elapsed().as_secs_f32() * 1e6
    };
    (0..RUNS).map(run).fold(f32::INFINITY, f32::min)
}

/// A step of these sequences, each by its number, with these of its tokens; each chooses a token.
fn plan(parts: &[(usize, std::ops::Range<usize>)]) -> StepPlan {
    let mut plan = StepPlan::default();
    for (sequence, range) in parts {
        let (first_token, first_block) = (plan.tokens.len(), plan.blocks.len());
        let token = |at: usize| (sequence * 31 + at * 7) as u32 % 100;
        plan.tokens.extend(range.clone().map(token));
        let own = sequence * EACH..sequence * EACH + range.end.div_ceil(BLOCK_TOKENS);
        plan.blocks.extend(own.map(|block| block as u32));
        plan.sequences.push(SequenceStep {
            key: *sequence as u64,
            tokens: first_token..plan.tokens.len(),
            follows: None,
            start: range.start as u32,
            blocks: first_block..plan.blocks.len(),
            sample: Some(SampleRun {
                len: 1,
                position: range.end as u32,
                state: SampleState::default().into(),
                stop_ids_banned: 0,
                mask: None,
            }),
            targets: 0..0,
            target_top: 0,
        });
    }
    plan
}

impl Sizes {
    fn spec(self) -> UniformSpec {
        const HEAD: usize = 64;
        let heads = self.hidden / HEAD;
        UniformSpec {
            family: "llama".to_owned(),
            hidden: self.hidden,
            intermediate: 2 * self.hidden,
            layers: self.layers,
            heads,
            kv_heads: heads,
            head_dim: HEAD,
            vocab: self.vocab,
            tokens_max: STEP_TOKENS_MAX,
            rms_eps: 1e-5,
            rope: Rope {
                theta: 10_000.0,
                scaling: RopeScaling::None,
            },
            qkv_bias: false,
            qk_norm: false,
            tied_embeddings: false,
            sliding_window: None,
        }
    }
}
