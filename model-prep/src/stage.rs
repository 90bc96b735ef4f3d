//! A directory that appears whole or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use baton_model::{FileEntry, MANIFEST, Manifest};
use tempfile::TempDir;

use crate::error::PrepError;
use crate::writer::HashedFile;

/// A temporary directory beside the output. Dropping it removes it; [`Stage::publish`] renames it.
pub(crate) struct Stage {
    temporary: TempDir,
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
        let temporary = tempfile::Builder::new()
            .prefix(&format!(".{name}.partial-"))
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir_in(parent)
            .map_err(|e| PrepError::io("create a directory in", parent, e))?;
        Ok(Stage {
            temporary,
            out: out.to_owned(),
        })
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
            let old = self.path().with_extension("replaced");
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
