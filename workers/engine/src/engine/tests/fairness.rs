//! Who waits for whom: long prompts for short ones, short ones for long ones, and both for blocks.

use proptest::prelude::*;

use super::*;

/// Steps that the bounds do not count: the one in which a prompt comes, and the one that is being collected.
const SLACK: usize = 4;

fn roomy(step_tokens: usize) -> Engine {
    engine(Setup {
        blocks: 4096,
        step_tokens,
        sequences: step_tokens,
        prefix_cache: false,
        ..Setup::default()
    })
}

/// Steps until this sequence has its token. `each` does something before each of them.
fn steps_until(
    driver: &mut Driver,
    engine: &mut Engine,
    key: u64,
    steps_max: usize,
    mut each: impl FnMut(&mut Driver, &mut Engine, usize),
) -> usize {
    for step in 0..=steps_max {
        if driver.finished.contains_key(&key) {
            return step;
        }
        each(driver, engine, step);
        driver.step(engine);
    }
    panic!("sequence {key} waited for more than {steps_max} steps");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// However many long prompts came before, a short one waits for the short ones before it alone.
    #[test]
    fn a_short_prompt_waits_for_short_ones_alone(
        step_tokens in 8usize..64,
        longs in prop::collection::vec(200usize..500, 1..14),
        ahead in prop::collection::vec(1usize..16, 0..8),
        own in 1usize..16,
    ) {
        let half = step_tokens / 2;
        let own = own.min(half);
        let mut engine = roomy(step_tokens);
        let mut driver = Driver::default();
        for (key, long) in (100..).zip(&longs) {
            driver.submit(&mut engine, key, spec(&prompt(key as u32, *long), 1));
        }
        driver.step(&mut engine);
        for (key, short) in (50..).zip(&ahead) {
            driver.submit(&mut engine, key, spec(&prompt(key as u32, (*short).min(half)), 1));
        }
        driver.submit(&mut engine, 1, spec(&prompt(1, own), 1));
        // Each step runs the shortest that are under way, half a budget of them; what does not fit together may leave
        // half of that half empty.
        let short: usize = ahead.iter().map(|short| (*short).min(half)).sum::<usize>() + own;
        let steps_max = 2 * short.div_ceil(half) + SLACK;
        steps_until(&mut driver, &mut engine, 1, steps_max, |_, _, _| {});
        driver.run(&mut engine, 100_000);
        assert_empty(&engine);
    }

    /// However many short prompts come after it, a long one waits for those before it alone.
    #[test]
    fn a_long_prompt_waits_for_older_ones_alone(
        step_tokens in 8usize..64,
        older in prop::collection::vec(1usize..500, 0..10),
        own in 100usize..500,
        stream in 1usize..32,
    ) {
        let mut engine = roomy(step_tokens);
        let mut driver = Driver::default();
        for (key, older) in (100..).zip(&older) {
            driver.submit(&mut engine, key, spec(&prompt(key as u32, *older), 1));
        }
        driver.submit(&mut engine, 1, spec(&prompt(1, own), 1));
        let work: usize = older.iter().sum::<usize>() + own;
        // Half of each step, and up to one step for each prompt that ends in the middle of one.
        let steps_max = work.div_ceil(step_tokens.div_ceil(2)) + older.len() + SLACK;
        let mut next = 1_000;
        steps_until(&mut driver, &mut engine, 1, steps_max, |driver, engine, _| {
            // More than a whole step of short ones, in every step.
            for _ in 0..=step_tokens / stream {
                let short = spec(&prompt(next as u32, stream), 1);
                if submit(engine, next, short.clone()).is_ok() {
                    driver.specs.insert(next, short);
                    driver.outputs.insert(next, Vec::new());
                }
                next += 1;
            }
        });
    }

    /// Where there is no room for all, sequences throw each other out; and still each round of them ends one, for the
    /// oldest is never thrown out and every try brings a token.
    #[test]
    fn sequences_that_throw_each_other_out_end_all_the_same(
        blocks in 4u32..16,
        jobs in prop::collection::vec((1usize..24, 1u32..40), 2..8),
        steps_in_flight in 1usize..3,
    ) {
        let mut engine = engine(Setup { blocks, step_tokens: 16, steps_in_flight, prefix_cache: false, ..Setup::default() });
        let mut driver = Driver::default();
        let tokens_max = engine.tokens_max();
        let mut work = 0;
        for (key, (prompt_tokens, output)) in (1..).zip(&jobs) {
            let prompt_tokens = (*prompt_tokens).min(tokens_max - 1);
            driver.submit(&mut engine, key, spec(&prompt(key as u32, prompt_tokens), *output));
            work += prompt_tokens + *output as usize;
        }
        driver.run(&mut engine, work * (jobs.len() + 1) + SLACK);
        prop_assert_eq!(driver.finished.len(), jobs.len());
        assert_empty(&engine);
    }
}
