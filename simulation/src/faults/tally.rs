//! Counts on the bus what a run did of what the scheduling of requests may do, so that a test can say that all of it was done.

use std::collections::BTreeSet;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_protocol::{Beat, DecodeJob, Release, Versioned, WorkerId, decode};

use crate::network;
use crate::weather::Kind;

/// How often something was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// A decode worker was sent a prompt that still ran.
    pub streams: u64,
    /// KV was moved between two workers that do both sides, and read to its end.
    pub migrations: u64,
    /// A worker that generated ran prompts beside: as often as its beats told that.
    pub deflections: u64,
    /// Requests were refused at once because what was promised could not be kept.
    pub refusals: u64,
    /// Requests were served as batch for that.
    pub batched: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.streams += other.streams;
        self.migrations += other.migrations;
        self.deflections += other.deflections;
        self.refusals += other.refusals;
        self.batched += other.batched;
    }
}

/// Counts, and has another witness look too.
pub struct Tally {
    counts: Arc<Mutex<Counts>>,
    both: BTreeSet<WorkerId>,
    inner: Option<Box<dyn network::Witness>>,
}

impl Tally {
    /// Of a cluster in which these workers do both sides.
    pub fn new(both: BTreeSet<WorkerId>, inner: Option<Box<dyn network::Witness>>) -> Self {
        Self {
            counts: Arc::default(),
            both,
            inner,
        }
    }

    /// What it counts.
    pub fn counts(&self) -> Arc<Mutex<Counts>> {
        Arc::clone(&self.counts)
    }

    fn count(&self, kind: Kind, subject: &str, reply: Option<&str>, payload: &[u8]) {
        match kind {
            Kind::Decode => {
                let job = read::<DecodeJob>(payload);
                let is_streamed = job.is_some_and(|job| job.handle.is_streamed());
                lock(&self.counts).streams += u64::from(is_streamed);
            }
            // Who gives a pull up waits for no answer.
            Kind::Release if reply.is_some() => {
                let from = WorkerId::new(subject.rsplit('.').next().unwrap_or_default());
                if let (Ok(from), Some(release)) = (from, read::<Release>(payload)) {
                    let both =
                        self.both.contains(&from) && self.both.contains(&release.decode_worker);
                    lock(&self.counts).migrations += u64::from(both);
                }
            }
            Kind::Beat => {
                if let Some(beat) = read::<Beat>(payload) {
                    let load = beat.load;
                    let beside = load.decoding > 0 && load.waiting_tokens > 0;
                    lock(&self.counts).deflections += u64::from(beside);
                }
            }
            _ => {}
        }
    }
}

impl network::Witness for Tally {
    fn saw(&mut self, kind: Kind, subject: &str, reply: Option<&str>, payload: &[u8]) {
        self.count(kind, subject, reply, payload);
        if let Some(inner) = &mut self.inner {
            inner.saw(kind, subject, reply, payload);
        }
    }

    fn take_wrong(&mut self) -> Vec<String> {
        let inner = self.inner.as_mut();
        inner.map(|inner| inner.take_wrong()).unwrap_or_default()
    }
}

/// What was counted so far.
pub fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<M: Versioned>(payload: &[u8]) -> Option<M> {
    decode(payload).ok()
}
