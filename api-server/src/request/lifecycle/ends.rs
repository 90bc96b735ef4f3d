//! What breaks a generation or ends it early: retry, or give up, and tell whoever holds something of it.

use std::time::Duration;

use baton_protocol::{Failure, FailureCode, FinishReason, KvHandle, WorkerId};

use super::room::Round;
use super::{Action, Lifecycle, Phase, Target};
use crate::error::{ApiError, ErrorKind};

/// How often a generation is retried after something broke.
pub const RETRIES_MAX: u32 = 4;

/// How many workers' executors one generation may break. It may be what breaks them: then the fewer it meets the
/// better, for none of them serves again.
pub const EXECUTORS_MAX: u32 = 2;

impl Lifecycle {
    pub(super) fn worker_failed(
        &mut self,
        failure: Failure,
        worker: WorkerId,
        out: &mut Vec<Action>,
    ) {
        if failure.code == FailureCode::Executor {
            self.executors_broken += 1;
            if self.executors_broken == EXECUTORS_MAX {
                let error = ApiError::new(
                    ErrorKind::Worker,
                    format!(
                        "{EXECUTORS_MAX} workers failed over it, the last one because: {}",
                        failure.message
                    ),
                );
                return self.end_early("executors failed", Err(error), out);
            }
        }
        if failure.code.retryable() {
            // To give way for want of room is no fault. While every try brings tokens it comes to its end.
            let has_moved = self.output.len() > self.prefilled_output + 1;
            if failure.code == FailureCode::Preempted && has_moved {
                self.retries = 0;
            }
            self.retry(failure.code.label(), Some(worker), out);
        } else {
            let kind = match failure.code {
                FailureCode::NoToken => ErrorKind::NoToken,
                FailureCode::TooLarge => ErrorKind::AnswerTooLarge,
                _ => ErrorKind::Deadline,
            };
            let error = ApiError::new(kind, failure.message);
            self.end_early(failure.code.label(), Err(error), out);
        }
    }

    pub(super) fn worker_lost(&mut self, lost: &Target, out: &mut Vec<Action>) {
        if self.involved().contains(lost) {
            self.retry("worker lost", Some(lost.worker.clone()), out);
        }
    }

    pub(super) fn stalled(&mut self, out: &mut Vec<Action>) {
        if let Phase::Pulling { decode, .. } | Phase::Decoding { decode } = &self.phase {
            let worker = decode.worker.clone();
            self.retry("decode worker fell silent", Some(worker), out);
        }
    }

    /// A prompt's answer comes once and may take long: nothing tells one that was lost with the bus from one that is to
    /// come. What the worker has computed is in its prefix index, so asking again costs little.
    pub(super) fn bus_back(&mut self, out: &mut Vec<Action>) {
        if let Phase::Prefilling { .. } = &self.phase {
            self.retry("the bus was away", None, out);
        }
    }

    /// Retries with the output so far, elsewhere if possible.
    pub(super) fn retry(
        &mut self,
        reason: &'static str,
        culprit: Option<WorkerId>,
        out: &mut Vec<Action>,
    ) {
        self.abort_involved(reason, out);
        self.phase = Phase::Queued;
        if let Some(finish) = self.already_finished() {
            self.phase = Phase::Done;
            return out.push(Action::Finish(finish));
        }
        if self.retries == RETRIES_MAX {
            let error = ApiError::new(
                ErrorKind::Worker,
                format!(
                    "{} tries failed, the last one because: {reason}",
                    RETRIES_MAX + 1
                ),
            );
            return self.fail(error, out);
        }
        self.retries += 1;
        self.next_round();
        if let Some(worker) = culprit.filter(|worker| !self.failed.contains(worker)) {
            self.failed.push(worker);
        }
        out.push(Action::Retried(reason));
        if self.retries == 1 {
            out.push(Action::ChooseContext);
        } else {
            self.waiting = true;
            out.push(Action::Wait(Duration::from_millis(50 << self.retries)));
        }
    }

    /// The lease of the KV that waits for a decode worker has ended. It is prefilled again at once: that is nobody's fault
    /// and no failed try, and each prefill brings a token.
    pub(super) fn lease_lost(&mut self, out: &mut Vec<Action>) {
        if let Phase::Staged { .. } = self.phase {
            const REASON: &str = "lease ended";
            self.abort_involved(REASON, out);
            self.phase = Phase::Queued;
            self.next_round();
            out.push(Action::Retried(REASON));
            out.push(Action::ChooseContext);
        }
    }

    pub(super) fn next_round(&mut self) {
        self.refused.clear();
        self.round = Round::default();
        self.waiting = false;
    }

    /// Only the news of the end was lost: the tokens themselves say that it is over.
    fn already_finished(&self) -> Option<FinishReason> {
        let last = self.output.last()?;
        let count = self.output.len() as u32;
        if self.rules.stop_token_ids.contains(last) && count > self.rules.min_tokens {
            return Some(FinishReason::Stop);
        }
        (count >= self.rules.max_tokens).then_some(FinishReason::Length)
    }

    pub(super) fn end_early(
        &mut self,
        reason: &'static str,
        end: Result<FinishReason, ApiError>,
        out: &mut Vec<Action>,
    ) {
        self.abort_involved(reason, out);
        match end {
            Ok(finish) => {
                self.phase = Phase::Done;
                out.push(Action::Finish(finish));
            }
            Err(error) => self.fail(error, out),
        }
    }

    pub(super) fn fail(&mut self, error: ApiError, out: &mut Vec<Action>) {
        self.phase = Phase::Failed;
        out.push(Action::Fail(error));
    }

    /// Workers that hold something of this request now.
    pub fn involved(&self) -> Vec<Target> {
        match &self.phase {
            Phase::Queued | Phase::Done | Phase::Failed => Vec::new(),
            Phase::Prefilling { context } => vec![context.clone()],
            Phase::Staged { handle } => vec![holder(handle)],
            Phase::Decoding { decode } => vec![decode.clone()],
            Phase::Pulling { handle, decode } => {
                let context = holder(handle);
                if context == *decode {
                    vec![context]
                } else {
                    vec![context, decode.clone()]
                }
            }
        }
    }

    fn abort_involved(&mut self, reason: &'static str, out: &mut Vec<Action>) {
        let involved = self.involved();
        let abort = |target: &Target| Action::Abort {
            target: target.clone(),
            reason,
        };
        out.extend(involved.iter().map(abort));
        let is_told = |line: &Target| involved.iter().any(|told| told.worker == line.worker);
        self.leave_lines(reason, is_told, out);
    }
}

/// The worker that holds the KV of a handle.
pub(crate) fn holder(handle: &KvHandle) -> Target {
    Target {
        worker: handle.worker.clone(),
        incarnation: handle.incarnation,
    }
}
