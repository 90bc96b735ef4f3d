//! Which attention kernel runs, and with what.

use std::sync::Arc;

use baton_engine::{KvMemory, Rows};
use baton_model::ModelSpec;
use baton_protocol::KvGeometry;
use cudarc::driver::sys::CUdeviceptr;

use crate::compile::Compiler;
use crate::device::Device;
use crate::error::CudaError;
use crate::kernel::{Kernel, Module, Shape};
use crate::launch;
use crate::sources;
use crate::step::{StepAddresses, StepShape};

/// Attention over one arena.
pub struct Attention {
    memory: Arc<dyn KvMemory>,
    kv: KvGeometry,
    heads: usize,
    window: usize,
    scale: f32,
    plain: Kernel,
}

impl Attention {
    /// Compiles what the model needs.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn new(
        device: &Arc<Device>,
        compiler: &Compiler,
        spec: &ModelSpec,
        memory: Arc<dyn KvMemory>,
        kv: KvGeometry,
    ) -> Result<Self, CudaError> {
        let defines = [format!("HEAD_DIM={}", spec.head_dim)];
        let image = compiler.compile(&sources::ATTENTION_PLAIN, &defines)?;
        Ok(Self {
            plain: Module::load(device, &image)?.kernel("attention_plain", 0)?,
            heads: spec.heads,
            window: spec.sliding_window.unwrap_or(0),
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
            memory,
            kv,
        })
    }

    /// The arena's address on the GPU.
    pub fn arena(&self) -> CUdeviceptr {
        self.memory.base() as CUdeviceptr
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> u32 {
        self.kv.block_tokens
    }

    /// Units of work of a prefill step: (sequence, first row within it), the longest first.
    pub fn work(&self, _rows: &Rows) -> Vec<(i32, i32)> {
        Vec::new()
    }

    /// The most units of a step of this many rows and sequences.
    pub fn work_max(&self, _rows: usize, _sequences: usize) -> usize {
        0
    }

    /// Attention of one layer over all rows of a step.
    ///
    /// # Safety
    /// `q` and `out` hold the step's rows; its tables lie in the arena.
    pub unsafe fn launch(
        &self,
        layer: usize,
        shape: StepShape,
        at: &StepAddresses,
        q: CUdeviceptr,
        out: CUdeviceptr,
    ) -> Result<(), CudaError> {
        let grid = Shape::plane(self.heads.div_ceil(4), shape.rows, 128).early();
        // SAFETY: the kernel's arguments, by its file.
        unsafe {
            launch!(
                self.plain,
                grid,
                q,
                self.arena(),
                out,
                at.row_position,
                at.seq_first_row,
                at.seq_rows,
                at.seq_table,
                at.tables,
                shape.sequences as i32,
                self.heads as i32,
                self.kv.kv_heads as i32,
                self.kv.layers as i32,
                layer as i32,
                self.kv.block_tokens as i32,
                self.window as i32,
                self.scale * std::f32::consts::LOG2_E,
            )
        }
    }
}
