//! Safetensors files.

use std::cell::RefCell;

use baton_model::SafetensorsFile;
use tempfile::TempDir;

use crate::fixture;

thread_local! {
    static DIRECTORY: RefCell<TempDir> = RefCell::new(fixture::directory());
}

/// Opens a file. Its tensors lie apart from each other and are as long as they say.
pub fn safetensors(data: &[u8]) {
    DIRECTORY.with_borrow(|directory| {
        // A new file each time: the last one may be mapped still.
        let path = directory.path().join("model.safetensors");
        let _ = std::fs::remove_file(&path);
        fixture::file(directory, "model.safetensors", data);
        let file = match SafetensorsFile::open(&path) {
            Ok(file) => file,
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("model.safetensors"), "{error}");
                return;
            }
        };
        let mut bytes = 0;
        for name in file.names() {
            if let Ok(tensor) = file.tensor(name) {
                let elements: usize = tensor.shape.iter().product();
                assert_eq!(tensor.bytes.len(), elements * tensor.dtype.size());
                bytes += tensor.bytes.len();
            }
        }
        assert!(bytes <= data.len());
    });
}
