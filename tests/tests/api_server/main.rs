//! The API server against a real nats-server and scripted workers.

mod admission;
mod deadlines;
mod doors;
mod fields;
mod first_hour;
mod hostile;
mod keys;
mod messages;
mod promises;
mod requests;
mod strays;
mod support;
mod tls;
mod tokens;
mod tools;
mod waiting;

use std::collections::HashSet;
use std::time::Duration;

use baton_api_server::SpecialTokensInContent;
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    ApiServerId, End, FinishReason, FrameItem, Incarnation, PROTOCOL_VERSION, PackedTokens, Role,
    TokenFrame, WorkerId,
};
use serde_json::{Value, json};
use support::{Api, EOS, Nats, SPACE_AND_LEAD, Script, TEXT, Worker, chat, within};

/// One context and one decode worker that do everything right.
async fn usual() -> (Nats, Worker, Worker, Api) {
    let nats = Nats::start().await;
    let context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let api = Api::start(&nats).await;
    api.sees(2).await;
    (nats, context, decode, api)
}

fn text_of(events: &[Value], index: usize) -> String {
    let choice = |event: &Value| {
        let choices = event["choices"].as_array().unwrap().clone();
        choices.into_iter().find(|choice| choice["index"] == index)
    };
    let text = |choice: Value| {
        let text = choice.get("text").unwrap_or(&choice["delta"]["content"]);
        text.as_str().unwrap_or_default().to_owned()
    };
    events.iter().filter_map(choice).map(text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_openais_shape() {
    let (_nats, _context, _decode, api) = usual().await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let response = api.post("/v1/chat/completions", body).await;
    assert!(response.head.contains("text/event-stream"));
    let events = response.events();
    assert_eq!(text_of(&events, 0), TEXT);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let (usage, chunks) = events.split_last().unwrap();
    for (i, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], events[0]["id"]);
        assert!(chunk["usage"].is_null() && chunk.get("usage").is_some());
        let finish = &chunk["choices"][0]["finish_reason"];
        let last = i + 1 == chunks.len();
        assert_eq!(*finish, if last { json!("stop") } else { Value::Null });
        assert!(chunk["choices"][0].get("finish_reason").is_some());
    }
    assert_eq!(usage["choices"], json!([]));
    let prompt = "<user>hi\n<assistant>".len();
    assert_eq!(usage["usage"]["prompt_tokens"], prompt);
    assert_eq!(usage["usage"]["completion_tokens"], TEXT.len() + 1);
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_in_one_piece() {
    let (_nats, mut context, mut decode, api) = usual().await;
    let response = api
        .post(
            "/v1/chat/completions",
            chat(json!({"max_tokens": 5, "seed": 7})),
        )
        .await;
    assert_eq!(response.status, 200, "{}", response.body);
    let answer = response.json();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["message"]["content"], "Hello");
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    let prefill = context.prefills.recv().await.unwrap();
    assert_eq!(prefill.sequence.generation.sampling.seed, 7);
    assert_eq!(prefill.sequence.generation.stop_token_ids, [EOS]);
    let job = decode.decodes.recv().await.unwrap();
    assert_eq!(job.sequence, prefill.sequence);
    assert_eq!(job.attempt, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_token_that_ends_it_needs_no_decode_worker() {
    let (_nats, _context, mut decode, api) = usual().await;
    let response = api
        .post("/v1/chat/completions", chat(json!({"max_tokens": 1})))
        .await;
    assert_eq!(response.json()["choices"][0]["message"]["content"], "H");
    assert!(decode.decodes.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_choices_have_seeds_and_requests_of_their_own() {
    let (_nats, mut context, _decode, api) = usual().await;
    let body = chat(json!({"n": 3, "seed": 10, "stream": true}));
    let events = api.post("/v1/chat/completions", body).await.events();
    let mut seeds = Vec::new();
    let mut requests = Vec::new();
    for index in 0..3 {
        assert_eq!(text_of(&events, index), TEXT);
        let job = context.prefills.recv().await.unwrap();
        seeds.push(job.sequence.generation.sampling.seed);
        requests.push(job.request);
    }
    seeds.sort_unstable();
    requests.sort_unstable();
    requests.dedup();
    assert_eq!(seeds, [10, 11, 12]);
    assert_eq!(requests.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_text_and_frees_the_worker() {
    let (_nats, _context, mut decode, api) = usual().await;
    decode.script.lock().unwrap().waits_at = Some(30);
    let body =
        json!({"model": "tiny", "prompt": "x", "max_tokens": 100, "stop": ["rld! Th", "zzz"]});
    let response = api.post("/v1/completions", body).await;
    let answer = response.json();
    assert_eq!(answer["choices"][0]["text"], "Hello, wö");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(decode.aborted().await.reason, "stop string found");
}

/// The token that completes a stop string may begin a character, of which nothing is the client's.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_after_a_stop_string() {
    let (_nats, context, decode, api) = usual().await;
    for worker in [&context, &decode] {
        let emoji = [b'a'.into(), SPACE_AND_LEAD, 0x9f, 0x8e, 0x89];
        worker.script.lock().unwrap().tokens = emoji.to_vec();
    }
    for (stop, text) in [("!", "a 🎉"), (" ", "a")] {
        let body = json!({"model": "tiny", "prompt": "x", "stop": stop});
        let answer = api.post("/v1/completions", body).await.json();
        assert_eq!(answer["choices"][0]["text"], text);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_echo_and_log_probabilities() {
    let (_nats, mut context, _decode, api) = usual().await;
    let body = json!({"model": "tiny", "prompt": [[104, 105], [111]], "max_tokens": 3,
        "echo": true, "logprobs": 2});
    let answer = api.post("/v1/completions", body).await.json();
    assert_eq!(answer["choices"][0]["text"], "hiHel");
    assert_eq!(answer["choices"][1]["text"], "oHel");
    assert_eq!(answer["choices"][1]["index"], 1);
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["h", "i", "H", "e", "l"]));
    assert_eq!(
        logprobs["token_logprobs"],
        json!([null, -0.5, -0.5, -0.5, -0.5])
    );
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4]));
    assert_eq!(logprobs["top_logprobs"][2], json!({"H": -0.5, "I": -1.5}));
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    assert_eq!(
        context.prefills.recv().await.unwrap().prompt_logprobs,
        Some(2)
    );

    let body = chat(json!({"max_tokens": 2, "logprobs": true, "top_logprobs": 1, "stream": true}));
    let events = api.post("/v1/chat/completions", body).await.events();
    let entries: Vec<Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0]["token"], "H");
    assert_eq!(entries[0]["bytes"], json!([72]));
    assert_eq!(entries[0]["top_logprobs"][0]["token"], "H");
}

#[tokio::test(flavor = "multi_thread")]
async fn echoed_ids_show_special_tokens_and_offsets_rise() {
    let (_nats, context, decode, api) = usual().await;
    // An emoji of which the prompt has the first two bytes and the output the rest.
    let script = |tokens: &[u32]| Script {
        tokens: tokens.to_vec(),
        ..Script::default()
    };
    *context.script.lock().unwrap() = script(&[0x8e, 0x89, 0x21]);
    *decode.script.lock().unwrap() = script(&[0x8e, 0x89, 0x21]);
    let body = json!({"model": "tiny", "prompt": [EOS, 0xc3, 0xa9, 0xf0, 0x9f], "max_tokens": 3,
        "echo": true, "logprobs": 0});
    let answer = api.post("/v1/completions", body).await.json();
    assert_eq!(answer["choices"][0]["text"], "<|end|>é🎉!");
    let offsets = &answer["choices"][0]["logprobs"]["text_offset"];
    assert_eq!(*offsets, json!([0, 7, 7, 8, 8, 8, 8, 9]));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_a_stop_string_begin_where_the_text_ends() {
    let (_nats, _context, _decode, api) = usual().await;
    let body =
        json!({"model": "tiny", "prompt": "hi", "max_tokens": 30, "stop": "wör", "logprobs": 0});
    let answer = api.post("/v1/completions", body).await.json();
    assert_eq!(answer["choices"][0]["text"], "Hello, ");
    let offsets = &answer["choices"][0]["logprobs"]["text_offset"];
    assert_eq!(*offsets, json!([0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streams_tokens_wait_with_the_text_that_may_be_a_stop_string() {
    let (_nats, _context, _decode, api) = usual().await;
    let body = json!({"model": "tiny", "prompt": "hi", "max_tokens": 30, "stop": ["Hellx", "wör"],
        "logprobs": 0, "return_token_ids": true});
    let whole = api.post("/v1/completions", body.clone()).await.json();
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = api.post("/v1/completions", streamed).await.events();
    let list = |event: &Value, name: &str| -> Vec<Value> {
        let found = event["choices"][0].pointer(name).and_then(Value::as_array);
        found.into_iter().flatten().cloned().collect()
    };
    for name in [
        "/logprobs/tokens",
        "/logprobs/token_logprobs",
        "/logprobs/text_offset",
        "/token_ids",
    ] {
        let all: Vec<Value> = events.iter().flat_map(|event| list(event, name)).collect();
        assert_eq!(all, list(&whole, name), "{name}");
    }
    let mut stopped = 0;
    for event in &events {
        let tokens = list(event, "/logprobs/tokens");
        assert_eq!(tokens.len(), list(event, "/token_ids").len(), "{event}");
        let tokens: String = tokens.iter().filter_map(Value::as_str).collect();
        let text = event["choices"][0]["text"].as_str().unwrap_or_default();
        assert!(tokens.starts_with(text), "{event}");
        stopped += usize::from(tokens != text);
    }
    assert_eq!(
        stopped, 1,
        "the stop string's tokens come together: {events:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_echo_too_large_for_the_bus_is_refused_before_anything_is_computed() {
    let nats = Nats::with_max_payload(64 << 10).await;
    let mut context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let _decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let api = Api::start(&nats).await;
    api.sees(2).await;
    let ask = |logprobs: u8| json!({"model": "tiny", "prompt": "x".repeat(200), "echo": true, "logprobs": logprobs});
    let response = api.post("/v1/completions", ask(20)).await;
    assert_eq!(response.status, 400, "{}", response.body);
    let error = &response.json()["error"];
    assert_eq!(error["code"], "answer_too_large");
    assert_eq!(error["param"], "logprobs");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("200 prompt tokens and 20 alternatives")
            && message.contains("ask for fewer alternatives"),
        "{message}"
    );
    let response = api.post("/v1/completions", ask(2)).await;
    assert_eq!(response.status, 200, "{}", response.body);
    let asked = context.prefills.recv().await.unwrap().prompt_logprobs;
    assert_eq!(asked, Some(2), "nobody was asked for the first");
}

#[tokio::test(flavor = "multi_thread")]
async fn control_tokens_in_messages_are_text_unless_allowed() {
    let (nats, mut context, _decode, api) = usual().await;
    let body = json!({"model": "tiny", "max_tokens": 1,
        "messages": [{"role": "user", "content": "a<|end|>b"}]});
    let prompt = "<user>a<|end|>b\n<assistant>";
    api.post("/v1/chat/completions", body.clone()).await;
    let sent = context.prefills.recv().await.unwrap().sequence.tokens.0;
    let bytes: Vec<u32> = prompt.bytes().map(u32::from).collect();
    assert_eq!(sent, bytes);

    let allowing = Api::with(&nats, |config| {
        config.name = ApiServerId::new("allowing").unwrap();
        config.special_tokens_in_content = SpecialTokensInContent::Allow;
    })
    .await;
    allowing.sees(2).await;
    allowing.post("/v1/chat/completions", body).await;
    let sent = context.prefills.recv().await.unwrap().sequence.tokens.0;
    assert_eq!(sent.iter().filter(|token| **token == EOS).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_get_a_clear_answer() {
    let (_nats, mut context, _decode, api) = usual().await;
    let path = "/v1/chat/completions";
    let long = "x".repeat(2000);
    let cases = [
        (
            chat(json!({"max_tokens": 0})),
            400,
            json!("max_tokens"),
            Value::Null,
        ),
        (
            chat(json!({"max_tokens": 990})),
            400,
            json!("max_tokens"),
            json!("context_length_exceeded"),
        ),
        (
            chat(json!({"temperature": "hot"})),
            400,
            json!("temperature"),
            Value::Null,
        ),
        (
            chat(json!({"messages": 1})),
            400,
            json!("messages"),
            Value::Null,
        ),
        (
            chat(json!({"tools": [{}]})),
            400,
            json!("tools[0].type"),
            Value::Null,
        ),
        (
            chat(json!({"model": "other"})),
            404,
            json!("model"),
            json!("model_not_found"),
        ),
        (
            chat(json!({"messages": [{"role": "user", "content": long}]})),
            400,
            json!("messages"),
            json!("context_length_exceeded"),
        ),
    ];
    for (body, status, param, code) in cases {
        let response = api.post(path, body.clone()).await;
        assert_eq!(response.status, status, "{body}: {}", response.body);
        let error = &response.json()["error"];
        assert_eq!((&error["param"], &error["code"]), (&param, &code), "{body}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().len() > 10);
    }
    for body in [&b"{"[..], b"[]", b"", b"{\"model\":\"\xff\"}"] {
        let response = api.send("POST", path, body).await;
        assert_eq!(response.status, 400, "{}", response.body);
        assert!(response.json()["error"]["message"].is_string());
    }
    assert_eq!(api.send("GET", path, b"").await.status, 405);
    assert_eq!(api.send("POST", "/v1/nothing", b"{}").await.status, 404);
    assert!(
        context.prefills.try_recv().is_err(),
        "no worker heard of any of them"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_bound_is_refused_unread() {
    let (_nats, _context, _decode, api) = usual().await;
    let mut stream = tokio::net::TcpStream::connect(api.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 52428800\r\n\r\n{\"prompt\":";
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes())
        .await
        .unwrap();
    let mut bytes = vec![0; 4096];
    let read = tokio::io::AsyncReadExt::read(&mut stream, &mut bytes);
    let count = within("an answer before the body is there", read)
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
    assert!(text.starts_with("HTTP/1.1 413"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_workers_make_503_with_retry_after() {
    let (_nats, context, _decode, api) = usual().await;
    context.script.lock().unwrap().busy = true;
    for stream in [false, true] {
        let response = api
            .post("/v1/chat/completions", chat(json!({"stream": stream})))
            .await;
        assert_eq!(response.status, 503, "{}", response.body);
        assert!(
            response.head.contains("retry-after: 2"),
            "{}",
            response.head
        );
        assert_eq!(response.json()["error"]["code"], "busy");
    }
    let metrics = api.get("/metrics").await.1;
    assert!(
        metrics.contains("baton_errors_total{reason=\"busy\"} 2\n"),
        "each is counted once: {metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_goes_to_the_next_worker() {
    let (nats, mut first, _decode, api) = usual().await;
    first.script.lock().unwrap().busy = true;
    let mut second = Worker::start(&nats, "c2", Role::Context, Script::default()).await;
    api.sees(3).await;
    for salt in ["a", "b"] {
        // None has its prefix anywhere: each worker is chosen in turn.
        let body = chat(json!({ "cache_salt": salt }));
        let response = api.post("/v1/chat/completions", body).await;
        assert_eq!(response.json()["choices"][0]["message"]["content"], TEXT);
        within("a prompt", second.prefills.recv()).await.unwrap();
    }
    let asked = within("a prompt that is refused", first.prefills.recv()).await;
    assert!(asked.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_frame_is_noticed_and_the_text_is_whole() {
    let (_nats, mut context, mut decode, api) = usual().await;
    decode.script.lock().unwrap().gap_at = Some(8);
    let events = api
        .post("/v1/chat/completions", chat(json!({"stream": true})))
        .await
        .events();
    assert_eq!(text_of(&events, 0), TEXT);
    assert_eq!(decode.aborted().await.reason, "tokens were lost on the bus");
    context.prefills.recv().await.unwrap();
    let again = context.prefills.recv().await.unwrap();
    let output = again.sequence.output_tokens() as usize;
    assert_eq!(output, 8);
    let (_, tail) = again
        .sequence
        .tokens
        .0
        .split_at(again.sequence.prompt_tokens as usize);
    let expected: Vec<u32> = TEXT.bytes().take(output).map(u32::from).collect();
    assert_eq!(tail, expected);
    let metrics = api.get("/metrics").await.1;
    assert!(metrics.contains("baton_retries_total{reason=\"tokens were lost on the bus\"} 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_its_decode_worker_is_heard() {
    let (nats, _context, mut decode, api) = usual().await;
    decode.script.lock().unwrap().waits_at = Some(10);
    let body = chat(json!({"max_tokens": 20})).to_string();
    let mut answer = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    let job = within("the decode job", decode.decodes.recv()).await;
    let job = job.unwrap();
    let cluster = Cluster::new("test").unwrap();
    let bus = async_nats::connect(&nats.url).await.unwrap();
    // A stranger, and the worker itself in an earlier life.
    for (worker, incarnation) in [("d9", 7), ("d1", 6)] {
        let worker = WorkerId::new(worker).unwrap();
        let subject = cluster.tokens(&job.api_server, &worker);
        let frame = TokenFrame {
            v: PROTOCOL_VERSION,
            worker,
            incarnation: Incarnation(incarnation),
            items: vec![FrameItem {
                request: job.request,
                attempt: job.attempt,
                index: 1,
                tokens: PackedTokens(vec![b'?'.into()]),
                logprobs: Vec::new(),
                pulled: None,
                end: Some(End::Finished(FinishReason::Stop)),
            }],
            prompts: Vec::new(),
        };
        let frame = serde_json::to_vec(&frame).unwrap();
        bus.publish(subject, frame.into()).await.unwrap();
    }
    baton_tests::settled(&bus).await;
    decode.go_on.send_replace(true);
    let answer = within("the answer", answer.finish()).await;
    let text = &answer.json()["choices"][0]["message"]["content"];
    assert_eq!(*text, TEXT[..TEXT.floor_char_boundary(20)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_worker_that_falls_silent_is_replaced() {
    let (nats, mut silent, _decode, api) = usual().await;
    silent.script.lock().unwrap().silent = true;
    let body = chat(json!({"stream": true})).to_string();
    let mut connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    within("the prefill job", silent.prefills.recv())
        .await
        .unwrap();
    let _second = Worker::start(&nats, "c2", Role::Context, Script::default()).await;
    connection.read_until(": keep-alive").await;
    let response = within("the answer", connection.finish()).await;
    assert_eq!(text_of(&response.events(), 0), TEXT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_worker_that_dies_in_mid_stream_is_replaced() {
    let (nats, _context, dying, api) = usual().await;
    dying.script.lock().unwrap().dies_at = Some(12);
    let body = chat(json!({"stream": true})).to_string();
    let mut connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    connection.read_until("w").await;
    let mut second = Worker::start(&nats, "d2", Role::Decode, Script::default()).await;
    let response = within("the answer", connection.finish()).await;
    assert_eq!(text_of(&response.events(), 0), TEXT);
    assert_eq!(second.decodes.recv().await.unwrap().attempt, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_the_workers() {
    let (_nats, mut context, mut decode, api) = usual().await;
    // In mid-stream.
    decode.script.lock().unwrap().waits_at = Some(10);
    let body = chat(json!({"stream": true})).to_string();
    let mut connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    connection.read_until("\"content\":\"H").await;
    drop(connection);
    let job = decode.decodes.recv().await.unwrap();
    let abort = decode.aborted().await;
    assert_eq!(
        (abort.request, abort.reason.as_str()),
        (job.request, "client left")
    );
    // While it waits for an answer in one piece.
    let body = chat(json!({})).to_string();
    let connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    let job = within("the decode job", decode.decodes.recv())
        .await
        .unwrap();
    drop(connection);
    let abort = decode.aborted_of(job.request).await;
    assert_eq!(abort.reason, "client left");
    // In the prompt.
    context.script.lock().unwrap().silent = true;
    while context.prefills.try_recv().is_ok() {}
    for stream in [true, false] {
        let body = chat(json!({"stream": stream})).to_string();
        let connection = api
            .open("POST", "/v1/chat/completions", body.as_bytes())
            .await;
        within("the prefill job", context.prefills.recv())
            .await
            .unwrap();
        drop(connection);
        assert_eq!(context.aborted().await.reason, "client left");
        context.beats.send_replace(true);
    }
    within("nothing is in flight", async {
        while !api
            .get("/metrics")
            .await
            .1
            .contains("baton_requests_in_flight 0")
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_stream_is_kept_alive() {
    let (_nats, _context, decode, api) = usual().await;
    decode.script.lock().unwrap().waits_at = Some(3);
    let body = chat(json!({"stream": true})).to_string();
    let mut connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    connection.read_until(": keep-alive").await;
    decode.go_on.send_replace(true);
    let response = within("the answer", connection.finish()).await;
    assert_eq!(text_of(&response.events(), 0), TEXT);
}

/// A request whose answer takes megabytes.
fn flood() -> Value {
    chat(
        json!({"stream": true, "ignore_eos": true, "max_tokens": 900, "n": 16,
        "logprobs": true, "top_logprobs": 20}),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_given_up_and_little_waits_for_it() {
    let nats = Nats::start().await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let endless = Script {
        endless: true,
        waits_at: Some(800),
        ..Script::default()
    };
    let mut decode = Worker::start(&nats, "d1", Role::Decode, endless).await;
    let api = Api::with(&nats, |config| {
        config.limits.reader_stall = Duration::from_millis(300);
    })
    .await;
    api.sees(2).await;
    let mut connection = api
        .open(
            "POST",
            "/v1/chat/completions",
            flood().to_string().as_bytes(),
        )
        .await;
    let mut given_up = HashSet::new();
    while given_up.len() < 16 {
        let abort = decode.aborted().await;
        // Only the first abort of a request counts: while a worker still sends tokens, it gets more, with the reason "it is over".
        if given_up.insert(abort.request) {
            assert_eq!(abort.reason, "client does not read");
        }
    }
    let response = within("what was sent before", connection.finish()).await;
    assert!(response.body.contains("event: error"));
    let bytes = response.body.len();
    // All of it is 12 MB. The kernel takes up to 4 MB, and each choice stops within one frame of the bound.
    assert!(bytes < 6 << 20, "{bytes} bytes were rendered for nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_takes_nothing_is_closed() {
    let nats = Nats::start().await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let endless = Script {
        endless: true,
        ..Script::default()
    };
    let mut decode = Worker::start(&nats, "d1", Role::Decode, endless).await;
    let api = Api::with(&nats, |config| {
        config.limits.reader_stall = Duration::from_millis(100);
        config.limits.connection_stall = Duration::from_millis(200);
    })
    .await;
    api.sees(2).await;
    // A stream whose request ends early, and an answer in one piece.
    let mut whole = flood();
    whole["stream"] = false.into();
    for body in [flood(), whole] {
        let connection = api
            .open("POST", "/v1/chat/completions", body.to_string().as_bytes())
            .await;
        within("a decode job", decode.decodes.recv()).await.unwrap();
        connection.closed_by_server().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_one_choice_fails_before_anything_was_said_the_others_end() {
    let (_nats, mut context, _decode, api) = usual().await;
    context.script.lock().unwrap().refuses_odd_seeds = true;
    for stream in [true, false] {
        let body = chat(json!({"stream": stream, "n": 2, "seed": 0}));
        let response = api.post("/v1/chat/completions", body).await;
        assert_eq!(response.status, 500, "{}", response.body);
        assert_eq!(context.aborted().await.reason, "client left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_in_the_last_token_is_the_reason() {
    let (_nats, _context, _decode, api) = usual().await;
    for stream in [false, true] {
        let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 5, "stop": "lo", "stream": stream});
        let response = api.post("/v1/completions", body).await;
        let answer = match stream {
            true => response.events().pop().unwrap(),
            false => response.json(),
        };
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_becomes_free_goes_to_who_waits_for_it() {
    let (_nats, _context, mut decode, api) = usual().await;
    *decode.script.lock().unwrap() = Script {
        places: 1,
        waits_at: Some(10),
        ..Script::default()
    };
    let body = chat(json!({"max_tokens": 20})).to_string();
    let mut connections = Vec::new();
    for _ in 0..4 {
        let path = "/v1/chat/completions";
        connections.push(api.open("POST", path, body.as_bytes()).await);
        // The first is taken, the others are refused and wait.
        within("the decode job", decode.decodes.recv())
            .await
            .unwrap();
    }
    decode.go_on.send_replace(true);
    for connection in &mut connections {
        let response = within("the answer", connection.finish()).await;
        let text = &response.json()["choices"][0]["message"]["content"];
        assert_eq!(*text, TEXT[..TEXT.floor_char_boundary(20)]);
    }
    // Each of the three may also have found the place by asking again in time, but hardly all of them.
    let metrics = api.get("/metrics").await.1;
    let woken = metrics
        .lines()
        .find_map(|line| line.strip_prefix("baton_decode_room_total "))
        .unwrap();
    assert_ne!(woken, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_slowly_gets_everything() {
    let (_nats, _context, decode, api) = usual().await;
    decode.script.lock().unwrap().endless = true;
    let mut connection = api
        .open(
            "POST",
            "/v1/chat/completions",
            flood().to_string().as_bytes(),
        )
        .await;
    let response = within("the answer", connection.finish()).await;
    let bytes = response.body.len();
    assert!(bytes > 10 << 20, "{bytes} bytes are no flood");
    let events = response.events();
    let long = TEXT.repeat(900 / TEXT.len() + 1);
    let expected = String::from_utf8_lossy(&long.as_bytes()[..900]).into_owned();
    for index in 0..16 {
        assert_eq!(text_of(&events, index), expected);
    }
}

/// That a client once had much to read says nothing once it has read it, however long the next token takes.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_has_read_is_not_given_up_while_nothing_comes() {
    let nats = Nats::start().await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    // One frame is more than may wait for a client, so that the pause begins when there was no room.
    let pausing = Script {
        endless: true,
        frame_tokens: 200,
        waits_at: Some(401),
        ..Script::default()
    };
    let decode = Worker::start(&nats, "d1", Role::Decode, pausing).await;
    let stall = Duration::from_secs(2);
    let api = Api::with(&nats, |config| config.limits.reader_stall = stall).await;
    api.sees(2).await;
    let mut body = flood();
    body["n"] = 1.into();
    let body = body.to_string();
    let mut connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    let reading = tokio::spawn(async move { connection.finish().await });
    // The pause itself is what is tested.
    tokio::time::sleep(3 * stall).await;
    decode.go_on.send_replace(true);
    let response = within("the answer", reading).await.unwrap();
    assert!(!response.body.contains("event: error"));
    let long = TEXT.repeat(900 / TEXT.len() + 1);
    assert_eq!(text_of(&response.events(), 0), long[..900]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_too_large_for_the_bus_is_refused_clearly() {
    let nats = Nats::with_max_payload(4096).await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let _decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let api = Api::start(&nats).await;
    api.sees(2).await;
    let body = json!({"model": "tiny", "prompt": "x".repeat(900)});
    let response = api.post("/v1/completions", body).await;
    assert_eq!(response.status, 413, "{}", response.body);
    assert_eq!(response.json()["error"]["code"], "prompt_too_large");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_pages_tell_what_is_there() {
    let nats = Nats::start().await;
    let api = Api::start(&nats).await;
    let (status, body) = api.get("/health").await;
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("no context worker") && body.contains("no decode worker"));
    assert_eq!(api.get("/live").await.0, 200);
    let response = api.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(response.status, 503);
    let _both = Worker::start(&nats, "b1", Role::Both, Script::default()).await;
    api.sees(1).await;
    assert_eq!(api.get("/health").await.0, 200);
    let (_, body) = api.get("/v1/models").await;
    let models: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(api.get("/v1/models/tiny").await.0, 200);
    assert_eq!(api.get("/v1/models/other").await.0, 404);
    let response = api.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(response.json()["choices"][0]["message"]["content"], TEXT);
    let (_, body) = api.get("/cluster").await;
    let cluster: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(cluster["workers"][0]["worker"], "b1");
    assert_eq!(cluster["workers"][0]["peers"][0]["transport"], "posix");
    let metrics = api.get("/metrics").await.1;
    for name in [
        "baton_ttft_seconds_count 1",
        "baton_inter_token_seconds_bucket",
        "baton_kv_pull_bytes_sum 4096",
        "baton_requests_total{outcome=\"stop\"} 1",
        "baton_errors_total{reason=\"no_worker\"}",
        "baton_worker_waiting{worker=\"b1\",role=\"both\"} 0",
    ] {
        assert!(metrics.contains(name), "{name} in {metrics}");
    }
    // Nothing was measured, which is not the same as no error.
    let error = "baton_worker_step_cost_error{";
    assert!(!metrics.contains(error), "{error} in {metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_time_of_the_last_requests_went_is_told() {
    let (_nats, _context, _decode, api) = usual().await;
    let said = "a secret that nobody is to read here";
    let messages = json!({"messages": [{"role": "user", "content": said}]});
    for _ in 0..2 {
        let response = api
            .post("/v1/chat/completions", chat(messages.clone()))
            .await;
        assert_eq!(response.status, 200, "{}", response.body);
    }
    let (status, body) = api.get("/requests").await;
    assert_eq!(status, 200);
    let told: Value = serde_json::from_str(&body).unwrap();
    let [newest, oldest] = told["requests"].as_array().unwrap().as_slice() else {
        panic!("{body}");
    };
    assert_eq!([&newest["number"], &oldest["number"]], [2, 1]);
    assert_eq!(
        [&newest["context_worker"], &newest["decode_worker"]],
        ["c1", "d1"]
    );
    assert_eq!(newest["outcome"], "stop");
    assert!(
        newest["prompt_tokens"].as_u64() > Some(0) && newest["output_tokens"].as_u64() > Some(1)
    );
    for part in [
        "queue_ms",
        "prefill_ms",
        "handover_ms",
        "decode_ms",
        "ended_ms_ago",
    ] {
        assert!(
            newest[part]
                .as_f64()
                .is_some_and(|ms| (0.0..60_000.0).contains(&ms)),
            "{part} in {body}"
        );
    }
    // Numbers and names of workers: no text, and no id by which an answer could be read.
    for text in ["secret", TEXT, "chatcmpl", "id\""] {
        assert!(!body.contains(text), "{text} in {body}");
    }
}
