//! Context workers as a decode worker sees them: whose arena can be read, and what to do about the
//! others.
//!
//! A state machine without I/O: beats, outcomes and the clock go in, [`Action`]s come out, and
//! `connect.rs` carries them out. Each incarnation is connected once, before the first request needs it;
//! a broken one is tried again with growing pauses; one that fell silent is let go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_protocol::deadlines::GONE_AFTER_MS;
use baton_protocol::limits::PEERS_MAX;
use baton_protocol::{
    Beat, Incarnation, KvGeometry, ModelInfo, PeerHealth, PeerState, WorkerId, WorkerState,
};
use baton_transfer::BlockMap;
use tokio::time::Instant;

/// First pause before a broken connection is tried again; doubled each time.
const RETRY_MIN: Duration = Duration::from_millis(250);

/// Longest pause.
const RETRY_MAX: Duration = Duration::from_secs(10);

/// What the state machine wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Ask for the descriptor and connect, dropping what is left of an earlier connection.
    Connect {
        worker: WorkerId,
        incarnation: Incarnation,
    },
    /// Close the connection.
    Disconnect { incarnation: Incarnation },
}

/// What a connection turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LinkInfo {
    /// What its lanes read with: `posix,cma`.
    pub(crate) transport: Arc<str>,
    pub(crate) gigabytes_per_second: f32,
    /// What of a block of its is read from which of its ranks.
    pub(crate) map: Arc<BlockMap>,
}

/// All context workers heard of.
pub(crate) struct Peers {
    me: WorkerId,
    model: ModelInfo,
    kv: KvGeometry,
    peers: BTreeMap<WorkerId, Peer>,
}

struct Peer {
    incarnation: Incarnation,
    heard: Instant,
    state: State,
    /// As it was when last connected.
    link: Option<LinkInfo>,
    error: Option<String>,
    /// Failures since it last was ready.
    failures: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Connecting,
    Ready,
    Broken {
        retry_at: Instant,
    },
    /// It serves this worker's model in name, and its KV is of no use: it is shown with the reason, and never connected.
    Unlike,
}

impl Peers {
    pub(crate) fn new(me: WorkerId, model: ModelInfo, kv: KvGeometry) -> Self {
        Self {
            me,
            model,
            kv,
            peers: BTreeMap::new(),
        }
    }

    /// A worker beat. Workers that make no KV for this one's model are no peers.
    pub(crate) fn heard(&mut self, now: Instant, beat: &Beat) -> Vec<Action> {
        let related =
            beat.model.fingerprint == self.model.fingerprint || beat.model.name == self.model.name;
        let usable = beat.role.prefills()
            && beat.worker != self.me
            && beat.state != WorkerState::Failed
            && related;
        if !usable {
            return self.forget(&beat.worker).into_iter().collect();
        }
        let mut actions = Vec::new();
        let known = self.peers.len();
        match self.peers.get_mut(&beat.worker) {
            Some(peer) if peer.incarnation == beat.incarnation => {
                peer.heard = now;
                return actions;
            }
            Some(peer) => actions.extend(peer.disconnect()),
            None if known >= PEERS_MAX => {
                tracing::warn!(worker = %beat.worker, PEERS_MAX, "too many context workers: this one is left out");
                return actions;
            }
            None => {}
        }
        let difference = self.difference(beat).or_else(|| self.namesake(beat));
        if let Some(error) = &difference {
            tracing::warn!(worker = %beat.worker, error, "a context worker's KV cannot be used");
        } else {
            actions.push(Action::Connect {
                worker: beat.worker.clone(),
                incarnation: beat.incarnation,
            });
        }
        let peer = Peer {
            incarnation: beat.incarnation,
            heard: now,
            state: match difference {
                None => State::Connecting,
                Some(_) => State::Unlike,
            },
            link: None,
            error: difference,
            failures: 0,
        };
        self.peers.insert(beat.worker.clone(), peer);
        actions
    }

    /// Connections go by incarnation, so one worker that says another's would be read in its stead: whoever came first has
    /// it. Two that draw the same 64 bits by themselves are not to be expected.
    fn namesake(&self, beat: &Beat) -> Option<String> {
        let (other, _) = self.peers.iter().find(|(worker, peer)| {
            peer.incarnation == beat.incarnation && **worker != beat.worker
        })?;
        Some(format!("it says the incarnation of {other} for its own"))
    }

    /// Why KV of a worker that serves a model of this name, or this very model, cannot be used here.
    fn difference(&self, beat: &Beat) -> Option<String> {
        if beat.model.fingerprint != self.model.fingerprint {
            let short = |model: &ModelInfo| model.fingerprint.as_str()[..12].to_owned();
            return Some(format!(
                "it serves another {} ({}…, here {}…): prepare both from one source, whatever their precision",
                self.model.name,
                short(&beat.model),
                short(&self.model)
            ));
        }
        let difference = self.kv.difference(&beat.kv)?;
        Some(format!("its KV is laid out otherwise: {difference}"))
    }

    /// A connection stands. One that nobody wants any more is closed again.
    pub(crate) fn connected(
        &mut self,
        worker: &WorkerId,
        incarnation: Incarnation,
        link: LinkInfo,
    ) -> Option<Action> {
        match self.peers.get_mut(worker) {
            Some(peer) if peer.incarnation == incarnation => {
                peer.state = State::Ready;
                peer.link = Some(link);
                peer.error = None;
                peer.failures = 0;
                None
            }
            _ => Some(Action::Disconnect { incarnation }),
        }
    }

    /// A connection did not come about.
    pub(crate) fn connect_failed(
        &mut self,
        now: Instant,
        worker: &WorkerId,
        incarnation: Incarnation,
        error: String,
    ) {
        self.broken(now, worker, incarnation, State::Connecting, error);
    }

    /// A pull failed, and with it the connection. Many may fail at once, some when the connection is being
    /// repaired already: that is one failure.
    pub(crate) fn pull_failed(
        &mut self,
        now: Instant,
        worker: &WorkerId,
        incarnation: Incarnation,
        error: String,
    ) {
        self.broken(now, worker, incarnation, State::Ready, error);
    }

    fn broken(
        &mut self,
        now: Instant,
        worker: &WorkerId,
        incarnation: Incarnation,
        before: State,
        error: String,
    ) {
        let Some(peer) = self.peers.get_mut(worker) else {
            return;
        };
        if peer.incarnation != incarnation || peer.state != before {
            return;
        }
        let pause = RETRY_MIN
            .saturating_mul(1 << peer.failures.min(16))
            .min(RETRY_MAX);
        peer.state = State::Broken {
            retry_at: now + pause,
        };
        peer.failures += 1;
        peer.error = Some(error);
    }

    /// Connections that broke while nobody pulled over them are made again before the next pull needs them.
    pub(crate) fn look(&mut self, now: Instant, is_connected: impl Fn(Incarnation) -> bool) {
        let lost = |peer: &Peer| peer.state == State::Ready && !is_connected(peer.incarnation);
        let lost: Vec<_> = self
            .peers
            .iter()
            .filter(|(_, peer)| lost(peer))
            .map(|(worker, peer)| (worker.clone(), peer.incarnation))
            .collect();
        for (worker, incarnation) in lost {
            let error = "the connection broke while nothing was pulled over it".to_owned();
            self.pull_failed(now, &worker, incarnation, error);
        }
    }

    /// Lets go of silent workers and tries broken ones again.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<Action> {
        let gone = Duration::from_millis(GONE_AFTER_MS);
        let silent = |peer: &Peer| now.duration_since(peer.heard) >= gone;
        let silent: Vec<_> = self
            .peers
            .iter()
            .filter(|(_, peer)| silent(peer))
            .map(|(worker, _)| worker.clone())
            .collect();
        let mut actions: Vec<_> = silent
            .iter()
            .filter_map(|worker| self.forget(worker))
            .collect();
        for (worker, peer) in &mut self.peers {
            if matches!(peer.state, State::Broken { retry_at } if retry_at <= now) {
                peer.state = State::Connecting;
                actions.push(Action::Connect {
                    worker: worker.clone(),
                    incarnation: peer.incarnation,
                });
            }
        }
        actions
    }

    /// When a broken connection is to be tried again.
    pub(crate) fn next_retry(&self) -> Option<Instant> {
        let retry = |peer: &Peer| match peer.state {
            State::Broken { retry_at } => Some(retry_at),
            State::Connecting | State::Ready | State::Unlike => None,
        };
        self.peers.values().filter_map(retry).min()
    }

    /// After the bus was away, silence proves nothing: all are heard from now on.
    pub(crate) fn excuse_silence(&mut self, now: Instant) {
        self.peers.values_mut().for_each(|peer| peer.heard = now);
    }

    /// How this life of this worker is read from.
    ///
    /// # Errors
    /// Which worker, and why it cannot be.
    pub(crate) fn ready(
        &self,
        worker: &WorkerId,
        incarnation: Incarnation,
    ) -> Result<&LinkInfo, String> {
        let Some(peer) = self.peers.get(worker) else {
            return Err(format!(
                "context worker {worker} was not heard of, or serves another model"
            ));
        };
        if peer.incarnation != incarnation {
            return Err(format!(
                "context worker {worker} was restarted since: the handle's KV is gone"
            ));
        }
        match peer.state {
            State::Ready => match &peer.link {
                Some(link) => Ok(link),
                None => Err(format!("context worker {worker} is not connected")),
            },
            State::Connecting => Err(format!("context worker {worker} is still being connected")),
            State::Unlike => Err(format!(
                "KV of context worker {worker} cannot be used: {}",
                peer.error.as_deref().unwrap_or("it differs")
            )),
            State::Broken { .. } => Err(format!(
                "the connection to context worker {worker} is broken: {}",
                peer.error.as_deref().unwrap_or("for no stated reason")
            )),
        }
    }

    /// All of them, for the beat, by name.
    pub(crate) fn health(&self) -> Vec<PeerHealth> {
        let health = |(worker, peer): (&WorkerId, &Peer)| PeerHealth {
            worker: worker.clone(),
            incarnation: peer.incarnation,
            state: match peer.state {
                State::Connecting => PeerState::Connecting,
                State::Ready => PeerState::Ready,
                State::Broken { .. } | State::Unlike => PeerState::Broken,
            },
            transport: peer
                .link
                .as_ref()
                .map(|link| link.transport.to_string())
                .unwrap_or_default(),
            gigabytes_per_second: peer
                .link
                .as_ref()
                .map_or(0.0, |link| link.gigabytes_per_second),
            pulled_gigabytes_per_second: None,
            pulled_bytes: 0,
            error: peer.error.clone(),
        };
        let mut all: Vec<_> = self.peers.iter().map(health).collect();
        all.sort_by(|a, b| a.worker.cmp(&b.worker));
        all
    }

    fn forget(&mut self, worker: &WorkerId) -> Option<Action> {
        self.peers.remove(worker)?.disconnect()
    }
}

impl Peer {
    /// What is to be done when it is let go.
    fn disconnect(&self) -> Option<Action> {
        (self.state != State::Unlike).then_some(Action::Disconnect {
            incarnation: self.incarnation,
        })
    }
}

#[cfg(test)]
mod tests;
