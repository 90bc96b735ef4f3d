//! How many clusters run at a time.

use std::fs::{File, OpenOptions, TryLockError};
use std::thread;
use std::time::Duration;

use crate::fixture;

/// Max number of clusters at a time. End-to-end tests mostly wait, so three keep two cores busy. Must equal `max-threads` of the group
/// `cluster` in `.config/nextest.toml`: otherwise a test waits for this lock while its own time limit runs.
const AT_A_TIME: usize = 3;

/// Interval between attempts to get a lock.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The right to run a cluster. Held by a file lock, so it works between the threads of `cargo test` and between the
/// processes of `cargo nextest`; the kernel takes it back from a test that dies.
pub struct Turn {
    _lock: File,
}

impl Turn {
    /// Waits for the other tests.
    ///
    /// # Panics
    /// If a lock file cannot be made.
    pub fn take() -> Self {
        loop {
            for place in 0..AT_A_TIME {
                let name = format!("cluster-{place}.lock");
                let file = open(&name);
                match file.try_lock() {
                    Ok(()) => return Self { _lock: file },
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => panic!("cannot lock {name}: {error}"),
                }
            }
            thread::sleep(LOOK_EVERY);
        }
    }
}

/// Locks a file of this name below the target directory, for as long as the value lives.
pub(crate) fn lock(name: &str) -> File {
    let file = open(name);
    file.lock()
        .unwrap_or_else(|e| panic!("cannot lock {name}: {e}"));
    file
}

fn open(name: &str) -> File {
    let path = fixture::scratch().join(name);
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|e| panic!("cannot open {}: {e}", path.display()))
}
