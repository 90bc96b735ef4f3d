//! One span, from its begin to its end.

use std::sync::Arc;
use std::time::Instant;

use baton_protocol::{SpanId, TraceContext};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, ArrayValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1 as otlp;

use crate::{Shared, random};

/// Longest text of an attribute or of an error, in bytes.
const TEXT_BYTES_MAX: usize = 1024;

/// Most events of a span.
const EVENTS_MAX: usize = 128;

/// What a span is to the one above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A part of it.
    Internal,
    /// The other side of a call.
    Server,
    /// A call.
    Client,
}

/// An attribute's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A text.
    Text(String),
    /// Several.
    Texts(Vec<String>),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Yes or no.
    Bool(bool),
}

/// A part of a request that has begun. Owned by whoever does that part; when it is dropped before its end, that is an end too, and an
/// error: so whatever cancels a task or ends a request leaves no span open.
#[derive(Debug)]
pub struct Span {
    shared: Arc<Shared>,
    context: TraceContext,
    /// `None` once it has ended.
    span: Option<Box<otlp::Span>>,
}

impl Span {
    pub(crate) fn begin(
        shared: Arc<Shared>,
        parent: &TraceContext,
        kind: Kind,
        name: String,
        start: Instant,
    ) -> Option<Self> {
        let id = SpanId(u64::from_le_bytes(random()?));
        let parent_id = match parent.span {
            SpanId(0) => Vec::new(),
            SpanId(id) => id.to_be_bytes().to_vec(),
        };
        let kind = match kind {
            Kind::Internal => otlp::span::SpanKind::Internal,
            Kind::Server => otlp::span::SpanKind::Server,
            Kind::Client => otlp::span::SpanKind::Client,
        };
        let span = otlp::Span {
            trace_id: parent.trace.0.to_be_bytes().to_vec(),
            span_id: id.0.to_be_bytes().to_vec(),
            trace_state: parent.state.to_string(),
            parent_span_id: parent_id,
            flags: u32::from(parent.sampled),
            name,
            kind: kind.into(),
            start_time_unix_nano: shared.clock.unix_nanos(start),
            ..otlp::Span::default()
        };
        Some(Self {
            shared,
            context: TraceContext {
                span: id,
                ..parent.clone()
            },
            span: Some(Box::new(span)),
        })
    }

    /// Its place in the trace: what it causes is below it.
    pub fn context(&self) -> &TraceContext {
        &self.context
    }

    /// A span below it, in this process.
    pub fn child(&self, kind: Kind, name: impl Into<String>, start: Instant) -> Option<Self> {
        Self::begin(
            Arc::clone(&self.shared),
            &self.context,
            kind,
            name.into(),
            start,
        )
    }

    /// A span below it that is over: a part of which one thing is to be said.
    pub fn part(
        &self,
        name: &'static str,
        (start, end): (Instant, Instant),
        key: &'static str,
        value: impl Into<Value>,
    ) {
        if let Some(mut part) = self.child(Kind::Internal, name, start) {
            part.set(key, value);
            part.end_at(end);
        }
    }

    /// Says something of it.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.span {
            span.attributes.push(pair(key, value.into()));
        }
    }

    /// Says what happened in it, and when.
    pub fn event(&mut self, name: &'static str, at: Instant) {
        if let Some(span) = self.span.as_mut() {
            if span.events.len() == EVENTS_MAX {
                span.dropped_events_count += 1;
                return;
            }
            span.events.push(otlp::span::Event {
                time_unix_nano: self.shared.clock.unix_nanos(at),
                name: name.to_owned(),
                ..otlp::span::Event::default()
            });
        }
    }

    /// It fails: `kind` is one of few words, `message` a sentence.
    pub fn fail(&mut self, kind: &'static str, message: impl Into<String>) {
        self.set("error.type", kind);
        if let Some(span) = &mut self.span {
            span.status = Some(otlp::Status {
                message: cut(message.into()),
                code: otlp::status::StatusCode::Error.into(),
            });
        }
    }

    /// It ends now.
    pub fn end(self) {
        self.end_at(Instant::now());
    }

    /// It ended then.
    pub fn end_at(mut self, end: Instant) {
        self.put(end);
    }

    fn put(&mut self, end: Instant) {
        if let Some(mut span) = self.span.take() {
            // The clock may be set back meanwhile.
            span.end_time_unix_nano = self
                .shared
                .clock
                .unix_nanos(end)
                .max(span.start_time_unix_nano);
            self.shared.put(*span);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let is_told = self.span.as_ref().is_none_or(|span| span.status.is_some());
        if !is_told {
            self.fail("aborted", "it was ended before it was done");
        }
        self.put(Instant::now());
    }
}

fn pair(key: &str, value: Value) -> KeyValue {
    let text = |text| Any::StringValue(cut(text));
    let value = match value {
        Value::Text(one) => text(one),
        Value::Texts(texts) => Any::ArrayValue(ArrayValue {
            values: texts
                .into_iter()
                .map(|one| AnyValue {
                    value: Some(text(one)),
                })
                .collect(),
        }),
        Value::Int(number) => Any::IntValue(number),
        Value::Float(number) => Any::DoubleValue(number),
        Value::Bool(flag) => Any::BoolValue(flag),
    };
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

pub(crate) fn text_pair(key: &str, value: &str) -> KeyValue {
    pair(key, Value::Text(value.to_owned()))
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<String>> for Value {
    fn from(texts: Vec<String>) -> Self {
        Self::Texts(texts)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Bool(flag)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Float(number)
    }
}

macro_rules! of_ints {
    ($($int:ty),*) => {$(
        impl From<$int> for Value {
            fn from(number: $int) -> Self {
                Self::Int(i64::try_from(number).unwrap_or(i64::MAX))
            }
        }
    )*};
}
of_ints!(u8, u16, u32, u64, usize);

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::{Sampler, Tracer};

    fn begun() -> (Span, crate::Kept) {
        let (tracer, kept) = Tracer::kept(Sampler::new(1.0).unwrap(), 8);
        let span = tracer.request((None, ""), "r", Instant::now());
        (span.unwrap(), kept)
    }

    #[test]
    fn times_are_as_they_were_told() {
        let (span, mut kept) = begun();
        let start = Instant::now();
        let child = span.child(Kind::Internal, "c", start).unwrap();
        child.end_at(start + Duration::from_millis(1_500));
        let child = kept.next().unwrap();
        let took = child.end_time_unix_nano - child.start_time_unix_nano;
        assert_eq!(took, 1_500_000_000);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let begun = Duration::from_nanos(child.start_time_unix_nano);
        assert!(now.abs_diff(begun) < Duration::from_secs(60), "{begun:?}");
    }

    #[test]
    fn one_that_is_dropped_has_ended_with_an_error_and_one_that_ended_has_none() {
        let (mut span, mut kept) = begun();
        drop(span.child(Kind::Client, "dropped", Instant::now()));
        let dropped = kept.next().unwrap();
        assert_eq!(dropped.name, "dropped");
        let status = dropped.status.unwrap();
        assert_eq!(status.code(), otlp::status::StatusCode::Error);
        span.set("n", 7_u32);
        span.end();
        let span = kept.next().unwrap();
        assert_eq!(span.status, None);
        assert_eq!(span.attributes.len(), 1);
        assert!(kept.next().is_none(), "once");
    }

    #[test]
    fn what_is_said_of_it_has_bounds() {
        let (mut span, mut kept) = begun();
        span.set("long", "é".repeat(TEXT_BYTES_MAX));
        span.fail("broken", "ä".repeat(TEXT_BYTES_MAX));
        for _ in 0..2 * EVENTS_MAX {
            span.event("e", Instant::now());
        }
        drop(span);
        let span = kept.next().unwrap();
        assert_eq!(span.status.unwrap().message.len(), TEXT_BYTES_MAX);
        let long = span.attributes[0].value.clone().unwrap().value.unwrap();
        let Any::StringValue(long) = long else {
            panic!("{long:?}")
        };
        assert_eq!(long.len(), TEXT_BYTES_MAX);
        let events = (span.events.len(), span.dropped_events_count as usize);
        assert_eq!(events, (EVENTS_MAX, EVENTS_MAX));
    }
}
