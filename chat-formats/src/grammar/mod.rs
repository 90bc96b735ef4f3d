//! Grammars that make a model call tools in its format: Lark, as `llguidance` reads it.
//!
//! With a required or named call all that the model may write is reasoning and then calls. In `auto` with strict tools it writes what
//! it likes until it opens a call, and from there on the grammar holds. In `auto` with a schema for the answer it writes reasoning and
//! then either that answer or calls. A grammar constrains the output only; it has nothing to do with how the prompt is made. The dialect's own additions that are used: `%json` for a JSON schema, `<[7]>` for token 7, `[lazy]`
//! for the shortest match (`guidance-ai/llguidance`, `docs/syntax.md`).

mod answer;
mod arguments;
mod calls;
mod lark;

use serde_json::Value;

use crate::format::{Format, Reasoning};
use crate::tool::{Tool, Tools};
use lark::Lark;

pub use answer::{Answer, after_reasoning};

/// What a request says about calling tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// Never.
    None,
    /// If the model wants to.
    #[default]
    Auto,
    /// At least once.
    Required,
    /// This one.
    Named(String),
}

/// For whom a grammar is made.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// How the model writes calls.
    pub format: Format,
    /// How it writes reasoning, after this prompt.
    pub reasoning: Reasoning,
    /// The tools.
    pub tools: &'a Tools,
    /// Whether it must call.
    pub choice: &'a ToolChoice,
    /// Whether it may call more than once.
    pub parallel: bool,
    /// JSON schema of an answer that is no call, if it must follow one. Only in `auto`.
    pub answer: Option<&'a Value>,
    /// The id of the special token with this text. None if the vocabulary has no such token or spells it as ordinary text.
    pub token: &'a dyn Fn(&str) -> Option<u32>,
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Request");
        debug
            .field("format", &self.format)
            .field("reasoning", &self.reasoning);
        debug.field("choice", self.choice).finish_non_exhaustive()
    }
}

/// The grammar for a request. `None` if it needs none: the model may call or not, no tool is strict, and the answer is free.
///
/// # Errors
/// A sentence, if the named tool was not offered, there are no tools, the model's format has no calls, or nothing in it tells a
/// call from an answer that follows a schema.
pub fn grammar(request: &Request<'_>) -> Result<Option<String>, String> {
    let all = request.tools.as_slice();
    let is_auto = *request.choice == ToolChoice::Auto;
    let is_free = is_auto && request.answer.is_none();
    let is_loose = is_free && !all.iter().any(|tool| tool.strict);
    if *request.choice == ToolChoice::None || is_loose {
        return Ok(None);
    }
    if !is_auto && request.answer.is_some() {
        return Err("a call is required, so there is no answer to follow a schema".to_owned());
    }
    let tools: Vec<&Tool> = match request.choice {
        ToolChoice::Named(name) => vec![request.tools.find(name).ok_or_else(|| {
            format!("tool_choice names the function {name:?}, which is not among the tools")
        })?],
        _ => all.iter().collect(),
    };
    if tools.is_empty() {
        return Err("a call is required, but no tools are offered".to_owned());
    }
    let mut lark = Lark::new(request.token);
    // A tool that is named is called once.
    let parallel = request.parallel && !matches!(request.choice, ToolChoice::Named(_));
    let ask = calls::Ask {
        format: request.format,
        tools: &tools,
        parallel,
        is_auto,
        is_free,
        answer: request.answer,
    };
    if request.format == Format::Harmony {
        calls::harmony(&ask, &mut lark);
        return Ok(Some(lark.finish()));
    }
    let Some(shape) = calls::shape(&ask, &mut lark) else {
        return Err(format!(
            "a call is required, but the model's tool format is {:?}: set one with --tool-format",
            request.format.name()
        ));
    };
    let start = match (is_free, request.answer) {
        (true, _) => auto(request, &shape, parallel, &mut lark),
        (false, answer) => {
            let thinking = thinking(request.reasoning, &mut lark);
            let [open, calls] = [&shape.open, &shape.calls];
            match answer {
                None => format!("{thinking} {open} {calls}"),
                // The lexer does not go back: what begins as both may begin must go on as one of them.
                Some(_) if shape.trigger.is_none() => {
                    return Err(format!(
                        "in the model's tool format, {:?}, no marker tells a call from an answer that is JSON too",
                        request.format.name()
                    ));
                }
                Some(schema) => {
                    lark.json("answer", schema);
                    format!("{thinking} (answer | {open} {calls})")
                }
            }
        }
    };
    lark.rule("start", &start);
    Ok(Some(lark.finish()))
}

/// Reasoning before what is forced.
fn thinking(reasoning: Reasoning, lark: &mut Lark<'_>) -> String {
    let Some(([open, close], is_opened)) = marks(reasoning) else {
        return String::new();
    };
    lark.until("thinking", close);
    lark.rule("SPACE", "/[ \\n]{0,4}/");
    match is_opened {
        true => "thinking SPACE".to_owned(),
        false => format!("({} thinking SPACE)?", lark.mark(open)),
    }
}

/// The markers of reasoning, and whether the prompt opened it.
fn marks(reasoning: Reasoning) -> Option<([&'static str; 2], bool)> {
    use crate::thinking::{MISTRAL, THINK};
    match reasoning {
        Reasoning::None | Reasoning::Harmony => None,
        Reasoning::Think => Some((THINK.all(), false)),
        Reasoning::ThinkOpened => Some((THINK.all(), true)),
        Reasoning::Mistral => Some((MISTRAL.all(), false)),
        Reasoning::MistralOpened => Some((MISTRAL.all(), true)),
    }
}

/// Text, and calls where the model opens them.
fn auto(
    request: &Request<'_>,
    shape: &calls::Shape,
    parallel: bool,
    lark: &mut Lark<'_>,
) -> String {
    let [open, calls] = [&shape.open, &shape.calls];
    let marks = marks(request.reasoning);
    let Some(trigger) = shape.trigger else {
        // The first character decides; white space before it is no answer's beginning.
        let thinking = thinking(request.reasoning, lark);
        let first = shape.first;
        let not = match marks {
            Some(([open, _], false)) => format!("{}{}", escaped(first), escaped(&open[..1])),
            _ => escaped(first),
        };
        lark.rule("ANSWER", &format!("/[^{not}\\s](?s:.*)/"));
        return format!("{thinking} (ANSWER | {open} {calls} | \"\")");
    };
    // Text never holds a special token. Markers of reasoning that are ones stand between texts.
    let texts: Vec<String> = marks
        .into_iter()
        .flat_map(|(marks, _)| marks)
        .filter(|mark| lark.is_token(mark))
        .map(|mark| lark.mark(mark))
        .collect();
    let free = match texts.is_empty() {
        true => String::new(),
        false => format!("(TEXT ({}))*", texts.join(" | ")),
    };
    lark.until("until_call", trigger);
    let times = if parallel { "*" } else { "?" };
    let rest = match parallel || lark.is_token(trigger) {
        true => "TEXT",
        false => {
            let pattern = escaped(trigger);
            lark.rule("REST", &format!("/(?s:.*)/ & ~/(?s:.*){pattern}(?s:.*)/"));
            "REST"
        }
    };
    format!("{free} (until_call {calls} {free}){times} {rest}")
}

/// A text inside a regular expression.
fn escaped(text: &str) -> String {
    let escape = |c: char| match c.is_ascii_punctuation() {
        true => format!("\\{c}"),
        false => c.to_string(),
    };
    text.chars().map(escape).collect()
}
