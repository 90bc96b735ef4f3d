//! Answers that must follow something, of models that reason first.

use serde_json::Value;

use super::lark::Lark;
use super::thinking;
use crate::format::Reasoning;

/// What an answer must be.
#[derive(Clone, Copy, Debug)]
pub enum Answer<'a> {
    /// JSON that follows this schema.
    Json(&'a Value),
    /// Text that matches all of this.
    Regex(&'a str),
    /// The body of a Lark rule that names no other.
    Rule(&'a str),
}

/// The grammar of an output that begins with reasoning, if the model reasons, and whose rest is such an answer. `None` for models that
/// do not: all of the output is the answer. `token` gives the id of the special token with a text.
pub fn after_reasoning(
    reasoning: Reasoning,
    answer: Answer<'_>,
    token: &dyn Fn(&str) -> Option<u32>,
) -> Option<String> {
    let mut lark = Lark::new(token);
    match answer {
        Answer::Json(schema) => lark.json("answer", schema),
        Answer::Regex(pattern) => {
            // Lark's mark of the end, and what may not stand in a line.
            let pattern = pattern.replace('/', "\\/").replace('\n', "\\n");
            lark.rule("answer", &format!("/{pattern}/"));
        }
        Answer::Rule(body) => lark.rule("answer", body),
    }
    let start = match reasoning {
        Reasoning::None => return None,
        Reasoning::Harmony => {
            let marks = [
                "<|channel|>",
                "<|message|>",
                "<|start|>",
                "<|end|>",
                "<|return|>",
            ];
            let [channel, message, start, end, over] = marks.map(|mark| lark.mark(mark));
            lark.until("said", "<|end|>");
            lark.rule(
                "thought",
                &format!("{channel} \"analysis\" {message} said {start} \"assistant\""),
            );
            format!("(thought)? {channel} \"final\" {message} answer ({over} | {end})?")
        }
        _ => format!("{} answer", thinking(reasoning, &mut lark)),
    };
    lark.rule("start", &start);
    Some(lark.finish())
}
