//! Tools of a model whose format has a marker. This small one calls nothing of its own accord: which token it begins with is forced
//! upon it, and the rest follows from the grammar.

use baton_protocol::Grammar;
use baton_tests::{Api, Cluster, PATIENCE, Setup, Trace, Turn, tool_model_dir};
use serde_json::{Value, json};

/// The id of a text that is one token.
async fn token(api: &Api, text: &str) -> String {
    let answer = api.post("/tokenize", &json!({"prompt": text})).await.ok();
    let tokens = answer["tokens"].as_array().expect("tokens");
    assert_eq!(tokens.len(), 1, "{text:?} is {tokens:?}");
    tokens[0].to_string()
}

#[tokio::test]
async fn a_model_answers_by_schema_or_calls_strictly() {
    let turn = Turn::take();
    let setup = Setup {
        api_args: vec!["--tool-format".to_owned(), "hermes".to_owned()],
        tokenizer: tool_model_dir(),
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let compact = json!({"whitespace_flexible": false});
    let answer = json!({"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"],
        "additionalProperties": false, "x-guidance": compact});
    let place = json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": false});
    let tool = json!({"type": "function", "function": {"name": "look", "parameters": place, "strict": true}});
    let ask = |begins: &str, structured: bool, parallel: bool| {
        let mut body = json!({"model": model, "max_tokens": 60, "temperature": 0, "logit_bias": {begins: 100}, "tools": [tool],
            "parallel_tool_calls": parallel, "messages": [{"role": "user", "content": "Is it sunny in Paris?"}]});
        if structured {
            let schema = json!({"name": "weather", "schema": answer, "strict": true});
            body["response_format"] = json!({"type": "json_schema", "json_schema": schema});
        }
        body
    };
    let [brace, angle] = [
        token(&cluster.api, "{").await,
        token(&cluster.api, "<").await,
    ];

    let told = cluster.api.chat(&ask(&brace, true, true)).await;
    let choice = &told["choices"][0];
    assert_eq!(choice["finish_reason"], "stop", "{told}");
    assert!(choice["message"]["tool_calls"].is_null(), "{told}");
    let content = choice["message"]["content"].as_str().expect("content");
    let content: Value = serde_json::from_str(content).expect("JSON");
    assert!(content["sunny"].is_boolean(), "{told}");

    let told = cluster.api.chat(&ask(&angle, true, false)).await;
    let choice = &told["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{told}");
    assert!(choice["message"]["content"].is_null(), "{told}");
    let call = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(call["name"], "look", "{told}");
    let arguments = call["arguments"].as_str().expect("JSON text");
    let arguments: Value = serde_json::from_str(arguments).expect("JSON");
    assert!(
        arguments["city"] == "Paris" || arguments["city"] == "Rome",
        "{told}"
    );

    // Without a schema for the answer the text is free; calls are not, and the workers know.
    let from = cluster.tap.now();
    cluster.api.chat(&ask(&brace, false, true)).await;
    let traces = Trace::all(&cluster.tap, from).await;
    // What ends of the requests before is heard too.
    let jobs: Vec<_> = traces.values().flat_map(|trace| &trace.prefills).collect();
    assert_eq!(jobs.len(), 1);
    match &jobs[0].1.sequence.generation.grammar {
        Some(Grammar::Lark(text)) => {
            assert!(text.contains("Paris") && text.contains("TEXT"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    cluster.drained(PATIENCE).await;
}
