//! SentencePiece BPE with byte fallback (`llama`): Llama 2, TinyLlama, Mistral.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::byte_level::merge_pairs;
use super::{Parts, TokenKind, Vocabulary};
use crate::gguf::metadata::{Metadata, required};

/// SentencePiece's mark for a space.
const SPACE: &str = "\u{2581}";

pub(super) fn parts(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    unknown: Option<u32>,
) -> Result<Parts, String> {
    const MERGES: &str = "tokenizer.ggml.merges";
    const SCORES: &str = "tokenizer.ggml.scores";
    let merges: Vec<(&str, &str)> = match metadata.texts(MERGES)? {
        Some(merges) => merge_pairs(merges, MERGES)?,
        None => {
            let scores = required(SCORES, metadata.floats(SCORES))?;
            if scores.len() != vocabulary.tokens.len() {
                return Err(format!(
                    "`{SCORES}` has {} entries for {} tokens",
                    scores.len(),
                    vocabulary.tokens.len()
                ));
            }
            merges_from_scores(vocabulary, scores)
        }
    };
    let unknown = unknown.or_else(|| {
        let id = vocabulary
            .kinds
            .iter()
            .position(|&kind| kind == TokenKind::Unknown)?;
        u32::try_from(id).ok()
    });
    let unknown =
        unknown.ok_or("the metadata names no unknown token (`tokenizer.ggml.unknown_token_id`)")?;

    let mark_spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let add_space = metadata
        .flag("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let normalizer = if add_space {
        json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": SPACE }, mark_spaces] })
    } else {
        mark_spaces
    };
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if add_space {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(Parts {
        normalizer,
        pre_tokenizer: Value::Null,
        post_processor: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": vocabulary.tokens[unknown as usize],
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.ids()?,
            "merges": merges,
        }),
        adds_bos: true,
    })
}

/// SentencePiece merges whatever pair makes the token with the highest score. As a list of pairs: every
/// way to cut a token into two tokens, ordered by the score of the whole, highest first.
fn merges_from_scores<'a>(vocabulary: &Vocabulary<'a>, scores: &[f64]) -> Vec<(&'a str, &'a str)> {
    let mergeable = |kind: TokenKind| matches!(kind, TokenKind::Normal | TokenKind::UserDefined);
    let tokens = || {
        let all = vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate();
        all.filter(|(_, (_, kind))| mergeable(**kind))
            .map(|(id, (text, _))| (id, text.as_str()))
    };
    let ids: HashMap<&str, usize> = tokens().map(|(id, text)| (text, id)).collect();
    let mut merges = Vec::new();
    for (id, text) in tokens() {
        let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        let mut pairs: Vec<_> = cuts
            .filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?, left, right)))
            .collect();
        pairs.sort_by_key(|&(left, right, ..)| (left, right));
        merges.extend(
            pairs
                .into_iter()
                .map(|(_, _, left, right)| (scores[id], left, right)),
        );
    }
    // Stable; among equal scores the longer left part first, as Transformers orders them.
    merges.sort_by(|a, b| {
        let lengths = |m: &(f64, &str, &str)| (m.1.chars().count(), m.2.chars().count());
        b.0.total_cmp(&a.0)
            .then_with(|| lengths(b).cmp(&lengths(a)))
    });
    merges
        .into_iter()
        .map(|(_, left, right)| (left, right))
        .collect()
}
