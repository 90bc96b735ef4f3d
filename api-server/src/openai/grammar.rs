//! What an output must follow: the fields that ask for structured output, as one grammar for the workers.

use std::sync::OnceLock;

use aho_corasick::AhoCorasick;
use baton_protocol::Grammar;
use baton_protocol::limits::GRAMMAR_BYTES_MAX;
use serde_json::{Map, Value};

use super::fields::{Fields, wrong_type};
use crate::error::ApiError;

/// Fields that ask for a grammar, or how they begin, and how an ASCII character begins that is escaped: in a body without any of
/// these there is no grammar. Tools that must be called, or called rightly, take one too.
const MARKS: [&str; 11] = [
    "response_format",
    "output_config",
    "output_format",
    "json_schema",
    "json_object",
    // what it goes on from may be long
    "previous_response_id",
    "structured_outputs",
    "guided_",
    "tool_choice",
    "\"strict\"",
    "\\u00",
];

/// Any JSON object: what `json_object` asks for.
const ANY_OBJECT: &str = r#"{"type":"object"}"#;

/// Most texts of a `choice`.
const CHOICES_MAX: usize = 1024;

/// Whether a body may have a grammar, whose compiling is no work for the thread that serves other requests too.
pub fn is_likely(body: &[u8]) -> bool {
    static FINDER: OnceLock<Option<AhoCorasick>> = OnceLock::new();
    let finder = FINDER.get_or_init(|| AhoCorasick::new(MARKS).ok());
    finder.as_ref().is_none_or(|finder| finder.is_match(body))
}

/// The grammar that a request asks for, if it does, and the field that does. It is compiled here once to see whether it can be, which takes up to about a second.
///
/// # Errors
/// 400 with the field's name: two grammars at once, one of the wrong form, one that cannot be compiled.
pub fn read(fields: &Fields) -> Result<Option<(String, Grammar)>, ApiError> {
    let mut found: Vec<(String, Grammar)> = Vec::new();
    if let Some(format) = fields.value("response_format") {
        found.extend(response_format(format)?);
    }
    if let Some(wanted) = fields.value("structured_outputs") {
        let name = "structured_outputs";
        let Value::Object(wanted) = wanted else {
            return Err(wrong_type(name, "an object", wanted));
        };
        for (kind, value) in wanted.iter().filter(|(_, value)| !value.is_null()) {
            found.extend(structured(kind, format!("{name}.{kind}"), value)?);
        }
    }
    for kind in ["json", "regex", "choice", "grammar"] {
        let name = format!("guided_{kind}");
        if let Some(value) = fields.value(&name) {
            found.extend(structured(kind, name, value)?);
        }
    }
    let mut found = found.into_iter();
    let Some((name, grammar)) = found.next() else {
        return Ok(None);
    };
    if let Some((other, _)) = found.next() {
        let message = format!("{name} and {other} both say what the output must be: send one");
        return Err(ApiError::param(other, message));
    }
    check(&name, &grammar)?;
    Ok(Some((name, grammar)))
}

/// Refuses what has too many bytes or cannot be compiled.
fn check(name: &str, grammar: &Grammar) -> Result<(), ApiError> {
    let bytes = grammar.text().len();
    if bytes > GRAMMAR_BYTES_MAX {
        let message = format!("{name} has {bytes} bytes, more than {GRAMMAR_BYTES_MAX}");
        return Err(ApiError::param(name, message));
    }
    baton_grammar::check(grammar).map_err(|error| ApiError::param(name, format!("{name}: {error}")))
}

/// The grammar of this JSON schema, which this field has.
///
/// # Errors
/// 400 with the field's name, if it cannot be compiled.
pub fn of_checked_schema(name: &str, schema: &Value) -> Result<Grammar, ApiError> {
    let grammar = of_schema(schema);
    check(name, &grammar)?;
    Ok(grammar)
}

/// OpenAI's field.
fn response_format(format: &Value) -> Result<Option<(String, Grammar)>, ApiError> {
    let name = "response_format";
    let Value::Object(fields) = format else {
        return Err(wrong_type(name, "an object", format));
    };
    match fields.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some((name.to_owned(), any_object()))),
        Some("json_schema") => {
            let path = "response_format.json_schema";
            let within = match fields.get("json_schema") {
                Some(Value::Object(within)) => within,
                other => {
                    let got = other.unwrap_or(&Value::Null);
                    return Err(wrong_type(path, "an object with a schema", got));
                }
            };
            known(within, path, &["name", "description", "schema", "strict"])?;
            let path = "response_format.json_schema.schema";
            match within.get("schema") {
                Some(schema @ (Value::Object(_) | Value::Bool(_))) => {
                    Ok(Some((path.to_owned(), of_schema(schema))))
                }
                other => Err(wrong_type(
                    path,
                    "a JSON schema",
                    other.unwrap_or(&Value::Null),
                )),
            }
        }
        other => {
            let message = format!(
                "response_format.type must be text, json_object or json_schema{}; structured_outputs has more",
                other.map_or(String::new(), |other| format!(", got {other:.64}"))
            );
            Err(ApiError::param("response_format.type", message))
        }
    }
}

/// vLLM's fields.
fn structured(
    kind: &str,
    name: String,
    value: &Value,
) -> Result<Option<(String, Grammar)>, ApiError> {
    let text = |expected: &str| match value {
        Value::String(text) => Ok(text.clone()),
        other => Err(wrong_type(&name, expected, other)),
    };
    let grammar = match kind {
        "json" => match value {
            Value::String(text) => Grammar::JsonSchema(text.clone()),
            schema @ (Value::Object(_) | Value::Bool(_)) => of_schema(schema),
            other => return Err(wrong_type(&name, "a JSON schema", other)),
        },
        "json_object" => match value {
            Value::Bool(true) => any_object(),
            Value::Bool(false) => return Ok(None),
            other => return Err(wrong_type(&name, "a boolean", other)),
        },
        "regex" => Grammar::Regex(text("a regular expression")?),
        "grammar" => Grammar::Lark(text("a Lark grammar")?),
        "choice" => choice(&name, value)?,
        _ => {
            let message = format!(
                "{name} is not supported by this server: structured_outputs has json, json_object, regex, choice or grammar"
            );
            return Err(ApiError::param(name, message));
        }
    };
    Ok(Some((name, grammar)))
}

fn any_object() -> Grammar {
    Grammar::JsonSchema(ANY_OBJECT.to_owned())
}

fn of_schema(schema: &Value) -> Grammar {
    Grammar::JsonSchema(schema.to_string())
}

/// One of these texts, and nothing else.
fn choice(name: &str, value: &Value) -> Result<Grammar, ApiError> {
    let expected = "an array of texts that are not empty";
    let Value::Array(texts) = value else {
        return Err(wrong_type(name, expected, value));
    };
    if texts.is_empty() || texts.len() > CHOICES_MAX {
        let message = format!(
            "{name} must hold 1 to {CHOICES_MAX} texts, got {}",
            texts.len()
        );
        return Err(ApiError::param(name, message));
    }
    let mut quoted = Vec::with_capacity(texts.len());
    for text in texts {
        match text {
            // Lark's texts are quoted as JSON's are.
            Value::String(one) if !one.is_empty() => quoted.push(text.to_string()),
            other => return Err(wrong_type(name, expected, other)),
        }
    }
    Ok(Grammar::Lark(format!("start: {}", quoted.join(" | "))))
}

fn known(fields: &Map<String, Value>, path: &str, known: &[&str]) -> Result<(), ApiError> {
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(other) => {
            let param = format!("{path}.{other:.64}");
            let message = format!("there is no field {param}");
            Err(ApiError::param(param, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::table::Door;

    fn of(body: &str) -> Result<Option<Grammar>, ApiError> {
        let fields = Fields::parse(Door::Chat, body.as_bytes()).expect("a body");
        Ok(read(&fields)?.map(|(_, grammar)| grammar))
    }

    fn schema(text: &str) -> Option<Grammar> {
        Some(Grammar::JsonSchema(text.to_owned()))
    }

    #[test]
    fn a_body_with_a_grammar_is_known_by_its_bytes() {
        for body in [
            r#"{"response_format":{"type":"text"}}"#,
            r#"{"\u0067uided_regex":"a"}"#,
            r#"{"structured_outputs":{}}"#,
            r#"{"tools":[],"tool_choice":"required"}"#,
            r#"{"tools":[{"function":{"strict" :true}}]}"#,
        ] {
            assert!(is_likely(body.as_bytes()), "{body}");
        }
        assert!(!is_likely("{\"messages\":[\"\\u4f60 é\"]}".as_bytes()));
    }

    #[test]
    fn every_way_to_ask_becomes_one_grammar() {
        let cases = [
            (r#"{}"#, None),
            (r#"{"response_format":{"type":"text"}}"#, None),
            (
                r#"{"response_format":null,"guided_json":null,"structured_outputs":{"json":null}}"#,
                None,
            ),
            (r#"{"structured_outputs":{"json_object":false}}"#, None),
            (
                r#"{"response_format":{"type":"json_object"}}"#,
                schema(ANY_OBJECT),
            ),
            (
                r#"{"structured_outputs":{"json_object":true}}"#,
                schema(ANY_OBJECT),
            ),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"name":"n","strict":true,"schema":{"type":"object","properties":{"z":{"type":"null"},"a":{"type":"null"}}}}}}"#,
                // In the order in which they were written: that is the order in which they come out.
                schema(
                    r#"{"type":"object","properties":{"z":{"type":"null"},"a":{"type":"null"}}}"#,
                ),
            ),
            (
                r#"{"guided_json":{"type":"null"}}"#,
                schema(r#"{"type":"null"}"#),
            ),
            (
                r#"{"guided_json":"{\"type\":\"null\"}"}"#,
                schema(r#"{"type":"null"}"#),
            ),
            (
                r#"{"guided_regex":"a+"}"#,
                Some(Grammar::Regex("a+".to_owned())),
            ),
            (
                r#"{"structured_outputs":{"grammar":"start: \"a\""}}"#,
                Some(Grammar::Lark("start: \"a\"".to_owned())),
            ),
            (
                r#"{"guided_choice":["yes","\"no\"\n|"]}"#,
                Some(Grammar::Lark(r#"start: "yes" | "\"no\"\n|""#.to_owned())),
            ),
        ];
        for (body, expected) in cases {
            assert_eq!(of(body).unwrap_or_else(|e| panic!("{body}: {e}")), expected);
        }
    }

    #[test]
    fn what_cannot_be_followed_is_refused_with_its_field() {
        let long = format!(
            r#"{{"guided_regex":"{}"}}"#,
            "a".repeat(GRAMMAR_BYTES_MAX + 1)
        );
        let cases = [
            (r#"{"response_format":"json"}"#, "response_format"),
            (r#"{"response_format":{}}"#, "response_format.type"),
            (
                r#"{"response_format":{"type":"structural_tag"}}"#,
                "response_format.type",
            ),
            (
                r#"{"response_format":{"type":"json_schema"}}"#,
                "response_format.json_schema",
            ),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"name":"n"}}}"#,
                "response_format.json_schema.schema",
            ),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"shema":{}}}}"#,
                "response_format.json_schema.shema",
            ),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"schema":{"type":"strnig"}}}}"#,
                "response_format.json_schema.schema",
            ),
            (
                r#"{"response_format":{"type":"json_object"},"guided_regex":"a"}"#,
                "guided_regex",
            ),
            (
                r#"{"structured_outputs":{"regex":"a","choice":["b"]}}"#,
                "structured_outputs.choice",
            ),
            (
                r#"{"structured_outputs":{"structural_tag":"a"}}"#,
                "structured_outputs.structural_tag",
            ),
            (r#"{"structured_outputs":["a"]}"#, "structured_outputs"),
            (r#"{"guided_json":7}"#, "guided_json"),
            (r#"{"guided_json":"{"}"#, "guided_json"),
            (r#"{"guided_regex":"("}"#, "guided_regex"),
            (r#"{"guided_choice":[]}"#, "guided_choice"),
            (r#"{"guided_choice":["a",""]}"#, "guided_choice"),
            (r#"{"guided_grammar":"root ::= \"a\""}"#, "guided_grammar"),
            (&long, "guided_regex"),
        ];
        for (body, param) in cases {
            let error = of(body).expect_err(body);
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
        }
    }
}
