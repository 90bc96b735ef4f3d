//! The API servers that have something here: when each was last heard, and which life of it.
//!
//! A request ends with the life of the API server that asked for it. Usually that life falls silent; an API server that is
//! started again under its old name is not silent for long, so a new incarnation ends what the former one had, once that one
//! has missed a beat ([`NAME_FREE_AFTER_MS`]). As long as the former one still beats, two processes have one name: the newcomer
//! is refused, and what the first one asked for goes on. Messages of several connections may overtake each other: a life that
//! has ended stays ended, however late a message of it comes.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use baton_protocol::deadlines::NAME_FREE_AFTER_MS;
use baton_protocol::{ApiServerId, Incarnation};
use tokio::time::Instant;

/// Ended lives that are remembered of one API server. Their last messages come within seconds, or not at all.
const ENDED_MAX: usize = 8;

/// A life that was silent for this long gives way to a new one.
const NAME_FREE_AFTER: Duration = Duration::from_millis(NAME_FREE_AFTER_MS);

/// Which life of an API server; those of old do not say.
pub(crate) type Life = Option<Incarnation>;

/// What a message says of the life of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It goes on, or is not known here.
    Alive,
    /// A new one: what the former one asked for is over.
    Restarted,
    /// Another one has the name and was heard just now. It has lost it if it stays silent for this long.
    Contested(Duration),
    /// It is over: another one was heard since.
    Ended,
}

/// Only those with something here are kept: that bounds the map.
#[derive(Default)]
pub(crate) struct ApiServers {
    known: BTreeMap<ApiServerId, Known>,
}

struct Known {
    heard: Instant,
    life: Life,
    ended: VecDeque<Life>,
}

impl ApiServers {
    /// A beat or a job came from this life.
    pub(crate) fn heard(&mut self, now: Instant, id: &ApiServerId, life: Life) -> Heard {
        let Some(known) = self.known.get_mut(id) else {
            return Heard::Alive;
        };
        if known.life == life {
            known.heard = now;
            return Heard::Alive;
        }
        if known.ended.contains(&life) {
            return Heard::Ended;
        }
        let silent = now.saturating_duration_since(known.heard);
        if silent < NAME_FREE_AFTER {
            return Heard::Contested(NAME_FREE_AFTER - silent);
        }
        known.ended.truncate(ENDED_MAX - 1);
        known.ended.push_front(known.life);
        (known.heard, known.life) = (now, life);
        Heard::Restarted
    }

    /// Something of this life is here from now on. What [`Self::heard`] said of it was not [`Heard::Ended`].
    pub(crate) fn note(&mut self, now: Instant, id: &ApiServerId, life: Life) {
        self.known.entry(id.clone()).or_insert_with(|| Known {
            heard: now,
            life,
            ended: VecDeque::new(),
        });
    }

    /// Forgets those silent for this long, and names them.
    pub(crate) fn forget_silent(&mut self, now: Instant, silence: Duration) -> Vec<ApiServerId> {
        let gone = |known: &mut Known| now.duration_since(known.heard) >= silence;
        self.known
            .extract_if(.., |_, known| gone(known))
            .map(|(id, _)| id)
            .collect()
    }

    /// Silence until now proved nothing.
    pub(crate) fn excuse_silence(&mut self, now: Instant) {
        self.known.values_mut().for_each(|known| known.heard = now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_secs(4);

    fn id() -> ApiServerId {
        ApiServerId::new("api-0").unwrap()
    }

    fn life(number: u64) -> Life {
        Some(Incarnation(number))
    }

    #[test]
    fn a_new_life_ends_a_former_one_that_missed_its_beat_for_good() {
        let (mut known, mut now) = (ApiServers::default(), Instant::now());
        assert_eq!(known.heard(now, &id(), life(1)), Heard::Alive);
        known.note(now, &id(), life(1));
        assert_eq!(known.heard(now, &id(), life(1)), Heard::Alive);
        for number in [2, 3] {
            now += NAME_FREE_AFTER;
            assert_eq!(known.heard(now, &id(), life(number)), Heard::Restarted);
            let before = life(number - 1);
            assert_eq!(known.heard(now, &id(), before), Heard::Ended, "too late");
            assert_eq!(known.heard(now, &id(), life(number)), Heard::Alive);
        }
        assert_eq!(known.heard(now, &id(), life(1)), Heard::Ended);
    }

    #[test]
    fn a_newcomer_takes_no_name_from_one_that_still_beats() {
        let (mut known, start) = (ApiServers::default(), Instant::now());
        known.note(start, &id(), life(1));
        let beat = Duration::from_secs(1);
        for seconds in 0..10 {
            let now = start + beat * seconds;
            assert_eq!(known.heard(now, &id(), life(1)), Heard::Alive);
            let newcomer = known.heard(now + beat / 2, &id(), life(2));
            assert_eq!(newcomer, Heard::Contested(beat), "after {seconds} s");
        }
    }

    #[test]
    fn one_that_says_no_life_is_a_life_too() {
        let (mut known, now) = (ApiServers::default(), Instant::now());
        known.note(now, &id(), None);
        assert_eq!(known.heard(now, &id(), None), Heard::Alive);
        let later = now + NAME_FREE_AFTER;
        assert_eq!(
            known.heard(later, &id(), life(1)),
            Heard::Restarted,
            "an upgrade"
        );
    }

    #[test]
    fn messages_of_an_ended_life_do_not_keep_a_name_alive() {
        let (mut known, start) = (ApiServers::default(), Instant::now());
        known.note(start, &id(), life(1));
        let taken = start + NAME_FREE_AFTER;
        assert_eq!(known.heard(taken, &id(), life(2)), Heard::Restarted);
        let later = taken + SILENCE;
        assert_eq!(known.heard(later, &id(), life(1)), Heard::Ended);
        assert_eq!(known.forget_silent(later, SILENCE), [id()]);
        assert_eq!(
            known.heard(later, &id(), life(1)),
            Heard::Alive,
            "forgotten"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut known, mut now) = (ApiServers::default(), Instant::now());
        known.note(now, &id(), life(0));
        for number in 1..1_000 {
            now += NAME_FREE_AFTER;
            assert_eq!(known.heard(now, &id(), life(number)), Heard::Restarted);
        }
        assert_eq!(known.known[&id()].ended.len(), ENDED_MAX);
    }
}
