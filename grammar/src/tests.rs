use baton_protocol::Grammar;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// Bytes, and some longer tokens, as a tokenizer's JSON; 300 is special and ends an output, 301 is special and means nothing.
fn tokenizer() -> Vec<u8> {
    let mut vocab = serde_json::Map::new();
    let mut name_of = |byte: u8| {
        // The table of byte-level tokenizers: printable bytes stand for themselves, the others follow from U+0100.
        let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        match printable(byte) {
            true => char::from(byte),
            false => {
                let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
                char::from_u32(0x100 + before).expect("a character")
            }
        }
    };
    let mut name = |text: &str| text.bytes().map(&mut name_of).collect::<String>();
    for (id, text) in (256..).zip(LONGER) {
        vocab.insert(name(text), json!(id));
    }
    for byte in 0..=255u8 {
        let text: String = [byte].iter().map(|b| name_of(*b)).collect();
        vocab.insert(text, json!(byte));
    }
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "special": true});
    let tokenizer = json!({
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [special(END, "<|end|>"), special(CALL, "<|call|>")],
        "model": {"type": "BPE", "vocab": vocab},
    });
    tokenizer.to_string().into_bytes()
}

const LONGER: [&str; 12] = [
    "{\"", "\":", "\": ", "\",", "true", "null", "name", "age", "12", "}}", "  ", "ab",
];
const END: u32 = 300;
const CALL: u32 = 301;
const VOCAB: u32 = 310;

fn compiler() -> Compiler {
    Compiler::new(&tokenizer(), VOCAB).expect("a tokenizer")
}

fn schema(schema: &Value) -> Grammar {
    Grammar::JsonSchema(schema.to_string())
}

fn text_of(tokens: &[u32]) -> Vec<u8> {
    let bytes = |token: &u32| match token {
        0..=255 => vec![*token as u8],
        _ => LONGER[*token as usize - 256].as_bytes().to_vec(),
    };
    tokens.iter().flat_map(bytes).collect()
}

fn allowed(mask: &[u32]) -> Vec<u32> {
    let ids = 0..mask.len() as u32 * 32;
    ids.filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
        .collect()
}

fn people() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    })
}

#[test]
fn an_output_that_is_whole_ends_and_ends_may_come_only_where_it_is() {
    let compiler = compiler();
    let mut matcher = compiler
        .compile(&Grammar::Regex("[0-9]{3}".to_owned()), &[END, VOCAB + 7])
        .expect("compiles");
    for digit in [b'1', b'2', b'3'] {
        assert!(!matcher.is_whole());
        let mask = matcher.mask().expect("digits");
        assert!(mask.len() == VOCAB.div_ceil(32) as usize && !allowed(&mask).contains(&END));
        assert!(allowed(&mask).contains(&u32::from(digit)));
        matcher.accept(u32::from(digit)).expect("a digit");
    }
    assert!(matcher.is_whole());

    let mut open = compiler
        .compile(&Grammar::Regex("[0-9]+".to_owned()), &[END])
        .expect("compiles");
    open.accept(u32::from(b'1')).expect("a digit");
    let mask = open.mask().expect("more digits, or the end");
    assert!(allowed(&mask).contains(&END) && !open.is_whole());
    assert!(allowed(&mask).iter().all(|token| *token < VOCAB));
    let error = open.accept(u32::from(b'x')).expect_err("no digit");
    assert!(matches!(error, GrammarError::Token(_)), "{error}");
    assert!(!open.is_whole());
}

#[test]
fn special_tokens_come_only_where_the_grammar_names_them() {
    let compiler = compiler();
    let free = Grammar::Regex("(?s:.*)".to_owned());
    let mask = compiler.compile(&free, &[]).expect("compiles").mask();
    let mask = allowed(&mask.expect("anything"));
    assert!(mask.contains(&256) && !mask.contains(&CALL) && !mask.contains(&END));
    let named = Grammar::Lark("start: <|call|> /[a-z]+/".to_owned());
    let mask = compiler.compile(&named, &[]).expect("compiles").mask();
    assert_eq!(allowed(&mask.expect("one")), [CALL]);
    let unknown = Grammar::Lark("start: <|nobody|> /[a-z]+/".to_owned());
    let error = compiler.compile(&unknown, &[]).expect_err("not there");
    assert!(error.to_string().contains("nobody"), "{error}");
}

#[test]
fn a_check_takes_any_id_for_a_token() {
    let named = |id: usize| Grammar::Lark(format!("start: <[{id}]> %json {{\"type\": \"null\"}}"));
    for id in [0, 65, 200_000] {
        assert_eq!(check(&named(id)), Ok(()), "{id}");
    }
    assert!(check(&named(1 << 30)).is_err());
}

#[test]
fn a_branch_goes_its_own_way() {
    let compiler = compiler();
    let mut one = compiler
        .compile(&Grammar::Regex("a*b".to_owned()), &[])
        .expect("compiles");
    one.accept(u32::from(b'a')).expect("an a");
    let mut other = one.branch();
    other.accept(u32::from(b'b')).expect("a b");
    assert!(other.is_whole() && !one.is_whole());
    assert!(allowed(&one.mask().expect("more")).contains(&u32::from(b'a')));
}

#[test]
fn what_cannot_be_compiled_is_refused_with_its_place() {
    let refused = |grammar: Grammar, words: &[&str]| {
        let error = check(&grammar)
            .expect_err("it cannot be compiled")
            .to_string();
        for word in words {
            assert!(error.contains(word), "{word}: {error}");
        }
        assert!(error.len() < 700 && !error.contains('\n'), "{error}");
        assert!(compiler().compile(&grammar, &[]).is_err());
    };
    let json_schema = |text: &str| Grammar::JsonSchema(text.to_owned());
    refused(json_schema("{\"type\": "), &["valid JSON", "line 1"]);
    refused(json_schema(r#"{"type": "strnig"}"#), &["strnig"]);
    refused(
        json_schema(
            r#"{"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}"#,
        ),
        &["("],
    );
    refused(json_schema(r##"{"$ref": "#/$defs/none"}"##), &["none"]);
    refused(json_schema(r#"{"enum": []}"#), &[]);
    refused(Grammar::Regex("(a".to_owned()), &[]);
    refused(Grammar::Lark("start: nothing".to_owned()), &["nothing"]);
    refused(Grammar::Lark(String::new()), &[]);
}

/// Grammars that would cost minutes or gigabytes are refused at a bound, or are cheap after all.
#[test]
fn hostile_grammars_meet_a_bound() {
    let deep = format!("{}{}", r#"{"items":"#.repeat(5_000), "}".repeat(5_000));
    let wide: Vec<String> = (0..20_000).map(|i| format!("\"word{i}\"")).collect();
    let mut doubled = json!({"type": "string"});
    for _ in 0..40 {
        doubled =
            json!({"anyOf": [doubled.clone(), {"type": "null"}], "allOf": [{"maxLength": 9}]});
    }
    for grammar in [
        Grammar::Regex("((((a{1,100}){1,100}){1,100}){1,100})b".to_owned()),
        Grammar::Regex("(.*a.{200}){50}".to_owned()),
        Grammar::JsonSchema(deep),
        Grammar::JsonSchema(format!("{{\"enum\":[{}]}}", wide.join(","))),
        Grammar::JsonSchema(r#"{"type":"array","minItems":1000000000}"#.to_owned()),
        Grammar::JsonSchema(r#"{"type":"string","minLength":1000000000}"#.to_owned()),
        schema(&doubled),
        Grammar::Lark("start: a a a a\na: start start | \"x\"".to_owned()),
    ] {
        let verdict = check(&grammar);
        if verdict.is_ok() {
            let mut matcher = compiler().compile(&grammar, &[END]).expect("checked");
            for _ in 0..100 {
                let Ok(mask) = matcher.mask() else { break };
                let Some(token) = allowed(&mask).into_iter().rev().find(|t| *t < 256) else {
                    break;
                };
                if matcher.accept(token).is_err() || matcher.is_whole() {
                    break;
                }
            }
        }
    }
}

#[test]
fn a_tokenizer_that_it_does_not_know_is_refused() {
    for text in [
        "",
        "{}",
        "[]",
        r#"{"decoder":{"type":"WordPiece"},"added_tokens":[],"model":{"vocab":{}}}"#,
    ] {
        let error = Compiler::new(text.as_bytes(), 10).expect_err(text);
        assert!(matches!(error, GrammarError::Tokenizer(_)), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is chosen among the tokens that masks allow: an output that ends is valid.
    #[test]
    fn every_output_that_ends_is_valid(dice in prop::collection::vec(any::<u32>(), 400)) {
        let mut matcher = compiler().compile(&schema(&people()), &[END]).expect("compiles");
        let mut output = Vec::new();
        let mut ended = false;
        for roll in dice {
            let mask = allowed(&matcher.mask().expect("something may come"));
            // Closing marks more often, so that most outputs end.
            let closing: Vec<u32> = mask.iter().copied().filter(|t| {
                matches!(t, &END | 34 | 44 | 93 | 125 | 257 | 259 | 265)
            }).collect();
            let choices = if roll % 3 == 0 && !closing.is_empty() { &closing } else { &mask };
            let token = choices[(roll / 3) as usize % choices.len()];
            if token == END {
                ended = true;
                break;
            }
            matcher.accept(token).expect("the mask allows it");
            output.push(token);
            if matcher.is_whole() {
                ended = true;
                break;
            }
        }
        if ended {
            let value: Value = serde_json::from_slice(&text_of(&output)).expect("JSON");
            prop_assert!(value["name"].as_str().is_some_and(|name| name.chars().count() <= 12));
            prop_assert!(value["age"].as_u64().is_some_and(|age| age <= 150));
            prop_assert!(value.as_object().is_some_and(|all| all.keys().all(|key| people()["properties"].get(key).is_some())));
        }
    }

    /// Whatever way a valid text is cut into tokens: each is in the mask before it, and the text is whole at its end.
    #[test]
    fn every_cut_of_a_valid_text_is_allowed(name in "[a-z \\-é]{0,12}", age in 0u8..150, cuts in any::<u64>()) {
        let text = json!({"name": name, "age": age}).to_string();
        let mut matcher = compiler().compile(&schema(&people()), &[END]).expect("compiles");
        let (mut rest, mut cuts) = (text.as_bytes(), cuts);
        while !rest.is_empty() {
            let longer = (256..).zip(LONGER).find(|(_, longer)| rest.starts_with(longer.as_bytes()));
            let (token, len) = match longer {
                Some((id, longer)) if cuts & 1 == 1 => (id, longer.len()),
                _ => (u32::from(rest[0]), 1),
            };
            cuts = cuts.rotate_right(1);
            let mask = matcher.mask().expect("something may come");
            prop_assert!(allowed(&mask).contains(&token), "{token} at {:?}", String::from_utf8_lossy(rest));
            matcher.accept(token).expect("allowed");
            rest = &rest[len..];
        }
        prop_assert!(matcher.is_whole() || allowed(&matcher.mask().expect("the end")).contains(&END));
    }
}
