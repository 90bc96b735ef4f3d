//! Standard error that takes nothing: what cannot be logged is dropped and counted, and everything else goes on.

use std::time::Duration;

use futures::future::join_all;
use serde_json::json;

use super::flood::one_malformed;
use super::scene::{Scene, limited};
use super::target::{COMPLETIONS, Outcome};
use crate::process::Signal;
use crate::setup::Setup;
use crate::wait::PATIENCE;

/// Where standard error goes, in the words of bash.
const PLACES: &[(&str, &str)] = &[
    ("a full disk", "2>/dev/full"),
    ("a pipe that nobody holds any more", "2> >(exec true)"),
    ("a pipe that nobody reads", "2> >(exec sleep 300)"),
];

/// Clusters whose processes log much to each of them serve, say how much was dropped, and leave when told to.
pub async fn stderr(scene: &mut Scene<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (place, redirection) in PLACES {
        let setup = Setup {
            device: "fake",
            kv_mib: 16,
            prefix: limited(),
            standard_error: Some(redirection),
            ..Setup::unsplit()
        };
        let mut deaf = Scene::start_with(scene.turn, setup).await;
        let asked = (0..50).map(|number| {
            let body =
                json!({"prompt": format!("Line {number}"), "max_tokens": 20, "ignore_eos": true});
            deaf.target.post(
                COMPLETIONS,
                deaf.target.body(&body).to_string(),
                Duration::from_secs(20),
            )
        });
        for outcome in join_all(asked).await {
            if !matches!(outcome, Outcome::Answered(200, _)) {
                wrong.push(format!("{place}: {outcome:?}"));
            }
        }
        let target = &deaf.target;
        let malformed = join_all((0..200).map(|number| one_malformed(target, number))).await;
        wrong.extend(
            malformed
                .into_iter()
                .flatten()
                .map(|one| format!("{place}: {one}")),
        );
        let dropped = deaf
            .metrics()
            .await
            .sum("baton_log_lines_dropped_total", &[]);
        if dropped.unwrap_or(0.0) == 0.0 {
            wrong.push(format!(
                "{place}: baton_log_lines_dropped_total is {dropped:?}"
            ));
        }
        let dead = deaf.cluster.dead();
        if !dead.is_empty() {
            wrong.push(format!("{place}: {dead:?}"));
            continue;
        }
        let worker = deaf.cluster.workers()[0].name.clone();
        for process in [
            &mut deaf.cluster.take(&worker).process,
            &mut deaf.cluster.api_servers[0].process,
        ] {
            process.signal(Signal::Terminate);
            let status = process.end(PATIENCE).await;
            if !status.success() {
                wrong.push(format!("{place}: {} left with {status}", process.name()));
            }
        }
    }
    wrong.truncate(20);
    wrong
}
