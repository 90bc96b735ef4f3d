//! The engine without a thread: a task that turns it in the runtime's own time, for the simulation.

use std::sync::Arc;
use std::time::Duration;

use baton_engine::Engine;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use super::{EngineEvent, EngineHandle, EngineThread, Flow, Turn};
use crate::frames::TokenOutbox;

/// What the engine thread does, to be awaited.
pub(crate) struct EngineTask {
    thread: EngineThread,
    bell: Arc<Notify>,
}

impl EngineTask {
    /// As [`EngineHandle::start`], with the caller to run it.
    pub(crate) fn new(
        engine: Engine,
        tokens: Arc<TokenOutbox>,
        sequences_max: usize,
    ) -> (EngineHandle, Self, mpsc::Receiver<EngineEvent>) {
        let (handle, thread, events) = EngineHandle::new(engine, None, tokens, sequences_max);
        let bell = Arc::clone(&handle.waker.bell);
        (handle, Self { thread, bell }, events)
    }

    /// Runs until it is told to end; each step takes as long as `step_time` says. The engine, unless it broke.
    pub(crate) async fn run(mut self, mut step_time: impl FnMut() -> Duration) -> Option<Engine> {
        loop {
            match self.thread.turn() {
                Turn::On => {
                    // As with the thread, commands come while a step is under way: what they free, others may take before
                    // that step is over.
                    sleep(step_time() / 2).await;
                    if let Flow::End = self.thread.take_commands() {
                        return self.thread.engine.take();
                    }
                    sleep(step_time() / 2).await;
                }
                Turn::Wait(None) => self.bell.notified().await,
                Turn::Wait(Some(at_most)) => drop(timeout(at_most, self.bell.notified()).await),
                Turn::End => return self.thread.engine.take(),
            }
        }
    }
}
