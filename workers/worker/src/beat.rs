//! The beat: once a second, and at once when something changed, all there is to know about this worker.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::Message;
use baton_protocol::{Beat, Load, PROTOCOL_VERSION, PeerHealth, PeersReply};
use baton_transfer::PeerKey;
use tokio::time::Instant;

use crate::desk::Desk;
use crate::mover::Mover;
use crate::peers_told::Told;

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

impl Desk {
    /// Beats now.
    pub(crate) fn send_beat(&mut self) {
        self.last_beat = Instant::now();
        let told = self.peers_told.tell(self.peer_health());
        if told.is_part {
            self.beat_soon();
        }
        let beat = self.beat(told);
        self.shared_load.set(beat.load);
        if let Err(error) = self.outbox.send(self.cluster.beat(&self.me.worker), &beat) {
            tracing::debug!(%error, "a beat was not sent");
        }
    }

    fn beat(&self, told: Told) -> Beat {
        Beat {
            v: PROTOCOL_VERSION,
            worker: self.me.worker.clone(),
            incarnation: self.me.incarnation,
            role: self.me.role,
            state: self.state,
            reason: self.failure.clone(),
            model: self.checks.model.clone(),
            kv: self.checks.kv.clone(),
            device: self.me.device.clone(),
            weights: self.me.weights.label().to_owned(),
            load: self.load(),
            capacity: self.me.capacity,
            peers: told.peers,
            changes: told.changes,
            transport: self.transport(),
            decode_ms: self.decode_pace.mean_ms(),
        }
        .within_bounds()
    }

    /// Beats within a moment: many connections that come about together are one beat, as far as there is room in it.
    pub(crate) fn beat_soon(&mut self) {
        let now = Instant::now();
        let due = (self.last_beat + NEWS_INTERVAL).max(now + NEWS_WAIT);
        self.beat_due.get_or_insert(due);
    }

    /// Somebody missed what beats told of the peers.
    pub(crate) fn on_peers_asked(&mut self, message: &Message) {
        let Some(reply) = message.reply.clone() else {
            return;
        };
        let Some((version, peers)) = self.peers_told.all(Instant::now()) else {
            return;
        };
        let all = PeersReply {
            v: PROTOCOL_VERSION,
            worker: self.me.worker.clone(),
            incarnation: self.me.incarnation,
            version,
            peers,
        };
        self.send(reply, &all);
    }

    /// Context workers, and how fast pulls from them are.
    fn peer_health(&self) -> Vec<PeerHealth> {
        let mut peers = self.peers.health();
        if let Some(agent) = &self.agent {
            for peer in &mut peers {
                let key = PeerKey(peer.incarnation.0);
                peer.pulled_gigabytes_per_second = agent.pulled_rate(key);
            }
        }
        peers
    }

    /// How KV moves, or that it does not any more.
    fn transport(&self) -> String {
        let transport = self.me.transport.clone();
        let Some(health) = self.agent.as_ref().and_then(Mover::health) else {
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

    fn load(&self) -> Load {
        let stats = self.pool.stats();
        let engine = &self.engine.load;
        Load {
            waiting: engine.waiting.load(Ordering::Relaxed),
            running: engine.running.load(Ordering::Relaxed),
            waiting_tokens: engine.waiting_tokens.load(Ordering::Relaxed),
            leased: self.leases.len() as u32,
            pulling: self.pulling() as u32,
            blocks_used: stats.used as u32,
            blocks_cached: stats.cached as u32,
            blocks_quarantined: stats.quarantined as u32,
        }
    }
}
