//! The GGUF container: header, metadata, tensor table, data.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Everything is little-endian. Every
//! count and length is compared with what is left of the file before anything is allocated for it, so a
//! hostile file costs no more memory than its own size allows.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::metadata::{Metadata, Value};
use super::quant::Format;
use crate::error::PrepError;

/// Longest header (metadata and tensor table) that is read. Real ones have some 10 MB, nearly all of it
/// vocabulary.
const HEADER_BYTES_MAX: u64 = 64 << 20;

/// Most entries of a list, most pairs and most tensors that are read: above any real vocabulary, pair count
/// and tensor count. They bound what small entries of a large file could grow to in memory.
const LIST_ENTRIES_MAX: u64 = 1 << 22;
const PAIRS_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 16;

/// Tensors begin at multiples of this where the metadata says nothing else.
const ALIGNMENT_DEFAULT: u64 = 32;

/// A GGUF file whose header was read and checked.
#[derive(Debug)]
pub(crate) struct Container {
    pub path: PathBuf,
    pub metadata: Metadata,
    tensors: HashMap<String, TensorInfo>,
    file: File,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
pub(crate) struct TensorInfo {
    /// Its shape, rows first (the file has the fastest dimension first).
    pub shape: Vec<usize>,
    pub format: Format,
    /// First byte, from the beginning of the file. All its bytes are there.
    pub start: u64,
}

impl Container {
    pub(crate) fn open(path: &Path) -> Result<Self, PrepError> {
        let file = File::open(path).map_err(|e| PrepError::io("open", path, e))?;
        let file_bytes = file
            .metadata()
            .map_err(|e| PrepError::io("read the size of", path, e))?
            .len();
        let mut reader = HeaderReader {
            left: file_bytes.min(HEADER_BYTES_MAX),
            read: 0,
            inner: BufReader::with_capacity(1 << 18, &file),
            file_bytes,
        };
        let (metadata, raw) = read_header(&mut reader).map_err(|e| e.at(path))?;
        let header_bytes = reader.read;
        let tensors =
            place_tensors(&metadata, raw, header_bytes, file_bytes).map_err(|e| e.at(path))?;
        Ok(Container {
            path: path.to_owned(),
            metadata,
            tensors,
            file,
        })
    }

    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    pub(crate) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Read bytes of the file.
    pub(crate) fn read_at(&self, start: u64, bytes: &mut [u8]) -> Result<(), PrepError> {
        self.file
            .read_exact_at(bytes, start)
            .map_err(|e| PrepError::io("read", &self.path, e))
    }
}

// === reading ===

/// What is wrong with the header, and with which tensor if it is one.
#[derive(Debug)]
pub(crate) enum HeaderError {
    File(String),
    Tensor(String, String),
}

impl HeaderError {
    fn at(self, path: &Path) -> PrepError {
        match self {
            HeaderError::File(reason) => PrepError::file(path, reason),
            HeaderError::Tensor(name, reason) => PrepError::tensor(path, &name, reason),
        }
    }
}

impl From<String> for HeaderError {
    fn from(reason: String) -> Self {
        HeaderError::File(reason)
    }
}

struct RawTensor {
    name: String,
    dims: Vec<u64>,
    format: u32,
    offset: u64,
}

struct HeaderReader<R> {
    inner: R,
    /// Bytes that may still be read.
    left: u64,
    read: u64,
    file_bytes: u64,
}

impl<R: Read> HeaderReader<R> {
    /// Refuse a length that the rest of the file cannot hold.
    fn reserve(&self, bytes: Option<u64>) -> Result<u64, String> {
        match bytes {
            Some(bytes) if bytes <= self.left => Ok(bytes),
            _ if self.read + self.left < self.file_bytes => Err(format!(
                "its header goes beyond {HEADER_BYTES_MAX} bytes, so it is corrupt"
            )),
            _ => Err(format!(
                "is truncated or corrupt: its header goes beyond its end at byte {}",
                self.file_bytes
            )),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.reserve(Some(N as u64))?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.inner
            .read_exact(bytes)
            .map_err(|e| format!("cannot be read at byte {}: {e}", self.read))?;
        self.left -= bytes.len() as u64;
        self.read += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn text(&mut self, what: impl Fn() -> String) -> Result<String, String> {
        let length = self.u64()?;
        let length = self.reserve(Some(length))?;
        let mut bytes = vec![0; length as usize]; // at most HEADER_BYTES_MAX
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| format!("{} is not UTF-8", what()))
    }
}

fn read_header<R: Read>(
    reader: &mut HeaderReader<R>,
) -> Result<(Metadata, Vec<RawTensor>), HeaderError> {
    let magic: [u8; 4] = reader.bytes()?;
    if &magic != b"GGUF" {
        return Err(HeaderError::File(
            "is no GGUF file: it does not begin with GGUF".to_owned(),
        ));
    }
    match reader.u32()? {
        2 | 3 => {}
        version if (1..=0xFFFF).contains(&version.swap_bytes()) => {
            return Err(HeaderError::File(
                "is a big-endian GGUF file, which is not supported".to_owned(),
            ));
        }
        version => {
            return Err(HeaderError::File(format!(
                "has GGUF version {version}; 2 and 3 can be read"
            )));
        }
    }
    let tensor_count = reader.u64()?;
    let pair_count = reader.u64()?;
    for (count, what, max) in [
        (pair_count, "metadata pairs", PAIRS_MAX),
        (tensor_count, "tensors", TENSORS_MAX),
    ] {
        if count > max {
            return Err(HeaderError::File(format!(
                "is corrupt: it claims to hold {count} {what}, at most {max} are read"
            )));
        }
    }

    let mut metadata = Metadata::default();
    for i in 0..pair_count {
        let key = reader.text(|| format!("the key of metadata {i}"))?;
        let kind = reader.u32()?;
        let value = read_value(reader, kind, &key)?;
        if !metadata.insert(key.clone(), value) {
            return Err(HeaderError::File(format!(
                "the metadata `{key}` is there twice"
            )));
        }
    }

    // The shortest entry of the table has 24 bytes.
    reader.reserve(tensor_count.checked_mul(24))?;
    let mut tensors = Vec::new();
    for i in 0..tensor_count {
        let name = reader.text(|| format!("the name of tensor {i}"))?;
        let dim_count = reader.u32()?;
        if dim_count > 4 {
            return Err(HeaderError::Tensor(
                name,
                format!("has {dim_count} dimensions; there can be 4"),
            ));
        }
        let dims = (0..dim_count)
            .map(|_| reader.u64())
            .collect::<Result<_, _>>()?;
        tensors.push(RawTensor {
            name,
            dims,
            format: reader.u32()?,
            offset: reader.u64()?,
        });
    }
    Ok((metadata, tensors))
}

fn read_value<R: Read>(
    reader: &mut HeaderReader<R>,
    kind: u32,
    key: &str,
) -> Result<Value, String> {
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;
    match kind {
        TEXT => reader
            .text(|| format!("the metadata `{key}`"))
            .map(Value::Text),
        ARRAY => {
            let kind = reader.u32()?;
            let count = reader.u64()?;
            let size = match kind {
                TEXT => 8, // the shortest string
                _ => scalar_bytes(kind).ok_or_else(|| {
                    format!("the metadata `{key}` is a list of unknown type {kind}")
                })?,
            };
            reader.reserve(count.checked_mul(size))?;
            if count > LIST_ENTRIES_MAX {
                return Err(format!(
                    "the metadata `{key}` has {count} entries, at most {LIST_ENTRIES_MAX} are read"
                ));
            }
            read_array(reader, kind, count, key)
        }
        _ => read_scalar(reader, kind, key),
    }
}

fn read_array<R: Read>(
    reader: &mut HeaderReader<R>,
    kind: u32,
    count: u64,
    key: &str,
) -> Result<Value, String> {
    if kind == 8 {
        let texts = (0..count).map(|_| reader.text(|| format!("a string of the metadata `{key}`")));
        return texts.collect::<Result<_, _>>().map(Value::Texts);
    }
    if matches!(kind, 6 | 12) {
        let floats = (0..count).map(|_| match read_scalar(reader, kind, key)? {
            Value::Float(float) => Ok(float),
            _ => unreachable!("types 6 and 12 are floats"),
        });
        return floats.collect::<Result<_, String>>().map(Value::Floats);
    }
    let integers = (0..count).map(|_| match read_scalar(reader, kind, key)? {
        Value::Signed(n) => Ok(n),
        Value::Unsigned(n) => {
            i64::try_from(n).map_err(|_| format!("the metadata `{key}` holds {n}"))
        }
        Value::Bool(flag) => Ok(flag.into()),
        _ => unreachable!("the other scalars are integers"),
    });
    integers.collect::<Result<_, String>>().map(Value::Integers)
}

fn scalar_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

fn read_scalar<R: Read>(
    reader: &mut HeaderReader<R>,
    kind: u32,
    key: &str,
) -> Result<Value, String> {
    Ok(match kind {
        0 => Value::Unsigned(u8::from_le_bytes(reader.bytes()?).into()),
        1 => Value::Signed(i8::from_le_bytes(reader.bytes()?).into()),
        2 => Value::Unsigned(u16::from_le_bytes(reader.bytes()?).into()),
        3 => Value::Signed(i16::from_le_bytes(reader.bytes()?).into()),
        4 => Value::Unsigned(reader.u32()?.into()),
        5 => Value::Signed(i32::from_le_bytes(reader.bytes()?).into()),
        6 => Value::Float(f32::from_le_bytes(reader.bytes()?).into()),
        7 => Value::Bool(reader.bytes::<1>()?[0] != 0),
        10 => Value::Unsigned(reader.u64()?),
        11 => Value::Signed(i64::from_le_bytes(reader.bytes()?)),
        12 => Value::Float(f64::from_le_bytes(reader.bytes()?)),
        _ => return Err(format!("the metadata `{key}` is of unknown type {kind}")),
    })
}

// === placing the tensors ===

fn place_tensors(
    metadata: &Metadata,
    raw: Vec<RawTensor>,
    header_bytes: u64,
    file_bytes: u64,
) -> Result<HashMap<String, TensorInfo>, HeaderError> {
    let alignment = metadata
        .count("general.alignment")?
        .map_or(ALIGNMENT_DEFAULT, |n| n as u64);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(HeaderError::File(format!(
            "its alignment {alignment} is impossible"
        )));
    }
    let data_start = header_bytes.next_multiple_of(alignment);
    let mut tensors = HashMap::with_capacity(raw.len());
    let mut ranges = Vec::with_capacity(raw.len());
    for tensor in raw {
        let name = tensor.name.clone();
        let (info, end) = place_tensor(tensor, data_start, alignment, file_bytes)
            .map_err(|reason| HeaderError::Tensor(name.clone(), reason))?;
        ranges.push((info.start, end, name.clone()));
        if tensors.insert(name.clone(), info).is_some() {
            return Err(HeaderError::Tensor(name, "is there twice".to_owned()));
        }
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let ((_, end, before), (start, _, name)) = (&pair[0], &pair[1]);
        if start < end {
            let reason = format!("overlaps `{before}`, so the file is corrupt");
            return Err(HeaderError::Tensor(name.clone(), reason));
        }
    }
    Ok(tensors)
}

/// The tensor and the byte after its last.
fn place_tensor(
    raw: RawTensor,
    data_start: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<(TensorInfo, u64), String> {
    let format = Format::from_id(raw.format)?;
    let columns = raw.dims.first().copied().unwrap_or(0);
    let elements = raw
        .dims
        .iter()
        .try_fold(1u64, |product, &n| product.checked_mul(n));
    let Some(elements) = elements.filter(|&n| n > 0) else {
        return Err(format!("has the impossible shape {:?}", raw.dims));
    };
    if !columns.is_multiple_of(format.block_elements() as u64) {
        return Err(format!(
            "has rows of {columns} elements, which {format} cannot hold: its blocks have {}",
            format.block_elements()
        ));
    }
    let bytes =
        (elements / format.block_elements() as u64).checked_mul(format.block_bytes() as u64);
    if !raw.offset.is_multiple_of(alignment) {
        return Err(format!(
            "begins at byte {} of the data, which is not aligned to {alignment}",
            raw.offset
        ));
    }
    let start = data_start.checked_add(raw.offset);
    let end = start
        .zip(bytes)
        .and_then(|(start, bytes)| start.checked_add(bytes));
    match (start, end) {
        (Some(start), Some(end)) if end <= file_bytes => {
            let info = TensorInfo {
                // Each dimension is at most the number of elements, of which a byte holds two at most.
                shape: raw.dims.iter().rev().map(|&n| n as usize).collect(),
                format,
                start,
            };
            Ok((info, end))
        }
        _ => Err(format!(
            "is cut off: it takes {} bytes from byte {} of the data on, but the file ends at byte {file_bytes}; fetch it again",
            bytes.map_or("too many".to_owned(), |n| n.to_string()),
            raw.offset
        )),
    }
}
