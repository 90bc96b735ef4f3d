//! Whatever a grammar for forced calls allows is read as calls, with arguments by their schemas.

use std::sync::Arc;

use baton_chat_formats::grammar::{Request, ToolChoice, grammar};
use baton_chat_formats::{Format, Reasoning, Tool, Tools};
use serde_json::{Value, json};

use crate::grammars::{Grammar, formats, id};
use crate::support::{Owned, SPECIAL, run_with, text};

/// Walks of each grammar.
const WALKS: u64 = 24;

/// Longest walk. Text, of which nothing but a marker is an end, may take longer: such a walk is given up.
const STEPS_MAX: usize = 4000;

/// Random numbers by seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % sides as u64) as usize
    }
}

fn tools(format: Format) -> Arc<Tools> {
    let inner = json!({"type": "object", "properties": {"a": {"type": ["null", "boolean"]}}, "required": ["a"],
        "additionalProperties": false});
    let mut properties = json!({
        "unit": {"type": "string", "enum": ["c", "f \"x\" é", "<b>"]},
        "n": {"type": "integer", "minimum": -9, "maximum": 99},
        "ok": {"type": "boolean"},
        "list": {"type": "array", "items": {"enum": ["x", 2, null, true]}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    });
    // Text without quotes has no bound there.
    if format != Format::QwenXml {
        properties["s"] = json!({"type": "string", "maxLength": 4});
    }
    let required: Vec<&String> = properties.as_object().unwrap().keys().collect();
    let all = json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false,
        "$defs": {"inner": inner}});
    let none = json!({"additionalProperties": false});
    Arc::new(Tools::new(vec![
        Tool::new("all", all),
        Tool::new("none", none),
    ]))
}

/// What one walk wrote. `None` if it did not come to an end.
fn walk(grammar: &Grammar, dice: &mut Dice) -> Option<Vec<Owned>> {
    let end = 256 + SPECIAL.len() as u32;
    let mut matcher = grammar.matcher();
    let mut pieces = Vec::new();
    let mut bytes = Vec::new();
    let flush = |bytes: &mut Vec<u8>, pieces: &mut Vec<Owned>| {
        if !bytes.is_empty() {
            let written = String::from_utf8(std::mem::take(bytes)).expect("the grammar is of text");
            pieces.push(text(&written));
        }
    };
    for _ in 0..STEPS_MAX {
        let mask = matcher.compute_mask_or_eos().expect("a mask");
        let allowed: Vec<u32> = (0..=end).filter(|id| mask.is_allowed(*id)).collect();
        let token = allowed[dice.roll(allowed.len())];
        if token == end {
            flush(&mut bytes, &mut pieces);
            return Some(pieces);
        }
        matcher.consume_token(token).expect("it was allowed");
        match u8::try_from(token) {
            Ok(byte) => bytes.push(byte),
            Err(_) => {
                flush(&mut bytes, &mut pieces);
                let text = SPECIAL[token as usize - 256].to_owned();
                let special = true;
                pieces.push(Owned { text, special });
            }
        }
    }
    None
}

fn check(name: &str, arguments: &Value, has_text: bool) {
    let fields = arguments.as_object().expect("an object");
    if name == "none" {
        assert!(fields.is_empty(), "{arguments}");
        return;
    }
    assert_eq!(name, "all");
    assert_eq!(fields.len(), if has_text { 6 } else { 5 }, "{arguments}");
    let units = ["c", "f \"x\" é", "<b>"];
    assert!(
        units.iter().any(|unit| fields["unit"] == *unit),
        "{arguments}"
    );
    // A whole number may be written as -0.
    let n = fields["n"].as_f64().expect("a number");
    assert!(
        n.fract() == 0.0 && (-9.0..=99.0).contains(&n),
        "{arguments}"
    );
    assert!(fields["ok"].is_boolean(), "{arguments}");
    let a = &fields["inner"]["a"];
    assert!(a.is_null() || a.is_boolean(), "{arguments}");
    for one in fields["list"].as_array().expect("a list") {
        assert!(
            [json!("x"), json!(2), json!(null), json!(true)].contains(one),
            "{arguments}"
        );
    }
    if has_text {
        let text = fields["s"].as_str().expect("a text");
        assert!(text.chars().count() <= 4, "{arguments}");
    }
}

#[test]
fn what_forced_calls_may_be_is_read_as_calls() {
    let named = ToolChoice::Named("all".to_owned());
    for (format, special) in formats() {
        let tools = tools(format);
        let reasoning = match format {
            Format::Harmony => Reasoning::Harmony,
            _ => Reasoning::None,
        };
        let mut whole = 0;
        for (choice, parallel) in [
            (&ToolChoice::Required, true),
            (&ToolChoice::Required, false),
            (&named, true),
        ] {
            let made = grammar(&Request {
                format,
                reasoning,
                tools: &tools,
                choice,
                parallel,
                answer: None,
                token: &|text| id(text).filter(|_| special),
            });
            let grammar = Grammar::new(made.unwrap().unwrap());
            for seed in 0..WALKS {
                let Some(pieces) = walk(&grammar, &mut Dice(seed)) else {
                    continue;
                };
                whole += 1;
                let read = run_with(format, reasoning, &tools, &pieces);
                assert!(
                    read.content.is_empty() && !read.cut_short,
                    "{format} {pieces:?}\n{read:?}"
                );
                assert!(!read.calls.is_empty(), "{format} {pieces:?}");
                assert!(
                    read.calls.len() == 1 || parallel && *choice != named,
                    "{format} {pieces:?}"
                );
                for (_, name, arguments) in &read.calls {
                    let arguments = serde_json::from_str(arguments)
                        .unwrap_or_else(|error| panic!("{error}: {arguments} of {pieces:?}"));
                    check(name, &arguments, format != Format::QwenXml);
                }
            }
        }
        assert!(whole > WALKS, "{format}: {whole} came to an end");
    }
}
