//! One connection: an endpoint and the remote keys of the peer's arenas.

use std::cell::Cell;
use std::ffi::c_void;
use std::num::NonZeroU64;
use std::ptr::null_mut;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use baton_protocol::MemoryType;
use libc::FILE;
use ucx_sys::*;

use crate::TransferError;
use crate::context::{check, status_text};
use crate::descriptor::{PeerPlan, RankPlan};
use crate::flow::Flow;
use crate::key::PeerKey;
use crate::vitals::Vitals;

/// A rank's arena as seen from here.
pub(crate) struct RemoteRegion {
    /// Null where the peer's UCX does not know the arena.
    pub(crate) rkey: ucp_rkey_h,
    pub(crate) base: u64,
    pub(crate) bytes: NonZeroU64,
    pub(crate) memory: MemoryType,
}

/// A live or failed connection. Only the agent's thread touches it.
///
/// Transfers share it by `Rc`, so its remote keys outlive every request that uses them; the thread keeps
/// one more until UCX has closed the endpoint, because the error handler writes to `failure`.
pub(crate) struct Link {
    ucp: &'static Ucp,
    pub(crate) key: PeerKey,
    /// What the peer knows us by, where it sends us staged KV.
    pub(crate) reader: u64,
    ep: ucp_ep_h,
    regions: Vec<RemoteRegion>,
    failure: Rc<Cell<Option<ucs_status_t>>>,
    /// Set when it failed because nothing came: how much was owed then.
    stalled: Cell<Option<usize>>,
    /// Whether the peer has to answer reads with messages; assumed until it is known.
    pub(crate) emulated: Cell<bool>,
    /// Whether KV comes by way of host memory, asked for in messages.
    pub(crate) staged: Cell<bool>,
    /// Whether the peer answers such messages: none while it has not said.
    pub(crate) welcome: Cell<Option<bool>>,
    /// What is outstanding, of all transfers, and how fast it comes.
    pub(crate) flow: Rc<Flow>,
    /// Where requests of all links are counted.
    pub(crate) vitals: Arc<Vitals>,
}

impl Link {
    /// Makes the endpoint; UCX connects when the first read is posted. An error beside the link says
    /// that a key was refused: then the link can only be closed.
    pub(crate) fn open(
        ucp: &'static Ucp,
        worker: ucp_worker_h,
        key: PeerKey,
        reader: u64,
        plan: &PeerPlan,
        vitals: Arc<Vitals>,
        stall_after: Duration,
    ) -> Result<(Self, Result<(), TransferError>), TransferError> {
        let failure = Rc::new(Cell::new(None));
        let params = ucp_ep_params_t {
            field_mask: UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
                | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
                | UCP_EP_PARAM_FIELD_ERR_HANDLER,
            address: plan.address.as_ptr().cast(),
            // Without it the requests of a killed peer never end.
            err_mode: UCP_ERR_HANDLING_MODE_PEER,
            err_handler: ucp_err_handler_t {
                cb: Some(on_endpoint_error),
                arg: Rc::as_ptr(&failure).cast_mut().cast(),
            },
            ..Default::default()
        };
        let mut ep = null_mut();
        // SAFETY: the worker is alive and this is its thread; the address is a whole one, as its seal
        // shows; `failure` outlives the endpoint, see above.
        check(ucp, "ucp_ep_create", unsafe {
            (ucp.ucp_ep_create)(worker, &params, &mut ep)
        })?;
        let mut link = Self {
            ucp,
            key,
            reader,
            ep,
            regions: Vec::with_capacity(plan.ranks.len()),
            failure,
            stalled: Cell::new(None),
            emulated: Cell::new(true),
            staged: Cell::new(false),
            welcome: Cell::new(None),
            flow: Rc::new(Flow::new(stall_after)),
            vitals,
        };
        let outcome = plan.ranks.iter().try_for_each(|rank| link.unpack(rank));
        Ok((link, outcome))
    }

    fn unpack(&mut self, rank: &RankPlan) -> Result<(), TransferError> {
        let mut rkey = null_mut();
        if let Some(packed) = &rank.rkey {
            // SAFETY: the endpoint is alive; the key is a whole one, as its seal shows.
            check(self.ucp, "ucp_ep_rkey_unpack", unsafe {
                (self.ucp.ucp_ep_rkey_unpack)(self.ep, packed.as_ptr().cast(), &mut rkey)
            })?;
        }
        self.regions.push(RemoteRegion {
            rkey,
            base: rank.base,
            bytes: rank.bytes,
            memory: rank.memory,
        });
        Ok(())
    }

    pub(crate) fn ep(&self) -> ucp_ep_h {
        self.ep
    }

    /// The peer's arenas, by rank.
    pub(crate) fn regions(&self) -> &[RemoteRegion] {
        &self.regions
    }

    /// Whether GPU memory is at either end. Only some transports read that in place.
    pub(crate) fn is_gpu(&self, own: MemoryType) -> bool {
        let theirs = self.regions.iter().map(|region| region.memory);
        theirs.chain([own]).any(|memory| memory == MemoryType::Cuda)
    }

    /// Whether every arena may be read by one side alone.
    pub(crate) fn has_keys(&self) -> bool {
        self.regions.iter().all(|region| !region.rkey.is_null())
    }

    /// What UCX reported of the endpoint, once it has failed.
    pub(crate) fn failure(&self) -> Option<ucs_status_t> {
        self.failure.get()
    }

    /// What was owed when nothing had come for too long; `None` if it did not fail so.
    pub(crate) fn stalled(&self) -> Option<usize> {
        self.stalled.get()
    }

    /// The connection is broken: it owes something and delivers nothing. It is to be closed.
    pub(crate) fn stall(&self) {
        if self.failure.get().is_none() {
            self.failure.set(Some(UCS_ERR_ENDPOINT_TIMEOUT));
            self.stalled.set(Some(self.flow.owed()));
        }
    }

    /// Begins to close the endpoint without waiting for the peer; afterwards no request may be posted.
    /// What is in flight ends with an error, mostly at once. Returns the request to wait for.
    ///
    /// Must not be called from inside a UCX callback, and only once.
    pub(crate) fn close(&self) -> Option<*mut c_void> {
        if self.failure.get().is_none() {
            self.failure.set(Some(UCS_ERR_CANCELED));
        }
        let param = ucp_request_param_t {
            op_attr_mask: UCP_OP_ATTR_FIELD_FLAGS,
            flags: UCP_EP_CLOSE_FLAG_FORCE,
            ..Default::default()
        };
        // SAFETY: the endpoint is alive and is closed once.
        let pointer = unsafe { (self.ucp.ucp_ep_close_nbx)(self.ep, &param) };
        status_of_pointer(pointer).unwrap_or_else(|status| {
            let status = status_text(self.ucp, status);
            tracing::warn!(peer = %self.key, "UCX: ucp_ep_close_nbx failed: {status}");
            // The endpoint is still there, and its error handler writes to this cell: it must never go.
            std::mem::forget(self.failure.clone());
            None
        })
    }

    /// Lets UCX print how the endpoint is made up.
    pub(crate) fn print_info(&self, file: *mut FILE) {
        // SAFETY: the endpoint is alive, the stream open.
        unsafe { (self.ucp.ucp_ep_print_info)(self.ep, file) };
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for region in self.regions.iter().filter(|region| !region.rkey.is_null()) {
            // SAFETY: unpacked by us; every request that used it has ended, because its transfer held
            // this link.
            unsafe { (self.ucp.ucp_rkey_destroy)(region.rkey) };
        }
    }
}

/// Notes the failure. The agent's thread closes the endpoint later, from outside the callback.
unsafe extern "C" fn on_endpoint_error(arg: *mut c_void, _ep: ucp_ep_h, status: ucs_status_t) {
    // SAFETY: `arg` is the cell that `Link::open` passed, alive until the endpoint is closed; UCX calls
    // from the agent's thread alone.
    let failure = unsafe { &*arg.cast::<Cell<Option<ucs_status_t>>>() };
    failure.set(Some(status));
}
