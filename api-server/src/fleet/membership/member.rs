//! One worker, as its last beat says.

use std::sync::Arc;
use std::time::Duration;

use baton_protocol::{
    Beat, Capacity, Incarnation, Load, ModelFingerprint, PeerHealth, PeerState, Role, WorkerState,
};
use tokio::time::Instant;

use super::SUSPECT_AFTER;
use super::slots::SlotSet;
use super::speed::Speed;
use crate::request::lifecycle::Target;

/// A worker and when it was last heard. A clone shares the beat.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its last beat, without its peers.
    pub beat: Arc<Beat>,
    /// All its peers as far as its beats were heard, in the order of their names.
    pub peers: Arc<[PeerHealth]>,
    /// Which version of them that is; none where beats tell all of them.
    pub(super) version: Option<u64>,
    /// A change of them was missed.
    pub(super) is_behind: bool,
    /// When they were last asked for.
    pub(super) asked: Option<Instant>,
    /// When that came.
    pub seen: Instant,
    /// What a choice reads of the beat.
    pub facts: Facts,
    /// Members that can take over KV of this incarnation.
    pub readers: Arc<SlotSet>,
    /// The life before this one, whose messages may come late.
    pub(super) former: Option<Incarnation>,
    /// Bytes of the beat and of its peers.
    pub(super) bytes: usize,
    pub(super) peers_bytes: usize,
}

/// What a choice reads of a beat, copied to where members stand side by side: a choice looks at all of them.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Number of its model's fingerprint.
    pub model: u32,
    /// Number of its KV geometry.
    pub kv: u32,
    /// What it does.
    pub role: Role,
    /// Whether it says that it takes jobs.
    pub takes_jobs: bool,
    /// How busy it is.
    pub load: Load,
    /// What it can hold.
    pub capacity: Capacity,
    /// Tokens of a block, at least 1.
    pub block_tokens: u32,
    /// Mean time of a generation; 0 if unknown.
    pub decode_ms: u32,
    /// Whether it streams KV.
    pub streams: bool,
    /// Whether it leases what its prefix index has.
    pub leases_prefixes: bool,
    /// How fast it is, if it says what its steps cost.
    pub speed: Option<Speed>,
    /// Microseconds in which it reads a token's KV from another worker; 0 if unknown.
    pub link_token_us: f32,
}

impl Facts {
    pub(super) fn new(beat: &Beat, model: u32, kv: u32) -> Self {
        Self {
            model,
            kv,
            role: beat.role,
            takes_jobs: beat.state == WorkerState::Serving,
            load: beat.load,
            capacity: beat.capacity,
            block_tokens: beat.kv.block_tokens.max(1),
            decode_ms: beat.decode_ms,
            streams: beat.streams,
            leases_prefixes: beat.leases_prefixes,
            speed: Speed::of(beat),
            link_token_us: 0.0,
        }
    }

    /// Whether the same jobs may come to a worker of which this and then the other is known.
    pub(super) fn stay(&self, other: &Self) -> bool {
        let of = |facts: &Self| {
            let has_speed = facts.speed.is_some();
            (
                facts.model,
                facts.kv,
                facts.role,
                facts.takes_jobs,
                has_speed,
            )
        };
        of(self) == of(other)
    }
}

impl Member {
    /// This life of the worker.
    pub fn target(&self) -> Target {
        Target {
            worker: self.beat.worker.clone(),
            incarnation: self.beat.incarnation,
        }
    }

    /// Tokens that its KV holds. Who says nothing of its blocks is taken to have enough.
    pub(super) fn holds(&self) -> u32 {
        match self.beat.capacity.blocks {
            0 => u32::MAX,
            blocks => blocks.saturating_mul(self.beat.kv.block_tokens),
        }
    }

    /// How long it has been silent.
    pub fn silent(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.seen)
    }

    /// Whether it may get new jobs.
    pub fn serves(&self, model: &ModelFingerprint, now: Instant) -> bool {
        self.beat.state == WorkerState::Serving
            && self.beat.model.fingerprint == *model
            && self.silent(now) < SUSPECT_AFTER
    }

    /// Its state in words: what it says, or that it fell silent.
    pub fn state(&self, now: Instant) -> &'static str {
        match self.beat.state {
            _ if self.silent(now) >= SUSPECT_AFTER => "suspect",
            WorkerState::Serving => "serving",
            WorkerState::Draining => "draining",
            WorkerState::Failed => "failed",
        }
    }

    /// Its state with what there is to say of it, if that is not that all is well: for people.
    pub fn complaint(&self, now: Instant) -> Option<String> {
        let (worker, state) = (&self.beat.worker, self.state(now));
        match (state, &self.beat.reason) {
            ("serving", _) => None,
            ("suspect", _) => {
                let silent = self.silent(now).as_secs_f32();
                Some(format!("{worker} has been silent for {silent:.1} s"))
            }
            (_, Some(reason)) => Some(format!("{worker} is {state}: {reason}")),
            (_, None) => Some(format!("{worker} is {state}")),
        }
    }

    /// Whether it can take over KV that `context` holds.
    pub fn reaches(&self, context: &Target) -> bool {
        let own = self.beat.role == Role::Both
            && self.beat.worker == context.worker
            && self.beat.incarnation == context.incarnation;
        own || self.reads(context).is_some()
    }

    /// How it reads from another worker, if it can.
    pub fn reads(&self, context: &Target) -> Option<&PeerHealth> {
        let peers = &self.peers;
        let first = peers.partition_point(|peer| peer.worker < context.worker);
        let of_this_name = peers[first..]
            .iter()
            .take_while(|peer| peer.worker == context.worker);
        of_this_name
            .filter(is_ready)
            .find(|peer| peer.incarnation == context.incarnation)
    }

    /// Whether it reads the KV of the same workers as this other state of it.
    pub(super) fn reads_the_same(&self, other: &Self) -> bool {
        let own = |member: &Self| (member.beat.role == Role::Both, member.beat.incarnation);
        let mine = self.ready().map(|peer| (&peer.worker, peer.incarnation));
        let others = other.ready().map(|peer| (&peer.worker, peer.incarnation));
        own(self) == own(other) && (Arc::ptr_eq(&self.peers, &other.peers) || mine.eq(others))
    }

    /// The peers whose KV it can read.
    pub fn ready(&self) -> impl Iterator<Item = &PeerHealth> {
        self.peers.iter().filter(is_ready)
    }
}

fn is_ready(peer: &&PeerHealth) -> bool {
    peer.state == PeerState::Ready
}
