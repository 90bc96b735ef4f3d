//! Requests that go well: whatever the way, the text is that of an undisturbed run.

use baton_protocol::{DecodeJob, End, FinishReason, PrefillReply, Role};
use baton_worker::Device;
use futures::future::join_all;

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn split_over_two_workers() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    let decode = Worker::start(house.config("dec", Role::Decode));
    let beat = api.until_ready(&decode.id, &context.id).await;
    let peer = &beat.peers[0];
    assert!(
        !peer.transport.is_empty() && peer.gigabytes_per_second > 0.0,
        "{peer:?}"
    );
    assert!(beat.transport.starts_with("ucx "), "{}", beat.transport);

    // Shorter than a block, exactly a block, longer than a step.
    for (seed, tokens) in [(1, 1), (2, 7), (3, 8), (4, 9), (5, 300)] {
        let (request, sequence) = (new_request(), prompt(seed, tokens, 40));
        let handle = api.staged(&context.id, request, &sequence).await;
        assert_eq!(handle.valid_tokens as usize, tokens);
        api.admitted(&decode.id, &api.decode_job(request, &sequence, &handle))
            .await;
        let stream = api.stream(request, 0).await;
        assert_whole(&stream, &sequence, &handle);
        let pulled = stream
            .pulled
            .expect("the first item says what the pull cost");
        assert_eq!(
            pulled.bytes as usize,
            tokens.div_ceil(8) * 64,
            "whole blocks"
        );
    }
    api.until_empty(&context.id).await;
    api.until_empty(&decode.id).await;
    decode.stop().await;
    context.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_over_two_and_two_workers() {
    const REQUESTS: u32 = 120;
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let workers: Vec<_> = [
        ("c0", Role::Context),
        ("c1", Role::Context),
        ("d0", Role::Decode),
        ("d1", Role::Decode),
    ]
    .map(|(name, role)| {
        let mut config = house.config(name, role);
        config.batch = 64;
        config.prefix_cache = true;
        Worker::start(config)
    })
    .into();
    for decode in &workers[2..] {
        for context in &workers[..2] {
            api.until_ready(&decode.id, &context.id).await;
        }
    }
    let jobs = (0..REQUESTS).map(|seed| {
        let (api, workers) = (&api, &workers);
        async move {
            // Every third prompt is the same: its prefix is shared.
            let sequence = prompt(if seed % 3 == 0 { 0 } else { seed }, 50, 30);
            let request = new_request();
            let handle = api
                .staged(&workers[seed as usize % 2].id, request, &sequence)
                .await;
            api.admitted(
                &workers[2 + seed as usize / 2 % 2].id,
                &api.decode_job(request, &sequence, &handle),
            )
            .await;
            (request, sequence, handle)
        }
    });
    let jobs = join_all(jobs).await;
    let mut cached = 0;
    for (request, sequence, handle) in jobs {
        let stream = api.stream(request, 0).await;
        assert_whole(&stream, &sequence, &handle);
        cached += handle.cached_tokens;
    }
    assert!(cached > 0, "shared prefixes are found");
    for worker in workers {
        api.until_empty(&worker.id).await;
        worker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_worker_does_both_without_a_pull() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let both = Worker::start(house.config("both", Role::Both));
    api.until(&both.id, "at all", |_| true).await;
    let (request, sequence) = (new_request(), prompt(9, 100, 50));
    let handle = api.staged(&both.id, request, &sequence).await;
    api.admitted(&both.id, &api.decode_job(request, &sequence, &handle))
        .await;
    let stream = api.stream(request, 0).await;
    assert_whole(&stream, &sequence, &handle);
    assert_eq!(
        stream.pulled.map(|pulled| pulled.bytes),
        Some(0),
        "nothing was moved"
    );
    assert!(
        !api.release(&handle, |_| {}).await,
        "taking it over released it"
    );

    // The same handle again: it is gone, and the API server is told so.
    let again = DecodeJob {
        attempt: 1,
        ..api.decode_job(request, &sequence, &handle)
    };
    api.admitted(&both.id, &again).await;
    assert_eq!(
        api.stream(request, 1).await.failure(),
        baton_protocol::FailureCode::HandleInvalid
    );
    api.until_empty(&both.id).await;
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_goes_on_where_the_text_stopped() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    let decode = Worker::start(house.config("dec", Role::Decode));
    api.until_ready(&decode.id, &context.id).await;
    let first = prompt(4, 33, 25);
    let expected = undisturbed(&first);
    // As if a decode worker had been lost after ten tokens.
    let mut retry = first.clone();
    retry.tokens.0.extend(&expected[..10]);
    let request = new_request();
    let handle = api.staged(&context.id, request, &retry).await;
    assert_eq!(handle.first_token, Some(expected[10]));
    let job = DecodeJob {
        attempt: 3,
        ..api.decode_job(request, &retry, &handle)
    };
    api.admitted(&decode.id, &job).await;
    let stream = api.stream(request, 3).await;
    assert_eq!(
        (stream.first_index, &stream.tokens[..]),
        (11, &expected[11..])
    );
    decode.stop().await;
    context.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_made_at_prefill_travels_with_the_handle() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let both = Worker::start(house.config("both", Role::Both));
    api.until(&both.id, "at all", |_| true).await;

    // One token is all: nothing is staged.
    let one = prompt(1, 20, 1);
    let handle = api.staged(&both.id, new_request(), &one).await;
    assert_eq!(handle.finish, Some(FinishReason::Length));
    assert!(handle.runs.is_empty());
    api.until_empty(&both.id).await;

    let mut sequence = prompt(2, 20, 3);
    sequence.generation.sampling.logprobs = Some(4);
    let request = new_request();
    let mut job = api.prefill_job(request, &sequence);
    job.prompt_logprobs = Some(2);
    let PrefillReply::Ready {
        handle,
        prompt_logprobs,
        ..
    } = api.prefill(&both.id, &job).await
    else {
        panic!("not staged");
    };
    assert_eq!(prompt_logprobs.expect("asked for").len(), 19);
    assert_eq!(
        handle.first_logprobs.as_ref().expect("asked for").top.len(),
        4
    );
    api.admitted(&both.id, &api.decode_job(request, &sequence, &handle))
        .await;
    let stream = api.stream(request, 0).await;
    assert_eq!(stream.tokens.len(), 2);
    assert_eq!(stream.end, Some(End::Finished(FinishReason::Length)));
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_api_shows_the_worker() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    let beat = api.until(&context.id, "at all", |_| true).await;
    let answer = api
        .client
        .request("$SRV.INFO.baton-context", "".into())
        .await
        .unwrap();
    let info: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!(info["metadata"]["worker"], "ctx");
    assert_eq!(info["endpoints"][0]["name"], "describe");
    let answer = api
        .client
        .request("$SRV.STATS.baton-context", "".into())
        .await
        .unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!(stats["endpoints"][0]["data"]["blocks_used"], 0);

    let answer = api
        .client
        .request(house.cluster.describe(&context.id), "".into())
        .await
        .unwrap();
    let descriptor: baton_protocol::WorkerDescriptor =
        baton_protocol::decode(&answer.payload).unwrap();
    assert_eq!(descriptor.incarnation, beat.incarnation);
    assert_eq!(descriptor.kv, beat.kv);
    assert!(descriptor.transfer.is_some());
    context.stop().await;
}

/// A prompt that waits for its turn and one that runs are both reported, to the API server that sent them, until they are answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_that_wait_or_run_are_reported() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let other = Api::new(&house, "other").await;
    let mut config = house.config("ctx", Role::Context);
    // 125 steps of 40 ms a prompt, one after the other: each is reported several times.
    config.device = Device::Fake {
        step_micros: 40_000,
    };
    config.step_tokens = 16;
    let context = Worker::start(config);
    api.until(&context.id, "that it serves", |_| true).await;

    let requests = [new_request(), new_request()];
    let sequences = [prompt(1, 2_000, 10), prompt(2, 2_000, 10)];
    let subject = house.cluster.prefill(&context.id);
    for (request, sequence) in requests.iter().zip(&sequences) {
        let job = api.prefill_job(*request, sequence);
        api.post(subject.clone(), &job).await;
    }
    let foreign = other.prefill_job(new_request(), &prompt(3, 40, 10));
    other.post(subject, &foreign).await;
    api.prompts_reported(&requests).await;
    // The first is answered: only the second is reported.
    api.prompts_reported(&requests[1..]).await;
    for request in requests {
        api.abort(&context.id, request).await;
    }
    other.abort(&context.id, foreign.request).await;
    api.until_empty(&context.id).await;
    context.stop().await;
}
