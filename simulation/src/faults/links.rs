//! How fast KV moves between two workers.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::dice::Dice;

/// KV of one token: that of a model of 70 billion parameters and more.
const TOKEN_BYTES: u64 = 512 << 10;

/// The slowest link, in bytes a second: 25 Mbit/s.
const RATE_MIN: u64 = 3_125_000;

/// Links that take time have up to this many times twice that rate: 13 Gbit/s.
const DOUBLINGS_MAX: u64 = 9;

/// The rate of each pair of workers, by name. A pair that is not in it moves KV at the speed of memory: in no time.
#[derive(Clone, Debug, Default)]
pub struct Links(BTreeMap<(String, String), u64>);

impl Links {
    /// Any rates for all pairs of these workers: about half of the pairs have links that take time.
    pub fn draw(dice: &mut Dice, workers: &[&str]) -> Self {
        let mut rates = BTreeMap::new();
        for (i, one) in workers.iter().enumerate() {
            for other in &workers[i + 1..] {
                if dice.chance(500) {
                    let least = RATE_MIN << dice.range(0..DOUBLINGS_MAX);
                    let rate = dice.range(least..2 * least);
                    for (from, to) in [(one, other), (other, one)] {
                        rates.insert(((*from).to_owned(), (*to).to_owned()), rate);
                    }
                }
            }
        }
        Self(rates)
    }

    /// How long the link between two workers takes for the KV of so many tokens.
    pub fn time(&self, one: &str, other: &str, tokens: u64) -> Duration {
        let pair = (one.to_owned(), other.to_owned());
        self.0
            .get(&pair)
            .map_or(Duration::ZERO, |rate| time_at(*rate, tokens))
    }

    /// The same over the slowest of all links.
    pub fn time_at_worst(&self, tokens: u64) -> Duration {
        let slowest = self.0.values().min();
        slowest.map_or(Duration::ZERO, |rate| time_at(*rate, tokens))
    }
}

fn time_at(rate: u64, tokens: u64) -> Duration {
    Duration::from_micros(tokens * TOKEN_BYTES * 1_000_000 / rate)
}
