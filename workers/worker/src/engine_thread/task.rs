//! The engine without a thread: a task that turns it in the runtime's own time, for the simulation.

use std::sync::Arc;
use std::time::Duration;

use baton_engine::Engine;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use super::{EngineEvent, EngineHandle, EngineThread, Flow, Turn};
use crate::frames::TokenOutbox;

/// How long the steps of a simulated worker take.
pub enum StepTimes {
    /// As long as is drawn. What a step made is there at its beginning, and no other begins before its time is over.
    Drawn(Box<dyn FnMut() -> Duration>),
    /// As long as the device says: the time until the oldest step in flight ends. Steps run as on the engine's thread: submitted ahead, and
    /// collected when they end.
    Device(Box<dyn Fn() -> Duration>),
}

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

    /// Runs until it is told to end. The engine, unless it broke.
    pub(crate) async fn run(self, step_times: StepTimes) -> Option<Engine> {
        match step_times {
            StepTimes::Drawn(draw) => self.run_drawn(draw).await,
            StepTimes::Device(left) => self.run_on_device(left).await,
        }
    }

    async fn run_drawn(mut self, mut draw: Box<dyn FnMut() -> Duration>) -> Option<Engine> {
        loop {
            match self.thread.turn() {
                Turn::On => {
                    // As with the thread, commands come while a step is under way: what they free, others may take before
                    // that step is over.
                    sleep(draw() / 2).await;
                    if let Flow::End = self.thread.take_commands() {
                        return self.thread.engine.take();
                    }
                    sleep(draw() / 2).await;
                }
                Turn::Wait(at_most) => self.wait(at_most).await,
                Turn::End => return self.thread.engine.take(),
            }
        }
    }

    async fn run_on_device(mut self, left: Box<dyn Fn() -> Duration>) -> Option<Engine> {
        loop {
            match self.thread.turn_with(Engine::submit_ahead) {
                Turn::On => {
                    // As the thread, which waits in the executor: commands come before the next step is planned.
                    sleep(left()).await;
                    self.thread.advance(Engine::collect);
                }
                Turn::Wait(at_most) => self.wait(at_most).await,
                Turn::End => return self.thread.engine.take(),
            }
        }
    }

    /// Until somebody rings, or until then at most.
    async fn wait(&self, at_most: Option<Duration>) {
        match at_most {
            None => self.bell.notified().await,
            Some(at_most) => drop(timeout(at_most, self.bell.notified()).await),
        }
    }
}
