//! What a run promises to whom: service levels, what becomes of requests for which they cannot be kept, classes, and workers that do
//! both sides and tell what their steps cost, by which requests are promised anything.

use std::time::Duration;

use baton_api_server::{Class, Overload, Promises, ServiceLevel};
use baton_protocol::{Role, Tier};

use crate::dice::Dice;
use crate::faults::client::Ask;
use crate::faults::process::WorkerSetup;

/// In these of a thousand worlds every life of a worker tells what its steps cost: routers choose by time.
const COSTS_PER_MILLE: u64 = 500;

/// In these something is promised.
const PROMISES_PER_MILLE: u64 = 333;

/// In these all workers do both sides.
const BOTH_PER_MILLE: u64 = 250;

/// Most workers that do.
const BOTH_MAX: usize = 3;

/// How a request asks to be served.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Who goes first.
    pub class: Class,
    /// Other times than those that are promised.
    pub level: Option<ServiceLevel>,
}

/// Draws all of it. It is the last that is drawn, so that a seed draws what it drew before there was any.
pub fn draw(
    dice: &mut Dice,
    workers: &mut [WorkerSetup],
    asks: &mut [(Duration, usize, Ask)],
) -> Promises {
    let knows_cost = dice.chance(COSTS_PER_MILLE);
    let does_both = dice.chance(BOTH_PER_MILLE) && (2..=BOTH_MAX).contains(&workers.len());
    for worker in &mut *workers {
        worker.knows_cost = knows_cost;
        if does_both {
            worker.role = Role::Both;
        }
    }
    if !dice.chance(PROMISES_PER_MILLE) {
        return Promises::default();
    }
    let slowest = workers.iter().map(|worker| worker.step_max_ms).max();
    let step_ms = slowest.unwrap_or(1).max(2) as u32;
    let level = ServiceLevel {
        ttft_ms: dice
            .pick(&[None, Some(1), Some(3), Some(20)])
            .map(|steps| steps * step_ms),
        itl_ms: dice
            .pick(&[None, Some(1), Some(2), Some(6)])
            .map(|halves| halves * step_ms / 2),
    };
    for worker in workers {
        worker.itl_ms = level.itl_ms.map_or(worker.itl_ms, u64::from);
    }
    for (_, _, ask) in asks {
        ask.asked = Some(Asked::draw(dice, level));
    }
    Promises {
        level,
        overload: dice.pick(&[Overload::Refuse, Overload::Batch]),
    }
}

impl Asked {
    fn draw(dice: &mut Dice, level: ServiceLevel) -> Self {
        let tier = dice.pick(&[Tier::Interactive, Tier::Interactive, Tier::Batch]);
        let class = Class {
            tier,
            priority: dice.pick(&[0, 0, 0, 1, -1]),
            never_batch: tier == Tier::Interactive && dice.chance(250),
        };
        let other = |dice: &mut Dice, ms: Option<u32>| {
            let times = dice.pick(&[1, 5, 20, 100]);
            ms.map(|ms| (ms * times / 10).max(1))
        };
        let has_headers = dice.chance(300);
        let (ttft_ms, itl_ms) = (other(dice, level.ttft_ms), other(dice, level.itl_ms));
        Self {
            class,
            level: has_headers.then_some(ServiceLevel { ttft_ms, itl_ms }),
        }
    }
}
