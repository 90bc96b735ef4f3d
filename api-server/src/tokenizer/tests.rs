//! The golden chats and texts, through a directory prepared from the real GGUF.

// Where the real model of the tests is, as the tests of model-prep say it.
#[path = "../../../model-prep/tests/common/mod.rs"]
mod common;

use baton_model_prep::{PrepareOptions, prepare};

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

    let chats: Vec<Chat> = golden("chat.json");
    assert!(!chats.is_empty());
    for chat in &chats {
        let rendered = model.render_chat(&chat.messages).unwrap();
        assert_eq!(rendered, chat.rendered, "of {:?}", chat.messages);
        let ids = model.encode(&rendered, false).unwrap();
        assert_eq!(ids, chat.ids, "of {rendered:?}");
    }

    let texts: Vec<Text> = golden("tokens.json");
    assert!(!texts.is_empty());
    for Text { text, ids } in &texts {
        assert_eq!(model.encode(text, false).unwrap(), *ids, "of {text:?}");
        // The table of the fast road against the tokenizer's own decoder, special tokens left out by both.
        let decoded = model.tokenizer.decode(ids, true).unwrap();
        assert_eq!(model.text(ids), decoded, "of {ids:?}");
    }
}
