//! The thread of a rank that is not the first: does what the first one does, on its own GPU.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use baton_engine::{ExecutorError, StepPlan, TokenMask};

use super::rank::RankExecutor;
use crate::sampling::Room;

/// What all ranks are told alike.
#[derive(Clone)]
pub(super) enum Command {
    Submit(Arc<StepPlan>),
    Choose(Arc<[Option<Arc<TokenMask>>]>),
    Collect,
    MakeRoom(Room),
}

/// Commands that a rank may be behind with: the next one is told when the last has been carried out.
const BEHIND: usize = 1;

pub(super) struct RankThread {
    /// For sentences: `rank 1 (cuda:3)`.
    name: String,
    commands: Option<SyncSender<Command>>,
    replies: Receiver<Result<(), ExecutorError>>,
    /// Commands without a reply.
    outstanding: usize,
    thread: Option<JoinHandle<()>>,
}

impl RankThread {
    /// Gives the executor a thread.
    ///
    /// # Errors
    /// [`ExecutorError`] if the machine has none.
    pub(super) fn start(rank: usize, mut executor: RankExecutor) -> Result<Self, ExecutorError> {
        let name = format!("rank {rank} (cuda:{})", executor.model.device().ordinal());
        let (commands, told) = sync_channel::<Command>(BEHIND);
        let (reply, replies) = sync_channel(BEHIND);
        let thread = std::thread::Builder::new()
            .name(format!("rank-{rank}"))
            .spawn(move || {
                for command in told {
                    let done = match command {
                        Command::Submit(plan) => executor.submit(&plan),
                        Command::Choose(masks) => executor.choose(&masks),
                        Command::Collect => executor.collect().map(|_| ()),
                        Command::MakeRoom(room) => executor.make_room(room).map_err(Into::into),
                    };
                    if reply.send(done).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| ExecutorError {
                message: format!("{name} cannot have a thread: {error}"),
            })?;
        Ok(Self {
            name,
            commands: Some(commands),
            replies,
            outstanding: 0,
            thread: Some(thread),
        })
    }

    /// Tells it what to do next.
    ///
    /// # Errors
    /// [`ExecutorError`] if its thread has ended, or is behind with more than there is room for.
    pub(super) fn tell(&mut self, command: Command) -> Result<(), ExecutorError> {
        let sent = self.commands.as_ref().map(|to| to.try_send(command));
        match sent {
            Some(Ok(())) => {
                self.outstanding += 1;
                Ok(())
            }
            _ => Err(self.error("takes no more commands: its thread has ended, or hangs")),
        }
    }

    /// Waits until all it was told is done.
    ///
    /// # Errors
    /// [`ExecutorError`]: its own, or that it took longer than `at_most`.
    pub(super) fn settle(&mut self, at_most: Duration) -> Result<(), ExecutorError> {
        while self.outstanding > 0 {
            let done = self.reply(at_most)?;
            done.map_err(|error| self.error(&error.message))?;
        }
        Ok(())
    }

    /// Whether it has refused what it was told last, as another rank did. It was told one thing.
    ///
    /// # Errors
    /// [`ExecutorError`]: it took longer than `at_most`.
    pub(super) fn refused(
        &mut self,
        like: &ExecutorError,
        at_most: Duration,
    ) -> Result<bool, ExecutorError> {
        let reply = self.reply(at_most)?;
        Ok(reply.is_err_and(|error| error == *like))
    }

    fn reply(&mut self, at_most: Duration) -> Result<Result<(), ExecutorError>, ExecutorError> {
        match self.replies.recv_timeout(at_most) {
            Ok(done) => {
                self.outstanding -= 1;
                Ok(done)
            }
            Err(RecvTimeoutError::Timeout) => {
                Err(self.error(&format!("has not done its part within {at_most:?}")))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(self.error("is gone: its thread has panicked"))
            }
        }
    }

    fn error(&self, what: &str) -> ExecutorError {
        ExecutorError {
            message: format!("{}: {what}", self.name),
        }
    }
}

impl Drop for RankThread {
    fn drop(&mut self) {
        self.commands = None;
        // One that hangs in the driver cannot be ended: the process will be.
        if self.outstanding == 0
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
