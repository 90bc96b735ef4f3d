//! `config.json` with its quantization, and `manifest.json`.

use std::cell::RefCell;

use baton_model::{
    Mixer, ModelDir, ModelSpec, check_tp_size, checkpoint_format, eos_token_ids, expected_tensors,
    parse_config, stored_tensors,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::fixture;

thread_local! {
    static DIRECTORY: RefCell<TempDir> = RefCell::new(fixture::directory());
}

/// Reads the bytes as each of the two. A specification that was taken can be computed with: nothing overflows.
pub fn model_config(data: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<Value>(data) {
        let _ = checkpoint_format(&value);
        let _ = eos_token_ids(&value);
    }
    if let Ok(spec) = parse_config(data) {
        let elements = expected_tensors(&spec).iter().fold(0u128, |sum, tensor| {
            sum + tensor.shape.iter().map(|n| *n as u128).product::<u128>()
        });
        assert!(elements < 1 << 60);
        for kind in spec.kinds() {
            let Mixer::Attention(attention) = &kind.mixer;
            let (rope, dim) = (&attention.rope, attention.head_dim);
            assert!(rope.inverse_frequencies(dim).len() == dim / 2);
        }
        // A manifest holds it, and gives it back.
        let written = serde_json::to_vec(&spec).expect("a spec is plain numbers and strings");
        let read: ModelSpec = serde_json::from_slice(&written).expect("what was written");
        assert!(read == spec);
        if let Ok(value) = serde_json::from_slice::<Value>(data)
            && let Ok(format) = checkpoint_format(&value)
        {
            for tp_size in [1, 2, 8] {
                if check_tp_size(&spec, format, tp_size).is_ok() {
                    let _ = stored_tensors(&spec, format, tp_size);
                }
            }
        }
        for block_tokens in [1, 32, 1 << 16] {
            let kv = baton_engine::kv_geometry(&spec, block_tokens);
            let _ = baton_engine::uniform_arena(&spec, &kv, 1 << 40);
        }
    }
    DIRECTORY.with_borrow(|directory| {
        fixture::file(directory, "manifest.json", data);
        if let Ok(model) = ModelDir::open(directory.path()) {
            let _ = model.verify();
        }
    });
}
