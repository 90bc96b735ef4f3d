//! What is typed at a running cluster: `status`, `top`, `chat`, `bench`, and what scripts read of them.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use baton_tests::{Cluster, PATIENCE, Setup, Turn, baton, eventually, model_dir, smollm2_gguf};
use serde_json::{Value, json};
use tempfile::TempDir;

const KEY: &str = "sk-somebody-0123456789";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `baton` with these words to its end, this on its standard input.
fn run_with(args: &[&str], input: &str) -> Output {
    let mut command = Command::new(baton());
    command.args(args).env_remove("BATON_API_KEY");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary");
    let mut stdin = child.stdin.take().expect("a pipe");
    // One that does not read has ended.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("its end")
}

fn run(args: &[&str]) -> Output {
    run_with(args, "")
}

fn json_of(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json = serde_json::from_slice(&output.stdout);
    json.unwrap_or_else(|error| panic!("{error}: {}", text(&output.stdout)))
}

fn fake() -> Setup {
    Setup {
        device: "fake",
        ..Setup::split(1, 1)
    }
}

#[tokio::test]
async fn with_a_key_all_go_in_and_without_one_each_tells_the_servers_sentence() {
    let turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let keys = dir.path().join("keys");
    fs::write(&keys, format!("somebody {KEY}\n")).expect("a directory to write to");
    fs::set_permissions(&keys, Permissions::from_mode(0o600)).expect("our own file");
    let mut cluster = Cluster::start(&turn, fake()).await;
    let keys = keys.to_str().expect("a plain path");
    let guarded = cluster.add_api_server(&["--api-keys-file", keys]);
    // As people write it, and as OpenAI's clients want it.
    let address = guarded.base().trim_start_matches("http://").to_owned();
    let with_path = format!("{}/v1", guarded.base());
    eventually("the API server to know the workers", PATIENCE, async || {
        let status = run(&["status", "--url", &address, "--api-key", KEY]);
        match status.status.success() {
            true => Ok(()),
            false => Err(text(&status.stderr)),
        }
    })
    .await;
    let bench = ["bench", "--requests", "2", "--max-tokens", "4"];
    for words in [
        &["status"][..],
        &["top"],
        &["chat", "--max-tokens", "4", "Hi"],
        &bench,
    ] {
        for url in [&address, &with_path] {
            let with = [words, &["--url", url, "--api-key", KEY]].concat();
            let output = run(&with);
            assert!(
                output.status.success(),
                "{with:?}: {}",
                text(&output.stderr)
            );
        }
        for key in [&[][..], &["--api-key", "sk-wrong-0123456789"]] {
            let without = [words, &["--url", &address], key].concat();
            let output = run(&without);
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{without:?}: {said}");
            // The server's own words, once, and where it is.
            assert_eq!(said.matches("API key").count(), 1, "{without:?}: {said}");
            assert!(said.contains("401") && said.contains(&address), "{said}");
        }
    }
}

#[tokio::test]
async fn top_shows_what_runs() {
    let turn = Turn::take();
    let setup = Setup {
        // A step of 20 ms: the request is there until it is stopped.
        device: "fake:20000",
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let url = cluster.api.base();
    let idle = json_of(&run(&["top", "--json", "--url", url]));
    assert_eq!(idle["running"], json!([]), "{idle}");
    let request = json!({"model": cluster.model().await, "prompt": "A river", "max_tokens": 1500, "ignore_eos": true});
    let mut events = cluster.api.stream("/v1/completions", &request).await;
    for _ in 0..3 {
        events.next().await.expect("an event");
    }
    eventually("the request to be shown", PATIENCE, async || {
        let told = json_of(&run(&["top", "--json", "--url", url]));
        let row = &told["running"][0];
        match row["phase"].as_str() {
            Some("decoding") => {
                assert_eq!(row["decode_worker"], "decode-0", "{told}");
                assert!(row["output_tokens"].as_u64() > Some(1), "{told}");
                assert_eq!(told["totals"]["running"], 1, "{told}");
                Ok(())
            }
            _ => Err(told.to_string()),
        }
    })
    .await;
    // Into a pipe it is shown once.
    let shown = run(&["top", "--url", url]);
    let shown = text(&shown.stdout);
    assert!(shown.starts_with("1 running, 0 waiting, "), "{shown}");
    let line = shown.lines().last().unwrap_or_default();
    for word in ["decoding", "interactive", "context-0", "decode-0"] {
        assert!(line.contains(word), "no {word} in {shown}");
    }
    drop(events);
    eventually("it to be gone", PATIENCE, async || {
        let told = json_of(&run(&["top", "--json", "--url", url]));
        match told["running"] == json!([]) {
            true => Ok(()),
            false => Err(told.to_string()),
        }
    })
    .await;
    let nobody = run(&["top", "--url", "127.0.0.1:9"]);
    assert!(text(&nobody.stderr).contains("http://127.0.0.1:9"));
    assert_eq!(nobody.status.code(), Some(1));
}

/// Before anything starts: the refusal is all there is.
#[test]
fn a_keys_file_that_is_none_is_told_before_the_workers_start() {
    let dir = TempDir::new().expect("a temporary directory");
    let keys = dir.path().join("keys");
    let model = model_dir().to_str().expect("a plain path");
    for (content, word) in [
        ("somebody short\n", "line 1"),
        ("# nobody\n", "no key in it"),
        ("\nanna sk-anna-0123456789 and more\n", "line 2"),
    ] {
        fs::write(&keys, content).expect("a directory to write to");
        let file = keys.to_str().expect("a plain path");
        let output = run(&[
            "up",
            "--device",
            "fake",
            "--model",
            model,
            "--api-keys-file",
            file,
        ]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{content:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{content:?}: {said}");
        assert!(
            said.contains(file) && said.contains(word),
            "{content:?}: {said}"
        );
        assert!(
            !said.contains("short") && !said.contains("sk-anna"),
            "{said}"
        );
    }
}

/// No bus is there, and the API server would wait for it.
#[test]
fn a_name_that_cannot_be_is_told_before_the_bus_is_waited_for() {
    let model = model_dir();
    let output = run(&[
        "api-server",
        "--tokenizer",
        model.to_str().expect("a plain path"),
        "--request-plane-uri",
        "nats://127.0.0.1:1",
        "--request-plane-wait-s",
        "86400",
        "--model-name",
        "twice",
        "--model-name",
        "twice",
    ]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("\"twice\" is given twice"), "{said}");
}

#[tokio::test]
async fn scripts_read_json() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, fake()).await;
    let url = cluster.api.base().to_owned();
    let model = cluster.model().await;

    let words = [
        "chat",
        "--max-tokens",
        "4",
        "--temperature",
        "0",
        "--url",
        &url,
    ];
    let chat = [&words[..], &["--json"]].concat();
    let answer = json_of(&run(&[&chat[..], &["Hi"]].concat()));
    assert_eq!(answer["model"], model.as_str(), "{answer}");
    assert_eq!(answer["finish_reason"], "length", "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
    // An object a line, in order; the plain text is the same.
    let conversation = run_with(&chat, "Hi\n\n/help\n");
    assert!(
        conversation.status.success(),
        "{}",
        text(&conversation.stderr)
    );
    let lines = text(&conversation.stdout);
    let answers: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let [first, second] = answers.as_slice() else {
        panic!("{lines}");
    };
    assert_eq!(first["content"], answer["content"]);
    let prompt = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64();
    assert!(
        prompt(second) > prompt(first),
        "the conversation goes on: {lines}"
    );
    let plain = run(&[&words[..], &["Hi"]].concat());
    let content = answer["content"].as_str().expect("a text");
    assert_eq!(text(&plain.stdout), format!("{content}\n"));

    // An answer that fails is told, and those after it come.
    let long = "word ".repeat(9_000);
    let failed = run_with(&chat, &format!("{long}\nHi\n"));
    assert_eq!(failed.status.code(), Some(1));
    let lines = text(&failed.stdout);
    let answers: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert!(answers[0]["error"]["message"].is_string(), "{lines}");
    assert_eq!(answers[1]["content"], answer["content"], "{lines}");
    let said = text(&failed.stderr);
    assert!(said.ends_with("baton: 1 of 2 answers failed\n"), "{said}");

    let libraries = json_of(&run(&["libraries", "--json"]));
    assert_eq!(libraries["libraries"][0]["library"], "ucx", "{libraries}");
    assert_eq!(libraries["libraries"][0]["works"], true, "{libraries}");
    let need = run(&["libraries", "--json", "--need", "driver"]);
    let told: Value = serde_json::from_slice(&need.stdout).expect("JSON");
    let has_driver = told["missing"] == json!([]);
    assert_eq!(need.status.success(), has_driver, "{told}");

    let dir = TempDir::new().expect("a temporary directory");
    let keys = dir.path().join("keys");
    fs::write(&keys, format!("somebody {KEY}\n")).expect("a directory to write to");
    let guarded = cluster.add_api_server(&["--api-keys-file", keys.to_str().expect("plain")]);
    let url = guarded.base().to_owned();
    let drain = [
        "drain",
        "decode-0",
        "--json",
        "--wait-s",
        "60",
        "--url",
        &url,
        "--api-key",
        KEY,
    ];
    eventually("the API server to know the worker", PATIENCE, async || {
        let status = run(&["status", "--url", &url, "--api-key", KEY]);
        match text(&status.stdout).contains("decode-0") {
            true => Ok(()),
            false => Err(text(&status.stderr)),
        }
    })
    .await;
    let drained = json_of(&run(&drain));
    assert_eq!(
        [&drained["worker"], &drained["state"]],
        ["decode-0", "left"]
    );
    assert!(drained["seconds"].as_f64() >= Some(0.0), "{drained}");
    cluster
        .take("decode-0")
        .process
        .end(Duration::from_secs(60))
        .await;
}

#[test]
fn what_model_prep_made_is_told_as_json() {
    let dir = TempDir::new().expect("a temporary directory");
    let out = dir.path().join("model");
    let (gguf, out) = (smollm2_gguf(), out.to_str().expect("a plain path"));
    let gguf = gguf.to_str().expect("a plain path");
    let prep = [
        "model-prep",
        "--json",
        "--model",
        gguf,
        "--max-num-tokens",
        "2048",
        "--out",
        out,
    ];
    let planned = json_of(&run(&[&prep[..], &["--dry-run"]].concat()));
    assert_eq!(planned["outcome"], "planned", "{planned}");
    assert_eq!(planned["fingerprint"], json!(null), "{planned}");
    let written = json_of(&run(&prep));
    assert_eq!([&written["outcome"], &written["path"]], ["written", out]);
    let manifest = fs::read(dir.path().join("model/manifest.json")).expect("a manifest");
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    assert_eq!(written["fingerprint"], manifest["fingerprint"]);
    for file in written["files"].as_array().expect("files") {
        let name = file["name"].as_str().expect("a name");
        let bytes = fs::metadata(dir.path().join("model").join(name)).map(|file| file.len());
        assert_eq!(file["bytes"], bytes.expect("a file"), "{name}");
    }
    assert_eq!(json_of(&run(&prep))["outcome"], "already_there");
}
