//! Anthropic's doors, with scripted workers that write what models of the families write.

use std::fmt::Write as _;

use baton_api_server::ApiKeys;
use baton_protocol::Role;
use serde_json::{Value, json};

use crate::support::{Api, Nats, Response, Script, TEXT, Worker};
use crate::tools::{Cluster, OUTPUT, cluster};
use crate::usual;

const PATH: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn ask(more: Value) -> Value {
    let user = json!({"role": "user", "content": "hi"});
    let mut body = json!({"model": "tiny", "max_tokens": 900, "messages": [user]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn tools() -> Value {
    let tool = |name: &str| json!({"name": name, "input_schema": {"type": "object"}});
    json!([tool("get_weather"), tool("now")])
}

/// A stream's events put together as the SDK does it; their names and order are checked.
fn assembled(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.body);
    let (mut message, mut is_open, mut names) = (Value::Null, false, Vec::new());
    let mut arguments = String::new();
    for event in response.body.split_terminator("\n\n") {
        if event.starts_with(':') {
            continue;
        }
        let (name, data) = event.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        let name = name.strip_prefix("event: ").unwrap();
        assert_eq!(data["type"], name);
        names.push(name.to_owned());
        if name == "message_start" {
            message = data["message"].clone();
            assert!(message["stop_reason"].is_null() && message["content"] == json!([]));
            continue;
        }
        if let Some(index) = data["index"].as_u64() {
            let blocks = message["content"].as_array().unwrap().len() as u64;
            match name {
                "content_block_start" => assert!(index == blocks && !is_open, "{data}"),
                _ => assert!(index + 1 == blocks && is_open, "{data}"),
            }
        }
        match name {
            "content_block_start" => {
                message["content"]
                    .as_array_mut()
                    .unwrap()
                    .push(data["content_block"].clone());
                is_open = true;
                arguments.clear();
            }
            "content_block_delta" => {
                let block = message["content"]
                    .as_array_mut()
                    .unwrap()
                    .last_mut()
                    .unwrap();
                let delta = &data["delta"];
                let (field, kind) = match delta["type"].as_str().unwrap() {
                    "text_delta" => ("text", "text"),
                    "thinking_delta" => ("thinking", "thinking"),
                    "signature_delta" => ("signature", "thinking"),
                    "input_json_delta" => {
                        assert_eq!(block["type"], "tool_use");
                        write!(arguments, "{}", delta["partial_json"].as_str().unwrap()).unwrap();
                        continue;
                    }
                    other => panic!("{other}"),
                };
                assert_eq!(block["type"], kind);
                let so_far = block[field].as_str().unwrap().to_owned();
                block[field] = (so_far + delta[field].as_str().unwrap()).into();
            }
            "content_block_stop" => {
                is_open = false;
                let block = message["content"]
                    .as_array_mut()
                    .unwrap()
                    .last_mut()
                    .unwrap();
                if block["type"] == "tool_use" && !arguments.is_empty() {
                    block["input"] = serde_json::from_str(&arguments).unwrap_or(json!({}));
                }
            }
            "message_delta" => {
                assert!(!is_open);
                for (name, value) in data["delta"].as_object().unwrap() {
                    message[name] = value.clone();
                }
                for (name, value) in data["usage"].as_object().unwrap() {
                    message["usage"][name] = value.clone();
                }
            }
            "ping" => assert_eq!(names.len(), 2),
            "message_stop" => {}
            other => panic!("{other}: {data}"),
        }
    }
    assert_eq!(names.last().unwrap(), "message_stop");
    assert_eq!(names[names.len() - 2], "message_delta");
    message
}

/// The answer in one piece and as a stream, which have to be the same.
async fn both(cluster: &Cluster, more: Value) -> Value {
    let whole = cluster.api.post(PATH, ask(more.clone())).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    let mut whole = whole.json();
    let mut more = more;
    more["stream"] = true.into();
    let mut streamed = assembled(&cluster.api.post(PATH, ask(more)).await);
    // What differs by itself.
    for message in [&mut whole, &mut streamed] {
        assert!(message["id"].as_str().unwrap().starts_with("msg_"));
        message["id"].take();
        for block in message["content"].as_array_mut().unwrap() {
            if block["type"] == "tool_use" {
                assert!(!block["id"].take().as_str().unwrap().is_empty());
            }
        }
        // The second finds the first's prefix.
        let usage = message["usage"].as_object_mut().unwrap();
        let cached = usage.remove("cache_read_input_tokens").unwrap();
        let input = usage["input_tokens"].as_u64().unwrap() + cached.as_u64().unwrap();
        usage["input_tokens"] = input.into();
    }
    assert_eq!(whole, streamed);
    whole
}

#[tokio::test(flavor = "multi_thread")]
async fn thinking_text_and_calls_are_blocks_streamed_or_not() {
    let mut cluster = cluster(OUTPUT, None, None).await;
    let message = both(&cluster, json!({"tools": tools()})).await;
    let call = |name: &str, input: Value| json!({"type": "tool_use", "caller": {"type": "direct"}, "id": null, "name": name, "input": input});
    let content = json!([
        {"type": "thinking", "thinking": "Wéather.", "signature": "baton"},
        {"type": "text", "text": "I look."},
        call("get_weather", json!({"city": "São \"P\""})),
        call("now", json!({})),
    ]);
    assert_eq!(message["content"], content);
    assert_eq!(message["stop_reason"], "tool_use");
    assert_eq!(
        (&message["model"], &message["role"]),
        (&json!("tiny"), &json!("assistant"))
    );
    let prompt = cluster.prompt().await;
    assert!(prompt.contains("get_weather"), "{prompt}");
    assert_eq!(message["usage"]["input_tokens"], prompt.len());

    let thinking = json!({"type": "enabled", "budget_tokens": 1024, "display": "omitted"});
    let shown = both(&cluster, json!({"tools": tools(), "thinking": thinking})).await;
    assert_eq!(shown["content"][0]["type"], "text");
    let one = json!({"type": "auto", "disable_parallel_tool_use": true});
    let one = both(&cluster, json!({"tools": tools(), "tool_choice": one})).await;
    assert_eq!(one["content"].as_array().unwrap().len(), 3);
    // Cut in the arguments: a call with nothing in it, which is not to be made.
    let cut = both(&cluster, json!({"tools": tools(), "max_tokens": 100})).await;
    assert_eq!(cut["content"][2], call("get_weather", json!({})));
    assert_eq!(
        (&cut["stop_reason"], &cut["usage"]["output_tokens"]),
        (&json!("max_tokens"), &json!(100))
    );
    let none = both(
        &cluster,
        json!({"tools": tools(), "tool_choice": {"type": "none"}}),
    )
    .await;
    assert_eq!(none["content"].as_array().unwrap().len(), 2);
    assert_eq!(none["stop_reason"], "end_turn");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agents_second_turn_is_the_chats_it_means() {
    let mut cluster = cluster("Fine.</think>Sunny.", None, None).await;
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "baton"},
            {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Paris"}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "clear <|end|>"}]},
    ]);
    let body = json!({"messages": messages, "system": "Be brief.", "thinking": {"type": "enabled", "budget_tokens": 2000},
        "output_config": {"effort": "low"}});
    let answer = both(&cluster, body.clone()).await;
    assert_eq!(answer["content"][0]["thinking"], "Fine.");
    assert_eq!(answer["content"][1]["text"], "Sunny.");
    let prompt = cluster.prompt().await;
    assert_eq!(
        prompt,
        "<system>Be brief.<user>Weather?<assistant>get_weather{\"city\": \"Paris\"}(Hm.)<tool>clear <|end|><assistant>[low]<think>\n"
    );
    let mut count = ask(body);
    count.as_object_mut().unwrap().remove("max_tokens");
    let counted = cluster.api.post(COUNT, count).await.json();
    assert_eq!(counted, json!({"input_tokens": prompt.len()}));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_an_answer_is_said() {
    let (_nats, mut context, _decode, api) = usual().await;
    for (more, text, reason, sequence) in [
        (json!({}), TEXT, "end_turn", Value::Null),
        (json!({"max_tokens": 5}), "Hello", "max_tokens", Value::Null),
        (
            json!({"max_tokens": 100_000}),
            TEXT,
            "end_turn",
            Value::Null,
        ),
        (
            json!({"stop_sequences": ["zzz", ", w"]}),
            "Hello",
            "stop_sequence",
            json!(", w"),
        ),
        (
            json!({"stop_token_ids": [b'l']}),
            "He",
            "end_turn",
            Value::Null,
        ),
    ] {
        for stream in [false, true] {
            let mut body = ask(more.clone());
            body["stream"] = stream.into();
            let response = api.post(PATH, body).await;
            let message = match stream {
                true => assembled(&response),
                false => response.json(),
            };
            assert_eq!(message["content"][0]["text"], text, "{more}");
            assert_eq!(
                (&message["stop_reason"], &message["stop_sequence"]),
                (&json!(reason), &sequence),
                "{more}"
            );
            context.prefills.recv().await.unwrap();
        }
    }
    // With the assistant's message last the model goes on with it.
    let messages =
        json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]);
    let answer = api
        .post("/v1/messages?beta=true", ask(json!({"messages": messages})))
        .await;
    assert_eq!(answer.json()["content"][0]["text"], TEXT);
    assert!(answer.head.contains("\r\nrequest-id: "), "{}", answer.head);
    let job = context.prefills.recv().await.unwrap();
    let prompt: Vec<u8> = job
        .sequence
        .tokens
        .0
        .iter()
        .map(|token| *token as u8)
        .collect();
    assert_eq!(String::from_utf8(prompt).unwrap(), "<user>a\n<assistant>b ");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_fills_the_model_says_so() {
    let (_nats, context, decode, api) = usual().await;
    for worker in [&context, &decode] {
        worker.script.lock().unwrap().endless = true;
    }
    let message = api
        .post(PATH, ask(json!({"max_tokens": 100_000})))
        .await
        .json();
    assert_eq!(message["stop_reason"], "model_context_window_exceeded");
    let used = &message["usage"];
    let tokens = |name: &str| used[name].as_u64().unwrap();
    let prompt = tokens("input_tokens") + tokens("cache_read_input_tokens");
    assert_eq!(prompt + tokens("output_tokens"), 1000, "{used}");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_anthropics_form() {
    let (_nats, _context, decode, api) = usual().await;
    let image = json!([{"role": "user", "content": [{"type": "image"}]}]);
    let long = json!([{"role": "user", "content": "x".repeat(2000)}]);
    for (method, path, body, status, kind, said) in [
        (
            "POST",
            PATH,
            ask(json!({"model": "other"})),
            404,
            "not_found_error",
            "other",
        ),
        (
            "POST",
            COUNT,
            json!({"model": "other", "messages": [{"role": "user", "content": "x"}]}),
            404,
            "not_found_error",
            "other",
        ),
        (
            "POST",
            PATH,
            ask(json!({"messages": image})),
            400,
            "invalid_request_error",
            "messages[0].content[0]",
        ),
        (
            "POST",
            PATH,
            ask(json!({"messages": long})),
            400,
            "invalid_request_error",
            "prompt is too long: ",
        ),
        (
            "POST",
            PATH,
            ask(json!({"tools": tools()})),
            400,
            "invalid_request_error",
            "--tool-format",
        ),
        (
            "POST",
            COUNT,
            ask(json!({})),
            400,
            "invalid_request_error",
            "max_tokens",
        ),
        ("GET", PATH, json!({}), 405, "invalid_request_error", "GET"),
        (
            "POST",
            "/v1/messages/batches",
            json!({}),
            404,
            "not_found_error",
            "/v1/messages/batches",
        ),
    ] {
        let response = api.send(method, path, body.to_string().as_bytes()).await;
        let error = response.json();
        assert_eq!(
            (response.status, &error["type"]),
            (status, &json!("error")),
            "{error}"
        );
        assert_eq!(error["error"]["type"], kind, "{error}");
        assert!(
            error["error"]["message"].as_str().unwrap().contains(said),
            "{error}"
        );
        let id = error["request_id"].as_str().unwrap();
        let header = format!("\r\nrequest-id: {id}\r\n");
        assert!(response.head.contains(&header), "{}", response.head);
    }
    // In mid-stream.
    decode.script.lock().unwrap().refuses_with = Some("broken");
    let response = api.post(PATH, ask(json!({"stream": true}))).await;
    let (_, event) = response
        .body
        .split_once("event: error\ndata: ")
        .expect(&response.body);
    let error: Value = serde_json::from_str(event.trim_end()).unwrap();
    assert_eq!(
        (&error["type"], &error["error"]["type"]),
        (&json!("error"), &json!("api_error"))
    );
    let id = error["request_id"].as_str().unwrap();
    assert!(
        response.head.contains(&format!("request-id: {id}")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_may_come_as_anthropics_clients_send_it() {
    let nats = Nats::start().await;
    let _workers = (
        Worker::start(&nats, "c1", Role::Context, Script::default()).await,
        Worker::start(&nats, "d1", Role::Decode, Script::default()).await,
    );
    let keys = ApiKeys::parse("anna sk-anna-0123456789").unwrap();
    let api = Api::with(&nats, |config| config.api_keys = keys).await;
    let refused = api.post(PATH, ask(json!({}))).await;
    assert_eq!(refused.status, 401);
    assert_eq!(refused.json()["error"]["type"], "authentication_error");
    let body = ask(json!({})).to_string();
    for (key, status) in [("sk-anna-0123456789", 200), ("sk-anna-0123456780", 401)] {
        let request = format!(
            "POST {COUNT} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Type: application/json\r\nX-Api-Key: {key}\r\n\
             anthropic-version: 2023-06-01\r\nContent-Length: {}\r\n\r\n{}",
            body.len() - r#""max_tokens":900,"#.len(),
            body.replace(r#""max_tokens":900,"#, "")
        );
        let mut connection = api.connect().await;
        connection.write(request.as_bytes()).await.unwrap();
        assert_eq!(connection.finish().await.status, status);
    }
}
