//! Workers that did not hear that a request is theirs no more, and go on with it.

use baton_protocol::Role;
use serde_json::json;

use crate::support::{Script, TEXT, Worker, chat, within};
use crate::{text_of, usual};

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_on_after_the_end_is_told_again() {
    let (_nats, _context, mut decode, api) = usual().await;
    decode.script.lock().unwrap().waits_at = Some(30);
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 100, "stop": "rld! Th"});
    let answer = api.post("/v1/completions", body).await;
    assert_eq!(answer.json()["choices"][0]["text"], "Hello, wö");
    assert_eq!(decode.aborted().await.reason, "stop string found");
    decode.go_on.send_replace(true);
    assert_eq!(decode.aborted().await.reason, "it is over");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_on_with_what_another_has_is_told_again() {
    let (nats, _context, mut lost, api) = usual().await;
    lost.script.lock().unwrap().waits_at = Some(12);
    let body = chat(json!({"stream": true})).to_string();
    let mut connection = api
        .open("POST", "/v1/chat/completions", body.as_bytes())
        .await;
    connection.read_until("w").await;
    lost.beats.send_replace(false);
    let script = Script {
        waits_at: Some(40),
        ..Script::default()
    };
    let mut other = Worker::start(&nats, "d2", Role::Decode, script).await;
    assert_eq!(lost.aborted().await.reason, "worker lost");
    within("the retry", other.decodes.recv()).await.unwrap();
    lost.go_on.send_replace(true);
    assert_eq!(lost.aborted().await.reason, "another worker has it now");
    other.go_on.send_replace(true);
    let response = within("the answer", connection.finish()).await;
    assert_eq!(text_of(&response.events(), 0), TEXT);
    assert!(other.aborts.try_recv().is_err(), "it has it rightly");
}
