//! One side is lost while the KV of a prompt of several steps follows the prompt: the context worker has some of it computed, the
//! decode worker has read some of that. The client gets the text that it would have got, and no pool keeps a block.
//!
//! The fake device chooses tokens from the KV that it reads back, so a part that is missing or foreign would be another text.

use std::time::Duration;

use baton_protocol::{DecodeJob, DecodeReply, PrefillReply, ProgressReply, Role};
use baton_tests::{
    Answer, Cluster, Message, PATIENCE, Setup, Signal, Trace, Turn, eventually, within,
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const PATH: &str = "/v1/completions";

/// Tokens of a step, and of a block.
const STEP_TOKENS: usize = 32;

/// Sixty steps of 40 ms: whoever is hit after the first few is hit while the prompt runs, on a busy machine too.
const PROMPT_TOKENS: usize = 60 * STEP_TOKENS;

/// Nothing of a prompt is kept for the next one: each runs in steps.
fn setup(ucx_tls: Option<&'static str>) -> Setup {
    Setup {
        device: "fake:40000",
        step_tokens: STEP_TOKENS,
        ucx_tls,
        worker_args: vec!["--no-prefix-cache".to_owned()],
        ..Setup::split(2, 2)
    }
}

fn request(model: &str) -> Value {
    let prompt: Vec<usize> = (1000..1000 + PROMPT_TOKENS).collect();
    json!({"model": model, "prompt": prompt, "max_tokens": 30, "ignore_eos": true, "seed": 1, "logprobs": 2})
}

/// A request whose prompt is being run and followed.
struct Followed {
    from: usize,
    /// Who runs it.
    context: String,
    /// Who follows it.
    decode: String,
    answer: JoinHandle<Answer>,
}

impl Followed {
    /// Asks, and waits until the decode worker has been told twice that more is final: it has read what came first.
    async fn ask(cluster: &Cluster, request: &Value) -> Self {
        let from = cluster.tap.now();
        let answer = cluster.api.ask(PATH, request);
        let prefill = cluster.tap.wait_kind("prefill", from, PATIENCE).await;
        let begun: PrefillReply = cluster.tap.answer(&prefill, PATIENCE).await.read();
        assert!(matches!(begun, PrefillReply::Begun { .. }), "{begun:?}");
        let job = cluster.tap.wait_kind("decode", from, PATIENCE).await;
        assert!(job.read::<DecodeJob>().handle.is_streamed());
        let admitted: DecodeReply = cluster.tap.answer(&job, PATIENCE).await.read();
        assert!(
            matches!(admitted, DecodeReply::Admitted { .. }),
            "{admitted:?}"
        );
        let mut told = 0;
        cluster
            .tap
            .wait("more of the KV to be final", from, PATIENCE, |message| {
                told += usize::from(matches!(progress(message), Some(ProgressReply::Running { tokens, .. }) if tokens > 0));
                (told == 2).then_some(())
            })
            .await;
        Self {
            from,
            context: prefill.whom(),
            decode: job.whom(),
            answer,
        }
    }

    /// The prompt was still running when this was called: neither side had said otherwise.
    async fn was_in_mid_stream(&self, cluster: &Cluster) {
        cluster.tap.catch_up().await;
        let done = cluster.tap.heard(self.from, |message| {
            matches!(progress(message), Some(ProgressReply::Done { .. })).then_some(())
        });
        assert!(done.is_empty(), "the prompt was over before the loss");
        assert!(!self.answer.is_finished());
    }

    async fn choices(&mut self) -> Value {
        let answer = within("the answer", 2 * PATIENCE, &mut self.answer).await;
        answer.expect("asked").ok()["choices"].clone()
    }
}

/// What a message says of how far a prompt is, if it does.
fn progress(message: &Message) -> Option<ProgressReply> {
    match message.kind() {
        Some(_) => None,
        None => serde_json::from_slice(&message.payload).ok(),
    }
}

/// The answer when nothing happens, and that its KV followed the prompt.
async fn undisturbed(cluster: &Cluster, request: &Value) -> Value {
    let from = cluster.tap.now();
    let choices = cluster.api.complete(request).await["choices"].clone();
    let trace = Trace::only(&cluster.tap, from).await;
    assert!(trace.decodes[0].1.handle.is_streamed());
    assert_eq!((trace.prefills.len(), trace.decodes.len()), (1, 1));
    cluster.drained(PATIENCE).await;
    choices
}

/// Every worker but the one that is lost holds nothing any more.
async fn others_are_free(cluster: &Cluster, lost: &str) {
    eventually("the others' pools to be free", PATIENCE, async || {
        let beats = cluster.beats().await;
        for worker in cluster.workers().iter().filter(|other| other.name != lost) {
            let beat = beats.get(&worker.name);
            let load = beat
                .ok_or_else(|| format!("no beat of {}", worker.name))?
                .load;
            let held = load.running + load.waiting + load.leased + load.pulling + load.blocks_used;
            if held > 0 {
                return Err(format!("{} holds {load:?}", worker.name));
            }
        }
        Ok(())
    })
    .await;
}

/// Loses the worker of this role in mid-stream, by this signal, and has it come back.
async fn lose(role: Role, signal: Signal, ucx_tls: Option<&'static str>) {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, setup(ucx_tls)).await;
    let request = request(&cluster.model().await);
    let expected = undisturbed(&cluster, &request).await;

    let mut followed = Followed::ask(&cluster, &request).await;
    let victim = match role {
        Role::Context => followed.context.clone(),
        Role::Decode | Role::Both => followed.decode.clone(),
    };
    match signal {
        Signal::Kill => cluster.kill(&victim),
        signal => cluster.signal(&victim, signal),
    }
    followed.was_in_mid_stream(&cluster).await;

    assert_eq!(followed.choices().await, expected);
    let trace = Trace::only(&cluster.tap, followed.from).await;
    assert_eq!(trace.output().len(), 30);
    let (prefilled, _) = trace.prefills.last().expect("prefilled");
    let (decoded, _) = trace.decodes.last().expect("decoded");
    match role {
        Role::Context => assert_ne!(
            *prefilled, victim,
            "the KV of a prompt that never ended was used"
        ),
        Role::Decode | Role::Both => assert_ne!(*decoded, victim),
    }
    others_are_free(&cluster, &victim).await;

    // Back among the living, it holds nothing of that either, and serves.
    match signal {
        Signal::Kill => cluster.restart(&victim, role),
        _ => cluster.signal(&victim, Signal::Continue),
    }
    cluster.ready().await;
    cluster.drained(PATIENCE + Duration::from_secs(10)).await;
    assert_eq!(undisturbed(&cluster, &request).await, expected);
}

#[tokio::test]
async fn the_context_worker_dies() {
    lose(Role::Context, Signal::Kill, None).await;
}

/// Over shared memory what is final can be read all the same: nobody says what is.
#[tokio::test]
async fn the_context_worker_freezes() {
    lose(Role::Context, Signal::Stop, None).await;
}

/// Over TCP a read waits for whoever owns the memory, and its destination waits for the read.
#[tokio::test]
async fn the_context_worker_freezes_under_a_read() {
    lose(Role::Context, Signal::Stop, Some("tcp,self")).await;
}

#[tokio::test]
async fn the_decode_worker_dies() {
    lose(Role::Decode, Signal::Kill, None).await;
}

#[tokio::test]
async fn the_decode_worker_freezes() {
    lose(Role::Decode, Signal::Stop, None).await;
}
