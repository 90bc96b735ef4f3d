//! What passes between the agent's handle and its thread.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_protocol::TransferDescriptor;
use crossbeam_channel::Receiver;
use tokio::sync::oneshot;

use crate::TransferError;
use crate::arena::{Arena, ArenaSource};
use crate::descriptor::PeerPlan;
use crate::key::PeerKey;
use crate::probe::PeerReport;
use crate::pull::{PullStats, Read};
use crate::vitals::Vitals;
use crate::wake::Wake;

pub(crate) type Guard = Box<dyn Any + Send>;

/// What the handle asks of the thread.
pub(crate) enum Command {
    Connect {
        peer: PeerKey,
        plan: PeerPlan,
        started: Instant,
        allowed: Duration,
        reply: oneshot::Sender<Result<PeerReport, TransferError>>,
    },
    Pull {
        peer: PeerKey,
        reads: Vec<Read>,
        guard: Guard,
        started: Instant,
        allowed: Duration,
        reply: oneshot::Sender<Result<(Guard, PullStats), TransferError>>,
    },
    Disconnect {
        peer: PeerKey,
        reply: oneshot::Sender<Result<(), TransferError>>,
    },
    Shutdown,
}

/// What the thread starts from.
pub(crate) struct Setup {
    /// By rank.
    pub(crate) sources: Vec<ArenaSource>,
    pub(crate) tls: Option<String>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) vitals: Arc<Vitals>,
    pub(crate) stall_after: Duration,
}

/// What the handle learns when the thread is up.
pub(crate) struct Ready {
    /// By rank.
    pub(crate) arenas: Vec<Arena>,
    pub(crate) descriptor: TransferDescriptor,
    pub(crate) summary: String,
}
