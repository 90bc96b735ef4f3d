//! A model directory as the API server reads it.

use std::cell::RefCell;

use baton_api_server::fuzzing::{Detokenizer, ModelText, Until};
use serde_json::json;
use tempfile::TempDir;

use crate::fixture;

/// What stands between the parts: no byte of UTF-8.
const BETWEEN: u8 = 0xff;

thread_local! {
    static DIRECTORY: RefCell<TempDir> = RefCell::new(fixture::directory());
}

/// The parts, with 0xff between them: `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, chat template,
/// text. Opens the first four and, if that works, puts the text through them.
pub fn model_text(data: &[u8]) {
    let mut parts = data.split(|byte| *byte == BETWEEN);
    let mut next = || parts.next().unwrap_or_default();
    DIRECTORY.with_borrow(|directory| {
        let manifest = fixture::manifest_json().to_string();
        fixture::file(directory, "manifest.json", manifest.as_bytes());
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "chat_template.jinja",
        ] {
            fixture::file(directory, name, next());
        }
        let Ok(model) = ModelText::open(directory.path()) else {
            return;
        };
        let bytes = next();
        let text = String::from_utf8_lossy(bytes);
        let messages = vec![json!({"role": "user", "content": text})];
        if let Ok(prompt) = model.render_chat(messages, &Until::forever()) {
            let _ = model.encode_chat(&prompt, &Until::forever());
        }
        if let Ok(tokens) = model.encode(&text, true, &Until::forever()) {
            let _ = model.text(&tokens);
        }
        // Token ids that nobody promised to be in the vocabulary.
        let mut out = String::new();
        let mut detokenizer = Detokenizer::default();
        let count = model.vocabulary.count() as u32;
        for byte in bytes {
            let token = match byte {
                0xf0.. => u32::MAX - u32::from(*byte),
                _ => count.wrapping_sub(u32::from(*byte)),
            };
            let _ = model.token_text(token);
            detokenizer.push(&model.vocabulary, token, &mut out);
        }
        detokenizer.finish(&model.vocabulary, &mut out);
    });
}
