//! Prompts that tell how far they are, while somebody reads their blocks.

use super::*;

/// Two equal prompts run side by side: what one has indexed the other would take over, were its blocks not told.
#[test]
fn a_prompt_that_is_streamed_keeps_its_blocks_beside_an_equal_one() {
    let setup = Setup {
        step_tokens: 2 * BLOCK_TOKENS as usize,
        prefix_cache: true,
        ..Setup::default()
    };
    let len = 6 * BLOCK_TOKENS as usize + 1;
    let mut engine = engine(setup);
    let mut driver = Driver::default();
    for key in [1, 2, 3] {
        driver.submit(&mut engine, key, spec(&prompt(1, len), 4));
    }
    driver.run(&mut engine, 200);
    assert_eq!(
        driver.streamed, 2,
        "1 and 3, of which both took several steps"
    );
    assert_eq!(driver.outputs[&1], driver.outputs[&2]);
    assert_eq!(driver.outputs[&1], driver.outputs[&3]);
    assert_eq!(engine.pool().stats().used, 0);
}

#[test]
fn a_prompt_of_one_step_has_nothing_to_tell() {
    let mut engine = engine(Setup::default());
    let mut driver = Driver::default();
    driver.submit(&mut engine, 1, spec(&prompt(1, 3), 4));
    driver.run(&mut engine, 200);
    assert_eq!(driver.streamed, 0);
}

#[test]
fn what_is_told_was_computed_by_steps_that_are_collected() {
    let setup = Setup {
        step_tokens: 8,
        prefix_cache: false,
        ..Setup::default()
    };
    let mut engine = engine(setup);
    submit(&mut engine, 1, spec(&prompt(1, 20), 4)).expect("taken");
    let mut told = Vec::new();
    while engine.has_work() {
        for event in engine.step().expect("a step") {
            match event {
                Event::Begun { computed, .. } | Event::Computed { computed, .. } => {
                    told.push(computed)
                }
                Event::Prefilled { .. } => told.push(20),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(told, [8, 16, 20]);
}
