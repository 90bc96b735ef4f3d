//! How long first tokens took, without faults and with them: the distributions, as JSON.

use std::time::Duration;

use serde_json::{Value, json};

use super::client::Story;
use super::load::Reader;
use super::verdict::Verdict;

/// Where the distribution is read off, in milliseconds: each about twice the one before. The longest budget of a request is in between.
const POINTS_MS: [u64; 15] = [
    5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 15_000, 20_000, 30_000, 60_000,
];

/// The streams of a phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firsts {
    /// How long the first token of each took that had one.
    times: Vec<Duration>,
    /// How many ended with an error before they had one.
    without: usize,
}

impl Firsts {
    /// Takes in a request, if its client asked for a stream and waited for as long as that took: one that leaves at some time is not
    /// there to see a late token.
    pub fn note(&mut self, reader: Reader, story: &Story, verdict: &Verdict) {
        if !reader.streams() || matches!(reader, Reader::LeavesAt { .. }) {
            return;
        }
        match (verdict, story.first) {
            // The first event of a stream that failed may be its error: of these none is counted as a token.
            (Verdict::Right | Verdict::Left, Some(first)) => self.times.push(first),
            _ => self.without += 1,
        }
    }

    /// Adds those of another seed.
    pub fn add(&mut self, other: &Self) {
        self.times.extend(&other.times);
        self.without += other.without;
    }

    /// Quantiles of those that came, and of all streams the part whose first token came within each of [`POINTS_MS`].
    pub fn report(&self) -> Value {
        let mut times: Vec<f64> = self
            .times
            .iter()
            .map(|time| time.as_secs_f64() * 1e3)
            .collect();
        times.sort_by(f64::total_cmp);
        let streams = times.len() + self.without;
        let quantile = |part: f64| {
            let last = times.len().checked_sub(1)?;
            Some(tenths(
                times[((part * times.len() as f64) as usize).min(last)],
            ))
        };
        let within: Vec<_> = POINTS_MS
            .iter()
            .map(|point| {
                let count = times.partition_point(|time| *time <= *point as f64);
                // In percent, with one place: rounded down, so that 100 is all of them.
                let percent = (1000 * count).checked_div(streams).unwrap_or(0) as f64 / 10.0;
                json!([point, percent])
            })
            .collect();
        json!({
            "streams": streams,
            "without_first_token": self.without,
            "first_token_ms": {
                "p50": quantile(0.5), "p90": quantile(0.9), "p99": quantile(0.99), "max": quantile(1.0),
            },
            "percent_within_ms": within,
        })
    }
}

fn tenths(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::{Firsts, POINTS_MS, Reader, Story, Verdict};
    use crate::chaos::client::End;
    use crate::chaos::verdict::Failure;

    fn story(first_ms: Option<u64>) -> Story {
        Story {
            from: Duration::ZERO,
            first: first_ms.map(Duration::from_millis),
            until: Duration::from_secs(1),
            status: Some(200),
            retry_after: None,
            body: Vec::new(),
            end: End::Complete,
        }
    }

    #[test]
    fn what_came_and_what_did_not_are_told_apart() {
        let mut firsts = Firsts::default();
        let stream = Reader::Stream { usage: false };
        for first in 1..=98 {
            firsts.note(stream, &story(Some(first)), &Verdict::Right);
        }
        firsts.note(
            Reader::LeavesAfter { events: 1 },
            &story(Some(4_000)),
            &Verdict::Left,
        );
        // Its error is an event too.
        firsts.note(stream, &story(Some(7)), &Verdict::Error(Failure::Worker));
        let leaves = Reader::LeavesAt {
            after: Duration::from_secs(1),
            stream: true,
        };
        for reader in [Reader::Whole, leaves] {
            firsts.note(reader, &story(Some(1)), &Verdict::Right);
        }
        let report = firsts.report();
        assert_eq!(report["streams"], 100);
        assert_eq!(report["without_first_token"], 1);
        let quantiles = json!({"p50": 50.0, "p90": 90.0, "p99": 4000.0, "max": 4000.0});
        assert_eq!(report["first_token_ms"], quantiles);
        let within = |ms: u64| {
            let at = POINTS_MS.iter().position(|point| *point == ms);
            report["percent_within_ms"][at.expect("a point")][1].clone()
        };
        assert_eq!(
            [
                within(5),
                within(100),
                within(2_000),
                within(5_000),
                within(60_000)
            ],
            [5.0, 98.0, 98.0, 99.0, 99.0]
        );
    }

    #[test]
    fn nothing_has_no_quantiles() {
        let report = Firsts::default().report();
        assert_eq!(report["streams"], 0);
        assert!(report["first_token_ms"]["p50"].is_null());
    }
}
