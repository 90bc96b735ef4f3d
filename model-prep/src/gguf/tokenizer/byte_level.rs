//! Byte-level BPE (`gpt2`): how text is cut before merging differs between models, and ids with it.

use serde_json::{Value, json};

use super::{Parts, Vocabulary};
use crate::gguf::metadata::{Metadata, required};

/// Llama 3's words: letters with one leading sign, numbers by three digits, signs, line ends, spaces.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen2's words: Llama 3's with digits one by one.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) fn parts(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Parts, String> {
    const PRE: &str = "tokenizer.ggml.pre";
    const MERGES: &str = "tokenizer.ggml.merges";
    let pre = required(PRE, metadata.text(PRE))?;
    let (pre_tokenizer, normalizer, ignore_merges) = match pre {
        "gpt-2" | "gpt2" => (byte_level(true), Value::Null, false),
        // Digits one by one, then GPT-2's words.
        "smollm" => (
            json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Digits", "individual_digits": true },
                byte_level(true),
            ]}),
            Value::Null,
            false,
        ),
        // A word that is a token stays one, whatever the merges say.
        "llama-bpe" | "llama3" | "llama-v3" => (split(LLAMA3_WORDS), Value::Null, true),
        "qwen2" => (split(QWEN2_WORDS), json!({ "type": "NFC" }), false),
        other => {
            return Err(format!(
                "its pre-tokenizer {other:?} (`{PRE}`) is not supported; gpt-2, smollm, llama-bpe and qwen2 are"
            ));
        }
    };
    let merges = required(MERGES, metadata.texts(MERGES))?;
    Ok(Parts {
        normalizer,
        pre_tokenizer,
        post_processor: json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true }),
        decoder: json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary.ids()?,
            "merges": merge_pairs(merges, MERGES)?,
        }),
        adds_bos: false,
    })
}

/// `"a b"` → `["a", "b"]`; neither part of a byte-level merge contains a space.
pub(super) fn merge_pairs<'a>(
    merges: &'a [String],
    key: &str,
) -> Result<Vec<(&'a str, &'a str)>, String> {
    merges
        .iter()
        .enumerate()
        .map(|(i, merge)| {
            merge
                .split_once(' ')
                .filter(|(left, right)| {
                    !left.is_empty() && !right.is_empty() && !right.contains(' ')
                })
                .ok_or_else(|| format!("entry {i} of `{key}`, {merge:?}, is no pair of tokens"))
        })
        .collect()
}

fn byte_level(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn split(words: &str) -> Value {
    json!({ "type": "Sequence", "pretokenizers": [
        { "type": "Split", "pattern": { "Regex": words }, "behavior": "Isolated", "invert": false },
        byte_level(false),
    ]})
}
