//! The allocator of every role: jemalloc, which gives memory back to the system soon after it was freed, whichever thread it was
//! for. glibc keeps what other threads freed, and an API server that was sent a few large bodies stayed large.
#![allow(unsafe_code)]

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What jemalloc does if `_RJEM_MALLOC_CONF` says nothing else. Freed memory goes back within a second instead of ten: fourteen chats
/// of 16 MiB at once then take half as much at most.
const SETTINGS: &[u8; 37] = b"dirty_decay_ms:1000,muzzy_decay_ms:0\0";

/// Where jemalloc looks for its settings: a pointer to a C string.
// SAFETY: nothing else has this name; jemalloc's own definition of it is weak. It reads up to the zero.
#[unsafe(export_name = "_rjem_malloc_conf")]
#[used]
static MALLOC_CONF: &[u8; 37] = SETTINGS;
