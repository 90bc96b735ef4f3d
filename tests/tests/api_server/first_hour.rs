//! What a new user tries first: another name or none, no limit, a wrong path, a look at what there is.

use baton_api_server::Format;
use baton_protocol::Role;
use serde_json::{Value, json};

use crate::doors::ask;
use crate::support::{Api, Nats, Script, Worker};

const CHAT: &str = "/v1/chat/completions";

async fn api_with(
    nats: &Nats,
    adjust: impl FnOnce(&mut baton_api_server::ApiServerConfig),
) -> (Worker, Worker, Api) {
    let context = Worker::start(nats, "c1", Role::Context, Script::default()).await;
    let decode = Worker::start(nats, "d1", Role::Decode, Script::default()).await;
    let api = Api::with(nats, adjust).await;
    api.sees(2).await;
    (context, decode, api)
}

fn user(more: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "a"}]});
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_served_under_each_of_its_names_and_under_none() {
    let nats = Nats::start().await;
    let (_context, _decode, api) = api_with(&nats, |config| {
        config.model_names = vec!["first".to_owned(), "org/second".to_owned()];
    })
    .await;
    for named in [
        json!({}),
        json!({"model": null}),
        json!({"model": ""}),
        json!({"model": "first"}),
        json!({"model": "org/second"}),
    ] {
        let mut body = user(&named);
        body["max_tokens"] = 2.into();
        let answer = api.post(CHAT, body.clone()).await;
        assert_eq!(answer.status, 200, "{named}: {}", answer.body);
        assert_eq!(answer.json()["model"], "first", "{named}");
        let message = api.post("/v1/messages", body).await;
        assert_eq!(message.status, 200, "{named}: {}", message.body);
        let mut body = named.clone();
        body["input"] = "a".into();
        body["max_output_tokens"] = 2.into();
        let response = api.post("/v1/responses", body).await;
        assert_eq!(response.status, 200, "{named}: {}", response.body);
    }
    for name in ["tiny", "second", "org"] {
        let answer = api.post(CHAT, user(&json!({"model": name}))).await;
        assert_eq!(answer.status, 404, "{}", answer.body);
        let message = answer.json()["error"]["message"].to_string();
        assert!(
            message.contains("first") && message.contains("org/second"),
            "{message}"
        );
    }

    let list = ask(&api, "GET /v1/models", &[], b"").await.json();
    let ids: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| &row["id"])
        .collect();
    assert_eq!(ids, ["first", "org/second"]);
    assert_eq!(
        (&list["has_more"], &list["last_id"]),
        (&false.into(), &"org/second".into())
    );
    let second = ask(&api, "GET /v1/models/org/second", &[], b"")
        .await
        .json();
    for (field, value) in [
        ("id", json!("org/second")),
        ("root", json!("first")),
        ("parent", Value::Null),
        ("object", json!("model")),
        ("type", json!("model")),
        ("display_name", json!("org/second")),
        ("max_model_len", json!(1000)),
        ("default_max_tokens", Value::Null),
        ("tools", json!("required")),
    ] {
        assert_eq!(second[field], value, "{field}: {second}");
    }
    // RFC 3339, and the same moment as `created`.
    let at = second["created_at"].as_str().unwrap();
    assert!(
        at.len() == 20 && at.starts_with("20") && at.ends_with('Z'),
        "{at}"
    );
    assert_eq!(ask(&api, "GET /v1/models/tiny", &[], b"").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_a_limit_has_the_servers() {
    let nats = Nats::start().await;
    let (mut context, _decode, api) = api_with(&nats, |config| {
        config.default_max_tokens = Some(9);
    })
    .await;
    let text = json!({"prompt": "a"});
    let long = json!({"role": "user", "content": "a".repeat(990)});
    for (path, body, tokens) in [
        (CHAT, user(&json!({})), 9),
        (CHAT, user(&json!({"max_tokens": 20})), 20),
        (CHAT, user(&json!({"max_completion_tokens": 3})), 3),
        ("/v1/responses", json!({"input": "a"}), 9),
        (
            "/v1/responses",
            json!({"input": "a", "max_output_tokens": 4}),
            4,
        ),
        // OpenAI's own default.
        ("/v1/completions", text, 16),
    ] {
        let answer = api.post(path, body.clone()).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        let job = context.prefills.recv().await.unwrap();
        assert_eq!(job.sequence.generation.max_tokens, tokens, "{path} {body}");
    }
    // Where the prompt leaves less room, that is the limit.
    let cut = json!({"messages": [long], "truncate_prompt_tokens": -1});
    let answer = api.post(CHAT, cut).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let job = context.prefills.recv().await.unwrap();
    assert_eq!(job.sequence.tokens.0.len(), 1000 - 9);
    let model = ask(&api, "GET /v1/models/tiny", &[], b"").await.json();
    assert_eq!(model["default_max_tokens"], 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_that_the_template_does_not_show_are_refused_where_the_model_must_know_them() {
    let nats = Nats::start().await;
    let (_context, _decode, api) = api_with(&nats, |config| {
        config.tool_format = Some(Format::Hermes);
    })
    .await;
    let function = json!({"name": "look", "parameters": {"type": "object", "properties": {}}});
    let tools = json!([{"type": "function", "function": function}]);
    let refused = api.post(CHAT, user(&json!({"tools": tools}))).await;
    assert_eq!(refused.status, 400, "{}", refused.body);
    let error = &refused.json()["error"];
    assert_eq!(error["param"], "tools");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("chat template of this model does not show it the tools"),
        "{message}"
    );
    // The other APIs say the same.
    let flat = json!([{"type": "function", "name": "look", "parameters": {"type": "object"}}]);
    let refused = api
        .post("/v1/responses", json!({"input": "a", "tools": flat}))
        .await;
    assert_eq!(refused.status, 400, "{}", refused.body);
    let custom = json!([{"name": "look", "input_schema": {"type": "object"}}]);
    for (path, more) in [
        ("/v1/messages", json!({"max_tokens": 5})),
        ("/v1/messages/count_tokens", json!({})),
    ] {
        let mut body = user(&more);
        body["tools"] = custom.clone();
        let refused = api.post(path, body).await;
        assert_eq!(refused.status, 400, "{path}: {}", refused.body);
        assert!(
            refused.body.contains("does not show it the tools"),
            "{}",
            refused.body
        );
    }
    // None may be called, so none need be seen.
    let none = json!({"tools": tools, "tool_choice": "none", "max_tokens": 2});
    assert_eq!(api.post(CHAT, user(&none)).await.status, 200);
    let model = ask(&api, "GET /v1/models/tiny", &[], b"").await.json();
    assert_eq!(model["tools"], "required");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_there_is_can_be_read_without_a_key() {
    let nats = Nats::start().await;
    let api = Api::with(&nats, |config| {
        config.api_keys = baton_api_server::ApiKeys::parse("0123456789abcdef").unwrap();
    })
    .await;
    let docs = ask(&api, "GET /docs", &[], b"").await;
    assert_eq!(docs.status, 200);
    assert_eq!(
        docs.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert!(
        docs.header("content-security-policy")
            .unwrap()
            .contains("sha256-")
    );
    assert!(
        docs.text().contains("<code>max_tokens</code>"),
        "{}",
        docs.text()
    );
    let document = ask(&api, "GET /openapi.json", &[], b"").await.json();
    assert_eq!(document["openapi"], "3.1.0");

    // Every path of the document is there, by each of its methods: not one is a 404 or a 405.
    let key = "Authorization: Bearer 0123456789abcdef";
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() > 20, "{}", paths.len());
    for (path, item) in paths {
        let path = path.replace("{model}", "tiny");
        for method in ["get", "post", "delete"] {
            let asked = format!("{} {path}", method.to_uppercase());
            let answer = ask(&api, &asked, &[key], b"").await;
            let nothing = answer.text().contains("there is nothing at");
            match item.get(method) {
                Some(_) => assert!(
                    answer.status != 405 && !nothing,
                    "{asked}: {}",
                    answer.text()
                ),
                None => assert_eq!(answer.status, 405, "{asked}: {}", answer.text()),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_path_is_told_the_right_one() {
    let nats = Nats::start().await;
    let (_context, _decode, api) = api_with(&nats, |_| {}).await;
    for (asked, said) in [
        ("GET /models", "do you mean /v1/models?"),
        (
            "POST /chat/completions",
            "do you mean /v1/chat/completions?",
        ),
        ("POST /v1/embeddings", "/v1/embeddings is not offered"),
        ("GET /api/tags", "this is no Ollama server"),
        ("GET /wibble", "GET /docs shows what there is"),
    ] {
        let answer = ask(&api, asked, &[], b"").await;
        assert_eq!(answer.status, 404, "{asked}");
        let error = &answer.json()["error"];
        assert_eq!(error["code"], "not_found");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(said), "{asked}: {message}");
    }
    // Anthropic's clients read Anthropic's form.
    let answer = ask(&api, "POST /v1/messages/batches", &[], b"").await;
    assert_eq!(
        (answer.status, &answer.json()["type"]),
        (404, &"error".into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_no_answer_is_taken() {
    let nats = Nats::start().await;
    let (_context, _decode, api) = api_with(&nats, |_| {}).await;
    for more in [
        json!({"store": true}),
        json!({"store": true, "metadata": {"a": "b"}}),
        json!({"verbosity": "low"}),
        json!({"reasoning": {"effort": "low", "summary": "auto"}}),
    ] {
        let mut body = user(&more);
        body["max_tokens"] = 2.into();
        let answer = api.post(CHAT, body).await;
        assert_eq!(answer.status, 200, "{more}: {}", answer.body);
    }
    let spoken = json!({"input": "a", "max_output_tokens": 2, "text": {"verbosity": "high"}});
    let answer = api.post("/v1/responses", spoken).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["text"]["verbosity"], "high");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_sent_back_by_the_ids_of_its_items() {
    let nats = Nats::start().await;
    let (mut context, _decode, api) = api_with(&nats, |_| {}).await;
    let asked = json!({"input": "a", "max_output_tokens": 5});
    let first = api.post("/v1/responses", asked).await.json();
    let _ = context.prefills.recv().await.unwrap();
    let said = &first["output"][0];
    let ask = |id: &Value| {
        let reference = json!({"type": "item_reference", "id": id});
        let user = |text: &str| json!({"role": "user", "content": text});
        json!({"input": [user("a"), reference, user("b")], "max_output_tokens": 2})
    };
    let second = api.post("/v1/responses", ask(&said["id"])).await;
    assert_eq!(second.status, 200, "{}", second.body);
    let job = context.prefills.recv().await.unwrap();
    let bytes: Vec<u8> = job.sequence.tokens.0.iter().map(|id| *id as u8).collect();
    let text = said["content"][0]["text"].as_str().unwrap();
    let prompt = format!("<user>a\n<assistant>{text}\n<user>b\n<assistant>");
    assert_eq!(String::from_utf8_lossy(&bytes), prompt);
    let none = api.post("/v1/responses", ask(&json!("msg_none_0"))).await;
    assert_eq!(none.status, 404, "{}", none.body);
    let error = &none.json()["error"];
    assert_eq!(error["param"], "input[1].id");
    assert!(
        error["message"].as_str().unwrap().contains("not found"),
        "{error}"
    );
    // What was kept of the second names the item itself.
    let id = second.json()["id"].as_str().unwrap().to_owned();
    let items = ask_items(&api, &id).await;
    assert!(
        items
            .iter()
            .any(|item| item["id"] == said["id"] && item["type"] == "message"),
        "{items:?}"
    );
}

async fn ask_items(api: &Api, id: &str) -> Vec<Value> {
    let path = format!("GET /v1/responses/{id}/input_items");
    let page = ask(api, &path, &[], b"").await.json();
    page["data"].as_array().unwrap().clone()
}
