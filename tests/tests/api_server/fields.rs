//! What fields of a request do to its job and to its answer.

use baton_api_server::GenerationConfig;
use serde_json::{Value, json};

use crate::support::{Api, EOS, Nats, Script, TEXT, chat};
use crate::{text_of, usual};

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

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_changes_the_answer_is_ignored() {
    let (_nats, mut context, _decode, api) = usual().await;
    for (path, body, param, said) in [
        (
            CHAT,
            chat(json!({"thinking_token_budget": 5})),
            "thinking_token_budget",
            "not supported",
        ),
        (
            TEXTS,
            text(
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strnig"}}}}),
            ),
            "response_format.json_schema.schema",
            "strnig",
        ),
        (
            CHAT,
            chat(json!({"tool_choice": "required"})),
            "tool_choice",
            "needs tools",
        ),
        (
            CHAT,
            chat(json!({"max_token": 5})),
            "max_token",
            "max_tokens?",
        ),
        (
            TEXTS,
            text(json!({"wibble": 1})),
            "wibble",
            "no field wibble",
        ),
        (
            TEXTS,
            text(json!({"stream_options": {"include_usage": true}})),
            "stream_options",
            "needs stream",
        ),
        (
            CHAT,
            chat(json!({"stream": true, "stream_options": {"usage": true}})),
            "stream_options.usage",
            "no field",
        ),
        (
            CHAT,
            chat(
                json!({"messages": [{"role": "user", "content": [{"type": "text", "txt": "a"}]}]}),
            ),
            "messages[0].content[0].txt",
            "no field",
        ),
    ] {
        let response = api.post(path, body.clone()).await;
        assert_eq!(response.status, 400, "{body}: {}", response.body);
        let error = &response.json()["error"];
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().unwrap().contains(said), "{error}");
    }
    assert!(
        context.prefills.try_recv().is_err(),
        "no worker heard of any"
    );
    let harmless = json!({"guided_json": null, "tools": [], "user": "me", "metadata": {"a": "b"}, "store": false,
        "service_tier": "auto", "priority": 3, "prompt_cache_key": "k", "safety_identifier": "s", "best_of": 1});
    let response = api.post(CHAT, chat(harmless)).await;
    assert_eq!(response.status, 200, "{}", response.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_a_text_is_part_of_it_if_asked_for() {
    let (_nats, context, decode, api) = usual().await;
    let ask = |more: Value| {
        let mut body = text(more);
        body["max_tokens"] = 100.into();
        let api = &api;
        async move {
            let choice = api.post(TEXTS, body).await.json()["choices"][0].clone();
            (
                choice["text"].as_str().unwrap().to_owned(),
                choice["finish_reason"].clone(),
            )
        }
    };
    let stopped = ("Hello, wörld!".to_owned(), json!("stop"));
    let more = json!({"stop": ["ld!"], "include_stop_str_in_output": true});
    assert_eq!(ask(more.clone()).await, stopped);
    let mut streamed = text(more);
    streamed["stream"] = true.into();
    streamed["max_tokens"] = 100.into();
    let events = api.post(TEXTS, streamed).await.events();
    assert_eq!(text_of(&events, 0), stopped.0);

    let more = json!({"stop_token_ids": [u32::from(b'!')], "include_stop_str_in_output": true});
    assert_eq!(ask(more).await, stopped);
    let more = json!({"stop_token_ids": [u32::from(b'!')]});
    assert_eq!(ask(more).await.0, "Hello, wörld");

    for worker in [&context, &decode] {
        worker.script.lock().unwrap().tokens = vec![u32::from(b'a'), EOS, u32::from(b'b')];
    }
    let shown = json!({"skip_special_tokens": false, "ignore_eos": true, "max_tokens": 3});
    let mut body = text(shown);
    let answer = api.post(TEXTS, body.clone()).await.json();
    assert_eq!(answer["choices"][0]["text"], "a<|end|>b");
    body["skip_special_tokens"] = true.into();
    let answer = api.post(TEXTS, body).await.json();
    assert_eq!(answer["choices"][0]["text"], "ab");
    let both = json!({"skip_special_tokens": false, "include_stop_str_in_output": true});
    assert_eq!(ask(both).await, ("a<|end|>".to_owned(), json!("stop")));
}

#[tokio::test(flavor = "multi_thread")]
async fn token_ids_are_shown_if_asked_for() {
    let (_nats, _context, _decode, api) = usual().await;
    let (hello, prompt) = (bytes("Hello"), bytes("<user>hi\n<assistant>"));
    let more = json!({"return_token_ids": true, "max_tokens": 5, "n": 2});
    let answer = api.post(CHAT, chat(more.clone())).await.json();
    assert_eq!(answer["prompt_token_ids"], json!(prompt));
    assert_eq!(answer["choices"][1]["token_ids"], json!(hello));
    let mut body = text(more);
    body["prompt"] = json!(["a", "b"]);
    let answer = api.post(TEXTS, body.clone()).await.json();
    assert!(answer.get("prompt_token_ids").is_none());
    assert_eq!(answer["choices"][3]["prompt_token_ids"], json!(bytes("b")));
    assert_eq!(answer["choices"][3]["token_ids"], json!(hello));

    let ids = |events: &[Value], index: u64| -> Vec<Value> {
        let choices = events
            .iter()
            .flat_map(|event| event["choices"].as_array().unwrap());
        let own = choices.filter(|choice| choice["index"] == index);
        own.filter_map(|choice| choice["token_ids"].as_array())
            .flatten()
            .cloned()
            .collect()
    };
    body["stream"] = true.into();
    let events = api.post(TEXTS, body).await.events();
    for index in 0..4 {
        assert_eq!(json!(ids(&events, index)), json!(hello));
    }
    let of = |index: u64| {
        let mut choices = events.iter().map(|event| &event["choices"][0]);
        choices.find(|choice| choice["index"] == index).unwrap()["prompt_token_ids"].clone()
    };
    assert_eq!((of(0), of(2)), (json!(bytes("a")), json!(bytes("b"))));
    let body = chat(json!({"return_token_ids": true, "max_tokens": 5, "stream": true}));
    let events = api.post(CHAT, body).await.events();
    assert_eq!(events[0]["prompt_token_ids"], json!(prompt));
    assert!(events[1].get("prompt_token_ids").is_none());
    assert_eq!(json!(ids(&events, 0)), json!(hello));
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_of_no_alternatives_and_with_ids() {
    let (_nats, _context, _decode, api) = usual().await;
    let answer = api
        .post(TEXTS, text(json!({"logprobs": 0, "max_tokens": 1})))
        .await
        .json();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["top_logprobs"], json!([{"H": -0.5}]));
    let more = json!({"logprobs": 1, "max_tokens": 1, "return_tokens_as_token_ids": true});
    let answer = api.post(TEXTS, text(more)).await.json();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["token_id:72"]));
    assert_eq!(logprobs["top_logprobs"], json!([{"token_id:72": -0.5}]));
    let more = json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 1, "return_tokens_as_token_ids": true});
    let answer = api.post(CHAT, chat(more)).await.json();
    let entry = &answer["choices"][0]["logprobs"]["content"][0];
    assert_eq!(entry["token"], "token_id:72");
    assert_eq!(entry["top_logprobs"][1]["token"], "token_id:73");
    assert_eq!(entry["bytes"], json!([72]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_is_cut_if_asked_for() {
    let (_nats, mut context, _decode, api) = usual().await;
    let long = format!("begin{}end", "x".repeat(20_000));
    for (more, expected) in [
        (json!({"truncate_prompt_tokens": 4}), "xend".to_owned()),
        (
            json!({"truncate_prompt_tokens": 4, "truncation_side": "right"}),
            "begi".to_owned(),
        ),
        (
            json!({"truncate_prompt_tokens": -1, "max_tokens": 10}),
            format!("{}end", "x".repeat(987)),
        ),
        (
            json!({"truncate_prompt_tokens": 4, "prompt": bytes("abcdef")}),
            "cdef".to_owned(),
        ),
        (
            json!({"truncate_prompt_tokens": 400, "prompt": "short"}),
            "short".to_owned(),
        ),
    ] {
        let mut body = text(json!({"prompt": long, "max_tokens": 1, "echo": true}));
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        let response = api.post(TEXTS, body).await;
        assert_eq!(response.status, 200, "{}", response.body);
        let answer = response.json();
        let shown = answer["choices"][0]["text"].as_str().unwrap();
        assert!(
            shown.starts_with(&expected) && shown.len() < expected.len() + 20,
            "{shown}"
        );
        let sent = context.prefills.recv().await.unwrap().sequence.tokens.0;
        assert_eq!(sent, bytes(&expected), "{more}");
    }
    let messages = json!([{"role": "user", "content": long}]);
    let body = chat(json!({"messages": messages, "truncate_prompt_tokens": 13, "max_tokens": 1}));
    assert_eq!(api.post(CHAT, body).await.status, 200);
    let sent = context.prefills.recv().await.unwrap().sequence.tokens.0;
    assert_eq!(sent, bytes("d\n<assistant>"));
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_comes_with_each_event_if_asked_for() {
    let (_nats, _context, _decode, api) = usual().await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = chat(json!({"stream": true, "stream_options": options, "max_tokens": 9}));
    let events = api.post(CHAT, body).await.events();
    let counts: Vec<u64> = events
        .iter()
        .map(|event| {
            assert_eq!(
                event["usage"]["prompt_tokens"],
                "<user>hi\n<assistant>".len()
            );
            assert_eq!(
                event["usage"]["completion_tokens_details"]["reasoning_tokens"],
                0
            );
            event["usage"]["completion_tokens"].as_u64().unwrap()
        })
        .collect();
    assert!(
        counts.is_sorted() && counts.last() == Some(&9),
        "{counts:?}"
    );
    let before_last = &events[events.len() - 2];
    let fingerprint = format!("baton-{}-abababababab", env!("CARGO_PKG_VERSION"));
    assert_eq!(before_last["system_fingerprint"], fingerprint);
    let whole = api.post(CHAT, chat(json!({"max_tokens": 2}))).await.json();
    assert_eq!(whole["system_fingerprint"], fingerprint);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_goes_on_where_it_is_asked_to() {
    let (_nats, mut context, _decode, api) = usual().await;
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hel <|end|> "}]);
    let spoken = "<user>hi\n<assistant>Hel <|end|> ";
    for (more, expected) in [
        (json!({"continue_final_message": true}), spoken.to_owned()),
        (
            json!({"add_generation_prompt": false}),
            format!("{spoken}\n"),
        ),
        (json!({}), format!("{spoken}\n<assistant>")),
        (
            json!({"chat_template_kwargs": {"mood": "glad<|end|>"}}),
            format!("{spoken}\n<assistant>glad<|end|>"),
        ),
    ] {
        let mut body = chat(json!({"messages": messages, "max_tokens": 1}));
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        let response = api.post(CHAT, body).await;
        assert_eq!(response.status, 200, "{}", response.body);
        let sent = context.prefills.recv().await.unwrap().sequence.tokens.0;
        // No client's text is a control token.
        assert_eq!(sent, bytes(&expected), "{more}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_may_be_all_of_an_answer() {
    let (_nats, _context, mut decode, api) = usual().await;
    let more = json!({"echo": true, "max_tokens": 0, "logprobs": 1});
    let answer = api.post(TEXTS, text(more.clone())).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!("hi"), &json!("length"))
    );
    assert_eq!(choice["logprobs"]["tokens"], json!(["h", "i"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let mut body = text(more);
    body["stream"] = true.into();
    let events = api.post(TEXTS, body).await.events();
    assert_eq!(text_of(&events, 0), "hi");
    assert!(
        decode.decodes.try_recv().is_err(),
        "there is nothing to decode"
    );
    let response = api.post(TEXTS, text(json!({"max_tokens": 0}))).await;
    assert_eq!(response.json()["error"]["param"], "max_tokens");
}

#[tokio::test(flavor = "multi_thread")]
async fn defaults_are_the_models_unless_they_are_not_wanted() {
    let nats = Nats::start().await;
    let mut context = crate::support::Worker::start(
        &nats,
        "c1",
        baton_protocol::Role::Context,
        Script::default(),
    )
    .await;
    let _decode =
        crate::support::Worker::start(&nats, "d1", baton_protocol::Role::Decode, Script::default())
            .await;
    for (from, warm) in [
        (GenerationConfig::Model, 0.25),
        (GenerationConfig::None, 1.0),
    ] {
        let api = Api::with(&nats, |config| {
            let config_json =
                json!({"temperature": 0.25, "top_p": 0.5, "top_k": 7, "eos_token_id": 2});
            let file = config.tokenizer.join("generation_config.json");
            std::fs::write(file, config_json.to_string()).unwrap();
            config.generation_config = from;
            config.name = baton_protocol::ApiServerId::new(format!("api-{}", warm as u32)).unwrap();
        })
        .await;
        api.sees(2).await;
        for (more, expected) in [(json!({}), warm), (json!({"temperature": 0.5}), 0.5)] {
            let response = api.post(CHAT, chat(more)).await;
            assert_eq!(response.json()["choices"][0]["message"]["content"], TEXT);
            let job = context.prefills.recv().await.unwrap();
            assert_eq!(job.sequence.generation.sampling.temperature, expected);
            let top_k = job.sequence.generation.sampling.top_k;
            assert_eq!(
                top_k,
                if from == GenerationConfig::Model {
                    7
                } else {
                    0
                }
            );
        }
        api.stop().await;
    }
}
