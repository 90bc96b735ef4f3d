//! Whether this server may serve under its name.
//!
//! Workers know an API server by its name, and end what it asked for when a new incarnation takes the name over. So of two
//! processes with one name only one may serve. One whose name another process may have listens before it serves
//! ([`NAME_CLAIM_MS`]); if it hears another one it stands by until that one has been silent for [`GONE_AFTER`]. Where both
//! serve all the same, because the first one was stopped for a while or the bus was cut in two, the later one keeps the
//! name: it began after silence, and workers have gone over to it.

use std::time::Duration;

use baton_protocol::deadlines::{BEAT_INTERVAL_MS, NAME_CLAIM_MS};
use baton_protocol::{ApiBeat, ApiServerId, Incarnation};
use tokio::time::Instant;

use crate::fleet::membership::GONE_AFTER;

/// How long a newcomer listens.
const CLAIM: Duration = Duration::from_millis(NAME_CLAIM_MS);

/// The state of the claim.
#[derive(Debug)]
pub struct Name {
    name: ApiServerId,
    incarnation: Incarnation,
    state: State,
    /// When another one that serves under this name was last heard.
    rival: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Listens until then.
    Listens(Instant),
    StandsBy,
    Serves {
        since: Instant,
    },
}

impl Name {
    /// `is_shared`: another process may have it, or have had it a moment ago.
    pub fn new(name: ApiServerId, incarnation: Incarnation, is_shared: bool, now: Instant) -> Self {
        let state = match is_shared {
            true => State::Listens(now + CLAIM),
            false => State::Serves { since: now },
        };
        Self {
            name,
            incarnation,
            state,
            rival: None,
        }
    }

    /// Whether requests may be taken.
    pub fn serves(&self) -> bool {
        matches!(self.state, State::Serves { .. })
    }

    /// Whether it waits for nothing but the end of another one.
    pub fn stands_by(&self) -> bool {
        self.state == State::StandsBy
    }

    /// For our own beat: for how long it has served, at least 1; 0 if it does not.
    pub fn serving_ms(&self, now: Instant) -> u64 {
        match self.state {
            State::Serves { since } => (now - since).as_millis().max(1) as u64,
            _ => 0,
        }
    }

    /// Time has passed. While the bus is not well, nobody is silent by himself.
    pub fn look(&mut self, now: Instant, bus_is_well: bool) {
        match self.state {
            State::Listens(_) if !bus_is_well => self.state = State::Listens(now + CLAIM),
            State::Listens(until) if now >= until => self.state = State::Serves { since: now },
            State::StandsBy if !bus_is_well => self.rival = Some(now),
            State::StandsBy if !self.rival_is_there(now) => {
                tracing::warn!(name = %self.name, "the other API server of this name is gone: this one serves now");
                self.state = State::Serves { since: now };
            }
            _ => {}
        }
    }

    /// An API server beat. True if this one has lost its name by it, with all that it has under way.
    pub fn heard(&mut self, beat: &ApiBeat, now: Instant) -> bool {
        let is_rival = beat.api_server == self.name && beat.incarnation != Some(self.incarnation);
        if !is_rival || beat.stands_by() {
            return false;
        }
        let is_new = !self.rival_is_there(now);
        self.rival = Some(now);
        let loses = match self.state {
            State::Listens(_) => true,
            State::StandsBy => false,
            State::Serves { .. } => self.is_earlier_than(beat, now),
        };
        if is_new || loses {
            let name = &self.name;
            tracing::error!(%name, loses, "another API server has this name too: give each a name of its own");
        }
        let served = self.serves();
        if loses {
            self.state = State::StandsBy;
        }
        loses && served
    }

    /// Whether the other one began to serve after this one. Within a beat nobody can tell, and the numbers decide. One of an
    /// earlier release does not say.
    fn is_earlier_than(&self, beat: &ApiBeat, now: Instant) -> bool {
        let Some(theirs) = beat.serving_ms else {
            return false;
        };
        let own = self.serving_ms(now);
        match own.abs_diff(theirs) < BEAT_INTERVAL_MS {
            true => beat.incarnation > Some(self.incarnation),
            false => own > theirs,
        }
    }

    fn rival_is_there(&self, now: Instant) -> bool {
        self.rival.is_some_and(|heard| now - heard < GONE_AFTER)
    }

    /// Why this server does not serve, or should not, for `/health`.
    pub fn fault(&self, now: Instant) -> Option<String> {
        let name = &self.name;
        match self.state {
            State::Listens(_) => Some(format!(
                "this API server listens for {:.1} s whether another one is called {name}",
                CLAIM.as_secs_f32()
            )),
            State::StandsBy => Some(format!(
                "another API server is called {name} too: this one stands by until that one has been silent for {:.1} s",
                GONE_AFTER.as_secs_f32()
            )),
            State::Serves { .. } if self.rival_is_there(now) => Some(format!(
                "another API server is called {name} too: workers end what one of them asks for"
            )),
            State::Serves { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::PROTOCOL_VERSION;

    use super::*;

    fn name(incarnation: u64, is_shared: bool, now: Instant) -> Name {
        let id = ApiServerId::new("api-0").unwrap();
        Name::new(id, Incarnation(incarnation), is_shared, now)
    }

    fn beat(incarnation: u64, serving_ms: Option<u64>) -> ApiBeat {
        ApiBeat {
            v: PROTOCOL_VERSION,
            api_server: ApiServerId::new("api-0").unwrap(),
            incarnation: Some(Incarnation(incarnation)),
            in_flight: 0,
            serving_ms,
        }
    }

    #[test]
    fn a_newcomer_serves_when_it_has_heard_nobody_of_its_name() {
        let now = Instant::now();
        let mut name = name(1, true, now);
        assert!(!name.serves() && name.fault(now).is_some());
        assert_eq!(name.serving_ms(now), 0);
        assert!(!name.heard(&beat(1, Some(0)), now), "its own");
        assert!(
            !name.heard(&beat(2, Some(0)), now),
            "that one does not serve"
        );
        name.look(now + CLAIM, false);
        assert!(!name.serves(), "the bus was silent: who is heard?");
        name.look(now + 2 * CLAIM, true);
        assert!(name.serves());
        assert_eq!(name.fault(now + 2 * CLAIM), None);
        assert_eq!(name.serving_ms(now + 2 * CLAIM), 1);
    }

    #[test]
    fn the_later_one_stands_by_until_the_first_is_gone() {
        let now = Instant::now();
        let mut name = name(2, true, now);
        assert!(
            !name.heard(&beat(1, Some(5_000)), now),
            "nothing was under way"
        );
        let later = now + 2 * CLAIM;
        name.look(later, true);
        assert!(name.stands_by());
        assert!(name.fault(later).unwrap().contains("api-0"), "{name:?}");
        name.look(now + GONE_AFTER, true);
        assert!(name.serves());
    }

    #[test]
    fn one_that_was_stopped_gives_its_name_up_to_whoever_has_taken_it() {
        let now = Instant::now();
        let mut stopped = name(1, false, now);
        let mut taker = name(2, false, now + 2 * GONE_AFTER);
        let then = now + 3 * GONE_AFTER;
        let of_stopped = beat(1, Some(stopped.serving_ms(then)));
        let of_taker = beat(2, Some(taker.serving_ms(then)));
        assert!(!taker.heard(&of_stopped, then) && taker.serves());
        assert!(stopped.heard(&of_taker, then) && !stopped.serves());
        stopped.look(then + GONE_AFTER, true);
        assert!(stopped.serves(), "the other is gone");
    }

    #[test]
    fn of_two_that_begin_at_once_one_serves() {
        let now = Instant::now();
        let [mut one, mut other] = [1, 2].map(|incarnation| name(incarnation, false, now));
        assert!(one.heard(&beat(2, Some(400)), now));
        assert!(!other.heard(&beat(1, Some(300)), now));
        assert!(!one.serves() && other.serves());
    }

    #[test]
    fn beside_one_of_an_earlier_release_it_says_so_and_serves() {
        let now = Instant::now();
        let mut name = name(1, false, now);
        assert!(!name.heard(&beat(2, None), now));
        assert!(name.serves() && name.fault(now).is_some());
        assert_eq!(name.fault(now + GONE_AFTER), None);
    }
}
