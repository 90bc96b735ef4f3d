//! The activations of a step.

use std::sync::Arc;

use baton_model::{AttentionSpec, GatedMlpSpec, ModelSpec};

use super::chain::Chain;
use crate::error::CudaError;
use crate::gpu::device::{Buffer, Device};
use crate::options::{CudaOptions, logits_rows, rows_max};
use crate::products::skinny::Activations;

/// Activations, allocated once.
pub(crate) struct Buffers {
    /// The residual stream, `[rows][hidden]`.
    pub(crate) x: Buffer<f32>,
    /// A norm's output, BF16.
    pub(crate) normed: Buffer<u16>,
    pub(crate) qkv: Buffer<u16>,
    pub(crate) q: Buffer<u16>,
    pub(crate) attended: Buffer<u16>,
    pub(crate) gate_up: Buffer<u16>,
    pub(crate) inner: Buffer<u16>,
    /// `normed`, `attended` and `inner` as few rows are multiplied.
    pub(crate) skinny_normed: Activations,
    pub(crate) skinny_attended: Activations,
    pub(crate) skinny_inner: Activations,
    /// Sums of squares of the residual stream, `[rows][ceil(hidden / 64)]`, or as many as [`Chain::squares`] says.
    pub(crate) squares: Buffer<f32>,
    /// Cosines and sines, `[rows][head_dim / 2][2]`.
    pub(crate) rope_table: Buffer<f32>,
    pub(crate) frequencies: Buffer<f64>,
    pub(crate) logits: Buffer<f32>,
    /// The best token of each row of logits, and what the kernel that finds it needs.
    pub(crate) best: Buffer<i32>,
    pub(crate) best_parts: Buffer<u32>,
    pub(crate) best_arrived: Buffer<u32>,
}

/// Blocks that look for the best token of a row; the kernel has the same number.
pub(crate) const ARGMAX_PARTS: usize = 32;

impl Buffers {
    /// For layers of this kind; `is_skinny` if a step of few rows may go through [`crate::products::skinny`].
    pub(crate) fn new(
        device: &Arc<Device>,
        spec: &ModelSpec,
        (attention, mlp): (&AttentionSpec, &GatedMlpSpec),
        is_skinny: bool,
        options: CudaOptions,
    ) -> Result<Self, CudaError> {
        let rows = rows_max(options);
        let logits_rows = logits_rows(options);
        let (dim, (q, kv)) = (attention.head_dim, attention.projected());
        let frequencies = attention.rope.inverse_frequencies(dim);
        let numbers = |width: usize| Buffer::<u16>::zeroed(device, rows * width, "activations");
        let normed = Buffer::zeroed(device, rows.max(logits_rows) * spec.hidden, "activations")?;
        let (attended, inner) = (numbers(q)?, numbers(mlp.intermediate)?);
        let squares = Chain::squares_max(spec.hidden).max(rows * spec.hidden.div_ceil(64));
        let skinny = |buffer: &Buffer<u16>, width| match is_skinny {
            true => Activations::new(device, buffer.at(0), rows, width),
            false => Ok(Activations::default()),
        };
        Ok(Self {
            x: Buffer::zeroed(device, rows * spec.hidden, "activations")?,
            skinny_normed: skinny(&normed, spec.hidden)?,
            skinny_attended: skinny(&attended, q)?,
            skinny_inner: skinny(&inner, mlp.intermediate)?,
            squares: Buffer::zeroed(device, squares, "activations")?,
            normed,
            qkv: numbers(q + 2 * kv)?,
            q: numbers(q)?,
            attended,
            gate_up: numbers(2 * mlp.intermediate)?,
            inner,
            rope_table: Buffer::zeroed(device, rows * dim, "activations")?,
            frequencies: Buffer::of(device, &frequencies, "rotary frequencies")?,
            logits: Buffer::zeroed(device, logits_rows * spec.vocab, "logits")?,
            best: Buffer::zeroed(device, logits_rows, "tokens")?,
            best_parts: Buffer::zeroed(device, logits_rows * ARGMAX_PARTS * 2, "tokens")?,
            best_arrived: Buffer::zeroed(device, logits_rows, "tokens")?,
        })
    }
}
