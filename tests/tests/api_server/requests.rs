//! `GET /requests`: what runs, and where the last requests' time went.

use baton_protocol::Role;
use serde_json::{Value, json};

use crate::support::{Api, Nats, Script, TEXT, Worker, chat, within};

async fn requests(api: &Api) -> (Value, String) {
    let (status, body) = api.get("/requests").await;
    assert_eq!(status, 200, "{body}");
    (serde_json::from_str(&body).unwrap(), body)
}

/// Looks until what is told is as it is awaited.
async fn told(api: &Api, what: &str, is: impl Fn(&Value) -> bool) -> (Value, String) {
    within(what, async {
        loop {
            let (told, body) = requests(api).await;
            if is(&told) {
                return (told, body);
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn those_under_way_are_told_with_where_they_stand() {
    let nats = Nats::start().await;
    let script = Script {
        waits_at: Some(5),
        ..Script::default()
    };
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let decode = Worker::start(&nats, "d1", Role::Decode, script).await;
    let api = Api::start(&nats).await;
    api.sees(2).await;
    let (nothing, _) = requests(&api).await;
    let idle = json!({"running": 0, "waiting": 0, "tokens_per_second": 0.0, "ttft_p50_ms": null});
    assert_eq!(nothing["totals"], idle);
    assert_eq!(nothing["running"], json!([]));

    let said = "a secret that nobody is to read here";
    let body = chat(json!({
        "messages": [{"role": "user", "content": said}], "stream": true, "max_tokens": 20, "service_tier": "flex", "priority": -3,
    }));
    let path = "/v1/chat/completions";
    let mut connection = api.open("POST", path, body.to_string().as_bytes()).await;
    let (running, body) = told(&api, "its tokens", |told| {
        told["running"][0]["output_tokens"].as_u64() >= Some(5)
    })
    .await;
    let [row] = running["running"].as_array().unwrap().as_slice() else {
        panic!("{body}");
    };
    assert_eq!([&row["phase"], &row["tier"]], ["decoding", "batch"]);
    assert_eq!(
        [&row["context_worker"], &row["decode_worker"]],
        ["c1", "d1"]
    );
    assert_eq!([&row["output_tokens"], &row["priority"]], [5, 3]);
    assert!(row["prompt_tokens"].as_u64() > Some(0), "{body}");
    let (age, ttft) = (row["age_ms"].as_f64(), row["ttft_ms"].as_f64());
    assert!(ttft > Some(0.0) && age > ttft, "{body}");
    let totals = &running["totals"];
    assert_eq!([&totals["running"], &totals["waiting"]], [1, 0]);
    assert!(totals["tokens_per_second"].as_f64() > Some(0.0), "{body}");
    // The beginning of an id, which no response can be read by, and no text.
    assert_eq!(row["id"].as_str().map(str::len), Some(8), "{body}");
    for text in ["secret", TEXT, "chatcmpl"] {
        assert!(!body.contains(text), "{text} in {body}");
    }

    decode.go_on.send_replace(true);
    let answer = within("the answer", connection.finish()).await;
    assert_eq!(answer.status, 200);
    let id = row["id"].as_str().unwrap();
    assert!(
        answer.body.contains(&format!("chatcmpl-{id}")),
        "{}",
        answer.body
    );
    let (ended, body) = told(&api, "its end", |told| told["running"] == json!([])).await;
    assert_eq!(ended["requests"][0]["outcome"], "length", "{body}");
    let first = ended["totals"]["ttft_p50_ms"].as_f64();
    assert!(first.is_some_and(|ms| ms > 0.0), "{body}");
}

/// Where nobody has a place for its KV, a request waits, and is counted so.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_waits_for_a_worker_is_told_so() {
    let nats = Nats::start().await;
    let busy = Script {
        busy: true,
        ..Script::default()
    };
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let _decode = Worker::start(&nats, "d1", Role::Decode, busy).await;
    let api = Api::start(&nats).await;
    api.sees(2).await;
    let body = chat(json!({})).to_string();
    let connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    let (waiting, body) = told(&api, "a wait", |told| {
        told["running"][0]["phase"] == "staged" && told["running"][0]["decode_worker"] == "d1"
    })
    .await;
    let (row, totals) = (&waiting["running"][0], &waiting["totals"]);
    assert_eq!([&totals["running"], &totals["waiting"]], [0, 1], "{body}");
    // Its context worker has sent its first token with the KV's handle.
    assert_eq!(row["output_tokens"], 1, "{body}");
    assert!(row["ttft_ms"].as_f64() > Some(0.0), "{body}");
    // A client that leaves takes it along.
    drop(connection);
    told(&api, "nothing", |told| told["running"] == json!([])).await;
}
