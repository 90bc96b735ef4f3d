//! Parts of a cluster are asked to leave, and new ones join, under load: no request is lost, no client sees an error.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use baton_protocol::{Beat, DecodeJob, Incarnation, PeerState, Role, WorkerState};
use baton_tests::{Cluster, Message, PATIENCE, Setup, Signal, Trace, Turn, baton, eventually};
use serde_json::json;

use crate::steady::{Steady, questions};

const PATH: &str = "/v1/completions";

/// Steps take 2 ms, so answers take about as long as on a GPU, and the machine has time for the rest.
fn setup(context: usize, decode: usize, both: usize) -> Setup {
    Setup {
        device: "fake:2000",
        context,
        decode,
        both,
        ..Setup::default()
    }
}

/// What takes the place of a worker that left.
#[derive(Clone, Copy, PartialEq)]
enum Successor {
    /// One of another name, started while it leaves.
    Another,
    /// It itself, started again when it has left.
    Itself,
}

/// Every worker of the cluster, and both API servers, one after the other: asked to leave, and replaced.
async fn replace_all(setup: Setup, successor: Successor) {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, setup).await;
    let second = cluster.add_api_server(&[]);
    cluster.ready().await;
    let questions = questions(&cluster, 80).await;
    let from = cluster.tap.now();
    let apis = [cluster.api.clone(), second];
    let load = Steady::start(&apis, &questions, 12);
    load.goes_on().await;

    let old: Vec<String> = cluster.workers().iter().map(|w| w.name.clone()).collect();
    for name in &old {
        let mut leaving = cluster.take(name);
        leaving.process.signal(Signal::Terminate);
        if successor == Successor::Another {
            cluster.add(leaving.role);
        }
        let status = leaving.process.end(PATIENCE).await;
        assert!(status.success(), "{name}: {status}");
        if successor == Successor::Itself {
            cluster.restart(name, leaving.role);
        }
        cluster.ready().await;
        load.goes_on().await;
    }

    // whoever leaves says so: nobody had to find out by its silence
    for api in &apis {
        let lost = ["reason=\"worker lost\""];
        let lost = api.metrics().await.sum("baton_retries_total", &lost);
        assert_eq!(lost.unwrap_or(0.0), 0.0, "requests lost their worker");
    }

    for number in [1, 0] {
        let leaving = &mut cluster.api_servers[number].process;
        leaving.signal(Signal::Terminate);
        let status = leaving.end(PATIENCE).await;
        assert!(status.success(), "API server {number}: {status}");
        cluster.restart_api_server(number);
        cluster.ready().await;
        load.goes_on().await;
    }

    let answers = load.stop().await;
    assert!(answers > 0);
    cluster.drained(PATIENCE).await;
    let traces = Trace::all(&cluster.tap, from).await;
    for name in &old {
        let worked = traces.values().any(|trace| {
            let jobs = trace.prefills.iter().map(|(worker, _)| worker);
            jobs.chain(trace.decodes.iter().map(|(worker, _)| worker))
                .any(|worker| worker == name)
        });
        assert!(worked, "{name} had nothing to do when it left");
    }
}

#[tokio::test]
async fn a_split_cluster_is_replaced_part_by_part_under_load() {
    replace_all(setup(2, 2, 0), Successor::Another).await;
}

#[tokio::test]
async fn a_cluster_that_does_both_is_replaced_part_by_part_under_load() {
    replace_all(setup(0, 0, 2), Successor::Itself).await;
}

/// What is under way is finished; nothing new is begun.
#[tokio::test]
async fn an_api_server_that_leaves_finishes_its_streams() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake:5000",
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let request = json!({"model": model, "prompt": "The sea", "max_tokens": 400, "ignore_eos": true,
                         "temperature": 0, "logprobs": 0});
    let expected = cluster.api.complete(&request).await["choices"].clone();

    let mut events = cluster.api.stream(PATH, &request).await;
    let first = events.next().await.expect("an event");
    cluster.api_servers[0].process.signal(Signal::Terminate);
    // the connection that the stream does not use is closed, and no other is taken
    eventually(
        "new connections to be refused",
        PATIENCE,
        async || match cluster.api.look("/live").await {
            Err(error) if error.contains("ConnectionRefused") => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .await;
    let leaving = &mut cluster.api_servers[0].process;
    assert_eq!(leaving.ended(), None, "it waits for its stream");
    let mut text = first["choices"][0]["text"]
        .as_str()
        .expect("text")
        .to_owned();
    for event in events.rest().await {
        text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
    }
    assert_eq!(text, expected[0]["text"]);
    let status = cluster.api_servers[0].process.end(PATIENCE).await;
    assert!(status.success(), "{status}");
    cluster.restart_api_server(0);
    cluster.ready().await;
    cluster.drained(PATIENCE).await;
}

/// The time to leave is bounded, and whoever is cut off is told why.
#[tokio::test]
async fn an_api_server_that_must_leave_says_so_in_its_streams() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake:20000",
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let api = cluster.add_api_server(&["--drain-s", "1"]);
    cluster.ready().await;
    let model = cluster.model().await;
    let request =
        json!({"model": model, "prompt": "The sea", "max_tokens": 2000, "ignore_eos": true});
    let mut events = api.stream(PATH, &request).await;
    let whole = tokio::spawn({
        let (api, request) = (api.clone(), request.clone());
        async move { api.post(PATH, &request).await }
    });
    events.next().await.expect("an event");
    eventually("both to be decoded", PATIENCE, async || {
        match cluster.beats().await["decode-0"].load.running {
            2 => Ok(()),
            running => Err(format!("{running} run")),
        }
    })
    .await;

    let mut leaving = cluster.api_servers.pop().expect("just added").process;
    leaving.signal(Signal::Terminate);
    let error = loop {
        let event = events.next().await.expect("an error before the end");
        if event["error"].is_object() {
            break event["error"].clone();
        }
    };
    assert_eq!(error["code"], "leaving", "{error}");
    let whole = whole.await.expect("answered");
    assert_eq!(whole.status, 503, "{}", whole.body);
    assert!(whole.retry_after.is_some());
    let status = leaving.end(PATIENCE).await;
    assert!(status.success(), "{status}");
    cluster.drained(PATIENCE).await;
}

/// Work comes within two seconds of a worker's first beat that it serves, and not before its KV can move.
#[tokio::test]
async fn a_worker_that_joins_has_its_connections_before_its_first_job() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, setup(1, 1, 0)).await;
    let questions = questions(&cluster, 16).await;
    let load = Steady::start(&[cluster.api.clone()], &questions, 8);
    load.goes_on().await;
    for role in [Role::Decode, Role::Context] {
        let from = cluster.tap.now();
        let name = cluster.add(role);
        let first = cluster
            .tap
            .wait("its first beat", from, PATIENCE, |message| {
                let beat = beat_of(message, &name)?;
                (beat.state == WorkerState::Serving).then_some((message.at, beat.incarnation))
            })
            .await;
        let kind = match role {
            Role::Decode => "decode",
            Role::Context | Role::Both => "prefill",
        };
        let job = cluster
            .tap
            .wait("its first job", from, PATIENCE, |message| {
                (message.kind() == Some((kind, name.as_str()))).then(|| message.clone())
            })
            .await;
        let waited = job.at - first.0;
        println!("the first job of {name} came after {waited:?}");
        assert!(waited < Duration::from_secs(2), "{name} waited {waited:?}");

        // the link of that job was ready in a beat before it
        let link: (Option<&str>, String, Incarnation) = match role {
            Role::Decode => {
                let handle = job.read::<DecodeJob>().handle;
                (Some(&name), handle.worker.to_string(), handle.incarnation)
            }
            Role::Context | Role::Both => (None, name.clone(), first.1),
        };
        let was_ready = cluster.tap.heard(from, |message| {
            let beat = message.is("beat").then(|| message.read::<Beat>())?;
            let ready = message.index < job.index
                && link.0.is_none_or(|reader| beat.worker.as_str() == reader)
                && beat.peers.iter().any(|peer| {
                    peer.state == PeerState::Ready
                        && peer.worker.as_str() == link.1
                        && peer.incarnation == link.2
                });
            ready.then_some(())
        });
        assert!(!was_ready.is_empty(), "{name} got a job before its link");
        load.goes_on().await;
    }
    load.stop().await;
    let retries = cluster.api.metrics().await.sum("baton_retries_total", &[]);
    assert_eq!(retries.unwrap_or(0.0), 0.0, "retries without a fault");
    cluster.drained(PATIENCE).await;
}

/// A worker of each side is asked to leave over HTTP, by `baton drain`: it finishes, leaves, and nobody's request is lost.
#[tokio::test]
async fn workers_drained_over_http_lose_nothing() {
    const KEY: &str = "sk-somebody-0123456789";
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, setup(2, 2, 0)).await;
    cluster.ready().await;
    let questions = questions(&cluster, 80).await;
    let load = Steady::start(&[cluster.api.clone()], &questions, 12);
    load.goes_on().await;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let keys = dir.path().join("keys");
    std::fs::write(&keys, format!("somebody {KEY}\n")).expect("a directory to write to");
    std::fs::set_permissions(&keys, Permissions::from_mode(0o600)).expect("our own file");
    let keys = keys.to_str().expect("a plain path").to_owned();
    let guarded = cluster.add_api_server(&["--api-keys-file", &keys]);
    let run = async |words: &[&str]| {
        let mut command = tokio::process::Command::new(baton());
        command.args(words).args(["--url", guarded.base()]);
        command.env("BATON_API_KEY", KEY).kill_on_drop(true);
        command.output().await.expect("the binary runs")
    };
    for name in ["context-0", "decode-0"] {
        eventually("the API server to know the worker", PATIENCE, async || {
            let shown = run(&["status"]).await;
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            if shown.contains(name) {
                Ok(())
            } else {
                Err(shown)
            }
        })
        .await;
        let drained = run(&["drain", name, "--wait-s", "60"]).await;
        let said = String::from_utf8_lossy(&drained.stdout);
        assert!(
            drained.status.success() && said.contains("has left"),
            "{drained:?}"
        );
        let status = cluster.take(name).process.end(PATIENCE).await;
        assert!(status.success(), "{name}: {status}");
        load.goes_on().await;
    }
    let unknown = run(&["drain", "context-0"]).await;
    let said = String::from_utf8_lossy(&unknown.stderr);
    assert!(
        !unknown.status.success() && said.contains("there is no worker"),
        "{said}"
    );
    let answers = load.stop().await;
    assert!(answers > 0);
    let lost = ["reason=\"worker lost\""];
    let lost = cluster
        .api
        .metrics()
        .await
        .sum("baton_retries_total", &lost);
    assert_eq!(lost.unwrap_or(0.0), 0.0, "requests lost their worker");
    cluster.drained(PATIENCE).await;
}

fn beat_of(message: &Message, name: &str) -> Option<Beat> {
    (message.kind() == Some(("beat", name))).then(|| message.read())
}
