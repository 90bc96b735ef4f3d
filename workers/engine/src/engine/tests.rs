use std::collections::HashMap;
use std::sync::Arc;

use baton_protocol::{Generation, PackedTokens, Sampling};
use proptest::prelude::*;

use super::*;
use crate::{FakeConfig, FakeExecutor, FakeMemory, StepPlan};

const BLOCK_TOKENS: u32 = 4;

#[derive(Clone, Copy, Debug)]
struct Setup {
    blocks: u32,
    step_tokens: usize,
    sequences: usize,
    queue: usize,
    prefix_cache: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            blocks: 256,
            step_tokens: 64,
            sequences: 8,
            queue: 1000,
            prefix_cache: true,
        }
    }
}

fn fake(setup: Setup) -> FakeConfig {
    let mut config = FakeConfig {
        blocks: setup.blocks,
        vocab: 1000,
        tokens_max: 512,
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
    }
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32)
        .map(|i| (seed * 31 + i * 7) % 1000)
        .collect()
}

fn submit(engine: &mut Engine, key: u64, spec: SequenceSpec) -> Result<(), Refusal> {
    engine.submit(NewSequence {
        key,
        spec,
        prompt_logprobs: None,
    })
}

/// What a worker of role `both` does: adopt every prefilled sequence, and run a preempted one again as prompt and
/// output so far.
#[derive(Default)]
struct Driver {
    specs: HashMap<u64, SequenceSpec>,
    outputs: HashMap<u64, Vec<u32>>,
    finished: HashMap<u64, FinishReason>,
    cached_tokens: u32,
    preemptions: usize,
    steps: usize,
}

impl Driver {
    fn submit(&mut self, engine: &mut Engine, key: u64, spec: SequenceSpec) {
        submit(engine, key, spec.clone()).expect("taken");
        self.specs.insert(key, spec);
        self.outputs.insert(key, Vec::new());
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
                    self.finished.extend(finish.map(|finish| (key, finish)));
                }
                Event::Preempted { key } => {
                    self.preemptions += 1;
                    submit(engine, key, self.so_far(key)).expect("taken again");
                }
            }
        }
    }

    fn run(&mut self, engine: &mut Engine, steps_max: usize) {
        while engine.has_work() {
            assert!(
                self.steps < steps_max,
                "not done after {steps_max} steps: {engine:?}"
            );
            self.step(engine);
            assert!(!engine.is_stalled(), "nobody outside holds a block");
            engine.check().expect("sound");
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

/// The text of one sequence alone in a roomy engine without a cache and without chunks.
fn alone(spec: &SequenceSpec) -> Vec<u32> {
    let setup = Setup {
        step_tokens: 4096,
        prefix_cache: false,
        ..Setup::default()
    };
    let mut engine = engine(setup);
    let mut driver = Driver::default();
    driver.submit(&mut engine, 1, spec.clone());
    driver.run(&mut engine, 1000);
    driver.outputs.remove(&1).expect("known")
}

#[test]
fn a_prompt_is_prefilled_handed_over_and_continued() {
    let mut engine = engine(Setup::default());
    let mut driver = Driver::default();
    driver.submit(&mut engine, 7, spec(&prompt(1, 10), 5));
    driver.run(&mut engine, 100);
    assert_eq!(driver.outputs[&7].len(), 5);
    assert_eq!(driver.finished[&7], FinishReason::Length);
    // One step for the prompt and one for each token but the first.
    assert_eq!(driver.steps, 5);
    assert_empty(&engine);
}

#[test]
fn two_engines_make_the_text_of_one() {
    let setup = Setup::default();
    let spec = spec(&prompt(3, 21), 12);
    let expected = alone(&spec);
    let memories = [(); 2].map(|()| Arc::new(FakeMemory::new(setup.blocks, BLOCK_TOKENS)));
    let [mut context, mut decode] = [0, 1].map(|i: usize| {
        engine_on(
            setup,
            Box::new(FakeExecutor::with_memory(fake(setup), memories[i].clone())),
        )
    });
    // Something else lies in the first blocks of the decode side.
    let hog = decode.pool().reserve(3).expect("room");
    submit(&mut context, 1, spec.clone()).expect("taken");
    let events = context.step().expect("runs");
    let [
        Event::Prefilled {
            blocks, sampled, ..
        },
    ] = &events[..]
    else {
        panic!("{events:?}")
    };

    let pull = |torn: bool| {
        let target = decode.pool().reserve(blocks.len()).expect("room");
        for (from, to) in blocks
            .ids()
            .iter()
            .zip(target.ids())
            .skip(usize::from(torn))
        {
            for slot in 0..BLOCK_TOKENS {
                crate::FakeKv::write(
                    &*memories[1],
                    *to,
                    slot,
                    crate::FakeKv::read(&*memories[0], *from, slot),
                );
            }
        }
        target
    };
    let (whole, torn) = (pull(false), pull(true));
    drop(hog);
    for (key, target) in [(1, whole), (2, torn)] {
        let resumed = ResumedSequence {
            key,
            spec: spec.clone(),
            next: sampled.token,
            blocks: target,
        };
        decode.resume(resumed).expect("taken");
    }
    let mut texts = HashMap::from([(1, vec![sampled.token]), (2, vec![sampled.token])]);
    while decode.has_work() {
        for event in decode.step().expect("runs") {
            let Event::Token { key, sampled, .. } = event else {
                panic!("{event:?}")
            };
            texts.get_mut(&key).expect("known").push(sampled.token);
        }
    }
    assert_eq!(texts[&1], expected);
    assert_ne!(texts[&2], expected, "a missing block must change the text");
    drop(events);
    assert_empty(&context);
    assert_empty(&decode);
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let mut engine = engine(Setup::default());
    let mut driver = Driver::default();
    driver.submit(&mut engine, 1, spec(&prompt(1, 40), 2));
    driver.run(&mut engine, 100);
    let mut longer = prompt(1, 40);
    longer.extend(prompt(2, 5));
    for (key, prompt) in [(2, longer), (3, prompt(1, 40)), (4, prompt(2, 40))] {
        driver.cached_tokens = 0;
        let spec = spec(&prompt, 6);
        driver.submit(&mut engine, key, spec.clone());
        driver.run(&mut engine, 100);
        // Block 9 of the same prompt holds its last token, which must be computed.
        assert_eq!(driver.cached_tokens, [40, 36, 0][key as usize - 2]);
        assert_eq!(driver.outputs[&key], alone(&spec));
    }
    assert_empty(&engine);
}

#[test]
fn stop_ids_end_a_sequence_and_min_tokens_holds_them_off() {
    let mut free = spec(&prompt(5, 9), 10);
    let text = alone(&free);
    free.generation.stop_token_ids = vec![text[3]];
    assert_eq!(alone(&free), text[..4]);
    free.generation.min_tokens = 4;
    let held_off = alone(&free);
    assert_eq!(held_off[..3], text[..3]);
    assert_ne!(held_off[3], text[3]);
    // A prompt whose first token ends it is never resumed.
    free.generation = Generation {
        stop_token_ids: vec![text[0]],
        max_tokens: 10,
        ..Generation::default()
    };
    assert_eq!(alone(&free), text[..1]);
}

#[test]
fn the_longest_sequence_ends_with_length() {
    let mut engine = engine(Setup::default());
    let mut driver = Driver::default();
    driver.submit(&mut engine, 1, spec(&prompt(1, 500), 1000));
    driver.run(&mut engine, 100);
    assert_eq!(driver.outputs[&1].len(), 12);
    assert_eq!(driver.finished[&1], FinishReason::Length);
}

#[test]
fn refusals_say_why() {
    let mut small = engine(Setup {
        blocks: 8,
        queue: 2,
        ..Setup::default()
    });
    let refused = submit(&mut small, 1, spec(&prompt(1, 32), 5));
    assert_eq!(refused, Err(Refusal::TooLong { tokens_max: 32 }));
    let mut refuse = |key, spec| match submit(&mut small, key, spec) {
        Err(Refusal::Malformed { detail }) => detail,
        other => panic!("{other:?}"),
    };
    assert!(refuse(1, spec(&[1, 1000], 5)).contains("1000"));
    assert!(refuse(1, spec(&[], 5)).contains("prompt_tokens"));
    assert!(refuse(1, spec(&[1], 0)).contains("max_tokens"));
    submit(&mut small, 1, spec(&prompt(1, 31), 5)).expect("taken");
    submit(&mut small, 2, spec(&prompt(2, 31), 5)).expect("taken");
    assert!(submit(&mut small, 2, spec(&[1], 1)).is_err());
    assert!(matches!(
        submit(&mut small, 3, spec(&[1], 1)),
        Err(Refusal::Busy { .. })
    ));
    assert_eq!(
        small.load(),
        EngineLoad {
            waiting: 2,
            running: 0,
            waiting_tokens: 62
        }
    );
    assert!(small.abort(1) && small.abort(2) && !small.abort(3));
    assert_empty(&small);
}

#[test]
fn foreign_or_short_blocks_are_not_resumed() {
    let mut engine = engine(Setup::default());
    let foreign = BlockPool::new(8, BLOCK_TOKENS).reserve(3).expect("room");
    let short = engine.pool().reserve(2).expect("room");
    for blocks in [foreign, short] {
        let resumed = ResumedSequence {
            key: 1,
            spec: spec(&prompt(1, 9), 5),
            next: 3,
            blocks,
        };
        assert!(matches!(
            engine.resume(resumed),
            Err(Refusal::Malformed { .. })
        ));
    }
    assert_empty(&engine);
}

#[test]
fn a_stalled_engine_says_so_and_goes_on() {
    let mut engine = engine(Setup {
        blocks: 8,
        ..Setup::default()
    });
    let lease = engine.pool().reserve(6).expect("room");
    submit(&mut engine, 1, spec(&prompt(1, 20), 5)).expect("taken");
    assert!(engine.step().expect("runs").is_empty());
    assert!(engine.is_stalled() && engine.has_work());
    drop(lease);
    assert_eq!(engine.step().expect("runs").len(), 1);
    assert!(!engine.is_stalled());
}

#[test]
fn a_short_prompt_does_not_wait_behind_a_long_one_nor_the_other_way_round() {
    let mut engine = engine(Setup {
        step_tokens: 16,
        ..Setup::default()
    });
    submit(&mut engine, 0, spec(&prompt(9, 400), 1)).expect("taken");
    let mut steps_of = HashMap::new();
    for step in 1..200u64 {
        // One short prompt a step would fill the whole budget.
        submit(&mut engine, step, spec(&prompt(step as u32, 15), 1)).expect("taken");
        for event in engine.step().expect("runs") {
            let Event::Prefilled { key, .. } = event else {
                panic!("{event:?}")
            };
            steps_of.insert(key, step);
        }
    }
    assert_eq!(steps_of[&0], 50, "half of each step is the long prompt's");
    assert!(steps_of[&1] <= 3 && steps_of[&2] <= 5);
    assert!(steps_of.len() > 120);
}

#[test]
fn the_youngest_gives_up_its_blocks() {
    // Four blocks for the prompts; they outgrow the other four at different moments.
    let mut engine = engine(Setup {
        blocks: 8,
        prefix_cache: false,
        ..Setup::default()
    });
    let mut driver = Driver::default();
    for key in 1..=2 {
        driver.submit(&mut engine, key, spec(&prompt(key as u32, 8), 12));
    }
    let mut first_to_finish = None;
    while engine.has_work() {
        driver.step(&mut engine);
        engine.check().expect("sound");
        first_to_finish = first_to_finish.or(driver.finished.keys().next().copied());
    }
    assert!(driver.preemptions > 0);
    assert_eq!(first_to_finish, Some(1));
    for key in 1..=2 {
        assert_eq!(driver.outputs[&key], alone(&driver.specs[&key]));
    }
    assert_empty(&engine);
}

#[test]
fn prompt_logprobs_cover_the_prompt_and_nothing_else() {
    let mut engine = engine(Setup {
        step_tokens: 5,
        ..Setup::default()
    });
    let mut with_output = spec(&prompt(1, 14), 9);
    with_output.prompt_tokens = 11;
    for key in 0..2 {
        let new = NewSequence {
            key,
            spec: with_output.clone(),
            prompt_logprobs: Some(2),
        };
        engine.submit(new).expect("taken");
        let mut events = Vec::new();
        while engine.has_work() {
            events.extend(engine.step().expect("runs"));
        }
        let [
            Event::Prefilled {
                prompt_logprobs: Some(logprobs),
                cached_tokens: 0,
                ..
            },
        ] = &events[..]
        else {
            panic!("{events:?}")
        };
        assert_eq!(logprobs.len(), 10);
        assert!(logprobs.iter().all(|logprobs| logprobs.top.len() == 2));
    }
}

/// An executor that breaks at a given step, in a given way.
struct Broken {
    inner: FakeExecutor,
    good_steps: usize,
    silent: bool,
}

impl Executor for Broken {
    fn info(&self) -> &ExecutorInfo {
        self.inner.info()
    }

    fn forward(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        if self.good_steps > 0 {
            self.good_steps -= 1;
            return self.inner.forward(plan);
        }
        match self.silent {
            true => Ok(StepOutput::default()),
            false => Err(ExecutorError {
                message: "the device fell off the bus".to_owned(),
            }),
        }
    }
}

#[test]
fn a_broken_executor_is_out_of_service() {
    for silent in [false, true] {
        let setup = Setup::default();
        let inner = FakeExecutor::new(fake(setup));
        let mut engine = engine_on(
            setup,
            Box::new(Broken {
                inner,
                good_steps: 1,
                silent,
            }),
        );
        let mut driver = Driver::default();
        driver.submit(&mut engine, 1, spec(&prompt(1, 9), 5));
        driver.step(&mut engine);
        let error = engine.step().expect_err("broken");
        assert_eq!(engine.step().expect_err("still broken"), error);
        assert_eq!(
            submit(&mut engine, 2, spec(&[1], 1)),
            Err(Refusal::Draining)
        );
        assert!(engine.abort(1));
        assert_empty(&engine);
    }
}

#[derive(Clone, Debug)]
struct Job {
    /// Which family of prompts, and how much of the family's beginning it shares.
    family: u32,
    shared: usize,
    own: usize,
    max_tokens: u32,
    seed: u64,
}

impl Job {
    fn spec(&self, key: u64) -> SequenceSpec {
        let mut tokens = prompt(self.family, self.shared);
        tokens.extend(prompt(100 + key as u32, self.own));
        let mut spec = spec(&tokens, self.max_tokens);
        spec.generation.sampling = Sampling {
            temperature: 1.0,
            seed: self.seed,
            ..Sampling::default()
        };
        spec
    }
}

fn job() -> impl Strategy<Value = Job> {
    (0u32..3, 0usize..30, 1usize..30, 1u32..20, 0u64..3).prop_map(
        |(family, shared, own, max_tokens, seed)| Job {
            family,
            shared,
            own,
            max_tokens,
            seed,
        },
    )
}

fn setup() -> impl Strategy<Value = Setup> {
    (20u32..80, 1usize..80, 1usize..12, any::<bool>()).prop_map(
        |(blocks, step_tokens, sequences, prefix_cache)| Setup {
            blocks,
            step_tokens,
            sequences,
            queue: 1000,
            prefix_cache,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the chunk size, the batch, the arena, prefix hits and preemptions: every sequence ends in a bounded
    /// number of steps with the text it has alone.
    #[test]
    fn same_text_whatever_the_company(
        setup in setup(),
        jobs in prop::collection::vec((job(), 0usize..6), 1..16),
    ) {
        let mut engine = engine(setup);
        let mut driver = Driver::default();
        for (key, (job, pause)) in jobs.iter().enumerate() {
            driver.submit(&mut engine, key as u64, job.spec(key as u64));
            for _ in 0..*pause {
                driver.step(&mut engine);
            }
        }
        // Every sequence alone would take its tokens in steps; a preemption costs its tokens once more, and the
        // oldest is never preempted, so in the worst case each runs anew after every other.
        let work: usize = jobs.iter().map(|(job, _)| job.shared + job.own + job.max_tokens as usize).sum();
        driver.run(&mut engine, work * (jobs.len() + 1) + 10);
        for key in 0..jobs.len() as u64 {
            prop_assert_eq!(&driver.outputs[&key], &alone(&driver.specs[&key]), "sequence {}", key);
        }
        assert_empty(&engine);
    }

    /// Aborts at any moment free everything at once and leave the others' texts alone.
    #[test]
    fn aborts_free_everything(
        setup in setup(),
        jobs in prop::collection::vec((job(), 0usize..4), 1..16),
        aborts in prop::collection::vec((0u64..16, 0usize..5), 0..16),
    ) {
        let mut engine = engine(setup);
        let mut driver = Driver::default();
        for (key, (job, pause)) in jobs.iter().enumerate() {
            driver.submit(&mut engine, key as u64, job.spec(key as u64));
            for _ in 0..*pause {
                driver.step(&mut engine);
            }
        }
        let mut aborted = Vec::new();
        for (key, pause) in aborts {
            if engine.abort(key) {
                aborted.push(key);
            }
            prop_assert!(!engine.abort(key));
            engine.check().expect("sound");
            for _ in 0..pause {
                driver.step(&mut engine);
            }
        }
        driver.run(&mut engine, 100_000);
        for key in 0..jobs.len() as u64 {
            let expected = alone(&driver.specs[&key]);
            let made = &driver.outputs[&key];
            match aborted.contains(&key) {
                true => prop_assert!(expected.starts_with(made)),
                false => prop_assert_eq!(made, &expected),
            }
        }
        assert_empty(&engine);
    }

    /// The queue takes what it says and no more, and refusing costs nothing.
    #[test]
    fn the_queue_is_bounded(queue in 0usize..6, submissions in 1usize..12) {
        let mut engine = engine(Setup { queue, ..Setup::default() });
        for key in 0..submissions {
            let taken = submit(&mut engine, key as u64, spec(&prompt(key as u32, 5), 1));
            prop_assert_eq!(taken.is_ok(), key < queue);
        }
        prop_assert_eq!(engine.load().waiting, submissions.min(queue));
        while engine.has_work() {
            engine.step().expect("runs");
        }
        assert_empty(&engine);
    }
}
