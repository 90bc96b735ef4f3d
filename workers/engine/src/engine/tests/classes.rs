//! Batch sequences wait for interactive ones, and none of them for ever.

use std::cell::Cell;
use std::time::Duration;

use baton_protocol::{Service, Tier};
use proptest::prelude::*;

use super::*;
use crate::scheduler::BATCH_TURN;

/// What a step takes.
const STEP: Duration = Duration::from_millis(50);

/// Steps until a batch sequence has its turn.
const TURN_STEPS: usize = BATCH_TURN.as_millis().div_ceil(STEP.as_millis()) as usize;

thread_local! {
    static STEPS: Cell<u32> = const { Cell::new(0) };
}

/// An engine whose clock goes on with [`step`] alone.
fn timed(setup: Setup) -> Engine {
    static BEGAN: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    engine(setup).with_clock(|| *BEGAN + STEP * STEPS.get())
}

fn step(driver: &mut Driver, engine: &mut Engine) {
    driver.step(engine);
    STEPS.set(STEPS.get() + 1);
}

fn spec_of(tier: Tier, key: u64, prompt_tokens: usize, max_tokens: u32) -> SequenceSpec {
    let mut spec = spec(&prompt(key as u32, prompt_tokens), max_tokens);
    spec.service.tier = tier;
    spec
}

/// Interactive requests without end: two prompts at least always wait.
struct Endless {
    next: u64,
    prompt_tokens: usize,
    max_tokens: u32,
}

impl Endless {
    fn new(prompt_tokens: usize, max_tokens: u32) -> Self {
        Self {
            next: 1_000,
            prompt_tokens,
            max_tokens,
        }
    }

    fn come(&mut self, driver: &mut Driver, engine: &mut Engine) {
        let waiting = |engine: &Engine| {
            let waiting = engine.scheduler.waiting.iter();
            waiting.filter(|s| !s.is_batch()).count()
        };
        while waiting(engine) < 2 {
            let spec = spec_of(
                Tier::Interactive,
                self.next,
                self.prompt_tokens,
                self.max_tokens,
            );
            driver.submit(engine, self.next, spec);
            self.next += 1;
        }
    }
}

/// Steps until this sequence has its first token, beside interactive requests without end.
fn steps_to_token(
    driver: &mut Driver,
    engine: &mut Engine,
    key: u64,
    endless: &mut Endless,
) -> usize {
    let before = driver.outputs[&key].len();
    for steps in 0..10 * TURN_STEPS {
        if driver.outputs[&key].len() > before {
            return steps;
        }
        endless.come(driver, engine);
        step(driver, engine);
    }
    panic!("sequence {key} waits for ever");
}

#[test]
fn a_batch_prompt_begins_in_its_turn_however_many_interactive_ones_wait() {
    let mut engine = timed(Setup {
        sequences: 2,
        ..Setup::default()
    });
    let mut driver = Driver::default();
    let mut endless = Endless::new(8, 1);
    endless.come(&mut driver, &mut engine);
    driver.submit(&mut engine, 1, spec_of(Tier::Batch, 1, 8, 1));
    let steps = steps_to_token(&mut driver, &mut engine, 1, &mut endless);
    assert!((TURN_STEPS..TURN_STEPS + 4).contains(&steps), "{steps}");
    // And the next one as long after it.
    driver.submit(&mut engine, 2, spec_of(Tier::Batch, 2, 8, 1));
    let steps = steps_to_token(&mut driver, &mut engine, 2, &mut endless);
    assert!((TURN_STEPS..TURN_STEPS + 4).contains(&steps), "{steps}");
}

#[test]
fn a_resumed_batch_sequence_goes_on_in_its_turn_and_then_to_its_end() {
    for max_tokens in [1, 3] {
        let mut engine = timed(Setup {
            sequences: 2,
            ..Setup::default()
        });
        let mut driver = Driver::default();
        driver.submit(&mut engine, 1, spec_of(Tier::Batch, 1, 8, 20));
        let mut endless = Endless::new(8, max_tokens);
        // Its prompt runs while nobody else is there.
        while driver.outputs[&1].is_empty() {
            step(&mut driver, &mut engine);
        }
        let steps = steps_to_token(&mut driver, &mut engine, 1, &mut endless);
        assert!((TURN_STEPS..TURN_STEPS + 8).contains(&steps), "{steps}");
        for left in (0..18).rev() {
            endless.come(&mut driver, &mut engine);
            step(&mut driver, &mut engine);
            assert_eq!(driver.finished.contains_key(&1), left == 0);
        }
        assert_eq!(driver.preemptions, 0);
    }
}

#[test]
fn in_a_full_batch_an_interactive_sequence_takes_the_place_of_a_batch_one() {
    for steps_in_flight in [1, 2, 3] {
        let mut engine = timed(Setup {
            sequences: 3,
            steps_in_flight,
            ..Setup::default()
        });
        let mut driver = Driver::default();
        for key in 1..=3 {
            driver.submit(&mut engine, key, spec_of(Tier::Batch, key, 8, 40));
        }
        for _ in 0..6 {
            step(&mut driver, &mut engine);
        }
        let begun = |driver: &Driver| [1, 2, 3].map(|key| driver.outputs[&key].len());
        assert!(begun(&driver).iter().all(|tokens| *tokens > 0));
        driver.submit(&mut engine, 9, spec_of(Tier::Interactive, 9, 8, 10));
        let before = begun(&driver);
        let mut steps = 0;
        while !driver.finished.contains_key(&9) {
            step(&mut driver, &mut engine);
            steps += 1;
        }
        // Ten tokens, and steps in flight before and after its prompt.
        assert!(steps <= 10 + 3 * steps_in_flight, "{steps}");
        let after = begun(&driver);
        let passed = |at: usize| after[at] - before[at];
        assert!(
            passed(2) + 6 < passed(0),
            "the last one waited: {before:?} {after:?}"
        );
        driver.run(&mut engine, 1_000);
        assert_eq!(driver.preemptions, 0);
        assert_empty(&engine);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever comes in which class, batch requests end beside interactive ones without end.
    #[test]
    fn batch_requests_end_whatever_else_comes(
        sequences in 1usize..5,
        steps_in_flight in 1usize..4,
        jobs in prop::collection::vec((any::<bool>(), -2i32..3, 1usize..40, 1u32..30), 1..8),
        endless in (1usize..30, 1u32..6),
    ) {
        let mut engine = timed(Setup {
            blocks: 4096,
            step_tokens: 32,
            sequences,
            steps_in_flight,
            ..Setup::default()
        });
        let mut driver = Driver::default();
        let mut endless = Endless::new(endless.0, endless.1);
        endless.come(&mut driver, &mut engine);
        // An interactive sequence and its prompt, before a place is free.
        let place = endless.prompt_tokens + endless.max_tokens as usize + 3 * steps_in_flight;
        let mut steps_max = SLACK;
        for (key, (batch, priority, prompt_tokens, output)) in (1..).zip(&jobs) {
            let tier = if *batch { Tier::Batch } else { Tier::Interactive };
            let mut spec = spec_of(tier, key, *prompt_tokens, *output);
            spec.service = Service { priority: *priority, ..spec.service };
            driver.submit(&mut engine, key, spec);
            // Its prompt has its turn, and then its output, each with the place of another.
            steps_max += 2 * (TURN_STEPS + place) + prompt_tokens + *output as usize;
        }
        let ended = |driver: &Driver, at: usize| driver.finished.contains_key(&(at as u64 + 1));
        let all = (0..jobs.len()).filter(|at| jobs[*at].0).collect::<Vec<_>>();
        for _ in 0..steps_max {
            if all.iter().all(|at| ended(&driver, *at)) {
                break;
            }
            endless.come(&mut driver, &mut engine);
            step(&mut driver, &mut engine);
        }
        let left: Vec<_> = all.iter().filter(|at| !ended(&driver, **at)).collect();
        prop_assert!(left.is_empty(), "{left:?} wait after {steps_max} steps");
        prop_assert_eq!(driver.preemptions, 0);
    }
}

/// Steps that no bound counts.
const SLACK: usize = 20;
