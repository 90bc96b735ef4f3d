//! The context side: a prompt comes in, its KV is staged under a lease, a release ends it.

mod leases;
mod lending;
mod streaming;
mod trace;

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::Subject;
use baton_engine::Sampled;
use baton_protocol::{
    ApiServerId, Failure, FailureCode, HandleId, KvHandle, Nonce, PROTOCOL_VERSION, PrefillJob,
    PrefillReply, PrefillTimings, PrefixPull, Refusal, Release, Renew, RequestId, TokenFrame,
    TokenLogprobs, WorkerId,
};
use baton_traces::Span;
use tokio::time::Instant;

use crate::bus::Unsent;
use crate::common::Common;
use crate::decode::{Beginning, DecodeSide, PullTask};
use crate::engine_thread::{Command, HeldBlocks, Prefilled};
use crate::pace::Pace;
use crate::random::random;

pub(crate) use leases::LeaseTable;
pub(crate) use streaming::progress_failed;

use streaming::{Streamed, Streams};
use trace::PrefillTrace;

/// Prompts that one frame reports: some 36 KiB, which every bus carries.
const PROMPTS_A_FRAME: usize = 1_024;

/// A worker that runs prompts has this.
pub(crate) struct ContextSide {
    /// Prompts in the engine, by key.
    pub(crate) prefills: BTreeMap<u64, Prefilling>,
    /// Staged KV.
    pub(crate) leases: LeaseTable<Staged>,
    /// Beginnings of prompts that others are to run.
    pub(crate) lent: LeaseTable<HeldBlocks>,
    /// What is remembered of prompts that were streamed.
    streams: Streams,
    /// How long a lease runs.
    lease: Duration,
    /// How long prompts take.
    pace: Pace,
}

/// KV that waits for its release.
pub(crate) struct Staged {
    pub(crate) blocks: HeldBlocks,
    /// The token after it: who was given the handle before there was one asks for it.
    first: Sampled,
    /// Since when it waits.
    since: Instant,
    /// Its lease, where its trace is recorded.
    trace: Option<Span>,
}

impl Staged {
    /// Its lease ended as it should: this worker has it now.
    pub(crate) fn went_to(&mut self, worker: &WorkerId) {
        if let Some(mut trace) = self.trace.take() {
            trace.set("baton.worker", worker.as_str());
            trace.end();
        }
    }
}

/// A prompt in the engine.
pub(crate) struct Prefilling {
    request: RequestId,
    api_server: ApiServerId,
    /// Tokens of the job; their KV is valid when it is done.
    tokens: u32,
    deadline: Instant,
    /// Where the answer goes; `None` once nobody wants it, and the engine is yet to let go.
    reply: Option<Subject>,
    /// Its handle is out: what is to be said of it goes to those who ask.
    streamed: Option<Box<Streamed>>,
    /// Its beginning is being pulled: the engine has it afterwards.
    held: Option<Box<(Command, PullTask)>>,
    /// What became of that.
    prefix_pull: Option<PrefixPull>,
    /// Its spans, where they are recorded.
    trace: Option<Box<PrefillTrace>>,
}

/// What is to be done about a job that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judged {
    /// Run it: [`ContextSide::begin`].
    New,
    /// Nothing more: it was answered, or will be by what runs here already.
    Settled,
}

impl ContextSide {
    pub(crate) fn new(lease: Duration) -> Self {
        Self {
            prefills: BTreeMap::new(),
            leases: LeaseTable::new(),
            lent: LeaseTable::new(),
            streams: Streams::default(),
            lease,
            pace: Pace::default(),
        }
    }

    /// 1. A job arrives: it is refused at once, or there is something to do about it.
    pub(crate) fn judge(
        &mut self,
        common: &Common,
        job: &mut PrefillJob,
        reply: &Subject,
    ) -> Result<Judged, Refusal> {
        common.checks.model(&job.model)?;
        common.checks.sequence(&mut job.sequence)?;
        let top = job.prompt_logprobs;
        if top.is_some_and(|top| top > baton_protocol::limits::TOP_LOGPROBS_MAX) {
            return Err(Refusal::Malformed {
                detail: "too many prompt log-probabilities are asked for".to_owned(),
            });
        }
        if let Some(failure) = reply_too_large(common, top, job.sequence.prompt_tokens) {
            fail(common, reply.clone(), failure);
            return Ok(Judged::Settled);
        }
        if self.answer_there_instead(common, job, reply) {
            return Ok(Judged::Settled);
        }
        match self.prefills.len() >= common.me.capacity.queue as usize {
            true => Err(self.busy()),
            false => Ok(Judged::New),
        }
    }

    /// 2. It goes to the engine, at once or when the `decode` side has pulled its beginning. No earlier try of it is here any more.
    pub(crate) fn begin(
        &mut self,
        common: &mut Common,
        decode: Option<&mut DecodeSide>,
        now: Instant,
        job: PrefillJob,
        reply: Subject,
    ) -> Result<(), Refusal> {
        let trace = PrefillTrace::begin(&common.tracer, &job, now.into_std());
        let deadline = now + Duration::from_millis(job.budget_ms.into());
        let key = common.new_key(deadline);
        // Where log-probabilities of the prompt are wanted all of it is computed.
        let decode = decode.filter(|_| job.prompt_logprobs.is_none());
        let beginning = decode.map_or(Beginning::Here, |decode| {
            decode.pull_prefix(common, now, key, &job, self.lease)
        });
        let PrefillJob {
            request,
            api_server,
            budget_ms,
            sequence,
            prompt_logprobs,
            stream,
            ..
        } = job;
        let tokens = sequence.tokens.0.len() as u32;
        let command = Command::Prefill {
            key,
            spec: sequence,
            prompt_logprobs,
            // The answer to a prompt with log-probabilities is one message, and comes at its end.
            stream: stream && prompt_logprobs.is_none() && common.mover.is_some(),
        };
        let failed = |failure| PrefixPull {
            failure: Some(failure),
            ..PrefixPull::default()
        };
        let (pulling, prefix_pull) = match beginning {
            Beginning::Pulling(task) => (Some(task), None),
            Beginning::Here => (None, None),
            Beginning::Not(failure) => (None, Some(failed(failure))),
        };
        let held = match pulling {
            Some(task) => Some(Box::new((command, task))),
            None if common.engine.send(command) => None,
            None => {
                common.deadlines.remove(&(deadline, key));
                return Err(self.busy());
            }
        };
        tracing::debug!(%request, %api_server, tokens, budget_ms, "prefill queued");
        self.prefills.insert(
            key,
            Prefilling {
                request,
                api_server,
                tokens,
                deadline,
                reply: Some(reply),
                streamed: None,
                held,
                prefix_pull,
                trace,
            },
        );
        Ok(())
    }

    fn busy(&self) -> Refusal {
        Refusal::Busy {
            retry_after_ms: self.pace.prefill_hint_ms(self.prefills.len()),
        }
    }

    /// Whether this prompt waits or runs here already. Its sender has not heard of it for a while and asks again.
    fn answer_there_instead(&mut self, common: &Common, job: &PrefillJob, reply: &Subject) -> bool {
        let is_it = |entry: &&mut Prefilling| {
            entry.request == job.request
                && entry.api_server == job.api_server
                && entry.tokens as usize == job.sequence.tokens.0.len()
                && entry.reply.is_some()
        };
        match self.prefills.values_mut().find(is_it) {
            Some(entry) => {
                entry.reply = Some(reply.clone());
                if let Some(streamed) = &entry.streamed {
                    common.send(reply.clone(), &streamed.begun());
                }
                true
            }
            None => false,
        }
    }

    /// 3. The engine ran it: the KV is staged under a lease and the handle goes out. Whether it is staged.
    pub(crate) fn on_prefilled(&mut self, common: &mut Common, done: Prefilled) -> bool {
        let Prefilled {
            key,
            blocks,
            sampled,
            finish,
            cached_tokens,
            prompt_logprobs,
            queue,
            compute,
            done,
        } = done;
        let now = Instant::now();
        let mut staged = Staged {
            blocks: HeldBlocks::new(blocks, common.engine.waker.clone()),
            first: sampled,
            since: now,
            trace: None,
        };
        let Some(entry) = self.remove(common, key) else {
            return false;
        };
        let Some(reply) = entry.reply else {
            return false;
        };
        self.pace.record(compute);
        if let Some(trace) = entry.trace {
            let tokens = (entry.tokens, cached_tokens);
            staged.trace = trace.done((queue, compute), tokens, done, finish.is_none());
        }
        if let Some(streamed) = entry.streamed {
            tracing::debug!(request = %entry.request, since_last_step_us = done.elapsed().as_micros(), "prefilled, and was streamed");
            streamed.done(common, &mut self.streams, &staged.first, finish);
            if finish.is_none() {
                let (handle, nonce) = (streamed.handle.handle, streamed.handle.nonce);
                self.leases.grant_as(
                    handle,
                    now,
                    self.lease,
                    entry.request,
                    entry.api_server,
                    nonce,
                    staged,
                );
            }
            return finish.is_none();
        }
        let mut handle = self.handle(common, entry.tokens);
        handle.first_token = Some(staged.first.token);
        handle.first_logprobs.clone_from(&staged.first.logprobs);
        (handle.finish, handle.cached_tokens) = (finish, cached_tokens);
        handle.timings = PrefillTimings {
            queue_ms: ms(queue),
            compute_ms: ms(compute),
        };
        handle.prefix_pull = entry.prefix_pull;
        if finish.is_none() {
            match nonce() {
                Ok(nonce) => handle.nonce = nonce,
                Err(failure) => {
                    fail(common, reply, failure);
                    return false;
                }
            }
            let table = staged.blocks.table();
            handle.runs = table.map(|table| table.runs()).unwrap_or_default();
            handle.handle = self.leases.grant(
                now,
                self.lease,
                entry.request,
                entry.api_server,
                handle.nonce,
                staged,
            );
        }
        tracing::debug!(request = %entry.request, since_last_step_us = done.elapsed().as_micros(), "prefilled");
        self.hand_over(common, entry.request, reply, handle, prompt_logprobs);
        finish.is_none()
    }

    /// A handle without what only its prompt can tell.
    fn handle(&self, common: &Common, tokens: u32) -> KvHandle {
        KvHandle {
            worker: common.me.worker.clone(),
            incarnation: common.me.incarnation,
            handle: HandleId(0),
            nonce: Nonce(0),
            model: common.checks.model.fingerprint.clone(),
            kv: common.checks.kv.clone(),
            runs: Vec::new(),
            valid_tokens: tokens,
            lease_ms: self.lease.as_millis() as u32,
            first_token: None,
            first_logprobs: None,
            finish: None,
            cached_tokens: 0,
            timings: PrefillTimings::default(),
            prefix_pull: None,
        }
    }

    fn hand_over(
        &mut self,
        common: &Common,
        request: RequestId,
        reply: Subject,
        handle: KvHandle,
        prompt_logprobs: Option<Vec<TokenLogprobs>>,
    ) {
        tracing::debug!(%request, handle = %handle.handle, tokens = handle.valid_tokens, cached = handle.cached_tokens, "handed over");
        let ready = PrefillReply::Ready {
            v: PROTOCOL_VERSION,
            handle: Box::new(handle),
            prompt_logprobs,
        };
        if let Err(error) = common.outbox.send(reply.clone(), &ready) {
            // Nobody will come for it.
            self.leases.abort(request);
            let code = match error {
                Unsent::TooLarge { .. } => FailureCode::TooLarge,
                Unsent::NoRoom | Unsent::Unwritable(_) => FailureCode::Internal,
            };
            fail(common, reply, Failure::new(code, error.to_string()));
        }
    }

    /// 4. A decode worker has read it: valid only if the lease was alive all the time. How long it waited for that, if it is.
    ///
    /// That of a prompt that still runs cannot be released: nobody has read it all.
    pub(crate) fn release(&mut self, common: &Common, release: &Release) -> Option<Duration> {
        let is_ours = release.incarnation == common.me.incarnation;
        let now = Instant::now();
        let mut staged = is_ours
            .then(|| self.leases.release(now, release.handle, release.nonce))
            .flatten()?;
        staged.went_to(&release.decode_worker);
        Some(now.saturating_duration_since(staged.since))
    }

    /// Its API server still wants it: the lease begins again, if it is alive.
    pub(crate) fn renew(&mut self, common: &Common, renew: &Renew) -> bool {
        let is_ours = renew.incarnation == common.me.incarnation;
        let now = Instant::now();
        is_ours
            && self
                .leases
                .renew(now, self.lease, renew.handle, renew.nonce)
    }

    /// Ends a prompt that waits or runs. The engine lets go of it with the next command it takes.
    pub(crate) fn end(&mut self, common: &mut Common, key: u64, failure: Option<Failure>) {
        let Some(entry) = self.prefills.get_mut(&key) else {
            return;
        };
        common.deadlines.remove(&(entry.deadline, key));
        let Some(reply) = entry.reply.take() else {
            return;
        };
        let streamed = entry.streamed.take();
        // The engine does not know it yet, and says of this too that it left.
        drop(entry.held.take());
        if let (Some(trace), Some(failure)) = (entry.trace.take(), &failure) {
            trace.failed("ended", failure.to_string());
        }
        tracing::debug!(request = %entry.request, failure = failure.as_ref().map(tracing::field::display), "prefill ended");
        if !common.engine.send(Command::Abort { key, failure: None }) {
            self.prefills.remove(&key);
        }
        if let Some(streamed) = streamed {
            streamed.failed(common, &mut self.streams, failure);
        } else if let Some(failure) = failure {
            fail(common, reply, failure);
        }
    }

    /// The engine let go of a prompt, or did not take it.
    pub(crate) fn left(&mut self, common: &mut Common, key: u64, refusal: Option<Refusal>) {
        let Some(entry) = self.remove(common, key) else {
            return;
        };
        if let (Some(trace), Some(refusal)) = (entry.trace, &refusal) {
            trace.failed("refused", refusal.to_string());
        }
        if let (Some(reply), Some(refusal)) = (entry.reply, refusal) {
            tracing::debug!(request = %entry.request, %refusal, "prefill refused by the engine");
            refuse(common, reply, refusal);
        }
    }

    /// The engine gave a prompt up.
    pub(crate) fn failed(&mut self, common: &mut Common, key: u64, failure: Failure) {
        let Some(entry) = self.remove(common, key) else {
            return;
        };
        if let Some(trace) = entry.trace {
            trace.failed("failed", failure.to_string());
        }
        let Some(reply) = entry.reply else {
            return;
        };
        match entry.streamed {
            Some(streamed) => streamed.failed(common, &mut self.streams, Some(failure)),
            None => fail(common, reply, failure),
        }
    }

    fn remove(&mut self, common: &mut Common, key: u64) -> Option<Prefilling> {
        let entry = self.prefills.remove(&key)?;
        common.deadlines.remove(&(entry.deadline, key));
        Some(entry)
    }

    /// Publishes to each API server which of its prompts wait or run here and are not answered yet. An API server that receives no report
    /// of a job takes it for lost and sends it again. Streamed prompts are left out: the holder of their handle asks for progress.
    pub(crate) fn report_prompts(&self, common: &Common) {
        let mut prompts: BTreeMap<&ApiServerId, Vec<RequestId>> = BTreeMap::new();
        for entry in self.prefills.values() {
            if entry.reply.is_some() && entry.streamed.is_none() {
                let of_server = prompts.entry(&entry.api_server).or_default();
                of_server.push(entry.request);
            }
        }
        for (api_server, prompts) in prompts {
            let subject = common.cluster.tokens(api_server, &common.me.worker);
            for prompts in prompts.chunks(PROMPTS_A_FRAME) {
                let frame = TokenFrame {
                    v: PROTOCOL_VERSION,
                    worker: common.me.worker.clone(),
                    incarnation: common.me.incarnation,
                    items: Vec::new(),
                    prompts: prompts.to_vec(),
                };
                common.send(subject.clone(), &frame);
            }
        }
    }

    /// Keys of the prompts here whose API server and request are these.
    pub(crate) fn keys_of<'a>(
        &'a self,
        are: &'a impl Fn(&ApiServerId, &RequestId) -> bool,
    ) -> impl Iterator<Item = u64> + 'a {
        let entries = self.prefills.iter();
        entries
            .filter(|(_, entry)| are(&entry.api_server, &entry.request))
            .map(|(key, _)| *key)
    }
}

/// Why the answer to a job could not be sent, where that is known before anything is computed.
fn reply_too_large(
    common: &Common,
    prompt_logprobs: Option<u8>,
    prompt_tokens: u32,
) -> Option<Failure> {
    let top = prompt_logprobs?;
    let vocab = common.checks.model.vocab;
    let bytes = PrefillReply::bytes_max(prompt_tokens as usize, top, vocab);
    let bytes_max = common.outbox.bytes_max();
    (bytes > bytes_max).then(|| {
        let message = format!(
            "the log-probabilities of {prompt_tokens} prompt tokens with {top} alternatives each make an answer of up to \
             {bytes} bytes, and the bus carries {bytes_max}: ask for fewer alternatives, a shorter prompt or none"
        );
        Failure::new(FailureCode::TooLarge, message)
    })
}

/// Answers a job that was not taken.
pub(crate) fn refuse(common: &Common, reply: Subject, refusal: Refusal) {
    let v = PROTOCOL_VERSION;
    common.send(reply, &PrefillReply::Refused { v, refusal });
}

fn fail(common: &Common, reply: Subject, failure: Failure) {
    let v = PROTOCOL_VERSION;
    common.send(reply, &PrefillReply::Failed { v, failure });
}

/// Proof of a handle.
fn nonce() -> Result<Nonce, Failure> {
    let drawn = random().map(|bytes| Nonce(u128::from_le_bytes(bytes)));
    drawn.map_err(|error| {
        let message = format!("no nonce could be drawn: {error}");
        Failure::new(FailureCode::Internal, message)
    })
}

fn ms(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e3
}
