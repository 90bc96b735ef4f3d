//! What a transfer does: reads of one side, or asking chunk by chunk.

use std::rc::Rc;
use std::time::{Duration, Instant};

use ucx_sys::Ucp;

use crate::arena::Regions;
use crate::peer::Link;
use crate::pull::{Progress, Reading};
use crate::stage::{Fetching, Greeting};

/// How a transfer is made.
pub(super) enum Work {
    /// By reads of one side.
    Reads(Reading),
    /// By asking, chunk after chunk.
    Chunks(Fetching),
    /// Not yet: the peer must know whom it will send to.
    Greeting(Greeting),
}

impl Work {
    pub(super) fn link(&self) -> &Rc<Link> {
        match self {
            Self::Reads(reading) => &reading.link,
            Self::Chunks(fetching) => &fetching.link,
            Self::Greeting(greeting) => &greeting.link,
        }
    }

    /// When it began, and how long it may take.
    pub(super) fn time(&self) -> (Instant, Duration) {
        match self {
            Self::Reads(reading) => (reading.started, reading.allowed),
            Self::Chunks(fetching) => (fetching.started, fetching.allowed),
            Self::Greeting(greeting) => (greeting.started, greeting.allowed),
        }
    }

    pub(super) fn deadline(&self) -> Instant {
        let (started, allowed) = self.time();
        started + allowed
    }

    /// Bytes moved.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Reads(reading) => reading.posted,
            Self::Chunks(fetching) => fetching.stored,
            Self::Greeting(_) => 0,
        }
    }

    /// Stores what came. Before anybody posts, or whoever stores would post in the stead of those that wait longer.
    pub(super) fn take_in(&mut self) -> bool {
        match self {
            Self::Chunks(fetching) => fetching.take_in(),
            Self::Reads(_) | Self::Greeting(_) => false,
        }
    }

    pub(super) fn post(&mut self, ucp: &Ucp, regions: &Regions, now: Instant) -> bool {
        match self {
            Self::Reads(reading) => reading.post(ucp, regions),
            Self::Chunks(fetching) => fetching.post(ucp, now),
            Self::Greeting(greeting) => greeting.post(ucp),
        }
    }

    pub(super) fn progress(&self, now: Instant) -> Progress {
        match self {
            Self::Reads(reading) => reading.progress(now),
            Self::Chunks(fetching) => fetching.progress(now),
            Self::Greeting(greeting) => greeting.progress(now),
        }
    }

    pub(super) fn cut(&mut self) {
        match self {
            Self::Reads(reading) => reading.cut(),
            Self::Chunks(fetching) => fetching.cut(),
            Self::Greeting(_) => {}
        }
    }

    /// What has not ended, and may still write to the arena.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Reads(reading) => reading.in_flight(),
            Self::Chunks(fetching) => fetching.in_flight(),
            Self::Greeting(_) => 0,
        }
    }

    /// When it has failed or was given up: lets go of what has ended.
    pub(super) fn settle(&mut self) {
        if let Self::Chunks(fetching) = self {
            fetching.settle();
        }
    }
}
