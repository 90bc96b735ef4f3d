//! Products of many rows, through cuBLASLt, and the operations before them, which leave what the product multiplies: BF16, or
//! e4m3 with scales where the weights are FP8 and the GPU multiplies that.

use std::sync::Arc;

use baton_model::{GatedMlpSpec, ModelSpec};
use cudarc::driver::sys::CUdeviceptr;

use super::gemm::{Blas, Dtype, Output, Product};
use super::matrix::{BLOCK, Format, Matrix, RowOrder};
use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernel::{Kernel, LaunchConfig, Module};
use crate::gpu::sources;
use crate::launch;

/// How weights are multiplied by many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// They are BF16.
    Bf16,
    /// By e4m3 with a scale a row.
    Rows,
    /// By e4m3 with a scale for each 128 of a row.
    Groups,
    /// By BF16, made into BF16 themselves just before.
    Widened,
}

/// What products of many rows need.
pub(crate) struct PrefillGemm {
    blas: Blas,
    /// cuBLASLt takes vectors of scales on Hopper alone.
    hopper: bool,
    /// Activations in e4m3, `[rows][inputs]` of whatever comes next, and their scales, `[rows]` or `[ceil(inputs / 128)][rows]`.
    codes: Buffer<u8>,
    scales: Buffer<f32>,
    /// The matrix that is multiplied, where it had to be widened.
    widened: Buffer<u16>,
    norm: Kernel,
    norm_e4m3: Kernel,
    swiglu: Kernel,
    swiglu_e4m3: Kernel,
    quantise: Kernel,
    dequantise: Kernel,
    hidden: usize,
    intermediate: usize,
    eps: f32,
}

/// Numbers that a thread keeps in registers, by the kernels' files.
const NORM_KEPT: usize = 16;
const SWIGLU_KEPT: usize = 32;

impl PrefillGemm {
    /// Room for `rows` rows and these weights.
    pub(crate) fn new<'a>(
        device: &Arc<Device>,
        compiler: &Compiler,
        spec: &ModelSpec,
        mlp: &GatedMlpSpec,
        weights: impl Iterator<Item = &'a Matrix>,
        rows: usize,
    ) -> Result<Self, CudaError> {
        let hopper = device.capability() == (9, 0);
        let (mut coded, mut widened) = (0, 0);
        for matrix in weights {
            match path(matrix, hopper) {
                Path::Bf16 => {}
                Path::Rows | Path::Groups => coded = coded.max(matrix.inputs),
                Path::Widened => widened = widened.max(matrix.inputs * matrix.outputs),
            }
        }
        let module =
            |source: &sources::Source| Module::load(device, &compiler.compile(source, &[])?);
        let norm = module(&sources::RMS_NORM)?;
        let swiglu = module(&sources::SWIGLU)?;
        let quantise = module(&sources::QUANTISE)?;
        Ok(Self {
            blas: Blas::new(device)?,
            hopper,
            codes: Buffer::zeroed(device, rows * coded, "activations in FP8")?,
            scales: Buffer::zeroed(device, rows * coded.div_ceil(BLOCK), "activations in FP8")?,
            widened: Buffer::uninitialized(device, widened, "one FP8 matrix in BF16")?,
            norm: norm.kernel("rms_norm", 0)?,
            norm_e4m3: norm.kernel("rms_norm_e4m3", 0)?,
            swiglu: swiglu.kernel("swiglu", 0)?,
            swiglu_e4m3: swiglu.kernel("swiglu_e4m3", 0)?,
            quantise: quantise.kernel("quantise", 0)?,
            dequantise: quantise.kernel("dequantise", 0)?,
            hidden: spec.hidden,
            intermediate: mlp.intermediate,
            eps: spec.rms_eps,
        })
    }

    /// Whether products with w make BF16 of it first, each time.
    pub(crate) fn widens(&self, w: &Matrix) -> bool {
        path(w, self.hopper) == Path::Widened
    }

    /// Norms rows of the residual stream `x`, all of them if `chosen` is null, for a product with `w`: into `y` as BF16 where that
    /// takes BF16.
    ///
    /// # Safety
    /// Addresses of this many rows; `chosen` are rows of x.
    pub(crate) unsafe fn norm(
        &self,
        w: &Matrix,
        y: CUdeviceptr,
        x: CUdeviceptr,
        gamma: &Buffer<u8>,
        chosen: CUdeviceptr,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (gamma, width) = (gamma.at(0), self.hidden as i32);
        // SAFETY: the kernels' arguments, by their file.
        unsafe {
            match self.groups(w) {
                None => {
                    let shape = LaunchConfig::row(rows, 256).early();
                    launch!(self.norm, shape, y, x, gamma, chosen, width, self.eps)
                }
                Some(groups) => {
                    let shared = (self.hidden.div_ceil(BLOCK) * size_of::<f32>()) as u32;
                    let shape = by_row(rows, self.hidden, NORM_KEPT).shared(shared);
                    let (codes, scales) = (self.codes.at(0), self.scales.at(0));
                    launch!(
                        self.norm_e4m3,
                        shape,
                        codes,
                        scales,
                        x,
                        gamma,
                        chosen,
                        width,
                        self.eps,
                        groups
                    )
                }
            }
        }
    }

    /// SwiGLU of `gate_up` for a product with `w`: into `y` as BF16 where that takes BF16.
    ///
    /// # Safety
    /// Addresses of this many rows.
    pub(crate) unsafe fn swiglu(
        &self,
        w: &Matrix,
        y: CUdeviceptr,
        gate_up: CUdeviceptr,
        rows: usize,
    ) -> Result<(), CudaError> {
        let width = self.intermediate;
        // SAFETY: the kernels' arguments, by their file.
        unsafe {
            match self.groups(w) {
                None => {
                    let count = rows * width;
                    let shape = LaunchConfig::row((count / 8).div_ceil(256), 256).early();
                    launch!(self.swiglu, shape, y, gate_up, count as i64)
                }
                Some(groups) => {
                    let shape = by_row(rows, width, SWIGLU_KEPT);
                    let (codes, scales) = (self.codes.at(0), self.scales.at(0));
                    launch!(
                        self.swiglu_e4m3,
                        shape,
                        codes,
                        scales,
                        gate_up,
                        width as i32,
                        groups
                    )
                }
            }
        }
    }

    /// Makes of BF16 rows `x` what a product with `w` takes, if that is not BF16.
    ///
    /// # Safety
    /// `[rows][inputs of w]` at x.
    pub(crate) unsafe fn prepare(
        &self,
        w: &Matrix,
        x: CUdeviceptr,
        rows: usize,
    ) -> Result<(), CudaError> {
        let Some(groups) = self.groups(w) else {
            return Ok(());
        };
        let shape = by_row(rows, w.inputs, NORM_KEPT);
        let (codes, scales) = (self.codes.at(0), self.scales.at(0));
        // SAFETY: the kernel's arguments, by its file.
        unsafe {
            launch!(
                self.quantise,
                shape,
                codes,
                scales,
                x,
                w.inputs as i32,
                groups
            )
        }
    }

    /// `y[rows][outputs]` of w and what was left for it: `x` in BF16, or what the last of [`Self::norm`], [`Self::swiglu`] and
    /// [`Self::prepare`] has left here.
    ///
    /// # Safety
    /// Addresses of this many rows.
    pub(crate) unsafe fn multiply(
        &mut self,
        w: &Matrix,
        x: CUdeviceptr,
        y: CUdeviceptr,
        rows: usize,
        output: Output,
    ) -> Result<(), CudaError> {
        let path = path(w, self.hopper);
        let e4m3 = |blocks| Dtype::E4m3 {
            w_scales: w.scales_at(),
            x_scales: self.scales.at(0),
            blocks,
        };
        let (x, weights, dtype) = match path {
            Path::Bf16 => (x, w.buffer.at(0), Dtype::Bf16),
            Path::Widened => (x, self.widened.at(0), Dtype::Bf16),
            Path::Rows => (self.codes.at(0), w.buffer.at(0), e4m3(false)),
            Path::Groups => (self.codes.at(0), w.buffer.at(0), e4m3(true)),
        };
        let product = Product {
            x,
            w: weights,
            y,
            rows,
            outputs: w.outputs,
            inputs: w.inputs,
            dtype,
            output,
        };
        // SAFETY: weights as loaded; the caller's promise.
        unsafe {
            if path == Path::Widened {
                self.widen(w)?;
            }
            self.blas.multiply(&product)
        }
    }

    /// # Safety
    /// The weights are as loaded.
    unsafe fn widen(&self, w: &Matrix) -> Result<(), CudaError> {
        const THREADS: u32 = 128;
        let across = (w.inputs / 16).div_ceil(THREADS as usize);
        let shape = LaunchConfig {
            grid: (w.outputs as u32, across as u32, 1),
            ..LaunchConfig::row(w.outputs, THREADS).early()
        };
        let blocks = match (w.format, w.order) {
            (Format::Fp8Block, RowOrder::Plain) => 1i32,
            (Format::Fp8Block, RowOrder::InTurn) => 2,
            _ => 0,
        };
        let (y, codes, scales) = (self.widened.at(0), w.buffer.at(0), w.scales_at());
        let (inputs, outputs) = (w.inputs as i32, w.outputs as i32);
        // SAFETY: the kernel's arguments, by its file.
        unsafe {
            launch!(
                self.dequantise,
                shape,
                y,
                codes,
                scales,
                inputs,
                outputs,
                blocks
            )
        }
    }

    /// Whether w is multiplied by e4m3, and whether with a scale for each group.
    fn groups(&self, w: &Matrix) -> Option<i32> {
        match path(w, self.hopper) {
            Path::Bf16 | Path::Widened => None,
            Path::Rows => Some(0),
            Path::Groups => Some(1),
        }
    }
}

fn path(w: &Matrix, hopper: bool) -> Path {
    match w.format {
        Format::Bf16 => Path::Bf16,
        _ if !hopper => Path::Widened,
        Format::Fp8Channel => Path::Rows,
        // cuBLASLt wants whole blocks, rows of scales of 16 bytes, and outputs that share a scale next to each other.
        Format::Fp8Block
            if w.order == RowOrder::Plain
                && w.outputs.is_multiple_of(BLOCK)
                && w.inputs.is_multiple_of(4 * BLOCK) =>
        {
            Path::Groups
        }
        Format::Fp8Block => Path::Widened,
    }
}

/// A block a row, threads enough to keep it in registers if 512 are.
fn by_row(rows: usize, width: usize, kept: usize) -> LaunchConfig {
    let threads = width.div_ceil(kept).next_multiple_of(32).min(512);
    LaunchConfig::row(rows, threads as u32).early()
}
