//! A model's weights on the GPU, row-major as in the checkpoint, those that are multiplied together side by side.
//!
//! Projections stay FP8 where every path can read them; others become BF16 here. The host never holds more of a rearranged copy
//! than [`STAGE_BYTES`].

use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use baton_model::{
    Fp8Scales, LayerKind, MatrixBytes, Mixer, Mlp, ModelSpec, TensorSource, dequantize_row, names,
};

use cudarc::driver::sys::CUdeviceptr;

use crate::error::CudaError;
use crate::gpu::device::{Buffer, Device};
use crate::products::matrix::{BLOCK, Format, Matrix, RowOrder, extend_stored};
use crate::ranks::RANKS_MAX;

/// Rows of gate, then as many of up, and so on: what SwiGLU reads together lies together.
pub const GATE_UP_ROWS: usize = 8;

/// Most bytes that are rearranged on the host before they are copied.
const STAGE_BYTES: usize = 32 << 20;

/// Where tokens' embeddings are: `Table` of `kernels/embed.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Embedding {
    parts: [u64; RANKS_MAX],
    vocab: i32,
    count: i32,
}

impl Embedding {
    /// In nearly equal parts, of which each rank's weights have one.
    pub(crate) fn of(vocab: usize, parts: &[CUdeviceptr]) -> Self {
        let mut addresses = [0; RANKS_MAX];
        addresses[..parts.len()].copy_from_slice(parts);
        Self {
            parts: addresses,
            vocab: vocab as i32,
            count: parts.len() as i32,
        }
    }
}

/// All weights of a model, or a rank's part of them. Numbers are BF16, kept as bytes; those of the projections may be FP8.
pub struct ModelWeights {
    /// `[vocab][hidden]`; a rank's part of the vocabulary.
    pub embedding: Matrix,
    /// The decoder layers.
    pub layers: Vec<LayerWeights>,
    /// `[hidden]`.
    pub norm: Buffer<u8>,
    /// Alike; `None` if the embedding is it.
    lm_head: Option<Matrix>,
    /// Matrices that came as FP8 and had to be made BF16.
    pub widened: usize,
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
    /// Copies a model to the GPU, or a rank's part, of which `spec` has the sizes and `own` the rows of the vocabulary.
    ///
    /// # Errors
    /// [`CudaError::Weight`] or [`CudaError::Memory`] say which tensor.
    pub fn load(
        device: &Arc<Device>,
        spec: &ModelSpec,
        own: Range<usize>,
        source: &dyn TensorSource,
    ) -> Result<Self, CudaError> {
        let loader = Loader {
            device,
            source,
            widened: Cell::new(0),
        };
        let hidden = spec.hidden;
        let sizes = [own.len(), hidden];
        let matrix = |name, bytes| {
            let buffer = Buffer::of(device, bytes, name)?;
            Matrix::new(device, buffer, None, Format::Bf16, RowOrder::Plain, sizes)
        };
        // Every rank's source has all of the embedding.
        let embedding = loader.bytes(names::EMBED, &[spec.vocab, hidden])?;
        let row = 2 * hidden;
        Ok(Self {
            embedding: matrix(names::EMBED, &embedding[own.start * row..own.end * row])?,
            layers: (spec.layers.iter().enumerate())
                .map(|(index, kind)| LayerWeights::load(&loader, hidden, kind, index))
                .collect::<Result<_, _>>()?,
            norm: loader.one(names::FINAL_NORM, &[hidden])?,
            lm_head: match spec.tied_embeddings {
                true => None,
                false => {
                    let bytes = loader.bytes(names::LM_HEAD, &sizes)?;
                    Some(matrix(names::LM_HEAD, &bytes)?)
                }
            },
            widened: loader.widened.get(),
        })
    }

    /// The output projection.
    pub fn lm_head(&self) -> &Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    /// The projections of all layers, and the output projection.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let layers = self.layers.iter();
        let layers = layers.flat_map(|l| [&l.qkv, &l.output, &l.gate_up, &l.down]);
        layers.chain([self.lm_head()])
    }

    /// Bytes that a step of one row reads: every matrix but the embedding.
    pub fn streamed_bytes(&self) -> usize {
        self.matrices().map(Matrix::bytes).sum()
    }
}

impl LayerWeights {
    fn load(
        loader: &Loader<'_>,
        hidden: usize,
        kind: &LayerKind,
        layer: usize,
    ) -> Result<Self, CudaError> {
        let name = |name: &str| names::layer(layer, name);
        let Mixer::Attention(attention) = &kind.mixer;
        let Mlp::Gated(mlp) = &kind.mlp;
        let (inner, dim, (q, kv)) = (mlp.intermediate, attention.head_dim, attention.projected());
        let part = |part, rows, inputs| loader.part(name(part), rows, inputs);
        let biases = || {
            let parts = [(names::Q_BIAS, q), (names::K_BIAS, kv), (names::V_BIAS, kv)];
            let parts =
                parts.map(|(part, rows)| Ok((name(part), loader.bytes(&name(part), &[rows])?)));
            loader.joined(&parts.into_iter().collect::<Result<Vec<_>, CudaError>>()?)
        };
        let qkv = [
            part(names::Q, q, hidden)?,
            part(names::K, kv, hidden)?,
            part(names::V, kv, hidden)?,
        ];
        let gate_up = [
            part(names::GATE, inner, hidden)?,
            part(names::UP, inner, hidden)?,
        ];
        Ok(Self {
            attention_norm: loader.one(&name(names::ATTN_NORM), &[hidden])?,
            qkv: loader.projection(&qkv, RowOrder::Plain)?,
            qkv_bias: match attention.qkv_bias {
                true => Some(biases()?),
                false => None,
            },
            qk_norm: match attention.qk_norm {
                true => Some((
                    loader.one(&name(names::Q_NORM), &[dim])?,
                    loader.one(&name(names::K_NORM), &[dim])?,
                )),
                false => None,
            },
            output: loader.projection(&[part(names::O, hidden, q)?], RowOrder::Plain)?,
            mlp_norm: loader.one(&name(names::MLP_NORM), &[hidden])?,
            gate_up: loader.projection(&gate_up, RowOrder::InTurn)?,
            down: loader.projection(&[part(names::DOWN, hidden, inner)?], RowOrder::Plain)?,
        })
    }
}

/// A projection of the checkpoint, which may be a part of a matrix here.
struct Part<'a> {
    name: String,
    rows: usize,
    inputs: usize,
    bytes: MatrixBytes<'a>,
}

impl Part<'_> {
    /// As what it can stay, side by side with others.
    fn format(&self, first: usize, alone: bool) -> Format {
        // Copies of 16 bytes and products take sixteens; a block's scale must not be cut where parts meet.
        let sixteens = self.inputs.is_multiple_of(16) && self.rows.is_multiple_of(16);
        let whole = alone || (first.is_multiple_of(BLOCK) && self.rows.is_multiple_of(BLOCK));
        match &self.bytes {
            MatrixBytes::Fp8(m) if sixteens => match m.scales {
                Fp8Scales::Channel(_) => Format::Fp8Channel,
                Fp8Scales::Block(_) if whole => Format::Fp8Block,
                Fp8Scales::Block(_) => Format::Bf16,
            },
            _ => Format::Bf16,
        }
    }

    /// Appends a row as `format` has it.
    fn extend(&self, row: usize, format: Format, out: &mut Vec<u8>) {
        let n = self.inputs;
        match &self.bytes {
            MatrixBytes::Bf16(bytes) => out.extend_from_slice(&bytes[row * n * 2..][..n * 2]),
            MatrixBytes::Fp8(m) => {
                let codes = &m.codes[row * n..][..n];
                match format {
                    Format::Bf16 => dequantize_row(codes, |column| m.scale(row, column), out),
                    Format::Fp8Channel | Format::Fp8Block => extend_stored(out, codes),
                }
            }
        }
    }

    fn scales(&self) -> &[f32] {
        match &self.bytes {
            MatrixBytes::Fp8(m) => match &m.scales {
                Fp8Scales::Channel(scales) | Fp8Scales::Block(scales) => scales,
            },
            MatrixBytes::Bf16(_) => &[],
        }
    }
}

/// Part and row of each output.
fn outputs<'a, 'b>(
    parts: &'a [Part<'b>],
    order: RowOrder,
) -> Box<dyn Iterator<Item = (&'a Part<'b>, usize)> + 'a> {
    match order {
        RowOrder::Plain => Box::new(
            parts
                .iter()
                .flat_map(|p| (0..p.rows).map(move |row| (p, row))),
        ),
        RowOrder::InTurn => {
            let pieces = (0..parts[0].rows).step_by(GATE_UP_ROWS);
            Box::new(pieces.flat_map(move |first| {
                let of = move |p| (first..first + GATE_UP_ROWS).map(move |row| (p, row));
                parts.iter().flat_map(of)
            }))
        }
    }
}

struct Loader<'a> {
    device: &'a Arc<Device>,
    source: &'a dyn TensorSource,
    widened: Cell<usize>,
}

impl<'a> Loader<'a> {
    fn bytes(&self, name: &str, shape: &[usize]) -> Result<Cow<'a, [u8]>, CudaError> {
        self.source
            .shaped(name, shape)
            .map_err(|reason| CudaError::Weight {
                name: name.to_owned(),
                reason,
            })
    }

    fn one(&self, name: &str, shape: &[usize]) -> Result<Buffer<u8>, CudaError> {
        Buffer::of(self.device, &self.bytes(name, shape)?, name)
    }

    fn part(&self, name: String, rows: usize, inputs: usize) -> Result<Part<'a>, CudaError> {
        let bytes = self.source.projection(&name, rows, inputs);
        Ok(Part {
            bytes: bytes.map_err(|reason| CudaError::Weight {
                name: name.clone(),
                reason,
            })?,
            name,
            rows,
            inputs,
        })
    }

    /// One matrix of parts with the same inputs.
    fn projection(&self, parts: &[Part<'_>], order: RowOrder) -> Result<Matrix, CudaError> {
        let (inputs, rows) = (parts[0].inputs, parts.iter().map(|p| p.rows).sum());
        let alone = parts.len() == 1 || order == RowOrder::InTurn;
        let mut first = 0;
        let formats = parts.iter().map(|part| {
            first += part.rows;
            part.format(first - part.rows, alone)
        });
        let formats: Vec<Format> = formats.collect();
        let format = match formats.iter().all(|f| *f == formats[0]) {
            true => formats[0],
            false => Format::Bf16,
        };
        let fp8 = |part: &Part<'_>| matches!(part.bytes, MatrixBytes::Fp8(_));
        if format == Format::Bf16 && parts.iter().any(fp8) {
            self.widened.set(self.widened.get() + 1);
        }
        let names: Vec<&str> = parts.iter().map(|p| p.name.as_str()).collect();
        let what = names.join(", ");
        let bytes = rows * inputs * format.bytes();
        let mut buffer = Buffer::uninitialized(self.device, bytes, &what)?;
        let mut at = 0;
        let mut staged = Vec::with_capacity(STAGE_BYTES.min(bytes));
        for (part, row) in outputs(parts, order) {
            part.extend(row, format, &mut staged);
            if staged.len() >= STAGE_BYTES {
                buffer.write(at, &staged)?;
                at += staged.len();
                staged.clear();
            }
        }
        buffer.write(at, &staged)?;
        let scales: Option<Vec<f32>> = match format {
            Format::Bf16 => None,
            Format::Fp8Channel => Some(
                outputs(parts, order)
                    .map(|(p, row)| p.scales()[row])
                    .collect(),
            ),
            Format::Fp8Block => Some(parts.iter().flat_map(Part::scales).copied().collect()),
        };
        let scales = scales.map(|scales| Buffer::of(self.device, &scales, &what));
        Matrix::new(
            self.device,
            buffer,
            scales.transpose()?,
            format,
            order,
            [rows, inputs],
        )
    }

    fn joined(&self, parts: &[(String, Cow<'_, [u8]>)]) -> Result<Buffer<u8>, CudaError> {
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
