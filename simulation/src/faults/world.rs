//! One run: the cluster comes up, is asked, is hurt, heals, and must then be as if nothing had been.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_api_server::{Class, ServiceLevel, SimulatedGeneration};
use baton_protocol::subjects::Cluster;
use baton_protocol::{RequestId, Role, Tier, WorkerId};
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep};

use crate::dice::Dice;
use crate::faults::client::{Ask, Ear, Heard};
use crate::faults::defects::Defects;
use crate::faults::judge::Ended;
use crate::faults::kv::KvFabric;
use crate::faults::plan::{Fault, Plan, Scenario};
use crate::faults::process::{ApiLife, Ground, TOKENS_MAX, WorkerLife, WorkerSetup};
use crate::faults::tally::{Counts, Tally, lock};
use crate::network::{Connectivity, Network, Witness};
use crate::trace::Trace;
use crate::weather::Weather;

/// Of so many seeds in which things break, one is of prompts that begin alike on workers that do both
/// ([`Plan::with_pulled_prefixes`]). It is no draw either.
const PULLED_PREFIXES_EVERY: u64 = 8;

/// How often the world is looked at.
const TICK: Duration = Duration::from_millis(50);

/// Of so many seeds, one has workers that run drafts. It is no draw: the others stand for the same runs as without.
const DRAFTS_EVERY: u64 = 8;

/// A request that is over by its deadline is told so within this time: the driver's timer and a turn of the loop.
const SLACK: Duration = Duration::from_millis(200);

/// With no message lost, everything that a request held is free within this time of its end: an API server that died
/// is noticed, a pull is given up, a peer answers or not.
const SETTLES_WITHIN: Duration = Duration::from_secs(16);

/// A cluster whose processes are all there serves again within this time: the longest pause between two tries to
/// connect, the longest try, and beats.
const HEALS_WITHIN: Duration = Duration::from_secs(25);

/// For so long a storm is felt once it is over: a message is under way for ten seconds at most, and beats that were lost are
/// missed until the next.
const STORM_FELT: Duration = Duration::from_secs(12);

/// API servers know what is in the workers' prefix indexes within this time: a report was lost, which two beats show, a worker
/// is asked, and once more.
const PREFIXES_KNOWN_WITHIN: Duration = Duration::from_secs(6);

/// Prompts of the storm that are asked once more at the end.
const ASKED_AGAIN: usize = 6;

/// An idle worker leaves within this time.
const LEAVES_WITHIN: Duration = Duration::from_secs(2);

/// What came of a run.
#[derive(Debug)]
pub struct Report {
    /// Which.
    pub seed: u64,
    /// Of everything that happened and when.
    pub hash: u64,
    /// How much happened.
    pub events: u64,
    /// How long it took in the simulation.
    pub lasted: Duration,
    /// Requests answered to their end.
    pub answered: u64,
    /// Requests that ended with an error, by its label.
    pub errors: BTreeMap<&'static str, u64>,
    /// Requests for which there was time and room, generously reckoned.
    pub owed: u64,
    /// How often it did what the scheduling of requests may do.
    pub counts: Counts,
    /// Tokens of prompts' beginnings that were pulled, as far as API servers know that live at the end.
    pub pulled: u64,
    /// What must not be, in words.
    pub wrong: Vec<String>,
    /// What happened, if it was to be told.
    pub lines: Vec<String>,
}

/// Runs a seed of a scenario. With `told`, the report tells everything that happened.
pub fn run(scenario: Scenario, seed: u64, told: bool) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing of the system");
    LocalSet::new().block_on(&runtime, async move {
        let begun = Instant::now();
        let defects = Defects::listen();
        let mut world = World::new(scenario, seed, told).await;
        world.live().await;
        for defect in defects.take() {
            world.wrong(defect);
        }
        let counts = world.counts();
        let servers = world.api_servers.iter().flatten();
        let pulled = servers.map(|life| life.server.prefix_pull_tokens()).sum();
        let (hash, events, lines) = world.ground.network.take_trace();
        Report {
            seed,
            hash,
            events,
            lasted: begun.elapsed(),
            answered: world.answered,
            errors: world.errors,
            owed: world.owed,
            counts,
            pulled,
            wrong: world.wrong,
            lines,
        }
    })
}

struct World {
    plan: Plan,
    ground: Ground,
    dice: Dice,
    begun: Instant,
    workers: Vec<Option<WorkerLife>>,
    api_servers: Vec<Option<ApiLife>>,
    asked: Vec<Asked>,
    /// Prompts that the caches may know.
    prompts: Vec<Vec<u32>>,
    requests: u64,
    answered: u64,
    errors: BTreeMap<&'static str, u64>,
    owed: u64,
    wrong: Vec<String>,
    counts: Arc<Mutex<Counts>>,
}

struct Asked {
    number: u64,
    api_server: usize,
    generation: SimulatedGeneration,
    heard: Rc<RefCell<Heard>>,
    begun: Instant,
    ask: Ask,
    left: bool,
    /// There is time and room for it, generously reckoned.
    must_be_answered: bool,
}

impl World {
    async fn new(scenario: Scenario, seed: u64, told: bool) -> Self {
        let mut dice = Dice::new(seed);
        let mut plan = Plan::draw(scenario, &mut dice.fork());
        for worker in &mut plan.workers {
            worker.drafts = seed % DRAFTS_EVERY == 1;
        }
        if scenario == Scenario::Faults && seed % PULLED_PREFIXES_EVERY == 7 {
            plan.with_pulled_prefixes();
        }
        let mut trace = Trace::new(told);
        trace.note([0, seed, 0, 0], format_args!("{plan:#?}"));
        let witness = plan.witness();
        let witness = witness.map(|witness| Box::new(witness) as Box<dyn Witness>);
        let both = plan
            .workers
            .iter()
            .filter(|worker| worker.role == Role::Both);
        let name =
            |worker: &WorkerSetup| WorkerId::new(worker.name.as_str()).expect("a plain name");
        let tally = Tally::new(both.map(name).collect(), witness);
        let counts = tally.counts();
        let network = Network::new(
            plan.weather.clone(),
            dice.fork(),
            trace,
            Some(Box::new(tally)),
        );
        tokio::spawn(network.clone().carry());
        let fabric = KvFabric::new(
            plan.kv_weather,
            plan.links.clone(),
            dice.fork(),
            plan.kv_heads().into(),
        );
        let ground = Ground {
            network,
            fabric,
            cluster: Cluster::new("sim").expect("a plain name"),
            lives: Cell::new(0),
        };
        let mut world = Self {
            workers: plan.workers.iter().map(|_| None).collect(),
            api_servers: (0..plan.api_servers).map(|_| None).collect(),
            plan,
            ground,
            dice,
            begun: Instant::now(),
            asked: Vec::new(),
            prompts: Vec::new(),
            requests: 0,
            answered: 0,
            errors: BTreeMap::new(),
            owed: 0,
            wrong: Vec::new(),
            counts,
        };
        for at in 0..world.workers.len() {
            world.start_worker(at).await;
        }
        for at in 0..world.api_servers.len() {
            world.start_api_server(at).await;
        }
        world
    }

    async fn live(&mut self) {
        self.storm().await;
        match self.plan.scenario {
            Scenario::Faults => {
                self.heal().await;
                self.settle().await;
            }
            // Slow links and dead ones stay as they are.
            Scenario::Load => {
                self.settle().await;
                self.look_at_retries();
                self.heal().await;
            }
        }
        self.serve_again().await;
        self.leave().await;
    }

    /// Requests and faults, as planned.
    async fn storm(&mut self) {
        let mut faults = std::mem::take(&mut self.plan.faults);
        let mut asks = std::mem::take(&mut self.plan.asks);
        asks.sort_by_key(|(at, ..)| *at);
        while !faults.is_empty() || !asks.is_empty() {
            let now = self.begun.elapsed();
            while faults.first().is_some_and(|(at, _)| *at <= now) {
                let (_, fault) = faults.remove(0);
                self.strike(fault).await;
            }
            let mut due = asks.iter().take_while(|(at, ..)| *at <= now).count();
            while due > 0 {
                due -= 1;
                let (_, api_server, ask) = asks.remove(0);
                self.ask(api_server, ask, due);
            }
            self.tick().await;
        }
    }

    /// Everybody comes back, and the weather is fair from now on.
    async fn heal(&mut self) {
        self.ground.network.set_weather(Weather::fair());
        self.ground.fabric.heal();
        for setup in &mut self.plan.workers {
            setup.breaks_per_mille = 0;
        }
        self.workers.iter().flatten().for_each(WorkerLife::spare);
        for at in 0..self.workers.len() {
            self.strike(Fault::Thaw(at)).await;
            self.strike(Fault::Mend(at)).await;
            self.strike(Fault::Start(at)).await;
            for other in 0..self.workers.len() {
                self.strike(Fault::Gap(at, other)).await;
            }
        }
        for at in 0..self.api_servers.len() {
            self.strike(Fault::ApiMend(at)).await;
            self.strike(Fault::ApiStart(at)).await;
        }
    }

    /// Every request ends by its deadline, and with no message lost as soon as there was time for it; what it held becomes
    /// free.
    async fn settle(&mut self) {
        let answered_by = Instant::now() + HEALS_WITHIN + self.plan.work;
        let last = self
            .asked
            .iter()
            .map(|asked| asked.begun + asked.ask.budget);
        let last = last.max().unwrap_or(self.begun);
        while !self.asked.is_empty() {
            self.tick().await;
            if self.plan.keeps_messages && Instant::now() > answered_by {
                for Asked { number, .. } in std::mem::take(&mut self.asked) {
                    self.wrong(format!("all is well, and request {number} waits"));
                }
            }
        }
        let lease = self.plan.workers.iter().map(|w| w.lease).max();
        let by = match self.plan.keeps_messages {
            true => Instant::now() + SETTLES_WITHIN,
            // A worker that was not told goes on until the request's time or the lease is over.
            false => last.max(Instant::now()) + lease.unwrap_or_default() + SETTLES_WITHIN,
        };
        while let Some(held) = self.held() {
            if Instant::now() > by {
                self.wrong(format!("after all requests have ended: {held}"));
                return;
            }
            self.tick().await;
        }
    }

    /// What is still held anywhere.
    fn held(&self) -> Option<String> {
        let workers = self.plan.workers.iter().zip(&self.workers);
        let mut all: Vec<String> = workers
            .filter_map(|(setup, life)| {
                let stats = life.as_ref()?.pool.stats();
                (stats.used + stats.quarantined > 0).then(|| format!("{}: {stats:?}", setup.name))
            })
            .collect();
        let servers = self.api_servers.iter().flatten();
        all.extend(servers.filter_map(|life| life.server.left_over()));
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// What some API server knows otherwise than it is of a worker's prefix index.
    fn unknown_prefixes(&self) -> Option<String> {
        let servers = || self.api_servers.iter().flatten();
        let workers = self.plan.workers.iter().zip(&self.workers);
        for (setup, life) in workers {
            let links = life.as_ref()?.pool.prefix_page(0).0;
            let worker = WorkerId::new(setup.name.as_str()).expect("a plain name");
            for (at, server) in servers().enumerate() {
                if let Err(error) = server.server.knows_prefixes(&worker, &links) {
                    return Some(format!("API server {at} of {worker}'s prefixes: {error}"));
                }
            }
        }
        None
    }

    /// The cluster answers as on its first day.
    async fn serve_again(&mut self) {
        let calm = Instant::now() + STORM_FELT;
        while Instant::now() < calm {
            self.tick().await;
        }
        let by = Instant::now() + HEALS_WITHIN;
        loop {
            let servers = self.api_servers.iter().flatten();
            let faults: Vec<_> = servers.flat_map(|life| life.server.faults()).collect();
            if faults.is_empty() {
                break;
            }
            if Instant::now() > by {
                return self.wrong(format!("the cluster does not heal: {faults:?}"));
            }
            self.tick().await;
        }
        let answered = self.answered;
        let prompts = std::mem::take(&mut self.prompts);
        // A prompt of its own each, and what was asked in the storm: a prefix that was kept and is not right would show.
        let again = prompts.into_iter().rev().take(ASKED_AGAIN).map(Some);
        let asks: Vec<_> = again.chain(vec![None; self.api_servers.len()]).collect();
        let wanted = asks.len() as u64;
        for (i, prompt) in asks.into_iter().enumerate() {
            let at = i % self.api_servers.len();
            let mut ask = Ask::draw(&mut self.dice, 8, 8);
            ask.prompt = prompt.unwrap_or(ask.prompt);
            ask.leaves_after = None;
            ask.reads = None;
            ask.budget = Duration::from_secs(20);
            let by = Instant::now() + ask.budget + SETTLES_WITHIN;
            self.ask(at, ask, 0);
            // One after the other: a queue of one has no room for two.
            while (!self.asked.is_empty() || self.held().is_some()) && Instant::now() < by {
                self.tick().await;
            }
        }
        if self.answered - answered != wanted {
            let errors = self.errors.clone();
            self.wrong(format!("the healed cluster gave errors: {errors:?}"));
        }
        let by = Instant::now() + SETTLES_WITHIN;
        while self.held().is_some() && Instant::now() < by {
            self.tick().await;
        }
        if let Some(held) = self.held() {
            self.wrong(format!("after the last request: {held}"));
        }
        let by = Instant::now() + PREFIXES_KNOWN_WITHIN;
        while self.unknown_prefixes().is_some() && Instant::now() < by {
            self.tick().await;
        }
        if let Some(unknown) = self.unknown_prefixes() {
            self.wrong(unknown);
        }
        let open = self.ground.network.open_requests();
        // Workers may be describing themselves to each other; nothing else is asked any more.
        if open > self.workers.len() * self.workers.len() {
            self.wrong(format!("{open} answers are still waited for"));
        }
    }

    /// Idle workers leave at once, and their books are empty.
    async fn leave(&mut self) {
        for life in self.workers.iter().flatten() {
            life.drain();
        }
        sleep(LEAVES_WITHIN).await;
        for at in 0..self.workers.len() {
            let Some(life) = self.workers[at].take() else {
                continue;
            };
            let name = self.plan.workers[at].name.clone();
            if !life.has_ended() {
                self.wrong(format!("{name} is idle and does not leave"));
                life.crash();
                continue;
            }
            if let Some(books) = life.ended().await {
                self.wrong(format!("{name} left with {books}"));
            }
        }
    }

    /// A moment passes, and what can be seen is looked at.
    async fn tick(&mut self) {
        sleep(TICK).await;
        let now = Instant::now();
        for wrong in self.ground.network.take_wrong() {
            self.wrong(wrong);
        }
        for at in (0..self.asked.len()).rev() {
            self.look_at(at, now);
        }
        for at in 0..self.workers.len() {
            if let Some(life) = &self.workers[at] {
                if let Err(error) = life.pool.check() {
                    self.wrong(format!("{}: {error}", self.plan.workers[at].name));
                }
                // Whoever watches over it starts it again.
                if self.workers[at].as_ref().is_some_and(WorkerLife::has_ended) {
                    self.bury(at).await;
                    self.start_worker(at).await;
                }
            }
        }
    }

    fn look_at(&mut self, at: usize, now: Instant) {
        let asked = &mut self.asked[at];
        let number = asked.number;
        let heard = asked.heard.borrow();
        if let Some(wrong) = &heard.wrong {
            let wrong = format!("request {number}: {wrong}");
            drop(heard);
            self.asked.remove(at);
            return self.wrong(wrong);
        }
        let Some((ended, outcome)) = heard.end else {
            drop(heard);
            let leaves = asked.ask.leaves_after.map(|after| asked.begun + after);
            if leaves.is_some_and(|leaves| leaves <= now) && !asked.left {
                asked.left = true;
                asked.generation.leave();
            }
            // A client that reads nothing keeps its driver waiting, and knows why.
            let deadline = asked.begun + asked.ask.budget + SLACK;
            if now > deadline {
                self.asked.remove(at);
                self.wrong(format!("request {number} has no end at its deadline"));
            }
            return;
        };
        let tokens = heard.tokens;
        drop(heard);
        let asked = self.asked.remove(at);
        self.ground.network.note(
            [5, number, (ended - asked.begun).as_millis() as u64, 0],
            format_args!("request {number} ended: {outcome:?}"),
        );
        match outcome {
            Ok(_) => self.answered += 1,
            Err(kind) => *self.errors.entry(kind.row().label).or_default() += 1,
        }
        let wrong = self.plan.judge(Ended {
            outcome,
            tokens,
            left: asked.left,
            is_late: ended >= asked.begun + asked.ask.budget,
            must_be_answered: asked.must_be_answered,
        });
        if let Some(wrong) = wrong {
            self.wrong(format!("request {number} {wrong}"));
        }
    }

    /// In a run in which nothing goes wrong nothing is retried.
    fn look_at_retries(&mut self) {
        let servers = self.api_servers.iter().flatten();
        let retries: Vec<_> = servers.flat_map(|life| life.server.retries()).collect();
        for (reason, count) in retries {
            if !self.plan.may_retry(&reason) {
                self.wrong(format!(
                    "{count} generations were retried, because: {reason}"
                ));
            }
        }
    }

    /// So many more are asked in the same moment, and may overtake it on the bus.
    fn ask(&mut self, api_server: usize, ask: Ask, beside: usize) {
        let Some(life) = &self.api_servers[api_server] else {
            *self.errors.entry("not reached").or_default() += 1;
            return;
        };
        self.prompts.push(ask.prompt.clone());
        self.requests += 1;
        let number = self.requests;
        let request = RequestId(u128::from(number));
        self.ground.network.note(
            [6, number, ask.prompt.len() as u64, 0],
            format_args!("request {number} = {request} of API server {api_server}: {ask:?}"),
        );
        let setup = &self.plan.workers[0];
        let tokens_max = TOKENS_MAX.min(setup.blocks * setup.block_tokens);
        let (ear, heard) = Ear::new(ask.clone(), setup.block_tokens, tokens_max);
        let generation = ask.generation.clone();
        let asked = match ask.asked {
            Some(asked) => (asked.class, asked.level),
            // One in four is batch, and the others are promised nothing.
            None => {
                let tier = match number.is_multiple_of(4) {
                    true => Tier::Batch,
                    false => Tier::Interactive,
                };
                let class = Class {
                    tier,
                    ..Class::default()
                };
                (class, Some(ServiceLevel::default()))
            }
        };
        let generation = life.server.generate(
            request,
            (ask.cache_salt(), &ask.prompt),
            generation,
            asked,
            ask.budget,
            ear,
        );
        let in_flight = self.asked.len() + beside;
        let must_be_answered = self.plan.must_answer(ask.budget, in_flight);
        self.owed += u64::from(must_be_answered);
        self.asked.push(Asked {
            must_be_answered,
            number,
            api_server,
            generation,
            heard,
            begun: Instant::now(),
            ask,
            left: false,
        });
    }

    async fn strike(&mut self, fault: Fault) {
        self.ground
            .network
            .note([7, 0, 0, 0], format_args!("{fault:?}"));
        match fault {
            Fault::Crash(at) => {
                if let Some(life) = self.workers[at].take() {
                    life.crash();
                    drop(life.ended().await);
                }
            }
            Fault::Start(at) => self.start_worker(at).await,
            Fault::Drain(at) => {
                if let Some(life) = &self.workers[at] {
                    life.drain();
                }
            }
            Fault::Freeze(at) => self.when(at, Connectivity::Up, |life| life.freeze(true)),
            Fault::Thaw(at) => self.when(at, Connectivity::Frozen, |life| life.freeze(false)),
            Fault::Cut(at) => self.when(at, Connectivity::Up, |life| life.cut(true)),
            Fault::Mend(at) => self.when(at, Connectivity::Cut, |life| life.cut(false)),
            Fault::ApiCrash(at) => {
                if let Some(life) = self.api_servers[at].take() {
                    life.port.set(Connectivity::Dead);
                    // Its clients see the connection break.
                    self.asked.retain(|asked| {
                        let its = asked.api_server == at;
                        if its {
                            asked.generation.kill();
                        }
                        !its
                    });
                }
            }
            Fault::ApiStart(at) => {
                if self.api_servers[at].is_none() {
                    self.start_api_server(at).await;
                }
            }
            Fault::ApiCut(at) => self.when_api(at, Connectivity::Up, true),
            Fault::ApiMend(at) => self.when_api(at, Connectivity::Cut, false),
            Fault::Wall(one, other) => self.wall(one, other, true),
            Fault::Gap(one, other) => self.wall(one, other, false),
        }
    }

    fn when(&self, at: usize, connectivity: Connectivity, then: impl FnOnce(&WorkerLife)) {
        if let Some(life) = self.workers[at]
            .as_ref()
            .filter(|l| l.port.state() == connectivity)
        {
            then(life);
        }
    }

    fn when_api(&self, at: usize, connectivity: Connectivity, is_cut: bool) {
        let life = self.api_servers[at].as_ref();
        if let Some(life) = life.filter(|life| life.port.state() == connectivity) {
            life.cut(is_cut);
        }
    }

    fn wall(&self, one: usize, other: usize, stands: bool) {
        let name = |at: usize| &self.plan.workers[at].name;
        self.ground.fabric.wall(name(one), name(other), stands);
    }

    async fn start_worker(&mut self, at: usize) {
        if self.workers[at].is_none() {
            let setup = &self.plan.workers[at];
            let life = WorkerLife::start(&self.ground, setup, &mut self.dice).await;
            self.workers[at] = Some(life);
        }
    }

    async fn bury(&mut self, at: usize) {
        if let Some(life) = self.workers[at].take()
            && let Some(books) = life.ended().await
        {
            let name = self.plan.workers[at].name.clone();
            self.wrong(format!("{name} left with {books}"));
        }
    }

    async fn start_api_server(&mut self, at: usize) {
        let life = ApiLife::start(&self.ground, &format!("api{at}"), self.plan.promises).await;
        self.api_servers[at] = Some(life);
    }

    /// What was done so far, as far as API servers that still live know.
    fn counts(&self) -> Counts {
        let mut counts = *lock(&self.counts);
        let servers = self.api_servers.iter().flatten();
        for (outcome, count) in servers.flat_map(|life| life.server.service_levels()) {
            match &*outcome {
                "refused" => counts.refusals += count,
                "batched" => counts.batched += count,
                _ => {}
            }
        }
        counts
    }

    fn wrong(&mut self, what: String) {
        self.ground
            .network
            .note([8, 0, 0, 0], format_args!("WRONG: {what}"));
        self.wrong.push(what);
    }
}
