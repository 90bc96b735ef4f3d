//! Between the read and the answer to its release: the moment in which KV is there and must not be used yet. The bus
//! holds the release back for as long as a test wants.

use async_nats::{Message, Subscriber};
use baton_protocol::deadlines::CONTROL_TIMEOUT_MS;
use baton_protocol::{FailureCode, KvHandle, Released, RequestId, Role, SequenceSpec, decode};
use futures::StreamExt;
use std::time::Duration;
use tokio::time::{Instant, timeout};

use crate::support::*;

/// Releases for `ctx` go to the test instead, which has a subject of its own to pass them on.
const DETOUR: &str =
    r#"mappings: { "baton.test.release.ctx": "held", "passed-on": "baton.test.release.ctx" }"#;

/// A context and a decode worker, and every release between them held back.
struct Held {
    _house: House,
    api: Api,
    context: Worker,
    decode: Worker,
    releases: Subscriber,
}

impl Held {
    async fn new(lease_ms: u32) -> Self {
        let house = House::with_bus(DETOUR).await;
        let mut api = Api::new(&house, "api").await;
        let releases = api.client.subscribe("held").await.unwrap();
        let mut config = house.config("ctx", Role::Context);
        config.lease_ms = lease_ms;
        let context = Worker::start(config);
        let decode = Worker::start(house.config("dec", Role::Decode));
        api.until_ready(&decode.id, &context.id).await;
        Self {
            _house: house,
            api,
            context,
            decode,
            releases,
        }
    }

    /// A request whose KV was read and whose release is held.
    async fn read(&mut self, sequence: &SequenceSpec) -> (RequestId, KvHandle, Message) {
        let request = new_request();
        let handle = self.api.staged(&self.context.id, request, sequence).await;
        let job = self.api.decode_job(request, sequence, &handle);
        self.api.admitted(&self.decode.id, &job).await;
        (request, handle, self.release().await)
    }

    async fn release(&mut self) -> Message {
        timeout(PATIENCE, self.releases.next())
            .await
            .expect("a release in time")
            .expect("a release")
    }

    /// Passes a release on, and its answer back.
    async fn pass_on(&self, release: &Message) -> bool {
        let answer = self
            .api
            .client
            .request("passed-on", release.payload.clone())
            .await
            .unwrap();
        if let Some(reply) = release.reply.clone() {
            let payload = answer.payload.clone();
            self.api.client.publish(reply, payload).await.unwrap();
        }
        decode::<Released>(&answer.payload).unwrap().valid
    }

    async fn is_thrown_away(&mut self, request: RequestId) {
        let stream = self.api.stream(request, 0).await;
        assert_eq!(
            (stream.failure(), stream.tokens.len()),
            (FailureCode::HandleInvalid, 0)
        );
        self.api.until_empty(&self.decode.id).await;
    }

    async fn stop(mut self) {
        self.api.until_empty(&self.decode.id).await;
        self.api.until_empty(&self.context.id).await;
        self.decode.stop().await;
        self.context.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_used_before_the_release_is_answered() {
    let mut held = Held::new(60_000).await;
    let sequence = prompt(1, 50, 10);
    let (request, handle, release) = held.read(&sequence).await;
    // The step that would use it takes no time on this device.
    let beat = held.api.until(&held.decode.id, "as before", |_| true).await;
    assert_eq!((beat.load.pulling, beat.load.running), (1, 0));
    assert!(held.pass_on(&release).await);
    assert_whole(&held.api.stream(request, 0).await, &sequence, &handle);
    held.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_ends_after_the_read_spoils_it() {
    let mut held = Held::new(500).await;
    let (request, handle, release) = held.read(&prompt(1, 50, 10)).await;
    held.api.until_empty(&held.context.id).await;
    // The blocks are another prompt's before the release comes.
    let other = new_request();
    let others = held
        .api
        .staged(&held.context.id, other, &prompt(2, 50, 10))
        .await;
    assert_eq!(handle.runs, others.runs, "it took the same blocks");
    assert!(!held.pass_on(&release).await);
    held.is_thrown_away(request).await;
    held.api.abort(&held.context.id, other).await;
    held.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_lease_spoils_the_read_at_once() {
    // No lease ends by itself while this test has patience.
    let mut held = Held::new(60_000).await;
    let (request, _, release) = held.read(&prompt(1, 50, 10)).await;
    held.api.abort(&held.context.id, request).await;
    held.api.until_empty(&held.context.id).await;
    assert!(!held.pass_on(&release).await);
    held.is_thrown_away(request).await;
    held.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_without_an_answer_is_a_no() {
    let mut held = Held::new(60_000).await;
    let (request, _, release) = held.read(&prompt(1, 50, 10)).await;
    let read_at = Instant::now();
    held.is_thrown_away(request).await;
    let waited = read_at.elapsed();
    let control = Duration::from_millis(CONTROL_TIMEOUT_MS);
    assert!(waited > control / 2, "it gave up after {waited:?}");
    // The lease is alive, and the late release ends it.
    let beat = held
        .api
        .until(&held.context.id, "as before", |_| true)
        .await;
    assert_eq!(beat.load.leased, 1);
    assert!(held.pass_on(&release).await);
    assert!(!held.pass_on(&release).await, "a second time");
    held.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_hears_of_a_pull_that_is_not_over() {
    let mut held = Held::new(60_000).await;
    // Nobody answers the first release, for as long as three reports take.
    let (request, _, first) = held.read(&prompt(1, 50, 10)).await;
    let stream = held.api.stream(request, 0).await;
    assert_eq!(stream.failure(), FailureCode::HandleInvalid);
    assert!(stream.reports >= 1, "{stream:?}");
    assert!(held.pass_on(&first).await);

    // What is over in time costs no message.
    let sequence = prompt(2, 50, 10);
    let (request, handle, release) = held.read(&sequence).await;
    assert!(held.pass_on(&release).await);
    assert_whole(&held.api.stream(request, 0).await, &sequence, &handle);
    held.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_does_not_wait_for_the_release() {
    let mut held = Held::new(60_000).await;
    let (request, _, first) = held.read(&prompt(1, 50, 10)).await;
    held.api.abort(&held.decode.id, request).await;
    // Nothing was answered: the abort alone frees the one side, and what it sends frees the other.
    held.api.until_empty(&held.decode.id).await;
    let second = held.release().await;
    assert!(held.pass_on(&second).await);
    held.api.until_empty(&held.context.id).await;
    assert!(!held.pass_on(&first).await, "it had been let go");
    held.stop().await;
}
