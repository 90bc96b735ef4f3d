//! A step that the executor refused: nothing of it ran. Its sequences end, the others continue.

use super::Engine;
use crate::{Event, ExecutorError};

impl Engine {
    /// Ends the sequences of the step that was planned last. It is not known which of them the executor refused, so all leave. The API
    /// server retries each on another worker, or on this one.
    pub(super) fn end_refused(&mut self, error: &ExecutorError, events: &mut Vec<Event>) {
        self.plans_refused = self.plans_refused.saturating_add(1);
        let rows = std::mem::take(&mut self.scheduler.flight).rows;
        let steps = std::mem::take(&mut self.scheduler.plan.sequences);
        for (step, row) in steps.iter().zip(&rows) {
            let Some(mut sequence) = self.scheduler.remove(step.key) else {
                continue;
            };
            sequence.in_flight -= row.tokens as usize;
            self.flights.give_back_of(&mut sequence);
            events.push(Event::Refused {
                key: step.key,
                detail: format!("the executor refused its step: {error}"),
            });
        }
    }
}
