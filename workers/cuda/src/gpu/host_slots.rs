//! Host memory beside a buffer on a GPU, and copies between the two on a stream of their own.

use std::ops::Range;
use std::sync::Arc;

use baton_kv_memory::KvMemory;
use cudarc::driver::{result, sys};

use super::device::{CudaMemory, Device, Pinned};
use crate::error::{CudaError, driver};

/// Pinned host memory in slots of one size. A slot takes part in one copy at a time; copies of different slots run in the order in
/// which they were started, beside whatever else the GPU does.
pub struct HostSlots {
    device: Arc<Device>,
    memory: Arc<CudaMemory>,
    stream: sys::CUstream,
    /// Recorded after each slot's last copy.
    events: Vec<sys::CUevent>,
    pinned: Pinned<u8>,
    slot_bytes: usize,
}

/// Which way a copy goes.
#[derive(Clone, Copy)]
enum Direction {
    ToHost,
    ToGpu,
}

impl HostSlots {
    /// `slots` slots of `slot_bytes` beside `memory`.
    ///
    /// # Errors
    /// [`CudaError::Driver`], above all where the system pins no more memory.
    pub fn new(
        device: &Arc<Device>,
        memory: Arc<CudaMemory>,
        slots: usize,
        slot_bytes: usize,
    ) -> Result<Self, CudaError> {
        let pinned = Pinned::zeroed(device, slots * slot_bytes)?;
        let failed = |e| driver("making a stream for staged KV", e);
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        let mut made = Self {
            device: device.clone(),
            memory,
            stream,
            events: Vec::with_capacity(slots),
            pinned,
            slot_bytes,
        };
        for _ in 0..slots {
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
            made.events
                .push(result::event::create(flags).map_err(failed)?);
        }
        Ok(made)
    }

    /// A slot's bytes. No copy of it is under way.
    pub fn slot(&mut self, slot: usize) -> &mut [u8] {
        &mut self.pinned[slot * self.slot_bytes..][..self.slot_bytes]
    }

    /// Starts copying ranges of the memory into a slot, one behind the other.
    ///
    /// # Errors
    /// A sentence, also where ranges reach outside.
    pub fn fetch(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), CudaError> {
        self.copy(slot, ranges, Direction::ToHost)
    }

    /// Starts copying a slot into ranges of the memory.
    ///
    /// # Errors
    /// A sentence, also where ranges reach outside.
    pub fn store(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), CudaError> {
        self.copy(slot, ranges, Direction::ToGpu)
    }

    /// Whether the slot's last copy has ended.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn is_done(&self, slot: usize) -> Result<bool, CudaError> {
        // SAFETY: a live event.
        match unsafe { result::event::query(self.events[slot]) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(driver("copying staged KV", error)),
        }
    }

    fn copy(
        &mut self,
        slot: usize,
        ranges: &[Range<u64>],
        direction: Direction,
    ) -> Result<(), CudaError> {
        let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        let bytes = self.memory.len() as u64;
        if total > self.slot_bytes as u64 || ranges.iter().any(|range| range.end > bytes) {
            return Err(CudaError::Device(
                "ranges of staged KV reach outside the arena or the slot".to_owned(),
            ));
        }
        let (stream, event) = (self.stream, self.events[slot]);
        let base = self.memory.address().number();
        let mut rest = self.slot(slot);
        let failed = |e| driver("copying staged KV", e);
        for range in ranges {
            let host;
            (host, rest) = rest.split_at_mut((range.end - range.start) as usize);
            let at = base + range.start;
            // SAFETY: within the allocation and the slot, as checked above; the slot is not looked at before the event.
            unsafe {
                match direction {
                    Direction::ToHost => result::memcpy_dtoh_async(host, at, stream),
                    Direction::ToGpu => result::memcpy_htod_async(at, host, stream),
                }
            }
            .map_err(failed)?;
        }
        // SAFETY: a live event and a live stream of one device.
        unsafe { result::event::record(event, stream) }.map_err(failed)
    }
}

impl Drop for HostSlots {
    fn drop(&mut self) {
        // SAFETY: made in `new`; copies are waited for before their memory goes.
        unsafe {
            let _ = self.device.bind();
            let _ = result::stream::synchronize(self.stream);
            for event in self.events.drain(..) {
                let _ = result::event::destroy(event);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}
