//! The trace of one HTTP request: the span that all others of it are below, whoever made them.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use baton_protocol::FinishReason;
use baton_traces::{Kind, Span};

use crate::error::{ApiError, ErrorKind};
use crate::request::inbox::lock;

/// A request whose trace is recorded. Its span ends when the last clone is dropped: with the last byte of its answer, or with its last
/// choice, whichever is later.
#[derive(Clone)]
pub struct RequestTrace(Arc<Inner>);

struct Inner(Mutex<Open>);

struct Open {
    /// `None` once it has ended.
    span: Option<Span>,
    /// The first token of any choice is out.
    has_begun: bool,
    output_tokens: usize,
    finish: Vec<String>,
}

impl RequestTrace {
    /// Of a request that has begun.
    pub fn new(span: Span) -> Self {
        Self(Arc::new(Inner(Mutex::new(Open {
            span: Some(span),
            has_begun: false,
            output_tokens: 0,
            finish: Vec::new(),
        }))))
    }

    /// A `traceparent` of its span.
    pub fn traceparent(&self) -> Option<String> {
        let open = lock(&self.0.0);
        Some(open.span.as_ref()?.context().traceparent())
    }

    /// A span below its own.
    pub fn child(&self, kind: Kind, name: &'static str, start: Instant) -> Option<Span> {
        lock(&self.0.0).span.as_ref()?.child(kind, name, start)
    }

    /// The answer has this status.
    pub fn status(&self, status: u16) {
        if let Some(span) = &mut lock(&self.0.0).span {
            span.set("http.response.status_code", status);
            if status >= 500 {
                span.fail("http", format!("it was answered with {status}"));
            }
        }
    }

    /// A token went to its client.
    pub fn token(&self, now: Instant) {
        let mut open = lock(&self.0.0);
        if !std::mem::replace(&mut open.has_begun, true)
            && let Some(span) = &mut open.span
        {
            span.event("first token", now);
        }
    }

    /// Its prompts have so many tokens, all together.
    pub fn prompts(&self, tokens: u64) {
        if let Some(span) = &mut lock(&self.0.0).span {
            span.set("gen_ai.usage.input_tokens", tokens);
        }
    }

    /// One of its choices has ended, with so many tokens.
    pub fn choice(&self, tokens: usize, end: &Result<FinishReason, ApiError>) {
        let mut open = lock(&self.0.0);
        open.output_tokens += tokens;
        match end {
            Ok(finish) => open.finish.push(finish.label().to_owned()),
            Err(error) => {
                if let Some(span) = &mut open.span {
                    fail(span, error);
                }
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut open = lock(&self.0);
        let Some(mut span) = open.span.take() else {
            return;
        };
        if open.output_tokens > 0 {
            span.set("gen_ai.usage.output_tokens", open.output_tokens);
        }
        if !open.finish.is_empty() {
            let finish = std::mem::take(&mut open.finish);
            span.set("gen_ai.response.finish_reasons", finish);
        }
        span.end();
    }
}

/// A generation that failed. What its client did is no failure of the request.
pub fn fail(span: &mut Span, error: &ApiError) {
    let row = error.kind.row();
    match row.status >= 500 && error.kind != ErrorKind::ClientLeft {
        true => span.fail(row.label, error.to_string()),
        false => span.set("error.type", row.label),
    }
}
