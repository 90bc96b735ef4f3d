//! A captured sequence of launches, replayed as one.

use std::sync::Arc;

use cudarc::driver::{DriverError, sys};

use super::device::Device;
use crate::error::{CudaError, driver};

/// An instantiated graph.
pub struct Graph {
    device: Arc<Device>,
    executable: sys::CUgraphExec,
}

// SAFETY: the driver's handles may be used from any thread that has made the context current.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `record` launches on the device's stream; none of it runs. Kernels must have been launched once
    /// before: loading one lazily cannot be captured.
    ///
    /// # Errors
    /// Those of `record`, and [`CudaError::Driver`].
    pub fn capture(
        device: &Arc<Device>,
        record: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Self, CudaError> {
        let failed = |e: DriverError| driver("capturing a graph", e);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live stream that nobody else uses; the capture is ended below, whatever happens between.
        unsafe { sys::cuStreamBeginCapture_v2(device.stream(), mode) }
            .result()
            .map_err(failed)?;
        let recorded = record();
        let mut graph = std::ptr::null_mut();
        // SAFETY: as above; one handle is written.
        let ended = unsafe { sys::cuStreamEndCapture(device.stream(), &mut graph) }.result();
        recorded?;
        ended.map_err(failed)?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: a captured graph, destroyed once it is instantiated.
        let instantiated = unsafe {
            let result = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result();
            let _ = sys::cuGraphDestroy(graph);
            result
        };
        instantiated.map_err(failed)?;
        Ok(Self {
            device: device.clone(),
            executable,
        })
    }

    /// Launches it.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// Everything its kernels were given when it was captured is still there.
    pub unsafe fn launch(&self) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; an instantiated graph of this device.
        unsafe { sys::cuGraphLaunch(self.executable, self.device.stream()) }
            .result()
            .map_err(|e| driver("launching a step", e))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated in `capture`; the stream is idle when an executor is dropped.
        unsafe {
            let _ = self.device.bind();
            let _ = sys::cuGraphExecDestroy(self.executable);
        }
    }
}
