//! Small paths, and what every path does: names of requests, types of bodies, other pages, gzip.

use std::io::{Read, Write};

use baton_api_server::Origins;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use crate::support::{Api, EOS, Nats, chat};
use crate::usual;

const CHAT: &str = "/v1/chat/completions";

/// An answer as it came over HTTP/1.1, chunks put together.
pub struct Raw {
    pub status: u16,
    head: String,
    body: Vec<u8>,
}

impl Raw {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

pub async fn ask(api: &Api, line: &str, headers: &[&str], body: &[u8]) -> Raw {
    let mut head = format!("{line} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n");
    for header in headers {
        head += &format!("{header}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", body.len());
    let mut connection = api.connect().await;
    // At once: a server that refuses a body need not wait for it.
    let all = [head.as_bytes(), body].concat();
    connection.write(&all).await.unwrap();
    let bytes = crate::support::within("the answer", connection.finish_bytes()).await;
    let at = bytes
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .unwrap();
    let head = String::from_utf8(bytes[..at].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = bytes[at + 4..].to_vec();
    let is_chunked = head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked");
    let body = if is_chunked { joined(&body) } else { body };
    Raw { status, head, body }
}

/// A chunked body's chunks as one.
fn joined(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let at = rest.windows(2).position(|two| two == b"\r\n").unwrap();
        let bytes = usize::from_str_radix(std::str::from_utf8(&rest[..at]).unwrap(), 16).unwrap();
        if bytes == 0 {
            return body;
        }
        body.extend_from_slice(&rest[at + 2..at + 2 + bytes]);
        rest = &rest[at + 4 + bytes..];
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_and_chats_as_tokens_and_back() {
    let nats = Nats::start().await;
    // No worker is needed.
    let api = Api::start(&nats).await;
    let tokens = |body: Value| {
        let api = &api;
        async move {
            let response = api.post("/tokenize", body).await;
            assert_eq!(response.status, 200, "{}", response.body);
            response.json()
        }
    };
    let text = tokens(json!({"model": "tiny", "prompt": "hé <|end|>"})).await;
    let ids = json!([104, 195, 169, 32, EOS]);
    assert_eq!(
        text,
        json!({"count": 5, "max_model_len": 1000, "tokens": ids, "token_strs": null})
    );
    let named = tokens(json!({"prompt": "h <|end|>", "return_token_strs": true})).await;
    assert_eq!(named["token_strs"], json!(["h", "Ġ", "<|end|>"]));
    let messages = json!([{"role": "user", "content": "a"}]);
    let turn = tokens(json!({"messages": messages})).await;
    assert_eq!(turn["count"], "<user>a\n<assistant>".len());
    let bare = tokens(json!({"messages": messages, "continue_final_message": true})).await;
    assert_eq!(bare["count"], "<user>a".len());

    let response = api.post("/detokenize", json!({"tokens": ids})).await;
    assert_eq!(response.json(), json!({"prompt": "hé <|end|>"}));
    for (path, body, status, param) in [
        ("/detokenize", json!({"tokens": [258]}), 400, "tokens"),
        ("/detokenize", json!({"tokens": "a"}), 400, "tokens"),
        ("/detokenize", json!({}), 400, "tokens"),
        (
            "/tokenize",
            json!({"prompt": "a", "messages": messages}),
            400,
            "prompt",
        ),
        ("/tokenize", json!({}), 400, "prompt"),
        (
            "/tokenize",
            json!({"prompt": "a", "model": "b"}),
            404,
            "model",
        ),
        (
            "/tokenize",
            json!({"prompt": "a", "temperature": 1}),
            400,
            "temperature",
        ),
    ] {
        let response = api.post(path, body.clone()).await;
        assert_eq!(response.status, status, "{body}: {}", response.body);
        assert_eq!(response.json()["error"]["param"], param, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_get_answers_head_does_too() {
    let (_nats, _context, _decode, api) = usual().await;
    for path in [
        "/health",
        "/ping",
        "/live",
        "/metrics",
        "/cluster",
        "/requests",
        "/version",
        "/v1/models",
        "/v1/models/tiny",
    ] {
        let get = ask(&api, &format!("GET {path}"), &[], b"").await;
        let head = ask(&api, &format!("HEAD {path}"), &[], b"").await;
        assert_eq!((get.status, head.status), (200, 200), "{path}");
        assert!(!get.body.is_empty() && head.body.is_empty(), "{path}");
        assert_eq!(get.header("content-type"), head.header("content-type"));
        let put = ask(&api, &format!("PUT {path}"), &[], b"").await;
        assert_eq!(put.status, 405, "{path}");
    }
    assert_eq!(ask(&api, "POST /ping", &[], b"").await.status, 200);
    assert_eq!(
        ask(&api, "HEAD /v1/models/other", &[], b"").await.status,
        404
    );
    let version = ask(&api, "GET /version", &[], b"").await.json();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_are_neither_compacted_nor_cancelled() {
    let (_nats, _context, _decode, api) = usual().await;
    let asked = json!({"model": "tiny", "input": "a", "max_output_tokens": 2});
    let compacted = api.post("/v1/responses/compact", asked.clone()).await;
    assert_eq!(compacted.status, 404, "{}", compacted.body);
    assert_eq!(compacted.json()["error"]["code"], "not_found");

    let made = api.post("/v1/responses", asked).await.json();
    let cancel = |id: &str| {
        let path = format!("/v1/responses/{id}/cancel");
        let api = &api;
        async move { api.post(&path, json!({})).await }
    };
    let over = cancel(made["id"].as_str().unwrap()).await;
    assert_eq!(over.status, 400, "{}", over.body);
    assert_eq!(over.json()["error"]["param"], "response_id");
    let unknown = cancel("resp_none").await;
    assert_eq!(unknown.status, 404, "{}", unknown.body);
    assert_eq!(unknown.json()["error"]["code"], "response_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_says_which_request_it_is_of() {
    let (_nats, mut context, _decode, api) = usual().await;
    let typed = "Content-Type: application/json";
    let body = chat(json!({"max_tokens": 1})).to_string();
    for path in [
        "GET /health",
        "GET /nothing",
        "POST /v1/models",
        "POST /v1/completions",
    ] {
        let given = ask(&api, path, &["X-Request-Id: trace-7", typed], b"{").await;
        assert_eq!(given.header("x-request-id"), Some("trace-7"), "{path}");
        let made = ask(&api, path, &["X-Request-Id: no \"quotes\"", typed], b"{").await;
        let name = made.header("x-request-id").unwrap();
        assert!(
            name.len() == 32 && name.chars().all(|c| c.is_ascii_hexdigit()),
            "{name}"
        );
    }
    let answer = ask(&api, &format!("POST {CHAT}"), &[typed], body.as_bytes()).await;
    let name = answer.header("x-request-id").unwrap().to_owned();
    assert_eq!(answer.json()["id"], format!("chatcmpl-{name}"));
    let job = context.prefills.recv().await.unwrap();
    assert_eq!(
        job.request.to_string(),
        name,
        "one name from the client to the workers"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_a_form_could_send_is_refused() {
    let (_nats, mut context, _decode, api) = usual().await;
    let body = chat(json!({})).to_string();
    for path in [CHAT, "/v1/completions", "/tokenize", "/detokenize"] {
        for kind in [
            &["Content-Type: text/plain"][..],
            &["Content-Type: application/x-www-form-urlencoded"],
            &["Content-Type: multipart/form-data; boundary=x"],
            &["Content-Type: application/jsonp"],
            &["Content-Type:"],
            &[],
        ] {
            let answer = ask(&api, &format!("POST {path}"), kind, body.as_bytes()).await;
            assert_eq!(answer.status, 415, "{path} {kind:?}");
            let error = &answer.json()["error"];
            assert_eq!(error["code"], "unsupported_media_type");
            assert!(
                error["message"]
                    .as_str()
                    .unwrap()
                    .contains("Content-Type: application/json")
            );
        }
    }
    assert!(context.prefills.try_recv().is_err());
    for kind in [
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/problem+json",
    ] {
        let kind = format!("Content-Type: {kind}");
        let answer = ask(&api, &format!("POST {CHAT}"), &[&kind], body.as_bytes()).await;
        assert_eq!(answer.status, 200, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_others_may_ask_only_if_they_are_named() {
    let (nats, _context, _decode, closed) = usual().await;
    let open = Api::with(&nats, |config| {
        config.name = baton_protocol::ApiServerId::new("open").unwrap();
        config.origins = Origins::parse(["https://a.example"]).unwrap();
        config.api_keys = baton_api_server::ApiKeys::parse("0123456789abcdef").unwrap();
    })
    .await;
    let preflight = [
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: content-type, authorization",
    ];
    let (ours, other) = ("Origin: https://a.example", "Origin: https://b.example");
    let question = format!("OPTIONS {CHAT}");
    let yes = ask(&open, &question, &[ours, preflight[0], preflight[1]], b"").await;
    assert_eq!(yes.status, 204, "without a key: the question carries none");
    assert_eq!(
        yes.header("access-control-allow-origin"),
        Some("https://a.example")
    );
    assert_eq!(
        yes.header("access-control-allow-headers"),
        Some("content-type, authorization")
    );
    let models = ask(&open, "GET /v1/models", &[ours], b"").await;
    assert_eq!(models.status, 401, "what follows the question needs one");
    assert_eq!(
        models.header("access-control-allow-origin"),
        Some("https://a.example")
    );
    assert!(
        models
            .header("vary")
            .unwrap()
            .eq_ignore_ascii_case("origin")
    );
    for (api, origin) in [(&open, other), (&closed, ours), (&closed, "Origin: null")] {
        for line in [&question, "GET /health"] {
            let no = ask(api, line, &[origin, preflight[0]], b"").await;
            assert!(
                no.header("access-control-allow-origin").is_none(),
                "{line} {origin}"
            );
            assert_ne!(no.status, 204);
        }
    }
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_may_be_compressed_and_are_bounded_all_the_same() {
    let (_nats, _context, _decode, api) = usual().await;
    let line = format!("POST {CHAT}");
    let (typed, gzip) = ("Content-Type: application/json", "Content-Encoding: gzip");
    let body = packed(
        chat(json!({"user": "x".repeat(100_000)}))
            .to_string()
            .as_bytes(),
    );
    let answer = ask(&api, &line, &[typed, gzip], &body).await;
    assert_eq!(answer.status, 200, "{}", answer.head);
    let bomb = packed(&vec![b' '; (16 << 20) + 1]);
    assert!(bomb.len() < 100_000);
    for (body, header, status) in [
        (&bomb, gzip, 413),
        (&body[..body.len() - 3].to_vec(), gzip, 400),
        (&b"{}".to_vec(), gzip, 400),
        (&body, "Content-Encoding: br", 415),
    ] {
        let answer = ask(&api, &line, &[typed, header], body).await;
        assert_eq!(
            answer.status,
            status,
            "{:?}",
            String::from_utf8_lossy(&answer.body)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_are_compressed_for_who_takes_it_and_streams_never() {
    let (_nats, _context, _decode, api) = usual().await;
    let ask_for = |more: Value, headers: &'static [&'static str]| {
        let api = &api;
        let body = chat(more).to_string();
        async move { ask(api, &format!("POST {CHAT}"), headers, body.as_bytes()).await }
    };
    const PLAIN: &[&str] = &["Content-Type: application/json"];
    const GZIP: &[&str] = &[
        "Content-Type: application/json",
        "Accept-Encoding: gzip, deflate",
    ];
    let more = json!({"logprobs": true, "top_logprobs": 20, "max_tokens": 60, "n": 8});
    let (plain, small) = (
        ask_for(more.clone(), PLAIN).await,
        ask_for(more, GZIP).await,
    );
    assert_eq!(small.header("content-encoding"), Some("gzip"));
    assert!(plain.header("content-encoding").is_none());
    assert!(small.body.len() < plain.body.len() / 4);
    let mut text = Vec::new();
    GzDecoder::new(&small.body[..])
        .read_to_end(&mut text)
        .unwrap();
    let text: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(text["choices"], plain.json()["choices"]);
    for more in [json!({"stream": true}), json!({"max_tokens": 2})] {
        let answer = ask_for(more, GZIP).await;
        assert_eq!(answer.status, 200);
        assert!(
            answer.header("content-encoding").is_none(),
            "{}",
            answer.head
        );
    }
}
