//! Many requests at once: all answered, nothing lost, nothing kept.

use baton_protocol::{DecodeJob, DecodeReply, End, FailureCode, RequestId, Role};
use baton_tests::{Api, Cluster, PATIENCE, Setup, Trace, Turn};
use futures::StreamExt;
use futures::future::join_all;
use futures::stream;
use serde_json::{Value, json};

use crate::steady::{Steady, questions};

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
        ..Setup::split(2, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let request =
        json!({"model": model, "prompt": "The sea", "max_tokens": 200, "ignore_eos": true});
    let from = cluster.tap.now();
    let burst = join_all((0..64).map(|_| cluster.api.post("/v1/completions", &request))).await;
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
    // whoever is told that all are full was refused by each, and nobody twice in a row by the same
    let traces = Trace::all(&cluster.tap, from).await;
    let refused = traces.values().filter(|trace| trace.handles.is_empty());
    for trace in refused {
        let mut asked: Vec<&String> = trace.prefills.iter().map(|(name, _)| name).collect();
        asked.sort_unstable();
        assert_eq!(asked, ["context-0", "context-1"]);
    }
    cluster.drained(PATIENCE).await;
    cluster.api.complete(&request).await;
    cluster.drained(PATIENCE).await;
}

/// Five times as many streams as the decode worker's batch has places, each of more than a second: those that wait have their
/// first token, and none is given up.
#[tokio::test]
async fn more_streams_than_places_all_end_well() {
    const STREAMS: usize = 40;
    let turn = Turn::take();
    let setup = Setup {
        device: "fake:20000",
        batch: 8,
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let stream = async |number: usize| {
        let request = json!({"model": model, "prompt": format!("Story {number}:"), "max_tokens": 60, "ignore_eos": true,
                             "logprobs": 0});
        let events = cluster
            .api
            .stream("/v1/completions", &request)
            .await
            .rest()
            .await;
        let tokens = events
            .iter()
            .filter_map(|event| event["choices"][0]["logprobs"]["tokens"].as_array());
        (tokens.map(Vec::len).sum::<usize>(), events.last().cloned())
    };
    for (number, (tokens, last)) in join_all((0..STREAMS).map(stream)).await.iter().enumerate() {
        assert_eq!(*tokens, 60, "stream {number} ended with {last:?}");
    }
    let metrics = cluster.api.metrics().await;
    let retries = metrics.sum("baton_retries_total", &[]).unwrap_or(0.0);
    assert_eq!(retries, 0.0, "retries without a fault");
    cluster.drained(PATIENCE).await;
}

/// The decode worker's arena takes a third of what is generated at once: those that came last give way in the midst of their
/// text, and are computed again.
#[tokio::test]
async fn no_block_is_left_in_mid_generation_and_the_text_is_right() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    let model = cluster.model().await;
    let requests: Vec<Value> = (0..6)
        .map(|number| {
            json!({"model": model, "prompt": format!("Story {number} of the tide:"), "max_tokens": 120,
                   "ignore_eos": true, "temperature": 1, "seed": number, "logprobs": 0, "frequency_penalty": 0.5})
        })
        .collect();
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(cluster.api.complete(request).await["choices"].clone());
    }
    cluster.kill("decode-0");
    let tiny = Setup {
        kv_mib: 8,
        ..Setup::default()
    };
    cluster.add_with(Role::Decode, &tiny);
    cluster.ready().await;

    let from = cluster.tap.now();
    let answers = join_all(requests.iter().map(|request| cluster.api.complete(request))).await;
    for (answer, expected) in answers.iter().zip(&expected) {
        assert_eq!(answer["choices"], *expected);
    }
    let traces = Trace::all(&cluster.tap, from).await;
    let gave_way = |trace: &Trace| {
        trace.ends.iter().any(
            |end| matches!(end, End::Failed(failure) if failure.code == FailureCode::Preempted),
        )
    };
    let preempted = traces.values().filter(|trace| gave_way(trace)).count();
    assert!(preempted > 0, "there was room for all");
    cluster.drained(PATIENCE).await;
}

/// Short sequences keep the decode worker full, and a long one wants most of its blocks at once. It gets them when those
/// that run have ended; those that come later do not go before it.
#[tokio::test]
async fn a_long_sequence_is_not_starved_by_short_ones() {
    const CLIENTS: usize = 12;
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    let model = cluster.model().await;
    let long: Vec<usize> = (1000..1500).collect();
    let long = json!({"model": model, "prompt": long, "max_tokens": 3, "ignore_eos": true, "temperature": 0});
    let expected = cluster.api.complete(&long).await["choices"].clone();
    let questions = questions(&cluster, 80).await;
    let short = [questions[0].clone()];
    cluster.kill("decode-0");
    // 22 blocks: the long one wants 16, a short one comes to 3
    let tiny = Setup {
        kv_mib: 16,
        ..Setup::default()
    };
    cluster.add_with(Role::Decode, &tiny);
    cluster.ready().await;

    let load = Steady::start(&[cluster.api.clone()], &short, CLIENTS);
    load.goes_on().await;
    let from = cluster.tap.now();
    let answer = cluster.api.complete_when_there_is_room(&long).await;
    assert_eq!(answer["choices"], expected);
    load.goes_on().await;
    load.stop().await;
    cluster.tap.catch_up().await;
    let overtook = admitted_before_the_long(&cluster, from);
    println!("{overtook} short ones were admitted while the long one waited");
    // those that stood before it in the line, and those for which there was room beside it
    assert!(overtook <= 2 * CLIENTS, "{overtook} went before it");
    cluster.drained(PATIENCE).await;
}

/// How many were admitted between the first time that the long one asked and its admission.
fn admitted_before_the_long(cluster: &Cluster, from: usize) -> usize {
    let tap = &cluster.tap;
    let mut long: Option<RequestId> = None;
    let mut overtook = 0;
    for message in tap.heard(from, |message| {
        message.is("decode").then(|| message.clone())
    }) {
        let job: DecodeJob = message.read();
        let is_long = job.handle.valid_tokens >= 500;
        if is_long {
            long = Some(job.request);
        }
        let Some(long) = long else { continue };
        let inbox = message.reply.clone().expect("a job wants an answer");
        let answer = tap.heard(message.index, |answer| {
            (answer.subject == inbox).then(|| answer.read::<DecodeReply>())
        });
        if let Some(DecodeReply::Admitted { .. }) = answer.first() {
            if job.request == long {
                return overtook;
            }
            overtook += 1;
        }
    }
    panic!("the long one was not admitted");
}
