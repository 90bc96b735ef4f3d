//! Small models for tests: a tokenizer of every kind that matters, no weights.

use std::sync::OnceLock;

use serde_json::{Value, json};

use super::ModelText;
use crate::error::ApiServerError;

/// The beginning of a text, in every model here.
pub const BOS: &str = "<s>";

/// The end of a text, in every model here.
pub const EOS_TEXT: &str = "</s>";

/// Its id in [`byte_model`].
pub const EOS: u32 = 257;

/// Longest sequence of a model that takes every text of these tests.
const TOKENS_MAX: u32 = 1 << 20;

/// A model with this tokenizer and these generation defaults, which holds 8 tokens.
pub fn opened_with(tokenizer: &str, defaults: &str) -> Result<ModelText, ApiServerError> {
    opened(tokenizer, defaults, None)
}

/// A model with this tokenizer and this chat template.
pub fn with_template(tokenizer: &Value, template: &str) -> ModelText {
    let mut model = opened(&tokenizer.to_string(), "{}", Some(template)).unwrap();
    model.tokens_max = TOKENS_MAX;
    model
}

fn opened(
    tokenizer: &str,
    defaults: &str,
    template: Option<&str>,
) -> Result<ModelText, ApiServerError> {
    let directory = tempfile::tempdir().unwrap();
    let write = |file: &str, text: &str| std::fs::write(directory.path().join(file), text).unwrap();
    let manifest = json!({"name": "m", "fingerprint": "ab".repeat(32), "tokens_max": 8});
    write("manifest.json", &manifest.to_string());
    write("tokenizer.json", tokenizer);
    write("generation_config.json", defaults);
    let config = json!({"bos_token": BOS, "eos_token": EOS_TEXT});
    write("tokenizer_config.json", &config.to_string());
    if let Some(template) = template {
        write("chat_template.jinja", template);
    }
    ModelText::open(directory.path())
}

/// A model whose tokens are the 256 bytes and a few special ones: `<s>`, `</s>`, `<|im_start|>`, `<|im_end|>`.
pub fn byte_model() -> &'static ModelText {
    static MODEL: OnceLock<ModelText> = OnceLock::new();
    MODEL.get_or_init(|| {
        let tokenizer = byte_level(&[BOS, EOS_TEXT, "<|im_start|>", "<|im_end|>"], &[]);
        let mut model = opened_with(&tokenizer.to_string(), "{}").unwrap();
        model.tokens_max = TOKENS_MAX;
        model
    })
}

fn added(id: usize, text: &str, special: bool, normalized: bool) -> Value {
    json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": normalized, "special": special})
}

/// Byte-level BPE, as Llama 3, Qwen and SmolLM2 have it: the 256 bytes, a few merges, these special tokens, and these added
/// ones that are not special.
pub fn byte_level(special: &[&str], plain: &[&str]) -> Value {
    let printable = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 256;
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..=255u32 {
        let code = match printable(byte) {
            true => byte,
            false => {
                next += 1;
                next - 1
            }
        };
        vocabulary.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let tokens = special.iter().map(|text| (text, true));
    let tokens = tokens.chain(plain.iter().map(|text| (text, false)));
    let added: Vec<Value> = tokens
        .zip(256..)
        .map(|((text, special), id)| added(id, text, special, false))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "NFC"}, "added_tokens": added,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocabulary, "merges": []},
    })
}

/// SentencePiece with byte fallback. Its model knows the special tokens as words, and `merges` may make them, as converters
/// of old did.
fn sentence_piece(special: &[&str], normalized: bool, merges: &[[&str; 2]]) -> Value {
    let mut vocabulary = serde_json::Map::new();
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let special_texts = special.iter().map(|text| (*text).to_owned());
    let characters = (0x21..0x7fu8).map(|byte| char::from(byte).to_string());
    let merged = merges.iter().map(|pair| pair.concat());
    let more = ["\u{2581}", "\u{2581}<"].map(str::to_owned);
    let pieces = special_texts.chain(bytes).chain(characters).chain(more);
    for piece in pieces.chain(merged) {
        let id = vocabulary.len();
        vocabulary.entry(piece).or_insert(id.into());
    }
    let added: Vec<Value> = (0..)
        .zip(special)
        .map(|(id, text)| added(id, text, true, normalized))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": special[0], "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges},
    })
}

/// SentencePiece as Llama 2, TinyLlama and Zephyr have it: a normalizer puts a space before each piece of text. With
/// `normalized` its special tokens are looked for after that. Two of its merges make `</s>`.
pub fn prepending(special: &[&str], normalized: bool) -> Value {
    let mut json = sentence_piece(
        special,
        normalized,
        &[["<", "/"], ["</", "s"], ["</s", ">"]],
    );
    json["pre_tokenizer"] = Value::Null;
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
    json
}

/// SentencePiece as newer Mistral models have it: a space before the first word only.
pub fn metaspace(special: &[&str]) -> Value {
    let mut json = sentence_piece(special, false, &[]);
    json["normalizer"] = Value::Null;
    json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false});
    json
}
