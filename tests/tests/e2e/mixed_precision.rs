//! Context and decode workers of one model in different precisions, and workers that must not be paired.

use std::fs;
use std::path::Path;
use std::process::Command;

use baton_protocol::{PeerState, Role};
use baton_tests::{
    Cluster, PATIENCE, Setup, Trace, Turn, baton, eventually, fp8_model_dir, model_dir,
};
use serde_json::{Value, json};

use crate::golden::{Limits, compare_with_the_reference};

/// What FP8 weights on one side cost against the reference's BF16 ones: measured 0.38 for log-probabilities; the margin
/// is that of `workers/cpu/tests`, where FP8 computes everything.
const LIMITS: Limits = Limits {
    margin: 0.7,
    logprob_error_max: 0.6,
};

/// Prompts of the reference, 64 steps each.
const CASES: usize = 3;

#[tokio::test]
async fn workers_of_different_precision_serve_one_model() {
    let turn = Turn::take();
    let (bf16, fp8) = ((model_dir(), "bf16"), (fp8_model_dir(), "fp8-channel"));
    for ((context, context_weights), (decode, decode_weights)) in [(bf16, fp8), (fp8, bf16)] {
        let setup = Setup {
            model: context,
            decode_model: Some(decode),
            ..Setup::split(1, 1)
        };
        let cluster = Cluster::start(&turn, setup).await;

        let shown = cluster.known_workers().await.expect("/cluster");
        assert_eq!(shown["context-0"]["weights"], context_weights);
        assert_eq!(shown["decode-0"]["weights"], decode_weights);
        let status = Command::new(baton())
            .args(["status", "--url", cluster.api.base()])
            .output()
            .expect("the binary was built");
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        for weights in [context_weights, decode_weights] {
            assert!(status.contains(weights), "{status}");
        }

        cluster.tells_the_capital().await;

        let (differ, worst) = compare_with_the_reference(&cluster, CASES, &LIMITS).await;
        println!("{context_weights} to {decode_weights}: {differ} other tokens, error {worst:.3}");
        cluster.drained(PATIENCE).await;
    }
}

/// The text may go on otherwise then, but it goes on: every token is there, once.
#[tokio::test]
async fn a_request_goes_on_at_a_worker_of_another_precision() {
    const TOKENS: usize = 200;
    let turn = Turn::take();
    let setup = Setup {
        decode_model: Some(fp8_model_dir()),
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    cluster.add_with(Role::Decode, &Setup::split(1, 1));
    cluster.ready().await;

    let from = cluster.tap.now();
    let request = json!({"model": cluster.model().await, "prompt": "Once upon a time", "max_tokens": TOKENS,
                         "temperature": 0, "ignore_eos": true});
    let api = cluster.api.clone();
    let answer = tokio::spawn(async move { api.complete(&request).await });
    let job = cluster.tap.wait_kind("decode", from, PATIENCE).await;
    let (_, victim) = job.kind().expect("a message of Baton");
    cluster.tap.wait_tokens(from, PATIENCE).await;
    cluster.kill(victim);
    let answer = answer.await.expect("answered");
    assert_eq!(answer["usage"]["completion_tokens"], TOKENS, "{answer}");
    let trace = Trace::only(&cluster.tap, from).await;
    assert_eq!(trace.output().len(), TOKENS);
    let (last, _) = trace.decodes.last().expect("decoded");
    assert_ne!(last, victim, "it ended before its worker did");
    cluster.drained(PATIENCE).await;
}

/// The model directory of the tests with another identity, for the fake device: the manifest is all it reads.
fn namesake(dir: &Path) -> &'static Path {
    let out = dir.join("namesake");
    fs::create_dir(&out).expect("a new directory");
    for entry in fs::read_dir(model_dir()).expect("the model").flatten() {
        std::os::unix::fs::symlink(entry.path(), out.join(entry.file_name())).expect("a link");
    }
    let manifest = fs::read(out.join("manifest.json")).expect("the manifest");
    let mut manifest: Value = serde_json::from_slice(&manifest).expect("it is JSON");
    manifest["fingerprint"] = "c".repeat(64).into();
    fs::remove_file(out.join("manifest.json")).expect("it was a link");
    fs::write(out.join("manifest.json"), manifest.to_string()).expect("a new file");
    Box::leak(out.into_boxed_path())
}

#[tokio::test]
async fn kv_of_another_model_or_layout_is_refused_with_the_reason() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup.clone()).await;
    let layout = cluster.add_with(
        Role::Context,
        &Setup {
            worker_args: vec!["--block-tokens".to_owned(), "16".to_owned()],
            ..setup.clone()
        },
    );
    let model = cluster.add_with(
        Role::Context,
        &Setup {
            model: namesake(cluster.dir()),
            ..setup
        },
    );
    for (worker, reason) in [
        (
            layout,
            "its KV is laid out otherwise: tokens per block is 32 here and 16 there",
        ),
        (
            model,
            "it serves another smollm2-135m-instruct (cccccccccccc…",
        ),
    ] {
        eventually("the reason to be shown", PATIENCE, async || {
            let beats = cluster.beats().await;
            let decode = beats.get("decode-0").ok_or("no beat of decode-0")?;
            let peer = decode
                .peers
                .iter()
                .find(|peer| peer.worker.as_str() == worker);
            let peer = peer.ok_or_else(|| format!("{worker} is not shown"))?;
            assert_eq!(peer.state, PeerState::Broken);
            let error = peer.error.as_deref().unwrap_or_default();
            assert!(error.contains(reason), "{error}");
            Ok(())
        })
        .await;
    }

    // Nobody is sent there.
    let from = cluster.tap.now();
    let name = cluster.model().await;
    for prompt in ["a", "b", "c", "d"] {
        let request = json!({"model": name, "prompt": prompt, "max_tokens": 4, "ignore_eos": true});
        cluster.api.complete(&request).await;
    }
    for trace in Trace::all(&cluster.tap, from).await.values() {
        let contexts: Vec<_> = trace
            .prefills
            .iter()
            .map(|(worker, _)| worker.as_str())
            .collect();
        assert_eq!(contexts, ["context-0"]);
    }
}
