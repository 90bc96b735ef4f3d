use std::collections::HashMap;
use std::time::Duration;

use super::*;
use crate::fleet::Fleet;
use crate::fleet::membership::tests::{beat, fingerprint};
use baton_protocol::{
    ApiBeat, ApiServerId, Beat, CacheSalt, HandleId, Incarnation, Nonce, PROTOCOL_VERSION,
    PackedLinks, PrefillTimings, PrefixReport, prefix_chain,
};

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

struct Setup {
    fleet: Fleet,
    model: ModelFingerprint,
    now: Instant,
    /// Of the prompt for whose handle a decode worker is chosen.
    tokens: u32,
}

impl Setup {
    fn new(workers: &[(&str, Role, &[&str])]) -> Self {
        let now = Instant::now();
        let mut fleet = Fleet::default();
        for (name, role, peers) in workers {
            fleet.beat(beat(name, *role, peers), now);
        }
        Self {
            fleet,
            model: fingerprint(),
            now,
            tokens: 1,
        }
    }

    fn context(&mut self, refused: &[WorkerId], tokens: usize, chain: &[u64]) -> Option<String> {
        let rules = Constraints {
            model: &self.model,
            refused,
            failed: &[],
            service: Service::default(),
            max_tokens: 16,
            now: self.now,
        };
        let (target, _) = self.fleet.choose_context(rules, tokens, chain)?;
        Some(target.worker.to_string())
    }

    fn decode(&mut self, failed: &[WorkerId], context: &str) -> Option<String> {
        let rules = Constraints {
            model: &self.model,
            refused: &[],
            failed,
            service: Service::default(),
            max_tokens: 16,
            now: self.now,
        };
        let handle = KvHandle {
            worker: worker(context),
            incarnation: Incarnation(1),
            handle: HandleId(1),
            nonce: Nonce(1),
            model: self.model.clone(),
            kv: beat("x", Role::Both, &[]).kv,
            runs: Vec::new(),
            valid_tokens: self.tokens,
            lease_ms: 1,
            first_token: Some(1),
            first_logprobs: None,
            finish: None,
            cached_tokens: 0,
            timings: PrefillTimings::default(),
            prefix_pull: None,
        };
        let target = self.fleet.choose_decode(rules, &handle, &[])?;
        Some(target.worker.to_string())
    }
}

const TWO_AND_TWO: &[(&str, Role, &[&str])] = &[
    ("c1", Role::Context, &[]),
    ("c2", Role::Context, &[]),
    ("d1", Role::Decode, &["c1", "c2"]),
    ("d2", Role::Decode, &["c2"]),
];

#[test]
fn bursts_spread_between_beats() {
    let mut s = Setup::new(TWO_AND_TWO);
    let job = Outstanding {
        prefills: 1,
        prefill_tokens: 100,
        ..Outstanding::default()
    };
    let mut counts = HashMap::new();
    for _ in 0..10 {
        let name = s.context(&[], 100, &[]).unwrap();
        s.fleet.begin(&worker(&name), job);
        *counts.entry(name).or_insert(0) += 1;
    }
    assert_eq!(counts["c1"], 5);
    assert_eq!(counts["c2"], 5);
}

#[test]
fn a_known_prefix_attracts_until_the_queue_outweighs_it() {
    let mut s = Setup::new(TWO_AND_TWO);
    let prompt: Vec<u32> = (0..256).collect();
    let block_tokens = s.fleet.block_tokens(&s.model);
    let chain = prefix_chain(CacheSalt::NONE, block_tokens, &prompt);
    assert_eq!(chain.len(), 256 / block_tokens);
    s.fleet.remember(&worker("c2"), &chain);
    for _ in 0..4 {
        assert_eq!(s.context(&[], 256, &chain).unwrap(), "c2");
    }
    let other: Vec<u32> = (7..263).collect();
    assert_ne!(
        prefix_chain(CacheSalt::NONE, block_tokens, &other)[0],
        chain[0]
    );
    // Workers would share nothing of it.
    assert_ne!(
        prefix_chain(CacheSalt(1), block_tokens, &prompt)[0],
        chain[0]
    );
    assert_ne!(
        prefix_chain(CacheSalt(1 << 64), block_tokens, &prompt)[0],
        chain[0]
    );
    let heavy = Outstanding {
        prefills: 1,
        prefill_tokens: 1000,
        ..Outstanding::default()
    };
    s.fleet.begin(&worker("c2"), heavy);
    assert_eq!(s.context(&[], 256, &chain).unwrap(), "c1");
    s.fleet.end(&worker("c2"), heavy);
    assert_eq!(s.context(&[], 256, &chain).unwrap(), "c2");
}

#[test]
fn own_jobs_in_a_beat_are_not_counted_twice() {
    let mut s = Setup::new(TWO_AND_TWO);
    let job = Outstanding {
        prefills: 1,
        prefill_tokens: 500,
        ..Outstanding::default()
    };
    s.fleet.begin(&worker("c1"), job);
    let mut told = beat("c1", Role::Context, &[]);
    told.load.waiting_tokens = 500;
    s.fleet.beat(told, s.now);
    s.fleet.end(&worker("c1"), job);
    // Ours is done: what the beat told was all ours, so the worker is idle again.
    let names: Vec<_> = (0..2).map(|_| s.context(&[], 10, &[]).unwrap()).collect();
    assert!(names.contains(&"c1".to_owned()));
}

#[test]
fn refused_suspect_and_unreachable_workers_are_not_chosen() {
    let mut s = Setup::new(TWO_AND_TWO);
    assert_eq!(s.context(&[worker("c1")], 1, &[]).unwrap(), "c2");
    assert_eq!(s.context(&[worker("c1"), worker("c2")], 1, &[]), None);
    s.now += std::time::Duration::from_secs(3);
    assert_eq!(s.context(&[], 1, &[]), None);
    let mut s = Setup::new(&[("c1", Role::Context, &[]), ("d1", Role::Decode, &[])]);
    assert_eq!(s.context(&[], 1, &[]), None, "no decode worker reaches it");
}

#[test]
fn decode_goes_where_the_kv_can_be_read_and_the_load_is_least() {
    let mut s = Setup::new(TWO_AND_TWO);
    assert_eq!(s.decode(&[], "c1").unwrap(), "d1");
    s.fleet.begin(
        &worker("d1"),
        Outstanding {
            decodes: 1,
            ..Outstanding::default()
        },
    );
    assert_eq!(s.decode(&[], "c2").unwrap(), "d2");
    assert_eq!(
        s.decode(&[worker("d2")], "c2").unwrap(),
        "d1",
        "d2 failed this request"
    );
    assert_eq!(
        s.decode(&[worker("d1")], "c1").unwrap(),
        "d1",
        "there is no other"
    );
}

#[test]
fn equals_take_turns_also_when_choices_of_both_kinds_alternate() {
    let mut s = Setup::new(TWO_AND_TWO);
    let names: Vec<_> = (0..2)
        .map(|_| {
            s.decode(&[], "c2").unwrap();
            s.context(&[], 10, &[]).unwrap()
        })
        .collect();
    assert_ne!(names[0], names[1]);
}

#[test]
fn a_worker_that_does_both_keeps_its_own() {
    let mut s = Setup::new(&[("b", Role::Both, &[]), ("d", Role::Decode, &["b"])]);
    s.fleet.begin(
        &worker("b"),
        Outstanding {
            decodes: 5,
            ..Outstanding::default()
        },
    );
    assert_eq!(s.decode(&[], "b").unwrap(), "b");
    assert_eq!(s.decode(&[worker("b")], "b").unwrap(), "d");
}

/// Three API servers that know of each other by old beats alone, each with nine jobs between two beats.
#[test]
fn several_api_servers_do_not_herd() {
    const NAMES: [&str; 4] = ["d1", "d2", "d3", "d4"];
    const SERVERS: usize = 3;
    const JOBS: usize = 9;
    let workers: Vec<(&str, Role, &[&str])> = std::iter::once(("c", Role::Context, &[][..]))
        .chain(NAMES.map(|name| (name, Role::Decode, &["c"][..])))
        .collect();
    let mut servers: Vec<Setup> = (0..SERVERS).map(|_| Setup::new(&workers)).collect();
    for server in &mut servers {
        for name in ["a", "b", "c"] {
            let beat = ApiBeat {
                v: PROTOCOL_VERSION,
                api_server: ApiServerId::new(name).unwrap(),
                incarnation: None,
                in_flight: 0,
                serving_ms: None,
            };
            server.fleet.api_beat(beat, server.now);
        }
    }
    let job = Outstanding {
        decodes: 1,
        ..Outstanding::default()
    };
    for beat_number in 0..50 {
        let mut placed = Vec::new();
        for (number, server) in servers.iter_mut().enumerate() {
            for _ in 0..JOBS {
                let name = server.decode(&[], "c").unwrap();
                server.fleet.begin(&worker(&name), job);
                placed.push((number, name));
            }
        }
        let jobs_on = |name: &str| placed.iter().filter(|(_, on)| on == name).count();
        let most = NAMES.map(jobs_on).into_iter().max().unwrap();
        let share = SERVERS * JOBS / NAMES.len();
        // Each levels its jobs with a third of what it sees of the others': less than twice its own share.
        assert!(
            most <= 2 * share + SERVERS,
            "{most} jobs on one worker at beat {beat_number}, {share} are its share"
        );
        for server in &mut servers {
            for name in NAMES {
                let mut told = beat(name, Role::Decode, &["c"]);
                told.load.running = jobs_on(name) as u32;
                server.fleet.beat(told, server.now);
            }
        }
        for (number, name) in placed {
            servers[number].fleet.end(&worker(&name), job);
        }
    }
}

#[test]
fn a_load_beyond_all_numbers_is_only_a_large_one() {
    let mut setup = Setup::new(&[
        ("c", Role::Context, &[]),
        ("d0", Role::Decode, &["c"]),
        ("d1", Role::Decode, &["c"]),
    ]);
    let mut beat = beat("d0", Role::Decode, &["c"]);
    beat.load.waiting = u32::MAX;
    beat.load.running = u32::MAX;
    beat.load.pulling = u32::MAX;
    setup.fleet.beat(beat, setup.now);
    for _ in 0..3 {
        assert_eq!(setup.decode(&[], "c").as_deref(), Some("d1"));
    }
}

/// One pair; decode workers have eight places and a hundred blocks of 16 tokens.
fn decode_wait(decode_ms: u32, running: u32, staged: usize, prompt_tokens: usize) -> Duration {
    let mut s = Setup::new(&[("c1", Role::Context, &[])]);
    let mut full = beat("d1", Role::Decode, &["c1"]);
    full.decode_ms = decode_ms;
    full.load.running = running;
    full.load.blocks_used = 4 * running;
    s.fleet.beat(full, s.now);
    let waits = Outstanding {
        staged,
        ..Outstanding::default()
    };
    s.fleet.begin(&worker("c1"), waits);
    s.fleet
        .decode_wait(&s.model, Service::default(), s.now, (prompt_tokens, 16))
}

#[test]
fn a_prompt_waits_for_as_many_ends_as_places_are_missing() {
    let seconds = Duration::from_secs;
    assert_eq!(decode_wait(16_000, 7, 0, 10), seconds(0), "there is room");
    // Eight generations of 16 s: one ends every 2 s.
    assert_eq!(decode_wait(16_000, 8, 0, 10), seconds(2));
    assert_eq!(
        decode_wait(16_000, 8, 9, 10),
        seconds(20),
        "nine are before it"
    );
    assert_eq!(
        decode_wait(0, 8, 9, 10),
        seconds(0),
        "nothing has ended yet"
    );
    // Blocks, too, are places: 68 are left.
    assert_eq!(decode_wait(16_000, 8, 0, 1_000), seconds(2));
    assert_eq!(decode_wait(16_000, 4, 0, 1_000), seconds(0));
    assert_eq!(
        decode_wait(16_000, 4, 1, 1_000),
        Duration::from_millis(3_200),
        "only one more fits: five generate, and one ends every 3.2 s"
    );
}

#[test]
fn what_others_have_under_way_is_waited_for_too_and_counts_once() {
    let mut s = Setup::new(&[]);
    let mut context = beat("c1", Role::Context, &[]);
    (context.load.waiting, context.load.running) = (2, 1);
    // Three wait for a decode worker, and two are being pulled.
    context.load.leased = 5;
    let mut decode = beat("d1", Role::Decode, &["c1"]);
    decode.decode_ms = 8_000;
    (decode.load.running, decode.load.pulling) = (6, 2);
    // Of all that two prompts are ours.
    let ours = Outstanding {
        prefills: 2,
        prefill_tokens: 20,
        ..Outstanding::default()
    };
    s.fleet.begin(&worker("c1"), ours);
    for told in [context, decode] {
        s.fleet.beat(told, s.now);
    }
    let wait = |s: &mut Setup| {
        s.fleet
            .decode_wait(&s.model, Service::default(), s.now, (10, 16))
    };
    assert_eq!(wait(&mut s), Duration::from_secs(3 + 3 + 1));
    s.fleet.end(&worker("c1"), ours);
    assert_eq!(
        wait(&mut s),
        Duration::from_secs(1 + 3 + 1),
        "ours are done"
    );
}

#[test]
fn nonsense_in_a_beat_is_no_wait_and_no_panic() {
    let mut s = Setup::new(&[]);
    let mut worker = beat("b1", Role::Both, &[]);
    worker.kv.block_tokens = 0;
    worker.decode_ms = u32::MAX;
    worker.capacity = baton_protocol::Capacity::default();
    worker.load.leased = u32::MAX;
    worker.load.pulling = u32::MAX;
    worker.load.blocks_used = u32::MAX;
    s.fleet.beat(worker, s.now);
    let wait = s.fleet.decode_wait(
        &s.model,
        Service::default(),
        s.now,
        (usize::MAX - 1, usize::MAX),
    );
    assert!(wait < Duration::from_secs(1 << 20), "{wait:?}");
}

/// Workers that do both and tell what their steps cost: 10 ms a step, or 10 µs a token if that is more; 100 µs a sequence.
mod by_time {
    use baton_protocol::{CostPoint, StepCost, Tier};

    use super::*;

    fn told(name: &str, others: &[&str]) -> Beat {
        let mut told = beat(name, Role::Both, others);
        told.cost = Some(cost(1.0));
        told.itl_ms = Some(20);
        told.step_tokens = Some(8192);
        told.capacity.batch = 256;
        told.capacity.blocks = 100_000;
        told
    }

    fn cost(slower: f32) -> StepCost {
        let point = |tokens, us: f32| CostPoint {
            tokens,
            us: us * slower,
        };
        StepCost {
            layers: vec![
                point(1, 10_000.0),
                point(1000, 10_000.0),
                point(8000, 80_000.0),
            ],
            row_us: 100.0 * slower,
            kv_token_us: 0.0,
            pair_us: 0.0,
        }
    }

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    /// Four of them, all of which can read each other's KV.
    fn four() -> Setup {
        let mut s = Setup::new(&[]);
        for name in NAMES {
            s.fleet.beat(told(name, &NAMES), s.now);
        }
        s
    }

    fn generation() -> Outstanding {
        Outstanding {
            decodes: 1,
            ..Outstanding::default()
        }
    }

    fn prompt(tokens: usize) -> Outstanding {
        Outstanding {
            prefills: 1,
            prefill_tokens: tokens,
            ..Outstanding::default()
        }
    }

    #[test]
    fn alone_a_generation_stays_where_its_prompt_ran() {
        let mut s = four();
        for _ in 0..4 {
            let context = s.context(&[], 2000, &[]).unwrap();
            assert_eq!(s.decode(&[], &context).unwrap(), context);
        }
    }

    #[test]
    fn when_prompts_wait_generations_are_packed_on_few_workers_as_far_as_their_time_allows() {
        let mut s = four();
        let mut counts: HashMap<String, usize> = HashMap::new();
        for _ in 0..100 {
            let context = s.context(&[], 2000, &[]).unwrap();
            s.fleet.begin(&worker(&context), prompt(2000));
            // Another one waits meanwhile.
            s.context(&[], 2000, &[]).unwrap();
            let decode = s.decode(&[], &context).unwrap();
            s.fleet.end(&worker(&context), prompt(2000));
            s.fleet.begin(&worker(&decode), generation());
            *counts.entry(decode).or_default() += 1;
        }
        // 18 ms have room for 80 sequences at 100 µs each beside the 10 ms of a step.
        let mut all: Vec<usize> = counts.into_values().collect();
        all.sort_unstable();
        assert_eq!(all, [20, 80]);
    }

    /// All of them with prompts to run, and some with generations. Of 1 GB/s a token's KV, 8 bytes, takes 8 ns.
    fn packing(generations: &[(&str, u32)]) -> Setup {
        let mut s = four();
        for name in NAMES {
            let mut busy = told(name, &NAMES);
            let own = generations.iter().find(|(of, _)| *of == name);
            busy.load.decoding = own.map_or(0, |(_, count)| *count);
            s.fleet.beat(busy, s.now);
            s.fleet.begin(&worker(name), prompt(2000));
        }
        s.context(&[], 2000, &[]).unwrap();
        s
    }

    fn pull(tokens: usize) -> Outstanding {
        Outstanding {
            pulls: 1,
            pull_tokens: tokens,
            ..Outstanding::default()
        }
    }

    #[test]
    fn where_kv_would_come_late_a_generation_goes_where_a_link_is_free_or_stays() {
        // 16 tokens of 18 ms each bear a delay of 17 ms: KV of 2.1 million tokens.
        let (few, many) = (2_000_000, 3_000_000);
        let mut s = packing(&[("a", 10), ("c", 5)]);
        assert_eq!(s.decode(&[], "b").unwrap(), "a", "the most generations");
        s.fleet.begin(&worker("a"), pull(few));
        assert_eq!(s.decode(&[], "b").unwrap(), "a", "its link is soon free");
        s.fleet.begin(&worker("a"), pull(many - few));
        assert_eq!(s.decode(&[], "b").unwrap(), "c", "its link is free");
        assert_eq!(
            s.decode(&[], "a").unwrap(),
            "a",
            "it moves nothing to itself"
        );
        s.fleet.begin(&worker("c"), pull(many));
        s.fleet.begin(&worker("d"), pull(many));
        assert_eq!(s.decode(&[], "b").unwrap(), "b", "it has the KV");
        s.fleet.end(&worker("a"), pull(many - few));
        assert_eq!(s.decode(&[], "b").unwrap(), "a", "it is free again");
    }

    #[test]
    fn what_others_pull_is_in_the_way_too() {
        let mut s = packing(&[("a", 10)]);
        s.tokens = 500_000;
        let mut told = told("a", &NAMES);
        told.load.decoding = 10;
        told.load.pulling = 2;
        told.capacity.blocks = 0;
        s.fleet.beat(told.clone(), s.now);
        // 4 ms for its own, and 8 for two others that are taken to be as long.
        assert_eq!(s.decode(&[], "b").unwrap(), "a");
        told.load.pulling = 5;
        s.fleet.beat(told.clone(), s.now);
        assert_ne!(s.decode(&[], "b").unwrap(), "a");
        // They are ours, of which it is known that little is left.
        for _ in 0..5 {
            s.fleet.begin(&worker("a"), pull(1));
        }
        s.fleet.beat(told, s.now);
        assert_eq!(s.decode(&[], "b").unwrap(), "a");
    }

    #[test]
    fn where_all_links_are_busy_and_the_own_worker_is_full_the_least_late_is_taken() {
        let mut s = packing(&[("a", 10), ("b", 200)]);
        for (name, tokens) in [("a", 5_000_000), ("c", 3_000_000), ("d", 4_000_000)] {
            s.fleet.begin(&worker(name), pull(tokens));
        }
        assert_eq!(s.decode(&[], "b").unwrap(), "c");
    }

    #[test]
    fn small_differences_of_flat_costs_send_nothing_all_to_one() {
        let mut s = Setup::new(&[]);
        s.fleet.beat(beat_of("p", Role::Context, 1.0, &[]), s.now);
        for (name, slower) in [("a", 1.0), ("b", 1.03), ("c", 1.06)] {
            s.fleet
                .beat(beat_of(name, Role::Decode, slower, &["p"]), s.now);
        }
        let mut counts: HashMap<String, usize> = HashMap::new();
        for _ in 0..90 {
            let name = s.decode(&[], "p").unwrap();
            s.fleet.begin(&worker(&name), generation());
            *counts.entry(name).or_default() += 1;
        }
        assert!(
            counts.values().all(|count| (20..=40).contains(count)),
            "{counts:?}"
        );
    }

    /// Of a worker whose steps take the same however many generate.
    fn beat_of(name: &str, role: Role, slower: f32, others: &[&str]) -> Beat {
        let mut told = told(name, others);
        told.role = role;
        told.cost = Some(StepCost {
            row_us: 0.0,
            ..cost(slower)
        });
        told
    }

    #[test]
    fn prompts_go_where_nothing_generates_until_the_queue_there_is_longer_than_sharing_takes() {
        let mut s = four();
        for name in ["b", "c", "d"] {
            let mut busy = told(name, &NAMES);
            busy.load.decoding = 70;
            busy.load.decoding_tokens = 70_000;
            s.fleet.beat(busy, s.now);
        }
        assert_eq!(s.context(&[], 2000, &[]).unwrap(), "a");
        s.fleet.begin(&worker("a"), prompt(2000));
        // 25 ms behind it; beside 70 sequences a step of 18 ms has room for all 500, after half of the one under way.
        assert_ne!(s.context(&[], 500, &[]).unwrap(), "a");
    }

    #[test]
    fn a_worker_that_is_half_as_fast_gets_a_third_of_the_prompts() {
        let mut s = Setup::new(&[]);
        s.fleet.beat(told("a", &["a", "b"]), s.now);
        let mut slow = told("b", &["a", "b"]);
        slow.cost = Some(cost(2.0));
        s.fleet.beat(slow, s.now);
        let mut counts: HashMap<String, usize> = HashMap::new();
        for _ in 0..90 {
            let name = s.context(&[], 2000, &[]).unwrap();
            s.fleet.begin(&worker(&name), prompt(2000));
            *counts.entry(name).or_default() += 1;
        }
        assert!((29..=31).contains(&counts["b"]), "{counts:?}");
    }

    #[test]
    fn a_prompt_goes_where_its_prefix_is_unless_the_wait_there_is_longer() {
        let mut s = four();
        let tokens: Vec<u32> = (0..2000).collect();
        let chain = prefix_chain(CacheSalt::NONE, s.fleet.block_tokens(&s.model), &tokens);
        s.fleet.remember(&worker("c"), &chain);
        assert_eq!(s.context(&[], 2000, &chain).unwrap(), "c");
        s.fleet.begin(&worker("c"), prompt(1500));
        assert_eq!(s.context(&[], 2000, &chain).unwrap(), "c");
        s.fleet.begin(&worker("c"), prompt(1500));
        assert_ne!(s.context(&[], 2000, &chain).unwrap(), "c");
    }

    /// Four that lease their prefixes, after `alter`. One, `c`, has said that it has all of a prompt of 2,000 tokens; its chain.
    fn four_and_a_prefix(alter: fn(&mut Beat)) -> (Setup, Vec<u64>) {
        let mut s = Setup::new(&[]);
        for name in NAMES {
            let mut told = told(name, &NAMES);
            (told.leases_prefixes, told.prefix_version) = (true, Some(0));
            alter(&mut told);
            s.fleet.beat(told, s.now);
        }
        let tokens: Vec<u32> = (0..2000).collect();
        let chain = prefix_chain(CacheSalt::NONE, s.fleet.block_tokens(&s.model), &tokens);
        s.fleet.prefixes(PrefixReport {
            v: PROTOCOL_VERSION,
            worker: worker("c"),
            incarnation: Incarnation(1),
            since: 0,
            version: 1,
            added: PackedLinks(chain.clone()),
            removed: PackedLinks(Vec::new()),
            is_part: false,
        });
        while s.fleet.take_in_prefixes() {}
        (s, chain)
    }

    fn chosen(s: &mut Setup, failed: &[WorkerId], chain: &[u64]) -> (String, Option<Source>) {
        let rules = Constraints {
            model: &s.model,
            refused: &[],
            failed,
            service: Service::default(),
            max_tokens: 16,
            now: s.now,
        };
        let (target, source) = s.fleet.choose_context(rules, 2000, chain).unwrap();
        (target.worker.to_string(), source)
    }

    #[test]
    fn while_its_holder_is_busy_a_prefix_is_pulled_where_that_is_quicker_than_to_wait_or_compute() {
        let (mut s, chain) = four_and_a_prefix(|_| {});
        // Idle, it is the best itself.
        assert_eq!(chosen(&mut s, &[], &chain), ("c".to_owned(), None));
        // 5 ms behind another prompt, 20 ms to compute anew, and a millisecond to ask and pull.
        s.fleet.begin(&worker("c"), prompt(500));
        let (name, source) = chosen(&mut s, &[], &chain);
        assert_ne!(name, "c");
        let source = source.expect("a source");
        let prefix = &source.prefix;
        // All whole blocks but the last: a token is left to compute.
        assert_eq!((prefix.worker.as_str(), prefix.tokens), ("c", 1984));
        let first = |source| {
            let (worker, tier) = (worker(&name), Tier::Interactive);
            s.fleet
                .first_token(&worker, tier, 2000, &chain, source)
                .unwrap()
        };
        let (pulled, computed) = (first(Some(&source)), first(None));
        assert!(pulled.expected < Duration::from_millis(2), "{pulled:?}");
        assert!(
            computed.expected > Duration::from_millis(19),
            "{computed:?}"
        );
        assert_eq!(pulled.alone, pulled.expected);
        // Each in turn, and whoever has more to do less.
        s.fleet.begin(&worker(&name), prompt(500));
        for _ in 0..8 {
            let (other, source) = chosen(&mut s, &[], &chain);
            assert!(other != name && other != "c" && source.is_some(), "{other}");
        }
    }

    #[test]
    fn nothing_is_pulled_over_slow_links_from_who_failed_by_workers_of_old_or_on_a_guess() {
        let slow = |told: &mut Beat| {
            for peer in &mut told.peers {
                // 8 bytes a token: as long as computing.
                peer.pulled_gigabytes_per_second = Some(0.001);
            }
        };
        let absurd = |told: &mut Beat| {
            for peer in &mut told.peers {
                peer.pulled_gigabytes_per_second = Some(f32::NAN);
            }
        };
        let of_old = |told: &mut Beat| told.leases_prefixes = false;
        let holder_of_old = |told: &mut Beat| told.leases_prefixes = told.worker.as_str() != "c";
        let unconnected = |told: &mut Beat| told.peers.clear();
        let leaves = |told: &mut Beat| {
            if told.worker.as_str() == "c" {
                told.state = baton_protocol::WorkerState::Draining;
            }
        };
        let alterations: [fn(&mut Beat); 6] =
            [slow, absurd, of_old, holder_of_old, unconnected, leaves];
        for (number, alter) in alterations.into_iter().enumerate() {
            let (mut s, chain) = four_and_a_prefix(alter);
            s.fleet.begin(&worker("c"), prompt(500));
            let (name, source) = chosen(&mut s, &[], &chain);
            assert_eq!(source, None, "alteration {number}");
            assert_eq!(name == "c", number != 5, "alteration {number}: {name}");
        }
        let (mut s, chain) = four_and_a_prefix(|_| {});
        s.fleet.begin(&worker("c"), prompt(500));
        let (name, source) = chosen(&mut s, &[worker("c")], &chain);
        assert!(name != "c" && source.is_none(), "{name}: {source:?}");
        // One that was just sent a prompt is yet to run it.
        let (mut s, _) = four_and_a_prefix(|_| {});
        let guessed: Vec<u64> = (1..=125).collect();
        s.fleet.remember(&worker("a"), &guessed);
        s.fleet.begin(&worker("a"), prompt(500));
        assert_eq!(chosen(&mut s, &[], &guessed).1, None);
    }

    #[test]
    fn a_worker_of_old_that_tells_nothing_has_all_weighed_by_tokens() {
        let mut s = four();
        s.fleet.beat(beat("e", Role::Both, &NAMES), s.now);
        s.fleet.begin(&worker("a"), prompt(10));
        for _ in 0..8 {
            assert_ne!(s.context(&[], 10, &[]).unwrap(), "a");
        }
    }

    #[test]
    fn interactive_prompts_are_not_behind_batch_ones() {
        let mut s = four();
        let batch = Outstanding {
            batch_tokens: 100_000,
            ..prompt(100_000)
        };
        s.fleet.begin(&worker("a"), batch);
        let first = |s: &Setup, tier| {
            s.fleet
                .first_token(&worker("a"), tier, 2000, &[], None)
                .unwrap()
        };
        let (interactive, behind) = (first(&s, Tier::Interactive), first(&s, Tier::Batch));
        assert_eq!(interactive.expected, interactive.alone);
        assert!(
            behind.expected > interactive.expected + Duration::from_millis(900),
            "{behind:?}"
        );
    }

    #[test]
    fn places_are_those_that_keep_the_promised_time() {
        let mut s = four();
        for name in NAMES {
            let mut busy = told(name, &NAMES);
            busy.load.decoding = 80;
            busy.load.running = 80;
            busy.load.decoding_tokens = 80_000;
            busy.decode_ms = 8_000;
            s.fleet.beat(busy, s.now);
        }
        let wait = |s: &mut Setup, itl_ms| {
            let service = Service {
                itl_ms,
                ..Service::default()
            };
            s.fleet.decode_wait(&s.model, service, s.now, (10, 1000))
        };
        // 256 sequences have places, but only 80 keep to 20 ms: one leaves each 25 ms.
        assert_eq!(wait(&mut s, None), Duration::ZERO);
        assert_eq!(wait(&mut s, Some(20)), Duration::from_millis(25));
        // 35 keep to 15 ms: of each worker's 80 there are 45 that leave before there is a place.
        assert_eq!(
            wait(&mut s, Some(15)),
            Duration::from_millis((4 * 45 + 1) * 25)
        );
    }

    /// Prompts of 2,000 tokens take 20 ms, which is 0.5% of the 4 s that their answers count for at least: 320 generations would bring 1.6 workers' time in prompts.
    #[test]
    fn places_leave_time_for_the_prompts_that_follow() {
        let free = |s: &mut Setup, generations: u32| {
            for name in NAMES {
                let mut busy = told(name, &NAMES);
                busy.load.decoding = generations;
                busy.load.running = generations;
                busy.decode_ms = 2_000;
                s.fleet.beat(busy, s.now);
            }
            let service = Service {
                itl_ms: Some(20),
                ..Service::default()
            };
            let wait = s.fleet.decode_wait(&s.model, service, s.now, (2000, 100));
            wait == Duration::ZERO
        };
        let mut s = four();
        // 320 / (1 + 0.005 · 80) = 228, and half of its root.
        assert!(free(&mut s, 58));
        assert!(!free(&mut s, 59));
        // A worker for prompts alone has some of that time.
        let mut apart = told("context", &NAMES);
        apart.role = Role::Context;
        s.fleet.beat(apart, s.now);
        assert!(free(&mut s, 73));
        assert!(!free(&mut s, 74));
        // What is found in caches takes none: most of 20 ms of the mean prompt is gone.
        for _ in 0..1000 {
            s.fleet.answered(100, 100);
        }
        assert!(free(&mut s, 79));
    }

    #[test]
    fn interactive_requests_do_not_wait_for_the_places_of_batch_ones() {
        let mut s = Setup::new(&[("c1", Role::Context, &[])]);
        let mut full = told("d1", &["c1"]);
        full.role = Role::Decode;
        full.decode_ms = 8_000;
        full.capacity.batch = 8;
        full.load.decoding = 6;
        full.load.running = 6;
        full.load.pulling = 2;
        let wait = |s: &mut Setup, tier| {
            let service = Service {
                tier,
                ..Service::default()
            };
            s.fleet.decode_wait(&s.model, service, s.now, (200, 100))
        };
        let [interactive, batch] = [Tier::Interactive, Tier::Batch];
        s.fleet.beat(full.clone(), s.now);
        assert_eq!(wait(&mut s, interactive), Duration::from_millis(1_000));
        // Three of them are batch: an interactive request takes the place of one.
        full.load.batch_decoding = 3;
        s.fleet.beat(full.clone(), s.now);
        assert_eq!(wait(&mut s, interactive), Duration::ZERO);
        assert_eq!(wait(&mut s, batch), Duration::from_millis(1_000));
        // What this API server has there itself counts once.
        let own = Outstanding {
            decodes: 3,
            batch_decodes: 3,
            ..Outstanding::default()
        };
        s.fleet.begin(&worker("d1"), own);
        s.fleet.beat(full.clone(), s.now);
        assert_eq!(wait(&mut s, interactive), Duration::ZERO);
        s.fleet.end(&worker("d1"), own);
        s.fleet.beat(full.clone(), s.now);
        // Prompts of batch requests will want places too, and get them after it.
        let prompts = Outstanding {
            batch_tokens: 20 * 100,
            batch_prompts: 20,
            ..Outstanding {
                prefills: 20,
                ..prompt(20 * 100)
            }
        };
        s.fleet.begin(&worker("c1"), prompts);
        assert_eq!(wait(&mut s, interactive), Duration::ZERO);
        assert_eq!(wait(&mut s, batch), Duration::from_millis(21_000));
        s.fleet.end(&worker("c1"), prompts);
        let mut others = beat("c1", Role::Context, &[]);
        others.load.waiting = 20;
        others.load.waiting_tokens = 2_000;
        others.load.batch_tokens = 2_000;
        s.fleet.beat(others, s.now);
        assert_eq!(wait(&mut s, interactive), Duration::ZERO);
        assert_eq!(wait(&mut s, batch), Duration::from_millis(21_000));
        s.fleet.beat(beat("c1", Role::Context, &[]), s.now);
        // As many interactive ones as places are beyond it.
        full.load.batch_decoding = 0;
        s.fleet.beat(full, s.now);
        assert!(wait(&mut s, interactive) > Duration::ZERO);
    }

    #[test]
    fn time_for_prompts_is_left_only_by_workers_that_say_what_it_costs() {
        let mut s = four();
        for name in NAMES {
            let mut busy = told(name, &NAMES);
            busy.load.decoding = 79;
            busy.load.running = 79;
            busy.decode_ms = 2_000;
            s.fleet.beat(busy, s.now);
        }
        let service = Service {
            itl_ms: Some(20),
            ..Service::default()
        };
        let wait = |s: &mut Setup| s.fleet.decode_wait(&s.model, service, s.now, (2000, 100));
        assert!(wait(&mut s) > Duration::ZERO);
        // One of an earlier release has all of its places.
        let mut old = beat("e", Role::Decode, &NAMES);
        old.capacity.blocks = 10_000;
        s.fleet.beat(old, s.now);
        assert_eq!(wait(&mut s), Duration::ZERO);
    }

    #[test]
    fn places_are_counted_with_the_kv_that_sequences_will_have() {
        let mut s = Setup::new(&[]);
        let mut grows = cost(1.0);
        grows.kv_token_us = 0.1;
        let mut busy = told("a", &[]);
        busy.cost = Some(grows);
        busy.load.decoding = 20;
        busy.load.running = 20;
        s.fleet.beat(busy.clone(), s.now);
        let free = |s: &mut Setup| {
            let service = Service {
                itl_ms: Some(20),
                ..Service::default()
            };
            s.fleet.decode_wait(&s.model, service, s.now, (100, 1000)) == Duration::ZERO
        };
        // 8 ms for 20 sequences and one more, each 100 µs and 0.1 a token of its 228, by what an answer is taken to have at first.
        assert!(free(&mut s));
        // They have just begun, and will have 600 tokens each in the mean of their time.
        busy.load.decoding_tokens = 20 * 100;
        s.fleet.beat(busy.clone(), s.now);
        for _ in 0..1000 {
            s.fleet.answered(100, 1000);
        }
        assert_eq!(s.fleet.lifetime_tokens(100, 5000), 600);
        assert_eq!(s.fleet.lifetime_tokens(100, 50), 125);
        let begun = Outstanding {
            decodes: 48,
            decode_tokens: 48 * 600,
            ..Outstanding::default()
        };
        s.fleet.begin(&worker("a"), begun);
        busy.load.decoding = 48;
        busy.load.running = 48;
        busy.load.decoding_tokens = 48 * 100;
        s.fleet.beat(busy, s.now);
        // 48 take 15.3 ms now, and 17.7 in the mean: another would be the 50th of those that 18 ms hold.
        assert!(free(&mut s));
        s.fleet.begin(
            &worker("a"),
            Outstanding {
                decodes: 3,
                decode_tokens: 1800,
                ..Outstanding::default()
            },
        );
        assert!(!free(&mut s));
    }

    #[test]
    fn who_comes_before_anything_ran_waits_for_a_full_worker_not_for_an_idle_one() {
        let mut s = Setup::new(&[("c1", Role::Context, &[])]);
        let mut idle = beat("d1", Role::Decode, &["c1"]);
        idle.capacity.batch = 8;
        idle.cost = Some(cost(2.0));
        s.fleet.beat(idle, s.now);
        let before = Outstanding {
            prefills: 39,
            ..Outstanding::default()
        };
        s.fleet.begin(&worker("c1"), before);
        let wait = s
            .fleet
            .decode_wait(&s.model, Service::default(), s.now, (10, 60));
        // Eight generate, each for 60 steps of 20 ms: one ends every 156 ms with what rows add, and 32 are missing.
        let range = Duration::from_millis(32 * 150)..Duration::from_millis(32 * 170);
        assert!(range.contains(&wait), "{wait:?}");
    }

    /// Three API servers see beats a second old and choose without knowing of each other. After a burst the number of generations on each worker
    /// settles: none of them swings.
    #[test]
    fn three_routers_do_not_swing() {
        let mut routers: Vec<Setup> = (0..3).map(|_| four()).collect();
        for s in &mut routers {
            for number in 0..3 {
                let api_server = ApiServerId::new(format!("api{number}")).unwrap();
                let beat = ApiBeat {
                    v: PROTOCOL_VERSION,
                    api_server,
                    incarnation: None,
                    in_flight: 0,
                    serving_ms: None,
                };
                s.fleet.api_beat(beat, s.now);
            }
        }
        // Each second 12 prompts of 2,000 tokens come for each router and are done within it; a generation lasts five seconds.
        let mut under_way: Vec<(usize, usize, String)> = Vec::new();
        let mut seen: Vec<Vec<usize>> = Vec::new();
        for second in 0..40 {
            under_way.retain(|(until, router, name)| {
                let stays = *until > second;
                if !stays {
                    routers[*router].fleet.end(&worker(name), generation());
                }
                stays
            });
            let counts: Vec<usize> = NAMES
                .iter()
                .map(|name| under_way.iter().filter(|(_, _, on)| on == name).count())
                .collect();
            for s in &mut routers {
                s.now += Duration::from_secs(1);
                for (name, count) in NAMES.iter().zip(&counts) {
                    let mut told = told(name, &NAMES);
                    told.load.decoding = *count as u32;
                    told.load.running = *count as u32;
                    told.load.decoding_tokens = *count as u64 * 2_000;
                    s.fleet.beat(told, s.now);
                }
            }
            seen.push(counts);
            for _ in 0..12 {
                for (number, s) in routers.iter_mut().enumerate() {
                    let context = s.context(&[], 2000, &[]).unwrap();
                    s.fleet.begin(&worker(&context), prompt(2000));
                    s.context(&[], 2000, &[]).unwrap();
                    let decode = s.decode(&[], &context).unwrap();
                    s.fleet.end(&worker(&context), prompt(2000));
                    s.fleet.begin(&worker(&decode), generation());
                    under_way.push((second + 5, number, decode));
                }
            }
        }
        // 180 generations: two workers full, one in part, and it stays like that.
        let settled = &seen[20..];
        for (worker, name) in NAMES.iter().enumerate() {
            let counts: Vec<usize> = settled.iter().map(|counts| counts[worker]).collect();
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(most - least <= 40, "{name} swings: {counts:?}");
            assert!(*most <= 110, "{name} is overfilled: {counts:?}");
        }
    }
}
