//! Structures and constants of `<ucp/api/ucp.h>`, as far as Baton uses them.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// A status: `UCS_OK`, `UCS_INPROGRESS`, or a negative error. One byte: the C enum is packed.
pub type ucs_status_t = i8;
/// Null (done), an error in the last 100 addresses, or a request. See [`status_of_pointer`].
pub type ucs_status_ptr_t = *mut c_void;
/// An opaque `ucp_context_h`.
pub type ucp_context_h = *mut c_void;
/// An opaque `ucp_worker_h`.
pub type ucp_worker_h = *mut c_void;
/// An opaque `ucp_ep_h`.
pub type ucp_ep_h = *mut c_void;
/// An opaque `ucp_mem_h`.
pub type ucp_mem_h = *mut c_void;
/// An opaque `ucp_rkey_h`.
pub type ucp_rkey_h = *mut c_void;
/// Called when a request ends.
pub type ucp_send_nbx_callback_t =
    unsafe extern "C" fn(request: *mut c_void, status: ucs_status_t, user_data: *mut c_void);
/// Called when an endpoint fails.
pub type ucp_err_handler_cb_t =
    unsafe extern "C" fn(arg: *mut c_void, ep: ucp_ep_h, status: ucs_status_t);

/// Called when an active message has come. `data` is valid until it returns.
pub type ucp_am_recv_callback_t = unsafe extern "C" fn(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    data: *mut c_void,
    length: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t;

/// What a [`ucs_status_ptr_t`] says: `Ok(None)` done, `Ok(Some(request))` under way, or an error.
///
/// # Errors
/// The status, if the pointer is one.
pub fn status_of_pointer(pointer: ucs_status_ptr_t) -> Result<Option<*mut c_void>, ucs_status_t> {
    let value = pointer as isize;
    if pointer.is_null() {
        Ok(None)
    } else if (UCS_ERR_LAST as isize..0).contains(&value) {
        Err(value as ucs_status_t)
    } else {
        Ok(Some(pointer))
    }
}

macro_rules! zeroed_default {
    ($($structure:ident),* $(,)?) => {
        $(impl Default for $structure {
            fn default() -> Self {
                // SAFETY: all fields are integers, raw pointers and optional function pointers, for
                // which zero is a value; a zero `field_mask` says that none of them is set.
                unsafe { std::mem::zeroed() }
            }
        })*
    };
}

zeroed_default!(
    ucp_params_t,
    ucp_worker_params_t,
    ucp_mem_map_params_t,
    ucp_mem_attr_t,
    ucp_ep_params_t,
    ucp_request_param_t,
    ucp_am_handler_param_t,
);

/// Tail for fields that newer releases append.
type Tail = [u64; 16];

/// Parameters of `ucp_init_version`.
#[repr(C)]
#[derive(Clone)]
pub struct ucp_params_t {
    pub field_mask: u64,
    pub features: u64,
    pub request_size: usize,
    pub request_init: *mut c_void,
    pub request_cleanup: *mut c_void,
    pub tag_sender_mask: u64,
    pub mt_workers_shared: c_int,
    pub estimated_num_eps: usize,
    pub estimated_num_ppn: usize,
    pub name: *const c_char,
    pub tail: Tail,
}

/// Parameters of `ucp_worker_create`.
#[repr(C)]
#[derive(Clone)]
pub struct ucp_worker_params_t {
    pub field_mask: u64,
    pub thread_mode: c_uint,
    pub cpu_mask: [u64; 16],
    pub events: c_uint,
    pub user_data: *mut c_void,
    pub event_fd: c_int,
    pub flags: u64,
    pub name: *const c_char,
    pub am_alignment: usize,
    pub client_id: u64,
    pub tail: Tail,
}

/// Parameters of `ucp_mem_map`.
#[repr(C)]
#[derive(Clone)]
pub struct ucp_mem_map_params_t {
    pub field_mask: u64,
    pub address: *mut c_void,
    pub length: usize,
    pub flags: c_uint,
    pub prot: c_uint,
    pub memory_type: c_uint,
    pub tail: Tail,
}

/// Result of `ucp_mem_query`.
#[repr(C)]
#[derive(Clone)]
pub struct ucp_mem_attr_t {
    pub field_mask: u64,
    pub address: *mut c_void,
    pub length: usize,
    pub mem_type: c_uint,
    pub tail: Tail,
}

/// What to call when an endpoint fails.
#[repr(C)]
#[derive(Clone)]
pub struct ucp_err_handler_t {
    pub cb: Option<ucp_err_handler_cb_t>,
    pub arg: *mut c_void,
}

/// A socket address.
#[repr(C)]
#[derive(Clone)]
pub struct ucs_sock_addr_t {
    pub addr: *const c_void,
    pub addrlen: u32,
}

/// Parameters of `ucp_ep_create`.
#[repr(C)]
#[derive(Clone)]
pub struct ucp_ep_params_t {
    pub field_mask: u64,
    pub address: *const c_void,
    pub err_mode: c_uint,
    pub err_handler: ucp_err_handler_t,
    pub user_data: *mut c_void,
    pub flags: c_uint,
    pub sockaddr: ucs_sock_addr_t,
    pub conn_request: *mut c_void,
    pub name: *const c_char,
    pub local_sockaddr: ucs_sock_addr_t,
    pub tail: Tail,
}

/// Parameters of the `_nbx` calls.
#[repr(C)]
#[derive(Clone)]
pub struct ucp_request_param_t {
    pub op_attr_mask: u32,
    pub flags: u32,
    pub request: *mut c_void,
    /// A union in C; this is its `send` arm.
    pub cb: Option<ucp_send_nbx_callback_t>,
    pub datatype: u64,
    pub user_data: *mut c_void,
    pub reply_buffer: *mut c_void,
    pub memory_type: c_uint,
    pub recv_info: *mut c_void,
    pub memh: ucp_mem_h,
    pub tail: Tail,
}

/// Parameters of `ucp_worker_set_am_recv_handler`.
#[repr(C)]
#[derive(Clone)]
pub struct ucp_am_handler_param_t {
    pub field_mask: u64,
    pub id: c_uint,
    pub flags: u32,
    pub cb: Option<ucp_am_recv_callback_t>,
    pub arg: *mut c_void,
    pub tail: Tail,
}

/// What comes with an active message.
#[repr(C)]
pub struct ucp_am_recv_param_t {
    pub recv_attr: u64,
    pub reply_ep: ucp_ep_h,
}

/// API version that this file describes, for `ucp_init_version`.
pub const UCP_API_MAJOR: c_uint = 1;
/// See [`UCP_API_MAJOR`].
pub const UCP_API_MINOR: c_uint = 13;

// The rest is named as in C and checked against it by the layout test.
pub const UCS_OK: ucs_status_t = 0;
pub const UCS_INPROGRESS: ucs_status_t = 1;
pub const UCS_ERR_NO_ELEM: ucs_status_t = -12;
pub const UCS_ERR_BUSY: ucs_status_t = -15;
pub const UCS_ERR_CANCELED: ucs_status_t = -16;
pub const UCS_ERR_CONNECTION_RESET: ucs_status_t = -25;
pub const UCS_ERR_ENDPOINT_TIMEOUT: ucs_status_t = -80;
pub const UCS_ERR_LAST: ucs_status_t = -100;

pub const UCP_FEATURE_RMA: u64 = 1 << 1;
pub const UCP_FEATURE_WAKEUP: u64 = 1 << 4;
pub const UCP_FEATURE_AM: u64 = 1 << 6;

pub const UCP_AM_HANDLER_PARAM_FIELD_ID: u64 = 1 << 0;
pub const UCP_AM_HANDLER_PARAM_FIELD_FLAGS: u64 = 1 << 1;
pub const UCP_AM_HANDLER_PARAM_FIELD_CB: u64 = 1 << 2;
pub const UCP_AM_HANDLER_PARAM_FIELD_ARG: u64 = 1 << 3;
pub const UCP_AM_FLAG_WHOLE_MSG: u32 = 1 << 0;
pub const UCP_AM_SEND_FLAG_EAGER: u32 = 1 << 1;
pub const UCP_AM_RECV_ATTR_FLAG_RNDV: u64 = 1 << 17;

pub const UCP_PARAM_FIELD_FEATURES: u64 = 1 << 0;
pub const UCP_PARAM_FIELD_MT_WORKERS_SHARED: u64 = 1 << 5;

pub const UCP_WORKER_PARAM_FIELD_THREAD_MODE: u64 = 1 << 0;
pub const UCS_THREAD_MODE_SINGLE: c_uint = 0;

pub const UCP_MEM_MAP_PARAM_FIELD_ADDRESS: u64 = 1 << 0;
pub const UCP_MEM_MAP_PARAM_FIELD_LENGTH: u64 = 1 << 1;
pub const UCP_MEM_MAP_PARAM_FIELD_FLAGS: u64 = 1 << 2;
pub const UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE: u64 = 1 << 4;
pub const UCP_MEM_MAP_ALLOCATE: c_uint = 1 << 1;

pub const UCP_MEM_ATTR_FIELD_ADDRESS: u64 = 1 << 0;
pub const UCP_MEM_ATTR_FIELD_LENGTH: u64 = 1 << 1;

pub const UCP_EP_PARAM_FIELD_REMOTE_ADDRESS: u64 = 1 << 0;
pub const UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE: u64 = 1 << 1;
pub const UCP_EP_PARAM_FIELD_ERR_HANDLER: u64 = 1 << 2;
pub const UCP_ERR_HANDLING_MODE_PEER: c_uint = 1;

pub const UCP_OP_ATTR_FIELD_CALLBACK: u32 = 1 << 1;
pub const UCP_OP_ATTR_FIELD_USER_DATA: u32 = 1 << 2;
pub const UCP_OP_ATTR_FIELD_FLAGS: u32 = 1 << 4;
pub const UCP_OP_ATTR_FIELD_MEMORY_TYPE: u32 = 1 << 6;
pub const UCP_OP_ATTR_FIELD_MEMH: u32 = 1 << 8;
pub const UCP_EP_CLOSE_FLAG_FORCE: u32 = 1 << 0;

pub const UCS_MEMORY_TYPE_HOST: c_uint = 0;
pub const UCS_MEMORY_TYPE_CUDA: c_uint = 1;
