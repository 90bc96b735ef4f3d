//! One worker's agent, in the place of the one over UCX, with the same contract: pulls from one peer take turns on its
//! link, read by read. A pull that is given up posts nothing more, and what it had posted may still be written. A link on
//! which reads are outstanding and none ends for [`PULL_STALL_MS`] is broken, and with it all its pulls; a slow one is not.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_protocol::deadlines::PULL_STALL_MS;
use baton_transfer::{PeerKey, PeerReport, PullStats, Read, TransferError};
use baton_worker::{KvFuture, KvNetwork};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{DIGEST_BYTES, KvFabric, Way};

/// Reads that are posted at once where a link takes time.
const POSTED_MAX: u64 = 4;

/// A connection on which nothing ends for so long is broken.
const STALL: Duration = Duration::from_millis(PULL_STALL_MS);

/// One worker's agent.
pub struct KvAgent {
    fabric: Arc<KvFabric>,
    own: u64,
    connections: Arc<Mutex<BTreeMap<u64, Arc<Connection>>>>,
}

/// The connection to one peer.
struct Connection {
    /// Whoever has it reads; the others wait in the order in which they came.
    turn: Semaphore,
    /// Why it is no more.
    end: Mutex<Option<Closed>>,
    /// Wakes whoever waits for that, the first to wait first. A `watch` channel wakes in an order that it draws, which no seed
    /// decides.
    ended: Notify,
    progress: Mutex<Progress>,
}

/// Why a connection is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closed {
    /// The worker wanted so.
    Disconnected,
    /// No read ended for too long.
    Stalled,
}

struct Progress {
    /// Pulls with reads that have not ended.
    reading: usize,
    /// When a read ended last, or the first one was posted.
    last: Instant,
}

impl KvAgent {
    pub(super) fn new(fabric: Arc<KvFabric>, own: u64) -> Self {
        Self {
            fabric,
            own,
            connections: Arc::default(),
        }
    }

    fn failed(peer: PeerKey, doing: &'static str) -> TransferError {
        TransferError::PeerFailed {
            peer,
            doing,
            status: "simulated".to_owned(),
        }
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
        let Some(connection) = lock(&self.connections).get(&peer.0).cloned() else {
            return Box::pin(async move { Err(TransferError::NotConnected(peer)) });
        };
        let (fabric, own) = (Arc::clone(&self.fabric), self.own);
        let fails = {
            let state = &mut *fabric.lock();
            let fails = state.weather.fail_per_mille;
            state.dice.chance(fails).then(|| state.dice.range(0..8))
        };
        let bytes = reads.iter().map(|read| read.bytes).sum();
        let begun = Instant::now();
        let cells = fabric.lock().cells;
        let mut pieces: Vec<Read> = pieces(&reads, cells).collect();
        // As gets do, they come in any order.
        fabric.lock().dice.shuffle(&mut pieces);
        let is_given_up = Arc::<AtomicBool>::default();
        // The copying is a task of its own: what was posted is written also when the pull is given up.
        let copying = Copying {
            fabric,
            connection: Arc::clone(&connection),
            own,
            peer: peer.0,
            is_given_up: Arc::clone(&is_given_up),
        };
        let mut task = tokio::spawn(async move {
            let outcome = copying.run(pieces, fails).await;
            // Whatever happened, nothing is written any more.
            drop(destination);
            outcome
        });
        let given_up = GivenUp(is_given_up);
        Box::pin(async move {
            let _given_up = given_up;
            tokio::select! {
                biased;
                outcome = &mut task => match outcome {
                    Ok(Some(())) => Ok(PullStats {
                        bytes,
                        seconds: begun.elapsed().as_secs_f32(),
                    }),
                    _ => Err(Self::failed(peer, "pulling")),
                },
                closed = connection.closed() => Err(match closed {
                    Closed::Disconnected => Self::failed(peer, "pulling"),
                    Closed::Stalled => TransferError::Stalled {
                        peer,
                        doing: "pulling",
                        after: STALL,
                        pending: 1,
                    },
                }),
                () = sleep(deadline) => Err(TransferError::Deadline {
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
        let connections = Arc::clone(&self.connections);
        // Connected when the way is open at one of the next moments.
        let wait = async move {
            loop {
                match fabric.way(own, peer.0) {
                    Way::Open => break,
                    Way::Still => sleep(Duration::from_millis(50)).await,
                    Way::Broken => return false,
                }
            }
            lock(&connections).insert(peer.0, Arc::new(Connection::new()));
            true
        };
        Box::pin(async move {
            match timeout(deadline, wait).await {
                Ok(true) => Ok(PeerReport {
                    transport: "simulated".to_owned(),
                    gigabytes_per_second: 1.0,
                }),
                Ok(false) => Err(Self::failed(peer, "connecting")),
                Err(_) => Err(TransferError::Deadline {
                    peer,
                    doing: "connecting",
                    after: deadline,
                    pending: 0,
                }),
            }
        })
    }

    /// Ends the pulls over it too.
    fn disconnect(&self, peer: PeerKey) {
        if let Some(connection) = lock(&self.connections).remove(&peer.0) {
            connection.close(Closed::Disconnected);
        }
    }

    fn is_connected(&self, peer: PeerKey) -> bool {
        let connections = lock(&self.connections);
        let connection = connections.get(&peer.0);
        connection.is_some_and(|connection| !connection.is_closed())
    }
}

impl Connection {
    fn new() -> Self {
        Self {
            turn: Semaphore::new(1),
            end: Mutex::default(),
            ended: Notify::new(),
            progress: Mutex::new(Progress {
                reading: 0,
                last: Instant::now(),
            }),
        }
    }

    fn close(&self, why: Closed) {
        *lock(&self.end) = Some(why);
        self.ended.notify_waiters();
    }

    fn is_closed(&self) -> bool {
        lock(&self.end).is_some()
    }

    async fn closed(&self) -> Closed {
        loop {
            // Hears of an end from here on.
            let ended = self.ended.notified();
            if let Some(why) = *lock(&self.end) {
                return why;
            }
            ended.await;
        }
    }

    /// Reads are outstanding, and none of them has ended for too long.
    async fn stalled(&self) {
        loop {
            let last = lock(&self.progress).last;
            sleep_until(last + STALL).await;
            if lock(&self.progress).last == last {
                return;
            }
        }
    }

    fn begin(&self) {
        let mut progress = lock(&self.progress);
        if progress.reading == 0 {
            progress.last = Instant::now();
        }
        progress.reading += 1;
    }

    fn has_read(&self) {
        lock(&self.progress).last = Instant::now();
    }

    fn end(&self) {
        lock(&self.progress).reading -= 1;
    }
}

/// Says so when it is dropped.
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

struct Copying {
    fabric: Arc<KvFabric>,
    connection: Arc<Connection>,
    own: u64,
    peer: u64,
    is_given_up: Arc<AtomicBool>,
}

impl Copying {
    async fn run(&self, pieces: Vec<Read>, fails: Option<u64>) -> Option<()> {
        self.connection.begin();
        let outcome = self.copy_all(pieces, fails).await;
        self.connection.end();
        outcome
    }

    async fn copy_all(&self, pieces: Vec<Read>, fails: Option<u64>) -> Option<()> {
        let takes_time = |piece: &Read| self.link_time(*piece) > Duration::ZERO;
        let posted_max = match pieces.first() {
            Some(piece) if takes_time(piece) => POSTED_MAX,
            _ => pieces.len() as u64,
        };
        let posted = self.fabric.lock().dice.range(0..posted_max + 1);
        let mut left = posted;
        for (i, piece) in (0..).zip(pieces) {
            if fails == Some(i) {
                return None;
            }
            if self.is_given_up.load(Relaxed) {
                left = left.checked_sub(1)?;
            }
            let link_time = self.link_time(piece);
            if link_time > Duration::ZERO {
                // Nobody closes it.
                let _turn = self.connection.turn.acquire().await.ok()?;
                sleep(link_time).await;
            }
            let is_closed = || self.connection.is_closed();
            let copied = self.fabric.copy(self.own, self.peer, piece, is_closed);
            tokio::select! {
                biased;
                copied = copied => copied?,
                // Also when nobody waits for the pull any more.
                () = self.connection.stalled() => {
                    self.connection.close(Closed::Stalled);
                    return None;
                }
            }
            self.connection.has_read();
        }
        // A failure that was due after the last piece.
        fails.is_none().then_some(())
    }

    fn link_time(&self, piece: Read) -> Duration {
        self.fabric.link_time(self.own, self.peer, piece)
    }
}

/// Ranges as pieces of two tokens: small enough that something can happen in between.
fn pieces(reads: &[Read], cells: u64) -> impl Iterator<Item = Read> {
    let piece = 2 * cells * DIGEST_BYTES;
    reads.iter().flat_map(move |read| {
        (0..read.bytes).step_by(piece as usize).map(move |at| Read {
            source: read.source,
            destination: read.destination,
            remote_offset: read.remote_offset + at,
            local_offset: read.local_offset + at,
            bytes: piece.min(read.bytes - at),
        })
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
