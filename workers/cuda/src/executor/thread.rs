//! The thread of a rank that is not the first: does what the first one does, on its own GPU.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use baton_engine::{ExecutorError, StepPlan, TokenMask};

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
    /// A thread that carries out commands by `work`. `name` is for sentences.
    ///
    /// # Errors
    /// [`ExecutorError`] if the machine has none.
    pub(super) fn start(
        name: String,
        mut work: impl FnMut(Command) -> Result<(), ExecutorError> + Send + 'static,
    ) -> Result<Self, ExecutorError> {
        let (commands, told) = sync_channel::<Command>(BEHIND);
        let (reply, replies) = sync_channel(BEHIND);
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                for command in told {
                    if reply.send(work(command)).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| {
                ExecutorError::failed(format!("{name} cannot have a thread: {error}"))
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
        ExecutorError::failed(format!("{}: {what}", self.name))
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

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn error(message: &str) -> ExecutorError {
        ExecutorError::failed(message)
    }

    #[test]
    fn what_ranks_refuse_alike_is_told_from_what_one_fails_at() {
        let mut rank = RankThread::start("rank 1 (cuda:3)".to_owned(), |command| match command {
            Command::Collect => Err(error("nothing was submitted")),
            _ => Ok(()),
        })
        .expect("a thread");
        rank.tell(Command::Collect).expect("told");
        let alike = error("nothing was submitted");
        assert_eq!(rank.refused(&alike, LONG), Ok(true));
        rank.tell(Command::Collect).expect("told");
        assert_eq!(rank.refused(&error("the GPU is gone"), LONG), Ok(false));
        rank.tell(Command::Choose(Arc::new([]))).expect("told");
        assert_eq!(rank.refused(&alike, LONG), Ok(false), "it has done it");
        rank.tell(Command::Collect).expect("told");
        let failed = rank.settle(LONG).expect_err("it has failed");
        assert_eq!(failed.message, "rank 1 (cuda:3): nothing was submitted");
    }

    #[test]
    fn a_rank_that_hangs_or_dies_is_named_in_time() {
        let (free, held) = sync_channel::<()>(0);
        let mut rank = RankThread::start("rank 2".to_owned(), move |_| {
            let _ = held.recv();
            panic!("as a rank may")
        })
        .expect("a thread");
        rank.tell(Command::Collect).expect("told");
        let late = rank.settle(Duration::from_millis(1)).expect_err("late");
        assert_eq!(late.message, "rank 2: has not done its part within 1ms");
        drop(free);
        let gone = rank.settle(LONG).expect_err("gone");
        assert!(gone.message.contains("its thread has panicked"), "{gone}");
        let untold = rank.tell(Command::Collect).expect_err("untold");
        assert!(untold.message.contains("takes no more"), "{untold}");
    }
}
