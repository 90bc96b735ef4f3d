//! Log lines about what others send: as often as somebody reads them, not as often as somebody sends.

use std::time::Duration;

use tokio::time::Instant;

/// Lets one of many through in each interval, and counts the others.
#[derive(Debug)]
pub struct Seldom {
    interval: Duration,
    last: Option<Instant>,
    others: u64,
}

impl Seldom {
    /// One in each interval of this length.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            last: None,
            others: 0,
        }
    }

    /// How many there were since the last one that was let through, if this one is.
    pub fn pass(&mut self, now: Instant) -> Option<u64> {
        let is_due = self
            .last
            .is_none_or(|last| now.duration_since(last) >= self.interval);
        if !is_due {
            self.others += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.others))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_passes_in_each_interval() {
        let (second, now) = (Duration::from_secs(1), Instant::now());
        let mut seldom = Seldom::new(second);
        assert_eq!(seldom.pass(now), Some(0));
        assert_eq!(seldom.pass(now), None);
        assert_eq!(seldom.pass(now + second / 2), None);
        assert_eq!(seldom.pass(now + second), Some(2));
        assert_eq!(seldom.pass(now + second), None);
    }
}
