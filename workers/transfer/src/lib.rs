//! KV movement: one-sided reads from another worker's arena, over UCX.
//!
//! An [`Agent`] owns one [`Arena`] for each rank of its worker, memory that peers may read, and one thread that owns the UCX worker
//! and always progresses it: where a transport has no remote read of its own, UCX emulates it, and then
//! the side that is read from has to take part. The handle is cheap to clone and async.
//!
//! 1. A context worker sends its [`Agent::descriptor`] to decode workers, once per incarnation.
//! 2. A decode worker calls [`Agent::connect`] before the first request needs it: the connection is made,
//!    tried and measured.
//! 3. For each request a [`BlockMap`] turns block runs into ranges and [`Agent::pull`] reads them. A pull may take as long as
//!    its request has time; its connection is given up when nothing of what is outstanding on it ends for
//!    [`PULL_STALL_MS`](baton_protocol::deadlines::PULL_STALL_MS).
//!
//! What was read is not yet what was meant: only the release of the lease says so (see the protocol).
//! What the agent promises is narrower: **destination memory is never given back while UCX may still write
//! to it.** The `guard` of a pull owns the destination blocks; the agent returns it with the success or
//! drops it when the last UCX request has ended, whatever became of the caller, the peer or the deadline.
//!
//! Files: `agent` is the handle, `thread` the loop behind it, `vitals` how that fares, `worker` the UCX worker that it turns;
//! `descriptor` what a peer says of itself, `seal` the check on bytes that UCX itself would trust blindly, `peer` one connection,
//! `flow` how it fares, `probe` what is told of it; `plan` which ranges to read, `pull` one set of reads; `context` UCX's configuration,
//! `printed` what it prints, `arena` the memory, `memory` what there is of it; `stage` the transport through host memory for GPUs that
//! cannot be read in place, `staging` that memory; `wake` the bell.

mod agent;
mod arena;
mod context;
mod descriptor;
mod error;
mod flow;
mod key;
pub mod memory;
mod peer;
mod plan;
mod printed;
mod probe;
mod pull;
mod seal;
mod stage;
mod staging;
mod thread;
mod vitals;
mod wake;
mod worker;

pub use agent::{Agent, AgentConfig, AgentHealth};
pub use arena::{Arena, ArenaSource, GpuMemory, gpu_allocation_bytes};
pub use error::TransferError;
pub use key::PeerKey;
pub use plan::{BlockMap, plan_reads};
pub use probe::PeerReport;
pub use pull::{PullStats, Read};
pub use staging::{MakeStaging, STAGING_SLOT_BYTES, STAGING_SLOTS, Staging};

/// What reads bytes that peers send, for the fuzz targets and for nobody else.
#[doc(hidden)]
pub mod fuzzing {
    use std::num::NonZeroU64;
    use std::ops::Range;

    use baton_protocol::{Base64Bytes, MemoryType, RankRegion, TransferDescriptor, UcxVersion};

    use crate::TransferError;
    use crate::arena::scratch_bytes;
    use crate::descriptor::PeerPlan;
    use crate::probe::walk;
    use crate::seal::{Kind, seal};
    pub use crate::stage::ranges_asked;

    /// One arena with fields of anybody's choice, under whole seals.
    pub fn sealed(
        ucx: UcxVersion,
        address: &[u8],
        key: Option<&[u8]>,
        (base, bytes): (u64, u64),
        memory: MemoryType,
    ) -> TransferDescriptor {
        let place = Kind::Key { base, bytes };
        let rkey = key.map(|key| seal(place, key)).unwrap_or_default();
        TransferDescriptor {
            ucx,
            address: Base64Bytes(seal(Kind::Address, address)),
            ranks: vec![RankRegion {
                rkey: Base64Bytes(rkey),
                base,
                bytes,
                memory,
            }],
        }
    }

    /// What of an arena is read to try a connection to it.
    pub fn probed(arena_bytes: NonZeroU64, memory: MemoryType) -> Vec<Range<u64>> {
        walk(arena_bytes, scratch_bytes(memory) as u64).collect()
    }

    /// Takes a descriptor apart as before a connection.
    ///
    /// # Errors
    /// As [`crate::Agent::connect`].
    pub fn descriptor(
        descriptor: &TransferDescriptor,
        ours: UcxVersion,
    ) -> Result<(), TransferError> {
        PeerPlan::parse(descriptor, ours).map(drop)
    }
}
