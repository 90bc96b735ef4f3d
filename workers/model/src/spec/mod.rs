//! What a decoder is, in numbers: everything an executor needs besides the weights.

mod layer_kind;
mod rope;
mod uniform;
mod written;

use std::sync::Arc;

pub use layer_kind::{AttentionSpec, GatedMlpSpec, LayerKind, Mixer, Mlp};
pub use rope::{Rope, RopeScaling};
pub use uniform::UniformSpec;

/// Most decoder layers.
pub(crate) const LAYERS_MAX: usize = 1 << 10;

/// A decoder: an embedding, layers around a residual stream with RMSNorm before each half, and an output projection.
///
/// Manifests and fingerprints hold it as JSON. If all layers are alike, that is a [`UniformSpec`]; otherwise the kinds
/// of layers stand in a list, and each layer is an index into it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the Hugging Face configuration: `llama`, `mistral`, `qwen2`, `qwen3`.
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// The decoder layers, first to last. Layers that are alike share one value.
    pub layers: Vec<Arc<LayerKind>>,
    /// Logits per position.
    pub vocab: usize,
    /// Longest sequence in tokens.
    pub tokens_max: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
    /// The output projection is the embedding.
    pub tied_embeddings: bool,
}

/// Layers whose KV has the same strides, so that it can lie in one arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvGroup {
    /// Key/value heads of each layer.
    pub kv_heads: usize,
    /// Numbers per head.
    pub head_dim: usize,
    /// The layers by number, ascending; they need not be consecutive.
    pub layers: Vec<usize>,
}

impl ModelSpec {
    /// The kinds of layers, each once, in the order of their first layers.
    pub fn kinds(&self) -> Vec<&Arc<LayerKind>> {
        let mut kinds: Vec<&Arc<LayerKind>> = Vec::new();
        for layer in &self.layers {
            if !kinds.contains(&layer) {
                kinds.push(layer);
            }
        }
        kinds
    }

    /// The kind of every layer, for an executor that computes models of one kind only.
    ///
    /// # Errors
    /// What the kinds are, if there are several.
    pub fn one_kind(&self) -> Result<&Arc<LayerKind>, String> {
        match self.kinds().as_slice() {
            [kind] => Ok(kind),
            [] => Err("it has no layers".to_owned()),
            kinds => {
                let counted = kinds.iter().map(|kind| {
                    let count = self.layers.iter().filter(|layer| layer == kind).count();
                    format!("{count} with {kind}")
                });
                Err(format!(
                    "its layers differ ({}); only models whose layers are all alike are supported",
                    counted.collect::<Vec<_>>().join(", ")
                ))
            }
        }
    }

    /// The layers by the strides of their KV, in the order of the groups' first layers. A model that can be served today
    /// has one group.
    pub fn kv_groups(&self) -> Vec<KvGroup> {
        let mut groups: Vec<KvGroup> = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let Mixer::Attention(attention) = &layer.mixer;
            let (kv_heads, head_dim) = (attention.kv_heads, attention.head_dim);
            let same =
                |group: &&mut KvGroup| (group.kv_heads, group.head_dim) == (kv_heads, head_dim);
            match groups.iter_mut().find(same) {
                Some(group) => group.layers.push(index),
                None => groups.push(KvGroup {
                    kv_heads,
                    head_dim,
                    layers: vec![index],
                }),
            }
        }
        groups
    }

    /// What each of so many ranks computes of every layer: its part of the heads and of the feed-forward columns. The residual
    /// stream and the vocabulary are the whole model's. Where there are more ranks than key/value heads, neighbouring
    /// ranks have the same head.
    ///
    /// # Errors
    /// What cannot be shared out equally.
    pub fn of_rank(&self, ranks: usize) -> Result<Self, String> {
        if ranks == 0 {
            return Err("the tensor-parallel size must be at least 1, it is 0".to_owned());
        }
        let kinds = self.kinds().into_iter();
        let kinds = kinds.map(|kind| Ok((kind, Arc::new(kind.of_rank(ranks)?))));
        let kinds = kinds.collect::<Result<Vec<_>, String>>()?;
        let of_kind = |layer: &Arc<LayerKind>| {
            let found = kinds.iter().find(|(kind, _)| *kind == layer);
            found.map_or_else(|| layer.clone(), |(_, part)| part.clone())
        };
        Ok(Self {
            layers: self.layers.iter().map(of_kind).collect(),
            ..self.clone()
        })
    }

    /// Whether the numbers are possible and in bounds, so that arithmetic on them cannot overflow.
    ///
    /// # Errors
    /// Which number is not, and what it may be.
    pub fn check(&self) -> Result<(), String> {
        in_bounds("hidden", self.hidden, 1 << 16)?;
        in_bounds("layers", self.layers.len(), LAYERS_MAX)?;
        // Sampling sums weights of 2^44 in 64 bits.
        in_bounds("vocab", self.vocab, 1 << 19)?;
        in_bounds("tokens_max", self.tokens_max, 1 << 26)?;
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(format!("rms_eps is {}", self.rms_eps));
        }
        self.kinds().iter().try_for_each(|kind| kind.check())
    }
}

fn in_bounds(name: &str, value: usize, max: usize) -> Result<(), String> {
    match (1..=max).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} is {value}, it must be between 1 and {max}")),
    }
}

#[cfg(test)]
mod tests;
