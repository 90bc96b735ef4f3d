//! What a decoder is, in numbers: everything an executor needs besides the weights.

use serde::{Deserialize, Serialize};

/// A Llama-type decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// `model_type` of the Hugging Face configuration: `llama`, `mistral`, `qwen2`, `qwen3`.
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Numbers per head; even. Not always `hidden / heads`.
    pub head_dim: usize,
    /// Logits per position.
    pub vocab: usize,
    /// Longest sequence in tokens.
    pub tokens_max: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
    /// Rotary positions.
    pub rope: Rope,
    /// Query, key and value projections have biases (Qwen2).
    pub qkv_bias: bool,
    /// Queries and keys are normalised per head (Qwen3).
    pub qk_norm: bool,
    /// The output projection is the embedding.
    pub tied_embeddings: bool,
    /// Attention reaches back only this far (Mistral v0.1); `None` reaches to the start.
    pub sliding_window: Option<usize>,
}

/// Rotary position embedding, in the half-split form of Hugging Face (`rotate_half`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// Stretching of the rotary frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RopeScaling {
    /// As they are.
    None,
    /// All divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1's: long wave lengths divided, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of long wave lengths.
        factor: f64,
        /// Wave lengths over `original_tokens_max / this` are long.
        low_freq_factor: f64,
        /// Wave lengths under `original_tokens_max / this` are short.
        high_freq_factor: f64,
        /// Context length of the unstretched model.
        original_tokens_max: f64,
    },
}

impl Rope {
    /// Angle per position of each of the `head_dim / 2` pairs, in double precision.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let plain = |i: usize| self.theta.powf(-(2.0 * i as f64) / head_dim as f64);
        (0..head_dim / 2)
            .map(|i| {
                let frequency = plain(i);
                match self.scaling {
                    RopeScaling::None => frequency,
                    RopeScaling::Linear { factor } => frequency / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_tokens_max,
                    } => {
                        let wave_length = 2.0 * std::f64::consts::PI / frequency;
                        let low = original_tokens_max / low_freq_factor;
                        let high = original_tokens_max / high_freq_factor;
                        if wave_length < high {
                            frequency
                        } else if wave_length > low {
                            frequency / factor
                        } else {
                            let smooth = (original_tokens_max / wave_length - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * frequency / factor + smooth * frequency
                        }
                    }
                }
            })
            .collect()
    }
}

impl ModelSpec {
    /// Whether the numbers are possible and in bounds, so that arithmetic on them cannot overflow.
    pub fn check(&self) -> Result<(), String> {
        let bounded = [
            ("hidden", self.hidden, 1 << 16),
            ("intermediate", self.intermediate, 1 << 20),
            ("layers", self.layers, 1 << 10),
            ("heads", self.heads, 1 << 10),
            ("kv_heads", self.kv_heads, 1 << 10),
            ("head_dim", self.head_dim, 1 << 10),
            // Sampling sums weights of 2^44 in 64 bits.
            ("vocab", self.vocab, 1 << 19),
            ("tokens_max", self.tokens_max, 1 << 26),
        ];
        for (name, value, max) in bounded {
            if value == 0 || value > max {
                return Err(format!("{name} is {value}, it must be between 1 and {max}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{} query heads cannot share {} key/value heads equally",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!(
                "head_dim is {}, rotary positions need an even number",
                self.head_dim
            ));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(format!("rms_eps is {}", self.rms_eps));
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let rope = match self.rope.scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_tokens_max,
            } => {
                positive(factor)
                    && positive(low_freq_factor)
                    && positive(original_tokens_max)
                    && high_freq_factor.is_finite()
                    && high_freq_factor > low_freq_factor
            }
        };
        if !positive(self.rope.theta) || !rope {
            return Err(format!(
                "the rotary embedding {:?} is impossible",
                self.rope
            ));
        }
        if self.sliding_window == Some(0) {
            return Err("sliding_window is 0".to_owned());
        }
        Ok(())
    }
}
