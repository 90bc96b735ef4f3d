//! Jobs for whoever cannot do them, and peers that are not who they say.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use baton_protocol::{Incarnation, Load, Role, WorkerId};
use bytes::Bytes;
use serde_json::{Value, json};

use super::forged::Forged;
use super::scene::Scene;
use super::target::{COMPLETIONS, Outcome, Target};
use crate::fixture::repository;
use crate::process::Signal;
use crate::wait::{PATIENCE, eventually};

/// A worker answers a job that it does not take at once.
const REFUSED_WITHIN: Duration = Duration::from_secs(5);

/// Clients that ask while roles are swapped.
const LOAD: usize = 16;

/// How long a liar or a namesake stays: some beats.
const STAYS: Duration = Duration::from_secs(6);

/// Prefill jobs at decode workers and the reverse: refused, by a reason that says which of the two is meant.
pub async fn wrong_role(scene: &mut Scene<'_>) -> Vec<String> {
    let client = scene.stranger().await;
    let subjects = scene.subjects();
    let beat = scene.beat(Role::Context).await;
    let name = |name: &str| WorkerId::new(name).expect("a plain name");
    let mut wrong = Vec::new();
    for (file, subject) in [
        ("prefill_job.json", subjects.prefill(&name("decode-0"))),
        ("decode_job.json", subjects.decode(&name("context-0"))),
    ] {
        let path = repository().join("protocol/messages/v2").join(file);
        let text = std::fs::read(&path).expect("a sample message");
        let mut job: Value = serde_json::from_slice(&text).expect("JSON");
        job["model"] = json!(beat.model.fingerprint);
        job["api_server"] = json!("hostile");
        let asked = client.request(subject.clone(), job.to_string().into());
        match tokio::time::timeout(REFUSED_WITHIN, asked).await {
            Ok(Ok(answer)) => {
                let answer: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
                let reason = answer["refusal"]["reason"].as_str();
                if reason != Some("wrong_role") {
                    wrong.push(format!("{subject}: {answer}"));
                }
            }
            other => wrong.push(format!("{subject}: {other:?}")),
        }
    }
    wrong
}

/// A context worker and a decode worker are started again, each in the other's role: jobs that were on their way to the
/// former role are done elsewhere.
pub async fn swapped_roles(scene: &mut Scene<'_>) -> Vec<String> {
    let target = scene.target.clone();
    let over = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..LOAD)
        .map(|number| tokio::spawn(ask(target.clone(), number, Arc::clone(&over))))
        .collect();
    let cluster = &mut scene.cluster;
    for swapped in [true, false] {
        // A worker that leaves says so first; one that is killed does not.
        let signal = if swapped {
            Signal::Kill
        } else {
            Signal::Terminate
        };
        let [context, decode] = match swapped {
            true => [Role::Decode, Role::Context],
            false => [Role::Context, Role::Decode],
        };
        for name in ["context-1", "decode-1"] {
            cluster.signal(name, signal);
        }
        for (name, role) in [("context-1", context), ("decode-1", decode)] {
            let mut former = cluster.take(name);
            former.process.end(PATIENCE).await;
            cluster.restart(name, role);
        }
        cluster.ready().await;
    }
    over.store(true, Relaxed);
    let mut wrong = Vec::new();
    for client in load {
        wrong.extend(client.await.unwrap_or_else(|error| vec![error.to_string()]));
    }
    wrong
}

/// Asks until it is over, and gives the answers that are neither answers nor a word to come again.
async fn ask(target: Target, number: usize, over: Arc<AtomicBool>) -> Vec<String> {
    let mut wrong = Vec::new();
    while !over.load(Relaxed) {
        let body = target.body(
            &json!({"prompt": format!("A swap {number}"), "max_tokens": 8, "ignore_eos": true}),
        );
        match target.post(COMPLETIONS, body.to_string(), PATIENCE).await {
            Outcome::Answered(200 | 503, _) => {}
            other => wrong.push(format!("while roles were swapped: {other:?}")),
        }
    }
    wrong
}

/// A decode worker with nothing to do, as it says, calls every job malformed, or something that nobody knows yet: it is done
/// by another.
pub async fn liar(scene: &mut Scene<'_>) -> Vec<String> {
    let client = scene.stranger().await;
    let mut liars = Vec::new();
    for (number, refusal) in [
        json!({"reason": "malformed", "detail": "so it is"}),
        json!({"reason": "of_another_version", "detail": {"deep": [1]}}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut beat = scene.beat(Role::Decode).await;
        beat.worker = WorkerId::new(format!("liar-{number}")).expect("a plain name");
        beat.incarnation = Incarnation(77 + number as u64);
        beat.load = Load::default();
        let answer =
            Bytes::from(json!({"outcome": "refused", "v": 2, "refusal": refusal}).to_string());
        let answers = move |kind: &str| (kind == "decode").then(|| answer.clone());
        liars.push(Forged::join(&client, &scene.subjects(), &beat, answers).await);
    }
    let begun = Instant::now();
    while begun.elapsed() < STAYS && liars.iter().any(|liar| liar.asked("decode") < 20) {
        let body = scene
            .target
            .body(&json!({"prompt": "A liar", "max_tokens": 2}))
            .to_string();
        let _ = scene.target.post(COMPLETIONS, body, PATIENCE).await;
    }
    let idle = liars
        .iter()
        .filter(|liar| liar.asked("decode") == 0)
        .count();
    drop(liars);
    gone(scene, "liar-").await;
    match idle {
        0 => Vec::new(),
        _ => vec![format!(
            "{idle} liars were never asked: the attack did not reach anybody"
        )],
    }
}

/// A second API server under the name of the first: it says so and does not serve, and whom the first serves sees nothing.
pub async fn namesake(scene: &mut Scene<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    let second = scene
        .cluster
        .add_api_server(&["--api-server-name", "api-0"]);
    let begun = Instant::now();
    let mut served = false;
    while begun.elapsed() < STAYS {
        served |= second
            .look("/health")
            .await
            .is_ok_and(|health| health.status == 200);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    if served {
        wrong.push("the second API server of a name says that it is healthy".to_owned());
    }
    let mut second = scene.cluster.api_servers.pop().expect("it was just added");
    let log = second.process.log();
    if !log.contains("another API server") {
        wrong.push(format!("the second API server does not say why: {log}"));
    }
    second.process.kill();
    eventually("/health to be green again", PATIENCE, async || {
        let health = scene.cluster.api.look("/health").await?;
        match health.status {
            200 => Ok(()),
            _ => Err(health.body.to_string()),
        }
    })
    .await;
    wrong
}

/// Waits until the API server has forgotten the workers of this prefix.
pub async fn gone(scene: &Scene<'_>, prefix: &str) {
    eventually("forged workers to be gone", PATIENCE, async || {
        let known = scene.cluster.known_workers().await?;
        match known.keys().find(|name| name.starts_with(prefix)) {
            Some(name) => Err(format!("/cluster shows {name}")),
            None => Ok(()),
        }
    })
    .await;
}
