//! What is heard on the bus: token frames, the beats of workers and of API servers, and what workers say of their prefixes.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::Message;
use baton_bus::{Intake, Seldom, Subscription};
use baton_protocol::subjects::speaker;
use baton_protocol::{
    ApiBeat, Beat, PeersReply, PrefixPage, PrefixReport, TokenFrame, WorkerId, deadlines, decode,
};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Bus, FAULT_INTERVAL};
use crate::error::ApiServerError;
use crate::fleet::membership::{ASK_INTERVAL, GONE_AFTER, SUSPECT_AFTER};
use crate::fleet::router::{AskAll, Paged};
use crate::request::inbox::{Event, Registry, STRAYS_MAX, lock};

/// Bytes of token frames that may wait. Some are dropped beyond it, which their numbers tell.
const FRAMES_BYTES_MAX: usize = 64 << 20;

/// Bytes of beats, and of hellos, that may wait. They are repeated.
const BEATS_BYTES_MAX: usize = 4 << 20;

/// Bytes of reports of prefixes that may wait. Of who loses one all is asked.
const PREFIXES_BYTES_MAX: usize = 16 << 20;

/// Workers are told of [`STRAYS_MAX`] strays in this time.
const STRAYS_INTERVAL: Duration = Duration::from_millis(10);

/// How often it is looked who fell silent.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);

/// What waits on the bus is worked off for this long before others on the thread have their turn again.
const AT_A_TIME: Duration = Duration::from_millis(2);

/// Others who say hello within this time hear the same beat.
const HELLO_WAIT: Duration = Duration::from_millis(10);

/// What beats and connection events are reported to.
pub trait Watcher: Send + Sync + 'static {
    /// A worker beat. The answer is whether its peers are to be asked for.
    fn beat(&self, beat: Beat, now: Instant) -> bool;
    /// A worker told all its peers.
    fn peers(&self, reply: PeersReply);
    /// A worker told what entered and left its prefix index.
    fn prefixes(&self, report: PrefixReport);
    /// Whether a worker is to be asked for all its prefixes now.
    fn asks_prefixes(&self, worker: &WorkerId, now: Instant) -> Option<AskAll>;
    /// A page of them came, which begins with this block; or none came.
    fn prefix_page(&self, ask: AskAll, block: u32, page: Option<&PrefixPage>) -> Paged;
    /// Works off some of what came. Whether there is more.
    fn take_in_prefixes(&self) -> bool;
    /// An API server beat.
    fn api_beat(&self, beat: ApiBeat, now: Instant);
    /// The bus is there, for the first time or again: what was said meanwhile is lost.
    fn bus_back(&self, now: Instant);
    /// Time to look for who fell silent.
    fn sweep(&self, now: Instant);
    /// Generations in flight, for our own beat.
    fn in_flight(&self) -> u32;
    /// For how long this server has served, for our own beat; 0 if it stands by.
    fn serving_ms(&self, now: Instant) -> u64;
    /// Messages that could not be read, or were dropped, by kind.
    fn bus_fault(&self, kind: &'static str);
}

impl Bus {
    /// Subscribes to tokens and beats, asks everybody to beat, and serves both until the tasks are aborted.
    ///
    /// # Errors
    /// [`ApiServerError::Bus`] if a subscription fails.
    pub async fn serve<W: Watcher>(
        &self,
        registry: Arc<Registry>,
        watcher: Arc<W>,
    ) -> Result<Vec<JoinHandle<()>>, ApiServerError> {
        let faults = Arc::new(Faults::new(Arc::clone(&registry), Arc::clone(&watcher)));
        let overflow = Arc::clone(&faults);
        let tokens = self.subscribe(self.cluster.all_tokens(&self.name)).await?;
        let tokens = Intake::new(tokens, FRAMES_BYTES_MAX, move |message| {
            overflow.lost("frame_overflow", message);
        });
        let repeated = async |subject: String, bytes_max: usize| {
            let subscriber = self.subscribe(subject).await?;
            Ok::<_, ApiServerError>(Intake::new(subscriber, bytes_max, |_| {}))
        };
        let prefixes = repeated(self.cluster.all_prefixes(), PREFIXES_BYTES_MAX).await?;
        let prefixes = Prefixes {
            reports: prefixes,
            asking: Asking {
                bus: self.clone(),
                watcher: Arc::clone(&watcher),
            },
            faults: Arc::clone(&faults),
        };
        let membership = Membership {
            beats: repeated(self.cluster.beats(), BEATS_BYTES_MAX).await?,
            api_beats: repeated(self.cluster.api_beats(), BEATS_BYTES_MAX).await?,
            hellos: repeated(self.cluster.hello(), BEATS_BYTES_MAX).await?,
            bus: self.clone(),
            asking: prefixes.asking.clone(),
            watcher,
            faults: Arc::clone(&faults),
            down: None,
        };
        Ok(vec![
            tokio::spawn(take_tokens(self.clone(), tokens, registry, faults)),
            tokio::spawn(membership.run()),
            tokio::spawn(prefixes.run()),
        ])
    }

    async fn subscribe(&self, subject: String) -> Result<Subscription, ApiServerError> {
        let subscription = self.wire.subscribe(subject).await;
        subscription.map_err(|error| ApiServerError::Bus(format!("NATS subscription: {error}")))
    }
}

async fn take_tokens<W: Watcher>(
    bus: Bus,
    mut tokens: Intake,
    registry: Arc<Registry>,
    faults: Arc<Faults<W>>,
) {
    let mut strays = Strays::default();
    let mut take = |message: Message| match decode::<TokenFrame>(&message.payload) {
        // NATS may let a worker send on its own subjects alone.
        Ok(frame) if speaker(&message.subject) == frame.worker.as_str() => {
            let dispatched = registry.dispatch(frame);
            for _ in 0..dispatched.dropped {
                faults.note("mailbox_overflow", &message);
            }
            // What is not ours may be that of the one who has our name.
            if !dispatched.strays.is_empty() && faults.watcher.serving_ms(Instant::now()) == 0 {
                return;
            }
            for request in dispatched.strays {
                if strays.pass(Instant::now()) {
                    bus.abort_stray(&dispatched.from, request, "it is over");
                }
            }
        }
        Ok(_) => faults.note("frame_forged", &message),
        Err(_) => faults.lost("frame_unreadable", &message),
    };
    while let Some(message) = tokens.next().await {
        take(message);
        // A flood would fill up faster than it is looked at message by message.
        let until = Instant::now() + AT_A_TIME;
        while Instant::now() < until
            && let Some(message) = tokens.try_next()
        {
            take(message);
        }
        // A queue that is never empty would not let go of the thread, on which the connection is read too.
        tokio::task::yield_now().await;
    }
}

/// How often workers are told of requests that are over. A worker names what it still runs with each step, so nothing is lost by
/// telling it later; whoever forges frames gets no flood of messages for them.
#[derive(Default)]
struct Strays {
    since: Option<Instant>,
    told: usize,
}

impl Strays {
    /// Whether another one may be told of now.
    fn pass(&mut self, now: Instant) -> bool {
        let is_over = |since: Instant| now.duration_since(since) >= STRAYS_INTERVAL;
        if self.since.is_none_or(is_over) {
            (self.since, self.told) = (Some(now), 0);
        }
        self.told += 1;
        self.told <= STRAYS_MAX
    }
}

/// Takes in what workers say of their prefixes. Apart from the beats: there may be thousands of links in a report, and a beat is not
/// to wait for them.
struct Prefixes<W> {
    reports: Intake,
    asking: Asking<W>,
    faults: Arc<Faults<W>>,
}

impl<W: Watcher> Prefixes<W> {
    async fn run(mut self) {
        while let Some(message) = self.reports.next().await {
            match decode::<PrefixReport>(&message.payload) {
                Ok(report) if speaker(&message.subject) == report.worker.as_str() => {
                    let worker = report.worker.clone();
                    self.asking.watcher.prefixes(report);
                    self.asking.take_in().await;
                    self.asking.begin(worker);
                }
                Ok(_) => self.faults.note("prefixes_forged", &message),
                Err(_) => self.faults.note("prefixes_unreadable", &message),
            }
        }
    }
}

/// Asks workers for all their prefixes.
struct Asking<W> {
    bus: Bus,
    watcher: Arc<W>,
}

impl<W> Clone for Asking<W> {
    fn clone(&self) -> Self {
        Self {
            bus: self.bus.clone(),
            watcher: Arc::clone(&self.watcher),
        }
    }
}

impl<W: Watcher> Asking<W> {
    /// Asks, if that is to be done now.
    fn begin(&self, worker: WorkerId) {
        if let Some(ask) = self.watcher.asks_prefixes(&worker, Instant::now()) {
            tokio::spawn(self.clone().ask(worker, ask));
        }
    }

    /// One page after the other. Should one be lost, a later beat asks again.
    async fn ask(self, worker: WorkerId, ask: AskAll) {
        let mut paged = Paged::Next(0);
        while let Paged::Next(block) = paged {
            let page = self.bus.prefix_page(&worker, block, ASK_INTERVAL).await;
            if let Err(error) = &page {
                tracing::debug!(%worker, block, ?error, "no answer about prefixes");
            }
            paged = self.watcher.prefix_page(ask, block, page.as_ref().ok());
            self.take_in().await;
        }
    }

    /// Works off what came, and lets others have the fleet in between.
    async fn take_in(&self) {
        while self.watcher.take_in_prefixes() {
            tokio::task::yield_now().await;
        }
    }
}

/// Who is there, by what they say of themselves, and what we say of ourselves.
struct Membership<W> {
    beats: Intake,
    api_beats: Intake,
    hellos: Intake,
    bus: Bus,
    watcher: Arc<W>,
    asking: Asking<W>,
    faults: Arc<Faults<W>>,
    /// When the bus was last found down or silent.
    down: Option<Instant>,
}

impl<W: Watcher> Membership<W> {
    async fn run(mut self) {
        let mut tick = tokio::time::interval(Duration::from_millis(deadlines::BEAT_INTERVAL_MS));
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        let mut hello_answer: Option<Instant> = None;
        let back = Arc::clone(&self.bus.back);
        loop {
            let answer_due = hello_answer.unwrap_or_else(Instant::now);
            // In order, so that a run can be repeated: the clock first, and after each beat others of both kinds (`catch_up`).
            tokio::select! {
                biased;
                () = back.notified() => self.on_back().await,
                _ = tick.tick() => self.beat().await,
                _ = sweep.tick() => self.sweep(Instant::now()),
                () = tokio::time::sleep_until(answer_due), if hello_answer.is_some() => {
                    hello_answer = None;
                    self.beat().await;
                }
                Some(_) = self.hellos.next() => {
                    hello_answer.get_or_insert_with(|| Instant::now() + HELLO_WAIT);
                    self.catch_up();
                }
                Some(message) = self.api_beats.next() => {
                    self.on_api_beat(&message);
                    self.catch_up();
                }
                Some(message) = self.beats.next() => {
                    self.on_beat(&message);
                    self.catch_up();
                }
            }
        }
    }

    async fn beat(&self) {
        let serving_ms = self.watcher.serving_ms(Instant::now());
        self.bus.beat(self.watcher.in_flight(), serving_ms).await;
    }

    /// Works off what is there of beats, as with token frames.
    fn catch_up(&mut self) {
        let until = Instant::now() + AT_A_TIME;
        while Instant::now() < until {
            let (beat, api_beat) = (self.beats.try_next(), self.api_beats.try_next());
            if beat.is_none() && api_beat.is_none() {
                return;
            }
            if let Some(message) = beat {
                self.on_beat(&message);
            }
            if let Some(message) = api_beat {
                self.on_api_beat(&message);
            }
        }
    }

    /// While the bus is down or silent, and until all had time to beat again, silence says nothing about the workers.
    fn sweep(&mut self, now: Instant) {
        let was_down = self.down.is_some_and(|at| now - at < GONE_AFTER);
        if self.bus.fault(now).is_some() {
            self.down = Some(now);
        } else if !was_down {
            self.watcher.sweep(now);
        }
    }

    /// Our own beat came back. If it had not for long, the bus stood still, or this process did, and then workers may have taken
    /// us for gone and ended what we asked for.
    fn on_echo(&mut self, now: Instant) {
        if self.bus.presence.echo(now) >= SUSPECT_AFTER {
            self.down = Some(now);
            self.bus.back.notify_one();
        }
    }

    /// The bus is there, for the first time or again.
    async fn on_back(&mut self) {
        let now = Instant::now();
        self.bus.presence.echo(now);
        self.down = Some(now);
        self.watcher.bus_back(now);
        self.bus.hello().await;
    }

    fn on_beat(&self, message: &Message) {
        match decode::<Beat>(&message.payload) {
            Ok(beat) if speaker(&message.subject) == beat.worker.as_str() => {
                let worker = beat.worker.clone();
                if self.watcher.beat(beat, Instant::now()) {
                    self.ask_peers(worker.clone());
                }
                self.asking.begin(worker);
            }
            Ok(_) => self.faults.note("beat_forged", message),
            Err(_) => self.faults.note("beat_unreadable", message),
        }
    }

    /// Asks for all peers of a worker, of which something was missed. Should the answer be lost, a later beat asks again.
    fn ask_peers(&self, worker: WorkerId) {
        let (bus, watcher) = (self.bus.clone(), Arc::clone(&self.watcher));
        tokio::spawn(async move {
            match bus.peers(&worker, ASK_INTERVAL).await {
                Ok(reply) if reply.worker == worker => watcher.peers(reply),
                Ok(reply) => {
                    tracing::warn!(%worker, other = %reply.worker, "another worker's peers came");
                }
                Err(error) => tracing::debug!(%worker, ?error, "no answer about peers"),
            }
        });
    }

    fn on_api_beat(&mut self, message: &Message) {
        match decode::<ApiBeat>(&message.payload) {
            Ok(beat) if speaker(&message.subject) == beat.api_server.as_str() => {
                let now = Instant::now();
                let bus = &self.bus;
                if beat.api_server == bus.name && beat.incarnation == Some(bus.incarnation) {
                    self.on_echo(now);
                }
                self.watcher.api_beat(beat, now);
            }
            Ok(_) => self.faults.note("beat_forged", message),
            Err(_) => self.faults.note("beat_unreadable", message),
        }
    }
}

/// What should not be on the bus: all of it is counted, and told seldom. Whoever floods the bus floods no log.
struct Faults<W> {
    registry: Arc<Registry>,
    watcher: Arc<W>,
    log: Mutex<Seldom>,
    loss: Mutex<Seldom>,
}

impl<W: Watcher> Faults<W> {
    fn new(registry: Arc<Registry>, watcher: Arc<W>) -> Self {
        Self {
            registry,
            watcher,
            log: Mutex::new(Seldom::new(FAULT_INTERVAL)),
            loss: Mutex::new(Seldom::new(FAULT_INTERVAL)),
        }
    }

    /// A message that says nothing.
    fn note(&self, kind: &'static str, message: &Message) {
        self.watcher.bus_fault(kind);
        if let Some(others) = lock(&self.log).pass(Instant::now()) {
            let (subject, bytes) = (&message.subject, message.payload.len());
            tracing::warn!(%subject, bytes, others, kind, "not a message to act on");
        }
    }

    /// A message that may have been a generation's.
    fn lost(&self, kind: &'static str, message: &Message) {
        self.note(kind, message);
        if lock(&self.loss).pass(Instant::now()).is_some() {
            self.registry.broadcast(|| Event::FramesLost);
        }
    }
}
