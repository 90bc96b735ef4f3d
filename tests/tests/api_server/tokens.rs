//! Which tokens may come, those of the prompt, and the one that ended the output.

use baton_protocol::{PackedTokens, Role};
use serde_json::{Value, json};

use crate::support::{Api, EOS, Nats, Script, Worker, chat};
use crate::usual;

const CHAT: &str = "/v1/chat/completions";
const TEXTS: &str = "/v1/completions";

/// A completion, and what else the test wants.
fn text(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "prompt": "hi"});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn token_rules_go_to_both_workers() {
    let (_nats, mut context, mut decode, api) = usual().await;
    let wishes = json!({"allowed_token_ids": [EOS, 72, 101, 72], "bad_words": [" ab", "c"], "max_tokens": 3});
    for (path, body) in [(CHAT, chat(wishes.clone())), (TEXTS, text(wishes))] {
        assert_eq!(api.post(path, body).await.status, 200);
        let prefill = context.prefills.recv().await.unwrap().sequence.generation;
        let decode = decode.decodes.recv().await.unwrap().sequence.generation;
        assert_eq!(prefill.token_rules, decode.token_rules);
        let rules = prefill.token_rules.expect("rules");
        assert_eq!(rules.allowed, Some(PackedTokens(vec![72, 101, EOS])));
        let words: Vec<Vec<u32>> = ["ab", " ab", "c", " c"]
            .map(|word| word.bytes().map(u32::from).collect())
            .to_vec();
        assert_eq!(rules.bad_words.len(), 4);
        assert!(
            words
                .iter()
                .all(|word| rules.bad_words.contains(&PackedTokens(word.clone())))
        );
    }
    for (wishes, param) in [
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [5_000]}), "allowed_token_ids"),
        (
            json!({"allowed_token_ids": [99], "bad_words": ["c"]}),
            "allowed_token_ids",
        ),
        (
            json!({"allowed_token_ids": [EOS], "min_tokens": 1}),
            "min_tokens",
        ),
        (json!({"bad_words": [" "]}), "bad_words[0]"),
        (json!({"prompt_logprobs": -1}), "prompt_logprobs"),
        (
            json!({"prompt_logprobs": 1, "stream": true}),
            "prompt_logprobs",
        ),
    ] {
        for (path, body) in [(CHAT, chat(wishes.clone())), (TEXTS, text(wishes.clone()))] {
            let response = api.post(path, body).await;
            assert_eq!(response.status, 400, "{wishes}");
            assert_eq!(response.json()["error"]["param"], param, "{wishes}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_has_its_log_probabilities_beside_those_of_its_echo() {
    let (_nats, mut context, _decode, api) = usual().await;
    let mut asked = async || context.prefills.recv().await.unwrap().prompt_logprobs;
    // One of the alternatives is the token itself.
    let i = |alternatives: &[Value]| {
        let mut ids = serde_json::Map::new();
        ids.insert(
            "105".to_owned(),
            json!({"logprob": -0.5, "rank": 1, "decoded_token": "i"}),
        );
        for (place, other) in alternatives.iter().enumerate() {
            ids.insert((106 + place).to_string(), other.clone());
        }
        Value::Object(ids)
    };
    let j = json!({"logprob": -1.5, "rank": 2, "decoded_token": "j"});
    let body = |more: Value| {
        let mut body = text(more);
        body["max_tokens"] = 1.into();
        body
    };

    let both = body(json!({"echo": true, "logprobs": 1, "prompt_logprobs": 2, "n": 2}));
    let answer = api.post(TEXTS, both).await.json();
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(
            choice["prompt_logprobs"],
            json!([null, i(std::slice::from_ref(&j))])
        );
        let echoed = &choice["logprobs"]["top_logprobs"];
        assert_eq!(*echoed, json!([null, {"i": -0.5}, {"H": -0.5}]));
        assert_eq!(asked().await, Some(2));
    }
    let other = body(json!({"echo": true, "logprobs": 2, "prompt_logprobs": 1}));
    let answer = api.post(TEXTS, other).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["prompt_logprobs"], json!([null, i(&[])]));
    assert_eq!(
        choice["logprobs"]["top_logprobs"][1],
        json!({"i": -0.5, "j": -1.5})
    );
    assert_eq!(asked().await, Some(2));
    // Of no alternatives the token has no rank that is known.
    let none = api
        .post(TEXTS, body(json!({"prompt_logprobs": 0})))
        .await
        .json();
    let entry = &none["choices"][0]["prompt_logprobs"][1];
    assert_eq!(
        *entry,
        json!({"105": {"logprob": -0.5, "rank": null, "decoded_token": "i"}})
    );
    assert_eq!(none["choices"][0]["logprobs"], Value::Null);
    assert_eq!(asked().await, Some(0));

    let answer = api
        .post(
            CHAT,
            chat(json!({"prompt_logprobs": 1, "n": 2, "max_tokens": 1})),
        )
        .await
        .json();
    let prompt = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(
        prompt.len() as u64,
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    );
    assert_eq!(
        (&prompt[0], prompt[1].as_object().unwrap().len()),
        (&Value::Null, 1)
    );
    assert_eq!(answer["choices"][1].get("prompt_logprobs"), None);
    let mut of_chat = [asked().await, asked().await];
    of_chat.sort();
    assert_eq!(of_chat, [None, Some(1)], "one prompt is told once");
    let plain = api.post(CHAT, chat(json!({"max_tokens": 1}))).await.json();
    assert_eq!(plain.get("prompt_logprobs"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_whose_log_probabilities_the_bus_does_not_carry_is_refused() {
    let nats = Nats::with_max_payload(64 << 10).await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let _decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let api = Api::start(&nats).await;
    api.sees(2).await;
    let long = "x".repeat(200);
    let of_chat =
        chat(json!({"messages": [{"role": "user", "content": long}], "prompt_logprobs": 20}));
    let of_text = text(json!({"prompt": long, "prompt_logprobs": 20}));
    for (path, mut body) in [(CHAT, of_chat), (TEXTS, of_text)] {
        let response = api.post(path, body.clone()).await;
        assert_eq!(response.status, 400, "{}", response.body);
        let error = &response.json()["error"];
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("answer_too_large"), &json!("prompt_logprobs"))
        );
        body["prompt_logprobs"] = 2.into();
        assert_eq!(api.post(path, body).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_choice_says_what_stopped_it() {
    let (_nats, context, decode, api) = usual().await;
    let script = |tokens: &[u32]| Script {
        tokens: tokens.to_vec(),
        ..Script::default()
    };
    let output: Vec<u32> = "Hi \"é\" there"
        .bytes()
        .map(u32::from)
        .chain([EOS])
        .collect();
    *context.script.lock().unwrap() = script(&output);
    *decode.script.lock().unwrap() = script(&output);
    for (more, finish, stop) in [
        (json!({"stop": ["no", "\"é\""]}), "stop", json!("\"é\"")),
        (json!({"stop_token_ids": [116, 5]}), "stop", json!(116)),
        (json!({"max_tokens": 4}), "length", Value::Null),
        // The model's own end is nobody's.
        (json!({"stop": "no"}), "stop", Value::Null),
    ] {
        for (path, mut body) in [(CHAT, chat(more.clone())), (TEXTS, text(more.clone()))] {
            let max_tokens = more.get("max_tokens").cloned().unwrap_or(json!(30));
            body["max_tokens"] = max_tokens;
            let answer = api.post(path, body.clone()).await.json();
            let choice = &answer["choices"][0];
            assert_eq!(
                (&choice["finish_reason"], &choice["stop_reason"]),
                (&json!(finish), &stop),
                "{more}"
            );
            body["stream"] = true.into();
            let events = api.post(path, body).await.events();
            let told: Vec<_> = events
                .iter()
                .filter_map(|event| event["choices"][0].get("stop_reason"))
                .collect();
            assert_eq!(told, [&stop], "{more}: in the last event, once");
        }
    }
}
