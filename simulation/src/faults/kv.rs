//! KV in memory, and the links between workers: bytes are copied piece by piece while both sides go on with whatever
//! they do. `agent` is what one worker sees of it, in the transfer agent's place.

mod agent;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_engine::{FakeCells, RankWords};
use baton_transfer::Read;
use tokio::time::sleep;

use crate::dice::Dice;
use crate::faults::links::Links;
use crate::network::{Connectivity, Port};

pub use agent::KvAgent;

/// Bytes of one token's digest.
const DIGEST_BYTES: u64 = 8;

/// How pulls fare.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvWeather {
    /// Of a thousand pulls, so many fail.
    pub fail_per_mille: u64,
    /// Longest pause between two pieces.
    pub pause_max_ms: u64,
    /// Of a thousand pieces, so many take seconds.
    pub stall_per_mille: u64,
    /// A peer that stands still can be read all the same, as over shared memory, RDMA or NVLink.
    pub reads_the_frozen: bool,
}

/// Every arena, and who can read which.
pub struct KvFabric {
    state: Mutex<State>,
}

struct State {
    weather: KvWeather,
    links: Links,
    dice: Dice,
    /// Digests of one token.
    cells: u64,
    arenas: BTreeMap<u64, Arena>,
    /// Pairs of workers that cannot reach each other.
    walls: BTreeSet<(String, String)>,
}

#[derive(Clone)]
struct Arena {
    worker: String,
    memory: Arc<Memory>,
    port: Arc<Port>,
}

/// A worker's arenas.
type Memory = FakeCells<Vec<Vec<AtomicU64>>>;

impl KvFabric {
    /// Without arenas. A token has a digest in each of so many `cells`, wherever they lie.
    pub fn new(weather: KvWeather, links: Links, dice: Dice, cells: u64) -> Arc<Self> {
        let state = State {
            weather,
            links,
            dice,
            cells,
            arenas: BTreeMap::new(),
            walls: BTreeSet::new(),
        };
        let state = Mutex::new(state);
        Arc::new(Self { state })
    }

    /// A new worker's memory.
    pub fn join(
        self: &Arc<Self>,
        worker: &str,
        incarnation: u64,
        memory: Arc<Memory>,
        port: Arc<Port>,
    ) -> Arc<KvAgent> {
        let arena = Arena {
            worker: worker.to_owned(),
            memory,
            port,
        };
        self.lock().arenas.insert(incarnation, arena);
        Arc::new(KvAgent::new(Arc::clone(self), incarnation))
    }

    /// Puts a wall between two workers, or takes it away.
    pub fn wall(&self, one: &str, other: &str, stands: bool) {
        let walls = &mut self.lock().walls;
        for pair in [(one, other), (other, one)] {
            let pair = (pair.0.to_owned(), pair.1.to_owned());
            match stands {
                true => drop(walls.insert(pair)),
                false => drop(walls.remove(&pair)),
            }
        }
    }

    /// From now on pulls fare well, and no link takes time.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.weather = KvWeather::default();
        state.links = Links::default();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the way from one worker to another is at this moment.
    fn way(&self, from: u64, to: u64) -> Way {
        let state = self.lock();
        let (Some(own), Some(peer)) = (state.arenas.get(&from), state.arenas.get(&to)) else {
            return Way::Broken;
        };
        let walled = state
            .walls
            .contains(&(own.worker.clone(), peer.worker.clone()));
        match (peer.port.state(), own.port.state()) {
            (Connectivity::Dead, _) | (_, Connectivity::Dead) => Way::Broken,
            (_, Connectivity::Frozen) => Way::Still,
            // Reads that the peer must help with stand still with it.
            (Connectivity::Frozen, _) if !state.weather.reads_the_frozen => Way::Still,
            _ if walled => Way::Still,
            _ => Way::Open,
        }
    }

    fn pause(&self) -> Duration {
        let state = &mut *self.lock();
        let weather = state.weather;
        if state.dice.chance(weather.stall_per_mille) {
            return Duration::from_millis(state.dice.range(500..4_000));
        }
        Duration::from_millis(state.dice.range(0..weather.pause_max_ms + 1))
    }

    /// How long the link between two workers takes for a piece.
    fn link_time(&self, from: u64, to: u64, piece: Read) -> Duration {
        let state = self.lock();
        let name = |of: u64| state.arenas.get(&of).map(|arena| arena.worker.as_str());
        let (Some(from), Some(to)) = (name(from), name(to)) else {
            return Duration::ZERO;
        };
        let digests = piece.bytes / DIGEST_BYTES;
        state.links.time(from, to, digests) / state.cells as u32
    }

    /// Copies one piece and takes a pause: `None` when the way broke, or does not open and nobody waits for that any more.
    async fn copy(
        &self,
        own: u64,
        peer: u64,
        read: Read,
        is_closed: impl Fn() -> bool,
    ) -> Option<()> {
        loop {
            match self.way(own, peer) {
                Way::Open => break,
                Way::Still if is_closed() => return None,
                Way::Still => sleep(Duration::from_millis(50)).await,
                Way::Broken => return None,
            }
        }
        let pause = self.pause();
        let (from, to) = {
            let state = self.lock();
            let memory = |of: u64| state.arenas.get(&of).map(|arena| arena.memory.clone());
            (memory(peer)?, memory(own)?)
        };
        for at in (0..read.bytes).step_by(DIGEST_BYTES as usize) {
            let from = from.words();
            let from = from.word(read.source as usize, read.remote_offset + at);
            let to = to.words();
            let to = to.word(read.destination as usize, read.local_offset + at);
            to.store(from.load(Relaxed), Relaxed);
        }
        if !pause.is_zero() {
            sleep(pause).await;
        }
        Some(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    /// Nothing moves, and nobody says so.
    Still,
    Broken,
}
