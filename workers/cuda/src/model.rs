//! A model on a GPU: weights, activations, and the launches of a step from tokens to logits.

use std::sync::Arc;

use baton_model::{ModelSpec, TensorSource};
use baton_protocol::{KvDtype, KvGeometry};
use cudarc::driver::sys::CUdeviceptr;

use crate::attention::Attention;
use crate::compile::Compiler;
use crate::device::{Buffer, Device};
use crate::error::CudaError;
use crate::gemm::{Blas, Output, Product};
use crate::kernel::{Kernel, Module, Shape};
use crate::launch;
use crate::sources;
use crate::step::{StepAddresses, StepShape};
use crate::weights::{GATE_UP_ROWS, LayerWeights, ModelWeights};

/// How large the steps of a model may be.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Most tokens of one step.
    pub step_tokens_max: usize,
    /// Most sequences of one step.
    pub step_sequences_max: usize,
}

/// The arena layout of a model that one GPU holds whole.
pub fn kv_geometry(spec: &ModelSpec, block_tokens: u32) -> KvGeometry {
    KvGeometry {
        layout: KvGeometry::LAYOUT,
        dtype: KvDtype::Bf16,
        block_tokens,
        kv_heads: spec.kv_heads as u32,
        layers: spec.layers as u32,
        head_dim: spec.head_dim as u32,
    }
}

/// A loaded model.
pub struct CudaModel {
    pub(crate) device: Arc<Device>,
    pub(crate) spec: ModelSpec,
    pub(crate) options: CudaOptions,
    pub(crate) compiler: Compiler,
    weights: ModelWeights,
    kernels: Kernels,
    blas: Blas,
    buffers: Buffers,
}

/// Kernels of every step.
struct Kernels {
    embed: Kernel,
    angles: Kernel,
    rms_norm: Kernel,
    rope: Kernel,
    swiglu: Kernel,
    argmax: Kernel,
}

/// Activations, allocated once.
struct Buffers {
    /// The residual stream, `[rows][hidden]`.
    x: Buffer<f32>,
    /// A norm's output, BF16.
    normed: Buffer<u16>,
    qkv: Buffer<u16>,
    q: Buffer<u16>,
    attended: Buffer<u16>,
    gate_up: Buffer<u16>,
    inner: Buffer<u16>,
    /// Cosines and sines, `[rows][head_dim / 2][2]`.
    turns: Buffer<f32>,
    frequencies: Buffer<f64>,
    logits: Buffer<f32>,
    /// The best token of each row of logits, and what the kernel that finds it needs.
    best: Buffer<i32>,
    best_parts: Buffer<u32>,
    best_arrived: Buffer<u32>,
}

/// Blocks that look for the best token of a row; the kernel has the same number.
const ARGMAX_PARTS: usize = 8;

impl CudaModel {
    /// Copies the weights to the GPU, compiles the kernels and allocates the activations.
    ///
    /// # Errors
    /// [`CudaError`] says what is missing, what does not fit, or which weight is wrong.
    pub fn load(
        device: &Arc<Device>,
        spec: &ModelSpec,
        source: &dyn TensorSource,
        options: CudaOptions,
    ) -> Result<Self, CudaError> {
        check(spec)?;
        let compiler = Compiler::for_capability(device.capability())?;
        let kernels = Kernels::load(device, &compiler, spec)?;
        let blas = Blas::new(device)?;
        let weights = ModelWeights::load(device, spec, source)?;
        let buffers = Buffers::new(device, spec, options)?;
        Ok(Self {
            device: device.clone(),
            spec: spec.clone(),
            options,
            compiler,
            weights,
            kernels,
            blas,
            buffers,
        })
    }

    /// Bytes of weights that a step of one row reads.
    pub fn streamed_bytes(&self) -> usize {
        self.weights.streamed_bytes()
    }

    /// The GPU it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Rows of logits that are computed at once.
    pub(crate) fn logits_rows(&self) -> usize {
        logits_rows(self.options)
    }

    /// Logits of the last [`Self::logits`], `[rows][vocab]`.
    pub(crate) fn logits_at(&self, row: usize) -> CUdeviceptr {
        self.buffers.logits.at(row * self.spec.vocab)
    }

    /// Their best tokens.
    pub(crate) fn best_at(&self) -> CUdeviceptr {
        self.buffers.best.at(0)
    }

    /// From tokens to the residual stream after the last layer; writes the KV of every row.
    ///
    /// # Safety
    /// `at` is a step of this shape, whose slots and tables lie in the arena of `attention`.
    pub(crate) unsafe fn layers(
        &mut self,
        attention: &Attention,
        shape: StepShape,
        at: &StepAddresses,
    ) -> Result<(), CudaError> {
        let (k, b, hidden) = (&self.kernels, &self.buffers, self.spec.hidden as i32);
        let half = (self.spec.head_dim / 2) as i32;
        let rows = Shape::row(shape.rows, 128);
        let table = self.weights.embedding.at(0);
        // SAFETY: the kernels' arguments, by their files; buffers hold the shape's rows.
        unsafe {
            launch!(k.embed, rows, b.x.at(0), table, at.row_token, hidden)?;
            launch!(
                k.angles,
                rows,
                b.turns.at(0),
                b.frequencies.at(0),
                at.row_position,
                half
            )?;
            for layer in 0..self.spec.layers {
                self.layer(layer, attention, shape, at)?;
            }
        }
        Ok(())
    }

    unsafe fn layer(
        &mut self,
        index: usize,
        attention: &Attention,
        shape: StepShape,
        at: &StepAddresses,
    ) -> Result<(), CudaError> {
        let Self {
            spec,
            weights,
            kernels,
            blas,
            buffers: b,
            ..
        } = self;
        let layer: &LayerWeights = &weights.layers[index];
        let (hidden, inner, rows) = (spec.hidden, spec.intermediate, shape.rows);
        let (heads, kv_heads, dim) = (spec.heads, spec.kv_heads, spec.head_dim);
        let all = (heads + 2 * kv_heads) * dim;
        let address = |buffer: &Option<Buffer<u8>>| buffer.as_ref().map_or(0, |b| b.at(0));
        let (q_norm, k_norm) = layer
            .qk_norm
            .as_ref()
            .map_or((0, 0), |(q, k)| (q.at(0), k.at(0)));
        let mut multiply = |x, w: &Buffer<u8>, y, outputs, inputs, output| {
            let product = Product {
                x,
                w: w.at(0),
                y,
                rows,
                outputs,
                inputs,
                output,
            };
            // SAFETY: weights as loaded, activations of this many rows.
            unsafe { blas.multiply(&product) }
        };
        let norm = |weight: &Buffer<u8>| {
            // SAFETY: as `layers`.
            unsafe { rms_norm(kernels, spec, b, weight, 0, rows) }
        };
        let (x, normed) = (b.x.at(0), b.normed.at(0));

        norm(&layer.attention_norm)?;
        multiply(normed, &layer.qkv, b.qkv.at(0), all, hidden, Output::Bf16)?;
        let rope = Shape::plane((heads + 2 * kv_heads).div_ceil(4), rows, 128).early();
        // SAFETY: as `layers`.
        unsafe {
            launch!(
                kernels.rope,
                rope,
                b.qkv.at(0),
                address(&layer.qkv_bias),
                q_norm,
                k_norm,
                spec.rms_eps,
                b.turns.at(0),
                at.row_slot,
                b.q.at(0),
                attention.arena(),
                heads as i32,
                kv_heads as i32,
                spec.layers as i32,
                index as i32,
                attention.block_tokens() as i32,
            )?;
            attention.launch(index, shape, at, b.q.at(0), b.attended.at(0))?;
        }
        multiply(
            b.attended.at(0),
            &layer.output,
            x,
            hidden,
            heads * dim,
            Output::AddF32,
        )?;
        norm(&layer.mlp_norm)?;
        multiply(
            normed,
            &layer.gate_up,
            b.gate_up.at(0),
            2 * inner,
            hidden,
            Output::Bf16,
        )?;
        let count = rows * inner;
        let swiglu = Shape::row((count / 8).div_ceil(256), 256).early();
        // SAFETY: as `layers`.
        unsafe {
            launch!(
                kernels.swiglu,
                swiglu,
                b.inner.at(0),
                b.gate_up.at(0),
                count as i64
            )?;
        }
        multiply(b.inner.at(0), &layer.down, x, hidden, inner, Output::AddF32)
    }

    /// Logits of `rows` wanted rows, and the best token of each.
    ///
    /// # Safety
    /// `wanted` are rows of the step that [`Self::layers`] has run, at most [`Self::logits_rows`].
    pub(crate) unsafe fn logits(
        &mut self,
        wanted: CUdeviceptr,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (k, b, vocab) = (&self.kernels, &self.buffers, self.spec.vocab);
        let product = Product {
            x: b.normed.at(0),
            w: self.weights.lm_head().at(0),
            y: b.logits.at(0),
            rows,
            outputs: vocab,
            inputs: self.spec.hidden,
            output: Output::F32,
        };
        let shape = Shape::plane(ARGMAX_PARTS, rows, 256).early();
        // SAFETY: the kernels' arguments, by their files; buffers hold this many rows.
        unsafe {
            rms_norm(k, &self.spec, b, &self.weights.norm, wanted, rows)?;
            self.blas.multiply(&product)?;
            launch!(
                k.argmax,
                shape,
                b.best.at(0),
                b.logits.at(0),
                vocab as i32,
                vocab as i64,
                b.best_parts.at(0),
                b.best_arrived.at(0),
            )
        }
    }
}

/// Norms rows of the residual stream, all of them if `chosen` is null.
///
/// # Safety
/// As [`CudaModel::layers`].
unsafe fn rms_norm(
    kernels: &Kernels,
    spec: &ModelSpec,
    b: &Buffers,
    weight: &Buffer<u8>,
    chosen: CUdeviceptr,
    rows: usize,
) -> Result<(), CudaError> {
    let shape = Shape::row(rows, 256).early();
    let (y, x, hidden) = (b.normed.at(0), b.x.at(0), spec.hidden as i32);
    // SAFETY: the caller's promise.
    unsafe {
        launch!(
            kernels.rms_norm,
            shape,
            y,
            x,
            weight.at(0),
            chosen,
            hidden,
            spec.rms_eps
        )
    }
}

impl Kernels {
    fn load(
        device: &Arc<Device>,
        compiler: &Compiler,
        spec: &ModelSpec,
    ) -> Result<Self, CudaError> {
        let head_dim = [format!("HEAD_DIM={}", spec.head_dim)];
        let module = |source: &sources::Source, defines: &[String]| {
            Module::load(device, &compiler.compile(source, defines)?)
        };
        let embed = module(&sources::EMBED, &[])?;
        Ok(Self {
            angles: embed.kernel("angles", 0)?,
            embed: embed.kernel("embed", 0)?,
            rms_norm: module(&sources::RMS_NORM, &[])?.kernel("rms_norm", 0)?,
            rope: module(&sources::ROPE, &head_dim)?.kernel("rope", 0)?,
            swiglu: module(&sources::SWIGLU, &[])?.kernel("swiglu", 0)?,
            argmax: module(&sources::ARGMAX, &[])?.kernel("argmax", 0)?,
        })
    }
}

impl Buffers {
    fn new(
        device: &Arc<Device>,
        spec: &ModelSpec,
        options: CudaOptions,
    ) -> Result<Self, CudaError> {
        let rows = rows_max(options);
        let logits_rows = logits_rows(options);
        let (heads, dim) = (spec.heads, spec.head_dim);
        let frequencies = spec.rope.inverse_frequencies(dim);
        let numbers = |width: usize| Buffer::<u16>::zeroed(device, rows * width, "activations");
        Ok(Self {
            x: Buffer::zeroed(device, rows * spec.hidden, "activations")?,
            normed: Buffer::zeroed(device, rows.max(logits_rows) * spec.hidden, "activations")?,
            qkv: numbers((heads + 2 * spec.kv_heads) * dim)?,
            q: numbers(heads * dim)?,
            attended: numbers(heads * dim)?,
            gate_up: numbers(2 * spec.intermediate)?,
            inner: numbers(spec.intermediate)?,
            turns: Buffer::zeroed(device, rows * dim, "activations")?,
            frequencies: Buffer::of(device, &frequencies, "rotary frequencies")?,
            logits: Buffer::zeroed(device, logits_rows * spec.vocab, "logits")?,
            best: Buffer::zeroed(device, logits_rows, "tokens")?,
            best_parts: Buffer::zeroed(device, logits_rows * ARGMAX_PARTS * 2, "tokens")?,
            best_arrived: Buffer::zeroed(device, logits_rows, "tokens")?,
        })
    }
}

/// Rows of a step, rounded up to what products are planned for: few plans, little waste.
pub(crate) fn padded_rows(rows: usize) -> usize {
    match rows {
        0..=128 => rows.next_multiple_of(8),
        129..=1024 => rows.next_multiple_of(64),
        _ => rows.next_multiple_of(128),
    }
}

/// Rows of the largest step.
pub(crate) fn rows_max(options: CudaOptions) -> usize {
    padded_rows(options.step_tokens_max.max(options.step_sequences_max))
}

/// A decode step takes its logits at once; prompt log-probabilities take more in turns.
fn logits_rows(options: CudaOptions) -> usize {
    padded_rows(options.step_sequences_max).max(64)
}

fn check(spec: &ModelSpec) -> Result<(), CudaError> {
    spec.check().map_err(CudaError::Unsupported)?;
    let refuse = |what: String| Err(CudaError::Unsupported(what));
    if !spec.intermediate.is_multiple_of(GATE_UP_ROWS) {
        return refuse(format!(
            "its feed-forward layer is {} wide, no multiple of {GATE_UP_ROWS}",
            spec.intermediate
        ));
    }
    if !spec.hidden.is_multiple_of(2) {
        return refuse(format!("its width {} is odd", spec.hidden));
    }
    if spec.head_dim > 256 {
        return refuse(format!("heads of {} numbers, more than 256", spec.head_dim));
    }
    Ok(())
}
