//! The identity of a model: what two workers must agree on before one reads the other's KV.

use sha2::{Digest, Sha256};

use crate::hex::hex;
use crate::spec::ModelSpec;
use crate::weights::TensorSpec;

/// SHA-256 over the spec, the tokenizer and all weights, unsharded, in the order of
/// [`crate::expected_tensors`].
///
/// Independent of the tensor-parallel size and of the limits a directory was prepared with, so that
/// differently sharded copies of one model agree.
#[derive(Clone)]
pub struct FingerprintHasher(Sha256);

impl FingerprintHasher {
    /// Begin with what comes before the weights. `spec` is the model's own, before any limit on its
    /// context length; `tokenizer` is the content of `tokenizer.json`.
    pub fn new(spec: &ModelSpec, tokenizer: &[u8]) -> Self {
        let spec = serde_json::to_vec(spec).expect("a spec is plain numbers and strings");
        let mut hasher = FingerprintHasher(Sha256::new());
        hasher.part("baton model fingerprint 1", &[]);
        hasher.part("spec", &spec);
        hasher.part("tokenizer", tokenizer);
        hasher
    }

    /// A tensor comes next; its whole content follows through [`Self::data`].
    pub fn tensor(&mut self, tensor: &TensorSpec) {
        self.part(&tensor.name, format!("BF16 {:?}", tensor.shape).as_bytes());
    }

    /// Bytes of the current tensor, in row order, in pieces of any size.
    pub fn data(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The fingerprint, 64 hexadecimal digits.
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }

    /// Lengths first, so that no two sequences of parts read the same.
    fn part(&mut self, name: &str, content: &[u8]) {
        self.0.update((name.len() as u64).to_le_bytes());
        self.0.update(name.as_bytes());
        self.0.update((content.len() as u64).to_le_bytes());
        self.0.update(content);
    }
}
