//! Arguments: how their JSON is written, and those that are not one JSON object, Qwen's XML and Python's keywords.

use serde_json::{Map, Value, json};

use super::calls::Ask;
use super::lark::{Lark, literal};
use crate::tool::Tool;

/// How the JSON of arguments is written where its schema does not say it (`x-guidance`): at most one space, behind a comma or a colon.
///
/// With free white space, which is what a schema means by itself, a model that is made to call may write blanks until its tokens run out.
/// Formats and chat templates show models calls as Python's `json.dumps` writes them, `, ` and `: `; some models were trained on calls
/// without any space (DeepSeek, Kimi, gpt-oss). Both are habits of one line, so a space may be there or not, and nothing else.
pub(crate) fn written(schema: Value) -> Value {
    match schema {
        Value::Object(mut schema) => {
            schema.entry(HOW).or_insert_with(|| {
                json!({"whitespace_flexible": false, "item_separator": ", ?", "key_separator": ": ?"})
            });
            Value::Object(schema)
        }
        other => other,
    }
}

/// The key of a schema that says how its JSON is written; the separators in it are regular expressions.
const HOW: &str = "x-guidance";

/// An argument of a tool.
struct Argument {
    name: String,
    schema: Value,
    is_required: bool,
}

/// The arguments that a schema names, in its order. `None` if any are allowed.
fn arguments(ask: &Ask<'_>, tool: &Tool) -> Option<Vec<Argument>> {
    if ask.is_auto && !tool.strict {
        return None;
    }
    let schema = written(tool.schema());
    let Some(Value::Object(properties)) = schema.get("properties") else {
        // An object about which nothing is said.
        return match schema.get("additionalProperties") {
            Some(Value::Bool(false)) => Some(Vec::new()),
            _ => None,
        };
    };
    let required = schema.get("required").and_then(Value::as_array);
    let is_required = |name: &str| required.is_some_and(|all| all.iter().any(|one| one == name));
    let argument = |(name, own): (&String, &Value)| Argument {
        name: name.clone(),
        schema: with_definitions(own, &schema),
        is_required: is_required(name),
    };
    Some(properties.iter().map(argument).collect())
}

/// A part of a schema with what it may refer to, and how JSON is to be written.
fn with_definitions(part: &Value, whole: &Value) -> Value {
    let mut part = match part {
        Value::Object(part) => part.clone(),
        Value::Bool(false) => return json!({"not": {}}),
        _ => Map::new(),
    };
    for key in ["$defs", "definitions", HOW] {
        if let (Some(shared), false) = (whole.get(key), part.contains_key(key)) {
            part.insert(key.to_owned(), shared.clone());
        }
    }
    Value::Object(part)
}

/// Rules for `<function=NAME>…</function>`.
pub(crate) fn xml(ask: &Ask<'_>, lark: &mut Lark<'_>) {
    const END: &str = "\n</parameter>\n";
    let mut calls = Vec::new();
    for (number, tool) in ask.tools.iter().enumerate() {
        let mut body = literal(&format!("<function={}>\n", tool.name));
        match arguments(ask, tool) {
            None => {
                lark.until("any_value", END);
                lark.rule(
                    "any_argument",
                    "\"<parameter=\" /[^<>\\n]{1,64}/ \">\\n\" any_value",
                );
                body.push_str(" (any_argument)*");
            }
            Some(arguments) => {
                for (place, argument) in arguments.iter().enumerate() {
                    let name = format!("argument_{number}_{place}");
                    let value = format!("value_{number}_{place}");
                    let head = literal(&format!("<parameter={}>\n", argument.name));
                    let choices = argument.schema.get("enum").and_then(Value::as_array);
                    match (argument.schema.get("type"), choices) {
                        (Some(Value::String(kind)), Some(choices)) if kind == "string" => {
                            let texts = choices.iter().filter_map(Value::as_str).map(literal);
                            let any = texts.collect::<Vec<_>>().join(" | ");
                            lark.rule(&value, &format!("({any}) {}", literal(END)));
                        }
                        (Some(Value::String(kind)), _) if kind == "string" => {
                            lark.until(&value, END);
                        }
                        _ => {
                            let json = format!("json_{number}_{place}");
                            lark.json(&json, &argument.schema);
                            lark.rule(&value, &format!("{json} {}", literal(END)));
                        }
                    }
                    lark.rule(&name, &format!("{head} {value}"));
                    let times = if argument.is_required { "" } else { "?" };
                    body.push_str(&format!(" ({name}){times}"));
                }
            }
        }
        body.push_str(" \"</function>\"");
        lark.rule(&format!("call_{number}"), &body);
        calls.push(format!("call_{number}"));
    }
    lark.rule("call", &calls.join(" | "));
}

/// Rules for `NAME(KEY=VALUE, …)`.
pub(crate) fn python(ask: &Ask<'_>, lark: &mut Lark<'_>) {
    let mut calls = Vec::new();
    for (number, tool) in ask.tools.iter().enumerate() {
        let inside = match arguments(ask, tool) {
            None => {
                lark.json("any_value", &written(json!({})));
                lark.rule(
                    "any_argument",
                    "/[A-Za-z_][A-Za-z0-9_]{0,63}/ \"=\" any_value",
                );
                "(any_argument (\", \" any_argument)*)?".to_owned()
            }
            Some(arguments) => keywords(number, arguments, lark),
        };
        let head = literal(&format!("{}(", tool.name));
        lark.rule(&format!("call_{number}"), &format!("{head} {inside} \")\""));
        calls.push(format!("call_{number}"));
    }
    lark.rule("call", &calls.join(" | "));
}

/// Arguments with commas between: first those that must be there, then the others, each or not.
fn keywords(number: usize, mut arguments: Vec<Argument>, lark: &mut Lark<'_>) -> String {
    arguments.sort_by_key(|argument| !argument.is_required);
    let mut names = Vec::new();
    for (place, argument) in arguments.iter().enumerate() {
        let name = format!("argument_{number}_{place}");
        let value = format!("value_{number}_{place}");
        match argument.schema.get("type") {
            Some(Value::String(kind)) if kind == "boolean" => {
                lark.rule(&value, "\"True\" | \"False\"");
            }
            _ => lark.json(&value, &argument.schema),
        }
        lark.rule(
            &name,
            &format!("{} {value}", literal(&format!("{}=", argument.name))),
        );
        names.push(name);
    }
    let required = arguments
        .iter()
        .filter(|argument| argument.is_required)
        .count();
    let rest = |from: usize| {
        let rest = names[from..].iter().map(|name| format!("(\", \" {name})?"));
        rest.collect::<Vec<_>>().join(" ")
    };
    if required > 0 {
        return format!("{} {}", names[..required].join(" \", \" "), rest(required));
    }
    // Whichever comes first has no comma before it.
    let mut ways: Vec<String> = (0..names.len())
        .map(|first| format!("{} {}", names[first], rest(first + 1)))
        .collect();
    ways.push("\"\"".to_owned());
    format!("({})", ways.join(" | "))
}
