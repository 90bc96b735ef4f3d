//! One cluster at a time, and beside it one that mostly waits.

use std::fs::{File, OpenOptions};

use crate::fixture;

/// The right to use the machine. Held by a file lock, so it works between the threads of `cargo test` and between the
/// processes of `cargo nextest`; the kernel takes it back from a test that dies.
pub struct Turn {
    _lock: File,
}

impl Turn {
    /// Waits for the other tests.
    ///
    /// # Panics
    /// If the lock file cannot be made.
    pub fn take() -> Self {
        Self {
            _lock: lock("cluster.lock"),
        }
    }

    /// For a test that waits for deadlines most of its time, and takes less than a fifth of one core: it runs beside one that
    /// took its turn, and waits for its like only.
    ///
    /// # Panics
    /// If the lock file cannot be made.
    pub fn beside() -> Self {
        Self {
            _lock: lock("waiting-cluster.lock"),
        }
    }
}

/// Locks a file of this name below the target directory, for as long as the value lives.
pub(crate) fn lock(name: &str) -> File {
    let path = fixture::scratch().join(name);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|e| panic!("cannot open {}: {e}", path.display()));
    file.lock()
        .unwrap_or_else(|e| panic!("cannot lock {}: {e}", path.display()));
    file
}
