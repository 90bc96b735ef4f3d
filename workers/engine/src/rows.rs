//! A step plan, checked and laid out by rows: what every executor does first.

use std::ops::Range;
use std::sync::Arc;

use crate::constraint::TokenMask;
use crate::executor::{ExecutorError, ExecutorInfo};
use crate::follow::Choices;
use crate::output::SequenceOutput;
use crate::sampling::{sample, token_logprobs};
use crate::step::{Follows, SampleRequest, StepPlan};

/// The rows of a step: one per token, sequence after sequence.
#[derive(Debug, Default)]
pub struct Rows {
    /// The plan's sequences, in its order.
    pub sequences: Vec<SequenceRows>,
    /// Position of each row.
    pub positions: Vec<u32>,
    /// Token of each row; of one that follows a step in flight, 0 until [`Self::follow`].
    pub tokens: Vec<u32>,
    /// Rows whose token a step in flight chooses, in order, and where it does.
    pub follows: Vec<(usize, Follows)>,
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
        self.follows.clear();
        self.places.clear();
        self.blocks.clone_from(&plan.blocks);
        let total: usize = plan.sequences.iter().map(|s| s.tokens.len()).sum();
        if total > info.step_tokens_max || plan.sequences.len() > info.step_sequences_max {
            return Err(ExecutorError::broken_plan(format!(
                "{total} tokens of {} sequences, but a step bears {} and {}",
                plan.sequences.len(),
                info.step_tokens_max,
                info.step_sequences_max
            )));
        }
        if let Some(block) = plan.blocks.iter().find(|b| **b >= info.blocks) {
            return Err(ExecutorError::broken_plan(format!(
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
                return Err(ExecutorError::broken_plan(format!(
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
                return Err(ExecutorError::broken_plan(format!(
                    "sequence {} has {} tokens from position {start}, {} targets and {} blocks; the model \
                     takes {} tokens",
                    s.key,
                    tokens.len(),
                    targets.len(),
                    blocks.len(),
                    info.tokens_max
                )));
            }
            if s.follows.is_some() && tokens.len() > 1 {
                return Err(ExecutorError::broken_plan(format!(
                    "sequence {} follows {} with {} tokens at once",
                    s.key,
                    s.follows.unwrap_or_default().step,
                    tokens.len()
                )));
            }
            if let Some(run) = &s.sample
                && !(1..=tokens.len().min(info.run_max)).contains(&run.len)
            {
                return Err(ExecutorError::broken_plan(format!(
                    "sequence {} has {} tokens and asks for a run of {}; a run has 1 to {}",
                    s.key,
                    tokens.len(),
                    run.len,
                    info.run_max
                )));
            }
            let known = if s.follows.is_some() { &[] } else { tokens };
            if let Some(token) = known.iter().chain(targets).find(|t| **t >= info.vocab) {
                return Err(ExecutorError::broken_plan(format!(
                    "token {token} of a vocabulary of {}",
                    info.vocab
                )));
            }
            let follows = s.follows.map(|follows| (self.tokens.len(), follows));
            self.follows.extend(follows);
            self.sequences.push(SequenceRows {
                row: self.tokens.len(),
                tokens: tokens.len(),
                start,
                blocks: s.blocks.clone(),
            });
            for (position, token) in (s.start..).zip(tokens) {
                let block = blocks[(position / info.kv.block_tokens) as usize];
                self.positions.push(position);
                self.tokens
                    .push(if s.follows.is_some() { 0 } else { *token });
                self.places.push((block, position % info.kv.block_tokens));
            }
        }
        Ok(())
    }

    /// Fills in the tokens of rows that follow steps in flight, of which these are all.
    ///
    /// # Errors
    /// [`ExecutorError`] if one follows what is not in flight, or what has not chosen one token.
    pub fn follow<'a>(
        &mut self,
        in_flight: impl Iterator<Item = &'a Choices> + Clone,
    ) -> Result<(), ExecutorError> {
        for (row, follows) in &self.follows {
            self.tokens[*row] = follows.find(in_flight.clone())?;
        }
        Ok(())
    }
}

/// A row whose logits are asked for, and what for.
#[derive(Clone, Debug)]
pub struct Want {
    /// Its sequence in the plan.
    pub sequence: usize,
    /// The row.
    pub row: usize,
    /// What is made of its logits.
    pub what: What,
}

impl Want {
    /// Whether a log-probability is reported of it, for which no mask is waited.
    pub fn is_target(&self) -> bool {
        matches!(self.what, What::Target { .. })
    }
}

/// What is made of a row's logits.
#[derive(Clone, Debug)]
pub enum What {
    /// The next token is chosen.
    Sample(SampleRequest),
    /// The log-probability of a token is reported, and the `top` most likely ones.
    Target {
        /// Which token.
        token: u32,
        /// Alternatives.
        top: u8,
    },
}

/// All rows of a plan whose logits are asked for, in the order in which a sequence's answers stand.
pub fn wants(plan: &StepPlan, rows: &Rows) -> Vec<Want> {
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
        let Some(run) = &s.sample else {
            continue;
        };
        // A plan's tokens are read behind the first of the run alone: a sequence that follows has no others.
        let first = s.tokens.len() - run.len;
        let drafts = &plan.tokens[s.tokens.start + first + 1..s.tokens.end];
        wants.extend((0..run.len).map(|i| Want {
            sequence,
            row: at.row + first + i,
            what: What::Sample(run.request(i, drafts)),
        }));
    }
    wants
}

/// Gives rows the masks that their plan left for later, by sequence as [`Executor::choose`](crate::Executor::choose) brings them.
pub fn add_masks(wants: &mut [Want], masks: &[Option<Arc<TokenMask>>]) {
    for want in wants {
        if let (What::Sample(request), Some(Some(mask))) =
            (&mut want.what, masks.get(want.sequence))
        {
            request.mask = Some(Arc::clone(mask));
        }
    }
}

/// Counts the tokens that rows follow where penalties want it, once [`Rows::follow`] has filled them in: for an executor whose
/// tokens are on the host when it samples.
pub fn count_followed(wants: &mut [Want], rows: &Rows) {
    for (row, _) in &rows.follows {
        let Some(want) = wants.iter_mut().find(|want| want.row == *row) else {
            continue;
        };
        if let What::Sample(request) = &mut want.what
            && request.state.has_penalty()
        {
            Arc::make_mut(&mut request.state).count(rows.tokens[*row]);
        }
    }
}

/// What a row's logits, which are used up, say to what was asked.
pub fn answer(want: &Want, logits: &mut [f32], want_logits: bool) -> SequenceOutput {
    let mut output = SequenceOutput::default();
    match &want.what {
        What::Target { token, top } => {
            output
                .target_logprobs
                .push(token_logprobs(logits, *token, *top));
        }
        What::Sample(request) => {
            if want_logits {
                output.logits = logits.to_vec();
            }
            match sample(logits, request) {
                Some(sampled) => output.sampled = Some(sampled).into(),
                None => output.failure = SequenceOutput::without_token().failure,
            }
        }
    }
    output
}
