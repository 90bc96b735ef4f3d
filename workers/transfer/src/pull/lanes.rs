//! Reads of one transfer by pair of ranks, and whose turn it is.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use ucx_sys::{UCS_OK, ucs_status_t};

use super::Read;
use crate::flow::Flow;
use crate::vitals::Vitals;

type RequestFree = unsafe extern "C" fn(*mut c_void);

/// What one rank of ours reads from one of the peer's. Between GPUs copies of one lane follow each other, and those of all lanes run
/// at the same time, so lanes take turns.
struct Lane {
    /// Of one source and one destination.
    reads: Vec<Read>,
    /// Index of the read to post next, and how much of it is posted.
    next: (usize, u64),
    tally: Rc<Tally>,
}

/// All of them. They take turns.
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    /// Index of the lane whose turn it is, and how many reads it has posted in it.
    turn: (usize, usize),
}

/// Reads that a lane posts in its turn. To make another GPU the current one costs time, and that one's copies are to begin soon too.
const TURN_READS: usize = 4;

impl Lanes {
    /// A lane, with a tally of its own, for each pair of ranks.
    pub(super) fn new(reads: Vec<Read>, tally: impl Fn() -> Tally) -> Self {
        let lane = |reads| Lane {
            reads,
            next: (0, 0),
            tally: Rc::new(tally()),
        };
        Self {
            lanes: by_pair(reads).into_iter().map(lane).collect(),
            turn: (0, 0),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.lanes.len()
    }

    /// What is to be read next, at most `bytes_max` of it, and where it is counted: from the next lane that has anything left and
    /// fewer than `reads_max` in flight.
    pub(super) fn next_piece(
        &mut self,
        reads_max: usize,
        bytes_max: u64,
    ) -> Option<(Rc<Tally>, Read)> {
        let (count, (turn, posted)) = (self.lanes.len(), self.turn);
        let has_room = |lane: &Lane| !lane.is_posted() && lane.tally.in_flight() < reads_max;
        let mut order = (0..count).map(|step| (turn + step) % count);
        let index = order.find(|&index| has_room(&self.lanes[index]))?;
        let posted = if index == turn { posted + 1 } else { 1 };
        self.turn = match posted {
            TURN_READS => ((index + 1) % count, 0),
            _ => (index, posted),
        };
        let lane = &mut self.lanes[index];
        let piece = lane.next_piece(bytes_max)?;
        Some((lane.tally.clone(), piece))
    }

    /// Nothing more is to be read.
    pub(super) fn cut(&mut self) {
        for lane in &mut self.lanes {
            lane.next = (lane.reads.len(), 0);
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.lanes.iter().map(|lane| lane.tally.in_flight()).sum()
    }

    pub(super) fn failure(&self) -> Option<ucs_status_t> {
        let of_lane = |lane: &Lane| lane.tally.failure.get();
        self.lanes.iter().find_map(of_lane)
    }

    /// Whether everything is posted and has ended.
    pub(super) fn are_done(&self) -> bool {
        let is_done = |lane: &Lane| lane.is_posted() && lane.tally.in_flight() == 0;
        self.lanes.iter().all(is_done)
    }
}

impl Lane {
    fn is_posted(&self) -> bool {
        self.next.0 == self.reads.len()
    }

    fn next_piece(&mut self, bytes_max: u64) -> Option<Read> {
        let (index, done) = self.next;
        let read = self.reads.get(index)?;
        let bytes = (read.bytes - done).min(bytes_max);
        self.next = if done + bytes == read.bytes {
            (index + 1, 0)
        } else {
            (index, done + bytes)
        };
        Some(Read {
            source: read.source,
            destination: read.destination,
            remote_offset: read.remote_offset + done,
            local_offset: read.local_offset + done,
            bytes,
        })
    }
}

/// The reads of each pair of ranks, in their order.
fn by_pair(mut reads: Vec<Read>) -> Vec<Vec<Read>> {
    let pair = |read: &Read| (read.destination, read.source);
    // Stable, and as a plan has them already.
    reads.sort_by_key(pair);
    let pairs = reads.chunk_by(|a, b| pair(a) == pair(b));
    pairs.map(<[Read]>::to_vec).collect()
}

/// Counts the requests that UCX holds. Callbacks write to it, so it lives until there are none.
pub(super) struct Tally {
    /// All of the peer's.
    flow: Rc<Flow>,
    /// All peers'.
    vitals: Arc<Vitals>,
    request_free: RequestFree,
    /// Lengths of the reads in flight. UCX does not say which one ended; counted off in the order of posting they add up.
    in_flight: RefCell<VecDeque<u64>>,
    failure: Cell<Option<ucs_status_t>>,
}

impl Tally {
    pub(super) fn new(flow: Rc<Flow>, vitals: Arc<Vitals>, request_free: RequestFree) -> Self {
        Self {
            flow,
            vitals,
            request_free,
            in_flight: RefCell::default(),
            failure: Cell::new(None),
        }
    }

    pub(super) fn fail(&self, status: ucs_status_t) {
        self.failure.set(Some(status));
    }

    /// Frees a request that has ended.
    ///
    /// # Safety
    /// It is UCX's, and the caller its only owner.
    pub(super) unsafe fn free(&self, request: *mut c_void) {
        // SAFETY: the caller's promise.
        unsafe { (self.request_free)(request) };
    }

    pub(super) fn posted(&self, bytes: u64) {
        self.in_flight.borrow_mut().push_back(bytes);
        self.flow.read_posted(bytes);
        self.count(1);
    }

    pub(super) fn ended(&self, status: ucs_status_t) {
        let bytes = self.in_flight.borrow_mut().pop_front().unwrap_or_default();
        let came = if status == UCS_OK { bytes } else { 0 };
        self.flow.read_ended(bytes, came);
        self.count(-1);
        if status != UCS_OK {
            self.fail(status);
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight.borrow().len()
    }

    fn count(&self, requests: isize) {
        // Only this thread writes it.
        let count = self.vitals.requests.load(Relaxed);
        let count = count.strict_add_signed(requests);
        self.vitals.requests.store(count, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::STALL;

    unsafe extern "C" fn nothing(_request: *mut c_void) {}

    fn lanes(reads: &[(u32, u32, u64)]) -> Lanes {
        let (flow, vitals) = (Rc::new(Flow::new(STALL)), Arc::new(Vitals::new()));
        let reads = reads.iter().enumerate();
        let reads = reads.map(|(index, &(source, destination, bytes))| Read {
            source,
            destination,
            remote_offset: 100 * index as u64,
            local_offset: 100 * index as u64,
            bytes,
        });
        Lanes::new(reads.collect(), || {
            Tally::new(flow.clone(), vitals.clone(), nothing)
        })
    }

    /// Posts all that there is room for: sources, destinations, offsets.
    fn post(lanes: &mut Lanes, reads_max: usize, bytes_max: u64) -> Vec<(u32, u32, u64)> {
        let mut posted = Vec::new();
        while let Some((tally, piece)) = lanes.next_piece(reads_max, bytes_max) {
            tally.posted(piece.bytes);
            posted.push((piece.source, piece.destination, piece.local_offset));
        }
        posted
    }

    #[test]
    fn every_pair_of_ranks_reads_at_the_same_time() {
        // As a plan has them: all of one rank, then all of the other.
        let mut reads = vec![(0, 0, 8); 9];
        reads.extend([(0, 1, 8); 9]);
        let mut lanes = lanes(&reads);
        assert_eq!(lanes.count(), 2);
        let destinations = |posted: &[(u32, u32, u64)]| {
            let destinations = posted.iter().map(|(_, destination, _)| *destination);
            destinations.collect::<Vec<_>>()
        };
        let posted = post(&mut lanes, 6, 8);
        let turns = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1];
        assert_eq!(destinations(&posted), turns);
        let first: Vec<u64> = posted.iter().map(|(_, _, offset)| *offset).collect();
        assert_eq!(first[..5], [0, 100, 200, 300, 900]);
        assert_eq!(lanes.in_flight(), 12);
        // A lane that is full holds no other up, and goes on when reads of its own have ended.
        lanes.lanes[1].tally.ended(UCS_OK);
        assert_eq!(destinations(&post(&mut lanes, 6, 8)), [1]);
        for _ in 0..3 {
            lanes.lanes[0].tally.ended(UCS_OK);
        }
        assert_eq!(destinations(&post(&mut lanes, 6, 8)), [0, 0, 0]);
        assert!(!lanes.are_done());
        assert_eq!(destinations(&post(&mut lanes, 99, 8)), [1, 1]);
        while lanes.in_flight() > 0 {
            let lane = lanes.lanes.iter().find(|lane| lane.tally.in_flight() > 0);
            lane.expect("one that has some").tally.ended(UCS_OK);
        }
        assert!(lanes.are_done());
        assert_eq!(lanes.failure(), None);
    }

    #[test]
    fn long_reads_go_in_pieces_and_what_is_cut_is_not_read() {
        let mut lanes = lanes(&[(1, 0, 20), (0, 0, 5)]);
        let posted = post(&mut lanes, 9, 8);
        assert_eq!(posted, [(0, 0, 100), (1, 0, 0), (1, 0, 8), (1, 0, 16)]);
        let mut lanes = self::lanes(&[(1, 0, 20), (0, 0, 5)]);
        assert!(lanes.next_piece(9, 8).is_some());
        lanes.cut();
        assert!(lanes.next_piece(9, 8).is_none());
        assert!(lanes.are_done());
        lanes.lanes[1].tally.fail(-3);
        assert_eq!(lanes.failure(), Some(-3));
    }
}
