//! API keys over HTTP.

use baton_api_server::ApiKeys;
use baton_protocol::Role;
use serde_json::json;

use crate::support::{Api, Nats, Script, TEXT, Worker, chat, within};

const KEYS: &str = "anna sk-anna-0123456789\nbert sk-bert-0123456789\n";
const ANNA: Option<&str> = Some("sk-anna-0123456789");
const BERT: Option<&str> = Some("sk-bert-0123456789");

async fn guarded(in_flight_max: Option<usize>) -> (Nats, Worker, Worker, Api) {
    let nats = Nats::start().await;
    let context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let keys = ApiKeys::parse(KEYS).unwrap();
    let keys = keys.with_in_flight_max(in_flight_max);
    let mut api = Api::with(&nats, |config| config.api_keys = keys).await;
    api.key = ANNA;
    api.sees(2).await;
    (nats, context, decode, api)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_only_the_state_of_the_server_is_told() {
    let (_nats, mut context, _decode, mut api) = guarded(None).await;
    let body = chat(json!({})).to_string();
    for key in [None, Some("sk-anna-0123456780"), Some("")] {
        api.key = key;
        for (method, path) in [
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/tiny"),
            ("GET", "/cluster"),
            ("GET", "/requests"),
            ("GET", "/nowhere"),
            ("GET", "/health/../cluster"),
        ] {
            let response = api.send(method, path, body.as_bytes()).await;
            assert_eq!(response.status, 401, "{method} {path}");
            assert_eq!(response.json()["error"]["code"], "invalid_api_key");
            assert!(response.head.contains("www-authenticate: bearer"));
        }
        for path in ["/health", "/live", "/metrics"] {
            assert_eq!(api.get(path).await.0, 200, "{path}");
        }
    }
    assert!(context.prefills.try_recv().is_err(), "nothing was begun");
    let metrics = api.get("/metrics").await.1;
    assert!(
        metrics.contains("baton_errors_total{reason=\"unauthorized\"} 24"),
        "{metrics}"
    );
    api.key = BERT;
    let response = api.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(response.json()["choices"][0]["message"]["content"], TEXT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keys_bound_counts_its_own_choices_until_they_end() {
    let (_nats, _context, mut decode, mut api) = guarded(Some(3)).await;
    decode.script.lock().unwrap().waits_at = Some(10);
    let path = "/v1/chat/completions";
    let mut under_way = Vec::new();
    for stream in [false, true] {
        let body = chat(json!({"stream": stream, "max_tokens": 20})).to_string();
        under_way.push(api.open("POST", path, body.as_bytes()).await);
        within("the decode job", decode.decodes.recv())
            .await
            .unwrap();
    }
    let refused = api.post(path, chat(json!({"n": 2}))).await;
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.head.contains("retry-after: "), "{}", refused.head);
    assert!(refused.body.contains("API key"), "{}", refused.body);
    // Another key has a bound of its own.
    api.key = BERT;
    let body = chat(json!({"n": 3, "max_tokens": 20})).to_string();
    under_way.push(api.open("POST", path, body.as_bytes()).await);
    within("the decode job", decode.decodes.recv())
        .await
        .unwrap();
    decode.go_on.send_replace(true);
    for connection in &mut under_way {
        assert_eq!(within("the answer", connection.finish()).await.status, 200);
    }
    api.key = ANNA;
    assert_eq!(api.post(path, chat(json!({"n": 3}))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_gives_its_place_back() {
    let (_nats, _context, mut decode, api) = guarded(Some(1)).await;
    decode.script.lock().unwrap().waits_at = Some(10);
    let body = chat(json!({"stream": true, "max_tokens": 20})).to_string();
    let connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    within("the decode job", decode.decodes.recv())
        .await
        .unwrap();
    drop(connection);
    decode.go_on.send_replace(true);
    within("a place", async {
        while api
            .post("/v1/chat/completions", chat(json!({})))
            .await
            .status
            == 429
        {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_drained_by_who_has_a_key_and_by_nobody_where_there_are_none() {
    let (_nats, _context, decode, mut api) = guarded(None).await;
    let drain = async |api: &Api, worker: &str| {
        let path = format!("/workers/{worker}/drain");
        api.send("POST", &path, b"").await
    };
    let unanswered = drain(&api, "d1").await;
    assert_eq!(unanswered.status, 504, "{}", unanswered.body);
    assert!(
        unanswered.body.contains("d1 did not answer in 3 s") && unanswered.body.contains("SIGTERM")
    );
    decode.script.lock().unwrap().drains = Some(false);
    let another_life = drain(&api, "d1").await;
    assert_eq!(another_life.status, 503, "{}", another_life.body);
    decode.script.lock().unwrap().drains = Some(true);
    let done = drain(&api, "d1").await;
    assert_eq!(
        (done.status, &done.json()["state"]),
        (202, &json!("draining")),
        "{}",
        done.body
    );
    let unknown = drain(&api, "nobody").await;
    assert_eq!(unknown.status, 404);
    assert!(unknown.body.contains("nobody"), "{}", unknown.body);
    assert_eq!(api.send("GET", "/workers/d1/drain", b"").await.status, 405);
    api.key = None;
    assert_eq!(drain(&api, "d1").await.status, 401);

    let nats = Nats::start().await;
    let worker = Worker::start(
        &nats,
        "d1",
        Role::Decode,
        Script {
            drains: Some(true),
            ..Script::default()
        },
    )
    .await;
    let open = Api::with(&nats, |_| {}).await;
    open.sees(1).await;
    let refused = drain(&open, "d1").await;
    assert_eq!(refused.status, 403, "{}", refused.body);
    assert!(refused.body.contains("--api-keys-file"), "{}", refused.body);
    drop(worker);
}
