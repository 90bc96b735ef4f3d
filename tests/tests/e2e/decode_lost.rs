//! Decode workers are lost in mid-stream: frozen, cut off from the network, killed, one after the other under the same
//! requests. Every client gets what it would have got, to the last log-probability and the last counted token.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use baton_protocol::{RequestId, TokenFrame};
use baton_tests::{Api, Cluster, Network, PATIENCE, Setup, Signal, Trace, Turn, eventually};
use futures::future::join_all;
use serde_json::{Value, json};

/// Output tokens of each choice that no stop string ends. Three workers are lost before that: after each loss every prompt is
/// run again, and who is first generates meanwhile; up to 120 tokens a loss were seen.
const MAX_TOKENS: usize = 400;

/// Tokens that every choice makes on a worker before that worker is lost.
const TOKENS_EACH: usize = 5;

/// Longest stop string that the API server takes.
const STOP_BYTES_MAX: usize = 1024;

/// One way to ask.
#[derive(Clone)]
struct Question {
    path: &'static str,
    body: Value,
}

/// An answer in one shape, streamed or not.
#[derive(Debug, Default, PartialEq)]
struct Told {
    choices: BTreeMap<u64, Choice>,
    /// Prompt and completion tokens.
    usage: (u64, u64),
}

#[derive(Debug, Default, PartialEq)]
struct Choice {
    text: String,
    finish: Value,
    /// Lists of log-probabilities, by name.
    logprobs: BTreeMap<String, Vec<Value>>,
}

impl Told {
    fn hear(&mut self, event: &Value) {
        if let Some(tokens) = event["usage"]["prompt_tokens"].as_u64() {
            let completion = &event["usage"]["completion_tokens"];
            self.usage = (tokens, completion.as_u64().expect("a number"));
        }
        for choice in event["choices"].as_array().expect("choices") {
            let index = choice["index"].as_u64().expect("an index");
            let told = self.choices.entry(index).or_default();
            let words = [
                &choice["text"],
                &choice["message"]["content"],
                &choice["delta"]["content"],
            ];
            for text in words.into_iter().filter_map(Value::as_str) {
                told.text += text;
            }
            let calls = [&choice["message"], &choice["delta"]].map(|told| &told["tool_calls"]);
            for call in calls.into_iter().filter_map(Value::as_array).flatten() {
                let words = ["name", "arguments"].map(|word| &call["function"][word]);
                for text in words.into_iter().filter_map(Value::as_str) {
                    told.text += text;
                }
            }
            if !choice["finish_reason"].is_null() {
                assert!(told.finish.is_null(), "it ended twice");
                told.finish = choice["finish_reason"].clone();
            }
            for (name, list) in choice["logprobs"].as_object().into_iter().flatten() {
                let known = told.logprobs.entry(name.clone()).or_default();
                known.extend(list.as_array().into_iter().flatten().cloned());
            }
        }
    }
}

async fn ask(api: &Api, question: &Question, stream: bool) -> Told {
    let mut told = Told::default();
    let Question { path, body } = question;
    if !stream {
        told.hear(&api.post(path, body).await.ok());
        return told;
    }
    let mut body = body.clone();
    body["stream_options"] = json!({"include_usage": true});
    for event in api.stream(path, &body).await.rest().await {
        told.hear(&event);
    }
    told
}

/// A tool with an argument of at least this many words.
fn tool(words: usize) -> Value {
    let word = json!({"type": "string", "pattern": "^[a-z]{1,12}$"});
    let list = json!({"type": "array", "items": word, "minItems": words});
    let arguments = json!({"type": "object", "properties": {"words": list}, "required": ["words"], "additionalProperties": false,
        "x-guidance": {"whitespace_flexible": false}});
    json!({"type": "function", "function": {"name": "say", "parameters": arguments}})
}

/// Everything that a break could get wrong.
fn questions(model: &str) -> Vec<Question> {
    let prompt = "My grandmother told me about the winter in which the river froze, and";
    let messages = json!([{"role": "user", "content": "Tell me a long story about a lighthouse and its keeper."}]);
    let ways = [
        json!({"prompt": prompt, "temperature": 0, "logprobs": 5}),
        json!({"prompt": prompt, "temperature": 1, "seed": 42, "logprobs": 2, "frequency_penalty": 0.5,
               "presence_penalty": 0.4, "repetition_penalty": 1.1}),
        json!({"prompt": prompt, "temperature": 1.2, "seed": 7, "top_p": 0.9, "n": 2}),
        json!({"messages": messages, "temperature": 0, "logprobs": true, "top_logprobs": 3}),
        json!({"messages": messages, "temperature": 1, "seed": -3, "n": 2, "frequency_penalty": 0.8, "top_k": 50,
               "logit_bias": {"198": -4}}),
        // No end is ever reached: each worker finds its place in the grammar from the tokens before.
        json!({"prompt": prompt, "temperature": 1, "seed": 9, "logprobs": 1,
               "structured_outputs": {"regex": "([a-z]{1,12}(, | ))*"}}),
        // A call that must come, and has more to say than there is room for.
        json!({"messages": messages, "temperature": 1, "seed": 11, "tool_choice": "required", "tools": [tool(MAX_TOKENS)]}),
    ];
    ways.into_iter()
        .map(|mut body| {
            body["model"] = json!(model);
            body["max_tokens"] = json!(MAX_TOKENS);
            body["ignore_eos"] = json!(true);
            let path = match body["prompt"].is_null() {
                true => "/v1/chat/completions",
                false => "/v1/completions",
            };
            Question { path, body }
        })
        .collect()
}

/// The same question with two stop strings. One begins early in the answer, is as long as one may be and differs in its last letter
/// alone: it is being matched whenever a worker is lost, and what it held back is told when it did not match. The other one
/// begins in the middle and is matched, far behind where the last worker is lost.
fn stopped(question: &Question, told: &Told) -> Question {
    let mut question = question.clone();
    let text = &told.choices[&0].text;
    let mut early = piece(text, 30, STOP_BYTES_MAX - 1);
    early.push('\u{1}');
    question.body["stop"] = json!([early, piece(text, 2, STOP_BYTES_MAX.min(text.len() / 3))]);
    question
}

/// At most this many bytes of the text, behind the first of so many parts of it.
fn piece(text: &str, parts: usize, bytes_max: usize) -> String {
    let mut piece = String::new();
    for letter in text.chars().skip(text.chars().count() / parts) {
        if piece.len() + letter.len_utf8() > bytes_max {
            break;
        }
        piece.push(letter);
    }
    piece
}

/// Which worker each generation under way is at, and how many tokens it made there.
fn progress(cluster: &Cluster, from: usize) -> BTreeMap<RequestId, (String, usize)> {
    let mut made: BTreeMap<RequestId, (String, usize)> = BTreeMap::new();
    let frames = cluster.tap.heard(from, |message| {
        message.is("tokens").then(|| message.read::<TokenFrame>())
    });
    for frame in frames {
        let worker = frame.worker.to_string();
        for item in frame.items {
            let known = made.entry(item.request).or_default();
            if known.0 != worker {
                *known = (worker.clone(), 0);
            }
            known.1 += item.tokens.0.len();
        }
    }
    made
}

/// Waits until all of these generations were sent to this worker.
async fn all_sent_to(cluster: &Cluster, from: usize, worker: &str, count: usize) {
    let what = format!("{count} generations sent to {worker}");
    eventually(&what, 2 * PATIENCE, async || {
        let traces = Trace::all(&cluster.tap, from).await;
        let was_sent = |trace: &&Trace| trace.decodes.iter().any(|(name, _)| name == worker);
        match traces.values().filter(was_sent).count() {
            sent if sent == count => Ok(()),
            sent => Err(sent.to_string()),
        }
    })
    .await;
}

/// Waits until all of these generations go on at this worker.
async fn all_go_on_at(cluster: &Cluster, from: usize, worker: &str, count: usize) {
    let what = format!("{count} generations at {worker}");
    eventually(&what, 2 * PATIENCE, async || {
        let progress = progress(cluster, from);
        let there = progress
            .values()
            .filter(|(at, tokens)| at == worker && *tokens >= TOKENS_EACH)
            .count();
        match there == count {
            true => Ok(()),
            false => Err(format!("{there}: {progress:?}")),
        }
    })
    .await;
}

/// Waits until the API server gives this worker jobs, or does not any more.
async fn serves(cluster: &Cluster, worker: &str, expected: bool) {
    let what = format!("{worker} serving: {expected}");
    eventually(&what, PATIENCE, async || {
        let known = cluster.known_workers().await?;
        let state = known.get(worker).map(|worker| &worker["state"]);
        match state.is_some_and(|state| state == "serving") == expected {
            true => Ok(()),
            false => Err(format!("{state:?}")),
        }
    })
    .await;
}

/// Prompt tokens that `/metrics` has counted so far.
async fn prompt_tokens(cluster: &Cluster) -> f64 {
    let metrics = cluster.api.metrics().await;
    metrics
        .sum("baton_tokens_total", &["kind=\"prompt\""])
        .expect("a counter")
}

/// What a worker that was taken for lost still held is free again.
async fn holds_nothing(cluster: &Cluster, worker: &str) {
    let what = format!("{worker} to be empty");
    eventually(&what, PATIENCE, async || {
        let beats = cluster.beats().await;
        let load = beats.get(worker).ok_or("no beat")?.load;
        match load.running + load.waiting + load.pulling + load.blocks_used {
            0 => Ok(()),
            _ => Err(format!("{load:?}")),
        }
    })
    .await;
}

#[tokio::test]
async fn three_workers_in_a_row_are_lost_and_no_client_notices() {
    let turn = Turn::take();
    // without namespaces the second one is frozen like the first
    let network = Network::new();
    let setup = Setup {
        network: network.clone(),
        kv_mib: 384,
        ..Setup::split(1, 3)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;

    let mut asked = questions(&model);
    let plain = [0, 1, 3].map(|number| asked[number].clone());
    let told = join_all(plain.iter().map(|it| ask(&cluster.api, it, false))).await;
    for (question, told) in plain.iter().zip(&told) {
        asked.push(stopped(question, told));
    }
    let asked: Vec<(Question, bool)> = asked
        .into_iter()
        .flat_map(|question| [(question.clone(), true), (question, false)])
        .collect();
    let all = || {
        join_all(
            asked
                .iter()
                .map(|(question, stream)| ask(&cluster.api, question, *stream)),
        )
    };
    let before = prompt_tokens(&cluster).await;
    let expected = all().await;
    let undisturbed = prompt_tokens(&cluster).await;
    let choices: usize = expected.iter().map(|told| told.choices.len()).sum();
    for (told, (question, _)) in expected.iter().zip(&asked) {
        let is_stopped = !question.body["stop"].is_null();
        let is_call = !question.body["tools"].is_null();
        for choice in told.choices.values() {
            assert_eq!(choice.text.starts_with("say{\"words\":[\""), is_call);
            assert_eq!(choice.finish, if is_stopped { "stop" } else { "length" });
        }
    }
    cluster.drained(PATIENCE).await;

    // all begin at one worker; the others are there when they are wanted
    for spare in ["decode-1", "decode-2"] {
        cluster.signal(spare, Signal::Stop);
    }
    for spare in ["decode-1", "decode-2"] {
        serves(&cluster, spare, false).await;
    }
    let from = cluster.tap.now();
    let answers: Vec<_> = asked
        .iter()
        .cloned()
        .map(|(question, stream)| {
            let api = cluster.api.clone();
            tokio::spawn(async move { ask(&api, &question, stream).await })
        })
        .collect();
    all_go_on_at(&cluster, from, "decode-0", choices).await;

    // a worker is lost before another is there to go on, so that nothing ends while the other comes back
    cluster.signal("decode-0", Signal::Stop);
    cluster.signal("decode-1", Signal::Continue);
    all_sent_to(&cluster, from, "decode-1", choices).await;

    // the dead one comes back to life: what it says disturbs nobody, what it holds it lets go
    cluster.signal("decode-0", Signal::Continue);
    all_go_on_at(&cluster, from, "decode-1", choices).await;
    holds_nothing(&cluster, "decode-0").await;
    serves(&cluster, "decode-0", true).await;
    match &network {
        Some(network) => network.unplug("decode-1"),
        None => cluster.signal("decode-1", Signal::Stop),
    }
    all_go_on_at(&cluster, from, "decode-0", choices).await;

    cluster.kill("decode-0");
    match &network {
        Some(network) => network.plug("decode-1"),
        None => cluster.signal("decode-1", Signal::Continue),
    }
    cluster.signal("decode-2", Signal::Continue);

    let mut wrong = String::new();
    for ((answer, expected), (question, stream)) in answers.into_iter().zip(&expected).zip(&asked) {
        let told = answer.await.expect("answered");
        if told != *expected {
            let body = &question.body;
            let _ = writeln!(
                wrong,
                "{body}, stream: {stream}:\n{told:?}\nis not\n{expected:?}"
            );
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert_eq!(
        prompt_tokens(&cluster).await - undisturbed,
        undisturbed - before,
        "prompts were counted again"
    );
    let traces = Trace::all(&cluster.tap, from).await;
    assert_eq!(traces.len(), choices);
    for trace in traces.values() {
        let lost: BTreeSet<&str> = trace
            .decodes
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        assert!(
            lost.len() >= 2 && trace.decodes.len() >= 4,
            "it was over before the third loss: {:?}",
            trace.decodes
        );
        let job = &trace.decodes[trace.decodes.len() - 1].1;
        assert_eq!(
            job.sequence.generation, trace.decodes[0].1.sequence.generation,
            "the rules changed on the way"
        );
    }
    cluster.drained(PATIENCE).await;
}
