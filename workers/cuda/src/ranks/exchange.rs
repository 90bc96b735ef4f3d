//! The memory that ranks write to each other: allocated together, freed when the last of them has gone.

use std::sync::Arc;
use std::time::Duration;

use super::RANKS_MAX;
use crate::error::CudaError;
use crate::gpu::device::{Buffer, Device};

/// Sizes and limits of a group's sums.
#[derive(Clone, Copy, Debug)]
pub struct ExchangeOptions {
    /// Bytes of one of the two sets of slots that each rank has: a multiple of 16. A larger sum takes several turns.
    pub set_bytes: usize,
    /// How long a rank waits for another one's part. Longer than hosts may be late with a step, shorter than the watchdog's
    /// limit for one.
    pub wait: Duration,
    /// For tests: kernels are late at random between sending and receiving.
    pub hold_back: bool,
}

impl Default for ExchangeOptions {
    fn default() -> Self {
        Self {
            set_bytes: 32 << 20,
            wait: Duration::from_secs(10),
            hold_back: false,
        }
    }
}

/// What kernels are told of a group: `Exchange` of `kernels/exchange.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Arguments {
    memory: [u64; RANKS_MAX],
    set_bytes: u64,
    wait_ns: u64,
    rank: u32,
    padding: u32,
}

/// Exchange memory of all ranks. No kernel may be running that uses it when it goes: [`super::AllReduce`] waits.
pub(super) struct Exchange {
    memory: Vec<Buffer<u8>>,
    header_bytes: usize,
    pub(super) options: ExchangeOptions,
}

// SAFETY: the buffers are addresses of GPU memory; the host touches them in `new` and, with copies, in `failed`.
unsafe impl Sync for Exchange {}

impl Exchange {
    /// Empty slots on each device.
    ///
    /// # Errors
    /// [`CudaError::Memory`].
    ///
    /// # Panics
    /// If `set_bytes` is no multiple of 16 or has no room for each rank.
    pub fn new(
        devices: &[Arc<Device>],
        header_bytes: usize,
        options: ExchangeOptions,
    ) -> Result<Arc<Self>, CudaError> {
        let set = options.set_bytes;
        assert!(
            set.is_multiple_of(16) && set >= 32 * devices.len(),
            "{set} bytes a set for {} ranks",
            devices.len()
        );
        let memory = devices.iter().map(|device| {
            let bytes = header_bytes + 2 * set;
            let mut memory = Buffer::uninitialized(device, bytes, "sums across GPUs")?;
            memory.fill_bytes(0xff)?; // MISSING
            memory.write(0, &vec![0; header_bytes])?; // waits: peers find it as it should be
            Ok(memory)
        });
        Ok(Arc::new(Self {
            memory: memory.collect::<Result<_, CudaError>>()?,
            header_bytes,
            options,
        }))
    }

    pub fn arguments(&self, rank: usize) -> Arguments {
        let mut memory = [0; RANKS_MAX];
        for (address, buffer) in memory.iter_mut().zip(&self.memory) {
            *address = buffer.at(0);
        }
        Arguments {
            memory,
            set_bytes: self.options.set_bytes as u64,
            wait_ns: self.options.wait.as_nanos().min(u128::from(u64::MAX / 2)) as u64,
            rank: rank as u32,
            padding: 0,
        }
    }

    /// Which rank did not send its part in time, after all that was launched on `rank`'s stream.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn failed(&self, rank: usize) -> Result<Option<u32>, CudaError> {
        let mut header = vec![0; self.header_bytes];
        self.memory[rank].read(0, &mut header)?;
        let word = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
        Ok(word.checked_sub(1))
    }
}
