//! One situation each.

use std::sync::Arc;

use super::*;
use crate::{FakeKv, FakeMemory, StepOutput, StepPlan, TokenMask};

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
    // With it, what was torn would give way to the whole blocks that are here.
    let setup = Setup {
        prefix_cache: false,
        ..Setup::default()
    };
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
                memories[1].write(*to, slot, memories[0].read(*from, slot));
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
            constraint: None,
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

/// A conversation's next turn finds what was pulled of the last one and what was generated upon it.
#[test]
fn what_was_pulled_and_what_goes_on_from_it_are_prefixes() {
    for prefix_cache in [true, false] {
        let mut engine = engine(Setup {
            prefix_cache,
            ..Setup::default()
        });
        let pool = engine.pool();
        let mut spec = spec(&prompt(1, 10), 30);
        spec.cache_salt = CacheSalt(7);
        let resumed = |key, blocks| ResumedSequence {
            key,
            spec: spec.clone(),
            next: 5,
            blocks,
            constraint: None,
        };
        let pulled = |pool: &BlockPool| {
            let tokens = &spec.tokens.0;
            pool.reserve_reusing(tokens, spec.cache_salt, 3, 0)
                .expect("room")
        };
        // Both were pulled before either was known: the second gives its full blocks up for those of the first.
        let [first, second] = [pulled(&pool), pulled(&pool)];
        assert_eq!((first.indexed(), pool.stats().used), (0, 6));
        engine.resume(resumed(1, first)).expect("taken");
        engine.resume(resumed(2, second)).expect("taken");
        let full = if prefix_cache { 2 } else { 0 };
        assert_eq!(pool.stats().used, 6 - full);
        assert_eq!(pulled(&pool).indexed(), full);
        let mut tokens = [spec.tokens.0.clone(), vec![5]].concat();
        while engine.has_work() {
            for event in engine.step().expect("runs") {
                if let Event::Token {
                    key: 1, sampled, ..
                } = event
                {
                    tokens.push(sampled.token);
                }
            }
            engine.check().expect("sound");
        }
        // No step ran the last token.
        let all = if prefix_cache {
            39 / BLOCK_TOKENS as usize
        } else {
            0
        };
        tokens.extend(prompt(3, 9));
        let next_turn = pool.admit(&tokens, Some(spec.cache_salt), 0).expect("room");
        assert_eq!(next_turn.indexed(), all);
        let others = pool.admit(&tokens, Some(CacheSalt(8)), 0).expect("room");
        assert_eq!(others.indexed(), 0, "of another salt");
    }
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
            waiting_tokens: 62,
            ..EngineLoad::default()
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
            constraint: None,
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
            let key = match event {
                Event::Prefilled { key, .. } => key,
                Event::Begun { .. } | Event::Computed { .. } => continue,
                other => panic!("{other:?}"),
            };
            steps_of.insert(key, step);
        }
    }
    let long = steps_of[&0];
    assert!(
        (45..=50).contains(&long),
        "half of each step is the long prompt's: {long}"
    );
    assert!(steps_of[&1] <= 3 && steps_of[&2] <= 5);
    assert!(steps_of.len() > 120);
}

#[test]
fn equal_prompts_end_one_after_the_other() {
    let mut engine = engine(Setup {
        step_tokens: 16,
        ..Setup::default()
    });
    for key in 0..3 {
        submit(&mut engine, key, spec(&prompt(key as u32, 16), 1)).expect("taken");
    }
    for expected in 0..3 {
        let events = engine.step().expect("runs");
        assert!(
            matches!(&events[..], [Event::Prefilled { key, .. }] if *key == expected),
            "{events:?}"
        );
    }
}

#[test]
fn engines_and_blocks_move_between_threads() {
    fn moves<T: Send>() {}
    fn is_shared<T: Send + Sync>() {}
    moves::<Engine>();
    is_shared::<BlockPool>();
    is_shared::<BlockTable>();
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
            constraint: None,
            stream: false,
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

#[test]
fn a_sequence_without_a_next_token_ends_and_nobody_finds_its_prefix() {
    for steps_in_flight in [1, 2] {
        let setup = Setup {
            steps_in_flight,
            ..Setup::default()
        };
        let (good, bad) = (spec(&prompt(1, 20), 20), spec(&prompt(2, 20), 20));
        let text = alone(&bad);
        assert!(!alone(&good).contains(&text[9]));
        let mut config = fake(setup);
        config.faults.no_logit = Some(text[9]);
        let mut engine = engine_on(setup, Box::new(FakeExecutor::new(config)));
        let mut driver = Driver::default();
        driver.submit(&mut engine, 1, good.clone());
        driver.submit(&mut engine, 2, bad.clone());
        driver.run(&mut engine, 100);
        assert_eq!(driver.outputs[&1], alone(&good));
        assert_eq!(driver.outputs[&2], text[..10]);
        assert_eq!(driver.failed, [2]);
        // What the good one has left is found, of the bad one nothing.
        for (key, spec, cached) in [(3, good, 16), (4, bad.clone(), 0)] {
            driver.cached_tokens = 0;
            driver.submit(&mut engine, key, spec);
            driver.run(&mut engine, 100);
            assert_eq!(driver.cached_tokens, cached);
        }
        // A prompt that ends in that token.
        let mut worse = bad.tokens.0;
        worse[19] = text[9];
        driver.submit(&mut engine, 5, spec(&worse, 20));
        driver.run(&mut engine, 100);
        assert_eq!(driver.failed, [2, 4, 5]);
        assert_empty(&engine);
    }
}

#[test]
fn a_refused_step_ends_its_sequences_and_no_other() {
    for steps_in_flight in [1, 2, 3] {
        let setup = Setup {
            steps_in_flight,
            sequences: 3,
            ..Setup::default()
        };
        let specs = [1, 2, 3].map(|seed| spec(&prompt(seed, 20), 20));
        let mut bad = spec(&prompt(4, 90), 20);
        bad.tokens.0[70] = VOCAB - 1;
        let mut config = fake(setup);
        config.never_emit = vec![VOCAB - 1];
        config.faults.refuse = Some(VOCAB - 1);
        let mut engine = engine_on(setup, Box::new(FakeExecutor::new(config)));
        let mut driver = Driver::default();
        driver.submit(&mut engine, 1, specs[0].clone());
        driver.step(&mut engine);
        driver.submit(&mut engine, 4, bad);
        driver.submit(&mut engine, 2, specs[1].clone());
        driver.submit(&mut engine, 3, specs[2].clone());
        driver.run(&mut engine, 100);
        // The bad one's second chunk is refused, and who was in that step; who waited for a place goes on to the end.
        assert_eq!(engine.plans_refused(), 1);
        let refused = |key| driver.refused.contains(&key);
        assert!(refused(1) && refused(4), "{:?}", driver.refused);
        assert!(!refused(2) || !refused(3), "{:?}", driver.refused);
        for key in 1..=4 {
            assert_ne!(refused(key), driver.finished.contains_key(&key), "{key}");
        }
        // Retried as prompts that include the output so far, they give the same text.
        let again: Vec<u64> = driver.refused.drain(..).filter(|key| *key != 4).collect();
        for key in again {
            submit(&mut engine, key, driver.so_far(key)).expect("taken again");
        }
        driver.run(&mut engine, 200);
        for (key, spec) in (1..).zip(&specs) {
            assert_eq!(driver.outputs[&key], alone(spec), "sequence {key}");
        }
        assert_empty(&engine);
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

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.inner.submit(plan)
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        self.inner.choose(masks)
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        if self.good_steps > 0 {
            self.good_steps -= 1;
            return self.inner.collect();
        }
        match self.silent {
            true => Ok(StepOutput::default()),
            false => Err(ExecutorError::failed("the device fell off the bus")),
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
