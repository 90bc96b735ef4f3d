//! What people type: `baton up`, `status`, `model-prep`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use baton_tests::{
    Api, Cluster, PATIENCE, Process, Setup, Signal, Turn, baton, eventually, model_dir,
    smollm2_gguf,
};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Runs `baton` to its end. A tool that hangs is caught by the runner's own time limit.
pub(crate) fn run(args: &[&str]) -> Output {
    Command::new(baton())
        .args(args)
        .output()
        .expect("the binary was just built")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `baton up` on a port that the system chooses.
pub(crate) async fn up(dir: &Path, more: &[&str]) -> (Process, Value) {
    up_anywhere(dir, &[&["--api-server-port", "0"], more].concat()).await
}

/// `baton up` on the usual port, or the next that is free.
pub(crate) async fn up_anywhere(dir: &Path, more: &[&str]) -> (Process, Value) {
    let ready = dir.join("ready.json");
    let mut command = Command::new(baton());
    command
        .args(["up", "--threads", "1", "--kv-mib", "64", "--model"])
        .arg(model_dir())
        .arg("--ready-file")
        .arg(&ready)
        .env("TMPDIR", dir)
        .args(more);
    let mut process = Process::start("up", &command, dir);
    let ready = eventually("baton up to serve", 2 * PATIENCE, async || {
        if let Some(status) = process.ended() {
            panic!("baton up ended: {status}");
        }
        let text = fs::read(&ready).map_err(|e| format!("{}: {e}", ready.display()))?;
        serde_json::from_slice::<Value>(&text).map_err(|e| e.to_string())
    })
    .await;
    (process, ready)
}

fn api(ready: &Value) -> Api {
    let url = ready["url"].as_str().expect("an address");
    let port = url.rsplit(':').next().expect("a port");
    Api::new(port.parse().expect("a port"))
}

fn pids(ready: &Value) -> Vec<(String, u64)> {
    let pids = ready["pids"].as_object().expect("process ids");
    pids.iter()
        .map(|(name, pid)| (name.clone(), pid.as_u64().expect("a process id")))
        .collect()
}

/// Waits until none of these processes is left; a zombie is not left.
async fn all_gone(ready: &Value) {
    eventually("all processes to end", PATIENCE, async || {
        let left: Vec<_> = pids(ready)
            .into_iter()
            .filter(|(_, pid)| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                let state = stat
                    .rsplit(") ")
                    .next()
                    .and_then(|rest| rest.chars().next());
                state.is_some_and(|state| state != 'Z')
            })
            .collect();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    })
    .await;
}

#[tokio::test]
async fn up_serves_and_leaves_nothing_behind() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let counts = [
        "--context-worker-count",
        "2",
        "--generate-worker-count",
        "2",
    ];
    let (mut process, ready) = up(dir.path(), &counts).await;
    // nats-server, API server, four workers, and itself
    assert_eq!(pids(&ready).len(), 7, "{ready}");
    let api = api(&ready);
    let answer = api
        .chat(&json!({"model": ready["model"], "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}))
        .await;
    let said = &answer["choices"][0]["message"]["content"];
    assert!(said.as_str().is_some_and(|said| !said.is_empty()), "{said}");

    let url = ready["url"].as_str().expect("an address");
    // Said when the ready file is there.
    eventually("it to say where it is", PATIENCE, async || {
        let log = process.log();
        let told = [format!("page: {url}/\n"), format!("baton chat --url {url}")];
        match told.iter().all(|told| log.contains(told)) {
            true => Ok(()),
            false => Err(log),
        }
    })
    .await;
    let page = api.look("/").await.expect("a page");
    assert_eq!(page.status, 200);
    let names = pids(&ready).into_iter().map(|(name, _)| name);
    let workers: Vec<String> = names
        .filter(|name| name.contains("context") || name.contains("decode"))
        .collect();
    assert_eq!(workers.len(), 4, "{workers:?}");
    // It serves as soon as it can, which may be before the last of them is there.
    eventually("a status of all workers", PATIENCE, async || {
        let status = run(&["status", "--url", url]);
        let shown = text(&status.stdout);
        assert!(status.status.success(), "{}", text(&status.stderr));
        match workers.iter().find(|name| !shown.contains(*name)) {
            None if shown.contains("ucx") => Ok(()),
            missing => Err(format!("no {missing:?}, or no transport, in\n{shown}")),
        }
    })
    .await;

    process.signal(Signal::Interrupt);
    let status = process.end(PATIENCE).await;
    assert!(status.success(), "{status}");
    all_gone(&ready).await;
}

#[tokio::test]
async fn up_ends_clearly_when_a_part_dies_and_takes_all_with_it() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let more = ["--device", "fake", "--no-restart"];
    let (mut process, ready) = up(dir.path(), &more).await;
    let (name, pid) = pids(&ready)
        .into_iter()
        .find(|(name, _)| name == "both-0")
        .expect("a worker");
    let killed = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
    assert!(killed.expect("kill").success());
    let status = process.end(PATIENCE).await;
    assert!(!status.success());
    let log = process.log();
    let last = log
        .lines()
        .rfind(|line| line.starts_with("baton: "))
        .unwrap_or_default();
    assert!(last.contains(&name), "the last word: {last:?}");
    all_gone(&ready).await;
}

/// Without counts there are two workers that do both. The one that dies in mid-stream is made good by the other: the same text, without an error.
#[tokio::test]
async fn of_two_workers_that_do_both_one_takes_over() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let (mut process, ready) = up(dir.path(), &[]).await;
    let names: Vec<String> = pids(&ready).into_iter().map(|(name, _)| name).collect();
    let wanted = ["api-server", "both-0", "both-1", "nats-server", "up"];
    assert_eq!(names, wanted);
    let api = api(&ready);
    eventually("both to serve", PATIENCE, async || {
        let workers = api.look("/cluster").await?.body["workers"].clone();
        let serving = |worker: &&Value| worker["state"] == "serving";
        match workers
            .as_array()
            .into_iter()
            .flatten()
            .filter(serving)
            .count()
        {
            2 => Ok(()),
            _ => Err(workers.to_string()),
        }
    })
    .await;
    let request = json!({"model": ready["model"], "prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": true, "temperature": 0});
    let expected = api.complete(&request).await["choices"][0]["text"].clone();

    let mut stream = api.stream("/v1/completions", &request).await;
    let mut events = Vec::new();
    for _ in 0..5 {
        events.push(stream.next().await.expect("it goes on"));
    }
    let running = api.look("/requests").await.expect("/requests").ok()["running"].clone();
    let victim = running[0]["decode_worker"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let pid = ready["pids"][&victim]
        .as_u64()
        .unwrap_or_else(|| panic!("{running}"));
    let killed = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
    assert!(killed.expect("kill").success());
    events.extend(stream.rest().await);
    let pieces = events
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str());
    assert_eq!(json!(pieces.collect::<String>()), expected);
    let retries = api.metrics().await.sum("baton_retries_total", &[]);
    assert_eq!(retries, Some(1.0), "{victim} was killed");

    process.signal(Signal::Interrupt);
    assert!(process.end(PATIENCE).await.success());
}

/// The lines of a log in which `baton up` speaks for itself: those of its children have their names before them.
fn own_lines(log: &str) -> Vec<&str> {
    log.lines().filter(|line| !line.contains(" | ")).collect()
}

/// One that was asked to leave has left: what is there serves on, and it is not started again.
#[tokio::test]
async fn a_worker_of_up_may_leave_by_itself() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let more = ["--device", "fake", "--decode-worker-count", "2"];
    let (mut process, ready) = up(dir.path(), &more).await;
    let told = pids(&ready);
    let (_, pid) = told
        .iter()
        .find(|(name, _)| name == "decode-0")
        .expect("it is there");
    let status = Command::new("kill")
        .args(["-TERM", &pid.to_string()])
        .status();
    assert!(status.expect("kill runs").success());
    eventually("it to have left", PATIENCE, async || {
        match process.log().contains("decode-0 has left") {
            true => Ok(()),
            false => Err(process.log()),
        }
    })
    .await;
    let answer = api(&ready)
        .chat(&json!({"model": ready["model"], "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}))
        .await;
    assert!(
        answer["choices"][0]["message"]["content"].is_string(),
        "{answer}"
    );
    let restarted = process.log().contains("it is started again");
    assert!(process.ended().is_none() && !restarted, "{}", process.log());
    process.signal(Signal::Terminate);
    assert!(process.end(PATIENCE).await.success());
    all_gone(&ready).await;
}

#[tokio::test]
async fn a_failure_is_told_once_and_last() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let mut command = Command::new(baton());
    command.args([
        "up",
        "--device",
        "fake",
        "--kv-mib",
        "64",
        // Workers that do both go on without.
        "--context-worker-count",
        "1",
        "--ucx-tls",
        "none-of-this-name",
    ]);
    command
        .args(["--api-server-port", "0", "--model"])
        .arg(model_dir());
    let mut process = Process::start("up", &command, dir.path());
    assert!(!process.end(PATIENCE).await.success());
    let log = process.log();
    let lines = own_lines(&log);
    let why = |line: &&&str| line.contains("KV transfer did not start");
    assert_eq!(lines.iter().filter(why).count(), 1, "{log}");
    let last = lines.last().copied().unwrap_or_default();
    assert!(last.starts_with("baton: ") && why(&&last), "{log}");
    assert!(!last.contains("it said: baton:"), "{last}");

    // A process by itself: what it waits for is a warning, and that it gave up its last word.
    let nowhere = [
        "--request-plane-uri",
        "nats://127.0.0.1:1",
        "--request-plane-wait-s",
        "1",
    ];
    let model = model_dir().to_str().expect("plain");
    let worker = [
        "worker", "--role", "both", "--device", "fake", "--kv-mib", "64", "--model", model,
    ];
    let server = ["api-server", "--api-server-port", "0", "--tokenizer", model];
    for process in [&worker[..], &server[..]] {
        let said = text(&run(&[process, &nowhere[..]].concat()).stderr);
        assert_eq!(said.matches("was not reached within").count(), 1, "{said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("baton: the NATS server at nats://127.0.0.1:1 was not"),
            "{said}"
        );
        assert!(!said.contains("60 s"), "{said}");
    }
}

#[test]
fn files_that_are_not_there_are_missed_before_anything_starts() {
    let model = model_dir().to_str().expect("plain");
    let up = ["up", "--device", "fake", "--model", model];
    let worker = [
        "worker", "--role", "both", "--device", "fake", "--model", model,
    ];
    let server = ["api-server", "--tokenizer", model];
    for (process, flag) in [
        (&up[..], "--api-keys-file"),
        (&up[..], "--ready-file"),
        (&up[..], "--nats-server"),
        (&server[..], "--api-keys-file"),
        (&server[..], "--request-plane-nkey"),
        (&worker[..], "--request-plane-credentials"),
        (&worker[..], "--request-plane-ca"),
    ] {
        let output = run(&[process, &[flag, "/nowhere/file"]].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{flag}: {said}");
        // Nothing was begun: the refusal is all there is.
        assert_eq!(said.lines().count(), 1, "{flag}: {said}");
        assert!(
            said.starts_with("baton: ") && said.contains("/nowhere/file"),
            "{flag}: {said}"
        );
    }
}

#[test]
fn completions_and_tips_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert!(output.status.success(), "{shell}");
        assert!(
            text(&output.stdout).contains("decode-worker-count"),
            "{shell}"
        );
    }
    let script = run(&["completions", "bash"]).stdout;
    let mut bash = Command::new("bash");
    let dir = TempDir::new().expect("a temporary directory");
    let file = dir.path().join("baton.bash");
    fs::write(&file, script).expect("a file of the test");
    let asks = "source \"$0\" && COMP_WORDS=(baton stat) COMP_CWORD=1 && _baton baton stat baton && echo \"${COMPREPLY[@]}\"";
    let output = bash.args(["-c", asks]).arg(&file).output().expect("bash");
    assert_eq!(
        text(&output.stdout).trim(),
        "status",
        "{}",
        text(&output.stderr)
    );

    let said = text(&run(&["serve", "some/model", "--port", "80"]).stderr);
    assert!(said.contains("baton up --model some/model"), "{said}");
    let wrong = run(&["up", "--model", "m", "--port", "80"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(
        text(&wrong.stderr).contains("--api-server-port"),
        "{}",
        text(&wrong.stderr)
    );
}

#[tokio::test]
async fn status_is_shown_again_and_again() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let mut command = Command::new(baton());
    command.args([
        "status",
        "--json",
        "--watch",
        "1",
        "--url",
        cluster.api.base(),
    ]);
    let process = Process::start("status", &command, cluster.dir());
    eventually("three looks", PATIENCE, async || {
        let log = process.log();
        let looks: Vec<Value> = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        match looks.len() {
            0..3 => Err(log),
            _ => {
                assert!(
                    looks
                        .iter()
                        .all(|look| look["workers"].as_array().is_some_and(|all| all.len() == 2)),
                    "{log}"
                );
                Ok(())
            }
        }
    })
    .await;
}

#[test]
fn a_machine_is_told_what_it_has() {
    let output = run(&["self-check"]);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    for check in [
        "cpu",
        "memory",
        "gpu",
        "ucx",
        "nats-server",
        "nats",
        "open-files",
        "locked-memory",
    ] {
        let is_told = |line: &str| line.split_whitespace().next() == Some(check);
        assert!(said.lines().any(is_told), "{check}: {said}");
    }
    // A server that is named has to be there.
    let output = run(&[
        "self-check",
        "--json",
        "--request-plane-uri",
        "nats://127.0.0.1:1",
    ]);
    assert_eq!(output.status.code(), Some(1));
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(said["can_serve"], false);
    let failed = said["checks"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|check| check["state"] == "fails");
    let failed: Vec<_> = failed.map(|check| &check["check"]).collect();
    assert_eq!(failed, ["nats"], "{said}");
    assert!(text(&output.stderr).contains("cannot serve: nats"));
}

#[test]
fn the_kernel_that_is_asked_for_is_taken_or_refused_by_name() {
    let with = |kernel: &str| {
        let mut command = Command::new(baton());
        command.arg("self-check").env("BATON_CPU_KERNEL", kernel);
        command.output().expect("the binary")
    };
    let said = text(&with("portable").stdout);
    assert!(said.contains("kernels portable"), "{said}");
    let refused = with("avx9");
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stdout);
    let reason = "BATON_CPU_KERNEL: no kernel \"avx9\": amx-bf16, avx512-bf16, avx2 or portable";
    assert!(said.contains(reason), "{said}");
}

#[tokio::test]
async fn up_itself_dies_and_takes_all_with_it() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let (mut process, ready) = up(dir.path(), &["--device", "fake"]).await;
    process.kill();
    all_gone(&ready).await;
    let left = scratch(dir.path());
    assert_eq!(left.len(), 1, "nobody could clear it away");

    // The next one does, and clears up after itself.
    fs::remove_file(dir.path().join("ready.json")).expect("the ready file that was left too");
    let (mut process, ready) = up(dir.path(), &["--device", "fake"]).await;
    let mine = scratch(dir.path());
    assert!(mine.len() == 1 && mine != left, "{left:?}, then {mine:?}");
    process.signal(Signal::Interrupt);
    assert!(process.end(PATIENCE).await.success());
    all_gone(&ready).await;
    assert_eq!(scratch(dir.path()), [""; 0]);
}

/// Names of the directories that runs of `baton up` keep below this one.
fn scratch(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory");
    entries
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("a plain name"))
        .filter(|name| name.starts_with("baton-up-"))
        .collect()
}

#[tokio::test]
async fn up_starts_again_what_died() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    let more = ["--device", "fake", "--decode-worker-count", "1"];
    let (mut process, ready) = up(dir.path(), &more).await;
    let api = api(&ready);
    let question = json!({
        "model": ready["model"], "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}],
    });
    // The bus comes last: with it everybody is cut off for a while.
    for name in ["context-0", "decode-0", "api-server", "nats-server"] {
        let now = || -> Value {
            let text = fs::read(dir.path().join("ready.json")).expect("the ready file");
            serde_json::from_slice(&text).expect("JSON")
        };
        let pid = now()["pids"][name].clone();
        let killed = Command::new("kill")
            .args(["-KILL", &pid.to_string()])
            .status();
        assert!(killed.expect("kill").success());
        let what = format!("{name} to be started again and the cluster to answer");
        eventually(&what, 2 * PATIENCE, async || {
            if let Some(status) = process.ended() {
                panic!("baton up ended: {status}");
            }
            if now()["pids"][name] == pid {
                return Err("not started yet".to_owned());
            }
            let health = api.look("/health").await?;
            if health.status != 200 {
                return Err(health.body.to_string());
            }
            let body = question.to_string();
            let path = "/v1/chat/completions";
            match api
                .send(Method::POST, path, Some(body.into_bytes()))
                .await?
            {
                answer if answer.status == 200 => Ok(()),
                answer => Err(answer.body.to_string()),
            }
        })
        .await;
    }
    let last = fs::read(dir.path().join("ready.json")).expect("the ready file");
    let last: Value = serde_json::from_slice(&last).expect("JSON");
    process.signal(Signal::Interrupt);
    assert!(process.end(PATIENCE).await.success());
    all_gone(&last).await;
}

#[tokio::test]
async fn status_says_what_is_wrong() {
    let turn = Turn::take();
    let nobody = run(&["status", "--url", "http://127.0.0.1:9"]);
    assert!(!nobody.status.success());
    let said = text(&nobody.stderr);
    assert!(said.contains("http://127.0.0.1:9"), "{said}");

    let setup = Setup {
        device: "fake",
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    assert!(
        run(&["status", "--url", cluster.api.base()])
            .status
            .success()
    );
    cluster.kill("decode-0");
    eventually("status to fail", PATIENCE, async || {
        let status = run(&["status", "--url", cluster.api.base()]);
        if status.status.success() {
            return Err(text(&status.stdout));
        }
        assert!(
            text(&status.stdout).contains("decode"),
            "{}",
            text(&status.stdout)
        );
        Ok(())
    })
    .await;
}

#[test]
fn a_truncated_gguf_is_refused_with_a_sentence() {
    let dir = TempDir::new().expect("a temporary directory");
    let whole = fs::read(smollm2_gguf()).expect("the model");
    for kept in [3, 1000, whole.len() / 2, whole.len() - 1] {
        let file = dir.path().join(format!("cut-{kept}.gguf"));
        fs::write(&file, &whole[..kept]).expect("a file below a temporary directory");
        let out = dir.path().join("out");
        let outcome = run(&[
            "model-prep",
            "--model",
            file.to_str().expect("a plain path"),
            "--out",
            out.to_str().expect("a plain path"),
        ]);
        let said = text(&outcome.stderr);
        assert!(
            !outcome.status.success(),
            "{kept} bytes were taken for a model"
        );
        assert!(said.contains(&format!("cut-{kept}.gguf")), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        assert!(!out.exists(), "something was left after {kept} bytes");
        fs::remove_file(&file).expect("the file just written");
    }
}

#[test]
fn a_prepared_model_is_not_made_twice() {
    let model = model_dir().to_str().expect("a plain path").to_owned();
    let manifest =
        || fs::metadata(model_dir().join("manifest.json")).and_then(|meta| meta.modified());
    let before = manifest().expect("the manifest");
    let gguf = smollm2_gguf();
    let gguf = gguf.to_str().expect("a plain path");
    let again = run(&[
        "model-prep",
        "--model",
        gguf,
        "--max-num-tokens",
        "2048",
        "--out",
        &model,
    ]);
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert_eq!(manifest().expect("the manifest"), before);
    let dry = run(&[
        "model-prep",
        "--model",
        gguf,
        "--dry-run",
        "--out",
        "/nowhere/at/all",
    ]);
    assert!(dry.status.success(), "{}", text(&dry.stderr));
    assert!(!Path::new("/nowhere").exists());
}

#[test]
fn a_worker_without_a_model_says_so() {
    let outcome = run(&[
        "worker",
        "--role",
        "both",
        "--model",
        "/nowhere/model",
        "--request-plane-uri",
        "nats://127.0.0.1:9",
    ]);
    let said = text(&outcome.stderr);
    assert!(!outcome.status.success());
    assert!(said.contains("/nowhere/model"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
