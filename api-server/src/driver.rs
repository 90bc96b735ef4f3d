//! Carries one generation through its lifecycle: does what the state machine says, over the bus, and
//! tells it what came of it. One local task per choice.

mod placed;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_protocol::limits::{CONTROL_TIMEOUT_MS, PULL_TIMEOUT_MS};
use baton_protocol::{
    DecodeJob, FinishReason, Generation, PROTOCOL_VERSION, PackedTokens, PrefillJob, RequestId,
    SequenceSpec, TokenLogprobs,
};
use tokio::time::Instant;

use crate::error::{ApiError, ErrorKind};
use crate::inbox::{Event, Inbox, Registered};
use crate::lifecycle::{Action, Input, Lifecycle, Phase, Rules, Target};
use crate::router::{Constraints, Outstanding};
use crate::server::Server;

use self::placed::Placed;

/// A decode worker that said nothing of a request for this long is given up.
const STALL: Duration = Duration::from_secs(30);

/// A pull and its release, and an answer on the bus.
const PULL_STALL: Duration = Duration::from_millis(PULL_TIMEOUT_MS + 2 * CONTROL_TIMEOUT_MS);

/// After the bus lost messages: the news of the end may have been among them.
const STALL_AFTER_LOSS: Duration = Duration::from_secs(2);

/// One generation to carry out.
pub struct Job {
    /// Its id.
    pub request: RequestId,
    /// Its prompt.
    pub prompt: Arc<[u32]>,
    /// The prompt's hash chain.
    pub chain: Arc<[u64]>,
    /// The rules.
    pub generation: Generation,
    /// Report the prompt's log-probabilities.
    pub prompt_logprobs: Option<u8>,
    /// When the HTTP request came.
    pub arrived: Instant,
    /// When its time is over.
    pub deadline: Instant,
}

/// Where a generation's output goes.
pub trait Sink {
    /// What the first prefill tells of the prompt.
    fn prompt(&mut self, cached_tokens: u32, logprobs: Option<Vec<TokenLogprobs>>);
    /// New tokens; `stop`: the last one is a stop id. True if a stop string ended the text.
    fn tokens(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, stop: bool) -> bool;
    /// Sends what came since the last flush.
    fn flush(&mut self);
    /// Whether more may come: the client has read most of what was sent.
    fn has_room(&self) -> bool;
    /// Waits until there is room.
    fn room(&self) -> impl Future<Output = ()>;
    /// The end.
    fn end(&mut self, end: Result<FinishReason, ApiError>);
}

/// Carries out one generation to its end. Its inbox gets events for as long as it is registered.
pub async fn drive(
    server: Arc<Server>,
    job: Job,
    inbox: Arc<Inbox>,
    registered: Registered,
    sink: impl Sink,
) {
    let _registered = registered;
    let rules = Rules {
        max_tokens: job.generation.max_tokens,
        stop_token_ids: job.generation.stop_token_ids.clone(),
        min_tokens: job.generation.min_tokens,
    };
    let mut actions = Vec::new();
    let lifecycle = Lifecycle::new(rules, &mut actions);
    let now = Instant::now();
    server.metrics.requests_in_flight.inc();
    let mut driver = Driver {
        server,
        job,
        lifecycle,
        sink,
        actions,
        reply: None,
        placed: None,
        wait_until: None,
        heard: now,
        stall_by: None,
        last_token: None,
        full_since: None,
        stop_found: false,
    };
    driver.run(&inbox).await;
}

struct Driver<S: Sink> {
    server: Arc<Server>,
    job: Job,
    lifecycle: Lifecycle,
    sink: S,
    actions: Vec<Action>,
    reply: Option<Pin<Box<dyn Future<Output = Input>>>>,
    placed: Option<Placed>,
    wait_until: Option<Instant>,
    /// When a decode worker was last heard, or asked.
    heard: Instant,
    /// Set after a loss on the bus: something must be heard until then.
    stall_by: Option<Instant>,
    last_token: Option<Instant>,
    /// The client has left the sink full since then.
    full_since: Option<Instant>,
    /// The text has come to a stop string.
    stop_found: bool,
}

impl<S: Sink> Driver<S> {
    async fn run(&mut self, inbox: &Inbox) {
        let mut events = VecDeque::new();
        self.carry_out();
        self.sink.flush();
        let timer = tokio::time::sleep_until(self.wake_at());
        tokio::pin!(timer);
        while !self.lifecycle.ended() {
            self.note_room();
            // Times only move away while tokens come, so a timer that fires early is set again then.
            if self.wake_at() < timer.deadline() {
                timer.as_mut().reset(self.wake_at());
            }
            tokio::select! {
                biased;
                // Noted at the top: a client that has read is not one that does not read, however long the next token takes.
                () = self.sink.room(), if self.full_since.is_some() => {}
                () = next_events(&self.sink, inbox, &mut events) => {
                    // What there is no room for stays as it came: token ids, bounded by max_tokens.
                    while self.sink.has_room() && let Some(event) = events.pop_front() {
                        self.event(event);
                    }
                }
                input = reply(&mut self.reply) => {
                    self.reply = None;
                    self.input(input);
                }
                () = self.server.decode_room.notified(), if self.waits_for_decode() => {
                    self.wait_until = None;
                    self.server.metrics.decode_room_total.inc();
                    self.input(Input::RoomMade);
                }
                () = timer.as_mut() => {
                    self.time(Instant::now());
                    timer.as_mut().reset(self.wake_at());
                }
            }
            self.sink.flush();
        }
    }

    /// Notes since when the sink is full. Nothing is heard of the workers meanwhile, so their clock
    /// begins anew when there is room again.
    fn note_room(&mut self) {
        if !self.sink.has_room() {
            self.full_since.get_or_insert_with(Instant::now);
        } else if self.full_since.take().is_some() {
            self.heard = Instant::now();
        }
    }

    /// Until when the client may leave the sink full.
    fn full_until(&self) -> Option<Instant> {
        Some(self.full_since? + self.server.limits.reader_stall)
    }

    fn waits_for_decode(&self) -> bool {
        self.wait_until.is_some() && matches!(self.lifecycle.phase(), Phase::Staged { .. })
    }

    fn event(&mut self, event: Event) {
        match event {
            // One that this generation was taken from has nothing to say any more, and others never had.
            Event::Item { from, .. } if self.lifecycle.decode() != Some(&*from) => {
                self.disown(&from);
            }
            Event::Item { item, .. } => {
                if let Some(placed) = &mut self.placed {
                    placed.admitted = true;
                }
                self.heard = Instant::now();
                self.stall_by = None;
                self.input(Input::Item(item));
            }
            Event::WorkerLost(target) => self.input(Input::WorkerLost(target)),
            Event::FramesLost => self.stall_by = Some(Instant::now() + STALL_AFTER_LOSS),
            Event::BusBack => {
                self.stall_by = Some(Instant::now() + STALL_AFTER_LOSS);
                self.input(Input::BusBack);
            }
            Event::ClientLeft => self.input(Input::ClientLeft),
            Event::Leaving => self.input(Input::Leaving),
        }
    }

    /// A worker still generates what was taken from it: it was deaf when it was told, or the telling was lost.
    fn disown(&self, worker: &Target) {
        if self.lifecycle.ended() {
            return;
        }
        let involved = self.lifecycle.involved();
        // An abort ends whatever its receiver has of the request, a later try too.
        if !involved.iter().any(|other| other.worker == worker.worker) {
            self.server
                .bus
                .abort(worker, self.job.request, "another worker has it now");
        }
    }

    fn input(&mut self, input: Input) {
        self.lifecycle.step(input, &mut self.actions);
        self.carry_out();
    }

    fn time(&mut self, now: Instant) {
        if now >= self.job.deadline {
            self.input(Input::Deadline);
        } else if self.wait_until.is_some_and(|until| now >= until) {
            self.wait_until = None;
            self.input(Input::WaitOver);
        } else if self.full_until().is_some_and(|until| now >= until) {
            self.input(Input::ClientStalled);
        } else if self.silent_until().is_some_and(|until| now >= until) {
            self.stall_by = None;
            self.heard = now;
            self.input(Input::Stalled);
        }
    }

    /// When something is due next.
    fn wake_at(&self) -> Instant {
        let times = [self.wait_until, self.full_until(), self.silent_until()];
        times
            .into_iter()
            .flatten()
            .fold(self.job.deadline, Instant::min)
    }

    /// Until when a decode worker may be silent.
    fn silent_until(&self) -> Option<Instant> {
        let allowed = match self.lifecycle.phase() {
            _ if self.full_since.is_some() => return None,
            Phase::Pulling { .. } => PULL_STALL,
            Phase::Decoding { .. } => STALL,
            _ => return None,
        };
        let usual = self.heard + allowed;
        Some(self.stall_by.map_or(usual, |by| by.min(usual)))
    }

    fn carry_out(&mut self) {
        while !self.actions.is_empty() {
            for action in std::mem::take(&mut self.actions) {
                self.act(action);
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::ChooseContext => {
                self.placed = None;
                let target = self.choose_context();
                self.lifecycle
                    .step(Input::Chosen(target), &mut self.actions);
            }
            Action::ChooseDecode => {
                self.placed = None;
                let target = self.choose_decode();
                self.lifecycle
                    .step(Input::Chosen(target), &mut self.actions);
            }
            Action::SendPrefill(context) => self.send_prefill(context),
            Action::SendDecode { decode, attempt } => self.send_decode(decode, attempt),
            Action::Prompt {
                cached_tokens,
                queue_ms,
                logprobs,
            } => {
                self.prompt_done(cached_tokens, queue_ms, logprobs);
            }
            Action::Pulled(report) => {
                let metrics = &self.server.metrics;
                metrics.kv_pull_seconds.observe(f64::from(report.seconds));
                metrics.kv_pull_bytes.observe(report.bytes as f64);
            }
            Action::Emit {
                tokens,
                logprobs,
                stop,
            } => self.emit(&tokens, logprobs, stop),
            Action::Wait(time) => {
                self.placed = None;
                self.wait_until = Some(Instant::now() + time);
            }
            Action::Abort { target, reason } => {
                self.server.bus.abort(&target, self.job.request, reason);
            }
            Action::Retried(reason) => {
                tracing::warn!(request = %self.job.request, reason, "generation begun anew");
                self.server
                    .metrics
                    .retries_total
                    .with_label_values(&[reason])
                    .inc();
            }
            // The token that completes a stop string may be the last of max_tokens too.
            Action::Finish(_) if self.stop_found => self.end(Ok(FinishReason::Stop)),
            Action::Finish(finish) => self.end(Ok(finish)),
            Action::Fail(error) => {
                let error = self.explained(error);
                self.end(Err(error));
            }
        }
    }

    /// Where nobody can serve, or the bus cannot bring an answer, that is said too.
    fn explained(&self, mut error: ApiError) -> ApiError {
        if error.kind == ErrorKind::NoWorker {
            let faults = self.server.faults();
            for fault in faults.iter().rev() {
                error.message = format!("{fault}: {}", error.message);
            }
        } else if error.kind == ErrorKind::Deadline
            && let Some(fault) = self.server.bus.fault(Instant::now())
        {
            error.message = format!("{}; {fault}", error.message);
        }
        error
    }

    fn choose_context(&self) -> Option<Target> {
        let fleet = &mut *self.server.fleet();
        let rules = self.constraints();
        let prompt_tokens = self.job.prompt.len() + self.lifecycle.output().len();
        fleet
            .router
            .choose_context(&fleet.members, rules, prompt_tokens, &self.job.chain)
    }

    fn choose_decode(&self) -> Option<Target> {
        let handle = self.lifecycle.handle()?;
        let fleet = &mut *self.server.fleet();
        fleet
            .router
            .choose_decode(&fleet.members, self.constraints(), handle)
    }

    fn constraints(&self) -> Constraints<'_> {
        Constraints {
            model: &self.server.model.fingerprint,
            refused: self.lifecycle.refused(),
            failed: self.lifecycle.failed(),
            now: Instant::now(),
        }
    }

    fn send_prefill(&mut self, context: Target) {
        let job = PrefillJob {
            v: PROTOCOL_VERSION,
            request: self.job.request,
            api_server: self.server.name.clone(),
            api_incarnation: Some(self.server.incarnation),
            budget_ms: self.budget_ms(),
            model: self.server.model.fingerprint.clone(),
            sequence: self.sequence(),
            prompt_logprobs: self
                .job
                .prompt_logprobs
                .filter(|_| self.lifecycle.output().is_empty()),
        };
        let tokens = job.sequence.tokens.0.len();
        let outstanding = Outstanding {
            prefills: 1,
            prefill_tokens: tokens,
            decodes: 0,
        };
        self.placed = Some(Placed::new(&self.server, &context, outstanding));
        // A second more than the deadline, which ends the wait.
        let timeout = self.remaining() + Duration::from_secs(1);
        let bus = self.server.bus.clone();
        self.reply = Some(Box::pin(async move {
            Input::Prefill(bus.prefill(&context, &job, timeout).await)
        }));
    }

    fn send_decode(&mut self, decode: Target, attempt: u32) {
        let Some(handle) = self.lifecycle.handle().cloned() else {
            return;
        };
        let job = DecodeJob {
            v: PROTOCOL_VERSION,
            request: self.job.request,
            api_server: self.server.name.clone(),
            api_incarnation: Some(self.server.incarnation),
            attempt,
            budget_ms: self.budget_ms(),
            sequence: self.sequence(),
            handle,
        };
        let outstanding = Outstanding {
            decodes: 1,
            ..Outstanding::default()
        };
        self.placed = Some(Placed::new(&self.server, &decode, outstanding));
        self.heard = Instant::now();
        self.stall_by = None;
        let bus = self.server.bus.clone();
        let timeout = Duration::from_millis(CONTROL_TIMEOUT_MS);
        self.reply = Some(Box::pin(async move {
            Input::Decode(bus.decode(&decode, &job, timeout).await)
        }));
    }

    /// The sequence as the context worker gets it, or got it.
    fn sequence(&self) -> SequenceSpec {
        let output = self.lifecycle.prefilled_output();
        let mut tokens = Vec::with_capacity(self.job.prompt.len() + output.len());
        tokens.extend_from_slice(&self.job.prompt);
        tokens.extend_from_slice(output);
        SequenceSpec {
            tokens: PackedTokens(tokens),
            prompt_tokens: self.job.prompt.len() as u32,
            generation: self.job.generation.clone(),
        }
    }

    fn remaining(&self) -> Duration {
        self.job.deadline.saturating_duration_since(Instant::now())
    }

    fn budget_ms(&self) -> u32 {
        u32::try_from(self.remaining().as_millis()).unwrap_or(u32::MAX)
    }

    fn prompt_done(&mut self, cached: u32, queue_ms: f32, logprobs: Option<Vec<TokenLogprobs>>) {
        let metrics = &self.server.metrics;
        metrics.queue_seconds.observe(f64::from(queue_ms) / 1e3);
        metrics
            .tokens_total
            .with_label_values(&["prompt"])
            .inc_by(self.job.prompt.len() as u64);
        metrics
            .tokens_total
            .with_label_values(&["cached"])
            .inc_by(u64::from(cached));
        self.sink.prompt(cached, logprobs);
    }

    fn emit(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, stop: bool) {
        let now = Instant::now();
        let metrics = &self.server.metrics;
        match self.last_token {
            None => metrics
                .ttft_seconds
                .observe((now - self.job.arrived).as_secs_f64()),
            Some(last) => {
                let each = (now - last).as_secs_f64() / tokens.len() as f64;
                metrics.inter_token_seconds.observe(each);
            }
        }
        self.last_token = Some(now);
        if let Phase::Staged { handle } = self.lifecycle.phase() {
            self.server
                .fleet()
                .router
                .remember(&handle.worker, &self.job.chain);
        }
        if self.sink.tokens(tokens, logprobs, stop) {
            self.stop_found = true;
            self.actions.clear();
            self.lifecycle.step(Input::StopFound, &mut self.actions);
        }
    }

    fn end(&mut self, end: Result<FinishReason, ApiError>) {
        self.placed = None;
        self.reply = None;
        let outcome = match &end {
            Ok(FinishReason::Stop) => "stop",
            Ok(FinishReason::Length) => "length",
            Err(error) => error.kind.row().label,
        };
        let metrics = &self.server.metrics;
        metrics.requests_total.with_label_values(&[outcome]).inc();
        let output = self.lifecycle.output().len() as u64;
        metrics
            .tokens_total
            .with_label_values(&["output"])
            .inc_by(output);
        if let Err(error) = &end {
            tracing::info!(request = %self.job.request, outcome, %error, "generation failed");
        }
        self.sink.end(end);
    }
}

impl<S: Sink> Drop for Driver<S> {
    fn drop(&mut self) {
        self.server.metrics.requests_in_flight.dec();
        // Dropped before its end: the server is going down.
        for target in self.lifecycle.involved() {
            self.server
                .bus
                .abort(&target, self.job.request, "api server is leaving");
        }
    }
}

/// Waits for room, and then for events unless some are left.
async fn next_events(sink: &impl Sink, inbox: &Inbox, events: &mut VecDeque<Event>) {
    sink.room().await;
    if events.is_empty() {
        inbox.take(events).await;
    }
}

async fn reply(pending: &mut Option<Pin<Box<dyn Future<Output = Input>>>>) -> Input {
    match pending {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
