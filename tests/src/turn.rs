//! How many clusters run at a time.

use std::fs::{File, OpenOptions, TryLockError};
use std::thread;
use std::time::Duration;

use crate::fixture;

/// Clusters that run at a time: most of a test's time is waiting, so two cores have enough to do by three, and memory is enough for them
/// everywhere. `.config/nextest.toml` has the same number, so that no test waits for its turn while its time runs.
const AT_A_TIME: usize = 3;

/// How often somebody who waits looks for a turn.
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
