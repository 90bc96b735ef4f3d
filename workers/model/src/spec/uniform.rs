//! A model whose layers are all alike, as one flat list of numbers.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::layer_kind::{AttentionSpec, GatedMlpSpec, LayerKind, Mixer, Mlp};
use super::rope::Rope;
use super::{LAYERS_MAX, ModelSpec, in_bounds};

/// A [`ModelSpec`] of one kind of layer; the fields mean what they mean there.
///
/// Manifests hold it, and fingerprints are taken of it: neither names nor order of the fields may change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields of ModelSpec and LayerKind
pub struct UniformSpec {
    pub family: String,
    pub hidden: usize,
    pub intermediate: usize,
    /// Number of layers.
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub tokens_max: usize,
    pub rms_eps: f32,
    pub rope: Rope,
    pub qkv_bias: bool,
    pub qk_norm: bool,
    pub tied_embeddings: bool,
    pub sliding_window: Option<usize>,
}

impl TryFrom<UniformSpec> for ModelSpec {
    type Error = String;

    /// # Errors
    /// As [`ModelSpec::check`].
    fn try_from(flat: UniformSpec) -> Result<Self, String> {
        // Before there is a list as long as it says.
        in_bounds("layers", flat.layers, LAYERS_MAX)?;
        let kind = Arc::new(LayerKind {
            mixer: Mixer::Attention(AttentionSpec {
                heads: flat.heads,
                kv_heads: flat.kv_heads,
                head_dim: flat.head_dim,
                rope: flat.rope,
                qkv_bias: flat.qkv_bias,
                qk_norm: flat.qk_norm,
                sliding_window: flat.sliding_window,
            }),
            mlp: Mlp::Gated(GatedMlpSpec {
                intermediate: flat.intermediate,
            }),
        });
        let spec = Self {
            family: flat.family,
            hidden: flat.hidden,
            layers: vec![kind; flat.layers],
            vocab: flat.vocab,
            tokens_max: flat.tokens_max,
            rms_eps: flat.rms_eps,
            tied_embeddings: flat.tied_embeddings,
        };
        spec.check()?;
        Ok(spec)
    }
}

impl TryFrom<&ModelSpec> for UniformSpec {
    type Error = String;

    /// # Errors
    /// As [`ModelSpec::one_kind`].
    fn try_from(spec: &ModelSpec) -> Result<Self, String> {
        let LayerKind {
            mixer: Mixer::Attention(attention),
            mlp: Mlp::Gated(mlp),
        } = &**spec.one_kind()?;
        Ok(Self {
            family: spec.family.clone(),
            hidden: spec.hidden,
            intermediate: mlp.intermediate,
            layers: spec.layers.len(),
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            vocab: spec.vocab,
            tokens_max: spec.tokens_max,
            rms_eps: spec.rms_eps,
            rope: attention.rope.clone(),
            qkv_bias: attention.qkv_bias,
            qk_norm: attention.qk_norm,
            tied_embeddings: spec.tied_embeddings,
            sliding_window: attention.sliding_window,
        })
    }
}
