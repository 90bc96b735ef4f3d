//! A step plan, checked and laid out by rows: what every executor does first.

use std::ops::Range;

use crate::executor::{ExecutorError, ExecutorInfo, SampleRequest, SequenceOutput, StepPlan};
use crate::sampling::{sample, token_logprobs};

/// The rows of a step: one per token, sequence after sequence.
#[derive(Debug, Default)]
pub struct Rows {
    /// The plan's sequences, in its order.
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
#[derive(Debug)]
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
    ///
    /// # Errors
    /// [`ExecutorError`] says what of the plan is broken.
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

/// A row whose logits are asked for, and what for.
#[derive(Debug)]
pub struct Want<'a> {
    /// Its sequence in the plan.
    pub sequence: usize,
    /// The row.
    pub row: usize,
    /// What is made of its logits.
    pub what: What<'a>,
}

/// What is made of a row's logits.
#[derive(Debug)]
pub enum What<'a> {
    /// The next token is chosen.
    Sample(&'a SampleRequest),
    /// The log-probability of a token is reported, and the `top` most likely ones.
    Target {
        /// Which token.
        token: u32,
        /// Alternatives.
        top: u8,
    },
}

/// All rows of a plan whose logits are asked for, in the order in which a sequence's answers stand.
pub fn wants<'a>(plan: &'a StepPlan, rows: &Rows) -> Vec<Want<'a>> {
    let mut wants = Vec::new();
    for (sequence, s) in plan.sequences.iter().enumerate() {
        let at = &rows.sequences[sequence];
        for (i, token) in plan.targets[s.targets.clone()].iter().enumerate() {
            let what = What::Target {
                token: *token,
                top: s.target_top,
            };
            wants.push(Want {
                sequence,
                row: at.row + i,
                what,
            });
        }
        if let Some(request) = &s.sample {
            let row = at.row + at.tokens - 1;
            wants.push(Want {
                sequence,
                row,
                what: What::Sample(request),
            });
        }
    }
    wants
}

/// What a row's logits, which are used up, say to what was asked.
pub fn answer(want: &Want<'_>, logits: &mut [f32], want_logits: bool) -> SequenceOutput {
    let mut output = SequenceOutput::default();
    match want.what {
        What::Target { token, top } => {
            output
                .target_logprobs
                .push(token_logprobs(logits, token, top));
        }
        What::Sample(request) => {
            if want_logits {
                output.logits = logits.to_vec();
            }
            output.sampled = Some(sample(logits, request));
        }
    }
    output
}

fn broken(what: String) -> ExecutorError {
    ExecutorError {
        message: format!("broken step plan: {what}"),
    }
}
