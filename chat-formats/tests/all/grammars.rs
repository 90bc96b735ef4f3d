//! Grammars compile, accept what the format's own models write, and refuse what they must.

use std::sync::Arc;

use baton_chat_formats::grammar::{Answer, Request, ToolChoice, after_reasoning, grammar};
use baton_chat_formats::{Format, Reasoning, Tool, Tools};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::json;

use crate::support::{Owned, SPECIAL, text, with_special_tokens};
use crate::written::write;

/// The id of a special token in the vocabulary of these tests: bytes come first.
pub fn id(token: &str) -> Option<u32> {
    let at = SPECIAL.iter().position(|special| *special == token);
    at.map(|at| 256 + at as u32)
}

fn environment() -> TokEnv {
    let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    words.extend(
        SPECIAL
            .iter()
            .map(|token| [b"\xff", token.as_bytes()].concat()),
    );
    words.push(b"\xff<|endoftext|>".to_vec());
    let vocab_size = words.len() as u32;
    let info = TokRxInfo::new(vocab_size, vocab_size - 1);
    let environment: Arc<dyn TokenizerEnv + Sync> =
        Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
    environment
}

/// One token a byte, or a special token.
fn tokens(pieces: &[Owned]) -> Vec<u32> {
    let one = |piece: &Owned| match piece.special {
        true => vec![id(&piece.text).unwrap()],
        false => piece.text.bytes().map(u32::from).collect(),
    };
    pieces.iter().flat_map(one).collect()
}

pub struct Grammar {
    factory: ParserFactory,
    text: String,
}

impl Grammar {
    pub fn new(text: String) -> Self {
        let mut factory = ParserFactory::new_simple(&environment()).unwrap();
        factory.quiet();
        Self { factory, text }
    }

    /// Whether an output may be this and end there.
    fn accepts(&self, pieces: &[Owned]) -> bool {
        let (taken, all, ends) = self.take(pieces);
        taken == all && ends
    }

    /// A matcher before the first token.
    pub fn matcher(&self) -> Matcher {
        let parser = self
            .factory
            .create_parser(TopLevelGrammar::from_lark(self.text.clone()));
        let matcher = Matcher::new(parser);
        assert!(
            !matcher.is_error(),
            "{:?}\n{}",
            matcher.get_error(),
            self.text
        );
        matcher
    }

    /// How many of how many tokens may come, and whether the output may end after them.
    fn take(&self, pieces: &[Owned]) -> (usize, usize, bool) {
        let mut matcher = self.matcher();
        let tokens = tokens(pieces);
        let taken = matcher.try_consume_tokens(&tokens).unwrap();
        let ends = taken == tokens.len() && matcher.is_accepting().unwrap();
        (taken, tokens.len(), ends)
    }
}

fn tools(strict: bool) -> Tools {
    let weather = json!({"type": "object", "additionalProperties": false, "required": ["city"], "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "metric": {"type": "boolean"},
        "unit": {"type": "string", "enum": ["c", "f"]},
        "where": {"$ref": "#/$defs/place"},
    }, "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": false}}});
    let search = json!({"type": "object", "properties": {"query": {"type": "string"}}, "additionalProperties": false});
    let mut tools = [
        Tool::new("get_weather", weather),
        Tool::new("search", search),
        Tool::new("now", serde_json::Value::Null),
    ];
    for tool in &mut tools {
        tool.strict = strict;
    }
    Tools::new(tools.into())
}

fn made(
    format: Format,
    reasoning: Reasoning,
    choice: &ToolChoice,
    parallel: bool,
    special: bool,
) -> Grammar {
    let tools = tools(*choice == ToolChoice::Auto);
    let request = Request {
        format,
        reasoning,
        tools: &tools,
        choice,
        parallel,
        answer: None,
        token: &|text| id(text).filter(|_| special),
    };
    Grammar::new(grammar(&request).unwrap().unwrap())
}

const GOOD: [(&str, &str); 3] = [
    (
        "get_weather",
        r#"{"city": "Paris, é \\ [x]", "days": 3, "metric": true}"#,
    ),
    ("search", r#"{"query": "a), b"}"#),
    ("now", r#"{}"#),
];

pub fn formats() -> impl Iterator<Item = (Format, bool)> {
    let formats = Format::all().filter(|format| *format != Format::None);
    formats.flat_map(|format| [(format, true), (format, false)])
}

fn pieces(written: &str, special: bool) -> Vec<Owned> {
    match special {
        true => with_special_tokens(written),
        // Models without the token [ARGS] write nothing in its place.
        false => vec![text(&written.replace("[ARGS]", ""))],
    }
}

#[test]
fn required_calls_are_the_formats_own() {
    let choice = ToolChoice::Required;
    for (format, special) in formats() {
        let grammar = made(format, Reasoning::None, &choice, true, special);
        let one = made(format, Reasoning::None, &choice, false, special);
        let written = |calls: &[(&str, &str)]| pieces(&write(format, calls).unwrap(), special);
        for call in GOOD {
            assert!(
                grammar.accepts(&written(&[call])),
                "{format} {call:?}\n{}",
                grammar.text
            );
            assert!(
                one.accepts(&written(&[call])) || format == Format::Json,
                "{format} {call:?}\n{}",
                one.text
            );
        }
        if format != Format::Harmony {
            assert!(
                grammar.accepts(&written(&GOOD)),
                "{format}\n{:?}\n{}",
                grammar.take(&written(&GOOD)),
                grammar.text
            );
            assert!(!one.accepts(&written(&GOOD)), "{format}\n{}", one.text);
        }
        for bad in [
            ("fly", "{}"),
            ("get_weather", r#"{"town": "Paris"}"#),
            ("get_weather", r#"{"city": "Paris", "days": "many"}"#),
        ] {
            assert!(
                !grammar.accepts(&written(&[bad])),
                "{format} {bad:?}\n{}",
                grammar.text
            );
        }
        assert!(!grammar.accepts(&[text("It is sunny.")]), "{format}");
        assert!(!grammar.accepts(&[text("")]), "{format}");
    }
}

#[test]
fn arguments_have_no_free_white_space() {
    let choice = ToolChoice::Required;
    let good = [
        r#"{"city": "Paris", "days": 3}"#,
        r#"{"city":"Paris","days":3}"#,
        r#"{"city": " \n  ", "where": {"x":1}}"#,
    ];
    let bad = [
        r#"{ "city": "Paris"}"#,
        r#"{"city":  "Paris"}"#,
        "{\"city\":\n\"Paris\"}",
        r#"{"city": "Paris" , "days": 3}"#,
        r#"{"city": "Paris",  "days": 3}"#,
        "{\"city\": \"Paris\"\n}",
    ];
    // These have no object around their arguments.
    let formats =
        formats().filter(|(format, _)| !matches!(format, Format::QwenXml | Format::Pythonic));
    for (format, special) in formats {
        let grammar = made(format, Reasoning::None, &choice, true, special);
        let accepts = |arguments: &str| {
            let written = write(format, &[("get_weather", arguments)]).unwrap();
            grammar.accepts(&pieces(&written, special))
        };
        for arguments in good {
            assert!(accepts(arguments), "{format} {arguments}\n{}", grammar.text);
        }
        for arguments in bad {
            assert!(
                !accepts(arguments),
                "{format} {arguments}\n{}",
                grammar.text
            );
        }
    }
}

#[test]
fn a_schema_may_say_itself_how_it_is_written() {
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
        "additionalProperties": false, "x-guidance": {"whitespace_flexible": true}});
    let tools = Tools::new(vec![Tool::new("count", schema)]);
    let made = grammar(&Request {
        format: Format::Hermes,
        reasoning: Reasoning::None,
        tools: &tools,
        choice: &ToolChoice::Required,
        parallel: true,
        answer: None,
        token: &|_| None,
    });
    let grammar = Grammar::new(made.unwrap().unwrap());
    let written = write(Format::Hermes, &[("count", "{ \"n\" :\n 1 }")]).unwrap();
    assert!(grammar.accepts(&[text(&written)]), "{}", grammar.text);
}

#[test]
fn a_named_tool_is_called_once() {
    let choice = ToolChoice::Named("search".to_owned());
    for (format, special) in formats() {
        let grammar = made(format, Reasoning::None, &choice, true, special);
        let written = |calls: &[(&str, &str)]| pieces(&write(format, calls).unwrap(), special);
        assert!(
            grammar.accepts(&written(&[GOOD[1]])),
            "{format}\n{}",
            grammar.text
        );
        assert!(!grammar.accepts(&written(&[GOOD[2]])), "{format}");
        assert!(!grammar.accepts(&written(&[GOOD[1], GOOD[1]])), "{format}");
    }
}

#[test]
fn reasoning_may_come_first() {
    let choice = ToolChoice::Required;
    for (format, special) in formats() {
        let call = write(format, &[GOOD[1]]).unwrap();
        let cases = match format {
            Format::Harmony => vec![(
                Reasoning::Harmony,
                format!("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{call}"),
            )],
            _ => vec![
                (
                    Reasoning::Think,
                    format!("<think>\nHm.\n</think>\n\n{call}"),
                ),
                (Reasoning::Think, call.clone()),
                (Reasoning::ThinkOpened, format!("Hm.\n</think>\n\n{call}")),
                (Reasoning::Mistral, format!("[THINK]Hm.[/THINK]{call}")),
            ],
        };
        for (reasoning, written) in cases {
            let grammar = made(format, reasoning, &choice, true, special);
            let pieces = pieces(&written, special);
            assert!(
                grammar.accepts(&pieces),
                "{format} {reasoning} {:?}\n{}",
                grammar.take(&pieces),
                grammar.text
            );
        }
    }
}

#[test]
fn strict_tools_hold_from_where_a_call_opens() {
    let choice = ToolChoice::Auto;
    for (format, special) in formats() {
        let reasoning = match format {
            Format::Harmony => Reasoning::Harmony,
            _ => Reasoning::None,
        };
        let grammar = made(format, reasoning, &choice, true, special);
        let plain = match format {
            Format::Harmony => "<|channel|>final<|message|>It is sunny.",
            _ => "It is sunny.",
        };
        assert!(
            grammar.accepts(&pieces(plain, special)),
            "{format}\n{}",
            grammar.text
        );
        for call in GOOD {
            let written = pieces(&write(format, &[call]).unwrap(), special);
            assert!(
                grammar.accepts(&written),
                "{format} {:?}\n{}",
                grammar.take(&written),
                grammar.text
            );
        }
        let bad = pieces(&write(format, &[("fly", "{}")]).unwrap(), special);
        assert!(!grammar.accepts(&bad), "{format}\n{}", grammar.text);
        let can_follow_text = !matches!(
            format,
            Format::LlamaJson | Format::Json | Format::Pythonic | Format::Harmony
        );
        if can_follow_text {
            let written = format!("I look. {}\nDone.", write(format, &GOOD).unwrap());
            let written = pieces(&written, special);
            assert!(
                grammar.accepts(&written),
                "{format} {:?}\n{}",
                grammar.take(&written),
                grammar.text
            );
        }
    }
}

#[test]
fn an_answer_by_schema_or_calls() {
    let schema = json!({"type": "object", "properties": {"is_sunny": {"type": "boolean"}, "n": {"$ref": "#/$defs/n"}},
        "required": ["is_sunny"], "additionalProperties": false, "$defs": {"n": {"enum": ["<tool_call>"]}}});
    for (format, special) in formats() {
        let tools = tools(false);
        let (reasoning, thought, end) = match format {
            Format::Harmony => (
                Reasoning::Harmony,
                "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant",
                "<|channel|>final<|message|>",
            ),
            _ => (Reasoning::Think, "<think>Hm.</think>", ""),
        };
        let made = grammar(&Request {
            format,
            reasoning,
            tools: &tools,
            choice: &ToolChoice::Auto,
            parallel: true,
            answer: Some(&schema),
            token: &|text| id(text).filter(|_| special),
        });
        if matches!(format, Format::LlamaJson | Format::Json | Format::Pythonic) {
            let error = made.unwrap_err();
            assert!(error.contains(format.name()), "{error}");
            continue;
        }
        let grammar = Grammar::new(made.unwrap().unwrap());
        let answer = |json: &str| format!("{end}{json}");
        let calls = match format {
            Format::Harmony => write(format, &GOOD[1..2]).unwrap(),
            _ => write(format, &GOOD).unwrap(),
        };
        let good = [
            answer(r#"{"is_sunny": true}"#),
            answer(r#"{"is_sunny": false, "n": "<tool_call>"}"#),
            calls,
        ];
        for written in good {
            for thought in ["", thought] {
                let pieces = pieces(&format!("{thought}{written}"), special);
                assert!(
                    grammar.accepts(&pieces),
                    "{format} {:?}\n{}",
                    grammar.take(&pieces),
                    grammar.text
                );
            }
        }
        let bad = [
            answer("It is sunny."),
            answer(r#"{"is_sunny": 7}"#),
            answer(""),
            write(format, &[("fly", "{}")]).unwrap(),
        ];
        for written in bad {
            assert!(
                !grammar.accepts(&pieces(&written, special)),
                "{format} {written}"
            );
        }
    }
}

#[test]
fn what_needs_no_grammar_and_what_cannot_have_one() {
    let tools = tools(false);
    let ask = |format, choice: &ToolChoice, tools: &Tools| {
        grammar(&Request {
            format,
            reasoning: Reasoning::None,
            tools,
            choice,
            parallel: true,
            answer: None,
            token: &|_| None,
        })
    };
    assert_eq!(ask(Format::Hermes, &ToolChoice::Auto, &tools), Ok(None));
    assert_eq!(ask(Format::Hermes, &ToolChoice::None, &tools), Ok(None));
    let unknown = ToolChoice::Named("fly".to_owned());
    assert!(
        ask(Format::Hermes, &unknown, &tools)
            .unwrap_err()
            .contains("\"fly\"")
    );
    let error = ask(Format::None, &ToolChoice::Required, &tools).unwrap_err();
    assert!(error.contains("--tool-format"), "{error}");
    assert!(ask(Format::Hermes, &ToolChoice::Required, &Tools::default()).is_err());
}

#[test]
fn an_answer_by_schema_comes_after_reasoning() {
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false});
    let answers = [
        (Answer::Json(&schema), r#"{"n": 3}"#, r#"{"n": "3"}"#),
        (Answer::Regex("[a-z]+/\n[0-9]"), "ab/\n7", "ab7"),
        (Answer::Rule(r#""yes" | "no""#), "no", "maybe"),
    ];
    for special in [false, true] {
        for (answer, good, bad) in answers {
            for (reasoning, thoughts, end) in [
                (Reasoning::Think, vec!["", "<think>Hm.</think>\n\n"], ""),
                (
                    Reasoning::ThinkOpened,
                    vec!["Hm. {}</think>\n\n", "</think>"],
                    "",
                ),
                (Reasoning::Mistral, vec!["", "[THINK]Hm.[/THINK]"], ""),
                (
                    Reasoning::Harmony,
                    vec![
                        "",
                        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant",
                    ],
                    "<|channel|>final<|message|>",
                ),
            ] {
                let token = |text: &str| id(text).filter(|_| special);
                let made = after_reasoning(reasoning, answer, &token).expect("it reasons");
                let grammar = Grammar::new(made);
                for thought in thoughts {
                    let good = pieces(&format!("{thought}{end}{good}"), special);
                    assert!(grammar.accepts(&good), "{good:?} by {}", grammar.text);
                    let bad = pieces(&format!("{thought}{end}{bad}"), special);
                    assert!(!grammar.accepts(&bad), "{bad:?} by {}", grammar.text);
                }
            }
            assert_eq!(after_reasoning(Reasoning::None, answer, &id), None);
        }
    }
}
