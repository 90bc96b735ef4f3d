//! A thousand workers and a day: the real membership and router of several API servers, over workers that are simulated by event.
//!
//! What is real: [`Fleet`](baton_api_server::fuzzing::Fleet), that is who is there, what they said with their last beat, what each API server has under way, and
//! every choice. What is not: desks, leases, pulls and the engine. A worker (`worker`) is two rates, KV takes its time on two links, messages take none. So
//! a day of some seventeen million requests passes in minutes; [`crate::planning`] has all of it, for a few workers and minutes.
//!
//! It is asked whether choices stay stable when several API servers know of each other by beats alone, up to a second old, and whether they are cheap:
//!
//! - [`Report::calm`] has the numbers of a burst: how soon the cluster is as it was before, how far it swings from then on, and how many requests one worker gets or
//!   loses at once. A router that runs after beats shows in the last one first. [`Defect`]s take away what keeps the router from that, and the tests fail with each.
//! - [`Choices`] is how long choices took, on this machine. All else is a function of the seed.

mod cluster;
mod events;
mod load;
mod report;
mod worker;

use baton_protocol::{CostPoint, StepCost};

use self::events::Run;
use crate::dice::Dice;

pub use self::load::{Arrival, Lengths, Load, Part};
pub use self::report::{Calm, Choices, Report, Second, Took, follows};

/// Tokens of a block of KV.
const BLOCK_TOKENS: u32 = 32;

/// A cluster of workers that all do both.
#[derive(Clone, Debug)]
pub struct Scale {
    /// How many there are; at least 1.
    pub workers: usize,
    /// API servers, among which requests are shared out at random; at least 1.
    pub api_servers: usize,
    /// What steps of each worker cost.
    pub cost: StepCost,
    /// Time to the first token that each request is promised, in milliseconds.
    pub ttft_ms: u32,
    /// Mean time between tokens that each request is promised, and that workers keep to, in milliseconds.
    pub itl_ms: u32,
    /// Most sequences of a step.
    pub batch: u32,
    /// Most tokens of a step.
    pub step_tokens: u32,
    /// Blocks of KV of each worker.
    pub blocks: u32,
    /// Bytes of a token's KV; a multiple of 4.
    pub kv_token_bytes: u32,
    /// What a worker's link moves in each direction, in GB/s.
    pub link: f32,
    /// What is taken away from the router, to see that it is missed.
    pub defect: Option<Defect>,
}

/// What a router would do wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// API servers do not count what they have under way themselves: they choose by beats alone.
    CountsNothing,
    /// API servers do not know that there are others: each levels all of what it sees.
    EachAlone,
}

impl Scale {
    /// Workers so slow that a thousand of them have enough to do with 200 requests a second: 40 ms a step, half a second for a prompt of
    /// a thousand tokens. First tokens are promised within 5 s, times between tokens of 80 ms.
    pub fn slow(workers: usize) -> Self {
        let layers = [
            (1, 40.0),
            (64, 44.0),
            (256, 120.0),
            (1_024, 480.0),
            (4_096, 1_900.0),
        ];
        Self {
            workers,
            api_servers: 3,
            cost: StepCost {
                layers: layers.map(point).to_vec(),
                row_us: 50.0,
                kv_token_us: 0.2,
                pair_us: 0.002,
            },
            ttft_ms: 5_000,
            itl_ms: 80,
            batch: 128,
            step_tokens: 4_096,
            blocks: 20_000,
            kv_token_bytes: 131_072,
            link: 25.0,
            defect: None,
        }
    }

    /// Workers with about what an H200 takes for an 8B model in BF16 (`tests/bench/costs`). First tokens are promised within 200 ms, times between tokens
    /// of 10 ms.
    pub fn fast(workers: usize) -> Self {
        let layers = [
            (1, 3.6),
            (128, 4.2),
            (512, 11.4),
            (2_048, 42.0),
            (8_192, 170.0),
        ];
        Self {
            cost: StepCost {
                layers: layers.map(point).to_vec(),
                row_us: 2.0,
                kv_token_us: 0.03,
                pair_us: 0.0003,
            },
            ttft_ms: 200,
            itl_ms: 10,
            batch: 256,
            step_tokens: 8_192,
            link: 50.0,
            ..Self::slow(workers)
        }
    }

    /// What becomes of this load. Blocks for as long as it takes: some 30 microseconds a request, and as much a second for each worker.
    pub fn run(&self, load: Load, seed: u64) -> (Report, Choices) {
        let mut dice = Dice::new(seed);
        let arrivals = dice.fork();
        let run = Run::new(self, &load, dice);
        run.go(load.arrivals(arrivals))
    }
}

fn point((tokens, ms): (u32, f32)) -> CostPoint {
    CostPoint {
        tokens,
        us: ms * 1e3,
    }
}

#[cfg(test)]
mod tests;
