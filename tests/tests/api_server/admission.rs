//! What a request may cost before anybody has said that it may, and after its client has left.

use std::time::Duration;

use baton_protocol::Role;
use serde_json::json;

use crate::support::{Api, Connection, Nats, Script, Worker, chat, within};
use crate::usual;

const CHAT: &str = "/v1/chat/completions";

/// Waits until nothing is in flight.
async fn empty(api: &Api) {
    within("nothing is in flight", async {
        loop {
            let (metrics, health) = (api.get("/metrics").await.1, api.get("/health").await.1);
            let idle = metrics.contains("baton_requests_in_flight 0\n");
            if idle && health.contains("\"in_flight\":0") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// The head of a request whose body is still to come.
async fn head_only(api: &Api, bytes: usize) -> Connection {
    let mut connection = api.connect().await;
    let head = format!(
        "POST {CHAT} HTTP/1.0\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {bytes}\r\n\r\n"
    );
    connection.write(head.as_bytes()).await.unwrap();
    connection
}

/// Whoever stays without a place is told so on sight of the head, and whoever sends a body has one.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_place_not_even_the_body_is_read() {
    let nats = Nats::start().await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let _decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let api = Api::with(&nats, |config| {
        config.limits.in_flight_max = 2;
        // Bodies are kept back for as long as the test takes on a busy machine.
        config.limits.body_stall = Duration::from_secs(600);
    })
    .await;
    api.sees(2).await;
    let body = chat(json!({})).to_string();
    let mut first = head_only(&api, body.len()).await;
    let mut second = head_only(&api, body.len()).await;
    within("both have their places", async {
        while !api.get("/health").await.1.contains("\"in_flight\":2") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let mut third = head_only(&api, 16 << 20).await;
    // The server answers a body that it has not read, and then waits for the client to see that.
    let refused = third.read_until("bound of 2 requests").await;
    assert!(refused.contains(" 429 "), "{refused}");
    first.write(body.as_bytes()).await.unwrap();
    assert_eq!(within("the answer", first.finish()).await.status, 200);
    // The places of other choices are known with the body.
    let refused = api.post(CHAT, chat(json!({"n": 2}))).await;
    assert_eq!(refused.status, 429, "{}", refused.body);
    second.write(body.as_bytes()).await.unwrap();
    assert_eq!(within("the answer", second.finish()).await.status, 200);
    empty(&api).await;
    assert_eq!(api.post(CHAT, chat(json!({"n": 2}))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_cannot_fit_is_refused_for_its_length() {
    let (_nats, mut context, _decode, api) = usual().await;
    let text = "1".repeat(15 << 20);
    for (path, body) in [
        ("/v1/completions", json!({"model": "tiny", "prompt": text})),
        (
            CHAT,
            chat(json!({"messages": [{"role": "user", "content": text}]})),
        ),
    ] {
        let response = api.post(path, body).await;
        assert_eq!(response.status, 400, "{}", response.body);
        let error = &response.json()["error"];
        assert_eq!(error["code"], "context_length_exceeded");
        // Nobody counted them.
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("tokens or more"), "{message}");
    }
    assert!(
        context.prefills.try_recv().is_err(),
        "no worker heard of it"
    );
    empty(&api).await;
}

/// In each phase: while the prompt runs, and with the stream under way and full.
#[tokio::test(flavor = "multi_thread")]
async fn every_choice_hears_that_the_client_left() {
    let (_nats, mut context, decode, api) = usual().await;
    for stream in [true, false] {
        // Not one of them is answered.
        context.script.lock().unwrap().silent = true;
        let body = chat(json!({"stream": stream, "n": 64})).to_string();
        let connection = api.open("POST", CHAT, body.as_bytes()).await;
        for _ in 0..64 {
            within("a prefill job", context.prefills.recv())
                .await
                .unwrap();
        }
        drop(connection);
        empty(&api).await;
        context.script.lock().unwrap().silent = false;
        context.beats.send_replace(true);
        api.sees(2).await;
    }
    decode.script.lock().unwrap().endless = true;
    let flood = chat(
        json!({"stream": true, "n": 64, "max_tokens": 900, "ignore_eos": true,
        "logprobs": true, "top_logprobs": 20}),
    );
    let mut connection = api.open("POST", CHAT, flood.to_string().as_bytes()).await;
    connection.read_until("\"content\":\"H").await;
    drop(connection);
    empty(&api).await;
}

/// An answer of megabytes in one document, while its thread serves others.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_answer_keeps_nobody_waiting_and_is_whole() {
    let (_nats, _context, decode, api) = usual().await;
    decode.script.lock().unwrap().endless = true;
    let large = chat(
        json!({"n": 16, "max_tokens": 900, "ignore_eos": true, "logprobs": true,
        "top_logprobs": 20}),
    );
    let mut connection = api.open("POST", CHAT, large.to_string().as_bytes()).await;
    let response = within("the answer", connection.finish()).await;
    assert!(response.body.len() > 10 << 20, "{}", response.body.len());
    assert!(
        !response.head.contains("content-length"),
        "{}",
        response.head
    );
    let answer = response.json();
    assert_eq!(answer["usage"]["completion_tokens"], 16 * 900);
    for index in 0..16 {
        let entries = &answer["choices"][index]["logprobs"]["content"];
        assert_eq!(entries.as_array().unwrap().len(), 900);
    }
    let small = api.post(CHAT, chat(json!({}))).await;
    assert!(small.head.contains("content-length"), "{}", small.head);
    empty(&api).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_would_be_too_large_is_refused_or_given_up() {
    let nats = Nats::start().await;
    let mut context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let endless = Script {
        endless: true,
        ..Script::default()
    };
    let _decode = Worker::start(&nats, "d1", Role::Decode, endless).await;
    let api = Api::with(&nats, |config| {
        config.limits.answer_bytes_max = 4 << 20;
        config.limits.answers_bytes_max = 64 << 10;
    })
    .await;
    api.sees(2).await;
    let large = |n: u32| {
        chat(
            json!({"n": n, "max_tokens": 900, "ignore_eos": true, "logprobs": true,
            "top_logprobs": 20}),
        )
    };
    let refused = api.post(CHAT, large(16)).await;
    assert_eq!(refused.status, 400, "{}", refused.body);
    assert!(
        refused.body.contains("16 choices of up to 900 tokens"),
        "{}",
        refused.body
    );
    assert!(context.prefills.try_recv().is_err(), "nothing was begun");
    let given_up = api.post(CHAT, large(2)).await;
    assert_eq!(given_up.status, 429, "{}", given_up.body);
    assert!(
        given_up.body.contains("ask for a stream"),
        "{}",
        given_up.body
    );
    empty(&api).await;
    assert_eq!(api.post(CHAT, chat(json!({}))).await.status, 200);
}
