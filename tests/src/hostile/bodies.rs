//! Large bodies: whoever sends them costs the server little, and others nothing.

use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use serde_json::json;

use super::scene::Scene;
use super::target::{CHAT, COMPLETIONS, Outcome, Target};

/// Just below the largest body that is taken.
const TEXT_BYTES: usize = (16 << 20) - 4096;

/// Nobody is told later than that that such a text is too long.
const TOLD_WITHIN: Duration = Duration::from_secs(90);

/// 64 prompts of digits at once: many tokens, and a text without a word's end.
pub async fn digits(scene: &mut Scene<'_>) -> Vec<String> {
    at_once(
        &scene.target,
        COMPLETIONS,
        64,
        completion(scene, &text("0123456789")),
    )
    .await
}

/// 64 prompts of short words at once: as many tokens as a text can have.
pub async fn words(scene: &mut Scene<'_>) -> Vec<String> {
    at_once(
        &scene.target,
        COMPLETIONS,
        64,
        completion(scene, &text("a b ")),
    )
    .await
}

/// The same through the chat template, in many messages and in one.
pub async fn chats(scene: &mut Scene<'_>) -> Vec<String> {
    let one = json!([{"role": "user", "content": text("a b ")}]);
    let word = "word ".repeat(20);
    let many: Vec<_> = (0..TEXT_BYTES / 140)
        .map(|_| json!({"role": "user", "content": word}))
        .collect();
    let body = |messages| {
        let body = json!({"messages": messages, "max_tokens": 4});
        Bytes::from(scene.target.body(&body).to_string())
    };
    let (one, many) = (body(one), body(json!(many)));
    let (one, many) = tokio::join!(
        at_once(&scene.target, CHAT, 16, one),
        at_once(&scene.target, CHAT, 16, many)
    );
    [one, many].concat()
}

/// 64 clients that send half of a large body and leave.
pub async fn half(scene: &mut Scene<'_>) -> Vec<String> {
    let body = completion(scene, &text("0123456789"));
    let leaving = (0..64).map(|number| {
        let after = Duration::from_millis(20 * number);
        scene
            .target
            .leave(COMPLETIONS, &body[..body.len() / 2], body.len(), after)
    });
    join_all(leaving).await;
    still_answers(scene).await
}

/// Clients that send all of a large body and leave at once: nobody wants its tokens any more.
pub async fn left(scene: &mut Scene<'_>) -> Vec<String> {
    let body = completion(scene, &text("a b "));
    let leaving = (0..16).map(|number| {
        let after = Duration::from_millis(10 * number);
        scene.target.leave(COMPLETIONS, &body, body.len(), after)
    });
    join_all(leaving).await;
    still_answers(scene).await
}

/// One hostile client of each kind, and smaller: for the soak.
pub async fn mild(target: &Target) {
    let text = "0123456789".repeat(100 << 10);
    let body = Bytes::from(
        target
            .body(&json!({"prompt": text, "max_tokens": 4}))
            .to_string(),
    );
    let _ = target.post(COMPLETIONS, body.clone(), TOLD_WITHIN).await;
    target
        .leave(
            COMPLETIONS,
            &body[..body.len() / 2],
            body.len(),
            Duration::ZERO,
        )
        .await;
}

fn text(of: &str) -> String {
    of.repeat(TEXT_BYTES / of.len())
}

fn completion(scene: &Scene<'_>, prompt: &str) -> Bytes {
    let body = json!({"prompt": prompt, "max_tokens": 4});
    Bytes::from(scene.target.body(&body).to_string())
}

/// Sends a body so many times at once: each is refused, with a sentence.
async fn at_once(target: &Target, path: &str, times: usize, body: Bytes) -> Vec<String> {
    let asked = (0..times).map(|_| target.post(path, body.clone(), TOLD_WITHIN));
    let outcomes: Vec<Outcome> = join_all(asked).await;
    let mut wrong: Vec<String> = outcomes.iter().filter_map(Outcome::is_no_refusal).collect();
    wrong.sort();
    let all = wrong.len();
    wrong.dedup();
    wrong
        .iter()
        .map(|one| format!("{all} of {times} not refused: {one}"))
        .collect()
}

/// Nothing is left to do for who has gone.
async fn still_answers(scene: &Scene<'_>) -> Vec<String> {
    // Good clients have some requests in flight.
    scene
        .few_in_flight(16, Duration::from_secs(5))
        .await
        .into_iter()
        .collect()
}
