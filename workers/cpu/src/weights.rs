//! A model's weights, packed at load.

use std::borrow::Cow;
use std::ops::Range;

use baton_model::{LayerKind, MatrixBytes, Mixer, Mlp, ModelSpec, TensorSource, names, part};

use crate::error::CpuError;
use crate::math::f32_of;
use crate::memory::{Carver, Pages, Shared};
use crate::pack::{PANEL, Packed};
use crate::threads::Pool;

/// All weights of a model.
pub struct ModelWeights {
    /// `[vocab][hidden]`, as in the checkpoint.
    pub embedding: Pages<u16>,
    pub norm: Vec<f32>,
    pub ranks: Vec<RankWeights>,
}

/// What one rank has: its part of each layer, and of the vocabulary.
pub struct RankWeights {
    pub layers: Vec<LayerWeights>,
    /// Logits of `vocab`.
    pub lm_head: Packed,
    pub vocab: Range<usize>,
}

/// One rank's part of a decoder layer. The norms are the whole layer's, the same on each.
pub struct LayerWeights {
    pub attention_norm: Vec<f32>,
    /// Queries, keys and values side by side.
    pub qkv: Packed,
    /// Their biases, over whole panels (Qwen2).
    pub qkv_bias: Option<Vec<f32>>,
    /// Norms of queries and keys per head (Qwen3).
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    pub output: Packed,
    pub mlp_norm: Vec<f32>,
    /// Panels of 16 gate and the same 16 up columns.
    pub gate_up: Packed,
    pub down: Packed,
}

impl ModelWeights {
    /// The weights of as many ranks as there are sources, each of which has its rank's part of `spec`.
    pub fn load(
        spec: &ModelSpec,
        sources: &[&dyn TensorSource],
        pool: &mut Pool,
    ) -> Result<Self, CpuError> {
        let ranks = sources.len();
        let of_rank = spec.of_rank(ranks).map_err(CpuError::Unsupported)?;
        let embedding = matrix(sources[0], names::EMBED, spec.vocab, spec.hidden)?;
        let norm = vector(sources[0], names::FINAL_NORM, spec.hidden)?;
        let mut memory = Carver::default();
        let mut load = |(rank, source): (usize, &&dyn TensorSource)| {
            let layers = of_rank.layers.iter().enumerate();
            let layers = layers.map(|(index, kind)| {
                LayerWeights::load(spec.hidden, kind, *source, index, pool, &mut memory)
            });
            let layers = layers.collect::<Result<_, _>>()?;
            let vocab = part(spec.vocab, rank, ranks);
            let lm_head = if spec.tied_embeddings {
                Packed::new(pool, &mut memory, vocab.len(), spec.hidden, |column| {
                    Some(embedding.row(vocab.start + column))
                })
            } else {
                let head = matrix(*source, names::LM_HEAD, vocab.len(), spec.hidden)?;
                pack(pool, &mut memory, &[&head])
            };
            Ok(RankWeights {
                layers,
                lm_head,
                vocab,
            })
        };
        let ranks = sources.iter().enumerate().map(&mut load);
        let ranks = ranks.collect::<Result<_, CpuError>>()?;
        Ok(Self {
            embedding: embedding.numbers,
            norm,
            ranks,
        })
    }
}

impl RankWeights {
    /// Bytes that one step with a single row reads: all packed matrices.
    pub fn streamed_bytes(&self) -> usize {
        let layers = self.layers.iter();
        let layers =
            layers.map(|l| l.qkv.bytes() + l.output.bytes() + l.gate_up.bytes() + l.down.bytes());
        layers.sum::<usize>() + self.lm_head.bytes()
    }
}

impl LayerWeights {
    fn load(
        hidden: usize,
        kind: &LayerKind,
        source: &dyn TensorSource,
        layer: usize,
        pool: &mut Pool,
        memory: &mut Carver,
    ) -> Result<Self, CpuError> {
        let name = |name: &str| names::layer(layer, name);
        let Mixer::Attention(attention) = &kind.mixer;
        let Mlp::Gated(mlp) = &kind.mlp;
        let ((q_rows, kv_rows), inner) = (attention.projected(), mlp.intermediate);
        let vector = |tensor: &str, len| vector(source, &name(tensor), len);
        let matrix = |tensor: &str, rows, k| projection(source, &name(tensor), rows, k);

        let q = matrix(names::Q, q_rows, hidden)?;
        let k = matrix(names::K, kv_rows, hidden)?;
        let v = matrix(names::V, kv_rows, hidden)?;
        let qkv = pack(pool, memory, &[&q, &k, &v]);
        let qkv_bias = attention
            .qkv_bias
            .then(|| {
                let mut bias = vector(names::Q_BIAS, q_rows)?;
                bias.extend(vector(names::K_BIAS, kv_rows)?);
                bias.extend(vector(names::V_BIAS, kv_rows)?);
                bias.resize(qkv.panels * PANEL, 0.0);
                Ok(bias)
            })
            .transpose()?;
        let qk_norm = attention
            .qk_norm
            .then(|| {
                Ok((
                    vector(names::Q_NORM, attention.head_dim)?,
                    vector(names::K_NORM, attention.head_dim)?,
                ))
            })
            .transpose()?;
        let gate = matrix(names::GATE, inner, hidden)?;
        let up = matrix(names::UP, inner, hidden)?;
        const HALF: usize = PANEL / 2;
        let gate_up = Packed::new(
            pool,
            memory,
            inner.next_multiple_of(HALF) * 2,
            hidden,
            |column| {
                let (panel, c) = (column / PANEL, column % PANEL);
                let row = panel * HALF + c % HALF;
                (row < inner).then(|| if c < HALF { gate.row(row) } else { up.row(row) })
            },
        );
        Ok(Self {
            attention_norm: vector(names::ATTN_NORM, hidden)?,
            qkv,
            qkv_bias,
            qk_norm,
            output: pack(pool, memory, &[&matrix(names::O, hidden, q_rows)?]),
            mlp_norm: vector(names::MLP_NORM, hidden)?,
            gate_up,
            down: pack(pool, memory, &[&matrix(names::DOWN, hidden, inner)?]),
        })
    }
}

/// A checkpoint matrix `[rows][k]` in memory.
struct Matrix {
    numbers: Pages<u16>,
    rows: usize,
    k: usize,
}

impl Matrix {
    fn new(bytes: &[u8], rows: usize, k: usize) -> Self {
        let mut numbers = Pages::zeroed(rows * k);
        let out = Shared::new(&mut numbers);
        // SAFETY: the only part handed out.
        copy_numbers(bytes, unsafe { out.slice(0, rows * k) });
        Matrix { numbers, rows, k }
    }

    fn row(&self, row: usize) -> &[u16] {
        &self.numbers[row * self.k..][..self.k]
    }
}

/// Packs matrices of the same K side by side.
fn pack(pool: &mut Pool, memory: &mut Carver, parts: &[&Matrix]) -> Packed {
    let columns = parts.iter().map(|m| m.rows).sum();
    Packed::new(pool, memory, columns, parts[0].k, |mut column| {
        parts.iter().find_map(|m| {
            if column < m.rows {
                return Some(m.row(column));
            }
            column -= m.rows;
            None
        })
    })
}

fn matrix(
    source: &dyn TensorSource,
    name: &str,
    rows: usize,
    k: usize,
) -> Result<Matrix, CpuError> {
    Ok(Matrix::new(&read(source, name, &[rows, k])?, rows, k))
}

/// A projection; FP8 becomes BF16, which every kernel multiplies.
fn projection(
    source: &dyn TensorSource,
    name: &str,
    rows: usize,
    k: usize,
) -> Result<Matrix, CpuError> {
    match source.projection(name, rows, k) {
        Ok(MatrixBytes::Bf16(bytes)) => Ok(Matrix::new(&bytes, rows, k)),
        Ok(MatrixBytes::Fp8(matrix)) => {
            let mut bytes = Vec::new();
            matrix.dequantize(&mut bytes);
            Ok(Matrix::new(&bytes, rows, k))
        }
        Err(reason) => Err(CpuError::Weight {
            name: name.to_owned(),
            reason,
        }),
    }
}

fn vector(source: &dyn TensorSource, name: &str, len: usize) -> Result<Vec<f32>, CpuError> {
    let mut numbers = vec![0u16; len];
    copy_numbers(&read(source, name, &[len])?, &mut numbers);
    Ok(numbers.into_iter().map(f32_of).collect())
}

fn copy_numbers(bytes: &[u8], out: &mut [u16]) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *out = u16::from_le_bytes(*bytes);
    }
}

fn read<'a>(
    source: &'a dyn TensorSource,
    name: &str,
    shape: &[usize],
) -> Result<Cow<'a, [u8]>, CpuError> {
    source
        .shaped(name, shape)
        .map_err(|reason| CpuError::Weight {
            name: name.to_owned(),
            reason,
        })
}
