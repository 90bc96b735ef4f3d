//! The one thread that owns the UCX worker: takes commands, posts reads, progresses, sleeps.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use baton_protocol::{Base64Bytes, TransferDescriptor};
use crossbeam_channel::{Receiver, Sender, TryRecvError};
use tokio::sync::oneshot;
use ucx_sys::*;

use crate::TransferError;
use crate::agent::{Vitals, version};
use crate::arena::{Arena, Region, Source};
use crate::context::{Context, status_text};
use crate::peer::{Link, PeerKey, PeerPlan};
use crate::probe::{self, PeerReport};
use crate::pull::{Progress, PullStats, Read, Reading};
use crate::seal::{Kind, seal};
use crate::wake::Wake;
use crate::worker::Worker;

/// The thread spins this long after the last activity before it sleeps. A target that slept at once would
/// be scheduled anew for each fragment of an emulated read: that was twenty times slower.
const LINGER: Duration = Duration::from_micros(200);

/// Longest sleep: the thread shows that it lives.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// The rate of a new connection is measured for this long.
const PROBE_TIME: Duration = Duration::from_millis(50);

/// Most pulls and connects under way.
const TRANSFERS_MAX: usize = 1024;

/// At shutdown UCX gets this long to end what it has in flight.
const DRAIN_TIME: Duration = Duration::from_secs(2);

pub(crate) type Guard = Box<dyn Any + Send>;

/// What the handle asks of the thread.
pub(crate) enum Command {
    Connect {
        peer: PeerKey,
        plan: PeerPlan,
        started: Instant,
        allowed: Duration,
        reply: oneshot::Sender<Result<PeerReport, TransferError>>,
    },
    Pull {
        peer: PeerKey,
        reads: Vec<Read>,
        guard: Guard,
        started: Instant,
        allowed: Duration,
        reply: oneshot::Sender<Result<(Guard, PullStats), TransferError>>,
    },
    Disconnect {
        peer: PeerKey,
        reply: oneshot::Sender<Result<(), TransferError>>,
    },
    Shutdown,
}

/// What the thread starts from.
pub(crate) struct Setup {
    pub(crate) source: Source,
    pub(crate) tls: Option<String>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) vitals: Arc<Vitals>,
}

/// What the handle learns when the thread is up.
pub(crate) struct Ready {
    pub(crate) arena: Arena,
    pub(crate) descriptor: TransferDescriptor,
    pub(crate) summary: String,
}

/// The thread's body.
pub(crate) fn run(setup: Setup, ready: &Sender<Result<Ready, TransferError>>) {
    let vitals = setup.vitals.clone();
    let _running = Running(&vitals);
    match Mover::start(setup) {
        Ok((mover, greeting)) => {
            let _ = ready.send(Ok(greeting));
            // Not dropped if this panics: its guards may own memory that UCX writes to.
            let mut mover = ManuallyDrop::new(mover);
            mover.work();
            mover.drain();
            if mover.idle() {
                drop(ManuallyDrop::into_inner(mover));
            } else {
                tracing::warn!("UCX still holds requests at shutdown; their memory is left alone");
            }
        }
        Err(error) => {
            let _ = ready.send(Err(error));
        }
    }
}

/// Tells of the end of the thread, however it comes.
struct Running<'a>(&'a Vitals);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.store(false, Relaxed);
    }
}

/// The thread's state.
struct Mover {
    // Fields drop in this order: links, then the worker, then the region.
    transfers: Vec<Transfer>,
    quarantine: Vec<Quarantined>,
    closing: Vec<Closing>,
    links: HashMap<PeerKey, Rc<Link>>,
    worker: Worker,
    region: Arc<Region>,
    ucp: &'static Ucp,
    commands: Receiver<Command>,
    wake: Arc<Wake>,
    vitals: Arc<Vitals>,
    stopping: bool,
}

/// Reads, and what follows them.
struct Transfer {
    reading: Reading,
    then: Then,
}

enum Then {
    /// Hand the guard back.
    Pull {
        guard: Guard,
        reply: oneshot::Sender<Result<(Guard, PullStats), TransferError>>,
    },
    /// The connection stands: measure it.
    Probe {
        reply: oneshot::Sender<Result<PeerReport, TransferError>>,
    },
    /// Report what was measured.
    Report {
        transport: String,
        until: Instant,
        reply: oneshot::Sender<Result<PeerReport, TransferError>>,
    },
}

impl Then {
    fn name(&self) -> &'static str {
        match self {
            Self::Pull { .. } => "a pull",
            Self::Probe { .. } => "connecting",
            Self::Report { .. } => "the probe",
        }
    }

    /// Whether what is not posted yet need not be read: nobody waits for it, or enough was measured.
    fn enough(&self, now: Instant) -> bool {
        match self {
            Self::Pull { reply, .. } => reply.is_closed(),
            Self::Probe { .. } => false,
            Self::Report { until, .. } => now >= *until,
        }
    }
}

/// A failed transfer whose requests have not all ended.
struct Quarantined {
    reading: Reading,
    /// Dropped with this value, when UCX writes no more.
    _guard: Option<Guard>,
}

/// An endpoint that UCX is closing.
struct Closing {
    link: Rc<Link>,
    request: Option<*mut c_void>,
}

impl Mover {
    fn start(setup: Setup) -> Result<(Self, Ready), TransferError> {
        let Setup {
            source,
            tls,
            commands,
            wake,
            vitals,
        } = setup;
        let context = Arc::new(Context::new(tls.as_deref())?);
        let ucp = context.ucp;
        let summary = format!("ucx {} {}", version(ucp), probe::transports(&context));
        let region = Arc::new(Region::map(context.clone(), source)?);
        let worker = Worker::new(context)?;
        let descriptor = TransferDescriptor {
            ucx: version(ucp),
            address: Base64Bytes(seal(Kind::Address, &worker.address()?)),
            ranks: vec![region.describe()?],
        };
        let ready = Ready {
            arena: Arena::new(region.clone()),
            descriptor,
            summary,
        };
        let mover = Self {
            transfers: Vec::new(),
            quarantine: Vec::new(),
            closing: Vec::new(),
            links: HashMap::new(),
            worker,
            region,
            ucp,
            commands,
            wake,
            vitals,
            stopping: false,
        };
        Ok((mover, ready))
    }

    /// Until told to stop.
    fn work(&mut self) {
        let mut active = Instant::now();
        while !self.stopping {
            let now = Instant::now();
            let busy = self.turn(now);
            if busy {
                active = now;
            } else if now.duration_since(active) < LINGER {
                // The peer's process may wait for this very core.
                std::thread::yield_now();
            } else {
                self.sleep(now);
            }
        }
    }

    /// Once round. Returns whether anything happened.
    fn turn(&mut self, now: Instant) -> bool {
        let mut busy = self.worker.progress();
        busy |= self.take_commands();
        busy |= self.advance(now);
        self.close_failed();
        self.sweep();
        self.tell(now);
        busy
    }

    fn take_commands(&mut self) -> bool {
        let mut busy = false;
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return busy,
                Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    return busy;
                }
            }
            busy = true;
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Connect {
                peer,
                plan,
                started,
                allowed,
                reply,
            } => {
                self.disconnect(peer);
                match self.connect(peer, &plan) {
                    Ok(link) => {
                        let reads = probe::first_reads(&link, self.region.scratch());
                        let reading = Reading::new(self.ucp, link, reads, started, allowed);
                        self.transfers.push(Transfer {
                            reading,
                            then: Then::Probe { reply },
                        });
                    }
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Command::Pull {
                peer,
                reads,
                guard,
                started,
                allowed,
                reply,
            } => match self.admit(peer, &reads) {
                Ok(link) => {
                    let reading = Reading::new(self.ucp, link, reads, started, allowed);
                    self.transfers.push(Transfer {
                        reading,
                        then: Then::Pull { guard, reply },
                    });
                }
                Err(error) => drop(reply.send(Err(error))),
            },
            Command::Disconnect { peer, reply } => {
                self.disconnect(peer);
                self.count();
                let _ = reply.send(Ok(()));
            }
            Command::Shutdown => self.stopping = true,
        }
    }

    fn connect(&mut self, peer: PeerKey, plan: &PeerPlan) -> Result<Rc<Link>, TransferError> {
        self.room()?;
        let (link, outcome) = Link::open(self.ucp, self.worker.handle, peer, plan)?;
        let link = Rc::new(link);
        self.links.insert(peer, link.clone());
        if outcome.is_err() {
            self.disconnect(peer);
        }
        outcome.map(|()| link)
    }

    fn admit(&self, peer: PeerKey, reads: &[Read]) -> Result<Rc<Link>, TransferError> {
        let link = self
            .links
            .get(&peer)
            .ok_or(TransferError::NotConnected(peer))?;
        Reading::check(link, self.region.bytes(), reads)?;
        self.room()?;
        Ok(link.clone())
    }

    fn room(&self) -> Result<(), TransferError> {
        if self.transfers.len() + self.quarantine.len() >= TRANSFERS_MAX {
            return Err(TransferError::Busy {
                what: "transfers under way",
                limit: TRANSFERS_MAX,
            });
        }
        Ok(())
    }

    /// Posts reads and ends transfers.
    fn advance(&mut self, now: Instant) -> bool {
        let mut busy = false;
        let mut index = 0;
        while let Some(transfer) = self.transfers.get_mut(index) {
            if transfer.then.enough(now) {
                transfer.reading.cut();
            }
            busy |= transfer.reading.post(self.ucp, &self.region);
            let progress = transfer.reading.progress(now);
            if progress == Progress::Pending {
                index += 1;
                continue;
            }
            busy = true;
            let transfer = self.transfers.swap_remove(index);
            self.count();
            match progress {
                Progress::Pending => unreachable!("it was skipped above"),
                Progress::Done => self.succeed(transfer, now),
                Progress::Failed(status) => {
                    let status = status_text(self.ucp, status);
                    self.fail(transfer, |peer, doing, _| TransferError::PeerFailed {
                        peer,
                        doing,
                        status,
                    });
                }
                Progress::Late => {
                    let after = transfer.reading.allowed;
                    self.fail(transfer, |peer, doing, pending| TransferError::Deadline {
                        peer,
                        doing,
                        after,
                        pending,
                    });
                }
            }
        }
        busy
    }

    fn succeed(&mut self, transfer: Transfer, now: Instant) {
        let Transfer { reading, then } = transfer;
        let seconds = reading.started.elapsed().as_secs_f32();
        match then {
            Then::Pull { guard, reply } => {
                let stats = PullStats {
                    bytes: reading.posted,
                    seconds,
                };
                // Nobody waits: the guard goes with the answer.
                let _ = reply.send(Ok((guard, stats)));
            }
            Then::Probe { reply } => {
                let transport = probe::describe(&reading.link, version(self.ucp));
                let reads = probe::probe_reads(&reading.link, self.region.scratch());
                let left = reading.deadline().saturating_duration_since(now);
                let reading = Reading::new(self.ucp, reading.link, reads, now, left);
                let until = now + PROBE_TIME;
                self.transfers.push(Transfer {
                    reading,
                    then: Then::Report {
                        transport,
                        until,
                        reply,
                    },
                });
            }
            Then::Report {
                transport, reply, ..
            } => {
                let gigabytes_per_second = reading.posted as f32 / seconds / 1e9;
                let _ = reply.send(Ok(PeerReport {
                    transport,
                    gigabytes_per_second,
                }));
            }
        }
    }

    fn fail(
        &mut self,
        transfer: Transfer,
        error: impl FnOnce(PeerKey, &'static str, usize) -> TransferError,
    ) {
        let Transfer { reading, then } = transfer;
        let peer = reading.link.key;
        let error = error(peer, then.name(), reading.in_flight());
        tracing::warn!("{error}");
        self.close(&reading.link.clone());
        let guard = match then {
            Then::Pull { guard, reply } => {
                let _ = reply.send(Err(error));
                Some(guard)
            }
            Then::Probe { reply } | Then::Report { reply, .. } => {
                let _ = reply.send(Err(error));
                None
            }
        };
        self.quarantine.push(Quarantined {
            reading,
            _guard: guard,
        });
    }

    fn disconnect(&mut self, peer: PeerKey) {
        if let Some(link) = self.links.get(&peer).cloned() {
            self.close(&link);
        }
    }

    /// Closes a link once; its other transfers see the failure in their turn.
    fn close(&mut self, link: &Rc<Link>) {
        if self
            .links
            .get(&link.key)
            .is_some_and(|current| Rc::ptr_eq(current, link))
        {
            self.links.remove(&link.key);
            let request = link.close();
            self.closing.push(Closing {
                link: link.clone(),
                request,
            });
        }
    }

    /// Closes links that failed while nobody used them.
    fn close_failed(&mut self) {
        let failed: Vec<_> = self
            .links
            .values()
            .filter(|link| link.failure().is_some())
            .cloned()
            .collect();
        for link in failed {
            tracing::warn!(peer = %link.key, "the connection failed");
            self.close(&link);
        }
    }

    /// Lets go of what UCX is done with.
    fn sweep(&mut self) {
        self.quarantine
            .retain(|quarantined| quarantined.reading.in_flight() > 0);
        let ucp = self.ucp;
        self.closing.retain_mut(|closing| {
            if let Some(request) = closing.request
                // SAFETY: the request is ours until it is freed below, once.
                && unsafe { (ucp.ucp_request_check_status)(request) } != UCS_INPROGRESS
            {
                // SAFETY: as above.
                unsafe { (ucp.ucp_request_free)(request) };
                closing.request = None;
            }
            // A transfer that still holds the link has requests in flight.
            closing.request.is_some() || Rc::strong_count(&closing.link) > 1
        });
    }

    fn tell(&self, now: Instant) {
        let turn = now.duration_since(self.vitals.epoch).as_micros() as u64;
        self.vitals.turn_micros.store(turn, Relaxed);
        self.count();
    }

    /// Before every answer, so that who gets one finds it in the figures.
    fn count(&self) {
        self.vitals.peers.store(self.links.len(), Relaxed);
        self.vitals.in_flight.store(self.transfers.len(), Relaxed);
        self.vitals
            .quarantined
            .store(self.quarantine.len(), Relaxed);
    }

    /// Until UCX has news, a command comes, a deadline ends or [`SLEEP_MAX`] is over.
    fn sleep(&mut self, now: Instant) {
        let deadlines = self
            .transfers
            .iter()
            .map(|transfer| transfer.reading.deadline());
        let wait = deadlines.min().map_or(SLEEP_MAX, |deadline| {
            deadline.saturating_duration_since(now).min(SLEEP_MAX)
        });
        if !self.worker.arm() {
            return;
        }
        let mut polled = [self.worker.event_fd, self.wake.fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        let milliseconds = wait.as_micros().div_ceil(1000) as i32;
        // SAFETY: two valid entries; an interrupted or failed poll is one that ended early.
        unsafe { libc::poll(polled.as_mut_ptr(), 2, milliseconds) };
        if polled[1].revents != 0 {
            self.wake.clear();
        }
    }

    /// Ends everything, as far as UCX lets it.
    fn drain(&mut self) {
        for transfer in std::mem::take(&mut self.transfers) {
            self.fail(transfer, |_, _, _| TransferError::Stopped);
        }
        for link in self.links.values().cloned().collect::<Vec<_>>() {
            self.close(&link);
        }
        let end = Instant::now() + DRAIN_TIME;
        while !self.idle() && Instant::now() < end {
            self.worker.progress();
            self.sweep();
            std::thread::yield_now();
        }
    }

    /// Whether UCX holds nothing of ours.
    fn idle(&self) -> bool {
        self.quarantine.is_empty() && self.closing.is_empty()
    }
}
