//! Out of service: something of this process broke or hangs, and nothing in it can mend that.
//!
//! The worker says so for a while, in its beats and to whoever has something here, refuses what comes, and ends with an error;
//! a supervisor starts it anew. What is left in the arena is unknown, so no lease is good any more.

use std::time::Duration;

use baton_protocol::{Failure, FailureCode, WorkerState};
use tokio::time::Instant;

use crate::desk::Desk;
use crate::watch::Stuck;

/// For how long a worker that is out of service still says so before it ends.
const FAILURE_SHOWN: Duration = Duration::from_secs(3);

impl Desk {
    /// The engine thread has said that the executor broke, to every try that it had too.
    pub(crate) fn on_executor_failed(&mut self, message: &str) {
        let message = format!("the executor failed: {message}");
        let keys = self.leave_service(&message);
        for key in keys {
            self.end_key(key, Some(Failure::new(FailureCode::Executor, &message)));
        }
        self.forget_all();
    }

    /// Something has not gone on for longer than it ever takes.
    pub(crate) fn on_stuck(&mut self, stuck: &Stuck) {
        if self.failure.is_some() {
            return;
        }
        let message = stuck.to_string();
        let keys = self.leave_service(&message);
        match stuck {
            Stuck::Executor { .. } => {
                self.hangs = true;
                for key in keys {
                    // The engine thread, which tells its tries otherwise, says nothing any more.
                    let failure = Failure::new(FailureCode::Executor, &message);
                    self.end_prefill(key, Some(failure.clone()));
                    self.give_decode_up(key, failure);
                }
            }
            Stuck::Transfer { .. } => {
                for key in keys {
                    self.end_key(key, Some(Failure::new(FailureCode::Internal, &message)));
                }
            }
        }
        self.forget_all();
    }

    /// Whether it was out of service for long enough.
    pub(crate) fn has_shown_failure(&self) -> bool {
        self.end_after_failure
            .is_some_and(|end| end <= Instant::now())
    }

    /// Everything that is here and has to be told.
    fn leave_service(&mut self, message: &str) -> Vec<u64> {
        self.failure = Some(message.to_owned());
        self.end_after_failure = Some(Instant::now() + FAILURE_SHOWN);
        self.state = WorkerState::Failed;
        let leases = self.leases.clear();
        let keys = self.keys_of(|_, _| true);
        tracing::error!(message, leases, requests = keys.len(), "out of service");
        keys
    }

    /// Nothing will report these as left any more.
    fn forget_all(&mut self) {
        self.prefills.clear();
        self.decodes.clear();
        self.deadlines.clear();
        self.send_beat();
    }

    /// Blocks in use while nobody holds any are lost blocks.
    pub(crate) fn look_for_strays(&mut self) {
        let busy = !self.prefills.is_empty()
            || !self.decodes.is_empty()
            || self.leases.len() > 0
            || self.failure.is_some();
        let stats = self.pool.stats();
        if busy || stats.used == 0 {
            self.stray_beats = 0;
            return;
        }
        self.stray_beats += 1;
        // A pull that was cut short may hold its blocks for a while: those are quarantined.
        if self.stray_beats == 3 && stats.quarantined == 0 {
            tracing::error!(?stats, "blocks are in use and nobody uses them: a defect");
        }
    }
}
