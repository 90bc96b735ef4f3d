//! The OS thread that owns the engine.
//!
//! Commands come in through a bounded channel and events go out through another; tokens go straight to
//! the [`TokenOutbox`]. With work it steps back to back, without it sleeps until a command comes. When a
//! step finds no free block it sleeps until blocks come back, and when the bus is slow, until there is
//! room for tokens: commands (aborts above all) are carried out meanwhile.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use baton_engine::{BlockTable, Engine, Event, NewSequence, ResumedSequence, Sampled};
use baton_protocol::{
    ApiServerId, End, Failure, FailureCode, FinishReason, FrameItem, PackedTokens, PullReport,
    Refusal, SequenceSpec, TokenLogprobs,
};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use tokio::sync::mpsc;

use crate::WorkerError;
use crate::frames::{Route, TokenOutbox};

/// How long a step that found no block, or an outbox without room, is waited out when no wake-up comes.
const STALL_WAIT: Duration = Duration::from_millis(20);

/// What the engine thread is asked to do.
pub(crate) enum Command {
    /// Run a prompt; ends with [`EngineEvent::Prefilled`] or [`EngineEvent::Left`].
    Prefill {
        key: u64,
        spec: SequenceSpec,
        prompt_logprobs: Option<u8>,
    },
    /// Go on generating; tokens go to `route`. Ends with [`EngineEvent::Left`].
    Decode {
        key: u64,
        route: Route,
        spec: SequenceSpec,
        next: u32,
        blocks: BlockTable,
        pulled: PullReport,
    },
    /// End a sequence and free its blocks. A decode's API server is told the failure, if there is one.
    Abort { key: u64, failure: Option<Failure> },
    /// Look again whether something can run.
    Wake,
    /// End the thread.
    Shutdown,
}

/// What the engine thread has to say to the desk.
pub(crate) enum EngineEvent {
    /// A prompt is done.
    Prefilled(Box<Prefilled>),
    /// A sequence left, or was not taken.
    Left { key: u64, refusal: Option<Refusal> },
    /// The executor broke; every sequence is gone.
    Failed { message: String },
}

/// A prompt whose KV is in `blocks`.
pub(crate) struct Prefilled {
    pub(crate) key: u64,
    pub(crate) blocks: BlockTable,
    pub(crate) sampled: Sampled,
    pub(crate) finish: Option<FinishReason>,
    pub(crate) cached_tokens: u32,
    pub(crate) prompt_logprobs: Option<Vec<TokenLogprobs>>,
    pub(crate) queue: Duration,
    pub(crate) compute: Duration,
}

/// How busy the engine is, as of its last step.
#[derive(Default)]
pub(crate) struct LoadGauge {
    pub(crate) waiting: AtomicU32,
    pub(crate) running: AtomicU32,
    pub(crate) waiting_tokens: AtomicU32,
}

/// Wakes the engine thread if it waits for blocks or for room in the token outbox.
#[derive(Clone)]
pub(crate) struct EngineWaker {
    commands: Sender<Command>,
    stalled: Arc<AtomicBool>,
}

impl EngineWaker {
    pub(crate) fn wake(&self) {
        if self.stalled.swap(false, Ordering::AcqRel) {
            // A full channel keeps it awake as well.
            let _ = self.commands.try_send(Command::Wake);
        }
    }
}

/// Blocks held outside the engine. Giving them back wakes an engine that waits for blocks.
pub(crate) struct HeldBlocks {
    table: Option<BlockTable>,
    waker: EngineWaker,
}

impl HeldBlocks {
    pub(crate) fn new(table: BlockTable, waker: EngineWaker) -> Self {
        Self {
            table: Some(table),
            waker,
        }
    }

    pub(crate) fn table(&self) -> Option<&BlockTable> {
        self.table.as_ref()
    }

    /// Hands the blocks on.
    pub(crate) fn take(&mut self) -> Option<BlockTable> {
        self.table.take()
    }

    /// Counts the blocks as quarantined until they come back.
    pub(crate) fn quarantine(&mut self) {
        if let Some(table) = &mut self.table {
            table.quarantine();
        }
    }
}

impl Drop for HeldBlocks {
    fn drop(&mut self) {
        if self.table.take().is_some() {
            self.waker.wake();
        }
    }
}

/// The desk's end of the engine thread.
pub(crate) struct EngineHandle {
    commands: Sender<Command>,
    pub(crate) waker: EngineWaker,
    pub(crate) load: Arc<LoadGauge>,
    thread: Option<JoinHandle<()>>,
}

impl EngineHandle {
    /// Starts the thread. `sequences_max` bounds how many sequences the desk has in the engine at once; each
    /// costs at most two commands and two events, so neither channel overflows.
    pub(crate) fn start(
        engine: Engine,
        tokens: Arc<TokenOutbox>,
        sequences_max: usize,
    ) -> Result<(Self, mpsc::Receiver<EngineEvent>), WorkerError> {
        let capacity = 2 * sequences_max + 64;
        let (commands, receiver) = bounded(capacity);
        let (events, event_receiver) = mpsc::channel(capacity);
        let stalled = Arc::new(AtomicBool::new(false));
        let load = Arc::new(LoadGauge::default());
        let (thread_stalled, thread_load) = (stalled.clone(), load.clone());
        let body = move || {
            let thread = EngineThread {
                engine: Some(engine),
                commands: receiver,
                events,
                tokens,
                stalled: thread_stalled,
                load: thread_load,
                decoding: HashMap::new(),
                items: Vec::new(),
                unsaid: Vec::new(),
                checked: true,
            };
            thread.run();
        };
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(body)
            .map_err(|error| WorkerError::System {
                what: "starting the engine thread",
                detail: error.to_string(),
            })?;
        let waker = EngineWaker {
            commands: commands.clone(),
            stalled,
        };
        Ok((
            Self {
                commands,
                waker,
                load,
                thread: Some(thread),
            },
            event_receiver,
        ))
    }

    /// Hands a command over without waiting. False, with the command dropped, when the thread is gone or,
    /// against the stated bound, its channel full.
    #[must_use]
    pub(crate) fn send(&self, command: Command) -> bool {
        self.commands.try_send(command).is_ok()
    }

    /// Ends the thread; waits for the step under way.
    pub(crate) fn shutdown(&mut self) {
        // Dropping what it was about to do is fine here: it is to end.
        let _ = self
            .commands
            .send_timeout(Command::Shutdown, Duration::from_secs(1));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine thread panicked");
        }
    }
}

struct EngineThread {
    /// `None` once the executor broke.
    engine: Option<Engine>,
    commands: Receiver<Command>,
    events: mpsc::Sender<EngineEvent>,
    tokens: Arc<TokenOutbox>,
    stalled: Arc<AtomicBool>,
    load: Arc<LoadGauge>,
    decoding: HashMap<u64, Decoding>,
    /// Items of the step or command under way.
    items: Vec<(ApiServerId, FrameItem)>,
    /// Events of the step or command under way.
    unsaid: Vec<EngineEvent>,
    /// Pools were checked since the last work.
    checked: bool,
}

struct Decoding {
    route: Route,
    /// Output index of the next token.
    index: u32,
    /// Reported with the first item.
    pulled: Option<PullReport>,
}

/// Whether the thread goes on.
#[derive(Clone, Copy)]
enum Flow {
    On,
    End,
}

impl EngineThread {
    fn run(mut self) {
        loop {
            if let Flow::End = self.take_commands() {
                return;
            }
            let flow = if !self.has_work() {
                self.check_pools();
                self.wait(None)
            } else if self.tokens.has_room() && self.step() {
                Flow::On
            } else {
                self.stalled.store(true, Ordering::Release);
                self.wait(Some(STALL_WAIT))
            };
            if let Flow::End = flow {
                return;
            }
        }
    }

    fn has_work(&self) -> bool {
        self.engine.as_ref().is_some_and(Engine::has_work)
    }

    /// Carries out all commands that are there.
    fn take_commands(&mut self) -> Flow {
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if let Flow::End = self.carry_out(command) {
                        return Flow::End;
                    }
                }
                Err(TryRecvError::Empty) => {
                    self.flush();
                    return Flow::On;
                }
                Err(TryRecvError::Disconnected) => return Flow::End,
            }
        }
    }

    /// Sleeps until a command comes, or until the time is over.
    fn wait(&mut self, at_most: Option<Duration>) -> Flow {
        let command = match at_most {
            Some(at_most) => self.commands.recv_timeout(at_most),
            None => self
                .commands
                .recv()
                .map_err(|_| RecvTimeoutError::Disconnected),
        };
        match command {
            Ok(command) => self.carry_out(command),
            Err(RecvTimeoutError::Timeout) => Flow::On,
            Err(RecvTimeoutError::Disconnected) => Flow::End,
        }
    }

    fn carry_out(&mut self, command: Command) -> Flow {
        match command {
            Command::Prefill {
                key,
                spec,
                prompt_logprobs,
            } => {
                let taken = match &mut self.engine {
                    Some(engine) => engine.submit(NewSequence {
                        key,
                        spec,
                        prompt_logprobs,
                    }),
                    None => Err(Refusal::Draining),
                };
                if let Err(refusal) = taken {
                    self.say(EngineEvent::Left {
                        key,
                        refusal: Some(refusal),
                    });
                }
            }
            Command::Decode {
                key,
                route,
                spec,
                next,
                blocks,
                pulled,
            } => {
                let index = spec.output_tokens() + 1;
                let taken = match &mut self.engine {
                    Some(engine) => engine.resume(ResumedSequence {
                        key,
                        spec,
                        next,
                        blocks,
                    }),
                    None => Err(Refusal::Draining),
                };
                self.decoding.insert(
                    key,
                    Decoding {
                        route,
                        index,
                        pulled: Some(pulled),
                    },
                );
                if let Err(refusal) = taken {
                    // Its KV was released for it: another try must begin with the prompt.
                    let failure = Failure::new(FailureCode::Preempted, refusal.to_string());
                    self.end_decoding(key, End::Failed(failure));
                    self.say(EngineEvent::Left { key, refusal: None });
                }
            }
            Command::Abort { key, failure } => {
                if let Some(engine) = &mut self.engine {
                    engine.abort(key);
                }
                match failure {
                    Some(failure) => self.end_decoding(key, End::Failed(failure)),
                    None => drop(self.decoding.remove(&key)),
                }
                self.say(EngineEvent::Left { key, refusal: None });
            }
            Command::Wake => {}
            Command::Shutdown => {
                self.flush();
                return Flow::End;
            }
        }
        self.report_load();
        Flow::On
    }

    /// Runs one step and sends on what it made. False if nothing could run.
    fn step(&mut self) -> bool {
        self.checked = false;
        let Some(engine) = &mut self.engine else {
            return false;
        };
        // A panicking executor is a broken executor, and no reason to leave requests without an answer.
        let outcome = catch_unwind(AssertUnwindSafe(|| engine.step()));
        let events = match outcome {
            Ok(Ok(events)) => events,
            Ok(Err(error)) => {
                self.fail(error.to_string());
                return true;
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                self.fail(format!(
                    "it panicked: {}",
                    text.unwrap_or("without a message")
                ));
                return true;
            }
        };
        let ran = !engine.is_stalled();
        for event in events {
            self.tell(event);
        }
        self.report_load();
        self.flush();
        ran
    }

    fn tell(&mut self, event: Event) {
        match event {
            Event::Prefilled {
                key,
                blocks,
                sampled,
                finish,
                cached_tokens,
                prompt_logprobs,
                queue,
                compute,
            } => {
                self.say(EngineEvent::Prefilled(Box::new(Prefilled {
                    key,
                    blocks,
                    sampled,
                    finish,
                    cached_tokens,
                    prompt_logprobs,
                    queue,
                    compute,
                })));
            }
            Event::Token {
                key,
                index,
                sampled,
                finish,
            } => {
                let Some(decoding) = self.decoding.get_mut(&key) else {
                    return;
                };
                let mut item = decoding.item();
                item.index = index;
                item.tokens.0.push(sampled.token);
                item.logprobs.extend(sampled.logprobs);
                item.end = finish.map(End::Finished);
                decoding.index = index + 1;
                self.items.push((decoding.route.api_server.clone(), item));
                if finish.is_some() {
                    self.decoding.remove(&key);
                    self.say(EngineEvent::Left { key, refusal: None });
                }
            }
            Event::Preempted { key } => {
                let message = "no KV block was left for its next token";
                self.end_decoding(
                    key,
                    End::Failed(Failure::new(FailureCode::Preempted, message)),
                );
                self.say(EngineEvent::Left { key, refusal: None });
            }
        }
    }

    fn end_decoding(&mut self, key: u64, end: End) {
        if let Some(mut decoding) = self.decoding.remove(&key) {
            let item = FrameItem {
                end: Some(end),
                ..decoding.item()
            };
            self.items.push((decoding.route.api_server, item));
        }
    }

    /// The executor is out of service, and what it left in the arena is unknown: everything ends.
    fn fail(&mut self, message: String) {
        tracing::error!(%message, "the executor broke: this worker serves no more");
        self.engine = None;
        let keys: Vec<_> = self.decoding.keys().copied().collect();
        for key in keys {
            let failure = Failure::new(FailureCode::Executor, message.clone());
            self.end_decoding(key, End::Failed(failure));
        }
        self.report_load();
        self.say(EngineEvent::Failed { message });
        self.flush();
    }

    /// Whenever it has nothing to do, the pools must add up.
    fn check_pools(&mut self) {
        if std::mem::replace(&mut self.checked, true) {
            return;
        }
        if let Some(engine) = &self.engine
            && let Err(error) = engine.check()
        {
            tracing::error!(error, "blocks and sequences do not add up: a defect");
        }
    }

    fn report_load(&self) {
        let load = self.engine.as_ref().map(Engine::load).unwrap_or_default();
        self.load
            .waiting
            .store(load.waiting as u32, Ordering::Relaxed);
        self.load
            .running
            .store(load.running as u32, Ordering::Relaxed);
        self.load
            .waiting_tokens
            .store(load.waiting_tokens as u32, Ordering::Relaxed);
    }

    /// Hands over what steps and commands made: tokens first, so whoever hears that a sequence left can rely
    /// on its last token being on its way.
    fn flush(&mut self) {
        self.tokens.push(std::mem::take(&mut self.items));
        for event in self.unsaid.drain(..) {
            // The desk never waits for this thread, so this cannot wait for ever; without a desk nobody listens.
            let _ = self.events.blocking_send(event);
        }
    }

    fn say(&mut self, event: EngineEvent) {
        self.unsaid.push(event);
    }
}

impl Decoding {
    /// An item without tokens; the first one carries what the pull cost.
    fn item(&mut self) -> FrameItem {
        FrameItem {
            request: self.route.request,
            attempt: self.route.attempt,
            index: self.index,
            tokens: PackedTokens::default(),
            logprobs: Vec::new(),
            pulled: self.pulled.take(),
            end: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_engine::{
        EngineConfig, Executor, ExecutorError, ExecutorInfo, FakeConfig, FakeExecutor, StepOutput,
        StepPlan,
    };
    use baton_protocol::{Generation, RequestId};

    use super::*;

    /// Works until the given step, and then fails or panics.
    struct Breaking {
        inner: FakeExecutor,
        steps_left: u32,
        panics: bool,
    }

    impl Executor for Breaking {
        fn info(&self) -> &ExecutorInfo {
            self.inner.info()
        }

        fn forward(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
            if self.steps_left == 0 {
                assert!(!self.panics, "out of steps");
                return Err(ExecutorError {
                    message: "the device is gone".to_owned(),
                });
            }
            self.steps_left -= 1;
            self.inner.forward(plan)
        }
    }

    struct Fixture {
        engine: EngineHandle,
        events: mpsc::Receiver<EngineEvent>,
        tokens: Arc<TokenOutbox>,
        pool: baton_engine::BlockPool,
    }

    fn start(executor: impl Executor + 'static) -> Fixture {
        let config = EngineConfig {
            step_tokens_max: 64,
            sequences_max: 8,
            queue_max: 8,
            prefix_cache: false,
        };
        let engine = Engine::new(Box::new(executor), config);
        let pool = engine.pool();
        let tokens = Arc::new(TokenOutbox::default());
        let (engine, events) = EngineHandle::start(engine, tokens.clone(), 16).unwrap();
        Fixture {
            engine,
            events,
            tokens,
            pool,
        }
    }

    fn spec(max_tokens: u32) -> SequenceSpec {
        SequenceSpec {
            tokens: vec![5; 20].into(),
            prompt_tokens: 20,
            generation: Generation {
                max_tokens,
                ..Generation::default()
            },
        }
    }

    fn decode(fixture: &Fixture, key: u64, max_tokens: u32) {
        let route = Route {
            api_server: ApiServerId::new("api").unwrap(),
            request: RequestId(key.into()),
            attempt: 0,
        };
        let blocks = fixture.pool.reserve(2).unwrap();
        let (spec, pulled) = (spec(max_tokens), PullReport::default());
        assert!(fixture.engine.send(Command::Decode {
            key,
            route,
            spec,
            next: 7,
            blocks,
            pulled
        }));
    }

    fn breaks(panics: bool, says: &str) {
        let inner = FakeExecutor::new(FakeConfig::default());
        let mut fixture = start(Breaking {
            inner,
            steps_left: 5,
            panics,
        });
        decode(&fixture, 1, 100);
        let Some(EngineEvent::Failed { message }) = fixture.events.blocking_recv() else {
            panic!("no failure was reported");
        };
        assert!(message.contains(says), "{message}");
        let items = fixture.tokens.try_take().unwrap().servers.pop().unwrap().1;
        assert_eq!(items[0].tokens.0.len(), 5, "the tokens before it are good");
        let Some(End::Failed(failure)) = &items[0].end else {
            panic!("{items:?}")
        };
        assert_eq!(failure.code, FailureCode::Executor);
        assert_eq!(fixture.pool.stats().used, 0);

        // Whatever comes later is turned away.
        assert!(fixture.engine.send(Command::Prefill {
            key: 2,
            spec: spec(3),
            prompt_logprobs: None
        }));
        let left = fixture.events.blocking_recv();
        assert!(matches!(
            left,
            Some(EngineEvent::Left {
                key: 2,
                refusal: Some(_)
            })
        ));
        fixture.engine.shutdown();
    }

    #[test]
    fn a_failing_executor_ends_everything() {
        breaks(false, "the device is gone");
    }

    #[test]
    fn a_panicking_executor_is_a_failing_one() {
        breaks(true, "out of steps");
    }

    #[test]
    fn a_full_outbox_stops_the_engine_but_not_aborts() {
        let config = FakeConfig {
            tokens_max: 1 << 20,
            blocks: 1 << 16,
            ..FakeConfig::default()
        };
        let mut fixture = start(FakeExecutor::new(config));
        decode(&fixture, 1, 1 << 20);
        while fixture.tokens.has_room() {
            std::thread::yield_now();
        }
        // Nobody takes tokens: an abort is carried out all the same.
        assert!(fixture.engine.send(Command::Abort {
            key: 1,
            failure: None
        }));
        let left = fixture.events.blocking_recv();
        assert!(matches!(
            left,
            Some(EngineEvent::Left {
                key: 1,
                refusal: None
            })
        ));
        assert_eq!(fixture.pool.stats().used, 0);
        let taken = fixture.tokens.try_take().unwrap();
        assert!(taken.was_full);
        let count = taken.servers[0].1[0].tokens.0.len();
        assert!(count < 2 * (1 << 16), "it went on for {count} tokens");
        fixture.engine.shutdown();
    }

    #[test]
    fn blocks_that_come_back_let_a_waiting_prompt_run() {
        let config = FakeConfig {
            blocks: 4,
            ..FakeConfig::default()
        };
        let mut fixture = start(FakeExecutor::new(config));
        let held = HeldBlocks::new(
            fixture.pool.reserve(3).unwrap(),
            fixture.engine.waker.clone(),
        );
        assert!(fixture.engine.send(Command::Prefill {
            key: 1,
            spec: spec(3),
            prompt_logprobs: None
        }));
        drop(held);
        let done = fixture.events.blocking_recv();
        assert!(matches!(done, Some(EngineEvent::Prefilled(done)) if done.key == 1));
        fixture.engine.shutdown();
    }
}
