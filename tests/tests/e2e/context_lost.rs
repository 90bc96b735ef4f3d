//! Context workers are frozen or killed before, during and after the hand-over of their KV. What a decode worker could
//! not prove to be whole is thrown away and computed elsewhere; what it could, it keeps.
//!
//! The fake device chooses tokens from the KV that it reads back, so foreign or torn KV would be another text.

use baton_protocol::Released;
use baton_tests::{Cluster, PATIENCE, Setup, Signal, Trace, Turn, eventually};
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

/// Two context workers and a decode worker of ten milliseconds a step: long enough for the API server to miss somebody.
fn setup() -> Setup {
    Setup {
        device: "fake:10000",
        ..Setup::split(2, 1)
    }
}

fn request(model: &str, first: usize, max_tokens: usize) -> Value {
    let prompt: Vec<usize> = (first..first + 200).collect();
    json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "seed": 1})
}

async fn undisturbed(cluster: &Cluster, request: &Value) -> Value {
    let choices = cluster.api.complete(request).await["choices"].clone();
    cluster.drained(PATIENCE).await;
    choices
}

/// Freezes the context worker that holds the KV of the request that is asked, before it is read. The prompt has been run
/// and the decode job lies before a decode worker that is frozen for as long.
async fn frozen_with_the_kv(cluster: &mut Cluster, request: &Value) -> (usize, String, AnswerTask) {
    let from = cluster.tap.now();
    cluster.signal("decode-0", Signal::Stop);
    let answer = cluster.api.ask(PATH, request);
    cluster.tap.wait_kind("decode", from, PATIENCE).await;
    let prefill = cluster.tap.wait_kind("prefill", from, PATIENCE).await;
    let victim = prefill.whom();
    cluster.signal(&victim, Signal::Stop);
    cluster.signal("decode-0", Signal::Continue);
    (from, victim, answer)
}

type AnswerTask = tokio::task::JoinHandle<baton_tests::Answer>;

/// The text came from another worker's KV, though the first one had it all.
async fn went_elsewhere(cluster: &Cluster, from: usize, victim: &str) {
    let trace = Trace::only(&cluster.tap, from).await;
    let (last, _) = trace.prefills.last().expect("prefilled");
    assert_ne!(last, victim, "KV was used that nobody vouched for");
    assert_eq!(trace.prefills[0].0, victim);
}

#[tokio::test]
async fn frozen_before_the_pull_nobody_vouches_for_what_was_read() {
    let turn = Turn::take();
    // over shared memory a frozen worker's KV can be read all the same: only the release stays without an answer
    let mut cluster = Cluster::start(&turn, setup()).await;
    let request = request(&cluster.model().await, 1000, 30);
    let expected = undisturbed(&cluster, &request).await;
    let (from, victim, answer) = frozen_with_the_kv(&mut cluster, &request).await;
    let release = cluster.tap.wait_kind("release", from, PATIENCE).await;
    assert_eq!(release.whom(), victim);
    assert_eq!(answer.await.expect("answered").ok()["choices"], expected);
    assert!(!cluster.tap.answered(&release));
    went_elsewhere(&cluster, from, &victim).await;

    // back among the living it answers, too late for anybody, and lets go
    cluster.signal(&victim, Signal::Continue);
    cluster.tap.answer(&release, PATIENCE).await;
    cluster.drained(PATIENCE).await;
    cluster.ready().await;
    assert_eq!(undisturbed(&cluster, &request).await, expected);
}

#[tokio::test]
async fn frozen_during_the_pull_the_prompt_runs_elsewhere() {
    let turn = Turn::take();
    // over TCP a read waits for the owner of the memory
    let setup = Setup {
        ucx_tls: Some("tcp,self"),
        ..setup()
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let request = request(&cluster.model().await, 1000, 30);
    let expected = undisturbed(&cluster, &request).await;
    let (from, victim, answer) = frozen_with_the_kv(&mut cluster, &request).await;
    assert_eq!(answer.await.expect("answered").ok()["choices"], expected);
    went_elsewhere(&cluster, from, &victim).await;
    cluster.signal(&victim, Signal::Continue);
    cluster.drained(PATIENCE).await;
    cluster.ready().await;
    assert_eq!(undisturbed(&cluster, &request).await, expected);
}

#[tokio::test]
async fn after_the_release_nobody_misses_it() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, setup()).await;
    let model = cluster.model().await;
    // six seconds: it is gone for everybody long before the end
    let request = request(&model, 1000, 600);
    let mut texts = Vec::new();
    for signal in [Signal::Stop, Signal::Kill] {
        let from = cluster.tap.now();
        let answer = cluster.api.ask(PATH, &request);
        let release = cluster.tap.wait_kind("release", from, PATIENCE).await;
        let victim = release.whom();
        let released: Released = cluster.tap.answer(&release, PATIENCE).await.read();
        assert!(released.valid);
        match signal {
            Signal::Kill => cluster.kill(&victim),
            signal => cluster.signal(&victim, signal),
        }
        eventually("the loss to be known", PATIENCE, async || {
            match cluster.known_workers().await?.contains_key(&victim) {
                true => Err(format!("{victim} is known")),
                false => Ok(()),
            }
        })
        .await;
        assert!(
            !answer.is_finished(),
            "it was over before the loss was known"
        );
        texts.push(answer.await.expect("answered").ok()["choices"].clone());
        let trace = Trace::only(&cluster.tap, from).await;
        assert_eq!((trace.prefills.len(), trace.decodes.len()), (1, 1));
        assert_eq!(trace.output().len(), 600);
        if signal == Signal::Stop {
            cluster.signal(&victim, Signal::Continue);
            cluster.ready().await;
        }
        cluster.drained(PATIENCE).await;
    }
    assert_eq!(texts[0], texts[1]);
}
