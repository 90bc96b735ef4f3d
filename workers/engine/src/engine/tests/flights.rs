//! Steps ahead of what is known: when there is one, and that nobody can tell from the tokens.

use std::collections::VecDeque;

use baton_protocol::Sampling;
use proptest::prelude::*;

use super::properties::{Job, alone, job, setup};
use super::*;
use crate::FakeKv;

const TWO: Setup = Setup {
    blocks: 64,
    step_tokens: 64,
    sequences: 8,
    queue: 1000,
    prefix_cache: true,
    steps_in_flight: 2,
    run_max: 8,
    drafting: Drafting::Off,
};

fn two() -> (Engine, Driver) {
    let (engine, watch, _) = watched_sampler(TWO);
    let driver = Driver {
        watch,
        ..Driver::default()
    };
    (engine, driver)
}

/// Steps in flight after each step until all is done.
fn run(engine: &mut Engine, driver: &mut Driver) -> Vec<usize> {
    let mut in_flight = Vec::new();
    while engine.has_work() {
        driver.step(engine);
        in_flight.push(driver.watch.steps());
    }
    assert_empty(engine);
    for (key, output) in &driver.outputs {
        assert_eq!(output, &alone(&driver.specs[key]), "sequence {key}");
    }
    in_flight
}

#[test]
fn steps_of_prompts_and_of_generating_sequences_overlap() {
    let (mut engine, mut driver) = two();
    driver.submit(&mut engine, 1, spec(&prompt(1, 100), 5));
    // Two chunks, then four decode steps, of which the last ends all: nothing is planned behind it.
    assert_eq!(run(&mut engine, &mut driver), [1, 0, 1, 1, 1, 0]);
}

#[test]
fn a_prompt_that_could_share_what_is_computed_waits_for_it() {
    let (mut engine, mut driver) = two();
    driver.submit(&mut engine, 1, spec(&prompt(1, 100), 2));
    driver.submit(&mut engine, 2, spec(&prompt(2, 40), 1));
    engine.step().expect("runs"); // half of each step is the first one's, the second has the rest
    let shared = prompt(1, 100);
    driver.submit(&mut engine, 3, spec(&shared[..90], 1));
    run(&mut engine, &mut driver);
    // All whole blocks of it but for what the third must compute to choose a token.
    assert!(driver.cached_tokens >= 88, "{}", driver.cached_tokens);
}

#[test]
fn a_prompt_is_in_the_next_step_that_is_planned() {
    let (mut engine, mut driver) = two();
    driver.submit(&mut engine, 1, spec(&prompt(1, 10), 20));
    driver.step(&mut engine);
    driver.step(&mut engine);
    assert_eq!(driver.watch.steps(), 1);
    driver.submit(&mut engine, 2, spec(&prompt(2, 10), 2));
    // It runs behind the decode step in flight, which is collected meanwhile.
    driver.step(&mut engine);
    assert_eq!(driver.watch.steps(), 1);
    driver.step(&mut engine);
    assert_eq!(driver.outputs[&2].len(), 1);
    run(&mut engine, &mut driver);
}

#[test]
fn penalties_count_one_token_that_is_not_here() {
    let setup = Setup {
        steps_in_flight: 3,
        ..TWO
    };
    let (mut engine, watch, _) = watched_sampler(setup);
    let mut driver = Driver {
        watch,
        ..Driver::default()
    };
    let mut penalised = spec(&prompt(1, 10), 8);
    penalised.generation.sampling = Sampling {
        repetition_penalty: 1.3,
        ..Sampling::default()
    };
    driver.submit(&mut engine, 1, penalised);
    assert_eq!(run(&mut engine, &mut driver), [0, 1, 1, 1, 1, 1, 1, 0]);
}

#[test]
fn a_row_behind_the_end_is_thrown_away_and_its_blocks_wait_for_it() {
    let (mut engine, mut driver) = two();
    let mut stops = spec(&prompt(1, 10), 20);
    let text = alone(&stops);
    stops.generation.stop_token_ids = vec![text[5]];
    driver.submit(&mut engine, 1, stops);
    while !driver.finished.contains_key(&1) {
        driver.step(&mut engine);
    }
    assert_eq!(driver.outputs[&1], text[..6]);
    assert_eq!(engine.load(), EngineLoad::default());
    assert!(engine.has_work(), "one step more is in flight");
    assert!(engine.pool().stats().used > 0);
    driver.step(&mut engine);
    assert_empty(&engine);
}

#[test]
fn a_key_may_come_again_while_its_last_step_is_in_flight() {
    let (mut engine, mut driver) = two();
    driver.submit(&mut engine, 1, spec(&prompt(1, 10), 20));
    driver.step(&mut engine);
    driver.step(&mut engine);
    assert!(engine.abort(1) && !engine.abort(1));
    driver.check(&engine);
    assert!(engine.pool().stats().used > 0);
    driver.submit(&mut engine, 1, spec(&prompt(2, 10), 3));
    run(&mut engine, &mut driver);
}

#[test]
fn equal_texts_share_blocks_and_those_given_up_wait() {
    let (mut engine, mut driver) = two();
    for key in 0..2 {
        driver.submit(&mut engine, key, spec(&prompt(1, 10), 20));
    }
    run(&mut engine, &mut driver);
}

#[test]
fn settling_brings_back_the_blocks_of_the_aborted() {
    let (mut engine, mut driver) = two();
    for key in 0..3 {
        driver.submit(&mut engine, key, spec(&prompt(key as u32, 10), 20));
    }
    driver.step(&mut engine);
    driver.step(&mut engine);
    for key in 0..3 {
        engine.abort(key);
    }
    assert!(engine.has_work());
    assert!(engine.settle().expect("runs").is_empty());
    assert_empty(&engine);
}

#[derive(Clone, Debug)]
enum Deed {
    Submit(Job),
    Abort(u64),
    Step,
    /// Somebody outside takes blocks and writes them, as a pull does.
    Take(usize),
    /// The oldest of those is given back.
    GiveBack,
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        2 => job().prop_map(Deed::Submit),
        1 => (0u64..20).prop_map(Deed::Abort),
        8 => Just(Deed::Step),
        1 => (1usize..12).prop_map(Deed::Take),
        1 => Just(Deed::GiveBack),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// However many steps are in flight, with stops, aborts, preemptions and others that write blocks as soon as they get
    /// them: every text is the one it has alone, and no block is given back under a step.
    #[test]
    fn nobody_can_tell_from_the_tokens(setup in setup(), deeds in prop::collection::vec(deed(), 1..120)) {
        let (engine, watch, memory) = watched_sampler(setup);
        let texts = Texts::default();
        let mut engine = texts.drafting(engine, setup.drafting);
        let mut driver = Driver { watch, texts, ..Driver::default() };
        let (mut keys, mut aborted, mut outside) = (0, Vec::new(), VecDeque::new());
        for deed in deeds {
            match deed {
                Deed::Submit(job) => {
                    driver.submit(&mut engine, keys, job.spec(keys));
                    keys += 1;
                }
                Deed::Abort(key) => aborted.extend(engine.abort(key).then_some(key)),
                Deed::Step => driver.step(&mut engine),
                Deed::Take(blocks) => outside.extend(engine.pool().reserve(blocks)),
                Deed::GiveBack => drop(outside.pop_front()),
            }
            for block in outside.iter().flat_map(BlockTable::ids) {
                (0..BLOCK_TOKENS).for_each(|slot| memory.write(*block, slot, 0xdead));
            }
            driver.check(&engine);
        }
        outside.clear();
        driver.run(&mut engine, 100_000);
        for key in (0..keys).filter(|key| !aborted.contains(key)) {
            prop_assert_eq!(&driver.outputs[&key], &alone(&driver.specs[&key]), "sequence {}", key);
        }
        assert_empty(&engine);
    }
}
