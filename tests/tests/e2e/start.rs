//! How processes start and end: memory that is not there, arenas that serve nobody, a bus that does not come, SIGTERM at any time.

use std::process::{Command, Output};

use baton_tests::{
    Cluster, Nats, PATIENCE, Process, Setup, Signal, Turn, baton, eventually, model_dir, within,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Nobody listens there.
const NOWHERE: &str = "nats://127.0.0.1:1";

/// What `confined` sets up: the largest System V segment in bytes, and then the command.
const CONFINED: &str = "mount -t tmpfs -o size=64m tmpfs /dev/shm && echo $0 > /proc/sys/kernel/shmmax && exec prlimit --as=8589934592 \"$@\"";

/// Runs `baton` to its end where it can take 8 GiB of addresses, 64 MiB of /dev/shm and System V segments of `segment_max` bytes at
/// most: a program that takes whatever it is told to must not take this machine with it. None where that cannot be made.
fn confined(segment_max: u64, args: &[&str]) -> Option<Output> {
    let command = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--ipc", "sh", "-c", CONFINED]);
        command.arg(segment_max.to_string()).arg(program);
        command
    };
    if !command("true")
        .status()
        .is_ok_and(|status| status.success())
    {
        println!("not run: it takes root to make a mount namespace");
        return None;
    }
    let baton = baton().to_str().expect("plain");
    let output = command("timeout").args(["60", baton]).args(args).output();
    Some(output.expect("it just ran"))
}

/// A segment of any size.
const ANY: u64 = 1 << 50;

fn refuses(segment_max: u64, args: &[&str], words: &[&str]) {
    let Some(output) = confined(segment_max, args) else {
        return;
    };
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {told}");
    for word in words {
        assert!(told.contains(word), "{args:?}: {told}");
    }
}

#[test]
fn memory_that_is_not_there_is_refused_with_what_is() {
    let model = model_dir().to_str().expect("plain");
    for device in ["cpu", "fake"] {
        let worker = ["worker", "--role", "context", "--model", model];
        // 90 TiB are not here; 9 GiB may be, and are more than the process may address.
        for (mib, words) in [
            ("90000000", &["of main memory", "fit", "--kv-mib"][..]),
            ("9000", &["of main memory", "fit", "--kv-mib"][..]),
        ] {
            let more = [
                "--kv-mib",
                mib,
                "--device",
                device,
                "--block-tokens",
                "4096",
                "--request-plane-uri",
                NOWHERE,
            ];
            refuses(ANY, &[&worker[..], &more[..]].concat(), words);
        }
    }
    // UCX's own queues fit, the arena does not; and nothing else takes its place.
    let worker = ["worker", "--role", "context", "--model", model];
    let more = [
        "--device",
        "fake",
        "--kv-mib",
        "16",
        "--request-plane-uri",
        NOWHERE,
    ];
    let args = [&worker[..], &more[..]].concat();
    refuses(8 << 20, &args, &["KV arena", "kernel.shmmax", "raise it"]);
    // Each alone would find room for its addresses, all together do not.
    let up = ["up", "--model", model, "--context-worker-count", "2"];
    let more = ["--kv-mib", "3500", "--start-timeout-s", "20"];
    refuses(
        ANY,
        &[&up[..], &more[..]].concat(),
        &["3 workers", "--kv-mib"],
    );
}

#[tokio::test]
async fn an_arena_that_serves_nobody_is_refused_and_what_is_served_is_said() {
    let turn = Turn::take();
    let model = model_dir().to_str().expect("plain");
    let worker = ["worker", "--role", "both", "--model", model];
    let more = ["--kv-mib", "1", "--request-plane-uri", NOWHERE];
    let words = ["holds 32 tokens", "--kv-mib to 2 at least"];
    refuses(ANY, &[&worker[..], &more[..]].concat(), &words);

    let setup = Setup {
        kv_mib: 8,
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let beats = cluster.beats().await;
    let beat = &beats["decode-0"];
    let holds = beat.capacity.blocks * beat.kv.block_tokens;
    assert!(holds < beat.model.tokens_max, "{holds}");
    let models = cluster.api.look("/v1/models").await.expect("models").ok();
    assert_eq!(models["data"][0]["max_model_len"], json!(holds));
}

#[tokio::test]
async fn who_waits_for_the_bus_ends_at_once_when_asked_to() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let model = model_dir().to_str().expect("plain");
    let bus = [
        "--request-plane-uri",
        NOWHERE,
        "--request-plane-wait-s",
        "3600",
    ];
    let worker = [
        "worker", "--role", "both", "--device", "fake", "--kv-mib", "4",
    ];
    let server = ["api-server", "--tokenizer", model, "--api-server-port", "0"];
    let own = [&[][..], &["--model", model][..]];
    for (args, more) in [(&server[..], own[0]), (&worker[..], own[1])] {
        let mut command = Command::new(baton());
        command.args(args).args(more).args(bus);
        let mut process = Process::start(args[0], &command, dir.path());
        eventually("it to wait for the bus", PATIENCE, async || {
            let log = process.log();
            match log.contains("is not reached, trying again for up to 3600 s") {
                true => Ok(()),
                false => Err(log),
            }
        })
        .await;
        process.signal(Signal::Terminate);
        let status = process.end(PATIENCE).await;
        assert!(status.success(), "{}: {status}", args[0]);
    }
}

/// What `nats micro ls`, `info` and `stats` ask.
#[tokio::test]
async fn a_worker_is_a_nats_service_though_there_is_no_api_server() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let nats = Nats::start(dir.path(), "").await;
    let mut command = Command::new(baton());
    command.args([
        "worker",
        "--role",
        "decode",
        "--worker-name",
        "alone",
        "--device",
        "fake",
    ]);
    command.args([
        "--kv-mib",
        "16",
        "--request-plane-uri",
        &nats.uri(),
        "--model",
    ]);
    command.arg(model_dir());
    let process = Process::start("alone", &command, dir.path());
    let client = async_nats::connect(nats.uri()).await.expect("a bus");
    let ask = async |verb: &str| {
        let answer = client
            .request(format!("$SRV.{verb}.baton-decode"), "".into())
            .await;
        let answer = answer.map_err(|error| format!("{error}: {}", process.log()))?;
        serde_json::from_slice::<Value>(&answer.payload).map_err(|error| error.to_string())
    };
    eventually("the worker to be listed", PATIENCE, async || {
        let listed = ask("PING").await?;
        assert_eq!(listed["name"], "baton-decode", "{listed}");
        Ok(())
    })
    .await;
    let info = ask("INFO").await.expect("an answer");
    assert_eq!(info["metadata"]["worker"], "alone", "{info}");
    eventually("its load", PATIENCE, async || {
        let stats = ask("STATS").await?;
        match &stats["endpoints"][0]["data"]["blocks_used"] {
            Value::Number(used) if used.as_u64() == Some(0) => Ok(()),
            _ => Err(stats.to_string()),
        }
    })
    .await;
}

/// Shared memory that a process has taken so far, in bytes.
fn shared_bytes(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssShmem:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    kib.unwrap_or(0) << 10
}

/// Names in /dev/shm, and System V segments that this process made.
fn left_by(pid: u32) -> (Vec<String>, usize) {
    let names = std::fs::read_dir("/dev/shm").expect("readable");
    let names = names
        .flatten()
        .map(|file| file.file_name().to_string_lossy().into_owned());
    let segments = std::fs::read_to_string("/proc/sysvipc/shm").expect("readable");
    let maker = |line: &str| line.split_whitespace().nth(4)?.parse::<u32>().ok();
    let made = segments.lines().filter(|line| maker(line) == Some(pid));
    let mut names: Vec<String> = names.collect();
    names.sort();
    (names, made.count())
}

#[tokio::test]
async fn a_worker_that_is_killed_while_it_takes_its_arena_leaves_nothing() {
    const MIB: usize = 1_500;
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let nats = Nats::start(dir.path(), "").await;
    let (before, _) = left_by(0);
    let mut command = Command::new(baton());
    command.args(["worker", "--role", "context", "--device", "fake", "--model"]);
    command
        .arg(model_dir())
        .arg("--kv-mib")
        .arg(MIB.to_string());
    command.args(["--request-plane-uri", &nats.uri()]);
    let mut process = Process::start("context-0", &command, dir.path());
    let pid = process.id();
    eventually("some of its arena", PATIENCE, async || {
        match shared_bytes(pid) {
            taken if taken > 100 << 20 => Ok(()),
            taken => Err(format!("{} MiB: {}", taken >> 20, process.log())),
        }
    })
    .await;
    // An arena in a file would be there now, and stay.
    process.kill();
    eventually("nothing of it", PATIENCE, async || match left_by(pid) {
        (after, 0) if after == before => Ok(()),
        left => Err(format!("{before:?} before, {left:?} after")),
    })
    .await;
}

#[tokio::test]
async fn an_api_server_that_leaves_has_no_error_to_tell() {
    const SERVERS: usize = 8;
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        kv_mib: 16,
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    for _ in 1..SERVERS {
        cluster.add_api_server(&["--http-threads", "4"]);
    }
    cluster.ready().await;
    for server in &cluster.api_servers {
        server.process.signal(Signal::Terminate);
    }
    let ends = async {
        for server in &mut cluster.api_servers {
            let status = server.process.end(PATIENCE).await;
            let log = server.process.log();
            assert!(status.success(), "{status}: {log}");
            assert!(!log.contains("ERROR"), "{log}");
        }
    };
    within("the servers' ends", 2 * PATIENCE, ends).await;
}
