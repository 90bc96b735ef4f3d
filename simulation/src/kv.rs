//! KV in memory, and pulls that take their time: bytes are copied piece by piece while both sides go on with
//! whatever they do. A pull that was given up may go on writing for a while, as UCX does.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_engine::{FakeKv, FakeMemory};
use baton_transfer::{PeerKey, PeerReport, PullStats, Read, TransferError};
use baton_worker::{KvFuture, KvNetwork};
use tokio::time::{Instant, sleep, timeout};

use crate::dice::Dice;
use crate::network::{Link, Port};

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
    dice: Dice,
    block_tokens: u32,
    arenas: BTreeMap<u64, Arena>,
    /// Pairs of workers that cannot reach each other.
    walls: BTreeSet<(String, String)>,
}

#[derive(Clone)]
struct Arena {
    worker: String,
    memory: Arc<FakeMemory>,
    port: Arc<Port>,
}

/// One worker's agent.
pub struct KvAgent {
    fabric: Arc<KvFabric>,
    own: u64,
    connected: Mutex<BTreeSet<u64>>,
}

impl KvFabric {
    /// Without arenas.
    pub fn new(weather: KvWeather, dice: Dice, block_tokens: u32) -> Arc<Self> {
        let state = State {
            weather,
            dice,
            block_tokens,
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
        memory: Arc<FakeMemory>,
        port: Arc<Port>,
    ) -> Arc<KvAgent> {
        let arena = Arena {
            worker: worker.to_owned(),
            memory,
            port,
        };
        self.lock().arenas.insert(incarnation, arena);
        Arc::new(KvAgent {
            fabric: Arc::clone(self),
            own: incarnation,
            connected: Mutex::default(),
        })
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

    /// From now on another weather.
    pub fn set_weather(&self, weather: KvWeather) {
        self.lock().weather = weather;
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
            (Link::Dead, _) | (_, Link::Dead) => Way::Broken,
            (_, Link::Frozen) => Way::Still,
            // Reads that the peer must help with stand still with it.
            (Link::Frozen, _) if !state.weather.reads_the_frozen => Way::Still,
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

    /// Copies one piece and takes a pause: `None` when the way broke.
    async fn copy(&self, own: u64, peer: u64, read: Read) -> Option<()> {
        loop {
            match self.way(own, peer) {
                Way::Open => break,
                Way::Still => sleep(Duration::from_millis(50)).await,
                Way::Broken => return None,
            }
        }
        let pause = self.pause();
        let (from, to, block_tokens) = {
            let state = self.lock();
            let memory = |of: u64| state.arenas.get(&of).map(|arena| arena.memory.clone());
            (memory(peer)?, memory(own)?, state.block_tokens)
        };
        let place = |digest: u64| {
            let tokens = u64::from(block_tokens);
            ((digest / tokens) as u32, (digest % tokens) as u32)
        };
        for i in 0..read.bytes / DIGEST_BYTES {
            let (block, slot) = place(read.remote_offset / DIGEST_BYTES + i);
            let digest = from.read(block, slot);
            let (block, slot) = place(read.local_offset / DIGEST_BYTES + i);
            to.write(block, slot, digest);
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

impl KvAgent {
    fn connected(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl KvNetwork for KvAgent {
    fn pull(
        &self,
        peer: PeerKey,
        reads: Vec<Read>,
        destination: Box<dyn Any + Send>,
        deadline: Duration,
    ) -> KvFuture<PullStats> {
        if !self.connected().contains(&peer.0) {
            return Box::pin(async move { Err(TransferError::NotConnected(peer)) });
        }
        let (fabric, own) = (Arc::clone(&self.fabric), self.own);
        let fails = {
            let state = &mut *fabric.lock();
            let fails = state.weather.fail_per_mille;
            state.dice.chance(fails).then(|| state.dice.range(0..8))
        };
        let bytes = reads.iter().map(|read| read.bytes).sum();
        let begun = Instant::now();
        let mut pieces: Vec<Read> = pieces(&reads).collect();
        // As gets do, they come in any order.
        fabric.lock().dice.shuffle(&mut pieces);
        // The copying is a task of its own: it goes on for a while when the pull is given up.
        let mut copying = Copying {
            fabric,
            own,
            peer: peer.0,
            pieces,
            _destination: destination,
        };
        let task = tokio::spawn(async move {
            let outcome = copying.run(fails).await;
            // Whatever happened, nothing is written any more.
            drop(copying);
            outcome
        });
        Box::pin(async move {
            match timeout(deadline, task).await {
                Ok(Ok(Some(()))) => Ok(PullStats {
                    bytes,
                    seconds: begun.elapsed().as_secs_f32(),
                }),
                Ok(_) => Err(TransferError::PeerFailed {
                    peer,
                    doing: "pulling",
                    status: "simulated".to_owned(),
                }),
                Err(_) => Err(TransferError::Deadline {
                    peer,
                    doing: "pulling",
                    after: deadline,
                    pending: 1,
                }),
            }
        })
    }

    fn connect(&self, peer: PeerKey, deadline: Duration) -> KvFuture<PeerReport> {
        let (fabric, own) = (Arc::clone(&self.fabric), self.own);
        // Connected when the way is open at one of the next moments.
        let wait = async move {
            loop {
                match fabric.way(own, peer.0) {
                    Way::Open => return true,
                    Way::Still => sleep(Duration::from_millis(50)).await,
                    Way::Broken => return false,
                }
            }
        };
        self.connected().insert(peer.0);
        Box::pin(async move {
            match timeout(deadline, wait).await {
                Ok(true) => Ok(PeerReport {
                    transport: "simulated".to_owned(),
                    gigabytes_per_second: 1.0,
                }),
                Ok(false) => Err(TransferError::PeerFailed {
                    peer,
                    doing: "connecting",
                    status: "simulated".to_owned(),
                }),
                Err(_) => Err(TransferError::Deadline {
                    peer,
                    doing: "connecting",
                    after: deadline,
                    pending: 0,
                }),
            }
        })
    }

    fn disconnect(&self, peer: PeerKey) {
        self.connected().remove(&peer.0);
    }
}

struct Copying {
    fabric: Arc<KvFabric>,
    own: u64,
    peer: u64,
    pieces: Vec<Read>,
    /// Held as long as anything is written.
    _destination: Box<dyn Any + Send>,
}

impl Copying {
    async fn run(&mut self, fails: Option<u64>) -> Option<()> {
        for (i, piece) in (0..).zip(std::mem::take(&mut self.pieces)) {
            if fails == Some(i) {
                return None;
            }
            self.fabric.copy(self.own, self.peer, piece).await?;
        }
        // A failure that was due after the last piece.
        fails.is_none().then_some(())
    }
}

/// Ranges as pieces of two digests: small enough that something can happen in between.
fn pieces(reads: &[Read]) -> impl Iterator<Item = Read> + '_ {
    let piece = 2 * DIGEST_BYTES;
    reads.iter().flat_map(move |read| {
        (0..read.bytes).step_by(piece as usize).map(move |at| Read {
            rank: read.rank,
            remote_offset: read.remote_offset + at,
            local_offset: read.local_offset + at,
            bytes: piece.min(read.bytes - at),
        })
    })
}
