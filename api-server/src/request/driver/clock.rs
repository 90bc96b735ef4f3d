//! The times of one generation: how long each of its waits may take, and what is due when one is over.

use std::time::Duration;

use baton_protocol::deadlines::{DECODE_SILENCE_MS, PULL_SILENCE_MS};
use tokio::time::Instant;

use super::lease::Lease;
use super::silence::Silence;
use super::{Driver, Sink};
use crate::request::lifecycle::{Input, Phase};

/// A decode worker that said nothing of a generation for this long is given up.
const DECODE_SILENCE: Duration = Duration::from_millis(DECODE_SILENCE_MS);

/// A decode worker that said nothing of a pull for this long is given up.
const PULL_SILENCE: Duration = Duration::from_millis(PULL_SILENCE_MS);

impl<S: Sink> Driver<S> {
    /// Notes since when the sink is full. Nothing is heard of the workers meanwhile, so their clock
    /// begins again when there is room again.
    pub(super) fn note_room(&mut self) {
        if !self.sink.has_room() {
            self.full_since.get_or_insert_with(Instant::now);
        } else if self.full_since.take().is_some() {
            self.silence.begin_again(Instant::now());
        }
    }

    /// Until when the client may leave the sink full.
    pub(super) fn full_until(&self) -> Option<Instant> {
        Some(self.full_since? + self.server.limits.reader_stall)
    }

    pub(super) fn time(&mut self, now: Instant) {
        if now >= self.job.deadline {
            self.input(Input::Deadline);
        } else if self.lease_ends().is_some_and(|until| now >= until) {
            self.input(Input::LeaseLost);
        } else if let Some(lease) = &mut self.lease
            && lease.renew_at().is_some_and(|at| now >= at)
        {
            lease.renew(&self.server.bus, now);
        } else if self.wait_until.is_some_and(|until| now >= until) {
            self.wait_until = None;
            if let Some(ticket) = &self.ticket {
                ticket.asks();
            }
            self.input(Input::WaitOver);
        } else if self.full_until().is_some_and(|until| now >= until) {
            self.input(Input::ClientStalled);
        } else if self.silent_until().is_some_and(|until| now >= until) {
            self.silence = Silence::new(now);
            self.input(Input::Stalled);
        }
    }

    /// When something is due next.
    pub(super) fn wake_at(&self) -> Instant {
        let renew_at = self.lease.as_ref().and_then(Lease::renew_at);
        let times = [
            self.wait_until,
            self.full_until(),
            self.silent_until(),
            self.lease_ends(),
            renew_at,
        ];
        times
            .into_iter()
            .flatten()
            .fold(self.job.deadline, Instant::min)
    }

    /// When the KV that waits for a decode worker is lost.
    pub(super) fn lease_ends(&self) -> Option<Instant> {
        let waits = matches!(self.lifecycle.phase(), Phase::Staged { .. });
        self.lease.as_ref().filter(|_| waits).map(Lease::until)
    }

    /// Until when a decode worker may be silent.
    pub(super) fn silent_until(&self) -> Option<Instant> {
        let allowed = match self.lifecycle.phase() {
            _ if self.full_since.is_some() => return None,
            Phase::Pulling { .. } => PULL_SILENCE,
            Phase::Decoding { .. } => DECODE_SILENCE,
            _ => return None,
        };
        Some(self.silence.until(allowed))
    }
}
