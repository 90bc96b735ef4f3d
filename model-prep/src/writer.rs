//! Weight files, written front to back while their checksums are taken.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use baton_model::{
    Dtype, FileEntry, FingerprintHasher, Split, TensorSpec, header_bytes, rank_file_name,
};
use sha2::{Digest, Sha256};

use crate::checkpoint::WeightSource;
use crate::error::PrepError;

/// Elements that are read and converted at a time: 4 MiB as f32.
const PIECE_ELEMENTS: usize = 1 << 20;

/// Bytes that are gathered before a write.
const BUFFER_BYTES: usize = 1 << 20;

/// Bytes of BF16.
const BF16: usize = 2;

/// Stream all tensors, divided over the ranks, into `rank{i}.safetensors` of a directory. `progress` is
/// told the source elements done. Returns the files and, through `fingerprint`, hashes the whole weights.
pub(crate) fn write_ranks(
    dir: &Path,
    tensors: &[TensorSpec],
    weights: &dyn WeightSource,
    tp_size: usize,
    fingerprint: &mut FingerprintHasher,
    progress: &dyn Fn(usize),
) -> Result<Vec<FileEntry>, PrepError> {
    let header: Vec<_> = tensors
        .iter()
        .map(|t| (t.name.clone(), Dtype::Bf16, t.rank_shape(tp_size)))
        .collect();
    let header = header_bytes(&header);
    let mut ranks = Vec::with_capacity(tp_size);
    for rank in 0..tp_size {
        let mut file = HashedFile::create(dir, rank_file_name(rank))?;
        file.write(&header)?;
        ranks.push(file);
    }
    for tensor in tensors {
        read_pieces(tensor, weights, fingerprint, |elements, piece| {
            share_out(tensor, &elements, piece, &mut ranks)?;
            progress(elements.len());
            Ok(())
        })?;
    }
    ranks.into_iter().map(HashedFile::finish).collect()
}

/// Hash all weights without writing them.
pub(crate) fn hash_weights(
    tensors: &[TensorSpec],
    weights: &dyn WeightSource,
    fingerprint: &mut FingerprintHasher,
    progress: &dyn Fn(usize),
) -> Result<(), PrepError> {
    for tensor in tensors {
        read_pieces(tensor, weights, fingerprint, |elements, _| {
            progress(elements.len());
            Ok(())
        })?;
    }
    Ok(())
}

fn read_pieces(
    tensor: &TensorSpec,
    weights: &dyn WeightSource,
    fingerprint: &mut FingerprintHasher,
    mut each: impl FnMut(Range<usize>, &[u8]) -> Result<(), PrepError>,
) -> Result<(), PrepError> {
    // A vector is one piece: its formats may have blocks that a cut would split.
    let step = match tensor.shape.len() {
        1 => tensor.elements(),
        _ => (PIECE_ELEMENTS / tensor.columns()).max(1) * tensor.columns(),
    };
    let mut piece = Vec::with_capacity(step * BF16);
    fingerprint.tensor(tensor);
    let mut start = 0;
    while start < tensor.elements() {
        let end = (start + step).min(tensor.elements());
        piece.clear();
        weights.read(tensor, start..end, &mut piece)?;
        assert_eq!(
            piece.len(),
            (end - start) * BF16,
            "a source returns what it is asked for"
        );
        if let Some(at) = piece.chunks_exact(BF16).position(is_not_finite) {
            return Err(weights.fault(
                tensor,
                &format!("holds a number that is not finite, element {}", start + at),
            ));
        }
        fingerprint.data(&piece);
        each(start..end, &piece)?;
        start = end;
    }
    Ok(())
}

/// Infinite or not a number: all bits of the exponent are set.
fn is_not_finite(bf16: &[u8]) -> bool {
    u16::from_le_bytes([bf16[0], bf16[1]]) & 0x7F80 == 0x7F80
}

/// Write to each rank what it holds of a piece that covers these elements of the tensor.
fn share_out(
    tensor: &TensorSpec,
    elements: &Range<usize>,
    piece: &[u8],
    ranks: &mut [HashedFile],
) -> Result<(), PrepError> {
    let count = ranks.len();
    match tensor.split {
        Split::Replicated => ranks.iter_mut().try_for_each(|file| file.write(piece)),
        Split::Rows => {
            let part = tensor.elements() / count;
            for (rank, file) in ranks.iter_mut().enumerate() {
                let start = elements.start.max(rank * part);
                let end = elements.end.min((rank + 1) * part);
                if start < end {
                    let from = (start - elements.start) * BF16;
                    file.write(&piece[from..from + (end - start) * BF16])?;
                }
            }
            Ok(())
        }
        Split::Columns => {
            let part = tensor.columns() / count * BF16;
            for row in piece.chunks_exact(tensor.columns() * BF16) {
                for (file, part) in ranks.iter_mut().zip(row.chunks_exact(part)) {
                    file.write(part)?;
                }
            }
            Ok(())
        }
    }
}

/// A file that knows its length and checksum when it is finished.
pub(crate) struct HashedFile {
    name: String,
    path: PathBuf,
    inner: BufWriter<Hashing>,
}

struct Hashing {
    file: File,
    hasher: Sha256,
    bytes: u64,
}

impl Write for Hashing {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(buffer)?;
        self.hasher.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl HashedFile {
    pub(crate) fn create(dir: &Path, name: String) -> Result<Self, PrepError> {
        let path = dir.join(&name);
        let file = File::create_new(&path).map_err(|e| PrepError::io("create", &path, e))?;
        let hashing = Hashing {
            file,
            hasher: Sha256::new(),
            bytes: 0,
        };
        Ok(HashedFile {
            name,
            path,
            inner: BufWriter::with_capacity(BUFFER_BYTES, hashing),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), PrepError> {
        self.inner
            .write_all(bytes)
            .map_err(|e| PrepError::io("write", &self.path, e))
    }

    /// Everything on disk.
    pub(crate) fn finish(self) -> Result<FileEntry, PrepError> {
        let fail = |e| PrepError::io("write", &self.path, e);
        let hashing = self.inner.into_inner().map_err(|e| fail(e.into_error()))?;
        hashing.file.sync_all().map_err(fail)?;
        Ok(FileEntry {
            name: self.name,
            bytes: hashing.bytes,
            sha256: hex(&hashing.hasher.finalize()),
        })
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
