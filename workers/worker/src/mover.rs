//! Who moves KV: the transfer agent, or what a simulation puts in its place.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_protocol::TransferDescriptor;
use baton_transfer::{Agent, AgentHealth, PeerKey, PeerReport, PullStats, Read, TransferError};

use crate::engine_thread::HeldBlocks;

/// A future of whoever carries KV.
#[cfg(feature = "simulation")]
pub type KvFuture<T> = std::pin::Pin<Box<dyn Future<Output = Result<T, TransferError>> + Send>>;

/// What carries KV between simulated workers.
#[cfg(feature = "simulation")]
pub trait KvNetwork: Send + Sync {
    /// Copies ranges of a peer's arena into this worker's. `destination` is let go when nothing writes there any
    /// more, also when the future is dropped.
    fn pull(
        &self,
        peer: PeerKey,
        reads: Vec<Read>,
        destination: Box<dyn std::any::Any + Send>,
        deadline: Duration,
    ) -> KvFuture<PullStats>;

    /// Connects to a peer.
    fn connect(&self, peer: PeerKey, deadline: Duration) -> KvFuture<PeerReport>;

    /// Closes the connection.
    fn disconnect(&self, peer: PeerKey);

    /// Whether there is a connection.
    fn is_connected(&self, peer: PeerKey) -> bool;
}

/// Destination blocks of a pull, shared with whoever may write to them.
pub(crate) type Destination = Arc<Mutex<HeldBlocks>>;

/// Moves KV. Clones share one agent.
#[derive(Clone)]
pub(crate) enum Mover {
    /// Over UCX.
    Ucx(Agent),
    /// Not at all, or as a simulation wants it.
    #[cfg(feature = "simulation")]
    Simulated(Arc<dyn KvNetwork>),
}

impl Mover {
    /// As [`Agent::pull`].
    pub(crate) async fn pull(
        &self,
        peer: PeerKey,
        reads: Vec<Read>,
        to: Destination,
        deadline: Duration,
    ) -> Result<PullStats, TransferError> {
        match self {
            Self::Ucx(agent) => Ok(agent.pull(peer, reads, to, deadline).await?.1),
            #[cfg(feature = "simulation")]
            Self::Simulated(network) => network.pull(peer, reads, Box::new(to), deadline).await,
        }
    }

    /// As [`Agent::connect`].
    pub(crate) async fn connect(
        &self,
        peer: PeerKey,
        descriptor: TransferDescriptor,
        deadline: Duration,
    ) -> Result<PeerReport, TransferError> {
        match self {
            Self::Ucx(agent) => agent.connect(peer, descriptor, deadline).await,
            #[cfg(feature = "simulation")]
            Self::Simulated(network) => network.connect(peer, deadline).await,
        }
    }

    /// As [`Agent::disconnect`].
    pub(crate) async fn disconnect(&self, peer: PeerKey) {
        match self {
            Self::Ucx(agent) => agent.disconnect(peer).await,
            #[cfg(feature = "simulation")]
            Self::Simulated(network) => network.disconnect(peer),
        }
    }

    /// As [`Agent::pulled_rate`]; a simulation measures none.
    pub(crate) fn pulled_rate(&self, peer: PeerKey) -> Option<f32> {
        match self {
            Self::Ucx(agent) => agent.pulled_rate(peer),
            #[cfg(feature = "simulation")]
            Self::Simulated(_) => None,
        }
    }

    /// As [`Agent::pulled_bytes`]; a simulation counts none.
    pub(crate) fn pulled_bytes(&self, peer: PeerKey) -> u64 {
        match self {
            Self::Ucx(agent) => agent.pulled_bytes(peer),
            #[cfg(feature = "simulation")]
            Self::Simulated(_) => 0,
        }
    }

    /// As [`Agent::is_connected`].
    pub(crate) fn is_connected(&self, peer: PeerKey) -> bool {
        match self {
            Self::Ucx(agent) => agent.is_connected(peer),
            #[cfg(feature = "simulation")]
            Self::Simulated(network) => network.is_connected(peer),
        }
    }

    /// As [`Agent::health`]; a simulation's is always well.
    pub(crate) fn health(&self) -> Option<AgentHealth> {
        match self {
            Self::Ucx(agent) => Some(agent.health()),
            #[cfg(feature = "simulation")]
            Self::Simulated(_) => None,
        }
    }
}
