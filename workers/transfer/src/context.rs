//! UCX's configuration and its context.

use std::ffi::{CStr, CString};
use std::ptr::{null, null_mut};

use ucx_sys::*;

use crate::TransferError;

/// Settings without which the agent does not do what it promises. An environment variable `UCX_…` of the
/// same name wins over them.
const SETTINGS: [(&str, &str); 2] = [
    // Death of a peer over shared memory is seen by this alone; the default is 20 s.
    ("KEEPALIVE_INTERVAL", "1s"),
    // The cache cannot cope with memory of cudaMalloc that it did not see allocated.
    ("MEMTYPE_CACHE", "n"),
];

/// One more where shared memory may be used: error handling drops it otherwise. Elsewhere UCX would warn of
/// a setting that nobody reads.
const SHARED_MEMORY_SETTING: (&str, &str) = ("MM_ERROR_HANDLING", "y");

/// Names in a list of transports that stand for shared memory.
const SHARED_MEMORY: [&str; 7] = ["all", "sm", "shm", "mm", "posix", "sysv", "xpmem"];

/// A UCX context. Threads may share it: it is set up so.
pub(crate) struct Context {
    pub(crate) ucp: &'static Ucp,
    pub(crate) handle: ucp_context_h,
}

// SAFETY: the context is created with `mt_workers_shared`, so UCX locks what threads share of it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// `tls` is UCX's list of transports, `UCX_TLS`.
    pub(crate) fn new(tls: Option<&str>) -> Result<Self, TransferError> {
        let ucp = Ucp::load()?;
        let mut config = null_mut();
        // SAFETY: null stands for the default prefix and no file; `config` is a place to write to.
        check(ucp, "ucp_config_read", unsafe {
            (ucp.ucp_config_read)(null(), null(), &mut config)
        })?;
        let chosen = tls
            .map(str::to_owned)
            .or_else(|| std::env::var("UCX_TLS").ok());
        let shared_memory = chosen
            .is_none_or(|list| may_share_memory(&list))
            .then_some(SHARED_MEMORY_SETTING);
        let own = SETTINGS
            .into_iter()
            .chain(shared_memory)
            .filter(|(name, _)| std::env::var_os(format!("UCX_{name}")).is_none());
        let mut outcome = Ok(());
        for (name, value) in own.chain(tls.map(|tls| ("TLS", tls))) {
            outcome = outcome.and_then(|()| modify(ucp, config, name, value));
        }
        let context = outcome.and_then(|()| Self::init(ucp, config));
        // SAFETY: it was read above and is used no more.
        unsafe { (ucp.ucp_config_release)(config) };
        context
    }

    fn init(ucp: &'static Ucp, config: *const std::ffi::c_void) -> Result<Self, TransferError> {
        let params = ucp_params_t {
            field_mask: UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED,
            features: UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP,
            mt_workers_shared: 1,
            ..Default::default()
        };
        let mut handle = null_mut();
        // SAFETY: `params` and `config` are valid for the call; `handle` is a place to write to.
        check(ucp, "ucp_init", unsafe {
            (ucp.ucp_init_version)(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &mut handle)
        })?;
        Ok(Self { ucp, handle })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: workers and regions hold the context by `Arc`, so all of them are gone.
        unsafe { (self.ucp.ucp_cleanup)(self.handle) };
    }
}

/// Whether a `UCX_TLS` names shared memory, or excludes (`^`) something else.
fn may_share_memory(list: &str) -> bool {
    list.starts_with('^') || list.split(',').any(|name| SHARED_MEMORY.contains(&name))
}

fn modify(
    ucp: &Ucp,
    config: *mut std::ffi::c_void,
    name: &str,
    value: &str,
) -> Result<(), TransferError> {
    let c = |text: &str| {
        CString::new(text).map_err(|_| TransferError::Ucx {
            call: "ucp_config_modify",
            status: format!("{text:?} holds a zero byte"),
        })
    };
    let (c_name, c_value) = (c(name)?, c(value)?);
    // SAFETY: `config` was read by the caller; both are C strings.
    let status = unsafe { (ucp.ucp_config_modify)(config, c_name.as_ptr(), c_value.as_ptr()) };
    if status != UCS_OK {
        let status = format!("UCX_{name}={value}: {}", status_text(ucp, status));
        return Err(TransferError::Ucx {
            call: "ucp_config_modify",
            status,
        });
    }
    Ok(())
}

/// An error unless the status is `UCS_OK`.
pub(crate) fn check(
    ucp: &Ucp,
    call: &'static str,
    status: ucs_status_t,
) -> Result<(), TransferError> {
    if status == UCS_OK {
        return Ok(());
    }
    Err(TransferError::Ucx {
        call,
        status: status_text(ucp, status),
    })
}

/// A status in UCX's words.
pub(crate) fn status_text(ucp: &Ucp, status: ucs_status_t) -> String {
    // SAFETY: it returns a string with static lifetime, or one in a static buffer, for any number.
    unsafe { CStr::from_ptr((ucp.ucs_status_string)(status)) }
        .to_string_lossy()
        .into_owned()
}
