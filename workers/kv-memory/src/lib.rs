//! What an executor and a transfer agent must know of each other's memory: where it is, and whether the CPU may follow the
//! address. A crate of its own because both rely on it in unsafe code, and the engine between them has none.

use std::ptr::NonNull;
use std::sync::Arc;

/// Where a piece of memory begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// In this process's memory: the CPU may follow it.
    Host(NonNull<u8>),
    /// On a GPU, as the CUDA driver numbers it: the CPU must not follow it.
    Device(u64),
}

impl Address {
    /// The pointer, where the CPU may follow it.
    pub fn host(self) -> Option<NonNull<u8>> {
        match self {
            Self::Host(pointer) => Some(pointer),
            Self::Device(_) => None,
        }
    }

    /// The address, where it is a GPU's.
    pub fn device(self) -> Option<u64> {
        match self {
            Self::Host(_) => None,
            Self::Device(address) => Some(address),
        }
    }

    /// As a number, whoever may follow it.
    pub fn number(self) -> u64 {
        match self {
            Self::Host(pointer) => pointer.addr().get() as u64,
            Self::Device(address) => address,
        }
    }
}

/// Memory that holds one rank's KV arena: the transfer agent's registered memory, or memory of the executor's own.
///
/// # Safety
/// Executors and transfer agents read and write these bytes on the word of this trait alone. Whoever implements it promises:
///
/// - [`Self::address`] is aligned to 4096, and says truly whose memory it is. It and [`Self::len`] never change.
/// - The bytes `address .. address + len` are allocated, readable and writable, as long as the value lives.
/// - No Rust reference to any of these bytes exists.
///
/// Whoever uses it promises in turn that nobody writes to a block while another reads or writes it. The engine's block pool
/// decides who has which block.
pub unsafe trait KvMemory: Send + Sync {
    /// First byte.
    fn address(&self) -> Address;

    /// Length in bytes.
    fn len(&self) -> usize;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The beginning of another memory.
pub struct FirstBytes {
    memory: Arc<dyn KvMemory>,
    bytes: usize,
}

impl FirstBytes {
    /// The first `bytes` of `memory`; all of it if it is shorter.
    pub fn new(memory: Arc<dyn KvMemory>, bytes: usize) -> Self {
        let bytes = bytes.min(memory.len());
        Self { memory, bytes }
    }
}

// SAFETY: as the memory that it is a part of, and keeps.
unsafe impl KvMemory for FirstBytes {
    fn address(&self) -> Address {
        self.memory.address()
    }

    fn len(&self) -> usize {
        self.bytes
    }
}
