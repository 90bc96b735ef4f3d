//! The next turn of a conversation runs on another worker than the one that has its KV, because that one is busy: its beginning is pulled
//! from there, or computed anew where that fails. The text is the same.
//!
//! The fake device chooses tokens from the KV that it reads back, so foreign or torn KV would be another text.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use baton_protocol::LeaseReply;
use baton_tests::{Answer, Cluster, Frozen, PATIENCE, Setup, Signal, Trace, Turn, eventually};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const PATH: &str = "/v1/completions";

/// Tokens of a block, unless a worker is told otherwise.
const BLOCK_TOKENS: usize = 32;

/// Of a first turn, prompt and answer; of what the next one adds; and of a prompt that keeps its worker busy for four seconds.
const FIRST: usize = 400;
const ANSWER: usize = 40;
const NEW: usize = 20;
const LONG: usize = 1_900;

/// Whole blocks of a first turn whose KV there is: of its answer's last token there is none.
const HELD: usize = (FIRST + ANSWER - 1) / BLOCK_TOKENS * BLOCK_TOKENS;

/// Two workers that need 2 ms for each token of a prompt. KV moves over TCP, with the help of who has it.
fn setup() -> Setup {
    static COST: OnceLock<String> = OnceLock::new();
    let cost = COST.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("baton-cost-{}.json", std::process::id()));
        let cost = json!({"layers": [{"tokens": 1, "us": 2_000}, {"tokens": 1_000, "us": 2_000_000}],
                          "row_us": 1, "kv_token_us": 0.001, "pair_us": 0.001});
        std::fs::write(&path, cost.to_string()).expect("a file of a test");
        path.to_string_lossy().into_owned()
    });
    Setup {
        both: 2,
        device: "fake",
        ucx_tls: Some("tcp,self"),
        worker_args: vec!["--fake-cost".to_owned(), cost.clone()],
        ..Setup::split(0, 0)
    }
}

fn request(model: &str, prompt: &[u32]) -> Value {
    json!({"model": model, "prompt": prompt, "max_tokens": ANSWER, "ignore_eos": true, "temperature": 1, "seed": 5})
}

fn prompt(number: usize, tokens: usize) -> Vec<u32> {
    let token = |at: usize| 1_000 + ((number * 7_001 + at * 13) % 40_000) as u32;
    (0..tokens).map(token).collect()
}

fn cached_tokens(answer: &Value) -> usize {
    let details = &answer["usage"]["prompt_tokens_details"];
    details["cached_tokens"].as_u64().expect("a number") as usize
}

/// A cluster in which one of two workers is busy and has the KV of a conversation.
struct Scene {
    cluster: Cluster,
    model: String,
    /// Who is busy, by what it has to do.
    holder: String,
    long: JoinHandle<Answer>,
    /// The conversation's next turn.
    next: Vec<u32>,
    from: usize,
}

impl Scene {
    async fn new(turn: &Turn) -> Self {
        let cluster = Cluster::start(turn, setup()).await;
        cluster_reads_both_ways(&cluster).await;
        let model = cluster.model().await;
        // Each has a conversation.
        let mut turns = BTreeMap::new();
        for number in 0.. {
            assert!(number < 10, "all are on one worker: {:?}", turns.keys());
            let from = cluster.tap.now();
            let first = prompt(number, FIRST);
            cluster.api.complete(&request(&model, &first)).await;
            let trace = Trace::only(&cluster.tap, from).await;
            let new = (0..NEW as u32).map(|at| 700 + at);
            let next: Vec<u32> = first
                .iter()
                .copied()
                .chain(trace.output())
                .chain(new)
                .collect();
            turns.insert(trace.prefills[0].0.clone(), next);
            if turns.len() == 2 {
                break;
            }
        }
        cluster.drained(PATIENCE).await;
        eventually("prefixes to be known", PATIENCE, async || {
            let metrics = cluster.api.metrics().await;
            match metrics.sum("baton_known_prefixes", &[]) {
                Some(known) if known as usize >= 2 * HELD / BLOCK_TOKENS => Ok(()),
                other => Err(format!("{other:?} blocks are known")),
            }
        })
        .await;
        let from = cluster.tap.now();
        let long = request(&model, &prompt(77, LONG));
        let long = cluster.api.ask(PATH, &long);
        let holder = cluster
            .tap
            .wait_kind("prefill", from, PATIENCE)
            .await
            .whom();
        let next = turns.remove(&holder).expect("one of the two");
        let from = cluster.tap.now();
        Self {
            cluster,
            model,
            holder,
            long,
            next,
            from,
        }
    }

    fn ask(&self) -> JoinHandle<Answer> {
        self.cluster
            .api
            .ask(PATH, &request(&self.model, &self.next))
    }

    /// The life of the next turn.
    async fn trace(&self) -> Trace {
        let all = Trace::all(&self.cluster.tap, self.from).await;
        let mut its = all
            .into_values()
            .filter(|trace| trace.prompt() == self.next);
        its.next().expect("it was asked")
    }

    async fn counted(&self, name: &str, labels: &[&str]) -> f64 {
        let metrics = self.cluster.api.metrics().await;
        metrics.sum(name, labels).unwrap_or(0.0)
    }

    /// Another tenant asks the same: it shares nothing, and what it is told was read from nowhere.
    async fn undisturbed(&self) -> Value {
        let mut alone = request(&self.model, &self.next);
        alone["cache_salt"] = "another tenant's".into();
        let answer = self.cluster.api.complete(&alone).await;
        assert_eq!(cached_tokens(&answer), 0);
        answer["choices"].clone()
    }
}

/// Workers that do both are connected to each other, which a cluster of them does not wait for.
async fn cluster_reads_both_ways(cluster: &Cluster) {
    eventually("workers to be connected", PATIENCE, async || {
        let known = cluster.known_workers().await?;
        let ready = |worker: &Value| worker["peers"].to_string().contains("\"ready\"");
        match known.len() == 2 && known.values().all(ready) {
            true => Ok(()),
            false => Err(format!("{known:?}")),
        }
    })
    .await;
}

#[tokio::test]
async fn while_its_holder_is_busy_the_next_turn_pulls_its_beginning_elsewhere() {
    let turn = Turn::take();
    let scene = Scene::new(&turn).await;
    let answer = scene.ask().await.expect("answered").ok();
    assert!(!scene.long.is_finished(), "or the holder was not busy");
    let trace = scene.trace().await;
    let (worker, job) = &trace.prefills[0];
    assert_ne!(*worker, scene.holder);
    let source = job.source.as_ref().expect("a source");
    assert_eq!(
        (source.worker.as_str(), source.tokens as usize),
        (scene.holder.as_str(), HELD)
    );
    assert_eq!(cached_tokens(&answer), HELD);
    let pull = trace.handles[0].prefix_pull.expect("it was pulled");
    assert_eq!((pull.failure, pull.tokens as usize), (None, HELD));
    assert!(pull.bytes > 0, "{pull:?}");
    assert_eq!(
        scene.counted("baton_prefix_pull_tokens_total", &[]).await as usize,
        HELD
    );
    assert_eq!(answer["choices"], scene.undisturbed().await);
    assert_eq!(
        scene.counted("baton_prefix_pull_failures_total", &[]).await,
        0.0
    );
    assert_eq!(scene.counted("baton_retries_total", &[]).await, 0.0);
    let Scene { cluster, long, .. } = scene;
    long.await.expect("answered").ok();
    cluster.drained(PATIENCE).await;
}

#[tokio::test]
async fn a_source_that_is_killed_while_it_is_read_costs_time_alone() {
    let turn = Turn::take();
    let mut scene = Scene::new(&turn).await;
    // It leases what it has, and does not help anybody to read it.
    let holder = scene.holder.clone();
    let pid = scene.cluster.worker(&holder).process.id();
    let frozen = Frozen::threads(pid, "baton-ucx");
    let answer = scene.ask();
    let lease = scene
        .cluster
        .tap
        .wait_kind("lease", scene.from, PATIENCE)
        .await;
    assert_eq!(lease.whom(), holder);
    let leased = scene.cluster.tap.answer(&lease, PATIENCE).await;
    let leased = leased.read::<LeaseReply>();
    assert!(matches!(leased, LeaseReply::Leased { .. }), "{leased:?}");
    assert!(!answer.is_finished());
    scene.cluster.kill(&holder);
    drop(frozen);
    let answer = answer.await.expect("answered").ok();
    assert_eq!(cached_tokens(&answer), 0, "it may not use what it read");
    let trace = scene.trace().await;
    assert_eq!(trace.prefills.len(), 1, "it was retried");
    let pull = trace.handles[0].prefix_pull.expect("it was to be pulled");
    assert!(pull.failure.is_some() && pull.tokens == 0, "{pull:?}");
    assert_eq!(
        scene.counted("baton_prefix_pull_failures_total", &[]).await,
        1.0
    );
    assert_eq!(answer["choices"], scene.undisturbed().await);
    scene.long.abort();
    scene.cluster.drained(PATIENCE).await;
}

/// It is asked for a lease and does not answer; when it goes on it leases to nobody, for a moment.
#[tokio::test]
async fn a_source_that_stands_still_is_waited_for_no_longer_than_computing_takes() {
    let turn = Turn::take();
    let mut scene = Scene::new(&turn).await;
    let holder = scene.holder.clone();
    scene.cluster.signal(&holder, Signal::Stop);
    let answer = scene.ask().await.expect("answered").ok();
    scene.cluster.signal(&holder, Signal::Continue);
    let trace = scene.trace().await;
    assert_eq!(trace.prefills.len(), 1, "it was retried");
    let pull = trace.handles[0].prefix_pull.expect("it was to be pulled");
    assert_eq!(
        pull.failure,
        Some(baton_protocol::PrefixPullFailure::Late),
        "{pull:?}"
    );
    assert_eq!(cached_tokens(&answer), 0);
    assert_eq!(
        scene
            .counted("baton_prefix_pull_failures_total", &["cause=\"late\""])
            .await,
        1.0
    );
    assert_eq!(answer["choices"], scene.undisturbed().await);
    scene.long.abort();
    scene.cluster.drained(PATIENCE).await;
}
