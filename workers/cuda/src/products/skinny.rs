//! Products of a few rows, bound by reading the weights once: `kernels/gemm_skinny.cu` and how it is launched
//! (`docs/cuda-gemm.md`).

use std::sync::Arc;

use baton_model::{AttentionSpec, GatedMlpSpec};
use cudarc::driver::sys::CUdeviceptr;

use super::matrix::{Format, Matrix};
use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::device::Device;
use crate::gpu::kernel::{Kernel, LaunchConfig, Module};
use crate::gpu::sources;
use crate::gpu::tensor_map::{Piece, TensorMap};
use crate::launch;
use crate::ranks::{Arguments, PushedSums, Slots};

/// Rows that one variant of the kernel handles; a step takes the least that has room.
const ROW_TILES: [usize; 6] = [8, 16, 24, 32, 48, 64];

/// Most rows of a step that goes this way: with more, cuBLASLt and kernels of their own for the norms are faster.
pub const ROWS_MAX: usize = 64;

/// From so many rows on, tiles of twice as many outputs are compiled too. Every tile reads all rows from L2, which then costs
/// as much as the weights do from memory.
const WIDE_ROWS_MIN: usize = 32;

/// Their outputs: `M_TILE` of `kernels/gemm_hopper.cuh`.
const WIDE_OUTPUTS: usize = 128;

/// Outputs whose squares [`Epilogue::Residual`] sums up; the kernel has the same number.
pub const SQUARES: usize = 64;

/// The variants, for one device.
pub struct Skinny {
    multiprocessors: usize,
    /// Hopper's kernels: TMA, wgmma and clusters.
    clusters: bool,
    /// Of each format of weights that there are, by rows.
    variants: [Vec<Variant>; Format::ALL.len()],
    /// Where there are several ranks.
    pushed: Option<PushedSums>,
}

struct Variant {
    rows: usize,
    tile: Tile,
    /// Of twice as many outputs.
    wide: Option<Tile>,
}

/// The kernels of one size of tile.
struct Tile {
    outputs: usize,
    threads: u32,
    shared_bytes: u32,
    store: Kernel,
    residual: Kernel,
    swiglu: Kernel,
    logits: Kernel,
}

/// Rows of activations `[rows][inputs]` in BF16, as each variant copies them.
#[derive(Default)]
pub struct Activations {
    address: CUdeviceptr,
    maps: Vec<TensorMap>,
}

/// What x is before it is multiplied: a row of z = residual * gamma, whose norm is still to be divided by.
#[derive(Clone, Copy)]
pub struct Norm {
    /// Sums of squares of the residual rows, `[rows][parts]`.
    pub squares: CUdeviceptr,
    /// Sums of a row; [`Epilogue::Residual`] leaves one for each [`SQUARES`].
    pub parts: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// What becomes of the product.
pub enum Epilogue {
    /// BF16, plus a bias or none (null).
    Store {
        /// `[rows][outputs]`.
        y: CUdeviceptr,
        /// `[outputs]`, or null.
        bias: CUdeviceptr,
    },
    /// Added to the residual stream; what the next norm begins with is left beside it. With several ranks, the sum of all
    /// ranks' products is added.
    Residual {
        /// Layer and sum of it, for [`PushedSums::slots`].
        sum: (usize, usize),
        /// f32 `[rows][outputs]`.
        residual: CUdeviceptr,
        /// The next norm's weight, `[outputs]`.
        gamma: CUdeviceptr,
        /// BF16 `[rows][outputs]`: the new residual times gamma.
        z: CUdeviceptr,
        /// `[rows][ceil(outputs / 64)]`: sums of squares of the new residual.
        squares: CUdeviceptr,
    },
    /// SwiGLU of outputs that come as 8 of gate, 8 of up: BF16 `[rows][outputs / 2]`.
    SwiGlu {
        /// Where to.
        y: CUdeviceptr,
    },
    /// f32 `[rows][outputs]`.
    Logits {
        /// Where to.
        y: CUdeviceptr,
    },
}

/// The kernel's one parameter; `gemm_skinny.cuh` has the same.
#[repr(C, align(64))]
struct Parameters {
    w_map: TensorMap,
    x_map: TensorMap,
    w: u64,
    x: u64,
    w_scale: u64,
    bias: u64,
    x_ssq: u64,
    gamma: u64,
    y: u64,
    residual: u64,
    y_ssq: u64,
    out: i32,
    k: i32,
    rows: i32,
    x_ssq_tiles: i32,
    eps: f32,
    slots: Slots,
    ranks: Arguments,
}

impl Activations {
    /// Describes `[rows][inputs]` at an address.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn new(
        device: &Device,
        address: CUdeviceptr,
        rows: usize,
        inputs: usize,
    ) -> Result<Self, CudaError> {
        let maps = ROW_TILES.iter();
        let maps = maps.map(|tile| map(device, address, rows, inputs, *tile));
        Ok(Self {
            address,
            maps: maps.collect::<Result<_, _>>()?,
        })
    }
}

fn map(
    device: &Device,
    address: CUdeviceptr,
    rows: usize,
    columns: usize,
    box_rows: usize,
) -> Result<TensorMap, CudaError> {
    if device.capability() != (9, 0) || !columns.is_multiple_of(8) {
        return Ok(TensorMap::NONE);
    }
    let piece = Piece {
        columns: 64,
        rows: box_rows as u32,
        far: false,
    };
    TensorMap::new(address, rows, columns, piece)
}

impl Skinny {
    /// Whether products of these sizes can go this way; FP8 weights have inputs of a multiple of 16 besides.
    fn takes(inputs: usize, outputs: usize) -> bool {
        inputs.is_multiple_of(8) && outputs.is_multiple_of(8)
    }

    /// Whether every product of such a layer can go this way.
    pub fn takes_layers(hidden: usize, attention: &AttentionSpec, mlp: &GatedMlpSpec) -> bool {
        let ((q, kv), inner) = (attention.projected(), mlp.intermediate);
        Self::takes(hidden, q + 2 * kv)
            && Self::takes(q, hidden)
            && Self::takes(hidden, 2 * inner)
            && Self::takes(inner, hidden)
    }

    /// Compiles the variants that steps of up to `rows` rows need, with weights of these formats, for one of `ranks` ranks.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn new(
        device: &Arc<Device>,
        compiler: &Compiler,
        rows: usize,
        formats: &[Format],
        ranks: usize,
    ) -> Result<Self, CudaError> {
        let last = ROW_TILES.iter().position(|tile| *tile >= rows);
        let tiles = &ROW_TILES[..last.map_or(ROW_TILES.len(), |last| last + 1)];
        let mut variants = [const { Vec::new() }; Format::ALL.len()];
        for format in Format::ALL.into_iter().filter(|f| formats.contains(f)) {
            let loaded = tiles
                .iter()
                .map(|tile| Variant::load(device, compiler, *tile, format, ranks));
            variants[format.number()] = loaded.collect::<Result<_, _>>()?;
        }
        Ok(Self {
            multiprocessors: device.multiprocessors() as usize,
            clusters: device.capability() == (9, 0),
            variants,
            pushed: None,
        })
    }

    /// Whose products are parts of sums over ranks: before the first one.
    pub fn push(&mut self, sums: PushedSums) {
        self.pushed = Some(sums);
    }

    /// y = end(x · wᵀ) for `rows` rows.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// Every address holds what its name says, in the sizes of `w` and `rows`.
    pub unsafe fn multiply(
        &self,
        w: &Matrix,
        x: &Activations,
        rows: usize,
        norm: Option<Norm>,
        end: Epilogue,
    ) -> Result<(), CudaError> {
        let variants = &self.variants[w.format.number()];
        let at = variants.iter().position(|v| v.rows >= rows);
        let at = at.expect("the caller keeps to ROWS_MAX and to the formats that were asked for");
        let variant = &variants[at];
        let mut p = Parameters {
            w_map: w.map,
            x_map: x.maps[at],
            w: w.buffer.at(0),
            x: x.address,
            w_scale: w.scales_at(),
            bias: 0,
            x_ssq: norm.map_or(0, |norm| norm.squares),
            gamma: 0,
            y: 0,
            residual: 0,
            y_ssq: 0,
            out: w.outputs as i32,
            k: w.inputs as i32,
            rows: rows as i32,
            x_ssq_tiles: norm.map_or(0, |norm| norm.parts as i32),
            eps: norm.map_or(0.0, |norm| norm.eps),
            slots: Slots::NONE,
            ranks: Arguments::NONE,
        };
        // What was faster for the shapes of an 8B model (docs/cuda-gemm.md). The residual's products have too few outputs, and
        // converting FP8 takes longer than reading rows again.
        let wide = match end {
            Epilogue::SwiGlu { .. } => true,
            Epilogue::Store { .. } => w.format == Format::Bf16,
            Epilogue::Residual { .. } | Epilogue::Logits { .. } => false,
        };
        let (tile, blocks, cluster) = self.tile(variant, w, wide);
        let kernel = match end {
            Epilogue::Store { y, bias } => {
                (p.y, p.bias) = (y, bias);
                &tile.store
            }
            Epilogue::Residual {
                sum: (layer, sum),
                residual,
                gamma,
                z,
                squares,
            } => {
                if let Some(pushed) = &self.pushed {
                    (p.slots, p.ranks) = (pushed.slots(layer, sum), pushed.arguments());
                }
                (p.residual, p.gamma, p.y, p.y_ssq) = (residual, gamma, z, squares);
                &tile.residual
            }
            Epilogue::SwiGlu { y } => {
                p.y = y;
                &tile.swiglu
            }
            Epilogue::Logits { y } => {
                p.y = y;
                &tile.logits
            }
        };
        let shape = LaunchConfig::row(blocks, tile.threads)
            .shared(tile.shared_bytes)
            .early();
        let shape = match self.clusters {
            true => shape.cluster(cluster),
            false => shape,
        };
        // SAFETY: the caller's promise, and the parameter is the kernel's.
        unsafe { launch!(kernel, shape, p) }
    }

    /// The tiles to take, the blocks of the launch and of a cluster. Wide ones only where they leave few multiprocessors idle.
    fn tile<'a>(&self, variant: &'a Variant, w: &Matrix, wide: bool) -> (&'a Tile, usize, usize) {
        let grid = |tile: &'a Tile| {
            let (clusters, split) = self.grid(tile.outputs, w);
            (tile, clusters * split, split)
        };
        let wide = variant.wide.as_ref().filter(|_| wide).map(grid);
        match wide {
            Some(wide) if wide.1 * 3 >= self.multiprocessors * 2 => wide,
            _ => grid(&variant.tile),
        }
    }

    /// Clusters, and the blocks of each: where tiles are few, several blocks divide the inputs of one.
    fn grid(&self, tile_outputs: usize, w: &Matrix) -> (usize, usize) {
        let tiles = w.outputs.div_ceil(tile_outputs);
        let chunks = w.inputs.div_ceil(256);
        let processors = self.multiprocessors;
        if !self.clusters {
            return (tiles, 1);
        }
        if 2 * tiles > processors {
            return (tiles.div_ceil(tiles.div_ceil(processors)), 1);
        }
        // Pairs fit everywhere; larger clusters do not fill every group of multiprocessors.
        let room = [processors, processors / 2];
        let mut split = 1;
        while split < 8 && tiles * split * 2 <= room[usize::from(split > 1)] && chunks >= split * 4
        {
            split *= 2;
        }
        (tiles, split)
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
        let load = |more: Option<String>| {
            let mut defines = vec![
                format!("N_TILE={rows}"),
                format!("WEIGHT={}", format.number()),
                format!("RANKS={ranks}"),
            ];
            defines.extend(more);
            let module = Module::load(device, &compiler.compile(&sources::GEMM_SKINNY, &defines)?)?;
            Tile::of(&module)
        };
        // With scales of blocks they have not been run on a GPU yet.
        let wide =
            rows >= WIDE_ROWS_MIN && device.capability() == (9, 0) && format != Format::Fp8Block;
        Ok(Self {
            rows,
            tile: load(None)?,
            wide: match wide {
                true => Some(load(Some(format!("M_TILE={WIDE_OUTPUTS}")))?),
                false => None,
            },
        })
    }
}

impl Tile {
    fn of(module: &Arc<Module>) -> Result<Self, CudaError> {
        let [outputs, _, threads, shared] = module.constants("gemm_skinny_shape")?;
        let kernel = |name: &str| module.kernel(&format!("gemm_skinny_{name}"), shared as u32);
        Ok(Self {
            outputs: outputs as usize,
            threads: threads as u32,
            shared_bytes: shared as u32,
            store: kernel("store")?,
            residual: kernel("residual")?,
            swiglu: kernel("swiglu")?,
            logits: kernel("logits")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_laid_out_as_in_the_kernel() {
        assert_eq!(std::mem::offset_of!(Parameters, out), 2 * 128 + 9 * 8);
        assert_eq!(std::mem::offset_of!(Parameters, ranks), 368);
        assert_eq!(size_of::<Parameters>(), 512);
    }
}
