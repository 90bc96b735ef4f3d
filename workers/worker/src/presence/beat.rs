//! The beat: once a second, and at once when something changed, all there is to know about this worker.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::Subject;
use baton_protocol::{Beat, Load, PROTOCOL_VERSION, PeerHealth, PeersReply};
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
    /// Leases.
    pub(crate) leases: usize,
    /// Pulls and generations.
    pub(crate) decodes: usize,
    /// Pulls among them.
    pub(crate) pulling: usize,
}

impl Held {
    /// Whether that is nothing.
    pub(crate) fn is_nothing(&self) -> bool {
        self.prefills + self.leases + self.decodes == 0
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
            cost: None,
            itl_ms: None,
            step_tokens: None,
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
        decoding: 0,
        decoding_tokens: 0,
        blocks_used: stats.used as u32,
        blocks_cached: stats.cached as u32,
        blocks_quarantined: stats.quarantined as u32,
    }
}
