//! Loads of a day: the rate goes up and down with the sun, bursts come upon it, and lengths are log-normal.

use std::f64::consts::TAU;

use crate::dice::Dice;

/// A request of a load. Times are seconds from its beginning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// When it comes.
    pub at: f64,
    /// Of its prompt; at least 2.
    pub prompt_tokens: u32,
    /// Of its answer; at least 2.
    pub output_tokens: u32,
    /// Most tokens of its answer that it names: what API servers know of that length.
    pub max_tokens: u32,
}

/// Log-normal lengths between two bounds; without a spread all are the median.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// Median, in tokens.
    pub median: f64,
    /// Standard deviation of the logarithm.
    pub sigma: f64,
    /// None is longer, in tokens.
    pub most: u32,
}

impl Lengths {
    /// All of them are so long.
    pub fn all(tokens: u32) -> Self {
        Self {
            median: f64::from(tokens),
            sigma: 0.0,
            most: tokens,
        }
    }

    fn draw(self, dice: &mut Dice) -> u32 {
        let length = self.median * (self.sigma * normal(dice)).exp();
        (length.round() as u32).clamp(2, self.most.max(2))
    }
}

/// A part of a load, at a rate of its own.
#[derive(Clone, Debug)]
pub struct Part {
    /// From then on.
    pub from: f64,
    /// Mean requests in a second.
    pub rate: f64,
    /// The rate goes up and down by this part of it in a day, the least at midnight.
    pub swings: f64,
    /// Of prompts.
    pub prompts: Lengths,
    /// Of answers. Requests name the longest length, whatever theirs is.
    pub outputs: Lengths,
}

/// A load.
#[derive(Clone, Debug)]
pub struct Load {
    /// By time; the first begins at 0.
    pub parts: Vec<Part>,
    /// Time of day at which it begins, in seconds.
    pub begins: f64,
    /// How long requests come.
    pub seconds: f64,
    /// Beginnings and ends of bursts, in order.
    pub bursts: Vec<(f64, f64)>,
    /// How many times the rate there is in a burst.
    pub burst: f64,
}

impl Load {
    /// Bursts of so many seconds, one in each `every` seconds, at a random time in their middle half.
    pub fn draw_bursts(&mut self, every: f64, lasts: f64, seed: u64) {
        // Another stream than arrivals have.
        let mut dice = Dice::new(seed ^ 0xb0);
        let count = (self.seconds / every) as u32;
        let mut begin = |i: u32| (f64::from(i) + 0.25 + 0.5 * uniform(&mut dice)) * every;
        let begins: Vec<f64> = (0..count).map(&mut begin).collect();
        self.bursts = begins.into_iter().map(|at| (at, at + lasts)).collect();
    }

    fn part(&self, at: f64) -> &Part {
        let after = self.parts.partition_point(|part| part.from <= at);
        &self.parts[after.max(1) - 1]
    }

    fn rate(&self, at: f64) -> f64 {
        const DAY: f64 = 86_400.0;
        let part = self.part(at);
        let sun = -((self.begins + at) / DAY * TAU).cos();
        let after = self.bursts.partition_point(|(begin, _)| *begin <= at);
        let in_burst = after > 0 && at < self.bursts[after - 1].1;
        let times = if in_burst { self.burst } else { 1.0 };
        part.rate * (1.0 + part.swings * sun) * times
    }

    /// Its requests, one after the other.
    pub(super) fn arrivals(self, mut dice: Dice) -> impl Iterator<Item = Arrival> {
        // As many as come at the highest rate; of those each stays with the probability that its time's rate has of that.
        let rates = self
            .parts
            .iter()
            .map(|part| part.rate * (1.0 + part.swings));
        let most = rates.fold(0.0, f64::max) * self.burst.max(1.0);
        let mut at = 0.0;
        std::iter::from_fn(move || {
            loop {
                at -= (1.0 - uniform(&mut dice)).ln() / most;
                if at >= self.seconds {
                    return None;
                }
                if uniform(&mut dice) * most < self.rate(at) {
                    let part = self.part(at);
                    return Some(Arrival {
                        at,
                        prompt_tokens: part.prompts.draw(&mut dice),
                        output_tokens: part.outputs.draw(&mut dice),
                        max_tokens: part.outputs.most,
                    });
                }
            }
        })
    }
}

/// From 0 to below 1.
fn uniform(dice: &mut Dice) -> f64 {
    (dice.next() >> 11) as f64 / (1_u64 << 53) as f64
}

/// Of mean 0 and variance 1 (Box and Muller).
fn normal(dice: &mut Dice) -> f64 {
    let (one, other) = (1.0 - uniform(dice), uniform(dice));
    (-2.0 * one.ln()).sqrt() * (TAU * other).cos()
}
