//! How many lines one place in the code may write.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tracing::callsite::Identifier;

/// Lines that one place may write at once: more than a cluster's start says of one thing.
const BURST: f64 = 200.0;

/// And then so many a second: some megabytes an hour.
const PER_SECOND: f64 = 10.0;

static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Lines left out since the process started.
pub(crate) fn left_out() -> u64 {
    LEFT_OUT.load(Relaxed)
}

/// One bucket for each place that logs. There are as many as the code has.
#[derive(Debug, Default)]
pub(crate) struct Rates(Mutex<HashMap<Identifier, Bucket>>);

#[derive(Debug)]
struct Bucket {
    /// Lines that may be written now.
    lines: f64,
    /// When that was so.
    at: Instant,
    left_out: u64,
}

impl Rates {
    /// How many lines of this place were left out since the last one that was written, if this one may be.
    pub(crate) fn pass(&self, place: Identifier, now: Instant) -> Option<u64> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = places.entry(place).or_insert(Bucket {
            lines: BURST,
            at: now,
            left_out: 0,
        });
        let waited = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.lines = (bucket.lines + waited * PER_SECOND).min(BURST);
        bucket.at = now;
        if bucket.lines < 1.0 {
            bucket.left_out += 1;
            LEFT_OUT.fetch_add(1, Relaxed);
            return None;
        }
        bucket.lines -= 1.0;
        Some(std::mem::take(&mut bucket.left_out))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tracing::Callsite;
    use tracing::subscriber::Interest;

    use super::*;

    /// With a size, so that each has an address of its own.
    struct Place(#[allow(dead_code)] u8);

    impl Callsite for Place {
        fn set_interest(&self, _: Interest) {}

        fn metadata(&self) -> &tracing::Metadata<'_> {
            unreachable!("nobody asks")
        }
    }

    static HERE: Place = Place(0);
    static THERE: Place = Place(1);

    #[test]
    fn one_place_writes_so_many_lines_a_second_and_no_other_pays_for_it() {
        let (rates, now) = (Rates::default(), Instant::now());
        let here = || Identifier(&HERE);
        let passed = (0..5_000).filter(|_| rates.pass(here(), now).is_some());
        assert_eq!(passed.count(), BURST as usize);
        assert_eq!(
            rates.pass(here(), now + Duration::from_secs(1)),
            Some(4_800)
        );
        let later = now + Duration::from_secs(2);
        let passed = (0..5_000).filter(|_| rates.pass(here(), later).is_some());
        assert_eq!(passed.count(), 2 * PER_SECOND as usize - 1);
        assert_eq!(rates.pass(Identifier(&THERE), now), Some(0));
        assert_eq!(left_out(), 4_800 + 5_000 - 19);
    }
}
