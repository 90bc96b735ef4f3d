//! Plans for what costs time: workers small against the load, generations that take seconds, links from slow to fast, leases
//! short against waits, times from short to long. Nothing breaks, except that a link may.

use std::time::Duration;

use baton_protocol::Role;
use baton_protocol::deadlines::{LEASE_MS, PULL_STALL_MS};

use crate::dice::Dice;
use crate::faults::classes;
use crate::faults::client::Ask;
use crate::faults::kv::KvWeather;
use crate::faults::links::Links;
use crate::faults::plan::{Fault, Plan, Scenario, names};
use crate::faults::process::WorkerSetup;
use crate::faults::witness::Witness;
use crate::weather::Weather;

/// Requests come from then on: all workers are connected, and API servers serve.
const BEGIN: Duration = Duration::from_secs(4);

/// Tokens of a block.
const BLOCK_TOKENS: u32 = 4;

/// A cluster may take so many times as long as [`undisturbed`] says.
const SLACK: u32 = 3;

impl Plan {
    pub(super) fn draw_load(dice: &mut Dice) -> Self {
        let is_crowd = dice.chance(100);
        let mut workers = draw_workers(dice, is_crowd);
        let links = Links::draw(dice, &names(&workers));
        let api_servers = dice.pick(&[1, 1, 2]);
        let (counts, prompts) = match is_crowd {
            true => (&[40][..], &[10][..]),
            false => (&[2, 8, 20, 40][..], &[10, 40, 100][..]),
        };
        let count = dice.pick(counts);
        let prompt_max = dice.pick(prompts);
        let output_max = dice.pick(&[3, 15, 60]).min(119 - prompt_max);
        let spread_ms = match is_crowd {
            true => 1,
            false => dice.pick(&[1, 1_000, 10_000, 30_000]),
        };
        let budgets = dice.pick(&[&[2, 8, 30][..], &[30, 120], &[120, 600]]);
        let mut asks: Vec<_> = (0..count)
            .map(|_| {
                let at = BEGIN + Duration::from_millis(dice.range(0..spread_ms));
                let api_server = dice.range(0..api_servers as u64) as usize;
                let mut ask = Ask::draw(dice, prompt_max, output_max.max(2));
                ask.budget = Duration::from_secs(dice.pick(budgets));
                ask.reads = None;
                if dice.chance(500) {
                    ask.generation.stop_token_ids.clear();
                }
                (at, api_server, ask)
            })
            .collect();
        let faults = draw_dead_link(dice, &workers);
        let work = SLACK * undisturbed(&asks, &workers, &links, &faults);
        let pause_max_ms = dice.pick(&[0, 1, 5]);
        let promises = classes::draw(dice, &mut workers, &mut asks);
        Self {
            scenario: Scenario::Load,
            work,
            promises,
            keeps_messages: true,
            is_calm: true,
            workers,
            api_servers,
            weather: Weather::fair(),
            kv_weather: KvWeather {
                pause_max_ms,
                reads_the_frozen: true,
                ..KvWeather::default()
            },
            links,
            has_dying_link: faults.iter().any(|(from, _)| *from > Duration::ZERO),
            asks,
            faults,
        }
    }

    /// Who reads along.
    pub fn witness(&self) -> Option<Witness> {
        let stall = match self.has_dying_link {
            true => Duration::from_millis(PULL_STALL_MS),
            false => Duration::ZERO,
        };
        (self.scenario == Scenario::Load).then(|| Witness::new(self.links.clone(), stall))
    }

    /// Whether a request that has so much time must be answered though so many others are in flight. Who is refused because
    /// queues are full, because a decode worker will not take it for as long as a lease runs, or because what is promised cannot be kept,
    /// was told in time.
    pub fn must_answer(&self, budget: Duration, in_flight: usize) -> bool {
        let queue = self.workers.iter().map(|worker| worker.queue).min();
        self.scenario == Scenario::Load
            && !self.promises.level.is_some()
            && in_flight < queue.unwrap_or(0)
            && self.work < budget.min(Duration::from_millis(LEASE_MS.into()))
    }
}

/// A crowd meets one worker of each role, and a decode worker with room for most of it at once: many more pulls than may
/// read beside each other wait for their turn on one link.
fn draw_workers(dice: &mut Dice, is_crowd: bool) -> Vec<WorkerSetup> {
    let (numbers, batches, tokens, queues) = match is_crowd {
        true => (&[1][..], &[32][..], &[1_200][..], &[64][..]),
        false => (
            &[1, 1, 2, 3][..],
            &[1, 2, 4, 16, 32][..],
            &[120, 240, 1_200][..],
            &[8, 64][..],
        ),
    };
    let mut roles = vec![Role::Context; dice.pick(numbers)];
    roles.extend(vec![Role::Decode; dice.pick(numbers)]);
    if !is_crowd && dice.chance(100) {
        roles.fill(Role::Both);
    }
    let lease = Duration::from_millis(dice.pick(&[300, 1_000, 5_000, u64::from(LEASE_MS)]));
    let batch = dice.pick(batches);
    let step_max_ms = dice.pick(&[5, 40, 150, 400]);
    let queue = dice.pick(queues);
    let setup = |(i, role): (usize, Role)| WorkerSetup {
        name: format!("{}{i}", &role.label()[..3]),
        role,
        blocks: dice.pick(tokens) / BLOCK_TOKENS,
        block_tokens: BLOCK_TOKENS,
        kv_heads: 1,
        ranks: 0,
        batch,
        step_tokens: dice.pick(&[16, 64]),
        steps_in_flight: dice.pick(&[1, 2]),
        drafts: false,
        queue,
        prefix_cache: true,
        knows_cost: false,
        step_max_ms: if role == Role::Context {
            40.min(step_max_ms)
        } else {
            step_max_ms
        },
        itl_ms: 0,
        lease,
        drain: Duration::from_secs(2),
        breaks_per_mille: 0,
    };
    roles.into_iter().enumerate().map(setup).collect()
}

/// Now and then one pair of workers loses its link for good, at the start or in the middle, where every context worker has
/// another decode worker.
fn draw_dead_link(dice: &mut Dice, workers: &[WorkerSetup]) -> Vec<(Duration, Fault)> {
    let at = |role: Role| {
        let has = |(i, worker): (usize, &WorkerSetup)| (worker.role == role).then_some(i);
        workers
            .iter()
            .enumerate()
            .filter_map(has)
            .collect::<Vec<_>>()
    };
    let (contexts, decodes) = (at(Role::Context), at(Role::Decode));
    if contexts.is_empty() || decodes.len() < 2 || !dice.chance(250) {
        return Vec::new();
    }
    let from = Duration::from_millis(dice.pick(&[0, 4_500, 8_000]));
    vec![(from, Fault::Wall(dice.pick(&contexts), dice.pick(&decodes)))]
}

/// Longer than a cluster of one context and one decode worker, the smallest and slowest of these, takes for all that is asked,
/// over the slowest of these links.
fn undisturbed(
    asks: &[(Duration, usize, Ask)],
    workers: &[WorkerSetup],
    links: &Links,
    faults: &[(Duration, Fault)],
) -> Duration {
    let least = |of: fn(&WorkerSetup) -> usize| workers.iter().map(of).min().unwrap_or(1);
    let slowest = workers.iter().map(|worker| worker.step_max_ms).max();
    let step = Duration::from_millis(slowest.unwrap_or(1));
    let asks = || asks.iter().map(|(_, _, ask)| ask);
    let tokens = |ask: &Ask| ask.prompt.len() + ask.generation.max_tokens as usize;
    let most = |of: &dyn Fn(&Ask) -> usize| asks().map(of).max().unwrap_or(1).max(1);
    // Half of a step is the oldest prompt's.
    let half = least(|worker| worker.step_tokens) / 2;
    let prefill_steps: usize = asks().map(|ask| 1 + ask.prompt.len().div_ceil(half)).sum();
    let room = least(|worker| (worker.blocks * worker.block_tokens) as usize);
    let at_once = least(|worker| worker.batch)
        .min(room / most(&tokens))
        .max(1);
    let output = most(&|ask| ask.generation.max_tokens as usize);
    let decode_steps = asks().count().div_ceil(at_once) * output;
    let pulls: Duration = asks()
        .map(|ask| links.time_at_worst(ask.prompt.len() as u64 + u64::from(BLOCK_TOKENS)))
        .sum();
    let stall = Duration::from_millis(PULL_STALL_MS) * faults.len() as u32;
    step * (prefill_steps + decode_steps) as u32 + pulls + stall + Duration::from_secs(1)
}
