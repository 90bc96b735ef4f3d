//! Every wait of a request ends with its time, and the error says where the time went.

use std::time::Duration;

use baton_protocol::Role;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Api, Nats, Script, Worker, chat, model_with, within};

/// A cluster of `c1` and `d1` that do as their scripts say, and requests with little time.
async fn cluster(context: Script, decode: Script) -> (Nats, Worker, Worker, Api) {
    let nats = Nats::start().await;
    let context = Worker::start(&nats, "c1", Role::Context, context).await;
    let decode = Worker::start(&nats, "d1", Role::Decode, decode).await;
    let api = Api::with(&nats, |config| {
        config.request_budget = Duration::from_millis(500);
    })
    .await;
    api.sees(2).await;
    (nats, context, decode, api)
}

/// What the client reads when its time is over: a status where nothing was sent yet.
async fn reads(api: &Api) -> String {
    let response = api.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(response.status, 504, "{}", response.body);
    let body: Value = serde_json::from_str(&response.body).unwrap();
    assert_eq!(body["error"]["code"], "deadline_exceeded");
    body["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_is_not_answered() {
    let silent = Script {
        silent: true,
        ..Script::default()
    };
    let (_nats, mut context, _decode, api) = cluster(silent, Script::default()).await;
    let message = reads(&api).await;
    assert_eq!(
        message,
        "the request's time ran out while it was prefilling on c1"
    );
    assert_eq!(context.aborted().await.reason, "deadline");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_worker_that_never_has_room() {
    let busy = Script {
        busy: true,
        ..Script::default()
    };
    let (_nats, mut context, _decode, api) = cluster(Script::default(), busy).await;
    let message = reads(&api).await;
    let expected =
        "the request's time ran out while its KV waited on c1 for a decode worker with room";
    assert_eq!(message, expected);
    assert_eq!(
        context.aborted().await.reason,
        "deadline",
        "the lease ends too"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_does_not_end() {
    let pulls = Script {
        waits_at: Some(1),
        ..Script::default()
    };
    let (_nats, mut context, mut decode, api) = cluster(Script::default(), pulls).await;
    let message = reads(&api).await;
    assert_eq!(
        message,
        "the request's time ran out while d1 pulled its KV from c1"
    );
    assert_eq!(context.aborted().await.reason, "deadline");
    assert_eq!(decode.aborted().await.reason, "deadline");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_that_stands_still() {
    let waits = Script {
        waits_at: Some(3),
        frame_tokens: 1,
        ..Script::default()
    };
    let (_nats, _context, mut decode, api) = cluster(Script::default(), waits).await;
    let message = reads(&api).await;
    assert_eq!(
        message,
        "the request's time ran out while it was decoding on d1"
    );
    assert_eq!(decode.aborted().await.reason, "deadline");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_has_begun_ends_with_the_reason() {
    let waits = Script {
        waits_at: Some(3),
        frame_tokens: 1,
        ..Script::default()
    };
    let (_nats, _context, _decode, api) = cluster(Script::default(), waits).await;
    let body = chat(json!({"stream": true}));
    let response = api.post("/v1/chat/completions", body).await;
    assert_eq!(response.status, 200);
    let end = "the request's time ran out while it was decoding on d1";
    assert!(response.body.contains(end), "{}", response.body);
    let metrics = api.get("/metrics").await.1;
    assert!(
        metrics.contains("baton_errors_total{reason=\"deadline\"} 1\n"),
        "it is counted once: {metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stops_coming_is_given_up() {
    let nats = Nats::start().await;
    let api = Api::with(&nats, |config| {
        config.limits.body_stall = Duration::from_millis(100);
    })
    .await;
    let mut stream = tokio::net::TcpStream::connect(api.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{\"prompt\":";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut bytes = vec![0; 4096];
    let read = stream.read(&mut bytes);
    let count = within("an answer without the rest", read).await.unwrap();
    let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
    assert!(text.starts_with("HTTP/1.1 408"), "{text}");
    assert!(text.contains("body_stalled"), "{text}");
}

/// A byte now and then is no pause, and yet it must end.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_is_given_up_with_the_requests_time() {
    let nats = Nats::start().await;
    let api = Api::with(&nats, |config| {
        config.request_budget = Duration::from_millis(500);
    })
    .await;
    let mut stream = tokio::net::TcpStream::connect(api.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut from, mut to) = stream.into_split();
    let dribble = tokio::spawn(async move {
        while to.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut bytes = vec![0; 4096];
    let count = within("an answer without the rest", from.read(&mut bytes))
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
    assert!(text.starts_with("HTTP/1.1 408"), "{text}");
    assert!(
        text.contains("time ran out while its body was still coming"),
        "{text}"
    );
    dribble.abort();
}

/// A prompt of so much text that the machine is at it for a while, of a model that would hold it.
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_takes_too_long_to_read() {
    let nats = Nats::start().await;
    let model = model_with(&json!({"tokens_max": 1 << 24, "use_regex": true}));
    let api = Api::with(&nats, |config| {
        config.tokenizer = model.path().to_owned();
        config.request_budget = Duration::from_millis(50);
    })
    .await;
    let body = json!({"model": "tiny", "prompt": "word ".repeat(3 << 20)});
    let response = api.post("/v1/completions", body).await;
    let message = &response.body;
    match response.status {
        // The machine is slow today: not even the body was there in time.
        408 => assert!(
            message.contains("while its body was still coming"),
            "{message}"
        ),
        status => {
            assert_eq!(status, 504, "{message}");
            assert!(
                message.contains("while its prompt was made into tokens"),
                "{message}"
            );
        }
    }
}

/// What is beyond the room for bodies is told to come back, and the room comes back with the bodies that have it.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_have_a_bound_together() {
    let nats = Nats::start().await;
    let api = Api::with(&nats, |config| {
        config.limits.bodies_bytes_max = 64 << 10;
    })
    .await;
    let mut half = tokio::net::TcpStream::connect(api.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n";
    half.write_all(head.as_bytes()).await.unwrap();
    half.write_all(&[b' '; 70 << 10]).await.unwrap();
    let body = json!({"model": "tiny", "prompt": "w".repeat(40 << 10)});
    // When the other's bytes are there is not told: it is asked until it is so.
    let refused = within("the room to be taken", async {
        loop {
            let response = api.post("/v1/completions", body.clone()).await;
            if response.status == 429 {
                return response;
            }
        }
    });
    let response = refused.await;
    assert!(
        response.body.contains("bound of 65536 bytes"),
        "{}",
        response.body
    );
    drop(half);
    within("room again", async {
        while api.post("/v1/completions", body.clone()).await.status == 429 {}
    })
    .await;
}
