//! How a peer is named.

use std::fmt;

/// Names a peer: its incarnation number, so that a restarted worker is another peer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
pub struct PeerKey(pub u64);

impl fmt::Display for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
