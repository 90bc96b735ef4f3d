//! What a new user types and reads in the first hour: `baton up MODEL`, its lines, `status` after a kill, tips.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::process::Command;
use std::thread;

use baton_tests::{PATIENCE, Signal, Turn, eventually, model_dir};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::tools::{run, text, up, up_anywhere};

/// An address that answers each request with this document, as long as the test runs.
fn answers(document: &Value) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    let body = document.to_string();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n > 0) {
                request.extend(byte);
            }
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close";
            let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes());
            let _ = stream.shutdown(Shutdown::Write);
        }
    });
    format!("http://{address}")
}

#[test]
fn up_takes_a_model_with_or_without_its_flag() {
    let model = model_dir().to_str().expect("a plain path");
    let config = |words: &[&str]| {
        let output = run(&[
            &["up", "--print-config", "--api-server-port", "8123"],
            words,
        ]
        .concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let expected = config(&["--model", model]);
    assert!(expected.contains(model), "{expected}");
    assert_eq!(config(&[model]), expected);

    for (words, part) in [
        (
            &["up", model, "--model", "other"][..],
            "cannot be used with",
        ),
        (&["up", model, "--config", "file"], "cannot be used with"),
        (&["up"], "a model directory, a GGUF file, or a name"),
        (&["run", "qwen3-0.6b"], "`baton up MODEL` starts a cluster"),
        (&["serve", "./model"], "baton up --model ./model"),
        (&["./model.gguf"], "`baton up ./model.gguf`"),
        (&["model-prep", "smollm2", "--out", "x"], "--model smollm2"),
    ] {
        let output = run(words);
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{words:?}");
        assert!(said.contains(part), "{words:?}: {said}");
    }
    for words in [&["--help"][..], &["up", "--help"]] {
        let said = text(&run(words).stdout);
        assert!(said.contains("baton up "), "{words:?}: {said}");
    }
    for (name, part) in [
        ("smollm2", "did you mean smollm2-135m-instruct, "),
        (
            "./no-such-directory",
            "no file or directory \"./no-such-directory\"\n",
        ),
    ] {
        let said = text(&run(&["up", name]).stderr);
        assert!(said.contains(part), "{said}");
    }
}

/// Each takes the first free port and keeps it until its API server has the socket.
#[tokio::test]
async fn clusters_that_start_at_once_have_ports_of_their_own() {
    let _turn = Turn::take();
    let dirs = [(); 3].map(|()| TempDir::new().expect("a temporary directory"));
    let start = |dir| up_anywhere(dir, &["--device", "fake"]);
    let (a, b, c) = tokio::join!(
        start(dirs[0].path()),
        start(dirs[1].path()),
        start(dirs[2].path())
    );
    let urls: BTreeSet<_> = [&a, &b, &c].map(|(_, ready)| ready["url"].as_str()).into();
    assert_eq!(urls.len(), 3, "{urls:?}");
    for (mut process, ready) in [a, b, c] {
        let url = ready["url"].as_str().expect("an address");
        let check = run(&["self-check", "--url", url]);
        assert!(check.status.success(), "{}", text(&check.stdout));
        process.signal(Signal::Interrupt);
        assert!(process.end(PATIENCE).await.success());
    }
}

#[tokio::test]
async fn the_start_is_readable_and_says_what_is_served() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let (mut process, ready) = up(dir.path(), &["--device", "fake"]).await;
    let model = ready["model"].as_str().expect("a name");
    let announced = format!("\nmodel: {model}, 2,048 tokens");
    let log = eventually("both workers to serve", PATIENCE, async || {
        let log = process.log();
        let joined = log.matches("worker joined").count();
        match log.contains(&announced) && log.contains("Ctrl-C stops it.") && joined == 2 {
            true => Ok(log),
            false => Err(log),
        }
    })
    .await;
    let is_ours = |line: &&str| !line.trim_start().starts_with("nats-server |");
    for line in log.lines().filter(is_ours) {
        assert!(line.len() <= 240, "{} bytes: {line}", line.len());
    }
    // What a worker resolved is there all the same.
    for part in [
        "starting worker=",
        "kv_bytes=",
        "step_tokens=",
        "lease_ms=",
        "bus=\"nats://",
    ] {
        assert_eq!(log.matches(part).count(), 2, "{part}: {log}");
    }

    let url = ready["url"].as_str().expect("an address");
    let check = run(&["self-check", "--url", url]);
    let said = text(&check.stdout);
    assert!(check.status.success(), "{said}");
    let expected = format!("{url} serves {model}, 2,048 tokens");
    assert!(said.contains(&expected), "{said}");
    process.signal(Signal::Interrupt);
    assert!(process.end(PATIENCE).await.success());
}

#[tokio::test]
async fn a_killed_worker_is_reported_by_its_signal() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let (mut process, ready) = up(dir.path(), &["--device", "fake"]).await;
    let pid = ready["pids"]["both-0"].to_string();
    let killed = Command::new("kill").args(["-KILL", &pid]).status();
    assert!(killed.expect("kill").success());
    let line = eventually("its end to be reported", PATIENCE, async || {
        let log = process.log();
        let line = log
            .lines()
            .find(|line| line.contains("it is started again"));
        line.map(str::to_owned).ok_or(log)
    })
    .await;
    assert!(
        line.contains("both-0 was killed by signal 9 (SIGKILL) after "),
        "{line}"
    );
    assert!(
        line.contains("out of memory") && !line.contains("INFO"),
        "{line}"
    );
    process.signal(Signal::Interrupt);
    assert!(process.end(PATIENCE).await.success());
}

#[test]
fn status_shows_a_worker_that_is_not_heard() {
    let worker = |name: &str, silent_ms: u64| json!({"worker": name, "role": "both", "state": "serving", "silent_ms": silent_ms});
    let cluster = json!({"cluster": "baton", "api_server": "api-0", "healthy": true, "reasons": [], "degraded": [],
        "model": {"name": "m"}, "workers": [worker("both-0", 900), worker("both-1", 1_900)]});
    let output = run(&["status", "--url", &answers(&cluster)]);
    let said = text(&output.stdout);
    // The server's judgement is as it was.
    assert!(
        output.status.success() && said.contains(": healthy"),
        "{said}"
    );
    let row = |name: &str| {
        said.lines()
            .find(|line| line.starts_with(name))
            .expect("a row")
    };
    assert!(row("both-0").contains("serving"), "{said}");
    assert!(row("both-1").contains("silent 1.9 s"), "{said}");
}

#[test]
fn self_check_says_whether_the_model_takes_tools() {
    let served = |tools: &str| {
        let model =
            json!({"id": "m", "max_model_len": 65_536, "default_max_tokens": null, "tools": tools});
        let url = answers(&json!({"object": "list", "data": [model]}));
        text(&run(&["self-check", "--url", &url]).stdout)
    };
    let said = served("auto");
    assert!(
        said.contains("serves m, 65,536 tokens, tools: the model calls"),
        "{said}"
    );
    let said = served("required");
    assert!(
        said.contains("tools: only where tool_choice demands a call"),
        "{said}"
    );

    // A server that is named has to be there.
    let output = run(&["self-check", "--json", "--url", "http://127.0.0.1:9"]);
    assert_eq!(output.status.code(), Some(1));
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = said["checks"].as_array().expect("a list").iter();
    let failed: Vec<_> = checks.filter(|check| check["state"] == "fails").collect();
    assert!(
        failed.len() == 1 && failed[0]["check"] == "api-server",
        "{said}"
    );
    let tip = failed[0]["says"].as_str().unwrap_or_default();
    assert!(tip.contains("`baton up MODEL` starts a cluster"), "{tip}");
}

#[test]
fn plan_says_what_it_assumes() {
    let dir = TempDir::new().expect("a temporary directory");
    let cost = dir.path().join("cost.json");
    let measured = json!({"layers": [{"tokens": 1, "us": 4000}, {"tokens": 1024, "us": 20000}], "row_us": 0, "kv_token_us": 0, "pair_us": 0});
    fs::write(&cost, measured.to_string()).expect("a directory to write to");
    let cost = cost.to_str().expect("a plain path");
    let words = [
        "plan",
        "--cost",
        cost,
        "--kv-bytes-per-token",
        "4096",
        "--mix",
        "both*1",
        "--rate",
        "1",
        "--ttft-ms",
        "900",
    ];
    let output = run(&words);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for assumed in [
        "no --prompt-tokens: prompts of 1,024 tokens",
        "no --max-tokens: answers of 128 tokens",
        "no --batch: 256 sequences in a step",
        "no --step-tokens: up to 8,192 tokens in a step",
        "no --itl-ms: workers keep their steps to 25 ms",
    ] {
        assert!(
            said.lines().any(|line| line == assumed),
            "{assumed}: {said}"
        );
    }
}
