//! How the agent's thread fares, for whoever asks.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::key::PeerKey;

/// What the thread tells of itself.
pub(crate) struct Vitals {
    pub(crate) epoch: Instant,
    pub(crate) running: AtomicBool,
    pub(crate) turn_micros: AtomicU64,
    pub(crate) peers: AtomicUsize,
    pub(crate) in_flight: AtomicUsize,
    pub(crate) requests: AtomicUsize,
    pub(crate) quarantined: AtomicUsize,
    /// Bytes a second that pulls reach, of peers that were pulled from.
    rates: Mutex<HashMap<PeerKey, f64>>,
    /// Peers with a connection.
    connected: Mutex<HashSet<PeerKey>>,
}

impl Vitals {
    /// Of a thread that is about to run.
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            running: AtomicBool::new(true),
            turn_micros: AtomicU64::new(0),
            peers: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            quarantined: AtomicUsize::new(0),
            rates: Mutex::default(),
            connected: Mutex::default(),
        }
    }

    pub(crate) fn tell_rate(&self, peer: PeerKey, rate: f64) {
        self.rates().insert(peer, rate);
    }

    pub(crate) fn forget_rate(&self, peer: PeerKey) {
        self.rates().remove(&peer);
    }

    /// A connection was made, or is closed.
    pub(crate) fn tell_connected(&self, peer: PeerKey, is_connected: bool) {
        let mut connected = self.connected();
        match is_connected {
            true => connected.insert(peer),
            false => connected.remove(&peer),
        };
    }

    pub(crate) fn connected(&self) -> MutexGuard<'_, HashSet<PeerKey>> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn rates(&self) -> MutexGuard<'_, HashMap<PeerKey, f64>> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
