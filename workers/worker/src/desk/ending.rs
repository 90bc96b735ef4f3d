//! Whatever ends requests on both sides: an abort, an API server that is gone, a deadline, leaving, being out of service.

use std::time::Duration;

use baton_bus::Intake;
use baton_protocol::{ApiServerId, Failure, FailureCode, RequestId};
use tokio::time::{Instant, timeout};

use super::Desk;
use crate::context::ContextSide;
use crate::presence::Held;
use crate::watch::Stuck;

/// What was on its way when a worker left has come within this time.
const LATECOMERS: Duration = Duration::from_secs(1);

/// Beats in a row that must find blocks in use by nobody before that is called a defect: what ended just before one of them may
/// not have given its blocks back yet.
const STRAY_BEATS: u32 = 3;

impl Desk {
    /// Ends a request in every phase it may be in. Its decode try is told `failure`; its prefill's reply too.
    pub(super) fn end_request(&mut self, request: RequestId, failure: Option<Failure>) -> bool {
        let context = self.context.as_mut();
        let leased = context.is_some_and(|context| context.end_leases_of(request));
        if let Some(decode) = &mut self.decode {
            decode.leave_line(request);
        }
        let keys = self.keys_of(|_, of| *of == request);
        for key in &keys {
            self.end_key(*key, failure.clone());
        }
        leased || !keys.is_empty()
    }

    /// Ends a prompt that waits or runs.
    pub(super) fn end_prefill(&mut self, key: u64, failure: Option<Failure>) {
        if let Some(context) = &mut self.context {
            context.end(&mut self.common, key, failure);
        }
    }

    /// Ends one prefill or decode.
    pub(super) fn end_key(&mut self, key: u64, failure: Option<Failure>) {
        self.end_prefill(key, failure.clone());
        if let Some(decode) = &mut self.decode {
            decode.end(&mut self.common, key, failure);
        }
    }

    /// Keys of the prefills and decodes here whose API server and request are these.
    pub(super) fn keys_of(&self, are: impl Fn(&ApiServerId, &RequestId) -> bool) -> Vec<u64> {
        let prefills = self.context.iter().flat_map(|side| side.keys_of(&are));
        let decodes = self.decode.iter().flat_map(|side| side.keys_of(&are));
        prefills.chain(decodes).collect()
    }

    /// What is here.
    pub(crate) fn held(&self) -> Held {
        let mut held = Held::default();
        if let Some(context) = &self.context {
            held.prefills = context.prefills.len();
            held.leases = context.leases.len();
            held.lent = context.lent.len();
        }
        if let Some(decode) = &self.decode {
            held.decodes = decode.decodes.len();
            held.pulling = decode.pulling();
            held.batch_decoding = decode.decodes.len() - decode.interactive();
        }
        held
    }

    /// Nobody waits for what this API server asked for until now.
    pub(super) fn end_requests_of(&mut self, api_server: &ApiServerId, why: &str) {
        let context = self.context.as_mut();
        let leases = context.map_or(0, |context| context.abandon_leases(api_server));
        let keys = self.keys_of(|of, _| of == api_server);
        if leases + keys.len() > 0 {
            tracing::info!(%api_server, requests = keys.len(), leases, "{why}");
        }
        for key in keys {
            self.end_key(key, None);
        }
    }

    pub(super) fn drop_gone_api_servers(&mut self, now: Instant) {
        for api_server in self.presence.gone_api_servers(now) {
            self.end_requests_of(&api_server, "API server gone: its requests end");
        }
    }

    /// Ends what ran out of time.
    pub(super) fn end_late(&mut self, now: Instant) {
        if let Some(context) = &mut self.context {
            for request in context.expire_leases(now) {
                tracing::debug!(%request, "the lease ran out");
            }
        }
        while let Some(&(deadline, key)) = self.common.deadlines.first() {
            if now < deadline {
                break;
            }
            self.common.deadlines.remove(&(deadline, key));
            let decode = self.decode.as_ref();
            let place = decode.and_then(|decode| decode.place_of(&self.common, key));
            let place =
                place.unwrap_or_else(|| format!("it was prefilling on {}", self.common.me.worker));
            let message = format!("the request's time ran out while {place}");
            self.end_key(key, Some(Failure::new(FailureCode::Deadline, message)));
        }
    }

    /// Begins to leave. From here on every job is refused, so the API servers go elsewhere.
    pub(super) fn begin_drain(&mut self) {
        self.presence.begin_drain(Instant::now());
        let held = self.held();
        tracing::info!(
            prefills = held.prefills,
            decodes = held.decodes,
            leases = held.leases,
            "draining"
        );
        self.send_beat();
    }

    /// The time to finish is over: what still runs is handed back, to be retried elsewhere, and what is staged
    /// is given up, so that whoever still comes for it is told at once and not by a connection that breaks.
    pub(super) fn end_drain(&mut self) {
        let leases = self.end_leases();
        let keys = self.keys_of(|_, _| true);
        if keys.len() + leases > 0 {
            tracing::info!(
                requests = keys.len(),
                leases,
                "the drain time is over: the rest is handed back"
            );
        }
        for key in keys {
            let message = "the worker left before it was done";
            self.end_key(key, Some(Failure::new(FailureCode::Draining, message)));
        }
        self.presence.end_drain();
    }

    /// Whether it may go.
    pub(super) fn is_drained(&self) -> bool {
        self.presence.is_draining() && self.held().is_nothing()
    }

    /// Listens no more, and answers what was sent before the bus knew: an API server that chose this worker a moment ago goes
    /// elsewhere at once, and need not find out by its silence.
    pub(crate) async fn answer_latecomers(&mut self, inbox: &mut Intake) {
        let rest = async {
            inbox.drain();
            while let Some(message) = inbox.next().await {
                self.on_inbox(message);
            }
        };
        if timeout(LATECOMERS, rest).await.is_err() {
            tracing::debug!("the bus did not say who came late");
        }
    }

    /// The engine thread has said that the executor broke, to every try that it had too.
    pub(super) fn on_executor_failed(&mut self, message: &str) {
        let message = format!("the executor failed: {message}");
        let keys = self.leave_service(&message);
        for key in keys {
            self.end_key(key, Some(Failure::new(FailureCode::Executor, &message)));
        }
        self.forget_all();
    }

    /// Something has not gone on for longer than it ever takes.
    pub(super) fn on_stuck(&mut self, stuck: &Stuck) {
        if self.presence.failure().is_some() {
            return;
        }
        let message = stuck.to_string();
        let keys = self.leave_service(&message);
        match stuck {
            Stuck::Executor { .. } => {
                self.hangs = true;
                for key in keys {
                    // The engine thread, which tells its tries otherwise, says nothing any more.
                    let failure = Failure::new(FailureCode::Executor, &message);
                    self.end_prefill(key, Some(failure.clone()));
                    if let Some(decode) = &mut self.decode {
                        decode.give_up(&mut self.common, key, failure);
                    }
                }
            }
            Stuck::Transfer { .. } => {
                for key in keys {
                    self.end_key(key, Some(Failure::new(FailureCode::Internal, &message)));
                }
            }
        }
        self.forget_all();
    }

    /// Something of this process broke or hangs, and nothing in it can mend that. The worker says so for a while, in its beats and
    /// to whoever has something here, refuses what comes, and ends with an error; a supervisor starts it again. What is left in
    /// the arena is unknown, so no lease is good any more. Returns everything that is here and has to be told.
    fn leave_service(&mut self, message: &str) -> Vec<u64> {
        self.presence.fail(Instant::now(), message);
        let leases = self.end_leases();
        let keys = self.keys_of(|_, _| true);
        tracing::error!(message, leases, requests = keys.len(), "out of service");
        keys
    }

    fn end_leases(&mut self) -> usize {
        let context = self.context.as_mut();
        context.map_or(0, ContextSide::end_leases)
    }

    /// Nothing will report these as left any more.
    fn forget_all(&mut self) {
        if let Some(context) = &mut self.context {
            context.prefills.clear();
        }
        if let Some(decode) = &mut self.decode {
            decode.decodes.clear();
        }
        self.common.deadlines.clear();
        self.send_beat();
    }

    /// Blocks in use while nobody holds any are lost blocks.
    pub(super) fn look_for_strays(&mut self) {
        let busy = !self.held().is_nothing() || self.presence.failure().is_some();
        let stats = self.common.pool.stats();
        // What began since the last beat may have ended just now, and the engine gives its blocks back with the next step.
        let began = std::mem::replace(&mut self.keys_at_beat, self.common.next_key);
        if busy || stats.used == 0 || began != self.common.next_key {
            self.stray_beats = 0;
            return;
        }
        self.stray_beats += 1;
        // A pull that was cut short may hold its blocks for a while: those are quarantined.
        if self.stray_beats == STRAY_BEATS && stats.quarantined == 0 {
            tracing::error!(?stats, "blocks are in use and nobody uses them: a defect");
        }
    }
}
