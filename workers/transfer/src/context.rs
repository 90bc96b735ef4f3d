//! UCX's configuration and its context.

use std::ffi::{CStr, CString, c_void};
use std::ptr::{null, null_mut};

use baton_protocol::UcxVersion;
use ucx_sys::*;

use crate::TransferError;
use crate::printed::{distinct, printed, transport_name};

/// Length of one read where the peer answers with messages. UCX is told to send as much in one piece.
pub(crate) const EMULATED_READ_BYTES: u64 = 256 << 10;

/// A setting without which the agent does not do what it promises. An environment variable `UCX_…` of the
/// same name wins over it.
struct Setting {
    name: &'static str,
    /// What 1.13 calls it here, if not so: there a transport's own prefix is left out. Releases that want
    /// the prefix refuse the name without it, so it is tried first.
    short: Option<&'static str>,
    value: String,
    /// Names in a list of transports that make UCX read the setting: it warns of those that nobody reads.
    /// None: it always does.
    transports: &'static [&'static str],
}

/// How UCX allocates an arena, by the transports that it may use (`UCX_TLS`). Peers on the host read it in place where it is a
/// System V segment, and that vanishes with its last user, also after kill -9. UCX's own choice goes on to POSIX segments where
/// a System V one cannot be had: those are filled while they are files in /dev/shm, and stay there if that kills the process.
fn allocation(list: Option<&str>) -> &'static str {
    match uses_system_v(list) {
        true => SYSTEM_V,
        false => "thp,mmap,heap",
    }
}

/// System V segments or nothing.
const SYSTEM_V: &str = "md:sysv";

/// Whether a list of transports has System V shared memory.
fn uses_system_v(list: Option<&str>) -> bool {
    const NAMES: [&str; 5] = ["sysv", "mm", "shm", "sm", "all"];
    let Some(list) = list else { return true };
    let (excluded, names) = match list.strip_prefix('^') {
        Some(names) => (true, names),
        None => (false, list),
    };
    let is_named = names.split(',').any(|name| NAMES.contains(&name.trim()));
    is_named != excluded
}

fn settings(list: Option<&str>, gpus: bool) -> Vec<Setting> {
    let always = |name, value: &str| Setting {
        name,
        short: None,
        value: value.into(),
        transports: &[],
    };
    let tcp = |name, short, value: &str| Setting {
        name,
        short: Some(short),
        value: value.into(),
        transports: &["tcp"],
    };
    // An answer to a read travels in one piece, with room for its header: see `pull::EMULATED`.
    let segment = (EMULATED_READ_BYTES + (8 << 10)).to_string();
    let mut all = vec![
        // Death of a peer over shared memory is seen by this alone; the default is 20 s.
        always("KEEPALIVE_INTERVAL", "1s"),
        // The cache cannot cope with memory of cudaMalloc that it did not see allocated.
        always("MEMTYPE_CACHE", "n"),
        always("ALLOC_PRIO", allocation(list)),
        // Error handling drops shared memory otherwise.
        Setting {
            name: "MM_ERROR_HANDLING",
            short: None,
            value: "y".into(),
            transports: &["sm", "shm", "mm", "posix", "sysv", "xpmem"],
        },
        tcp("TCP_TX_SEG_SIZE", "TX_SEG_SIZE", &segment),
        tcp("TCP_RX_SEG_SIZE", "RX_SEG_SIZE", &segment),
        // Otherwise a peer that cannot be reached holds the thread up for as long as the kernel tries, two minutes, and with
        // it everybody else's transfers.
        tcp("TCP_CONN_NB", "CONN_NB", "y"),
    ];
    if gpus {
        // By itself UCX reads in place only where a host's GPUs have NVLink. Without this, workers that share a GPU moved KV at 2 GB/s, and
        // with it at 2,400.
        all.push(Setting {
            name: "CUDA_IPC_ENABLE_GET_ZCOPY",
            short: None,
            value: "on".into(),
            transports: &["cuda", "cuda_ipc"],
        });
    }
    all
}

impl Setting {
    /// Whether it is to be made, with this list of transports.
    fn applies(&self, list: Option<&str>) -> bool {
        let read = self.transports.is_empty()
            || list.is_none_or(|list| {
                // `^x` names what is left out; which rest stays is UCX's affair.
                list.starts_with('^')
                    || list
                        .split(',')
                        .any(|name| name == "all" || self.transports.contains(&name))
            });
        read && std::env::var_os(format!("UCX_{}", self.name)).is_none()
    }

    fn make(&self, ucp: &Ucp, config: *mut c_void) -> Result<(), TransferError> {
        match self
            .short
            .map(|short| modify(ucp, config, short, &self.value))
        {
            Some(Ok(())) => Ok(()),
            _ => modify(ucp, config, self.name, &self.value),
        }
    }
}

/// A UCX context. Threads may share it: it is set up so.
pub(crate) struct Context {
    pub(crate) ucp: &'static Ucp,
    pub(crate) handle: ucp_context_h,
    /// Whether what UCX allocates is System V shared memory.
    pub(crate) has_system_v_arenas: bool,
}

// SAFETY: the context is created with `mt_workers_shared`, so UCX locks what threads share of it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// `tls` is UCX's list of transports, `UCX_TLS`; `gpus`: arenas lie on GPUs.
    pub(crate) fn new(tls: Option<&str>, gpus: bool) -> Result<Self, TransferError> {
        let ucp = Ucp::load()?;
        let mut config = null_mut();
        // SAFETY: null stands for the default prefix and no file; `config` is a place to write to.
        check(ucp, "ucp_config_read", unsafe {
            (ucp.ucp_config_read)(null(), null(), &mut config)
        })?;
        let environment = std::env::var("UCX_TLS").ok();
        let tls = tls.or(default_tls(ucp.version()).filter(|_| environment.is_none()));
        let chosen = tls.or(environment.as_deref());
        let mut outcome = Ok(());
        // Debian's 1.13 has no CUDA.
        let gpus = gpus && !is_without_cuda(ucp.version());
        for setting in settings(chosen, gpus)
            .iter()
            .filter(|setting| setting.applies(chosen))
        {
            outcome = outcome.and_then(|()| setting.make(ucp, config));
        }
        if let Some(tls) = tls {
            outcome = outcome.and_then(|()| modify(ucp, config, "TLS", tls));
        }
        let is_set = std::env::var("UCX_ALLOC_PRIO").ok();
        let method = is_set.as_deref().unwrap_or(allocation(chosen));
        let has_system_v_arenas = method == SYSTEM_V;
        let context = outcome.and_then(|()| Self::init(ucp, config, has_system_v_arenas));
        // SAFETY: it was read above and is used no more.
        unsafe { (ucp.ucp_config_release)(config) };
        context
    }

    fn init(
        ucp: &'static Ucp,
        config: *const c_void,
        has_system_v_arenas: bool,
    ) -> Result<Self, TransferError> {
        let params = ucp_params_t {
            field_mask: UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED,
            features: UCP_FEATURE_RMA | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP,
            mt_workers_shared: 1,
            ..Default::default()
        };
        let mut handle = null_mut();
        // SAFETY: `params` and `config` are valid for the call; `handle` is a place to write to.
        check(ucp, "ucp_init", unsafe {
            (ucp.ucp_init_version)(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &mut handle)
        })?;
        Ok(Self {
            ucp,
            handle,
            has_system_v_arenas,
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: workers and regions hold the context by `Arc`, so all of them are gone.
        unsafe { (self.ucp.ucp_cleanup)(self.handle) };
    }
}

/// What to say of transports when nobody chose: nothing, or, since 1.14, no shared memory. There it only carries messages, and a reader killed while it writes one into the target's
/// queue blocks that queue for ever: 7 of 80 times with 1.22.
fn default_tls((major, minor, _): (u32, u32, u32)) -> Option<&'static str> {
    ((major, minor) >= (1, 14)).then_some("^sm")
}

/// Releases that no package has with CUDA: they would warn of settings for it.
fn is_without_cuda((major, minor, _): (u32, u32, u32)) -> bool {
    (major, minor) < (1, 14)
}

fn modify(ucp: &Ucp, config: *mut c_void, name: &str, value: &str) -> Result<(), TransferError> {
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

/// Version of a loaded UCX.
pub(crate) fn version(ucp: &Ucp) -> UcxVersion {
    let (major, minor, release) = ucp.version();
    UcxVersion(major, minor, release)
}

/// Transports that UCX found on this host: `posix,cma,tcp`.
pub(crate) fn transports(context: &Context) -> String {
    let text = printed(|file| {
        // SAFETY: context and stream are valid.
        unsafe { (context.ucp.ucp_context_print_info)(context.handle, file) }
    });
    tracing::trace!("{text}");
    let names = text
        .lines()
        .filter(|line| line.contains("resource"))
        .filter_map(transport_name);
    distinct(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_for_releases_that_read_it_in_place() {
        assert_eq!(default_tls((1, 13, 1)), None);
        assert_eq!(default_tls((1, 22, 0)), Some("^sm"));
    }

    #[test]
    fn an_arena_is_a_system_v_segment_or_private_and_never_a_file() {
        for list in [
            None,
            Some("all"),
            Some("sm,self"),
            Some("sysv,tcp"),
            Some("^cma,xpmem"),
        ] {
            assert_eq!(allocation(list), SYSTEM_V, "{list:?}");
        }
        for list in ["tcp,self", "^sm", "posix,tcp", "^sysv", "cma"] {
            assert!(!allocation(Some(list)).contains("md:"), "{list}");
        }
    }

    #[test]
    fn settings_follow_the_transports() {
        let made = |list| {
            let settings = settings(list, true);
            let made = settings.iter().filter(|setting| setting.applies(list));
            made.map(|setting| setting.name).collect::<Vec<_>>()
        };
        assert_eq!(made(None).len(), settings(None, true).len());
        assert_eq!(made(Some("^cma")).len(), settings(None, true).len());
        assert!(!made(Some("tcp,self")).contains(&"MM_ERROR_HANDLING"));
        assert!(!made(Some("shm,self")).contains(&"TCP_TX_SEG_SIZE"));
        assert!(made(Some("tcp,self")).contains(&"TCP_CONN_NB"));
        // Staged: nothing is read in place.
        assert!(!made(Some("tcp,cuda_copy,self")).contains(&"CUDA_IPC_ENABLE_GET_ZCOPY"));
        assert!(made(Some("tcp,cuda_ipc,self")).contains(&"CUDA_IPC_ENABLE_GET_ZCOPY"));
        assert_eq!(settings(None, false).len() + 1, settings(None, true).len());
    }
}
