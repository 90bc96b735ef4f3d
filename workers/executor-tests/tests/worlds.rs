//! The worlds with the fake executor: what they find is the engine's, or theirs.

use baton_engine::{FakeConfig, FakeExecutor};
use baton_executor_tests::worlds::{Alike, worlds};
use baton_executor_tests::{Build, STEP_SEQUENCES_MAX, STEP_TOKENS_MAX};

fn fake(build: Build<'_>, run_max: usize) -> FakeExecutor {
    let mut config = FakeConfig {
        blocks: build.blocks as u32,
        vocab: build.spec.vocab as u32,
        tokens_max: build.spec.tokens_max as u32,
        step_sequences_max: STEP_SEQUENCES_MAX,
        step_tokens_max: STEP_TOKENS_MAX,
        steps_in_flight: 3,
        run_max,
        ..FakeConfig::default()
    };
    config.kv.block_tokens = build.block_tokens;
    FakeExecutor::new(config)
}

#[test]
fn every_sequence_gets_what_it_gets_alone() {
    for steps in 1..=3 {
        for run_max in [1, 5] {
            let build = |build: Build<'_>| -> Box<dyn baton_engine::Executor> {
                Box::new(fake(build, run_max))
            };
            let seen = worlds(&build, 1_000, Some(steps), Alike::Exactly);
            assert!(seen.tokens > 10_000, "{seen:?}");
        }
    }
}
