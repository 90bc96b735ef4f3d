use std::collections::HashMap;

use baton_protocol::{BlockRun, CacheSalt, FinishReason, Generation, PackedTokens};

use super::*;
use crate::{Constraint, FakeConfig, FakeExecutor, Sampled};

mod behaviour;
mod budget;
mod classes;
mod constraints;
mod fairness;
mod flights;
mod oracle;
mod properties;
mod runs;
mod sampler;
mod streaming;

use constraints::Rule;
use oracle::{Drafting, Texts};
use sampler::{Watch, sampler, watched_sampler};

const BLOCK_TOKENS: u32 = 4;
const VOCAB: u32 = 1000;

#[derive(Clone, Copy, Debug)]
struct Setup {
    blocks: u32,
    step_tokens: usize,
    sequences: usize,
    queue: usize,
    prefix_cache: bool,
    steps_in_flight: usize,
    run_max: usize,
    drafting: Drafting,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            blocks: 256,
            step_tokens: 64,
            sequences: 8,
            queue: 1000,
            prefix_cache: true,
            steps_in_flight: 1,
            run_max: 8,
            drafting: Drafting::Off,
        }
    }
}

fn fake(setup: Setup) -> FakeConfig {
    let mut config = FakeConfig {
        blocks: setup.blocks,
        vocab: VOCAB,
        tokens_max: 512,
        steps_in_flight: setup.steps_in_flight,
        run_max: setup.run_max,
        ..FakeConfig::default()
    };
    config.kv.block_tokens = BLOCK_TOKENS;
    config
}

fn engine(setup: Setup) -> Engine {
    engine_on(setup, Box::new(FakeExecutor::new(fake(setup))))
}

fn engine_on(setup: Setup, executor: Box<dyn Executor>) -> Engine {
    let config = EngineConfig {
        step_tokens_max: setup.step_tokens,
        sequences_max: setup.sequences,
        queue_max: setup.queue,
        prefix_cache: setup.prefix_cache,
    };
    Engine::new(executor, config)
}

fn spec(prompt: &[u32], max_tokens: u32) -> SequenceSpec {
    SequenceSpec {
        tokens: PackedTokens(prompt.to_vec()),
        prompt_tokens: prompt.len() as u32,
        generation: Generation {
            max_tokens,
            ..Generation::default()
        },
        cache_salt: CacheSalt::NONE,
        service: baton_protocol::Service::default(),
    }
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32)
        .map(|i| (seed * 31 + i * 7) % VOCAB)
        .collect()
}

fn submit(engine: &mut Engine, key: u64, spec: SequenceSpec) -> Result<(), Refusal> {
    submit_with(engine, key, spec, None)
}

fn submit_with(
    engine: &mut Engine,
    key: u64,
    spec: SequenceSpec,
    constraint: Option<Box<dyn Constraint>>,
) -> Result<(), Refusal> {
    engine.submit(NewSequence {
        key,
        spec,
        prompt_logprobs: None,
        constraint,
        // Half of all; nobody's tokens, and no bound on waits, may depend on it.
        stream: key % 2 == 1,
    })
}

/// What a worker of role `both` does: adopt every prefilled sequence, and run a preempted one again as prompt and
/// output so far.
#[derive(Default)]
struct Driver {
    specs: HashMap<u64, SequenceSpec>,
    /// What outputs must follow.
    rules: HashMap<u64, Rule>,
    outputs: HashMap<u64, Vec<u32>>,
    /// Tokens of resumed sequences, with what is reported of them.
    sampled: HashMap<u64, Vec<Sampled>>,
    finished: HashMap<u64, FinishReason>,
    cached_tokens: u32,
    preemptions: usize,
    failed: Vec<u64>,
    refused: Vec<u64>,
    /// Prompts that are streamed: their blocks, and tokens whose KV is there.
    begun: HashMap<u64, (Vec<BlockRun>, u32)>,
    /// How many have been.
    streamed: usize,
    steps: usize,
    watch: Watch,
    /// What a drafter may know.
    texts: Texts,
}

impl Driver {
    fn submit(&mut self, engine: &mut Engine, key: u64, spec: SequenceSpec) {
        self.begun.remove(&key); // of one that was aborted
        if !self.rules.contains_key(&key) {
            self.texts.learn(&spec);
        }
        submit_with(engine, key, spec.clone(), self.constraint(key)).expect("taken");
        self.specs.insert(key, spec);
        self.outputs.insert(key, Vec::new());
    }

    /// Of what must come after the output so far.
    fn constraint(&self, key: u64) -> Option<Box<dyn Constraint>> {
        let output = self.outputs.get(&key).map_or(&[][..], Vec::as_slice);
        self.rules.get(&key).map(|rule| rule.after(output))
    }

    fn so_far(&self, key: u64) -> SequenceSpec {
        let mut spec = self.specs[&key].clone();
        spec.tokens.0.extend(&self.outputs[&key]);
        spec
    }

    fn step(&mut self, engine: &mut Engine) {
        self.steps += 1;
        for event in engine.step().expect("the fake does not fail") {
            match event {
                Event::Prefilled {
                    key,
                    blocks,
                    sampled,
                    finish,
                    cached_tokens,
                    ..
                } => {
                    let spec = self.so_far(key);
                    if let Some((runs, computed)) = self.begun.remove(&key) {
                        assert_eq!(blocks.runs(), runs, "sequence {key} kept its blocks");
                        assert!((computed as usize) < spec.tokens.0.len());
                    }
                    self.cached_tokens += cached_tokens;
                    self.outputs
                        .get_mut(&key)
                        .expect("known")
                        .push(sampled.token);
                    match finish {
                        Some(finish) => drop(self.finished.insert(key, finish)),
                        None => {
                            let resumed = ResumedSequence {
                                key,
                                spec,
                                next: sampled.token,
                                blocks,
                                constraint: self.constraint(key),
                            };
                            engine.resume(resumed).expect("taken");
                        }
                    }
                }
                Event::Token {
                    key,
                    index,
                    sampled,
                    finish,
                } => {
                    let output = self.outputs.get_mut(&key).expect("known");
                    assert_eq!(output.len(), index as usize, "sequence {key} has a gap");
                    output.push(sampled.token);
                    self.sampled.entry(key).or_default().push(sampled);
                    self.finished.extend(finish.map(|finish| (key, finish)));
                }
                Event::Begun {
                    key,
                    runs,
                    computed,
                    cached_tokens,
                    ..
                } => {
                    assert!(computed > cached_tokens, "sequence {key} has had a step");
                    let before = self.begun.insert(key, (runs, computed));
                    assert_eq!(before, None, "sequence {key} began twice");
                    self.streamed += 1;
                }
                Event::Computed { key, computed } => {
                    // Of what began before this driver looked it knows nothing.
                    if let Some((_, before)) = self.begun.get_mut(&key) {
                        assert!(std::mem::replace(before, computed) < computed);
                    }
                }
                Event::Failed { key, detail } => {
                    self.begun.remove(&key);
                    assert!(detail.contains("no finite logit"), "{detail}");
                    self.failed.push(key);
                }
                Event::Refused { key, detail } => {
                    self.begun.remove(&key);
                    assert!(detail.contains("broken step plan"), "{detail}");
                    self.refused.push(key);
                }
                Event::Preempted { key } => {
                    self.preemptions += 1;
                    let constraint = self.constraint(key);
                    submit_with(engine, key, self.so_far(key), constraint).expect("taken again");
                }
            }
        }
        self.check(engine);
    }

    /// Books that agree, and no block given back that a step in flight may touch.
    fn check(&self, engine: &Engine) {
        engine.check().expect("sound");
        for block in self.watch.blocks() {
            let held = engine.pool().is_held(block);
            assert!(held, "block {block} was given back under a step in flight");
        }
        // Prompts are resumed in the blocks that they need, and rejected drafts leave nothing.
        let decoding = engine.scheduler.decoding.iter();
        for sequence in decoding.filter(|sequence| sequence.in_flight == 0) {
            let needed = sequence.tokens.len().div_ceil(BLOCK_TOKENS as usize);
            let held = sequence.blocks.len();
            assert!(held <= needed, "{held} blocks for {needed} are held");
        }
    }

    fn run(&mut self, engine: &mut Engine, steps_max: usize) {
        while engine.has_work() {
            assert!(
                self.steps < steps_max,
                "not done after {steps_max} steps: {engine:?}"
            );
            self.step(engine);
            let may_stall = !self.rules.is_empty();
            assert!(
                may_stall || !engine.is_stalled(),
                "nobody outside holds a block"
            );
        }
    }
}

fn assert_empty(engine: &Engine) {
    let stats = engine.pool().stats();
    assert_eq!((stats.used, stats.quarantined), (0, 0), "{stats:?}");
    assert_eq!(stats.available(), stats.total);
    engine.check().expect("sound");
    assert!(!engine.has_work());
    assert_eq!(engine.load(), EngineLoad::default());
}

/// Room for any one sequence of these tests, in one chunk.
const ROOMY: Setup = Setup {
    blocks: 256,
    step_tokens: 4096,
    sequences: 8,
    queue: 1000,
    prefix_cache: false,
    steps_in_flight: 1,
    run_max: 1,
    drafting: Drafting::Off,
};

/// The text of one sequence that has the engine to itself.
fn alone_on(engine: &mut Engine, spec: &SequenceSpec) -> Vec<u32> {
    let mut driver = Driver::default();
    driver.submit(engine, 1, spec.clone());
    driver.run(engine, 1000);
    driver.outputs.remove(&1).expect("known")
}

/// The same, as the fake executor writes it.
fn alone(spec: &SequenceSpec) -> Vec<u32> {
    alone_on(&mut engine(ROOMY), spec)
}
