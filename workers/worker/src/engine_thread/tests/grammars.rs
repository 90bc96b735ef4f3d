//! Sequences with a grammar: over a vocabulary of single bytes, each id its byte.

use std::path::Path;

use baton_protocol::{FinishReason, Grammar};
use tempfile::TempDir;

use super::*;

const END: u32 = 256;
const VOCAB: u32 = 300;

/// A tokenizer of the printable bytes, which stand for themselves, and one id that ends outputs.
fn tokenizer(dir: &Path) -> std::path::PathBuf {
    let vocab: serde_json::Map<String, serde_json::Value> = (b'!'..=b'~')
        .map(|byte| (char::from(byte).to_string(), byte.into()))
        .collect();
    let tokenizer = serde_json::json!({
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": END, "content": "<|end|>", "special": true}],
        "model": {"type": "BPE", "vocab": vocab},
    });
    let path = dir.join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    path
}

fn fake(steps_in_flight: usize) -> FakeExecutor {
    FakeExecutor::new(FakeConfig {
        vocab: VOCAB,
        steps_in_flight,
        ..FakeConfig::default()
    })
}

fn following(grammar: &Grammar, max_tokens: u32) -> SequenceSpec {
    let mut spec = spec(max_tokens);
    spec.generation.grammar = Some(grammar.clone());
    spec.generation.stop_token_ids = vec![END];
    spec
}

fn prefill(fixture: &mut Fixture, spec: SequenceSpec) -> Option<EngineEvent> {
    assert!(fixture.engine.send(Command::Prefill {
        key: 1,
        spec,
        prompt_logprobs: None,
        stream: false,
    }));
    fixture.events.blocking_recv()
}

/// The whole output of a sequence: its prompt on one worker, the rest on another.
fn output(grammar: &Grammar, max_tokens: u32, steps_in_flight: usize) -> (Vec<u32>, FinishReason) {
    let dir = TempDir::new().unwrap();
    let path = tokenizer(dir.path());
    let start = || {
        start_with(
            fake(steps_in_flight),
            Some(Grammars::new(path.clone(), VOCAB)),
        )
    };
    let (mut context, mut decode) = (start(), start());
    let spec = following(grammar, max_tokens);
    let Some(EngineEvent::Prefilled(first)) = prefill(&mut context, spec.clone()) else {
        panic!("no first token");
    };
    let mut output = vec![first.sampled.token];
    if let Some(finish) = first.finish {
        return (output, finish);
    }
    let blocks = decode.pool.reserve(2).unwrap();
    assert!(decode.engine.send(Command::Decode {
        key: 1,
        route: route(1),
        spec,
        next: output[0],
        first: None,
        blocks,
        pulled: PullReport::default(),
        trace: None,
    }));
    let left = decode.events.blocking_recv();
    assert!(matches!(
        left,
        Some(EngineEvent::Left { refusal: None, .. })
    ));
    let (_, items) = decode.tokens.try_take().unwrap().servers.pop().unwrap();
    output.extend(items.iter().flat_map(|item| &item.tokens.0));
    let end = items.into_iter().find_map(|item| item.end);
    let Some(End::Finished(finish)) = end else {
        panic!("{end:?}")
    };
    context.engine.shutdown();
    decode.engine.shutdown();
    (output, finish)
}

fn text(output: &[u32]) -> String {
    let bytes = output.iter().filter(|token| **token != END);
    bytes.map(|token| char::from(*token as u8)).collect()
}

#[test]
fn an_output_follows_its_grammar_on_whatever_workers_it_is_made() {
    let ids = Grammar::Regex("[a-f]{3}-[0-9]{4}".to_owned());
    for steps_in_flight in [1, 2] {
        let (made, finish) = output(&ids, 50, steps_in_flight);
        let text = text(&made);
        assert_eq!(finish, FinishReason::Whole, "{text}");
        let (letters, digits) = text.split_once('-').expect("a dash");
        assert!(letters.len() == 3 && letters.bytes().all(|b| (b'a'..=b'f').contains(&b)));
        assert!(digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_digit()));
        // It ends when it is whole: nobody has to choose an end.
        assert_eq!(made.len(), 8);
    }
    let short = Grammar::Regex("[a-f]".to_owned());
    assert_eq!(output(&short, 50, 1).0.len(), 1);
    let (cut, finish) = output(&Grammar::Regex("[a-f]{9}".to_owned()), 5, 1);
    assert_eq!((cut.len(), finish), (5, FinishReason::Length));
    // Where the grammar allows an end, ids that end outputs may be chosen.
    let open = Grammar::Regex("[a-b]+".to_owned());
    let (made, finish) = output(&open, 500, 1);
    assert_eq!((made.last(), finish), (Some(&END), FinishReason::Stop));
    let schema = Grammar::JsonSchema(r#"{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"],"additionalProperties":false}"#.to_owned());
    let (made, finish) = output(&schema, 500, 2);
    if finish == FinishReason::Whole {
        let value: serde_json::Value = serde_json::from_str(&text(&made)).expect("JSON");
        assert!(value["n"].is_number(), "{value}");
    }
}

#[test]
fn what_cannot_be_followed_is_turned_away_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let refused = |grammars: Option<Grammars>, grammar: Grammar, word: &str| {
        let mut fixture = start_with(fake(1), grammars);
        let spec = following(&grammar, 50);
        let Some(EngineEvent::Left { refusal, .. }) = prefill(&mut fixture, spec.clone()) else {
            panic!("it was taken");
        };
        let detail = refusal.map(|refusal| refusal.to_string());
        assert!(
            detail.as_ref().is_some_and(|d| d.contains(word)),
            "{detail:?}"
        );
        // And so is a sequence whose prompt was run elsewhere; its blocks come back.
        let blocks = fixture.pool.reserve(2).unwrap();
        assert!(fixture.engine.send(Command::Decode {
            key: 2,
            route: route(2),
            spec,
            next: 7,
            first: None,
            blocks,
            pulled: PullReport::default(),
            trace: None,
        }));
        let Some(EngineEvent::Ended { failure, .. }) = fixture.events.blocking_recv() else {
            panic!("it was taken");
        };
        assert!(failure.message.contains(word), "{failure:?}");
        assert_eq!(fixture.pool.stats().used, 0);
        // Others are taken.
        let prefilled = prefill(&mut fixture, self::spec(1));
        assert!(matches!(prefilled, Some(EngineEvent::Prefilled(_))));
        fixture.engine.shutdown();
    };
    let digits = || Grammar::Regex("[0-9]+".to_owned());
    let path = tokenizer(dir.path());
    let grammars = |path: &Path| Some(Grammars::new(path.to_owned(), VOCAB));
    refused(grammars(&path), Grammar::Regex("(".to_owned()), "compiled");
    refused(None, digits(), "no tokenizer");
    refused(grammars(&dir.path().join("none")), digits(), "none");
    // Its output so far is none of this grammar.
    let mut fixture = start_with(fake(1), grammars(&path));
    let mut spec = following(&digits(), 50);
    spec.tokens.0.push(b'x'.into());
    let Some(EngineEvent::Left { refusal, .. }) = prefill(&mut fixture, spec) else {
        panic!("it was taken");
    };
    assert!(refusal.is_some());
    fixture.engine.shutdown();
}

#[test]
fn a_sequence_that_is_held_back_can_be_aborted() {
    let dir = TempDir::new().unwrap();
    let grammars = Grammars::new(tokenizer(dir.path()), VOCAB);
    let mut fixture = start_with(fake(1), Some(grammars));
    let spec = following(&Grammar::Regex("[0-9]+".to_owned()), 1 << 10);
    for key in 1..20 {
        let spec = spec.clone();
        assert!(fixture.engine.send(Command::Prefill {
            key,
            spec,
            prompt_logprobs: None,
            stream: false,
        }));
        assert!(fixture.engine.send(Command::Abort { key, failure: None }));
        loop {
            match fixture.events.blocking_recv() {
                Some(EngineEvent::Prefilled(_)) => {}
                Some(EngineEvent::Left {
                    key: left,
                    refusal: None,
                }) => break assert_eq!(left, key),
                _ => panic!("sequence {key} failed"),
            }
        }
    }
    let prefilled = prefill(&mut fixture, self::spec(1));
    assert!(matches!(prefilled, Some(EngineEvent::Prefilled(_))));
    fixture.engine.shutdown();
}
