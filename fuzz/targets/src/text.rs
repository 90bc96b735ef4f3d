//! Text through tokenizers of every kind, token ids back to text, and stop strings in what comes.

use std::sync::OnceLock;

use baton_api_server::fuzzing::{Detokenizer, ModelText, StopMatcher, TextError, Until};
use serde_json::{Value, json};

use crate::fixture;

/// The first byte picks a tokenizer and how long pieces are; the rest is text, and token ids too.
pub fn text(data: &[u8]) {
    let Some((pick, bytes)) = data.split_first() else {
        return;
    };
    let models = models();
    let index = usize::from(*pick) % models.len();
    let model = &models[index];
    let text = String::from_utf8_lossy(bytes);
    let tokens = match model.encode(&text, false, &Until::forever()) {
        Ok(tokens) => tokens,
        Err(TextError::TooLong(_) | TextError::Uncut) => return,
        Err(error) => panic!("{error:?}"),
    };
    assert!(
        tokens
            .iter()
            .all(|token| (*token as usize) < model.vocabulary.count())
    );
    let again = model.text(&tokens);
    if index == 0
        && !fixture::SPECIAL
            .iter()
            .any(|special| text.contains(special))
    {
        assert_eq!(again, text, "bytes are bytes");
    }

    let ids: Vec<u32> = match pick & 0x80 {
        // Mostly known ones.
        0 => bytes.iter().map(|byte| u32::from(*byte)).collect(),
        _ => {
            let words = bytes.as_chunks::<4>().0.iter();
            words.map(|word| u32::from_le_bytes(*word)).collect()
        }
    };
    pushed(model, &ids, index == 0);
    stopped(&text, usize::from(pick >> 4) + 1);
}

/// However ids come, the text is the same, and where tokens are bytes it is what the bytes say.
fn pushed(model: &ModelText, ids: &[u32], exact: bool) {
    let vocabulary = &model.vocabulary;
    let mut out = String::new();
    let mut detokenizer = Detokenizer::default();
    for id in ids {
        detokenizer.push(vocabulary, *id, &mut out);
    }
    detokenizer.finish(vocabulary, &mut out);
    assert_eq!(out, model.text(ids));
    if exact {
        let plain = ids.iter().filter(|id| !vocabulary.special(**id));
        let bytes: Vec<u8> = plain
            .flat_map(|id| vocabulary.bytes(*id).to_vec())
            .collect();
        assert_eq!(out, String::from_utf8_lossy(&bytes));
    }
}

/// The first word is the stop string. In however many pieces the text comes, it ends before the first one.
fn stopped(text: &str, piece: usize) {
    let Some((stop, text)) = text.split_once(' ').filter(|(stop, _)| !stop.is_empty()) else {
        return;
    };
    let chars: Vec<char> = text.chars().collect();
    let mut matcher = StopMatcher::new(vec![stop.to_owned()]);
    let mut out = String::new();
    let found = chars
        .chunks(piece)
        .any(|piece| matcher.push(&piece.iter().collect::<String>(), &mut out));
    if !found {
        matcher.finish(&mut out);
    }
    match text.find(stop) {
        Some(at) => assert_eq!((found, out.as_str()), (true, &text[..at])),
        None => assert_eq!((found, out.as_str()), (false, text)),
    }
}

/// Bytes; SentencePiece with byte fallback; word pieces, whose decoder joins them in a way of its own.
fn models() -> &'static [ModelText; 3] {
    static MODELS: OnceLock<[ModelText; 3]> = OnceLock::new();
    MODELS.get_or_init(|| {
        [fixture::tokenizer_json(), sentence_pieces(), word_pieces()]
            .map(|tokenizer| open(&tokenizer))
    })
}

fn open(tokenizer: &Value) -> ModelText {
    let directory = fixture::directory();
    let manifest = fixture::manifest_json().to_string();
    fixture::file(&directory, "manifest.json", manifest.as_bytes());
    fixture::file(
        &directory,
        "tokenizer.json",
        tokenizer.to_string().as_bytes(),
    );
    ModelText::open(directory.path()).expect("the tokenizer of this file")
}

fn sentence_pieces() -> Value {
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = ["<unk>".to_owned()]
        .into_iter()
        .chain(bytes)
        .chain(["\u{2581}", "a", "b", "ab", "\u{2581}ab", "é", "漢"].map(str::to_owned));
    let vocabulary: serde_json::Map<String, Value> = pieces
        .zip(0..)
        .map(|(piece, id)| (piece, json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "pre_tokenizer": null,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": [["a", "b"], ["\u{2581}", "ab"]]},
    })
}

fn word_pieces() -> Value {
    let pieces = [
        "[UNK]",
        "hand",
        "##ball",
        "##s",
        "Köln",
        "runs",
        "🎉",
        "##\u{4e16}",
    ];
    let vocabulary: serde_json::Map<String, Value> = pieces
        .iter()
        .zip(0..)
        .map(|(piece, id)| ((*piece).to_owned(), json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 0, "content": "[UNK]", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary},
    })
}
