//! KV that is read while its prompt still runs.

use baton_protocol::{
    FailureCode, KvHandle, Nonce, PROTOCOL_VERSION, PrefillReply, Progress, ProgressReply, Refusal,
    RequestId, Role, SequenceSpec,
};
use baton_worker::Device;

use crate::support::*;

/// Of a prompt of 30 steps and some tokens: each takes so long that much can happen meanwhile.
const STEP: Device = Device::Fake {
    step_micros: 20_000,
};
const TOKENS: usize = 30 * 64 + 13;

/// A context and a decode worker.
struct Pair {
    house: House,
    api: Api,
    context: Worker,
    decode: Worker,
}

impl Pair {
    async fn new(prefix_cache: bool) -> Self {
        let house = House::new().await;
        let mut api = Api::new(&house, "api").await;
        let mut config = house.config("ctx", Role::Context);
        config.device = STEP;
        config.prefix_cache = prefix_cache;
        config.drain_ms = 100;
        let context = Worker::start(config);
        let decode = Worker::start(house.config("dec", Role::Decode));
        api.until_ready(&decode.id, &context.id).await;
        Self {
            house,
            api,
            context,
            decode,
        }
    }

    /// A prompt that runs, and its handle.
    async fn begun(&self, request: RequestId, sequence: &SequenceSpec) -> KvHandle {
        match self.prefill(request, sequence).await {
            PrefillReply::Begun { handle, .. } => *handle,
            other => panic!("not begun: {other:?}"),
        }
    }

    /// What is said of a prompt that may be streamed.
    async fn prefill(&self, request: RequestId, sequence: &SequenceSpec) -> PrefillReply {
        let mut job = self.api.prefill_job(request, sequence);
        job.stream = true;
        self.api.prefill(&self.context.id, &job).await
    }

    /// The same, which the decode worker follows.
    async fn followed(&mut self, request: RequestId, sequence: &SequenceSpec) -> KvHandle {
        let handle = self.begun(request, sequence).await;
        let job = self.api.decode_job(request, sequence, &handle);
        self.api.admitted(&self.decode.id, &job).await;
        handle
    }

    /// How the prompt ended.
    async fn end(&self, handle: &KvHandle) -> ProgressReply {
        loop {
            let reply = self.progress(handle, handle.valid_tokens).await;
            if !matches!(reply, ProgressReply::Running { .. }) {
                return reply;
            }
        }
    }

    async fn progress(&self, handle: &KvHandle, have_tokens: u32) -> ProgressReply {
        let progress = Progress {
            v: PROTOCOL_VERSION,
            request: RequestId(0),
            incarnation: handle.incarnation,
            handle: handle.handle,
            nonce: handle.nonce,
            have_tokens,
        };
        let subject = self.api.cluster.progress(&handle.worker);
        self.api.request(subject, &progress).await
    }

    async fn stop(mut self) {
        self.api.until_empty(&self.decode.id).await;
        self.api.until_empty(&self.context.id).await;
        self.decode.stop().await;
        self.context.stop().await;
    }
}

fn failure(end: &ProgressReply) -> FailureCode {
    match end {
        ProgressReply::Failed { failure, .. } => failure.code,
        other => panic!("it goes well: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_follows_the_prompt_and_the_text_is_the_same() {
    for prefix_cache in [false, true] {
        let mut pair = Pair::new(prefix_cache).await;
        let sequence = prompt(1, TOKENS, 20);
        let expected = undisturbed(&sequence);
        let request = new_request();
        let handle = pair.followed(request, &sequence).await;
        assert_eq!(
            (handle.first_token, handle.valid_tokens),
            (None, TOKENS as u32)
        );
        // What is told is what was computed, and more each time.
        let mut have = 0;
        while let ProgressReply::Running { tokens, .. } = pair.progress(&handle, have).await {
            assert!(tokens > have && tokens % 64 == 0, "{tokens} after {have}");
            have = tokens;
        }
        assert!(have > 0, "it ran when it was asked");
        let ProgressReply::Done { first_token, .. } = pair.end(&handle).await else {
            // Released already: what is left is what the decode worker says.
            let stream = pair.api.stream(request, 0).await;
            assert_eq!((stream.first_index, stream.tokens), (0, expected));
            pair.stop().await;
            continue;
        };
        assert_eq!(first_token, expected[0]);
        // The first token comes with the stream as well.
        let stream = pair.api.stream(request, 0).await;
        assert_eq!((stream.first_index, stream.tokens), (0, expected));
        let pulled = stream.pulled.expect("it was pulled");
        let kv = &handle.kv;
        let blocks = TOKENS.div_ceil(kv.block_tokens as usize) as u64;
        assert_eq!(pulled.bytes, blocks * kv.block_bytes() as u64);
        assert!(pulled.handover_seconds.is_some());
        pair.stop().await;
    }
}

/// Two equal prompts side by side: what one has computed the other could share, were its blocks not being read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_prompts_that_are_followed_at_the_same_time_come_out_alike() {
    let mut pair = Pair::new(true).await;
    let sequence = prompt(1, TOKENS, 20);
    let expected = undisturbed(&sequence);
    let requests = [new_request(), new_request(), new_request()];
    let asked = requests.map(|request| pair.prefill(request, &sequence));
    for (request, reply) in requests.iter().zip(futures::future::join_all(asked).await) {
        // Who comes while the first runs may wait for it, find all but a step cached, and not be streamed.
        let (PrefillReply::Begun { handle, .. } | PrefillReply::Ready { handle, .. }) = reply
        else {
            panic!("neither begun nor ready: {reply:?}");
        };
        let job = pair.api.decode_job(*request, &sequence, &handle);
        pair.api.admitted(&pair.decode.id, &job).await;
    }
    for request in requests {
        let stream = pair.api.stream(request, 0).await;
        let first = stream.first_index as usize;
        assert!(first <= 1, "it begins at {first}");
        assert_eq!(stream.tokens, expected[first..]);
    }
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_in_mid_stream_frees_both_sides() {
    let mut pair = Pair::new(false).await;
    let (request, sequence) = (new_request(), prompt(1, TOKENS, 20));
    let handle = pair.followed(request, &sequence).await;
    pair.api.abort(&pair.context.id, request).await;
    // The decode worker learns it from the context worker, as the API server does, and holds nothing any more.
    assert_eq!(failure(&pair.end(&handle).await), FailureCode::Internal);
    pair.api.until_empty(&pair.decode.id).await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_decode_worker_takes_over_what_the_first_gave_up() {
    let mut pair = Pair::new(false).await;
    let other = Worker::start(pair.house.config("other", Role::Decode));
    pair.api.until_ready(&other.id, &pair.context.id).await;
    let (request, sequence) = (new_request(), prompt(1, TOKENS, 20));
    let handle = pair.followed(request, &sequence).await;
    pair.api.abort(&pair.decode.id, request).await;
    pair.api.until_empty(&pair.decode.id).await;
    // It said that it needs the KV no more. That is no release: the prompt runs.
    assert!(!pair.api.release(&handle, |_| {}).await);
    let job = pair.api.decode_job(request, &sequence, &handle);
    pair.api.admitted(&other.id, &job).await;
    let stream = pair.api.stream(request, 0).await;
    assert_eq!(stream.tokens, undisturbed(&sequence));
    pair.api.until_empty(&other.id).await;
    other.stop().await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_context_worker_that_leaves_in_mid_stream_says_so() {
    let mut pair = Pair::new(false).await;
    let (request, sequence) = (new_request(), prompt(1, TOKENS, 20));
    let handle = pair.followed(request, &sequence).await;
    pair.context.signal();
    assert_eq!(failure(&pair.end(&handle).await), FailureCode::Draining);
    pair.api.until_empty(&pair.decode.id).await;
    pair.context.left().await.expect("it leaves in peace");
    pair.decode.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_without_proof_hears_nothing_of_a_prompt() {
    let pair = Pair::new(false).await;
    let (request, sequence) = (new_request(), prompt(1, TOKENS, 20));
    let handle = pair.begun(request, &sequence).await;
    let forged = KvHandle {
        nonce: Nonce(handle.nonce.0 ^ 1),
        ..handle.clone()
    };
    assert_eq!(
        failure(&pair.progress(&forged, 0).await),
        FailureCode::HandleInvalid
    );
    // More questions than there is room for are answered, the first first.
    let asked = futures::future::join_all((0..9).map(|_| pair.end(&handle))).await;
    for end in asked {
        assert!(matches!(end, ProgressReply::Done { .. }), "{end:?}");
    }
    pair.api.abort(&pair.context.id, request).await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_sent_again_is_answered_with_the_same_handle() {
    let pair = Pair::new(false).await;
    let (request, sequence) = (new_request(), prompt(1, TOKENS, 20));
    let handle = pair.begun(request, &sequence).await;
    assert_eq!(pair.begun(request, &sequence).await, handle);
    pair.api.abort(&pair.context.id, request).await;
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_of_one_step_or_whose_sender_knows_no_streams_is_handed_over_at_its_end() {
    let pair = Pair::new(false).await;
    let (short, long) = (prompt(1, 64, 20), prompt(2, 200, 20));
    for (sequence, stream) in [(&short, true), (&long, false)] {
        let request = new_request();
        let mut job = pair.api.prefill_job(request, sequence);
        job.stream = stream;
        let reply = pair.api.prefill(&pair.context.id, &job).await;
        assert!(matches!(reply, PrefillReply::Ready { .. }), "{reply:?}");
        pair.api.abort(&pair.context.id, request).await;
    }
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_does_not_take_its_own_prompt_over_while_it_runs() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let mut config = house.config("both", Role::Both);
    config.device = STEP;
    let both = Worker::start(config);
    api.until(&both.id, "at all", |_| true).await;
    let (request, sequence) = (new_request(), prompt(1, TOKENS, 20));
    let mut job = api.prefill_job(request, &sequence);
    job.stream = true;
    let PrefillReply::Begun { handle, .. } = api.prefill(&both.id, &job).await else {
        panic!("not begun");
    };
    let job = api.decode_job(request, &sequence, &handle);
    let refusal = api.refused(&both.id, &job).await;
    assert!(matches!(refusal, Refusal::Malformed { .. }), "{refusal}");
    api.abort(&both.id, request).await;
    api.until_empty(&both.id).await;
    both.stop().await;
}
