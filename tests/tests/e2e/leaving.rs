//! A client that leaves, in every phase of its request, frees everything at once.

use std::time::Duration;

use baton_protocol::{PrefillReply, Role};
use baton_tests::{Api, Cluster, PATIENCE, Setup, Signal, Trace, Turn, eventually};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// The goal is one second. An idle machine needs far less; a busy one must not fail the test.
const FREED_WITHIN: Duration = Duration::from_secs(20);

/// A client whose request runs until it is done or the client leaves.
struct Client(JoinHandle<()>);

impl Client {
    fn ask(api: &Api, body: &Value, stream: bool) -> Self {
        let (api, body) = (api.clone(), body.clone());
        Self(tokio::spawn(async move {
            if stream {
                api.stream("/v1/completions", &body).await.rest().await;
            } else {
                api.post("/v1/completions", &body).await;
            }
        }))
    }

    /// Closes the connection.
    async fn leave(self) {
        assert!(!self.0.is_finished(), "the request ended by itself");
        self.0.abort();
        let _ = self.0.await;
    }
}

async fn long_request(cluster: &Cluster) -> Value {
    json!({"model": cluster.model().await, "prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": true})
}

/// Waits for the message by which the API server ends a request.
async fn abort_heard(cluster: &Cluster, from: usize, worker: &str) {
    let what = format!("an abort sent to {worker}");
    cluster
        .tap
        .wait(&what, from, FREED_WITHIN, |message| {
            (message.kind() == Some(("abort", worker))).then_some(())
        })
        .await;
}

#[tokio::test]
async fn while_queued() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    let request = long_request(&cluster).await;
    for stream in [true, false] {
        let from = cluster.tap.now();
        // a frozen worker takes nothing out of its queue
        cluster.signal("context-0", Signal::Stop);
        let client = Client::ask(&cluster.api, &request, stream);
        let job = cluster.tap.wait_kind("prefill", from, PATIENCE).await;
        client.leave().await;
        abort_heard(&cluster, from, "context-0").await;
        assert!(!cluster.tap.answered(&job));
        cluster.signal("context-0", Signal::Continue);
        cluster.drained(FREED_WITHIN).await;
        assert!(Trace::only(&cluster.tap, from).await.decodes.is_empty());
    }
    serves(&cluster).await;
}

#[tokio::test]
async fn while_prefilling() {
    let turn = Turn::take();
    let setup = Setup {
        step_tokens: 32,
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    for (stream, first) in [(true, 400), (false, 500)] {
        let mut request = long_request(&cluster).await;
        let prompt: Vec<usize> = (first..first + 1900).collect();
        request["prompt"] = json!(prompt);
        request["max_tokens"] = json!(16);
        let from = cluster.tap.now();
        let client = Client::ask(&cluster.api, &request, stream);
        cluster.tap.wait_kind("prefill", from, PATIENCE).await;
        eventually("the prompt to run", PATIENCE, async || {
            let load = cluster.beats().await["context-0"].load;
            if load.running + load.waiting > 0 && load.blocks_used > 0 {
                Ok(())
            } else {
                Err(format!("{load:?}"))
            }
        })
        .await;
        // freeze it there, so that the test does not depend on how long a prompt takes
        cluster.signal("context-0", Signal::Stop);
        let trace = Trace::only(&cluster.tap, from).await;
        assert!(trace.output().is_empty(), "the prompt was too short");
        client.leave().await;
        abort_heard(&cluster, from, "context-0").await;
        cluster.signal("context-0", Signal::Continue);
        cluster.drained(FREED_WITHIN).await;
        let trace = Trace::only(&cluster.tap, from).await;
        assert!(trace.output().is_empty(), "the prompt ran to its end");
        assert!(trace.pulled.is_empty(), "it was generated from");
    }
    serves(&cluster).await;
}

#[tokio::test]
async fn while_pulling() {
    let turn = Turn::take();
    let setup = Setup {
        // gets over TCP are emulated: they need the owner of the memory to make progress
        ucx_tls: Some("tcp,self"),
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    for (stream, first) in [(true, 400), (false, 500)] {
        let mut request = long_request(&cluster).await;
        let prompt: Vec<usize> = (first..first + 200).collect();
        request["prompt"] = json!(prompt);
        let from = cluster.tap.now();
        cluster.signal("decode-0", Signal::Stop);
        let client = Client::ask(&cluster.api, &request, stream);
        let job = cluster.tap.wait_kind("decode", from, PATIENCE).await;
        // staged; with its owner frozen the KV cannot be read
        cluster.signal("context-0", Signal::Stop);
        cluster.signal("decode-0", Signal::Continue);
        cluster.tap.answer(&job, PATIENCE).await;
        let trace = Trace::only(&cluster.tap, from).await;
        assert!(trace.pulled.is_empty(), "the pull is over");
        client.leave().await;
        abort_heard(&cluster, from, "decode-0").await;
        abort_heard(&cluster, from, "context-0").await;
        cluster.signal("context-0", Signal::Continue);
        cluster.drained(FREED_WITHIN).await;
        cluster.ready().await;
    }
    serves(&cluster).await;
}

#[tokio::test]
async fn while_decoding() {
    let turn = Turn::take();
    let cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    for (stream, n) in [(true, 1), (false, 1), (true, 3), (false, 3)] {
        let mut request = long_request(&cluster).await;
        request["n"] = json!(n);
        request["temperature"] = json!(1);
        let from = cluster.tap.now();
        let client = Client::ask(&cluster.api, &request, stream);
        cluster.tap.wait_tokens(from, PATIENCE).await;
        client.leave().await;
        abort_heard(&cluster, from, "decode-0").await;
        cluster.drained(FREED_WITHIN).await;
        let traces = Trace::all(&cluster.tap, from).await;
        assert_eq!(traces.len(), n);
        for trace in traces.values() {
            assert!(!trace.aborts.is_empty());
            assert!(trace.output().len() < 1500);
        }
    }
    serves(&cluster).await;
}

/// A handle that nobody fetches: its lease ends, its blocks come back.
#[tokio::test]
async fn nobody_comes_for_the_handle() {
    let turn = Turn::take();
    let setup = Setup {
        worker_args: vec!["--lease-ms".to_owned(), "500".to_owned()],
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let from = cluster.tap.now();
    // what an API server does that dies right after the prompt: a prefill job and nothing more
    let mut request = long_request(&cluster).await;
    request["max_tokens"] = json!(2);
    cluster.api.complete(&request).await;
    let job = cluster.tap.wait_kind("prefill", from, PATIENCE).await;
    cluster.drained(FREED_WITHIN).await;
    let reply = cluster
        .tap
        .client()
        .request(job.subject.clone(), job.payload.clone())
        .await
        .expect("an answer");
    let reply: PrefillReply = serde_json::from_slice(&reply.payload).expect("a prefill reply");
    assert!(matches!(reply, PrefillReply::Ready { .. }), "{reply:?}");
    cluster.drained(FREED_WITHIN).await;
    assert_eq!(cluster.worker("context-0").role, Role::Context);
    serves(&cluster).await;
}

async fn serves(cluster: &Cluster) {
    let mut request = long_request(cluster).await;
    request["max_tokens"] = json!(8);
    let answer = cluster.api.complete(&request).await;
    assert_eq!(answer["usage"]["completion_tokens"], 8);
    cluster.drained(PATIENCE).await;
}
