//! The tensors a spec needs, and how tensor parallelism shares them out.

use super::names;
use super::safetensors::Dtype;
use super::weight_format::WeightFormat;
use crate::spec::{LayerKind, Mixer, Mlp, ModelSpec};

/// How a tensor is divided over the ranks of a tensor-parallel group.
///
/// Projections into the heads or the feed-forward layer are cut by output rows and those back by input
/// columns, so that a layer needs two all-reduces and nothing else
/// (Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Every rank holds all of it.
    Replicated,
    /// Rank `r` of `n` holds rows `r * rows / n .. (r + 1) * rows / n` (the first dimension).
    Rows,
    /// Rank `r` of `n` holds columns `r * columns / n .. (r + 1) * columns / n` (the second dimension).
    Columns,
}

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in Hugging Face checkpoints.
    pub name: String,
    /// Its whole shape, `[rows]` or `[rows, columns]`; a projection is `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// How ranks share it.
    pub split: Split,
    /// One of the seven projections of a layer, whose format is the model's [`WeightFormat`]; all else is BF16.
    pub projection: bool,
}

/// A tensor as a weight file holds it.
pub type StoredTensor = (String, Dtype, Vec<usize>);

impl TensorSpec {
    /// First dimension.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Second dimension, 1 for a vector.
    pub fn columns(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.rows() * self.columns()
    }

    /// Shape of one rank's part. `tp_size` must have passed [`super::check_tp_size`].
    pub fn rank_shape(&self, tp_size: usize) -> Vec<usize> {
        let mut shape = self.shape.clone();
        match self.split {
            Split::Replicated => {}
            Split::Rows => shape[0] /= tp_size,
            Split::Columns => shape[1] /= tp_size,
        }
        shape
    }

    /// What one rank's weight file holds of it: the tensor, and after it the scales of an FP8 projection.
    /// `tp_size` must have passed [`super::check_tp_size`].
    pub fn stored(
        &self,
        format: WeightFormat,
        tp_size: usize,
    ) -> impl Iterator<Item = StoredTensor> + use<> {
        let shape = self.rank_shape(tp_size);
        let scales = match (self.projection, shape.as_slice()) {
            (true, &[out, inputs]) => format.scales_shape([out, inputs]),
            _ => None,
        };
        let dtype = match scales {
            Some(_) => Dtype::F8E4M3,
            None => Dtype::Bf16,
        };
        let scales = scales.map(|shape| (names::scales(&self.name), Dtype::F32, shape));
        [(self.name.clone(), dtype, shape)]
            .into_iter()
            .chain(scales)
    }
}

/// Every tensor of one rank's weight file, in order: those of [`expected_tensors`] with the scales that
/// the format has. `tp_size` must have passed [`super::check_tp_size`].
pub fn stored_tensors(
    spec: &ModelSpec,
    format: WeightFormat,
    tp_size: usize,
) -> impl Iterator<Item = StoredTensor> {
    expected_tensors(spec)
        .into_iter()
        .flat_map(move |tensor| tensor.stored(format, tp_size))
}

/// Every tensor of the model, in the order in which weight files and fingerprints hold them.
/// An FP8 model has scales besides, which [`stored_tensors`] lists: they belong to how it is kept, not to what it is.
pub fn expected_tensors(spec: &ModelSpec) -> Vec<TensorSpec> {
    let (vocab, hidden) = (spec.vocab, spec.hidden);
    let embed = plain(names::EMBED, &[vocab, hidden], Split::Replicated);
    let layers = spec.layers.iter().enumerate();
    let layers = layers.flat_map(|(index, kind)| layer_tensors(index, kind, hidden));
    let norm = plain(names::FINAL_NORM, &[hidden], Split::Replicated);
    let head =
        (!spec.tied_embeddings).then(|| plain(names::LM_HEAD, &[vocab, hidden], Split::Rows));
    [embed]
        .into_iter()
        .chain(layers)
        .chain([norm])
        .chain(head)
        .collect()
}

/// The tensors of a layer of this kind.
fn layer_tensors(index: usize, kind: &LayerKind, hidden: usize) -> Vec<TensorSpec> {
    let Mixer::Attention(attention) = &kind.mixer;
    let Mlp::Gated(mlp) = &kind.mlp;
    let (q, kv) = attention.projected();
    let (dim, inner) = (attention.head_dim, mlp.intermediate);
    use Split::{Columns, Replicated, Rows};

    let mut tensors = Vec::with_capacity(14);
    let mut add = |name: &str, shape: &[usize], split| {
        tensors.push(TensorSpec {
            name: names::layer(index, name),
            shape: shape.to_vec(),
            split,
            projection: names::PROJECTIONS.contains(&name),
        });
    };
    add(names::ATTN_NORM, &[hidden], Replicated);
    add(names::Q, &[q, hidden], Rows);
    add(names::K, &[kv, hidden], Rows);
    add(names::V, &[kv, hidden], Rows);
    if attention.qkv_bias {
        add(names::Q_BIAS, &[q], Rows);
        add(names::K_BIAS, &[kv], Rows);
        add(names::V_BIAS, &[kv], Rows);
    }
    if attention.qk_norm {
        add(names::Q_NORM, &[dim], Replicated);
        add(names::K_NORM, &[dim], Replicated);
    }
    add(names::O, &[hidden, q], Columns);
    add(names::MLP_NORM, &[hidden], Replicated);
    add(names::GATE, &[inner, hidden], Rows);
    add(names::UP, &[inner, hidden], Rows);
    add(names::DOWN, &[hidden, inner], Columns);
    tensors
}

/// A tensor outside the layers.
fn plain(name: &str, shape: &[usize], split: Split) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        split,
        projection: false,
    }
}
