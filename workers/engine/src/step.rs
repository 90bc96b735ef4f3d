//! A step as an executor is told of it: which tokens of which sequences run, where their KV lies, and what is chosen.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use baton_protocol::{Sampling, StepShape};

use crate::TokenMask;

/// Names a step. The engine counts them up, so no two steps of an engine have the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepId(pub u64);

impl fmt::Display for StepId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.0)
    }
}

/// One batch. Flat arrays with ranges into them, so that a backend can hand them to a device whole.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// Its name. No other step in flight has it.
    pub id: StepId,
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
    /// Its tokens are chosen only when [`Executor::choose`](crate::Executor::choose) brings the masks that are missing here.
    pub chooses_later: bool,
}

impl StepPlan {
    /// What it consists of, as far as it costs time. A sequence that chooses a token after each one that it runs generates, any other is at its
    /// prompt.
    pub fn shape(&self) -> StepShape {
        let mut shape = StepShape::default();
        for step in &self.sequences {
            let (tokens, start) = (step.tokens.len() as u64, u64::from(step.start));
            let rows = step.sample.as_ref().map_or(0, |run| run.len as u64);
            if rows == tokens {
                shape.tokens += tokens;
                shape.kv_tokens += start;
            } else {
                shape = shape.and_prompt(tokens, start);
            }
            shape.rows += rows;
        }
        shape
    }
}

/// One sequence's part of a step: the tokens it runs, and what is made of them.
#[derive(Clone, Debug)]
pub struct SequenceStep {
    /// The engine's key of the sequence, stable for its life.
    pub key: u64,
    /// Its tokens in [`StepPlan::tokens`]; at least one.
    pub tokens: Range<usize>,
    /// Set where its token is not known on the host yet, because a step in flight chooses it. Then it runs that one token;
    /// what stands for it in [`StepPlan::tokens`] is not read. The executor adds it to the counts of [`SampleState`] where
    /// penalties are on. If that step can choose nothing ([`SequenceOutput::failure`](crate::SequenceOutput::failure)),
    /// the executor runs any token: the engine throws the result away.
    pub follows: Option<Follows>,
    /// Position of the first of its tokens; the KV of all positions before it is in place.
    pub start: u32,
    /// Its block table in [`StepPlan::blocks`]: covers positions `0 .. start + tokens.len()`, and may go on
    /// beyond them. Blocks before the one of `start` may stand in other sequences' tables too.
    pub blocks: Range<usize>,
    /// Which tokens to choose, if any.
    pub sample: Option<SampleRun>,
    /// Report the log-probabilities of these tokens in [`StepPlan::targets`]: the i-th is the token at
    /// position `start + i + 1`, as the model saw it from position `start + i`.
    pub targets: Range<usize>,
    /// Alternatives to report with each target.
    pub target_top: u8,
}

/// The token that a step in flight chooses for a sequence.
///
/// The step was submitted before the one that names it and is not collected when that one is submitted, whatever other
/// steps are in flight. It chooses exactly one token for the sequence: a sequence with a longer run in flight is in no further
/// step, for nobody knows how many of its tokens will stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Follows {
    /// The step.
    pub step: StepId,
    /// Index of the same sequence in that step's [`StepPlan::sequences`].
    pub sequence: usize,
}

/// Which tokens to choose for a sequence, and how.
///
/// One token is chosen after each of the last `len` tokens that the sequence runs. Usually `len` is 1: the token after the
/// last. In speculative decoding the sequence runs its last token and `len - 1` drafts, which are guesses of what comes after
/// it. Each choice is the one that a step of its own would make, had the drafts before it been chosen. So the choices up to
/// the first that differs from the draft behind it are right, that one too, and those after it mean nothing. The executor runs
/// drafts and counts them for penalties; comparing is the engine's.
#[derive(Clone, Debug)]
pub struct SampleRun {
    /// How many tokens to choose: 1 to [`ExecutorInfo::run_max`](crate::ExecutorInfo::run_max), and no more than the
    /// sequence runs.
    pub len: usize,
    /// Position of the first chosen token: that of the token after which it is chosen, plus one.
    pub position: u32,
    /// Parameters, and the counts for the first choice. For each later one the drafts before it count as output tokens too.
    pub state: Arc<SampleState>,
    /// The first so many choices cannot be a stop id: they come before `min_tokens`.
    pub stop_ids_banned: usize,
    /// Which tokens the first choice may be; `None` allows all, where [`Executor::choose`](crate::Executor::choose) brings no mask.
    /// With a mask `len` is 1. The mask of a sequence that follows a step in flight depends on the token that the step chooses, so
    /// it never stands here.
    pub mask: Option<Arc<TokenMask>>,
}

impl SampleRun {
    /// How to make the i-th choice. `drafts` are the sequence's tokens of this step after the one that the first choice comes after.
    pub fn request(&self, i: usize, drafts: &[u32]) -> SampleRequest {
        let mut state = Arc::clone(&self.state);
        if i > 0 && state.has_penalty() {
            let state = Arc::make_mut(&mut state);
            drafts.iter().take(i).for_each(|draft| state.count(*draft));
        }
        SampleRequest {
            position: self.position + i as u32,
            state,
            ban_stop_ids: i < self.stop_ids_banned,
            mask: self.mask.clone().filter(|_| i == 0),
        }
    }
}

impl From<SampleRequest> for SampleRun {
    /// A run of one.
    fn from(request: SampleRequest) -> Self {
        Self {
            len: 1,
            position: request.position,
            state: request.state,
            stop_ids_banned: usize::from(request.ban_stop_ids),
            mask: request.mask,
        }
    }
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
    /// Which tokens may be chosen; `None` allows all.
    pub mask: Option<Arc<TokenMask>>,
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
    /// Whether what was chosen before changes what is likely now. Of a sequence with [`SequenceStep::follows`], `counts` lack
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
