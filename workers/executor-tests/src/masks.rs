//! Masks: of the tokens that one allows, the token is chosen that the engine's own rules choose.

use std::sync::Arc;

use baton_engine::{SampleRequest, SampleState, SequenceStep, StepId, StepPlan, TokenMask, sample};
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
