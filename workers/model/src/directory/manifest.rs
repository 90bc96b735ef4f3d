//! `manifest.json`: what a model directory holds.

use serde::{Deserialize, Serialize};

use crate::spec::ModelSpec;
use crate::weights::{WeightFormat, check_tp_size};

/// Format number of the manifests written and read here.
pub const MANIFEST_FORMAT: u32 = 1;

/// The last file written into a model directory: a directory with one is whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// Name the model is served under.
    pub name: String,
    /// Identity of the model, 64 hexadecimal digits; see [`crate::FingerprintHasher`]. The same in every
    /// `dtype` it was prepared in, so that workers of different precision can pass KV on.
    pub fingerprint: String,
    /// Format of the projections; all other weights are BF16.
    pub dtype: WeightFormat,
    /// Ranks the weights are divided over.
    pub tp_size: usize,
    /// Longest sequence to serve, in tokens; the same as `spec.tokens_max`.
    pub tokens_max: usize,
    /// Most sequences to serve at once; `None` leaves it to the worker.
    pub batch_max: Option<usize>,
    /// The model in numbers.
    pub spec: ModelSpec,
    /// Token that begins a sequence, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer; at least one.
    pub eos_token_ids: Vec<u32>,
    /// Every other file of the directory.
    pub files: Vec<FileEntry>,
    /// Where the model came from, for people.
    pub source: String,
    /// Names, sizes and times of the source files (hashed), to recognise them without reading them.
    #[serde(default)]
    pub source_stamp: String,
}

/// One file of a model directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its plain name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, 64 hexadecimal digits.
    pub sha256: String,
}

impl Manifest {
    /// Why this manifest cannot be used, if so.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.format != MANIFEST_FORMAT {
            return Err(format!(
                "its manifest has format {}, this program reads {MANIFEST_FORMAT}; prepare the model again",
                self.format
            ));
        }
        if self.fingerprint.len() != 64 || !self.fingerprint.bytes().all(|b| b.is_ascii_hexdigit())
        {
            return Err("its fingerprint is not 64 hexadecimal digits".to_owned());
        }
        check_tp_size(&self.spec, self.dtype, self.tp_size).map_err(|e| e.to_string())?;
        if self.tokens_max == 0 || self.tokens_max != self.spec.tokens_max {
            return Err(format!(
                "its longest sequence is {} tokens in one place and {} in another",
                self.tokens_max, self.spec.tokens_max
            ));
        }
        for file in &self.files {
            let plain = !file.name.is_empty()
                && !file.name.starts_with('.')
                && !file.name.contains(['/', '\\', '\0']);
            if !plain {
                return Err(format!(
                    "its manifest lists {:?}, which is no plain file name",
                    file.name
                ));
            }
        }
        Ok(())
    }
}
