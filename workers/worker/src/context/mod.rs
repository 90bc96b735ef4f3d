//! The context side: a prompt comes in, its KV is staged under a lease, a release ends it.

mod leases;

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::Subject;
use baton_protocol::{
    ApiServerId, Failure, FailureCode, HandleId, KvHandle, Nonce, PROTOCOL_VERSION, PrefillJob,
    PrefillReply, PrefillTimings, Refusal, Release, Renew, RequestId, TokenLogprobs,
};
use tokio::time::Instant;

use crate::bus::Unsent;
use crate::common::Common;
use crate::engine_thread::{Command, HeldBlocks, Prefilled};
use crate::pace::Pace;
use crate::random::random;

pub(crate) use leases::LeaseTable;

/// A worker that runs prompts has this.
pub(crate) struct ContextSide {
    /// Prompts in the engine, by key.
    pub(crate) prefills: BTreeMap<u64, Prefilling>,
    /// Staged KV.
    pub(crate) leases: LeaseTable<HeldBlocks>,
    /// How long a lease runs.
    lease: Duration,
    /// How long prompts take.
    pace: Pace,
}

/// A prompt in the engine.
pub(crate) struct Prefilling {
    request: RequestId,
    api_server: ApiServerId,
    /// Tokens of the job; their KV is valid when it is done.
    tokens: u32,
    deadline: Instant,
    /// Where the answer goes; `None` once it was given or is not wanted, and the engine is yet to let go.
    reply: Option<Subject>,
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
        if self.answer_there_instead(job, reply) {
            return Ok(Judged::Settled);
        }
        match self.prefills.len() >= common.me.capacity.queue as usize {
            true => Err(self.busy()),
            false => Ok(Judged::New),
        }
    }

    /// 2. It goes to the engine. No earlier try of its request is here any more.
    pub(crate) fn begin(
        &mut self,
        common: &mut Common,
        now: Instant,
        job: PrefillJob,
        reply: Subject,
    ) -> Result<(), Refusal> {
        let PrefillJob {
            request,
            api_server,
            budget_ms,
            sequence,
            prompt_logprobs,
            ..
        } = job;
        let tokens = sequence.tokens.0.len() as u32;
        let deadline = now + Duration::from_millis(budget_ms.into());
        let key = common.new_key(deadline);
        if !common.engine.send(Command::Prefill {
            key,
            spec: sequence,
            prompt_logprobs,
        }) {
            common.deadlines.remove(&(deadline, key));
            return Err(self.busy());
        }
        tracing::debug!(%request, %api_server, tokens, budget_ms, "prefill queued");
        self.prefills.insert(
            key,
            Prefilling {
                request,
                api_server,
                tokens,
                deadline,
                reply: Some(reply),
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
    fn answer_there_instead(&mut self, job: &PrefillJob, reply: &Subject) -> bool {
        let is_it = |entry: &&mut Prefilling| {
            entry.request == job.request
                && entry.api_server == job.api_server
                && entry.tokens as usize == job.sequence.tokens.0.len()
                && entry.reply.is_some()
        };
        match self.prefills.values_mut().find(is_it) {
            Some(entry) => {
                entry.reply = Some(reply.clone());
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
        let blocks = HeldBlocks::new(blocks, common.engine.waker.clone());
        let Some(entry) = self.remove(common, key) else {
            return false;
        };
        let Some(reply) = entry.reply else {
            return false;
        };
        self.pace.record(compute);
        let mut handle = KvHandle {
            worker: common.me.worker.clone(),
            incarnation: common.me.incarnation,
            handle: HandleId(0),
            nonce: Nonce(0),
            model: common.checks.model.fingerprint.clone(),
            kv: common.checks.kv.clone(),
            runs: Vec::new(),
            valid_tokens: entry.tokens,
            lease_ms: self.lease.as_millis() as u32,
            first_token: sampled.token,
            first_logprobs: sampled.logprobs,
            finish,
            cached_tokens,
            timings: PrefillTimings {
                queue_ms: ms(queue),
                compute_ms: ms(compute),
            },
        };
        if finish.is_none() {
            match random() {
                Ok(bytes) => handle.nonce = Nonce(u128::from_le_bytes(bytes)),
                Err(error) => {
                    let message = format!("no nonce could be drawn: {error}");
                    fail(common, reply, Failure::new(FailureCode::Internal, message));
                    return false;
                }
            }
            handle.runs = blocks.table().map(|table| table.runs()).unwrap_or_default();
            let (now, nonce) = (Instant::now(), handle.nonce);
            handle.handle = self.leases.grant(
                now,
                self.lease,
                entry.request,
                entry.api_server,
                nonce,
                blocks,
            );
        }
        tracing::debug!(request = %entry.request, since_last_step_us = done.elapsed().as_micros(), "prefilled");
        self.hand_over(common, entry.request, reply, handle, prompt_logprobs);
        finish.is_none()
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

    /// 4. A decode worker has read it: valid only if the lease was alive all the time.
    pub(crate) fn release(&mut self, common: &Common, release: &Release) -> bool {
        let is_ours = release.incarnation == common.me.incarnation;
        let now = Instant::now();
        is_ours
            && self
                .leases
                .release(now, release.handle, release.nonce)
                .is_some()
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
        tracing::debug!(request = %entry.request, failure = failure.as_ref().map(tracing::field::display), "prefill ended");
        if !common.engine.send(Command::Abort { key, failure: None }) {
            self.prefills.remove(&key);
        }
        if let Some(failure) = failure {
            fail(common, reply, failure);
        }
    }

    /// The engine let go of a prompt, or did not take it.
    pub(crate) fn left(&mut self, common: &mut Common, key: u64, refusal: Option<Refusal>) {
        let Some(entry) = self.remove(common, key) else {
            return;
        };
        if let (Some(reply), Some(refusal)) = (entry.reply, refusal) {
            tracing::debug!(request = %entry.request, %refusal, "prefill refused by the engine");
            refuse(common, reply, refusal);
        }
    }

    /// The engine gave a prompt up.
    pub(crate) fn failed(&mut self, common: &mut Common, key: u64, failure: Failure) {
        let entry = self.remove(common, key);
        if let Some(reply) = entry.and_then(|entry| entry.reply) {
            fail(common, reply, failure);
        }
    }

    fn remove(&mut self, common: &mut Common, key: u64) -> Option<Prefilling> {
        let entry = self.prefills.remove(&key)?;
        common.deadlines.remove(&(entry.deadline, key));
        Some(entry)
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

fn ms(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e3
}
