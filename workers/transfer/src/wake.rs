//! A file descriptor that becomes readable: how other threads wake the one that polls.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use crate::TransferError;

/// An eventfd.
pub(crate) struct Wake(File);

impl Wake {
    pub(crate) fn new() -> Result<Self, TransferError> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            let status = std::io::Error::last_os_error().to_string();
            return Err(TransferError::Ucx {
                call: "eventfd",
                status,
            });
        }
        // SAFETY: it was just opened and nobody else owns it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Makes it readable.
    pub(crate) fn ring(&self) {
        // It can only fail when the counter is full, and then it is readable already.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Makes it unreadable again.
    pub(crate) fn clear(&self) {
        let _ = (&self.0).read(&mut [0; 8]);
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
