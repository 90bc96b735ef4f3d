//! Whatever a client sends that cannot be served is answered with a 4xx in OpenAI's shape that says what is wrong.

use baton_tests::{Answer, Api, Cluster, PATIENCE, Setup, Turn};
use reqwest::Method;
use serde_json::{Value, json};

/// A request that cannot be served, and how it must be answered.
struct Case {
    what: &'static str,
    path: &'static str,
    body: Vec<u8>,
    status: &'static [u16],
    /// `error.param`; `None` where no parameter is to blame.
    param: Option<&'static str>,
}

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn cases(model: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    // one field of an else good request
    let completions: &[(&str, &str, Value)] = &[
        ("max_tokens 0", "max_tokens", json!(0)),
        ("max_tokens negative", "max_tokens", json!(-1)),
        ("max_tokens huge", "max_tokens", json!(u64::MAX)),
        (
            "max_tokens beyond the model",
            "max_tokens",
            json!(1_000_000),
        ),
        ("max_tokens a fraction", "max_tokens", json!(1.5)),
        ("max_tokens a string", "max_tokens", json!("ten")),
        ("temperature negative", "temperature", json!(-0.1)),
        ("temperature too high", "temperature", json!(2.5)),
        ("temperature a string", "temperature", json!("hot")),
        ("top_p above 1", "top_p", json!(1.1)),
        ("top_p negative", "top_p", json!(-0.5)),
        ("n 0", "n", json!(0)),
        ("n huge", "n", json!(1_000_000)),
        ("logprobs huge", "logprobs", json!(1000)),
        ("logprobs a string", "logprobs", json!("all")),
        ("stream a string", "stream", json!("yes")),
        ("stop a number", "stop", json!(3)),
        ("stop too many", "stop", json!(vec!["x"; 1000])),
        ("seed a string", "seed", json!("x")),
        ("presence_penalty too high", "presence_penalty", json!(9)),
        ("frequency_penalty too low", "frequency_penalty", json!(-9)),
        ("logit_bias a list", "logit_bias", json!([1, 2])),
        ("logit_bias of no token", "logit_bias", json!({"fish": 1})),
        (
            "logit_bias beyond the vocabulary",
            "logit_bias",
            json!({"9999999": 1}),
        ),
        ("logit_bias too strong", "logit_bias", json!({"5": 1000})),
        ("prompt null", "prompt", json!(null)),
        ("prompt a number", "prompt", json!(12)),
        ("prompt an object", "prompt", json!({"text": "x"})),
        ("prompt of no tokens", "prompt", json!([])),
        ("prompt of mixed things", "prompt", json!(["a", 1])),
        ("prompt ids negative", "prompt", json!([1, -2])),
        (
            "prompt ids beyond the vocabulary",
            "prompt",
            json!([1, 4_000_000]),
        ),
        (
            "prompt ids longer than the model",
            "prompt",
            json!(vec![5; 3000]),
        ),
        (
            "prompt longer than the model",
            "prompt",
            json!("word ".repeat(3000)),
        ),
        ("model a number", "model", json!(7)),
        ("a field that nobody knows", "x_trace", json!({"a": 1})),
        ("a typing error", "max_token", json!(4)),
        ("a schema", "guided_json", json!({"type": "strnig"})),
    ];
    for (what, param, value) in completions {
        let mut body = json!({"model": model, "prompt": "Hello", "max_tokens": 4});
        body[*param] = value.clone();
        cases.push(Case {
            what,
            path: COMPLETIONS,
            body: body.to_string().into_bytes(),
            status: &[400],
            param: Some(param),
        });
    }
    let hello = json!([{"role": "user", "content": "Hi"}]);
    let chats: &[(&str, &str, Value)] = &[
        ("messages a string", "messages", json!("Hi")),
        ("messages empty", "messages", json!([])),
        ("messages null", "messages", json!(null)),
        (
            "message without a role",
            "messages",
            json!([{"content": "Hi"}]),
        ),
        (
            "content a number",
            "messages",
            json!([{"role": "user", "content": 5}]),
        ),
        (
            "messages longer than the model",
            "messages",
            json!([{"role": "user", "content": "word ".repeat(3000)}]),
        ),
        ("max_completion_tokens 0", "max_completion_tokens", json!(0)),
        ("top_logprobs too many", "top_logprobs", json!(99)),
        ("logprobs a number", "logprobs", json!(3)),
        ("stream_options a string", "stream_options", json!("usage")),
    ];
    for (what, param, value) in chats {
        let mut body = json!({"model": model, "messages": hello, "max_tokens": 4});
        if *param == "max_completion_tokens" {
            body = json!({"model": model, "messages": hello});
        }
        if *param == "top_logprobs" {
            body["logprobs"] = json!(true);
        }
        body[*param] = value.clone();
        cases.push(Case {
            what,
            path: CHAT,
            body: body.to_string().into_bytes(),
            status: &[400],
            param: Some(param),
        });
    }
    let invalid_utf8 = [
        format!("{{\"model\": \"{model}\", \"prompt\": \"").as_bytes(),
        b"caf\xe9\"}",
    ]
    .concat();
    let deep = format!(
        "{{\"model\": \"{model}\", \"prompt\": {}1{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let mut other = |what, path, body: Vec<u8>, status, param| {
        cases.push(Case {
            what,
            path,
            body,
            status,
            param,
        });
    };
    let body = |body: Value| body.to_string().into_bytes();
    other(
        "unknown model",
        COMPLETIONS,
        body(json!({"model": "gpt-17", "prompt": "Hi"})),
        &[404],
        Some("model"),
    );
    other(
        "no prompt",
        COMPLETIONS,
        body(json!({"model": model})),
        &[400],
        Some("prompt"),
    );
    other(
        "no messages",
        CHAT,
        body(json!({"model": model})),
        &[400],
        Some("messages"),
    );
    other("empty body", COMPLETIONS, Vec::new(), &[400], None);
    other(
        "half a JSON",
        COMPLETIONS,
        b"{\"model\": \"x\", ".to_vec(),
        &[400],
        None,
    );
    other(
        "no JSON",
        COMPLETIONS,
        b"prompt=hello".to_vec(),
        &[400],
        None,
    );
    other("a JSON list", COMPLETIONS, b"[]".to_vec(), &[400], None);
    other(
        "JSON nested without end",
        COMPLETIONS,
        deep.into(),
        &[400],
        None,
    );
    other("invalid UTF-8", COMPLETIONS, invalid_utf8, &[400], None);
    other("unknown path", "/v1/nothing", b"{}".to_vec(), &[404], None);
    cases
}

#[tokio::test]
async fn bad_input_is_answered_with_what_is_wrong() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let mut wrong = Vec::new();
    for case in cases(&model) {
        let answer = cluster
            .api
            .send(Method::POST, case.path, Some(case.body))
            .await;
        let verdict = answer.and_then(|answer| judge(&answer, case.status, case.param));
        if let Err(reason) = verdict {
            wrong.push(format!("{}: {reason}", case.what));
        }
    }
    for (what, method, path) in [
        ("GET of what is posted", Method::GET, COMPLETIONS),
        ("DELETE", Method::DELETE, CHAT),
        ("POST of what is read", Method::POST, "/v1/models"),
    ] {
        let answer = cluster.api.send(method, path, None).await;
        if let Err(reason) = answer.and_then(|answer| judge(&answer, &[404, 405], None)) {
            wrong.push(format!("{what}: {reason}"));
        }
    }
    if let Err(reason) = too_large(&cluster.api).await {
        wrong.push(format!("a body of 50 MB: {reason}"));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // and none of it did any harm
    let good = json!({"model": model, "prompt": "Hello", "max_tokens": 4, "ignore_eos": true});
    let answer = cluster.api.complete(&good).await;
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    let accepted = json!({"model": model, "prompt": "Hello", "max_tokens": 4, "user": "ann", "metadata": {"a": "1"}});
    cluster.api.complete(&accepted).await;
    cluster.drained(PATIENCE).await;
}

fn judge(answer: &Answer, status: &[u16], param: Option<&str>) -> Result<(), String> {
    let shown = format!("{} {}", answer.status, answer.body);
    if !status.contains(&answer.status) {
        return Err(format!("not {status:?}: {shown}"));
    }
    let error = &answer.body["error"];
    let text = |key: &str| error[key].as_str().is_some_and(|text| !text.is_empty());
    if !text("message") || !text("type") || error.get("code").is_none() {
        return Err(format!("not OpenAI's shape: {shown}"));
    }
    match (param, &error["param"]) {
        (None, _) => Ok(()),
        // a field inside may be named more exactly: messages[0].role
        (Some(param), Value::String(named)) if named.starts_with(param) => Ok(()),
        (Some(param), _) => Err(format!("does not name {param}: {shown}")),
    }
}

/// The server may answer and close before it has read all of the body; then sending fails.
async fn too_large(api: &Api) -> Result<(), String> {
    let body = format!("{{\"prompt\": \"{}\"}}", "x".repeat(50_000_000));
    match api
        .send(Method::POST, COMPLETIONS, Some(body.into_bytes()))
        .await
    {
        Ok(answer) => judge(&answer, &[413], None),
        Err(reason) => {
            let cut = ["BrokenPipe", "ConnectionReset", "ConnectionAborted"];
            match cut.iter().any(|kind| reason.contains(kind)) {
                true => Ok(()),
                false => Err(reason),
            }
        }
    }
}
