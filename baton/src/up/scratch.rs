//! The directory of files that a running `baton up` needs, and what is left of those that were killed.
//!
//! Its owner holds a lock on a file in it, which the kernel takes back however the owner ends: a directory whose lock
//! can be had belongs to nobody.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;

/// How the directories' names begin.
const PREFIX: &str = "baton-up-";
/// The file that is locked.
const LOCK: &str = "lock";
/// A directory without a lock file may be about to get one; after this time it will not.
const UNLOCKED_MAX: Duration = Duration::from_secs(3600);

/// A directory of this process's own. Removed when dropped; if that does not come about, by a later `baton up`.
pub struct Scratch {
    directory: TempDir,
    _lock: File,
}

impl Scratch {
    /// Makes one below `parent`, and clears away those of processes that are gone.
    ///
    /// # Errors
    /// If it cannot be made. What cannot be cleared away is left.
    pub fn new(parent: &Path) -> io::Result<Self> {
        sweep(parent);
        loop {
            let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
            let lock = File::create(directory.path().join(LOCK))?;
            lock.lock()?;
            // Another process's sweep may have had the lock before us and taken all away.
            if directory.path().join(LOCK).exists() {
                return Ok(Self {
                    directory,
                    _lock: lock,
                });
            }
        }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_ours = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(PREFIX));
        // The lock is held until all is gone.
        if is_ours && let Some(_lock) = abandoned(&path) {
            match fs::remove_dir_all(&path) {
                Ok(()) => tracing::debug!("removed {}, left by a killed process", path.display()),
                Err(error) => tracing::debug!("cannot remove {}: {error}", path.display()),
            }
        }
    }
}

/// Whether nobody lives here; with the lock, if there is one. Never so for a link, or for somebody else's directory.
fn abandoned(directory: &Path) -> Option<Option<File>> {
    let meta = fs::symlink_metadata(directory).ok()?;
    if !meta.is_dir() || meta.uid() != rustix::process::geteuid().as_raw() {
        return None;
    }
    match OpenOptions::new().write(true).open(directory.join(LOCK)) {
        Ok(lock) => lock.try_lock().is_ok().then_some(Some(lock)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let age = meta.modified().ok()?.elapsed().ok()?;
            (age > UNLOCKED_MAX).then_some(None)
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn entries(parent: &Path) -> Vec<String> {
        let names = fs::read_dir(parent).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn only_what_nobody_holds_is_cleared_away() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, locked: bool| {
            let directory = parent.path().join(name);
            fs::create_dir(&directory).unwrap();
            if locked {
                fs::write(directory.join(LOCK), "").unwrap();
            }
            fs::write(directory.join("nats-server.conf"), "port: 1").unwrap();
            directory
        };
        make("baton-up-dead", true);
        make("baton-up-begun", false);
        make("something-else", true);
        let old = make("baton-up-of-an-older-release", false);
        let long_ago = SystemTime::now() - 2 * UNLOCKED_MAX;
        let old = File::open(old).unwrap();
        old.set_modified(long_ago).unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join(LOCK), "").unwrap();
        std::os::unix::fs::symlink(outside.path(), parent.path().join("baton-up-link")).unwrap();

        let first = Scratch::new(parent.path()).unwrap();
        let second = Scratch::new(parent.path()).unwrap();
        let name = |scratch: &Scratch| {
            let name = scratch.path().file_name().unwrap();
            name.to_str().unwrap().to_owned()
        };
        let mut expected = vec![
            "baton-up-begun".to_owned(),
            "baton-up-link".to_owned(),
            "something-else".to_owned(),
            name(&first),
            name(&second),
        ];
        expected.sort();
        assert_eq!(entries(parent.path()), expected);
        assert!(outside.path().join(LOCK).exists());

        drop((first, second));
        assert_eq!(entries(parent.path()).len(), 3);
    }
}
