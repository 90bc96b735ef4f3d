//! What is counted of a generation: metrics, and where its time went.

use std::time::Duration;

use baton_protocol::{FinishReason, Tier, TokenLogprobs};
use tokio::time::Instant;

use super::{Driver, Job, Sink};
use crate::error::{ApiError, ErrorKind};
use crate::request::spent::Spent;
use crate::service::ServiceLevel;

impl<S: Sink> Driver<S> {
    /// Measures how long the KV waited for a decode worker with room.
    pub(super) fn note_handed(&mut self, has_place: bool) {
        let handle = self.lifecycle.handle().map(|handle| handle.nonce);
        let Some(since) = self.handed.note(handle, has_place) else {
            return;
        };
        let now = Instant::now();
        let parts = &self.server.metrics.kv_handover_part_seconds;
        let room = parts.with_label_values(&["room"]);
        room.observe((now - since).as_secs_f64());
        if let Some(trace) = &self.trace {
            trace.has_room(since, now);
        }
    }

    /// The first prefill is done.
    pub(super) fn prompt_done(
        &mut self,
        cached: u32,
        queue_ms: f32,
        logprobs: Option<Vec<TokenLogprobs>>,
    ) {
        let metrics = &self.server.metrics;
        metrics.queue_seconds.observe(f64::from(queue_ms) / 1e3);
        let queue = Duration::try_from_secs_f32(queue_ms / 1e3).unwrap_or_default();
        self.attainment.queued(queue);
        self.shown.note(|place| place.cached_tokens = cached);
        metrics
            .tokens_total
            .with_label_values(&["prompt"])
            .inc_by(self.job.prompt.len() as u64);
        metrics
            .tokens_total
            .with_label_values(&["cached"])
            .inc_by(u64::from(cached));
        self.sink.prompt(cached, logprobs);
    }

    /// The end, and `outcome` as the word for it.
    pub(super) fn count_end(
        &mut self,
        end: &Result<FinishReason, ApiError>,
        outcome: &'static str,
    ) {
        let metrics = &self.server.metrics;
        metrics.requests_total.with_label_values(&[outcome]).inc();
        self.count_attainment(end);
        let (now, output) = (Instant::now(), self.lifecycle.output().len());
        let place = self.shown.place();
        let computed = self
            .job
            .prompt
            .len()
            .saturating_sub(place.cached_tokens as usize);
        self.server.last_spent.add(Spent {
            ended: now,
            outcome,
            parts: self.attainment.parts(self.job.arrived, now),
            prompt_tokens: self.job.prompt.len(),
            cached_tokens: place.cached_tokens,
            output_tokens: output,
            workers: place.workers,
        });
        metrics
            .tokens_total
            .with_label_values(&["output"])
            .inc_by(output as u64);
        if end.is_ok() {
            self.server.fleet().answered(computed, output);
        }
    }

    /// Counts whether it got what it was promised. Who was promised nothing, or left, is not counted.
    fn count_attainment(&self, end: &Result<FinishReason, ApiError>) {
        let Job {
            class,
            level,
            arrived,
            ..
        } = self.job;
        let end = match end {
            Ok(_) => Ok(()),
            Err(error) => match error.kind {
                ErrorKind::ClientLeft => return,
                ErrorKind::Busy => Err("refused"),
                _ => Err("failed"),
            },
        };
        if level.is_some() {
            // Batch is promised no times.
            let held_to = match class.tier {
                Tier::Interactive => level,
                Tier::Batch => ServiceLevel::default(),
            };
            let metrics = &self.server.metrics;
            self.attainment
                .count(metrics, (class.tier, held_to), arrived, end);
        }
    }
}
