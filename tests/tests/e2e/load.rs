//! Many requests at once: all answered, nothing lost, nothing kept.

use baton_tests::{Api, Cluster, PATIENCE, Setup, Trace, Turn};
use futures::StreamExt;
use futures::stream;
use serde_json::{Value, json};

/// One request in a load, streamed or whole; gives the number of tokens it got.
async fn one(api: &Api, model: &str, number: usize, max_tokens: usize) -> usize {
    let words = ["tide", "lamp", "stone", "bread", "wind"];
    let prompt = format!(
        "Story {number} of the {} and the {}:",
        words[number % 5],
        words[number / 5 % 5]
    );
    // lengths differ, so sequences join and leave the batch at all times
    let wanted = 1 + number * 7 % max_tokens;
    let request = json!({"model": model, "prompt": prompt, "max_tokens": wanted, "ignore_eos": true,
                         "temperature": 1, "seed": number, "logprobs": 0,
                         "stream_options": {"include_usage": true}});
    if number.is_multiple_of(2) {
        let mut request = request;
        request
            .as_object_mut()
            .expect("an object")
            .remove("stream_options");
        let answer = api.complete(&request).await;
        assert_eq!(answer["usage"]["completion_tokens"], wanted, "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        return wanted;
    }
    let events = api.stream("/v1/completions", &request).await.rest().await;
    let (usage, events) = events.split_last().expect("events");
    assert_eq!(usage["choices"], json!([]), "{usage}");
    assert_eq!(usage["usage"]["completion_tokens"], wanted, "{usage}");
    let streamed: usize = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["tokens"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(streamed, wanted, "tokens in the stream");
    let finishes: Vec<&Value> = events
        .iter()
        .map(|event| &event["choices"][0]["finish_reason"])
        .filter(|reason| !reason.is_null())
        .collect();
    assert_eq!(finishes, ["length"]);
    wanted
}

async fn load(cluster: &Cluster, requests: usize, concurrency: usize, max_tokens: usize) {
    let model = cluster.model().await;
    let from = cluster.tap.now();
    let tokens: usize = stream::iter(0..requests)
        .map(|number| one(&cluster.api, &model, number, max_tokens))
        .buffer_unordered(concurrency)
        .fold(0, async |sum, tokens| sum + tokens)
        .await;
    cluster.drained(PATIENCE).await;

    // each ran once, on one worker of each kind, and its tokens have no gap
    let traces = Trace::all(&cluster.tap, from).await;
    assert_eq!(traces.len(), requests);
    let mut made = 0;
    for (request, trace) in &traces {
        assert_eq!(trace.handles.len(), 1, "{request}: {:?}", trace.ends);
        made += trace.output().len();
    }
    assert_eq!(made, tokens);
    for worker in cluster.workers() {
        let used = traces.values().any(|trace| {
            let jobs = trace.prefills.iter().map(|(name, _)| name);
            let more = trace.decodes.iter().map(|(name, _)| name);
            jobs.chain(more).any(|name| *name == worker.name)
        });
        assert!(used, "{} got nothing to do", worker.name);
    }
    let metrics = cluster.api.metrics().await;
    let retries = metrics.sum("baton_retries_total", &[]).unwrap_or(0.0);
    assert_eq!(retries, 0.0, "retries without a fault");
}

#[tokio::test]
async fn two_hundred_requests_over_two_and_two_workers() {
    let turn = Turn::take();
    let cluster = Cluster::start(&turn, Setup::split(2, 2)).await;
    load(&cluster, 200, 32, 16).await;
}

#[tokio::test]
async fn four_thousand_requests_over_fake_executors() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        batch: 64,
        ..Setup::split(2, 2)
    };
    let cluster = Cluster::start(&turn, setup).await;
    load(&cluster, 4000, 64, 64).await;
}

#[tokio::test]
async fn a_full_cluster_says_so_and_recovers() {
    let turn = Turn::take();
    // little KV and a short queue: most of a burst has no place
    let setup = Setup {
        queue: 2,
        batch: 2,
        kv_mib: 32,
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let request =
        json!({"model": model, "prompt": "The sea", "max_tokens": 200, "ignore_eos": true});
    let burst =
        futures::future::join_all((0..64).map(|_| cluster.api.post("/v1/completions", &request)))
            .await;
    let mut answered = 0;
    for answer in burst {
        match answer.status {
            200 => {
                answered += 1;
                assert_eq!(answer.body["usage"]["completion_tokens"], 200);
            }
            503 | 429 => {
                let seconds = answer.retry_after.as_deref().map(str::parse::<u32>);
                assert!(
                    matches!(seconds, Some(Ok(1..))),
                    "Retry-After: {:?}",
                    answer.retry_after
                );
                assert!(answer.body["error"]["message"].is_string());
            }
            _ => panic!("{} {}", answer.status, answer.body),
        }
    }
    assert!(answered > 0, "nobody was answered");
    cluster.drained(PATIENCE).await;
    cluster.api.complete(&request).await;
    cluster.drained(PATIENCE).await;
}
