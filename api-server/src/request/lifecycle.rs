//! The life of one generation: `Queued → Prefilling → Staged → Pulling → Decoding → Done | Failed`.
//!
//! A pure state machine: what happened goes in, what to do comes out. Nothing else moves a request.
//! KV of a prompt that takes several steps is staged, and pulled, while the prompt runs: its handle has no first token then
//! ([`streaming`]).
//!
//! The driver ([`crate::request::driver`]) carries the actions out and reports what came of them.
//!
//! However a generation is retried, its output is the same text, because random numbers depend only on
//! seed and position: a retry prefills the prompt and the output so far, and goes on.

mod ends;
mod room;
mod streaming;
mod words;

use std::time::Duration;

use baton_protocol::{
    DecodeReply, End, FailureCode, FinishReason, FrameItem, KvHandle, PrefillReply, TokenLogprobs,
    WorkerId,
};

use crate::error::{ApiError, ErrorKind};

pub(crate) use ends::holder;
use room::Round;
pub use words::{Action, Input, NoReply, Overbooked, Phase, Target};

/// The state machine of one generation.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    phase: Phase,
    rules: Rules,
    output: Vec<u32>,
    /// Output tokens that the current prefill carried.
    prefilled_output: usize,
    next_attempt: u32,
    retries: u32,
    executors_broken: u32,
    /// How long it has waited for workers that are not there.
    waited: Duration,
    waiting: bool,
    prompt_reported: bool,
    /// Refused in this round: not asked again before the next.
    refused: Vec<WorkerId>,
    /// Broke this request: asked again only if nobody else is there.
    failed: Vec<WorkerId>,
    round: Round,
    /// Questions in a row how far a prompt is, that had no answer.
    unanswered: u32,
    /// Decode workers that were full when they were asked: it has a place in the line of each.
    lines: Vec<Target>,
}

/// The rules that end a generation, as the workers apply them.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Most output tokens.
    pub max_tokens: u32,
    /// Ids that end it.
    pub stop_token_ids: Vec<u32>,
    /// Not before this many tokens.
    pub min_tokens: u32,
}

impl Lifecycle {
    /// A new generation and its first action.
    pub fn new(rules: Rules, out: &mut Vec<Action>) -> Self {
        out.push(Action::ChooseContext);
        Self {
            phase: Phase::Queued,
            rules,
            output: Vec::new(),
            prefilled_output: 0,
            next_attempt: 0,
            retries: 0,
            executors_broken: 0,
            waited: Duration::ZERO,
            waiting: false,
            prompt_reported: false,
            refused: Vec::new(),
            failed: Vec::new(),
            round: Round::default(),
            unanswered: 0,
            lines: Vec::new(),
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Whether nothing was sent for it yet.
    pub fn is_new(&self) -> bool {
        self.phase == Phase::Queued
            && self.output.is_empty()
            && self.retries == 0
            && self.refused.is_empty()
            && self.waited.is_zero()
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        matches!(self.phase, Phase::Done | Phase::Failed)
    }

    /// All output tokens so far.
    pub fn output(&self) -> &[u32] {
        &self.output
    }

    /// The output tokens that the prefill under way, or last done, carried.
    pub fn prefilled_output(&self) -> &[u32] {
        &self.output[..self.prefilled_output]
    }

    /// The handle that waits for a decode worker or is being pulled.
    pub fn handle(&self) -> Option<&KvHandle> {
        match &self.phase {
            Phase::Staged { handle } | Phase::Pulling { handle, .. } => Some(handle),
            _ => None,
        }
    }

    /// Workers that must not be chosen now.
    pub fn refused(&self) -> &[WorkerId] {
        &self.refused
    }

    /// Workers to choose only if there is no other.
    pub fn failed(&self) -> &[WorkerId] {
        &self.failed
    }

    /// Takes in what happened and says what to do, in order.
    pub fn step(&mut self, input: Input, out: &mut Vec<Action>) {
        if self.ended() {
            return;
        }
        match input {
            Input::Chosen(target) => self.chosen(target, out),
            Input::Prefill(reply) => self.prefill_reply(reply, out),
            Input::Progress(reply) => self.progress(reply, out),
            Input::Decode(reply) => self.decode_reply(reply, out),
            Input::Item(item) => self.item(item, out),
            Input::WorkerLost(target) => self.worker_lost(&target, out),
            Input::Stalled => self.stalled(out),
            Input::BusBack => self.bus_back(out),
            Input::WaitOver => self.wait_over(out),
            Input::RoomMade => self.room_made(out),
            Input::LeaseLost => self.lease_lost(out),
            Input::Overbooked {
                why,
                wait,
                retry_after,
            } => self.overbooked(why, wait, retry_after, out),
            Input::StopFound => self.end_early("stop string found", Ok(FinishReason::Stop), out),
            Input::Deadline => {
                let place = self.phase.place();
                let error = ApiError::new(
                    ErrorKind::Deadline,
                    format!("the request's time ran out while {place}"),
                );
                self.end_early("deadline", Err(error), out);
            }
            Input::ClientLeft => {
                let error = ApiError::new(ErrorKind::ClientLeft, "the client left");
                self.end_early("client left", Err(error), out);
            }
            Input::Leaving => {
                let error = ApiError::new(
                    ErrorKind::Leaving,
                    "this API server is leaving and has no more time for the request; ask again",
                );
                self.end_early("the API server leaves", Err(error), out);
            }
            Input::NameLost => {
                let error = ApiError::new(
                    ErrorKind::Leaving,
                    "another API server has taken this one's name; ask again",
                );
                self.end_early("the API server lost its name", Err(error), out);
            }
            Input::ClientStalled => {
                let error =
                    ApiError::new(ErrorKind::ClientLeft, "the client did not read its stream");
                self.end_early("client does not read", Err(error), out);
            }
        }
    }

    fn chosen(&mut self, target: Option<Target>, out: &mut Vec<Action>) {
        if self.waiting {
            return;
        }
        match (&self.phase, target) {
            (Phase::Queued, Some(context)) => {
                self.prefilled_output = self.output.len();
                self.phase = Phase::Prefilling {
                    context: context.clone(),
                };
                out.push(Action::SendPrefill(context));
            }
            (Phase::Staged { handle }, Some(decode)) => {
                let attempt = self.next_attempt;
                self.next_attempt += 1;
                self.phase = Phase::Pulling {
                    handle: handle.clone(),
                    decode: decode.clone(),
                };
                out.push(Action::SendDecode { decode, attempt });
            }
            (Phase::Queued, None) => self.no_context_worker(out),
            // A worker may come while the prompt runs; when it is done one is looked for again.
            (Phase::Staged { handle }, None)
                if handle.is_streamed() && !self.round.is_decided() => {}
            (Phase::Staged { handle }, None) => {
                let context = holder(handle);
                self.no_decode_worker(context, out);
            }
            _ => {}
        }
    }

    fn prefill_reply(&mut self, reply: Result<PrefillReply, NoReply>, out: &mut Vec<Action>) {
        let Phase::Prefilling { context } = &self.phase else {
            return;
        };
        let context = context.clone();
        match reply {
            Ok(PrefillReply::Ready {
                handle,
                prompt_logprobs,
                ..
            }) => {
                self.prefilled(context, handle, prompt_logprobs, out);
            }
            Ok(PrefillReply::Begun { handle, .. }) => self.begun(&context, handle, out),
            Ok(PrefillReply::Refused { refusal, .. }) => {
                self.phase = Phase::Queued;
                self.refused_by(context, &refusal);
                out.push(Action::ChooseContext);
            }
            Ok(PrefillReply::Failed { failure, .. }) => {
                self.worker_failed(failure, context.worker, out);
            }
            Err(NoReply::NoResponders) => {
                self.refused.push(context.worker);
                self.phase = Phase::Queued;
                out.push(Action::ChooseContext);
            }
            Err(NoReply::TooLarge { bytes, bytes_max }) => {
                let error = ApiError::new(
                    ErrorKind::JobTooLarge,
                    format!(
                        "the prompt makes a message of {bytes} bytes and the bus carries {bytes_max}: \
                         shorten it, or raise max_payload of nats-server"
                    ),
                );
                self.phase = Phase::Queued;
                self.fail(error, out);
            }
            Err(NoReply::TimedOut) => {
                self.retry("context worker did not answer", Some(context.worker), out);
            }
            Err(NoReply::Broken(_)) => {
                self.retry(
                    "context worker's answer was lost",
                    Some(context.worker),
                    out,
                );
            }
        }
    }

    fn prefilled(
        &mut self,
        context: Target,
        handle: Box<KvHandle>,
        prompt_logprobs: Option<Vec<TokenLogprobs>>,
        out: &mut Vec<Action>,
    ) {
        if handle.worker != context.worker {
            return self.retry(
                "a handle of another worker came back",
                Some(context.worker),
                out,
            );
        }
        let Some(first_token) = handle.first_token else {
            let reason = "a handle without first token came back";
            return self.retry(reason, Some(context.worker), out);
        };
        self.report_prompt(&handle, prompt_logprobs, out);
        self.first_token(first_token, &handle.first_logprobs, handle.finish, out);
        if let Some(finish) = handle.finish {
            self.phase = Phase::Done;
            return out.push(Action::Finish(finish));
        }
        self.next_round();
        self.waited = Duration::ZERO;
        self.phase = Phase::Staged { handle };
        out.push(Action::ChooseDecode);
    }

    fn report_prompt(
        &mut self,
        handle: &KvHandle,
        logprobs: Option<Vec<TokenLogprobs>>,
        out: &mut Vec<Action>,
    ) {
        if !std::mem::replace(&mut self.prompt_reported, true) {
            out.push(Action::Prompt {
                cached_tokens: handle.cached_tokens,
                queue_ms: handle.timings.queue_ms,
                logprobs,
            });
        }
    }

    fn first_token(
        &mut self,
        token: u32,
        logprobs: &Option<TokenLogprobs>,
        finish: Option<FinishReason>,
        out: &mut Vec<Action>,
    ) {
        self.output.push(token);
        out.push(Action::Emit {
            tokens: vec![token],
            logprobs: logprobs.clone().into_iter().collect(),
            stop: finish == Some(FinishReason::Stop),
        });
    }

    fn decode_reply(&mut self, reply: Result<DecodeReply, NoReply>, out: &mut Vec<Action>) {
        // Tokens may overtake the answer; then it has nothing to add.
        let Phase::Pulling { handle, decode } = &self.phase else {
            return;
        };
        let (handle, decode) = (handle.clone(), decode.clone());
        match reply {
            Ok(DecodeReply::Admitted { incarnation, .. }) => {
                self.admitted(out);
                if incarnation != decode.incarnation {
                    let decode = Target {
                        worker: decode.worker,
                        incarnation,
                    };
                    self.phase = Phase::Pulling { handle, decode };
                }
            }
            Ok(DecodeReply::Refused { refusal, .. }) => {
                self.phase = Phase::Staged { handle };
                self.refused_by(decode, &refusal);
                out.push(Action::ChooseDecode);
            }
            Err(NoReply::NoResponders) => {
                self.round.is_absent = true;
                self.refused.push(decode.worker);
                self.phase = Phase::Staged { handle };
                out.push(Action::ChooseDecode);
            }
            Err(NoReply::TooLarge { bytes, bytes_max }) => {
                let error = ApiError::new(
                    ErrorKind::JobTooLarge,
                    format!("the decode job has {bytes} bytes and the bus carries {bytes_max}"),
                );
                self.end_early("the decode job is too large", Err(error), out);
            }
            Err(NoReply::TimedOut) => {
                self.retry("decode worker did not answer", Some(decode.worker), out);
            }
            Err(NoReply::Broken(_)) => {
                self.retry("decode worker's answer was lost", Some(decode.worker), out);
            }
        }
    }

    /// A decode worker has it: the others need keep no place for it. Its context worker hears of it by the release.
    fn admitted(&mut self, out: &mut Vec<Action>) {
        self.waited = Duration::ZERO;
        let Phase::Pulling { handle, decode } = &self.phase else {
            return;
        };
        let (holder, decode) = (handle.worker.clone(), decode.worker.clone());
        let knows = |line: &Target| line.worker == holder || line.worker == decode;
        self.leave_lines("another decode worker has it", knows, out);
    }

    /// The decode worker that has it, if one does.
    pub fn decode(&self) -> Option<&Target> {
        match &self.phase {
            Phase::Pulling { decode, .. } | Phase::Decoding { decode } => Some(decode),
            _ => None,
        }
    }

    fn item(&mut self, item: FrameItem, out: &mut Vec<Action>) {
        if self.decode().is_none() || item.attempt.checked_add(1) != Some(self.next_attempt) {
            return;
        }
        if let Some(report) = item.pulled {
            out.push(Action::Pulled(report));
        }
        let have = self.output.len();
        let first = item.index as usize;
        if first > have {
            return self.retry("tokens were lost on the bus", None, out);
        }
        let known = have - first;
        let mut tokens = item.tokens.0;
        let mut logprobs = item.logprobs;
        if known > 0 {
            logprobs.drain(..known.min(logprobs.len()));
            tokens.drain(..known.min(tokens.len()));
        }
        if have + tokens.len() > self.rules.max_tokens as usize {
            let worker = self.decode().map(|decode| decode.worker.clone());
            return self.retry("more tokens came than were asked for", worker, out);
        }
        if !tokens.is_empty() || item.pulled.is_some() {
            // Tokens may overtake the answer.
            self.admitted(out);
            if let Phase::Pulling { decode, .. } = &self.phase {
                let decode = decode.clone();
                self.phase = Phase::Decoding { decode };
            }
        }
        if !tokens.is_empty() {
            self.output.extend_from_slice(&tokens);
            let stop = item.end == Some(End::Finished(FinishReason::Stop));
            out.push(Action::Emit {
                tokens,
                logprobs,
                stop,
            });
        }
        match item.end {
            None => {}
            Some(End::Finished(finish)) => {
                self.phase = Phase::Done;
                out.push(Action::Finish(finish));
            }
            Some(End::Failed(failure)) => {
                // A handle that went stale is the fault of the one who held it; so may a pull be.
                let context = self.handle().map(|handle| &handle.worker);
                let context = context.filter(|_| failure.code == FailureCode::HandleInvalid);
                let decode = self.decode().map(|decode| &decode.worker);
                if let Some(culprit) = context.or(decode).cloned() {
                    self.worker_failed(failure, culprit, out);
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
