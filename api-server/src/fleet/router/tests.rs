use std::collections::HashMap;
use std::time::Duration;

use super::*;
use crate::fleet::Fleet;
use crate::fleet::membership::tests::{beat, fingerprint};
use baton_protocol::{
    ApiBeat, ApiServerId, CacheSalt, HandleId, Incarnation, Nonce, PROTOCOL_VERSION, PrefillTimings,
};

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

struct Setup {
    fleet: Fleet,
    model: ModelFingerprint,
    now: Instant,
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
        }
    }

    fn context(&mut self, refused: &[WorkerId], tokens: usize, chain: &[u64]) -> Option<String> {
        let rules = Constraints {
            model: &self.model,
            refused,
            failed: &[],
            now: self.now,
        };
        let target = self.fleet.choose_context(rules, tokens, chain)?;
        Some(target.worker.to_string())
    }

    fn decode(&mut self, failed: &[WorkerId], context: &str) -> Option<String> {
        let rules = Constraints {
            model: &self.model,
            refused: &[],
            failed,
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
            valid_tokens: 1,
            lease_ms: 1,
            first_token: 1,
            first_logprobs: None,
            finish: None,
            cached_tokens: 0,
            timings: PrefillTimings::default(),
        };
        let target = self.fleet.choose_decode(rules, &handle)?;
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
        staged: 0,
        decodes: 0,
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
    let chain = prefix_chain(CacheSalt::NONE, &prompt);
    assert_eq!(chain.len(), 8);
    s.fleet.remember(&worker("c2"), &chain);
    for _ in 0..4 {
        assert_eq!(s.context(&[], 256, &chain).unwrap(), "c2");
    }
    let other: Vec<u32> = (7..263).collect();
    assert_ne!(prefix_chain(CacheSalt::NONE, &other)[0], chain[0]);
    // Workers would share nothing of it.
    assert_ne!(prefix_chain(CacheSalt(1), &prompt)[0], chain[0]);
    assert_ne!(prefix_chain(CacheSalt(1 << 64), &prompt)[0], chain[0]);
    let heavy = Outstanding {
        prefills: 1,
        prefill_tokens: 1000,
        staged: 0,
        decodes: 0,
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
        staged: 0,
        decodes: 0,
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
    s.fleet.decode_wait(&s.model, s.now, prompt_tokens)
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
        seconds(4),
        "only one fits"
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
    let wait = |s: &Setup| s.fleet.decode_wait(&s.model, s.now, 10);
    assert_eq!(wait(&s), Duration::from_secs(3 + 3 + 1));
    s.fleet.end(&worker("c1"), ours);
    assert_eq!(wait(&s), Duration::from_secs(1 + 3 + 1), "ours are done");
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
    let wait = s.fleet.decode_wait(&s.model, s.now, usize::MAX - 1);
    assert!(wait < Duration::from_secs(1 << 20), "{wait:?}");
}
