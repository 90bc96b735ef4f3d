//! The desk: the one task that owns a worker's requests, leases, peers and clock.
//!
//! Everything that happens comes to it as a message and is carried out at once; nothing here waits. What
//! takes time runs elsewhere and reports back: forward steps on the engine thread, pulls and connections
//! in tasks of their own, publishing in the publisher task.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message};
use baton_engine::BlockPool;
use baton_model::WeightFormat;
use baton_protocol::limits::{BEAT_INTERVAL_MS, GONE_AFTER_MS};
use baton_protocol::subjects::{Cluster, speaker};
use baton_protocol::{
    Abort, ApiBeat, ApiServerId, Beat, Capacity, Failure, FailureCode, Hello, Incarnation, Refusal,
    RequestId, Role, WorkerId, WorkerState, decode,
};
use baton_transfer::Agent;
use futures::StreamExt;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::WorkerError;
use crate::api_servers::{ApiServers, Heard, Life};
use crate::beat::SharedLoad;
use crate::bus::{Outbox, Subscriptions};
use crate::checks::Checks;
use crate::connect::LinkOutcome;
use crate::context::{Pace, Prefilling};
use crate::decode::Decoding;
use crate::engine_thread::{EngineEvent, EngineHandle, HeldBlocks};
use crate::frames::TokenOutbox;
use crate::leases::LeaseTable;
use crate::line::Line;
use crate::peers::Peers;
use crate::pulls::Pulled;

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
    pub(crate) client: Client,
    pub(crate) outbox: Outbox,
    pub(crate) tokens: Arc<TokenOutbox>,
    pub(crate) engine: EngineHandle,
    pub(crate) pool: BlockPool,
    pub(crate) lease: Duration,
    pub(crate) drain: Duration,

    pub(crate) state: WorkerState,
    pub(crate) executor_failure: Option<String>,
    /// When a draining worker ends what still runs.
    pub(crate) drain_deadline: Option<Instant>,
    /// It has done so.
    pub(crate) has_ended_drain: bool,
    /// When something of a prefill (by key) or a decode (by key) runs out of budget.
    pub(crate) deadlines: BTreeSet<(Instant, u64)>,
    pub(crate) next_key: u64,

    /// Prompts in the engine, by key.
    pub(crate) prefills: HashMap<u64, Prefilling>,
    /// Staged KV.
    pub(crate) leases: LeaseTable<HeldBlocks>,
    pub(crate) pace: Pace,

    /// Pulls and generations, by key.
    pub(crate) decodes: HashMap<u64, Decoding>,
    /// Decode jobs that wait for blocks.
    pub(crate) line: Line,
    pub(crate) pulls: JoinSet<Pulled>,
    pub(crate) pull_places: Arc<Semaphore>,
    pub(crate) agent: Option<Agent>,
    pub(crate) peers: Peers,
    pub(crate) links: JoinSet<LinkOutcome>,

    pub(crate) api_servers: ApiServers,
    pub(crate) shared_load: SharedLoad,
    /// Beats in a row that found blocks in use by nobody.
    pub(crate) stray_beats: u32,
    /// When a worker whose executor broke ends, to be started again by whoever watches over it.
    pub(crate) end_after_failure: Option<Instant>,

    /// Whether this thread may spin while a hand-over is near.
    pub(crate) may_spin: bool,
    /// Until when it does after a prompt was staged.
    pub(crate) awake_until: Instant,
}

/// A prompt's release comes within this time of its handle, or its decode worker is busy.
const RELEASE_NEAR: Duration = Duration::from_millis(20);

/// For how long a worker whose executor broke still says so, and refuses what comes, before it ends.
const FAILURE_SHOWN: Duration = Duration::from_secs(3);

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
            let next = self.next_deadline();
            // The clock and the rare things stand before the inbox, so that a flood of jobs starves none.
            tokio::select! {
                biased;
                () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => self.on_time(),
                _ = beat.tick() => self.on_beat_due(*is_up.borrow()),
                () = &mut shutdown, if self.drain_deadline.is_none() => self.begin_drain(),
                Ok(()) = is_up.changed() => self.on_bus(*is_up.borrow_and_update()),
                event = events.recv() => match event {
                    Some(event) => self.on_engine(event),
                    None => {
                        self.on_executor_failed("the engine thread ended");
                        return Err(WorkerError::Executor { detail: "the engine thread ended".to_owned() });
                    }
                },
                Some(pulled) = self.pulls.join_next() => self.on_pulled(pulled),
                Some(link) = self.links.join_next() => self.on_link(link),
                message = bus.hello.next() => {
                    open(message)?;
                    self.send_beat();
                }
                message = bus.api_beats.next() => self.on_api_beat(&open(message)?),
                message = bus.beats.next() => self.on_beat(&open(message)?),
                message = bus.inbox.next() => self.on_inbox(open(message)?),
                // Looks at the bus and comes back.
                () = tokio::task::yield_now(), if self.is_awake() => {}
            }
        }
        match self.executor_failure.take() {
            None => Ok(()),
            Some(detail) => Err(WorkerError::Executor { detail }),
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

    pub(crate) fn on_inbox(&mut self, message: Message) {
        let (cluster, me) = (&self.cluster, &self.me.worker);
        let subject = message.subject.as_str();
        if subject == cluster.prefill(me) {
            self.on_prefill(message);
        } else if subject == cluster.decode(me) {
            self.on_decode(message);
        } else if subject == cluster.release(me) {
            self.on_release(&message);
        } else if subject == cluster.abort(me) {
            self.on_abort(&message);
        }
        // The rest is our own beats, and `describe`, which the service answers.
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
                for key in self.keys_of(|of| *of == abort.request) {
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
        let keys: Vec<_> = self.keys_of(|of| *of == request);
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

    fn keys_of(&self, of: impl Fn(&RequestId) -> bool) -> Vec<u64> {
        let prefills = self
            .prefills
            .iter()
            .filter(|(_, entry)| of(&entry.request))
            .map(|(key, _)| *key);
        let decodes = self
            .decodes
            .iter()
            .filter(|(_, entry)| of(&entry.route.request))
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
            let message = "the request's time budget ran out on the worker";
            self.end_key(key, Some(Failure::new(FailureCode::Deadline, message)));
        }
        if self
            .drain_deadline_ahead()
            .is_some_and(|deadline| deadline <= now)
        {
            self.end_drain();
        }
        for action in self.peers.tick(now) {
            self.act(action);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let budget = self.deadlines.first().map(|(deadline, _)| *deadline);
        [
            self.end_after_failure,
            self.leases.next_deadline(),
            budget,
            self.peers.next_retry(),
            self.drain_deadline_ahead(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn on_beat_due(&mut self, is_up: bool) {
        let now = Instant::now();
        if is_up {
            self.drop_gone_api_servers(now);
            for action in self.peers.tick(now) {
                self.act(action);
            }
        }
        self.look_for_strays();
        self.send_beat();
    }

    /// While the bus was away, silence proved nothing about anybody.
    fn on_bus(&mut self, is_up: bool) {
        if is_up {
            let now = Instant::now();
            self.peers.excuse_silence(now);
            self.api_servers.excuse_silence(now);
            self.send_beat();
        }
    }

    fn on_api_beat(&mut self, message: &Message) {
        match decode::<ApiBeat>(&message.payload) {
            Ok(beat) if speaker(&message.subject) != beat.api_server.as_str() => {
                tracing::warn!(subject = %message.subject, api_server = %beat.api_server, "a beat in another API server's name");
            }
            Ok(beat) => {
                // One whose life is over has nothing more to say.
                let _ = self.heard_api_server(Instant::now(), &beat.api_server, beat.incarnation);
            }
            Err(error) => tracing::debug!(%error, "an API server's beat was not understood"),
        }
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

    /// A beat or a job came from this life of an API server. What a former one asked for ends at once.
    pub(crate) fn heard_api_server(
        &mut self,
        now: Instant,
        api_server: &ApiServerId,
        life: Life,
    ) -> Result<(), Refusal> {
        match self.api_servers.heard(now, api_server, life) {
            Heard::Alive => Ok(()),
            Heard::Reborn => {
                self.end_requests_of(
                    api_server,
                    "API server started anew: its former requests end",
                );
                Ok(())
            }
            Heard::Ended => Err(Refusal::Malformed {
                detail: format!(
                    "another API server has joined as {api_server} since: give each a name of its own"
                ),
            }),
        }
    }

    fn drop_gone_api_servers(&mut self, now: Instant) {
        let gone_after = Duration::from_millis(GONE_AFTER_MS);
        for api_server in self.api_servers.forget_silent(now, gone_after) {
            self.end_requests_of(&api_server, "API server gone: its requests end");
        }
    }

    /// Nobody waits for what this API server asked for until now.
    fn end_requests_of(&mut self, api_server: &ApiServerId, why: &str) {
        let leases = self.leases.abandon(api_server);
        let prefills = self
            .prefills
            .iter()
            .filter(|(_, entry)| entry.api_server == *api_server);
        let decodes = self
            .decodes
            .iter()
            .filter(|(_, entry)| entry.route.api_server == *api_server);
        let keys: Vec<_> = prefills
            .map(|(key, _)| *key)
            .chain(decodes.map(|(key, _)| *key))
            .collect();
        if leases + keys.len() > 0 {
            tracing::info!(%api_server, requests = keys.len(), leases, "{why}");
        }
        for key in keys {
            self.end_key(key, None);
        }
    }

    fn has_shown_failure(&self) -> bool {
        self.end_after_failure
            .is_some_and(|end| end <= Instant::now())
    }

    /// The executor is out of service. What it left in the arena is unknown, so no lease is good. Nothing in this process can
    /// mend it: it ends soon, with an error, and a supervisor starts it anew.
    fn on_executor_failed(&mut self, message: &str) {
        self.executor_failure = Some(message.to_owned());
        self.end_after_failure = Some(Instant::now() + FAILURE_SHOWN);
        self.state = WorkerState::Failed;
        let leases = self.leases.clear();
        let keys: Vec<_> = self
            .prefills
            .keys()
            .chain(self.decodes.keys())
            .copied()
            .collect();
        tracing::error!(message, leases, requests = keys.len(), "out of service");
        for key in keys {
            self.end_key(key, Some(Failure::new(FailureCode::Executor, message)));
        }
        // Nothing will report these as left any more.
        self.prefills.clear();
        self.decodes.clear();
        self.deadlines.clear();
        self.send_beat();
    }

    /// Blocks in use while nobody holds any are lost blocks.
    fn look_for_strays(&mut self) {
        let busy = !self.prefills.is_empty()
            || !self.decodes.is_empty()
            || self.leases.len() > 0
            || self.executor_failure.is_some();
        let stats = self.pool.stats();
        if busy || stats.used == 0 {
            self.stray_beats = 0;
            return;
        }
        self.stray_beats += 1;
        // A pull that was cut short may hold its blocks for a while: those are quarantined.
        if self.stray_beats == 3 && stats.quarantined == 0 {
            tracing::error!(?stats, "blocks are in use and nobody uses them: a defect");
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
            tracing::warn!(error, message = M::NAME, "not sent");
        }
    }
}

/// The subscription's next message; without subscription the connection is closed for good.
fn open(message: Option<Message>) -> Result<Message, WorkerError> {
    message.ok_or_else(|| WorkerError::System {
        what: "listening on the bus",
        detail: "the connection was closed".to_owned(),
    })
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
