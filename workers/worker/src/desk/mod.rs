//! The desk: the one task that owns a worker's requests, leases, peers and clock.
//!
//! Everything that happens comes to it as a message, goes to the side that it concerns, and is carried out at once; nothing here
//! waits. What takes time runs elsewhere and reports back: forward steps on the engine thread, pulls and connections
//! in tasks of their own, publishing in the publisher task.

mod ending;
mod parts;
mod prefixes;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_nats::Message;
use baton_protocol::deadlines::BEAT_INTERVAL_MS;
use baton_protocol::subjects::speaker;
use baton_protocol::{
    Abort, ApiBeat, ApiServerId, Beat, DecodeJob, Drain, Draining, Failure, FailureCode, Hello,
    PROTOCOL_VERSION, PrefillJob, PrefixesAsk, Progress, Refusal, Release, Released, Renew,
    Renewed, decode,
};
use baton_watchdog::Pulse;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::WorkerError;
use crate::bus::{Heard, Subscriptions};
use crate::common::Common;
use crate::context::{self, ContextSide, Judged, progress_failed};
use crate::decode::{self, DecodeSide};
use crate::engine_thread::{EngineEvent, Prefilled};
use crate::presence::{Life, Presence};
use crate::watch::Stuck;

pub(crate) use parts::Parts;

/// A worker's state.
pub(crate) struct Desk {
    pub(crate) common: Common,
    /// Runs prompts; `None` where the role does not.
    pub(crate) context: Option<ContextSide>,
    /// Generates; `None` where the role does not.
    pub(crate) decode: Option<DecodeSide>,
    pub(crate) presence: Presence,
    /// Its engine thread hangs, and cannot be waited for.
    pub(crate) hangs: bool,
    /// Beats in a row that found blocks in use by nobody.
    stray_beats: u32,
    /// What the next key was at the last beat.
    keys_at_beat: u64,
    /// Shows the watchdog that the desk goes round.
    pulse: Pulse,
    /// What the watchdog found stuck.
    stuck: mpsc::Receiver<Stuck>,
    /// Whether this thread may spin while a hand-over is near.
    may_spin: bool,
    /// Until when it does after a prompt was staged.
    awake_until: Instant,
    /// Something entered the prefix index or left it.
    prefix_bell: Arc<Notify>,
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
            v: PROTOCOL_VERSION,
            from: self.common.me.worker.to_string(),
        };
        self.common.send(self.common.cluster.hello(), &hello);
        let prefix_bell = Arc::clone(&self.prefix_bell);
        while !self.is_drained() && !self.presence.has_shown_failure(Instant::now()) {
            self.pulse.beat();
            let next = self.next_deadline();
            let is_awake = self.is_awake();
            // The clock and the rare things stand before the bus, so that a flood starves none.
            tokio::select! {
                biased;
                () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => self.on_time(),
                _ = beat.tick() => self.on_beat_due(),
                () = &mut shutdown, if !self.presence.is_draining() => self.begin_drain(),
                () = prefix_bell.notified() => self.presence.on_prefix_change(),
                Some(stuck) = self.stuck.recv() => self.on_stuck(&stuck),
                Ok(()) = is_up.changed() => self.on_bus(*is_up.borrow_and_update()),
                event = events.recv() => match event {
                    Some(event) => self.on_engine(event),
                    None => {
                        self.on_executor_failed("the engine thread ended");
                        return Err(WorkerError::Failed { detail: "the engine thread ended".to_owned() });
                    }
                },
                Some(ended) = next_ended(&mut self.decode) => self.on_task(ended),
                heard = bus.next() => {
                    self.on_heard(heard?);
                    // A flood would fill up faster than it is looked at message by message.
                    let until = Instant::now() + AT_A_TIME;
                    while Instant::now() < until && let Some(heard) = bus.try_next() {
                        self.on_heard(heard);
                    }
                }
                // Looks at the bus and comes back.
                () = tokio::task::yield_now(), if is_awake => {}
            }
        }
        match self.presence.failure() {
            None => Ok(()),
            Some(detail) => Err(WorkerError::Failed {
                detail: detail.to_owned(),
            }),
        }
    }

    /// Whether a hand-over is near. A thread that sleeps takes 0.2 ms to begin, as long as a GPU takes to read 600 tokens of KV,
    /// and a hand-over would wait for that four times.
    fn is_awake(&self) -> bool {
        let prefills = self.context.as_ref();
        let pulls = self.decode.as_ref();
        self.may_spin
            && (prefills.is_some_and(|context| !context.prefills.is_empty())
                || pulls.is_some_and(|decode| !decode.pulls.is_empty())
                || Instant::now() < self.awake_until)
    }

    fn on_heard(&mut self, heard: Heard) {
        match heard {
            Heard::Inbox(message) => self.on_inbox(message),
            Heard::Beat(message) => self.on_beat(&message),
            Heard::ApiBeat(message) => self.on_api_beat(&message),
            Heard::Hello => self.presence.on_hello(Instant::now()),
        }
    }

    fn on_inbox(&mut self, message: Message) {
        let (cluster, me) = (&self.common.cluster, &self.common.me.worker);
        let subject = message.subject.as_str();
        if subject == cluster.prefill(me) {
            self.on_prefill(message);
        } else if subject == cluster.decode(me) {
            self.on_decode(message);
        } else if subject == cluster.release(me) {
            self.on_release(&message);
        } else if subject == cluster.lease(me) {
            self.on_lease(message);
        } else if subject == cluster.renew(me) {
            self.on_renew(&message);
        } else if subject == cluster.progress(me) {
            self.on_progress(message);
        } else if subject == cluster.abort(me) {
            self.on_abort(&message);
        } else if subject == cluster.drain(me) {
            self.on_drain(message);
        } else if subject == cluster.peers(me) {
            if let Some(reply) = message.reply {
                self.presence.on_peers_asked(&self.common, reply);
            }
        } else if subject == cluster.prefix_pages(me) {
            self.on_prefixes_asked(message);
        } else if subject == cluster.beat(me) {
            self.on_echo();
        }
        // The rest is `describe`, which the service answers, and our own reports of prefixes.
    }

    fn on_prefixes_asked(&mut self, message: Message) {
        let Some(reply) = message.reply else {
            return;
        };
        match decode::<PrefixesAsk>(&message.payload) {
            Ok(ask) => self.presence.on_prefixes_asked(&self.common, &ask, reply),
            Err(error) => tracing::debug!(%error, "a request for prefixes was not understood"),
        }
    }

    fn on_prefill(&mut self, message: Message) {
        let Some(reply) = message.reply else {
            tracing::debug!("a prefill job without reply subject was ignored");
            return;
        };
        let job = decode::<PrefillJob>(&message.payload).map_err(malformed);
        let taken = job.and_then(|mut job| {
            let now = Instant::now();
            self.takes_job_of(now, &job.api_server, job.api_incarnation)?;
            let context = self.context.as_mut().ok_or_else(|| Refusal::WrongRole {
                detail: "this worker runs no prompts: its role is decode".to_owned(),
            })?;
            if context.judge(&self.common, &mut job, &reply)? == Judged::Settled {
                return Ok(());
            }
            // A request has one live try: what an earlier one left here ends.
            self.end_request(job.request, None);
            let (api_server, life) = (&job.api_server, job.api_incarnation);
            self.presence.note_api_server(now, api_server, life);
            match &mut self.context {
                Some(context) => {
                    let decode = self.decode.as_mut();
                    context.begin(&mut self.common, decode, now, job, reply.clone())
                }
                None => Ok(()),
            }
        });
        if let Err(refusal) = taken {
            context::refuse(&self.common, reply, refusal);
        }
    }

    fn on_decode(&mut self, message: Message) {
        let Some(reply) = message.reply else {
            tracing::debug!("a decode job without reply subject was ignored");
            return;
        };
        let job = decode::<DecodeJob>(&message.payload).map_err(malformed);
        let taken = job.and_then(|job| {
            let now = Instant::now();
            self.takes_job_of(now, &job.api_server, job.api_incarnation)?;
            let decode = self.decode.as_mut().ok_or_else(|| Refusal::WrongRole {
                detail: "this worker generates nothing: its role is context".to_owned(),
            })?;
            let (api_server, life) = (job.api_server.clone(), job.api_incarnation);
            decode.take(&mut self.common, self.context.as_mut(), now, job, &reply)?;
            self.presence.note_api_server(now, &api_server, life);
            Ok(())
        });
        if let Err(refusal) = taken {
            decode::refuse(&self.common, reply, refusal);
        }
    }

    /// Refuses a job before it is looked at: because of who asks, or because none is taken.
    fn takes_job_of(
        &mut self,
        now: Instant,
        api_server: &ApiServerId,
        life: Life,
    ) -> Result<(), Refusal> {
        self.heard_api_server(now, api_server, life)?;
        self.presence.takes_jobs()
    }

    fn on_release(&mut self, message: &Message) {
        let (valid, waited) = match decode::<Release>(&message.payload) {
            Ok(release) if self.on_lent_release(&release) => (true, None),
            Ok(release) => {
                let context = self.context.as_mut();
                let waited = context.and_then(|context| context.release(&self.common, &release));
                let valid = waited.is_some();
                // Another worker has it now: its place in this one's line is free.
                if let Some(decode) = &mut self.decode {
                    decode.leave_line(release.request);
                }
                tracing::debug!(request = %release.request, handle = %release.handle, by = %release.decode_worker, valid, "released");
                (valid, waited)
            }
            Err(error) => {
                tracing::debug!(%error, "a release was not understood");
                (false, None)
            }
        };
        if let Some(reply) = message.reply.clone() {
            let released = Released {
                v: PROTOCOL_VERSION,
                valid,
                handover_seconds: waited.map(|waited| waited.as_secs_f32()),
            };
            self.common.send(reply, &released);
        }
    }

    fn on_progress(&mut self, message: Message) {
        let Some(reply) = message.reply else {
            return;
        };
        match (decode::<Progress>(&message.payload), &mut self.context) {
            (Ok(progress), Some(context)) => context.progress(&self.common, &progress, reply),
            (Ok(_), None) => {
                let message = "this worker runs no prompts: its role is decode".to_owned();
                self.common.send(reply, &progress_failed(message));
            }
            (Err(error), _) => {
                tracing::debug!(%error, "a question after a prompt was not understood")
            }
        }
    }

    fn on_renew(&mut self, message: &Message) {
        let valid = match decode::<Renew>(&message.payload) {
            Ok(renew) => {
                let context = self.context.as_mut();
                let valid = context.is_some_and(|context| context.renew(&self.common, &renew));
                tracing::debug!(request = %renew.request, handle = %renew.handle, valid, "renewed");
                valid
            }
            Err(error) => {
                tracing::debug!(%error, "a renewal was not understood");
                false
            }
        };
        if let Some(reply) = message.reply.clone() {
            let v = PROTOCOL_VERSION;
            self.common.send(reply, &Renewed { v, valid });
        }
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

    /// What SIGTERM does, for an API server that was asked to have it done.
    fn on_drain(&mut self, message: Message) {
        let drain = match decode::<Drain>(&message.payload) {
            Ok(drain) => drain,
            Err(error) => return tracing::debug!(%error, "a request to drain was not understood"),
        };
        let is_meant = drain.incarnation == self.common.me.incarnation;
        if is_meant && !self.presence.is_draining() {
            tracing::info!(from = drain.from, "an API server asks this worker to leave");
            self.begin_drain();
        }
        if let Some(reply) = message.reply {
            let v = PROTOCOL_VERSION;
            self.common.send(
                reply,
                &Draining {
                    v,
                    draining: is_meant,
                },
            );
        }
    }

    fn on_engine(&mut self, event: EngineEvent) {
        match event {
            EngineEvent::Begun(begun) => {
                if let Some(context) = &mut self.context {
                    context.on_begun(&self.common, *begun);
                }
            }
            EngineEvent::Computed { key, computed } => {
                if let Some(context) = &mut self.context {
                    context.on_computed(&self.common, key, computed);
                }
            }
            EngineEvent::Prefilled(done) => self.on_prefilled(*done),
            EngineEvent::Left { key, refusal } => {
                if let Some(context) = &mut self.context {
                    context.left(&mut self.common, key, refusal);
                }
                self.decode_left(key);
            }
            EngineEvent::Ended { key, failure } => {
                tracing::error!(key, %failure, "a sequence could not go on here");
                if let Some(context) = &mut self.context {
                    context.failed(&mut self.common, key, failure);
                }
                self.decode_left(key);
            }
            EngineEvent::Failed { message } => self.on_executor_failed(&message),
        }
    }

    fn on_prefilled(&mut self, done: Prefilled) {
        let Some(context) = &mut self.context else {
            return;
        };
        if context.on_prefilled(&mut self.common, done) {
            self.awake_until = Instant::now() + RELEASE_NEAR;
        }
    }

    fn decode_left(&mut self, key: u64) {
        if let Some(decode) = &mut self.decode {
            decode.left(&mut self.common, key);
        }
    }

    /// A pull or a connection has ended.
    fn on_task(&mut self, ended: decode::Ended) {
        let Some(decode) = &mut self.decode else {
            return;
        };
        match ended {
            decode::Ended::Pull(pulled) => {
                if decode.on_pulled(&mut self.common, pulled) {
                    self.send_beat();
                }
            }
            decode::Ended::Prefix(pulled) => self.on_prefix_pulled(pulled),
            decode::Ended::Link(link) => {
                if decode.on_link(&self.common, link) {
                    self.presence.beat_soon(Instant::now());
                }
            }
        }
    }

    /// What the clock brings: leases and budgets that ran out, peers to try again, prefixes to report, the end of a drain.
    fn on_time(&mut self) {
        let now = Instant::now();
        self.end_late(now);
        let drain_ends = self.presence.drain_deadline_ahead();
        if drain_ends.is_some_and(|deadline| deadline <= now) {
            self.end_drain();
        }
        // Before a beat, which names the last report.
        self.presence.tell_prefixes(&self.common, now);
        if self.presence.owes_beat(now) {
            self.send_beat();
        }
        if self.presence.hears(now) {
            self.tick_peers(now);
        }
    }

    fn tick_peers(&mut self, now: Instant) {
        if let Some(decode) = &mut self.decode {
            decode.tick_peers(&self.common, now);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        // What would not be done now must not be due.
        let hears = self.presence.hears(Instant::now());
        let decode = self.decode.as_ref().filter(|_| hears);
        let deadlines = self.common.deadlines.first();
        let context = self.context.as_ref();
        [
            self.presence.next_deadline(),
            context.and_then(ContextSide::next_deadline),
            deadlines.map(|(deadline, _)| *deadline),
            decode.and_then(|decode| decode.peers.next_retry()),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn on_beat_due(&mut self) {
        let now = Instant::now();
        if let Some(decode) = &mut self.decode {
            decode.look_at_connections(&self.common, now);
        }
        if self.presence.hears(now) {
            self.drop_gone_api_servers(now);
            self.tick_peers(now);
        }
        self.look_for_strays();
        if let Some(context) = &mut self.context {
            context.answer_waiting(&self.common);
        }
        // Without a connection reports would only pile up.
        if self.presence.is_connected() {
            if let Some(context) = &self.context {
                context.report_prompts(&self.common);
            }
            if let Some(decode) = &self.decode {
                decode.report_jobs(&self.common);
            }
        }
        self.send_beat();
    }

    /// Beats now.
    pub(crate) fn send_beat(&mut self) {
        let decode = self.decode.as_ref();
        let peers = decode.map(|decode| decode.peer_health(&self.common));
        let decode_ms = decode.map_or(0, DecodeSide::mean_ms);
        let peers = peers.unwrap_or_default();
        let held = self.held();
        self.presence
            .send_beat(&self.common, &held, peers, decode_ms);
    }

    /// Our own beat came back.
    fn on_echo(&mut self) {
        let now = Instant::now();
        if self.presence.on_echo(now)
            && let Some(decode) = &mut self.decode
        {
            decode.peers.excuse_silence(now);
        }
    }

    fn on_bus(&mut self, is_up: bool) {
        let now = Instant::now();
        self.presence.on_bus(now, is_up);
        if is_up {
            if let Some(decode) = &mut self.decode {
                decode.peers.excuse_silence(now);
            }
            self.send_beat();
        }
    }

    /// Another worker's beat.
    fn on_beat(&mut self, message: &Message) {
        let Some(side) = &mut self.decode else {
            return;
        };
        match decode::<Beat>(&message.payload) {
            Ok(beat) if speaker(&message.subject) != beat.worker.as_str() => {
                tracing::warn!(subject = %message.subject, worker = %beat.worker, "a beat in another worker's name");
            }
            Ok(beat) => side.heard(&self.common, &beat),
            Err(error) => tracing::debug!(%error, "a beat was not understood"),
        }
    }

    fn on_api_beat(&mut self, message: &Message) {
        match decode::<ApiBeat>(&message.payload) {
            Ok(beat) if speaker(&message.subject) != beat.api_server.as_str() => {
                tracing::warn!(subject = %message.subject, api_server = %beat.api_server, "a beat in another API server's name");
            }
            // It serves nobody yet, and has no claim on the name.
            Ok(beat) if beat.stands_by() => {}
            Ok(beat) => {
                // One whose life is over has nothing more to say.
                let _ = self.heard_api_server(Instant::now(), &beat.api_server, beat.incarnation);
            }
            Err(error) => tracing::debug!(%error, "an API server's beat was not understood"),
        }
    }

    /// A beat or a job came from this life of an API server. What a former one asked for ends at once.
    fn heard_api_server(
        &mut self,
        now: Instant,
        api_server: &ApiServerId,
        life: Life,
    ) -> Result<(), Refusal> {
        if self.presence.heard_api_server(now, api_server, life)? {
            let why = "API server restarted: requests of its previous incarnation end";
            self.end_requests_of(api_server, why);
        }
        Ok(())
    }
}

/// The next pull or connection to end; `None` where there is none.
async fn next_ended(decode: &mut Option<DecodeSide>) -> Option<decode::Ended> {
    decode.as_mut()?.next_ended().await
}

fn malformed(error: baton_protocol::ProtocolError) -> Refusal {
    Refusal::Malformed {
        detail: error.to_string(),
    }
}
