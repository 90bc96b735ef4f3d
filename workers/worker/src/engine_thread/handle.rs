//! What the desk holds of the engine thread: commands in, events out, a bell, a gauge.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_engine::{BlockTable, Engine, Sampled};
use baton_protocol::{
    BlockRun, Failure, FinishReason, PullReport, Refusal, SequenceSpec, StepCost, TokenLogprobs,
};
use baton_traces::Span;
use baton_watchdog::Pulse;
use crossbeam_channel::{Sender, bounded};
use tokio::sync::{Notify, mpsc};

use super::EngineThread;
use crate::WorkerError;
use crate::frames::{Route, TokenOutbox};
use crate::grammars::Grammars;

/// What the engine thread is asked to do.
pub(crate) enum Command {
    /// Run a prompt; ends with [`EngineEvent::Prefilled`] or [`EngineEvent::Left`]. If it is to be streamed and takes more than
    /// one step, [`EngineEvent::Begun`] and [`EngineEvent::Computed`] tell how far it is.
    Prefill {
        key: u64,
        spec: SequenceSpec,
        prompt_logprobs: Option<u8>,
        stream: bool,
    },
    /// Go on generating; tokens go to `route`. Ends with [`EngineEvent::Left`].
    Decode {
        key: u64,
        route: Route,
        spec: SequenceSpec,
        next: u32,
        /// `next` with its log-probabilities, if the API server may not have it yet: it is sent with the first one made here.
        first: Option<Sampled>,
        blocks: BlockTable,
        pulled: PullReport,
        /// Where its trace is recorded.
        trace: Option<Box<Span>>,
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
    /// A prompt that is streamed has had its first step.
    Begun(Box<Begun>),
    /// It has had another one, not the last: KV of so many tokens is final. Left out where the channel is full; the next says more.
    Computed { key: u64, computed: u32 },
    /// A prompt is done.
    Prefilled(Box<Prefilled>),
    /// A sequence left, or was not taken.
    Left { key: u64, refusal: Option<Refusal> },
    /// A sequence ended: no next token could be chosen, or the executor refused its step. Of a decode job the API server already has the failure.
    Ended { key: u64, failure: Failure },
    /// The executor broke; every sequence is gone.
    Failed { message: String },
}

/// A prompt that takes more than one step, after the first.
pub(crate) struct Begun {
    pub(crate) key: u64,
    /// Its blocks, to its end.
    pub(crate) runs: Vec<BlockRun>,
    /// KV of so many tokens is final.
    pub(crate) computed: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) queue: Duration,
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
    /// When its last step was over.
    pub(crate) done: Instant,
}

/// How busy the engine is, as of its last step.
#[derive(Default)]
pub(crate) struct LoadGauge {
    pub(crate) waiting: AtomicU32,
    pub(crate) running: AtomicU32,
    pub(crate) waiting_tokens: AtomicU32,
    /// Of batch requests among them.
    pub(crate) batch_tokens: AtomicU32,
    pub(crate) decoding: AtomicU32,
    pub(crate) decoding_tokens: AtomicU64,
    /// Steps that the executor has refused.
    pub(crate) plans_refused: AtomicU32,
    /// What steps cost, told every [`COST_STEPS`] steps.
    cost: Mutex<Option<MeasuredCost>>,
}

/// What steps cost, and how well that predicts them.
#[derive(Clone, Debug)]
pub(crate) struct MeasuredCost {
    pub(crate) cost: StepCost,
    /// Nine of ten of the last steps were predicted within this part of what they took. `None` before the first.
    pub(crate) error: Option<f32>,
}

/// Steps between two reports of what they cost.
pub(super) const COST_STEPS: u32 = 32;

impl LoadGauge {
    /// What steps cost as of the last report; `None` if the engine does not know.
    pub(crate) fn cost(&self) -> Option<MeasuredCost> {
        self.cost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn set_cost(&self, engine: &Engine) {
        let measured = engine.cost().map(|cost| MeasuredCost {
            cost: cost.clone(),
            error: engine.cost_error(),
        });
        *self.cost.lock().unwrap_or_else(PoisonError::into_inner) = measured;
    }
}

/// Wakes the engine thread if it waits for blocks or for room in the token outbox.
#[derive(Clone)]
pub(crate) struct EngineWaker {
    commands: Sender<Command>,
    stalled: Arc<AtomicBool>,
    /// Rung with every command: what a task waits for that runs the engine without a thread.
    pub(super) bell: Arc<Notify>,
}

impl EngineWaker {
    pub(crate) fn wake(&self) {
        if self.stalled.swap(false, Ordering::AcqRel) {
            // A full channel keeps it awake as well.
            let _ = self.commands.try_send(Command::Wake);
            self.bell.notify_one();
        }
    }
}

/// The desk's end of the engine thread.
pub(crate) struct EngineHandle {
    commands: Sender<Command>,
    pub(crate) waker: EngineWaker,
    pub(crate) load: Arc<LoadGauge>,
    /// Its turns. Waiting for a command is rest; a step that does not end is none.
    pub(crate) pulse: Pulse,
    thread: Option<JoinHandle<()>>,
}

impl EngineHandle {
    /// Starts the thread. Without `grammars` it refuses sequences that have one. `sequences_max` bounds how many sequences the desk has in the engine at once; each
    /// costs at most two commands and three events, and what says how far a prompt is finds room or is left out, so neither channel
    /// overflows.
    pub(crate) fn start(
        engine: Engine,
        grammars: Option<Grammars>,
        tokens: Arc<TokenOutbox>,
        sequences_max: usize,
    ) -> Result<(Self, mpsc::Receiver<EngineEvent>), WorkerError> {
        let (mut handle, thread, events) = Self::new(engine, grammars, tokens, sequences_max);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(|| thread.run())
            .map_err(|error| WorkerError::System {
                what: "starting the engine thread",
                detail: error.to_string(),
            })?;
        handle.thread = Some(thread);
        Ok((handle, events))
    }

    /// The two ends, with nobody to run the engine yet.
    pub(super) fn new(
        engine: Engine,
        grammars: Option<Grammars>,
        tokens: Arc<TokenOutbox>,
        sequences_max: usize,
    ) -> (Self, EngineThread, mpsc::Receiver<EngineEvent>) {
        let capacity = 3 * sequences_max + 64;
        let (commands, receiver) = bounded(capacity);
        let (events, event_receiver) = mpsc::channel(capacity);
        let stalled = Arc::new(AtomicBool::new(false));
        let load = Arc::new(LoadGauge::default());
        load.set_cost(&engine);
        let pulse = Pulse::default();
        let thread = EngineThread::new(
            engine,
            receiver,
            events,
            tokens,
            stalled.clone(),
            load.clone(),
            pulse.clone(),
        )
        .with_grammars(grammars);
        let waker = EngineWaker {
            commands: commands.clone(),
            stalled,
            bell: Arc::default(),
        };
        let handle = Self {
            commands,
            waker,
            load,
            pulse,
            thread: None,
        };
        (handle, thread, event_receiver)
    }

    /// Hands a command over without waiting. False, with the command dropped, when the thread is gone or,
    /// against the stated bound, its channel full.
    #[must_use]
    pub(crate) fn send(&self, command: Command) -> bool {
        let sent = self.commands.try_send(command).is_ok();
        self.waker.bell.notify_one();
        sent
    }

    /// Lets the thread be: it is stuck, and nothing can free it but the end of the process.
    pub(crate) fn leave_behind(&mut self) {
        drop(self.thread.take());
    }

    /// Ends the thread; waits for the step under way.
    pub(crate) fn shutdown(&mut self) {
        // Dropping what it was about to do is fine here: it is to end.
        let _ = self
            .commands
            .send_timeout(Command::Shutdown, Duration::from_secs(1));
        self.waker.bell.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine thread panicked");
        }
    }
}
