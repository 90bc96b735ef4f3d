//! Too much of everything.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use baton_protocol::{
    Beat, FrameItem, Incarnation, PROTOCOL_VERSION, PackedTokens, PeerState, PrefillJob, RequestId,
    Role, TokenFrame, WorkerId,
};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use serde_json::json;

use super::jobs::gone;
use super::scene::Scene;
use super::target::{CHAT, COMPLETIONS, Outcome, Target};
use crate::freeze::Frozen;
use crate::wait::PATIENCE;

/// Faults of clients may leave so much in a log: a line now and then.
const CLIENT_FAULTS_LOG_MAX: u64 = 64 << 10;

/// The largest `/cluster` of a handful of workers, forged ones included.
const CLUSTER_BYTES_MAX: usize = 1 << 20;

/// How long threads are stopped: shorter than what silence of a process leads to.
const STOPPED: Duration = Duration::from_secs(3);

/// What a flood may make a process hold more than before. Its inboxes are bounded to some 64 MiB, and allocators round up.
const GROWTH_MAX: usize = 192 << 20;

/// Bytes of nonsense that a flood sends to a subject at once, items of a frame (some 100 bytes each), and the pause after them:
/// some 60 MB a second.
const PIECE: usize = 16 << 10;
const FRAME_ITEMS: usize = 5_000;
const PACE: Duration = Duration::from_millis(8);

/// The stream that frames are sent for lasts longer than the attack; its request is known on the bus by its `max_tokens`.
const VICTIM_TOKENS: u32 = 60_001;
const VICTIM_STAYS: Duration = Duration::from_secs(60);

/// Malformed HTTP requests of every kind: refused, and no errors of ours.
pub async fn malformed(scene: &mut Scene<'_>) -> Vec<String> {
    let (log, errors) = (scene.api_server().log_bytes(), errors(scene));
    let target = &scene.target;
    let wrong: Vec<String> = stream::iter(0..5_000)
        .map(|number| one_malformed(target, number))
        .buffer_unordered(64)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    let mut all = Vec::new();
    if let Some(first) = wrong.first() {
        all.push(format!(
            "{} of 5,000 were not refused: {first}",
            wrong.len()
        ));
    }
    let logged = scene.api_server().log_bytes() - log;
    let told = self::errors(scene) - errors;
    if told > 0 || logged > CLIENT_FAULTS_LOG_MAX {
        all.push(format!(
            "clients' faults made {told} ERROR lines, {logged} bytes of log"
        ));
    }
    all
}

/// One malformed request.
pub async fn one_malformed(target: &Target, number: usize) -> Option<String> {
    let model = &target.model;
    // What is no HTTP at all has no answer that must be.
    let raw: [&[u8]; 4] = [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost : \x00\xff\r\n\r\n",
    ];
    if number.is_multiple_of(4) {
        target
            .say(raw[number / 4 % raw.len()], Duration::from_secs(10))
            .await;
        return None;
    }
    let (path, body) = match number / 4 % 8 {
        0 => (COMPLETIONS, "{\"model\": ".to_owned()),
        1 => (
            COMPLETIONS,
            format!(
                "{{\"model\": \"{model}\", \"prompt\": {}}}",
                "[".repeat(2_000)
            ),
        ),
        2 => (
            COMPLETIONS,
            json!({"model": model, "prompt": "x", "max_tokens": -1}).to_string(),
        ),
        3 => (
            CHAT,
            json!({"model": model, "messages": [{"role": 5}]}).to_string(),
        ),
        4 => (
            CHAT,
            json!({"model": "nobody's", "messages": []}).to_string(),
        ),
        5 => ("/v1/nothing", "x".repeat(1_000)),
        6 => (
            COMPLETIONS,
            json!({"model": model, "prompt": [1, 4_000_000_000_u32]}).to_string(),
        ),
        _ => (CHAT, String::from_utf8_lossy(&[0xff; 100]).into_owned()),
    };
    match target.post(path, body, Duration::from_secs(10)).await {
        Outcome::Answered(503, body) => Some(format!("503 {body}")),
        outcome => outcome.is_no_refusal(),
    }
}

fn errors(scene: &Scene<'_>) -> usize {
    scene
        .api_server()
        .log()
        .lines()
        .filter(|line| line.contains("ERROR"))
        .count()
}

/// Beats of workers that are none, each of megabytes.
pub async fn beats(scene: &mut Scene<'_>) -> Vec<String> {
    let client = scene.stranger().await;
    let subjects = scene.subjects();
    let beat = scene.beat(Role::Decode).await;
    let peer = beat
        .peers
        .first()
        .cloned()
        .expect("a decode worker has peers");
    for number in 0..60_u64 {
        let mut forged = beat.clone();
        forged.worker = WorkerId::new(format!("forged-{number}")).expect("a plain name");
        forged.incarnation = Incarnation(1_000 + number);
        match number % 3 {
            0 => forged.device = "x".repeat(3_500_000),
            1 => forged.peers = vec![peer.clone(); 18_000],
            _ => {
                let mut broken = peer.clone();
                broken.state = PeerState::Broken;
                broken.error = Some("y".repeat(3_500_000));
                forged.peers = vec![broken];
            }
        }
        let said = serde_json::to_vec(&forged).expect("a message");
        client
            .publish(subjects.beat(&forged.worker), said.into())
            .await
            .expect("a connected bus");
        client.flush().await.expect("a connected bus");
    }
    let mut wrong = Vec::new();
    match scene.target.look("/cluster").await {
        Ok((200, body)) if body.len() <= CLUSTER_BYTES_MAX => {}
        Ok((status, body)) => wrong.push(format!("/cluster: {status}, {} KiB", body.len() >> 10)),
        Err(error) => wrong.push(error),
    }
    gone(scene, "forged-").await;
    wrong
}

/// Somebody says nonsense on every subject, and sends frames for a stream that is under way, while one thread of each process
/// stands still: what it does not take is not kept for it without bound.
pub async fn behind_stopped_threads(scene: &mut Scene<'_>) -> Vec<String> {
    let from = scene.cluster.tap.now();
    let body = json!({"prompt": "A river", "max_tokens": VICTIM_TOKENS, "ignore_eos": true, "stream": true});
    let body = scene.target.body(&body).to_string();
    let target = scene.target.clone();
    let victim = async move {
        target
            .leave(COMPLETIONS, body.as_bytes(), body.len(), VICTIM_STAYS)
            .await
    };
    let victim = tokio::spawn(victim);
    let tap = &scene.cluster.tap;
    let request = tap
        .wait("the stream's prompt", from, PATIENCE, |message| {
            let job: PrefillJob = message.is("prefill").then(|| message.read())?;
            (job.sequence.generation.max_tokens == VICTIM_TOKENS).then_some(job.request)
        })
        .await;
    let frame = Bytes::from(frame(&scene.beat(Role::Decode).await, request));
    let over = Arc::new(AtomicBool::new(false));
    let flood = tokio::spawn(flood(scene.stranger().await, frame, Arc::clone(&over)));
    let before: Vec<usize> = scene
        .processes()
        .map(|process| process.resident_max())
        .collect();
    for thread in threads(scene.api_server().id()) {
        // Those of the workers that take from the bus, or are handed what came from it.
        let pid = |name: &str| {
            let worker = scene
                .cluster
                .workers()
                .iter()
                .find(|worker| worker.name == name);
            worker.map(|worker| worker.process.id())
        };
        let frozen = [
            (Some(scene.api_server().id()), thread.as_str()),
            (pid("decode-0"), "engine"),
            (pid("context-0"), "baton-ucx"),
        ];
        let frozen = frozen.map(|(pid, name)| pid.map(|pid| Frozen::threads(pid, name)));
        tokio::time::sleep(STOPPED).await;
        drop(frozen);
        // The process is heard again before the next of its threads stops.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    over.store(true, Relaxed);
    let sent = flood.await.unwrap_or_default();
    victim.abort();
    scene.cluster.tap.catch_up().await;
    let mut wrong: Vec<String> = scene
        .processes()
        .zip(before)
        .map(|(process, before)| (process, process.grown_since(before)))
        .filter(|(_, grown)| *grown > GROWTH_MAX)
        .map(|(process, grown)| {
            let grown = grown >> 20;
            format!(
                "{} grew by {grown} MiB behind a stopped thread",
                process.name()
            )
        })
        .collect();
    if sent < 100 << 20 {
        wrong.push(format!("only {} MiB were sent: no flood", sent >> 20));
    }
    wrong
}

/// The different names of a process's threads.
fn threads(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let mut names: Vec<String> = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .collect();
    names.sort();
    names.dedup();
    names
}

/// A frame of many items for one request, all of a try that there never was.
fn frame(of: &Beat, request: RequestId) -> Vec<u8> {
    let item = FrameItem {
        request,
        attempt: 4_000_000,
        index: 1,
        tokens: PackedTokens(vec![300, 301]),
        logprobs: Vec::new(),
        pulled: None,
        end: None,
    };
    let frame = TokenFrame {
        v: PROTOCOL_VERSION,
        worker: of.worker.clone(),
        incarnation: of.incarnation,
        items: vec![item; FRAME_ITEMS],
        prompts: Vec::new(),
    };
    serde_json::to_vec(&frame).expect("a message")
}

/// Says both until it is over, and gives how many bytes.
async fn flood(client: async_nats::Client, frame: Bytes, over: Arc<AtomicBool>) -> usize {
    let nonsense = Bytes::from(vec![b'['; PIECE]);
    let said = [
        ("prefill.context-0", &nonsense),
        ("decode.decode-0", &nonsense),
        ("abort.decode-0", &nonsense),
        ("beat.nobody", &nonsense),
        ("tokens.api-0.decode-0", &frame),
    ];
    let mut sent = 0;
    while !over.load(Relaxed) {
        for (subject, payload) in said {
            let subject = format!("baton.test.{subject}");
            if client.publish(subject, payload.clone()).await.is_err() {
                return sent;
            }
            sent += payload.len();
        }
        tokio::time::sleep(PACE).await;
    }
    let _ = client.flush().await;
    sent
}
