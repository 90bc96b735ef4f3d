//! The four products between a layer's attention and the next layer's in one launch, for steps of few rows:
//! `kernels/gemm_chain.cu` (`docs/cuda-gemm.md`, "Chains").

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_model::{GatedMlpSpec, ModelSpec};
use cudarc::driver::sys::CUdeviceptr;

use super::weights::ModelWeights;
use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernel::{Kernel, LaunchConfig, Module};
use crate::gpu::sources;
use crate::gpu::tensor_map::TensorMap;
use crate::launch;
use crate::products::matrix::{Format, Matrix};
use crate::ranks::{Arguments, PushedSums, Slots, set};

/// Rows that one variant of the kernel handles; a step takes the least that has room.
const ROWS: [usize; 3] = [1, 4, 8];

/// Most rows of a step that goes this way.
const ROWS_MAX: usize = ROWS[ROWS.len() - 1];

/// Outputs of a tile; queries, keys and values have half as many, or too few blocks would have one.
const TILE_OUTPUTS: usize = 32;

/// Of a residual row, whose squares are summed by one block.
const SQUARES: usize = 32;

/// What all layers' launches need.
pub struct Chain {
    variants: Vec<Variant>,
    blocks: usize,
    layers: Vec<[Product; 4]>,
    format: Format,
    /// Few blocks idle while others have the last tiles of a residual product.
    balanced: bool,
    hidden: usize,
    exchange: Exchange,
    /// Where there are several ranks.
    pushed: Option<PushedSums>,
    eps: f32,
    _alone: Alone,
}

/// Of this process's chains the only one on a GPU: launches of two, on streams of their own, could wait for each other as those of
/// two processes could.
struct Alone(usize);

static TAKEN: [AtomicBool; 64] = [const { AtomicBool::new(false) }; 64];

impl Alone {
    /// None while there is another on this GPU.
    fn on(ordinal: usize) -> Option<Self> {
        let taken = TAKEN.get(ordinal)?.swap(true, Ordering::AcqRel);
        (!taken).then(|| Self(ordinal))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        TAKEN[self.0].store(false, Ordering::Release);
    }
}

struct Variant {
    rows: usize,
    /// Inputs up to which rows are brought once for all tiles of a product.
    inputs_kept: usize,
    threads: u32,
    shared_bytes: u32,
    kernel: Kernel,
}

/// Memory through which the blocks of a launch hand each other activations. What is not written yet has all bits set, so a
/// launch needs some that was cleared: the launch before it does that, while nobody touches it.
struct Exchange {
    sets: Buffer<u8>,
    /// Bytes of z, z, inner, squares and squares, as they follow each other in a set.
    parts: [usize; 5],
}

/// `ChainProduct` of the kernel.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Product {
    w_map: TensorMap,
    w_scale: u64,
    bias: u64,
    out: i32,
    k: i32,
}

/// `Chain` of the kernel, its one parameter.
#[repr(C, align(64))]
struct Parameters {
    products: [Product; 4],
    attended: u64,
    residual: u64,
    gamma: [u64; 2],
    z: [u64; 2],
    squares: [u64; 2],
    inner: u64,
    qkv_out: u64,
    clear: u64,
    clear_count: i32,
    rows: i32,
    eps: f32,
    slots: [Slots; 2],
    ranks: Arguments,
}

/// What a launch reads and leaves, each `[rows][...]`.
pub struct Streams {
    /// Attention's output.
    pub attended: CUdeviceptr,
    /// The residual stream, f32.
    pub residual: CUdeviceptr,
    /// What the next layer's attention takes.
    pub qkv: CUdeviceptr,
    /// After the last layer, what its norm begins with: the residual stream times the norm's weight.
    pub z: CUdeviceptr,
    /// And its sums of squares, as many as [`Chain::squares`] says.
    pub squares: CUdeviceptr,
}

impl Chain {
    /// Compiles the kernel, if the GPU and all matrices are such that it can be used, for one of `ranks` ranks.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn new(
        device: &Arc<Device>,
        compiler: &Compiler,
        spec: &ModelSpec,
        mlp: &GatedMlpSpec,
        weights: &ModelWeights,
        ranks: usize,
    ) -> Result<Option<Self>, CudaError> {
        // All blocks of a launch wait for each other. Where several processes share the GPU's multiprocessors at a time, two
        // launches could each wait for what the other holds.
        if device.capability() != (9, 0) || device.shared_by_processes()? {
            return Ok(None);
        }
        let Some(format) = common_format(spec.hidden, mlp.intermediate, weights) else {
            return Ok(None);
        };
        let Some(alone) = Alone::on(device.ordinal() as usize) else {
            return Ok(None);
        };
        let blocks = device.multiprocessors() as usize;
        let variants = ROWS.map(|rows| Variant::load(device, compiler, rows, format, ranks));
        let layers = (0..weights.layers.len()).map(|index| products(weights, index));
        Ok(Some(Self {
            variants: variants.into_iter().collect::<Result<_, _>>()?,
            blocks,
            layers: layers.collect::<Result<_, _>>()?,
            format,
            balanced: balanced(spec.hidden / TILE_OUTPUTS, blocks),
            hidden: spec.hidden,
            exchange: Exchange::new(device, spec.hidden, mlp.intermediate)?,
            pushed: None,
            eps: spec.rms_eps,
            _alone: alone,
        }))
    }

    /// Whose products are parts of sums over ranks: before the first launch.
    pub fn push(&mut self, sums: PushedSums) {
        self.pushed = Some(sums);
    }

    /// Whether a step of so many rows is faster this way (docs/cuda-gemm.md has the models that were timed). FP8 weights come too fast
    /// for rows that are brought again for each tile; BF16 weights need every block to read them.
    pub fn takes(&self, rows: usize) -> bool {
        let faster = |variant: &Variant| match self.format {
            Format::Bf16 => self.balanced || rows == 1,
            Format::Fp8Channel | Format::Fp8Block => self.hidden <= variant.inputs_kept,
        };
        self.variant(rows).is_some_and(faster)
    }

    fn variant(&self, rows: usize) -> Option<&Variant> {
        self.variants.iter().find(|variant| variant.rows >= rows)
    }

    /// Sums of squares of a row that the last layer leaves, for [`crate::products::skinny::Norm`].
    pub fn squares(hidden: usize) -> usize {
        hidden / SQUARES
    }

    /// Numbers of them, for as many rows as there may be.
    pub fn squares_max(hidden: usize) -> usize {
        ROWS_MAX * Self::squares(hidden)
    }

    /// From layer `index`'s attention to the next layer's queries, keys and values; after the last layer to `z` and `squares`.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// It takes `rows` rows, all streams hold them, `weights` are those of [`Self::new`], and a step launches
    /// every layer once, in order. After an error there is no further step: what was exchanged stands where the next would look.
    pub unsafe fn launch(
        &self,
        weights: &ModelWeights,
        index: usize,
        streams: &Streams,
        rows: usize,
    ) -> Result<(), CudaError> {
        let layers = &weights.layers;
        let next = layers.get(index + 1);
        let norm = next.map_or(&weights.norm, |next| &next.attention_norm);
        let own = self.exchange.addresses(set(index, layers.len()));
        let after = set((index + 1) % layers.len(), layers.len());
        let (z, squares) = match next {
            Some(_) => (own.z[1], own.squares[1]),
            None => (streams.z, streams.squares),
        };
        let p = Parameters {
            products: self.layers[index],
            attended: streams.attended,
            residual: streams.residual,
            gamma: [layers[index].mlp_norm.at(0), norm.at(0)],
            z: [own.z[0], z],
            squares: [own.squares[0], squares],
            inner: own.inner,
            qkv_out: streams.qkv,
            clear: self.exchange.set_at(after),
            clear_count: (self.exchange.set_bytes() / 16) as i32,
            rows: rows as i32,
            eps: self.eps,
            slots: [0, 1].map(|sum| match &self.pushed {
                Some(pushed) => pushed.slots(index, sum),
                None => Slots::NONE,
            }),
            ranks: match &self.pushed {
                Some(pushed) => pushed.arguments(),
                None => Arguments::NONE,
            },
        };
        let variant = self.variant(rows).expect("the caller has asked");
        let shape = LaunchConfig::row(self.blocks, variant.threads)
            .shared(variant.shared_bytes)
            .early();
        // SAFETY: the caller's promise, and the parameter is the kernel's.
        unsafe { launch!(variant.kernel, shape, p) }
    }
}

impl Variant {
    fn load(
        device: &Arc<Device>,
        compiler: &Compiler,
        rows: usize,
        format: Format,
        ranks: usize,
    ) -> Result<Self, CudaError> {
        let defines = [
            format!("RANKS={ranks}"),
            format!("ROWS={rows}"),
            format!("WEIGHT={}", format.number()),
        ];
        let module = Module::load(device, &compiler.compile(&sources::GEMM_CHAIN, &defines)?)?;
        let [threads, shared, _, inputs_kept] = module.constants("gemm_chain_shape")?;
        Ok(Self {
            rows,
            inputs_kept: inputs_kept as usize,
            threads: threads as u32,
            shared_bytes: shared as u32,
            kernel: module.kernel("gemm_chain", shared as u32)?,
        })
    }
}

/// Of the memory that layers exchange through, by [`set`].
const SETS: usize = 3;

struct Addresses {
    z: [CUdeviceptr; 2],
    inner: CUdeviceptr,
    squares: [CUdeviceptr; 2],
}

impl Exchange {
    fn new(device: &Arc<Device>, hidden: usize, intermediate: usize) -> Result<Self, CudaError> {
        let (z, inner) = (hidden * 2, intermediate * 2);
        let squares = Chain::squares(hidden) * 4;
        let parts = [z, z, inner, squares, squares].map(|bytes| ROWS_MAX * bytes);
        let bytes = SETS * parts.iter().sum::<usize>();
        let mut sets = Buffer::uninitialized(device, bytes, "activations")?;
        sets.fill_bytes(0xff)?;
        Ok(Self { sets, parts })
    }

    fn set_bytes(&self) -> usize {
        self.parts.iter().sum()
    }

    fn set_at(&self, set: usize) -> CUdeviceptr {
        self.sets.at(set * self.set_bytes())
    }

    fn addresses(&self, set: usize) -> Addresses {
        let mut next = self.set_at(set);
        let [z, last_z, inner, squares, last_squares] = self.parts.map(|bytes| {
            let at = next;
            next += bytes as CUdeviceptr;
            at
        });
        Addresses {
            z: [z, last_z],
            inner,
            squares: [squares, last_squares],
        }
    }
}

/// Whether so many tiles leave few blocks idle, or one each: with 160 tiles on 132 multiprocessors 80 blocks would have two each.
fn balanced(tiles: usize, blocks: usize) -> bool {
    let each = tiles.div_ceil(blocks);
    each == 1 || tiles * 4 >= each * blocks * 3
}

/// The format of all projections, if it is one and their sizes are what the kernel takes.
fn common_format(hidden: usize, intermediate: usize, weights: &ModelWeights) -> Option<Format> {
    let format = weights.layers.first()?.qkv.format;
    let projections = || {
        let layers = weights.layers.iter();
        layers.flat_map(|l| [&l.qkv, &l.output, &l.gate_up, &l.down])
    };
    let sizes = hidden.is_multiple_of(TILE_OUTPUTS)
        && (2 * intermediate).is_multiple_of(TILE_OUTPUTS)
        && projections().all(|w| w.outputs.is_multiple_of(TILE_OUTPUTS / 2));
    let inputs = |w: &Matrix| (w.inputs * format.bytes()).is_multiple_of(128);
    let all = projections().all(|w| w.format == format && inputs(w));
    (sizes && all && weights.layers.len() > 1).then_some(format)
}

/// Output projection, gate and up, down, and what the next layer begins with, if there is one.
fn products(weights: &ModelWeights, index: usize) -> Result<[Product; 4], CudaError> {
    let layer = &weights.layers[index];
    let plain = |w| Product::new(w, TILE_OUTPUTS, 0);
    let qkv = match weights.layers.get(index + 1) {
        Some(next) => {
            let bias = next.qkv_bias.as_ref().map_or(0, |bias| bias.at(0));
            Product::new(&next.qkv, TILE_OUTPUTS / 2, bias)?
        }
        None => Product::NONE,
    };
    Ok([
        plain(&layer.output)?,
        plain(&layer.gate_up)?,
        plain(&layer.down)?,
        qkv,
    ])
}

impl Product {
    const NONE: Self = Self {
        w_map: TensorMap::NONE,
        w_scale: 0,
        bias: 0,
        out: 0,
        k: 0,
    };

    fn new(w: &Matrix, tile: usize, bias: CUdeviceptr) -> Result<Self, CudaError> {
        let sizes = [w.outputs, w.inputs];
        Ok(Self {
            w_map: TensorMap::stages(w.buffer.at(0), sizes, w.format.bytes(), tile)?,
            w_scale: w.scales_at(),
            bias,
            out: w.outputs as i32,
            k: w.inputs as i32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_has_one_chain_at_a_time() {
        let first = Alone::on(63);
        assert!(first.is_some() && Alone::on(63).is_none() && Alone::on(62).is_some());
        drop(first);
        assert!(Alone::on(63).is_some());
        assert!(Alone::on(64).is_none(), "nobody keeps count of it");
    }

    #[test]
    fn tiles_that_leave_many_blocks_idle_are_not_balanced() {
        let hidden = |hidden: usize| balanced(hidden / TILE_OUTPUTS, 132);
        assert!(hidden(2048) && hidden(4096) && hidden(8192));
        assert!(!hidden(5120));
    }

    #[test]
    fn parameters_are_laid_out_as_in_the_kernel() {
        assert_eq!(size_of::<Product>(), 192);
        assert_eq!(size_of::<Parameters>(), 1024);
    }
}
