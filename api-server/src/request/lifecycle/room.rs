//! When no worker takes a job now: who is asked next, how long to wait, and when to give up.
//!
//! A client that has its first token is not given up for want of room: as long as some worker is full, its request waits
//! until its deadline. For a worker that is not there it waits for a bounded time, [`ABSENT_WAIT`].

use std::time::Duration;

use baton_protocol::Refusal;
use baton_protocol::deadlines::{ABSENT_WAIT_MS, ASK_AGAIN_MAX_MS, ASK_AGAIN_MIN_MS};

use super::words::Overbooked;
use super::{Action, Lifecycle, Phase, Target};
use crate::error::{ApiError, ErrorKind};

/// How long it waits for workers that are not there, all waits since one was heard last taken together.
pub const ABSENT_WAIT: Duration = Duration::from_millis(ABSENT_WAIT_MS);

/// Between two rounds of asking where no worker gave a hint.
const WITHOUT_HINT_MS: u64 = ASK_AGAIN_MAX_MS / 2;

/// What the workers that were asked in this round said.
#[derive(Clone, Debug, Default)]
pub(super) struct Round {
    /// The shortest hint of those that are full.
    busy_ms: Option<u32>,
    /// One was not there, or has another role than it had: it may be starting again.
    pub(super) is_absent: bool,
    /// Longest sequence for which a worker that refused this one has room.
    too_long: Option<u32>,
    /// What one of those said that did not understand the job.
    malformed: Option<String>,
    /// One refused for a reason that may pass.
    may_pass: bool,
}

impl Round {
    /// Whether a worker may take it later.
    fn may_come(&self) -> bool {
        self.busy_ms.is_some() || self.is_absent
    }

    /// Whether those who were asked have said what comes next: wait, or never.
    pub(super) fn is_decided(&self) -> bool {
        self.may_come() || self.is_hopeless()
    }

    /// Whether whoever was asked said that it never will.
    fn is_hopeless(&self) -> bool {
        let never = self.too_long.is_some() || self.malformed.is_some() && !self.may_pass;
        never && !self.may_come()
    }

    fn error(&self, role: &str) -> ApiError {
        match (self.busy_ms, self.too_long, &self.malformed) {
            (Some(ms), ..) => ApiError::new(
                ErrorKind::Busy,
                format!("every {role} worker is busy; try again"),
            )
            .retry_after(ms),
            (None, Some(tokens), _) if self.is_hopeless() => ApiError::new(
                ErrorKind::ContextLength,
                format!(
                    "prompt and output exceed the {tokens} tokens that a {role} worker can hold"
                ),
            ),
            (None, _, Some(detail)) => ApiError::new(
                ErrorKind::Internal,
                format!(
                    "no {role} worker takes the job, and one did not understand it: {detail}; \
                     run the same Baton release on every host"
                ),
            ),
            _ => ApiError::new(
                ErrorKind::NoWorker,
                format!("no {role} worker can serve this request; see /health and /cluster"),
            ),
        }
    }
}

impl Lifecycle {
    pub(super) fn no_context_worker(&mut self, out: &mut Vec<Action>) {
        // Nothing was promised to the client yet: say at once that there is no room. Later it is better
        // to wait for it.
        let nothing_promised = self.output.is_empty() && self.retries == 0;
        let gives_up = nothing_promised && !self.round.is_absent;
        if gives_up || self.round.is_hopeless() || !self.may_wait() {
            let error = self.round.error("context");
            self.fail(error, out);
        } else {
            self.wait(out);
        }
    }

    pub(super) fn no_decode_worker(&mut self, context: Target, out: &mut Vec<Action>) {
        if self.round.may_come() && self.may_wait() {
            self.wait(out);
        } else if self.round.may_come() || self.round.is_hopeless() {
            let error = self.round.error("decode");
            self.end_early("no decode worker has room", Err(error), out);
        } else {
            self.retry(
                "no decode worker can reach the KV",
                Some(context.worker),
                out,
            );
        }
    }

    /// Whether a wait for room counts for nothing: a worker is there and full, and the client has its first token.
    fn waits_freely(&self) -> bool {
        self.round.busy_ms.is_some() && !self.output.is_empty()
    }

    fn may_wait(&self) -> bool {
        self.waits_freely() || self.waited < ABSENT_WAIT
    }

    fn wait(&mut self, out: &mut Vec<Action>) {
        let hint = self.round.busy_ms.map_or(WITHOUT_HINT_MS, u64::from);
        let time = Duration::from_millis(hint.clamp(ASK_AGAIN_MIN_MS, ASK_AGAIN_MAX_MS));
        if !self.waits_freely() {
            self.waited += time;
        }
        self.waiting = true;
        out.push(Action::Wait(time));
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

    /// Notes a refusal. Another worker is asked next.
    pub(super) fn refused_by(&mut self, target: Target, refusal: &Refusal) {
        match refusal {
            Refusal::Malformed { detail } => {
                self.round.malformed = Some(format!("{} says: {detail}", target.worker));
                if !self.failed.contains(&target.worker) {
                    self.failed.push(target.worker.clone());
                }
            }
            Refusal::TooLong { tokens_max } => {
                self.round.too_long = self.round.too_long.max(Some(*tokens_max));
            }
            Refusal::Busy { retry_after_ms } => {
                let soonest = self
                    .round
                    .busy_ms
                    .map_or(*retry_after_ms, |ms| ms.min(*retry_after_ms));
                self.round.busy_ms = Some(soonest);
                // Somebody is there.
                self.waited = Duration::ZERO;
                let stands_in_line = self.lines.iter().any(|line| line.worker == target.worker);
                if matches!(self.phase, Phase::Staged { .. }) && !stands_in_line {
                    self.lines.push(target.clone());
                }
            }
            // Its next beat says what it does now.
            Refusal::WrongRole { .. } => self.round.is_absent = true,
            Refusal::Draining
            | Refusal::WrongModel { .. }
            | Refusal::Unreachable { .. }
            | Refusal::Unknown => self.round.may_pass = true,
        }
        self.refused.push(target.worker);
    }

    /// A place became free before the wait was over.
    pub(super) fn room_made(&mut self, out: &mut Vec<Action>) {
        if self.waiting && matches!(self.phase, Phase::Staged { .. }) {
            self.wait_over(out);
        }
    }

    /// No decode worker would take it in time: the client is told before its first token, and nothing is begun.
    pub(super) fn overbooked(
        &mut self,
        why: Overbooked,
        wait: Duration,
        retry_after: Duration,
        out: &mut Vec<Action>,
    ) {
        if self.phase != Phase::Queued || self.waiting || !self.output.is_empty() {
            return;
        }
        let message = match why {
            Overbooked::Prompt => format!(
                "the context workers have too much to do: its first token would come after some {} ms, which is later than \
                 promised; try again",
                wait.as_millis()
            ),
            Overbooked::Decode => format!(
                "the decode workers are full: its second token would wait some {:.0} s for one with room; try again",
                wait.as_secs_f32().max(1.0)
            ),
        };
        let error = ApiError::new(ErrorKind::Busy, message);
        let retry_after_ms = u32::try_from(retry_after.as_millis()).unwrap_or(u32::MAX);
        self.fail(error.retry_after(retry_after_ms), out);
    }

    /// Gives up its places in the lines of decode workers that were full, but for workers that `knows` tells of.
    pub(super) fn leave_lines(
        &mut self,
        reason: &'static str,
        knows: impl Fn(&Target) -> bool,
        out: &mut Vec<Action>,
    ) {
        let lines = std::mem::take(&mut self.lines).into_iter();
        let told = lines.filter(|line| !knows(line));
        out.extend(told.map(|target| Action::Abort { target, reason }));
    }
}
