//! A link that is slow is not a link that is dead: KV that takes longer over it than a broken link is waited for arrives all the
//! same, and nobody is told that a worker cannot be reached.
//!
//! Workers live in network namespaces. Where those cannot be made, the test says that it did not run.

use std::time::{Duration, Instant};

use baton_protocol::deadlines::PULL_STALL_MS;
use baton_protocol::{Beat, PeerState};
use baton_tests::{Cluster, Network, PATIENCE, Setup, Trace, Turn};
use futures::future::join_all;
use serde_json::{Value, json};

/// What the decode worker receives.
const MEGABITS: u32 = 30;

/// At once. A worker has eight under way from one context worker; the rest wait for their turn.
const PULLS: usize = 17;

/// A request whose KV takes 23 KB a token: 350 are some 8 MB, 2,000 are 46 MB.
fn request(model: &str, first: usize, tokens: usize) -> Value {
    let prompt: Vec<usize> = (first..first + tokens).collect();
    json!({"model": model, "prompt": prompt, "max_tokens": 8, "ignore_eos": true, "temperature": 1, "seed": 5, "logprobs": 1})
}

#[tokio::test]
async fn over_a_slow_link_every_pull_arrives_and_nothing_is_called_broken() {
    let Some(network) = Network::new() else {
        return;
    };
    let turn = Turn::take();
    let setup = Setup {
        network: Some(network.clone()),
        kv_mib: 320,
        step_tokens: 512,
        // Or the second time nothing is left to pull.
        worker_args: vec!["--no-prefix-cache".to_owned()],
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let many: Vec<Value> = (0..PULLS)
        .map(|kind| request(&model, 1000 + 400 * kind, 350))
        .collect();
    let long = request(&model, 20_000, 2_000);
    let mut expected = Vec::new();
    for request in many.iter().chain([&long]) {
        expected.push(cluster.api.complete(request).await["choices"].clone());
    }
    cluster.drained(PATIENCE).await;

    network.throttle("decode-0", Some(MEGABITS));
    let from = cluster.tap.now();
    let throttled = Instant::now();
    let answers = join_all(many.iter().map(|request| cluster.api.complete(request))).await;
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(answer["choices"], expected[number], "answer {number}");
    }
    println!("{PULLS} pulls took {:?}", throttled.elapsed());
    let begun = Instant::now();
    let answer = cluster.api.complete(&long).await;
    assert_eq!(answer["choices"], expected[PULLS]);
    println!("the long one took {:?}", begun.elapsed());
    let throttled = throttled.elapsed();

    let stall = Duration::from_millis(PULL_STALL_MS);
    assert!(begun.elapsed() > stall, "or it shows nothing");
    let traces = Trace::all(&cluster.tap, from).await;
    assert_eq!(traces.len(), PULLS + 1);
    for trace in traces.values() {
        assert_eq!(trace.prefills.len(), 1, "{trace:?}");
        assert_eq!(trace.decodes.len(), 1, "{trace:?}");
        assert_eq!(trace.pulled.len(), 1, "{trace:?}");
    }
    let metrics = cluster.api.metrics().await;
    assert_eq!(metrics.sum("baton_retries_total", &[]).unwrap_or(0.0), 0.0);

    // What its decode worker said of the link meanwhile: that it is there, and how fast it is.
    let beats = cluster.tap.heard(from, |message| {
        (message.kind() == Some(("beat", "decode-0"))).then(|| message.read::<Beat>())
    });
    assert!(!beats.is_empty());
    for beat in &beats {
        let peer = &beat.peers[0];
        assert_eq!(peer.state, PeerState::Ready, "{peer:?}");
    }
    let rate = beats
        .last()
        .and_then(|beat| beat.peers[0].pulled_gigabytes_per_second);
    // And what came over it, second by second and not only when a pull ended.
    let pulled = beats.iter().map(|beat| beat.peers[0].pulled_bytes);
    let pulled: Vec<u64> = pulled.collect();
    assert!(pulled.is_sorted(), "{pulled:?}");
    let steps = pulled.windows(2).filter(|pair| pair[0] < pair[1]).count();
    assert!(steps > PULLS + 1, "{pulled:?}");
    let rate = rate.expect("it pulled") * 8e3;
    // Not much less than came over it on the whole, which a busy machine makes less too; and hardly more than it carries: what had
    // come before the clock was read, or lay in a queue, counts too.
    let came = (pulled[pulled.len() - 1] - pulled[0]) as f32 * 8e-6 / throttled.as_secs_f32();
    let carried = 0.5 * came..1.3 * MEGABITS as f32;
    assert!(carried.contains(&rate), "{rate} Mbit/s, {carried:?}");
    cluster.drained(PATIENCE).await;
}
