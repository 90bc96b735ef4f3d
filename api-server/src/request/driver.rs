//! Carries one generation through its lifecycle: does what the state machine says, over the bus, and
//! tells it what came of it. One local task per choice.

mod attainment;
mod clock;
mod count;
mod handed;
mod jobs;
mod lease;
mod placed;
mod silence;
mod trace;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_protocol::{
    CacheSalt, DecodeReply, FinishReason, Generation, KvHandle, PrefillReply, RequestId,
    TokenLogprobs,
};
use tokio::time::Instant;

use crate::bus::PromptReports;
use crate::error::{ApiError, ErrorKind};
use crate::fleet::router::Source;
use crate::request::decode_room::Ticket;
use crate::request::inbox::{Event, Inbox, Registered};
use crate::request::lifecycle::{Action, Input, Lifecycle, Phase, Rules, Target};
use crate::request::running::{Begun, Shown, Stage};
use crate::request::trace::RequestTrace;
use crate::server::Server;
use crate::service::{Class, ServiceLevel};

use self::attainment::Attainment;
use self::handed::Handed;
use self::lease::Lease;
use self::placed::Placed;
use self::silence::Silence;
use self::trace::GenerationTrace;

/// Time between two words to a worker that generates what it should not have any more.
const DISOWN_INTERVAL: Duration = Duration::from_millis(100);

/// One generation to carry out.
pub struct Job {
    /// Its id.
    pub request: RequestId,
    /// Its prompt.
    pub prompt: Arc<[u32]>,
    /// The prompt's hash chain.
    pub chain: Arc<[u64]>,
    /// Whose KV it may use.
    pub cache_salt: CacheSalt,
    /// The rules.
    pub generation: Generation,
    /// Report the prompt's log-probabilities.
    pub prompt_logprobs: Option<u8>,
    /// Who goes first.
    pub class: Class,
    /// What it was promised.
    pub level: ServiceLevel,
    /// When the HTTP request came.
    pub arrived: Instant,
    /// When its time is over.
    pub deadline: Instant,
    /// Its request's trace, where that is recorded.
    pub trace: Option<RequestTrace>,
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
    let attainment = Attainment::default();
    let shown = server.running.begin(Begun {
        request: job.request,
        class: job.class,
        arrived: job.arrived,
        prompt_tokens: job.prompt.len(),
        more: attainment.counter(),
    });
    let mut driver = Driver {
        server,
        trace: GenerationTrace::begin(job.trace.as_ref(), job.request),
        job,
        lifecycle,
        sink,
        actions,
        reply: None,
        prompt: None,
        prompt_reports: PromptReports::default(),
        placed: None,
        running: None,
        pull: None,
        source: None,
        lease: None,
        handed: Handed::default(),
        ticket: None,
        wait_until: None,
        silence: Silence::new(now),
        disown_next: now,
        full_since: None,
        stop_found: false,
        attainment,
        shown,
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
    /// The answer to the question for the first token of a prompt that is streamed.
    prompt: Option<Pin<Box<dyn Future<Output = Input>>>>,
    /// Of the context worker that is to answer `reply`.
    prompt_reports: PromptReports,
    placed: Option<Placed>,
    /// That prompt, on its context worker.
    running: Option<Placed>,
    /// Its KV, on its way to a decode worker.
    pull: Option<Placed>,
    /// Where that prompt's beginning is to be pulled from.
    source: Option<Source>,
    /// Of the KV that waits for a decode worker or is being pulled.
    lease: Option<Lease>,
    /// How long that KV waits for a decode worker.
    handed: Handed,
    /// Its place among those that wait for room.
    ticket: Option<Ticket>,
    wait_until: Option<Instant>,
    /// Of the decode worker.
    silence: Silence,
    /// When a worker may be told again that this generation was taken from it.
    disown_next: Instant,
    /// The client has left the sink full since then.
    full_since: Option<Instant>,
    /// The text has come to a stop string.
    stop_found: bool,
    attainment: Attainment,
    /// Its spans, where they are recorded.
    trace: Option<Box<GenerationTrace>>,
    /// Where it stands, for whoever asks what runs.
    shown: Shown,
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
                // Before the reply: so the question goes out before the job by which a decode worker comes to ask it too.
                input = reply(&mut self.prompt) => {
                    self.prompt = None;
                    self.input(input);
                }
                input = reply(&mut self.reply) => {
                    self.reply = None;
                    self.input(input);
                }
                is_alive = renewed(&mut self.lease) => {
                    // One that is being pulled may just have been released: then its decode worker says what came of it.
                    if !is_alive {
                        self.input(Input::LeaseLost);
                    }
                }
                () = told(self.ticket.as_ref()), if self.waits_for_decode() => {
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
                self.silence.heard(Instant::now());
                self.input(Input::Item(item));
            }
            Event::PromptReported { from } => match self.lifecycle.phase() {
                Phase::Prefilling { context } if *context == *from => {
                    self.prompt_reports.note(Instant::now());
                }
                _ => self.disown(&from),
            },
            Event::WorkerLost(target) => self.input(Input::WorkerLost(target)),
            Event::FramesLost => self.silence.lost(Instant::now()),
            Event::BusBack => {
                self.silence.lost(Instant::now());
                self.input(Input::BusBack);
            }
            Event::ClientLeft => self.input(Input::ClientLeft),
            Event::Leaving => self.input(Input::Leaving),
            Event::NameLost => self.input(Input::NameLost),
        }
    }

    /// A worker still generates what was taken from it: it was deaf when it was told, or the telling was lost. It names the request
    /// again with each step until it has heard, so that it is told now and then, not each time.
    fn disown(&mut self, worker: &Target) {
        let now = Instant::now();
        if self.lifecycle.ended() || now < self.disown_next {
            return;
        }
        self.disown_next = now + DISOWN_INTERVAL;
        let involved = self.lifecycle.involved();
        // An abort ends whatever its receiver has of the request, a later try too.
        if !involved.iter().any(|other| other.worker == worker.worker) {
            let bus = &self.server.bus;
            bus.abort_stray(worker, self.job.request, "another worker has it now");
        }
    }

    fn input(&mut self, input: Input) {
        let is_handle = matches!(input, Input::Prefill(_) | Input::Progress(_));
        if let (Input::Decode(Ok(DecodeReply::Admitted { .. })), Some(placed)) =
            (&input, &mut self.placed)
        {
            placed.admitted = true;
        }
        if let Input::Prefill(Ok(
            PrefillReply::Begun { handle, .. } | PrefillReply::Ready { handle, .. },
        )) = &input
            && let Some(pull) = handle.prefix_pull
        {
            self.server.metrics.observe_prefix_pull(pull);
        }
        if let Some(trace) = &mut self.trace {
            trace.hears(&input);
        }
        self.lifecycle.step(input, &mut self.actions);
        self.settle();
        // The lease of a prompt that runs needs no renewal.
        if is_handle
            && let Some(handle) = self.lifecycle.handle()
            && !handle.is_streamed()
        {
            self.lease = Some(Lease::new(self.job.request, handle, Instant::now()));
        }
        self.carry_out();
        if !self.lifecycle.handle().is_some_and(KvHandle::is_streamed) {
            (self.prompt, self.running) = (None, None);
        }
        if !matches!(self.lifecycle.phase(), Phase::Pulling { .. }) {
            self.pull = None;
        }
        let has_place = self.placed.as_ref().is_some_and(|placed| placed.admitted);
        self.note_handed(has_place);
        if self.lifecycle.handle().is_none() {
            (self.lease, self.ticket) = (None, None);
        } else if has_place {
            self.ticket = None;
        }
    }

    /// Ends the spans of tries that are over.
    fn settle(&mut self) {
        if let Some(trace) = &mut self.trace {
            trace.settle(self.lifecycle.phase());
        }
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
                self.shown.note(|place| place.stage = Stage::Queued);
                let input = match self.overbooked() {
                    Some(overbooked) => overbooked,
                    None => self.context_chosen(),
                };
                self.lifecycle.step(input, &mut self.actions);
            }
            Action::ChooseDecode => {
                self.placed = self.staged();
                // One whose prompt still runs waits for nobody.
                if !self.lifecycle.handle().is_some_and(KvHandle::is_streamed) {
                    self.shown.note(|place| place.stage = Stage::Staged);
                }
                let lease = self.lease.as_ref();
                let input = match lease.is_some_and(|lease| lease.is_over(Instant::now())) {
                    true => Input::LeaseLost,
                    false => {
                        let chosen = self.choose_decode();
                        if self.must_wait_for_prompt(chosen.as_ref()) {
                            return;
                        }
                        Input::Chosen(chosen)
                    }
                };
                self.lifecycle.step(input, &mut self.actions);
            }
            Action::SendPrefill(context) => {
                self.shown.note(|place| {
                    place.stage = Stage::Prefilling;
                    place.workers = [Some(context.worker.clone()), None];
                });
                self.send_prefill(context);
            }
            Action::AwaitPrompt => self.await_prompt(),
            Action::SendDecode { decode, attempt } => {
                self.shown.note(|place| {
                    place.stage = Stage::Pulling;
                    place.workers[1] = Some(decode.worker.clone());
                });
                self.send_decode(decode, attempt);
            }
            Action::Prompt {
                cached_tokens,
                queue_ms,
                logprobs,
            } => {
                self.prompt_done(cached_tokens, queue_ms, logprobs);
            }
            Action::Pulled(report) => {
                self.shown.note(|place| place.stage = Stage::Decoding);
                let metrics = &self.server.metrics;
                metrics.kv_pull_seconds.observe(f64::from(report.seconds));
                metrics.kv_pull_bytes.observe(report.bytes as f64);
                if let Some(seconds) = report.handover_seconds {
                    metrics.kv_handover_seconds.observe(f64::from(seconds));
                }
                if let Some(parts) = report.parts {
                    metrics.observe_pull(parts);
                }
            }
            Action::Emit {
                tokens,
                logprobs,
                stop,
            } => self.emit(&tokens, logprobs, stop),
            Action::Wait(time) => {
                self.wait_until = Some(Instant::now() + time);
                if let Phase::Staged { .. } = self.lifecycle.phase() {
                    let (room, service) = (&self.server.decode_room, self.service());
                    let ticket = self.ticket.get_or_insert_with(|| room.wait(service));
                    ticket.waits_on();
                } else {
                    self.placed = None;
                    if let Some(trace) = &mut self.trace {
                        trace.waits();
                    }
                }
            }
            Action::Abort { target, reason } => {
                self.server.bus.abort(&target, self.job.request, reason);
            }
            Action::Retried(reason) => {
                self.shown.note(|place| place.stage = Stage::Queued);
                tracing::warn!(request = %self.job.request, reason, "generation retried");
                self.server
                    .metrics
                    .retries_total
                    .with_label_values(&[reason])
                    .inc();
            }
            // The token that completes a stop string may be the last of max_tokens too.
            Action::Finish(_) if self.stop_found => self.end(Ok(FinishReason::Stop)),
            // To a client it is a text that ended by itself.
            Action::Finish(FinishReason::Whole) => self.end(Ok(FinishReason::Stop)),
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

    fn emit(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, stop: bool) {
        let now = Instant::now();
        let metrics = &self.server.metrics;
        match self.attainment.last() {
            None => {
                let ttft = now - self.job.arrived;
                metrics.ttft_seconds.observe(ttft.as_secs_f64());
                self.shown.note(|place| place.first = Some(now));
                if let Some(trace) = &mut self.trace {
                    trace.first_token(now);
                }
            }
            Some(last) => {
                let each = (now - last).as_secs_f64() / tokens.len() as f64;
                metrics.inter_token_seconds.observe(each);
            }
        }
        self.attainment.tokens(tokens.len(), now);
        if let Some(handle) = self.lifecycle.handle() {
            self.server
                .fleet()
                .remember(&handle.worker, &self.job.chain);
        }
        if self.sink.tokens(tokens, logprobs, stop) {
            self.stop_found = true;
            self.actions.clear();
            self.lifecycle.step(Input::StopFound, &mut self.actions);
        }
    }

    fn end(&mut self, end: Result<FinishReason, ApiError>) {
        (self.placed, self.running) = (None, None);
        (self.reply, self.prompt) = (None, None);
        let outcome = match &end {
            Ok(finish) => finish.label(),
            Err(error) => error.kind.row().label,
        };
        self.count_end(&end, outcome);
        if let Err(error) = &end {
            tracing::info!(request = %self.job.request, outcome, %error, "generation failed");
        }
        self.settle();
        if let Some(trace) = self.trace.take() {
            let output = self.lifecycle.output().len();
            let cached = self.shown.place().cached_tokens;
            trace.end((self.job.prompt.len(), cached, output), &end);
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

/// Waits for the answer to a renewal; false if the lease has ended.
async fn renewed(lease: &mut Option<Lease>) -> bool {
    match lease {
        Some(lease) => lease.renewed().await,
        None => std::future::pending().await,
    }
}

/// Waits until there may be a place on a decode worker.
async fn told(ticket: Option<&Ticket>) {
    match ticket {
        Some(ticket) => ticket.told().await,
        None => std::future::pending().await,
    }
}

async fn reply(pending: &mut Option<Pin<Box<dyn Future<Output = Input>>>>) -> Input {
    match pending {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
