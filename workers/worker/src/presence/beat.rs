//! The beat: once a second, and at once when something changed, all there is to know about this worker.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::Subject;
use baton_protocol::{
    Beat, Load, PROTOCOL_VERSION, PackedLinks, PeerHealth, PeersReply, PrefixPage, PrefixReport,
    PrefixesAsk,
};
use tokio::time::Instant;

use super::Presence;
#[cfg(feature = "simulation")]
use super::peers_told::PeersTold;
use crate::common::Common;
use crate::mover::Mover;

/// A transfer thread that is well goes round its loop many times in this time.
const PROGRESS_MAX: Duration = Duration::from_secs(3);

/// News of connections that come within this time are told together.
const NEWS_WAIT: Duration = Duration::from_millis(10);

/// Beats with such news come no faster than this: everybody listens to them.
const NEWS_INTERVAL: Duration = Duration::from_millis(100);

/// The load as of the last beat, for the service's statistics.
#[derive(Clone, Default)]
pub(crate) struct SharedLoad(Arc<Mutex<Load>>);

impl SharedLoad {
    pub(crate) fn set(&self, load: Load) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = load;
    }

    pub(crate) fn load(&self) -> Load {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the sides hold that a beat tells of.
#[derive(Default)]
pub(crate) struct Held {
    /// Prompts in the engine.
    pub(crate) prefills: usize,
    /// Leases of prompts that ran here.
    pub(crate) leases: usize,
    /// Leases of beginnings of others' prompts.
    pub(crate) lent: usize,
    /// Pulls and generations.
    pub(crate) decodes: usize,
    /// Pulls among them.
    pub(crate) pulling: usize,
    /// Batch requests among them.
    pub(crate) batch_decoding: usize,
}

impl Held {
    /// Whether that is nothing.
    pub(crate) fn is_nothing(&self) -> bool {
        self.prefills + self.leases + self.lent + self.decodes == 0
    }
}

impl Presence {
    /// Beats now. `peers` are the context workers that KV can be pulled from, `decode_ms` how long a generation takes.
    pub(crate) fn send_beat(
        &mut self,
        common: &Common,
        held: &Held,
        peers: Vec<PeerHealth>,
        decode_ms: u32,
    ) {
        let Common { me, checks, .. } = common;
        let load = load(common, held);
        let measured = common.engine.load.cost();
        let now = Instant::now();
        self.last_beat = now;
        let told = self.peers_told.tell(peers);
        if told.is_part {
            self.beat_soon(now);
        }
        let beat = Beat {
            v: PROTOCOL_VERSION,
            worker: me.worker.clone(),
            incarnation: me.incarnation,
            role: me.role,
            state: self.state,
            reason: self.failure.clone(),
            model: checks.model.clone(),
            kv: checks.kv.clone(),
            device: me.device.clone(),
            ranks: Some(me.ranks),
            weights: me.weights.label().to_owned(),
            load,
            capacity: me.capacity,
            peers: told.peers,
            changes: told.changes,
            transport: transport(common),
            decode_ms,
            cost_error: measured.as_ref().and_then(|measured| measured.error),
            cost: measured.map(|measured| measured.cost),
            itl_ms: me.itl_ms,
            step_tokens: Some(me.step_tokens),
            prefix_version: Some(self.prefixes_told.version()),
            streams: common.mover.is_some(),
            leases_prefixes: me.leases_prefixes,
        }
        .within_bounds();
        self.shared_load.set(load);
        if let Err(error) = common.outbox.send(common.cluster.beat(&me.worker), &beat) {
            tracing::debug!(%error, "a beat was not sent");
        }
    }

    /// Beats within a moment: many connections that come about together are one beat, as far as there is room in it.
    pub(crate) fn beat_soon(&mut self, now: Instant) {
        let due = (self.last_beat + NEWS_INTERVAL).max(now + NEWS_WAIT);
        self.beat_due.get_or_insert(due);
    }

    /// Somebody missed what beats told of the peers.
    pub(crate) fn on_peers_asked(&mut self, common: &Common, reply: Subject) {
        let Some((version, peers)) = self.peers_told.all(Instant::now()) else {
            return;
        };
        let all = PeersReply {
            v: PROTOCOL_VERSION,
            worker: common.me.worker.clone(),
            incarnation: common.me.incarnation,
            version,
            peers,
        };
        common.send(reply, &all);
    }

    /// Something entered the prefix index or left it.
    pub(crate) fn on_prefix_change(&mut self) {
        self.prefixes_told.changed(Instant::now());
    }

    /// Reports what entered and left the prefix index, if that is due.
    pub(crate) fn tell_prefixes(&mut self, common: &Common, now: Instant) {
        if !self.is_connected() {
            return;
        }
        let Some(told) = self.prefixes_told.report(now, &common.pool) else {
            return;
        };
        let report = PrefixReport {
            v: PROTOCOL_VERSION,
            worker: common.me.worker.clone(),
            incarnation: common.me.incarnation,
            since: told.since,
            version: told.version,
            added: told.added,
            removed: told.removed,
            is_part: common.pool.tells_part(),
        };
        let subject = common.cluster.prefixes(&common.me.worker);
        if let Err(error) = common.outbox.send(subject, &report) {
            tracing::debug!(%error, "a report of prefixes was not sent: its number will be missed");
        }
    }

    /// Somebody missed a report, or is new.
    pub(crate) fn on_prefixes_asked(&mut self, common: &Common, ask: &PrefixesAsk, reply: Subject) {
        if !self.prefixes_told.gives_page(Instant::now()) {
            return;
        }
        // The number first: what is reported above it may be in the page already, and changes nothing then.
        let version = self.prefixes_told.version();
        let (links, next) = common.pool.prefix_page(ask.block);
        let page = PrefixPage {
            v: PROTOCOL_VERSION,
            worker: common.me.worker.clone(),
            incarnation: common.me.incarnation,
            version,
            links: PackedLinks(links),
            next,
            is_part: common.pool.tells_part(),
        };
        common.send(reply, &page);
    }

    /// Of so many peers a beat tells all, and only changes of more.
    #[cfg(feature = "simulation")]
    pub(crate) fn tell_at_once(&mut self, peers: usize) {
        self.peers_told = PeersTold::of(peers);
    }
}

/// How KV moves, or that it does not any more.
fn transport(common: &Common) -> String {
    let transport = common.me.transport.clone();
    let Some(health) = common.mover.as_ref().and_then(Mover::health) else {
        return transport;
    };
    if !health.running {
        return format!("{transport}; its thread has stopped");
    }
    if health.last_progress > PROGRESS_MAX {
        let seconds = health.last_progress.as_secs_f32();
        return format!("{transport}; no progress for {seconds:.1} s");
    }
    transport
}

fn load(common: &Common, held: &Held) -> Load {
    let stats = common.pool.stats();
    let engine = &common.engine.load;
    Load {
        waiting: engine.waiting.load(Ordering::Relaxed),
        running: engine.running.load(Ordering::Relaxed),
        waiting_tokens: engine.waiting_tokens.load(Ordering::Relaxed),
        leased: held.leases as u32,
        pulling: held.pulling as u32,
        batch_tokens: engine.batch_tokens.load(Ordering::Relaxed),
        decoding: engine.decoding.load(Ordering::Relaxed),
        decoding_tokens: engine.decoding_tokens.load(Ordering::Relaxed),
        batch_decoding: held.batch_decoding as u32,
        blocks_used: stats.used as u32,
        blocks_cached: stats.cached as u32,
        blocks_quarantined: stats.quarantined as u32,
        plans_refused: engine.plans_refused.load(Ordering::Relaxed),
    }
}
