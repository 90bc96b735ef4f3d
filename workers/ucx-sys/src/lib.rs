//! FFI to libucp (UCX), loaded at run time, and nothing else.
//!
//! UCX is loaded like CUDA: one binary serves hosts with and without it, and with either of the builds
//! in use (the distribution's 1.13, the PyPI wheels' 1.22). Nothing is linked and no header is needed to
//! build. Names are C's, so UCX's own documentation applies; see [`Ucp`] for the functions.
//!
//! - `ucs_status_t` is a packed enum: one byte.
//! - Structures whose tail grew between releases end in zeroed padding here: a newer library reads its
//!   new fields, guarded by `field_mask` bits that are not set, inside our allocation.
//! - `UCS_MEMORY_TYPE_UNKNOWN` changed its number between releases; it is not declared.
//!
//! `tests/layout.rs` compares every size, offset and constant with what a C compiler says of the
//! installed headers.

#![allow(non_camel_case_types)]

// Fields, constants and functions are C's and documented there.
#[allow(missing_docs)]
mod functions;
mod load;
#[allow(missing_docs)]
mod types;

pub use functions::Ucp;
pub use load::{LIB_DIR_VARIABLE, LoadError};
pub use types::*;
