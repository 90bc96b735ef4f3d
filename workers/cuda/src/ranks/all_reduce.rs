//! Sums over all ranks: which kernel, which grid, how many turns. The kernels are in `kernels/all_reduce.cu`.

use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;

use super::exchange::{Arguments, Exchange, ExchangeOptions};
use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::device::Device;
use crate::gpu::kernel::{Kernel, LaunchConfig, Module};
use crate::gpu::sources;

/// Bytes of partials up to which everything is sent to everybody. Two ranks: measured (docs/cuda-ranks.md). More: the sizes
/// at which what is sent in excess takes as long as the second way through NVLink (computed, not measured).
fn one_shot_bytes_max(ranks: usize) -> usize {
    match ranks {
        0..=2 => 2 << 20,
        3..=4 => 512 << 10,
        _ => 128 << 10,
    }
}

/// Blocks of a kernel that waits for other ranks', `each` of which fit a multiprocessor. Where ranks share the GPU, half of its
/// multiprocessors are left free of all of them: a kernel of another rank may need whole ones, and be waited for.
pub(super) fn blocks_at_once(device: &Device, each: usize, sharing: usize) -> usize {
    let multiprocessors = device.multiprocessors() as usize;
    match sharing {
        1 => multiprocessors * each,
        _ => (multiprocessors / (2 * sharing)).max(1),
    }
}

/// What partials are, and what their sum becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumDtype {
    /// BF16 partials, BF16 sum.
    Bf16,
    /// BF16 partials, f32 sum: for the residual stream.
    Bf16ToF32,
    /// f32 partials and sum.
    F32,
}

impl SumDtype {
    fn partial_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::Bf16ToF32 => 2,
            Self::F32 => 4,
        }
    }

    fn out_bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Bf16ToF32 | Self::F32 => 4,
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

/// How partials travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Every rank sends all to everybody: one way, more bytes where ranks are more than two.
    OneShot,
    /// Every rank adds its share and sends the sum: two ways, and BF16 sums are rounded before a residual is added.
    TwoShot,
}

/// One sum. Addresses are of the rank's own GPU, multiples of 16 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Sum {
    /// What the numbers are.
    pub dtype: SumDtype,
    /// This rank's part: `count` numbers.
    pub partial: CUdeviceptr,
    /// Where the sum goes: `count` numbers. `partial` itself will do where both are of one type.
    pub out: CUdeviceptr,
    /// `count` f32 that are added to the sum, only where that is f32: `out`, most likely.
    pub residual: Option<CUdeviceptr>,
    /// Numbers; any.
    pub count: usize,
}

/// One rank's end of a group's sums.
///
/// A kernel waits for those of its peers. So while a sum is under way, no rank may do what waits for other GPUs' kernels to end
/// before its own part is launched: allocate, free, load a kernel or instantiate a graph.
///
/// All ranks launch the same sums (type, count, algorithm) in the same order, each on its device's stream, from a thread of its
/// own or from one after the other; captured in graphs or not. The sum is added in the order of ranks, in f32, so all ranks have
/// the same bits, and the same step has them again. A rank that does not come ends the group's sums: whoever waits for it gives
/// up after [`ExchangeOptions::wait`], and this and every later sum is NaN; [`AllReduce::check`] says so.
pub struct AllReduce {
    device: Arc<Device>,
    exchange: Arc<Exchange>,
    arguments: Arguments,
    rank: usize,
    ranks: usize,
    kernels: [[Kernel; 3]; 2],
    threads: usize,
    blocks_max: usize,
    /// Ranks on this GPU.
    sharing: usize,
}

impl AllReduce {
    /// The ends of all ranks, for devices of [`super::open_group`].
    ///
    /// # Errors
    /// [`CudaError::Library`] or [`CudaError::Compile`] for the kernels, [`CudaError::Memory`] for the exchange memory.
    pub fn open(devices: &[Arc<Device>], options: ExchangeOptions) -> Result<Vec<Self>, CudaError> {
        let ranks = devices.len();
        let mut compiled = Vec::new();
        for device in devices {
            let compiler = Compiler::for_capability(device.capability())?;
            let mut defines = vec![format!("RANKS={ranks}")];
            if options.hold_back {
                defines.push("HOLD_BACK=1".to_owned());
            }
            let image = compiler.compile(&sources::ALL_REDUCE, &defines)?;
            let module = Module::load(device, &image)?;
            compiled.push((module.constants("all_reduce_shape")?, module));
        }
        let header_bytes = compiled[0].0[2] as usize;
        let exchange = Exchange::new(devices, header_bytes, options)?;
        let ends = devices.iter().zip(compiled).enumerate();
        ends.map(|(rank, (device, (shape, module)))| {
            let [threads, turn_blocks, _, resident] = shape.map(|x| x as usize);
            let kernel = |shot, dtype| module.kernel(&format!("{shot}_{dtype}"), 0);
            let of = |shot| -> Result<[Kernel; 3], CudaError> {
                Ok([
                    kernel(shot, "bf16")?,
                    kernel(shot, "bf16_f32")?,
                    kernel(shot, "f32")?,
                ])
            };
            let sharing = devices.iter().filter(|d| d.ordinal() == device.ordinal());
            let sharing = sharing.count();
            let resident = blocks_at_once(device, resident, sharing);
            Ok(Self {
                device: device.clone(),
                arguments: exchange.arguments(rank),
                exchange: exchange.clone(),
                rank,
                ranks,
                kernels: [of("one_shot")?, of("two_shot")?],
                threads,
                blocks_max: resident.min(turn_blocks),
                sharing,
            })
        })
        .collect()
    }

    /// Which rank this is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks of the group that are on this one's GPU, itself too: 1 but in tests.
    pub(crate) fn sharing(&self) -> usize {
        self.sharing
    }

    /// The rank's GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// What a sum of this many bytes of partials is made by where nobody says.
    pub fn algorithm(&self, bytes: usize) -> Algorithm {
        match bytes <= one_shot_bytes_max(self.ranks) {
            true => Algorithm::OneShot,
            false => Algorithm::TwoShot,
        }
    }

    /// Launches a sum, by the algorithm for its size. See [`AllReduce::launch_by`].
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// As [`AllReduce::launch_by`].
    pub unsafe fn launch(&self, sum: &Sum) -> Result<(), CudaError> {
        let algorithm = self.algorithm(sum.count * sum.dtype.partial_bytes());
        // SAFETY: the caller's promise.
        unsafe { self.launch_by(algorithm, sum) }
    }

    /// Launches a sum, as several turns where it is larger than a set of slots. The calling thread has the device bound.
    ///
    /// # Errors
    /// [`CudaError::Driver`]. A rank that does not come shows in [`AllReduce::check`].
    ///
    /// # Panics
    /// If a residual is to be added to BF16, or an address is no multiple of 16.
    ///
    /// # Safety
    /// The addresses are of memory on this rank's GPU with room for as many numbers. Peers launch the same.
    pub unsafe fn launch_by(&self, algorithm: Algorithm, sum: &Sum) -> Result<(), CudaError> {
        let residual = sum.residual.unwrap_or(0);
        assert!(
            residual == 0 || sum.dtype != SumDtype::Bf16,
            "a residual is f32"
        );
        assert!(
            (sum.partial | sum.out | residual).is_multiple_of(16),
            "addresses of a sum: {sum:x?}"
        );
        let (partial_bytes, out_bytes) = (sum.dtype.partial_bytes(), sum.dtype.out_bytes());
        let turn_count = self.turn_vectors(algorithm) * 16 / partial_bytes;
        let mut done = 0;
        while done < sum.count {
            let count = turn_count.min(sum.count - done);
            let vectors = (count * partial_bytes).div_ceil(16);
            let (set, threads_wanted) = match algorithm {
                Algorithm::OneShot => (0, vectors),
                Algorithm::TwoShot => (1, vectors.div_ceil(self.ranks)),
            };
            let blocks = threads_wanted.div_ceil(self.threads).min(self.blocks_max);
            let at = |base: CUdeviceptr, bytes| base + (done * bytes) as u64;
            let residual = match residual {
                0 => 0,
                residual => at(residual, out_bytes),
            };
            let kernel = &self.kernels[set][sum.dtype.index()];
            let shape = LaunchConfig::row(blocks, self.threads as u32).early();
            // SAFETY: the kernel's arguments, by its file; the caller's promise.
            unsafe {
                crate::launch!(
                    kernel,
                    shape,
                    self.arguments,
                    at(sum.out, out_bytes),
                    at(sum.partial, partial_bytes),
                    residual,
                    count as u64
                )?;
            }
            done += count;
        }
        Ok(())
    }

    /// Sixteens of bytes of partials that fit a set.
    fn turn_vectors(&self, algorithm: Algorithm) -> usize {
        let set = self.exchange.options.set_bytes / 16;
        match algorithm {
            Algorithm::OneShot => set / self.ranks,
            // Partials and sums of each rank's share.
            Algorithm::TwoShot => set / (2 * self.ranks) * self.ranks,
        }
    }

    /// The exchange, for others who use it.
    pub(crate) fn exchange(&self) -> &Arc<Exchange> {
        &self.exchange
    }

    /// Whether a sum that is over did without a rank. Never waits: what runs yet is not known.
    ///
    /// # Errors
    /// [`CudaError::Rank`].
    pub fn told(&self) -> Result<(), CudaError> {
        self.judge(self.exchange.told(self.rank))
    }

    /// Waits for all that was launched on this rank's stream.
    ///
    /// # Errors
    /// [`CudaError::Rank`] if a sum since the group was opened did without a rank, [`CudaError::Driver`].
    pub fn check(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        self.judge(self.exchange.failed(self.rank)?)
    }

    fn judge(&self, missing: Option<u32>) -> Result<(), CudaError> {
        match missing {
            None => Ok(()),
            Some(missing) => Err(CudaError::Rank {
                missing,
                waited: self.exchange.options.wait,
            }),
        }
    }
}

impl Drop for AllReduce {
    fn drop(&mut self) {
        // Peers' memory is freed with the last rank: this one's kernels write to it no longer. Their waits are bounded.
        let _ = self.device.bind();
        let _ = self.device.synchronize();
    }
}
