//! The system's time of moments that were taken from this process's monotonic clock.
//!
//! One reading of both clocks holds for all spans: read for each of them, a thread that loses its CPU between the two would move a span. The
//! exporter looks now and then whether the system's clock was set.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Two readings that are further apart than this are none.
const APART_MAX: Duration = Duration::from_micros(100);

/// The system's clock is followed when it is off by more than this. Below that it is the readings.
const OFF_MAX: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(crate) struct Clock {
    base: Instant,
    /// Nanoseconds from 1970 to `base`.
    unix: AtomicU64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self {
            base: Instant::now(),
            unix: AtomicU64::new(nanos(SystemTime::now())),
        }
    }

    /// Nanoseconds from 1970 to this moment.
    pub(crate) fn unix_nanos(&self, at: Instant) -> u64 {
        let unix = self.unix.load(Ordering::Relaxed);
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        match at.checked_duration_since(self.base) {
            Some(after) => unix.saturating_add(nanos(after)),
            None => unix.saturating_sub(nanos(self.base.saturating_duration_since(at))),
        }
    }

    /// Follows the system's clock, should that have been set.
    pub(crate) fn look(&self) {
        let before = Instant::now();
        let system = SystemTime::now();
        if before.elapsed() <= APART_MAX {
            self.follow(before, nanos(system));
        }
    }

    fn follow(&self, at: Instant, unix: u64) {
        let off = unix as i128 - self.unix_nanos(at) as i128;
        if off.unsigned_abs() > OFF_MAX.as_nanos() {
            let base = self.unix.load(Ordering::Relaxed) as i128 + off;
            let base = u64::try_from(base).unwrap_or_default();
            self.unix.store(base, Ordering::Relaxed);
        }
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_as_far_apart_as_moments_and_follow_a_clock_that_is_set() {
        let clock = Clock::new();
        let (at, hour) = (clock.base, Duration::from_secs(3600));
        let begin = clock.unix_nanos(at);
        let second = 1_000_000_000;
        assert_eq!(clock.unix_nanos(at + hour), begin + 3600 * second);
        if let Some(before) = at.checked_sub(Duration::from_secs(1)) {
            assert_eq!(clock.unix_nanos(before), begin - second);
        }
        // As much as two readings may be apart.
        clock.follow(at + hour, begin + 3600 * second + 900_000);
        assert_eq!(clock.unix_nanos(at), begin);
        for set in [begin + 5 * second, begin - 5 * second] {
            clock.follow(at, set);
            assert_eq!(clock.unix_nanos(at), set);
            assert_eq!(clock.unix_nanos(at + hour), set + 3600 * second);
        }
    }
}
