//! Turns of a conversation: each finds the KV of those before it, wherever it was made and whoever asks.

use baton_protocol::Role;
use baton_tests::{Cluster, Message, PATIENCE, Setup, Trace, Turn, eventually};
use serde_json::{Value, json};

/// Tokens of a block, unless a worker is told otherwise.
const BLOCK_TOKENS: usize = 32;

fn first_turn(number: u32) -> Vec<u32> {
    (0..100)
        .map(|at| 1_000 + (number * 7 + at * 13) % 5_000)
        .collect()
}

/// What the prompt of the turn after this one begins with, and goes on with.
fn next_turn(prompt: &[u32], output: &[u32]) -> Vec<u32> {
    let new = (0..20).map(|at| 700 + at);
    prompt.iter().chain(output).copied().chain(new).collect()
}

fn request(model: &str, prompt: &[u32]) -> Value {
    json!({"model": model, "prompt": prompt, "max_tokens": 40, "ignore_eos": true, "temperature": 0})
}

fn cached_tokens(answer: &Value) -> u64 {
    let details = &answer["usage"]["prompt_tokens_details"];
    details["cached_tokens"]
        .as_u64()
        .unwrap_or_else(|| panic!("{answer}"))
}

/// Waits until every worker's reports have been sent, and then until what they tell has arrived where `metrics` are asked.
async fn reported(cluster: &Cluster, blocks: usize) {
    eventually("prefixes to be known", PATIENCE, async || {
        let metrics = cluster.api.metrics().await;
        match metrics.sum("baton_known_prefixes", &[]) {
            Some(known) if known as usize >= blocks => Ok(()),
            other => Err(format!("{other:?} blocks are known, of {blocks}")),
        }
    })
    .await;
}

#[tokio::test]
async fn the_next_turn_computes_and_pulls_only_what_is_new() {
    let turn = Turn::take();
    let cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    let model = cluster.model().await;
    let from = cluster.tap.now();
    let prompt = first_turn(0);
    cluster.api.complete(&request(&model, &prompt)).await;
    let first = Trace::only(&cluster.tap, from).await;
    cluster.drained(PATIENCE).await;

    let longer = next_turn(&prompt, &first.output());
    let from = cluster.tap.now();
    let answer = cluster.api.complete(&request(&model, &longer)).await;
    let second = Trace::only(&cluster.tap, from).await;
    // The context worker ran the first prompt's three blocks; the decode worker has those and what it generated.
    assert_eq!(cached_tokens(&answer), 3 * BLOCK_TOKENS as u64);
    let blocks = longer.len().div_ceil(BLOCK_TOKENS) as u64;
    let block_bytes = first.pulled[0] / prompt.len().div_ceil(BLOCK_TOKENS) as u64;
    let held = (prompt.len() + 39) as u64 / BLOCK_TOKENS as u64;
    assert_eq!(second.pulled, [(blocks - held) * block_bytes]);

    // With a salt of its own it shares nothing, and says the same.
    let mut alone = request(&model, &longer);
    alone["cache_salt"] = "another tenant's".into();
    let from = cluster.tap.now();
    let answer_alone = cluster.api.complete(&alone).await;
    let third = Trace::only(&cluster.tap, from).await;
    assert_eq!(
        (cached_tokens(&answer_alone), &third.pulled[..]),
        (0, &[blocks * block_bytes][..])
    );
    assert_eq!(second.output(), third.output());
    assert_eq!(
        answer["choices"][0]["text"],
        answer_alone["choices"][0]["text"]
    );
}

#[tokio::test]
async fn an_api_server_that_starts_late_knows_where_conversations_are() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    let model = cluster.model().await;
    let prompts: Vec<Vec<u32>> = (0..4).map(first_turn).collect();
    for prompt in &prompts {
        let answer = cluster.api.complete(&request(&model, prompt)).await;
        assert_eq!(cached_tokens(&answer), 0);
    }
    reported(&cluster, 4 * 3).await;
    cluster.add(Role::Context);
    cluster.ready().await;
    let from = cluster.tap.now();
    cluster.api = cluster.add_api_server(&[]);
    cluster.ready().await;
    // Each worker that has something is asked for all of it.
    let asked = |message: &Message| message.is("prefix-pages").then(|| message.whom());
    eventually("the workers to be asked", PATIENCE, async || {
        let mut asked = cluster.tap.heard(from, asked);
        asked.sort();
        asked.dedup();
        match asked.len() {
            2 => Ok(()),
            _ => Err(format!("{asked:?} were")),
        }
    })
    .await;
    reported(&cluster, 4 * 3).await;
    let from = cluster.tap.now();
    for prompt in &prompts {
        let answer = cluster
            .api
            .complete(&request(&model, &next_turn(prompt, &[])))
            .await;
        assert_eq!(cached_tokens(&answer), 3 * BLOCK_TOKENS as u64, "{answer}");
    }
    let traces = Trace::all(&cluster.tap, from).await;
    let workers = traces.values().map(|trace| trace.prefills[0].0.as_str());
    assert!(workers.into_iter().all(|worker| worker == "context-0"));
}

#[tokio::test]
async fn the_next_turn_goes_to_the_worker_that_generated_the_last_one() {
    let turn = Turn::take();
    let setup = Setup {
        both: 2,
        ..Setup::split(0, 0)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    for number in 0..4 {
        let from = cluster.tap.now();
        let prompt = first_turn(number);
        cluster.api.complete(&request(&model, &prompt)).await;
        let first = Trace::only(&cluster.tap, from).await;
        reported(&cluster, 4 * (number as usize + 1)).await;
        // With slow steps, what the last beat said of a worker's load weighs more than a prefix.
        cluster.drained(PATIENCE).await;
        let longer = next_turn(&prompt, &first.output());
        let from = cluster.tap.now();
        let answer = cluster.api.complete(&request(&model, &longer)).await;
        let second = Trace::only(&cluster.tap, from).await;
        assert_eq!(second.prefills[0].0, first.prefills[0].0);
        // Its output too: 139 tokens were run.
        assert_eq!(cached_tokens(&answer), 4 * BLOCK_TOKENS as u64, "{answer}");
    }
}
