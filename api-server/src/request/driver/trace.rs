//! The spans of one generation: its tries on workers, its waits, and the parts of its hand-over that this server sees.

use baton_protocol::{
    DecodeReply, End, FinishReason, PrefillReply, ProgressReply, RequestId, TraceContext,
};
use baton_traces::{Kind, Span};
use tokio::time::Instant;

use crate::error::ApiError;
use crate::request::lifecycle::{Input, Phase, Target};
use crate::request::trace::{RequestTrace, fail};

/// A generation whose request's trace is recorded.
pub(super) struct GenerationTrace {
    request: RequestTrace,
    span: Span,
    /// It waits for a context worker with room.
    queue: Option<Span>,
    /// A try on a context worker, until the first token is here.
    prefill: Option<Span>,
    /// A try on a decode worker, until the last token is here.
    decode: Option<Span>,
    /// What was last heard that ends a try.
    why: Option<String>,
}

impl GenerationTrace {
    pub(super) fn begin(trace: Option<&RequestTrace>, request: RequestId) -> Option<Box<Self>> {
        let trace = trace?;
        let mut span = trace.child(Kind::Internal, "generation", Instant::now().into_std())?;
        span.set("baton.request", request.to_string());
        Some(Box::new(Self {
            request: trace.clone(),
            span,
            queue: None,
            prefill: None,
            decode: None,
            why: None,
        }))
    }

    /// No context worker has room for it.
    pub(super) fn waits(&mut self) {
        if self.queue.is_none() {
            self.queue = self.child(Kind::Internal, "queue");
        }
    }

    /// Its prompt goes to a context worker, which is told where its spans belong.
    pub(super) fn sends_prefill(&mut self, to: &Target, tokens: usize) -> Option<TraceContext> {
        if let Some(queue) = self.queue.take() {
            queue.end();
        }
        let mut span = self.child(Kind::Client, "prefill")?;
        span.set("baton.worker", to.worker.as_str());
        span.set("baton.tokens", tokens);
        let context = span.context().clone();
        self.prefill = Some(span);
        Some(context)
    }

    /// Its handle goes to a decode worker.
    pub(super) fn sends_decode(&mut self, to: &Target, attempt: u32) -> Option<TraceContext> {
        let mut span = self.child(Kind::Client, "decode")?;
        span.set("baton.worker", to.worker.as_str());
        span.set("baton.attempt", attempt);
        let context = span.context().clone();
        self.decode = Some(span);
        Some(context)
    }

    /// Its KV had waited since then when a decode worker took it.
    pub(super) fn has_room(&self, since: Instant, now: Instant) {
        let times = (since.into_std(), now.into_std());
        self.span.part("kv.room", times, "baton.part", "room");
    }

    /// The first token went to its client.
    pub(super) fn first_token(&mut self, now: Instant) {
        self.span.event("first token", now.into_std());
        self.request.token(now.into_std());
    }

    /// Remembers what may end a try.
    pub(super) fn hears(&mut self, input: &Input) {
        if let Some(why) = why(input) {
            self.why = Some(why);
        }
    }

    /// Ends the tries that are over in this phase.
    pub(super) fn settle(&mut self, phase: &Phase) {
        let (prefills, decodes) = match phase {
            Phase::Queued | Phase::Failed => (Over::Failed, Over::Failed),
            Phase::Prefilling { .. } => (Over::NotYet, Over::Failed),
            Phase::Staged { handle } if handle.is_streamed() => (Over::NotYet, Over::Failed),
            Phase::Staged { .. } => (Over::Done, Over::Failed),
            Phase::Pulling { handle, .. } if handle.is_streamed() => (Over::NotYet, Over::NotYet),
            Phase::Pulling { .. } | Phase::Decoding { .. } => (Over::Done, Over::NotYet),
            Phase::Done => (Over::Done, Over::Done),
        };
        for (over, span) in [(decodes, &mut self.decode), (prefills, &mut self.prefill)] {
            match (over, span.take_if(|_| over != Over::NotYet)) {
                (Over::Failed, Some(mut span)) => {
                    let why = self.why.as_deref();
                    span.fail("try", why.unwrap_or("the generation has ended"));
                    span.end();
                }
                (_, Some(span)) => span.end(),
                (_, None) => {}
            }
        }
    }

    /// The end, with so many tokens of prompt, of it cached, and of output.
    pub(super) fn end(
        self: Box<Self>,
        (prompt, cached, output): (usize, u32, usize),
        end: &Result<FinishReason, ApiError>,
    ) {
        let Self {
            request,
            mut span,
            queue,
            ..
        } = *self;
        drop(queue);
        span.set("gen_ai.usage.input_tokens", prompt);
        span.set("gen_ai.usage.cache_read.input_tokens", cached);
        span.set("gen_ai.usage.output_tokens", output);
        match end {
            Ok(finish) => span.set(
                "gen_ai.response.finish_reasons",
                vec![finish.label().to_owned()],
            ),
            Err(error) => fail(&mut span, error),
        }
        span.end();
        request.choice(output, end);
    }

    fn child(&self, kind: Kind, name: &'static str) -> Option<Span> {
        self.span.child(kind, name, Instant::now().into_std())
    }
}

/// Whether a try is over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    NotYet,
    Done,
    Failed,
}

/// Why a try is over, where this ends it without what it was for.
fn why(input: &Input) -> Option<String> {
    Some(match input {
        Input::Prefill(Ok(PrefillReply::Refused { refusal, .. }))
        | Input::Decode(Ok(DecodeReply::Refused { refusal, .. })) => refusal.to_string(),
        Input::Prefill(Ok(PrefillReply::Failed { failure, .. }))
        | Input::Progress(Ok(ProgressReply::Failed { failure, .. })) => failure.to_string(),
        Input::Item(item) => match &item.end {
            Some(End::Failed(failure)) => failure.to_string(),
            _ => return None,
        },
        Input::Prefill(Err(why)) | Input::Decode(Err(why)) | Input::Progress(Err(why)) => {
            format!("no answer: {why:?}")
        }
        Input::WorkerLost(target) => format!("{} is gone", target.worker),
        Input::Stalled => "nothing was heard of it for too long".to_owned(),
        Input::LeaseLost => "the lease of its KV has ended".to_owned(),
        Input::Deadline => "the request's time ran out".to_owned(),
        Input::ClientLeft => "the client left".to_owned(),
        Input::ClientStalled => "the client did not read".to_owned(),
        Input::Leaving => "the API server is leaving".to_owned(),
        Input::NameLost => "another API server has this one's name".to_owned(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use baton_protocol::{Incarnation, Refusal, WorkerId};
    use baton_traces::{Kept, Sampler, Tracer};

    use super::*;
    use crate::error::ErrorKind;
    use crate::request::lifecycle::tests::handle;

    fn target(name: &str) -> Target {
        Target {
            worker: WorkerId::new(name).unwrap(),
            incarnation: Incarnation(1),
        }
    }

    fn begun() -> (Box<GenerationTrace>, RequestTrace, Kept) {
        let (tracer, kept) = Tracer::kept(Sampler::new(1.0).unwrap(), 16);
        let span = tracer.request((None, ""), "request", std::time::Instant::now());
        let request = RequestTrace::new(span.unwrap());
        let trace = GenerationTrace::begin(Some(&request), RequestId(7)).unwrap();
        (trace, request, kept)
    }

    /// What has ended since the last look: names, and why where there is an error.
    fn ended(kept: &mut Kept) -> Vec<(String, Option<String>)> {
        let spans = kept.map(|span| (span.name, span.status.map(|status| status.message)));
        spans.collect()
    }

    #[test]
    fn each_try_is_a_span_and_says_why_it_failed() {
        let (mut trace, request, mut kept) = begun();
        let ok = |name: &str| (name.to_owned(), None);
        trace.waits();
        trace.waits();
        trace.sends_prefill(&target("a"), 9).unwrap();
        assert_eq!(ended(&mut kept), [ok("queue")]);
        trace.settle(&Phase::Prefilling {
            context: target("a"),
        });
        assert_eq!(ended(&mut kept), []);
        let refusal = Refusal::Draining;
        let why = refusal.to_string();
        trace.hears(&Input::Prefill(Ok(PrefillReply::Refused { v: 2, refusal })));
        trace.settle(&Phase::Queued);
        assert_eq!(ended(&mut kept), [("prefill".to_owned(), Some(why))]);

        trace.sends_prefill(&target("b"), 9).unwrap();
        let staged = handle("b", 1);
        trace.settle(&Phase::Staged {
            handle: staged.clone(),
        });
        assert_eq!(ended(&mut kept), [ok("prefill")]);
        trace.sends_decode(&target("c"), 0).unwrap();
        let pulling = Phase::Pulling {
            handle: staged,
            decode: target("c"),
        };
        trace.settle(&pulling);
        trace.settle(&Phase::Decoding {
            decode: target("c"),
        });
        assert_eq!(ended(&mut kept), []);
        trace.hears(&Input::WorkerLost(target("c")));
        trace.settle(&Phase::Queued);
        let [(name, Some(why))] = &ended(&mut kept)[..] else {
            panic!("no error")
        };
        assert!(name == "decode" && why.contains('c'), "{name} {why}");
        trace.settle(&Phase::Done);
        trace.end((9, 0, 3), &Ok(FinishReason::Length));
        assert_eq!(ended(&mut kept), [ok("generation")]);
        drop(request);
        assert_eq!(ended(&mut kept), [ok("request")]);
    }

    #[test]
    fn a_streamed_prompt_runs_while_its_kv_is_pulled() {
        let (mut trace, _request, mut kept) = begun();
        trace.sends_prefill(&target("a"), 9).unwrap();
        let mut handle = handle("a", 1);
        handle.first_token = None;
        trace.settle(&Phase::Staged {
            handle: handle.clone(),
        });
        trace.sends_decode(&target("c"), 0).unwrap();
        let pulling = |handle| Phase::Pulling {
            handle,
            decode: target("c"),
        };
        trace.settle(&pulling(handle.clone()));
        assert_eq!(ended(&mut kept), []);
        handle.first_token = Some(1);
        trace.settle(&pulling(handle));
        assert_eq!(ended(&mut kept), [("prefill".to_owned(), None)]);
    }

    #[test]
    fn what_is_given_up_leaves_no_span_open_and_a_failure_is_the_requests_too() {
        let (mut trace, request, mut kept) = begun();
        trace.sends_prefill(&target("a"), 9).unwrap();
        drop(trace);
        let spans = ended(&mut kept);
        assert_eq!(spans.len(), 2, "{spans:?}");
        assert!(spans.iter().all(|(_, why)| why.is_some()), "{spans:?}");

        let trace = GenerationTrace::begin(Some(&request), RequestId(8)).unwrap();
        let error = ApiError::new(ErrorKind::Worker, "five tries failed");
        trace.end((9, 0, 0), &Err(error));
        drop(request);
        for (name, why) in ended(&mut kept) {
            assert!(why.is_some_and(|why| why.contains("five tries")), "{name}");
        }
        assert!(GenerationTrace::begin(None, RequestId(9)).is_none());
    }
}
