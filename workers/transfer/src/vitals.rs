//! How the agent's thread fares, for whoever asks.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    /// Bytes that pulls brought, of peers with a connection. Their flows count.
    pulled: Mutex<HashMap<PeerKey, Arc<AtomicU64>>>,
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
            pulled: Mutex::default(),
            connected: Mutex::default(),
        }
    }

    pub(crate) fn tell_rate(&self, peer: PeerKey, rate: f64) {
        self.rates().insert(peer, rate);
    }

    /// A connection was made: its flow counts here.
    pub(crate) fn tell_pulled(&self, peer: PeerKey, bytes: Arc<AtomicU64>) {
        self.pulled().insert(peer, bytes);
    }

    /// A connection is closed.
    pub(crate) fn forget_pulls(&self, peer: PeerKey) {
        self.rates().remove(&peer);
        self.pulled().remove(&peer);
    }

    /// Bytes that pulls brought over the present connection.
    pub(crate) fn pulled_bytes(&self, peer: PeerKey) -> u64 {
        self.pulled()
            .get(&peer)
            .map_or(0, |bytes| bytes.load(Relaxed))
    }

    fn pulled(&self) -> MutexGuard<'_, HashMap<PeerKey, Arc<AtomicU64>>> {
        self.pulled.lock().unwrap_or_else(PoisonError::into_inner)
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
