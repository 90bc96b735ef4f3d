//! Tools and reasoning, with scripted workers that write what models of the families write.

use baton_api_server::{Format, Reasoning};
use baton_protocol::Role;
use serde_json::{Value, json};

use crate::support::{Api, EOS, Nats, Script, Worker, chat, model_directory};

/// A template that shows tools as Hermes does, earlier calls, and whether to think.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}\nAnswer in <tool_call></tool_call>.\n{% endif %}\
    {% for m in messages %}<{{ m.role }}>{{ m.content }}\
    {% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}\
    {% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}\n{% endfor %}<assistant>\
    {% if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}{% if enable_thinking %}<think>\n{% endif %}";

pub const OUTPUT: &str = "<think>\nWéather.\n</think>\n\nI look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": \
    {\"city\": \"São \\\"P\\\"\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";

pub struct Cluster {
    _nats: Nats,
    context: Worker,
    decode: Worker,
    pub api: Api,
    _model: tempfile::TempDir,
}

pub async fn cluster(
    output: &str,
    format: Option<Format>,
    reasoning: Option<Reasoning>,
) -> Cluster {
    let script = Script {
        tokens: output.bytes().map(u32::from).collect(),
        ..Script::default()
    };
    let nats = Nats::start().await;
    let context = Worker::start(&nats, "c1", Role::Context, script.clone()).await;
    let decode = Worker::start(&nats, "d1", Role::Decode, script).await;
    let model = model_directory();
    std::fs::write(model.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let api = Api::with(&nats, |config| {
        config.tokenizer = model.path().to_owned();
        config.tool_format = format;
        config.reasoning_format = reasoning;
    })
    .await;
    api.sees(2).await;
    Cluster {
        _nats: nats,
        context,
        decode,
        api,
        _model: model,
    }
}

impl Cluster {
    async fn ask(&self, more: Value) -> crate::support::Response {
        self.api.post("/v1/chat/completions", chat(more)).await
    }

    /// The text of the prompt of the next job.
    pub async fn prompt(&mut self) -> String {
        let job = self.context.prefills.recv().await.unwrap();
        let bytes = job
            .sequence
            .tokens
            .0
            .iter()
            .map(|token| *token as u8)
            .collect();
        String::from_utf8(bytes).unwrap()
    }
}

fn tools() -> Value {
    let function = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    json!([function("get_weather"), function("now")])
}

/// A stream's deltas put together as SDKs do it: by index, texts joined.
fn assembled(events: &[Value]) -> (Value, String) {
    let mut message =
        json!({"content": "", "reasoning_content": "", "reasoning": "", "tool_calls": []});
    let mut finish = String::new();
    for event in events {
        let choice = &event["choices"][0];
        finish.push_str(choice["finish_reason"].as_str().unwrap_or(""));
        let delta = choice["delta"].as_object().unwrap();
        for name in ["content", "reasoning_content", "reasoning"] {
            let text = delta.get(name).and_then(Value::as_str).unwrap_or("");
            message[name] = json!(format!("{}{text}", message[name].as_str().unwrap()));
        }
        for call in delta
            .get("tool_calls")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let index = call["index"].as_u64().unwrap() as usize;
            let calls = message["tool_calls"].as_array_mut().unwrap();
            let arguments = call["function"]["arguments"].as_str().unwrap();
            if index == calls.len() {
                assert!(
                    call["id"].is_string() && call["type"] == "function",
                    "{call}"
                );
                let function = json!({"name": call["function"]["name"], "arguments": arguments});
                calls.push(json!({"id": call["id"], "type": "function", "function": function}));
            } else {
                assert!(
                    index + 1 == calls.len() && call.get("id").is_none(),
                    "{call}"
                );
                let so_far = calls[index]["function"]["arguments"].as_str().unwrap();
                calls[index]["function"]["arguments"] = json!(format!("{so_far}{arguments}"));
            }
        }
    }
    (message, finish)
}

fn check(message: &Value, finish: &str) {
    assert_eq!(message["reasoning_content"], "Wéather.");
    assert_eq!(message["reasoning"], "Wéather.");
    assert_eq!(message["content"], "I look.");
    let calls = message["tool_calls"].as_array().unwrap();
    let names: Vec<_> = calls
        .iter()
        .map(|call| call["function"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["get_weather", "now"]);
    assert_eq!(
        calls[0]["function"]["arguments"],
        r#"{"city": "São \"P\""}"#
    );
    assert_eq!(calls[1]["function"]["arguments"], "{}");
    assert_ne!(calls[0]["id"], calls[1]["id"]);
    assert_eq!(finish, "tool_calls");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_reasoning_in_a_stream_and_in_one_piece() {
    // The format is the template's, the reasoning is not: the template only opens it.
    let mut cluster = cluster(OUTPUT, None, None).await;
    for stream in [true, false] {
        let response = cluster
            .ask(json!({"tools": tools(), "stream": stream}))
            .await;
        match stream {
            true => {
                let (message, finish) = assembled(&response.events());
                check(&message, &finish);
            }
            false => {
                assert_eq!(response.status, 200, "{}", response.body);
                let choice = response.json()["choices"][0].clone();
                check(
                    &choice["message"],
                    choice["finish_reason"].as_str().unwrap(),
                );
            }
        }
        let prompt = cluster.prompt().await;
        assert!(
            prompt.starts_with("[{\"") && prompt.contains("get_weather"),
            "{prompt}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_requests_say_of_calls_and_reasoning() {
    let cluster = cluster(OUTPUT, None, None).await;
    let message = |response: crate::support::Response| {
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()["choices"][0]["message"].clone()
    };
    // Without tools, or with none to be called, calls are text.
    for more in [json!({}), json!({"tools": tools(), "tool_choice": "none"})] {
        let response = cluster.ask(more).await;
        assert_eq!(response.json()["choices"][0]["finish_reason"], "stop");
        let message = message(response);
        assert_eq!(message["reasoning_content"], "Wéather.");
        assert!(
            message["content"]
                .as_str()
                .unwrap()
                .starts_with("I look.\n<tool_call>"),
            "{message}"
        );
        assert!(message.get("tool_calls").is_none());
    }
    let without = message(
        cluster
            .ask(json!({"tools": tools(), "include_reasoning": false}))
            .await,
    );
    assert!(
        without.get("reasoning_content").is_none() && without.get("reasoning").is_none(),
        "{without}"
    );
    let one = message(
        cluster
            .ask(json!({"tools": tools(), "parallel_tool_calls": false}))
            .await,
    );
    assert_eq!(one["tool_calls"].as_array().unwrap().len(), 1, "{one}");
    // Cut in the arguments: not done, so not to be called.
    let cut = cluster
        .ask(json!({"tools": tools(), "max_tokens": 110}))
        .await
        .json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    for (more, param) in [
        (
            json!({"tools": tools(), "tool_choice": "some"}),
            "tool_choice",
        ),
        (json!({"tool_choice": "auto"}), "tool_choice"),
        (
            json!({"tools": [{"type": "function"}]}),
            "tools[0].function",
        ),
        (
            json!({"chat_template_kwargs": {"tools": []}}),
            "chat_template_kwargs.tools",
        ),
    ] {
        let response = cluster.ask(more).await;
        assert_eq!(
            (response.status, &response.json()["error"]["param"]),
            (400, &json!(param))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_tools_and_template_arguments_reach_the_model() {
    let mut cluster = cluster("Fine.</think>Sunny.", None, None).await;
    let call = json!({"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}});
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [call], "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "{\"sky\": \"clear <|end|>\"}"},
    ]);
    let more = json!({"messages": messages, "chat_template_kwargs": {"enable_thinking": true}, "reasoning_effort": "low"});
    let answer = cluster.ask(more).await.json();
    // The template opened the reasoning.
    assert_eq!(
        answer["choices"][0]["message"]["reasoning_content"],
        "Fine."
    );
    assert_eq!(answer["choices"][0]["message"]["content"], "Sunny.");
    assert_eq!(
        cluster.prompt().await,
        "<user>Weather?<assistant>get_weather{\"city\": \"Paris\"}(Hm.)<tool>{\"sky\": \"clear <|end|>\"}<assistant>[low]<think>\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_known_format_is_shown_no_tools() {
    let cluster = cluster("Hi.", Some(Format::None), Some(Reasoning::None)).await;
    let response = cluster.ask(json!({"tools": tools()})).await;
    assert_eq!(response.status, 400);
    assert!(response.body.contains("--tool-format"), "{}", response.body);
    let answer = cluster.ask(json!({})).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "Hi.");
}

/// Special tokens and stop strings, with a token for each.
#[tokio::test(flavor = "multi_thread")]
async fn special_tokens_are_not_shown_and_stop_strings_hold() {
    let cluster = cluster("", Some(Format::Hermes), Some(Reasoning::None)).await;
    let mut tokens: Vec<u32> = b"one".map(u32::from).to_vec();
    tokens.push(EOS);
    tokens.extend(b" two STOP three".map(u32::from));
    for worker in [&cluster.context, &cluster.decode] {
        worker.script.lock().unwrap().tokens = tokens.clone();
    }
    for stream in [true, false] {
        let more = json!({"tools": tools(), "ignore_eos": true, "max_tokens": 19, "stop": ["STOP"], "stream": stream});
        let response = cluster.ask(more).await;
        let content = match stream {
            true => assembled(&response.events()).0["content"].clone(),
            false => response.json()["choices"][0]["message"]["content"].clone(),
        };
        assert_eq!(content, "one two ");
    }
}
