//! The safetensors format: a length, a JSON header, then the tensors' bytes.
//!
//! <https://huggingface.co/docs/safetensors>. The header is checked whole before a tensor is handed out:
//! every range lies inside the file and is as long as its dtype and shape say. A hostile header costs
//! memory in proportion to the file and never panics.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::mapped::MappedFile;
use crate::error::ModelError;

/// Longest header that is read. Real ones take some 100 bytes a tensor.
const HEADER_BYTES_MAX: u64 = 64 << 20;

/// Tensors begin at a multiple of this in files that [`header_bytes`] begins: one cache line.
const ALIGNMENT: usize = 64;

/// Number formats of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dtype {
    /// bfloat16.
    #[serde(rename = "BF16")]
    Bf16,
    /// IEEE half precision.
    #[serde(rename = "F16")]
    F16,
    /// IEEE single precision.
    #[serde(rename = "F32")]
    F32,
    /// e4m3: 4 exponent and 3 mantissa bits; [`crate::f32_from_e4m3`] says what a code stands for.
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F8E4M3 => 1,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "BF16" => Some(Dtype::Bf16),
            "F16" => Some(Dtype::F16),
            "F32" => Some(Dtype::F32),
            "F8_E4M3" => Some(Dtype::F8E4M3),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::F32 => "F32",
            Dtype::F8E4M3 => "F8_E4M3",
        })
    }
}

/// A tensor in mapped memory.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Format of its elements.
    pub dtype: Dtype,
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// Its elements, little-endian, row after row; `shape` product times [`Dtype::size`] bytes.
    pub bytes: &'a [u8],
}

/// Where a tensor of a file lies. `dtype` is as the file spells it: not every one can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Spelling of the header: `BF16`, `F32`, `I64`…
    pub dtype: String,
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// First byte and byte after the last, from the beginning of the file.
    pub range: (usize, usize),
}

/// A mapped safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: MappedFile,
    tensors: HashMap<String, TensorEntry>,
}

impl SafetensorsFile {
    /// Map a file and check its header.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let map = MappedFile::open(path)?;
        let tensors = parse_header(&map).map_err(|e| match e {
            HeaderError::File(reason) => ModelError::file(path, reason),
            HeaderError::Tensor(name, reason) => ModelError::tensor(path, &name, reason),
        })?;
        Ok(SafetensorsFile {
            path: path.to_owned(),
            map,
            tensors,
        })
    }

    /// Which file it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of its tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Where a tensor lies, if it is there.
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    /// A tensor by name, of a dtype that can be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        let entry = self
            .entry(name)
            .ok_or_else(|| ModelError::tensor(&self.path, name, "is missing"))?;
        let dtype = Dtype::from_name(&entry.dtype).ok_or_else(|| {
            let reason = format!(
                "is {}; only BF16, F16, F32 and F8_E4M3 can be read",
                entry.dtype
            );
            ModelError::tensor(&self.path, name, reason)
        })?;
        let (start, end) = entry.range;
        Ok(Tensor {
            dtype,
            shape: entry.shape.clone(),
            bytes: &self.map[start..end],
        })
    }
}

/// The beginning of a safetensors file that holds these tensors in this order: length and JSON header,
/// padded so that the first tensor begins at a multiple of 64 bytes.
pub fn header_bytes(tensors: &[(String, Dtype, Vec<usize>)]) -> Vec<u8> {
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut offset = 0usize;
    for (name, dtype, shape) in tensors {
        let end = offset + shape.iter().product::<usize>() * dtype.size();
        let entry =
            serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] });
        header.push_str(&format!(
            ",{}:{entry}",
            serde_json::Value::from(name.as_str())
        ));
        offset = end;
    }
    header.push('}');
    while (8 + header.len()) % ALIGNMENT != 0 {
        header.push(' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes
}

// === reading the header ===

#[derive(Debug)]
enum HeaderError {
    File(String),
    Tensor(String, String),
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's entries in file order; duplicates are refused, `__metadata__` is skipped.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

fn parse_header(file: &[u8]) -> Result<HashMap<String, TensorEntry>, HeaderError> {
    let fail = |reason: String| HeaderError::File(reason);
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(fail(format!(
            "is no safetensors file: it is only {} bytes long",
            file.len()
        )));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        return Err(fail(format!(
            "is no safetensors file: its header would be {length} bytes long (at most {HEADER_BYTES_MAX})"
        )));
    }
    let length = length as usize; // at most HEADER_BYTES_MAX
    let Some(header) = rest.get(..length) else {
        return Err(fail(format!(
            "is truncated: its header is {length} bytes long, only {} are there",
            rest.len()
        )));
    };
    let data = &rest[length..];
    let header: RawHeader = serde_json::from_slice(header).map_err(|e| {
        fail(format!(
            "is no safetensors file: its header is not the JSON it should be ({e})"
        ))
    })?;

    let mut tensors = HashMap::with_capacity(header.0.len());
    for (name, raw) in header.0 {
        let entry = check_entry(raw, 8 + length, data.len())
            .map_err(|reason| HeaderError::Tensor(name.clone(), reason))?;
        if tensors.contains_key(&name) {
            return Err(HeaderError::Tensor(name, "is listed twice".to_owned()));
        }
        tensors.insert(name, entry);
    }
    refuse_overlaps(&tensors)?;
    Ok(tensors)
}

/// The format allows no byte to belong to two tensors.
fn refuse_overlaps(tensors: &HashMap<String, TensorEntry>) -> Result<(), HeaderError> {
    let mut ranges: Vec<_> = tensors
        .iter()
        .filter(|(_, entry)| entry.range.0 < entry.range.1)
        .map(|(name, entry)| (entry.range, name))
        .collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let (((_, end), before), ((start, _), name)) = (&pair[0], &pair[1]);
        if start < end {
            return Err(HeaderError::Tensor(
                (*name).clone(),
                format!("overlaps `{before}`, so the file is corrupt"),
            ));
        }
    }
    Ok(())
}

fn check_entry(raw: RawEntry, data_start: usize, data_len: usize) -> Result<TensorEntry, String> {
    let (start, end) = raw.data_offsets;
    if start > end {
        return Err(format!(
            "ends (at byte {end}) before it begins (at byte {start})"
        ));
    }
    if end > data_len as u64 {
        return Err(format!(
            "is cut off: it ends at byte {end} of the data, only {data_len} are there; fetch the file again"
        ));
    }
    if let Some(size) = Dtype::from_name(&raw.dtype).map(Dtype::size) {
        let bytes = raw
            .shape
            .iter()
            .try_fold(size as u64, |product, &n| product.checked_mul(n));
        if bytes != Some(end - start) {
            return Err(format!(
                "is {} of shape {:?} and takes {} bytes, which do not agree",
                raw.dtype,
                raw.shape,
                end - start
            ));
        }
    }
    let shape = raw
        .shape
        .iter()
        .map(|&n| usize::try_from(n).map_err(|_| format!("has a dimension of {n}")))
        .collect::<Result<_, _>>()?;
    Ok(TensorEntry {
        dtype: raw.dtype,
        shape,
        // No overflow: both are at most data_len, and the file is mapped.
        range: (data_start + start as usize, data_start + end as usize),
    })
}
