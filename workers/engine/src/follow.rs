//! How an executor finds the token that a sequence follows.

use crate::executor::ExecutorError;
use crate::output::{SequenceOutput, StepOutput};
use crate::step::{Follows, SequenceStep, StepId, StepPlan};

/// What a step in flight has chosen for its sequences, for later steps that follow them.
#[derive(Clone, Debug)]
pub struct Choices {
    /// The step.
    pub step: StepId,
    /// By sequence of its plan.
    pub sequences: Vec<Choice>,
}

/// What a step has chosen for one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This token; or on a device, whatever number tells the device where it is.
    Token(u32),
    /// Nothing could be chosen.
    Failed,
    /// Not one token was asked for, but none or several: nobody can follow it.
    NotOne,
}

impl Choices {
    /// What a step that is computed has chosen.
    pub fn of(plan: &StepPlan, output: &StepOutput) -> Self {
        let choice = |(step, output): (&SequenceStep, &SequenceOutput)| {
            if !step.chooses_one() {
                return Choice::NotOne;
            }
            let first = output.sampled.first();
            first.map_or(Choice::Failed, |sampled| Choice::Token(sampled.token))
        };
        let sequences = plan.sequences.iter().zip(&output.sequences);
        Self {
            step: plan.id,
            sequences: sequences.map(choice).collect(),
        }
    }
}

impl SequenceStep {
    /// Whether one token is chosen for it, so that it can be followed.
    pub fn chooses_one(&self) -> bool {
        self.sample.as_ref().is_some_and(|run| run.len == 1)
    }
}

impl Follows {
    /// The token, looked up in all steps in flight. 0 where nothing could be chosen.
    ///
    /// # Errors
    /// [`ExecutorError`] if the step is not in flight, or has not chosen one token for the sequence.
    pub fn find<'a>(
        &self,
        mut in_flight: impl Iterator<Item = &'a Choices>,
    ) -> Result<u32, ExecutorError> {
        let Some(choices) = in_flight.find(|choices| choices.step == self.step) else {
            return Err(self.not_in_flight());
        };
        match choices.sequences.get(self.sequence) {
            Some(Choice::Token(token)) => Ok(*token),
            Some(Choice::Failed) => Ok(0),
            Some(Choice::NotOne) | None => Err(self.not_one()),
        }
    }

    /// Refuses a plan whose step is unknown, or was collected.
    pub fn not_in_flight(&self) -> ExecutorError {
        ExecutorError::broken_plan(format!(
            "a sequence follows {}, which is not in flight",
            self.step
        ))
    }

    /// Refuses a plan that follows what cannot be followed.
    pub fn not_one(&self) -> ExecutorError {
        ExecutorError::broken_plan(format!(
            "a sequence follows sequence {} of {}, for which that step does not choose one token",
            self.sequence, self.step
        ))
    }
}
