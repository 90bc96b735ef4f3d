//! Clients that leave.

use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use futures::stream;
use serde_json::json;

use super::scene::Scene;
use super::target::{COMPLETIONS, Target};

/// Generations that good clients may have in flight, all together.
const OF_OTHERS: u64 = 16;

/// What runs for clients that have left is over then. It takes milliseconds; without anybody's telling it would be half a
/// minute.
const OVER_WITHIN: Duration = Duration::from_secs(5);

/// Streams of many choices whose clients leave before the head of the answer.
pub async fn choices(scene: &mut Scene<'_>) -> Vec<String> {
    let body = json!({"prompt": "A river", "n": 128, "max_tokens": 4000, "ignore_eos": true, "stream": true});
    let body = scene.target.body(&body).to_string();
    let leaving = (0..40).map(|number| {
        let after = Duration::from_millis(5 * (number % 20));
        scene
            .target
            .leave(COMPLETIONS, body.as_bytes(), body.len(), after)
    });
    join_all(leaving).await;
    scene
        .few_in_flight(OF_OTHERS, OVER_WITHIN)
        .await
        .into_iter()
        .collect()
}

/// Requests that are given up, of every kind, one after the other and many at once.
pub async fn given_up(scene: &mut Scene<'_>) -> Vec<String> {
    let target = &scene.target;
    stream::iter(0..2_000)
        .for_each_concurrent(32, |number| give_up(target, number))
        .await;
    scene
        .few_in_flight(OF_OTHERS, OVER_WITHIN)
        .await
        .into_iter()
        .collect()
}

/// One request that is given up.
pub async fn give_up(target: &Target, number: u64) {
    let body = json!({"prompt": format!("A river {number}"), "n": 1 + number % 3, "max_tokens": 2000, "ignore_eos": true,
                      "stream": number.is_multiple_of(2)});
    let body = target.body(&body).to_string();
    let after = Duration::from_millis(number % 23);
    target
        .leave(COMPLETIONS, body.as_bytes(), body.len(), after)
        .await;
}
