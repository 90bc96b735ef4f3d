//! What a worker says of its memory, so that others can read it over UCX.

use serde::{Deserialize, Serialize};

use crate::Base64Bytes;

/// Kind of memory an arena lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryType {
    /// Main memory.
    Host,
    /// Memory of an NVIDIA GPU.
    Cuda,
}

/// Version of a UCX library: major, minor, release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UcxVersion(pub u32, pub u32, pub u32);

impl UcxVersion {
    /// Whether remote keys packed by one version can be unpacked by the other. Seen: 1.13 and 1.22
    /// over TCP cannot.
    pub fn compatible(self, other: Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl std::fmt::Display for UcxVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// One rank's registered arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRegion {
    /// Packed UCX remote key.
    pub rkey: Base64Bytes,
    /// Address of the arena in its owner's address space.
    pub base: u64,
    /// Its length.
    pub bytes: u64,
    /// Its kind of memory.
    pub memory: MemoryType,
}

/// Everything a peer needs to read a worker's arenas. Constant for one incarnation, so it is sent
/// once and not with every handle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferDescriptor {
    /// Version of the UCX library at this end.
    pub ucx: UcxVersion,
    /// UCX worker address.
    pub address: Base64Bytes,
    /// The arenas, by rank.
    pub ranks: Vec<RankRegion>,
}
