use serde_json::json;

use super::*;
use crate::anthropic;
use crate::config::Limits;
use crate::openai::{
    ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, responses,
};
use crate::text::tokenizer::GenerationDefaults;

/// A body that this door takes.
fn plain(door: Door) -> Value {
    let user = json!({"role": "user", "content": "hi"});
    match door {
        Door::Chat => json!({"model": "m", "messages": [user]}),
        Door::Text => json!({"model": "m", "prompt": "hi"}),
        Door::Tokenize => json!({"messages": [user]}),
        Door::Detokenize => json!({"tokens": [1]}),
        Door::Messages => json!({"model": "m", "max_tokens": 5, "messages": [user]}),
        Door::CountTokens => json!({"model": "m", "messages": [user]}),
        Door::Responses => json!({"model": "m", "input": "hi"}),
    }
}

fn parse(door: Door, body: &Value) -> Result<(), ApiError> {
    let (body, limits) = (body.to_string(), Limits::default());
    let (body, defaults) = (body.as_bytes(), GenerationDefaults::default());
    match door {
        Door::Chat => ChatRequest::parse(body, &defaults, &limits).map(drop),
        Door::Text => CompletionRequest::parse(body, &defaults, &limits).map(drop),
        Door::Tokenize => TokenizeRequest::parse(body).map(drop),
        Door::Detokenize => DetokenizeRequest::parse(body).map(drop),
        Door::Messages => anthropic::read(body, &defaults, &limits).map(drop),
        Door::CountTokens => anthropic::CountRequest::parse(body).map(drop),
        Door::Responses => responses::read(body, &defaults, &limits, &|_| None).map(drop),
    }
}

/// The plain body with this field.
fn with(door: Door, name: &str, value: Value) -> Value {
    let mut body = plain(door);
    match name.split_once('.') {
        Some((parent, name)) => {
            if parent == "stream_options" {
                body["stream"] = true.into();
            }
            body[parent] = json!({name: value});
        }
        None => body[name] = value,
    }
    // Either of the two.
    if door == Door::Tokenize && name == "prompt" {
        body.as_object_mut().unwrap().remove("messages");
    }
    body
}

fn rows() -> impl Iterator<Item = (Door, &'static Field)> {
    let doors = |door: Door| fields().map(move |field| (door, field));
    let rows = Door::ALL.into_iter().flat_map(doors);
    rows.filter(|(door, field)| field.doors.has(*door))
}

/// A field that nobody reads would take any value.
#[test]
fn what_is_done_is_read() {
    for (door, field) in rows().filter(|(_, field)| field.does == Does::It) {
        let wrong = json!([[[{}]]]);
        let error = parse(door, &with(door, field.name, wrong)).expect_err(field.name);
        let param = error.param.unwrap_or_default();
        assert!(param.starts_with(field.name), "{}: {param}", field.name);
    }
}

/// The types that descriptions of the API have are those that are read.
#[test]
fn types_are_those_that_are_read() {
    let mut wrong = Vec::new();
    for (door, field) in rows().filter(|(_, field)| field.does == Does::It) {
        let error = parse(door, &with(door, field.name, json!([[[{}]]]))).expect_err(field.name);
        let read = [
            ("a boolean", "boolean"),
            ("an integer", "integer"),
            ("a number,", "number"),
        ]
        .into_iter()
        .find(|(words, _)| format!("{},", error.message).contains(&format!("must be {words}")))
        .map(|(_, kind)| kind);
        if read != json_type(door, field.name) {
            wrong.push(format!("{} of {door:?} is {read:?}: {error}", field.name));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_does_nothing_is_taken() {
    for (door, field) in rows().filter(|(_, field)| field.does == Does::Nothing) {
        for value in [
            json!("x"),
            json!(true),
            json!(7),
            json!({"a": 1}),
            Value::Null,
        ] {
            parse(door, &with(door, field.name, value)).expect(field.name);
        }
    }
}

#[test]
fn what_is_refused_is_refused_by_name_and_only_if_it_asks_for_something() {
    for (door, field) in rows() {
        let Does::Refuses(harmless) = field.does else {
            continue;
        };
        let asks = with(door, field.name, json!({"x": ["asks"]}));
        let error = parse(door, &asks).expect_err(field.name);
        assert_eq!(error.param.as_deref(), Some(field.name));
        assert!(error.message.contains(field.about), "{error}");
        parse(door, &with(door, field.name, Value::Null)).expect(field.name);
        for text in harmless {
            let value = serde_json::from_str(text).expect("rows hold JSON");
            parse(door, &with(door, field.name, value)).expect(field.name);
        }
    }
}

#[test]
fn no_door_has_two_rows_of_one_name() {
    for (door, field) in rows() {
        let same = rows().filter(|(other, row)| *other == door && row.name == field.name);
        assert_eq!(same.count(), 1, "{}", field.name);
    }
}

#[test]
fn numbers_are_the_same_however_they_are_written() {
    parse(Door::Text, &with(Door::Text, "best_of", json!(1.0))).unwrap();
    assert!(parse(Door::Text, &with(Door::Text, "best_of", json!(2))).is_err());
}

#[test]
fn unknown_fields_are_named_and_so_is_what_was_meant() {
    for (door, name, said) in [
        (Door::Chat, "max_token", "do you mean max_tokens?"),
        (Door::Text, "Temperature", "do you mean temperature?"),
        (Door::Chat, "wibble", "there is no field wibble"),
        (
            Door::Chat,
            "prompt",
            "is a field of /v1/completions and /tokenize and /v1/responses, not of /v1/chat/completions",
        ),
        (
            Door::Text,
            "messages",
            "is a field of /v1/chat/completions and /tokenize and /v1/messages and /v1/messages/count_tokens, not of /v1/completions",
        ),
        (Door::Detokenize, "temperature", "not of /detokenize"),
        (Door::Messages, "max_token", "do you mean max_tokens?"),
        (
            Door::CountTokens,
            "max_tokens",
            "and /v1/messages, not of /v1/messages/count_tokens",
        ),
        (
            Door::Messages,
            "thinking.budget",
            "there is no field thinking.budget",
        ),
        (
            Door::Chat,
            "stream_options.include_usages",
            "do you mean include_usage?",
        ),
        (
            Door::Chat,
            "stream_options.wibble",
            "there is no field stream_options.wibble",
        ),
    ] {
        let error = parse(door, &with(door, name, json!(1))).expect_err(name);
        assert!(error.message.contains(said), "{error}");
        assert_eq!(error.param.as_deref(), Some(name));
    }
    let error = parse(Door::Chat, &with(Door::Chat, &"x".repeat(9_999), json!(1))).unwrap_err();
    assert!(error.message.len() < 300, "{error}");
    assert!(error.param.unwrap().len() <= NAME_CHARS_MAX);
}

/// `docs/api.md` holds the table as it is here.
#[test]
fn the_page_and_the_table_are_equal() {
    let page = include_str!("../../../../docs/api.md");
    let (_, rest) = page
        .split_once("<!-- fields -->\n")
        .expect("where it begins");
    let (on_page, _) = rest
        .split_once("<!-- end of fields -->")
        .expect("where it ends");
    let mut table = String::from("| field | door | what Baton does |\n|---|---|---|\n");
    for field in fields() {
        let does = match field.does {
            Does::It => String::from("done"),
            Does::Nothing => String::from("accepted, changes nothing"),
            Does::Refuses([]) => String::from("**refused**"),
            Does::Refuses(harmless) => {
                format!("**refused**, but for `{}`", harmless.join("`, `"))
            }
        };
        let doors: Vec<_> = field
            .doors
            .paths()
            .map(|path| path.trim_start_matches("/v1/"))
            .collect();
        let (doors, about) = (doors.join(", "), field.about);
        table += &format!("| `{}` | {doors} | {does}: {about} |\n", field.name);
    }
    assert!(on_page == table, "docs/api.md should hold:\n{table}");
}
