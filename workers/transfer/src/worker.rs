//! The UCX worker: what progresses, and what says when there is something to progress.

use std::ptr::null_mut;
use std::sync::Arc;

use ucx_sys::*;

use crate::TransferError;
use crate::context::{Context, check, status_text};

/// A UCX worker. It belongs to the thread that made it.
pub(crate) struct Worker {
    context: Arc<Context>,
    pub(crate) handle: ucp_worker_h,
    /// Becomes readable when there is news, once armed.
    pub(crate) event_fd: i32,
}

impl Worker {
    pub(crate) fn new(context: Arc<Context>) -> Result<Self, TransferError> {
        let ucp = context.ucp;
        let params = ucp_worker_params_t {
            field_mask: UCP_WORKER_PARAM_FIELD_THREAD_MODE,
            thread_mode: UCS_THREAD_MODE_SINGLE,
            ..Default::default()
        };
        let mut handle = null_mut();
        // SAFETY: context and params are valid; `handle` is a place to write to.
        check(ucp, "ucp_worker_create", unsafe {
            (ucp.ucp_worker_create)(context.handle, &params, &mut handle)
        })?;
        let mut worker = Self {
            context,
            handle,
            event_fd: -1,
        };
        // SAFETY: the worker was just made, with the wakeup feature.
        check(ucp, "ucp_worker_get_efd", unsafe {
            (ucp.ucp_worker_get_efd)(handle, &mut worker.event_fd)
        })?;
        Ok(worker)
    }

    pub(crate) fn address(&self) -> Result<Vec<u8>, TransferError> {
        let ucp = self.context.ucp;
        let (mut address, mut length) = (null_mut(), 0);
        // SAFETY: the worker is alive; the rest are places to write to.
        check(ucp, "ucp_worker_get_address", unsafe {
            (ucp.ucp_worker_get_address)(self.handle, &mut address, &mut length)
        })?;
        // SAFETY: UCX says that there are `length` bytes.
        let bytes = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), length) }.to_vec();
        // SAFETY: got above, and copied.
        unsafe { (ucp.ucp_worker_release_address)(self.handle, address) };
        Ok(bytes)
    }

    /// Returns whether anything happened.
    pub(crate) fn progress(&self) -> bool {
        // SAFETY: the worker is alive and this is its thread. Callbacks touch nothing but tallies and
        // failure cells.
        unsafe { (self.context.ucp.ucp_worker_progress)(self.handle) > 0 }
    }

    /// Whether UCX will now signal news on `event_fd`. If not, there is news already.
    pub(crate) fn arm(&self) -> bool {
        // SAFETY: as in `progress`.
        let status = unsafe { (self.context.ucp.ucp_worker_arm)(self.handle) };
        if status != UCS_OK && status != UCS_ERR_BUSY {
            tracing::error!(
                "UCX: ucp_worker_arm failed: {}",
                status_text(self.context.ucp, status)
            );
        }
        status == UCS_OK
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SAFETY: its endpoints are closed or unused, and nothing is in flight.
        unsafe { (self.context.ucp.ucp_worker_destroy)(self.handle) };
    }
}
