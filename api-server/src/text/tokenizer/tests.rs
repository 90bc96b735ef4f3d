//! The golden chats and texts, through a directory prepared from the real GGUF.

// Where the real model of the tests is, as the tests of model-prep say it.
#[path = "../../../../model-prep/tests/common/mod.rs"]
mod common;

use baton_model_prep::{PrepareOptions, prepare};

use super::fixtures::{BOS, byte_level, opened_with};
use super::*;

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Value>,
    rendered: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
}

fn golden<T: for<'de> Deserialize<'de>>(name: &str) -> Vec<T> {
    let path = common::root().join("tests/golden").join(name);
    let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn smollm2_chats_and_texts_are_the_originals() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path().join("smollm2");
    let gguf = common::smollm2_gguf();
    prepare(PrepareOptions::new(gguf.to_str().unwrap(), &directory)).unwrap();
    let model = ModelText::open(&directory).unwrap();

    let forever = Until::forever();
    let chats: Vec<Chat> = golden("chat.json");
    assert!(!chats.is_empty());
    for chat in &chats {
        let prompt = model.render_chat(chat.messages.clone(), &forever).unwrap();
        assert_eq!(prompt.text(), chat.rendered, "of {:?}", chat.messages);
        let ids = model.encode_chat(&prompt, &forever).unwrap();
        assert_eq!(ids, chat.ids, "of {prompt:?}");
    }

    let texts: Vec<Text> = golden("tokens.json");
    assert!(!texts.is_empty());
    for Text { text, ids } in &texts {
        assert_eq!(
            model.encode(text, false, &forever).unwrap(),
            *ids,
            "of {text:?}"
        );
        // The table of the fast path against the tokenizer's own decoder, special tokens left out by both.
        let decoded = model.tokenizer.decode(ids, true).unwrap();
        assert_eq!(model.text(ids), decoded, "of {ids:?}");
    }
}

/// Every text of the golden ones, joined to a long one that is cut.
#[test]
fn a_long_text_in_pieces_has_the_tokens_of_the_whole() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path().join("smollm2");
    let gguf = common::smollm2_gguf();
    prepare(PrepareOptions::new(gguf.to_str().unwrap(), &directory)).unwrap();
    let mut model = ModelText::open(&directory).unwrap();
    model.tokens_max = u32::MAX;
    assert!(!model.cuts.is_empty() && model.ends.are_known());
    let texts: Vec<Text> = golden("tokens.json");
    let mut long = String::new();
    while long.len() < 3 * cuts::PIECE_BYTES {
        texts.iter().for_each(|text| long += &text.text);
        long += &"0123456789".repeat(100);
    }
    let forever = Until::forever();
    for special in [true, false] {
        let whole = model.tokenizer.encode_fast(long.as_str(), special).unwrap();
        let pieces = model.encode(&long, special, &forever).unwrap();
        assert_eq!(pieces, whole.get_ids(), "{special}");
    }
    // Where it cannot fit, no more is tokenised than shows that.
    model.tokens_max = 1_000;
    let refused = model.encode(&long, true, &forever).unwrap_err();
    assert!(matches!(refused, TextError::TooLong(tokens) if tokens > 1_000));
    let digits = "7".repeat(16 << 20);
    let refused = model.encode(&digits, true, &forever).unwrap_err();
    let TextError::TooLong(tokens) = refused else {
        panic!("{refused:?}");
    };
    let bound = model.token_bytes.most().unwrap();
    assert_eq!(
        tokens,
        digits.len().div_ceil(bound),
        "from its length alone"
    );
    let refused = TextError::TooLong(tokens).of("prompt", &model);
    assert_eq!(refused.kind, ErrorKind::ContextLength);
    // A word without an end is not begun.
    model.tokens_max = u32::MAX;
    let word = "a".repeat(UNCUT_BYTES_MAX + 1);
    let refused = model.encode(&word, true, &forever).unwrap_err();
    assert!(matches!(refused, TextError::Uncut));
    // Nor is one piece more, when the client has left.
    let left = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(600);
    let refused = model.encode(&long, true, &Until::new(deadline, left));
    assert!(matches!(refused, Err(TextError::Ended(_))));
}

/// A tokenizer with one token of this id.
pub(crate) fn opened(id: u32, defaults: &str) -> Result<ModelText, ApiServerError> {
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {"a": id}, "unk_token": "a"},
    });
    opened_with(&tokenizer.to_string(), defaults)
}

/// Found by fuzzing: the tokenizers crate panics over a decoder that breaks off.
#[test]
fn a_tokenizer_that_breaks_off_is_a_sentence() {
    let whole = r#"{"decoder": {"type": "Fuse"}, "model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"}}"#;
    assert!(opened_with(whole, "{}").is_ok());
    for end in 0..whole.len() {
        let error = opened_with(&whole[..end], "{}").err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

/// Found by fuzzing: the tokenizers crate panics over the first text that such a template is put around.
#[test]
fn a_special_token_that_nobody_defines_is_named() {
    let around = |defined: &str| {
        let special = serde_json::json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        let template = serde_json::json!({
            "type": "TemplateProcessing", "single": [special, text], "pair": [],
            "special_tokens": {defined: {"id": defined, "ids": [1], "tokens": [defined]}},
        });
        let tokenizer = serde_json::json!({
            "post_processor": {"type": "Sequence", "processors": [template]},
            "model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"},
        });
        opened_with(&tokenizer.to_string(), "{}")
    };
    let ids = around("<s>").unwrap().encode("a", true, &Until::forever());
    assert_eq!(ids.unwrap(), [1, 1]);
    let error = around("</s>").err().unwrap().to_string();
    assert!(error.contains("adds \"<s>\""), "{error}");
}

#[test]
fn a_token_of_an_impossible_id_takes_no_memory() {
    assert_eq!(opened(7, "{}").unwrap().vocabulary.count(), 8);
    for id in [VOCABULARY_MAX as u32, u32::MAX] {
        let error = opened(id, "{}").err().unwrap().to_string();
        assert!(error.contains(&format!("a token of id {id}")), "{error}");
    }
}

#[test]
fn defaults_that_workers_would_refuse_are_refused_at_the_start() {
    let sound = r#"{"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1.05, "do_sample": true}"#;
    assert_eq!(
        opened(1, sound).unwrap().defaults.repetition_penalty,
        Some(1.05)
    );
    for (defaults, name) in [
        (r#"{"temperature": -1}"#, "temperature"),
        (r#"{"temperature": 1e300}"#, "temperature"),
        (r#"{"top_p": 0}"#, "top_p"),
        (r#"{"top_p": 1.5}"#, "top_p"),
        (r#"{"min_p": -0.1}"#, "min_p"),
        (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
        (r#"{"repetition_penalty": 1e-40}"#, "repetition_penalty"),
        (r#"{"top_k": 4294967296}"#, "top_k"),
    ] {
        let error = opened(1, defaults).err().unwrap().to_string();
        assert!(
            error.contains("generation_config.json") && error.contains(name),
            "{error}"
        );
    }
}

#[test]
fn a_special_token_is_known_by_its_text() {
    let tokenizer = byte_level(&[BOS, "<|call|>"], &["<tool_call>"]);
    let model = opened_with(&tokenizer.to_string(), "{}").unwrap();
    assert_eq!(model.special_token("<|call|>"), Some(257));
    // It is text to a grammar, though it is one token.
    assert_eq!(model.special_token("<tool_call>"), None);
    assert_eq!(model.special_token("a"), None);
}
