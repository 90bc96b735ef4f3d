//! What becomes of messages: drawn again for each seed, kind by kind.

use std::fmt;
use std::time::Duration;

use crate::dice::Dice;

/// Kinds of messages, as subjects tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Prefill jobs.
    Prefill,
    /// Decode jobs.
    Decode,
    /// Aborts.
    Abort,
    /// Releases.
    Release,
    /// Renewals of leases.
    Renew,
    /// Token frames.
    Tokens,
    /// Beats of workers and API servers, hello, and questions for all peers.
    Beat,
    /// Requests for a description.
    Describe,
    /// Answers to any of them.
    Answer,
    /// Questions how far a prompt is.
    Progress,
}

impl Kind {
    const COUNT: usize = 10;

    /// That of a subject.
    pub fn of(subject: &str) -> Self {
        if subject.starts_with("_INBOX") {
            return Self::Answer;
        }
        match subject.split('.').nth(2) {
            Some("prefill") => Self::Prefill,
            Some("decode") => Self::Decode,
            Some("abort") => Self::Abort,
            Some("release") => Self::Release,
            Some("renew") => Self::Renew,
            Some("progress") => Self::Progress,
            Some("tokens") => Self::Tokens,
            Some("describe") => Self::Describe,
            _ => Self::Beat,
        }
    }
}

/// What becomes of the messages of each kind.
#[derive(Clone, Debug)]
pub struct Weather([Climate; Kind::COUNT]);

#[derive(Clone, Copy, Debug, Default)]
struct Climate {
    drop_per_mille: u64,
    duplicate_per_mille: u64,
    delay_max_ms: u64,
    /// Of a thousand, so many take a hundred times as long.
    slow_per_mille: u64,
    reorders: bool,
}

/// What becomes of one message.
#[derive(Debug)]
pub struct Fate {
    /// When it arrives, as often as it does.
    pub arrivals: Vec<Duration>,
    /// After everything that was sent before.
    pub in_order: bool,
}

impl Weather {
    /// None at all: everything comes, once, in order, and takes no time.
    pub fn none() -> Self {
        Self([Climate::default(); Kind::COUNT])
    }

    /// As NATS on a good day: everything comes, once, in order, within a millisecond or two.
    pub fn fair() -> Self {
        let climate = Climate {
            delay_max_ms: 2,
            ..Climate::default()
        };
        Self([climate; Kind::COUNT])
    }

    /// As NATS on a bad day: slow, and now and then something is lost, but in order.
    pub fn lossy(dice: &mut Dice) -> Self {
        let mut all = Self::fair();
        for climate in &mut all.0 {
            climate.delay_max_ms = dice.pick(&[1, 3, 20, 100]);
            climate.drop_per_mille = dice.pick(&[0, 0, 5, 30, 150]);
            climate.slow_per_mille = dice.pick(&[0, 0, 10]);
        }
        all
    }

    /// As no NATS is: also twice, and in any order.
    pub fn wild(dice: &mut Dice) -> Self {
        let mut all = Self::lossy(dice);
        for climate in &mut all.0 {
            climate.duplicate_per_mille = dice.pick(&[0, 20, 200]);
            climate.reorders = dice.chance(600);
        }
        all
    }

    /// What becomes of a message of this kind.
    pub fn fate(&self, kind: Kind, dice: &mut Dice) -> Fate {
        let climate = self.0[kind as usize];
        let mut arrivals = Vec::with_capacity(2);
        if !dice.chance(climate.drop_per_mille) {
            arrivals.push(climate.delay(dice));
            if dice.chance(climate.duplicate_per_mille) {
                arrivals.push(climate.delay(dice));
            }
        }
        Fate {
            arrivals,
            in_order: !climate.reorders,
        }
    }
}

impl Climate {
    fn delay(&self, dice: &mut Dice) -> Duration {
        let slow = if dice.chance(self.slow_per_mille) {
            100
        } else {
            1
        };
        Duration::from_millis(slow * dice.range(0..self.delay_max_ms + 1))
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.arrivals[..] {
            [] => f.write_str("LOST"),
            [once] => write!(f, "in {} ms", once.as_millis()),
            more => write!(f, "TWICE in {more:?}"),
        }
    }
}
