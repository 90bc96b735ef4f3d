//! What took a request's time, and whether it got what it was promised.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use baton_protocol::Tier;
use tokio::time::Instant;

use crate::metrics::Metrics;
use crate::request::spent::Parts;
use crate::service::ServiceLevel;

/// What a request's times were made of, as they become known.
#[derive(Debug, Default)]
pub(super) struct Attainment {
    /// The prompt's wait on its context worker.
    queue: Duration,
    first: Option<Instant>,
    last: Option<Instant>,
    /// From the first token to the next: the hand-over, and a step.
    handed_over: Duration,
    /// Tokens after the first: written here alone, and looked at by whoever asks what runs.
    more: Arc<AtomicU32>,
}

/// What took the time of a request that missed what it was promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// It waited before its prompt ran.
    Queue,
    /// Its prompt took long to run.
    Compute,
    /// Its KV took long to come to where it generated.
    Transfer,
    /// Its tokens were slow to come.
    Decode,
}

impl Cause {
    fn label(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Compute => "compute",
            Self::Transfer => "transfer",
            Self::Decode => "decode",
        }
    }
}

impl Attainment {
    /// The prompt waited for so long before its first step.
    pub(super) fn queued(&mut self, queue: Duration) {
        self.queue = queue;
    }

    /// Counts the tokens after the first.
    pub(super) fn counter(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.more)
    }

    fn more(&self) -> u32 {
        self.more.load(Ordering::Relaxed)
    }

    /// When the last tokens came.
    pub(super) fn last(&self) -> Option<Instant> {
        self.last
    }

    /// So many tokens came.
    pub(super) fn tokens(&mut self, count: usize, now: Instant) {
        match self.first {
            None => self.first = Some(now),
            Some(first) => {
                let more = self.more();
                if more == 0 {
                    self.handed_over = now.saturating_duration_since(first);
                }
                let more = more.saturating_add(count as u32);
                self.more.store(more, Ordering::Relaxed);
            }
        }
        self.last = Some(now);
    }

    /// Where the time of a request that ends now went.
    pub(super) fn parts(&self, arrived: Instant, now: Instant) -> Parts {
        let whole = now.saturating_duration_since(arrived);
        let Some(first) = self.first else {
            return Parts {
                queue: whole,
                ..Parts::default()
            };
        };
        let ttft = first.saturating_duration_since(arrived);
        let queue = self.queue.min(ttft);
        let rest = whole.saturating_sub(ttft);
        let handover = match self.more() {
            0 => rest,
            _ => self.handed_over.min(rest),
        };
        Parts {
            queue,
            prefill: ttft - queue,
            handover,
            decode: rest - handover,
        }
    }

    /// Why a request that is over missed its promise; `None` if it did not.
    pub(super) fn missed(&self, level: ServiceLevel, arrived: Instant) -> Option<Cause> {
        let (first, last) = (self.first?, self.last?);
        let ttft = first.saturating_duration_since(arrived);
        if level.ttft().is_some_and(|promised| ttft > promised) {
            // What is neither is the road there and other workers that were tried before: a wait.
            return Some(match self.queue < ttft / 2 {
                true => Cause::Compute,
                false => Cause::Queue,
            });
        }
        let itl = level.itl().filter(|_| self.more() > 0)?;
        let took = last.saturating_duration_since(first);
        let over = took
            .checked_sub(itl * self.more())
            .filter(|over| !over.is_zero())?;
        Some(match self.handed_over.saturating_sub(itl) >= over / 2 {
            true => Cause::Transfer,
            false => Cause::Decode,
        })
    }

    /// Counts a request of this class that is over: without an error in `end`, or with its kind's label.
    pub(super) fn count(
        &self,
        metrics: &Metrics,
        (tier, level): (Tier, ServiceLevel),
        arrived: Instant,
        end: Result<(), &'static str>,
    ) {
        let tier = tier.label();
        let count = |outcome| {
            let labels = &[tier, outcome];
            metrics.service_level_total.with_label_values(labels).inc();
        };
        match (end, self.missed(level, arrived)) {
            (Err(outcome), _) => count(outcome),
            (Ok(()), None) => count("met"),
            (Ok(()), Some(cause)) => {
                count("missed");
                let labels = &[tier, cause.label()];
                metrics
                    .service_level_missed_total
                    .with_label_values(labels)
                    .inc();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn level(ttft_ms: u32, itl_ms: u32) -> ServiceLevel {
        ServiceLevel {
            ttft_ms: Some(ttft_ms),
            itl_ms: Some(itl_ms),
        }
    }

    /// One whose first token came after `ttft`, the next ones after these times.
    fn run(queue: u64, ttft: u64, gaps: &[u64]) -> (Attainment, Instant) {
        let arrived = Instant::now();
        let mut all = Attainment::default();
        all.queued(MS(queue));
        let mut now = arrived + MS(ttft);
        all.tokens(1, now);
        for gap in gaps {
            now += MS(*gap);
            all.tokens(1, now);
        }
        (all, arrived)
    }

    #[test]
    fn the_parts_add_up_to_the_whole() {
        for (queue, ttft, gaps, end, parts) in [
            (10, 100, &[50, 5, 5][..], 162, [10, 90, 50, 12]),
            (10, 100, &[], 101, [10, 90, 1, 0]),
            // Told late: a worker's clock may say more than there was.
            (150, 100, &[10], 110, [100, 0, 10, 0]),
        ] {
            let (all, arrived) = run(queue, ttft, gaps);
            let found = all.parts(arrived, arrived + MS(end));
            let [queue, prefill, handover, decode] = parts.map(MS);
            assert_eq!(
                found,
                Parts {
                    queue,
                    prefill,
                    handover,
                    decode
                },
                "{parts:?}"
            );
        }
        // It never had a token.
        let arrived = Instant::now();
        let found = Attainment::default().parts(arrived, arrived + MS(30));
        assert_eq!(
            found,
            Parts {
                queue: MS(30),
                ..Parts::default()
            }
        );
    }

    #[test]
    fn the_part_that_took_most_is_the_cause() {
        for (queue, ttft, gaps, cause) in [
            (10, 100, &[10, 10][..], None),
            (10, 201, &[10], Some(Cause::Compute)),
            (150, 201, &[10], Some(Cause::Queue)),
            (10, 100, &[10, 11, 12], Some(Cause::Decode)),
            (10, 100, &[50, 5, 5], Some(Cause::Transfer)),
            // A late hand-over is made good by quick steps.
            (10, 100, &[18, 2], None),
            (10, 100, &[], None),
        ] {
            let (all, arrived) = run(queue, ttft, gaps);
            assert_eq!(
                all.missed(level(200, 10), arrived),
                cause,
                "{queue} {ttft} {gaps:?}"
            );
            assert_eq!(all.missed(ServiceLevel::default(), arrived), None);
        }
    }
}
