//! Every rank's columns of a matrix, on all ranks: `kernels/all_gather.cu`.

use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;

use super::AllReduce;
use super::all_reduce::blocks_at_once;
use super::exchange::{Arguments, Exchange};
use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::kernel::{Kernel, LaunchConfig, Module};
use crate::gpu::sources;

/// One rank's end. What [`AllReduce`] says of sums holds: all ranks launch the same, in one order with their sums.
pub struct AllGather {
    arguments: Arguments,
    exchange: Arc<Exchange>,
    ranks: usize,
    kernel: Kernel,
    threads: usize,
    blocks_max: usize,
}

impl AllGather {
    /// For the group of `sums`, through its exchange memory.
    ///
    /// # Errors
    /// [`CudaError::Library`] or [`CudaError::Compile`] for the kernel.
    pub fn new(sums: &AllReduce) -> Result<Self, CudaError> {
        let (device, exchange) = (sums.device(), sums.exchange().clone());
        let ranks = exchange.ranks();
        let compiler = Compiler::for_capability(device.capability())?;
        let image = compiler.compile(&sources::ALL_GATHER, &[format!("RANKS={ranks}")])?;
        let module = Module::load(device, &image)?;
        let [threads, turn_blocks, _, resident] = module.constants("all_gather_shape")?;
        let resident = blocks_at_once(device, resident as usize, sums.sharing());
        Ok(Self {
            arguments: exchange.arguments(sums.rank()),
            ranks,
            kernel: module.kernel("all_gather", 0)?,
            threads: threads as usize,
            blocks_max: resident.min(turn_blocks as usize),
            exchange,
        })
    }

    /// `out` `[rows][width]` of all ranks' `part`s `[rows][columns]`, both f32; rank r of n has the columns `width * r / n ..
    /// width * (r + 1) / n`.
    ///
    /// # Errors
    /// [`CudaError::Driver`]. A rank that does not come shows in [`AllReduce::told`].
    ///
    /// # Panics
    /// If a row of one rank does not fit its slots.
    ///
    /// # Safety
    /// The addresses are of this rank's GPU; `part` may be read to the next multiple of 16 bytes. Peers launch the same.
    pub unsafe fn launch(
        &self,
        out: CUdeviceptr,
        part: CUdeviceptr,
        rows: usize,
        width: usize,
        columns: usize,
    ) -> Result<(), CudaError> {
        let widest = width / self.ranks + 1;
        // A multiple of four, so that each turn's part begins at 16 bytes whatever its width.
        let room = self.exchange.options.set_bytes / self.ranks / 16 * 4;
        let turn_rows = (room.saturating_sub(4) / widest) & !3;
        assert!(turn_rows > 0, "a row of {widest} numbers in {room}");
        let mut done = 0;
        while done < rows {
            let count = turn_rows.min(rows - done);
            let vectors = (count * widest).div_ceil(4);
            let blocks = vectors.div_ceil(self.threads).min(self.blocks_max);
            let shape = LaunchConfig::row(blocks, self.threads as u32).early();
            let to = out + (done * width * size_of::<f32>()) as u64;
            let from = part + (done * columns * size_of::<f32>()) as u64;
            // SAFETY: the kernel's arguments, by its file; the caller's promise.
            unsafe {
                crate::launch!(
                    self.kernel,
                    shape,
                    self.arguments,
                    to,
                    from,
                    count as i32,
                    width as i32
                )?;
            }
            done += count;
        }
        Ok(())
    }
}
