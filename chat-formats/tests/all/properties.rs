//! What holds for any input.

use baton_chat_formats::{Event, Format, HELD_BYTES_MAX, Parser, Piece, Reasoning};
use proptest::prelude::*;

use crate::support::{Owned, Result, cut, run, text, tools, with_special_tokens};

const REASONINGS: [Reasoning; 6] = [
    Reasoning::None,
    Reasoning::Think,
    Reasoning::ThinkOpened,
    Reasoning::Mistral,
    Reasoning::MistralOpened,
    Reasoning::Harmony,
];

/// Pieces of what families write, whole and broken. Letters that count are upper case or not ASCII, and in no marker.
const FRAGMENTS: [&str; 66] = [
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "<function=search>",
    "<function=Q7>",
    "</function>",
    "<parameter=",
    "<parameter=query>",
    "<parameter=days>",
    "<parameter=Q>",
    "</parameter>",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "search[ARGS]{",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "function<｜tool▁sep｜>search\n```json\n",
    "\n```<｜tool▁call▁end｜>",
    "search<｜tool▁sep｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "functions.Q:0<|tool_call_argument_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    "<|start|>assistant",
    "<|channel|>",
    "analysis<|message|>",
    "final<|message|>",
    "commentary to=functions.Q <|constrain|>json<|message|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "{\"name\": \"search\", \"arguments\": {\"query\": \"Z\"}}",
    "{\"name\": \"search\"",
    "{\"name\": \"Q\"",
    "{\"parameters\": {",
    "\"arguments\": {",
    "\"name\": \"search\"",
    "[search(query='Z')]",
    "search(query=",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\\"",
    ", ",
    ": ",
    ")",
    "\n",
    " ",
    "<",
    "```",
];

fn soup() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => prop::sample::select(FRAGMENTS.to_vec()).prop_map(str::to_owned),
        1 => "[QXZ7é漢]{1,3}",
    ];
    prop::collection::vec(part, 0..16).prop_map(|parts| parts.concat())
}

fn formats() -> impl Strategy<Value = (Format, Reasoning)> {
    let all: Vec<Format> = Format::all().collect();
    (
        prop::sample::select(all),
        prop::sample::select(REASONINGS.to_vec()),
    )
}

/// Letters that count, sorted: a call's arguments may have come before its name.
fn letters<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<char> {
    let counts = |c: &char| "QXZ7é漢".contains(*c);
    let mut all: Vec<char> = texts.flat_map(|text| text.chars().filter(counts)).collect();
    all.sort_unstable();
    all
}

fn letters_out(format: Format, result: &Result) -> Vec<char> {
    let mut texts = vec![result.reasoning.as_str(), result.content.as_str()];
    for (id, name, arguments) in &result.calls {
        match id {
            // It is all of the call's head, the name with it.
            Some(id) if format == Format::Kimi => texts.push(id),
            Some(id) => texts.extend([id.as_str(), name]),
            None => texts.push(name),
        }
        texts.push(arguments);
    }
    letters(texts.into_iter())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn any_cut_gives_the_same_result(input in soup(), (format, reasoning) in formats(), characters in 1usize..9, special: bool) {
        let pieces = match special {
            true => with_special_tokens(&input),
            false => vec![text(&input)],
        };
        let whole = run(format, reasoning, &pieces);
        prop_assert_eq!(run(format, reasoning, &cut(&pieces, characters)), whole);
    }

    #[test]
    fn no_letter_is_lost_or_repeated(input in soup(), (format, reasoning) in formats(), special: bool) {
        let pieces = match special {
            true => with_special_tokens(&input),
            false => vec![text(&input)],
        };
        let result = run(format, reasoning, &pieces);
        prop_assert_eq!(letters_out(format, &result), letters(std::iter::once(input.as_str())), "{:?}", result);
    }

    #[test]
    fn text_without_markers_is_content(input in "[a-zA-Zé漢.,:;!?(){}'\"\\\\0-9 \n]{0,40}", (format, reasoning) in formats()) {
        // A first letter that begins neither a call nor a header.
        let input = format!("A{input}");
        let reasoning = match reasoning {
            Reasoning::ThinkOpened | Reasoning::MistralOpened => Reasoning::None,
            other => other,
        };
        let result = run(format, reasoning, &[text(&input)]);
        prop_assert_eq!(result.content, input);
    }

    #[test]
    fn strings_of_the_arguments_come_through(value in any::<String>(), (format, _) in formats()) {
        let arguments = serde_json::json!({"query": value}).to_string();
        let Some(written) = crate::written::write(format, &[("search", &arguments)]) else {
            return Ok(());
        };
        // What the format has no way to quote.
        let unquotable = matches!(format, Format::QwenXml);
        prop_assume!(!unquotable || !value.contains("<"));
        let result = run(format, Reasoning::None, &cut(&with_special_tokens(&written), 1));
        prop_assert_eq!(result.calls.len(), 1, "{}", written);
        let read: serde_json::Value = serde_json::from_str(&result.calls[0].2).unwrap();
        prop_assert_eq!(read["query"].as_str(), Some(value.as_str()));
    }
}

/// Bytes of text in events.
fn bytes(events: &[Event]) -> usize {
    let one = |event: &Event| match event {
        Event::Reasoning(text) | Event::Content(text) => text.len(),
        Event::CallArguments { delta, .. } => delta.len(),
        Event::CallBegins { .. } | Event::CallEnds { .. } => 0,
    };
    events.iter().map(one).sum()
}

#[test]
fn what_is_held_back_has_a_bound() {
    let beginnings = [
        "<think>",
        "[THINK]",
        "<tool_call>",
        "<tool_call>{\"name\": \"",
        "<tool_call>{\"arguments\": {\"a\": \"",
        "<tool_call>[",
        "<function=",
        "<function=f>",
        "<function=f><parameter=",
        "<function=f><parameter=a>",
        "<function=get_weather><parameter=options>{\"a\": \"",
        "<|python_tag|>",
        "{\"name\": \"",
        "[search(query='",
        "[search(",
        "<|python_start|>[",
        "<|python_start|>[f(a='",
        "[TOOL_CALLS]",
        "[TOOL_CALLS]f",
        "[TOOL_CALLS]f[ARGS]",
        "[TOOL_CALLS][{\"name\": \"",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}",
        "<|tool_call_begin|>",
        "<|channel|>",
        "<|start|>",
        "<|channel|>analysis",
        "<|channel|>commentary to=functions.f<|constrain|>",
        "<|channel|>commentary to=functions.f<|message|>",
        "",
    ];
    let fill = "x".repeat(1 << 10);
    let with_calls = Format::all().map(|format| (format, Reasoning::None));
    let with_reasoning = REASONINGS.map(|reasoning| (Format::None, reasoning));
    for (format, reasoning) in with_calls.chain(with_reasoning) {
        for beginning in beginnings {
            let mut parser = Parser::new(format, reasoning, &tools());
            let mut events = Vec::new();
            parser.push(Piece::text(beginning), &mut events);
            let pieces = HELD_BYTES_MAX / fill.len() + 8;
            for _ in 0..pieces {
                parser.push(Piece::text(&fill), &mut events);
            }
            let out = bytes(&events);
            let least = pieces * fill.len() - HELD_BYTES_MAX - 1024;
            assert!(out >= least, "{format} {reasoning} {beginning:?}: {out}");
        }
    }
}

#[test]
fn white_space_without_end_is_not_held_without_end() {
    for format in Format::all() {
        let mut parser = Parser::new(format, Reasoning::Think, &tools());
        let mut events = Vec::new();
        parser.push(Piece::text("<think>a</think>b"), &mut events);
        for _ in 0..64 {
            parser.push(Piece::text(&" \n".repeat(512)), &mut events);
        }
        assert!(bytes(&events) >= 64 * 1024 - 1024, "{format}");
    }
}

/// A text in pieces, to be looked at when a property fails.
#[test]
fn pieces_are_cut_as_told() {
    let pieces = with_special_tokens("a[ARGS]bcd");
    assert_eq!(cut(&pieces, 2).len(), 4);
    assert_eq!(
        pieces[1],
        Owned {
            text: "[ARGS]".into(),
            special: true
        }
    );
}
