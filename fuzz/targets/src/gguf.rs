//! GGUF files.

use std::cell::RefCell;

use baton_model::ModelDir;
use baton_model_prep::{PrepareOptions, prepare};
use tempfile::TempDir;

use crate::fixture;

thread_local! {
    static DIRECTORY: RefCell<TempDir> = RefCell::new(fixture::directory());
}

/// Prepares a model from the bytes of a GGUF file. What can be planned and is whole must come out as a model directory
/// that opens; what cannot is refused by a sentence that names the file.
pub fn gguf(data: &[u8]) {
    DIRECTORY.with_borrow(|directory| {
        let path = fixture::file(directory, "model.gguf", data);
        let out = directory.path().join("out");
        let mut options = PrepareOptions::new(path.to_string_lossy(), &out);
        options.dry_run = true;
        if let Err(error) = prepare(options.clone()) {
            let error = error.to_string();
            assert!(error.contains("model.gguf"), "{error}");
            return;
        }
        options.dry_run = false;
        let prepared = prepare(options);
        if prepared.is_ok() {
            let model = ModelDir::open(&out).expect("what was prepared opens");
            model.weights(0).expect("and has its weights");
            std::fs::remove_dir_all(&out).expect("the target's own directory");
        }
    });
}
