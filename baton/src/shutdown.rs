//! The signals that ask a process to end.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A process that has nothing left to do is gone within this time, or something keeps it.
pub const END_WAIT: Duration = Duration::from_secs(10);

/// How long a process that has nothing left to do takes to say good-bye.
pub const FAREWELL: Duration = Duration::from_secs(2);

/// SIGINT and SIGTERM, caught from the moment of creation.
pub struct Shutdown {
    interrupt: Signal,
    terminate: Signal,
}

impl Shutdown {
    /// Catches the signals from now on; needs a running Tokio runtime.
    ///
    /// # Errors
    /// If the operating system refuses the handlers.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for the next signal and names it.
    pub async fn requested(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}
