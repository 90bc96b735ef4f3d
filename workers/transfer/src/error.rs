//! What can go wrong with a transfer.

use std::fmt;
use std::time::Duration;

use baton_protocol::UcxVersion;
use ucx_sys::LoadError;

use crate::key::PeerKey;

/// Why a transfer, or the agent itself, failed.
#[derive(Clone, Debug, PartialEq)]
pub enum TransferError {
    /// There is no UCX on this host, or none that fits.
    Library(LoadError),
    /// UCX refused something that the agent cannot do without.
    Ucx {
        /// The call.
        call: &'static str,
        /// What UCX said.
        status: String,
    },
    /// The arena could not be made.
    Arena {
        /// Its size.
        bytes: usize,
        /// What was wrong.
        detail: String,
    },
    /// A peer's descriptor is damaged.
    Descriptor(String),
    /// The peer's UCX cannot be spoken to.
    Version {
        /// The peer's.
        theirs: UcxVersion,
        /// Ours.
        ours: UcxVersion,
    },
    /// The peer was never connected, or its connection has failed since.
    NotConnected(PeerKey),
    /// The connection failed under the transfer. The peer has to be connected again.
    PeerFailed {
        /// Which peer.
        peer: PeerKey,
        /// What was being done.
        doing: &'static str,
        /// What UCX said.
        status: String,
    },
    /// Nothing of what was outstanding on the connection ended for too long, so it was closed. The peer has to be connected again.
    Stalled {
        /// Which peer.
        peer: PeerKey,
        /// What was being done.
        doing: &'static str,
        /// How long nothing ended.
        after: Duration,
        /// What was outstanding.
        pending: usize,
    },
    /// KV could not be copied to or from host memory, here or at the peer. The connection stays.
    Staging {
        /// Which peer.
        peer: PeerKey,
        /// What was wrong.
        detail: String,
    },
    /// The transfer did not end in time. A pull's connection stays; one that was being made is closed.
    Deadline {
        /// Which peer.
        peer: PeerKey,
        /// What was being done.
        doing: &'static str,
        /// The time it was given.
        after: Duration,
        /// Requests that had not ended by then.
        pending: usize,
    },
    /// A read reaches outside an arena. Nothing was read.
    Bounds {
        /// Which arena.
        arena: &'static str,
        /// First byte of the range.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// Length of the arena.
        limit: u64,
    },
    /// A handle's runs do not describe the sequence.
    Plan(String),
    /// A bound of the agent is reached; try again later or elsewhere.
    Busy {
        /// Of what there are too many.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// The agent has stopped, or does not answer.
    Stopped,
}

impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library(error) => error.fmt(f),
            Self::Ucx { call, status } => write!(f, "UCX: {call} failed: {status}"),
            Self::Arena { bytes, detail } => {
                write!(
                    f,
                    "cannot make a KV arena of {bytes} bytes: {detail}; give it less memory or raise the limit"
                )
            }
            Self::Descriptor(detail) => {
                write!(f, "the peer's transfer descriptor is damaged: {detail}")
            }
            Self::Version { theirs, ours } => write!(
                f,
                "the peer runs UCX {theirs} and this process UCX {ours}, which cannot read each other's keys: install the same UCX on both hosts"
            ),
            Self::NotConnected(peer) => write!(f, "no connection to peer {peer}: connect it first"),
            Self::PeerFailed {
                peer,
                doing,
                status,
            } => {
                write!(
                    f,
                    "the connection to peer {peer} failed during {doing}: {status}"
                )
            }
            Self::Stalled {
                peer,
                doing,
                after,
                pending,
            } => write!(
                f,
                "the connection to peer {peer} delivered nothing for {} ms during {doing} ({pending} requests pending), so it is closed: see whether the hosts still reach each other",
                after.as_millis()
            ),
            Self::Staging { peer, detail } => {
                write!(f, "KV of peer {peer} was not staged: {detail}")
            }
            Self::Deadline {
                peer,
                doing,
                after,
                pending,
            } => write!(
                f,
                "{doing} with peer {peer} did not end within {} ms ({pending} requests pending)",
                after.as_millis()
            ),
            Self::Bounds {
                arena,
                offset,
                bytes,
                limit,
            } => write!(
                f,
                "{bytes} bytes at {offset} are not within the {arena} arena of {limit} bytes"
            ),
            Self::Plan(detail) => write!(f, "the KV handle's runs do not fit: {detail}"),
            Self::Busy { what, limit } => write!(f, "there are already {limit} {what}"),
            Self::Stopped => f.write_str("the transfer agent has stopped"),
        }
    }
}

impl std::error::Error for TransferError {}

impl From<LoadError> for TransferError {
    fn from(error: LoadError) -> Self {
        Self::Library(error)
    }
}
