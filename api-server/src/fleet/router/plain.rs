//! The same choices by the plainest rule, as a model for the property test: every worker is looked at with everything that is
//! known of it by name, and nothing is worked out before.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::fleet::Fleet;
use crate::fleet::membership::tests::{beat, fingerprint};
use crate::fleet::membership::{GONE_AFTER, SUSPECT_AFTER, Speed};
use baton_protocol::{
    ApiBeat, ApiServerId, Beat, CostPoint, HandleId, Incarnation, Nonce, PROTOCOL_VERSION,
    PeerHealth, PeerState, PrefillTimings, StepCost, WorkerState,
};

mod wait;

const WORKERS: u8 = 9;

#[derive(Default)]
struct Plain {
    workers: BTreeMap<WorkerId, Known>,
    api_servers: BTreeMap<ApiServerId, Instant>,
    own: HashMap<WorkerId, Outstanding>,
    at_beat: HashMap<WorkerId, Outstanding>,
    /// Who ran a prefix, latest first.
    holders: HashMap<u64, VecDeque<WorkerId>>,
    turns: [usize; 2],
    prompts_wait: f32,
}

/// Blame, class and measure.
type Weight = (bool, usize, f64);

/// Times are told apart by 250 microseconds.
fn coarse(us: f32) -> f64 {
    let whole = (us * (1.0 / 250.0)).round_ties_even();
    f64::from(whole.clamp(0.0, 4_194_303.0))
}

struct Known {
    beat: Beat,
    seen: Instant,
    former: Option<Incarnation>,
}

impl Known {
    fn serves(&self, model: &ModelFingerprint, now: Instant) -> bool {
        self.beat.state == WorkerState::Serving
            && self.beat.model.fingerprint == *model
            && now.duration_since(self.seen) < SUSPECT_AFTER
    }

    fn reaches(&self, context: &Target) -> bool {
        let own = self.beat.role == Role::Both
            && self.beat.worker == context.worker
            && self.beat.incarnation == context.incarnation;
        own || self.beat.peers.iter().any(|peer| {
            peer.state == PeerState::Ready
                && peer.worker == context.worker
                && peer.incarnation == context.incarnation
        })
    }

    fn target(&self) -> Target {
        Target {
            worker: self.beat.worker.clone(),
            incarnation: self.beat.incarnation,
        }
    }
}

impl Plain {
    fn beat(&mut self, beat: Beat, now: Instant) {
        let name = beat.worker.clone();
        let own = self.own.get(&name).copied().unwrap_or_default();
        let (mut former, mut is_new_life) = (None, false);
        if let Some(known) = self.workers.get(&name) {
            if known.former == Some(beat.incarnation) {
                return;
            }
            is_new_life = known.beat.incarnation != beat.incarnation;
            former = match is_new_life {
                true => Some(known.beat.incarnation),
                false => known.former,
            };
        }
        self.workers.insert(
            name.clone(),
            Known {
                beat,
                seen: now,
                former,
            },
        );
        self.at_beat.insert(name.clone(), own);
        if is_new_life {
            self.forget(&name);
        }
    }

    fn forget(&mut self, name: &WorkerId) {
        self.at_beat.remove(name);
        for holders in self.holders.values_mut() {
            holders.retain(|holder| holder != name);
        }
    }

    fn sweep(&mut self, now: Instant) {
        let is_gone = |seen: Instant| now.duration_since(seen) >= GONE_AFTER;
        self.api_servers.retain(|_, seen| !is_gone(*seen));
        let workers = self.workers.iter();
        let gone: Vec<WorkerId> = workers
            .filter(|(_, known)| is_gone(known.seen))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.workers.remove(&name);
            self.forget(&name);
        }
    }

    fn suspect_all(&mut self, now: Instant) {
        let then = now - SUSPECT_AFTER;
        for known in self.workers.values_mut() {
            known.seen = known.seen.min(then);
        }
    }

    fn count(&mut self, name: &WorkerId, job: Outstanding, begins: bool) {
        let own = self.own.entry(name.clone()).or_default();
        let change = |number: &mut usize, by: usize| match begins {
            true => *number += by,
            false => *number = number.saturating_sub(by),
        };
        change(&mut own.prefills, job.prefills);
        change(&mut own.prefill_tokens, job.prefill_tokens);
        change(&mut own.staged, job.staged);
        change(&mut own.decodes, job.decodes);
        change(&mut own.decode_tokens, job.decode_tokens);
        change(&mut own.batch_tokens, job.batch_tokens);
        change(&mut own.batch_decodes, job.batch_decodes);
        change(&mut own.batch_prompts, job.batch_prompts);
        change(&mut own.pulls, job.pulls);
        change(&mut own.pull_tokens, job.pull_tokens);
    }

    fn counted(&self, name: &WorkerId) -> [Outstanding; 2] {
        [&self.own, &self.at_beat].map(|numbers| numbers.get(name).copied().unwrap_or_default())
    }

    fn routers(&self) -> usize {
        self.api_servers.len().max(1)
    }

    /// Tokens of prompts ahead, for each that tells what its steps cost.
    fn ahead(&self, known: &Known, tier: Tier) -> f32 {
        let [own, at_beat] = self.counted(&known.beat.worker);
        let load = known.beat.load;
        let interactive = |all: usize, batch: usize| match tier {
            Tier::Interactive => all.saturating_sub(batch),
            Tier::Batch => all,
        };
        let mine = interactive(own.prefill_tokens, own.batch_tokens);
        let mine_then = interactive(at_beat.prefill_tokens, at_beat.batch_tokens);
        let told = interactive(load.waiting_tokens as usize, load.batch_tokens as usize);
        mine as f32 + told.saturating_sub(mine_then) as f32 / self.routers() as f32
    }

    /// Microseconds until a prompt's first token.
    fn first_token(&self, known: &Known, tier: Tier, prompt_tokens: usize, have: usize) -> f32 {
        let speed = Speed::of(&known.beat).unwrap();
        let [own, at_beat] = self.counted(&known.beat.worker);
        let load = known.beat.load;
        let generate = own.decodes + (load.decoding as usize).saturating_sub(at_beat.decodes);
        let (token_us, wait_us) = match generate {
            0 => (speed.alone_us, 0.0),
            _ => (speed.beside_us, speed.decode_us / 2.0),
        };
        let (need, have) = (prompt_tokens.saturating_sub(have) as f32, have as f32);
        let pair_us = speed.pair_us * (token_us / speed.alone_us.max(1e-6));
        let ahead = self.ahead(known, tier);
        wait_us + (ahead + need) * token_us + need * (have + need * 0.5) * pair_us
    }

    /// Class and measure of a place by time.
    fn place(
        &self,
        known: &Known,
        rules: &Constraints<'_>,
        is_own: bool,
        (tokens, have): (usize, usize),
    ) -> (usize, f64) {
        let speed = Speed::of(&known.beat).unwrap();
        let [own, at_beat] = self.counted(&known.beat.worker);
        let (load, capacity) = (known.beat.load, known.beat.capacity);
        let output = rules.max_tokens.clamp(1, OUTPUT_GUESS as usize);
        let lifetime = (tokens + output / 2) as f32;
        let routers = self.routers() as f32;
        let begun = (own.decodes as f32 - at_beat.decodes as f32) * routers + load.pulling as f32;
        let coming = begun.max(0.0);
        let generates = (load.decoding as f32 + begun).max(0.0);
        // A step with it: of those that generate by the KV that they will have, of this one by its own.
        let means = [
            (own.decode_tokens as f32, own.decodes as f32),
            (load.decoding_tokens as f32, load.decoding as f32),
        ];
        let means = means.into_iter().filter(|(_, of)| *of > 0.0);
        let mean = means.map(|(tokens, of)| tokens / of).reduce(f32::max);
        let now = |begun: f32, mean: f32| {
            (speed.decode_us + begun * (speed.row_us + speed.kv_token_us * mean)).max(0.0)
        };
        let growth = (mean.unwrap_or(0.0) * load.decoding as f32 - load.decoding_tokens as f32)
            .max(0.0)
            * speed.kv_token_us;
        let (before, before_token) = match mean {
            Some(mean) => (now(begun, mean), 0.0),
            None => (
                speed.decode_us + coming * speed.row_us,
                coming * speed.kv_token_us,
            ),
        };
        let step_us =
            before + speed.row_us + growth + (before_token + speed.kv_token_us) * lifetime;
        let promised = rules.service.itl_ms.map(limit_us);
        let limit = promised.unwrap_or(speed.limit_us);
        let block = known.beat.kv.block_tokens.max(1) as f32;
        let used = load.blocks_used as f32 + load.blocks_quarantined as f32;
        let has_blocks = is_own || capacity.blocks == 0 || {
            let left = capacity.blocks as f32 - used - (coming + 1.0);
            tokens as f32 * ((coming + 1.0) / block) <= left
        };
        if step_us > limit || generates >= capacity.batch as f32 || !has_blocks {
            return (3, coarse(step_us));
        }
        let have = have.min(tokens);
        if !is_own {
            let link_token_us = self.link_token_us(known);
            let pulls = [own, at_beat].map(|jobs| jobs.pull_tokens as f32);
            let ahead = pulls[0] + (pulls[0] - pulls[1]).max(0.0) * (routers - 1.0);
            let others = (load.pulling as f32 - at_beat.pulls as f32).max(0.0);
            let late_us = ahead * link_token_us
                + (tokens as f32 - have as f32) * ((1.0 + others) * link_token_us);
            if late_us > by_time::LATE_PART * output as f32 * limit {
                return (2, coarse(late_us));
            }
        }
        let packs = self.prompts_wait >= by_time::PACK_FROM;
        let cached = by_time::CACHED_PART * (have as f32 / tokens as f32);
        let others = (generates - cached * capacity.batch as f32).max(0.0);
        let full = (1.0 + coarse(step_us) as f32) * (1.0 + others) * (1.0 - cached);
        // Within one part in a million or so, numbers are equal.
        let full = f64::from(full.to_bits() >> 3);
        match (known.beat.role, packs, is_own) {
            (Role::Both, true, _) => {
                let least = -f64::from(generates.round_ties_even());
                (1, 2.0 * least + f64::from(u8::from(!is_own)))
            }
            (Role::Both, false, true) => (0, 0.0),
            (Role::Both, false, false) => (1, full),
            (_, packs, _) => (usize::from(!packs), full),
        }
    }

    fn link_token_us(&self, known: &Known) -> f32 {
        let mut peers: Vec<&PeerHealth> = known.beat.peers.iter().collect();
        peers.sort_by(|a, b| a.worker.cmp(&b.worker));
        let rates = peers.iter().map(|peer| peer.gigabytes_per_second);
        let rates: Vec<f32> = rates.filter(|rate| *rate > 0.0).collect();
        let sum = rates.iter().fold(0.0, |sum, rate| sum + rate);
        match rates.len() {
            0 => 0.0,
            // Keys and values of two numbers of two bytes.
            count => 8.0 * count as f32 / (sum * 1e3),
        }
    }

    fn remember(&mut self, name: &WorkerId, chain: &[u64]) {
        if !self.workers.contains_key(name) {
            return;
        }
        for link in chain {
            let holders = self.holders.entry(*link).or_default();
            holders.retain(|holder| holder != name);
            holders.push_front(name.clone());
            holders.truncate(4);
        }
    }

    fn cached_tokens(&self, name: &WorkerId, chain: &[u64]) -> usize {
        let has = |link: &&u64| self.holders.get(link).is_some_and(|h| h.contains(name));
        let block_tokens = self.workers[name].beat.kv.block_tokens.max(1);
        chain.iter().take_while(has).count() * block_tokens as usize
    }

    fn choose_context(
        &mut self,
        rules: Constraints<'_>,
        prompt_tokens: usize,
        chain: &[u64],
        slot: &dyn Fn(&WorkerId) -> Option<Slot>,
    ) -> Option<Target> {
        self.turns[0] += 1;
        let serving = || {
            let all = self.workers.values();
            all.filter(|known| known.serves(rules.model, rules.now))
        };
        let candidates: Vec<_> = serving()
            .filter(|known| known.beat.role.prefills())
            .filter(|known| !rules.refused.contains(&known.beat.worker))
            .filter(|known| {
                let mut decoders = serving().filter(|known| known.beat.role.decodes());
                decoders.any(|decoder| decoder.reaches(&known.target()))
            })
            .collect();
        let tells = |known: &&&Known| known.beat.cost.is_some();
        let timed = || candidates.iter().filter(tells);
        let tier = rules.service.tier;
        let busy = timed().filter(|known| self.ahead(known, tier) > 0.0);
        let prompts_wait = busy.count() as f32 / timed().count().max(1) as f32;
        let is_by_time = timed().count() == candidates.len();
        let cost = |known: &Known| -> Weight {
            let name = &known.beat.worker;
            let [own, at_beat] = self.counted(name);
            let load = known.beat.load;
            let have = self.cached_tokens(name, chain);
            let measure = match is_by_time {
                true => coarse(self.first_token(known, tier, prompt_tokens, have)),
                false => {
                    let tokens =
                        (load.waiting_tokens as usize).saturating_sub(at_beat.prefill_tokens);
                    let jobs = (load.waiting + load.running) as usize;
                    let others = tokens + jobs.saturating_sub(at_beat.prefills) * JOB_COST_TOKENS;
                    let left = prompt_tokens.saturating_sub(have);
                    let own = own.prefill_tokens + own.prefills * JOB_COST_TOKENS;
                    (left + own + others / self.routers()) as f64
                }
            };
            (rules.failed.contains(name), 0, measure)
        };
        let chosen = in_turn(&candidates, self.turns[0], slot, cost);
        if self.has_model(rules.model) {
            self.prompts_wait = prompts_wait;
        }
        chosen
    }

    fn has_model(&self, model: &ModelFingerprint) -> bool {
        let mut all = self.workers.values();
        all.any(|known| known.beat.model.fingerprint == *model)
    }

    fn choose_decode(
        &mut self,
        rules: Constraints<'_>,
        handle: &KvHandle,
        chain: &[u64],
        slot: &dyn Fn(&WorkerId) -> Option<Slot>,
    ) -> Option<Target> {
        self.turns[1] += 1;
        let context = Target {
            worker: handle.worker.clone(),
            incarnation: handle.incarnation,
        };
        let candidates: Vec<_> = self
            .workers
            .values()
            .filter(|known| known.serves(rules.model, rules.now) && known.beat.role.decodes())
            .filter(|known| !rules.refused.contains(&known.beat.worker))
            .filter(|known| known.reaches(&context) && known.beat.kv == handle.kv)
            .collect();
        let is_by_time = candidates.iter().all(|known| known.beat.cost.is_some());
        let cost = |known: &Known| -> Weight {
            let name = &known.beat.worker;
            let is_own = known.beat.role == Role::Both && known.target() == context;
            let tokens = handle.valid_tokens as usize;
            let have = self.cached_tokens(name, chain);
            let blame = rules.failed.contains(name);
            if is_by_time {
                let (class, measure) = self.place(known, &rules, is_own, (tokens, have));
                return (blame, class, measure);
            }
            let [own, at_beat] = self.counted(name).map(|jobs| jobs.decodes);
            let load = known.beat.load;
            let beaten = (load.waiting + load.running + load.pulling) as usize;
            let others = beaten.saturating_sub(at_beat) * 1024;
            let jobs = own * 1024 + others / self.routers();
            let batch = known.beat.capacity.batch.max(1) as usize;
            let have = have.min(tokens);
            let share = jobs / batch + CACHED_SHARE - CACHED_SHARE * have / tokens;
            (blame, usize::from(!is_own), share as f64)
        };
        in_turn(&candidates, self.turns[1], slot, cost)
    }
}

/// The cheapest; among equals each in turn, in the order of slots.
fn in_turn(
    candidates: &[&Known],
    turn: usize,
    slot: &dyn Fn(&WorkerId) -> Option<Slot>,
    cost: impl Fn(&Known) -> Weight,
) -> Option<Target> {
    let mut all: Vec<_> = candidates
        .iter()
        .map(|known| (cost(known), *known))
        .collect();
    all.sort_by_key(|(_, known)| slot(&known.beat.worker));
    let costs = all.iter().map(|(cost, _)| *cost);
    let least = costs.reduce(|a, b| if b < a { b } else { a })?;
    all.retain(|(cost, _)| *cost == least);
    Some(all[turn % all.len()].1.target())
}

#[derive(Clone, Debug)]
enum Happens {
    Beat(Beaten),
    ApiBeat(u8),
    Later(u16),
    SuspectAll,
    Count {
        worker: u8,
        job: [u8; 4],
        begins: bool,
    },
    Remember(u8, u8),
    Choose(Choice),
}

#[derive(Clone, Debug)]
struct Beaten {
    worker: u8,
    incarnation: u8,
    kind: u8,
    odd: u8,
    load: [u8; 4],
    batch: u8,
    /// What its steps cost, if it says that.
    cost: Option<u8>,
    peers: Vec<(u8, u8, bool)>,
}

#[derive(Clone, Debug)]
struct Choice {
    prompt_tokens: u16,
    links: u8,
    refused: Vec<u8>,
    failed: Vec<u8>,
    handle: (u8, u8),
    service: (bool, Option<u8>),
}

/// `telling`: how probable it is that a beat tells what steps cost.
fn happens(telling: f64) -> impl Strategy<Value = Happens> {
    let worker = || 0..WORKERS;
    let workers = move || prop::collection::vec(worker(), 0..3);
    let peers = prop::collection::vec((worker(), 0u8..3, prop::bool::weighted(0.8)), 0..9);
    let beaten = (
        worker(),
        0u8..3,
        0u8..8,
        0u8..20,
        any::<[u8; 4]>(),
        0u8..9,
        prop::option::weighted(telling, any::<u8>()),
        peers,
    )
        .prop_map(
            |(worker, incarnation, kind, odd, load, batch, cost, peers)| Beaten {
                worker,
                incarnation,
                kind,
                odd,
                load,
                batch,
                cost,
                peers,
            },
        );
    let service = (any::<bool>(), prop::option::of(1u8..40));
    let handle = (worker(), 0u8..3);
    let choice = (0u16..400, 0u8..8, workers(), workers(), handle, service).prop_map(
        |(prompt_tokens, links, refused, failed, handle, service)| Choice {
            prompt_tokens,
            links,
            refused,
            failed,
            handle,
            service,
        },
    );
    prop_oneof![
        8 => beaten.prop_map(Happens::Beat),
        1 => (0u8..3).prop_map(Happens::ApiBeat),
        2 => (0u16..2_500).prop_map(Happens::Later),
        1 => Just(Happens::SuspectAll),
        3 => (worker(), any::<[u8; 4]>(), any::<bool>())
            .prop_map(|(worker, job, begins)| Happens::Count { worker, job, begins }),
        2 => (worker(), 0u8..8).prop_map(|(worker, links)| Happens::Remember(worker, links)),
        6 => choice.prop_map(Happens::Choose),
    ]
}

/// Mostly one incarnation, so that peers are mostly right about it.
fn incarnation(number: u8) -> Incarnation {
    Incarnation(u64::from(number / 2))
}

fn name(number: u8) -> WorkerId {
    WorkerId::new(format!("w{number}")).unwrap()
}

fn told(beaten: Beaten) -> Beat {
    let role = [Role::Context, Role::Decode, Role::Both, Role::Decode];
    let mut told = beat("w", role[usize::from(beaten.kind % 4)], &[]);
    told.worker = name(beaten.worker);
    told.incarnation = incarnation(beaten.incarnation);
    match beaten.odd {
        0 => told.state = WorkerState::Draining,
        1 => told.kv.groups[0].head_dim += 1,
        2 => told.model.fingerprint = ModelFingerprint::new("cd".repeat(32)).unwrap(),
        _ => {}
    }
    let [waiting, running, waiting_tokens, pulling] = beaten.load.map(u32::from);
    (told.load.waiting, told.load.running) = (waiting % 4, running % 4);
    (told.load.waiting_tokens, told.load.pulling) = (waiting_tokens, pulling % 4);
    told.load.decoding = running % 4;
    told.load.decoding_tokens = u64::from(running % 4) * u64::from(pulling);
    told.load.batch_tokens = waiting_tokens / 2;
    told.load.batch_decoding = running % 2;
    told.load.leased = waiting % 3;
    told.decode_ms = waiting_tokens * 40;
    told.load.blocks_used = waiting;
    told.capacity.batch = beaten.batch.into();
    if beaten.batch == 7 {
        told.capacity.blocks = 0;
    }
    if let Some(cost) = beaten.cost {
        let slower = [1.0, 1.5, 3.0][usize::from(cost % 3)];
        let part = |bit: u8, us: f32| if cost >> bit & 1 == 1 { us } else { 0.0 };
        let point = |tokens, us: f32| CostPoint {
            tokens,
            us: us * slower,
        };
        told.cost = Some(StepCost {
            layers: vec![
                point(1, 4_000.0),
                point(64, 5_000.0),
                point(1_024, 40_000.0),
            ],
            row_us: part(3, 300.0),
            kv_token_us: part(4, 1.0),
            pair_us: part(5, 0.01),
        });
        told.itl_ms = (cost >> 6 & 1 == 1).then_some(10);
        told.step_tokens = Some(512);
    }
    // Links so slow that a prompt of 70 tokens is late, links with which it is late behind others, and fast ones.
    let rate = [0.0, 1e-6, 1e-5, 1.0][usize::from(beaten.load[3] % 4)];
    told.peers = beaten
        .peers
        .into_iter()
        .map(|(worker, of, is_ready)| PeerHealth {
            worker: name(worker),
            incarnation: incarnation(of),
            state: match is_ready {
                true => PeerState::Ready,
                false => PeerState::Broken,
            },
            transport: String::new(),
            gigabytes_per_second: rate,
            pulled_gigabytes_per_second: None,
            pulled_bytes: 0,
            error: None,
        })
        .collect();
    told
}

fn handle(worker: u8, of: u8) -> KvHandle {
    KvHandle {
        worker: name(worker),
        incarnation: incarnation(of),
        handle: HandleId(1),
        nonce: Nonce(1),
        model: fingerprint(),
        kv: beat("x", Role::Both, &[]).kv,
        runs: Vec::new(),
        valid_tokens: 70,
        lease_ms: 1,
        first_token: Some(1),
        first_logprobs: None,
        finish: None,
        cached_tokens: 0,
        timings: PrefillTimings::default(),
        prefix_pull: None,
    }
}

/// Prompts that begin alike share as many links.
fn chain(links: u8) -> Vec<u64> {
    (0..u64::from(links))
        .map(|i| i + 100 * u64::from(links / 4))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Beats, deaths, restarts, workers that come back under their names with other incarnations, and peers that are heard of
    /// before or after those whose KV they read.
    #[test]
    fn choices_are_those_of_the_plain_rule(
        all in prop_oneof![Just(0.999), Just(0.9), Just(0.001)]
            .prop_flat_map(|telling| prop::collection::vec(happens(telling), 1..120)),
    ) {
        let (mut fleet, mut plain) = (Fleet::default(), Plain::default());
        let mut now = Instant::now() + GONE_AFTER;
        let model = fingerprint();
        for happens in all {
            match happens {
                Happens::Beat(beaten) => {
                    let told = told(beaten);
                    fleet.beat(told.clone(), now);
                    plain.beat(told, now);
                }
                Happens::ApiBeat(number) => {
                    let api_server = ApiServerId::new(format!("a{number}")).unwrap();
                    plain.api_servers.insert(api_server.clone(), now);
                    let beat = ApiBeat {
                        v: PROTOCOL_VERSION,
                        api_server,
                        incarnation: None,
                        in_flight: 0,
                        serving_ms: None,
                    };
                    fleet.api_beat(beat, now);
                }
                Happens::Later(ms) => {
                    now += Duration::from_millis(ms.into());
                    fleet.sweep(now);
                    plain.sweep(now);
                }
                Happens::SuspectAll => {
                    fleet.suspect_all(now);
                    plain.suspect_all(now);
                }
                Happens::Count { worker, job, begins } => {
                    let [prefills, prefill_tokens, staged, decodes] = job.map(usize::from);
                    let job = Outstanding {
                        prefills: prefills % 3,
                        prefill_tokens,
                        staged,
                        decodes: decodes % 3,
                        decode_tokens: decodes % 3 * staged,
                        batch_tokens: prefill_tokens / 2,
                        pulls: decodes % 2,
                        pull_tokens: decodes % 2 * staged,
                        batch_decodes: decodes % 2,
                        batch_prompts: prefills % 2,
                    };
                    match begins {
                        true => fleet.begin(&name(worker), job),
                        false => fleet.end(&name(worker), job),
                    }
                    plain.count(&name(worker), job, begins);
                }
                Happens::Remember(worker, links) => {
                    fleet.remember(&name(worker), &chain(links));
                    plain.remember(&name(worker), &chain(links));
                }
                Happens::Choose(choice) => {
                    let [refused, failed] = [choice.refused, choice.failed]
                        .map(|list| list.into_iter().map(name).collect::<Vec<_>>());
                    let (is_batch, itl_ms) = choice.service;
                    let service = Service {
                        tier: if is_batch { Tier::Batch } else { Tier::Interactive },
                        itl_ms: itl_ms.map(u32::from),
                        ..Service::default()
                    };
                    let rules = Constraints { model: &model, refused: &refused, failed: &failed, service, max_tokens: 128, now };
                    let tokens = choice.prompt_tokens.into();
                    let chain = chain(choice.links);
                    let wait = fleet.decode_wait(&model, service, now, (tokens, rules.max_tokens));
                    // Workers are added up in another order there.
                    let plainly = plain.decode_wait(rules, tokens, rules.max_tokens);
                    prop_assert!(wait.abs_diff(plainly) <= plainly / 1000 + Duration::from_millis(1), "{wait:?} {plainly:?}");
                    let chosen = fleet.choose_context(rules, tokens, &chain).map(|(target, _)| target);
                    let slot = |worker: &WorkerId| fleet.members().slot(worker);
                    prop_assert_eq!(chosen, plain.choose_context(rules, tokens, &chain, &slot));
                    let handle = handle(choice.handle.0, choice.handle.1);
                    let chosen = fleet.choose_decode(rules, &handle, &chain);
                    let slot = |worker: &WorkerId| fleet.members().slot(worker);
                    prop_assert_eq!(chosen, plain.choose_decode(rules, &handle, &chain, &slot));
                }
            }
        }
        let members = fleet.members();
        for context in members.workers() {
            let target = context.target();
            let reads = members.slots().filter(|(_, member)| member.reaches(&target));
            let readers: std::collections::BTreeSet<_> = reads.map(|(slot, _)| slot).collect();
            prop_assert!(context.readers.iter().eq(readers), "the readers of {target:?}");
        }
        let plain_idle = plain.own.values().all(|own| *own == Outstanding::default());
        prop_assert_eq!(fleet.is_idle(), plain_idle);
    }
}
