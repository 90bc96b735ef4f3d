//! The one thread that owns the UCX worker: takes commands, posts reads, progresses, sleeps.

mod command;
mod ending;
mod transfers;
mod work;

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use baton_protocol::{Base64Bytes, MemoryType, TransferDescriptor};
use crossbeam_channel::{Receiver, Sender, TryRecvError};
use ucx_sys::Ucp;

use self::ending::{Closing, Quarantined};
use self::transfers::{Then, Transfer};
use self::work::Work;
use crate::TransferError;
use crate::arena::{Arena, ArenaSource, Region, Regions, scratch_bytes};
use crate::context::{Context, transports, version};
use crate::descriptor::PeerPlan;
use crate::key::PeerKey;
use crate::peer::Link;
use crate::probe;
use crate::pull::{Read, Reading};
use crate::seal::{Kind, seal};
use crate::stage::{HostStaging, Serving, Stage};
use crate::staging::{MakeStaging, Staging};
use crate::vitals::Vitals;
use crate::wake::Wake;
use crate::worker::Worker;

pub(crate) use self::command::{Command, Guard, Ready, Setup};

/// The thread spins this long after the last activity before it sleeps. A target that slept at once would
/// be scheduled again for each fragment of an emulated read: that was twenty times slower.
const LINGER: Duration = Duration::from_micros(200);

/// And this long past the last pull into GPU memory. To fall asleep and be woken takes a quarter of a millisecond, which is a third
/// of a pull; a worker that serves more than a few requests a second is not worth the sleep.
const LINGER_GPU: Duration = Duration::from_secs(1);

/// Why a connection is refused that could only be staged.
const NOT_STAGED: &str = "KV of several ranks does not go through host memory";

/// Longest sleep: the thread shows that it lives.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// How often UCX is opened before it is said to be broken, and the pause in between.
const OPEN_TRIES: u32 = 4;
const OPEN_PAUSE: Duration = Duration::from_millis(250);

/// Most pulls and connects under way.
const TRANSFERS_MAX: usize = 1024;

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

/// A context and its worker. UCX looks for the host's network interfaces with the one and opens them with the other. One that is
/// gone by then (each container has one, and takes it with it) is no reason not to start.
#[expect(
    clippy::disallowed_methods,
    reason = "the agent's own thread, which has nothing else to do yet"
)]
fn open(tls: Option<&str>, gpus: bool) -> Result<(Arc<Context>, Worker), TransferError> {
    let mut tries = 1;
    loop {
        let context = Arc::new(Context::new(tls, gpus)?);
        match Worker::new(context.clone()) {
            Ok(worker) => return Ok((context, worker)),
            Err(error) if tries == OPEN_TRIES => return Err(error),
            Err(error) => tracing::warn!(%error, "tried again"),
        }
        tries += 1;
        std::thread::sleep(OPEN_PAUSE);
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
    // Fields drop in this order: links, then the worker, then the regions.
    transfers: Vec<Transfer>,
    quarantine: Vec<Quarantined>,
    closing: Vec<Closing>,
    links: HashMap<PeerKey, Rc<Link>>,
    serving: Serving,
    worker: Worker,
    // After the worker, which delivers to its inbox.
    stage: Rc<Stage>,
    regions: Regions,
    ucp: &'static Ucp,
    commands: Receiver<Command>,
    wake: Arc<Wake>,
    vitals: Arc<Vitals>,
    stopping: bool,
    /// How often transfers had their turn.
    round: u64,
    stall_after: Duration,
    /// When the last pull was under way.
    pulled: Option<Instant>,
}

impl Mover {
    fn start(setup: Setup) -> Result<(Self, Ready), TransferError> {
        let Setup {
            sources,
            tls,
            commands,
            wake,
            vitals,
            stall_after,
        } = setup;
        Regions::check(&sources)?;
        // UCX looks for GPUs in the context that is current.
        if let Some(ArenaSource::Gpu(gpu)) = sources.first() {
            (gpu.bind)().map_err(|detail| TransferError::Arena {
                bytes: gpu.bytes,
                detail,
            })?;
        }
        let gpus = sources
            .iter()
            .any(|source| matches!(source, ArenaSource::Gpu(_)));
        let (context, worker) = open(tls.as_deref(), gpus)?;
        let ucp = context.ucp;
        let summary = format!("ucx {} {}", version(ucp), transports(&context));
        let staging = match &sources[..] {
            [ArenaSource::Gpu(gpu)] => Some(gpu.staging.clone()),
            _ => None,
        };
        let regions = Regions::map(&context, sources)?;
        let address = seal(Kind::Address, &worker.address()?);
        let staging = staging.unwrap_or_else(|| match regions.all() {
            [region] => beside(region),
            _ => Arc::new(|| Err(NOT_STAGED.to_owned())),
        });
        let stage = Rc::new(Stage::new(staging, address.clone()));
        stage.inbox.listen(ucp, worker.handle)?;
        let descriptor = TransferDescriptor {
            ucx: version(ucp),
            address: Base64Bytes(address),
            ranks: regions.describe()?,
        };
        let ready = Ready {
            arenas: regions.all().iter().cloned().map(Arena::new).collect(),
            descriptor,
            summary,
        };
        let mover = Self {
            transfers: Vec::new(),
            quarantine: Vec::new(),
            closing: Vec::new(),
            links: HashMap::new(),
            serving: Serving::new(ucp, stage.clone(), vitals.clone(), stall_after),
            worker,
            stage,
            regions,
            ucp,
            commands,
            wake,
            vitals,
            stopping: false,
            round: 0,
            stall_after,
            pulled: None,
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
            } else if now.duration_since(active) < LINGER || self.must_watch(now) {
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
        busy |= self.serve(now);
        self.look();
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
                    // Where UCX does not know one of the two memories it must not touch either.
                    Ok(link) if link.has_keys() && self.regions.are_registered() => {
                        let reads = probe::first_reads(&link, &self.regions);
                        let reading = Reading::new(self.ucp, link, reads, started, allowed);
                        self.begin(Work::Reads(reading), Then::Probe { reply });
                    }
                    Ok(link) => self.greet(link, started, allowed, None, reply),
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
                    let work = self.pulling(link, reads, started, allowed);
                    self.begin(work, Then::Pull { guard, reply });
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
        // Whether the peer's memory is within reach is asked in the context that is current.
        let bound = self.regions.first().bind();
        bound.map_err(|detail| TransferError::Arena {
            bytes: self.regions.first().bytes() as usize,
            detail,
        })?;
        let (link, outcome) = Link::open(
            self.ucp,
            self.worker.handle,
            peer,
            self.stage.id(),
            plan,
            self.vitals.clone(),
            self.stall_after,
        )?;
        let link = Rc::new(link);
        self.links.insert(peer, link.clone());
        self.vitals.tell_connected(peer, true);
        self.vitals.tell_pulled(peer, link.flow.pulled_bytes());
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
        Reading::check(link, &self.regions, reads)?;
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

    fn tell(&self, now: Instant) {
        let turn = now.duration_since(self.vitals.epoch).as_micros() as u64;
        self.vitals.turn_micros.store(turn, Relaxed);
        self.count();
    }

    /// Breaks links that deliver nothing, and tells how fast the others do.
    fn look(&self) {
        // UCX may have copied for a while just now.
        let now = Instant::now();
        for link in self.links.values() {
            if link.flow.look(now) {
                link.stall();
            }
            if let Some(rate) = link.flow.news_of_rate() {
                self.vitals.tell_rate(link.key, rate);
            }
        }
    }

    /// Whether something is under way, or soon will be, whose end is seen by looking alone: a thread that waits for UCX to wake it
    /// sleeps on, up to [`SLEEP_MAX`].
    fn must_watch(&mut self, now: Instant) -> bool {
        let pulls = self.regions.memory() == MemoryType::Cuda;
        if pulls && !self.transfers.is_empty() {
            self.pulled = Some(now);
        }
        let pulled = self.pulled;
        pulled.is_some_and(|pulled| now.duration_since(pulled) < LINGER_GPU)
            || self.stage.is_copying()
    }

    /// What peers want of the staged transport.
    fn serve(&mut self, now: Instant) -> bool {
        let received = self.stage.received(self.links.values());
        // With several arenas nobody is welcome.
        let bytes = self.regions.first().bytes();
        let (busy, broken) = self.serving.turn(self.worker.handle, received, bytes, now);
        self.close_all(broken);
        busy
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
            .map(|transfer| transfer.work.deadline());
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
}

/// Slots beside an arena in host memory.
fn beside(region: &Arc<Region>) -> MakeStaging {
    let region = region.clone();
    Arc::new(move || {
        // What behind the arena is scratch space belongs to it.
        let bytes = region.scratch() + scratch_bytes(region.memory()) as u64;
        // SAFETY: the region is mapped as long as the thread, which alone has the slots, holds it. A reader that sees a range
        // half written is told by the release.
        let staging = unsafe { HostStaging::new(region.at(0), bytes) };
        Ok(Box::new(staging) as Box<dyn Staging>)
    })
}
