//! Workers that say anything to an API server: it goes on, and answers of others come out right.

use baton_protocol::subjects::Cluster;
use baton_protocol::{
    FrameItem, Incarnation, PROTOCOL_VERSION, PackedTokens, TokenFrame, WorkerId,
};
use baton_tests::Mutator;
use serde_json::{Value, json};

use crate::support::{TEXT, chat, within};
use crate::usual;

/// Altered messages of each round; meanwhile a real request runs.
const ROUND: usize = 500;

const ROUNDS: usize = 8;

fn value<M: baton_protocol::Versioned>(message: &M) -> Value {
    serde_json::from_slice(&baton_protocol::encode(message).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn altered_frames_and_beats_change_no_answer() {
    let (nats, _context, mut decode, api) = usual().await;
    let cluster = Cluster::new("test").unwrap();
    let bus = async_nats::connect(&nats.url).await.unwrap();
    let mut beats = bus.subscribe(cluster.beats()).await.unwrap();
    bus.publish(cluster.hello(), "{}".into()).await.unwrap();
    let beat = within("a beat", futures::StreamExt::next(&mut beats))
        .await
        .unwrap();
    let beat: Value = serde_json::from_slice(&beat.payload).unwrap();

    let mut mutator = Mutator::new(2);
    let stranger = WorkerId::new("stranger").unwrap();
    for _ in 0..ROUNDS {
        let body = chat(json!({"stream": true})).to_string();
        let path = "/v1/chat/completions";
        let mut answer = api.open("POST", path, body.as_bytes()).await;
        let job = within("the decode job", decode.decodes.recv())
            .await
            .unwrap();
        // Of this very try, by a stranger or by the worker in another life; and of a try that numbers can just name.
        let frame = |worker: &str, incarnation: u64, attempt: u32| TokenFrame {
            v: PROTOCOL_VERSION,
            worker: WorkerId::new(worker).unwrap(),
            incarnation: Incarnation(incarnation),
            items: vec![FrameItem {
                request: job.request,
                attempt,
                index: 1,
                tokens: PackedTokens(vec![b'?'.into(); 3]),
                logprobs: Vec::new(),
                pulled: None,
                end: None,
            }],
            prompts: Vec::new(),
        };
        let frames = [
            value(&frame("stranger", 7, job.attempt)),
            value(&frame("d1", 1 << 40, job.attempt)),
            value(&frame("stranger", 7, u32::MAX)),
        ];
        let mut strange = beat.clone();
        strange["worker"] = json!("stranger");
        for _ in 0..ROUND {
            let (subject, message) = match mutator.below(4) {
                0 => (cluster.beat(&stranger), &strange),
                1 => (cluster.api_beat(&job.api_server), &frames[0]),
                _ => (
                    cluster.tokens(&job.api_server, &stranger),
                    &frames[mutator.below(frames.len())],
                ),
            };
            let bytes = mutator.bytes(message);
            bus.publish(subject, bytes.into()).await.unwrap();
        }
        baton_tests::settled(&bus).await;
        let answer = within("the answer", answer.finish()).await;
        assert_eq!(crate::text_of(&answer.events(), 0), TEXT);
    }
    let metrics = api.get("/metrics").await.1;
    for kind in ["frame_forged", "frame_unreadable", "beat_unreadable"] {
        assert!(
            metrics.contains(&format!("baton_bus_faults_total{{kind=\"{kind}\"}}")),
            "{kind}"
        );
    }
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_over_its_bounds_is_refused() {
    let (_nats, _context, _decode, api) = usual().await;
    let head = |more: &str| format!("GET /live HTTP/1.0\r\nHost: test\r\n{more}\r\n");
    let mut status = Vec::new();
    for headers in [90, 100] {
        let mut connection = api.connect().await;
        let head = head(&"X-A: b\r\n".repeat(headers));
        connection.write(head.as_bytes()).await.unwrap();
        status.push(within("an answer", connection.finish()).await.status);
    }
    assert_eq!(status, [200, 431], "96 headers");

    // A header without end: the server does not wait for it, and takes no more than 128 KiB.
    let mut connection = api.connect().await;
    let endless = format!("GET /live HTTP/1.0\r\nX-A: {}", "b".repeat(256 << 10));
    // Before all of it is written the server may have closed.
    let _ = connection.write(endless.as_bytes()).await;
    connection.closed_by_server().await;
    assert_eq!(api.get("/live").await.0, 200);
    api.stop().await;
}
