//! Standard error that takes nothing: a full disk, a pipe whose reader is gone, a pipe that nobody reads. Logs are dropped and
//! counted, everything else goes on. And what a client does wrong is no error of ours.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use baton_tests::{
    Api, Cluster, PATIENCE, Process, Setup, Signal, Turn, baton, eventually, model_dir,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Ways of standard error to take nothing, in the words of bash, and why lines are dropped then.
const WAYS: [(&str, &str); 3] = [
    ("2>/dev/full", "write_failed"),
    ("2> >(exec true)", "write_failed"),
    ("2> >(exec sleep infinity)", "queue_full"),
];

fn request(model: &str, number: usize) -> Value {
    json!({"model": model, "prompt": format!("The river froze {number}"), "max_tokens": 20, "ignore_eos": true,
           "temperature": 0})
}

/// Asks until lines were dropped for this reason; each answer is right.
async fn asks_until_lines_are_dropped(api: &Api, model: &str, reason: &str) {
    let name = format!("baton_log_lines_dropped_total{{reason=\"{reason}\"}} ");
    let expected = api.complete(&request(model, 0)).await["choices"].clone();
    eventually("lines to be dropped", PATIENCE, async || {
        for _ in 0..16 {
            let answer = api.complete(&request(model, 0)).await;
            assert_eq!(answer["choices"], expected);
        }
        let metrics = api.look("/metrics").await?;
        let text = metrics.body.as_str().unwrap_or_default();
        let dropped = text.lines().find_map(|line| line.strip_prefix(&name));
        match dropped.and_then(|count| count.parse::<u64>().ok()) {
            Some(1..) => Ok(()),
            _ => Err(format!("{name} is {dropped:?}")),
        }
    })
    .await;
}

#[tokio::test]
async fn logs_that_cannot_be_written_are_dropped_and_serving_goes_on() {
    let turn = Turn::take();
    for (way, reason) in WAYS {
        let setup = Setup {
            device: "fake",
            kv_mib: 16,
            standard_error: Some(way),
            ..Setup::split(1, 1)
        };
        let mut cluster = Cluster::start(&turn, setup).await;
        let model = cluster.model().await;
        asks_until_lines_are_dropped(&cluster.api, &model, reason).await;
        for worker in cluster.workers() {
            worker.process.signal(Signal::Terminate);
        }
        for name in ["context-0", "decode-0"] {
            let status = cluster.take(name).process.end(PATIENCE).await;
            assert!(status.success(), "{way}: {name}: {status}");
        }
        let mut server = cluster.api_servers.pop().expect("the first");
        server.process.signal(Signal::Terminate);
        let status = server.process.end(PATIENCE).await;
        assert!(status.success(), "{way}: {status}");
    }
}

#[tokio::test]
async fn a_supervisor_whose_lines_nobody_reads_holds_no_child_up() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let ready = dir.path().join("ready.json");
    let mut command = Command::new("bash");
    command
        .args(["-c", "exec \"$@\" 2> >(exec sleep infinity)", "bash"])
        .arg(baton())
        .args(["up", "--device", "fake", "--kv-mib", "16"])
        .arg("--model")
        .arg(model_dir())
        .arg("--ready-file")
        .arg(&ready)
        .env("RUST_LOG", "trace")
        .env("TMPDIR", dir.path());
    let mut process = Process::start("up", &command, dir.path());
    let ready = eventually("baton up to serve", 2 * PATIENCE, async || {
        assert_eq!(process.ended(), None);
        let text = fs::read(&ready).map_err(|e| e.to_string())?;
        serde_json::from_slice::<Value>(&text).map_err(|e| e.to_string())
    })
    .await;
    let url = ready["url"].as_str().expect("an address");
    let port = url.rsplit(':').next().expect("a port");
    let api = Api::new(port.parse().expect("a port"));
    let model = ready["model"].as_str().expect("a name");
    // Some megabytes of lines of the children: more than all pipes and queues between them and nobody hold.
    for number in 0..400 {
        api.complete(&request(model, number)).await;
    }
    process.signal(Signal::Terminate);
    let status = process.end(2 * PATIENCE).await;
    assert!(status.success(), "{status}");
}

/// Sends bytes that are no HTTP, and waits for the end of the answer.
fn talks_nonsense(port: u16, number: usize) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    let nonsense = format!("GE\u{1}T nonsense{number} HTTP/9.9\r\n\r\n");
    stream.write_all(nonsense.as_bytes()).expect("it reads");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[tokio::test]
async fn what_clients_do_wrong_is_counted_and_floods_no_log() {
    const REQUESTS: usize = 500;
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        kv_mib: 16,
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let base = cluster.api.base().to_owned();
    let port = base.rsplit(':').next().and_then(|port| port.parse().ok());
    let port = port.expect("a port");
    let asked = tokio::task::spawn_blocking(move || {
        for number in 0..REQUESTS {
            let answer = talks_nonsense(port, number);
            assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        }
    });
    asked.await.expect("all are answered");
    for _ in 0..REQUESTS {
        let answer = cluster.api.post("/v1/completions", &json!({"n": -1})).await;
        assert_eq!(answer.status, 400);
    }
    let metrics = cluster.api.look("/metrics").await.expect("metrics").ok();
    let metrics = metrics.as_str().expect("text");
    let line = format!("baton_http_malformed_total {REQUESTS}");
    assert!(metrics.lines().any(|found| found == line), "{metrics}");
    let server = cluster.api_servers.pop().expect("the first");
    let log = server.process.log();
    assert!(!log.contains("ERROR"), "{log}");
    assert!(log.lines().count() < 50, "{log}");
}

/// Whoever may publish on the bus may say anything there.
#[tokio::test]
async fn forged_beats_fill_neither_the_log_nor_cluster_nor_the_memory() {
    const BEATS: usize = 60;
    const GROWTH_MAX: usize = 128 << 20;
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        kv_mib: 16,
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let beats = cluster.beats().await;
    let beat = serde_json::to_value(&beats["decode-0"]).expect("a beat");
    let before = cluster.api_servers[0].process.resident_max();
    let bus = cluster.tap.client().clone();
    for number in 0..BEATS {
        for device in [
            "x".repeat(7 << 19),
            "x".repeat(300 << 10),
            "x".repeat(1 << 10),
        ] {
            let name = format!("forged-{number}-{}", device.len());
            let mut forged = beat.clone();
            forged["worker"] = json!(name);
            forged["device"] = json!(device);
            let subject = format!("baton.test.beat.{name}");
            let payload = serde_json::to_vec(&forged).expect("a beat");
            bus.publish(subject, payload.into()).await.expect("sent");
        }
        bus.flush().await.expect("sent");
    }
    eventually("the beats to be counted", PATIENCE, async || {
        let metrics = cluster.api.look("/metrics").await?.ok();
        let text = metrics.as_str().unwrap_or_default();
        let name = "baton_bus_faults_total{kind=\"beat_unreadable\"} ";
        let count = text.lines().find_map(|line| line.strip_prefix(name));
        match count.and_then(|count| count.parse::<usize>().ok()) {
            Some(count) if count >= 2 * BEATS => Ok(()),
            _ => Err(format!("{count:?}")),
        }
    })
    .await;
    let known = cluster.api.look("/cluster").await.expect("an answer").ok();
    let bytes = known.to_string().len();
    assert!(bytes < 100_000, "/cluster has {bytes} bytes");
    let server = &cluster.api_servers[0].process;
    let log = server.log();
    assert!(log.len() < 100_000, "{} bytes of log", log.len());
    let grown = server.grown_since(before);
    assert!(grown < GROWTH_MAX, "it grew by {} MiB", grown >> 20);
    let model = cluster.model().await;
    cluster.api.complete(&request(&model, 0)).await;
}
