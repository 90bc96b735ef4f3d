//! The same choices by the plainest rule, as a model for the property test: every worker is looked at with everything that is
//! known of it by name, and nothing is worked out before.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use super::prefixes::PREFIX_BLOCK_TOKENS;
use super::*;
use crate::fleet::Fleet;
use crate::fleet::membership::GONE_AFTER;
use crate::fleet::membership::tests::{beat, fingerprint};
use baton_protocol::{
    ApiBeat, ApiServerId, Beat, HandleId, Incarnation, Nonce, PROTOCOL_VERSION, PeerHealth,
    PeerState, PrefillTimings, WorkerState,
};

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
        chain.iter().take_while(has).count() * PREFIX_BLOCK_TOKENS
    }

    fn choose_context(
        &mut self,
        rules: Constraints<'_>,
        prompt_tokens: usize,
        chain: &[u64],
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
        let cost = |known: &Known| {
            let name = &known.beat.worker;
            let [own, at_beat] = [&self.own, &self.at_beat]
                .map(|numbers| numbers.get(name).copied().unwrap_or_default());
            let load = known.beat.load;
            let tokens = (load.waiting_tokens as usize).saturating_sub(at_beat.prefill_tokens);
            let jobs = (load.waiting + load.running) as usize;
            let others = tokens + jobs.saturating_sub(at_beat.prefills) * JOB_COST_TOKENS;
            let left = prompt_tokens.saturating_sub(self.cached_tokens(name, chain));
            (
                rules.failed.contains(name),
                left + own.prefill_tokens
                    + own.prefills * JOB_COST_TOKENS
                    + others / self.api_servers.len().max(1),
            )
        };
        in_turn(&candidates, self.turns[0], cost)
    }

    fn choose_decode(&mut self, rules: Constraints<'_>, handle: &KvHandle) -> Option<Target> {
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
        let cost = |known: &Known| {
            let name = &known.beat.worker;
            let own = self.own.get(name).copied().unwrap_or_default().decodes;
            let at_beat = self.at_beat.get(name).copied().unwrap_or_default().decodes;
            let load = known.beat.load;
            let beaten = (load.waiting + load.running + load.pulling) as usize;
            let others = beaten.saturating_sub(at_beat) * 1024;
            let jobs = own * 1024 + others / self.api_servers.len().max(1);
            let is_own = known.beat.role == Role::Both && known.target() == context;
            let batch = known.beat.capacity.batch.max(1) as usize;
            (rules.failed.contains(name), !is_own, jobs / batch)
        };
        in_turn(&candidates, self.turns[1], cost)
    }
}

/// The cheapest; among equals the first from where this turn begins, in the order of names.
fn in_turn<C: Ord>(
    candidates: &[&Known],
    turn: usize,
    cost: impl Fn(&Known) -> C,
) -> Option<Target> {
    let count = candidates.len();
    let order = (0..count).map(|i| candidates[(i + turn) % count]);
    order.min_by_key(|known| cost(known)).map(Known::target)
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
    peers: Vec<(u8, u8, bool)>,
}

#[derive(Clone, Debug)]
struct Choice {
    prompt_tokens: u16,
    links: u8,
    refused: Vec<u8>,
    failed: Vec<u8>,
    handle: (u8, u8),
}

fn happens() -> impl Strategy<Value = Happens> {
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
        peers,
    )
        .prop_map(
            |(worker, incarnation, kind, odd, load, batch, peers)| Beaten {
                worker,
                incarnation,
                kind,
                odd,
                load,
                batch,
                peers,
            },
        );
    let choice = (0u16..400, 0u8..8, workers(), workers(), (worker(), 0u8..3)).prop_map(
        |(prompt_tokens, links, refused, failed, handle)| Choice {
            prompt_tokens,
            links,
            refused,
            failed,
            handle,
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
    told.capacity.batch = beaten.batch.into();
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
            gigabytes_per_second: 0.0,
            pulled_gigabytes_per_second: None,
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
        valid_tokens: 1,
        lease_ms: 1,
        first_token: 1,
        first_logprobs: None,
        finish: None,
        cached_tokens: 0,
        timings: PrefillTimings::default(),
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
    fn choices_are_those_of_the_plain_rule(all in prop::collection::vec(happens(), 1..120)) {
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
                    let job = Outstanding { prefills: prefills % 3, prefill_tokens, staged, decodes: decodes % 3 };
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
                    let rules = Constraints { model: &model, refused: &refused, failed: &failed, now };
                    let tokens = choice.prompt_tokens.into();
                    let chain = chain(choice.links);
                    prop_assert_eq!(
                        fleet.choose_context(rules, tokens, &chain),
                        plain.choose_context(rules, tokens, &chain)
                    );
                    let handle = handle(choice.handle.0, choice.handle.1);
                    prop_assert_eq!(
                        fleet.choose_decode(rules, &handle),
                        plain.choose_decode(rules, &handle)
                    );
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
