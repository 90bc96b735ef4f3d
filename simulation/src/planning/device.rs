//! A device that computes nothing and takes as long as a step costs.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_engine::{
    Executor, ExecutorError, ExecutorInfo, Sampled, SequenceOutput, SequenceStep, StepOutput,
    StepPlan,
};
use baton_protocol::StepCost;
use tokio::time::Instant;

/// The token that is always chosen. No plan has stop ids.
const TOKEN: u32 = 1;

thread_local! {
    /// When the step ended that was collected last, until somebody looks at the clock.
    static ENDED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The clock of a worker with such a device. Who looks first after a step was collected is told when the step ended: the timer by which its end
/// was waited for is late by a part of a millisecond, and the engine learns from times what steps cost.
pub fn clock() -> std::time::Instant {
    ENDED.take().unwrap_or_else(Instant::now).into_std()
}

/// What a worker did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens of prompts that it ran.
    pub prompt_tokens: u64,
    /// Tokens that it generated, without those that came of prompts.
    pub output_tokens: u64,
}

/// A device. Clones share it.
#[derive(Clone, Default)]
pub struct Steps(Arc<Mutex<InFlight>>);

#[derive(Default)]
struct InFlight {
    steps: VecDeque<Step>,
    /// Of all steps, those in flight too.
    work: Work,
}

/// A step in flight.
struct Step {
    ends: Instant,
    /// How many tokens are chosen for each sequence. Nobody asks for the log-probabilities of prompts here.
    choices: Vec<usize>,
}

impl Steps {
    /// Time until the oldest step in flight ends.
    pub fn left(&self) -> Duration {
        let oldest = self.lock().steps.front().map(|step| step.ends);
        oldest.map_or(Duration::ZERO, |ends| {
            ends.saturating_duration_since(Instant::now())
        })
    }

    /// What was submitted so far.
    pub fn work(&self) -> Work {
        self.lock().work
    }

    fn lock(&self) -> MutexGuard<'_, InFlight> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The executor of such a device.
pub struct Device {
    pub info: ExecutorInfo,
    pub cost: StepCost,
    pub steps: Steps,
    /// When the last step ended that was submitted.
    pub busy_until: Instant,
}

impl Executor for Device {
    fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let takes = self.cost.step_time(plan.shape());
        // It goes on with the next step by itself, whenever the host has the last one.
        self.busy_until = self.busy_until.max(Instant::now()) + takes;
        let choices = |step: &SequenceStep| step.sample.as_ref().map_or(0, |run| run.len);
        let mut in_flight = self.steps.lock();
        for step in &plan.sequences {
            // As in `StepPlan::shape`.
            let (tokens, work) = (step.tokens.len(), &mut in_flight.work);
            match choices(step) == tokens {
                true => work.output_tokens += tokens as u64,
                false => work.prompt_tokens += tokens as u64,
            }
        }
        in_flight.steps.push_back(Step {
            ends: self.busy_until,
            choices: plan.sequences.iter().map(choices).collect(),
        });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let step = self.steps.lock().steps.pop_front();
        let step = step.ok_or_else(ExecutorError::nothing_submitted)?;
        ENDED.set(Some(step.ends));
        let sampled = || Sampled {
            token: TOKEN,
            logprobs: None,
        };
        let output = |chosen: &usize| {
            let mut output = SequenceOutput::default();
            output.sampled.extend((0..*chosen).map(|_| sampled()));
            output
        };
        let sequences = step.choices.iter().map(output).collect();
        Ok(StepOutput { sequences })
    }
}
