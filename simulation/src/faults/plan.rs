//! What a seed stands for: a cluster, its weather, what is asked of it, and what goes wrong when.

use std::time::Duration;

use baton_api_server::Promises;
use baton_protocol::Role;

use crate::dice::Dice;
use crate::faults::classes;
use crate::faults::client::Ask;
use crate::faults::kv::KvWeather;
use crate::faults::links::Links;
use crate::faults::process::WorkerSetup;
use crate::weather::Weather;

/// Faults and requests begin within this time.
const STORM: Duration = Duration::from_secs(12);

/// What a run is to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// That nothing wrong is said and nothing is lost, whatever breaks.
    Faults,
    /// That nobody waits for too long, or in vain, though links are slow, workers full and times short. Nothing breaks, except
    /// that a link may.
    Load,
}

/// One run, in full.
#[derive(Debug)]
pub struct Plan {
    /// What it is to show.
    pub scenario: Scenario,
    /// The workers.
    pub workers: Vec<WorkerSetup>,
    /// How many API servers.
    pub api_servers: usize,
    /// The bus.
    pub weather: Weather,
    /// Nothing is lost on it but what is sent to the dead.
    pub keeps_messages: bool,
    /// Nothing goes wrong, but that leases may be short and room scarce.
    pub is_calm: bool,
    /// The KV's ways.
    pub kv_weather: KvWeather,
    /// How fast they are.
    pub links: Links,
    /// One of them dies while requests are under way.
    pub has_dying_link: bool,
    /// Who asks what of which API server when.
    pub asks: Vec<(Duration, usize, Ask)>,
    /// What goes wrong, and when it is over, in order.
    pub faults: Vec<(Duration, Fault)>,
    /// What is promised.
    pub promises: Promises,
    /// Longer than all that is asked can take once nothing goes wrong any more.
    pub work: Duration,
}

impl Plan {
    /// Key/value heads of the model.
    pub fn kv_heads(&self) -> u32 {
        self.workers.first().map_or(1, |worker| worker.kv_heads)
    }
}

/// What goes wrong, or right again. Numbers are places in [`Plan::workers`] and among API servers.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// A worker is killed.
    Crash(usize),
    /// It begins to drain.
    Drain(usize),
    /// A worker that is not there comes up.
    Start(usize),
    /// A worker stands still.
    Freeze(usize),
    /// It goes on.
    Thaw(usize),
    /// A worker's connection to the bus breaks.
    Cut(usize),
    /// It is there again.
    Mend(usize),
    /// An API server is killed.
    ApiCrash(usize),
    /// Another comes up in its place.
    ApiStart(usize),
    /// An API server's connection to the bus breaks.
    ApiCut(usize),
    /// It is there again.
    ApiMend(usize),
    /// KV does not move between two workers.
    Wall(usize, usize),
    /// It does again.
    Gap(usize, usize),
}

impl Plan {
    /// What this seed stands for.
    pub fn draw(scenario: Scenario, dice: &mut Dice) -> Self {
        match scenario {
            Scenario::Faults => Self::draw_storm(dice),
            Scenario::Load => Self::draw_load(dice),
        }
    }

    fn draw_storm(dice: &mut Dice) -> Self {
        let block_tokens = dice.pick(&[2, 4, 8]);
        let mut workers = draw_workers(dice, block_tokens);
        let api_servers = dice.pick(&[1, 1, 2]);
        let (weather, in_order) = match dice.range(0..10) {
            0..4 => (Weather::fair(), true),
            4..7 => (Weather::lossy(dice), false),
            _ => (Weather::wild(dice), false),
        };
        let kv_weather = KvWeather {
            fail_per_mille: dice.pick(&[0, 0, 30, 200]),
            pause_max_ms: dice.pick(&[0, 1, 5, 40]),
            stall_per_mille: dice.pick(&[0, 0, 5]),
            reads_the_frozen: dice.chance(500),
        };
        let smallest = workers.iter().map(|w| w.blocks * w.block_tokens).min();
        let room = u64::from(smallest.unwrap_or(0)).min(100);
        let count = dice.range(3..25);
        let prompt_max = dice.pick(&[4, room / 4, room / 2]).max(2);
        let output_max = dice.pick(&[4, room / 4, room / 2]).max(2);
        let rush = dice.pick(&[1, 4, 12]);
        let mut asks: Vec<_> = (0..count)
            .map(|_| {
                let at = dice.range(1_500..1_500 + STORM.as_millis() as u64 / rush);
                let api_server = dice.range(0..api_servers as u64) as usize;
                let ask = Ask::draw(dice, prompt_max, output_max);
                (Duration::from_millis(at), api_server, ask)
            })
            .collect();
        let faults = draw_faults(dice, &workers, api_servers);
        let cuts =
            |(_, fault): &(Duration, Fault)| matches!(fault, Fault::Cut(_) | Fault::ApiCut(_));
        let breaks = |worker: &WorkerSetup| worker.breaks_per_mille > 0;
        let links = Links::draw(dice, &names(&workers));
        // Drawn after the others, so that seeds without ranks are what they were before there were any.
        draw_ranks(dice, &mut workers);
        let promises = classes::draw(dice, &mut workers, &mut asks);
        Self {
            scenario: Scenario::Faults,
            links,
            has_dying_link: false,
            work: work(&asks, &workers, &faults),
            keeps_messages: in_order && !faults.iter().any(cuts),
            is_calm: in_order
                && faults.is_empty()
                && !workers.iter().any(breaks)
                && kv_weather.fail_per_mille + kv_weather.stall_per_mille == 0,
            promises,
            workers,
            api_servers,
            weather,
            kv_weather,
            asks,
            faults,
        }
    }
}

/// Of a group of prompts that begin alike, so many have so many tokens in common, and come this long after the first.
const GROUP: usize = 6;
const ALIKE: usize = 24;
const GROUP_FOLLOWS: Duration = Duration::from_secs(2);

impl Plan {
    /// Workers all do both, know what steps cost, and have room; and prompts come in groups: a first one, and a little later all at once
    /// others that begin as it does. Then who has that beginning is busy, and it is pulled from there. Nothing of it is drawn.
    pub fn with_pulled_prefixes(&mut self) {
        for worker in &mut self.workers {
            worker.role = Role::Both;
            (worker.prefix_cache, worker.knows_cost) = (true, true);
            worker.blocks = worker.blocks.max(400 / worker.block_tokens);
            worker.step_max_ms = worker.step_max_ms.max(30);
        }
        for group in self.asks.chunks_mut(GROUP) {
            let Some(((at, _, first), others)) = group.split_first_mut() else {
                continue;
            };
            let begun = first.prompt.iter().copied().cycle().take(ALIKE);
            let prompt: Vec<u32> = begun.collect();
            first.prompt.clone_from(&prompt);
            for (when, _, other) in others {
                *when = *at + GROUP_FOLLOWS;
                let own = other.prompt.iter().copied().take(6);
                other.prompt = prompt.iter().copied().chain(own).collect();
                // One tenant's.
                other.generation.sampling.seed = first.generation.sampling.seed;
            }
        }
        self.work = work(&self.asks, &self.workers, &self.faults);
    }
}

/// Their names.
pub fn names(workers: &[WorkerSetup]) -> Vec<&str> {
    workers.iter().map(|worker| worker.name.as_str()).collect()
}

/// As if one worker did it all, token by token, twice, every client read on its own, and then somebody drained.
fn work(
    asks: &[(Duration, usize, Ask)],
    workers: &[WorkerSetup],
    faults: &[(Duration, Fault)],
) -> Duration {
    let slowest = workers.iter().map(|worker| worker.step_max_ms).max();
    let step = Duration::from_millis(slowest.unwrap_or(0));
    let one = |ask: &Ask| {
        let output = ask.generation.max_tokens;
        let pauses = ask
            .reads
            .map(|(count, pause)| pause * (output / count as u32 + 1));
        2 * step * (ask.prompt.len() as u32 + output) + pauses.unwrap_or_default()
    };
    let all: Duration = asks.iter().map(|(_, _, ask)| one(ask)).sum();
    let drains = |(_, fault): &&(Duration, Fault)| matches!(fault, Fault::Drain(_));
    let drain = workers.iter().map(|worker| worker.drain).max();
    all + drain.unwrap_or_default() * faults.iter().filter(drains).count().min(1) as u32
}

fn draw_workers(dice: &mut Dice, block_tokens: u32) -> Vec<WorkerSetup> {
    let mut roles = vec![Role::Context; dice.pick(&[1, 1, 2, 3])];
    roles.extend(vec![Role::Decode; dice.pick(&[1, 2, 2, 3])]);
    if dice.chance(250) {
        // Some or all of them do both.
        for role in &mut roles {
            if dice.chance(600) {
                *role = Role::Both;
            }
        }
    }
    let lease = Duration::from_millis(dice.pick(&[30, 300, 3_000, 30_000]));
    let drain = Duration::from_millis(dice.pick(&[100, 2_000, 20_000]));
    let breaks_per_mille = dice.pick(&[0, 0, 0, 150, 400]);
    let prefix_cache = dice.chance(700);
    let tokens = dice.pick(&[32, 60, 120, 400]);
    let setup = |(i, role): (usize, Role)| WorkerSetup {
        name: format!("{}{i}", &role.label()[..3]),
        role,
        blocks: tokens / block_tokens,
        block_tokens,
        kv_heads: 1,
        ranks: 0,
        batch: dice.pick(&[1, 2, 4, 8]),
        step_tokens: dice.pick(&[8, 16, 64]),
        steps_in_flight: dice.pick(&[1, 2, 2]),
        drafts: false,
        queue: dice.pick(&[1, 4, 16]),
        prefix_cache,
        knows_cost: false,
        step_max_ms: dice.pick(&[1, 5, 30, 120]),
        itl_ms: 0,
        lease,
        drain,
        breaks_per_mille,
    };
    roles.into_iter().enumerate().map(setup).collect()
}

/// In one world of four the model has several heads, and workers have ranks that share them out, each as many as it likes.
fn draw_ranks(dice: &mut Dice, workers: &mut [WorkerSetup]) {
    if !dice.chance(250) {
        return;
    }
    let kv_heads = dice.pick(&[2, 3, 4]);
    for worker in workers {
        worker.kv_heads = kv_heads;
        worker.ranks = dice.pick(&[1, 2, 3, 4]);
    }
}

fn draw_faults(
    dice: &mut Dice,
    workers: &[WorkerSetup],
    api_servers: usize,
) -> Vec<(Duration, Fault)> {
    let count = dice.pick(&[0, 1, 2, 4, 8]);
    let mut faults = Vec::new();
    for _ in 0..count {
        let from = Duration::from_millis(dice.range(1_000..STORM.as_millis() as u64));
        let lasts = Duration::from_millis(dice.pick(&[1, 200, 1_000, 3_000, 6_000, 9_000]));
        let worker = dice.range(0..workers.len() as u64) as usize;
        let other = dice.range(0..workers.len() as u64) as usize;
        let api = dice.range(0..api_servers as u64) as usize;
        let (begin, end) = match dice.range(0..13) {
            0..3 => (Fault::Crash(worker), Fault::Start(worker)),
            3..6 => (Fault::Freeze(worker), Fault::Thaw(worker)),
            6 => (Fault::Cut(worker), Fault::Mend(worker)),
            7..9 => (Fault::Drain(worker), Fault::Start(worker)),
            9 => (Fault::ApiCrash(api), Fault::ApiStart(api)),
            10 => (Fault::ApiCut(api), Fault::ApiMend(api)),
            _ => (Fault::Wall(worker, other), Fault::Gap(worker, other)),
        };
        faults.push((from, begin));
        faults.push((from + lasts, end));
    }
    faults.sort_by_key(|(at, _)| *at);
    faults
}
