//! A GGUF file's tensors under Hugging Face's names, in Hugging Face's order of rows.

use std::collections::HashSet;
use std::ops::Range;

use baton_model::{ModelSpec, TensorSpec, WeightFormat, expected_tensors, names};

use super::container::Container;
use super::llama;
use crate::checkpoint::WeightSource;
use crate::error::PrepError;

/// Weight names inside a layer: Hugging Face's and GGUF's.
const LAYER_NAMES: [(&str, &str); 9] = [
    (names::ATTN_NORM, "attn_norm.weight"),
    (names::Q, "attn_q.weight"),
    (names::K, "attn_k.weight"),
    (names::V, "attn_v.weight"),
    (names::O, "attn_output.weight"),
    (names::MLP_NORM, "ffn_norm.weight"),
    (names::GATE, "ffn_gate.weight"),
    (names::UP, "ffn_up.weight"),
    (names::DOWN, "ffn_down.weight"),
];

pub(crate) struct GgufWeights {
    container: Container,
    head_dim: usize,
}

impl GgufWeights {
    /// Refuses a file with tensors that a Llama-type model does not have: leaving one out, a bias say,
    /// would make another model of it.
    pub(crate) fn new(
        container: Container,
        spec: &ModelSpec,
        head_dim: usize,
    ) -> Result<Self, PrepError> {
        let known: HashSet<String> = expected_tensors(spec)
            .iter()
            .map(|tensor| gguf_name(&tensor.name))
            .chain([llama::ROPE_FREQS.to_owned()])
            .collect();
        if let Some(name) = container
            .tensor_names()
            .filter(|&name| !known.contains(name))
            .min()
        {
            let reason = "belongs to no Llama model of this size, so the file cannot be used";
            return Err(PrepError::tensor(&container.path, name, reason));
        }
        Ok(GgufWeights {
            container,
            head_dim,
        })
    }
}

impl WeightSource for GgufWeights {
    fn check(&self, tensor: &TensorSpec, _kept: Option<WeightFormat>) -> Result<(), PrepError> {
        let name = gguf_name(&tensor.name);
        let fail = |reason: String| PrepError::tensor(&self.container.path, &name, reason);
        let info = self
            .container
            .tensor(&name)
            .ok_or_else(|| fail("is missing".to_owned()))?;
        if info.shape != tensor.shape {
            return Err(fail(format!(
                "has the shape {:?}, it should be {:?}",
                info.shape, tensor.shape
            )));
        }
        Ok(())
    }

    fn read(
        &self,
        tensor: &TensorSpec,
        elements: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), PrepError> {
        self.check(tensor, None)?;
        let info = self
            .container
            .tensor(&gguf_name(&tensor.name))
            .expect("checked");
        let mut values = Vec::with_capacity(elements.len());
        let mut blocks = Vec::new();
        let mut fetch = |elements: Range<usize>| {
            let per_block = info.format.block_elements();
            let offset = elements.start / per_block * info.format.block_bytes();
            blocks.resize(elements.len() / per_block * info.format.block_bytes(), 0);
            self.container
                .read_at(info.start + offset as u64, &mut blocks)?;
            info.format.dequantize(&blocks, &mut values);
            Ok::<_, PrepError>(())
        };
        if is_permuted(&tensor.name) {
            let columns = tensor.columns();
            for row in elements.start / columns..elements.end / columns {
                let row = permuted_row(row, self.head_dim);
                fetch(row * columns..(row + 1) * columns)?;
            }
        } else {
            fetch(elements)?;
        }
        llama::round_to_bf16(&values, out);
        Ok(())
    }

    fn fault(&self, tensor: &TensorSpec, reason: &str) -> PrepError {
        PrepError::tensor(&self.container.path, &gguf_name(&tensor.name), reason)
    }
}

/// `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`.
fn gguf_name(name: &str) -> String {
    match name {
        names::EMBED => return llama::TOKEN_EMBD.to_owned(),
        names::FINAL_NORM => return "output_norm.weight".to_owned(),
        names::LM_HEAD => return llama::OUTPUT.to_owned(),
        _ => {}
    }
    let (layer, part) = name
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'))
        .expect("every other weight is in a layer");
    let (_, part) = LAYER_NAMES
        .iter()
        .find(|(hugging_face, _)| *hugging_face == part)
        .expect("Llama has no other weights");
    format!("blk.{layer}.{part}")
}

fn is_permuted(name: &str) -> bool {
    name.ends_with(names::Q) || name.ends_with(names::K)
}

/// Row of the file that holds a row of Hugging Face's query or key projection.
///
/// Hugging Face rotates element `i` of a head with element `i + head_dim / 2`; GGUF's Llama rotates
/// neighbours, so its converter stores the rows of a head as 0, d/2, 1, d/2 + 1, …
fn permuted_row(row: usize, head_dim: usize) -> usize {
    let (head, i) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (i % half) + i / half
}

#[cfg(test)]
mod tests {
    use super::{gguf_name, permuted_row};

    /// Two heads of eight: what llama.cpp's converter puts into each row of the file.
    const STORED: [usize; 16] = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15];

    #[test]
    fn rows_of_q_and_k_are_found_where_the_converter_put_them() {
        for row in 0..16 {
            assert_eq!(STORED[permuted_row(row, 8)], row);
        }
    }

    #[test]
    fn names_are_translated() {
        assert_eq!(
            gguf_name("model.layers.12.self_attn.o_proj.weight"),
            "blk.12.attn_output.weight"
        );
        assert_eq!(gguf_name("model.embed_tokens.weight"), "token_embd.weight");
        assert_eq!(gguf_name("model.norm.weight"), "output_norm.weight");
    }
}
