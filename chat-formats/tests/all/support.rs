//! What the tests share: running a parser over pieces, and events with their cuts taken out.
#![allow(dead_code, missing_docs, reason = "each test file uses some of it")]

use std::sync::Arc;

use baton_chat_formats::{End, Event, Format, Parser, Piece, Reasoning, Tool, Tools};
use serde_json::json;

/// A piece that is owned.
#[derive(Clone, Debug, PartialEq)]
pub struct Owned {
    pub text: String,
    pub special: bool,
}

pub fn text(text: &str) -> Owned {
    Owned {
        text: text.to_owned(),
        special: false,
    }
}

/// What came out, with adjacent events joined.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Result {
    pub reasoning: String,
    pub content: String,
    /// Id, name and arguments.
    pub calls: Vec<(Option<String>, String, String)>,
    /// The order in which they came.
    pub order: Vec<&'static str>,
    /// Whether a call's arguments are not whole.
    pub cut_short: bool,
}

pub fn tools() -> Arc<Tools> {
    let weather = json!({"type": "object", "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "wind": {"type": "number"},
        "metric": {"type": "boolean"},
        "places": {"type": "array", "items": {"type": "string"}},
        "options": {"type": "object"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "limit": {"type": ["integer", "null"]},
    }, "required": ["city"]});
    let search = json!({"type": "object", "properties": {"query": {"type": "string"}}});
    Arc::new(Tools::new(vec![
        Tool::new("get_weather", weather),
        Tool::new("search", search),
        Tool::new("now", serde_json::Value::Null),
    ]))
}

pub fn run(format: Format, reasoning: Reasoning, pieces: &[Owned]) -> Result {
    run_with(format, reasoning, &tools(), pieces)
}

pub fn run_with(
    format: Format,
    reasoning: Reasoning,
    tools: &Arc<Tools>,
    pieces: &[Owned],
) -> Result {
    let mut parser = Parser::new(format, reasoning, tools);
    let mut events = Vec::new();
    for piece in pieces {
        let (text, special) = (piece.text.as_str(), piece.special);
        parser.push(Piece { text, special }, &mut events);
    }
    let end = parser.finish(&mut events);
    joined(events, end)
}

/// Joins events and checks their order: a call begins, has its arguments, ends.
pub fn joined(events: Vec<Event>, end: End) -> Result {
    let mut result = Result::default();
    let mut open = None;
    for event in events {
        let kind = match event {
            Event::Reasoning(text) => {
                assert!(!text.is_empty());
                result.reasoning.push_str(&text);
                "reasoning"
            }
            Event::Content(text) => {
                assert!(!text.is_empty());
                result.content.push_str(&text);
                "content"
            }
            Event::CallBegins { index, id, name } => {
                assert_eq!((index, open), (result.calls.len(), None));
                assert!(!name.is_empty());
                open = Some(index);
                result.calls.push((id, name, String::new()));
                "call"
            }
            Event::CallArguments { index, delta } => {
                assert_eq!(open, Some(index));
                assert!(!delta.is_empty());
                result.calls[index].2.push_str(&delta);
                continue;
            }
            Event::CallEnds { index, is_whole } => {
                result.cut_short |= !is_whole;
                assert_eq!(open.take(), Some(index));
                continue;
            }
        };
        if result.order.last() != Some(&kind) || kind == "call" {
            result.order.push(kind);
        }
    }
    assert_eq!(open, None, "every call ends");
    assert_eq!(end.calls, result.calls.len());
    result
}

/// The same text, with every text piece cut into pieces of so many characters.
pub fn cut(pieces: &[Owned], characters: usize) -> Vec<Owned> {
    let mut all = Vec::new();
    for piece in pieces {
        if piece.special {
            all.push(piece.clone());
            continue;
        }
        let chars: Vec<char> = piece.text.chars().collect();
        for chunk in chars.chunks(characters) {
            all.push(text(&chunk.iter().collect::<String>()));
        }
    }
    all
}

/// Tokens that are special in the families that use them.
pub const SPECIAL: [&str; 19] = [
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|im_end|>",
    "<|eot_id|>",
];

/// A text in which what reads as a special token is one.
pub fn with_special_tokens(text: &str) -> Vec<Owned> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let next = SPECIAL
            .iter()
            .filter_map(|token| rest.find(token).map(|at| (at, *token)))
            .min();
        let Some((at, token)) = next else { break };
        if at > 0 {
            pieces.push(self::text(&rest[..at]));
        }
        pieces.push(Owned {
            text: token.to_owned(),
            special: true,
        });
        rest = &rest[at + token.len()..];
    }
    if !rest.is_empty() {
        pieces.push(self::text(rest));
    }
    pieces
}
