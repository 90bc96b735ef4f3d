//! How a model directory keeps the matrices of the decoder layers.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::fp8::BLOCK;

/// Format of the seven projections of each layer (q, k, v, o, gate, up, down), one for the whole model.
///
/// Embedding, norms, biases and `lm_head` are BF16 in every format: the published FP8 checkpoints leave
/// them so, logits are what rounding hurts most, and the output projection is an eighth of what an 8B
/// model's step reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightFormat {
    /// bfloat16.
    #[default]
    #[serde(rename = "BF16")]
    Bf16,
    /// e4m3 with one scale for each output channel, `[out]`.
    #[serde(rename = "FP8_CHANNEL")]
    Fp8Channel,
    /// e4m3 with one scale for each block of 128×128, `[ceil(out / 128)][ceil(in / 128)]`.
    #[serde(rename = "FP8_BLOCK")]
    Fp8Block,
}

impl WeightFormat {
    /// Whether the projections are e4m3 with scales.
    pub fn is_fp8(self) -> bool {
        self != WeightFormat::Bf16
    }

    /// The word of beats, logs and `baton status`.
    pub fn label(self) -> &'static str {
        match self {
            WeightFormat::Bf16 => "bf16",
            WeightFormat::Fp8Channel => "fp8-channel",
            WeightFormat::Fp8Block => "fp8-block",
        }
    }

    /// Shape of the scales of a projection `[out, in]`; `None` if it has none.
    pub fn scales_shape(self, shape: [usize; 2]) -> Option<Vec<usize>> {
        let [out, inputs] = shape;
        match self {
            WeightFormat::Bf16 => None,
            WeightFormat::Fp8Channel => Some(vec![out]),
            WeightFormat::Fp8Block => Some(vec![out.div_ceil(BLOCK), inputs.div_ceil(BLOCK)]),
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WeightFormat::Bf16 => "BF16",
            WeightFormat::Fp8Channel => "FP8 (e4m3, a scale per output channel)",
            WeightFormat::Fp8Block => "FP8 (e4m3, a scale per 128×128 block)",
        })
    }
}
