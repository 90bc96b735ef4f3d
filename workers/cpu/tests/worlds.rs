//! The engine's own plans on this executor: every sequence gets the same bits as alone.

mod common;

use baton_engine::Executor;
use baton_executor_tests::Build;
use baton_executor_tests::worlds::{Alike, worlds};
use common::{chosen, ranks};

/// As many steps in flight as on a GPU: more than are worth it here.
const STEPS_IN_FLIGHT: Option<usize> = Some(2);

#[test]
fn every_sequence_gets_what_it_gets_alone() {
    worlds(
        &|build| Box::new(ranks(chosen(), 2, 1, build).0),
        1_000,
        STEPS_IN_FLIGHT,
        Alike::Exactly,
    );
}

#[test]
fn on_ranks_too() {
    let build = |build: Build<'_>| -> Box<dyn Executor> {
        let divides = |count: &usize| build.spec.of_rank(*count).is_ok();
        let count = [2, 3].into_iter().find(divides);
        Box::new(ranks(chosen(), 2, count.expect("a number of ranks"), build).0)
    };
    worlds(&build, 100, STEPS_IN_FLIGHT, Alike::Exactly);
}

#[test]
fn step_by_step_too() {
    let build =
        |build: Build<'_>| -> Box<dyn Executor> { Box::new(ranks(chosen(), 2, 1, build).0) };
    worlds(&build, 100, None, Alike::Exactly);
    // As a GPU is tested, whose logits hardly depend on the company: these do not at all.
    let seen = worlds(&build, 100, STEPS_IN_FLIGHT, Alike::Within(0.0));
    assert_eq!(seen.differ, 0);
}
