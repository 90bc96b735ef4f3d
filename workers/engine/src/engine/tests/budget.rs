//! Steps sized by what they cost.

use std::cell::Cell;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_protocol::{CostPoint, ITL_PART, PAUSE_MAX, Service, StepCost, StepShape, Tier};

use super::*;
use crate::{ExecutorInfo, StepOutput, StepPlan};

/// What each step had in it: (generating rows, prompt tokens).
type Steps = Arc<Mutex<Vec<(usize, usize)>>>;

thread_local! {
    /// Microseconds that steps have taken.
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

/// Notes the shape of every step, and lets the clock go on by what it costs.
struct Noted {
    inner: FakeExecutor,
    steps: Steps,
}

impl Executor for Noted {
    fn info(&self) -> &ExecutorInfo {
        self.inner.info()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let rows = plan.sequences.iter();
        let decodes = rows.filter(|step| step.key < 100).count();
        let step = (decodes, plan.tokens.len() - decodes);
        let us = cost().layers_us(plan.tokens.len() as u64) as u64;
        TAKEN.set(TAKEN.get() + us);
        self.steps.lock().unwrap().push(step);
        self.inner.submit(plan)
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.inner.collect()
    }
}

/// 1 ms, and 100 µs a token beyond 10.
fn cost() -> StepCost {
    let point = |tokens, us| CostPoint { tokens, us };
    StepCost {
        layers: vec![point(1, 1000.0), point(10, 1000.0), point(110, 11_000.0)],
        row_us: 0.0,
        kv_token_us: 0.0,
        pair_us: 0.0,
    }
}

/// Knows what steps cost, and learns that it is so.
fn sized(setup: Setup, itl: Option<Duration>) -> (Engine, Steps) {
    let steps = Steps::default();
    let executor = Noted {
        inner: FakeExecutor::new(fake(setup)),
        steps: Arc::clone(&steps),
    };
    static BEGAN: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    let engine = engine_on(setup, Box::new(executor))
        .with_clock(|| *BEGAN + Duration::from_micros(TAKEN.get()))
        .with_cost(cost())
        .with_itl(itl);
    (engine, steps)
}

/// A sequence with this key, below 100, that generates one token more: none of its later tokens' time can be used before.
fn generate(engine: &mut Engine, key: u64, service: Service) {
    generate_for(engine, key, service, 2);
}

fn generate_for(engine: &mut Engine, key: u64, service: Service, max_tokens: u32) {
    let tokens = prompt(key as u32, 8);
    let blocks = engine.pool().reserve(4).unwrap();
    let mut spec = spec(&tokens, max_tokens);
    spec.service = service;
    let resumed = ResumedSequence {
        key,
        spec,
        next: 1,
        blocks,
        constraint: None,
    };
    engine.resume(resumed).unwrap();
}

fn wait(engine: &mut Engine, key: u64, tokens: usize, tier: Tier) {
    let mut spec = spec(&prompt(key as u32, tokens), 2);
    spec.service.tier = tier;
    submit(engine, key, spec).unwrap();
}

fn steps(engine: &mut Engine, noted: &Steps, count: usize) -> Vec<(usize, usize)> {
    (0..count).for_each(|_| drop(engine.step().unwrap()));
    std::mem::take(&mut noted.lock().unwrap())
}

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A step that takes so many times what is kept of `itl`, with so many generating rows in it.
fn full(generating: usize, itl: Duration, times: u32) -> (usize, usize) {
    let us = (itl.mul_f32(ITL_PART) * times).as_micros() as usize;
    (generating, 10 + (us - 1000) / 100 - generating)
}

#[test]
fn prompts_run_beside_generating_sequences_as_far_as_their_time_allows() {
    let (mut engine, noted) = sized(Setup::default(), Some(MS(4)));
    generate(&mut engine, 1, Service::default());
    wait(&mut engine, 100, 200, Tier::Interactive);
    assert_eq!(steps(&mut engine, &noted, 1), [full(1, MS(4), 1)]);
}

#[test]
fn who_was_quick_so_far_has_time_to_spare() {
    let setup = Setup {
        step_tokens: 200,
        ..Setup::default()
    };
    let (mut engine, noted) = sized(setup, Some(MS(4)));
    generate_for(&mut engine, 1, Service::default(), 4);
    assert_eq!(steps(&mut engine, &noted, 2), [(1, 0), (1, 0)]);
    wait(&mut engine, 100, 400, Tier::Interactive);
    // Two tokens took 1 ms each, which leaves more than one step may take.
    assert_eq!(steps(&mut engine, &noted, 1), [full(1, MS(4), PAUSE_MAX)]);
}

#[test]
fn a_part_of_the_time_of_later_tokens_may_be_used_before() {
    let setup = Setup {
        step_tokens: 400,
        ..Setup::default()
    };
    let (mut engine, noted) = sized(setup, Some(MS(4)));
    generate_for(&mut engine, 1, Service::default(), 25);
    wait(&mut engine, 100, 450, Tier::Interactive);
    wait(&mut engine, 101, 450, Tier::Interactive);
    // A step that takes twice what was promised uses up the time of one token to come: half of those there are, until nothing is left.
    let taken = steps(&mut engine, &noted, 9);
    let long = full(1, MS(4), PAUSE_MAX);
    assert_eq!(taken[..8], [long; 8]);
    let (beside, most) = (taken[8].1, long.1);
    let least = full(1, MS(4), 1).1;
    assert!((least..most).contains(&beside), "{taken:?}");
}

#[test]
fn who_was_promised_more_decides() {
    let (mut engine, noted) = sized(Setup::default(), Some(MS(4)));
    let quick = Service {
        itl_ms: Some(2),
        ..Service::default()
    };
    generate(&mut engine, 1, Service::default());
    generate(&mut engine, 2, quick);
    wait(&mut engine, 100, 200, Tier::Interactive);
    assert_eq!(steps(&mut engine, &noted, 1), [full(2, MS(2), 1)]);
}

#[test]
fn a_prompt_gets_a_block_a_step_where_generating_takes_all_the_time() {
    let (mut engine, noted) = sized(Setup::default(), Some(Duration::from_micros(400)));
    generate_for(&mut engine, 1, Service::default(), 9);
    wait(&mut engine, 100, 10, Tier::Interactive);
    let block = BLOCK_TOKENS as usize;
    assert_eq!(
        steps(&mut engine, &noted, 3),
        [(1, block), (1, block), (1, 2)]
    );
}

#[test]
fn where_nothing_is_promised_a_step_is_as_large_as_is_efficient() {
    let (mut engine, noted) = sized(Setup::default(), None);
    generate(&mut engine, 1, Service::default());
    wait(&mut engine, 100, 200, Tier::Interactive);
    assert_eq!(steps(&mut engine, &noted, 1), [(1, 10)]);
}

#[test]
fn step_tokens_bound_what_time_would_allow() {
    let setup = Setup {
        step_tokens: 20,
        ..Setup::default()
    };
    let (mut engine, noted) = sized(setup, Some(MS(4)));
    generate(&mut engine, 1, Service::default());
    wait(&mut engine, 100, 200, Tier::Interactive);
    assert_eq!(steps(&mut engine, &noted, 1), [(1, 19)]);
}

#[test]
fn a_step_of_prompts_is_as_large_as_is_efficient() {
    let setup = Setup {
        step_tokens: 110,
        ..Setup::default()
    };
    let (mut engine, noted) = sized(setup, Some(MS(4)));
    wait(&mut engine, 100, 200, Tier::Interactive);
    // 10 tokens in 1 ms are as good as 110 in 11 ms: no others wait for the rest.
    assert_eq!(steps(&mut engine, &noted, 2), [(0, 10), (0, 10)]);
}

#[test]
fn batch_prompts_take_what_interactive_ones_leave() {
    let setup = Setup {
        step_tokens: 110,
        sequences: 4,
        ..Setup::default()
    };
    let (mut engine, noted) = sized(setup, Some(MS(4)));
    generate_for(&mut engine, 1, Service::default(), 100);
    wait(&mut engine, 100, 100, Tier::Batch);
    let long = full(1, MS(4), PAUSE_MAX);
    assert_eq!(steps(&mut engine, &noted, 1), [long]);
    wait(&mut engine, 101, 100, Tier::Interactive);
    let (left, taken) = (100 - long.1, long.1);
    let before = engine.load();
    assert_eq!(
        (before.waiting_tokens, before.batch_tokens),
        (100 + left, left)
    );
    assert_eq!(steps(&mut engine, &noted, 1), [long]);
    let after = engine.load();
    // The batch prompt, which began first, gets a block.
    let block = BLOCK_TOKENS as usize;
    assert_eq!(
        (after.waiting_tokens, after.batch_tokens),
        (100 + left - taken, left - block)
    );
}

#[test]
fn interactive_prompts_begin_before_batch_ones_and_by_priority() {
    let setup = Setup {
        sequences: 1,
        ..Setup::default()
    };
    let (mut engine, _) = sized(setup, None);
    let mut asked = |key, tier, priority| {
        let mut spec = spec(&prompt(key as u32, 8), 1);
        spec.service = Service {
            tier,
            priority,
            itl_ms: None,
        };
        submit(&mut engine, key, spec).unwrap();
    };
    asked(100, Tier::Batch, 9);
    asked(101, Tier::Interactive, 0);
    asked(102, Tier::Interactive, 1);
    asked(103, Tier::Interactive, 1);
    let mut order = Vec::new();
    while engine.has_work() {
        for event in engine.step().unwrap() {
            if let Event::Prefilled { key, .. } = event {
                order.push(key);
            }
        }
    }
    assert_eq!(order, [102, 103, 101, 100]);
}

#[test]
fn a_batch_sequence_gives_up_its_blocks_first() {
    let setup = Setup {
        blocks: 8,
        ..Setup::default()
    };
    let (mut engine, _) = sized(setup, None);
    let batch = Service {
        tier: Tier::Batch,
        ..Service::default()
    };
    generate_for(&mut engine, 1, batch, 100);
    generate_for(&mut engine, 2, Service::default(), 100);
    let mut preempted = Vec::new();
    while engine.has_work() && preempted.is_empty() {
        for event in engine.step().unwrap() {
            if let Event::Preempted { key } = event {
                preempted.push(key);
            }
        }
        engine.check().unwrap();
    }
    assert_eq!(preempted, [1]);
}

#[test]
fn batch_sequences_sit_out_what_would_take_longer_than_interactive_ones_were_promised() {
    let setup = Setup {
        blocks: 4096,
        step_tokens: 110,
        sequences: 110,
        ..Setup::default()
    };
    let (mut engine, noted) = sized(setup, Some(MS(4)));
    let batch = Service {
        tier: Tier::Batch,
        ..Service::default()
    };
    (1..=40).for_each(|key| generate_for(&mut engine, key, batch, 20_000));
    // Nobody was promised anything.
    assert_eq!(steps(&mut engine, &noted, 1), [(40, 0)]);
    (41..=50).for_each(|key| generate_for(&mut engine, key, Service::default(), 3));
    // 3.76 ms hold 37 rows.
    assert_eq!(full(37, MS(4), 1), (37, 0));
    assert_eq!(steps(&mut engine, &noted, 3), [(37, 0), (37, 0), (40, 0)]);
    // With more interactive ones than that, none of batch is in it.
    (51..=98).for_each(|key| generate_for(&mut engine, key, Service::default(), 2));
    assert_eq!(steps(&mut engine, &noted, 2), [(48, 0), (40, 0)]);
}

#[test]
fn the_probe_finds_what_steps_cost_and_leaves_nothing_behind() {
    let mut device = fake(Setup::default());
    let point = |tokens, us| CostPoint { tokens, us };
    let cost = StepCost {
        layers: vec![point(1, 2000.0), point(16, 2000.0), point(64, 8000.0)],
        row_us: 100.0,
        kv_token_us: 10.0,
        pair_us: 1.0,
    };
    device.cost = Some(cost.clone());
    let executor = Box::new(FakeExecutor::new(device));
    let mut engine = engine_on(Setup::default(), executor);
    engine.probe().unwrap();
    engine.check().unwrap();
    assert_eq!(engine.pool().stats().free, 256);
    let found = engine.cost().expect("it was measured").clone();
    found.check().unwrap();
    // Sleeping takes longer than asked, never shorter.
    for shape in [
        StepShape::default().and_prompt(64, 0),
        StepShape::decode(8, 8 * 100),
    ] {
        let (is, was) = (cost.step_us(shape), found.step_us(shape));
        assert!(was > is * 0.7, "{shape:?} takes {is} µs, {was} were found");
    }
    // What is known already is not measured again.
    engine.probe().unwrap();
    assert_eq!(engine.cost(), Some(&found));
}

/// A worker that were taken for so slow would be sent nothing, and never learn better.
#[test]
fn a_device_too_slow_to_be_measured_is_not_taken_for_slower_than_it_is() {
    let setup = Setup {
        step_tokens: 256,
        ..Setup::default()
    };
    for one_ms in [30.0_f32, 500.0] {
        let mut device = fake(setup);
        let point = |tokens, ms| CostPoint {
            tokens,
            us: ms * 1000.0,
        };
        device.cost = Some(StepCost {
            layers: vec![
                point(1, one_ms),
                point(16, one_ms),
                point(256, one_ms * 4.0),
            ],
            ..StepCost::default()
        });
        let executor = Box::new(FakeExecutor::new(device));
        let mut engine = engine_on(setup, executor);
        engine.probe().unwrap();
        let found = engine.cost().expect("it was measured");
        let [one, most] = [1, 256].map(|tokens| found.layers_us(tokens));
        assert!(most < one * 17.0, "{found:?}");
    }
}
