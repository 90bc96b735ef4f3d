//! The seam between scheduling and arithmetic.
//!
//! An executor runs steps: some tokens of some sequences, in one batch, through the whole model, and the next tokens
//! chosen for each sequence that asks for them. Per step and not per operator, so each backend fuses, captures and
//! overlaps as it likes, and a fake one drives the scheduler in tests.
//!
//! A step is submitted, and collected later. In between further ones may be submitted: their sequences go on from
//! tokens that only the device knows yet ([`SequenceStep::follows`](crate::SequenceStep::follows)), and the device never
//! waits for the host. Where the next token must follow rules, the device runs the layers meanwhile, and waits for the masks
//! alone ([`Executor::choose`]).

use std::fmt;
use std::sync::Arc;

use baton_protocol::KvGeometry;

use crate::TokenMask;
use crate::output::StepOutput;
use crate::step::StepPlan;

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
    /// Most tokens chosen for one sequence in one step: with `n`, it checks `n - 1` drafts at once. 1 where it checks none.
    pub run_max: usize,
}

/// The state of an executor after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It refused the call. Nothing of it ran, and the executor is unchanged.
    Refused,
    /// It is out of service: what it left in the arena is unknown.
    Failed,
}

/// Why an executor did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutorError {
    /// The executor's state afterwards.
    pub fault: Fault,
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
    /// A step is in flight from its submission until it is collected. At most [`ExecutorInfo::steps_in_flight`] steps are, this
    /// one included.
    ///
    /// KV of drafts is written as that of any token. The engine has what a rejected draft left in a block written again before
    /// anybody reads it.
    ///
    /// The engine promises of a plan that keys are unique, ranges lie in their arrays, block ids in the arena, that the step is within
    /// [`ExecutorInfo`]'s bounds, that what it follows is in flight, and that no step before it waits for [`Self::choose`]. Of such
    /// plans the executor runs every one: prompts, generating sequences, targets, penalties, masks that are here and masks that
    /// come later, in any mixture.
    ///
    /// # Errors
    /// [`Fault::Refused`] if it sees one of these promises broken, and for no other reason: the executor never guesses. Nothing of the plan has
    /// run then, and steps in flight go on. The engine ends the plan's sequences ([`Event::Refused`](crate::Event::Refused)), counts
    /// it ([`Engine::plans_refused`](crate::Engine::plans_refused)) and goes on. [`Fault::Failed`] if the device failed.
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError>;

    /// Has the tokens chosen of the step that was submitted last, whose plan says that they are
    /// [chosen later](StepPlan::chooses_later). `masks` has an entry for each of its sequences; with `None` its plan says all of how
    /// its token is chosen. The engine calls this when the steps before it are collected, and before it collects that step or submits
    /// another. Only executors that bear several steps in flight get such plans.
    ///
    /// # Errors
    /// [`Fault::Failed`] if the device failed, [`Fault::Refused`] if no step waits for this.
    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        let _ = masks;
        Err(ExecutorError::nothing_to_choose())
    }

    /// Waits for the oldest step that was not collected yet, and says what it made.
    ///
    /// # Errors
    /// [`Fault::Failed`] if the device failed; [`Fault::Refused`] if there is no such step, or if its tokens are not
    /// [chosen](Self::choose) yet.
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
    /// The device or its driver failed: the executor is out of service. `message` is a sentence.
    pub fn failed(message: impl Into<String>) -> Self {
        Self {
            fault: Fault::Failed,
            message: message.into(),
        }
    }

    fn refused(message: String) -> Self {
        Self {
            fault: Fault::Refused,
            message,
        }
    }

    /// [`Executor::submit`] with as many steps in flight as there may be: a defect of the caller.
    pub fn too_many_in_flight(steps: usize) -> Self {
        Self::refused(format!("{steps} steps are in flight already"))
    }

    /// [`Executor::collect`] without a step to collect: a defect of the caller.
    pub fn nothing_submitted() -> Self {
        Self::refused("no step was submitted that could be collected".to_owned())
    }

    /// [`Executor::choose`] without a step that waits for it: a defect of the caller.
    pub fn nothing_to_choose() -> Self {
        Self::refused("no step in flight waits for its tokens to be chosen".to_owned())
    }

    /// A step that waits for [`Executor::choose`] is in the way: a defect of the caller.
    pub fn not_chosen(step: impl fmt::Display) -> Self {
        Self::refused(format!("the tokens of {step} are not chosen yet"))
    }

    /// A plan that breaks one of the engine's promises, and which.
    pub fn broken_plan(what: impl fmt::Display) -> Self {
        Self::refused(format!("broken step plan: {what}"))
    }
}
