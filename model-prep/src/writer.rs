//! Weight files, written front to back while their checksums are taken.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use baton_model::{
    FileEntry, FingerprintHasher, Fp8Matrix, Fp8Scales, Split, TensorSpec, WeightFormat,
    header_bytes, hex, names, quantize_row, rank_file_name,
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

/// Stream all tensors, in a format and divided over the ranks, into `rank{i}.safetensors` of a directory.
/// `progress` is told the source elements done. Returns the files and, through `fingerprint`, hashes the
/// whole weights as they are in BF16, whatever the format.
pub(crate) fn write_ranks(
    dir: &Path,
    tensors: &[TensorSpec],
    weights: &dyn WeightSource,
    (format, tp_size): (WeightFormat, usize),
    fingerprint: &mut FingerprintHasher,
    progress: &dyn Fn(usize),
) -> Result<Vec<FileEntry>, PrepError> {
    let header: Vec<_> = tensors
        .iter()
        .flat_map(|tensor| tensor.stored(format, tp_size))
        .collect();
    let header = header_bytes(&header);
    let mut ranks = Vec::with_capacity(tp_size);
    for rank in 0..tp_size {
        let mut file = HashedFile::create(dir, rank_file_name(rank))?;
        file.write(&header)?;
        ranks.push(file);
    }
    for tensor in tensors {
        let mut form = Form::of(tensor, format, weights)?;
        read_pieces(tensor, weights, fingerprint, |elements, piece| {
            let piece = form.converted(tensor, &elements, piece);
            share_out(tensor, &elements, piece, &mut ranks)?;
            progress(elements.len());
            Ok(())
        })?;
        if let Some((scales, bytes)) = form.scales(tensor) {
            share_out(&scales, &(0..scales.elements()), &bytes, &mut ranks)?;
        }
    }
    ranks.into_iter().map(HashedFile::finish).collect()
}

/// How a tensor gets into the files.
enum Form<'a> {
    /// As it is read, in BF16.
    Bf16,
    /// In FP8, as the source has it.
    Kept(Fp8Matrix<'a>),
    /// In FP8, made here.
    Quantized {
        /// Of the rows so far.
        scales: Vec<f32>,
        /// Of the last piece.
        codes: Vec<u8>,
    },
}

impl<'a> Form<'a> {
    fn of(
        tensor: &TensorSpec,
        format: WeightFormat,
        weights: &'a dyn WeightSource,
    ) -> Result<Self, PrepError> {
        if !(tensor.projection && format.is_fp8()) {
            return Ok(Form::Bf16);
        }
        Ok(match weights.fp8(tensor)? {
            Some(matrix) => Form::Kept(matrix),
            None => Form::Quantized {
                scales: Vec::with_capacity(tensor.rows()),
                codes: Vec::new(),
            },
        })
    }

    /// Whole rows in this form. The pieces of a tensor come in order, each once.
    fn converted<'p>(
        &'p mut self,
        tensor: &TensorSpec,
        elements: &Range<usize>,
        piece: &'p [u8],
    ) -> &'p [u8] {
        match self {
            Form::Bf16 => piece,
            Form::Kept(matrix) => &matrix.codes[elements.clone()],
            Form::Quantized { scales, codes } => {
                codes.clear();
                let rows = piece.chunks_exact(tensor.columns() * BF16);
                scales.extend(rows.map(|row| quantize_row(row, codes)));
                codes
            }
        }
    }

    /// The scales of the whole tensor, to be written after it, and how ranks share them.
    fn scales(self, tensor: &TensorSpec) -> Option<(TensorSpec, Vec<u8>)> {
        let scales = match self {
            Form::Bf16 => return None,
            Form::Kept(matrix) => matrix.scales,
            Form::Quantized { scales, .. } => Fp8Scales::Channel(scales),
        };
        let (format, split, scales) = match (scales, tensor.split) {
            // Every rank has a part of each output channel, and needs the channel's scale.
            (Fp8Scales::Channel(scales), Split::Columns) => {
                (WeightFormat::Fp8Channel, Split::Replicated, scales)
            }
            (Fp8Scales::Channel(scales), split) => (WeightFormat::Fp8Channel, split, scales),
            (Fp8Scales::Block(scales), split) => (WeightFormat::Fp8Block, split, scales),
        };
        let spec = TensorSpec {
            name: names::scales(&tensor.name),
            shape: format.scales_shape([tensor.rows(), tensor.columns()])?,
            split,
            projection: false,
        };
        let bytes = scales.into_iter().flat_map(f32::to_le_bytes).collect();
        Some((spec, bytes))
    }
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

/// Write to each rank what it holds of a piece that covers these elements of the tensor, in numbers of any size.
fn share_out(
    tensor: &TensorSpec,
    elements: &Range<usize>,
    piece: &[u8],
    ranks: &mut [HashedFile],
) -> Result<(), PrepError> {
    let size = piece.len() / elements.len();
    let count = ranks.len();
    match tensor.split {
        Split::Replicated => ranks.iter_mut().try_for_each(|file| file.write(piece)),
        Split::Rows => {
            let part = tensor.elements() / count;
            for (rank, file) in ranks.iter_mut().enumerate() {
                let start = elements.start.max(rank * part);
                let end = elements.end.min((rank + 1) * part);
                if start < end {
                    let from = (start - elements.start) * size;
                    file.write(&piece[from..from + (end - start) * size])?;
                }
            }
            Ok(())
        }
        Split::Columns => {
            let part = tensor.columns() / count * size;
            for row in piece.chunks_exact(tensor.columns() * size) {
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
