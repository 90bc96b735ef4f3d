//! A file mapped into memory for reading. The one place of this crate with `unsafe`.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use crate::error::ModelError;

/// The bytes of a file, read by the operating system as they are touched.
#[derive(Debug)]
pub(crate) struct MappedFile(Mmap);

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(|e| ModelError::io("open", path, e))?;
        let metadata = file
            .metadata()
            .map_err(|e| ModelError::io("read the size of", path, e))?;
        if !metadata.is_file() {
            return Err(ModelError::file(path, "is not a regular file"));
        }
        // SAFETY: the mapping is private and read-only, and all access goes through byte slices of the
        // length it had when mapped. Weight files are written once, under another name, and renamed into
        // place, so nobody writes to them or truncates them while they are mapped; a user who does so by
        // hand gets SIGBUS or changed weights, as with every mapped model file.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(|e| ModelError::io("map", path, e))?;
        Ok(MappedFile(map))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
