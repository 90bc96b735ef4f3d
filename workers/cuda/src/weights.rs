//! A model's weights on the GPU, row-major as in the checkpoint, those that are multiplied together side by side.

use std::sync::Arc;

use baton_model::{ModelSpec, TensorSource, names};

use crate::device::{Buffer, Device};
use crate::error::CudaError;
use crate::skinny::Matrix;

/// Rows of gate, then as many of up, and so on: what SwiGLU reads together lies together.
pub const GATE_UP_ROWS: usize = 8;

/// All weights of a model. Numbers are BF16, kept as bytes.
pub struct ModelWeights {
    /// `[vocab][hidden]`.
    pub embedding: Matrix,
    /// The decoder layers.
    pub layers: Vec<LayerWeights>,
    /// `[hidden]`.
    pub norm: Buffer<u8>,
    /// `[vocab][hidden]`; `None` if the embedding is it.
    lm_head: Option<Matrix>,
}

/// One decoder layer.
pub struct LayerWeights {
    /// `[hidden]`.
    pub attention_norm: Buffer<u8>,
    /// Queries, keys and values: `[(heads + 2 kv_heads) * head_dim][hidden]`.
    pub qkv: Matrix,
    /// Their biases (Qwen2).
    pub qkv_bias: Option<Buffer<u8>>,
    /// Norms of queries and keys per head, `[head_dim]` each (Qwen3).
    pub qk_norm: Option<(Buffer<u8>, Buffer<u8>)>,
    /// `[hidden][heads * head_dim]`.
    pub output: Matrix,
    /// `[hidden]`.
    pub mlp_norm: Buffer<u8>,
    /// `[2 * intermediate][hidden]`, [`GATE_UP_ROWS`] of gate and of up in turn.
    pub gate_up: Matrix,
    /// `[hidden][intermediate]`.
    pub down: Matrix,
}

impl ModelWeights {
    /// Copies a model to the GPU.
    ///
    /// # Errors
    /// [`CudaError::Weight`] or [`CudaError::Memory`] say which tensor.
    pub fn load(
        device: &Arc<Device>,
        spec: &ModelSpec,
        source: &dyn TensorSource,
    ) -> Result<Self, CudaError> {
        let loader = Loader { device, source };
        let (vocab, hidden) = (spec.vocab, spec.hidden);
        let head = |name| loader.matrix(loader.one(name, &[vocab, hidden])?, vocab, hidden);
        Ok(Self {
            embedding: head(names::EMBED)?,
            layers: (0..spec.layers)
                .map(|layer| LayerWeights::load(&loader, spec, layer))
                .collect::<Result<_, _>>()?,
            norm: loader.one(names::FINAL_NORM, &[hidden])?,
            lm_head: match spec.tied_embeddings {
                true => None,
                false => Some(head(names::LM_HEAD)?),
            },
        })
    }

    /// The output projection.
    pub fn lm_head(&self) -> &Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes that a step of one row reads: every matrix but the embedding.
    pub fn streamed_bytes(&self) -> usize {
        let layers = self.layers.iter();
        let matrices = layers.flat_map(|l| [&l.qkv, &l.output, &l.gate_up, &l.down]);
        let matrices = matrices.chain([self.lm_head()]);
        matrices.map(|matrix| matrix.buffer.len()).sum()
    }
}

impl LayerWeights {
    fn load(loader: &Loader<'_>, spec: &ModelSpec, layer: usize) -> Result<Self, CudaError> {
        let name = |name: &str| names::layer(layer, name);
        let (hidden, inner, dim) = (spec.hidden, spec.intermediate, spec.head_dim);
        let (q, kv) = (spec.heads * dim, spec.kv_heads * dim);
        let side_by_side = |parts: [&str; 3], columns: &[usize]| {
            let parts = parts.into_iter().zip([q, kv, kv]).map(|(part, rows)| {
                let shape = [&[rows], columns].concat();
                Ok((name(part), loader.bytes(&name(part), &shape)?))
            });
            loader.joined(&parts.collect::<Result<Vec<_>, CudaError>>()?)
        };
        let gate = loader.bytes(&name(names::GATE), &[inner, hidden])?;
        let up = loader.bytes(&name(names::UP), &[inner, hidden])?;
        Ok(Self {
            attention_norm: loader.one(&name(names::ATTN_NORM), &[hidden])?,
            qkv: loader.matrix(
                side_by_side([names::Q, names::K, names::V], &[hidden])?,
                q + 2 * kv,
                hidden,
            )?,
            qkv_bias: match spec.qkv_bias {
                true => Some(side_by_side(
                    [names::Q_BIAS, names::K_BIAS, names::V_BIAS],
                    &[],
                )?),
                false => None,
            },
            qk_norm: match spec.qk_norm {
                true => Some((
                    loader.one(&name(names::Q_NORM), &[dim])?,
                    loader.one(&name(names::K_NORM), &[dim])?,
                )),
                false => None,
            },
            output: loader.matrix(loader.one(&name(names::O), &[hidden, q])?, hidden, q)?,
            mlp_norm: loader.one(&name(names::MLP_NORM), &[hidden])?,
            gate_up: loader.matrix(
                Buffer::of(
                    loader.device,
                    &in_turn(gate, up, GATE_UP_ROWS * hidden * 2),
                    &name("mlp.gate_proj and up_proj"),
                )?,
                2 * inner,
                hidden,
            )?,
            down: loader.matrix(
                loader.one(&name(names::DOWN), &[hidden, inner])?,
                hidden,
                inner,
            )?,
        })
    }
}

/// Pieces of `piece` bytes of a and of b in turn.
fn in_turn(a: &[u8], b: &[u8], piece: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(a.len() + b.len());
    for (a, b) in a.chunks(piece).zip(b.chunks(piece)) {
        out.extend_from_slice(a);
        out.extend_from_slice(b);
    }
    out
}

struct Loader<'a> {
    device: &'a Arc<Device>,
    source: &'a dyn TensorSource,
}

impl<'a> Loader<'a> {
    fn bytes(&self, name: &str, shape: &[usize]) -> Result<&'a [u8], CudaError> {
        self.source
            .shaped(name, shape)
            .map_err(|reason| CudaError::Weight {
                name: name.to_owned(),
                reason,
            })
    }

    fn one(&self, name: &str, shape: &[usize]) -> Result<Buffer<u8>, CudaError> {
        Buffer::of(self.device, self.bytes(name, shape)?, name)
    }

    fn matrix(
        &self,
        buffer: Buffer<u8>,
        outputs: usize,
        inputs: usize,
    ) -> Result<Matrix, CudaError> {
        Matrix::new(self.device, buffer, outputs, inputs)
    }

    fn joined(&self, parts: &[(String, &[u8])]) -> Result<Buffer<u8>, CudaError> {
        let bytes = parts.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut buffer = Buffer::uninitialized(self.device, bytes, &parts[0].0)?;
        let mut at = 0;
        for (_, bytes) in parts {
            buffer.write(at, bytes)?;
            at += bytes.len();
        }
        Ok(buffer)
    }
}
