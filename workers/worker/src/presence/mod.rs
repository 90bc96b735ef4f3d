//! What others know of this worker, and what it knows of whoever asks: its state, its beats, which API servers are there.
//!
//! Silence says something only as long as we hear ourselves ([`baton_bus::Presence`]).

mod api_servers;
mod beat;
mod peers_told;
mod prefixes_told;
mod service;

use std::time::Duration;

use baton_protocol::deadlines::{GONE_AFTER_MS, SUSPECT_AFTER_MS};
use baton_protocol::{ApiServerId, Refusal, WorkerState};
use tokio::time::Instant;

pub(crate) use api_servers::{Heard, Life};
pub(crate) use beat::{Held, SharedLoad};
pub(crate) use service::MicroService;

use api_servers::ApiServers;
use peers_told::PeersTold;
use prefixes_told::PrefixesTold;

/// Others who say hello within this time get the same beat.
const HELLO_WAIT: Duration = Duration::from_millis(10);

/// For how long a worker that is out of service still says so before it ends.
const FAILURE_SHOWN: Duration = Duration::from_secs(3);

/// A worker among others.
pub(crate) struct Presence {
    state: WorkerState,
    /// Why it is out of service.
    failure: Option<String>,
    /// When a worker that is out of service ends, to be started again by whoever watches over it.
    end_after_failure: Option<Instant>,
    /// How long a drain may take.
    drain: Duration,
    /// When a draining worker ends what still runs.
    drain_deadline: Option<Instant>,
    /// It has done so.
    has_ended_drain: bool,
    hearing: baton_bus::Presence,
    api_servers: ApiServers,
    /// When a beat is due besides those of the clock: somebody said hello, or there is news.
    beat_due: Option<Instant>,
    last_beat: Instant,
    peers_told: PeersTold,
    prefixes_told: PrefixesTold,
    shared_load: SharedLoad,
}

impl Presence {
    /// A worker that serves.
    pub(crate) fn new(now: Instant, drain: Duration, shared_load: SharedLoad) -> Self {
        Self {
            state: WorkerState::Serving,
            failure: None,
            end_after_failure: None,
            drain,
            drain_deadline: None,
            has_ended_drain: false,
            hearing: baton_bus::Presence::new(now, Duration::from_millis(SUSPECT_AFTER_MS)),
            api_servers: ApiServers::default(),
            beat_due: None,
            last_beat: now,
            peers_told: PeersTold::default(),
            prefixes_told: PrefixesTold::default(),
            shared_load,
        }
    }

    /// Refuses a job for a worker that takes none.
    pub(crate) fn takes_jobs(&self) -> Result<(), Refusal> {
        match self.state {
            WorkerState::Serving => Ok(()),
            _ => Err(Refusal::Draining),
        }
    }

    /// Whether those who are silent now are so by themselves.
    pub(crate) fn hears(&self, now: Instant) -> bool {
        self.hearing.hears(now)
    }

    /// Whether there is a connection to the bus.
    pub(crate) fn is_connected(&self) -> bool {
        self.hearing.is_connected()
    }

    /// Our own beat came back. Whether we did not hear before: then nobody's silence until now counts.
    pub(crate) fn on_echo(&mut self, now: Instant) -> bool {
        let was_deaf = !self.hears(now);
        if was_deaf {
            tracing::info!("the bus carries messages again");
            self.api_servers.excuse_silence(now);
        }
        self.hearing.echo(now);
        was_deaf
    }

    /// The connection came or went. What was said meanwhile was said to nobody.
    pub(crate) fn on_bus(&mut self, now: Instant, is_up: bool) {
        self.hearing.set_connected(is_up);
        if is_up {
            self.api_servers.excuse_silence(now);
        }
    }

    /// Somebody wants to know who is there. One beat answers all who ask within a moment.
    pub(crate) fn on_hello(&mut self, now: Instant) {
        self.beat_due.get_or_insert(now + HELLO_WAIT);
    }

    /// Whether a beat is due now besides those of the clock. It says so once.
    pub(crate) fn owes_beat(&mut self, now: Instant) -> bool {
        self.beat_due.take_if(|due| *due <= now).is_some()
    }

    /// A beat or a job came from this life of an API server. Whether that is a new one: what the former one asked for is over.
    ///
    /// # Errors
    /// Why a job of it is not taken.
    pub(crate) fn heard_api_server(
        &mut self,
        now: Instant,
        api_server: &ApiServerId,
        life: Life,
    ) -> Result<bool, Refusal> {
        match self.api_servers.heard(now, api_server, life) {
            Heard::Alive => Ok(false),
            Heard::Restarted => Ok(true),
            Heard::Contested(wait) => Err(Refusal::Busy {
                retry_after_ms: wait.as_millis() as u32,
            }),
            Heard::Ended => Err(Refusal::Malformed {
                detail: format!(
                    "another API server has joined as {api_server} since: give each a name of its own"
                ),
            }),
        }
    }

    /// Something of this life of an API server is here from now on.
    pub(crate) fn note_api_server(&mut self, now: Instant, api_server: &ApiServerId, life: Life) {
        self.api_servers.note(now, api_server, life);
    }

    /// Forgets API servers that fell silent, and names them.
    pub(crate) fn gone_api_servers(&mut self, now: Instant) -> Vec<ApiServerId> {
        let gone_after = Duration::from_millis(GONE_AFTER_MS);
        self.api_servers.forget_silent(now, gone_after)
    }

    /// Takes no more jobs.
    pub(crate) fn begin_drain(&mut self, now: Instant) {
        self.drain_deadline = Some(now + self.drain);
        if self.state == WorkerState::Serving {
            self.state = WorkerState::Draining;
        }
    }

    /// The time to finish is over.
    pub(crate) fn end_drain(&mut self) {
        self.has_ended_drain = true;
    }

    /// Whether it is to leave.
    pub(crate) fn is_draining(&self) -> bool {
        self.drain_deadline.is_some()
    }

    /// When [`Self::end_drain`] is due.
    pub(crate) fn drain_deadline_ahead(&self) -> Option<Instant> {
        self.drain_deadline.filter(|_| !self.has_ended_drain)
    }

    /// Out of service, for this reason.
    pub(crate) fn fail(&mut self, now: Instant, why: &str) {
        self.failure = Some(why.to_owned());
        self.end_after_failure = Some(now + FAILURE_SHOWN);
        self.state = WorkerState::Failed;
    }

    /// Why it is out of service, if it is.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Whether it was out of service for long enough.
    pub(crate) fn has_shown_failure(&self, now: Instant) -> bool {
        self.end_after_failure.is_some_and(|end| end <= now)
    }

    /// When something of this is due.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let deadlines = [
            self.end_after_failure,
            self.beat_due,
            self.drain_deadline_ahead(),
            // Nobody hears it otherwise.
            self.prefixes_told.due().filter(|_| self.is_connected()),
        ];
        deadlines.into_iter().flatten().min()
    }
}
