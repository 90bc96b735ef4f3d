//! Recorded cases: `cases/*.json`, a list for each format.

use baton_chat_formats::{Format, Reasoning};
use serde_json::Value;

use crate::support::{Owned, cut, run, text, with_special_tokens};

#[test]
fn recorded_cases() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/cases");
    let mut counts = Vec::new();
    // All that fail are shown.
    let mut failed = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let cases: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let cases = cases.as_array().unwrap();
        for case in cases {
            let checked = std::panic::catch_unwind(|| check(&file, case));
            failed += usize::from(checked.is_err());
        }
        counts.push((file, cases.len()));
    }
    assert_eq!(failed, 0, "cases fail");
    assert!(
        counts.len() >= 10 && counts.iter().all(|(_, count)| *count >= 10),
        "{counts:?}"
    );
}

fn check(file: &str, case: &Value) {
    let what = format!("{file}: {}", case["what"].as_str().unwrap());
    let format: Format = case["format"].as_str().unwrap().parse().unwrap();
    let reasoning: Reasoning = case["reasoning"]
        .as_str()
        .unwrap_or("none")
        .parse()
        .unwrap();
    let expected = &case["gives"];
    let known = ["reasoning", "content", "calls", "cut_short", "order"];
    assert!(
        expected
            .as_object()
            .unwrap()
            .keys()
            .all(|key| known.contains(&key.as_str())),
        "{what}"
    );
    for pieces in inputs(&case["input"]) {
        for pieces in [cut(&pieces, 1), cut(&pieces, 2), cut(&pieces, 5), pieces] {
            let result = run(format, reasoning, &pieces);
            let said = |key: &str| expected[key].as_str().unwrap_or("");
            assert_eq!(result.content, said("content"), "{what}: content");
            assert_eq!(result.reasoning, said("reasoning"), "{what}: reasoning");
            let calls: Vec<_> = expected["calls"]
                .as_array()
                .into_iter()
                .flatten()
                .map(call)
                .collect();
            assert_eq!(result.calls, calls, "{what}: calls");
            let cut_short = expected["cut_short"].as_bool().unwrap_or(false);
            assert_eq!(result.cut_short, cut_short, "{what}: cut_short");
            if let Some(order) = expected["order"].as_array() {
                let order: Vec<&str> = order.iter().filter_map(Value::as_str).collect();
                assert_eq!(result.order, order, "{what}: order");
            }
        }
    }
}

/// The ways to read an input: a text with its special tokens as such, and as text; or pieces as they are.
fn inputs(input: &Value) -> Vec<Vec<Owned>> {
    match input {
        Value::String(all) => vec![with_special_tokens(all), vec![text(all)]],
        pieces => {
            let piece = |piece: &Value| match piece.as_str() {
                Some(plain) => text(plain),
                None => Owned {
                    text: piece["special"].as_str().unwrap().to_owned(),
                    special: true,
                },
            };
            vec![pieces.as_array().unwrap().iter().map(piece).collect()]
        }
    }
}

fn call(call: &Value) -> (Option<String>, String, String) {
    let field = |key: &str| call[key].as_str().map(str::to_owned);
    (
        field("id"),
        field("name").unwrap(),
        field("arguments").unwrap(),
    )
}
