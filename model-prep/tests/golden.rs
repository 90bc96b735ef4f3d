//! The tokenizer rebuilt from the SmolLM2 GGUF gives exactly the ids of the model's own.

mod common;

use baton_model::{ModelDir, TOKENIZER};
use baton_model_prep::{Outcome, PrepareOptions, prepare};
use serde::Deserialize;
use tokenizers::Tokenizer;

#[derive(Deserialize)]
struct TextCase {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct ChatCase {
    rendered: String,
    ids: Vec<u32>,
}

fn golden<T: for<'de> Deserialize<'de>>(name: &str) -> Vec<T> {
    let path = common::root().join("tests/golden").join(name);
    let text =
        std::fs::read(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn smollm2_is_prepared_whole_and_tokenizes_like_the_original() {
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("smollm2");
    let report = prepare(PrepareOptions::new(
        common::smollm2_gguf().to_str().unwrap(),
        &out,
    ))
    .unwrap();
    assert_eq!(report.outcome, Outcome::Written);

    let model = ModelDir::open(&out).unwrap();
    model.verify().unwrap();
    model.weights(0).unwrap();
    assert_eq!(model.manifest.name, "smollm2-135m-instruct");
    assert_eq!(model.manifest.bos_token_id, Some(1));
    assert_eq!(model.manifest.eos_token_ids, [2]);
    assert!(model.spec().tied_embeddings);

    // As its model card says; the file says nothing.
    let defaults = std::fs::read(out.join("generation_config.json")).unwrap();
    let defaults: serde_json::Value = serde_json::from_slice(&defaults).unwrap();
    assert_eq!(
        (&defaults["temperature"], &defaults["top_p"]),
        (&0.2.into(), &0.9.into())
    );
    assert!(
        report.plan.to_string().contains("model card"),
        "{}",
        report.plan
    );

    let tokenizer = Tokenizer::from_file(out.join(TOKENIZER)).unwrap();
    let texts: Vec<TextCase> = golden("tokens.json");
    assert!(texts.len() >= 600, "only {} golden texts", texts.len());
    for case in &texts {
        let ids = tokenizer.encode(case.text.as_str(), false).unwrap();
        assert_eq!(ids.get_ids(), case.ids, "ids of {:?}", case.text);
    }
    let chats: Vec<ChatCase> = golden("chat.json");
    for case in &chats {
        let ids = tokenizer.encode(case.rendered.as_str(), false).unwrap();
        assert_eq!(ids.get_ids(), case.ids, "ids of {:?}", case.rendered);
    }
}
