//! Where the time of the last requests went: the numbers of those that ended, and nothing of their text. No ids either: a
//! response that is kept can be read by its id.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use baton_protocol::WorkerId;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::request::inbox::lock;

/// Most that are kept; the oldest goes first.
pub const KEPT: usize = 64;

/// The parts of a generation's time, from the arrival of its HTTP request to its end. They add up to the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Its prompt waited on its context worker; of one that never had a token, all of its time.
    pub queue: Duration,
    /// Until its first token: the prompt's steps, the way there and back, and other tries before.
    pub prefill: Duration,
    /// From the first token to the next: the KV's way to the decode worker, and a step there.
    pub handover: Duration,
    /// From then on.
    pub decode: Duration,
}

/// A generation that ended.
#[derive(Clone, Debug)]
pub struct Spent {
    /// When.
    pub ended: Instant,
    /// `stop`, `length`, or an error's label.
    pub outcome: &'static str,
    /// Where its time went.
    pub parts: Parts,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Of these, those whose KV was there.
    pub cached_tokens: u32,
    /// Tokens that it brought.
    pub output_tokens: usize,
    /// Who was last sent its prompt, and who its KV's handle.
    pub workers: [Option<WorkerId>; 2],
}

/// The last [`KEPT`] of them.
#[derive(Default)]
pub struct LastSpent(Mutex<Ring>);

#[derive(Default)]
struct Ring {
    /// How many there ever were.
    count: u64,
    last: VecDeque<Spent>,
}

impl LastSpent {
    /// One more.
    pub fn add(&self, spent: Spent) {
        let mut ring = lock(&self.0);
        ring.count += 1;
        if ring.last.len() == KEPT {
            ring.last.pop_front();
        }
        ring.last.push_back(spent);
    }

    /// All that are kept, the newest first, as `GET /requests` shows them, and the middle one of the times to their first tokens.
    pub fn rendered(&self, now: Instant) -> (Value, Option<f64>) {
        let (count, last) = {
            let ring = lock(&self.0);
            (ring.count, ring.last.clone())
        };
        let numbers = (1..=count).rev();
        let rows: Vec<_> = last
            .iter()
            .rev()
            .zip(numbers)
            .map(|(spent, number)| Row::of(spent, number, now))
            .collect();
        (json!(rows), ttft_p50_ms(&last))
    }
}

fn ttft_p50_ms(last: &VecDeque<Spent>) -> Option<f64> {
    let had_tokens = last.iter().filter(|spent| spent.output_tokens > 0);
    let mut times: Vec<_> = had_tokens
        .map(|spent| spent.parts.queue + spent.parts.prefill)
        .collect();
    times.sort_unstable();
    times.get(times.len() / 2).copied().map(ms)
}

#[derive(Serialize)]
struct Row<'a> {
    /// How many had ended with it: tells those of two answers apart.
    number: u64,
    ended_ms_ago: f64,
    outcome: &'a str,
    queue_ms: f64,
    prefill_ms: f64,
    handover_ms: f64,
    decode_ms: f64,
    prompt_tokens: usize,
    cached_tokens: u32,
    output_tokens: usize,
    context_worker: Option<&'a WorkerId>,
    decode_worker: Option<&'a WorkerId>,
}

impl<'a> Row<'a> {
    fn of(spent: &'a Spent, number: u64, now: Instant) -> Self {
        let [context_worker, decode_worker] = spent.workers.each_ref().map(Option::as_ref);
        Self {
            number,
            ended_ms_ago: ms(now.saturating_duration_since(spent.ended)),
            outcome: spent.outcome,
            queue_ms: ms(spent.parts.queue),
            prefill_ms: ms(spent.parts.prefill),
            handover_ms: ms(spent.parts.handover),
            decode_ms: ms(spent.parts.decode),
            prompt_tokens: spent.prompt_tokens,
            cached_tokens: spent.cached_tokens,
            output_tokens: spent.output_tokens,
            context_worker,
            decode_worker,
        }
    }
}

/// Milliseconds with what is after the point to the microsecond.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_kept_the_newest_first() {
        let (all, now) = (LastSpent::default(), Instant::now());
        assert_eq!(all.rendered(now), (json!([]), None));
        for tokens in 0..KEPT + 3 {
            all.add(Spent {
                ended: now,
                outcome: "stop",
                parts: Parts {
                    queue: Duration::from_micros(1_500),
                    ..Parts::default()
                },
                prompt_tokens: tokens,
                cached_tokens: 0,
                output_tokens: 1,
                workers: [Some(WorkerId::new("c").unwrap()), None],
            });
        }
        let (shown, ttft_p50_ms) = all.rendered(now + Duration::from_secs(2));
        let shown = shown.as_array().unwrap();
        assert_eq!(ttft_p50_ms, Some(1.5));
        assert_eq!(shown.len(), KEPT);
        let (newest, oldest) = (&shown[0], &shown[KEPT - 1]);
        assert_eq!(
            [&newest["prompt_tokens"], &newest["number"]],
            [KEPT + 2, KEPT + 3]
        );
        assert_eq!([&oldest["prompt_tokens"], &oldest["number"]], [3, 4]);
        assert_eq!(
            [&newest["queue_ms"], &newest["ended_ms_ago"]],
            [1.5, 2000.0]
        );
        assert_eq!(
            (&newest["context_worker"], &newest["decode_worker"]),
            (&json!("c"), &json!(null))
        );
    }
}
