//! What the sides of a worker have in common: who it is, its engine and its arena, the way onto the bus, and the clock of its
//! requests.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_nats::Subject;
use baton_bus::Wire;
use baton_engine::BlockPool;
use baton_model::WeightFormat;
use baton_protocol::subjects::Cluster;
use baton_protocol::{Capacity, Incarnation, Role, Versioned, WorkerId};
use baton_traces::Tracer;
use tokio::task::JoinError;
use tokio::time::Instant;

use crate::bus::Outbox;
use crate::checks::Checks;
use crate::engine_thread::EngineHandle;
use crate::frames::TokenOutbox;
use crate::mover::Mover;

/// Who this worker is: what stays the same for its life and goes into every beat.
pub(crate) struct Identity {
    pub(crate) worker: WorkerId,
    pub(crate) incarnation: Incarnation,
    pub(crate) role: Role,
    pub(crate) device: String,
    /// Number of ranks.
    pub(crate) ranks: u32,
    pub(crate) weights: WeightFormat,
    pub(crate) transport: String,
    pub(crate) capacity: Capacity,
    /// Time between tokens that it keeps its steps to, in milliseconds.
    pub(crate) itl_ms: Option<u32>,
    /// Most tokens of a step.
    pub(crate) step_tokens: u32,
    /// It leases what its prefix index has to other workers, and pulls what they have.
    pub(crate) leases_prefixes: bool,
}

/// What both sides use.
pub(crate) struct Common {
    pub(crate) me: Identity,
    pub(crate) checks: Checks,
    pub(crate) cluster: Cluster,
    pub(crate) wire: Wire,
    pub(crate) outbox: Outbox,
    pub(crate) tokens: Arc<TokenOutbox>,
    pub(crate) engine: EngineHandle,
    pub(crate) pool: BlockPool,
    /// Who moves KV; `None`: this worker serves its own prompts only.
    pub(crate) mover: Option<Mover>,
    /// When a request, by the key that it has here, runs out of time.
    pub(crate) deadlines: BTreeSet<(Instant, u64)>,
    pub(crate) next_key: u64,
    /// Who makes spans of requests.
    pub(crate) tracer: Tracer,
}

impl Common {
    /// A key for a request, which is to be over at `deadline`.
    pub(crate) fn new_key(&mut self, deadline: Instant) -> u64 {
        let key = self.next_key;
        self.next_key += 1;
        self.deadlines.insert((deadline, key));
        key
    }

    /// Sends a message whose loss harms nobody for long.
    pub(crate) fn send<M: Versioned>(&self, subject: impl Into<Subject>, message: &M) {
        if let Err(error) = self.outbox.send(subject, message) {
            tracing::warn!(%error, message = M::NAME, "not sent");
        }
    }
}

/// What a task brought, or why it brought nothing. A cancelled task is no news.
pub(crate) fn task_outcome<T>(what: &str, outcome: Result<T, JoinError>) -> Option<T> {
    match outcome {
        Ok(outcome) => Some(outcome),
        Err(error) if error.is_cancelled() => None,
        Err(error) => {
            tracing::error!(%error, what, "a task panicked: a defect");
            None
        }
    }
}
