//! Traces of requests: spans, and their export to an OpenTelemetry collector (OTLP over HTTP, protobuf).
//!
//! Off is a [`Tracer`] without anything in it: no thread, and a request costs it a look at an `Option`. On, a span is made when a part of a
//! request begins, by whoever owns that part, and goes into a bounded queue when the part ends ([`Span`]); a thread of its own sends
//! what is there ([`Exporter`]). Nothing of a request ever waits for it: where the queue is full, spans are dropped and counted.
//!
//! The messages are OpenTelemetry's own (`opentelemetry-proto`). Its SDK is not used: it ties a span to a scope or a task, and the parts of a
//! request begin in one task and end in another, with times that another clock gave.
#![forbid(unsafe_code)]
#![warn(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods
)]

mod clock;
mod config;
mod exporter;
mod sampler;
mod span;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use baton_protocol::{SpanId, TraceContext, TraceId};
use opentelemetry_proto::tonic::trace::v1 as otlp;
use tokio::sync::mpsc;

use clock::Clock;

pub use config::{Endpoint, Headers, TraceConfig};
pub use exporter::Exporter;
pub use sampler::Sampler;
pub use span::{Kind, Span, Value};

/// Spans that may wait to be sent: some 4 MB.
const QUEUE_MAX: usize = 4096;

/// Who makes spans; by default nobody. Clones share the queue.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Shared>>);

/// What the tracer, its spans and its exporter share.
#[derive(Debug)]
struct Shared {
    queue: mpsc::Sender<otlp::Span>,
    sampler: Sampler,
    clock: Clock,
    dropped: Dropped,
}

/// Spans that were recorded and reached nobody.
#[derive(Debug, Default)]
struct Dropped {
    queue_full: AtomicU64,
    export: AtomicU64,
}

impl Tracer {
    /// None: it makes no spans.
    pub fn off() -> Self {
        Self::default()
    }

    /// Starts one, and the thread that exports its spans until the [`Exporter`] is dropped.
    ///
    /// # Errors
    /// If the system gives no thread, or the endpoint cannot be used.
    pub fn start(config: TraceConfig) -> Result<(Self, Exporter), String> {
        let (queue, waiting) = mpsc::channel(QUEUE_MAX);
        let shared = Arc::new(Shared::new(queue, config.sampler));
        let exporter = Exporter::start(config, Arc::clone(&shared), waiting)?;
        Ok((Self(Some(shared)), exporter))
    }

    /// Whether it makes spans.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// The first span of a request here, if its trace is recorded: as its client says in a `traceparent` that makes sense, else by sampling.
    pub fn request(
        &self,
        (traceparent, tracestate): (Option<&str>, &str),
        name: impl Into<String>,
        start: Instant,
    ) -> Option<Span> {
        let shared = self.0.as_ref()?;
        let parent = traceparent.and_then(|parent| TraceContext::parse(parent, tracestate));
        let context = match parent {
            Some(parent) => parent,
            None => {
                let trace = TraceId(u128::from_le_bytes(random()?));
                TraceContext {
                    trace,
                    // It has no parent.
                    span: SpanId(0),
                    sampled: trace.0 != 0 && shared.sampler.takes(trace),
                    state: "".into(),
                }
            }
        };
        self.span(&context, Kind::Server, name, start)
    }

    /// A span below that of `parent`, if its trace is recorded.
    pub fn span(
        &self,
        parent: &TraceContext,
        kind: Kind,
        name: impl Into<String>,
        start: Instant,
    ) -> Option<Span> {
        let shared = self.0.as_ref().filter(|_| parent.sampled)?;
        Span::begin(Arc::clone(shared), parent, kind, name.into(), start)
    }

    /// Spans that were dropped so far, by reason.
    pub fn dropped(&self) -> [(&'static str, u64); 2] {
        let count = |of: fn(&Dropped) -> &AtomicU64| {
            let shared = self.0.as_ref();
            shared.map_or(0, |shared| of(&shared.dropped).load(Ordering::Relaxed))
        };
        [
            ("queue_full", count(|dropped| &dropped.queue_full)),
            ("export", count(|dropped| &dropped.export)),
        ]
    }

    /// One whose spans come out here instead of being exported; for tests.
    #[doc(hidden)]
    pub fn kept(sampler: Sampler, most: usize) -> (Self, Kept) {
        let (queue, waiting) = mpsc::channel(most);
        let shared = Shared::new(queue, sampler);
        (Self(Some(Arc::new(shared))), Kept(waiting))
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_on() { "on" } else { "off" })
    }
}

impl Shared {
    fn new(queue: mpsc::Sender<otlp::Span>, sampler: Sampler) -> Self {
        Self {
            queue,
            sampler,
            clock: Clock::new(),
            dropped: Dropped::default(),
        }
    }

    /// Puts a span that has ended into the queue, if there is room.
    fn put(&self, span: otlp::Span) {
        if self.queue.try_send(span).is_err() {
            self.dropped.queue_full.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Spans that have ended, of [`Tracer::kept`].
#[doc(hidden)]
#[derive(Debug)]
pub struct Kept(mpsc::Receiver<otlp::Span>);

impl Iterator for Kept {
    type Item = otlp::Span;

    fn next(&mut self) -> Option<otlp::Span> {
        self.0.try_recv().ok()
    }
}

/// Random bytes for an id. Without any there is no span.
fn random<const N: usize>() -> Option<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn all() -> Sampler {
        Sampler::new(1.0).unwrap()
    }

    #[test]
    fn what_is_off_makes_nothing() {
        let off = Tracer::off();
        assert!(!off.is_on());
        let request = off.request((Some(PARENT), ""), "r", Instant::now());
        assert!(request.is_none());
        assert_eq!(off.dropped(), [("queue_full", 0), ("export", 0)]);
    }

    #[test]
    fn a_clients_trace_goes_on_and_its_flag_decides() {
        // By itself it would record nothing.
        let (tracer, mut kept) = Tracer::kept(Sampler::new(0.0).unwrap(), 8);
        let start = Instant::now();
        let root = tracer.request((Some(PARENT), "a=1"), "r", start).unwrap();
        let context = root.context().clone();
        assert_eq!(
            context.trace.to_string(),
            "4bf92f3577b34da6a3ce929d0e0e4736"
        );
        assert_eq!((context.sampled, &*context.state), (true, "a=1"));
        let child = tracer.span(&context, Kind::Internal, "c", start).unwrap();
        child.end();
        root.end();
        let (child, root) = (kept.next().unwrap(), kept.next().unwrap());
        assert_eq!(child.trace_id, root.trace_id);
        assert_eq!(child.parent_span_id, root.span_id);
        assert_eq!(root.parent_span_id, 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes());
        assert_eq!((&*root.trace_state, &*child.trace_state), ("a=1", "a=1"));

        let unsampled = PARENT.replace("-01", "-00");
        for parent in [Some(&*unsampled), Some("nonsense"), None] {
            let request = tracer.request((parent, ""), "r", start);
            assert!(request.is_none(), "{parent:?}");
        }
    }

    #[test]
    fn a_request_without_a_trace_begins_one() {
        let (tracer, mut kept) = Tracer::kept(all(), 8);
        for parent in [None, Some("00-0-0-01")] {
            let span = tracer.request((parent, "a=1"), "r", Instant::now());
            let span = span.unwrap();
            assert_eq!(&*span.context().state, "", "that of no trace");
            span.end();
        }
        let (one, other) = (kept.next().unwrap(), kept.next().unwrap());
        assert_ne!(one.trace_id, other.trace_id);
        assert!(one.parent_span_id.is_empty());
        assert_eq!((one.trace_id.len(), one.span_id.len()), (16, 8));
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (tracer, mut kept) = Tracer::kept(all(), 2);
        for _ in 0..5 {
            let span = tracer.request((None, ""), "r", Instant::now());
            span.unwrap().end();
        }
        assert_eq!(tracer.dropped()[0], ("queue_full", 3));
        assert!(kept.next().is_some() && kept.next().is_some() && kept.next().is_none());
    }
}
