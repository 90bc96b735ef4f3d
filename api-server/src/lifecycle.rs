//! The life of one generation: `Queued → Prefilling → Staged → Pulling → Decoding → Done | Failed`.
//!
//! A pure state machine: what happened goes in, what to do comes out. Nothing else moves a request.
//! The driver ([`crate::driver`]) carries the actions out and reports what came of them.
//!
//! However a generation is retried, its output is the same text, because random numbers depend only on
//! seed and position: a retry prefills the prompt and the output so far, and goes on.

use std::time::Duration;

use baton_protocol::{
    DecodeReply, End, Failure, FailureCode, FinishReason, FrameItem, Incarnation, KvHandle,
    PrefillReply, PullReport, Refusal, TokenLogprobs, WorkerId,
};

use crate::error::{ApiError, ErrorKind};

/// How often a generation is begun anew after something broke.
pub const RETRIES_MAX: u32 = 4;

/// How often it waits for room before it gives up.
pub const WAITS_MAX: u32 = 20;

/// One life of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The worker.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
}

/// Where a generation stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// Looking for a context worker.
    Queued,
    /// A context worker has the prompt.
    Prefilling {
        /// Which.
        context: Target,
    },
    /// The KV is ready; looking for a decode worker.
    Staged {
        /// Where it is.
        handle: Box<KvHandle>,
    },
    /// A decode worker was asked to pull it.
    Pulling {
        /// Where the KV is.
        handle: Box<KvHandle>,
        /// Who pulls.
        decode: Target,
    },
    /// Tokens come from a decode worker.
    Decoding {
        /// Which.
        decode: Target,
    },
    /// Ended by its own rules.
    Done,
    /// Ended otherwise.
    Failed,
}

impl Phase {
    /// Name for logs and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Prefilling { .. } => "prefilling",
            Self::Staged { .. } => "staged",
            Self::Pulling { .. } => "pulling",
            Self::Decoding { .. } => "decoding",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// Why a request on the bus has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoReply {
    /// Nobody listens there.
    NoResponders,
    /// No answer in time.
    TimedOut,
    /// The message is over the bus's bound.
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// The bus failed, or the answer makes no sense.
    Broken(String),
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The best worker for what [`Action::ChooseContext`] or [`Action::ChooseDecode`] asked, if any.
    Chosen(Option<Target>),
    /// The context worker's answer.
    Prefill(Result<PrefillReply, NoReply>),
    /// The decode worker's answer.
    Decode(Result<DecodeReply, NoReply>),
    /// This request's share of a token frame.
    Item(FrameItem),
    /// A worker is gone.
    WorkerLost(Target),
    /// Nothing was heard for too long.
    Stalled,
    /// The time of [`Action::Wait`] is over.
    WaitOver,
    /// A stop string was found in the text.
    StopFound,
    /// The budget is used up.
    Deadline,
    /// The client left.
    ClientLeft,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Find a context worker and answer [`Input::Chosen`].
    ChooseContext,
    /// Find a decode worker for the staged handle and answer [`Input::Chosen`].
    ChooseDecode,
    /// Send prompt and output so far.
    SendPrefill(Target),
    /// Send the handle. The attempt tells its frames from those of other tries.
    SendDecode {
        /// To whom.
        decode: Target,
        /// Number of the try.
        attempt: u32,
    },
    /// The first prefill is done: what it reports of the prompt.
    Prompt {
        /// Tokens the prefix index had.
        cached_tokens: u32,
        /// Milliseconds the prompt waited on the worker.
        queue_ms: f32,
        /// For `echo`.
        logprobs: Option<Vec<TokenLogprobs>>,
    },
    /// The pull is done.
    Pulled(PullReport),
    /// Tokens for the client. `stop` tells that the last one is a stop id, which has no text.
    Emit {
        /// New tokens.
        tokens: Vec<u32>,
        /// One for each, if asked for.
        logprobs: Vec<TokenLogprobs>,
        /// The last token is a stop id.
        stop: bool,
    },
    /// Answer [`Input::WaitOver`] after this time.
    Wait(Duration),
    /// Tell a worker to drop the request.
    Abort {
        /// Whom.
        target: Target,
        /// Why.
        reason: &'static str,
    },
    /// It is begun anew; for metrics and logs.
    Retried(&'static str),
    /// The end, by its own rules.
    Finish(FinishReason),
    /// The end, otherwise.
    Fail(ApiError),
}

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
    waits: u32,
    waiting: bool,
    prompt_reported: bool,
    /// Refused in this round: not asked again before the next.
    refused: Vec<WorkerId>,
    /// Broke this request: asked again only if nobody else is there.
    failed: Vec<WorkerId>,
    busy_ms: Option<u32>,
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
            waits: 0,
            waiting: false,
            prompt_reported: false,
            refused: Vec::new(),
            failed: Vec::new(),
            busy_ms: None,
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> &Phase {
        &self.phase
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
            Input::Decode(reply) => self.decode_reply(reply, out),
            Input::Item(item) => self.item(item, out),
            Input::WorkerLost(target) => self.worker_lost(&target, out),
            Input::Stalled => self.stalled(out),
            Input::WaitOver => self.wait_over(out),
            Input::StopFound => self.end_early("stop string found", Ok(FinishReason::Stop), out),
            Input::Deadline => {
                let phase = self.phase.label();
                let error = ApiError::new(
                    ErrorKind::Deadline,
                    format!("the request's time ran out while it was {phase}"),
                );
                self.end_early("deadline", Err(error), out);
            }
            Input::ClientLeft => {
                let error = ApiError::new(ErrorKind::ClientLeft, "the client left");
                self.end_early("client left", Err(error), out);
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
            (Phase::Staged { handle }, None) => {
                let context = holder(handle);
                self.no_decode_worker(context, out);
            }
            _ => {}
        }
    }

    fn no_context_worker(&mut self, out: &mut Vec<Action>) {
        // Nothing was promised to the client yet: say at once that there is no room. Later it is better
        // to wait for it.
        if self.output.is_empty() && self.retries == 0 || self.waits >= WAITS_MAX {
            let error = self.no_room("context");
            self.fail(error, out);
        } else {
            self.wait(out);
        }
    }

    fn no_decode_worker(&mut self, context: Target, out: &mut Vec<Action>) {
        if self.busy_ms.is_some() && self.waits < WAITS_MAX {
            self.wait(out);
        } else if self.busy_ms.is_some() {
            let error = self.no_room("decode");
            self.end_early("no decode worker has room", Err(error), out);
        } else {
            self.retry(
                "no decode worker can reach the KV",
                Some(context.worker),
                out,
            );
        }
    }

    fn no_room(&self, role: &str) -> ApiError {
        match self.busy_ms {
            Some(ms) => ApiError::new(
                ErrorKind::Busy,
                format!("every {role} worker is busy; try again"),
            )
            .retry_after(ms),
            None => ApiError::new(
                ErrorKind::NoWorker,
                format!("no {role} worker is serving this model; see /health and /cluster"),
            ),
        }
    }

    fn wait(&mut self, out: &mut Vec<Action>) {
        self.waits += 1;
        self.waiting = true;
        let ms = u64::from(self.busy_ms.unwrap_or(250)).clamp(50, 500);
        out.push(Action::Wait(Duration::from_millis(ms)));
    }

    fn wait_over(&mut self, out: &mut Vec<Action>) {
        if !std::mem::take(&mut self.waiting) {
            return;
        }
        self.refused.clear();
        self.busy_ms = None;
        match self.phase {
            Phase::Queued => out.push(Action::ChooseContext),
            Phase::Staged { .. } => out.push(Action::ChooseDecode),
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
            Ok(PrefillReply::Refused { refusal, .. }) => match self.refused_by(context, &refusal) {
                Ok(()) => {
                    self.phase = Phase::Queued;
                    out.push(Action::ChooseContext);
                }
                Err(error) => self.fail(error, out),
            },
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
        if !self.prompt_reported {
            self.prompt_reported = true;
            out.push(Action::Prompt {
                cached_tokens: handle.cached_tokens,
                queue_ms: handle.timings.queue_ms,
                logprobs: prompt_logprobs,
            });
        }
        self.output.push(handle.first_token);
        let logprobs = handle.first_logprobs.clone().into_iter().collect();
        let stop = handle.finish == Some(FinishReason::Stop);
        out.push(Action::Emit {
            tokens: vec![handle.first_token],
            logprobs,
            stop,
        });
        if let Some(finish) = handle.finish {
            self.phase = Phase::Done;
            return out.push(Action::Finish(finish));
        }
        self.next_round();
        self.phase = Phase::Staged { handle };
        out.push(Action::ChooseDecode);
    }

    fn decode_reply(&mut self, reply: Result<DecodeReply, NoReply>, out: &mut Vec<Action>) {
        // Tokens may overtake the answer; then it has nothing to add.
        let Phase::Pulling { handle, decode } = &self.phase else {
            return;
        };
        let (handle, decode) = (handle.clone(), decode.clone());
        match reply {
            Ok(DecodeReply::Admitted { incarnation, .. }) => {
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
                match self.refused_by(decode, &refusal) {
                    Ok(()) => out.push(Action::ChooseDecode),
                    Err(error) => self.end_early("refused by the decode worker", Err(error), out),
                }
            }
            Err(NoReply::NoResponders) => {
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

    /// Notes a refusal; an error if no other worker would take the job either.
    fn refused_by(&mut self, target: Target, refusal: &Refusal) -> Result<(), ApiError> {
        match refusal {
            Refusal::TooLong { tokens_max } => Err(ApiError::new(
                ErrorKind::ContextLength,
                format!("prompt and output exceed the {tokens_max} tokens that a worker can hold"),
            )),
            Refusal::Malformed { detail } => Err(ApiError::new(
                ErrorKind::Internal,
                format!(
                    "worker {} did not understand the job: {detail}",
                    target.worker
                ),
            )),
            Refusal::Busy { retry_after_ms } => {
                self.refused.push(target.worker);
                let soonest = self
                    .busy_ms
                    .map_or(*retry_after_ms, |ms| ms.min(*retry_after_ms));
                self.busy_ms = Some(soonest);
                Ok(())
            }
            Refusal::Draining | Refusal::WrongModel { .. } | Refusal::Unreachable { .. } => {
                self.refused.push(target.worker);
                Ok(())
            }
        }
    }

    fn item(&mut self, item: FrameItem, out: &mut Vec<Action>) {
        let decode = match &self.phase {
            Phase::Pulling { decode, .. } | Phase::Decoding { decode } => decode.clone(),
            _ => return,
        };
        if item.attempt + 1 != self.next_attempt {
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
        if !tokens.is_empty() || item.pulled.is_some() {
            self.phase = Phase::Decoding {
                decode: decode.clone(),
            };
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
                let context = self.handle().map(|handle| handle.worker.clone());
                let culprit = match failure.code {
                    FailureCode::HandleInvalid => context.unwrap_or(decode.worker),
                    _ => decode.worker,
                };
                self.worker_failed(failure, culprit, out);
            }
        }
    }

    fn worker_failed(&mut self, failure: Failure, worker: WorkerId, out: &mut Vec<Action>) {
        if failure.code.retryable() {
            self.retry(failure.code.label(), Some(worker), out);
        } else {
            let error = ApiError::new(ErrorKind::Deadline, failure.message);
            self.end_early("deadline", Err(error), out);
        }
    }

    fn worker_lost(&mut self, lost: &Target, out: &mut Vec<Action>) {
        if self.involved().contains(lost) {
            self.retry("worker lost", Some(lost.worker.clone()), out);
        }
    }

    fn stalled(&mut self, out: &mut Vec<Action>) {
        if let Phase::Pulling { decode, .. } | Phase::Decoding { decode } = &self.phase {
            let worker = decode.worker.clone();
            self.retry("decode worker fell silent", Some(worker), out);
        }
    }

    /// Begins anew with the output so far, elsewhere if possible.
    fn retry(&mut self, reason: &'static str, culprit: Option<WorkerId>, out: &mut Vec<Action>) {
        self.abort_involved(reason, out);
        self.phase = Phase::Queued;
        if let Some(finish) = self.already_finished() {
            self.phase = Phase::Done;
            return out.push(Action::Finish(finish));
        }
        if self.retries == RETRIES_MAX {
            let error = ApiError::new(
                ErrorKind::Worker,
                format!(
                    "{} tries failed, the last one because: {reason}",
                    RETRIES_MAX + 1
                ),
            );
            return self.fail(error, out);
        }
        self.retries += 1;
        self.next_round();
        if let Some(worker) = culprit.filter(|worker| !self.failed.contains(worker)) {
            self.failed.push(worker);
        }
        out.push(Action::Retried(reason));
        if self.retries == 1 {
            out.push(Action::ChooseContext);
        } else {
            self.waiting = true;
            out.push(Action::Wait(Duration::from_millis(50 << self.retries)));
        }
    }

    fn next_round(&mut self) {
        self.refused.clear();
        self.busy_ms = None;
        self.waiting = false;
    }

    /// Only the news of the end was lost: the tokens themselves say that it is over.
    fn already_finished(&self) -> Option<FinishReason> {
        let last = self.output.last()?;
        let count = self.output.len() as u32;
        if self.rules.stop_token_ids.contains(last) && count > self.rules.min_tokens {
            return Some(FinishReason::Stop);
        }
        (count >= self.rules.max_tokens).then_some(FinishReason::Length)
    }

    fn end_early(
        &mut self,
        reason: &'static str,
        end: Result<FinishReason, ApiError>,
        out: &mut Vec<Action>,
    ) {
        self.abort_involved(reason, out);
        match end {
            Ok(finish) => {
                self.phase = Phase::Done;
                out.push(Action::Finish(finish));
            }
            Err(error) => self.fail(error, out),
        }
    }

    fn fail(&mut self, error: ApiError, out: &mut Vec<Action>) {
        self.phase = Phase::Failed;
        out.push(Action::Fail(error));
    }

    /// Workers that hold something of this request now.
    pub fn involved(&self) -> Vec<Target> {
        match &self.phase {
            Phase::Queued | Phase::Done | Phase::Failed => Vec::new(),
            Phase::Prefilling { context } => vec![context.clone()],
            Phase::Staged { handle } => vec![holder(handle)],
            Phase::Decoding { decode } => vec![decode.clone()],
            Phase::Pulling { handle, decode } => {
                let context = holder(handle);
                if context == *decode {
                    vec![context]
                } else {
                    vec![context, decode.clone()]
                }
            }
        }
    }

    fn abort_involved(&self, reason: &'static str, out: &mut Vec<Action>) {
        out.extend(
            self.involved()
                .into_iter()
                .map(|target| Action::Abort { target, reason }),
        );
    }
}

fn holder(handle: &KvHandle) -> Target {
    Target {
        worker: handle.worker.clone(),
        incarnation: handle.incarnation,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_protocol::{HandleId, ModelFingerprint, Nonce, PackedTokens, PrefillTimings};
    use proptest::prelude::*;

    use crate::membership::tests::beat;
    use baton_protocol::{PROTOCOL_VERSION, RequestId, Role};

    const V: u16 = PROTOCOL_VERSION;

    fn target(name: &str) -> Target {
        Target {
            worker: WorkerId::new(name).unwrap(),
            incarnation: Incarnation(1),
        }
    }

    fn handle(worker: &str, first_token: u32) -> Box<KvHandle> {
        Box::new(KvHandle {
            worker: WorkerId::new(worker).unwrap(),
            incarnation: Incarnation(1),
            handle: HandleId(1),
            nonce: Nonce(2),
            model: ModelFingerprint::new("0".repeat(64)).unwrap(),
            kv: beat("x", Role::Both, &[]).kv,
            ranks: Vec::new(),
            valid_tokens: 3,
            lease_ms: 1000,
            first_token,
            first_logprobs: None,
            finish: None,
            cached_tokens: 0,
            timings: PrefillTimings::default(),
        })
    }

    fn ready(worker: &str, token: u32) -> Input {
        let handle = handle(worker, token);
        Input::Prefill(Ok(PrefillReply::Ready {
            v: V,
            handle,
            prompt_logprobs: None,
        }))
    }

    fn item(attempt: u32, index: u32, tokens: &[u32], end: Option<End>) -> Input {
        Input::Item(FrameItem {
            request: RequestId(1),
            attempt,
            index,
            tokens: PackedTokens(tokens.to_vec()),
            logprobs: Vec::new(),
            pulled: None,
            end,
        })
    }

    fn admitted() -> Input {
        Input::Decode(Ok(DecodeReply::Admitted {
            v: V,
            incarnation: Incarnation(1),
        }))
    }

    fn busy_prefill() -> Input {
        let refusal = Refusal::Busy {
            retry_after_ms: 700,
        };
        Input::Prefill(Ok(PrefillReply::Refused { v: V, refusal }))
    }

    struct Run {
        life: Lifecycle,
        out: Vec<Action>,
    }

    impl Run {
        fn new() -> Self {
            let mut out = Vec::new();
            let rules = Rules {
                max_tokens: 100,
                stop_token_ids: vec![2],
                min_tokens: 0,
            };
            let life = Lifecycle::new(rules, &mut out);
            out.clear();
            Self { life, out }
        }

        fn step(&mut self, input: Input) -> Vec<Action> {
            self.life.step(input, &mut self.out);
            std::mem::take(&mut self.out)
        }

        fn decoding() -> Self {
            let mut run = Self::new();
            run.step(Input::Chosen(Some(target("c"))));
            run.step(ready("c", 10));
            run.step(Input::Chosen(Some(target("d"))));
            run.step(admitted());
            run.step(item(0, 1, &[11], None));
            assert_eq!(
                run.life.phase(),
                &Phase::Decoding {
                    decode: target("d")
                }
            );
            run
        }
    }

    fn aborts(actions: &[Action]) -> Vec<&str> {
        let abort = |action: &'_ Action| match action {
            Action::Abort { target, .. } => Some(target.worker.clone()),
            _ => None,
        };
        let names: Vec<WorkerId> = actions.iter().filter_map(abort).collect();
        names
            .iter()
            .map(|name| if name.as_str() == "c" { "c" } else { "d" })
            .collect()
    }

    #[test]
    fn the_straight_road() {
        let mut run = Run::new();
        let context = target("c");
        assert_eq!(
            run.step(Input::Chosen(Some(context.clone()))),
            [Action::SendPrefill(context)]
        );
        let actions = run.step(ready("c", 10));
        assert!(matches!(actions[0], Action::Prompt { .. }));
        let first = Action::Emit {
            tokens: vec![10],
            logprobs: Vec::new(),
            stop: false,
        };
        assert_eq!(actions[1..], [first, Action::ChooseDecode]);
        let decode = target("d");
        assert_eq!(
            run.step(Input::Chosen(Some(decode.clone()))),
            [Action::SendDecode { decode, attempt: 0 }]
        );
        assert!(run.step(admitted()).is_empty());
        let end = Some(End::Finished(FinishReason::Stop));
        let actions = run.step(item(0, 1, &[11, 2], end));
        let last = Action::Emit {
            tokens: vec![11, 2],
            logprobs: Vec::new(),
            stop: true,
        };
        assert_eq!(actions, [last, Action::Finish(FinishReason::Stop)]);
        assert_eq!(run.life.output(), [10, 11, 2]);
    }

    #[test]
    fn a_first_token_that_ends_it_needs_no_decode_worker() {
        let mut run = Run::new();
        run.step(Input::Chosen(Some(target("c"))));
        let mut done = handle("c", 2);
        done.finish = Some(FinishReason::Stop);
        let reply = PrefillReply::Ready {
            v: V,
            handle: done,
            prompt_logprobs: None,
        };
        let actions = run.step(Input::Prefill(Ok(reply)));
        assert_eq!(actions.last(), Some(&Action::Finish(FinishReason::Stop)));
    }

    #[test]
    fn busy_goes_to_the_next_worker_and_then_to_the_client() {
        let mut run = Run::new();
        run.step(Input::Chosen(Some(target("c"))));
        assert_eq!(run.step(busy_prefill()), [Action::ChooseContext]);
        assert_eq!(run.life.refused(), [WorkerId::new("c").unwrap()]);
        let actions = run.step(Input::Chosen(None));
        let [Action::Fail(error)] = actions.as_slice() else {
            panic!("{actions:?}")
        };
        assert_eq!(
            (error.kind, error.retry_after_ms),
            (ErrorKind::Busy, Some(700))
        );
    }

    #[test]
    fn tokens_may_overtake_the_admission_and_duplicates_are_dropped() {
        let mut run = Run::new();
        run.step(Input::Chosen(Some(target("c"))));
        run.step(ready("c", 10));
        run.step(Input::Chosen(Some(target("d"))));
        run.step(item(0, 1, &[11, 12], None));
        assert!(run.step(admitted()).is_empty());
        assert!(run.step(item(0, 1, &[11, 12], None)).is_empty());
        let actions = run.step(item(0, 2, &[12, 13], None));
        let new = Action::Emit {
            tokens: vec![13],
            logprobs: Vec::new(),
            stop: false,
        };
        assert_eq!(actions, [new]);
    }

    #[test]
    fn a_gap_begins_anew_with_the_output_so_far() {
        let mut run = Run::decoding();
        let actions = run.step(item(0, 3, &[13], None));
        assert_eq!(aborts(&actions), ["d"]);
        assert_eq!(actions.last(), Some(&Action::ChooseContext));
        run.step(Input::Chosen(Some(target("c"))));
        assert_eq!(run.life.prefilled_output(), [10, 11]);
        run.step(ready("c", 12));
        let actions = run.step(Input::Chosen(Some(target("d"))));
        assert_eq!(
            actions,
            [Action::SendDecode {
                decode: target("d"),
                attempt: 1
            }]
        );
        assert!(
            run.step(item(0, 3, &[99], None)).is_empty(),
            "an old try's frame"
        );
        run.step(item(1, 3, &[13], None));
        assert_eq!(run.life.output(), [10, 11, 12, 13]);
    }

    #[test]
    fn a_lost_worker_is_avoided() {
        let mut run = Run::decoding();
        assert!(
            run.step(Input::WorkerLost(target("c"))).is_empty(),
            "its part is done"
        );
        run.step(Input::WorkerLost(target("d")));
        assert_eq!(run.life.failed(), [WorkerId::new("d").unwrap()]);
        assert_eq!(run.life.phase(), &Phase::Queued);
    }

    #[test]
    fn leaving_aborts_whoever_holds_something_in_every_phase() {
        let inputs = [
            Input::Chosen(Some(target("c"))),
            ready("c", 10),
            Input::Chosen(Some(target("d"))),
            item(0, 1, &[11], None),
        ];
        let expected: [&[&str]; 5] = [&[], &["c"], &["c"], &["c", "d"], &["d"]];
        for (steps, expected) in expected.iter().enumerate() {
            let mut run = Run::new();
            inputs[..steps]
                .iter()
                .cloned()
                .for_each(|input| drop(run.step(input)));
            let actions = run.step(Input::ClientLeft);
            assert_eq!(aborts(&actions), *expected, "after {steps} steps");
            assert_eq!(run.life.phase(), &Phase::Failed);
        }
    }

    #[test]
    fn only_the_news_of_the_end_was_lost() {
        let mut run = Run::decoding();
        run.step(item(0, 2, &[2], None));
        let actions = run.step(Input::Stalled);
        assert_eq!(actions.last(), Some(&Action::Finish(FinishReason::Stop)));
    }

    #[test]
    fn retries_end() {
        let mut run = Run::new();
        let mut sent = 0;
        let mut inputs = vec![Input::Chosen(Some(target("c")))];
        while let Some(input) = inputs.pop() {
            for action in run.step(input) {
                match action {
                    Action::ChooseContext => inputs.push(Input::Chosen(Some(target("c")))),
                    Action::Wait(_) => inputs.push(Input::WaitOver),
                    Action::SendPrefill(_) => {
                        sent += 1;
                        let failure = Failure::new(FailureCode::Executor, "broken");
                        inputs.push(Input::Prefill(Ok(PrefillReply::Failed { v: V, failure })));
                    }
                    _ => {}
                }
            }
        }
        assert_eq!(sent, RETRIES_MAX + 1);
        assert_eq!(run.life.phase(), &Phase::Failed);
    }

    fn any_input() -> impl Strategy<Value = Input> {
        let worker = prop_oneof![Just("c"), Just("d")];
        let failure = prop_oneof![
            Just(FailureCode::HandleInvalid),
            Just(FailureCode::Preempted),
            Just(FailureCode::Draining)
        ];
        let end = prop_oneof![
            8 => Just(None),
            1 => Just(Some(End::Finished(FinishReason::Length))),
            2 => failure.prop_map(|code| Some(End::Failed(Failure::new(code, "broken")))),
        ];
        let item = (0u32..4, 0u32..12, 0u32..4, end).prop_map(|(attempt, index, count, end)| {
            let tokens: Vec<u32> = (index..index + count).map(|i| 1000 + i).collect();
            item(attempt, index, &tokens, end)
        });
        prop_oneof![
            6 => worker.clone().prop_map(|name| Input::Chosen(Some(target(name)))),
            1 => Just(Input::Chosen(None)),
            4 => Just(Input::Prefill(Err(NoReply::TimedOut))),
            2 => Just(busy_prefill()),
            2 => Just(Input::Decode(Err(NoReply::NoResponders))),
            3 => Just(admitted()),
            12 => item,
            1 => worker.prop_map(|name| Input::WorkerLost(target(name))),
            1 => Just(Input::Stalled),
            3 => Just(Input::WaitOver),
            1 => Just(Input::StopFound),
            1 => Just(Input::ClientLeft),
        ]
    }

    proptest! {
        /// Whatever comes in whatever order: the output has no gap and no duplicate, whoever holds
        /// something is told when it is not needed, and the end is the end.
        #[test]
        fn nothing_breaks_it(inputs in prop::collection::vec((any_input(), any::<bool>()), 0..60)) {
            let mut run = Run::new();
            let mut emitted: Vec<u32> = Vec::new();
            let mut prefills = 0;
            for (input, prefill) in inputs {
                let was_ended = run.life.ended();
                let held = run.life.involved();
                // Prefill answers continue the output as a worker would.
                let input = match run.life.phase() {
                    Phase::Prefilling { context } if prefill => {
                        ready(context.worker.as_str(), 1000 + run.life.output().len() as u32)
                    }
                    _ => input,
                };
                let lost = matches!(input, Input::WorkerLost(_));
                let actions = run.step(input);
                prop_assert!(!was_ended || actions.is_empty());
                for action in &actions {
                    match action {
                        Action::Emit { tokens, .. } => emitted.extend(tokens),
                        Action::SendPrefill(_) => prefills += 1,
                        _ => {}
                    }
                }
                let failed = actions.iter().any(|a| matches!(a, Action::Fail(_) | Action::Retried(_)));
                if failed && !lost && matches!(actions[0], Action::Abort { .. }) {
                    let aborted = actions.iter().filter(|a| matches!(a, Action::Abort { .. })).count();
                    prop_assert_eq!(aborted, held.len());
                }
            }
            prop_assert_eq!(&emitted, run.life.output());
            for (i, token) in emitted.iter().enumerate() {
                prop_assert_eq!(*token, 1000 + i as u32);
            }
            prop_assert!(prefills <= (RETRIES_MAX + 1) * 40);
        }
    }
}
