//! Processes that are told to leave.

use std::time::Duration;

use serde_json::json;

use super::scene::{Scene, limited};
use super::target::COMPLETIONS;
use crate::fixture::long_model_dir;
use crate::process::{Process, Signal};
use crate::setup::{Setup, started_by};
use crate::wait::{PATIENCE, eventually};

/// Who waits for something leaves at once; starting a process takes longer than that.
const AT_ONCE: Duration = Duration::from_secs(3);

/// Nobody listens there.
const NO_BUS: &str = "nats://127.0.0.1:9";

/// SIGTERM before the bus is there ends a process at once, and under load an API server says nothing of errors.
pub async fn signals(scene: &mut Scene<'_>) -> Vec<String> {
    let mut wrong = waiting(scene).await;
    wrong.extend(serving(scene).await);
    wrong
}

async fn waiting(scene: &Scene<'_>) -> Vec<String> {
    let dir = scene.cluster.dir();
    let model = long_model_dir().to_string_lossy();
    let worker = [
        "worker", "--role", "context", "--model", &model, "--device", "fake", "--kv-mib", "4",
    ];
    let api_server = [
        "api-server",
        "--tokenizer",
        &model,
        "--api-server-port",
        "0",
    ];
    let mut wrong = Vec::new();
    for (name, args) in [
        ("early-worker", worker.as_slice()),
        ("early-api-server", &api_server),
    ] {
        let mut command = started_by(&limited());
        command.args(args).args(["--request-plane-uri", NO_BUS]);
        let mut process = Process::start(name, &command, dir);
        eventually(
            "a process to say that there is no bus",
            PATIENCE,
            async || match process.log().contains("127.0.0.1:9") {
                true => Ok(()),
                false => Err(process.log()),
            },
        )
        .await;
        process.signal(Signal::Terminate);
        let ended = async {
            while process.ended().is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(AT_ONCE, ended).await.is_err() {
            wrong.push(format!(
                "{name} did not leave within {AT_ONCE:?} while it waited for the bus"
            ));
        }
    }
    wrong
}

async fn serving(scene: &Scene<'_>) -> Vec<String> {
    let setup = Setup {
        device: "fake:2000",
        kv_mib: 16,
        prefix: limited(),
        ..Setup::unsplit()
    };
    let mut leaving = Scene::start_with(scene.turn, setup).await;
    let body = json!({"prompt": "A river", "max_tokens": 500, "ignore_eos": true});
    let mut stream = leaving
        .cluster
        .api
        .stream(COMPLETIONS, &leaving.target.body(&body))
        .await;
    let mut wrong = Vec::new();
    if stream.next().await.is_none() {
        wrong.push("the stream has no event".to_owned());
    }
    let process = &mut leaving.cluster.api_servers[0].process;
    process.signal(Signal::Terminate);
    let rest = stream.rest().await;
    let status = process.end(PATIENCE).await;
    let log = process.log();
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    if !status.success() || !errors.is_empty() || rest.is_empty() {
        wrong.push(format!(
            "an API server that was told to leave: {status}, {} events after it, {errors:?}",
            rest.len()
        ));
    }
    wrong
}
