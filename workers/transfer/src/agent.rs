//! The handle that the rest of a worker holds.

use std::any::Any;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_protocol::TransferDescriptor;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use tokio::sync::oneshot;

use crate::arena::{Arena, ArenaSource};
use crate::descriptor::PeerPlan;
use crate::flow::STALL;
use crate::key::PeerKey;
use crate::probe::PeerReport;
use crate::pull::{PullStats, Read};
use crate::thread::{Command, Ready};
use crate::vitals::Vitals;
use crate::wake::Wake;
use crate::{TransferError, thread};

/// Commands that may wait for the agent's thread. It takes them within microseconds, so a full queue
/// means that it is stuck.
const COMMANDS_MAX: usize = 1024;

/// UCX starts within this time or not at all.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A system that is short of memory gives pages at this rate at least; one at leisure at ten times as many.
const PAGES_BYTES_PER_SECOND: usize = 128 << 20;

/// For UCX to start, and for the arena's pages.
fn start_timeout(arena_bytes: usize) -> Duration {
    START_TIMEOUT + Duration::from_secs((arena_bytes / PAGES_BYTES_PER_SECOND) as u64)
}

/// The thread answers within the deadline of a command plus this, or is stuck.
const GRACE: Duration = Duration::from_secs(2);

/// Whoever waits for an answer looks this often whether the thread still goes round, and waits no longer if it does not for
/// [`STUCK_LOOKS`] in a row: as long as a connection may stall.
const LOOK: Duration = Duration::from_secs(1);
const STUCK_LOOKS: u32 = (STALL.as_millis() / LOOK.as_millis()) as u32;

/// The thread is left to itself when it has not stopped within this time.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What an agent is made of.
#[derive(Clone, Debug, Default)]
pub struct AgentConfig {
    /// The arenas, by rank: at least one. They all lie in host memory, or each on a GPU; two may be on one.
    pub arenas: Vec<ArenaSource>,
    /// UCX's list of transports (`UCX_TLS`), if not its own choice: `tcp,self` between processes of
    /// different users, which cannot share memory.
    pub tls: Option<String>,
}

/// How an agent fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentHealth {
    /// Whether its thread runs.
    pub running: bool,
    /// Peers connected.
    pub peers: usize,
    /// Connects and pulls under way.
    pub in_flight: usize,
    /// Requests that UCX has not ended, those of failed transfers included.
    pub requests: usize,
    /// Failed transfers whose destination UCX may still write to. Their blocks cannot be reused.
    pub quarantined: usize,
    /// Time since the thread last went round its loop: at most some 100 ms when it is well.
    pub last_progress: Duration,
}

/// Moves KV. Clones share one thread, which ends with [`Agent::shutdown`] or with the last clone.
#[derive(Clone)]
pub struct Agent {
    shared: Arc<Shared>,
}

struct Shared {
    commands: Sender<Command>,
    wake: Arc<Wake>,
    vitals: Arc<Vitals>,
    descriptor: TransferDescriptor,
    summary: String,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl Agent {
    /// Loads UCX, makes the arenas and starts the thread. Blocks for some 10 ms. The arenas come back in their order.
    ///
    /// # Errors
    /// [`TransferError::Library`] without a fitting UCX, [`TransferError::Arena`] without memory,
    /// [`TransferError::Ucx`] if UCX refuses to start.
    pub fn start(config: AgentConfig) -> Result<(Self, Vec<Arena>), TransferError> {
        Self::start_impatient(config, STALL)
    }

    /// As [`Agent::start`]; connections are broken when they stall for this long. For tests.
    ///
    /// # Errors
    /// As [`Agent::start`].
    #[doc(hidden)]
    pub fn start_impatient(
        config: AgentConfig,
        stall_after: Duration,
    ) -> Result<(Self, Vec<Arena>), TransferError> {
        let (commands, receiver) = bounded(COMMANDS_MAX);
        let (ready_sender, ready) = bounded(1);
        let (ended_sender, ended) = bounded(0);
        let wake = Arc::new(Wake::new()?);
        let vitals = Arc::new(Vitals::new());
        let arena_bytes = config.arenas.iter().map(ArenaSource::host_bytes);
        let arena_bytes = arena_bytes.fold(0, usize::saturating_add);
        let setup = thread::Setup {
            sources: config.arenas,
            tls: config.tls,
            commands: receiver,
            wake: wake.clone(),
            vitals: vitals.clone(),
            stall_after,
        };
        let handle = std::thread::Builder::new()
            .name("baton-ucx".into())
            .spawn(move || {
                let _ended = ended_sender;
                thread::run(setup, &ready_sender);
            })
            .map_err(|error| TransferError::Ucx {
                call: "spawning its thread",
                status: error.to_string(),
            })?;
        let Ready {
            arenas,
            descriptor,
            summary,
        } = ready
            .recv_timeout(start_timeout(arena_bytes))
            .map_err(|_| TransferError::Stopped)??;
        let shared = Shared {
            commands,
            wake,
            vitals,
            descriptor,
            summary,
            thread: Mutex::new(Some(handle)),
            ended,
        };
        Ok((
            Self {
                shared: Arc::new(shared),
            },
            arenas,
        ))
    }

    /// What a peer needs to connect.
    pub fn descriptor(&self) -> TransferDescriptor {
        self.shared.descriptor.clone()
    }

    /// Library and transports of this host, for people: `ucx 1.13.1 self,tcp,sysv,posix,cma`.
    pub fn summary(&self) -> String {
        self.shared.summary.clone()
    }

    /// Connects to a peer, reads from each of its arenas once and measures the rate. A connection of the
    /// same key is closed first, and its pulls fail.
    ///
    /// # Errors
    /// [`TransferError::Version`] and [`TransferError::Descriptor`] before anything is tried; then
    /// [`TransferError::PeerFailed`], [`TransferError::Ucx`], [`TransferError::Staging`], [`TransferError::Stalled`] or
    /// [`TransferError::Deadline`].
    pub async fn connect(
        &self,
        peer: PeerKey,
        descriptor: TransferDescriptor,
        deadline: Duration,
    ) -> Result<PeerReport, TransferError> {
        let plan = PeerPlan::parse(&descriptor, self.shared.descriptor.ucx)?;
        let started = Instant::now();
        self.call(deadline, |reply| Command::Connect {
            peer,
            plan,
            started,
            allowed: deadline,
            reply,
        })
        .await
    }

    /// Reads ranges of a peer's arenas into our own. Pulls over one connection take turns.
    ///
    /// `guard` owns the destination. It comes back with the success; otherwise the agent drops it, but
    /// not before UCX has ended every request that writes there: never, if UCX never does. The same holds
    /// when the future is dropped, which also ends the pull.
    ///
    /// # Errors
    /// [`TransferError::NotConnected`], [`TransferError::Bounds`] and [`TransferError::Busy`] before
    /// anything is read. [`TransferError::Deadline`] and [`TransferError::Staging`] concern this pull alone.
    /// [`TransferError::PeerFailed`] and [`TransferError::Stalled`] close the connection, and with it fail the peer's other pulls.
    pub async fn pull<G: Send + 'static>(
        &self,
        peer: PeerKey,
        reads: Vec<Read>,
        guard: G,
        deadline: Duration,
    ) -> Result<(G, PullStats), TransferError> {
        let started = Instant::now();
        let guard: Box<dyn Any + Send> = Box::new(guard);
        let (guard, stats) = self
            .call(deadline, |reply| Command::Pull {
                peer,
                reads,
                guard,
                started,
                allowed: deadline,
                reply,
            })
            .await?;
        let guard = guard
            .downcast::<G>()
            .expect("the thread returns the guard that it was given");
        Ok((*guard, stats))
    }

    /// Closes the connection to a peer, if there is one. Its pulls fail.
    pub async fn disconnect(&self, peer: PeerKey) {
        // It only fails when the thread has stopped, and then nothing is connected.
        let _ = self
            .call(GRACE, |reply| Command::Disconnect { peer, reply })
            .await;
    }

    /// Whether there is a connection to this peer. It may break while nobody pulls, and nobody is told.
    pub fn is_connected(&self, peer: PeerKey) -> bool {
        self.shared.vitals.connected().contains(&peer)
    }

    /// The rate of pulls from this peer in 10⁹ bytes a second, while anything was outstanding; a moving average. `None` if nothing was
    /// pulled over its connection.
    pub fn pulled_rate(&self, peer: PeerKey) -> Option<f32> {
        let rate = self.shared.vitals.rates().get(&peer).copied()?;
        Some((rate / 1e9) as f32)
    }

    /// Bytes that pulls from this peer brought over its present connection.
    pub fn pulled_bytes(&self, peer: PeerKey) -> u64 {
        self.shared.vitals.pulled_bytes(peer)
    }

    /// How the agent fares.
    pub fn health(&self) -> AgentHealth {
        let vitals = &self.shared.vitals;
        let turn = Duration::from_micros(vitals.turn_micros.load(Relaxed));
        AgentHealth {
            running: vitals.running.load(Relaxed),
            peers: vitals.peers.load(Relaxed),
            in_flight: vitals.in_flight.load(Relaxed),
            requests: vitals.requests.load(Relaxed),
            quarantined: vitals.quarantined.load(Relaxed),
            last_progress: vitals.epoch.elapsed().saturating_sub(turn),
        }
    }

    /// Closes every connection and ends the thread; blocks until then, 5 s at most. Everything under way
    /// fails with [`TransferError::Stopped`]. The arena stays valid for whoever holds it.
    pub fn shutdown(&self) {
        let shared = &self.shared;
        let handle = shared
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(handle) = handle else { return };
        let _ = shared
            .commands
            .send_timeout(Command::Shutdown, STOP_TIMEOUT);
        shared.wake.ring();
        // Nothing is ever sent: the wait ends when the thread drops its end.
        match shared.ended.recv_timeout(STOP_TIMEOUT) {
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                tracing::warn!(
                    "the UCX thread did not stop within {} s; it is left behind",
                    STOP_TIMEOUT.as_secs()
                );
            }
            _ => {
                if handle.join().is_err() {
                    tracing::error!("the UCX thread had panicked");
                }
            }
        }
    }

    async fn call<T>(
        &self,
        deadline: Duration,
        command: impl FnOnce(oneshot::Sender<Result<T, TransferError>>) -> Command,
    ) -> Result<T, TransferError> {
        let (reply, answer) = oneshot::channel();
        self.shared
            .commands
            .try_send(command(reply))
            .map_err(|error| match error {
                TrySendError::Full(_) => TransferError::Busy {
                    what: "waiting transfers",
                    limit: COMMANDS_MAX,
                },
                TrySendError::Disconnected(_) => TransferError::Stopped,
            })?;
        self.shared.wake.ring();
        let end = tokio::time::Instant::now() + deadline + GRACE;
        let (mut answer, mut turn, mut stuck) = (answer, 0, 0);
        while stuck < STUCK_LOOKS {
            let now = tokio::time::Instant::now();
            if now >= end {
                break;
            }
            match tokio::time::timeout_at(end.min(now + LOOK), &mut answer).await {
                Ok(outcome) => return outcome.unwrap_or(Err(TransferError::Stopped)),
                Err(_) => {
                    let before =
                        std::mem::replace(&mut turn, self.shared.vitals.turn_micros.load(Relaxed));
                    stuck = if turn == before { stuck + 1 } else { 0 };
                }
            }
        }
        Err(TransferError::Stopped)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The thread also ends when the channel is closed, but should not wait for its next round.
        let _ = self.commands.try_send(Command::Shutdown);
        self.wake.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_arena_has_time_to_be_given() {
        assert_eq!(start_timeout(0), START_TIMEOUT);
        assert!(start_timeout(64 << 30) > Duration::from_secs(500));
    }
}
