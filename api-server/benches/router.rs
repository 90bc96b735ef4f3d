//! What a choice of the router costs in a large cluster, at rest and while the members are rendered without a pause.
//!
//! `cargo bench -p baton-api-server`. 1,000 workers, half of them context workers, each of which every decode worker can read;
//! 10,000 requests under way. A choice is measured as the server makes it, the wait for the lock included.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_api_server::fuzzing::{
    Constraints, Fleet, Metrics, Outstanding, Target, prefix_chain, worker_rows,
};
use baton_protocol::{
    Beat, CacheSalt, Capacity, HandleId, Incarnation, KvGeometry, KvGroup, KvHandle, Load,
    ModelFingerprint, ModelInfo, Nonce, PROTOCOL_VERSION, PeerHealth, PeerState, PrefillTimings,
    Role, WorkerId, WorkerState,
};

const PAIRS: usize = 500;
const UNDER_WAY: usize = 10_000;
const PROMPT_TOKENS: usize = 2_048;

/// One choice of the round of this number.
type Act = fn(&Cluster, usize);

fn main() {
    // Cargo passes its own flags; `cargo test --benches` asks only whether this runs.
    let quick = std::env::args().any(|arg| arg == "--test");
    let (pairs, rounds) = match quick {
        true => (4, 10),
        false => (PAIRS, 20_000),
    };
    let cluster = Cluster::new(pairs);
    println!(
        "{} workers, {UNDER_WAY} requests under way; microseconds",
        2 * pairs
    );
    println!("{:>34} {:>8} {:>8} {:>8}", "", "p50", "p99", "max");
    let all: [(&str, Act); 4] = [
        ("choose_context", |cluster, _| {
            black_box(cluster.choose_context(&[]));
        }),
        ("choose_context, prefix known", |cluster, i| {
            let prompt = &cluster.prompts[i % cluster.prompts.len()];
            black_box(cluster.choose_context(prompt));
        }),
        ("choose_decode", |cluster, i| {
            black_box(cluster.choose_decode(i % cluster.pairs));
        }),
        ("decode_wait", |cluster, _| {
            let now = tokio::time::Instant::now();
            black_box(
                cluster
                    .fleet()
                    .decode_wait(&cluster.model, now, PROMPT_TOKENS),
            );
        }),
    ];
    for (name, act) in all {
        print(name, measure(rounds, |i| act(&cluster, i)));
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
                        .render(&members, (0, 0), now)
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
        for (name, act) in all {
            let name = format!("{name}, rendering");
            print(&name, measure(rounds, |i| act(&cluster, i)));
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
    pairs: usize,
    prompts: Vec<Vec<u64>>,
    beats: Vec<Beat>,
}

impl Cluster {
    fn new(pairs: usize) -> Self {
        let model = ModelFingerprint::new("ab".repeat(32)).expect("64 digits");
        let kv = KvGeometry::bf16(
            32,
            vec![KvGroup {
                layers: 32,
                kv_heads: 8,
                head_dim: 128,
            }],
        );
        let beats: Vec<Beat> = (0..pairs)
            .flat_map(|i| [(Role::Context, i), (Role::Decode, i)])
            .map(|(role, i)| beat(role, i, pairs, &model, &kv))
            .collect();
        let mut fleet = Fleet::default();
        let now = tokio::time::Instant::now();
        for beat in &beats {
            fleet.beat(beat.clone(), now);
        }
        assert_eq!(
            fleet.members().workers().count(),
            2 * pairs,
            "all have room"
        );
        for i in 0..UNDER_WAY {
            let (worker, job) = match i % 2 {
                0 => (context(i % pairs), prefill()),
                _ => (decode(i % pairs), generation()),
            };
            fleet.begin(&worker, job);
        }
        let prompts: Vec<Vec<u64>> = (0..UNDER_WAY as u32)
            .map(|i| {
                let prompt: Vec<u32> = (i..i + PROMPT_TOKENS as u32).collect();
                prefix_chain(CacheSalt::NONE, &prompt)
            })
            .take(1_000)
            .collect();
        for (i, prompt) in prompts.iter().enumerate() {
            fleet.remember(&context(i % pairs), prompt);
        }
        Self {
            fleet: Mutex::new(fleet),
            model,
            now,
            kv,
            pairs,
            prompts,
            beats,
        }
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rules(&self) -> Constraints<'_> {
        Constraints {
            model: &self.model,
            refused: &[],
            failed: &[],
            now: self.now,
        }
    }

    fn choose_context(&self, chain: &[u64]) -> Target {
        let chosen = self
            .fleet()
            .choose_context(self.rules(), PROMPT_TOKENS, chain);
        chosen.expect("all serve")
    }

    fn choose_decode(&self, context_number: usize) -> Target {
        let handle = KvHandle {
            worker: context(context_number),
            incarnation: Incarnation(1),
            handle: HandleId(1),
            nonce: Nonce(1),
            model: self.model.clone(),
            kv: self.kv.clone(),
            runs: Vec::new(),
            valid_tokens: 1,
            lease_ms: 30_000,
            first_token: 1,
            first_logprobs: None,
            finish: None,
            cached_tokens: 0,
            timings: PrefillTimings::default(),
        };
        let chosen = self.fleet().choose_decode(self.rules(), &handle);
        chosen.expect("all serve")
    }
}

fn context(number: usize) -> WorkerId {
    WorkerId::new(format!("context-{number}")).expect("a name")
}

fn decode(number: usize) -> WorkerId {
    WorkerId::new(format!("decode-{number}")).expect("a name")
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
        ..Outstanding::default()
    }
}

fn beat(
    role: Role,
    number: usize,
    pairs: usize,
    model: &ModelFingerprint,
    kv: &KvGeometry,
) -> Beat {
    let peer = |number| PeerHealth {
        worker: context(number),
        incarnation: Incarnation(1),
        state: PeerState::Ready,
        transport: "rc_mlx5,cuda_ipc".to_owned(),
        gigabytes_per_second: 40.0,
        pulled_gigabytes_per_second: Some(38.5),
        error: None,
    };
    let (worker, peers) = match role {
        Role::Decode => (decode(number), (0..pairs).map(peer).collect()),
        _ => (context(number), Vec::new()),
    };
    Beat {
        v: PROTOCOL_VERSION,
        worker,
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
            running: (number % 32) as u32,
            waiting_tokens: (number % 7 * PROMPT_TOKENS) as u32,
            blocks_used: (number % 1_000) as u32,
            ..Load::default()
        },
        capacity: Capacity {
            blocks: 20_000,
            batch: 256,
            queue: 256,
        },
        peers,
        changes: None,
        transport: "ucx 1.18.0 rc_mlx5,cuda_ipc".to_owned(),
        decode_ms: 9_000,
        cost: None,
        itl_ms: None,
        step_tokens: None,
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
        "{name:>34} {p50:>8.1} {p99:>8.1} {:>8.1}",
        micros(times.len())
    );
}
