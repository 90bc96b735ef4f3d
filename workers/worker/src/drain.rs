//! Leaving: say so, take nothing new, finish what is there, and go.

use baton_protocol::{Failure, FailureCode, WorkerState};
use tokio::time::Instant;

use crate::desk::Desk;

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
        let keys: Vec<_> = self
            .prefills
            .keys()
            .chain(self.decodes.keys())
            .copied()
            .collect();
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
