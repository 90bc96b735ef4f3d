//! A set of reads from one peer.

mod lanes;

use std::ffi::c_void;
use std::rc::Rc;
use std::time::{Duration, Instant};

use baton_protocol::MemoryType;
use ucx_sys::*;

use self::lanes::{Lanes, Tally};
use crate::TransferError;
use crate::arena::Regions;
use crate::context::EMULATED_READ_BYTES;
use crate::peer::Link;

/// How much is posted at once. On a slow link [`crate::flow::Flow`] allows less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Longest single read.
    read_bytes: u64,
    /// Most reads that UCX holds for one peer at once; where GPUs read, for each pair of ranks.
    reads: usize,
}

/// Most pairs of ranks for whose reads there is room at once.
const PAIRS_MAX: usize = 8;

/// Where the transport reads host memory by itself: one read of this length blocks the agent's thread for a few
/// milliseconds only. Posting costs some 4 µs and a lone read 40 to 50 µs, so a dozen keep every transport busy;
/// more would only make a forced close longer.
const DIRECT: Window = Window {
    read_bytes: 16 << 20,
    reads: 32,
};

/// Where a GPU's copy engine reads. It comes nearer to its peak the longer a read is, and nobody waits for one: this
/// takes it 0.7 ms. Between workers of unequal sizes a read is a rank's part of one block. As many as 2,048
/// tokens need may go at once (with 32 the medians were no better; they spread by a quarter either way).
const DIRECT_GPU: Window = Window {
    read_bytes: 256 << 20,
    reads: 128,
};

/// Where the peer answers with messages: one read at a time, whose answer is one piece. If the connection
/// breaks between two pieces of an answer, or while another request waits, UCX aborts the *peer's* process;
/// with this window it never has anything to send on a connection that it knows to be broken
/// (docs/transfer.md).
const EMULATED: Window = Window {
    read_bytes: EMULATED_READ_BYTES,
    reads: 1,
};

/// A transfer posts about this much, and one read at least, before others have their turn.
const TURN_BYTES: u64 = 32 << 20;

/// One range to copy from an arena of a peer into one of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Which of the peer's arenas, by rank.
    pub source: u32,
    /// Which of ours, by rank.
    pub destination: u32,
    /// First byte in the peer's.
    pub remote_offset: u64,
    /// First byte in ours.
    pub local_offset: u64,
    /// Length.
    pub bytes: u64,
}

/// What a pull cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PullStats {
    /// Bytes read.
    pub bytes: u64,
    /// From the call to the last byte in place.
    pub seconds: f32,
}

/// Reads under way.
pub(crate) struct Reading {
    pub(crate) link: Rc<Link>,
    lanes: Lanes,
    pub(crate) started: Instant,
    pub(crate) allowed: Duration,
    /// Bytes posted so far.
    pub(crate) posted: u64,
}

/// Why a transfer cannot succeed any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// UCX's word for it.
    Ucx(ucs_status_t),
    /// A sentence.
    Said(String),
}

/// How far a transfer has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Everything is read.
    Done,
    /// Something is still to be posted or to end.
    Pending,
    /// It cannot succeed any more. Requests may still be in flight.
    Failed(Why),
    /// Its time is up. Requests may still be in flight.
    Late,
}

impl Reading {
    pub(crate) fn new(
        ucp: &Ucp,
        link: Rc<Link>,
        reads: Vec<Read>,
        started: Instant,
        allowed: Duration,
    ) -> Self {
        let tally = || Tally::new(link.flow.clone(), link.vitals.clone(), ucp.ucp_request_free);
        let lanes = Lanes::new(reads, tally);
        Self {
            link,
            lanes,
            started,
            allowed,
            posted: 0,
        }
    }

    /// Posts what may be posted now. Returns whether that was anything.
    pub(crate) fn post(&mut self, ucp: &Ucp, regions: &Regions) -> bool {
        let window = match (self.link.emulated.get(), regions.memory()) {
            (true, _) => EMULATED,
            (false, MemoryType::Host) => DIRECT,
            (false, MemoryType::Cuda) => DIRECT_GPU,
        };
        let lanes = match window == DIRECT_GPU {
            true => self.lanes.count().clamp(1, PAIRS_MAX),
            false => 1,
        };
        let flow = self.link.flow.clone();
        let turn_bytes = TURN_BYTES.max(window.read_bytes);
        let (mut turn, mut at_once, mut began) = (0, 0, None);
        let mut current = None;
        while turn < turn_bytes
            && flow.reads() < window.reads * lanes
            && self.failure().is_none()
            && let Some(bytes_max) = flow.read_bytes()
            && let Some((tally, piece)) =
                (self.lanes).next_piece(window.reads, window.read_bytes.min(bytes_max))
        {
            // Releases of UCX before 1.19 use the GPU that is current.
            if regions.all().len() > 1
                && current.replace(piece.destination) != Some(piece.destination)
                && let Err(error) = regions.of(piece.destination).bind()
            {
                tracing::error!("rank {}: {error}", piece.destination);
                tally.fail(UCS_ERR_CANCELED);
                break;
            }
            let began = *began.get_or_insert_with(Instant::now);
            flow.begin(began);
            turn += piece.bytes;
            if self.post_one(ucp, regions, &tally, piece) {
                at_once += piece.bytes;
            }
        }
        if let Some(began) = began
            && at_once > 0
        {
            flow.came_at_once(at_once, began.elapsed());
        }
        self.posted += turn;
        turn > 0
    }

    /// Whether it ended at once.
    fn post_one(&self, ucp: &Ucp, regions: &Regions, tally: &Rc<Tally>, piece: Read) -> bool {
        let region = regions.of(piece.destination);
        let remote = &self.link.regions()[piece.source as usize];
        let mut param = ucp_request_param_t {
            op_attr_mask: UCP_OP_ATTR_FIELD_CALLBACK
                | UCP_OP_ATTR_FIELD_USER_DATA
                | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
            cb: Some(on_read_end),
            user_data: Rc::as_ptr(tally).cast_mut().cast(),
            memory_type: region.ucs_memory_type(),
            ..Default::default()
        };
        if let (Some(handle), MemoryType::Cuda) = (region.handle(), region.memory()) {
            // Or UCX registers the destination again for each read, which takes 20 µs.
            param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
            param.memh = handle;
        }
        let local = region.at(piece.local_offset);
        let address = remote.base + piece.remote_offset;
        // SAFETY: the endpoint is open and has not failed; both ranges are within their arenas, as was
        // checked before the reading began; the destination is the guard's until no request is left, and
        // the tally lives as long.
        let pointer = unsafe {
            (ucp.ucp_get_nbx)(
                self.link.ep(),
                local.cast(),
                piece.bytes as usize,
                address,
                remote.rkey,
                &param,
            )
        };
        match status_of_pointer(pointer) {
            // Done, and no callback will come.
            Ok(None) => return true,
            Ok(Some(_)) => tally.posted(piece.bytes),
            Err(status) => tally.fail(status),
        }
        false
    }

    /// Posts no more; what is in flight ends by itself.
    pub(crate) fn cut(&mut self) {
        self.lanes.cut();
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.lanes.in_flight()
    }

    fn failure(&self) -> Option<ucs_status_t> {
        self.lanes.failure().or(self.link.failure())
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.started + self.allowed
    }

    pub(crate) fn progress(&self, now: Instant) -> Progress {
        if let Some(status) = self.failure() {
            Progress::Failed(Why::Ucx(status))
        } else if self.lanes.are_done() {
            Progress::Done
        } else if now >= self.deadline() {
            Progress::Late
        } else {
            Progress::Pending
        }
    }

    /// Whether each read lies within an arena of the peer's and one of ours.
    pub(crate) fn check(link: &Link, own: &Regions, reads: &[Read]) -> Result<(), TransferError> {
        let unknown = |rank: u32, whose: &str, count: usize| {
            TransferError::Plan(format!("there is no rank {rank} among {whose} {count}"))
        };
        for read in reads {
            let (theirs, ours) = (link.regions(), own.all());
            let Some(remote) = theirs.get(read.source as usize) else {
                return Err(unknown(read.source, "the peer's", theirs.len()));
            };
            let Some(local) = ours.get(read.destination as usize) else {
                return Err(unknown(read.destination, "our own", ours.len()));
            };
            within("peer's", read.remote_offset, read.bytes, remote.bytes.get())?;
            within("own", read.local_offset, read.bytes, local.bytes())?;
        }
        Ok(())
    }
}

fn within(arena: &'static str, offset: u64, bytes: u64, limit: u64) -> Result<(), TransferError> {
    match offset.checked_add(bytes) {
        Some(end) if end <= limit && bytes > 0 => Ok(()),
        _ => Err(TransferError::Bounds {
            arena,
            offset,
            bytes,
            limit,
        }),
    }
}

/// Counts a request off and frees it.
unsafe extern "C" fn on_read_end(
    request: *mut c_void,
    status: ucs_status_t,
    user_data: *mut c_void,
) {
    // SAFETY: `user_data` is the tally that `post_one` passed, alive while any request is in flight; UCX
    // calls from the agent's thread alone.
    let tally = unsafe { &*user_data.cast::<Tally>() };
    tally.ended(status);
    // SAFETY: the request has ended and this is its only owner.
    unsafe { tally.free(request) };
}
