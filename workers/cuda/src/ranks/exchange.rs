//! The memory that ranks write to each other: allocated together, freed when the last of them has gone.

use std::sync::Arc;
use std::time::Duration;

use baton_protocol::deadlines::STEP_MAX_GPU_MS;

use super::RANKS_MAX;
use crate::error::CudaError;
use crate::gpu::device::{Buffer, Device, Pinned};

/// Sizes and limits of a group's sums.
#[derive(Clone, Copy, Debug)]
pub struct ExchangeOptions {
    /// Bytes of one of the two sets of slots that each rank has: a multiple of 16. A larger sum takes several turns.
    pub set_bytes: usize,
    /// Bytes of the slots that products push their sums to, behind the sets ([`super::PushedSums`]); 0 where none do.
    pub pushed_bytes: usize,
    /// How long a rank waits for another one's part. Longer than hosts may be late with a step; twice that, which is how long a rank's
    /// thread may be behind, is shorter than the watchdog's limit for a step.
    pub wait: Duration,
    /// For tests: kernels are late at random between sending and receiving.
    pub hold_back: bool,
}

impl Default for ExchangeOptions {
    fn default() -> Self {
        Self {
            set_bytes: 32 << 20,
            pushed_bytes: 0,
            wait: Duration::from_millis(STEP_MAX_GPU_MS / 3),
            hold_back: false,
        }
    }
}

/// What kernels are told of a group: `Exchange` of `kernels/exchange.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Arguments {
    memory: [u64; RANKS_MAX],
    set_bytes: u64,
    wait_ns: u64,
    told: u64,
    rank: u32,
    padding: u32,
}

impl Arguments {
    /// For kernels of a model on one GPU, which read nothing of it.
    pub(crate) const NONE: Self = Self {
        memory: [0; RANKS_MAX],
        set_bytes: 0,
        wait_ns: 0,
        told: 0,
        rank: 0,
        padding: 0,
    };
}

/// Exchange memory of all ranks. No kernel may be running that uses it when it goes: [`super::AllReduce`] waits.
pub(crate) struct Exchange {
    memory: Vec<Buffer<u8>>,
    /// On the host, of each rank: 1 + the rank that did not come, once a kernel knows.
    told: Vec<Pinned<u32>>,
    header_bytes: usize,
    pub(crate) options: ExchangeOptions,
}

// SAFETY: the buffers are addresses of GPU memory; the host touches them in `new` and, with copies, in `failed`. What kernels tell is
// read as they write it, a word at a time.
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
            let bytes = header_bytes + 2 * set + options.pushed_bytes;
            let mut memory = Buffer::uninitialized(device, bytes, "sums across GPUs")?;
            memory.fill_bytes(0xff)?; // MISSING
            memory.write(0, &vec![0; header_bytes])?; // waits: peers find it as it should be
            Ok(memory)
        });
        Ok(Arc::new(Self {
            memory: memory.collect::<Result<_, CudaError>>()?,
            told: devices
                .iter()
                .map(|device| Pinned::zeroed(device, 1))
                .collect::<Result<_, _>>()?,
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
            // Host memory has the same address on all GPUs.
            told: self.told[rank].as_ptr().addr() as u64,
            wait_ns: self.options.wait.as_nanos().min(u128::from(u64::MAX / 2)) as u64,
            rank: rank as u32,
            padding: 0,
        }
    }

    pub fn ranks(&self) -> usize {
        self.memory.len()
    }

    /// Where slots of pushed sums begin in a rank's memory.
    pub fn pushed_at(&self) -> usize {
        self.header_bytes + 2 * self.options.set_bytes
    }

    /// Which rank did not send its part in time, as far as `rank`'s kernels have told the host. Never waits.
    pub fn told(&self, rank: usize) -> Option<u32> {
        // SAFETY: a word of pinned memory, which a kernel may be writing.
        let word = unsafe { self.told[rank].as_ptr().read_volatile() };
        word.checked_sub(1)
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
