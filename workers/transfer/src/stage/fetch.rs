//! The side that wants the KV: asks for it chunk by chunk, and copies what comes into its arena.

use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ucx_sys::*;

use super::inbox::{Arrival, Received};
use super::message::{Message, ranges_body};
use super::send::{Body, Sent, send};
use super::{ASKS_MAX, RANGES_MAX, Stage};
use crate::peer::Link;
use crate::pull::{Progress, Read, Why};
use crate::staging::STAGING_SLOT_BYTES;

const MILLISECOND: Duration = Duration::from_millis(1);

/// Introduces this agent to a peer, and waits to be welcome.
pub(crate) struct Greeting {
    pub(crate) link: Rc<Link>,
    pub(crate) started: Instant,
    pub(crate) allowed: Duration,
    stage: Rc<Stage>,
    said: bool,
    sent: Rc<Sent>,
}

impl Greeting {
    pub(crate) fn new(
        stage: Rc<Stage>,
        link: Rc<Link>,
        started: Instant,
        allowed: Duration,
    ) -> Self {
        Self {
            link,
            started,
            allowed,
            stage,
            said: false,
            sent: Rc::default(),
        }
    }

    pub(crate) fn post(&mut self, ucp: &Ucp) -> bool {
        if std::mem::replace(&mut self.said, true) {
            return false;
        }
        let body = Body::Own(self.stage.address.clone());
        let reader = self.link.reader;
        // SAFETY: the body goes with the message.
        unsafe { send(ucp, &self.link, Message::Hello { reader }, body, &self.sent) };
        true
    }

    pub(crate) fn progress(&self, now: Instant) -> Progress {
        if let Some(status) = self.sent.failure().or(self.link.failure()) {
            return Progress::Failed(Why::Ucx(status));
        }
        // An answer of a few bytes: a peer that is there sends it sooner than a connection may stall.
        let allowed = self.allowed.min(self.link.flow.stall_after());
        match self.link.welcome.get() {
            Some(true) => match self.stage.open() {
                Ok(()) => Progress::Done,
                Err(error) => Progress::Failed(Why::Said(error)),
            },
            Some(false) => {
                Progress::Failed(Why::Said("the peer stages no KV: its log says why".into()))
            }
            None if now >= self.started + allowed => Progress::Late,
            None => Progress::Pending,
        }
    }
}

/// A pull by way of host memory.
pub(crate) struct Fetching {
    pub(crate) link: Rc<Link>,
    pub(crate) started: Instant,
    pub(crate) allowed: Duration,
    /// Bytes in place.
    pub(crate) stored: u64,
    stage: Rc<Stage>,
    reads: Vec<Read>,
    /// Index of the read to ask for next, and how much of it is asked for.
    next: (usize, u64),
    chunks: Vec<Chunk>,
    sent: Rc<Sent>,
    failure: Option<String>,
}

/// A slot's worth under way.
struct Chunk {
    id: u64,
    slot: usize,
    bytes: u64,
    /// Where it belongs in our arena.
    ranges: Vec<Range<u64>>,
    is_storing: bool,
}

impl Fetching {
    pub(crate) fn new(
        stage: Rc<Stage>,
        link: Rc<Link>,
        reads: Vec<Read>,
        started: Instant,
        allowed: Duration,
    ) -> Self {
        Self {
            link,
            started,
            allowed,
            stored: 0,
            stage,
            reads,
            next: (0, 0),
            chunks: Vec::new(),
            sent: Rc::default(),
            failure: None,
        }
    }

    /// Asks for what may be asked for. Returns whether that was anything.
    pub(crate) fn post(&mut self, ucp: &Ucp, now: Instant) -> bool {
        let mut busy = false;
        while self.failure.is_none()
            && self.sent.failure().is_none()
            && self.link.failure().is_none()
            && self.link.flow.chunks() < ASKS_MAX
            && self.next.0 < self.reads.len()
            && let Some(bytes_max) = self.link.flow.read_bytes()
        {
            let Some(slot) = self.stage.free.borrow_mut().pop() else {
                break;
            };
            busy = true;
            self.ask(ucp, slot, bytes_max, now);
        }
        busy
    }

    fn ask(&mut self, ucp: &Ucp, slot: usize, bytes_max: u64, now: Instant) {
        let (remote, ranges) = self.next_chunk(bytes_max.min(STAGING_SLOT_BYTES as u64));
        let bytes = ranges.iter().map(|range| range.end - range.start).sum();
        let id = self.stage.id();
        let arrival = Arrival {
            slot,
            bytes: bytes as usize,
            got: 0,
            refused: false,
            flow: self.link.flow.clone(),
        };
        self.stage.inbox.arrivals.borrow_mut().insert(id, arrival);
        self.link.flow.begin(now);
        self.link.flow.chunk_asked(bytes);
        self.chunks.push(Chunk {
            id,
            slot,
            bytes,
            ranges,
            is_storing: false,
        });
        // In whole milliseconds, none cut off: the peer does not give it up before we do.
        let left = (self.started + self.allowed).saturating_duration_since(now) + MILLISECOND;
        let message = Message::Ask {
            reader: self.link.reader,
            chunk: id,
            budget_ms: left.as_millis().try_into().unwrap_or(u32::MAX),
        };
        let body = Body::Own(ranges_body(&remote));
        // SAFETY: the body goes with the message.
        unsafe { send(ucp, &self.link, message, body, &self.sent) };
    }

    /// The next ranges, the peer's and our own: so many bytes, or as many ranges as one message names.
    fn next_chunk(&mut self, bytes_max: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let (mut remote, mut local) = (Vec::new(), Vec::new());
        let mut room = bytes_max;
        while room > 0
            && remote.len() < RANGES_MAX
            && let Some(read) = self.reads.get(self.next.0)
        {
            let done = self.next.1;
            let bytes = (read.bytes - done).min(room);
            let range = |start: u64| start + done..start + done + bytes;
            remote.push(range(read.remote_offset));
            local.push(range(read.local_offset));
            room -= bytes;
            self.next = match done + bytes == read.bytes {
                true => (self.next.0 + 1, 0),
                false => (self.next.0, done + bytes),
            };
        }
        (remote, local)
    }

    /// Stores chunks that came, and lets go of those that are stored. Returns whether that was anything.
    pub(crate) fn take_in(&mut self) -> bool {
        let mut busy = false;
        let mut index = 0;
        while let Some(chunk) = self.chunks.get_mut(index) {
            match chunk.go_on(&self.stage) {
                Ok(Step::Waits) => index += 1,
                Ok(Step::Came) => {
                    self.link.flow.chunk_ended(chunk.bytes);
                    busy = true;
                    index += 1;
                }
                Ok(Step::Stored) => {
                    let chunk = self.chunks.swap_remove(index);
                    self.stage.free.borrow_mut().push(chunk.slot);
                    self.stored += chunk.bytes;
                    busy = true;
                }
                Err(error) => {
                    self.failure.get_or_insert(error);
                    index += 1;
                }
            }
        }
        busy
    }

    /// Asks for no more.
    pub(crate) fn cut(&mut self) {
        self.next = (self.reads.len(), 0);
    }

    /// Chunks that are to come, or whose copies write to our arena.
    pub(crate) fn in_flight(&self) -> usize {
        self.chunks.len()
    }

    /// After it was given up: lets go of what has ended. The peer sends what it was asked for all the same, unless it is gone, and
    /// until then is asked for that much less.
    pub(crate) fn settle(&mut self) {
        let (stage, link) = (&self.stage, &self.link);
        self.chunks.retain(|chunk| {
            let ended = match chunk.is_storing {
                // Where asking fails nobody knows: then it is never let go of.
                true => stage.has_ended(chunk.slot).unwrap_or(false),
                false => {
                    let mut arrivals = stage.inbox.arrivals.borrow_mut();
                    let has_come = arrivals.get(&chunk.id).is_none_or(Arrival::has_ended);
                    let ended = has_come || link.failure().is_some();
                    if ended {
                        arrivals.remove(&chunk.id);
                        link.flow.chunk_ended(chunk.bytes);
                    }
                    ended
                }
            };
            if ended {
                stage.free.borrow_mut().push(chunk.slot);
            }
            !ended
        });
    }

    pub(crate) fn progress(&self, now: Instant) -> Progress {
        if let Some(status) = self.sent.failure().or(self.link.failure()) {
            Progress::Failed(Why::Ucx(status))
        } else if self.next.0 == self.reads.len() && self.chunks.is_empty() {
            Progress::Done
        } else if now >= self.started + self.allowed {
            // The peer refuses what is too late, which is no other reason.
            Progress::Late
        } else if let Some(failure) = &self.failure {
            Progress::Failed(Why::Said(failure.clone()))
        } else {
            Progress::Pending
        }
    }
}

/// What happened to a chunk.
enum Step {
    Waits,
    Came,
    Stored,
}

impl Chunk {
    fn go_on(&mut self, stage: &Stage) -> Result<Step, String> {
        if self.is_storing {
            return Ok(match stage.has_ended(self.slot)? {
                true => Step::Stored,
                false => Step::Waits,
            });
        }
        let arrivals = stage.inbox.arrivals.borrow();
        let has_come = match arrivals.get(&self.id) {
            Some(arrival) if arrival.refused => {
                return Err("the peer cannot send what was asked for".into());
            }
            Some(arrival) => arrival.got == arrival.bytes,
            None => false,
        };
        if !has_come {
            return Ok(Step::Waits);
        }
        drop(arrivals);
        stage.with(|staging| staging.store(self.slot, &self.ranges))?;
        stage.inbox.arrivals.borrow_mut().remove(&self.id);
        stage.copying.set(stage.copying.get() + 1);
        self.is_storing = true;
        Ok(Step::Came)
    }
}

impl Stage {
    /// Messages that came: a peer's welcome is noted with its link, the rest is for the serving side.
    pub(crate) fn received<'a>(
        &self,
        links: impl Iterator<Item = &'a Rc<Link>> + Clone,
    ) -> Vec<Received> {
        let received = std::mem::take(&mut *self.inbox.received.borrow_mut());
        let note = |received: &Received| match received.message {
            Message::Welcome { reader, willing } => {
                for link in links.clone().filter(|link| link.reader == reader) {
                    link.welcome.set(Some(willing));
                }
                false
            }
            _ => true,
        };
        received.into_iter().filter(note).collect()
    }
}
