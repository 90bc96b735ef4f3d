//! How long prompts and generations take here, for the hints in [`Refusal::Busy`](baton_protocol::Refusal::Busy) and in beats.

use std::time::Duration;

/// Hints are within these, in milliseconds.
const HINT_MIN_MS: f32 = 20.0;
const PREFILL_HINT_MAX_MS: f32 = 10_000.0;
const DECODE_HINT_MAX_MS: f32 = 60_000.0;

/// Of those that wait for a place each asks this much later than the one before it: they do not all come back at once.
const APART_MS: f32 = 25.0;

/// A running mean of how long something takes.
#[derive(Default)]
pub(crate) struct Pace {
    mean_ms: f32,
}

impl Pace {
    /// Weight of the newest in the mean.
    const NEWEST: f32 = 0.1;

    /// One more has ended.
    pub(crate) fn record(&mut self, took: Duration) {
        let took_ms = took.as_secs_f32() * 1e3;
        self.mean_ms = match self.mean_ms {
            0.0 => took_ms,
            mean => mean + Self::NEWEST * (took_ms - mean),
        };
    }

    /// The mean, at least 1 once one has ended; 0 before.
    pub(crate) fn mean_ms(&self) -> u32 {
        match self.mean_ms {
            0.0 => 0,
            mean => mean.max(1.0) as u32,
        }
    }

    /// When a prompt may find a place, with this many before it: a quarter of them done, at least one.
    pub(crate) fn prefill_hint_ms(&self, jobs: usize) -> u32 {
        let ms = self.mean_ms * (jobs as f32 / 4.0).max(1.0);
        ms.clamp(HINT_MIN_MS, PREFILL_HINT_MAX_MS) as u32
    }

    /// When a generation may find a place, with this many before it in the line: those that run are taken to last as long as
    /// the mean, and `ages` says how long each has run. Before anything has ended here, the oldest stands for the mean.
    pub(crate) fn decode_hint_ms(
        &self,
        ages: impl Iterator<Item = Duration>,
        before: usize,
    ) -> u32 {
        let mut ages: Vec<f32> = ages.map(|age| age.as_secs_f32() * 1e3).collect();
        // The oldest first: its place is the first to become free.
        ages.sort_unstable_by(|a, b| b.total_cmp(a));
        let oldest = ages.first().copied().unwrap_or_default();
        let mean = if self.mean_ms == 0.0 {
            oldest
        } else {
            self.mean_ms
        };
        let running = ages.len().max(1);
        let next = ages.get(before % running).copied().unwrap_or_default();
        let rounds = (before / running) as f32;
        let ms = (mean - next).max(0.0) + rounds * mean;
        let apart = APART_MS * (before + 1) as f32;
        ms.max(apart).clamp(HINT_MIN_MS, DECODE_HINT_MAX_MS) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: &[f32]) -> impl Iterator<Item = Duration> {
        seconds.iter().map(|s| Duration::from_secs_f32(*s))
    }

    #[test]
    fn a_hint_says_when_the_next_place_is_likely_free() {
        let mut pace = Pace::default();
        pace.record(Duration::from_secs(6));
        let ages = [5.0, 1.0, 3.0];
        assert_eq!(pace.decode_hint_ms(seconds(&ages), 0), 1_000);
        assert_eq!(pace.decode_hint_ms(seconds(&ages), 1), 3_000);
        assert_eq!(pace.decode_hint_ms(seconds(&ages), 2), 5_000);
        assert_eq!(
            pace.decode_hint_ms(seconds(&ages), 3),
            7_000,
            "a round later"
        );
    }

    #[test]
    fn a_hint_is_never_a_moment_and_those_who_wait_are_told_different_ones() {
        let pace = Pace::default();
        assert_eq!(pace.mean_ms(), 0);
        assert_eq!(pace.decode_hint_ms(seconds(&[2.0, 2.0]), 0), 25);
        assert_eq!(pace.decode_hint_ms(seconds(&[2.0, 2.0]), 1), 50);
        assert_eq!(pace.decode_hint_ms(seconds(&[]), 0), 25);
        let mut slow = Pace::default();
        slow.record(Duration::from_secs(1_000_000));
        assert_eq!(slow.decode_hint_ms(seconds(&[0.0]), 9), 60_000);
    }
}
