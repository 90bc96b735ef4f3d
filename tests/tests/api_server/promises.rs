//! Service levels: what is promised, by whom it is changed, and what becomes of requests that come too late.

use std::time::Duration;

use baton_api_server::{Overload, Promises, ServiceLevel};
use baton_protocol::{Role, Tier};
use serde_json::json;

use crate::support::{Api, Nats, Response, Script, Worker, chat, within};

const CHAT: &str = "/v1/chat/completions";

/// A worker where `waiting` tokens of prompts are before anybody who comes, a millisecond each, and a server that promises the first token
/// within a second.
async fn promised(waiting: u32, overload: Overload) -> (Nats, Worker, Api) {
    let nats = Nats::start().await;
    let script = Script {
        waiting_tokens: Some(waiting),
        ..Script::default()
    };
    let worker = Worker::start(&nats, "b1", Role::Both, script).await;
    let promises = Promises {
        level: ServiceLevel {
            ttft_ms: Some(1000),
            itl_ms: Some(5000),
        },
        overload,
    };
    let api = Api::with(&nats, |config| config.promises = promises).await;
    api.sees(1).await;
    (nats, worker, api)
}

async fn counted(api: &Api, line: &str) -> bool {
    let (_, metrics) = api.get("/metrics").await;
    metrics.lines().any(|found| found == line)
}

/// A chat with this header.
async fn with_header(api: &Api, header: &str) -> Response {
    let body = chat(json!({"max_tokens": 4})).to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Type: application/json\r\n{header}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut connection = api.connect().await;
    connection.write(head.as_bytes()).await.unwrap();
    within("the answer", connection.finish()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gets_what_was_promised_is_counted() {
    let (_nats, mut worker, api) = promised(0, Overload::Refuse).await;
    let answer = api
        .post(CHAT, chat(json!({"max_tokens": 4, "priority": -7})))
        .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let job = within("a prompt", worker.prefills.recv()).await.unwrap();
    let service = job.sequence.service;
    assert_eq!((service.tier, service.priority), (Tier::Interactive, 7));
    assert_eq!(service.itl_ms, Some(5000));
    let met = "baton_service_level_total{outcome=\"met\",tier=\"interactive\"} 1";
    assert!(counted(&api, met).await);
    let flex = chat(json!({"max_tokens": 4, "service_tier": "flex"}));
    assert_eq!(api.post(CHAT, flex).await.status, 200);
    let job = within("a prompt", worker.prefills.recv()).await.unwrap();
    assert_eq!(job.sequence.service.tier, Tier::Batch);
    let met = "baton_service_level_total{outcome=\"met\",tier=\"batch\"} 1";
    assert!(counted(&api, met).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_whose_first_token_would_come_too_late_is_refused_at_once() {
    let (_nats, mut worker, api) = promised(4_000, Overload::Refuse).await;
    let refused = api.post(CHAT, chat(json!({"max_tokens": 4}))).await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(
        refused.body.contains("later than promised"),
        "{}",
        refused.body
    );
    // Four seconds are before it, one is promised.
    let seconds = refused.head.split("retry-after: ").nth(1).unwrap();
    let seconds: u32 = seconds.lines().next().unwrap().parse().unwrap();
    assert!((3..=4).contains(&seconds), "{seconds}");
    assert!(worker.prefills.try_recv().is_err(), "it was begun");
    let line = "baton_service_level_total{outcome=\"refused\",tier=\"interactive\"} 1";
    assert!(counted(&api, line).await);
    // Batch has time, and so has who asks for less.
    let flex = chat(json!({"max_tokens": 4, "service_tier": "flex"}));
    assert_eq!(api.post(CHAT, flex).await.status, 200);
    let patient = with_header(&api, "X-Baton-TTFT-Ms: 9000").await;
    assert_eq!(patient.status, 200, "{}", patient.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn or_it_is_served_as_batch_unless_it_says_otherwise() {
    let (_nats, mut worker, api) = promised(4_000, Overload::Batch).await;
    let answer = api.post(CHAT, chat(json!({"max_tokens": 4}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let job = within("a prompt", worker.prefills.recv()).await.unwrap();
    assert_eq!(job.sequence.service.tier, Tier::Batch);
    let batched = "baton_service_level_total{outcome=\"batched\",tier=\"interactive\"} 1";
    assert!(counted(&api, batched).await);
    let never = chat(json!({"max_tokens": 4, "service_tier": "default"}));
    assert_eq!(api.post(CHAT, never).await.status, 503);
}

/// One generation is all that keeps the promised time between tokens, and it lasts for longer than anybody waits.
#[tokio::test(flavor = "multi_thread")]
async fn where_places_to_generate_are_full_it_is_served_as_batch_too() {
    let nats = Nats::start().await;
    let script = Script {
        waiting_tokens: Some(0),
        decode_ms: 100_000,
        waits_at: Some(5),
        ..Script::default()
    };
    let mut worker = Worker::start(&nats, "b1", Role::Both, script).await;
    let promises = Promises {
        level: ServiceLevel {
            ttft_ms: None,
            itl_ms: Some(1),
        },
        overload: Overload::Batch,
    };
    let api = Api::with(&nats, |config| config.promises = promises).await;
    api.sees(1).await;
    let first = chat(json!({"max_tokens": 20})).to_string();
    let mut first = api.open("POST", CHAT, first.as_bytes()).await;
    within("the decode job", worker.decodes.recv())
        .await
        .unwrap();
    // What became batch takes no place from who comes next.
    for _ in 0..3 {
        let answer = api.post(CHAT, chat(json!({"max_tokens": 4}))).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let job = within("a decode job", worker.decodes.recv()).await.unwrap();
        assert_eq!(job.sequence.service.tier, Tier::Batch);
    }
    let batched = "baton_service_level_total{outcome=\"batched\",tier=\"interactive\"} 3";
    assert!(counted(&api, batched).await);
    let never = chat(json!({"max_tokens": 4, "service_tier": "default"}));
    let refused = api.post(CHAT, never).await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.body.contains("decode workers are full"));
    worker.go_on.send_replace(true);
    assert_eq!(within("the answer", first.finish()).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_misses_what_was_promised_is_counted_with_what_took_the_time() {
    let nats = Nats::start().await;
    let script = Script {
        waiting_tokens: Some(0),
        waits_at: Some(3),
        ..Script::default()
    };
    let worker = Worker::start(&nats, "b1", Role::Both, script).await;
    let promises = Promises {
        level: ServiceLevel {
            ttft_ms: None,
            itl_ms: Some(5),
        },
        overload: Overload::Refuse,
    };
    let api = Api::with(&nats, |config| config.promises = promises).await;
    api.sees(1).await;
    let body = chat(json!({"max_tokens": 6, "stream": true})).to_string();
    let mut answer = api.open("POST", CHAT, body.as_bytes()).await;
    // The first tokens, and then much time before the others.
    answer.read_until("\"content\":\"H").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    worker.go_on.send_replace(true);
    within("the answer", answer.finish()).await;
    for line in [
        "baton_service_level_total{outcome=\"missed\",tier=\"interactive\"} 1",
        "baton_service_level_missed_total{cause=\"decode\",tier=\"interactive\"} 1",
    ] {
        assert!(counted(&api, line).await, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_promised_something_and_gets_nothing_is_counted_as_failed() {
    let nats = Nats::start().await;
    let script = Script {
        waiting_tokens: Some(0),
        silent: true,
        ..Script::default()
    };
    let _worker = Worker::start(&nats, "b1", Role::Both, script).await;
    let api = Api::with(&nats, |config| {
        config.promises.level.itl_ms = Some(5000);
        config.request_budget = Duration::from_secs(1);
    })
    .await;
    api.sees(1).await;
    let answer = api.post(CHAT, chat(json!({"max_tokens": 4}))).await;
    assert_eq!(answer.status, 504, "{}", answer.body);
    let failed = "baton_service_level_total{outcome=\"failed\",tier=\"interactive\"} 1";
    assert!(counted(&api, failed).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_out_of_bounds_are_named() {
    let (_nats, _worker, api) = promised(0, Overload::Refuse).await;
    for wrong in [
        "X-Baton-TTFT-Ms: 99",
        "X-Baton-TTFT-Ms: 10001",
        "x-baton-itl-ms: soon",
    ] {
        let answer = with_header(&api, wrong).await;
        let name = wrong.split(':').next().unwrap().to_ascii_lowercase();
        assert_eq!(answer.status, 400, "{wrong}: {}", answer.body);
        assert_eq!(answer.json()["error"]["param"], name.as_str());
    }
}
