//! A sequence whose numbers are none, in company: it fails, and nobody else notices.

use std::sync::Arc;

use baton_engine::{
    Follows, SampleRequest, SampleState, SequenceOutput, SequenceStep, StepId, StepPlan,
};
use baton_model::UniformSpec;
use baton_protocol::Sampling;

use crate::{Build, Builder, Tiny, tiny_families};

const PROMPT: usize = 9;
const BROKEN: u32 = 77;

/// Runs prompts, some with a token whose embedding is NaN, and a step that follows them before they are collected.
///
/// # Panics
/// If one of them gets a token, or another none, or another one than alone.
pub fn rows_without_numbers(build: Builder<'_>) {
    let spec = UniformSpec {
        tied_embeddings: false,
        ..tiny_families().remove(1)
    };
    let mut tiny = Tiny::new(spec, 3);
    tiny.break_embedding(BROKEN);
    let run = |sequences: &[usize]| {
        let mut executor = build(Build {
            spec: &tiny.spec,
            weights: &tiny,
            block_tokens: 16,
            blocks: 8,
        });
        executor.submit(&plan(sequences, false)).expect("a step");
        executor.submit(&plan(sequences, true)).expect("a step");
        [(); 2].map(|()| executor.collect().expect("a step").sequences)
    };
    let together = run(&[0, 1, 2, 3, 4, 5]);
    let alone = run(&[0, 2, 4]);
    for (together, alone) in together.iter().zip(&alone) {
        for (sequence, found) in together.iter().enumerate() {
            let SequenceOutput {
                sampled, failure, ..
            } = found;
            match sequence % 2 {
                0 => {
                    assert_eq!(failure, &None);
                    assert_eq!(sampled, &alone[sequence / 2].sampled);
                }
                _ => assert!(
                    failure.is_some() && sampled.is_empty(),
                    "sequence {sequence}: {sampled:?}"
                ),
            }
        }
    }
}

/// Odd sequences have the broken token; two at a time have a rule in common.
fn plan(sequences: &[usize], follow: bool) -> StepPlan {
    let rules = [
        Sampling::default(),
        Sampling {
            temperature: 0.8,
            ..Sampling::default()
        },
        Sampling {
            temperature: 0.8,
            top_k: 3,
            logprobs: Some(1),
            ..Sampling::default()
        },
    ];
    let mut plan = StepPlan {
        id: StepId(u64::from(follow)),
        ..StepPlan::default()
    };
    for (i, sequence) in sequences.iter().enumerate() {
        let follows = Follows {
            step: StepId(0),
            sequence: i,
        };
        let (first, block) = (plan.tokens.len(), plan.blocks.len());
        let start = if follow { PROMPT } else { 0 };
        let prompt = (0..PROMPT).map(|at| match (sequence % 2, at) {
            (1, 4) => BROKEN,
            _ => ((at * 7 + sequence * 3) % 70) as u32,
        });
        plan.tokens
            .extend(prompt.take(if follow { 1 } else { PROMPT }));
        plan.blocks.push(*sequence as u32);
        plan.sequences.push(SequenceStep {
            key: *sequence as u64,
            tokens: first..plan.tokens.len(),
            follows: follow.then_some(follows),
            start: start as u32,
            blocks: block..block + 1,
            sample: Some(
                SampleRequest {
                    position: (start + plan.tokens.len() - first) as u32,
                    state: Arc::new(SampleState {
                        sampling: rules[sequence / 2].clone(),
                        ..SampleState::default()
                    }),
                    ban_stop_ids: false,
                    mask: None,
                }
                .into(),
            ),
            targets: 0..0,
            target_top: 0,
        });
    }
    plan
}
