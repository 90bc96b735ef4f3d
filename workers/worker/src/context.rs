//! The context worker's leg: a prompt comes in, its KV is staged under a lease, a release ends it.

use std::time::Duration;

use async_nats::{Message, Subject};
use baton_protocol::{
    ApiServerId, Failure, FailureCode, HandleId, KvHandle, Nonce, PROTOCOL_VERSION, PrefillJob,
    PrefillReply, PrefillTimings, Refusal, Release, Released, Renew, Renewed, RequestId,
    TokenLogprobs, WorkerState, decode,
};
use tokio::time::Instant;

use crate::bus::Unsent;
use crate::desk::Desk;
use crate::engine_thread::{Command, HeldBlocks, Prefilled};
use crate::random::random;

/// A prompt in the engine.
pub(crate) struct Prefilling {
    pub(crate) request: RequestId,
    pub(crate) api_server: ApiServerId,
    /// Tokens of the job; their KV is valid when it is done.
    tokens: u32,
    deadline: Instant,
    /// Where the answer goes; `None` once it was given or is not wanted, and the engine is yet to let go.
    reply: Option<Subject>,
}

impl Desk {
    /// 1. A job arrives: it goes to the engine, or is refused at once.
    pub(crate) fn on_prefill(&mut self, message: Message) {
        let Some(reply) = message.reply else {
            tracing::debug!("a prefill job without reply subject was ignored");
            return;
        };
        let job = decode::<PrefillJob>(&message.payload).map_err(|error| Refusal::Malformed {
            detail: error.to_string(),
        });
        if let Err(refusal) = job.and_then(|job| self.take_prefill(job, &reply)) {
            self.refuse_prefill(reply, refusal);
        }
    }

    fn take_prefill(&mut self, job: PrefillJob, reply: &Subject) -> Result<(), Refusal> {
        let now = Instant::now();
        let PrefillJob {
            request,
            api_server,
            api_incarnation,
            budget_ms,
            model,
            mut sequence,
            prompt_logprobs,
            ..
        } = job;
        self.heard_api_server(now, &api_server, api_incarnation)?;
        if self.state != WorkerState::Serving {
            return Err(Refusal::Draining);
        }
        if !self.me.role.prefills() {
            return Err(Refusal::WrongRole {
                detail: "this worker runs no prompts: its role is decode".to_owned(),
            });
        }
        self.checks.model(&model)?;
        self.checks.sequence(&mut sequence)?;
        if prompt_logprobs.is_some_and(|top| top > baton_protocol::limits::TOP_LOGPROBS_MAX) {
            return Err(Refusal::Malformed {
                detail: "too many prompt log-probabilities are asked for".to_owned(),
            });
        }
        if let Some(failure) = self.reply_too_large(prompt_logprobs, sequence.prompt_tokens) {
            self.fail_prefill(reply.clone(), failure);
            return Ok(());
        }
        if self.answer_there_instead(request, &api_server, sequence.tokens.0.len(), reply) {
            return Ok(());
        }
        if self.prefills.len() >= self.me.capacity.queue as usize {
            return Err(Refusal::Busy {
                retry_after_ms: self.prefill_pace.prefill_hint_ms(self.prefills.len()),
            });
        }
        // A request has one live try: what an earlier one left here ends.
        self.end_request(request, None);
        self.api_servers.note(now, &api_server, api_incarnation);
        let tokens = sequence.tokens.0.len() as u32;
        let deadline = now + Duration::from_millis(budget_ms.into());
        let key = self.new_key(deadline);
        if !self.engine.send(Command::Prefill {
            key,
            spec: sequence,
            prompt_logprobs,
        }) {
            self.deadlines.remove(&(deadline, key));
            return Err(Refusal::Busy {
                retry_after_ms: self.prefill_pace.prefill_hint_ms(self.prefills.len()),
            });
        }
        tracing::debug!(%request, %api_server, tokens, budget_ms, "prefill queued");
        self.prefills.insert(
            key,
            Prefilling {
                request,
                api_server,
                tokens,
                deadline,
                reply: Some(reply.clone()),
            },
        );
        Ok(())
    }

    /// Why the answer to a job could not be sent, where that is known before anything is computed.
    fn reply_too_large(&self, prompt_logprobs: Option<u8>, prompt_tokens: u32) -> Option<Failure> {
        let top = prompt_logprobs?;
        let vocab = self.checks.model.vocab;
        let bytes = PrefillReply::bytes_max(prompt_tokens as usize, top, vocab);
        let bytes_max = self.outbox.bytes_max();
        (bytes > bytes_max).then(|| {
            let message = format!(
                "the log-probabilities of {prompt_tokens} prompt tokens with {top} alternatives each make an answer of up to \
                 {bytes} bytes, and the bus carries {bytes_max}: ask for fewer alternatives, a shorter prompt or none"
            );
            Failure::new(FailureCode::TooLarge, message)
        })
    }

    /// Whether this prompt waits or runs here already. Its sender has not heard of it for a while and asks again.
    fn answer_there_instead(
        &mut self,
        request: RequestId,
        api_server: &ApiServerId,
        tokens: usize,
        reply: &Subject,
    ) -> bool {
        let is_it = |entry: &&mut Prefilling| {
            entry.request == request
                && entry.api_server == *api_server
                && entry.tokens as usize == tokens
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

    /// 2. The engine ran it: the KV is staged under a lease and the handle goes out.
    pub(crate) fn on_prefilled(&mut self, done: Prefilled) {
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
        let blocks = HeldBlocks::new(blocks, self.engine.waker.clone());
        let Some(entry) = self.remove_prefill(key) else {
            return;
        };
        let Some(reply) = entry.reply else { return };
        self.prefill_pace.record(compute);
        let mut handle = KvHandle {
            worker: self.me.worker.clone(),
            incarnation: self.me.incarnation,
            handle: HandleId(0),
            nonce: Nonce(0),
            model: self.checks.model.fingerprint.clone(),
            kv: self.checks.kv.clone(),
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
                    self.fail_prefill(reply, Failure::new(FailureCode::Internal, message));
                    return;
                }
            }
            handle.runs = blocks.table().map(|table| table.runs()).unwrap_or_default();
            let (now, nonce) = (Instant::now(), handle.nonce);
            self.expect_release(now);
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
        self.hand_over(entry.request, reply, handle, prompt_logprobs);
    }

    fn hand_over(
        &mut self,
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
        if let Err(error) = self.outbox.send(reply.clone(), &ready) {
            // Nobody will come for it.
            self.leases.abort(request);
            let code = match error {
                Unsent::TooLarge { .. } => FailureCode::TooLarge,
                Unsent::NoRoom | Unsent::Unwritable(_) => FailureCode::Internal,
            };
            self.fail_prefill(reply, Failure::new(code, error.to_string()));
        }
    }

    /// 3. A decode worker has read it: valid only if the lease was alive all the time.
    pub(crate) fn on_release(&mut self, message: &Message) {
        let valid = match decode::<Release>(&message.payload) {
            Ok(release) => {
                let blocks = (release.incarnation == self.me.incarnation)
                    .then(|| {
                        self.leases
                            .release(Instant::now(), release.handle, release.nonce)
                    })
                    .flatten();
                let valid = blocks.is_some();
                // Another worker has it now: its place in this one's line is free.
                self.line.leave(release.request);
                tracing::debug!(request = %release.request, handle = %release.handle, by = %release.decode_worker, valid, "released");
                valid
            }
            Err(error) => {
                tracing::debug!(%error, "a release was not understood");
                false
            }
        };
        if let Some(reply) = message.reply.clone() {
            self.send(
                reply,
                &Released {
                    v: PROTOCOL_VERSION,
                    valid,
                },
            );
        }
    }

    /// Its API server still wants it: the lease begins again, if it is alive.
    pub(crate) fn on_renew(&mut self, message: &Message) {
        let valid = match decode::<Renew>(&message.payload) {
            Ok(renew) => {
                let valid = renew.incarnation == self.me.incarnation
                    && self
                        .leases
                        .renew(Instant::now(), self.lease, renew.handle, renew.nonce);
                tracing::debug!(request = %renew.request, handle = %renew.handle, valid, "renewed");
                valid
            }
            Err(error) => {
                tracing::debug!(%error, "a renewal was not understood");
                false
            }
        };
        if let Some(reply) = message.reply.clone() {
            let v = PROTOCOL_VERSION;
            self.send(reply, &Renewed { v, valid });
        }
    }

    /// Ends a prompt that waits or runs. The engine lets go of it with the next command it takes.
    pub(crate) fn end_prefill(&mut self, key: u64, failure: Option<Failure>) {
        let Some(entry) = self.prefills.get_mut(&key) else {
            return;
        };
        self.deadlines.remove(&(entry.deadline, key));
        let Some(reply) = entry.reply.take() else {
            return;
        };
        tracing::debug!(request = %entry.request, failure = failure.as_ref().map(tracing::field::display), "prefill ended");
        if !self.engine.send(Command::Abort { key, failure: None }) {
            self.prefills.remove(&key);
        }
        if let Some(failure) = failure {
            self.fail_prefill(reply, failure);
        }
    }

    /// The engine let go of a prompt, or did not take it.
    pub(crate) fn prefill_left(&mut self, key: u64, refusal: Option<Refusal>) {
        let Some(entry) = self.remove_prefill(key) else {
            return;
        };
        if let (Some(reply), Some(refusal)) = (entry.reply, refusal) {
            tracing::debug!(request = %entry.request, %refusal, "prefill refused by the engine");
            self.refuse_prefill(reply, refusal);
        }
    }

    /// The engine gave a prompt up.
    pub(crate) fn prefill_failed(&mut self, key: u64, failure: Failure) {
        let entry = self.remove_prefill(key);
        if let Some(reply) = entry.and_then(|entry| entry.reply) {
            self.fail_prefill(reply, failure);
        }
    }

    fn remove_prefill(&mut self, key: u64) -> Option<Prefilling> {
        let entry = self.prefills.remove(&key)?;
        self.deadlines.remove(&(entry.deadline, key));
        Some(entry)
    }

    fn refuse_prefill(&self, reply: Subject, refusal: Refusal) {
        self.send(
            reply,
            &PrefillReply::Refused {
                v: PROTOCOL_VERSION,
                refusal,
            },
        );
    }

    fn fail_prefill(&self, reply: Subject, failure: Failure) {
        self.send(
            reply,
            &PrefillReply::Failed {
                v: PROTOCOL_VERSION,
                failure,
            },
        );
    }
}

fn ms(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e3
}
