//! The staged transport: KV through host memory, where a peer cannot read GPU memory in place.
//!
//! A read by one side alone would have to find in the peer's host memory what nobody has told it to put there. So the reader
//! asks: it names ranges, at most a slot's worth at a time, and some slots ahead. The peer copies them from its arena into a
//! slot of its own and sends that as active messages; the reader puts them into a slot of *its* own and copies that into its
//! arena. Every message is sent at once, in pieces that never need an answer from inside UCX, so that a killed reader takes
//! nobody along. docs/transfer.md has the protocol.
//!
//! UCX never writes to the arena here: what is left of a failed pull are copies of our own, which end.
//!
//! Files: `message` is what is said, `inbox` hears it, `send` says it, `serve` is the side that has the KV, `fetch` the side that
//! wants it, `host` a [`Staging`] for arenas in host memory.

mod fetch;
mod host;
mod inbox;
mod message;
mod send;
mod serve;

use std::cell::{Cell, RefCell};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::ops::Range;
use std::rc::Rc;

use crate::staging::{MakeStaging, STAGING_SLOTS, Staging};

pub(crate) use self::fetch::{Fetching, Greeting};
pub(crate) use self::host::HostStaging;
pub(crate) use self::inbox::Inbox;
pub(crate) use self::serve::Serving;

/// What a message asks of an arena of this length, if it asks soundly.
pub fn ranges_asked(head: &[u8], body: &[u8], arena_bytes: u64) -> Option<Vec<Range<u64>>> {
    match message::Message::parse(head)? {
        message::Message::Ask { .. } => message::ranges(body, arena_bytes, RANGES_MAX),
        _ => None,
    }
}

/// Slots for what is sent are those below.
const SERVING_SLOTS: usize = STAGING_SLOTS / 2;

/// Most slots that one reader asks of one peer at once.
const ASKS_MAX: usize = 8;

/// Most ranges of one slot.
const RANGES_MAX: usize = 64;

/// What both sides of the staged transport share.
pub(crate) struct Stage {
    make: MakeStaging,
    pub(crate) inbox: Rc<Inbox>,
    /// Of this agent, as readers say it to peers.
    address: Vec<u8>,
    /// Slots for what comes that are free.
    free: RefCell<Vec<usize>>,
    /// Slots whose copies are under way, in either direction.
    copying: Cell<usize>,
    next_id: Cell<u64>,
}

impl Stage {
    pub(crate) fn new(make: MakeStaging, address: Vec<u8>) -> Self {
        Self {
            make,
            inbox: Rc::default(),
            address,
            free: RefCell::new((SERVING_SLOTS..STAGING_SLOTS).collect()),
            copying: Cell::new(0),
            // Another agent's, or this one's in an earlier life, should not look the same.
            next_id: Cell::new(RandomState::new().build_hasher().finish()),
        }
    }

    /// Makes the slots, if there are none yet.
    fn open(&self) -> Result<(), String> {
        let mut staging = self.inbox.staging.borrow_mut();
        if staging.is_none() {
            *staging = Some((self.make)()?);
        }
        Ok(())
    }

    /// Does something with the slots; they are there.
    fn with<T>(
        &self,
        body: impl FnOnce(&mut dyn Staging) -> Result<T, String>,
    ) -> Result<T, String> {
        match &mut *self.inbox.staging.borrow_mut() {
            Some(staging) => body(&mut **staging),
            None => Err("there are no slots".into()),
        }
    }

    /// Whether a slot's copy has ended; if so it is counted off.
    fn has_ended(&self, slot: usize) -> Result<bool, String> {
        let ended = self.with(|staging| staging.is_done(slot))?;
        if ended {
            self.copying.set(self.copying.get() - 1);
        }
        Ok(ended)
    }

    /// Whether copies are under way, whose end only asking tells.
    pub(crate) fn is_copying(&self) -> bool {
        self.copying.get() > 0
    }

    pub(crate) fn id(&self) -> u64 {
        let id = self.next_id.get();
        self.next_id.set(id.wrapping_add(1));
        id
    }
}
