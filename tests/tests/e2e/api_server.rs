//! API servers that come and go.

use std::time::{Duration, Instant};

use baton_tests::{Cluster, PATIENCE, Setup, Trace, Turn};
use serde_json::json;

/// What the workers held for a former life is free this long after the new one serves. Its requests would run for a minute.
const FREED_WITHIN: Duration = Duration::from_secs(20);

/// As a container does that is started again: killed, and back under its name before anybody could miss it.
#[tokio::test]
async fn an_api_server_is_started_again_under_its_name() {
    let turn = Turn::take();
    let name = ["--api-server-name", "api-0"].map(str::to_owned);
    let setup = Setup {
        api_args: name.to_vec(),
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let request = json!({"model": cluster.model().await, "prompt": "A river", "max_tokens": 1500, "ignore_eos": true,
                         "temperature": 0, "n": 3});
    let from = cluster.tap.now();
    let mut events = cluster.api.stream("/v1/completions", &request).await;
    events.next().await.expect("an event");
    cluster.tap.wait_tokens(from, PATIENCE).await;

    cluster.restart_api_server(0);
    cluster.ready().await;
    let ready = Instant::now();
    cluster.drained(PATIENCE).await;
    let freed = ready.elapsed();
    assert!(freed < FREED_WITHIN, "free {freed:?} after it served again");
    for trace in Trace::all(&cluster.tap, from).await.values() {
        assert!(trace.output().len() < 1500, "it ran to its end for nobody");
    }
    // The new life is nobody's rival, and what it asks for runs to its end.
    cluster.tells_the_capital().await;
    let health = cluster.api.look("/health").await.expect("an answer");
    assert_eq!(health.status, 200, "{}", health.body);
}
