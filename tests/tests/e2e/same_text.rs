//! One request has one answer: text and log-probabilities, bit by bit, whoever computes it, in whatever pieces, beside
//! whomever.

use baton_protocol::{FrameItem, RequestId, TokenFrame};
use baton_tests::{Cluster, PATIENCE, Setup, Trace, Turn, golden};
use futures::future::join_all;
use serde_json::{Value, json};

const MAX_TOKENS: usize = 20;

/// Neighbours in the full batch; with them 32 sequences want to run at once.
const NEIGHBOURS: usize = 23;

/// Three prompts (one token block is 32 tokens: less than one, a few, many), each with three ways to choose.
fn requests(model: &str) -> Vec<Value> {
    let long = &golden("logits.json")["cases"][5]["input_ids"];
    let long = long.as_array().expect("ids")[..400].to_vec();
    let prompts = [
        json!("The capital of France is"),
        json!(
            "<|im_start|>user\nWrite a long letter to a friend who has moved to a town by the sea, and ask about the house, \
             the neighbours, the weather, the garden, the dog and the new work. Then tell of your own year: the fall from \
             the ladder, the good summer, the book that you could not finish.<|im_end|>\n<|im_start|>assistant\n"
        ),
        json!(long),
    ];
    let choices = [
        json!({"temperature": 0, "logprobs": 5}),
        json!({"temperature": 1, "seed": 7, "logprobs": 2}),
        json!({"temperature": 1.3, "seed": 11, "top_p": 0.95, "top_k": 200, "frequency_penalty": 0.7,
               "presence_penalty": 0.3, "logit_bias": {"198": -3}, "logprobs": 0}),
    ];
    let mut requests = Vec::new();
    for prompt in &prompts {
        for choice in &choices {
            let mut request = json!({"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": true});
            let fields = choice.as_object().expect("an object").clone();
            request.as_object_mut().expect("an object").extend(fields);
            requests.push(request);
        }
    }
    requests
}

/// The plain way: one worker, nothing cached, each prompt in one step, alone.
pub fn plain() -> Setup {
    Setup {
        step_tokens: 512,
        worker_args: vec!["--no-prefix-cache".to_owned()],
        ..Setup::unsplit()
    }
}

/// Answers to all requests, one after the other.
pub async fn ask(cluster: &Cluster) -> Vec<Value> {
    let mut answers = Vec::new();
    for request in requests(&cluster.model().await) {
        answers.push(told(&cluster.api.complete(&request).await));
    }
    answers
}

/// What an answer says of the text.
fn told(answer: &Value) -> Value {
    assert_eq!(answer["usage"]["completion_tokens"], MAX_TOKENS, "{answer}");
    answer["choices"].clone()
}

#[track_caller]
pub fn assert_same(how: &str, expected: &[Value], answers: &[Value]) {
    assert_eq!(expected.len(), answers.len());
    for (number, (expected, answer)) in expected.iter().zip(answers).enumerate() {
        assert_eq!(expected, answer, "request {number}, {how}");
    }
}

#[tokio::test]
async fn the_same_request_gives_the_same_text() {
    let turn = Turn::take();

    let expected = {
        let cluster = Cluster::start(&turn, plain()).await;
        let from = cluster.tap.now();
        let answers = ask(&cluster).await;
        for trace in Trace::all(&cluster.tap, from).await.values() {
            assert_eq!(trace.handles[0].cached_tokens, 0);
            assert_eq!(trace.pulled, [0], "adopted in place");
        }
        cluster.drained(PATIENCE).await;
        answers
    };
    let texts: Vec<&str> = expected
        .iter()
        .map(|choices| choices[0]["text"].as_str().expect("text"))
        .collect();
    for texts in texts.chunks(3) {
        assert_ne!(texts[0], texts[1], "the seed must matter");
        assert_ne!(texts[1], texts[2], "the sampling parameters must matter");
    }

    // split over two processes; then again with what the prefix index kept; then in a full batch
    {
        let mut split = Setup::split(1, 1);
        split.step_tokens = 512;
        let cluster = Cluster::start(&turn, split).await;
        let from = cluster.tap.now();
        assert_same("split", &expected, &ask(&cluster).await);
        for trace in Trace::all(&cluster.tap, from).await.values() {
            assert!(trace.pulled[0] > 0, "nothing was pulled");
        }

        let from = cluster.tap.now();
        assert_same("prefix cached", &expected, &ask(&cluster).await);
        let cached: Vec<u32> = Trace::all(&cluster.tap, from)
            .await
            .values()
            .filter(|trace| trace.prompt().len() > 64)
            .map(|trace| trace.handles[0].cached_tokens)
            .collect();
        assert!(
            !cached.is_empty() && cached.iter().all(|tokens| *tokens >= 32),
            "no cached prefix was used: {cached:?}"
        );

        let answers = in_full_batch(&cluster).await;
        assert_same("in a full batch", &expected, &answers);
        cluster.drained(PATIENCE).await;
    }

    // prompts in chunks, and these of every size: 7 is no divisor of anything
    for (step_tokens, setup) in [
        (7, Setup::split(1, 1)),
        (33, Setup::unsplit()),
        (100, Setup::split(2, 1)),
    ] {
        let setup = Setup {
            step_tokens,
            batch: step_tokens.min(32),
            worker_args: vec!["--no-prefix-cache".to_owned()],
            ..setup
        };
        let cluster = Cluster::start(&turn, setup).await;
        let how = format!("in chunks of {step_tokens}");
        assert_same(&how, &expected, &ask(&cluster).await);
        cluster.drained(PATIENCE).await;
    }
}

/// A worker that does both beside one that only generates, left to choose. A prompt that comes alone runs beside what the first one generates, and stays:
/// it was deflected. Of prompts that come at once some wait, and the KV of those goes to the other worker: they migrate. Asked until both were seen.
#[tokio::test]
async fn deflected_and_migrated_requests_give_the_same_text() {
    const ROUNDS_MAX: usize = 8;
    let turn = Turn::take();
    let expected = {
        let cluster = Cluster::start(&turn, plain()).await;
        ask(&cluster).await
    };
    let mut worker_args = vec!["--no-prefix-cache".to_owned()];
    // However busy this machine is, a step takes no longer, so a generation may stay where its prompt ran.
    worker_args.extend(["--itl-ms", "10000"].map(str::to_owned));
    let setup = Setup {
        both: 1,
        // A prompt of several steps has a part in each, beside whatever is generated.
        step_tokens: 64,
        worker_args,
        ..Setup::split(0, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let (mut deflected, mut migrated) = (0, 0);
    for round in 0..ROUNDS_MAX {
        let from = cluster.tap.now();
        // One after the other: none waits, so each stays where its prompt ran.
        let mut neighbours = Vec::new();
        for number in 0..NEIGHBOURS / 3 {
            let asked = cluster.tap.now();
            let request = neighbour(&model, number, 500);
            neighbours.push(cluster.api.ask("/v1/completions", &request));
            cluster.tap.wait_kind("decode", asked, PATIENCE).await;
        }
        assert_same("one by one", &expected, &ask(&cluster).await);
        let requests = requests(&model);
        let asked = requests.iter().map(|request| cluster.api.complete(request));
        let answers: Vec<Value> = join_all(asked).await.iter().map(told).collect();
        assert_same("all at once", &expected, &answers);
        for neighbour in neighbours {
            neighbour.await.expect("asked").ok();
        }
        cluster.drained(PATIENCE).await;

        let traces = Trace::all(&cluster.tap, from).await;
        for (request, trace) in &traces {
            // Neighbours have their texts from nowhere else.
            if trace.prefills[0].1.sequence.generation.max_tokens as usize != MAX_TOKENS {
                continue;
            }
            let (prompt, _) = trace.prefills.last().expect("prefilled");
            let (generation, _) = trace.decodes.last().expect("generated");
            if prompt != generation {
                assert!(trace.pulled.last() > Some(&0), "its KV came from nowhere");
                migrated += 1;
            } else if beside_others(&cluster, *request, trace) {
                deflected += 1;
            }
        }
        eprintln!("round {round}: {deflected} deflected, {migrated} migrated so far");
        if deflected > 0 && migrated > 0 {
            return;
        }
    }
    panic!("{deflected} deflected and {migrated} migrated in {ROUNDS_MAX} rounds");
}

/// Whether the worker that ran a prompt in several steps made tokens for others in the midst of them: in two steps at least, as the first may have
/// been under way when the prompt came.
fn beside_others(cluster: &Cluster, request: RequestId, trace: &Trace) -> bool {
    let (worker, _) = trace.prefills.last().expect("prefilled");
    let [Some(begun), Some(over)] = [&trace.handles_at, &trace.decodes_at].map(|at| at.last())
    else {
        return false;
    };
    let is_streamed = trace
        .handles
        .last()
        .is_some_and(|handle| handle.is_streamed());
    let frames = cluster.tap.heard(*begun, |message| {
        let theirs = message.index < *over && message.is("tokens");
        let frame: TokenFrame = theirs.then(|| message.read())?;
        let other = |item: &FrameItem| item.request != request && !item.tokens.0.is_empty();
        (frame.worker.as_str() == worker && frame.items.iter().any(other)).then_some(())
    });
    is_streamed && frames.len() >= 2
}

/// Somebody else's request.
fn neighbour(model: &str, number: usize, max_tokens: usize) -> Value {
    json!({"model": model, "prompt": format!("{number} green bottles"), "max_tokens": max_tokens, "ignore_eos": true,
           "temperature": 1, "seed": number})
}

/// Answers to all requests, all at once, beside neighbours that are running already.
async fn in_full_batch(cluster: &Cluster) -> Vec<Value> {
    let model = cluster.model().await;
    let from = cluster.tap.now();
    let neighbours = join_all((0..NEIGHBOURS).map(|number| {
        let (api, model) = (cluster.api.clone(), model.clone());
        tokio::spawn(async move { api.complete(&neighbour(&model, number, 80)).await })
    }));
    let neighbours = tokio::spawn(neighbours);
    widest_batch(cluster, from, NEIGHBOURS).await;
    let requests = requests(&model);
    let asked = join_all(requests.iter().map(|request| cluster.api.complete(request)));
    let (answers, ()) = tokio::join!(asked, widest_batch(cluster, from, NEIGHBOURS + 1));
    for neighbour in neighbours.await.expect("neighbours ran") {
        neighbour.expect("a neighbour was answered");
    }
    answers.iter().map(told).collect()
}

/// Waits for a step that made tokens for at least `sequences` of them.
async fn widest_batch(cluster: &Cluster, from: usize, sequences: usize) {
    let what = format!("a batch of {sequences}");
    cluster
        .tap
        .wait(&what, from, 3 * PATIENCE, |message| {
            let frame: TokenFrame = message.is("tokens").then(|| message.read())?;
            (frame.items.len() >= sequences).then_some(())
        })
        .await;
}
