//! Leaving: say so, take nothing new, finish what is there, and go.

use std::time::Duration;

use baton_bus::Intake;
use baton_protocol::{Failure, FailureCode, WorkerState};
use tokio::time::{Instant, timeout};

use crate::desk::Desk;

/// What was on its way when a worker left has come within this time.
const LATECOMERS: Duration = Duration::from_secs(1);

impl Desk {
    /// Begins to leave. From here on every job is refused, so the API servers go elsewhere.
    pub(crate) fn begin_drain(&mut self) {
        self.drain_deadline = Some(Instant::now() + self.drain);
        if self.state == WorkerState::Serving {
            self.state = WorkerState::Draining;
        }
        tracing::info!(
            prefills = self.prefills.len(),
            decodes = self.decodes.len(),
            leases = self.leases.len(),
            "draining"
        );
        self.send_beat();
    }

    /// The time to finish is over: what still runs is handed back, to be retried elsewhere, and what is staged
    /// is given up, so that whoever still comes for it is told at once and not by a connection that breaks.
    pub(crate) fn end_drain(&mut self) {
        let leases = self.leases.clear();
        let keys = self.keys_of(|_, _| true);
        if keys.len() + leases > 0 {
            tracing::info!(
                requests = keys.len(),
                leases,
                "the drain time is over: the rest is handed back"
            );
        }
        for key in keys {
            let message = "the worker left before it was done";
            self.end_key(key, Some(Failure::new(FailureCode::Draining, message)));
        }
        self.has_ended_drain = true;
    }

    /// Listens no more, and answers what was sent before the bus knew: an API server that chose this worker a moment ago goes
    /// elsewhere at once, and need not find out by its silence.
    pub(crate) async fn answer_latecomers(&mut self, inbox: &mut Intake) {
        let rest = async {
            inbox.drain();
            while let Some(message) = inbox.next().await {
                self.on_inbox(message);
            }
        };
        if timeout(LATECOMERS, rest).await.is_err() {
            tracing::debug!("the bus did not say who came late");
        }
    }

    /// When [`Desk::end_drain`] is due.
    pub(crate) fn drain_deadline_ahead(&self) -> Option<Instant> {
        self.drain_deadline.filter(|_| !self.has_ended_drain)
    }

    /// Whether it may go.
    pub(crate) fn is_drained(&self) -> bool {
        self.drain_deadline.is_some()
            && self.prefills.is_empty()
            && self.decodes.is_empty()
            && self.leases.len() == 0
    }
}
