//! Rebuilt tokenizers on small vocabularies, against what other implementations make of the same ones:
//! Transformers' GPT2Tokenizer and Qwen2Tokenizer, a tokenizer with Llama 3's published pattern, and the
//! SentencePiece library, which also trained its vocabulary.

use baton_model::{Rope, RopeScaling, UniformSpec};
use serde::Deserialize;
use tokenizers::Tokenizer;

use super::{RebuiltTokenizer, rebuild};
use crate::gguf::metadata::{Metadata, Value};

#[derive(Deserialize)]
struct Fixtures {
    byte_level: ByteLevel,
    sentencepiece: SentencePiece,
}

#[derive(Deserialize)]
struct ByteLevel {
    /// The last two are control tokens, `<|begin|>` and `<|end|>`.
    tokens: Vec<String>,
    merges: Vec<String>,
    cases: std::collections::BTreeMap<String, Vec<Case>>,
}

#[derive(Deserialize)]
struct SentencePiece {
    tokens: Vec<String>,
    scores: Vec<f64>,
    types: Vec<i64>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

fn fixtures() -> Fixtures {
    serde_json::from_str(include_str!("../../../tests/data/tokenizers.json")).unwrap()
}

fn spec(vocab: usize) -> UniformSpec {
    UniformSpec {
        family: "llama".to_owned(),
        hidden: 8,
        intermediate: 8,
        layers: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        vocab,
        tokens_max: 64,
        rms_eps: 1e-5,
        rope: Rope {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        },
        qkv_bias: false,
        qk_norm: false,
        tied_embeddings: true,
        sliding_window: None,
    }
}

fn metadata(pairs: impl IntoIterator<Item = (&'static str, Value)>) -> Metadata {
    let mut metadata = Metadata::default();
    for (key, value) in pairs {
        assert!(metadata.insert(format!("tokenizer.ggml.{key}"), value));
    }
    metadata
}

fn byte_level(pre: &str, fixture: &ByteLevel) -> Metadata {
    let count = fixture.tokens.len();
    let mut types = vec![1; count];
    types[count - 2..].fill(3);
    metadata([
        ("model", Value::Text("gpt2".to_owned())),
        ("pre", Value::Text(pre.to_owned())),
        ("tokens", Value::Texts(fixture.tokens.clone())),
        ("token_type", Value::Integers(types)),
        ("merges", Value::Texts(fixture.merges.clone())),
        ("bos_token_id", Value::Unsigned(count as u64 - 2)),
        ("eos_token_id", Value::Unsigned(count as u64 - 1)),
    ])
}

fn sentence_piece(fixture: &SentencePiece) -> Vec<(&'static str, Value)> {
    vec![
        ("model", Value::Text("llama".to_owned())),
        ("tokens", Value::Texts(fixture.tokens.clone())),
        ("scores", Value::Floats(fixture.scores.clone())),
        ("token_type", Value::Integers(fixture.types.clone())),
        ("unknown_token_id", Value::Unsigned(0)),
        ("bos_token_id", Value::Unsigned(1)),
        ("eos_token_id", Value::Unsigned(2)),
    ]
}

fn loaded(rebuilt: &RebuiltTokenizer) -> Tokenizer {
    Tokenizer::from_bytes(&rebuilt.json).unwrap()
}

#[test]
fn byte_level_tokenizers_give_the_reference_ids() {
    let fixture = fixtures().byte_level;
    assert_eq!(fixture.cases.len(), 3);
    for (pre, cases) in &fixture.cases {
        let rebuilt = rebuild(&byte_level(pre, &fixture), &spec(fixture.tokens.len())).unwrap();
        let tokenizer = loaded(&rebuilt);
        for case in cases {
            let ids = tokenizer.encode(case.text.as_str(), false).unwrap();
            assert_eq!(ids.get_ids(), case.ids, "{pre}: ids of {:?}", case.text);
            let decoded = tokenizer.decode(&case.ids, false).unwrap();
            assert_eq!(decoded, case.decoded, "{pre}: text of {:?}", case.ids);
        }
        assert_eq!(rebuilt.eos_token_ids, [fixture.tokens.len() as u32 - 1]);
    }
}

#[test]
fn a_text_begins_with_bos_where_the_metadata_says_so() {
    let fixture = fixtures().byte_level;
    let bos = fixture.tokens.len() as u32 - 2;
    let spec = spec(fixture.tokens.len());
    for (add, expected) in [(true, Some(bos)), (false, None)] {
        let mut metadata = byte_level("llama-bpe", &fixture);
        metadata.insert("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(add));
        let tokenizer = loaded(&rebuild(&metadata, &spec).unwrap());
        let with = tokenizer.encode("the", true).unwrap();
        let without = tokenizer.encode("the", false).unwrap();
        let prefix = with.get_ids().len() - without.get_ids().len();
        assert_eq!(with.get_ids()[..prefix], Vec::from_iter(expected));
        assert_eq!(&with.get_ids()[prefix..], without.get_ids());
    }
}

#[test]
fn sentence_piece_gives_the_reference_ids_from_scores() {
    let fixture = fixtures().sentencepiece;
    let rebuilt = rebuild(
        &metadata(sentence_piece(&fixture)),
        &spec(fixture.tokens.len()),
    )
    .unwrap();
    let tokenizer = loaded(&rebuilt);
    for case in &fixture.cases {
        let ids = tokenizer.encode(case.text.as_str(), false).unwrap();
        assert_eq!(ids.get_ids(), case.ids, "ids of {:?}", case.text);
        let decoded = tokenizer.decode(&case.ids, false).unwrap();
        assert_eq!(decoded, case.decoded, "text of {:?}", case.ids);
        // This kind begins with bos unless told otherwise.
        let with = tokenizer.encode(case.text.as_str(), true).unwrap();
        assert_eq!(with.get_ids()[0], 1);
        assert_eq!(with.get_ids()[1..], case.ids);
    }
}

#[test]
fn sentence_piece_without_the_space_in_front() {
    let fixture = fixtures().sentencepiece;
    let mut pairs = sentence_piece(&fixture);
    pairs.push(("add_space_prefix", Value::Bool(false)));
    let tokenizer = loaded(&rebuild(&metadata(pairs), &spec(fixture.tokens.len())).unwrap());
    let ids = tokenizer.encode("the", false).unwrap();
    let pieces: Vec<&str> = ids
        .get_ids()
        .iter()
        .map(|&id| fixture.tokens[id as usize].as_str())
        .collect();
    assert_eq!(pieces.concat(), "the");
    assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), "the");
}

#[test]
fn what_is_wrong_with_the_metadata_is_said() {
    let fixture = fixtures();
    let pieces = fixture.sentencepiece;
    let with = |key: &str, value: Value| {
        let mut pairs = sentence_piece(&pieces);
        pairs.retain(|(k, _)| *k != key);
        let mut metadata = metadata(pairs);
        metadata.insert(format!("tokenizer.ggml.{key}"), value);
        rebuild(&metadata, &spec(pieces.tokens.len()))
            .err()
            .unwrap_or_default()
    };
    let mut twice = pieces.tokens.clone();
    twice[300] = twice[301].clone();
    // Cutting it everywhere would take hours.
    let mut endless = pieces.tokens.clone();
    endless[300] = "a".repeat(8 << 20);
    let cases = [
        (
            with("model", Value::Text("bert".to_owned())),
            "\"bert\" is not supported",
        ),
        (
            with("scores", Value::Floats(vec![0.0])),
            "has 1 entries for",
        ),
        (
            with("token_type", Value::Integers(vec![1])),
            "has 1 entries for",
        ),
        (
            with("token_type", Value::Text(String::new())),
            "should be a list of integers",
        ),
        (with("tokens", Value::Texts(Vec::new())), "has 0 entries"),
        (
            with("tokens", Value::Texts(twice)),
            "tokens 300 and 301 are both",
        ),
        (
            with("tokens", Value::Texts(endless)),
            "token 300 has 8388608 bytes",
        ),
        (
            with("eos_token_id", Value::Unsigned(1 << 20)),
            "is 1048576, there are",
        ),
        (
            with("merges", Value::Texts(vec!["abc".to_owned()])),
            "is no pair of tokens",
        ),
    ];
    for (error, expected) in cases {
        assert!(
            error.contains(expected),
            "{error:?} should contain {expected:?}"
        );
    }
    let bytes = fixture.byte_level;
    let error = rebuild(
        &byte_level("deepseek-llm", &bytes),
        &spec(bytes.tokens.len()),
    )
    .err()
    .unwrap();
    assert!(error.contains("pre-tokenizer \"deepseek-llm\""), "{error}");
    let error = rebuild(&byte_level("qwen2", &bytes), &spec(4))
        .err()
        .unwrap();
    assert!(error.contains("the embedding 4 rows"), "{error}");
}
