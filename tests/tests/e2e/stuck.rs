//! Something inside of a process hangs: it is seen, said, and ended, to be started again; and every request is answered rightly.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use baton_tests::{Cluster, Frozen, PATIENCE, Setup, Signal, Turn, eventually};
use serde_json::{Value, json};

/// Longer than a desk may stand still, so that a worker that was stopped for as long must be told from one that hangs.
const STOPPED: Duration = Duration::from_secs(18);

/// A context worker, four decode workers of which one stays well, a worker that is stopped as a whole, and two API servers of
/// which one hangs.
#[tokio::test]
async fn what_hangs_is_seen_and_ended_and_what_was_stopped_is_not() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake:3000",
        both: 1,
        kv_mib: 16,
        ..Setup::split(1, 4)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    cluster.add_api_server(&[]);
    cluster.ready().await;
    let model = cluster.model().await;
    let request = |number: u32| json!({"model": model, "prompt": format!("This is text {number}"), "max_tokens": 1000, "ignore_eos": true, "temperature": 0});
    let expected = cluster.api.complete(&request(0)).await["choices"].clone();

    let from = cluster.tap.now();
    let mut answers = Vec::new();
    for number in 0..16 {
        let (api, request) = (cluster.api.clone(), request(number % 4));
        let asked = cluster.tap.now();
        answers.push(tokio::spawn(async move { api.complete(&request).await }));
        // One after the other: while prompts wait, none would be given to the worker that does both.
        cluster.tap.wait_kind("decode", asked, PATIENCE).await;
    }
    for name in ["decode-0", "decode-1", "decode-2", "both-0"] {
        let has_tokens = |message: &baton_tests::Message| {
            (message.is("tokens") && message.subject.ends_with(name)).then_some(())
        };
        cluster.tap.wait(name, from, PATIENCE, has_tokens).await;
    }
    cluster.signal("both-0", Signal::Stop);
    let stopped = tokio::time::Instant::now();
    let mut api_server = cluster.api_servers.pop().expect("the second");
    let frozen = [
        ("decode-0", "engine"),
        ("decode-1", "baton"),
        ("decode-2", "baton-ucx"),
    ]
    .map(|(name, thread)| Frozen::threads(cluster.worker(name).process.id(), thread));

    let frozen_too = Frozen::threads(api_server.process.id(), "tokio-rt-worker");

    // Said: by the worker itself, where it still can, else by its silence.
    for (name, words) in [("decode-1", "silent"), ("decode-0", "the executor hangs")] {
        eventually(
            &format!("/health to say that {name} is {words}"),
            PATIENCE,
            async || {
                let health = cluster.api.look("/health").await?;
                let notes = health.body["degraded"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                let said = |note: &Value| {
                    note.as_str()
                        .is_some_and(|note| note.contains(name) && note.contains(words))
                };
                match notes.iter().any(said) {
                    true => Ok(()),
                    false => Err(health.body.to_string()),
                }
            },
        )
        .await;
    }

    // Answered, whoever had it.
    let texts: Vec<_> = (0..4).map(request).collect();
    let mut by_text = vec![expected];
    for text in &texts[1..] {
        by_text.push(cluster.api.complete(text).await["choices"].clone());
    }
    for (number, answer) in answers.into_iter().enumerate() {
        let answer = answer.await.expect("answered");
        assert_eq!(answer["choices"], by_text[number % 4], "answer {number}");
    }

    // Ended, with an error that names it.
    for (name, sentence) in [
        (
            "decode-0",
            "the executor hangs: fake:3000 has been at one step for 5 s",
        ),
        ("decode-1", "the worker's desk has not gone round for 15 s"),
        (
            "decode-2",
            "KV transfer hangs: its thread has not gone round for 15 s",
        ),
    ] {
        let mut worker = cluster.take(name);
        let status = worker.process.end(PATIENCE).await;
        assert!(!status.success(), "{name}: {status}");
        let log = worker.process.log();
        assert!(log.contains(sentence), "{name}: {log}");
    }
    let status = api_server.process.end(PATIENCE).await;
    assert_eq!(status.signal(), Some(6), "{status}");
    let log = api_server.process.log();
    let sentence = "the API server's bus loop has not gone round for 15 s";
    assert!(log.contains(sentence), "{log}");
    drop((frozen, frozen_too));

    // What was stopped as a whole hangs in nothing: it goes on.
    tokio::time::sleep_until(stopped + STOPPED).await;
    cluster.signal("both-0", Signal::Continue);
    cluster.ready().await;
    cluster.drained(PATIENCE).await;
    assert!(cluster.worker("both-0").process.ended().is_none());
}
