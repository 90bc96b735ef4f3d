//! The spans of a prompt: its wait, its chunks, and the lease of its KV.

use std::time::{Duration, Instant};

use baton_protocol::PrefillJob;
use baton_traces::{Kind, Span, Tracer};

/// Chunks that have a span each; the last of them is as long as all that follow.
const CHUNKS_MAX: u32 = 64;

/// A prompt whose trace is recorded.
pub(super) struct PrefillTrace {
    span: Span,
    arrived: Instant,
    /// When the chunk that runs began; `None` before the first is over.
    begun: Option<Instant>,
    chunks: u32,
    /// Tokens whose KV is there.
    computed: u32,
}

impl PrefillTrace {
    pub(super) fn begin(tracer: &Tracer, job: &PrefillJob, now: Instant) -> Option<Box<Self>> {
        let parent = job.trace.as_ref()?;
        let mut span = tracer.span(parent, Kind::Server, "prefill", now)?;
        span.set("baton.request", job.request.to_string());
        span.set("baton.tokens", job.sequence.tokens.0.len());
        Some(Box::new(Self {
            span,
            arrived: now,
            begun: None,
            chunks: 0,
            computed: 0,
        }))
    }

    /// It waited for so long, and had so many tokens from the prefix index.
    pub(super) fn first_step(&mut self, queue: Duration, cached: u32) {
        let begun = self.arrived + queue;
        let times = (self.arrived, begun);
        self.span.part("queue", times, "baton.part", "queue");
        self.span.set("baton.cached_tokens", cached);
        (self.begun, self.computed) = (Some(begun), cached);
    }

    /// A chunk is over: KV of so many tokens is there.
    pub(super) fn chunk(&mut self, computed: u32, now: Instant) {
        if self.chunks + 1 < CHUNKS_MAX {
            self.tell_chunk(computed, now);
        }
    }

    fn tell_chunk(&mut self, computed: u32, now: Instant) {
        let tokens = computed.saturating_sub(self.computed);
        let times = (self.begun.replace(now).unwrap_or(self.arrived), now);
        self.span.part("chunk", times, "baton.tokens", tokens);
        self.computed = computed;
        self.chunks += 1;
    }

    /// All of it was done then. What follows is the lease, if there is one.
    pub(super) fn done(
        mut self,
        (queue, compute): (Duration, Duration),
        (tokens, cached): (u32, u32),
        done: Instant,
        is_leased: bool,
    ) -> Option<Span> {
        if self.begun.is_none() {
            self.first_step(queue, cached);
            // By the end, which was measured, not by the arrival.
            self.begun = done.checked_sub(compute);
        }
        self.tell_chunk(tokens, done);
        let child = || self.span.child(Kind::Internal, "lease", done);
        let lease = is_leased.then(child).flatten();
        self.span.end_at(done);
        lease
    }

    /// It was ended, or refused.
    pub(super) fn failed(mut self, kind: &'static str, why: impl Into<String>) {
        self.span.fail(kind, why);
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::TraceContext;
    use baton_traces::{Kept, Sampler};

    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn begun(arrived: Instant) -> (Box<PrefillTrace>, Kept) {
        let (tracer, kept) = Tracer::kept(Sampler::new(0.0).unwrap(), 256);
        let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parent = TraceContext::parse(traceparent, "").unwrap();
        let span = tracer.span(&parent, Kind::Server, "prefill", arrived);
        let trace = PrefillTrace {
            span: span.unwrap(),
            arrived,
            begun: None,
            chunks: 0,
            computed: 0,
        };
        (Box::new(trace), kept)
    }

    /// Names of what has ended, with milliseconds that it took and tokens.
    fn ended(kept: &mut Kept) -> Vec<(String, u64, String)> {
        let spans = kept;
        let spans = spans.map(|span| {
            let nanos = span.end_time_unix_nano - span.start_time_unix_nano;
            let tokens = span
                .attributes
                .iter()
                .find(|pair| pair.key == "baton.tokens");
            let tokens = tokens
                .map(|pair| format!("{:?}", pair.value))
                .unwrap_or_default();
            let digits = tokens.chars().filter(char::is_ascii_digit).collect();
            (span.name, (nanos as f64 / 1e6).round() as u64, digits)
        });
        spans.collect()
    }

    fn is(name: &str, ms: u64, tokens: &str) -> (String, u64, String) {
        (name.to_owned(), ms, tokens.to_owned())
    }

    #[test]
    fn a_prompt_of_one_step_is_a_wait_and_a_chunk() {
        let done = Instant::now();
        let (trace, mut kept) = begun(done - MS(100));
        let lease = trace.done((MS(60), MS(40)), (10, 4), done, true);
        let spans = ended(&mut kept);
        assert_eq!(
            spans,
            [
                is("queue", 60, ""),
                is("chunk", 40, "6"),
                is("prefill", 100, "")
            ]
        );
        assert!(lease.is_some());
        drop(lease);
        let (trace, mut kept) = begun(done - MS(100));
        assert!(trace.done((MS(60), MS(40)), (10, 4), done, false).is_none());
        assert_eq!(ended(&mut kept).len(), 3, "nothing is leased");
    }

    #[test]
    fn chunks_are_one_after_the_other_and_not_too_many() {
        let arrived = Instant::now() - MS(1_000);
        let (mut trace, mut kept) = begun(arrived);
        trace.first_step(MS(100), 0);
        for n in 1..=200 {
            trace.chunk(n as u32, arrived + MS(100 + n));
        }
        let lease = trace.done((MS(100), MS(201)), (201, 0), arrived + MS(301), true);
        drop(lease);
        let spans = ended(&mut kept);
        let chunks: Vec<_> = spans.iter().filter(|span| span.0 == "chunk").collect();
        assert_eq!(chunks.len(), CHUNKS_MAX as usize);
        assert_eq!(*chunks[0], is("chunk", 1, "1"));
        // The rest is one.
        assert_eq!(**chunks.last().unwrap(), is("chunk", 138, "138"));
    }

    #[test]
    fn one_that_is_ended_has_no_chunk_and_no_lease() {
        let (trace, mut kept) = begun(Instant::now());
        trace.failed("ended", "the request's time ran out");
        let span = kept.next().unwrap();
        assert!(span.status.unwrap().message.contains("time ran out"));
        assert!(kept.next().is_none());
    }
}
