//! What decode workers know of context workers, and how it is told so that a beat stays small however many there are.
//!
//! A worker that knows few tells all of them with each beat. One that knows more numbers the changes: each beat says which
//! version it brings its listeners to and from which, and one that has missed a change asks for the whole.

use serde::{Deserialize, Serialize};

use crate::limits::{PEERS_MAX, SENTENCE_BYTES_MAX};
use crate::{Incarnation, WorkerId, cut};

/// Whether KV can be pulled from one context worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerState {
    /// Being connected.
    Connecting,
    /// Connected and probed.
    Ready,
    /// The last connection or pull failed; it is tried again.
    Broken,
}

/// A decode worker's view of one context worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerHealth {
    /// The context worker.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Whether pulls work.
    pub state: PeerState,
    /// UCX transports in use, as UCX names them.
    pub transport: String,
    /// Rate reached by the probe at connect, in GB/s; 0 before it.
    pub gigabytes_per_second: f32,
    /// Rate that pulls over the present connection reach, in GB/s: a moving average over the time in which something was
    /// outstanding. None before the first pull; senders of old say none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulled_gigabytes_per_second: Option<f32>,
    /// Bytes that pulls brought over the present connection; the difference between two beats is what goes over it now. Absent
    /// before the first pull; senders of old do not say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pulled_bytes: u64,
    /// The last error, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

impl PeerHealth {
    /// Bytes that it holds in memory, about.
    pub fn bytes(&self) -> usize {
        let error = self.error.as_ref().map_or(0, String::len);
        size_of::<Self>() + self.worker.as_str().len() + self.transport.len() + error
    }

    /// Its sentences, with their names.
    pub(crate) fn texts(&self) -> [(&'static str, &str); 2] {
        [
            ("peer's transport", &self.transport),
            ("peer's error", self.error.as_deref().unwrap_or_default()),
        ]
    }

    /// Cuts sentences that are too long.
    pub fn cut(&mut self) {
        for text in [Some(&mut self.transport), self.error.as_mut()]
            .into_iter()
            .flatten()
        {
            *text = cut(std::mem::take(text), SENTENCE_BYTES_MAX);
        }
    }
}

/// What a [`crate::Beat`] tells of the peers of a worker that has too many to tell all of them each time. `peers` are those
/// that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerChanges {
    /// The version that these changes follow. Whoever has not heard of it asks for all, on `peers.<worker>`.
    pub since: u64,
    /// The version after them. It only grows while the worker lives; with nothing new it equals `since`.
    pub version: u64,
    /// Peers that are no more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<WorkerId>,
}

/// Answer to a [`crate::Hello`] on `peers.<worker>`: all peers, as the beats until now have told them. A worker that is asked
/// too often answers later: ask again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeersReply {
    /// Protocol version.
    pub v: u16,
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub incarnation: Incarnation,
    /// The version that these are of.
    pub version: u64,
    /// All of them.
    pub peers: Vec<PeerHealth>,
}

impl PeersReply {
    /// Whether it holds no more than receivers keep of each worker.
    ///
    /// # Errors
    /// Which bound it breaks, as a sentence.
    pub fn check(&self) -> Result<(), String> {
        for (what, text) in self.peers.iter().flat_map(PeerHealth::texts) {
            let bytes = text.len();
            if bytes > SENTENCE_BYTES_MAX {
                return Err(format!(
                    "its {what} has {bytes} bytes, {SENTENCE_BYTES_MAX} are allowed"
                ));
            }
        }
        match self.peers.len() {
            peers if peers > PEERS_MAX => {
                Err(format!("it has {peers} peers, {PEERS_MAX} are allowed"))
            }
            _ => Ok(()),
        }
    }
}
