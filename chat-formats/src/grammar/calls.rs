//! How each format's calls are written, as rules.

use serde_json::{Value, json};

use super::arguments;
use super::lark::{Lark, literal};
use crate::format::Format;
use crate::tool::Tool;

/// What is asked for.
pub(crate) struct Ask<'a> {
    pub format: Format,
    pub tools: &'a [&'a Tool],
    pub parallel: bool,
    /// Only strict tools have their arguments held to their schema: the others' are any object.
    pub is_auto: bool,
    /// There may be text beside calls, and after one of them the text opens the next.
    pub is_free: bool,
    /// The schema of an answer instead of calls.
    pub answer: Option<&'a Value>,
}

/// Calls in a format.
pub(crate) struct Shape {
    /// The marker after which calls begin, if the format has one.
    pub trigger: Option<&'static str>,
    /// With what the calls begin, if it has none.
    pub first: &'static str,
    /// The marker as a symbol; nothing if there is none.
    pub open: String,
    /// What follows it.
    pub calls: String,
}

impl Ask<'_> {
    /// The rule for a tool's arguments as JSON.
    fn arguments(&self, number: usize, tool: &Tool, lark: &mut Lark<'_>) -> String {
        let name = format!("arguments_{number}");
        let schema = match self.is_auto && !tool.strict {
            true => json!({"type": "object"}),
            false => tool.schema(),
        };
        lark.json(&name, &arguments::written(schema));
        name
    }

    /// One rule for each tool, made of what stands before and after its arguments, and one for any of them.
    fn each(
        &self,
        lark: &mut Lark<'_>,
        one: &dyn Fn(&str, &str, &Lark<'_>) -> String,
    ) -> &'static str {
        let mut names = Vec::new();
        for (number, tool) in self.tools.iter().enumerate() {
            let arguments = self.arguments(number, tool, lark);
            let body = one(&tool.name, &arguments, lark);
            let name = format!("call_{number}");
            lark.rule(&name, &body);
            names.push(name);
        }
        lark.rule("call", &names.join(" | "));
        "call"
    }

    /// Several of a rule with a text between, or one.
    fn several(&self, rule: &str, between: &str) -> String {
        match self.parallel {
            false => rule.to_owned(),
            true if between.is_empty() => format!("{rule} ({rule})*"),
            true => format!("{rule} ({} {rule})*", literal(between)),
        }
    }
}

/// The calls of a format, whose rules are added. `None` if it has none, or is harmony.
pub(crate) fn shape(ask: &Ask<'_>, lark: &mut Lark<'_>) -> Option<Shape> {
    let marked = |trigger: &'static str, calls: String, lark: &Lark<'_>| Shape {
        trigger: Some(trigger),
        first: "",
        open: lark.mark(trigger),
        calls,
    };
    let unmarked = |first: &'static str, calls: String| Shape {
        trigger: None,
        first,
        open: String::new(),
        calls,
    };
    let object = |key: &'static str| {
        move |name: &str, arguments: &str, _: &Lark<'_>| {
            let head = format!("{{\"name\": {}, \"{key}\": ", literal(name));
            format!("{} {arguments} \"}}\"", literal(&head))
        }
    };
    Some(match ask.format {
        Format::None | Format::Harmony => return None,
        Format::Hermes | Format::QwenXml => {
            if ask.format == Format::QwenXml {
                arguments::xml(ask, lark);
            } else {
                ask.each(lark, &object("arguments"));
            }
            let [open, close] = ["<tool_call>", "</tool_call>"];
            lark.rule(
                "inside",
                &format!("\"\\n\" call \"\\n\" {}", lark.mark(close)),
            );
            let calls = repeated(ask, open, "inside", lark);
            marked(open, calls, lark)
        }
        Format::LlamaJson => {
            ask.each(lark, &object("parameters"));
            unmarked("{", ask.several("call", "; "))
        }
        Format::Json => {
            ask.each(lark, &object("arguments"));
            match ask.parallel {
                false => unmarked("{", "call".to_owned()),
                true => unmarked("{[", "(call | \"[\" call (\", \" call)* \"]\")".to_owned()),
            }
        }
        Format::Pythonic => {
            arguments::python(ask, lark);
            unmarked("[", format!("\"[\" {} \"]\"", ask.several("call", ", ")))
        }
        Format::Mistral => {
            ask.each(lark, &object("arguments"));
            let list = format!("\"[\" {} \"]\"", ask.several("call", ", "));
            marked("[TOOL_CALLS]", list, lark)
        }
        Format::MistralArgs => {
            let one = |name: &str, arguments: &str, lark: &Lark<'_>| {
                // Some tokenizers of this format have no such token, and their models write none.
                let mark = match lark.is_token("[ARGS]") {
                    true => lark.mark("[ARGS]"),
                    false => String::new(),
                };
                format!("{} {mark} {arguments}", literal(name))
            };
            ask.each(lark, &one);
            let calls = repeated(ask, "[TOOL_CALLS]", "call", lark);
            marked("[TOOL_CALLS]", calls, lark)
        }
        Format::DeepSeekV3 | Format::DeepSeekV31 => {
            let is_fenced = ask.format == Format::DeepSeekV3;
            let one = |name: &str, arguments: &str, lark: &Lark<'_>| {
                let begin = lark.mark("<｜tool▁call▁begin｜>");
                let separator = lark.mark("<｜tool▁sep｜>");
                let end = lark.mark("<｜tool▁call▁end｜>");
                let fenced = literal(&format!("{name}\n```json\n"));
                match is_fenced {
                    true => format!(
                        "{begin} \"function\" {separator} {fenced} {arguments} \"\\n```\" {end}"
                    ),
                    false => format!("{begin} {} {separator} {arguments} {end}", literal(name)),
                }
            };
            ask.each(lark, &one);
            let calls = ask.several("call", if is_fenced { "\n" } else { "" });
            let close = lark.mark("<｜tool▁calls▁end｜>");
            marked("<｜tool▁calls▁begin｜>", format!("{calls} {close}"), lark)
        }
        Format::Kimi => {
            let one = |name: &str, arguments: &str, lark: &Lark<'_>| {
                let begin = lark.mark("<|tool_call_begin|>");
                let separator = lark.mark("<|tool_call_argument_begin|>");
                let end = lark.mark("<|tool_call_end|>");
                let head = literal(&format!("functions.{name}:"));
                format!("{begin} {head} /[0-9]{{1,3}}/ {separator} {arguments} {end}")
            };
            ask.each(lark, &one);
            let close = lark.mark("<|tool_calls_section_end|>");
            let calls = format!("{} {close}", ask.several("call", ""));
            marked("<|tool_calls_section_begin|>", calls, lark)
        }
    })
}

/// What follows the first opening marker, with more calls after it, each with that marker before it.
fn repeated(ask: &Ask<'_>, open: &str, inside: &str, lark: &Lark<'_>) -> String {
    let open = lark.mark(open);
    match ask.parallel && !ask.is_free {
        false => inside.to_owned(),
        true if ask.format == Format::MistralArgs => format!("{inside} ({open} {inside})*"),
        true => format!("{inside} (\"\\n\" {open} {inside})*"),
    }
}

/// Harmony's whole output.
pub(crate) fn harmony(ask: &Ask<'_>, lark: &mut Lark<'_>) {
    let one = |name: &str, arguments: &str, lark: &Lark<'_>| {
        let head = literal(&format!("commentary to=functions.{name} "));
        let [channel, constrain, message] =
            ["<|channel|>", "<|constrain|>", "<|message|>"].map(|mark| lark.mark(mark));
        format!("{channel} {head} {constrain} \"json\" {message} {arguments}")
    };
    ask.each(lark, &one);
    lark.text();
    let marks = [
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|start|>",
        "<|call|>",
        "<|return|>",
    ];
    let [channel, message, end, start, call, over] = marks.map(|mark| lark.mark(mark));
    lark.until("said", "<|end|>");
    let next = format!("{start} \"assistant\"");
    lark.rule(
        "thought",
        &format!("{channel} \"analysis\" {message} said {next}"),
    );
    // The token that ends a call also ends the output.
    let calls = format!("call ({call})?");
    match ask.is_auto {
        false => lark.rule("start", &format!("(thought)? {calls}")),
        true => {
            lark.rule(
                "preamble",
                &format!("{channel} \"commentary\" {message} said {next}"),
            );
            let said = match ask.answer {
                None => "TEXT",
                Some(schema) => {
                    lark.json("schema", schema);
                    "schema"
                }
            };
            lark.rule(
                "answer",
                &format!("{channel} \"final\" {message} {said} ({over} | {end})?"),
            );
            lark.rule(
                "start",
                &format!("(thought | preamble)* (answer | {calls})"),
            );
        }
    }
}
