//! Masks: of the tokens that one allows, the token is chosen that the engine's own rules choose.

use std::sync::Arc;

use baton_engine::{
    Executor, Follows, SampleRequest, SampleState, Sampled, SequenceStep, StepId, StepPlan,
    TokenMask, sample,
};
use baton_model::UniformSpec;

use crate::ahead::sampling;
use crate::{Build, Builder, Random, Tiny, tiny_families};

const SEQUENCES: usize = 9;
const PROMPT: usize = 5;
const STEPS: usize = 12;
const BLOCK_TOKENS: u32 = 8;
const BLOCKS_EACH: usize = (PROMPT + STEPS).div_ceil(BLOCK_TOKENS as usize);
const VOCAB: u32 = 301;

/// Prompts, and some steps after them, with a mask for two of three rows: of many tokens, of few, and of one.
///
/// # Panics
/// If a token is not the one that [`baton_engine::sample`] chooses from the logits of the same step, or if its log-probability
/// differs.
pub fn masks_are_obeyed(build: Builder<'_>) {
    let spec = UniformSpec {
        vocab: VOCAB as usize,
        ..tiny_families().remove(1)
    };
    let tiny = Tiny::new(spec, 12);
    let mut executor = build(Build {
        spec: &tiny.spec,
        weights: &tiny,
        block_tokens: BLOCK_TOKENS,
        blocks: SEQUENCES * BLOCKS_EACH,
    });
    let mut random = Random(7);
    let mut texts: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|_| {
            (0..PROMPT)
                .map(|_| random.below(VOCAB as usize) as u32)
                .collect()
        })
        .collect();
    let mut changed = 0;
    for step in 0..STEPS {
        let mut plan = StepPlan {
            id: StepId(step as u64),
            want_logits: true,
            ..StepPlan::default()
        };
        let mut requests = Vec::new();
        for (sequence, text) in texts.iter().enumerate() {
            let start = if step == 0 { 0 } else { text.len() - 1 };
            let (token, block) = (plan.tokens.len(), plan.blocks.len());
            plan.tokens.extend(&text[start..]);
            let blocks = (0..BLOCKS_EACH).map(|i| (i * SEQUENCES + sequence) as u32);
            plan.blocks.extend(blocks);
            let mut state = SampleState {
                sampling: sampling(sequence),
                ..SampleState::default()
            };
            text[PROMPT..].iter().for_each(|token| state.count(*token));
            let request = SampleRequest {
                position: text.len() as u32,
                state: Arc::new(state),
                ban_stop_ids: false,
                mask: mask(&mut random),
            };
            requests.push(request.clone());
            plan.sequences.push(SequenceStep {
                key: sequence as u64,
                tokens: token..plan.tokens.len(),
                follows: None,
                start: start as u32,
                blocks: block..plan.blocks.len(),
                sample: Some(request.into()),
                targets: 0..0,
                target_top: 0,
            });
        }
        let output = executor.forward(&plan).expect("a step");
        for ((text, request), row) in texts.iter_mut().zip(requests).zip(output.sequences) {
            let expected = sample(&mut row.logits.clone(), &request);
            let found = row.sampled.first();
            assert_eq!(found, expected.as_ref(), "step {step}: {request:?}");
            let free = SampleRequest {
                mask: None,
                ..request
            };
            let free = sample(&mut row.logits.clone(), &free);
            changed += usize::from(free != expected);
            text.extend(expected.map(|sampled| sampled.token));
        }
    }
    assert!(changed > STEPS, "masks hardly change anything: {changed}");
}

/// The same texts, each token under a mask of its own: step by step with the masks in the plans, and ahead, with masks that come when
/// the device is at work already. In some steps a row gets a mask that allows nothing: it is thrown away and run again.
///
/// # Panics
/// If a token or its log-probability differs, or if what is out of order is not refused.
pub fn masks_come_later(build: Builder<'_>) {
    let spec = UniformSpec {
        vocab: VOCAB as usize,
        ..tiny_families().remove(1)
    };
    let tiny = Tiny::new(spec, 12);
    let build = || {
        build(Build {
            spec: &tiny.spec,
            weights: &tiny,
            block_tokens: BLOCK_TOKENS,
            blocks: SEQUENCES * BLOCKS_EACH,
        })
    };
    let mut executor = build();
    let mut expected = texts();
    for step in 0..STEPS {
        let rows: Vec<Row> = (0..SEQUENCES)
            .map(|sequence| known(&expected, sequence))
            .collect();
        let output = executor
            .forward(&plan(step as u64, &rows, true))
            .expect("a step");
        for (text, row) in expected.iter_mut().zip(output.sequences) {
            text.extend(row.sampled.first().cloned());
        }
    }
    assert_eq!(ahead(&mut *build()), expected);
}

/// Tokens that were chosen, of each sequence.
type Texts = Vec<Vec<Sampled>>;

fn texts() -> Texts {
    vec![Vec::new(); SEQUENCES]
}

/// A sequence in a step: how many of its tokens are chosen before, the last of them if it is known, else where it is found.
struct Row {
    sequence: usize,
    chosen: usize,
    last: Result<Option<u32>, Follows>,
}

fn known(texts: &Texts, sequence: usize) -> Row {
    let text = &texts[sequence];
    Row {
        sequence,
        chosen: text.len(),
        last: Ok(text.last().map(|sampled| sampled.token)),
    }
}

/// The mask of a sequence's i-th token.
fn mask_of(sequence: usize, i: usize) -> Option<Arc<TokenMask>> {
    mask(&mut Random((i * SEQUENCES + sequence + 1) as u64))
}

fn plan(id: u64, rows: &[Row], with_masks: bool) -> StepPlan {
    let mut plan = StepPlan {
        id: StepId(id),
        chooses_later: !with_masks,
        ..StepPlan::default()
    };
    for row in rows {
        let (token, block) = (plan.tokens.len(), plan.blocks.len());
        let start = match row.last {
            Ok(None) => {
                plan.tokens
                    .extend((0..PROMPT).map(|i| (i * 5 + row.sequence) as u32));
                0
            }
            Ok(Some(last)) => {
                plan.tokens.push(last);
                PROMPT + row.chosen - 1
            }
            Err(_) => {
                plan.tokens.push(0);
                PROMPT + row.chosen - 1
            }
        };
        plan.blocks
            .extend((0..BLOCKS_EACH).map(|i| (i * SEQUENCES + row.sequence) as u32));
        let mut sampling = sampling(row.sequence);
        // Counts are not what this is about.
        (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        ) = (1.0, 0.0, 0.0);
        let request = SampleRequest {
            position: (PROMPT + row.chosen) as u32,
            state: Arc::new(SampleState {
                sampling,
                ..SampleState::default()
            }),
            ban_stop_ids: false,
            mask: mask_of(row.sequence, row.chosen).filter(|_| with_masks),
        };
        plan.sequences.push(SequenceStep {
            key: row.sequence as u64,
            tokens: token..plan.tokens.len(),
            follows: row.last.err(),
            start: start as u32,
            blocks: block..plan.blocks.len(),
            sample: Some(request.into()),
            targets: 0..0,
            target_top: 0,
        });
    }
    plan
}

fn ahead(executor: &mut dyn Executor) -> Texts {
    let mut texts = texts();
    let refused = "chosen";
    let error = executor
        .choose(&[])
        .expect_err("nothing is in flight")
        .to_string();
    assert!(error.contains(refused), "{error}");
    let first: Vec<Row> = (0..SEQUENCES)
        .map(|sequence| known(&texts, sequence))
        .collect();
    executor.submit(&plan(0, &first, true)).expect("a step");
    let mut rows = first;
    let mut void: Vec<usize> = Vec::new();
    for id in 1.. {
        let step = StepId(id - 1);
        // All that go on behind the step in flight; those of which it has nothing sit out.
        let follow = |(sequence, row): (usize, &Row)| Row {
            sequence: row.sequence,
            chosen: row.chosen + 1,
            last: Err(Follows { step, sequence }),
        };
        let next = rows
            .iter()
            .enumerate()
            .filter(|(_, row)| !void.contains(&row.sequence));
        let mut next: Vec<Row> = next.map(follow).filter(|row| row.chosen < STEPS).collect();
        let away = |sequence: &usize| rows.iter().all(|row| row.sequence != *sequence);
        let back: Vec<usize> = (0..SEQUENCES).filter(away).collect();
        let back = back
            .into_iter()
            .filter(|sequence| texts[*sequence].len() < STEPS);
        next.extend(back.map(|sequence| known(&texts, sequence)));
        let is_last = next.is_empty();
        if !is_last {
            executor.submit(&plan(id, &next, false)).expect("a step");
            let error = executor
                .submit(&plan(id + 1, &[], true))
                .expect_err("the one before waits");
            assert!(!error.message.is_empty());
        }
        let output = executor.collect().expect("a step");
        for (row, made) in rows.iter().zip(output.sequences) {
            if !void.contains(&row.sequence) {
                texts[row.sequence].extend(made.sampled.first().cloned());
                assert_eq!(
                    texts[row.sequence].len(),
                    row.chosen + 1,
                    "{:?}",
                    made.failure
                );
            }
        }
        if is_last {
            return texts;
        }
        let error = executor
            .collect()
            .expect_err("it waits for masks")
            .to_string();
        assert!(error.contains(refused), "{error}");
        let mut random = Random(id);
        void = next
            .iter()
            .map(|row| row.sequence)
            .filter(|_| random.below(8) == 0)
            .collect();
        let nothing = Arc::new(TokenMask::new(Box::default()));
        let masks: Vec<_> = next
            .iter()
            .map(|row| match void.contains(&row.sequence) {
                true => Some(Arc::clone(&nothing)),
                false => mask_of(row.sequence, row.chosen),
            })
            .collect();
        executor.choose(&masks).expect("they are chosen");
        let error = executor
            .choose(&masks)
            .expect_err("chosen already")
            .to_string();
        assert!(error.contains(refused), "{error}");
        rows = next;
    }
    texts
}

fn mask(random: &mut Random) -> Option<Arc<TokenMask>> {
    let one_in = match random.below(6) {
        0 | 1 => return None,
        2 => VOCAB,
        3 => 2,
        _ => 20,
    };
    let first = random.below(one_in as usize) as u32;
    let allowed = (first..VOCAB).step_by(one_in as usize);
    Some(Arc::new(TokenMask::of(VOCAB, allowed)))
}
