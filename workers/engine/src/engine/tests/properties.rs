//! What holds whatever happens.

use baton_protocol::{CacheSalt, Sampling};
use proptest::prelude::*;

use super::*;

pub fn watched(setup: Setup) -> (Engine, Driver) {
    let (engine, watch, _) = watched_sampler(setup);
    let texts = Texts::default();
    let engine = texts.drafting(engine, setup.drafting);
    let driver = Driver {
        watch,
        texts,
        ..Driver::default()
    };
    (engine, driver)
}

/// The text of one sequence alone in a roomy engine without a cache and without chunks.
pub fn alone(spec: &SequenceSpec) -> Vec<u32> {
    alone_on(&mut sampler(ROOMY), spec)
}

#[derive(Clone, Debug)]
pub struct Job {
    /// Which family of prompts, and how much of the family's beginning it shares.
    family: u32,
    shared: usize,
    own: usize,
    generation: Generation,
}

impl Job {
    pub fn spec(&self, key: u64) -> SequenceSpec {
        let mut tokens = prompt(self.family, self.shared);
        tokens.extend(prompt(100 + key as u32, self.own));
        SequenceSpec {
            generation: self.generation.clone(),
            // One tenant of two, by who it is.
            cache_salt: CacheSalt(u128::from(key % 2)),
            ..spec(&tokens, 1)
        }
    }
}

prop_compose! {
    fn sampling()(
        temperature in prop_oneof![Just(0.0f32), 0.5f32..2.0],
        seed in 0u64..3,
        top_k in prop_oneof![Just(0u32), 1u32..50],
        top_p in prop_oneof![Just(1.0f32), 0.5f32..1.0],
        repetition_penalty in prop_oneof![9 => Just(1.0f32), 1 => 1.0f32..2.0],
        presence_penalty in prop_oneof![9 => Just(0.0f32), 1 => 0.0f32..2.0],
        frequency_penalty in prop_oneof![9 => Just(0.0f32), 1 => 0.0f32..2.0],
        logprobs in prop_oneof![Just(None), Just(Some(2u8))],
    ) -> Sampling {
        Sampling {
            temperature, seed, top_k, top_p, repetition_penalty, presence_penalty, frequency_penalty, logprobs,
            ..Sampling::default()
        }
    }
}

/// Few, or so many that one is soon met.
fn stop_token_ids() -> impl Strategy<Value = Vec<u32>> {
    prop_oneof![
        prop::collection::vec(0..VOCAB, 0..8),
        (0..VOCAB).prop_map(|first| (0..150).map(|i| (first + i) % VOCAB).collect()),
    ]
}

prop_compose! {
    pub fn job()(
        family in 0u32..3,
        shared in 0usize..30,
        own in 1usize..30,
        sampling in sampling(),
        stop_token_ids in stop_token_ids(),
        min_tokens in 0u32..10,
        max_tokens in 1u32..20,
    ) -> Job {
        Job { family, shared, own, generation: Generation { sampling, stop_token_ids, min_tokens, max_tokens, grammar: None, token_rules: None, } }
    }
}

fn drafting() -> impl Strategy<Value = Drafting> {
    prop_oneof![
        Just(Drafting::Off),
        Just(Drafting::Right),
        any::<u64>().prop_map(Drafting::Sometimes),
        Just(Drafting::Wrong),
    ]
}

prop_compose! {
    pub fn setup()(
        blocks in 20u32..80,
        step_tokens in 1usize..80,
        sequences in 1usize..12,
        prefix_cache in any::<bool>(),
        steps_in_flight in 1usize..5,
        run_max in 1usize..9,
        drafting in drafting(),
    ) -> Setup {
        Setup { blocks, step_tokens, sequences, queue: 1000, prefix_cache, steps_in_flight, run_max, drafting }
    }
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
        let (mut engine, mut driver) = watched(setup);
        for (key, (job, pause)) in jobs.iter().enumerate() {
            driver.submit(&mut engine, key as u64, job.spec(key as u64));
            for _ in 0..*pause {
                driver.step(&mut engine);
            }
        }
        // Every sequence alone would take its tokens in steps; a preemption costs its tokens once more, and the
        // oldest is never preempted, so in the worst case each runs again after every other.
        let work: usize = jobs.iter().map(|(job, _)| job.shared + job.own + job.generation.max_tokens as usize).sum();
        driver.run(&mut engine, work * (jobs.len() + 1) + 10);
        for key in 0..jobs.len() as u64 {
            prop_assert_eq!(&driver.outputs[&key], &alone(&driver.specs[&key]), "sequence {}", key);
        }
        assert_empty(&engine);
    }

    /// Aborts at any moment free everything and leave the others' texts alone.
    #[test]
    fn aborts_free_everything(
        setup in setup(),
        jobs in prop::collection::vec((job(), 0usize..4), 1..16),
        aborts in prop::collection::vec((0u64..16, 0usize..5), 0..16),
    ) {
        let (mut engine, mut driver) = watched(setup);
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
            driver.check(&engine);
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
