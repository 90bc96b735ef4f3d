//! The tensors a spec needs, and how tensor parallelism shares them out.

use crate::error::ModelError;
use crate::names;
use crate::safetensors::Dtype;
use crate::spec::ModelSpec;
use crate::weight_format::WeightFormat;

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

    /// Shape of one rank's part. `tp_size` must have passed [`check_tp_size`].
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
    /// `tp_size` must have passed [`WeightFormat::check_tp_size`].
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
/// the format has. `tp_size` must have passed [`WeightFormat::check_tp_size`].
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
    let ModelSpec {
        hidden,
        intermediate,
        head_dim,
        vocab,
        ..
    } = *spec;
    let q = spec.heads * head_dim;
    let kv = spec.kv_heads * head_dim;
    let mut tensors = Vec::with_capacity(3 + spec.layers * 14);
    let mut add = |name: String, shape: Vec<usize>, split| {
        tensors.push(TensorSpec {
            projection: names::is_projection(&name),
            name,
            shape,
            split,
        });
    };

    add(
        names::EMBED.to_owned(),
        vec![vocab, hidden],
        Split::Replicated,
    );
    for i in 0..spec.layers {
        add(
            names::layer(i, names::ATTN_NORM),
            vec![hidden],
            Split::Replicated,
        );
        add(names::layer(i, names::Q), vec![q, hidden], Split::Rows);
        add(names::layer(i, names::K), vec![kv, hidden], Split::Rows);
        add(names::layer(i, names::V), vec![kv, hidden], Split::Rows);
        if spec.qkv_bias {
            add(names::layer(i, names::Q_BIAS), vec![q], Split::Rows);
            add(names::layer(i, names::K_BIAS), vec![kv], Split::Rows);
            add(names::layer(i, names::V_BIAS), vec![kv], Split::Rows);
        }
        if spec.qk_norm {
            add(
                names::layer(i, names::Q_NORM),
                vec![head_dim],
                Split::Replicated,
            );
            add(
                names::layer(i, names::K_NORM),
                vec![head_dim],
                Split::Replicated,
            );
        }
        add(names::layer(i, names::O), vec![hidden, q], Split::Columns);
        add(
            names::layer(i, names::MLP_NORM),
            vec![hidden],
            Split::Replicated,
        );
        add(
            names::layer(i, names::GATE),
            vec![intermediate, hidden],
            Split::Rows,
        );
        add(
            names::layer(i, names::UP),
            vec![intermediate, hidden],
            Split::Rows,
        );
        add(
            names::layer(i, names::DOWN),
            vec![hidden, intermediate],
            Split::Columns,
        );
    }
    add(
        names::FINAL_NORM.to_owned(),
        vec![hidden],
        Split::Replicated,
    );
    if !spec.tied_embeddings {
        add(names::LM_HEAD.to_owned(), vec![vocab, hidden], Split::Rows);
    }
    tensors
}

/// Whether the model can be divided over `tp_size` ranks: whole heads and equal parts for each.
pub fn check_tp_size(spec: &ModelSpec, tp_size: usize) -> Result<(), ModelError> {
    if tp_size == 0 {
        return Err(ModelError::TensorParallel(
            "the tensor-parallel size must be at least 1, it is 0".to_owned(),
        ));
    }
    let mut parts = vec![
        ("key/value heads", spec.kv_heads),
        ("query heads", spec.heads),
        ("feed-forward columns", spec.intermediate),
    ];
    if !spec.tied_embeddings {
        parts.push(("vocabulary entries", spec.vocab));
    }
    for (what, count) in parts {
        if count % tp_size != 0 {
            return Err(ModelError::TensorParallel(format!(
                "tensor-parallel size {tp_size} does not divide the model's {count} {what}; choose a size that does"
            )));
        }
    }
    Ok(())
}
