//! Answers that are too large.

use std::time::Duration;

use futures::future::join_all;
use serde_json::json;

use super::scene::Scene;
use super::target::{CHAT, COMPLETIONS, Outcome, shown};

/// An answer that is given takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whole answers of many choices with all alternatives: what is too large is refused, and what is given leaves room for others.
pub async fn whole(scene: &mut Scene<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    let ask = |path, tokens: usize| {
        let mut body = json!({"n": 128, "max_tokens": tokens, "ignore_eos": true});
        match path {
            CHAT => {
                body["messages"] = json!([{"role": "user", "content": "A river"}]);
                body["logprobs"] = json!(true);
                body["top_logprobs"] = json!(20);
            }
            _ => {
                body["prompt"] = json!("A river");
                body["logprobs"] = json!(20);
            }
        }
        scene.target.body(&body).to_string()
    };
    // A few megabytes each: to be given, in pieces.
    let asked = [COMPLETIONS, CHAT].map(|path| scene.target.post(path, ask(path, 60), PATIENCE));
    for outcome in join_all(asked).await {
        match outcome {
            Outcome::Answered(200, body)
                if body["choices"]
                    .as_array()
                    .is_some_and(|all| all.len() == 128) => {}
            Outcome::Answered(400, body) if body["error"]["message"].is_string() => {
                wrong.push(format!(
                    "an answer of some megabytes was refused: {}",
                    shown(&body)
                ));
            }
            other => wrong.push(told("128 choices of 60 tokens", &other)),
        }
    }
    // Gigabytes: refused before anything is computed, or given without harm.
    match scene.target.post(CHAT, ask(CHAT, 20_000), PATIENCE).await {
        Outcome::Answered(200 | 400, _) => {}
        other => wrong.push(told("128 choices of 20,000 tokens", &other)),
    }
    wrong
}

/// Echo with log-probabilities of a prompt whose answer does not fit one message of the bus: given, or refused at once, and
/// never computed again.
pub async fn echo(scene: &mut Scene<'_>) -> Vec<String> {
    let before = retries(scene).await;
    let prompt: Vec<u32> = (0..60_000).map(|place| 300 + place % 5_000).collect();
    let body = json!({"prompt": prompt, "echo": true, "logprobs": 20, "max_tokens": 2});
    let body = scene.target.body(&body).to_string();
    let mut wrong = Vec::new();
    match scene.target.post(COMPLETIONS, body, PATIENCE).await {
        Outcome::Answered(200, body) => {
            let tokens = body["choices"][0]["logprobs"]["tokens"].as_array();
            if tokens.map(Vec::len) != Some(60_002) {
                wrong.push(format!(
                    "not all tokens were echoed: {:?}",
                    tokens.map(Vec::len)
                ));
            }
        }
        Outcome::Answered(400..500, body) if body["error"]["message"].is_string() => {}
        other => wrong.push(told("echo of 60,000 tokens", &other)),
    }
    let again = retries(scene).await - before;
    if again > 0.0 {
        wrong.push(format!(
            "{again} retries were made of what a retry cannot mend"
        ));
    }
    wrong
}

async fn retries(scene: &Scene<'_>) -> f64 {
    scene
        .metrics()
        .await
        .sum("baton_retries_total", &[])
        .unwrap_or(0.0)
}

fn told(what: &str, outcome: &Outcome) -> String {
    match outcome {
        Outcome::Answered(status, body) => format!("{what}: {status} {}", shown(body)),
        Outcome::Cut(error) => format!("{what}: the connection broke: {error}"),
        Outcome::Hung => format!("{what}: no answer in {PATIENCE:?}"),
    }
}
