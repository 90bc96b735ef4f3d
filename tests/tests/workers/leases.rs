//! Staged KV, and everything that ends it: release, expiry, abort.

use std::time::{Duration, Instant};

use baton_protocol::{
    FailureCode, Incarnation, KvHandle, Nonce, PROTOCOL_VERSION, Release, Renew, Renewed, Role,
};
use baton_worker::Device;

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_is_valid_once_and_only_with_proof() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    api.until(&context.id, "at all", |_| true).await;
    let handle = api
        .staged(&context.id, new_request(), &prompt(1, 50, 10))
        .await;
    let other = api
        .staged(&context.id, new_request(), &prompt(1, 50, 10))
        .await;
    assert_ne!(handle.nonce, other.nonce);
    assert_ne!(handle.handle, other.handle);

    assert!(
        !api.release(&handle, |r| r.nonce = Nonce(r.nonce.0 ^ 1))
            .await,
        "wrong nonce"
    );
    assert!(
        !api.release(&handle, |r| r.nonce = other.nonce).await,
        "another handle's nonce"
    );
    assert!(
        !api.release(&handle, |r| r.incarnation =
            Incarnation(r.incarnation.0 ^ 1))
            .await,
        "another life"
    );
    assert!(
        !api.release(&handle, |r| r.handle.0 += 1_000).await,
        "no such handle"
    );
    api.until(&context.id, "both leases still there", |beat| {
        beat.load.leased == 2
    })
    .await;

    assert!(api.release(&handle, |_| {}).await);
    assert!(!api.release(&handle, |_| {}).await, "a second time");
    assert!(api.release(&other, |_| {}).await);
    api.until_empty(&context.id).await;

    // What comes late: after an abort, and in the worker's next life.
    let (aborted, kept) = (new_request(), new_request());
    let handle = api.staged(&context.id, aborted, &prompt(1, 50, 10)).await;
    api.abort(&context.id, aborted).await;
    api.until_empty(&context.id).await;
    assert!(!api.release(&handle, |_| {}).await, "after its abort");
    let of_old = api.staged(&context.id, kept, &prompt(2, 50, 10)).await;
    api.abort(&context.id, kept).await;
    context.stop().await;
    let restarted = Worker::start(house.config("ctx", Role::Context));
    api.until(&restarted.id, "in its next life", |beat| {
        beat.incarnation != of_old.incarnation
    })
    .await;
    // Handles are numbered again in each life: one of the same number comes.
    let mut of_new = Vec::new();
    while of_new
        .last()
        .is_none_or(|handle: &KvHandle| handle.handle != of_old.handle)
    {
        let sequence = prompt(2, 50, 10);
        of_new.push(api.staged(&restarted.id, new_request(), &sequence).await);
    }
    assert!(!api.release(&of_old, |_| {}).await, "of a former life");
    for handle in &of_new {
        let former = |r: &mut Release| r.incarnation = of_old.incarnation;
        assert!(!api.release(handle, former).await, "said to be of one");
        assert!(api.release(handle, |_| {}).await);
    }
    restarted.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_ends_by_itself_and_its_handle_is_worth_nothing() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let mut config = house.config("ctx", Role::Context);
    config.lease_ms = 300;
    let context = Worker::start(config);
    let decode = Worker::start(house.config("dec", Role::Decode));
    api.until_ready(&decode.id, &context.id).await;
    let (request, sequence) = (new_request(), prompt(1, 50, 10));
    let handle = api.staged(&context.id, request, &sequence).await;
    assert_eq!(handle.lease_ms, 300);
    // Nothing else is going on at the worker.
    api.until_empty(&context.id).await;
    assert!(!api.release(&handle, |_| {}).await);

    // The blocks are another prompt's by now: whatever is read must not become text.
    let other = api
        .staged(&context.id, new_request(), &prompt(2, 50, 10))
        .await;
    assert_eq!(
        handle.runs, other.runs,
        "the other prompt took the same blocks"
    );
    api.admitted(&decode.id, &api.decode_job(request, &sequence, &handle))
        .await;
    let stream = api.stream(request, 0).await;
    assert_eq!(
        (stream.failure(), stream.tokens.len()),
        (FailureCode::HandleInvalid, 0)
    );
    api.until_empty(&decode.id).await;
    api.until_empty(&context.id).await;
    decode.stop().await;
    context.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_lives_for_as_long_as_it_is_renewed() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let mut config = house.config("ctx", Role::Context);
    config.lease_ms = 2_000;
    let context = Worker::start(config);
    api.until(&context.id, "at all", |_| true).await;
    let request = new_request();
    let handle = api.staged(&context.id, request, &prompt(1, 50, 10)).await;
    let renewed = async |api: &Api, handle: &KvHandle, change: fn(&mut Renew)| {
        let mut renew = Renew {
            v: PROTOCOL_VERSION,
            request,
            incarnation: handle.incarnation,
            handle: handle.handle,
            nonce: handle.nonce,
        };
        change(&mut renew);
        let subject = house.cluster.renew(&context.id);
        api.request::<_, Renewed>(subject, &renew).await.valid
    };
    assert!(
        !renewed(&api, &handle, |renew| renew.nonce.0 ^= 1).await,
        "a wrong nonce"
    );
    assert!(!renewed(&api, &handle, |renew| renew.incarnation.0 ^= 1).await);
    assert!(!renewed(&api, &handle, |renew| renew.handle.0 += 1_000).await);
    let staged = Instant::now();
    while staged.elapsed() < Duration::from_secs(3) {
        assert!(
            renewed(&api, &handle, |_| {}).await,
            "after {:?}",
            staged.elapsed()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(api.release(&handle, |_| {}).await);
    assert!(!renewed(&api, &handle, |_| {}).await, "it was released");
    let handle = api.staged(&context.id, request, &prompt(1, 50, 10)).await;
    api.until_empty(&context.id).await;
    assert!(!renewed(&api, &handle, |_| {}).await, "its time was over");
    assert!(!api.release(&handle, |_| {}).await);
    context.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_frees_everything_in_every_phase() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let slow = |name, role| {
        let mut config = house.config(name, role);
        config.device = Device::Fake {
            step_micros: 20_000,
        };
        config.batch = 1;
        config.step_tokens = 4;
        config
    };
    let context = Worker::start(slow("ctx", Role::Context));
    let decode = Worker::start(slow("dec", Role::Decode));
    api.until_ready(&decode.id, &context.id).await;

    // Running and waiting: some 500 steps of 20 ms, one prompt at a time.
    let (running, waiting) = (new_request(), new_request());
    for (request, seed) in [(running, 1), (waiting, 2)] {
        let inbox = api.client.new_inbox();
        let job =
            baton_protocol::encode(&api.prefill_job(request, &prompt(seed, 2_000, 10))).unwrap();
        let subject = house.cluster.prefill(&context.id);
        api.client
            .publish_with_reply(subject, inbox, job.into())
            .await
            .unwrap();
    }
    api.until(&context.id, "one running, one waiting", |beat| {
        (beat.load.running, beat.load.waiting) == (1, 1)
    })
    .await;
    api.abort(&context.id, waiting).await;
    api.until(&context.id, "one running", |beat| {
        (beat.load.running, beat.load.waiting) == (1, 0)
    })
    .await;
    api.abort(&context.id, running).await;
    api.until_empty(&context.id).await;

    // A job and its abort in one breath.
    let hasty = new_request();
    let job = baton_protocol::encode(&api.prefill_job(hasty, &prompt(3, 2_000, 10))).unwrap();
    let (subject, inbox) = (house.cluster.prefill(&context.id), api.client.new_inbox());
    api.client
        .publish_with_reply(subject, inbox, job.into())
        .await
        .unwrap();
    api.abort(&context.id, hasty).await;
    api.until_empty(&context.id).await;

    // Leased.
    let leased = new_request();
    let handle = api.staged(&context.id, leased, &prompt(4, 8, 2_000)).await;
    api.until(&context.id, "a lease", |beat| beat.load.leased == 1)
        .await;
    api.abort(&context.id, leased).await;
    api.until_empty(&context.id).await;
    assert!(!api.release(&handle, |_| {}).await);

    // Decoding.
    let (decoding, sequence) = (new_request(), prompt(5, 8, 2_000));
    let handle = api.staged(&context.id, decoding, &sequence).await;
    api.admitted(&decode.id, &api.decode_job(decoding, &sequence, &handle))
        .await;
    api.first_tokens(decoding).await;
    api.abort(&decode.id, decoding).await;
    api.until_empty(&decode.id).await;
    api.until_empty(&context.id).await;

    // Somewhere around the pull.
    for delay_micros in [0, 100, 300, 600, 1_000, 2_000, 5_000, 10_000] {
        let (request, sequence) = (new_request(), prompt(6, 16, 2_000));
        let handle = api.staged(&context.id, request, &sequence).await;
        api.admitted(&decode.id, &api.decode_job(request, &sequence, &handle))
            .await;
        tokio::time::sleep(Duration::from_micros(delay_micros)).await;
        api.abort(&decode.id, request).await;
        api.abort(&context.id, request).await;
    }
    api.until_empty(&decode.id).await;
    api.until_empty(&context.id).await;
    decode.stop().await;
    context.stop().await;
}
