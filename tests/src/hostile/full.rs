//! More streams than places, and leases shorter than the wait for one.

use std::time::{Duration, Instant};

use baton_protocol::Released;
use futures::future::join_all;
use serde_json::json;

use super::scene::{Scene, limited};
use super::target::COMPLETIONS;
use crate::chaos::client::Asking;
use crate::chaos::load::{Ask, Reader};
use crate::chaos::said::{Said, StreamEnd};
use crate::setup::Setup;
use crate::wait::PATIENCE;

/// Three times as many as there are places.
const STREAMS: usize = 48;
const PLACES: usize = 16;

/// Each takes five seconds, so that the last ones wait for ten: longer than a lease, and longer than a few times of asking.
const TOKENS: usize = 1_000;
const STEP: &str = "fake:5000";
const LEASE_MS: u64 = 2_000;

/// All streams at once on one decode worker: each ends well, or is refused before its first token; and no decode worker is
/// asked to pull KV whose lease has ended.
pub async fn full(scene: &mut Scene<'_>) -> Vec<String> {
    let setup = Setup {
        device: STEP,
        batch: PLACES,
        kv_mib: 32,
        prefix: limited(),
        worker_args: vec!["--lease-ms".to_owned(), LEASE_MS.to_string()],
        ..Setup::split(1, 1)
    };
    let full = Scene::start_with(scene.turn, setup).await;
    let body = json!({"prompt": "The river froze", "max_tokens": TOKENS, "ignore_eos": true, "temperature": 0});
    let epoch = Instant::now();
    let from = full.cluster.tap.now();
    let asked = (0..STREAMS).map(|_| {
        let asking = Asking {
            base: full.target.base.clone(),
            model: full.target.model.clone(),
            ask: Ask {
                headers: Vec::new(),
                path: COMPLETIONS,
                body: body.clone(),
            },
            reader: Reader::Stream { usage: true },
            patience: PATIENCE,
        };
        asking.tell(epoch)
    });
    let mut wrong = Vec::new();
    let mut said: Option<Said> = None;
    let (mut answered, mut refused) = (0, 0);
    for story in join_all(asked).await {
        let body = String::from_utf8_lossy(&story.body);
        let tail: String = body
            .chars()
            .rev()
            .take(300)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect();
        match (story.status, Said::streamed(&story.body)) {
            (Some(200), Ok((its, StreamEnd::Done))) => {
                answered += 1;
                if said
                    .get_or_insert_with(|| its.clone())
                    .difference(&its)
                    .is_some()
                {
                    wrong.push("two streams of one prompt differ".to_owned());
                }
            }
            (Some(503), _) if story.retry_after.is_some() => refused += 1,
            (status, _) => wrong.push(format!(
                "{status:?} {:?} after {:.1?}: {tail}",
                story.end, story.until
            )),
        }
    }
    if answered < 2 * PLACES {
        wrong.push(format!(
            "only {answered} of {STREAMS} were answered, {refused} refused before their first token"
        ));
    }
    let tap = &full.cluster.tap;
    let releases = tap.heard(from, |message| {
        message.is("release").then(|| message.clone())
    });
    let mut wasted = 0;
    for release in &releases {
        let answer = tap.answer(release, Duration::from_secs(5)).await;
        wasted += usize::from(!answer.read::<Released>().valid);
    }
    if wasted > 0 {
        wrong.push(format!(
            "{wasted} of {} pulls were of KV whose lease had ended",
            releases.len()
        ));
    }
    full.cluster.drained(PATIENCE).await;
    wrong
}
