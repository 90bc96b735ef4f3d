//! Which attention kernel runs, and with what.
//!
//! Heads of a multiple of 16 numbers go to the tensor cores: one kernel for decode, where every sequence has one row and
//! the bytes of KV are what counts, one for everything else. Other heads take the plain kernel.

use std::cmp::Reverse;
use std::sync::Arc;

use baton_engine::Rows;
use baton_kv_memory::KvMemory;
use baton_model::AttentionSpec;
use baton_protocol::{KvGeometry, KvGroup};
use cudarc::driver::sys::CUdeviceptr;

use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernel::{Kernel, LaunchConfig, Module};
use crate::gpu::sources::{self, Source};
use crate::gpu::tensor_map::{Piece, TensorMap};
use crate::launch;
use crate::step::{HEADER_SEQUENCES, StepAddresses, StepShape};

/// Attention over one arena.
pub struct Attention {
    /// Keeps the arena.
    _memory: Arc<dyn KvMemory>,
    arena: CUdeviceptr,
    block_tokens: u32,
    /// All layers.
    kv_group: KvGroup,
    heads: usize,
    window: usize,
    /// Of scores.
    scale: f32,
    kernels: Kernels,
}

enum Kernels {
    Plain(Kernel),
    Tiled(Box<Tiled>),
}

/// What attention is made of, each `[rows][…]`.
pub struct Inputs {
    /// Queries, keys and values as the product left them, for a step whose queries attention makes
    /// ([`Attention::makes_queries`]).
    pub qkv: CUdeviceptr,
    /// What is added to them, or null.
    pub bias: CUdeviceptr,
    /// Norm of each query head, or null.
    pub q_norm: CUdeviceptr,
    /// Norm of each key head, or null.
    pub k_norm: CUdeviceptr,
    /// Of the norms.
    pub eps: f32,
    /// Cosines and sines of the rows' positions.
    pub rope_table: CUdeviceptr,
    /// Queries, for every other step; their keys and values are in the arena.
    pub q: CUdeviceptr,
}

/// The kernels of the tensor cores.
struct Tiled {
    arena: TensorMap,
    decode: Kernel,
    decode_shape: LaunchConfig,
    /// Sums of sequences that several blocks share, and how many of them have come.
    partial: Buffer<f32>,
    counters: Buffer<i32>,
    prefill: Kernel,
    prefill_shape: LaunchConfig,
    /// Rows of a sequence in one unit of work.
    unit_rows: usize,
    /// Query heads of a KV head.
    group: usize,
    /// Blocks take units until none is left; otherwise each unit has its block.
    persistent: Option<usize>,
}

impl Attention {
    /// Compiles what the model needs, for steps of up to this many sequences.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn new(
        device: &Arc<Device>,
        compiler: &Compiler,
        spec: &AttentionSpec,
        memory: Arc<dyn KvMemory>,
        (kv, layers): (&KvGeometry, KvGroup),
        sequences: usize,
    ) -> Result<Self, CudaError> {
        let arena = memory.address().device().ok_or_else(|| {
            CudaError::Arena("it is in host memory, and a GPU computes in its own".to_owned())
        })?;
        let group = spec.heads / spec.kv_heads;
        let tiled = spec.head_dim.is_multiple_of(16)
            && spec.head_dim <= 256
            && group <= 16
            && matches!(kv.block_tokens, 16 | 32 | 64)
            // The copy engine counts rows in 31 bits.
            && i32::try_from(memory.len() / (spec.head_dim * 2)).is_ok();
        let kernels = if tiled {
            let rows = memory.len() / kv.block_bytes() * kv.block_bytes() / (spec.head_dim * 2);
            let arena = (arena, rows);
            let tiled = Tiled::new(
                device,
                compiler,
                kv.block_tokens,
                layers,
                group,
                arena,
                sequences,
            )?;
            Kernels::Tiled(Box::new(tiled))
        } else {
            let defines = [format!("HEAD_DIM={}", spec.head_dim)];
            let image = compiler.compile(&sources::ATTENTION_PLAIN, &defines)?;
            Kernels::Plain(Module::load(device, &image)?.kernel("attention_plain", 0)?)
        };
        Ok(Self {
            kernels,
            heads: spec.heads,
            window: spec.sliding_window.unwrap_or(0),
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
            arena,
            block_tokens: kv.block_tokens,
            kv_group: layers,
            _memory: memory,
        })
    }

    /// The arena's address on the GPU.
    pub fn arena(&self) -> CUdeviceptr {
        self.arena
    }

    /// Query heads and key/value heads.
    pub fn heads(&self) -> (usize, usize) {
        (self.heads, self.kv_group.kv_heads as usize)
    }

    /// Layers that share the arena.
    pub fn layers(&self) -> u32 {
        self.kv_group.layers
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Units of work of a step that is no decode step: (sequence, first row within it), those that see most first, so
    /// that blocks end together.
    pub fn work(&self, rows: &Rows) -> Vec<(i32, i32)> {
        let Kernels::Tiled(tiled) = &self.kernels else {
            return Vec::new();
        };
        let mut units = Vec::new();
        for (s, sequence) in rows.sequences.iter().enumerate() {
            for first in (0..sequence.tokens).step_by(tiled.unit_rows) {
                let last = (first + tiled.unit_rows).min(sequence.tokens);
                units.push((Reverse(sequence.start + last), s as i32, first as i32));
            }
        }
        units.sort_unstable();
        units.into_iter().map(|(_, s, first)| (s, first)).collect()
    }

    /// The most units of a step of this many rows and sequences.
    pub fn work_max(&self, rows: usize, sequences: usize) -> usize {
        match &self.kernels {
            Kernels::Tiled(tiled) => rows / tiled.unit_rows + sequences,
            Kernels::Plain(_) => 0,
        }
    }

    /// Whether attention itself makes queries, keys and values of what the product left, which is little beside its reading.
    pub fn makes_queries(&self, shape: StepShape) -> bool {
        matches!(self.kernels, Kernels::Tiled(_)) && shape.work == 0
    }

    /// Attention of one layer over all rows of a step; without units of work, each sequence has one row.
    ///
    /// # Safety
    /// `inputs` and `out` hold the step's rows; its tables lie in the arena.
    pub unsafe fn launch(
        &self,
        layer: usize,
        shape: StepShape,
        at: &StepAddresses,
        inputs: &Inputs,
        out: CUdeviceptr,
    ) -> Result<(), CudaError> {
        let q = inputs.q;
        let (kv_heads, layers) = (self.kv_group.kv_heads as i32, self.kv_group.layers as i32);
        let (layer, window, arena) = (layer as i32, self.window as i32, self.arena());
        // SAFETY: the kernels' arguments, by their files.
        unsafe {
            match &self.kernels {
                Kernels::Plain(kernel) => launch!(
                    kernel,
                    LaunchConfig::plane(self.heads.div_ceil(4), shape.rows, 128).early(),
                    q,
                    arena,
                    out,
                    at.row_position,
                    at.seq_first_row,
                    at.seq_rows,
                    at.seq_table,
                    at.tables,
                    shape.sequences as i32,
                    self.heads as i32,
                    kv_heads,
                    layers,
                    layer,
                    self.block_tokens as i32,
                    window,
                    self.scale * std::f32::consts::LOG2_E,
                ),
                Kernels::Tiled(tiled) if shape.work == 0 => launch!(
                    tiled.decode,
                    tiled.decode_shape,
                    tiled.arena,
                    inputs.qkv,
                    inputs.bias,
                    inputs.q_norm,
                    inputs.k_norm,
                    inputs.rope_table,
                    out,
                    arena,
                    at.header,
                    at.seq_kv_len,
                    at.seq_table,
                    at.tables,
                    tiled.partial.at(0),
                    tiled.counters.at(0),
                    HEADER_SEQUENCES,
                    shape.sequences as i32,
                    layer,
                    layers,
                    kv_heads,
                    self.scale,
                    window,
                    inputs.eps,
                ),
                Kernels::Tiled(tiled) => launch!(
                    tiled.prefill,
                    tiled.prefill_grid(shape.work * self.kv_group.kv_heads as usize),
                    tiled.arena,
                    tiled.queries(q, [shape.rows, self.heads, self.kv_group.head_dim as usize])?,
                    q,
                    out,
                    arena,
                    at.work,
                    at.seq_first_row,
                    at.seq_rows,
                    at.seq_kv_len,
                    at.seq_table,
                    at.tables,
                    shape.work as i32,
                    layer,
                    layers,
                    kv_heads,
                    self.scale,
                    window,
                ),
            }
        }
    }
}

impl Tiled {
    fn new(
        device: &Arc<Device>,
        compiler: &Compiler,
        block_tokens: u32,
        layers: KvGroup,
        group: usize,
        (arena, rows): (CUdeviceptr, usize),
        sequences: usize,
    ) -> Result<Self, CudaError> {
        let (dim, kv_heads) = (layers.head_dim as usize, layers.kv_heads as usize);
        let hopper = device.capability() == (9, 0);
        let defines = [
            format!("HEAD_DIM={dim}"),
            format!("GROUP={group}"),
            format!("BLOCK_TOKENS={block_tokens}"),
        ];
        let load = |source: &Source, name: &str| {
            let module = Module::load(device, &compiler.compile(source, &defines)?)?;
            let constants = module.constants(&format!("{name}_launch"))?;
            Ok::<_, CudaError>((module.kernel(name, constants[1] as u32)?, constants))
        };
        let (decode, [threads, shared, sequences_max, grid_max]) =
            load(&sources::ATTENTION_DECODE, "attention_decode")?;
        if sequences > sequences_max as usize {
            return Err(CudaError::Unsupported(format!(
                "{sequences} sequences in a step, decode attention takes {sequences_max}: lower the batch"
            )));
        }
        let grid = (device.multiprocessors() as usize).min(grid_max as usize);
        let decode_shape = LaunchConfig::row(grid, threads as u32).shared(shared as u32);
        let (prefill, [threads, shared, unit_rows, persistent]) = match hopper {
            true => load(&sources::ATTENTION_PREFILL_SM90, "attention_prefill_sm90")?,
            false => load(&sources::ATTENTION_PREFILL, "attention_prefill")?,
        };
        let piece = Piece {
            columns: 64,
            rows: block_tokens.min(32),
            far: true,
        };
        Ok(Self {
            arena: match hopper {
                true => TensorMap::new(arena, rows, dim, piece)?,
                false => TensorMap::NONE,
            },
            decode,
            decode_shape: decode_shape.early(),
            partial: Buffer::zeroed(device, 2 * grid * group * (dim + 2), "attention's sums")?,
            counters: Buffer::zeroed(device, sequences * kv_heads, "attention's counters")?,
            prefill,
            prefill_shape: LaunchConfig::row(0, threads as u32)
                .shared(shared as u32)
                .early(),
            unit_rows: unit_rows as usize,
            group,
            persistent: (persistent != 0).then_some(device.multiprocessors() as usize),
        })
    }

    /// The queries of a step `[rows][heads][head_dim]`, as prefill on Hopper copies them.
    fn queries(&self, q: CUdeviceptr, shape: [usize; 3]) -> Result<TensorMap, CudaError> {
        match self.persistent {
            Some(_) => TensorMap::queries(q, shape, [self.unit_rows, self.group]),
            None => Ok(TensorMap::NONE),
        }
    }

    fn prefill_grid(&self, items: usize) -> LaunchConfig {
        let blocks = self.persistent.map_or(items, |most| items.min(most));
        LaunchConfig {
            grid: (blocks as u32, 1, 1),
            ..self.prefill_shape
        }
    }
}
