//! Ends that nobody asked for: budgets, silent API servers, draining workers.

use std::time::{Duration, Instant};

use baton_protocol::deadlines::{GONE_AFTER_MS, NAME_FREE_AFTER_MS};
use baton_protocol::{
    Beat, DecodeJob, Drain, Draining, FailureCode, Incarnation, PROTOCOL_VERSION, PrefillJob,
    PrefillReply, Refusal, Role, WorkerState,
};
use baton_worker::{Device, WorkerError};

use crate::support::*;

fn slow(house: &House, name: &str, role: Role) -> baton_worker::WorkerConfig {
    let mut config = house.config(name, role);
    config.device = Device::Fake {
        step_micros: 20_000,
    };
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_ends_prefill_and_decode() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let both = Worker::start(slow(&house, "both", Role::Both));
    api.until(&both.id, "at all", |_| true).await;
    // 2,000 tokens take 32 steps of 20 ms.
    let job = PrefillJob {
        budget_ms: 100,
        ..api.prefill_job(new_request(), &prompt(1, 2_000, 10))
    };
    let PrefillReply::Failed { failure, .. } = api.prefill(&both.id, &job).await else {
        panic!("it went well")
    };
    assert_eq!(failure.code, FailureCode::Deadline);
    api.until_empty(&both.id).await;

    let (request, sequence) = (new_request(), prompt(1, 10, 1_000));
    let handle = api.staged(&both.id, request, &sequence).await;
    let job = DecodeJob {
        budget_ms: 300,
        ..api.decode_job(request, &sequence, &handle)
    };
    api.admitted(&both.id, &job).await;
    let stream = api.stream(request, 0).await;
    assert_eq!(stream.failure(), FailureCode::Deadline);
    assert_eq!(
        stream.tokens,
        undisturbed(&sequence)[1..1 + stream.tokens.len()],
        "what came is right"
    );
    api.until_empty(&both.id).await;
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_api_server_leaves_nothing_behind() {
    let house = House::new().await;
    let mut dead = Api::new(&house, "dead").await;
    let mut alive = Api::new(&house, "alive").await;
    let both = Worker::start(slow(&house, "both", Role::Both));
    dead.until(&both.id, "at all", |_| true).await;
    let sequence = prompt(1, 10, 2_000);
    dead.staged(&both.id, new_request(), &sequence).await;
    let decoding = new_request();
    let handle = dead.staged(&both.id, decoding, &sequence).await;
    dead.admitted(&both.id, &dead.decode_job(decoding, &sequence, &handle))
        .await;
    let kept = alive.staged(&both.id, new_request(), &sequence).await;
    dead.until(&both.id, "two leases, one running", |beat| {
        (beat.load.leased, beat.load.running) == (2, 1)
    })
    .await;
    dead.heart.abort();
    alive
        .until(&both.id, "only the living one's lease", |beat| {
            (beat.load.leased, beat.load.running) == (1, 0)
        })
        .await;
    assert!(alive.release(&kept, |_| {}).await);
    both.stop().await;
}

/// Killed and started again at once under its name: it never fell silent, yet nobody waits for what it asked before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_starts_anew_ends_what_its_former_life_asked_for() {
    let house = House::new().await;
    let mut former = Api::new(&house, "api").await;
    let mut other = Api::new(&house, "other").await;
    let mut config = slow(&house, "both", Role::Both);
    config.step_tokens = 16;
    let both = Worker::start(config);
    former.until(&both.id, "at all", |_| true).await;
    let sequence = prompt(1, 10, 2_000);

    // By its beats, whatever phase a request is in.
    former.staged(&both.id, new_request(), &sequence).await;
    let decoding = new_request();
    let handle = former.staged(&both.id, decoding, &sequence).await;
    let job = former.decode_job(decoding, &sequence, &handle);
    former.admitted(&both.id, &job).await;
    let kept = other.staged(&both.id, new_request(), &sequence).await;
    let prefilling = former.prefill_job(new_request(), &prompt(2, 2_000, 10));
    former
        .post(former.cluster.prefill(&both.id), &prefilling)
        .await;
    other
        .until(&both.id, "all of it", |beat| {
            (beat.load.leased, beat.load.running + beat.load.waiting) == (2, 2)
        })
        .await;
    former.heart.abort();
    let now = Api::in_life(&house, "api", Incarnation(2)).await;
    let restarted = Instant::now();
    other
        .until(&both.id, "only the other's lease", |beat| {
            let load = beat.load;
            (load.leased, load.running + load.waiting) == (1, 0)
        })
        .await;
    assert!(
        restarted.elapsed().as_millis() < GONE_AFTER_MS.into(),
        "it was waited for"
    );
    assert!(other.release(&kept, |_| {}).await);

    // What the former life has still to say is too late; and it ends nothing of the new one.
    let kept = now.staged(&both.id, new_request(), &sequence).await;
    let job = former.prefill_job(new_request(), &sequence);
    let PrefillReply::Refused {
        refusal: Refusal::Malformed { detail },
        ..
    } = former.prefill(&both.id, &job).await
    else {
        panic!("it was taken")
    };
    assert!(
        detail.contains("another API server has joined as api"),
        "{detail}"
    );
    former.beat().await;
    assert!(now.release(&kept, |_| {}).await);

    // By its first job, should that come before a beat.
    now.staged(&both.id, new_request(), &sequence).await;
    now.heart.abort();
    let third = now.in_incarnation(Incarnation(3));
    // The one before it may beat again, as far as the worker knows: it waits for that a little longer than a beat.
    let kept = loop {
        let job = third.prefill_job(new_request(), &sequence);
        match third.prefill(&both.id, &job).await {
            PrefillReply::Ready { handle, .. } => break *handle,
            PrefillReply::Refused {
                refusal: Refusal::Busy { retry_after_ms },
                ..
            } => {
                assert!(u64::from(retry_after_ms) <= NAME_FREE_AFTER_MS);
                tokio::time::sleep(Duration::from_millis(retry_after_ms.into())).await;
            }
            other => panic!("not staged: {other:?}"),
        }
    };
    other
        .until(&both.id, "only the newest lease", |beat| {
            beat.load.leased == 1
        })
        .await;
    assert!(third.release(&kept, |_| {}).await);
    other.until_empty(&both.id).await;
    both.stop().await;
}

/// Two processes have one name, and both beat: what the first one asked for stays, and the newcomer is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_takes_nothing_from_an_api_server_that_still_beats() {
    let house = House::new().await;
    let first = Api::new(&house, "api").await;
    let mut other = Api::new(&house, "other").await;
    let both = Worker::start(house.config("both", Role::Both));
    other.until(&both.id, "at all", |_| true).await;
    let sequence = prompt(1, 10, 2_000);
    let kept = first.staged(&both.id, new_request(), &sequence).await;
    let newcomer = Api::in_life(&house, "api", Incarnation(2)).await;
    // Longer than a dead one would be waited for.
    let begun = Instant::now();
    while begun.elapsed().as_millis() < (2 * NAME_FREE_AFTER_MS).into() {
        let job = newcomer.prefill_job(new_request(), &sequence);
        let reply = newcomer.prefill(&both.id, &job).await;
        let PrefillReply::Refused { refusal, .. } = reply else {
            panic!("it was taken: {reply:?}")
        };
        assert!(matches!(refusal, Refusal::Busy { .. }), "{refusal}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(first.release(&kept, |_| {}).await);
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_worker_finishes_and_takes_nothing_new() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    let mut decode = Worker::start(slow(&house, "dec", Role::Decode));
    api.until_ready(&decode.id, &context.id).await;
    let (request, sequence) = (new_request(), prompt(1, 10, 60));
    let handle = api.staged(&context.id, request, &sequence).await;
    let (late, late_handle) = (
        new_request(),
        api.staged(&context.id, new_request(), &sequence).await,
    );
    api.admitted(&decode.id, &api.decode_job(request, &sequence, &handle))
        .await;
    api.first_tokens(request).await;
    decode.signal();
    api.until(&decode.id, "that it drains", |beat| {
        beat.state == WorkerState::Draining
    })
    .await;
    assert_eq!(
        api.refused(&decode.id, &api.decode_job(late, &sequence, &late_handle))
            .await,
        Refusal::Draining
    );
    assert_whole(&api.stream(request, 0).await, &sequence, &handle);
    decode.left().await.unwrap();

    // A context worker waits for what it has staged.
    let mut context = context;
    context.signal();
    let beat = api
        .until(&context.id, "that it drains", |beat| {
            beat.state == WorkerState::Draining
        })
        .await;
    assert_eq!(beat.load.leased, 1);
    assert!(api.release(&late_handle, |_| {}).await);
    context.left().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_asked_over_the_bus_to_drain_finishes_and_leaves_and_a_later_life_stays() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let mut config = house.config("ctx", Role::Context);
    // One handle is never fetched: this is what ends it.
    config.drain_ms = 1_000;
    let context = Worker::start(config);
    let beat = api
        .until(&context.id, "that it serves", |beat| {
            beat.state == WorkerState::Serving
        })
        .await;
    let (request, sequence) = (new_request(), prompt(1, 10, 8));
    let handle = api.staged(&context.id, request, &sequence).await;
    let subject = api.cluster.drain(&context.id);
    let mut drain = Drain {
        v: PROTOCOL_VERSION,
        incarnation: Incarnation(beat.incarnation.0 ^ 1),
        from: "api".to_owned(),
    };
    let other: Draining = api.request(subject.clone(), &drain).await;
    assert!(!other.draining, "another life was meant");
    assert!(
        matches!(
            api.prefill(&context.id, &api.prefill_job(new_request(), &sequence))
                .await,
            PrefillReply::Ready { .. }
        ),
        "it serves on"
    );
    drain.incarnation = beat.incarnation;
    // Twice is as good as once.
    for _ in 0..2 {
        let meant: Draining = api.request(subject.clone(), &drain).await;
        assert!(meant.draining);
    }
    let draining = api
        .until(&context.id, "that it drains", |beat| {
            beat.state == WorkerState::Draining
        })
        .await;
    assert_eq!(draining.load.leased, 2, "what is staged is kept");
    assert!(api.release(&handle, |_| {}).await);
    context.left().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_takes_too_long_hands_the_rest_back() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let mut config = slow(&house, "both", Role::Both);
    config.drain_ms = 200;
    config.step_tokens = 16;
    let mut both = Worker::start(config);
    api.until(&both.id, "at all", |_| true).await;
    let (request, sequence) = (new_request(), prompt(1, 10, 2_000));
    let handle = api.staged(&both.id, request, &sequence).await;
    api.admitted(&both.id, &api.decode_job(request, &sequence, &handle))
        .await;
    api.first_tokens(request).await;
    // Staged, and nobody comes for it: its lease is longer than this test's patience.
    let unwanted = new_request();
    api.staged(&both.id, unwanted, &prompt(3, 10, 10)).await;
    let job = api.prefill_job(new_request(), &prompt(2, 2_000, 10));
    let id = both.id.clone();
    let mut other = Api::new(&house, "other").await;
    let prefill = api.prefill(&id, &job);
    let drain = async {
        let is_there = |beat: &Beat| beat.load.running + beat.load.waiting == 2;
        other.until(&id, "the prompt too", is_there).await;
        both.signal();
    };
    let (reply, ()) = tokio::join!(prefill, drain);
    let PrefillReply::Failed { failure, .. } = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(failure.code, FailureCode::Draining);
    let stream = api.stream(request, 0).await;
    assert_eq!(stream.failure(), FailureCode::Draining);
    assert_eq!(
        stream.tokens,
        undisturbed(&sequence)[1..1 + stream.tokens.len()],
        "what came is right"
    );
    both.left().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_start_says_why() {
    let house = House::new().await;
    let run = async |config| Worker::start(config).left().await.unwrap_err();
    let mut config = house.config("w", Role::Both);
    // Without a driver that is what is missing; with one, this GPU is.
    config.device = "cuda:99".parse().unwrap();
    let error = run(config).await.to_string();
    assert!(
        error.contains("the NVIDIA driver") || error.contains("there is no GPU 99"),
        "{error}"
    );
    let mut config = house.config("w", Role::Both);
    config.model_dir = "/nowhere".into();
    let error = run(config).await;
    assert!(matches!(error, WorkerError::Model { .. }), "{error}");
    let mut config = house.config("w", Role::Both);
    config.bus.url = "nats://127.0.0.1:1".into();
    config.bus.connect_wait = Some(Duration::from_millis(500));
    let error = run(config).await.to_string();
    assert!(
        error.contains("nats://127.0.0.1:1 was not reached"),
        "{error}"
    );
    let mut config = house.config("w", Role::Both);
    config.kv_bytes = Some(10);
    let error = run(config).await.to_string();
    assert!(error.contains("hold no block"), "{error}");
}
