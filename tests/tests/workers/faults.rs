//! Executors that break, for one sequence or for good.

use baton_engine::FakeFaults;
use baton_protocol::{Beat, FailureCode, PrefillReply, Refusal, Role, SequenceSpec, WorkerState};
use baton_worker::{Device, WorkerError};

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_without_a_next_token_ends_and_no_other() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let (good, bad) = (prompt(1, 30, 40), prompt(2, 30, 40));
    let text = undisturbed(&bad);
    let mut config = house.config("both", Role::Both);
    config.prefix_cache = true;
    config.device = Device::Fake { step_micros: 1_000 };
    config.fake_faults = FakeFaults {
        no_logit: Some(text[20]),
        ..FakeFaults::default()
    };
    assert!(!undisturbed(&good).contains(&text[20]));
    let both = Worker::start(config);
    api.until(&both.id, "at all", |_| true).await;

    let requests = [new_request(), new_request()];
    let good_handle = api.staged(&both.id, requests[0], &good).await;
    let bad_handle = api.staged(&both.id, requests[1], &bad).await;
    api.admitted(&both.id, &api.decode_job(requests[0], &good, &good_handle))
        .await;
    api.admitted(&both.id, &api.decode_job(requests[1], &bad, &bad_handle))
        .await;
    let stream = api.stream(requests[1], 0).await;
    assert_eq!(stream.failure(), FailureCode::NoToken);
    assert_eq!(stream.tokens, text[1..=20], "what came before is right");
    assert_whole(&api.stream(requests[0], 0).await, &good, &good_handle);

    // A prompt that ends in it.
    let mut bad = prompt(3, 30, 40);
    bad.tokens.0[29] = text[20];
    let job = api.prefill_job(new_request(), &bad);
    let PrefillReply::Failed { failure, .. } = api.prefill(&both.id, &job).await else {
        panic!("it went well")
    };
    assert_eq!(failure.code, FailureCode::NoToken);
    assert!(failure.message.contains("no finite logit"), "{failure}");
    api.until(&both.id, "serving, and nothing used", |beat| {
        beat.state == WorkerState::Serving && beat.load.blocks_used == 0
    })
    .await;
    both.stop().await;
}

/// Who was in the refused step hears of it and may be run again; the worker serves on, and says how often it happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_step_ends_its_requests_and_not_the_worker() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let sequence = prompt(1, 30, 1_000);
    let text = undisturbed(&sequence);
    let mut config = house.config("both", Role::Both);
    config.device = Device::Fake { step_micros: 5_000 };
    let bad = other_prompt(&sequence, &text);
    config.fake_faults = FakeFaults {
        refuse: Some(bad.tokens.0[29]),
        ..FakeFaults::default()
    };
    let both = Worker::start(config);
    api.until(&both.id, "at all", |_| true).await;
    let request = new_request();
    let handle = api.staged(&both.id, request, &sequence).await;
    api.admitted(&both.id, &api.decode_job(request, &sequence, &handle))
        .await;
    api.first_tokens(request).await;

    let job = api.prefill_job(new_request(), &bad);
    let PrefillReply::Failed { failure, .. } = api.prefill(&both.id, &job).await else {
        panic!("it went well")
    };
    assert_eq!(failure.code, FailureCode::Executor);
    assert!(failure.code.retryable(), "elsewhere");
    assert!(
        failure.message.contains("the executor refused its step"),
        "{failure}"
    );
    let stream = api.stream(request, 0).await;
    assert_eq!(stream.failure(), FailureCode::Executor);
    assert_eq!(stream.tokens, text[1..1 + stream.tokens.len()]);
    api.until(&both.id, "that it serves and has refused one", |beat| {
        let load = &beat.load;
        beat.state == WorkerState::Serving && load.plans_refused == 1 && load.blocks_used == 0
    })
    .await;
    let again = prompt(1, 30, 10);
    let request = new_request();
    let handle = api.staged(&both.id, request, &again).await;
    api.admitted(&both.id, &api.decode_job(request, &again, &handle))
        .await;
    assert_whole(&api.stream(request, 0).await, &again, &handle);
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_executor_ends_its_worker_after_saying_so() {
    let breaks = |token| FakeFaults {
        step: Some(token),
        ..FakeFaults::default()
    };
    ends_after_saying_so(breaks, "as it was told").await;
}

/// A GPU that hangs is waited for by a thread that nothing can free. The desk sees it, says so, and the worker ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_executor_ends_its_worker_after_saying_so() {
    let hangs = |token| FakeFaults {
        hang: Some(token),
        ..FakeFaults::default()
    };
    let sentence = "the executor hangs: fake:5000 has been at one step for 5 s";
    ends_after_saying_so(hangs, sentence).await;
}

/// A worker with one prompt staged and another being decoded is given one whose last token is its executor's end.
async fn ends_after_saying_so(fault: impl FnOnce(u32) -> FakeFaults, sentence: &str) {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let sequence = prompt(1, 30, 1_000);
    let text = undisturbed(&sequence);
    let mut config = house.config("both", Role::Both);
    config.device = Device::Fake { step_micros: 5_000 };
    let bad = other_prompt(&sequence, &text);
    config.fake_faults = fault(bad.tokens.0[29]);
    let both = Worker::start(config);
    api.until(&both.id, "at all", |_| true).await;
    let staged = api.staged(&both.id, new_request(), &sequence).await;
    let request = new_request();
    let handle = api.staged(&both.id, request, &sequence).await;
    api.admitted(&both.id, &api.decode_job(request, &sequence, &handle))
        .await;
    api.first_tokens(request).await;

    let job = api.prefill_job(new_request(), &bad);
    let PrefillReply::Failed { failure, .. } = api.prefill(&both.id, &job).await else {
        panic!("it went well")
    };
    assert_eq!(failure.code, FailureCode::Executor);
    assert!(failure.code.retryable(), "elsewhere");
    assert!(failure.message.contains(sentence), "{failure}");
    let stream = api.stream(request, 0).await;
    assert_eq!(stream.failure(), FailureCode::Executor);
    assert_eq!(stream.tokens, text[1..1 + stream.tokens.len()]);
    // It still answers, and everything it says is no.
    let is_failed = |beat: &Beat| beat.state == WorkerState::Failed;
    let beat = api.until(&both.id, "that it failed", is_failed).await;
    assert_eq!(beat.reason, Some(failure.message));
    assert_eq!(beat.load.leased, 0);
    let job = api.prefill_job(new_request(), &sequence);
    let PrefillReply::Refused { refusal, .. } = api.prefill(&both.id, &job).await else {
        panic!("it was taken")
    };
    assert_eq!(refusal, Refusal::Draining);
    assert!(!api.release(&staged, |_| {}).await, "no lease is good");
    // And then it ends by itself, with an error.
    let error = both.left().await.expect_err("it failed");
    assert!(matches!(error, WorkerError::Failed { .. }), "{error}");
}

/// One whose last token is nowhere in this prompt and its text.
fn other_prompt(sequence: &SequenceSpec, text: &[u32]) -> SequenceSpec {
    let is_met = |token: u32| text.contains(&token) || sequence.tokens.0.contains(&token);
    (10..)
        .map(|seed| prompt(seed, 30, 40))
        .find(|other| !is_met(other.tokens.0[29]))
        .expect("there is one")
}
