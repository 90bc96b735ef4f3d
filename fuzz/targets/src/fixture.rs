//! A small model, its workers' rules, and files in memory.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use baton_api_server::fuzzing::ModelText;
use baton_protocol::{KvGeometry, KvGroup, ModelFingerprint, ModelInfo};
use baton_worker::fuzzing::Checks;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The special tokens: beginning, end, padding in between.
pub(crate) const SPECIAL: [&str; 3] = ["<s>", "</s>", "<|im_end|>"];

/// Ids: the 256 bytes, then [`SPECIAL`].
pub(crate) const VOCAB: u32 = 256 + SPECIAL.len() as u32;

/// Longest sequence.
pub(crate) const TOKENS_MAX: u32 = 512;

/// Tokens of a block.
pub(crate) const BLOCK_TOKENS: u32 = 4;

/// Blocks of an arena: just enough for the longest sequence.
pub(crate) const BLOCKS: u32 = TOKENS_MAX / BLOCK_TOKENS;

/// A directory that lasts as long as the process, in memory where that can be.
pub(crate) fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a directory for the files that a target reads")
}

/// A file of this name with these bytes; each call overwrites what the last one wrote.
pub(crate) fn file(directory: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.path().join(name);
    std::fs::write(&path, bytes).expect("the target's own directory can be written");
    path
}

/// GPT-2's alphabet: a printable character for each byte.
pub(crate) fn alphabet() -> impl Iterator<Item = char> {
    let plain = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 256;
    (0..=255u32).filter_map(move |byte| {
        let code = match plain(byte) {
            true => byte,
            false => {
                next += 1;
                next - 1
            }
        };
        char::from_u32(code)
    })
}

/// A `tokenizer.json` whose tokens are the 256 bytes and [`SPECIAL`].
pub(crate) fn tokenizer_json() -> Value {
    let vocabulary: serde_json::Map<String, Value> = alphabet()
        .zip(0..)
        .map(|(c, id)| (c.to_string(), json!(id)))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let added: Vec<Value> = SPECIAL
        .iter()
        .zip(256..)
        .map(|(text, id)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "added_tokens": added,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": []},
    })
}

/// A `manifest.json` as far as the API server reads it.
pub(crate) fn manifest_json() -> Value {
    json!({"format": 1, "name": "m", "fingerprint": "ab".repeat(32), "tokens_max": TOKENS_MAX, "eos_token_ids": [257]})
}

/// The text side of the small model.
pub(crate) fn model() -> &'static ModelText {
    static MODEL: OnceLock<ModelText> = OnceLock::new();
    MODEL.get_or_init(|| {
        let directory = directory();
        let template =
            "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}";
        file(
            &directory,
            "manifest.json",
            manifest_json().to_string().as_bytes(),
        );
        file(
            &directory,
            "tokenizer.json",
            tokenizer_json().to_string().as_bytes(),
        );
        file(&directory, "chat_template.jinja", template.as_bytes());
        ModelText::open(directory.path()).expect("the small model opens")
    })
}

/// How the KV of the small model is laid out.
pub(crate) fn kv() -> KvGeometry {
    KvGeometry::bf16(
        BLOCK_TOKENS,
        vec![KvGroup {
            layers: 3,
            kv_heads: 4,
            head_dim: 2,
        }],
    )
}

/// What its workers can take.
pub(crate) fn checks() -> Checks {
    Checks {
        model: ModelInfo {
            name: "m".to_owned(),
            fingerprint: fingerprint(),
            tokens_max: TOKENS_MAX,
            vocab: VOCAB,
        },
        kv: kv(),
        blocks: BLOCKS,
    }
}

pub(crate) fn fingerprint() -> ModelFingerprint {
    ModelFingerprint::new("ab".repeat(32)).expect("64 hexadecimal digits")
}
