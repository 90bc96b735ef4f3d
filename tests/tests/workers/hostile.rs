//! A bus on which anybody says anything: no worker breaks, nothing is held for it, and real requests come out right.

use std::time::Duration;

use baton_protocol::{
    Abort, ApiBeat, ApiServerId, BlockRun, Hello, PROTOCOL_VERSION, PrefillReply, Release,
    RequestId, Role, WorkerId,
};
use baton_tests::Mutator;
use serde_json::Value;

use crate::support::*;

/// Altered messages of each round; between rounds a real request runs.
const ROUND: usize = 2_000;

const ROUNDS: usize = 3;

/// What the process may grow by: its arenas are there before, and a message is at most some kilobytes long.
const GROWTH_BYTES_MAX: u64 = 128 << 20;

fn value<M: baton_protocol::Versioned>(message: &M) -> Value {
    serde_json::from_slice(&baton_protocol::encode(message).unwrap()).unwrap()
}

/// Resident memory of this process.
fn memory_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages = statm.split_whitespace().nth(1).unwrap();
    pages.parse::<u64>().unwrap() * 4096
}

/// Runs a request from its prompt to its last token.
async fn runs(api: &mut Api, context: &WorkerId, decode: &WorkerId, seed: u32) {
    let (request, sequence) = (new_request(), prompt(seed, 60, 10));
    let handle = api.staged(context, request, &sequence).await;
    let job = api.decode_job(request, &sequence, &handle);
    api.admitted(decode, &job).await;
    assert_whole(&api.stream(request, 0).await, &sequence, &handle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn altered_messages_break_nothing_and_hold_nothing() {
    let house = House::new().await;
    let mut api = Api::new(&house, "api").await;
    let start = |name: &str, role: Role| {
        let mut config = house.config(name, role);
        // What a hostile job had staged is free again soon after.
        config.lease_ms = 2_000;
        Worker::start(config)
    };
    let context = start("ctx", Role::Context);
    let decode = start("dec", Role::Decode);
    let both = start("both", Role::Both);
    api.until_ready(&decode.id, &context.id).await;
    api.until_ready(&both.id, &context.id).await;
    runs(&mut api, &context.id, &decode.id, 1).await;
    let beat = api.until(&context.id, "at all", |_| true).await;

    let (mut mutator, cluster) = (Mutator::new(1), house.cluster.clone());
    let stranger = WorkerId::new("stranger").unwrap();
    let before = memory_bytes();
    for round in 0..ROUNDS {
        // Of requests that nobody waits for, and of an API server of its own: whoever can ask in another's name can end
        // what that one asked for.
        let request = RequestId(u128::MAX - round as u128);
        let sequence = prompt(round as u32, 40, 10);
        let hostile = ApiServerId::new(format!("hostile-{round}")).unwrap();
        let mut prefill = api.prefill_job(request, &sequence);
        prefill.api_server = hostile.clone();
        let PrefillReply::Ready { handle, .. } = api.prefill(&context.id, &prefill).await else {
            panic!("the job is sound so far");
        };
        let mut job = api.decode_job(request, &sequence, &handle);
        job.api_server = hostile.clone();
        let mut forged = job.clone();
        forged.handle.runs = vec![
            BlockRun {
                first: 0,
                count: u32::MAX,
            },
            BlockRun {
                first: u32::MAX,
                count: 0,
            },
        ];
        let mut hurried = job.clone();
        hurried.budget_ms = 0;
        let mut endless = prefill.clone();
        endless.budget_ms = u32::MAX;
        let abort = Abort {
            v: PROTOCOL_VERSION,
            request,
            reason: "gone".to_owned(),
        };
        let release = Release {
            v: PROTOCOL_VERSION,
            request,
            incarnation: handle.incarnation,
            handle: handle.handle,
            nonce: handle.nonce,
            decode_worker: stranger.clone(),
        };
        let mut strange = beat.clone();
        strange.worker = stranger.clone();
        let hello = Hello {
            v: PROTOCOL_VERSION,
            from: "stranger".to_owned(),
        };
        let api_beat = ApiBeat {
            v: PROTOCOL_VERSION,
            api_server: api.id.clone(),
            incarnation: None,
            in_flight: 0,
            serving_ms: None,
        };
        let jobs = [
            value(&prefill),
            value(&job),
            value(&forged),
            value(&hurried),
            value(&endless),
            value(&abort),
            value(&release),
        ];
        let news = [
            (cluster.beat(&stranger), value(&strange)),
            (
                cluster.api_beat(&ApiServerId::new("stranger").unwrap()),
                value(&api_beat),
            ),
            (cluster.hello(), value(&hello)),
        ];
        for n in 0..ROUND {
            let (subject, message) = match mutator.below(16) {
                0 => news[mutator.below(news.len())].clone(),
                _ => {
                    let worker = [&context.id, &decode.id, &both.id][mutator.below(3)];
                    let subjects = [
                        cluster.prefill(worker),
                        cluster.decode(worker),
                        cluster.abort(worker),
                        cluster.release(worker),
                        cluster.describe(worker),
                    ];
                    // Mostly a message on its own subject.
                    let job = mutator.below(jobs.len());
                    let subject = match (mutator.below(8), job) {
                        (0, _) => &subjects[mutator.below(subjects.len())],
                        (_, 0 | 4) => &subjects[0],
                        (_, 5) => &subjects[2],
                        (_, 6) => &subjects[3],
                        _ => &subjects[1],
                    };
                    (subject.clone(), jobs[job].clone())
                }
            };
            // As it is now and then: the same job twice, for which a request has one live try.
            let bytes = match n % 10 {
                0 => message.to_string().into_bytes(),
                _ => mutator.bytes(&message),
            };
            let inbox = api.client.new_inbox();
            match mutator.below(4) {
                0 => api.client.publish(subject, bytes.into()).await.unwrap(),
                _ => api
                    .client
                    .publish_with_reply(subject, inbox, bytes.into())
                    .await
                    .unwrap(),
            }
        }
        api.client.flush().await.unwrap();
        // What was altered may be a sound job too, and queues may be full of those.
        for worker in [&context.id, &decode.id, &both.id] {
            api.until_empty(worker).await;
        }
        runs(&mut api, &context.id, &decode.id, 100 + round as u32).await;
        runs(&mut api, &both.id, &both.id, 200 + round as u32).await;
    }
    let grown = memory_bytes().saturating_sub(before);
    assert!(
        grown < GROWTH_BYTES_MAX,
        "{} MiB more than before",
        grown >> 20
    );
    for worker in [decode, both, context] {
        api.until_empty(&worker.id).await;
        tokio::time::timeout(Duration::from_secs(30), worker.stop())
            .await
            .expect("it stops");
    }
}
