//! A mark on the stream that the host can wait for.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::Device;
use crate::error::{CudaError, driver};

/// Tells when everything launched before it is done.
pub struct Event {
    device: Arc<Device>,
    handle: sys::CUevent,
}

// SAFETY: the driver's handles may be used from any thread that has made the context current.
unsafe impl Send for Event {}

impl Event {
    /// One that nothing waits behind yet.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let handle = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|e| driver("making an event", e))?;
        Ok(Self {
            device: device.clone(),
            handle,
        })
    }

    /// Stands behind all that was launched on the device's stream until now.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn record(&self) -> Result<(), CudaError> {
        // SAFETY: a live event and stream.
        unsafe { result::event::record(self.handle, self.device.stream()) }
            .map_err(|e| driver("marking the end of a step", e))
    }

    /// Waits until all that it was recorded behind is done, however long a GPU that hangs may take: a thread that waits for the
    /// driver cannot be freed. Whoever runs steps watches how long one takes, and ends the process (`workers/worker/src/watch.rs`).
    ///
    /// # Errors
    /// [`CudaError::Driver`]: of the launches before, too.
    pub fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: a live event.
        unsafe { result::event::synchronize(self.handle) }
            .map_err(|e| driver("waiting for the GPU", e))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`; the driver keeps it as long as it is pending.
        unsafe {
            let _ = self.device.bind();
            let _ = result::event::destroy(self.handle);
        }
    }
}
