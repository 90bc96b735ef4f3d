//! What the watchdog looks at in a worker, and what becomes of what hangs.
//!
//! A stuck executor or transfer thread is told to the desk, which takes the worker out of service and ends it. A desk that is
//! stuck itself can do nothing: the process is ended as it is. Either way a supervisor starts it again, and the API servers go on
//! elsewhere.

use std::fmt;
use std::time::Duration;

use baton_transfer::Agent;
use baton_watchdog::{Pulse, Turn, Watchdog, abort};
use tokio::sync::mpsc;

use crate::{Device, WorkerError};

/// The desk goes round at least with every beat, once a second, and nothing in it waits.
const DESK_PATIENCE: Duration = Duration::from_secs(15);

/// The transfer thread goes round every 100 ms; what takes longest in it, to map a peer's GPU memory, takes tens of milliseconds.
/// Pulls are given up before.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(15);

/// All that a worker still has to do when nothing is left to serve, beside its last step.
const LEAVING_PATIENCE: Duration = Duration::from_secs(30);

/// A transfer thread that was last round this long ago goes on. It sleeps for less.
const FRESH: Duration = Duration::from_millis(250);

/// What hangs, and for how long it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stuck {
    /// A step does not end.
    Executor { device: String, time: Duration },
    /// The thread that moves KV does not go round, or is no more.
    Transfer { time: Duration },
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Executor { device, time } => write!(
                f,
                "the executor hangs: {device} has been at one step for {} s",
                time.as_secs()
            ),
            Self::Transfer { time } => write!(
                f,
                "KV transfer hangs: its thread has not gone round for {} s",
                time.as_secs()
            ),
        }
    }
}

/// The watchdog of a worker. It looks until this is dropped.
pub(crate) struct Watching {
    /// The desk's, at rest before and after it serves.
    pub(crate) desk: Pulse,
    /// Beats once, when the worker begins to end.
    pub(crate) leaving: Pulse,
    _watchdog: Watchdog,
}

impl Watching {
    /// Begins to look. What is stuck and is not the desk's own affair comes out of the receiver.
    pub(crate) fn start(
        engine: &Pulse,
        device: Device,
        agent: Option<&Agent>,
    ) -> Result<(Self, mpsc::Receiver<Stuck>), WorkerError> {
        let watchdog = Watchdog::start().map_err(|error| WorkerError::System {
            what: "starting the watchdog",
            detail: error.to_string(),
        })?;
        let (news, stuck) = mpsc::channel(4);
        let (desk, leaving) = (Pulse::default(), Pulse::default());
        watchdog.watch(&desk, DESK_PATIENCE, |time| {
            abort(format!(
                "the worker's desk has not gone round for {} s: the process is ended, to be started again",
                time.as_secs()
            ))
        });
        let step_time_max = device.step_time_max();
        watchdog.watch(&leaving, LEAVING_PATIENCE + step_time_max, |time| {
            abort(format!(
                "the worker was to leave and has not for {} s: the process is ended",
                time.as_secs()
            ))
        });
        let told = news.clone();
        watchdog.watch(engine, step_time_max, move |time| {
            let device = device.to_string();
            let _ = told.try_send(Stuck::Executor { device, time });
        });
        if let Some(agent) = agent.cloned() {
            let mut turn = 0;
            let turns = move || {
                turn += u64::from(agent.health().last_progress < FRESH);
                Turn::At(turn)
            };
            watchdog.watch_turns(turns, TRANSFER_PATIENCE, move |time| {
                let _ = news.try_send(Stuck::Transfer { time });
            });
        }
        let watching = Self {
            desk,
            leaving,
            _watchdog: watchdog,
        };
        Ok((watching, stuck))
    }
}
