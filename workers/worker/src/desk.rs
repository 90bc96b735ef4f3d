//! The desk: the one task that owns a worker's requests, leases, peers and clock.
//!
//! Everything that happens comes to it as a message and is carried out at once; nothing here waits. What
//! takes time runs elsewhere and reports back: forward steps on the engine thread, pulls and connections
//! in tasks of their own, publishing in the publisher task.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_nats::Message;
use baton_bus::{Presence, Wire};
use baton_engine::BlockPool;
use baton_model::WeightFormat;
use baton_protocol::deadlines::BEAT_INTERVAL_MS;
use baton_protocol::subjects::{Cluster, speaker};
use baton_protocol::{
    Abort, ApiServerId, Beat, Capacity, Failure, FailureCode, Hello, Incarnation, RequestId, Role,
    WorkerId, WorkerState, decode,
};
use baton_transfer::PeerKey;
use baton_watchdog::Pulse;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::WorkerError;
use crate::api_servers::ApiServers;
use crate::beat::SharedLoad;
use crate::bus::{Heard, Outbox, Subscriptions};
use crate::checks::Checks;
use crate::connect::LinkOutcome;
use crate::context::Prefilling;
use crate::decode::Decoding;
use crate::engine_thread::{EngineEvent, EngineHandle, HeldBlocks};
use crate::frames::TokenOutbox;
use crate::leases::LeaseTable;
use crate::line::Line;
use crate::mover::Mover;
use crate::pace::Pace;
use crate::peers::Peers;
use crate::peers_told::PeersTold;
use crate::pulls::{Places, Pulled};
use crate::watch::Stuck;

/// Who this worker is: what stays the same for its life and goes into every beat.
pub(crate) struct Identity {
    pub(crate) worker: WorkerId,
    pub(crate) incarnation: Incarnation,
    pub(crate) role: Role,
    pub(crate) device: String,
    pub(crate) weights: WeightFormat,
    pub(crate) transport: String,
    pub(crate) capacity: Capacity,
}

/// A worker's state.
pub(crate) struct Desk {
    pub(crate) me: Identity,
    pub(crate) checks: Checks,
    pub(crate) cluster: Cluster,
    pub(crate) wire: Wire,
    pub(crate) outbox: Outbox,
    pub(crate) tokens: Arc<TokenOutbox>,
    pub(crate) engine: EngineHandle,
    pub(crate) pool: BlockPool,
    pub(crate) lease: Duration,
    pub(crate) drain: Duration,

    pub(crate) state: WorkerState,
    /// Why it is out of service.
    pub(crate) failure: Option<String>,
    /// Its engine thread hangs, and cannot be waited for.
    pub(crate) hangs: bool,
    /// When a draining worker ends what still runs.
    pub(crate) drain_deadline: Option<Instant>,
    /// It has done so.
    pub(crate) has_ended_drain: bool,
    /// When something of a prefill (by key) or a decode (by key) runs out of budget.
    pub(crate) deadlines: BTreeSet<(Instant, u64)>,
    pub(crate) next_key: u64,

    /// Prompts in the engine, by key.
    pub(crate) prefills: BTreeMap<u64, Prefilling>,
    /// Staged KV.
    pub(crate) leases: LeaseTable<HeldBlocks>,
    /// How long prompts take.
    pub(crate) prefill_pace: Pace,

    /// Pulls and generations, by key.
    pub(crate) decodes: BTreeMap<u64, Decoding>,
    /// How long generations take, from admission to end.
    pub(crate) decode_pace: Pace,
    /// Decode jobs that wait for a place.
    pub(crate) line: Line,
    pub(crate) pulls: JoinSet<Pulled>,
    pub(crate) pull_places: Places,
    pub(crate) agent: Option<Mover>,
    pub(crate) peers: Peers,
    pub(crate) peers_told: PeersTold,
    pub(crate) links: JoinSet<LinkOutcome>,

    pub(crate) api_servers: ApiServers,
    /// Whether we hear ourselves, without which silence says nothing of others.
    pub(crate) presence: Presence,
    /// When a beat is due besides those of the clock: somebody said hello, or there is news.
    pub(crate) beat_due: Option<Instant>,
    pub(crate) last_beat: Instant,
    pub(crate) shared_load: SharedLoad,
    /// Beats in a row that found blocks in use by nobody.
    pub(crate) stray_beats: u32,
    /// When a worker that is out of service ends, to be started again by whoever watches over it.
    pub(crate) end_after_failure: Option<Instant>,

    /// Shows the watchdog that the desk goes round.
    pub(crate) pulse: Pulse,
    /// What the watchdog found stuck.
    pub(crate) stuck: mpsc::Receiver<Stuck>,

    /// Whether this thread may spin while a hand-over is near.
    pub(crate) may_spin: bool,
    /// Until when it does after a prompt was staged.
    pub(crate) awake_until: Instant,
}

/// What waits on the bus is worked off for this long before the clock and the engine have their turn again.
const AT_A_TIME: Duration = Duration::from_millis(2);

/// A prompt's release comes within this time of its handle, or its decode worker is busy.
const RELEASE_NEAR: Duration = Duration::from_millis(20);

impl Desk {
    /// Serves until `shutdown`, then drains. Returns when nothing is left to do.
    pub(crate) async fn run(
        &mut self,
        bus: &mut Subscriptions,
        mut events: mpsc::Receiver<EngineEvent>,
        mut is_up: watch::Receiver<bool>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), WorkerError> {
        let mut shutdown = std::pin::pin!(shutdown);
        let mut beat = interval(Duration::from_millis(BEAT_INTERVAL_MS));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let hello = Hello {
            v: baton_protocol::PROTOCOL_VERSION,
            from: self.me.worker.to_string(),
        };
        self.send(self.cluster.hello(), &hello);
        while !self.is_drained() && !self.has_shown_failure() {
            self.pulse.beat();
            let next = self.next_deadline();
            // The clock and the rare things stand before the bus, so that a flood starves none.
            tokio::select! {
                biased;
                () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => self.on_time(),
                _ = beat.tick() => self.on_beat_due(),
                () = &mut shutdown, if self.drain_deadline.is_none() => self.begin_drain(),
                Some(stuck) = self.stuck.recv() => self.on_stuck(&stuck),
                Ok(()) = is_up.changed() => self.on_bus(*is_up.borrow_and_update()),
                event = events.recv() => match event {
                    Some(event) => self.on_engine(event),
                    None => {
                        self.on_executor_failed("the engine thread ended");
                        return Err(WorkerError::Failed { detail: "the engine thread ended".to_owned() });
                    }
                },
                Some(pulled) = self.pulls.join_next() => self.on_pulled(pulled),
                Some(link) = self.links.join_next() => self.on_link(link),
                heard = bus.next() => {
                    self.on_heard(heard?);
                    // A flood would fill up faster than it is looked at message by message.
                    let until = Instant::now() + AT_A_TIME;
                    while Instant::now() < until && let Some(heard) = bus.try_next() {
                        self.on_heard(heard);
                    }
                }
                // Looks at the bus and comes back.
                () = tokio::task::yield_now(), if self.is_awake() => {}
            }
        }
        match self.failure.take() {
            None => Ok(()),
            Some(detail) => Err(WorkerError::Failed { detail }),
        }
    }
}

impl Desk {
    /// Whether a hand-over is near. A thread that sleeps takes 0.2 ms to begin, as long as a GPU takes to read 600 tokens of KV,
    /// and a hand-over would wait for that four times.
    fn is_awake(&self) -> bool {
        self.may_spin
            && (!self.prefills.is_empty()
                || !self.pulls.is_empty()
                || Instant::now() < self.awake_until)
    }

    /// A prompt was staged.
    pub(crate) fn expect_release(&mut self, now: Instant) {
        self.awake_until = now + RELEASE_NEAR;
    }

    fn on_heard(&mut self, heard: Heard) {
        match heard {
            Heard::Inbox(message) => self.on_inbox(message),
            Heard::Beat(message) => self.on_beat(&message),
            Heard::ApiBeat(message) => self.on_api_beat(&message),
            Heard::Hello => self.on_hello(),
        }
    }

    pub(crate) fn on_inbox(&mut self, message: Message) {
        let (cluster, me) = (&self.cluster, &self.me.worker);
        let subject = message.subject.as_str();
        if subject == cluster.prefill(me) {
            self.on_prefill(message);
        } else if subject == cluster.decode(me) {
            self.on_decode(message);
        } else if subject == cluster.release(me) {
            self.on_release(&message);
        } else if subject == cluster.renew(me) {
            self.on_renew(&message);
        } else if subject == cluster.abort(me) {
            self.on_abort(&message);
        } else if subject == cluster.peers(me) {
            self.on_peers_asked(&message);
        } else if subject == cluster.beat(me) {
            self.on_echo();
        }
        // The rest is `describe`, which the service answers.
    }

    fn on_abort(&mut self, message: &Message) {
        match decode::<Abort>(&message.payload) {
            Ok(abort) => {
                // A prefill job is answered once, whatever becomes of it: should it be wanted after all,
                // its sender must not wait for ever.
                let failure = Failure::new(
                    FailureCode::Internal,
                    format!("aborted by the API server: {}", abort.reason),
                );
                for key in self.keys_of(|_, of| *of == abort.request) {
                    self.end_prefill(key, Some(failure.clone()));
                }
                let held = self.end_request(abort.request, None);
                tracing::debug!(request = %abort.request, reason = abort.reason, held, "aborted");
            }
            Err(error) => tracing::debug!(%error, "an abort was not understood"),
        }
    }

    fn on_engine(&mut self, event: EngineEvent) {
        match event {
            EngineEvent::Prefilled(done) => self.on_prefilled(*done),
            EngineEvent::Left { key, refusal } => {
                self.prefill_left(key, refusal);
                self.decode_left(key);
            }
            EngineEvent::Ended { key, failure } => {
                tracing::error!(key, %failure, "a sequence ended without a next token");
                self.prefill_failed(key, failure);
                self.decode_left(key);
            }
            EngineEvent::Failed { message } => self.on_executor_failed(&message),
        }
    }

    /// Ends a request in every phase it may be in. Its decode try is told `failure`; its prefill's reply too.
    pub(crate) fn end_request(&mut self, request: RequestId, failure: Option<Failure>) -> bool {
        let leased = self.leases.abort(request);
        self.line.leave(request);
        let keys: Vec<_> = self.keys_of(|_, of| *of == request);
        for key in &keys {
            self.end_key(*key, failure.clone());
        }
        leased || !keys.is_empty()
    }

    /// Ends one prefill or decode.
    pub(crate) fn end_key(&mut self, key: u64, failure: Option<Failure>) {
        self.end_prefill(key, failure.clone());
        self.end_decode(key, failure);
    }

    /// Keys of the prefills and decodes here whose API server and request are these.
    pub(crate) fn keys_of(&self, are: impl Fn(&ApiServerId, &RequestId) -> bool) -> Vec<u64> {
        let prefills = self
            .prefills
            .iter()
            .filter(|(_, entry)| are(&entry.api_server, &entry.request))
            .map(|(key, _)| *key);
        let decodes = self
            .decodes
            .iter()
            .filter(|(_, entry)| are(&entry.route.api_server, &entry.route.request))
            .map(|(key, _)| *key);
        prefills.chain(decodes).collect()
    }

    /// What the clock brings: leases and budgets that ran out, peers to try again, the end of a drain.
    fn on_time(&mut self) {
        let now = Instant::now();
        for request in self.leases.expire(now) {
            tracing::debug!(%request, "the lease ran out");
        }
        while let Some(&(deadline, key)) = self.deadlines.first() {
            if now < deadline {
                break;
            }
            self.deadlines.remove(&(deadline, key));
            let place = self.place_of(key);
            let message = format!("the request's time ran out while {place}");
            self.end_key(key, Some(Failure::new(FailureCode::Deadline, message)));
        }
        if self
            .drain_deadline_ahead()
            .is_some_and(|deadline| deadline <= now)
        {
            self.end_drain();
        }
        if self.beat_due.is_some_and(|due| due <= now) {
            self.beat_due = None;
            self.send_beat();
        }
        if self.hears(now) {
            self.tick_peers(now);
        }
    }

    fn look_at_connections(&mut self, now: Instant) {
        if let Some(agent) = &self.agent {
            self.peers.look(now, |incarnation| {
                agent.is_connected(PeerKey(incarnation.0))
            });
        }
    }

    fn tick_peers(&mut self, now: Instant) {
        for action in self.peers.tick(now) {
            self.act(action);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        // What would not be done now must not be due.
        let peers = self.peers.next_retry();
        let budget = self.deadlines.first().map(|(deadline, _)| *deadline);
        [
            self.end_after_failure,
            self.beat_due,
            self.leases.next_deadline(),
            budget,
            peers.filter(|_| self.hears(Instant::now())),
            self.drain_deadline_ahead(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn on_beat_due(&mut self) {
        let now = Instant::now();
        self.look_at_connections(now);
        if self.hears(now) {
            self.drop_gone_api_servers(now);
            self.tick_peers(now);
        }
        self.look_for_strays();
        self.report_jobs();
        self.send_beat();
    }

    fn on_beat(&mut self, message: &Message) {
        if !self.me.role.decodes() || self.agent.is_none() {
            return;
        }
        match decode::<Beat>(&message.payload) {
            Ok(beat) if speaker(&message.subject) != beat.worker.as_str() => {
                tracing::warn!(subject = %message.subject, worker = %beat.worker, "a beat in another worker's name");
            }
            Ok(beat) => {
                for action in self.peers.heard(Instant::now(), &beat) {
                    self.act(action);
                }
            }
            Err(error) => tracing::debug!(%error, "a beat was not understood"),
        }
    }

    pub(crate) fn new_key(&mut self, deadline: Instant) -> u64 {
        let key = self.next_key;
        self.next_key += 1;
        self.deadlines.insert((deadline, key));
        key
    }

    /// Sends a message whose loss harms nobody for long.
    pub(crate) fn send<M: baton_protocol::Versioned>(
        &self,
        subject: impl Into<async_nats::Subject>,
        message: &M,
    ) {
        if let Err(error) = self.outbox.send(subject, message) {
            tracing::warn!(%error, message = M::NAME, "not sent");
        }
    }
}

/// What a task brought, or why it brought nothing. A cancelled task is no news.
pub(crate) fn task_outcome<T>(what: &str, outcome: Result<T, JoinError>) -> Option<T> {
    match outcome {
        Ok(outcome) => Some(outcome),
        Err(error) if error.is_cancelled() => None,
        Err(error) => {
            tracing::error!(%error, what, "a task panicked: a defect");
            None
        }
    }
}
