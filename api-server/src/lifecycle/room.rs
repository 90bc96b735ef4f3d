//! When no worker takes a job now: who is asked next, how long to wait, and when to give up.

use std::time::Duration;

use baton_protocol::Refusal;

use super::{Action, Lifecycle, Phase, Target};
use crate::error::{ApiError, ErrorKind};

/// How often in a row it waits for room before it gives up: half a minute, as long as a lease, in waits of at
/// most half a second.
pub const WAITS_MAX: u32 = 60;

impl Lifecycle {
    pub(super) fn no_context_worker(&mut self, out: &mut Vec<Action>) {
        // Nothing was promised to the client yet: say at once that there is no room. Later it is better
        // to wait for it.
        let nothing_promised = self.output.is_empty() && self.retries == 0;
        if nothing_promised || self.waits >= WAITS_MAX || self.fits_nowhere() {
            let error = self.no_room("context");
            self.fail(error, out);
        } else {
            self.wait(out);
        }
    }

    pub(super) fn no_decode_worker(&mut self, context: Target, out: &mut Vec<Action>) {
        let may_come = self.busy_ms.is_some() || self.is_absent;
        if may_come && self.waits < WAITS_MAX {
            self.wait(out);
        } else if may_come || self.fits_nowhere() {
            let error = self.no_room("decode");
            self.end_early("no decode worker has room", Err(error), out);
        } else {
            self.retry(
                "no decode worker can reach the KV",
                Some(context.worker),
                out,
            );
        }
    }

    /// Whoever could take it said that it never will.
    fn fits_nowhere(&self) -> bool {
        self.too_long.is_some() && self.busy_ms.is_none() && !self.is_absent
    }

    fn no_room(&self, role: &str) -> ApiError {
        match self.busy_ms {
            None if self.fits_nowhere() => ApiError::new(
                ErrorKind::ContextLength,
                format!(
                    "prompt and output exceed the {} tokens that a {role} worker can hold",
                    self.too_long.unwrap_or_default()
                ),
            ),
            Some(ms) => ApiError::new(
                ErrorKind::Busy,
                format!("every {role} worker is busy; try again"),
            )
            .retry_after(ms),
            None => ApiError::new(
                ErrorKind::NoWorker,
                format!("no {role} worker can serve this request; see /health and /cluster"),
            ),
        }
    }

    fn wait(&mut self, out: &mut Vec<Action>) {
        self.waits += 1;
        self.waiting = true;
        let ms = u64::from(self.busy_ms.unwrap_or(250)).clamp(50, 500);
        out.push(Action::Wait(Duration::from_millis(ms)));
    }

    pub(super) fn wait_over(&mut self, out: &mut Vec<Action>) {
        if !std::mem::take(&mut self.waiting) {
            return;
        }
        self.next_round();
        match self.phase {
            Phase::Queued => out.push(Action::ChooseContext),
            Phase::Staged { .. } => out.push(Action::ChooseDecode),
            _ => {}
        }
    }

    /// Notes a refusal; an error if no other worker would take the job either.
    pub(super) fn refused_by(&mut self, target: Target, refusal: &Refusal) -> Result<(), ApiError> {
        match refusal {
            Refusal::Malformed { detail } => {
                return Err(ApiError::new(
                    ErrorKind::Internal,
                    format!(
                        "worker {} did not understand the job: {detail}",
                        target.worker
                    ),
                ));
            }
            Refusal::TooLong { tokens_max } => {
                self.too_long = self.too_long.max(Some(*tokens_max));
            }
            Refusal::Busy { retry_after_ms } => {
                let soonest = self
                    .busy_ms
                    .map_or(*retry_after_ms, |ms| ms.min(*retry_after_ms));
                self.busy_ms = Some(soonest);
            }
            Refusal::Draining | Refusal::WrongModel { .. } | Refusal::Unreachable { .. } => {}
        }
        self.refused.push(target.worker);
        Ok(())
    }

    /// A place became free before the wait was over.
    pub(super) fn room_made(&mut self, out: &mut Vec<Action>) {
        // A wait cut short does not count: others may take the place again and again.
        if self.waiting && matches!(self.phase, Phase::Staged { .. }) {
            self.waits = self.waits.saturating_sub(1);
            self.wait_over(out);
        }
    }
}
