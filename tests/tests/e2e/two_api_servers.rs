//! Two API servers over one cluster, each unaware of the other.

use std::collections::BTreeMap;

use baton_tests::{Api, Cluster, PATIENCE, Setup, Trace, Turn};
use futures::future::join_all;
use serde_json::json;

use crate::steady::{Steady, questions};

const PATH: &str = "/v1/completions";

/// Requests that each API server gets at once, and how often.
const BURST: usize = 24;
const BURSTS: usize = 12;

async fn two(turn: &Turn, device: &'static str, workers: usize) -> (Cluster, [Api; 2]) {
    let setup = Setup {
        device,
        ..Setup::split(workers, workers)
    };
    let mut cluster = Cluster::start(turn, setup).await;
    let apis = [cluster.api.clone(), cluster.add_api_server(&[])];
    cluster.ready().await;
    (cluster, apis)
}

/// Each counts its own jobs, and knows those of the other as they were at a worker's last beat. It levels its own with
/// its part of them, one half. Of its `B` jobs and at most `B` that it sees of the other's it so places at most
/// `(B + B / 2) / W`, rounded up, on each of `W` equal workers; both together one and a half times a worker's share. Whoever
/// herds comes to twice the share and more, and to all jobs on one worker.
#[tokio::test]
async fn bursts_of_both_spread_over_all_workers() {
    let turn = Turn::take();
    let (cluster, apis) = two(&turn, "fake:3000", 3).await;
    let model = cluster.model().await;
    let share = 2 * BURST / 3;
    let most = share + share / 2 + 2;
    for burst in 0..BURSTS {
        let from = cluster.tap.now();
        let asked = (0..BURST).flat_map(|number| {
            // no two prompts have a beginning in common that would draw one to where the other was
            let first = 1000 + 10 * (burst * BURST + number);
            let request = json!({"model": model, "prompt": (first..first + 40).collect::<Vec<_>>(),
                                 "max_tokens": 30 + number, "ignore_eos": true});
            apis.iter().map(move |api| (api, request.clone()))
        });
        let answers = asked.map(async |(api, request)| api.complete(&request).await);
        join_all(answers).await;
        let mut prefills: BTreeMap<String, usize> = BTreeMap::new();
        let mut decodes: BTreeMap<String, usize> = BTreeMap::new();
        for trace in Trace::all(&cluster.tap, from).await.into_values() {
            for (worker, _) in trace.prefills {
                *prefills.entry(worker).or_default() += 1;
            }
            for (worker, _) in trace.decodes {
                *decodes.entry(worker).or_default() += 1;
            }
        }
        println!("burst {burst}: {prefills:?} {decodes:?}");
        for (worker, jobs) in prefills.iter().chain(&decodes) {
            assert!(
                *jobs <= most,
                "{worker} got {jobs} jobs of a burst, {share} were its share"
            );
        }
    }
    cluster.drained(PATIENCE).await;
}

/// What an API server had under way dies with it and is freed; the other's clients do not notice.
#[tokio::test]
async fn one_dies_and_the_other_does_not_notice() {
    let turn = Turn::take();
    let (mut cluster, apis) = two(&turn, "fake:5000", 2).await;
    let questions = questions(&cluster, 40).await;
    let model = cluster.model().await;
    let load = Steady::start(&apis[..1], &questions, 8);
    let from = cluster.tap.now();
    // ten seconds' work each: longer than a dead API server is waited for
    let endless =
        json!({"model": model, "prompt": "The sea", "max_tokens": 2000, "ignore_eos": true});
    let mut doomed = Vec::new();
    for _ in 0..4 {
        let mut events = apis[1].stream(PATH, &endless).await;
        events.next().await.expect("an event");
        doomed.push(events);
    }
    load.goes_on().await;
    cluster.restart_api_server(1);
    cluster.ready().await;
    load.goes_on().await;
    load.stop().await;
    cluster.drained(PATIENCE).await;
    drop(doomed);
    let traces = Trace::all(&cluster.tap, from).await;
    // Of what ran already when they were asked only the end was heard.
    let wanted = |trace: &&Trace| {
        let first = trace.prefills.first();
        first.is_some_and(|(_, job)| job.sequence.generation.max_tokens == 2000)
    };
    let doomed: Vec<&Trace> = traces.values().filter(wanted).collect();
    assert_eq!(doomed.len(), 4);
    for trace in doomed {
        let made = trace.output().len();
        assert!(made < 2000, "it ran to its end for nobody");
    }
    let retries = apis[0].metrics().await.sum("baton_retries_total", &[]);
    assert_eq!(retries.unwrap_or(0.0), 0.0, "retries without a fault");
    for api in &apis {
        let choices = api.complete(&questions[0].request).await["choices"].clone();
        assert_eq!(choices, questions[0].choices);
    }
    cluster.drained(PATIENCE).await;
}
