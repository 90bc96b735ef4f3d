//! Messages as the families' templates write them: text before, calls, text after. What was written is what is read.

use baton_chat_formats::{Format, Reasoning};
use serde_json::Value;

use crate::support::{cut, run, text, with_special_tokens};

/// Calls, names with the JSON text of arguments, as a model of this family writes them. None if the format has no calls.
pub fn write(format: Format, calls: &[(&str, &str)]) -> Option<String> {
    let object = |key: &str| {
        let one = |(name, arguments): &(&str, &str)| {
            format!("{{\"name\": \"{name}\", \"{key}\": {arguments}}}")
        };
        calls.iter().map(one).collect::<Vec<_>>()
    };
    let each = |one: &dyn Fn(&str, &str) -> String| {
        calls
            .iter()
            .map(|(name, arguments)| one(name, arguments))
            .collect::<Vec<_>>()
    };
    Some(match format {
        Format::None => return None,
        Format::Hermes => {
            let calls = object("arguments");
            calls
                .iter()
                .map(|call| format!("<tool_call>\n{call}\n</tool_call>"))
                .collect::<Vec<_>>()
                .join("\n")
        }
        Format::QwenXml => {
            let one = |name: &str, arguments: &str| {
                let mut xml = format!("<tool_call>\n<function={name}>\n");
                let value: Value = serde_json::from_str(arguments).unwrap();
                for (key, value) in value.as_object().unwrap() {
                    let value = value
                        .as_str()
                        .map_or_else(|| value.to_string(), str::to_owned);
                    xml.push_str(&format!("<parameter={key}>\n{value}\n</parameter>\n"));
                }
                xml + "</function>\n</tool_call>"
            };
            each(&one).join("\n")
        }
        Format::LlamaJson => object("parameters").join("; "),
        Format::Json if calls.len() == 1 => object("arguments").concat(),
        Format::Json => format!("[{}]", object("arguments").join(", ")),
        Format::Mistral => format!("[TOOL_CALLS][{}]", object("arguments").join(", ")),
        Format::MistralArgs => {
            each(&|name, arguments| format!("[TOOL_CALLS]{name}[ARGS]{arguments}")).concat()
        }
        Format::DeepSeekV3 => {
            let one = |name: &str, arguments: &str| {
                format!(
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
                )
            };
            format!(
                "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>",
                each(&one).join("\n")
            )
        }
        Format::DeepSeekV31 => {
            let one = |name: &str, arguments: &str| {
                format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>")
            };
            format!(
                "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>",
                each(&one).concat()
            )
        }
        Format::Kimi => {
            let mut number = 0..;
            let calls = calls.iter().map(|(name, arguments)| {
                let number = number.next().unwrap();
                format!("<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>")
            });
            format!(
                "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>",
                calls.collect::<String>()
            )
        }
        Format::Harmony => {
            let one = |name: &str, arguments: &str| {
                format!(
                    "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
                )
            };
            each(&one).join("<|start|>assistant")
        }
        Format::Pythonic => {
            let one = |name: &str, arguments: &str| {
                let value: Value = serde_json::from_str(arguments).unwrap();
                let fields = value.as_object().unwrap().iter();
                let fields: Vec<String> = fields
                    .map(|(key, value)| format!("{key}={}", python(value)))
                    .collect();
                format!("{name}({})", fields.join(", "))
            };
            format!("[{}]", each(&one).join(", "))
        }
    })
}

/// A value as Python writes it.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Array(items) => format!(
            "[{}]",
            items.iter().map(python).collect::<Vec<_>>().join(", ")
        ),
        Value::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(key, value)| format!("'{key}': {}", python(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// Arguments of `get_weather` that are hard to tell the end of.
const ARGUMENTS: [&str; 24] = [
    r#"{}"#,
    r#"{"city": "Paris"}"#,
    r#"{"city":"Paris","days":3}"#,
    r#"{"city": ""}"#,
    r#"{"city": "São Paulo 🌧️ 東京"}"#,
    r#"{"city": "a\"b"}"#,
    r#"{"city": "back\\slash\\"}"#,
    r#"{"city": "}{][}}"}"#,
    r#"{"city": "{\"name\": \"search\", \"arguments\": {}}"}"#,
    r#"{"city": "line\nline\ttab"}"#,
    r#"{"city": "'single' and \"double\""}"#,
    r#"{"city": "a), b=(c"}"#,
    r#"{"city": "[x](y), ```json\n```"}"#,
    r#"{"city": "\u00e9\ud83d\ude00"}"#,
    r#"{"days": -3}"#,
    r#"{"wind": 2.5e-3}"#,
    r#"{"metric": true}"#,
    r#"{"metric": false, "city": "null"}"#,
    r#"{"places": []}"#,
    r#"{"places": ["a", "b]", "c,d"]}"#,
    r#"{"options": {"a": {"b": {"c": [1, [2, [3, {"d": null}]]]}}}}"#,
    r#"{"limit": null}"#,
    r#"{"note": null, "city": "x"}"#,
    r#"{"city": "true", "days": 0, "wind": 1.0, "metric": true, "places": ["p"], "options": {}}"#,
];

fn same(read: &str, written: &str) -> bool {
    let json = |text: &str| {
        serde_json::from_str::<Value>(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    };
    json(read) == json(written)
}

/// Whether a format keeps the model's own text of the arguments.
fn keeps_text(format: Format) -> bool {
    !matches!(format, Format::QwenXml | Format::Pythonic)
}

#[test]
fn calls_are_read_as_they_were_written() {
    let mut count = 0;
    for format in Format::all() {
        for (i, first) in ARGUMENTS.iter().enumerate() {
            for calls in [
                vec![("get_weather", *first)],
                vec![
                    ("get_weather", *first),
                    ("search", r#"{"query": "x"}"#),
                    ("now", "{}"),
                ],
                vec![
                    ("now", "{}"),
                    ("get_weather", *first),
                    ("get_weather", ARGUMENTS[(i + 7) % 24]),
                ],
            ] {
                let Some(written) = write(format, &calls) else {
                    continue;
                };
                for pieces in [with_special_tokens(&written), vec![text(&written)]] {
                    for pieces in [cut(&pieces, 1), cut(&pieces, 4), pieces] {
                        let result = run(format, Reasoning::None, &pieces);
                        assert_eq!(
                            result.calls.len(),
                            calls.len(),
                            "{format}: {written}\n{result:?}"
                        );
                        assert_eq!(result.content, "", "{format}: {written}");
                        assert!(!result.cut_short);
                        for ((_, name, read), (expected, arguments)) in
                            result.calls.iter().zip(&calls)
                        {
                            assert_eq!(name, expected);
                            assert!(same(read, arguments), "{format}: {written}\n{read}");
                            assert!(!keeps_text(format) || read == arguments, "{format}: {read}");
                        }
                        count += 1;
                    }
                }
            }
        }
    }
    assert!(count > 4_000, "{count}");
}

#[test]
fn text_around_calls_is_content_without_the_space_between() {
    let calls = [("search", r#"{"query": "x"}"#)];
    for format in Format::all() {
        let can_follow_text = !matches!(
            format,
            Format::None | Format::LlamaJson | Format::Json | Format::Pythonic | Format::Harmony
        );
        let Some(written) = write(format, &calls).filter(|_| can_follow_text) else {
            continue;
        };
        for (around, content) in [
            (format!("Let me see.\n{written}"), "Let me see."),
            (format!("Let me see.\n\n{written}\n\n"), "Let me see."),
            (format!("{written}\nDone."), "Done."),
            (format!("\n {written}"), ""),
            (
                format!("One. {written}\nTwo. {written}\nThree."),
                "One.Two.Three.",
            ),
        ] {
            let result = run(format, Reasoning::None, &with_special_tokens(&around));
            assert_eq!(result.content, content, "{format}: {around}");
            assert_eq!(
                result.calls.len(),
                around.matches("query").count(),
                "{format}: {around}"
            );
        }
    }
}

#[test]
fn reasoning_comes_before() {
    let calls = [("search", r#"{"query": "x"}"#)];
    for format in Format::all() {
        if format == Format::Harmony {
            continue;
        }
        let written = write(format, &calls).unwrap_or_default();
        for (reasoning, input) in [
            (
                Reasoning::Think,
                format!("<think>\nHm <b>: \"so\".\n</think>\n\n{written}"),
            ),
            (
                Reasoning::ThinkOpened,
                format!("\nHm <b>: \"so\".\n</think>\n\n{written}"),
            ),
            (
                Reasoning::ThinkOpened,
                format!("<think>\nHm <b>: \"so\".\n</think>\n\n{written}"),
            ),
            (
                Reasoning::Mistral,
                format!("[THINK]Hm <b>: \"so\".[/THINK]{written}"),
            ),
            (
                Reasoning::MistralOpened,
                format!("Hm <b>: \"so\".[/THINK]{written}"),
            ),
        ] {
            let result = run(format, reasoning, &cut(&with_special_tokens(&input), 3));
            assert_eq!(result.reasoning, "Hm <b>: \"so\".", "{format} {reasoning}");
            assert_eq!(result.content, "", "{format} {reasoning}");
            assert_eq!(
                result.calls.len(),
                usize::from(format != Format::None),
                "{format} {reasoning}"
            );
        }
    }
}

#[test]
fn calls_inside_reasoning_are_not_made() {
    for format in Format::all() {
        let Some(written) = write(format, &[("search", "{}")]) else {
            continue;
        };
        if format == Format::Harmony {
            continue;
        }
        let input = format!("<think>I could write {written} here.</think>No.");
        let result = run(format, Reasoning::Think, &[text(&input)]);
        assert_eq!(
            result.reasoning,
            format!("I could write {written} here."),
            "{format}"
        );
        assert_eq!(
            (result.content.as_str(), result.calls.len()),
            ("No.", 0),
            "{format}"
        );
    }
}

/// An output that ends anywhere: what came of the calls is a beginning of what would have come.
#[test]
fn outputs_that_are_cut_short() {
    let arguments = r#"{"city": "São \"P\"", "days": 3, "options": {"a": [1]}}"#;
    for format in Format::all() {
        let Some(written) = write(format, &[("get_weather", arguments), ("now", "{}")]) else {
            continue;
        };
        let all = run(format, Reasoning::None, &[text(&written)]);
        for (end, _) in written.char_indices() {
            let result = run(format, Reasoning::None, &[text(&written[..end])]);
            for (read, whole) in result.calls.iter().zip(&all.calls) {
                assert_eq!(read.1, whole.1, "{format} {end}");
                // A value that ends with the beginning of its closing marker has that as text.
                let is_xml = format == Format::QwenXml;
                let marker = read.2.find("\\n<").or(read.2.find("\n<"));
                let read = &read.2[..marker.filter(|_| is_xml).unwrap_or(read.2.len())];
                assert!(
                    whole.2.starts_with(read),
                    "{format} {end}: {} {}",
                    read,
                    whole.2
                );
            }
            let last = result.calls.last().map(|call| call.2.as_str());
            let is_whole = last.is_none_or(|text| serde_json::from_str::<Value>(text).is_ok());
            assert!(is_whole || result.cut_short, "{format} {end}: {result:?}");
        }
    }
}
