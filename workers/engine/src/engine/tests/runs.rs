//! Several tokens of a sequence in one step: what drafts may change, and what they may not.

use baton_protocol::Sampling;
use proptest::prelude::*;

use super::properties::{alone, watched};
use super::*;
use crate::Drafter;

fn drafting(run_max: usize, drafting: Drafting) -> Setup {
    Setup {
        run_max,
        drafting,
        ..Setup::default()
    }
}

/// Runs of a sequence in all steps that chose something for it.
fn runs_of(driver: &Driver, key: u64) -> Vec<usize> {
    let steps = driver.watch.runs().into_iter().flatten();
    steps
        .filter(|s| s.0 == key && s.1 > 0)
        .map(|s| s.1)
        .collect()
}

#[test]
fn right_drafts_save_steps_and_the_last_run_ends_with_the_text() {
    let (mut engine, mut driver) = watched(drafting(4, Drafting::Right));
    let spec = spec(&prompt(1, 10), 20);
    driver.submit(&mut engine, 1, spec.clone());
    driver.run(&mut engine, 100);
    assert_eq!(driver.outputs[&1], alone(&spec));
    // The prompt's token, four runs of four, and three tokens that are left.
    assert_eq!(runs_of(&driver, 1), [1, 4, 4, 4, 4, 3]);
    assert_empty(&engine);
}

#[test]
fn wrong_drafts_cost_no_token() {
    let (mut engine, mut driver) = watched(drafting(8, Drafting::Wrong));
    let spec = spec(&prompt(1, 10), 20);
    driver.submit(&mut engine, 1, spec.clone());
    driver.run(&mut engine, 100);
    assert_eq!(driver.outputs[&1], alone(&spec));
    assert_eq!(driver.steps, 20);
    assert_empty(&engine);
}

#[test]
fn an_executor_of_single_tokens_is_asked_for_no_more() {
    let (mut engine, mut driver) = watched(drafting(1, Drafting::Right));
    driver.submit(&mut engine, 1, spec(&prompt(1, 10), 20));
    driver.run(&mut engine, 100);
    assert_eq!(runs_of(&driver, 1), [1; 20]);
    assert!(driver.texts.asked().is_empty());
}

#[test]
fn a_stop_token_inside_a_run_ends_it_there() {
    let mut stops = spec(&prompt(1, 10), 20);
    let text = alone(&stops);
    let (mut engine, mut driver) = watched(drafting(8, Drafting::Right));
    // The drafter knows the text beyond the stop token.
    driver
        .texts
        .add([stops.tokens.0.clone(), text.clone()].concat());
    stops.generation.stop_token_ids = vec![text[5]];
    submit(&mut engine, 1, stops.clone()).expect("taken");
    driver.specs.insert(1, stops);
    driver.outputs.insert(1, Vec::new());
    driver.run(&mut engine, 100);
    assert_eq!(runs_of(&driver, 1), [1, 8]);
    assert_eq!(driver.outputs[&1], text[..6]);
    assert_eq!(driver.finished[&1], FinishReason::Stop);
    assert_empty(&engine);
}

/// Every rule at once: counts, bans and log-probabilities of the middle of a run are those of single steps.
#[test]
fn rules_hold_at_every_position_of_a_run() {
    let mut ruled = spec(&prompt(4, 10), 30);
    ruled.generation.min_tokens = 9;
    ruled.generation.stop_token_ids = (0..VOCAB).filter(|i| i % 5 == 0).collect();
    ruled.generation.sampling = Sampling {
        temperature: 1.2,
        seed: 5,
        frequency_penalty: 1.0,
        repetition_penalty: 1.5,
        logprobs: Some(2),
        ..Sampling::default()
    };
    let run = |setup| {
        let (mut engine, mut driver) = watched(setup);
        driver.submit(&mut engine, 1, ruled.clone());
        driver.run(&mut engine, 100);
        (driver.sampled.remove(&1), driver.steps)
    };
    let (expected, steps) = run(Setup::default());
    let made = expected.as_ref().expect("it ran");
    assert!(made.len() >= 9 && made.iter().all(|s| s.logprobs.is_some()));
    for seed in 0..8 {
        let drafting = drafting(8, Drafting::Sometimes(seed));
        assert_eq!(run(drafting).0, expected, "seed {seed}");
    }
    let (found, fewer) = run(drafting(8, Drafting::Right));
    assert_eq!(found, expected);
    assert!(fewer <= steps.div_ceil(8) + 2, "{fewer} steps for {steps}");
}

#[test]
fn a_sequence_with_drafts_in_flight_sits_out_and_the_others_go_ahead() {
    let (mut engine, mut driver) = watched(Setup {
        steps_in_flight: 2,
        ..drafting(3, Drafting::Right)
    });
    driver.submit(&mut engine, 1, spec(&prompt(1, 10), 10));
    // Of this text the drafter knows nothing.
    let unknown = spec(&prompt(2, 10), 6);
    submit(&mut engine, 2, unknown.clone()).expect("taken");
    driver.specs.insert(2, unknown);
    driver.outputs.insert(2, Vec::new());
    driver.run(&mut engine, 100);
    let runs = [
        vec![(1, 1), (2, 1)],
        vec![(1, 3), (2, 1)],
        vec![(2, 1)],
        vec![(1, 3), (2, 1)],
        vec![(2, 1)],
        vec![(1, 3), (2, 1)],
    ];
    assert_eq!(driver.watch.runs(), runs);
    for key in 1..=2 {
        assert_eq!(driver.outputs[&key], alone(&driver.specs[&key]));
    }
    assert_empty(&engine);
}

#[test]
fn a_drafter_without_drafts_is_asked_now_and_then() {
    let (mut engine, mut driver) = watched(Setup {
        steps_in_flight: 2,
        ..drafting(8, Drafting::Right)
    });
    let unknown = spec(&prompt(2, 10), 120);
    submit(&mut engine, 1, unknown.clone()).expect("taken");
    driver.specs.insert(1, unknown.clone());
    driver.outputs.insert(1, Vec::new());
    driver.run(&mut engine, 200);
    assert_eq!(driver.outputs[&1], alone(&unknown));
    let asked: Vec<usize> = driver
        .texts
        .asked()
        .iter()
        .map(|(text, _)| text.len())
        .collect();
    assert_eq!(asked, [11, 44, 77, 110]);
}

#[test]
fn drafts_leave_prompts_their_tokens() {
    let (mut engine, mut driver) = watched(Setup {
        step_tokens: 16,
        ..drafting(8, Drafting::Right)
    });
    driver.submit(&mut engine, 1, spec(&prompt(1, 10), 60));
    driver.step(&mut engine);
    driver.step(&mut engine);
    driver.submit(&mut engine, 2, spec(&prompt(2, 40), 1));
    let before = driver.watch.runs().len();
    while !driver.finished.contains_key(&2) {
        driver.step(&mut engine);
    }
    // 15 tokens of the prompt, 15, and 10; beside those are 5 drafts.
    assert_eq!(
        driver.watch.runs()[before..],
        [[(1, 1), (2, 0)], [(1, 1), (2, 0)], [(1, 6), (2, 1)]]
    );
}

#[test]
fn nobody_gives_up_its_blocks_for_a_draft() {
    // Two sequences of 32 tokens have exactly the arena.
    let setup = Setup {
        blocks: 16,
        prefix_cache: false,
        ..drafting(8, Drafting::Wrong)
    };
    let (mut engine, mut driver) = watched(setup);
    for key in 1..=2 {
        driver.submit(&mut engine, key, spec(&prompt(key as u32, 8), 24));
    }
    driver.run(&mut engine, 100);
    assert_eq!(driver.preemptions, 0);
    assert_empty(&engine);
}

#[test]
fn what_rejected_drafts_leave_is_no_prefix_for_anybody() {
    let (mut engine, mut driver) = watched(drafting(8, Drafting::Wrong));
    let first = spec(&prompt(1, 10), 40);
    driver.submit(&mut engine, 1, first.clone());
    driver.run(&mut engine, 100);
    let text = [first.tokens.0, driver.outputs[&1].clone()].concat();
    for (key, (tokens, drafts)) in (2..).zip(driver.texts.asked()) {
        let mut rejected = spec(&[tokens.clone(), drafts].concat(), 1);
        rejected.tokens.0.push(0);
        rejected.prompt_tokens += 1;
        assert_eq!(tokens, text[..tokens.len()]);
        driver.cached_tokens = 0;
        driver.submit(&mut engine, key, rejected);
        driver.run(&mut engine, 1000);
        let known = tokens.len() / BLOCK_TOKENS as usize * BLOCK_TOKENS as usize;
        assert_eq!(driver.cached_tokens as usize, known, "of {}", tokens.len());
    }
    assert_empty(&engine);
}

#[test]
fn the_drafter_of_the_fake_executor_is_often_right() {
    let setup = Setup::default();
    let drafter = crate::FakeDrafter {
        block_tokens: BLOCK_TOKENS,
        vocab: VOCAB,
    };
    let mut engine = engine(setup).with_drafter(Box::new(drafter));
    let mut driver = Driver::default();
    let spec = spec(&prompt(1, 10), 100);
    driver.submit(&mut engine, 1, spec.clone());
    driver.run(&mut engine, 1000);
    assert_eq!(driver.outputs[&1], super::alone(&spec));
    assert!((20..60).contains(&driver.steps), "{}", driver.steps);
    assert_empty(&engine);
}

/// Says the same whatever comes.
struct Parrot(Vec<u32>);

impl Drafter for Parrot {
    fn draft(&mut self, _: &[u32], most: usize, drafts: &mut Vec<u32>) {
        drafts.extend(self.0.iter().take(most));
    }
}

#[test]
fn a_failure_counts_where_single_steps_would_meet_it() {
    let spec = spec(&prompt(2, 20), 20);
    let text = super::alone(&spec);
    let fault = text[9];
    let engine = |drafter: Box<dyn Drafter>| {
        let mut config = fake(Setup::default());
        config.faults.no_logit = Some(fault);
        let executor = FakeExecutor::new(config);
        engine_on(Setup::default(), Box::new(executor)).with_drafter(drafter)
    };
    // Behind a draft that is right, and then a rejected one that would fail.
    let texts = Texts::default();
    texts.add([spec.tokens.0.clone(), text.clone()].concat());
    let right = texts.oracle(Drafting::Right);
    for drafter in [right, Box::new(Parrot(vec![fault]))] {
        let mut engine = engine(drafter);
        let mut driver = Driver::default();
        driver.submit(&mut engine, 1, spec.clone());
        driver.run(&mut engine, 100);
        assert_eq!(driver.outputs[&1], text[..10]);
        assert_eq!(driver.failed, [1]);
        assert_empty(&engine);
    }
}

#[test]
fn drafts_outside_the_vocabulary_are_not_run() {
    let (engine, watch, _) = watched_sampler(Setup::default());
    let mut engine = engine.with_drafter(Box::new(Parrot(vec![1, VOCAB, 2])));
    let mut driver = Driver {
        watch,
        ..Driver::default()
    };
    let spec = spec(&prompt(1, 10), 8);
    driver.submit(&mut engine, 1, spec.clone());
    driver.run(&mut engine, 100);
    assert_eq!(driver.outputs[&1], alone(&spec));
    assert_eq!(runs_of(&driver, 1)[1..3], [2, 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// A drafter that is always right is never slower: a text of `n` tokens alone takes a step for the prompt and one for each
    /// `run_max` of the others, with any number of steps in flight.
    #[test]
    fn a_drafter_that_is_right_takes_few_steps(
        run_max in 1usize..9,
        steps_in_flight in 1usize..5,
        max_tokens in 1u32..40,
        prefix_cache in any::<bool>(),
    ) {
        let setup = Setup { steps_in_flight, prefix_cache, ..drafting(run_max, Drafting::Right) };
        let (mut engine, mut driver) = watched(setup);
        let spec = spec(&prompt(1, 10), max_tokens);
        driver.submit(&mut engine, 1, spec.clone());
        driver.run(&mut engine, 100);
        prop_assert_eq!(&driver.outputs[&1], &alone(&spec));
        let steps = 1 + (max_tokens as usize - 1).div_ceil(run_max);
        prop_assert_eq!(driver.watch.runs().len(), steps);
        assert_empty(&engine);
    }
}
