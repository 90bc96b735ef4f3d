//! KV for which there is no memory, or hardly any.
//!
//! What asks for more than there is runs where it can do no harm: with little address space, and with a `/dev/shm` and
//! System V memory of its own.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::scene::{Scene, limited};
use super::target::{COMPLETIONS, Outcome, Target, shown};
use crate::api::Api;
use crate::fixture::{baton, model_dir};
use crate::ports::free_port;
use crate::process::Process;
use crate::wait::PATIENCE;

/// Runs its arguments in a narrow place for up to this many seconds, ends them by kill -9 if they still run, and says what they
/// left behind.
const NARROW: &str = r#"
mount -t tmpfs -o size=64m tmpfs /dev/shm || exit 99
if [ "$SHMMAX" != 0 ]; then echo "$SHMMAX" > /proc/sys/kernel/shmmax || exit 99; fi
prlimit --as=4294967296 -- "$@" &
child=$!
for _ in $(seq "$SECONDS_MAX"); do sleep 1; kill -0 "$child" 2>/dev/null || break; done
if kill -0 "$child" 2>/dev/null; then echo "narrow: still runs"; kill -KILL "$child"; fi
wait "$child"; code=$?
echo "narrow: left $(ls -A /dev/shm | wc -l) files, $(($(ipcs -m | grep -c 0x) )) segments"
exit "$code"
"#;

/// Too much, too much for shared memory, and too little.
pub async fn no_room(scene: &mut Scene<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    if !may_unshare() {
        println!(
            "    what asks for too much memory was not started: this process may not make a place for it"
        );
    } else {
        let much = narrow(scene, "much", 100_000_000, 0).await;
        wrong.extend(refused("--kv-mib 100000000", &much, "kv-mib"));
        // UCX would take a file of /dev/shm instead, which outlives a kill.
        let shared = narrow(scene, "shared", 32, 16 << 20).await;
        if shared.log.contains("narrow: still runs") {
            wrong.extend(left("--kv-mib 32 with shmmax of 16 MiB", &shared.log));
        } else {
            wrong.extend(refused(
                "--kv-mib 32 with shmmax of 16 MiB",
                &shared,
                "shmmax",
            ));
        }
    }
    wrong.extend(little(scene).await);
    wrong
}

fn may_unshare() -> bool {
    let tried = Command::new("unshare")
        .args(["--mount", "--ipc", "true"])
        .status();
    tried.is_ok_and(|status| status.success())
}

/// How a worker in a narrow place ended.
struct Ended {
    code: Option<i32>,
    log: String,
}

async fn narrow(scene: &Scene<'_>, name: &str, kv_mib: usize, shmmax: usize) -> Ended {
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--ipc",
            "--propagation",
            "private",
            "--",
            "bash",
            "-c",
            NARROW,
            "bash",
        ])
        .arg(baton())
        .args(worker(&scene.target, name, "context"))
        .arg("--model")
        .arg(model_dir())
        .args(["--device", "cpu", "--kv-mib", &kv_mib.to_string()])
        .env("SHMMAX", shmmax.to_string())
        .env("SECONDS_MAX", "8");
    let mut process = Process::start(name, &command, scene.cluster.dir());
    let status = process.end(PATIENCE).await;
    Ended {
        code: status.code(),
        log: process.log(),
    }
}

fn worker(target: &Target, name: &str, role: &str) -> Vec<String> {
    let words = [
        "worker",
        "--role",
        role,
        "--worker-name",
        name,
        "--cluster",
        name,
        "--threads",
        "1",
    ];
    let mut words: Vec<String> = words.map(str::to_owned).to_vec();
    words.extend(["--request-plane-uri".to_owned(), target.bus.clone()]);
    words
}

/// What is wrong with the end of a worker that was to refuse its arguments with a sentence that names this.
fn refused(what: &str, ended: &Ended, named: &str) -> Vec<String> {
    let log = &ended.log;
    let mut wrong = left(what, log);
    // 101 is a panic, 128 and more a signal.
    let refuses = matches!(ended.code, Some(1..=98));
    if !refuses || log.contains("narrow: still runs") {
        wrong.push(format!(
            "{what}: ended with {:?}: {}",
            ended.code,
            tail(log)
        ));
    } else if !log.contains(named) {
        wrong.push(format!("{what}: no sentence names {named}: {}", tail(log)));
    }
    wrong
}

fn left(what: &str, log: &str) -> Vec<String> {
    match log.contains("narrow: left 0 files, 0 segments") {
        true => Vec::new(),
        false => vec![format!("{what}: {}", tail(log))],
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(4)..].join(" | ")
}

/// A worker with 1 MiB of KV for a real model refuses to start, or the cluster says how little it can serve, and serves it.
async fn little(scene: &Scene<'_>) -> Vec<String> {
    let dir = scene.cluster.dir();
    let mut worker_command = prefixed();
    worker_command
        .args(worker(&scene.target, "little", "both"))
        .arg("--model")
        .arg(model_dir())
        .args(["--device", "cpu", "--kv-mib", "1"]);
    let mut worker = Process::start("little", &worker_command, dir);
    let port = free_port();
    let _api_server = api_server(&scene.target, port, dir);
    let api = Api::new(port);
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        if let Some(status) = worker.ended() {
            let log = worker.log();
            return match status.code() {
                Some(1..=98) if log.contains("kv-mib") => Vec::new(),
                code => vec![format!("--kv-mib 1: ended with {code:?}: {}", tail(&log))],
            };
        }
        let health = api.look("/health").await;
        if health.is_ok_and(|health| health.status == 200) {
            return serves_what_it_says(&api, port).await;
        }
    }
    // Red health says that nothing can be served: then it must say why.
    match api.look("/health").await {
        Ok(health) if health.body["reasons"].to_string().contains("KV") => Vec::new(),
        other => vec![format!(
            "--kv-mib 1: neither refused nor healthy: {other:?}"
        )],
    }
}

async fn serves_what_it_says(api: &Api, port: u16) -> Vec<String> {
    let models = api.look("/v1/models").await.map(|models| models.body);
    let model: Value = models
        .map(|models| models["data"][0].clone())
        .unwrap_or_default();
    let Some(tokens_max) = model["max_model_len"].as_u64().filter(|tokens| *tokens > 1) else {
        return vec![format!("--kv-mib 1: no max_model_len: {model}")];
    };
    let target = Target {
        base: format!("http://127.0.0.1:{port}"),
        bus: String::new(),
        model: model["id"].as_str().unwrap_or_default().to_owned(),
    };
    let prompt = vec![300; tokens_max as usize - 1];
    let body = target.body(&json!({"prompt": prompt, "max_tokens": 1}));
    match target.post(COMPLETIONS, body.to_string(), PATIENCE).await {
        Outcome::Answered(200, _) => Vec::new(),
        Outcome::Answered(status, body) => {
            vec![format!(
                "--kv-mib 1: healthy, max_model_len {tokens_max}, and then {status} {}",
                shown(&body)
            )]
        }
        other => vec![format!("--kv-mib 1: {other:?}")],
    }
}

fn api_server(target: &Target, port: u16, dir: &Path) -> Process {
    let mut command = prefixed();
    command
        .args([
            "api-server",
            "--cluster",
            "little",
            "--request-plane-uri",
            &target.bus,
            "--tokenizer",
        ])
        .arg(model_dir())
        .args(["--api-server-port", &port.to_string()]);
    Process::start("little-api", &command, dir)
}

fn prefixed() -> Command {
    crate::setup::started_by(&limited())
}
