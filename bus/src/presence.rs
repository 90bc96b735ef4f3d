//! Whether silence says anything about others: only to who hears itself.
//!
//! What one publishes comes back over the bus. As long as it does, whoever is not heard is silent by itself. When it does not,
//! because the connection is gone, because the bus hangs, or because this very process was stopped for a while, nothing
//! follows about anybody else.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Whether this process hears itself on the bus. Clones are one and the same.
#[derive(Clone, Debug)]
pub struct Presence {
    state: Arc<Mutex<State>>,
    silent_after: Duration,
}

#[derive(Debug)]
struct State {
    is_connected: bool,
    /// When our own beat last came back.
    echo: Instant,
}

/// Why nothing can be said or heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusFault {
    /// There is no connection.
    Disconnected,
    /// There is one, and nothing comes over it, not even what we say ourselves.
    Silent(Duration),
}

impl fmt::Display for BusFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected => f.write_str("the bus is not connected"),
            Self::Silent(time) => write!(
                f,
                "the bus is silent: our own beats have not come back for {:.1} s",
                time.as_secs_f32()
            ),
        }
    }
}

impl Presence {
    /// Connected now. `silent_after`: who has not heard itself for this long does not hear.
    pub fn new(now: Instant, silent_after: Duration) -> Self {
        let state = State {
            is_connected: true,
            echo: now,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            silent_after,
        }
    }

    /// The connection came, or went. One that came proves nothing before something is heard over it.
    pub fn set_connected(&self, is_connected: bool) {
        self.state().is_connected = is_connected;
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        self.state().is_connected
    }

    /// Our own beat came back. The answer is for how long none had: if it is as long as silence takes, nothing that others did
    /// meanwhile was heard.
    pub fn echo(&self, now: Instant) -> Duration {
        let state = &mut *self.state();
        let before = std::mem::replace(&mut state.echo, now);
        now.saturating_duration_since(before)
    }

    /// Why nothing is heard now, if so.
    pub fn fault(&self, now: Instant) -> Option<BusFault> {
        let state = self.state();
        let silent = now.saturating_duration_since(state.echo);
        match silent {
            _ if !state.is_connected => Some(BusFault::Disconnected),
            _ if silent >= self.silent_after => Some(BusFault::Silent(silent)),
            _ => None,
        }
    }

    /// Whether those who are silent now are so by themselves.
    pub fn hears(&self, now: Instant) -> bool {
        self.fault(now).is_none()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_millis(2_500);
    const BEAT: Duration = Duration::from_secs(1);

    #[test]
    fn who_hears_itself_hears() {
        let start = Instant::now();
        let presence = Presence::new(start, SILENCE);
        for beats in 1..10 {
            let now = start + BEAT * beats;
            assert!(presence.hears(now), "after {beats} beats");
            assert_eq!(presence.echo(now), BEAT);
        }
    }

    #[test]
    fn who_does_not_hear_itself_for_long_is_deaf_until_it_does() {
        let start = Instant::now();
        let presence = Presence::new(start, SILENCE);
        let just_before = start + SILENCE - Duration::from_nanos(1);
        assert!(presence.hears(just_before));
        let now = start + SILENCE;
        assert_eq!(presence.fault(now), Some(BusFault::Silent(SILENCE)));
        assert_eq!(
            presence.echo(now + BEAT),
            SILENCE + BEAT,
            "how long it was deaf"
        );
        assert!(presence.hears(now + BEAT));
    }

    #[test]
    fn without_a_connection_nothing_is_heard_and_with_one_not_yet_anything() {
        let start = Instant::now();
        let presence = Presence::new(start, SILENCE);
        let other = presence.clone();
        other.set_connected(false);
        assert!(!presence.is_connected());
        assert_eq!(presence.fault(start), Some(BusFault::Disconnected));
        let now = start + SILENCE;
        assert_eq!(presence.fault(now), Some(BusFault::Disconnected));
        other.set_connected(true);
        assert_eq!(presence.fault(now), Some(BusFault::Silent(SILENCE)));
        other.echo(now);
        assert!(presence.hears(now));
    }

    #[test]
    fn a_fault_is_a_sentence() {
        assert_eq!(
            BusFault::Disconnected.to_string(),
            "the bus is not connected"
        );
        assert_eq!(
            BusFault::Silent(SILENCE).to_string(),
            "the bus is silent: our own beats have not come back for 2.5 s"
        );
    }
}
