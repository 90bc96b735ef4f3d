//! Steps for an executor, made by hand.

use std::ops::Range;
use std::sync::Arc;

use baton_engine::{Executor, SampleRequest, SequenceStep, StepPlan};

/// A sequence's part of a plan: feed `range` of `tokens`, sample after them.
pub struct Part<'a> {
    /// The sequence.
    pub key: u64,
    /// All its tokens.
    pub tokens: &'a [u32],
    /// Those of this step.
    pub range: Range<usize>,
    /// Its block table.
    pub blocks: &'a [u32],
}

/// Runs one step; the logits after each part.
pub fn step(executor: &mut dyn Executor, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
    let mut plan = StepPlan {
        want_logits: true,
        ..StepPlan::default()
    };
    for part in parts {
        let tokens = plan.tokens.len()..plan.tokens.len() + part.range.len();
        plan.tokens.extend(&part.tokens[part.range.clone()]);
        let blocks = plan.blocks.len()..plan.blocks.len() + part.blocks.len();
        plan.blocks.extend(part.blocks);
        plan.sequences.push(SequenceStep {
            key: part.key,
            tokens,
            follows: None,
            start: part.range.start as u32,
            blocks,
            sample: Some(
                SampleRequest {
                    position: part.range.end as u32,
                    state: Arc::default(),
                    ban_stop_ids: false,
                    mask: None,
                }
                .into(),
            ),
            targets: 0..0,
            target_top: 0,
        });
    }
    let output = executor.forward(&plan).expect("a step");
    output.sequences.into_iter().map(|s| s.logits).collect()
}
