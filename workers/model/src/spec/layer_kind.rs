//! What one decoder layer computes: a mixer, which looks at other tokens, then an MLP, which does not.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::in_bounds;
use super::rope::Rope;

/// A kind of decoder layer. Each half adds to the residual stream what it makes of its RMSNorm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerKind {
    /// The half that looks at other tokens and has KV.
    pub mixer: Mixer,
    /// The half that sees one token at a time.
    pub mlp: Mlp,
}

/// How a layer looks at other tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mixer {
    /// Grouped-query attention.
    Attention(AttentionSpec),
}

/// What a layer does with each token alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mlp {
    /// SwiGLU, dense.
    Gated(GatedMlpSpec),
}

/// Grouped-query attention with rotary positions; scores are divided by the root of `head_dim`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Numbers per head; even. Not always `hidden / heads`.
    pub head_dim: usize,
    /// Rotary positions.
    pub rope: Rope,
    /// Query, key and value projections have biases (Qwen2).
    pub qkv_bias: bool,
    /// Queries and keys are normalised per head (Qwen3).
    pub qk_norm: bool,
    /// A token sees this many, itself included (Mistral v0.1); `None` sees all from the start.
    pub sliding_window: Option<usize>,
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatedMlpSpec {
    /// Outputs of gate and of up.
    pub intermediate: usize,
}

impl LayerKind {
    /// As [`super::ModelSpec::of_rank`].
    pub(super) fn of_rank(&self, ranks: usize) -> Result<Self, String> {
        let Mixer::Attention(attention) = &self.mixer;
        let Mlp::Gated(mlp) = &self.mlp;
        let kv = attention.kv_heads;
        let shared = kv.is_multiple_of(ranks) || ranks.is_multiple_of(kv);
        for (what, count, fits) in [
            (
                "query heads",
                attention.heads,
                attention.heads.is_multiple_of(ranks),
            ),
            ("key/value heads", kv, shared),
            (
                "feed-forward columns",
                mlp.intermediate,
                mlp.intermediate.is_multiple_of(ranks),
            ),
        ] {
            if !fits {
                return Err(format!(
                    "tensor-parallel size {ranks} does not divide the model's {count} {what}; choose a size that does"
                ));
            }
        }
        Ok(Self {
            mixer: Mixer::Attention(AttentionSpec {
                heads: attention.heads / ranks,
                kv_heads: (kv / ranks).max(1),
                ..attention.clone()
            }),
            mlp: Mlp::Gated(GatedMlpSpec {
                intermediate: mlp.intermediate / ranks,
            }),
        })
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let Mixer::Attention(attention) = &self.mixer;
        let Mlp::Gated(mlp) = &self.mlp;
        attention.check()?;
        in_bounds("intermediate", mlp.intermediate, 1 << 20)
    }
}

impl AttentionSpec {
    /// Outputs of the query projection, and of the key and the value projection each.
    pub fn projected(&self) -> (usize, usize) {
        (self.heads * self.head_dim, self.kv_heads * self.head_dim)
    }

    fn check(&self) -> Result<(), String> {
        in_bounds("heads", self.heads, 1 << 10)?;
        in_bounds("kv_heads", self.kv_heads, 1 << 10)?;
        in_bounds("head_dim", self.head_dim, 1 << 10)?;
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
        if self.sliding_window == Some(0) {
            return Err("sliding_window is 0".to_owned());
        }
        self.rope.check()
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {}", self.mixer, self.mlp)
    }
}

impl fmt::Display for Mixer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mixer::Attention(attention) = self;
        match attention.sliding_window {
            None => f.write_str("full attention of ")?,
            Some(window) => write!(f, "sliding attention over {window} tokens of ")?,
        }
        let AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            ..
        } = attention;
        write!(f, "{heads}/{kv_heads} heads of {head_dim}")
    }
}

impl fmt::Display for Mlp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mlp::Gated(mlp) = self;
        write!(f, "a gated MLP of {}", mlp.intermediate)
    }
}
