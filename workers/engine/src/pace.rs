//! How long a step that runs already keeps the device busy: as long as the last one did, about.

use std::time::{Duration, Instant};

use crate::scheduler::MASK_PATIENCE;

/// When steps ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// The last one.
    ended: Option<Instant>,
    /// Whether another was submitted by then, so that it began when that one ended.
    is_ahead: bool,
    /// From the end of the one before to the end of the last, where that was submitted ahead.
    took: Duration,
}

impl Pace {
    /// A step was collected; `is_ahead` if another is in flight behind it.
    pub fn note(&mut self, now: Instant, is_ahead: bool) {
        let ended = self.ended.replace(now).filter(|_| self.is_ahead);
        self.took = ended.map_or(Duration::ZERO, |ended| now.saturating_duration_since(ended));
        self.is_ahead = is_ahead;
    }

    /// How long a step took that was submitted then and is collected now: since the one before it ended, if that was later. To be asked before
    /// it is [noted](Self::note).
    pub fn took(&self, submitted: Instant, now: Instant) -> Duration {
        let began = self.ended.map_or(submitted, |ended| submitted.max(ended));
        now.saturating_duration_since(began)
    }

    /// When the steps in flight end, which take so long together: the first began when the last one ended that was collected.
    pub fn ends(&self, now: Instant, expected: Duration) -> Instant {
        self.ended.map_or(now, |ended| now.max(ended + expected))
    }

    /// Until when what the device does leaves time for masks, and at least as long as a step is held back for them. It is three
    /// quarters of a step after the last end: a step that was held up by masks does not make the next wait longer.
    pub fn busy_until(&self, now: Instant) -> Instant {
        let least = now + MASK_PATIENCE;
        match self.ended {
            Some(ended) if self.is_ahead => least.max(ended + self.took * 3 / 4),
            _ => least,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_runs_leaves_time_for_masks() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.busy_until(start), start + MASK_PATIENCE);
        pace.note(start, true);
        // How long it takes is not known yet.
        assert_eq!(pace.busy_until(start), start + MASK_PATIENCE);
        pace.note(start + ms(8), true);
        let now = start + ms(9);
        assert_eq!(pace.busy_until(now), start + ms(8 + 6));
        // Held up, it took longer; what is waited for gets shorter from step to step all the same.
        pace.note(start + ms(8 + 7), true);
        assert_eq!(
            pace.busy_until(start + ms(15)),
            start + ms(15) + ms(7) * 3 / 4
        );
        // Nothing runs behind it.
        pace.note(start + ms(30), false);
        let now = start + ms(31);
        assert_eq!(pace.busy_until(now), now + MASK_PATIENCE);
        pace.note(start + ms(99), true);
        assert_eq!(
            pace.busy_until(start + ms(99)),
            start + ms(99) + MASK_PATIENCE
        );
    }
}
