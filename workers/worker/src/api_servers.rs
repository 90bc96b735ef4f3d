//! The API servers that have something here: when each was last heard, and which life of it.
//!
//! A request ends with the life of the API server that asked for it. Usually that life falls silent; an API server that is
//! started again under its old name is never silent for long, so a new incarnation ends what the former one had. Messages of
//! several connections may overtake each other: a life that has ended stays ended, however late its last words come.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use baton_protocol::{ApiServerId, Incarnation};
use tokio::time::Instant;

/// Ended lives that are remembered of one API server. Their last words come within seconds, or not at all.
const ENDED_MAX: usize = 8;

/// Which life of an API server; those of old do not say.
pub(crate) type Life = Option<Incarnation>;

/// What a message says of the life of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It goes on, or is not known here.
    Alive,
    /// A new one: what the former one asked for is over.
    Reborn,
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
        known.ended.truncate(ENDED_MAX - 1);
        known.ended.push_front(known.life);
        (known.heard, known.life) = (now, life);
        Heard::Reborn
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
    fn a_new_life_ends_the_former_one_for_good() {
        let (mut known, now) = (ApiServers::default(), Instant::now());
        assert_eq!(known.heard(now, &id(), life(1)), Heard::Alive);
        known.note(now, &id(), life(1));
        assert_eq!(known.heard(now, &id(), life(1)), Heard::Alive);
        assert_eq!(known.heard(now, &id(), life(2)), Heard::Reborn);
        assert_eq!(
            known.heard(now, &id(), life(1)),
            Heard::Ended,
            "its last words"
        );
        assert_eq!(known.heard(now, &id(), life(2)), Heard::Alive);
        assert_eq!(known.heard(now, &id(), life(3)), Heard::Reborn);
        for ended in [1, 2] {
            assert_eq!(known.heard(now, &id(), life(ended)), Heard::Ended);
        }
    }

    #[test]
    fn one_that_says_no_life_is_a_life_too() {
        let (mut known, now) = (ApiServers::default(), Instant::now());
        known.note(now, &id(), None);
        assert_eq!(known.heard(now, &id(), None), Heard::Alive);
        assert_eq!(
            known.heard(now, &id(), life(1)),
            Heard::Reborn,
            "an upgrade"
        );
    }

    #[test]
    fn last_words_do_not_keep_a_name_alive() {
        let (mut known, start) = (ApiServers::default(), Instant::now());
        known.note(start, &id(), life(1));
        known.heard(start, &id(), life(2));
        let later = start + SILENCE;
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
        let (mut known, now) = (ApiServers::default(), Instant::now());
        known.note(now, &id(), life(0));
        for number in 1..1_000 {
            assert_eq!(known.heard(now, &id(), life(number)), Heard::Reborn);
        }
        assert_eq!(known.known[&id()].ended.len(), ENDED_MAX);
    }
}
