//! A step plan, checked and laid out by rows.

use std::ops::Range;

use baton_engine::{ExecutorError, ExecutorInfo, StepPlan};

/// The rows of a step: one per token, sequence after sequence.
#[derive(Default)]
pub struct Rows {
    pub sequences: Vec<SequenceRows>,
    /// Position of each row.
    pub positions: Vec<u32>,
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Block of each row's own KV, and its slot in it.
    pub places: Vec<(u32, u32)>,
    blocks: Vec<u32>,
}

/// One sequence's rows.
pub struct SequenceRows {
    /// Its first row.
    pub row: usize,
    /// Its rows.
    pub tokens: usize,
    /// Position of the first.
    pub start: usize,
    blocks: Range<usize>,
}

impl Rows {
    /// The block table of a sequence.
    #[inline(always)]
    pub fn blocks(&self, sequence: usize) -> &[u32] {
        &self.blocks[self.sequences[sequence].blocks.clone()]
    }

    /// Takes over a plan. The engine promises a sound one; memory outside the arena is at stake, so look.
    pub fn fill(&mut self, plan: &StepPlan, info: &ExecutorInfo) -> Result<(), ExecutorError> {
        self.sequences.clear();
        self.positions.clear();
        self.tokens.clear();
        self.places.clear();
        self.blocks.clone_from(&plan.blocks);
        let total: usize = plan.sequences.iter().map(|s| s.tokens.len()).sum();
        if total > info.step_tokens_max || plan.sequences.len() > info.step_sequences_max {
            return Err(broken(format!(
                "{total} tokens of {} sequences, but a step bears {} and {}",
                plan.sequences.len(),
                info.step_tokens_max,
                info.step_sequences_max
            )));
        }
        if let Some(block) = plan.blocks.iter().find(|b| **b >= info.blocks) {
            return Err(broken(format!(
                "block {block} of an arena of {}",
                info.blocks
            )));
        }
        for s in &plan.sequences {
            let (Some(tokens), Some(blocks), Some(targets)) = (
                plan.tokens.get(s.tokens.clone()),
                plan.blocks.get(s.blocks.clone()),
                plan.targets.get(s.targets.clone()),
            ) else {
                return Err(broken(format!(
                    "ranges of sequence {} leave their arrays",
                    s.key
                )));
            };
            let start = s.start as usize;
            let end = start + tokens.len();
            if tokens.is_empty()
                || end > info.tokens_max as usize
                || info.kv.blocks_for(end) > blocks.len()
                || targets.len() > tokens.len()
            {
                return Err(broken(format!(
                    "sequence {} has {} tokens from position {start}, {} targets and {} blocks; the model \
                     takes {} tokens",
                    s.key,
                    tokens.len(),
                    targets.len(),
                    blocks.len(),
                    info.tokens_max
                )));
            }
            if let Some(token) = tokens.iter().chain(targets).find(|t| **t >= info.vocab) {
                return Err(broken(format!(
                    "token {token} of a vocabulary of {}",
                    info.vocab
                )));
            }
            self.sequences.push(SequenceRows {
                row: self.tokens.len(),
                tokens: tokens.len(),
                start,
                blocks: s.blocks.clone(),
            });
            for (position, token) in (s.start..).zip(tokens) {
                let block = blocks[(position / info.kv.block_tokens) as usize];
                self.positions.push(position);
                self.tokens.push(*token);
                self.places.push((block, position % info.kv.block_tokens));
            }
        }
        Ok(())
    }
}

fn broken(what: String) -> ExecutorError {
    ExecutorError {
        message: format!("broken step plan: {what}"),
    }
}
