//! A directory that appears whole or not at all.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use baton_model::{FileEntry, MANIFEST, Manifest};
use tempfile::TempDir;

use crate::error::PrepError;
use crate::writer::HashedFile;

/// Times that a new directory may be taken for a leftover, by another run that starts at the same moment.
const LOCK_ATTEMPTS_MAX: usize = 10;

/// A temporary directory beside the output. Dropping it removes it; [`Stage::publish`] renames it.
pub(crate) struct Stage {
    temporary: TempDir,
    /// Says that a living process works here. The operating system takes it back from a dead one.
    _lock: File,
    out: PathBuf,
}

impl Stage {
    /// Make the temporary directory, and the output's parents if they are missing.
    pub(crate) fn new(out: &Path) -> Result<Self, PrepError> {
        let name = out
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| PrepError::output(out, "the path does not end in a directory name"))?;
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(|e| PrepError::io("create", parent, e))?;
        let prefix = format!(".{name}.partial-");
        remove_leftovers(parent, &prefix)?;
        for _ in 0..LOCK_ATTEMPTS_MAX {
            let temporary = tempfile::Builder::new()
                .prefix(&prefix)
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .tempdir_in(parent)
                .map_err(|e| PrepError::io("create a directory in", parent, e))?;
            if let Some(lock) = lock(temporary.path())? {
                return Ok(Stage {
                    temporary,
                    _lock: lock,
                    out: out.to_owned(),
                });
            }
        }
        Err(PrepError::output(
            out,
            format!(
                "other runs take every directory made for it in {}",
                parent.display()
            ),
        ))
    }

    pub(crate) fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Write a small file.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<FileEntry, PrepError> {
        let mut file = HashedFile::create(self.path(), name.to_owned())?;
        file.write(content)?;
        file.finish()
    }

    /// Write the manifest, and make the directory appear under its name. With `replace`, what is there
    /// goes away: it is renamed first, so that at no time half a model has the name.
    pub(crate) fn publish(self, manifest: &Manifest, replace: bool) -> Result<(), PrepError> {
        let mut text = serde_json::to_vec_pretty(manifest).expect("a manifest is plain data");
        text.push(b'\n');
        self.write(MANIFEST, &text)?;
        sync_directory(self.path())?;

        let out = &self.out;
        let old = if replace && out.exists() {
            // Under the stage's name and more, so that the next run clears it away should this one die.
            let mut old = self.path().as_os_str().to_owned();
            old.push("-replaced");
            let old = PathBuf::from(old);
            fs::rename(out, &old).map_err(|e| PrepError::io("rename", out, e))?;
            Some(old)
        } else {
            None
        };
        if let Err(error) = fs::rename(self.path(), out) {
            if let Some(old) = &old {
                // Best effort: the first error is the one to report.
                let _ = fs::rename(old, out);
            }
            return Err(PrepError::io("rename the finished model to", out, error));
        }
        let _ = self.temporary.keep(); // renamed: nothing is left to remove
        if let Some(parent) = out.parent().filter(|p| !p.as_os_str().is_empty()) {
            sync_directory(parent)?;
        }
        match old {
            Some(old) => fs::remove_dir_all(&old).map_err(|e| PrepError::io("remove", &old, e)),
            None => Ok(()),
        }
    }
}

fn sync_directory(path: &Path) -> Result<(), PrepError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| PrepError::io("write", path, e))
}

/// Remove what killed runs left: directories of this output that no living process has locked.
fn remove_leftovers(parent: &Path, prefix: &str) -> Result<(), PrepError> {
    let entries = fs::read_dir(parent).map_err(|e| PrepError::io("list", parent, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| PrepError::io("list", parent, e))?;
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let is_stage = entry.file_name().to_string_lossy().starts_with(prefix);
        if !(is_directory && is_stage) {
            continue;
        }
        let path = entry.path();
        // The lock is held while the directory goes, so that nobody begins to work in it.
        let Some(_lock) = lock(&path)? else { continue };
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(PrepError::io("remove the leftover", &path, e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Lock a directory. `None` if another process has it, or if it is gone by the time the lock is there.
fn lock(path: &Path) -> Result<Option<File>, PrepError> {
    let directory = match File::open(path) {
        Ok(directory) => directory,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(PrepError::io("open", path, e)),
    };
    match directory.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(e)) => return Err(PrepError::io("lock", path, e)),
    }
    let locked = directory
        .metadata()
        .map_err(|e| PrepError::io("read", path, e))?;
    let there =
        fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (locked.dev(), locked.ino()));
    Ok(there.then_some(directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hidden(parent: &Path) -> Vec<String> {
        let entries = fs::read_dir(parent).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn leftovers_of_dead_runs_go_and_living_ones_stay() {
        let parent = tempfile::tempdir().unwrap();
        let parent = parent.path();
        let living = Stage::new(&parent.join("model")).unwrap();
        for leftover in [
            ".model.partial-dead",
            ".model.partial-dead-replaced",
            ".other.partial-dead",
            "model.partial-mine",
        ] {
            fs::create_dir_all(parent.join(leftover).join("deep")).unwrap();
            fs::write(parent.join(leftover).join("rank0.safetensors"), "half").unwrap();
        }
        fs::write(parent.join(".model.partial-file"), "no directory").unwrap();
        let second = Stage::new(&parent.join("model")).unwrap();
        let name = |stage: &Stage| {
            stage
                .path()
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        };
        let mut expected = vec![
            ".model.partial-file".to_owned(),
            ".other.partial-dead".to_owned(),
            name(&living),
            name(&second),
            "model.partial-mine".to_owned(),
        ];
        expected.sort();
        assert_eq!(hidden(parent), expected);
        drop((living, second));
        assert_eq!(
            hidden(parent),
            [
                ".model.partial-file",
                ".other.partial-dead",
                "model.partial-mine"
            ]
        );
    }

    #[test]
    fn a_directory_that_changed_under_the_lock_is_not_taken() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("stage");
        assert!(lock(&path).unwrap().is_none());
        fs::create_dir(&path).unwrap();
        let held = lock(&path).unwrap().unwrap();
        assert!(lock(&path).unwrap().is_none());
        drop(held);
        assert!(lock(&path).unwrap().is_some());
    }
}
