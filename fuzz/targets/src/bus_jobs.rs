//! Jobs from the bus in an engine: taken or refused, run, handed over, aborted, forged, twice under one name.

use std::collections::HashMap;

use arbitrary::{Arbitrary, Unstructured};
use baton_engine::{
    BlockTable, Engine, EngineConfig, Event, FakeConfig, FakeExecutor, NewSequence, ResumedSequence,
};
use baton_protocol::{CacheSalt, Generation, Sampling, SequenceSpec};

use crate::fixture;

#[derive(Arbitrary, Debug)]
enum Step {
    Prefill(Job, Option<u8>),
    /// Goes on from a hand-over, with the job as it was or another.
    Decode(u8, Option<Job>, u16),
    /// Goes on from blocks that hold nothing of it.
    Forged(Job, u16, u8),
    Abort(u8),
    Release(u8),
    Run(u8),
}

#[derive(Arbitrary, Debug)]
struct Job {
    key: u8,
    tokens: Vec<u16>,
    prompt_tokens: u32,
    max_tokens: u32,
    min_tokens: u32,
    stop_token_ids: Vec<u32>,
    logprobs: Option<u8>,
    numbers: [f32; 6],
    plain: bool,
    logit_bias: Vec<(u32, f32)>,
    seed: u64,
}

impl Job {
    fn spec(&self) -> SequenceSpec {
        let [
            temperature,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
        ] = self.numbers;
        let sampling = match self.plain {
            true => Sampling::default(),
            false => Sampling {
                temperature,
                top_k: 0,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias: self.logit_bias.clone(),
                seed: self.seed,
                logprobs: self.logprobs,
            },
        };
        // Mostly of the vocabulary.
        let token = |token: &u16| match token % 64 {
            63 => u32::from(*token),
            _ => u32::from(*token) % fixture::VOCAB,
        };
        SequenceSpec {
            tokens: self.tokens.iter().map(token).collect::<Vec<u32>>().into(),
            prompt_tokens: self.prompt_tokens,
            generation: Generation {
                sampling,
                stop_token_ids: self.stop_token_ids.clone(),
                min_tokens: self.min_tokens,
                max_tokens: self.max_tokens,
                grammar: None,
                token_rules: None,
            },
            cache_salt: CacheSalt::NONE,
            service: baton_protocol::Service::default(),
        }
    }
}

/// Steps of an engine, more than which no input needs: each is a token for somebody.
const STEPS_MAX: usize = 100_000;

/// Carries the steps out. At the end every job has ended and no block is held.
pub fn bus_jobs(data: &[u8]) {
    let Ok(steps) = Vec::<Step>::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let checks = fixture::checks();
    let mut engine = engine();
    let pool = engine.pool();
    let mut staged: HashMap<u64, (SequenceSpec, u32, BlockTable)> = HashMap::new();
    let mut specs: HashMap<u64, SequenceSpec> = HashMap::new();
    for step in steps.into_iter().take(64) {
        match step {
            Step::Prefill(job, prompt_logprobs) => {
                let (key, mut spec) = (u64::from(job.key), job.spec());
                if checks.sequence(&mut spec).is_err() {
                    continue;
                }
                // As the desk does: what an earlier try left here ends.
                engine.abort(key);
                staged.remove(&key);
                specs.insert(key, spec.clone());
                let submitted = engine.submit(NewSequence {
                    key,
                    spec,
                    prompt_logprobs: prompt_logprobs.map(|top| top % 21),
                    constraint: None,
                    stream: false,
                });
                if submitted.is_err() {
                    specs.remove(&key);
                }
            }
            Step::Decode(key, other, next) => {
                let key = u64::from(key);
                let Some((spec, first, blocks)) = staged.remove(&key) else {
                    continue;
                };
                let (mut spec, next) = match other {
                    Some(job) => (job.spec(), u32::from(next)),
                    None => (spec, first),
                };
                let next_known = checks.token("next", std::iter::once(next)).is_ok();
                if next_known && checks.resumed(&mut spec).is_ok() {
                    resume(&mut engine, key, spec, next, blocks);
                }
            }
            Step::Forged(job, next, blocks) => {
                let (key, mut spec, next) = (u64::from(job.key), job.spec(), u32::from(next));
                let next_known = checks.token("next", std::iter::once(next)).is_ok();
                if next_known
                    && checks.resumed(&mut spec).is_ok()
                    && let Some(blocks) = pool.reserve(usize::from(blocks))
                {
                    engine.abort(key);
                    resume(&mut engine, key, spec, next, blocks);
                }
            }
            Step::Abort(key) => {
                engine.abort(u64::from(key));
                staged.remove(&u64::from(key));
            }
            Step::Release(key) => drop(staged.remove(&u64::from(key))),
            Step::Run(count) => {
                for _ in 0..count {
                    run(&mut engine, &mut specs, &mut staged);
                }
            }
        }
        engine.check().expect("blocks and sequences agree");
    }
    // What waits for blocks gets them when nothing is staged any more.
    staged.clear();
    let mut count = 0;
    while engine.has_work() {
        run(&mut engine, &mut specs, &mut staged);
        staged.clear();
        count += 1;
        assert!(count < STEPS_MAX, "a job never ends: {:?}", engine.load());
    }
    engine.check().expect("blocks and sequences agree");
    let stats = pool.stats();
    assert_eq!((stats.used, stats.quarantined), (0, 0), "{stats:?}");
}

fn engine() -> Engine {
    let executor = FakeExecutor::new(FakeConfig {
        kv: fixture::kv(),
        blocks: fixture::BLOCKS,
        vocab: fixture::VOCAB,
        tokens_max: fixture::TOKENS_MAX,
        step_sequences_max: 8,
        step_tokens_max: 64,
        steps_in_flight: 2,
        ..FakeConfig::default()
    });
    let config = EngineConfig {
        step_tokens_max: 64,
        sequences_max: 8,
        queue_max: 8,
        prefix_cache: true,
    };
    Engine::new(Box::new(executor), config)
}

fn resume(engine: &mut Engine, key: u64, spec: SequenceSpec, next: u32, blocks: BlockTable) {
    // The engine's own checks are the last ones; what it refuses gives its blocks back.
    let _ = engine.resume(ResumedSequence {
        key,
        spec,
        next,
        blocks,
        constraint: None,
    });
}

fn run(
    engine: &mut Engine,
    specs: &mut HashMap<u64, SequenceSpec>,
    staged: &mut HashMap<u64, (SequenceSpec, u32, BlockTable)>,
) {
    for event in engine.step().expect("the fake executor does not break") {
        if let Event::Prefilled {
            key,
            blocks,
            sampled,
            finish: None,
            ..
        } = event
            && let Some(spec) = specs.remove(&key)
        {
            staged.insert(key, (spec, sampled.token, blocks));
        }
    }
}
