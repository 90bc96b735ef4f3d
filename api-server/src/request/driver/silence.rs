//! How long a decode worker may say nothing of a generation.

use std::time::Duration;

use baton_protocol::deadlines::{LATE_AFTER_LOSS_MS, SILENCE_AFTER_LOSS_MS};
use tokio::time::Instant;

/// After a loss on the bus something must be heard until then.
const SILENCE_AFTER_LOSS: Duration = Duration::from_millis(SILENCE_AFTER_LOSS_MS);

/// Until then it may have been sent before the loss.
const LATE_AFTER_LOSS: Duration = Duration::from_millis(LATE_AFTER_LOSS_MS);

/// When a decode worker was last heard, or asked, and whether something of it was lost since.
pub(super) struct Silence {
    since: Instant,
    lost_at: Option<Instant>,
}

impl Silence {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            lost_at: None,
        }
    }

    /// The worker's clock begins again; what was lost stays lost.
    pub(super) fn begin_again(&mut self, now: Instant) {
        self.since = now;
    }

    /// The worker said something. Right after a loss that proves nothing: news of a loss overtakes what was received before it and
    /// still waits to be read, and what was lost may be the end, after which the worker has nothing more to say.
    pub(super) fn heard(&mut self, now: Instant) {
        self.since = now;
        if self.lost_at.is_some_and(|at| now > at + LATE_AFTER_LOSS) {
            self.lost_at = None;
        }
    }

    /// Frames were lost, or the bus was away.
    pub(super) fn lost(&mut self, now: Instant) {
        self.lost_at = Some(now);
    }

    /// Until when something must be heard of a worker that may be silent for `usual`.
    pub(super) fn until(&self, usual: Duration) -> Instant {
        let usual = self.since + usual;
        let after_loss = self.lost_at.map(|at| at + SILENCE_AFTER_LOSS);
        after_loss.map_or(usual, |until| until.min(usual))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_right_after_a_loss_may_be_older_and_proves_nothing() {
        let (now, usual) = (Instant::now(), Duration::from_secs(30));
        let after = |ms| now + Duration::from_millis(ms);
        let mut silence = Silence::new(now);
        silence.lost(after(10));
        silence.heard(after(20));
        assert_eq!(silence.until(usual), after(10) + SILENCE_AFTER_LOSS);
        // What its next reports say does.
        silence.heard(after(11 + LATE_AFTER_LOSS_MS));
        assert_eq!(silence.until(usual), after(11 + LATE_AFTER_LOSS_MS) + usual);
    }

    #[test]
    fn a_loss_never_gives_a_worker_more_time() {
        let (now, usual) = (Instant::now(), Duration::from_millis(500));
        let mut silence = Silence::new(now);
        silence.lost(now);
        assert_eq!(silence.until(usual), now + usual);
    }
}
