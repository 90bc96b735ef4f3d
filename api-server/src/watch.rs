//! What the watchdog looks at in an API server: the event loops of its threads.
//!
//! One that has not gone round for long answers nobody, and nothing can be done about it from within: the process is ended, and
//! whoever supervises it starts it again.

use std::sync::Arc;
use std::time::Duration;

use baton_watchdog::{Pulse, Watchdog, abort};
use tokio::time::{MissedTickBehavior, interval};

use crate::error::ApiServerError;

/// How often a loop shows that it goes round.
const PULSE_INTERVAL: Duration = Duration::from_secs(1);

/// Nothing on a loop takes longer than some milliseconds: large texts have threads of their own, large answers are rendered in pieces.
const LOOP_PATIENCE: Duration = Duration::from_secs(15);

/// The watchdog of one API server.
#[derive(Clone)]
pub struct LoopWatch(Arc<Watchdog>);

impl LoopWatch {
    /// Starts it.
    ///
    /// # Errors
    /// [`ApiServerError::System`] if there can be no more threads.
    pub fn start() -> Result<Self, ApiServerError> {
        let watchdog = Watchdog::start()
            .map_err(|error| ApiServerError::System(format!("starting the watchdog: {error}")))?;
        Ok(Self(Arc::new(watchdog)))
    }

    /// To be run on a loop for as long as that is to be watched; dropped with it at its end.
    pub fn show(&self, name: &'static str) -> impl Future<Output = ()> + Send + 'static {
        let pulse = Pulse::default();
        self.0.watch(&pulse, LOOP_PATIENCE, move |time| {
            let seconds = time.as_secs();
            abort(format!(
                "the API server's {name} has not gone round for {seconds} s: the process is ended, to be started again"
            ))
        });
        let shown = Shown(pulse);
        async move {
            let mut interval = interval(PULSE_INTERVAL);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                shown.0.beat();
            }
        }
    }
}

/// A loop that has ended is not stuck.
struct Shown(Pulse);

impl Drop for Shown {
    fn drop(&mut self) {
        self.0.rest();
    }
}
