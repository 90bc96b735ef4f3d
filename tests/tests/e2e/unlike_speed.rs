//! Context workers of unlike speed in one cluster: each gets prompts in proportion to what it really does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use baton_protocol::{CostPoint, Role, StepCost};
use baton_tests::{Cluster, PATIENCE, Setup, Trace, Turn, fp8_model_dir, model_dir};
use futures::future::join_all;
use serde_json::json;

/// Tokens of each prompt: one step.
const PROMPT_TOKENS: usize = 256;

/// What the faster worker takes for one: much more than a message between two processes, on a busy machine too.
const PROMPT_MS: usize = 60;

/// Prompts under way at any time: both workers have some before them, so that none is chosen for being idle.
const AT_ONCE: usize = 12;

/// Prompts of each client, one after the other.
const EACH: usize = 25;

/// A step whose time grows with its tokens, `times` as slow as that of the fastest.
fn cost_file(dir: &Path, times: usize) -> String {
    let point = |tokens: usize| CostPoint {
        tokens: tokens as u32,
        us: (times * PROMPT_MS * 1000 * tokens) as f32 / PROMPT_TOKENS as f32,
    };
    let cost = StepCost {
        layers: vec![point(1), point(PROMPT_TOKENS)],
        ..StepCost::default()
    };
    let path = dir.join(format!("cost-{times}.json"));
    let text = serde_json::to_vec(&cost).expect("numbers");
    fs::write(&path, text).expect("a file in the cluster's directory");
    path.display().to_string()
}

fn of_cost(dir: &Path, times: usize) -> Setup {
    let flags = ["--no-prefix-cache", "--fake-cost", &cost_file(dir, times)];
    Setup {
        device: "fake",
        step_tokens: PROMPT_TOKENS,
        worker_args: flags.map(str::to_owned).to_vec(),
        ..Setup::split(1, 1)
    }
}

/// Which worker ran how many of the prompts of `AT_ONCE` clients that always have one under way.
async fn shares(cluster: &Cluster) -> BTreeMap<String, usize> {
    let model = cluster.model().await;
    let from = cluster.tap.now();
    let clients = (0..AT_ONCE).map(|client| {
        let (api, model) = (cluster.api.clone(), model.clone());
        async move {
            for number in 0..EACH {
                let first = 1000 + client * EACH + number;
                let prompt: Vec<usize> = (first..first + PROMPT_TOKENS).collect();
                // With its first token it ends: no decode worker has a part in how long it takes.
                let body =
                    json!({"model": model, "prompt": prompt, "max_tokens": 1, "ignore_eos": true});
                api.complete(&body).await;
            }
        }
    });
    join_all(clients).await;
    let mut shares = BTreeMap::new();
    for trace in Trace::all(&cluster.tap, from).await.into_values() {
        for (worker, _) in trace.prefills {
            *shares.entry(worker).or_default() += 1;
        }
    }
    shares
}

#[tokio::test]
async fn one_of_twice_the_speed_runs_twice_the_prompts() {
    let turn = Turn::take();
    let dir = tempfile::tempdir().expect("a temporary directory");
    // As an FP8 worker is among BF16 ones; the fake device takes as long as it is told, whatever the machine.
    let fast = Setup {
        model: fp8_model_dir(),
        decode_model: Some(model_dir()),
        ..of_cost(dir.path(), 1)
    };
    let mut cluster = Cluster::start(&turn, fast).await;
    let slow = cluster.add_with(Role::Context, &of_cost(dir.path(), 2));
    cluster.ready().await;

    let shown = cluster.known_workers().await.expect("/cluster");
    let precisions = ["context-0", &slow].map(|name| shown[name]["weights"].clone());
    assert_eq!(precisions, ["fp8-channel", "bf16"]);

    let shares = shares(&cluster).await;
    let total = (AT_ONCE * EACH) as f64;
    assert_eq!(shares.values().sum::<usize>() as f64, total, "{shares:?}");
    // Three standard deviations of as many throws of a die that sends two thirds to the fast one: with 300 it gets 176 to 224, so workers
    // that were taken for equal (150) and one that is always preferred (300) are both found out.
    let [expected, off] = [total * 2.0 / 3.0, 3.0 * (total * 2.0 / 9.0).sqrt()];
    let fast = shares["context-0"] as f64;
    eprintln!("{shares:?}, expected {expected} ± {off:.1}");
    assert!((fast - expected).abs() <= off, "{shares:?} of {total}");
    assert!(shares[&slow] > 0);
    cluster.drained(PATIENCE).await;
}
