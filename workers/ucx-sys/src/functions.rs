//! The functions of libucp that Baton calls.

use std::ffi::{c_char, c_int, c_uint, c_void};

use libc::FILE;
use libloading::os::unix::Library;

use crate::types::*;

macro_rules! functions {
    ($($name:ident: fn($($argument:ident: $kind:ty),* $(,)?) $(-> $result:ty)?;)*) => {
        /// Function pointers into libucp, each named and typed as in `<ucp/api/ucp.h>`.
        ///
        /// Calling one is `unsafe`: the contract is the one in UCX's documentation.
        pub struct Ucp {
            $(pub $name: unsafe extern "C" fn($($argument: $kind),*) $(-> $result)?,)*
        }

        impl Ucp {
            /// Looks every function up.
            ///
            /// # Safety
            /// `library` must be a libucp, and must never be unloaded.
            pub(crate) unsafe fn resolve(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: the symbol of this name in a libucp has this type; the caller keeps the
                    // library loaded.
                    $($name: unsafe { *library.get(concat!(stringify!($name), "\0").as_bytes())? },)*
                })
            }
        }
    };
}

functions! {
    ucp_get_version: fn(major: *mut c_uint, minor: *mut c_uint, release: *mut c_uint);
    ucs_status_string: fn(status: ucs_status_t) -> *const c_char;

    ucp_config_read: fn(prefix: *const c_char, file: *const c_char, config: *mut *mut c_void) -> ucs_status_t;
    ucp_config_modify: fn(config: *mut c_void, name: *const c_char, value: *const c_char) -> ucs_status_t;
    ucp_config_release: fn(config: *mut c_void);

    // `ucp_init` is `static inline`; this is the exported symbol beneath it.
    ucp_init_version: fn(
        major: c_uint, minor: c_uint, params: *const ucp_params_t, config: *const c_void, context: *mut ucp_context_h,
    ) -> ucs_status_t;
    ucp_cleanup: fn(context: ucp_context_h);
    ucp_context_print_info: fn(context: ucp_context_h, stream: *mut FILE);

    ucp_worker_create: fn(context: ucp_context_h, params: *const ucp_worker_params_t, worker: *mut ucp_worker_h) -> ucs_status_t;
    ucp_worker_destroy: fn(worker: ucp_worker_h);
    ucp_worker_get_address: fn(worker: ucp_worker_h, address: *mut *mut c_void, length: *mut usize) -> ucs_status_t;
    ucp_worker_release_address: fn(worker: ucp_worker_h, address: *mut c_void);
    ucp_worker_progress: fn(worker: ucp_worker_h) -> c_uint;
    ucp_worker_get_efd: fn(worker: ucp_worker_h, fd: *mut c_int) -> ucs_status_t;
    ucp_worker_arm: fn(worker: ucp_worker_h) -> ucs_status_t;
    ucp_worker_set_am_recv_handler: fn(worker: ucp_worker_h, param: *const ucp_am_handler_param_t) -> ucs_status_t;

    ucp_mem_map: fn(context: ucp_context_h, params: *const ucp_mem_map_params_t, memory: *mut ucp_mem_h) -> ucs_status_t;
    ucp_mem_query: fn(memory: ucp_mem_h, attributes: *mut ucp_mem_attr_t) -> ucs_status_t;
    ucp_mem_unmap: fn(context: ucp_context_h, memory: ucp_mem_h) -> ucs_status_t;

    ucp_rkey_pack: fn(context: ucp_context_h, memory: ucp_mem_h, buffer: *mut *mut c_void, length: *mut usize) -> ucs_status_t;
    ucp_rkey_buffer_release: fn(buffer: *mut c_void);
    ucp_ep_rkey_unpack: fn(ep: ucp_ep_h, buffer: *const c_void, rkey: *mut ucp_rkey_h) -> ucs_status_t;
    ucp_rkey_destroy: fn(rkey: ucp_rkey_h);

    ucp_ep_create: fn(worker: ucp_worker_h, params: *const ucp_ep_params_t, ep: *mut ucp_ep_h) -> ucs_status_t;
    ucp_ep_close_nbx: fn(ep: ucp_ep_h, param: *const ucp_request_param_t) -> ucs_status_ptr_t;
    ucp_ep_print_info: fn(ep: ucp_ep_h, stream: *mut FILE);

    ucp_get_nbx: fn(
        ep: ucp_ep_h, buffer: *mut c_void, count: usize, remote: u64, rkey: ucp_rkey_h, param: *const ucp_request_param_t,
    ) -> ucs_status_ptr_t;
    ucp_am_send_nbx: fn(
        ep: ucp_ep_h, id: c_uint, header: *const c_void, header_length: usize, buffer: *const c_void, count: usize,
        param: *const ucp_request_param_t,
    ) -> ucs_status_ptr_t;
    ucp_request_check_status: fn(request: *mut c_void) -> ucs_status_t;
    ucp_request_free: fn(request: *mut c_void);
    ucp_request_cancel: fn(worker: ucp_worker_h, request: *mut c_void);
}
