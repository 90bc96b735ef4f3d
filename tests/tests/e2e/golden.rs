//! What comes over HTTP agrees with Transformers: token ids of texts and chats exactly, greedy output wherever the
//! reference is sure of its choice.

use baton_tests::{Cluster, Setup, Trace, Turn, golden};
use serde_json::{Value, json};

/// How far from the reference an answer may be.
pub struct Limits {
    /// Where the reference's best two logits lie further apart than this, the best must be ours too.
    pub margin: f64,
    /// Most that a log-probability of one of the reference's best tokens may differ.
    pub logprob_error_max: f64,
}

/// Our weights and KV are BF16, the reference computes in F32 on the same weights: `workers/cpu/tests` states and gates
/// the same bound on the logits themselves.
const BF16_LIMITS: Limits = Limits {
    margin: 0.1,
    logprob_error_max: 0.25,
};

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("a list of ids");
    ids.iter()
        .map(|id| id.as_u64().expect("an id") as u32)
        .collect()
}

#[tokio::test]
async fn greedy_output_agrees_with_the_reference() {
    let turn = Turn::take();
    let cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    compare_with_the_reference(&cluster, 6, &BF16_LIMITS).await;
}

/// Asks for the greedy output of the reference's first `cases` prompts; where ours is another token than the reference's, it
/// goes on from the reference's. Gives how often that was, and the largest error of a log-probability.
pub async fn compare_with_the_reference(
    cluster: &Cluster,
    cases: usize,
    limits: &Limits,
) -> (usize, f64) {
    let model = cluster.model().await;
    let golden = golden("logits.json");
    let (mut compared, mut differ, mut worst) = (0, 0, 0f64);
    for case in golden["cases"]
        .as_array()
        .expect("cases")
        .iter()
        .take(cases)
    {
        let steps = case["steps"].as_array().expect("steps");
        let (input, output) = (ids(&case["input_ids"]), ids(&case["output_ids"]));
        // teacher-forced: after a step on which the two may differ, go on from the reference's choice
        let mut done = 0;
        while done < steps.len() {
            let prompt = match done {
                0 => case["prompt"].clone(),
                _ => json!([&input[..], &output[..done]].concat()),
            };
            let from = cluster.tap.now();
            let request = json!({"model": model, "prompt": prompt, "max_tokens": steps.len() - done, "temperature": 0,
                                 "ignore_eos": true, "logprobs": 0});
            let answer = cluster.api.complete(&request).await;
            let trace = Trace::only(&cluster.tap, from).await;
            assert_eq!(trace.prompt(), [&input[..], &output[..done]].concat());
            let logprobs = &answer["choices"][0]["logprobs"]["token_logprobs"];
            for (made, token) in trace.output().into_iter().enumerate() {
                let step = &steps[done];
                let number = |value: &Value| value.as_f64().expect("a number");
                let top = step["top"].as_array().expect("the best logits");
                let margin = number(&top[0][1]) - number(&top[1][1]);
                let place = top.iter().find(|entry| entry[0] == token);
                let at = format!("prompt {}, step {done}", case["prompt"]);
                match place {
                    Some(entry) => {
                        let theirs = number(&entry[1]) - number(&step["logsumexp"]);
                        let ours = number(&logprobs[made]);
                        worst = worst.max((ours - theirs).abs());
                        assert!(
                            (ours - theirs).abs() <= limits.logprob_error_max,
                            "{at}: log-probability {ours}, the reference's is {theirs}"
                        );
                    }
                    None => panic!("{at}: {token} is not among the reference's best 20"),
                }
                compared += 1;
                done += 1;
                if token != output[done - 1] {
                    differ += 1;
                    assert!(
                        margin <= limits.margin,
                        "{at}: {token}, the reference chose {} by {margin}",
                        output[done - 1]
                    );
                    break;
                }
            }
        }
    }
    assert!(
        compared >= cases * 64,
        "only {compared} steps were compared"
    );
    (differ, worst)
}

#[tokio::test]
async fn prompts_become_the_reference_ids() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;

    for case in golden("chat.json").as_array().expect("cases") {
        let from = cluster.tap.now();
        let request = json!({"model": model, "messages": case["messages"], "max_tokens": 1});
        cluster.api.chat(&request).await;
        let trace = Trace::only(&cluster.tap, from).await;
        assert_eq!(trace.prompt(), ids(&case["ids"]), "{}", case["messages"]);
    }

    let tokens = golden("tokens.json");
    let cases: Vec<&Value> = tokens
        .as_array()
        .expect("cases")
        .iter()
        .filter(|case| !ids(&case["ids"]).is_empty())
        .collect();
    assert!(cases.len() > 600, "only {} texts", cases.len());
    for case in cases {
        let from = cluster.tap.now();
        let request = json!({"model": model, "prompt": case["text"], "max_tokens": 1});
        cluster.api.complete(&request).await;
        let trace = Trace::only(&cluster.tap, from).await;
        assert_eq!(trace.prompt(), ids(&case["ids"]), "{}", case["text"]);
    }
}
