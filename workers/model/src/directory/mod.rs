//! A prepared model directory.

mod fingerprint;
mod manifest;
mod rank_weights;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::ModelError;
use crate::hex::hex;
use crate::spec::ModelSpec;
use crate::weights::stored_tensors;

pub use fingerprint::FingerprintHasher;
pub use manifest::{FileEntry, MANIFEST_FORMAT, Manifest};
pub use rank_weights::Weights;

/// What the directory holds. Written last.
pub const MANIFEST: &str = "manifest.json";
/// Hugging Face's model configuration.
pub const CONFIG: &str = "config.json";
/// Hugging Face's tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// Hugging Face's tokenizer configuration.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Jinja chat template; absent for models without one.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Hugging Face's generation configuration.
pub const GENERATION_CONFIG: &str = "generation_config.json";

/// Largest manifest that is read.
const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// Name of the weight file of one rank.
pub fn rank_file_name(rank: usize) -> String {
    format!("rank{rank}.safetensors")
}

/// An opened model directory.
#[derive(Clone, Debug)]
pub struct ModelDir {
    /// Where it is.
    pub path: PathBuf,
    /// What it holds.
    pub manifest: Manifest,
}

impl ModelDir {
    /// Open a directory: reads the manifest and checks that every file is there at its size.
    /// [`Self::verify`] checks their content too.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        let path = path.as_ref();
        let refuse = |reason: String| ModelError::directory(path, reason);
        let manifest_path = path.join(MANIFEST);
        let metadata = match fs::metadata(&manifest_path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(refuse(format!(
                    "it has no {MANIFEST}; make it with `baton model-prep`"
                )));
            }
            Err(e) => return Err(ModelError::io("read", &manifest_path, e)),
        };
        if metadata.len() > MANIFEST_BYTES_MAX {
            return Err(refuse(format!(
                "its {MANIFEST} is {} bytes long",
                metadata.len()
            )));
        }
        let text =
            fs::read(&manifest_path).map_err(|e| ModelError::io("read", &manifest_path, e))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|e| refuse(format!("its {MANIFEST} cannot be read: {e}")))?;
        manifest.check().map_err(refuse)?;

        for required in [CONFIG, TOKENIZER]
            .map(str::to_owned)
            .into_iter()
            .chain((0..manifest.tp_size).map(rank_file_name))
        {
            if !manifest.files.iter().any(|f| f.name == required) {
                return Err(refuse(format!("its manifest does not list {required}")));
            }
        }
        for file in &manifest.files {
            let found = fs::metadata(path.join(&file.name)).map(|m| m.len());
            match found {
                Ok(bytes) if bytes == file.bytes => {}
                Ok(bytes) => {
                    return Err(refuse(format!(
                        "{} is {bytes} bytes long, the manifest says {}; prepare the model again",
                        file.name, file.bytes
                    )));
                }
                Err(e) => return Err(ModelError::io("read", &path.join(&file.name), e)),
            }
        }
        Ok(ModelDir {
            path: path.to_owned(),
            manifest,
        })
    }

    /// Read every file and compare its checksum. Takes as long as reading the model does.
    pub fn verify(&self) -> Result<(), ModelError> {
        for file in &self.manifest.files {
            let path = self.path.join(&file.name);
            let found = hash_file(&path)?;
            if found != file.sha256 {
                return Err(ModelError::file(
                    &path,
                    format!(
                        "has SHA-256 {found}, the manifest says {}; prepare the model again",
                        file.sha256
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The model in numbers.
    pub fn spec(&self) -> &ModelSpec {
        &self.manifest.spec
    }

    /// Map one rank's weights and check that every tensor of the model is there, in its format and shape.
    pub fn weights(&self, rank: usize) -> Result<Weights, ModelError> {
        let tp_size = self.manifest.tp_size;
        if rank >= tp_size {
            return Err(ModelError::directory(
                &self.path,
                format!(
                    "it has {tp_size} ranks, there is no rank {rank}; prepare it with a larger --tp-size"
                ),
            ));
        }
        let path = self.path.join(rank_file_name(rank));
        let format = self.manifest.dtype;
        Weights::open(&path, format, stored_tensors(self.spec(), format, tp_size))
    }
}

/// SHA-256 of a file, 64 hexadecimal digits.
pub fn hash_file(path: &Path) -> Result<String, ModelError> {
    let mut file = File::open(path).map_err(|e| ModelError::io("open", path, e))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ModelError::io("read", path, e)),
        }
    }
}
