//! The seam between scheduling and arithmetic.
//!
//! An executor runs steps: some tokens of some sequences, in one batch, through the whole model, and a token
//! chosen for each sequence that asks for one. Per step and not per operator, so each backend fuses, captures and
//! overlaps as it likes, and a fake one drives the scheduler in tests.
//!
//! A step is submitted, and collected later. In between the next one may be submitted: its sequences go on from
//! tokens that only the device knows yet ([`SequenceStep::follows`]), and the device never waits for the host.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use baton_protocol::{KvGeometry, Sampling, TokenLogprobs};

/// What an executor is and can bear.
#[derive(Clone, Debug, PartialEq)]
pub struct ExecutorInfo {
    /// What it computes on, for people: `cpu avx512-bf16, 2 threads`.
    pub device: String,
    /// Layout of its arena.
    pub kv: KvGeometry,
    /// Blocks in its arena.
    pub blocks: u32,
    /// Logits per position.
    pub vocab: u32,
    /// Longest sequence in tokens.
    pub tokens_max: u32,
    /// Most sequences of one step.
    pub step_sequences_max: usize,
    /// Most tokens of one step.
    pub step_tokens_max: usize,
    /// Steps worth submitting before the first of them is collected: 2 where a device computes while the host plans,
    /// 1 where they are the same.
    pub steps_in_flight: usize,
}

/// One batch. Flat arrays with ranges into them, so that a backend can hand them to a device whole.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// The sequences of this step; each at most once.
    pub sequences: Vec<SequenceStep>,
    /// Token ids of all sequences, one after the other.
    pub tokens: Vec<u32>,
    /// Block tables of all sequences, one after the other.
    pub blocks: Vec<u32>,
    /// Targets of prompt log-probabilities, one after the other.
    pub targets: Vec<u32>,
    /// Return the logits of every sampled position too. For tests.
    pub want_logits: bool,
}

/// One sequence's part of a step.
#[derive(Clone, Debug)]
pub struct SequenceStep {
    /// The engine's key of the sequence, stable for its life.
    pub key: u64,
    /// Its tokens in [`StepPlan::tokens`]; at least one.
    pub tokens: Range<usize>,
    /// Its one token is what this sequence of the step submitted before chose, by its index there; what stands in
    /// [`StepPlan::tokens`] means nothing then. Where nothing could be chosen, so that what follows it is meaningless,
    /// any token will do. Nor do the counts of [`SampleState`] have that token: an executor adds it where penalties are on.
    pub follows: Option<usize>,
    /// Position of the first of them; the KV of all positions before it is in place.
    pub start: u32,
    /// Its block table in [`StepPlan::blocks`]: covers positions `0 .. start + tokens.len()`, and may go on
    /// beyond them. Blocks before the one of `start` may stand in other sequences' tables too.
    pub blocks: Range<usize>,
    /// Choose the token that follows the last one here.
    pub sample: Option<SampleRequest>,
    /// Report the log-probabilities of these tokens in [`StepPlan::targets`]: the i-th is the token at
    /// position `start + i + 1`, as the model saw it from position `start + i`.
    pub targets: Range<usize>,
    /// Alternatives to report with each target.
    pub target_top: u8,
}

/// How to choose one token.
#[derive(Clone, Debug)]
pub struct SampleRequest {
    /// Position the chosen token will have; with the seed it decides the random number.
    pub position: u32,
    /// Parameters and what penalties need to know.
    pub state: Arc<SampleState>,
    /// Ids that cannot be chosen now: stop ids before `min_tokens`.
    pub ban_stop_ids: bool,
}

/// A sequence's sampling parameters, and the counts its penalties need.
#[derive(Clone, Debug, Default)]
pub struct SampleState {
    /// Parameters.
    pub sampling: Sampling,
    /// Ids that end the generation.
    pub stop_token_ids: Vec<u32>,
    /// How often each token stands in the prompt and in the output, sorted by id; empty unless a
    /// penalty is on.
    pub counts: Vec<TokenCount>,
}

impl SampleState {
    /// Whether what was chosen before changes what is likely now. Of a sequence that [`SequenceStep::follows`], `counts` lack
    /// the token that it follows.
    pub fn has_penalty(&self) -> bool {
        let sampling = &self.sampling;
        sampling.repetition_penalty != 1.0
            || sampling.presence_penalty != 0.0
            || sampling.frequency_penalty != 0.0
    }

    /// Counts one more output token.
    pub fn count(&mut self, token: u32) {
        let counts = &mut self.counts;
        match counts.binary_search_by_key(&token, |count| count.token) {
            Ok(at) => counts[at].output += 1,
            Err(at) => counts.insert(
                at,
                TokenCount {
                    token,
                    prompt: 0,
                    output: 1,
                },
            ),
        }
    }
}

/// Occurrences of one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenCount {
    /// Which token.
    pub token: u32,
    /// Times in the prompt.
    pub prompt: u32,
    /// Times in the output.
    pub output: u32,
}

/// What a step made, sequence by sequence in the plan's order.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// For each sequence of the plan.
    pub sequences: Vec<SequenceOutput>,
}

impl StepOutput {
    /// The token chosen for each sequence: what [`crate::Rows::follow`] takes.
    pub fn tokens(&self) -> Vec<Option<u32>> {
        let token = |output: &SequenceOutput| output.sampled.as_ref().map(|sampled| sampled.token);
        self.sequences.iter().map(token).collect()
    }
}

/// What a step made for one sequence.
#[derive(Clone, Debug, Default)]
pub struct SequenceOutput {
    /// The chosen token, if one was asked for.
    pub sampled: Option<Sampled>,
    /// Why nothing could be chosen or reported, as a sentence: no logit is a finite number. It ends this sequence and no
    /// other. Nothing else of it is looked at.
    pub failure: Option<String>,
    /// One for each target.
    pub target_logprobs: Vec<TokenLogprobs>,
    /// Logits of the sampled position before any sampling rule, if the plan wants them.
    pub logits: Vec<f32>,
}

impl SequenceOutput {
    /// The output of a row without a finite logit.
    pub fn without_token() -> Self {
        let failure = "the model gave no finite logit for the next token: its weights, its KV or its arithmetic are broken \
                       for this text";
        Self {
            failure: Some(failure.to_owned()),
            ..Self::default()
        }
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why a step failed. The executor is out of service afterwards: what it left in the arena is unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutorError {
    /// What failed and where, as a sentence.
    pub message: String,
}

impl fmt::Display for ExecutorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ExecutorError {}

/// Runs the model. One OS thread owns it.
pub trait Executor: Send {
    /// What it is and can bear. Constant.
    fn info(&self) -> &ExecutorInfo;

    /// Begins a step: it writes the KV of every token of the plan into its blocks, attends to everything before
    /// it, and chooses tokens. Steps run in the order of submission, each as if the one before it had ended. Of the
    /// plan nothing is held on to after [`Self::collect`] has returned the step's output.
    ///
    /// At most [`ExecutorInfo::steps_in_flight`] steps may be begun and not collected, this one included.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device failed. The plan is the engine's promise: keys are unique, ranges
    /// lie in their arrays, block ids in the arena, and the step is within [`ExecutorInfo`]'s bounds.
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError>;

    /// Waits for the oldest step that was not collected yet, and says what it made.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device failed, or if there is no such step.
    fn collect(&mut self) -> Result<StepOutput, ExecutorError>;

    /// One step from beginning to end, with no other under way.
    ///
    /// # Errors
    /// As [`Self::submit`] and [`Self::collect`].
    fn forward(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        self.submit(plan)?;
        self.collect()
    }
}

impl ExecutorError {
    /// [`Executor::collect`] without a step to collect: a defect of the caller.
    pub fn nothing_submitted() -> Self {
        Self {
            message: "no step was submitted that could be collected".to_owned(),
        }
    }
}
