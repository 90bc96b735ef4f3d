//! Prompts whose KV is read while they run: their handles go out after the first step, and whoever has one asks how far they are.
//!
//! The lease of such a prompt begins with its handle. While it runs the prompt itself is the lease: whatever ends the one ends
//! the other. When it is done the lease goes on in the table, under the same handle and nonce.

use std::collections::VecDeque;

use async_nats::Subject;
use baton_engine::Sampled;
use baton_protocol::{
    Failure, FailureCode, FinishReason, HandleId, KvHandle, Nonce, PROTOCOL_VERSION, PrefillReply,
    PrefillTimings, Progress, ProgressReply,
};
use tokio::time::Instant;

use super::{ContextSide, ms, nonce};
use crate::common::Common;
use crate::engine_thread::Begun;

/// Questions after one prompt that may wait: its API server's, its decode worker's, and those of a try before.
const ASKS_MAX: usize = 4;

/// Prompts without a lease whose ends are remembered for those who ask a moment later.
const ENDS_MAX: usize = 256;

/// A prompt that runs and whose handle is out.
pub(super) struct Streamed {
    pub(super) handle: KvHandle,
    /// KV of so many tokens is final.
    computed: u32,
    /// Who waits for more.
    asks: VecDeque<Ask>,
}

struct Ask {
    reply: Subject,
    /// Tokens that it knows of.
    have: u32,
}

/// How prompts ended that were streamed and left no lease, the last last.
#[derive(Default)]
pub(super) struct Streams {
    ends: VecDeque<(HandleId, Nonce, ProgressReply)>,
}

impl Streams {
    fn remember(&mut self, handle: &KvHandle, end: ProgressReply) {
        if self.ends.len() == ENDS_MAX {
            self.ends.pop_front();
        }
        self.ends.push_back((handle.handle, handle.nonce, end));
    }

    fn end_of(&self, handle: HandleId, nonce: Nonce) -> Option<&ProgressReply> {
        let is_it =
            |(of, its, _): &&(HandleId, Nonce, ProgressReply)| (*of, *its) == (handle, nonce);
        self.ends.iter().rev().find(is_it).map(|(_, _, end)| end)
    }
}

impl Streamed {
    /// The answer that says that it runs.
    pub(super) fn begun(&self) -> PrefillReply {
        PrefillReply::Begun {
            v: PROTOCOL_VERSION,
            handle: Box::new(self.handle.clone()),
        }
    }

    fn running(&self) -> ProgressReply {
        ProgressReply::Running {
            v: PROTOCOL_VERSION,
            tokens: self.computed,
        }
    }

    /// It is done: everybody is told the token after it.
    pub(super) fn done(
        &self,
        common: &Common,
        streams: &mut Streams,
        first: &Sampled,
        finish: Option<FinishReason>,
    ) {
        let done = done(first, finish);
        self.tell_all(common, &done);
        if finish.is_some() {
            streams.remember(&self.handle, done);
        }
    }

    /// It has ended without: nothing is held. With no failure it was ended by whoever wanted it.
    pub(super) fn failed(
        self: Box<Self>,
        common: &Common,
        streams: &mut Streams,
        failure: Option<Failure>,
    ) {
        let end = match failure {
            Some(failure) => ProgressReply::Failed {
                v: PROTOCOL_VERSION,
                failure,
            },
            None => no_lease(common),
        };
        self.tell_all(common, &end);
        streams.remember(&self.handle, end);
    }

    fn tell_all(&self, common: &Common, news: &ProgressReply) {
        for ask in &self.asks {
            common.send(ask.reply.clone(), news);
        }
    }

    /// Tells those who have less than there is.
    fn tell_news(&mut self, common: &Common) {
        let (computed, running) = (self.computed, self.running());
        self.asks.retain(|ask| {
            let is_news = ask.have < computed;
            if is_news {
                common.send(ask.reply.clone(), &running);
            }
            !is_news
        });
    }
}

impl ContextSide {
    /// A prompt that is to be streamed has had its first step, and needs more: its lease begins and its handle goes out.
    pub(crate) fn on_begun(&mut self, common: &Common, begun: Begun) {
        let Begun {
            key,
            runs,
            computed,
            cached_tokens,
            queue,
        } = begun;
        let Some((reply, tokens, request, prefix_pull)) =
            self.prefills.get_mut(&key).and_then(|entry| {
                if let Some(trace) = &mut entry.trace {
                    trace.first_step(queue, cached_tokens);
                    trace.chunk(computed, Instant::now().into_std());
                }
                let reply = entry.reply.clone()?;
                Some((reply, entry.tokens, entry.request, entry.prefix_pull))
            })
        else {
            return;
        };
        let mut handle = self.handle(common, tokens);
        match nonce() {
            Ok(nonce) => handle.nonce = nonce,
            // It is handed over when it is done, if one can be drawn then.
            Err(error) => return tracing::warn!(%error, "a prompt is not streamed"),
        }
        handle.handle = self.leases.draw();
        (handle.runs, handle.cached_tokens) = (runs, cached_tokens);
        handle.prefix_pull = prefix_pull;
        handle.timings = PrefillTimings {
            queue_ms: ms(queue),
            compute_ms: 0.0,
        };
        let streamed = Streamed {
            handle,
            computed,
            asks: VecDeque::new(),
        };
        if let Err(error) = common.outbox.send(reply, &streamed.begun()) {
            return tracing::debug!(%request, %error, "a prompt is not streamed");
        }
        tracing::debug!(%request, handle = %streamed.handle.handle, tokens, computed, "prefill begun");
        if let Some(entry) = self.prefills.get_mut(&key) {
            entry.streamed = Some(Box::new(streamed));
        }
    }

    /// A further step of it is over.
    pub(crate) fn on_computed(&mut self, common: &Common, key: u64, computed: u32) {
        let Some(entry) = self.prefills.get_mut(&key) else {
            return;
        };
        if let Some(trace) = &mut entry.trace {
            trace.chunk(computed, Instant::now().into_std());
        }
        if let Some(streamed) = &mut entry.streamed {
            streamed.computed = computed;
            streamed.tell_news(common);
        }
    }

    /// Somebody who has its handle asks how far a prompt is.
    pub(crate) fn progress(&mut self, common: &Common, progress: &Progress, reply: Subject) {
        let Progress { handle, nonce, .. } = *progress;
        if progress.incarnation != common.me.incarnation {
            return common.send(reply, &no_lease(common));
        }
        let is_it = |streamed: &&mut Box<Streamed>| {
            (streamed.handle.handle, streamed.handle.nonce) == (handle, nonce)
        };
        let mut running = self
            .prefills
            .values_mut()
            .filter_map(|entry| entry.streamed.as_mut());
        if let Some(streamed) = running.find(is_it) {
            if streamed.asks.len() == ASKS_MAX
                && let Some(first) = streamed.asks.pop_front()
            {
                common.send(first.reply, &streamed.running());
            }
            streamed.asks.push_back(Ask {
                reply,
                have: progress.have_tokens,
            });
            streamed.tell_news(common);
        } else if let Some(staged) = self.leases.get(Instant::now(), handle, nonce) {
            common.send(reply, &done(&staged.first, None));
        } else if let Some(end) = self.streams.end_of(handle, nonce) {
            common.send(reply, end);
        } else {
            common.send(reply, &no_lease(common));
        }
    }

    /// With each beat those who wait hear that there is nothing new.
    pub(crate) fn answer_waiting(&mut self, common: &Common) {
        let streamed = self.prefills.values_mut();
        for streamed in streamed.filter_map(|entry| entry.streamed.as_mut()) {
            let running = streamed.running();
            for ask in streamed.asks.drain(..) {
                common.send(ask.reply, &running);
            }
        }
    }
}

fn done(first: &Sampled, finish: Option<FinishReason>) -> ProgressReply {
    ProgressReply::Done {
        v: PROTOCOL_VERSION,
        first_token: first.token,
        first_logprobs: first.logprobs.clone(),
        finish,
    }
}

fn no_lease(common: &Common) -> ProgressReply {
    let worker = &common.me.worker;
    progress_failed(format!("the prompt or its lease has ended on {worker}"))
}

/// The answer to who asks for what is not here.
pub(crate) fn progress_failed(message: String) -> ProgressReply {
    ProgressReply::Failed {
        v: PROTOCOL_VERSION,
        failure: Failure::new(FailureCode::HandleInvalid, message),
    }
}
