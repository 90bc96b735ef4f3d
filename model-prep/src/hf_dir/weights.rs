//! The safetensors files of a Hugging Face directory, FP8 ones with the scales beside their weights.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use baton_model::{
    Dtype, Fp8Matrix, Fp8Scales, ModelSpec, SafetensorsFile, Tensor, TensorSpec, WeightFormat,
    dequantize_row, expected_tensors, names,
};
use half::{bf16, f16};
use serde::Deserialize;

use super::read_small;
use crate::checkpoint::WeightSource;
use crate::error::PrepError;

/// All weights in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Which file holds which tensor, where there are several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// What the scales of `X.weight` are called: by DeepSeek and Qwen, and by AutoFP8 and compressed-tensors. Both are
/// what a number is multiplied by, whatever "inverse" suggests.
const SCALE_SUFFIXES: [&str; 2] = ["_scale_inv", "_scale"];
/// Static scales of a projection's input, which are not used: activations are quantized as they come.
const INPUT_SCALES: [&str; 2] = ["input_scale", "activation_scale"];

/// The weight files of a directory and which of them holds which tensor.
pub(super) struct Safetensors {
    dir: PathBuf,
    pub(super) files: Vec<SafetensorsFile>,
    file_of: HashMap<String, usize>,
    /// How `config.json` says that projections are kept.
    format: WeightFormat,
}

#[derive(Deserialize)]
pub(crate) struct Index {
    /// Tensor → file.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Names of the files, each once.
    pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<(Self, BTreeSet<String>), PrepError> {
        let index: Index = serde_json::from_slice(text)
            .map_err(|e| PrepError::file(path, format!("is no index of weight files: {e}")))?;
        let files: BTreeSet<String> = index.weight_map.values().cloned().collect();
        for file in &files {
            if file.is_empty() || file.starts_with('.') || file.contains(['/', '\\', '\0']) {
                return Err(PrepError::file(
                    path,
                    format!("names {file:?}, which is no plain file name"),
                ));
            }
        }
        Ok((index, files))
    }
}

impl Safetensors {
    pub(super) fn open(
        dir: &Path,
        spec: &ModelSpec,
        format: WeightFormat,
    ) -> Result<Self, PrepError> {
        let index_path = dir.join(INDEX);
        let mut file_of = HashMap::new();
        let mut files = Vec::new();
        if let Some(text) = read_small(&index_path)? {
            let (index, names) = Index::parse(&index_path, &text)?;
            let names: Vec<String> = names.into_iter().collect();
            for name in &names {
                files.push(SafetensorsFile::open(&dir.join(name))?);
            }
            for (tensor, file) in index.weight_map {
                let at = names
                    .binary_search(&file)
                    .expect("the names come from this map");
                file_of.insert(tensor, at);
            }
        } else if dir.join(SINGLE).exists() {
            let file = SafetensorsFile::open(&dir.join(SINGLE))?;
            file_of.extend(file.names().map(|name| (name.to_owned(), 0)));
            files.push(file);
        } else {
            return Err(PrepError::file(
                dir,
                format!(
                    "has neither {SINGLE} nor {INDEX}; weights in other formats (.bin, .pth) are not read"
                ),
            ));
        }
        let weights = Safetensors {
            dir: dir.to_owned(),
            files,
            file_of,
            format,
        };
        weights.refuse_unknown(spec)?;
        Ok(weights)
    }

    /// Leaving out a tensor that the model has, a bias say, would make another model of it.
    fn refuse_unknown(&self, spec: &ModelSpec) -> Result<(), PrepError> {
        let mut known: BTreeSet<String> =
            expected_tensors(spec).into_iter().map(|t| t.name).collect();
        known.insert(names::LM_HEAD.to_owned()); // with tied embeddings, a copy of them
        if self.format.is_fp8() {
            let matrices: Vec<String> = known.iter().filter(|n| may_be_fp8(n)).cloned().collect();
            for name in matrices {
                let module = name.trim_end_matches("weight");
                known.extend(INPUT_SCALES.map(|scale| format!("{module}{scale}")));
                known.extend(SCALE_SUFFIXES.map(|suffix| format!("{name}{suffix}")));
            }
        }
        // Old checkpoints store the rotary frequencies, which follow from the configuration.
        let unknown =
            |name: &&String| !known.contains(*name) && !name.ends_with(".rotary_emb.inv_freq");
        match self.file_of.keys().filter(unknown).min() {
            None => Ok(()),
            Some(name) => Err(PrepError::tensor(
                self.files[self.file_of[name]].path(),
                name,
                "belongs to no model that config.json describes, so the directory cannot be used",
            )),
        }
    }

    fn file(&self, tensor: &str) -> Result<&SafetensorsFile, PrepError> {
        match self.file_of.get(tensor) {
            Some(&at) => Ok(&self.files[at]),
            None => Err(PrepError::tensor(&self.dir, tensor, "is missing")),
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>, PrepError> {
        Ok(self.file(name)?.tensor(name)?)
    }

    /// The scales of an FP8 matrix; one for a whole tensor becomes one for each of its channels.
    fn scales(&self, tensor: &TensorSpec) -> Result<Fp8Scales, PrepError> {
        let names = SCALE_SUFFIXES.map(|suffix| format!("{}{suffix}", tensor.name));
        let Some(name) = names.iter().find(|name| self.file_of.contains_key(*name)) else {
            return Err(self.fault(tensor, "is F8_E4M3, and there are no scales for it"));
        };
        let found = self.tensor(name)?;
        let fail = |reason: String| Err(PrepError::tensor(self.path(name), name, reason));
        let scales: Vec<f32> = match found.dtype {
            Dtype::Bf16 => numbers(found.bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => numbers(found.bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::F32 => numbers(found.bytes, f32::from_le_bytes),
            Dtype::F8E4M3 => return fail("is F8_E4M3, which scales cannot be".to_owned()),
        };
        if let Some(scale) = scales.iter().find(|s| !s.is_finite() || **s < 0.0) {
            return fail(format!("holds {scale}, which no scale can be"));
        }
        let (rows, shape) = (tensor.rows(), found.shape.as_slice());
        let expected = self
            .format
            .scales_shape([rows, tensor.columns()])
            .unwrap_or_default();
        match self.format {
            WeightFormat::Fp8Block if shape == expected => Ok(Fp8Scales::Block(scales)),
            WeightFormat::Fp8Channel if shape == [rows] || shape == [rows, 1] => {
                Ok(Fp8Scales::Channel(scales))
            }
            WeightFormat::Fp8Channel if scales.len() == 1 => {
                Ok(Fp8Scales::Channel(vec![scales[0]; rows]))
            }
            _ => fail(format!(
                "has the shape {shape:?}, for a matrix {:?} in {} it should be {expected:?}",
                tensor.shape, self.format
            )),
        }
    }

    /// The file of a tensor, or the directory that lacks it.
    fn path(&self, tensor: &str) -> &Path {
        self.file(tensor)
            .map_or(self.dir.as_path(), SafetensorsFile::path)
    }
}

/// Whether a tensor of this name may be FP8 in a checkpoint: what is multiplied by, but not the embedding.
fn may_be_fp8(name: &str) -> bool {
    names::is_projection(name) || name == names::LM_HEAD
}

fn numbers<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| number(b)).collect()
}

impl WeightSource for Safetensors {
    fn check(&self, tensor: &TensorSpec, kept: Option<WeightFormat>) -> Result<(), PrepError> {
        let found = self.tensor(&tensor.name)?;
        if found.shape != tensor.shape {
            let reason = format!(
                "has the shape {:?}, it should be {:?}",
                found.shape, tensor.shape
            );
            return Err(self.fault(tensor, &reason));
        }
        if found.dtype == Dtype::F8E4M3 {
            if !self.format.is_fp8() {
                let reason =
                    "is F8_E4M3, and config.json has no `quantization_config` that says so";
                return Err(self.fault(tensor, reason));
            }
            if !may_be_fp8(&tensor.name) {
                return Err(self.fault(tensor, "is F8_E4M3, which only projections may be"));
            }
            self.scales(tensor)?;
        } else if tensor.projection
            && let Some(format) = kept
        {
            let reason = format!(
                "is {} in a model whose projections are {format}, and a mixture cannot be served; prepare it with \
                 `--dtype bf16`",
                found.dtype
            );
            return Err(self.fault(tensor, &reason));
        }
        Ok(())
    }

    fn read(
        &self,
        tensor: &TensorSpec,
        elements: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), PrepError> {
        if let Some(matrix) = self.fp8(tensor)? {
            let first = elements.start / tensor.columns();
            let rows = matrix.codes[elements].chunks_exact(tensor.columns());
            for (row, codes) in rows.enumerate() {
                dequantize_row(codes, |column| matrix.scale(first + row, column), out);
            }
            return Ok(());
        }
        let found = self.tensor(&tensor.name)?;
        let size = found.dtype.size();
        let bytes = &found.bytes[elements.start * size..elements.end * size];
        match found.dtype {
            Dtype::Bf16 => out.extend_from_slice(bytes),
            Dtype::F16 => out.extend(bytes.chunks_exact(2).flat_map(|b| {
                let value = f16::from_le_bytes([b[0], b[1]]).to_f32();
                bf16::from_f32(value).to_le_bytes()
            })),
            Dtype::F32 => out.extend(bytes.chunks_exact(4).flat_map(|b| {
                let value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                bf16::from_f32(value).to_le_bytes()
            })),
            Dtype::F8E4M3 => unreachable!("it was dequantized above"),
        }
        Ok(())
    }

    fn fp8(&self, tensor: &TensorSpec) -> Result<Option<Fp8Matrix<'_>>, PrepError> {
        let found = self.tensor(&tensor.name)?;
        if found.dtype != Dtype::F8E4M3 {
            return Ok(None);
        }
        Ok(Some(Fp8Matrix {
            rows: tensor.rows(),
            columns: tensor.columns(),
            codes: found.bytes.into(),
            scales: self.scales(tensor)?,
        }))
    }

    fn fault(&self, tensor: &TensorSpec, reason: &str) -> PrepError {
        PrepError::tensor(self.path(&tensor.name), &tensor.name, reason)
    }
}
