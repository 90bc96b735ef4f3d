//! What a choice of the router costs in a large cluster, at rest and while the members are rendered without a pause.
//!
//! `cargo bench -p baton-api-server`. Two clusters of 1,000 workers: half of them context workers, each of which every decode worker can read; and all
//! of role `both`, each of which can read every other. 10,000 requests under way. Workers tell what their steps cost, so choices are by time. A choice
//! is measured as the server makes it, the wait for the lock included; "a request" is all that one asks which was promised times. Every worker reports
//! its prefixes: all hold one system prompt, and conversations that go on from it are on one pair each.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_api_server::fuzzing::{Constraints, Fleet, Metrics, Outstanding, Target, worker_rows};
use baton_protocol::{
    Beat, CacheSalt, Capacity, CostPoint, HandleId, Incarnation, KvGeometry, KvGroup, KvHandle,
    Load, ModelFingerprint, ModelInfo, Nonce, PROTOCOL_VERSION, PackedLinks, PeerChanges,
    PeerHealth, PeerState, PrefillTimings, PrefixReport, Role, Service, StepCost, Tier, WorkerId,
    WorkerState, prefix_chain,
};

const PAIRS: usize = 500;
const UNDER_WAY: usize = 10_000;
const PROMPT_TOKENS: usize = 2_048;
const BLOCK_TOKENS: usize = 32;

/// Tokens of a conversation: the first 2,048 are the system prompt.
const CONVERSATION_TOKENS: usize = 8_192;

/// Conversations of each pair.
const CONVERSATIONS: usize = 10;

/// What requests are promised.
const PROMISED: Service = Service {
    tier: Tier::Interactive,
    priority: 0,
    itl_ms: Some(10),
};

/// What no worker keeps: all of them are full.
const FULL: Service = Service {
    itl_ms: Some(1),
    ..PROMISED
};

/// One choice of the round of this number.
type Act = fn(&Cluster, usize);

const ACTS: [(&str, Act); 10] = [
    ("choose_context", |cluster, _| {
        black_box(cluster.choose_context(&[]));
    }),
    ("choose_context, prefix known", |cluster, i| {
        black_box(cluster.choose_context(cluster.prompt(i)));
    }),
    ("choose_context, conversation", |cluster, i| {
        black_box(cluster.choose_context(cluster.conversation(i)));
    }),
    ("first_token, conversation", |cluster, i| {
        let worker = &cluster.contexts[i % cluster.contexts.len()];
        cluster.first_token(worker, cluster.conversation(i));
    }),
    ("choose_decode", |cluster, i| {
        let context = &cluster.contexts[i % cluster.contexts.len()];
        black_box(cluster.choose_decode(context, &[]));
    }),
    ("choose_decode, conversation", |cluster, i| {
        let context = &cluster.contexts[i % cluster.contexts.len()];
        black_box(cluster.choose_decode(context, cluster.conversation(i)));
    }),
    ("decode_wait", |cluster, _| cluster.decode_wait(PROMISED)),
    ("decode_wait, all full", |cluster, _| {
        cluster.decode_wait(FULL);
    }),
    ("a request", |cluster, i| {
        cluster.request(cluster.prompt(i * 7));
    }),
    ("a request, conversation", |cluster, i| {
        cluster.request(cluster.conversation(i * 7));
    }),
];

fn main() {
    // Cargo passes its own flags; `cargo test --benches` asks only whether this runs.
    let quick = std::env::args().any(|arg| arg == "--test");
    let (pairs, rounds) = match quick {
        true => (4, 10),
        false => (PAIRS, 20_000),
    };
    for (name, roles) in [
        ("half context, half decode", [Role::Context, Role::Decode]),
        ("all of role both", [Role::Both, Role::Both]),
    ] {
        let cluster = Cluster::new(pairs, roles);
        println!(
            "{} workers, {name}, {UNDER_WAY} requests under way; microseconds",
            2 * pairs
        );
        measure_all(&cluster, rounds);
    }
}

fn measure_all(cluster: &Cluster, rounds: usize) {
    println!("{:>40} {:>8} {:>8} {:>8}", "", "p50", "p99", "max");
    for (name, act) in ACTS {
        print(name, measure(rounds, |i| act(cluster, i)));
    }
    print(
        "a beat",
        measure(rounds, |i| {
            let beat = cluster.beats[i % cluster.beats.len()].clone();
            let begun = Instant::now();
            cluster.fleet().beat(beat, cluster.now);
            begun
        }),
    );
    print(
        "a job begins and ends",
        measure(rounds, |i| {
            let worker = &cluster.contexts[i % cluster.contexts.len()];
            let begun = Instant::now();
            cluster.fleet().begin(worker, generation());
            cluster.fleet().end(worker, generation());
            begun
        }),
    );
    let mut version = 1;
    print(
        "64 links of a report",
        measure(rounds, |i| {
            let worker = i % cluster.contexts.len();
            version += u64::from(worker == 0);
            let links =
                (0..64).map(|at| ((i * 64 + at) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let worker = cluster.contexts[worker].clone();
            let report = report(worker, version, links.collect());
            let begun = Instant::now();
            let mut fleet = cluster.fleet();
            fleet.prefixes(report);
            fleet.take_in_prefixes();
            begun
        }),
    );
    println!("{} links are known", cluster.fleet().known_prefixes());
    let over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let metrics = Metrics::new().expect("the names are Prometheus'");
            let (begun, mut pages) = (Instant::now(), 0);
            while !over.load(Ordering::Relaxed) {
                let members = cluster.fleet().members().clone();
                let now = cluster.now;
                black_box(
                    metrics
                        .render(&members, (0, 0), &baton_traces::Tracer::off(), now)
                        .map(|text| text.len())
                        .ok(),
                );
                let rows: Vec<_> = worker_rows(&members, now).collect();
                black_box(serde_json::to_string(&rows).map(|text| text.len()).ok());
                pages += 1;
            }
            let each = begun.elapsed() / pages.max(1);
            println!("rendering without a pause: {each:.1?} for both pages");
        });
        for (name, act) in ACTS {
            let name = format!("{name}, rendering");
            print(&name, measure(rounds, |i| act(cluster, i)));
        }
        over.store(true, Ordering::Relaxed);
    });
}

struct Cluster {
    fleet: Mutex<Fleet>,
    model: ModelFingerprint,
    /// When all beat: nobody falls silent, however long this takes.
    now: tokio::time::Instant,
    kv: KvGeometry,
    /// Workers that run prompts.
    contexts: Vec<WorkerId>,
    prompts: Vec<Vec<u64>>,
    /// Of pair after pair.
    conversations: Vec<Vec<u64>>,
    /// Of all workers, with nothing new of their peers.
    beats: Vec<Beat>,
}

impl Cluster {
    /// Pairs of workers of these roles.
    fn new(pairs: usize, roles: [Role; 2]) -> Self {
        let model = ModelFingerprint::new("ab".repeat(32)).expect("64 digits");
        let kv = KvGeometry::bf16(
            32,
            vec![KvGroup {
                layers: 32,
                kv_heads: 8,
                head_dim: 128,
            }],
        );
        let mut fleet = Fleet::default();
        let now = tokio::time::Instant::now();
        let all: Vec<(Role, WorkerId)> = (0..2 * pairs)
            .map(|i| (roles[i % 2], worker(roles[i % 2], i / 2 + i % 2 * pairs)))
            .collect();
        let names = |does: fn(Role) -> bool| -> Vec<WorkerId> {
            let all = all.iter().filter(|(role, _)| does(*role));
            all.map(|(_, worker)| worker.clone()).collect()
        };
        let (contexts, decoders) = (names(Role::prefills), names(Role::decodes));
        let mut beats = Vec::new();
        for (i, (role, worker)) in all.iter().enumerate() {
            let mut first = beat(*role, worker, i, &model, &kv);
            if role.decodes() {
                let others = contexts.iter().filter(|context| *context != worker);
                first.peers = others.map(peer).collect();
                first.changes = Some(changes(0));
            }
            let next = Beat {
                peers: Vec::new(),
                changes: role.decodes().then(|| changes(1)),
                ..first.clone()
            };
            fleet.beat(first, now);
            beats.push(next);
        }
        for beat in &beats {
            fleet.beat(beat.clone(), now);
        }
        assert_eq!(
            fleet.members().workers().count(),
            2 * pairs,
            "all have room"
        );
        for i in 0..UNDER_WAY {
            match i % 2 {
                0 => fleet.begin(&contexts[i / 2 % contexts.len()], prefill()),
                _ => fleet.begin(&decoders[i / 2 % decoders.len()], generation()),
            }
        }
        let prompts: Vec<Vec<u64>> = (0..UNDER_WAY as u32)
            .map(|i| {
                let prompt: Vec<u32> = (i..i + PROMPT_TOKENS as u32).collect();
                prefix_chain(CacheSalt::NONE, BLOCK_TOKENS, &prompt)
            })
            .take(1_000)
            .collect();
        for (i, prompt) in prompts.iter().enumerate() {
            fleet.remember(&contexts[i % contexts.len()], prompt);
        }
        let conversations: Vec<Vec<u64>> = (0..pairs * CONVERSATIONS)
            .map(|i| {
                let system = 0..PROMPT_TOKENS as u32;
                let turns = (PROMPT_TOKENS..CONVERSATION_TOKENS).map(|at| (i * 7 + at) as u32);
                let tokens: Vec<u32> = system.chain(turns).collect();
                prefix_chain(CacheSalt::NONE, BLOCK_TOKENS, &tokens)
            })
            .collect();
        for (pair, workers) in all.chunks(2).enumerate() {
            let own = conversations.iter().skip(pair).step_by(pairs);
            let mut links: Vec<u64> = own.flatten().copied().collect();
            links.sort_unstable();
            links.dedup();
            for (_, worker) in workers {
                fleet.prefixes(report(worker.clone(), 1, links.clone()));
                while fleet.take_in_prefixes() {}
            }
        }
        Self {
            fleet: Mutex::new(fleet),
            model,
            now,
            kv,
            contexts,
            prompts,
            conversations,
            beats,
        }
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prompt(&self, i: usize) -> &[u64] {
        &self.prompts[i % self.prompts.len()]
    }

    fn conversation(&self, i: usize) -> &[u64] {
        &self.conversations[i % self.conversations.len()]
    }

    fn rules(&self) -> Constraints<'_> {
        Constraints {
            model: &self.model,
            refused: &[],
            failed: &[],
            service: PROMISED,
            max_tokens: 128,
            now: self.now,
        }
    }

    fn decode_wait(&self, service: Service) {
        let tokens = (PROMPT_TOKENS, 128);
        let wait = self
            .fleet()
            .decode_wait(&self.model, service, self.now, tokens);
        black_box(wait);
    }

    fn choose_context(&self, chain: &[u64]) -> Target {
        let tokens = PROMPT_TOKENS.max(chain.len() * BLOCK_TOKENS);
        let chosen = self.fleet().choose_context(self.rules(), tokens, chain);
        chosen.expect("all serve").0
    }

    fn first_token(&self, worker: &WorkerId, chain: &[u64]) {
        let tokens = PROMPT_TOKENS.max(chain.len() * BLOCK_TOKENS);
        let tier = Tier::Interactive;
        black_box(self.fleet().first_token(worker, tier, tokens, chain, None));
    }

    fn choose_decode(&self, context: &WorkerId, chain: &[u64]) -> Target {
        let handle = KvHandle {
            worker: context.clone(),
            incarnation: Incarnation(1),
            handle: HandleId(1),
            nonce: Nonce(1),
            model: self.model.clone(),
            kv: self.kv.clone(),
            runs: Vec::new(),
            valid_tokens: PROMPT_TOKENS as u32,
            lease_ms: 30_000,
            first_token: Some(1),
            first_logprobs: None,
            finish: None,
            cached_tokens: 0,
            timings: PrefillTimings::default(),
            prefix_pull: None,
        };
        let chosen = self.fleet().choose_decode(self.rules(), &handle, chain);
        chosen.expect("all serve")
    }

    /// All that is asked for a request that was promised times, from its arrival to its decode job.
    fn request(&self, chain: &[u64]) {
        self.decode_wait(PROMISED);
        let context = self.choose_context(chain);
        self.first_token(&context.worker, chain);
        black_box(self.choose_decode(&context.worker, chain));
    }
}

fn report(worker: WorkerId, version: u64, links: Vec<u64>) -> PrefixReport {
    PrefixReport {
        v: PROTOCOL_VERSION,
        worker,
        incarnation: Incarnation(1),
        since: version - 1,
        version,
        added: PackedLinks(links),
        removed: PackedLinks::default(),
        is_part: false,
    }
}

fn worker(role: Role, number: usize) -> WorkerId {
    WorkerId::new(format!("{}-{number}", role.label())).expect("a name")
}

fn prefill() -> Outstanding {
    Outstanding {
        prefills: 1,
        prefill_tokens: PROMPT_TOKENS,
        ..Outstanding::default()
    }
}

fn generation() -> Outstanding {
    Outstanding {
        decodes: 1,
        decode_tokens: PROMPT_TOKENS + 64,
        ..Outstanding::default()
    }
}

fn peer(context: &WorkerId) -> PeerHealth {
    PeerHealth {
        worker: context.clone(),
        incarnation: Incarnation(1),
        state: PeerState::Ready,
        transport: "rc_mlx5,cuda_ipc".to_owned(),
        gigabytes_per_second: 40.0,
        pulled_gigabytes_per_second: Some(38.5),
        pulled_bytes: 46_137_344,
        error: None,
    }
}

fn changes(since: u64) -> PeerChanges {
    PeerChanges {
        since,
        version: 1,
        gone: Vec::new(),
    }
}

/// What a step of an 8B model takes on an H200, about.
fn cost() -> StepCost {
    let points = [
        (1, 3_600.0),
        (128, 4_200.0),
        (512, 11_400.0),
        (2_048, 42_000.0),
        (8_192, 170_000.0),
    ];
    StepCost {
        layers: points.map(|(tokens, us)| CostPoint { tokens, us }).to_vec(),
        row_us: 2.0,
        kv_token_us: 0.03,
        pair_us: 0.0003,
    }
}

/// The beat of a worker without peers.
fn beat(
    role: Role,
    worker: &WorkerId,
    number: usize,
    model: &ModelFingerprint,
    kv: &KvGeometry,
) -> Beat {
    let decoding = match role.decodes() {
        true => (number % 48) as u32,
        false => 0,
    };
    Beat {
        v: PROTOCOL_VERSION,
        worker: worker.clone(),
        incarnation: Incarnation(1),
        role,
        state: WorkerState::Serving,
        reason: None,
        model: ModelInfo {
            name: "m".to_owned(),
            fingerprint: model.clone(),
            tokens_max: 131_072,
            vocab: 128_256,
        },
        kv: kv.clone(),
        device: "NVIDIA H200".to_owned(),
        ranks: Some(1),
        weights: "bf16".to_owned(),
        load: Load {
            waiting: (number % 7) as u32,
            running: decoding,
            waiting_tokens: (number % 7 * PROMPT_TOKENS) as u32,
            decoding,
            decoding_tokens: u64::from(decoding) * 2_100,
            blocks_used: (number % 1_000) as u32,
            ..Load::default()
        },
        capacity: Capacity {
            blocks: 20_000,
            batch: 256,
            queue: 256,
        },
        peers: Vec::new(),
        changes: None,
        transport: "ucx 1.18.0 rc_mlx5,cuda_ipc".to_owned(),
        decode_ms: 1_200,
        cost: Some(cost()),
        cost_error: Some(0.05),
        itl_ms: Some(10),
        step_tokens: Some(8_192),
        prefix_version: Some(0),
        streams: true,
        leases_prefixes: true,
    }
}

/// Time of each, from the instant that it returns or from its beginning.
fn measure<B: Begun>(rounds: usize, mut act: impl FnMut(usize) -> B) -> Vec<Duration> {
    let mut times: Vec<Duration> = (0..rounds)
        .map(|i| {
            let begun = Instant::now();
            act(i).begun().unwrap_or(begun).elapsed()
        })
        .collect();
    times.sort_unstable();
    times
}

trait Begun {
    fn begun(self) -> Option<Instant>;
}

impl Begun for () {
    fn begun(self) -> Option<Instant> {
        None
    }
}

impl Begun for Instant {
    fn begun(self) -> Option<Instant> {
        Some(self)
    }
}

fn print(name: &str, times: Vec<Duration>) {
    let micros = |at: usize| times[at.min(times.len() - 1)].as_secs_f64() * 1e6;
    let (p50, p99) = (micros(times.len() / 2), micros(times.len() * 99 / 100));
    println!(
        "{name:>40} {p50:>8.1} {p99:>8.1} {:>8.1}",
        micros(times.len())
    );
}
