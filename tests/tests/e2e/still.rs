//! Processes that stand still for a while and go on: nobody takes their silence for what it is not, and nothing piles up.

use std::time::Duration;

use baton_tests::{Answer, Api, Cluster, PATIENCE, Setup, Signal, Trace, Turn, eventually};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

const PATH: &str = "/v1/completions";

/// Longer than anybody may be silent (4.5 s).
const STILL: Duration = Duration::from_secs(6);

/// No process may ever hold this much more than it did before.
const GROWTH_MAX: usize = 256 << 20;

fn request(model: &str, number: usize, max_tokens: usize) -> Value {
    json!({"model": model, "prompt": format!("The river froze {number}"), "max_tokens": max_tokens, "ignore_eos": true,
           "temperature": 0})
}

fn ask(api: &Api, request: &Value) -> JoinHandle<Answer> {
    let (api, request) = (api.clone(), request.clone());
    tokio::spawn(async move { api.post(PATH, &request).await })
}

fn setup() -> Setup {
    Setup {
        device: "fake:1500",
        kv_mib: 16,
        ..Setup::split(1, 1)
    }
}

/// The connection stands, and nothing comes over it. Whoever took that for the silence of the others would end everything.
#[tokio::test]
async fn a_bus_that_stands_still_ends_nothing() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, setup()).await;
    let request = request(&cluster.model().await, 0, 1000);
    let expected = cluster.api.complete(&request).await["choices"].clone();

    let from = cluster.tap.now();
    let answer = ask(&cluster.api, &request);
    cluster.tap.wait_tokens(from, PATIENCE).await;
    cluster.nats.signal(Signal::Stop);
    let stopped = Instant::now();
    eventually("/health to say what is the matter", PATIENCE, async || {
        let health = cluster.api.look("/health").await?;
        let reasons = health.body["reasons"].to_string();
        match health.status == 503 && reasons.contains("the bus is silent") {
            true => Ok(()),
            false => Err(health.body.to_string()),
        }
    })
    .await;
    sleep_until(stopped + STILL).await;
    let refused = cluster.api.post(PATH, &request).await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert_eq!(refused.body["error"]["code"], "bus_unavailable");
    assert!(refused.retry_after.is_some());
    cluster.nats.signal(Signal::Continue);

    assert_eq!(answer.await.expect("answered").ok()["choices"], expected);
    let trace = Trace::only(&cluster.tap, from).await;
    assert_eq!(
        (trace.prefills.len(), trace.decodes.len()),
        (1, 1),
        "it was retried"
    );
    cluster.ready().await;
    cluster.drained(PATIENCE).await;
}

/// Its requests end on the workers, those of another API server do not, and when it goes on its clients get their text.
#[tokio::test]
async fn an_api_server_that_stands_still_harms_nobody() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, setup()).await;
    let other = cluster.add_api_server(&[]);
    cluster.ready().await;
    let model = cluster.model().await;
    let requests: Vec<_> = (0..4).map(|number| request(&model, number, 1000)).collect();
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(cluster.api.complete(request).await["choices"].clone());
    }
    let resident = |cluster: &Cluster| -> Vec<(String, usize)> {
        let workers = cluster.workers().iter().map(|worker| &worker.process);
        let api_servers = cluster.api_servers.iter().map(|server| &server.process);
        let all = workers.chain(api_servers).chain([cluster.nats.process()]);
        all.map(|process| (process.name().to_owned(), process.resident_max()))
            .collect()
    };
    let before = resident(&cluster);

    let from = cluster.tap.now();
    let asked: Vec<_> = requests
        .iter()
        .map(|request| ask(&cluster.api, request))
        .collect();
    cluster.tap.wait_tokens(from, PATIENCE).await;
    cluster.api_servers[0].process.signal(Signal::Stop);
    let begun = Instant::now();
    while begun.elapsed() < STILL {
        let answers: Vec<_> = requests
            .iter()
            .map(|request| ask(&other, request))
            .collect();
        for (answer, expected) in answers.into_iter().zip(&expected) {
            assert_eq!(answer.await.expect("answered").ok()["choices"], *expected);
        }
    }
    // What it had asked for is over, and its lease on life too.
    eventually("the workers to be free", PATIENCE, async || {
        let beats = cluster.beats().await;
        match beats.values().find(|beat| beat.load.blocks_used > 0) {
            None => Ok(()),
            Some(beat) => Err(format!("{}: {:?}", beat.worker, beat.load)),
        }
    })
    .await;
    cluster.api_servers[0].process.signal(Signal::Continue);
    for (answer, expected) in asked.into_iter().zip(&expected) {
        assert_eq!(answer.await.expect("answered").ok()["choices"], *expected);
    }
    cluster.ready().await;
    cluster.drained(PATIENCE).await;
    for ((name, before), (_, after)) in before.into_iter().zip(resident(&cluster)) {
        let grown = after.saturating_sub(before);
        eprintln!("{name} grew by {} KiB", grown >> 10);
        assert!(grown < GROWTH_MAX, "{name} grew by {grown} bytes");
    }
}
