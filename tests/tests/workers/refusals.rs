//! Jobs that cannot be taken are refused at once, with a reason, and cost nothing.

use baton_protocol::limits::TOP_LOGPROBS_MAX;
use baton_protocol::{
    DecodeJob, DecodeReply, FailureCode, ModelFingerprint, PrefillJob, PrefillReply, Refusal, Role,
    decode,
};
use baton_worker::Device;

use crate::support::*;

async fn within_patience(future: impl Future<Output = ()>) {
    let outcome = tokio::time::timeout(PATIENCE, future).await;
    outcome.expect("it does not take so long");
}

fn refusal(reply: PrefillReply) -> Refusal {
    match reply {
        PrefillReply::Refused { refusal, .. } => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_worker_says_busy() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let mut config = house.config("ctx", Role::Context);
    config.device = Device::Fake {
        step_micros: 20_000,
    };
    config.queue = 1;
    config.step_tokens = 16;
    let context = Worker::start(config);
    // Nine blocks of eight tokens, and one sequence at a time.
    let mut config = house.config("dec", Role::Decode);
    config.kv_bytes = Some(9 * 64);
    let decode_worker = Worker::start(config);
    api.until_ready(&decode_worker.id, &context.id).await;

    let subject = house.cluster.prefill(&context.id);
    let long = new_request();
    let job = baton_protocol::encode(&api.prefill_job(long, &prompt(1, 2_000, 10))).unwrap();
    api.client
        .publish_with_reply(subject, api.client.new_inbox(), job.into())
        .await
        .unwrap();
    let reply = api
        .prefill(
            &context.id,
            &api.prefill_job(new_request(), &prompt(2, 10, 10)),
        )
        .await;
    let Refusal::Busy { retry_after_ms } = refusal(reply) else {
        panic!("not busy")
    };
    assert!(retry_after_ms > 0);
    api.abort(&context.id, long).await;
    api.until_empty(&context.id).await;

    // 60 tokens and one more take eight of the nine blocks.
    let (first, sequence) = (new_request(), prompt(3, 60, 12));
    let (second, other) = (new_request(), prompt(4, 60, 12));
    let handle = api.staged(&context.id, first, &sequence).await;
    let other_handle = api.staged(&context.id, second, &other).await;
    api.admitted(
        &decode_worker.id,
        &api.decode_job(first, &sequence, &handle),
    )
    .await;
    if let DecodeReply::Refused { refusal, .. } = api
        .decode(
            &decode_worker.id,
            &api.decode_job(second, &other, &other_handle),
        )
        .await
    {
        assert!(matches!(refusal, Refusal::Busy { .. }), "{refusal:?}");
        assert!(
            api.release(&other_handle, |_| {}).await,
            "the handle stays leased"
        );
    } else {
        // The first one was already done: then this one must be whole.
        assert_whole(&api.stream(second, 0).await, &other, &other_handle);
    }
    assert_whole(&api.stream(first, 0).await, &sequence, &handle);
    api.until_empty(&decode_worker.id).await;
    decode_worker.stop().await;
    context.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_without_blocks_says_busy_and_the_handle_stays_leased() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    let mut config = house.config("dec", Role::Decode);
    config.kv_bytes = Some(20 * 64);
    config.device = Device::Fake {
        step_micros: 20_000,
    };
    let decode_worker = Worker::start(config);
    api.until_ready(&decode_worker.id, &context.id).await;
    let (first, sequence) = (new_request(), prompt(3, 100, 30));
    let (second, other) = (new_request(), prompt(4, 100, 30));
    let handle = api.staged(&context.id, first, &sequence).await;
    let other_handle = api.staged(&context.id, second, &other).await;
    api.admitted(
        &decode_worker.id,
        &api.decode_job(first, &sequence, &handle),
    )
    .await;
    let refusal = api
        .refused(
            &decode_worker.id,
            &api.decode_job(second, &other, &other_handle),
        )
        .await;
    assert!(matches!(refusal, Refusal::Busy { .. }), "{refusal:?}");
    assert!(api.release(&other_handle, |_| {}).await);
    assert_whole(&api.stream(first, 0).await, &sequence, &handle);
    decode_worker.stop().await;
    context.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_is_told_apart() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    let mut config = house.config("other-blocks", Role::Decode);
    config.block_tokens = 16;
    let other_blocks = Worker::start(config);
    let other_model = house.model_dir.with_file_name("other");
    write_model(&other_model, "b");
    let mut config = house.config("other-model", Role::Decode);
    config.model_dir = other_model;
    let other_model = Worker::start(config);
    for worker in [&context.id, &other_blocks.id, &other_model.id] {
        api.until(worker, "at all", |_| true).await;
    }

    let good = api.prefill_job(new_request(), &prompt(1, 20, 10));
    let refused = async |change: &dyn Fn(&mut PrefillJob)| {
        let mut job = good.clone();
        change(&mut job);
        refusal(api.prefill(&context.id, &job).await)
    };
    let wrong = refused(&|job| job.model = ModelFingerprint::new("c".repeat(64)).unwrap()).await;
    assert!(matches!(wrong, Refusal::WrongModel { .. }), "{wrong}");
    let long = refused(&|job| job.sequence = prompt(1, TOKENS_MAX as usize, 10)).await;
    assert_eq!(
        long,
        Refusal::TooLong {
            tokens_max: TOKENS_MAX
        }
    );
    let version = refused(&|job| job.v = 1).await;
    assert!(
        version.to_string().contains("protocol version 1"),
        "{version}"
    );
    for (what, change) in [
        (
            "no prompt",
            &(|job: &mut PrefillJob| job.sequence.prompt_tokens = 0) as &dyn Fn(&mut PrefillJob),
        ),
        ("token outside the vocabulary", &|job| {
            job.sequence.tokens.0[3] = VOCAB
        }),
        ("nothing to generate", &|job| {
            job.sequence.generation.max_tokens = 0
        }),
        ("too many log-probabilities", &|job| {
            job.prompt_logprobs = Some(TOP_LOGPROBS_MAX + 1)
        }),
        ("infinite temperature", &|job| {
            job.sequence.generation.sampling.temperature = -1.0
        }),
    ] {
        let refusal = refused(change).await;
        assert!(
            matches!(refusal, Refusal::Malformed { .. }),
            "{what}: {refusal}"
        );
    }

    let (request, sequence) = (new_request(), prompt(1, 20, 10));
    let handle = api.staged(&context.id, request, &sequence).await;
    let job = api.decode_job(request, &sequence, &handle);
    let refusal = api.refused(&other_blocks.id, &job).await;
    assert!(
        refusal
            .to_string()
            .contains("tokens per block is 16 here and 8 there"),
        "{refusal}"
    );
    let refusal = api.refused(&other_model.id, &job).await;
    assert!(matches!(refusal, Refusal::WrongModel { .. }), "{refusal}");
    let refusal = api.refused(&context.id, &job).await;
    assert!(
        matches!(refusal, Refusal::WrongRole { .. }),
        "a context worker generates nothing: {refusal}"
    );
    assert!(
        api.release(&handle, |_| {}).await,
        "all that cost the handle nothing"
    );
    other_model.stop().await;
    other_blocks.stop().await;
    context.stop().await;
}

/// 900 prompt tokens with 20 alternatives each are some 500 KB. Known before they are computed, and nobody asks again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_over_the_buss_bound_is_not_computed() {
    let house = House::with_bus("max_payload: 262144").await;
    let mut api = Api::new(&house, "api").await;
    let mut config = house.config("ctx", Role::Context);
    // A prompt takes minutes.
    config.device = Device::Fake {
        step_micros: 100_000_000,
    };
    let context = Worker::start(config);
    api.until(&context.id, "at all", |_| true).await;
    let mut job = api.prefill_job(new_request(), &prompt(1, 900, 10));
    job.prompt_logprobs = Some(20);
    let PrefillReply::Failed { failure, .. } = api.prefill(&context.id, &job).await else {
        panic!("it failed")
    };
    assert_eq!(failure.code, FailureCode::TooLarge);
    assert!(!failure.code.retryable());
    assert!(
        failure
            .message
            .contains("900 prompt tokens with 20 alternatives")
            && failure.message.contains("the bus carries 262144"),
        "{failure}"
    );
    context.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handles_that_lie_do_no_harm() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    let decode_worker = Worker::start(house.config("dec", Role::Decode));
    api.until_ready(&decode_worker.id, &context.id).await;
    let (request, sequence) = (new_request(), prompt(1, 60, 10));
    let handle = api.staged(&context.id, request, &sequence).await;
    let good = api.decode_job(request, &sequence, &handle);

    let refused = async |change: &dyn Fn(&mut DecodeJob)| {
        let mut job = good.clone();
        change(&mut job);
        api.refused(&decode_worker.id, &job).await
    };
    let gone = refused(&|job| job.handle.incarnation.0 ^= 1).await;
    assert!(matches!(gone, Refusal::Unreachable { .. }), "{gone}");
    let stranger =
        refused(&|job| job.handle.worker = baton_protocol::WorkerId::new("stranger").unwrap())
            .await;
    assert!(
        matches!(stranger, Refusal::Unreachable { .. }),
        "{stranger}"
    );
    for (what, change) in [
        (
            "other number of tokens",
            &(|job: &mut DecodeJob| job.handle.valid_tokens = 8) as &dyn Fn(&mut DecodeJob),
        ),
        ("first token outside the vocabulary", &|job| {
            job.handle.first_token = Some(VOCAB)
        }),
        ("generation over", &|job| {
            job.handle.finish = Some(baton_protocol::FinishReason::Stop)
        }),
    ] {
        let refusal = refused(change).await;
        assert!(
            matches!(refusal, Refusal::Malformed { .. }),
            "{what}: {refusal}"
        );
    }

    // Runs that point outside the arena, or hold too few blocks: admitted, and then nothing is read.
    for (attempt, (first, count)) in [(u32::MAX - 8, 8), (1 << 30, 8), (0, 1), (0, u32::MAX)]
        .into_iter()
        .enumerate()
    {
        let mut job = good.clone();
        job.request = new_request();
        job.attempt = attempt as u32;
        job.handle.runs = vec![baton_protocol::BlockRun { first, count }];
        api.admitted(&decode_worker.id, &job).await;
        let stream = api.stream(job.request, job.attempt).await;
        assert_eq!(stream.failure(), FailureCode::PullFailed, "{first} {count}");
    }

    // Such a handle says nothing against the connection; it is let go of, so a new one is needed.
    let (request, handle) = (
        new_request(),
        api.staged(&context.id, new_request(), &sequence).await,
    );
    api.admitted(
        &decode_worker.id,
        &api.decode_job(request, &sequence, &handle),
    )
    .await;
    assert_whole(&api.stream(request, 0).await, &sequence, &handle);
    api.until_empty(&decode_worker.id).await;
    decode_worker.stop().await;
    context.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_bytes_do_no_harm() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let both = Worker::start(house.config("both", Role::Both));
    api.until(&both.id, "at all", |_| true).await;
    let cluster = &house.cluster;
    let subjects = [
        cluster.prefill(&both.id),
        cluster.decode(&both.id),
        cluster.abort(&both.id),
        cluster.release(&both.id),
        cluster.describe(&both.id),
        cluster.beat(&both.id),
        cluster.hello(),
        cluster.api_beat(&api.id),
        format!("baton.test.nonsense.{}", both.id),
    ];
    let valid = baton_protocol::encode(&api.prefill_job(new_request(), &prompt(1, 10, 5))).unwrap();
    let bodies: Vec<Vec<u8>> = vec![
        vec![],
        vec![0xff; 100],
        b"{".to_vec(),
        b"null".to_vec(),
        b"{\"v\":2,\"request\":\"zz\"}".to_vec(),
        b"{\"v\":65535}".to_vec(),
        b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[".repeat(200),
        valid[..valid.len() / 2].to_vec(),
    ];
    for subject in &subjects {
        for body in &bodies {
            let inbox = api.client.new_inbox();
            api.client
                .publish_with_reply(subject.clone(), inbox, body.clone().into())
                .await
                .unwrap();
            api.client
                .publish(subject.clone(), body.clone().into())
                .await
                .unwrap();
        }
    }
    for subject in &subjects[..2] {
        let answer = api
            .client
            .request(subject.clone(), "{\"v\":2}".into())
            .await
            .unwrap();
        assert!(
            String::from_utf8_lossy(&answer.payload).contains("\"malformed\""),
            "{answer:?}"
        );
    }
    let answer = api
        .client
        .request(cluster.release(&both.id), "{\"v\":2}".into())
        .await
        .unwrap();
    assert!(
        !decode::<baton_protocol::Released>(&answer.payload)
            .unwrap()
            .valid
    );

    let (request, sequence) = (new_request(), prompt(1, 60, 10));
    let handle = api.staged(&both.id, request, &sequence).await;
    api.admitted(&both.id, &api.decode_job(request, &sequence, &handle))
        .await;
    assert_whole(&api.stream(request, 0).await, &sequence, &handle);
    api.until_empty(&both.id).await;
    both.stop().await;
}

/// A job that is sent again because nothing was heard of it goes on where it is, and the latest sender is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_sent_again_is_answered_once_and_run_once() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let mut config = house.config("ctx", Role::Context);
    config.device = Device::Fake {
        step_micros: 20_000,
    };
    // A queue of one: a second prompt would be refused.
    config.queue = 1;
    let context = Worker::start(config);
    api.until(&context.id, "at all", |_| true).await;
    let sequence = prompt(1, 2_000, 10);
    let job = api.prefill_job(new_request(), &sequence);
    let subject = house.cluster.prefill(&context.id);
    let mut first = api.client.subscribe("first").await.unwrap();
    let payload = baton_protocol::encode(&job).unwrap();
    let sent = api
        .client
        .publish_with_reply(subject, "first", payload.into());
    sent.await.unwrap();
    let reply = api.prefill(&context.id, &job).await;
    let PrefillReply::Ready { handle, .. } = reply else {
        panic!("not staged: {reply:?}")
    };
    assert!(api.release(&handle, |_| {}).await);
    api.until_empty(&context.id).await;
    let nothing = futures::FutureExt::now_or_never(futures::StreamExt::next(&mut first));
    assert!(nothing.is_none(), "answered twice: {nothing:?}");
    context.stop().await;
}

/// The batch has one place. Whoever was refused it and asks again has it before those that come later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_in_the_batch_goes_to_whoever_asked_for_it_first() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let context = Worker::start(house.config("ctx", Role::Context));
    let mut config = house.config("dec", Role::Decode);
    config.batch = 1;
    config.device = Device::Fake {
        step_micros: 10_000,
    };
    let decode = Worker::start(config);
    api.until_ready(&decode.id, &context.id).await;
    let mut jobs = Vec::new();
    for seed in 0..3 {
        let (request, sequence) = (new_request(), prompt(seed, 10, 1_000));
        let handle = api.staged(&context.id, request, &sequence).await;
        jobs.push(api.decode_job(request, &sequence, &handle));
    }
    let [running, first, later] = &jobs[..] else {
        unreachable!("three were made")
    };
    let is_busy = async |job: &DecodeJob| {
        let refusal = api.refused(&decode.id, job).await;
        let Refusal::Busy { retry_after_ms } = refusal else {
            panic!("{refusal}")
        };
        retry_after_ms
    };
    api.admitted(&decode.id, running).await;
    is_busy(first).await;
    let hint = is_busy(first).await;
    assert!(is_busy(later).await > hint, "it is behind the first");
    api.abort(&decode.id, running.request).await;
    // While the first keeps asking the place is its own.
    is_busy(later).await;
    within_patience(async {
        while matches!(
            api.decode(&decode.id, first).await,
            DecodeReply::Refused { .. }
        ) {
            is_busy(later).await;
        }
    })
    .await;
    // One that found room elsewhere is aborted here, and keeps nobody out.
    is_busy(later).await;
    is_busy(later).await;
    for worker in [&decode.id, &context.id] {
        api.abort(worker, later.request).await;
    }
    api.abort(&decode.id, first.request).await;
    let (request, sequence) = (new_request(), prompt(9, 10, 5));
    let handle = api.staged(&context.id, request, &sequence).await;
    let newest = api.decode_job(request, &sequence, &handle);
    within_patience(async {
        while matches!(
            api.decode(&decode.id, &newest).await,
            DecodeReply::Refused { .. }
        ) {}
    })
    .await;
    assert_whole(&api.stream(request, 0).await, &sequence, &handle);
    let beat = api.until(&decode.id, "idle", |beat| beat.load.running == 0);
    assert!(beat.await.decode_ms > 0, "it knows how long they take");
    decode.stop().await;
    context.stop().await;
}
