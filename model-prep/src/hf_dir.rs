//! A local directory in Hugging Face's layout.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use baton_model::{
    CHAT_TEMPLATE, CONFIG, Dtype, GENERATION_CONFIG, ModelError, ModelSpec, SafetensorsFile,
    TOKENIZER, TOKENIZER_CONFIG, TensorSpec, eos_token_ids, expected_tensors, names, parse_config,
};
use half::{bf16, f16};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::checkpoint::{Checkpoint, SmallFile, WeightSource, stamp};
use crate::error::PrepError;

/// All weights in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Which file holds which tensor, where there are several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Largest configuration, tokenizer or index that is read; real ones stay under 40 MB.
const SMALL_FILE_BYTES_MAX: u64 = 128 << 20;

/// Open a directory with `config.json`, `tokenizer.json` and safetensors.
pub(crate) fn open(dir: &Path) -> Result<Checkpoint, PrepError> {
    let (spec, text) = read_config_and_text(dir)?;
    let weights = Safetensors::open(dir, &spec)?;
    let named: Vec<PathBuf> = text
        .files
        .iter()
        .map(|f| dir.join(f.name))
        .filter(|p| p.exists())
        .collect();
    let stamp = stamp(
        named
            .iter()
            .map(PathBuf::as_path)
            .chain(weights.files.iter().map(SafetensorsFile::path)),
    )?;
    checkpoint(dir, spec, text, stamp, Box::new(weights))
}

/// Open a directory in which the weights are still missing; `weights` stands for them.
pub(crate) fn open_without_weights(
    dir: &Path,
    weights: Box<dyn WeightSource>,
) -> Result<Checkpoint, PrepError> {
    let (spec, text) = read_config_and_text(dir)?;
    checkpoint(dir, spec, text, String::new(), weights)
}

fn checkpoint(
    dir: &Path,
    spec: ModelSpec,
    text: TextFiles,
    stamp: String,
    weights: Box<dyn WeightSource>,
) -> Result<Checkpoint, PrepError> {
    let full = dir
        .canonicalize()
        .map_err(|e| PrepError::io("find", dir, e))?;
    let name = full
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_ascii_lowercase();
    Ok(Checkpoint {
        source: format!("Hugging Face directory {name}"),
        name,
        stamp,
        bos_token_id: text.bos_token_id,
        eos_token_ids: text.eos_token_ids,
        files: text.files,
        weights,
        spec,
    })
}

fn read_config_and_text(dir: &Path) -> Result<(ModelSpec, TextFiles), PrepError> {
    let config_path = dir.join(CONFIG);
    let config = read_small(&config_path)?.ok_or_else(|| {
        PrepError::file(
            dir,
            format!("has no {CONFIG}, so it is no Hugging Face model directory"),
        )
    })?;
    let spec = parse_config(&config).map_err(|error| match error {
        ModelError::Config(reason) => PrepError::file(dir, reason),
        other => other.into(),
    })?;
    let text = read_text_files(dir, &spec, config)?;
    Ok((spec, text))
}

// === configuration and tokenizer ===

struct TextFiles {
    files: Vec<SmallFile>,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
}

fn read_text_files(dir: &Path, spec: &ModelSpec, config: Vec<u8>) -> Result<TextFiles, PrepError> {
    let tokenizer_path = dir.join(TOKENIZER);
    let tokenizer_json = read_small(&tokenizer_path)?.ok_or_else(|| {
        let reason =
            format!("has no {TOKENIZER}; models with a slow tokenizer alone are not supported");
        PrepError::file(dir, reason)
    })?;
    let tokenizer = Tokenizer::from_bytes(&tokenizer_json)
        .map_err(|e| PrepError::file(&tokenizer_path, format!("is no usable tokenizer: {e}")))?;

    let tokenizer_config = read_json(&dir.join(TOKENIZER_CONFIG))?;
    let generation_config = read_json(&dir.join(GENERATION_CONFIG))?;
    let template = match read_small(&dir.join(CHAT_TEMPLATE))? {
        Some(template) => Some(template),
        None => tokenizer_config
            .as_ref()
            .and_then(|(_, config)| template_in(config))
            .map(String::into_bytes),
    };

    let config_value: Value =
        serde_json::from_slice(&config).expect("it was parsed as JSON before");
    let token = |name: &str| {
        let (_, config) = tokenizer_config.as_ref()?;
        let token = config.get(name)?;
        // A string, or an added token written out.
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        tokenizer.token_to_id(text)
    };
    let generation = generation_config
        .as_ref()
        .map_or(&Value::Null, |(_, value)| value);
    let mut eos = eos_token_ids(generation);
    if eos.is_empty() {
        eos = eos_token_ids(&config_value);
    }
    eos.extend(token("eos_token"));
    let mut seen = BTreeSet::new();
    eos.retain(|id| seen.insert(*id));
    if eos.is_empty() {
        return Err(PrepError::file(
            dir,
            "names no token that ends an answer (`eos_token_id` of generation_config.json or config.json)",
        ));
    }
    let bos = [generation, &config_value]
        .iter()
        .find_map(|config| config.get("bos_token_id")?.as_u64())
        .and_then(|id| u32::try_from(id).ok())
        .or_else(|| token("bos_token"));
    if let Some(id) = eos
        .iter()
        .chain(&bos)
        .find(|&&id| id as usize >= spec.vocab)
    {
        return Err(PrepError::file(
            dir,
            format!("names the token {id}, the vocabulary has {}", spec.vocab),
        ));
    }

    let mut files = vec![
        SmallFile {
            name: CONFIG,
            content: config,
        },
        SmallFile {
            name: TOKENIZER,
            content: tokenizer_json,
        },
    ];
    let optional = [
        (TOKENIZER_CONFIG, tokenizer_config.map(|(text, _)| text)),
        (GENERATION_CONFIG, generation_config.map(|(text, _)| text)),
        (CHAT_TEMPLATE, template),
    ];
    files.extend(optional.into_iter().filter_map(|(name, content)| {
        Some(SmallFile {
            name,
            content: content?,
        })
    }));
    Ok(TextFiles {
        files,
        bos_token_id: bos,
        eos_token_ids: eos,
    })
}

/// The template of a `tokenizer_config.json`: a string, or a list of named ones with a default.
fn template_in(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(template) => Some(template.clone()),
        Value::Array(templates) => {
            let default = templates
                .iter()
                .find(|t| t.get("name").is_some_and(|n| n == "default"))?;
            default.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// The content of a file, `None` if there is no such file.
fn read_small(path: &Path) -> Result<Option<Vec<u8>>, PrepError> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(PrepError::io("read", path, e)),
    };
    if metadata.len() > SMALL_FILE_BYTES_MAX {
        let reason = format!(
            "is {} bytes long, at most {SMALL_FILE_BYTES_MAX} are read",
            metadata.len()
        );
        return Err(PrepError::file(path, reason));
    }
    fs::read(path)
        .map(Some)
        .map_err(|e| PrepError::io("read", path, e))
}

fn read_json(path: &Path) -> Result<Option<(Vec<u8>, Value)>, PrepError> {
    let Some(text) = read_small(path)? else {
        return Ok(None);
    };
    match serde_json::from_slice(&text) {
        Ok(value) => Ok(Some((text, value))),
        Err(e) => Err(PrepError::file(path, format!("is not JSON: {e}"))),
    }
}

// === weights ===

/// The weight files of a directory and which of them holds which tensor.
struct Safetensors {
    dir: PathBuf,
    files: Vec<SafetensorsFile>,
    file_of: HashMap<String, usize>,
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
    fn open(dir: &Path, spec: &ModelSpec) -> Result<Self, PrepError> {
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
        };
        weights.refuse_unknown(spec)?;
        Ok(weights)
    }

    /// Leaving out a tensor that the model has, a bias say, would make another model of it.
    fn refuse_unknown(&self, spec: &ModelSpec) -> Result<(), PrepError> {
        let mut known: BTreeSet<String> =
            expected_tensors(spec).into_iter().map(|t| t.name).collect();
        known.insert(names::LM_HEAD.to_owned()); // with tied embeddings, a copy of them
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
}

impl WeightSource for Safetensors {
    fn check(&self, tensor: &TensorSpec) -> Result<(), PrepError> {
        let file = self.file(&tensor.name)?;
        let found = file.tensor(&tensor.name)?;
        if found.shape != tensor.shape {
            let reason = format!(
                "has the shape {:?}, it should be {:?}",
                found.shape, tensor.shape
            );
            return Err(PrepError::tensor(file.path(), &tensor.name, reason));
        }
        if found.dtype == Dtype::F8E4M3 {
            let reason = "is F8_E4M3, and config.json does not say with which scales";
            return Err(PrepError::tensor(file.path(), &tensor.name, reason));
        }
        Ok(())
    }

    fn read(
        &self,
        tensor: &TensorSpec,
        elements: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), PrepError> {
        let found = self.file(&tensor.name)?.tensor(&tensor.name)?;
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
            Dtype::F8E4M3 => unreachable!("refused by the check"),
        }
        Ok(())
    }

    fn fault(&self, tensor: &TensorSpec, reason: &str) -> PrepError {
        let path = self
            .file(&tensor.name)
            .map_or(self.dir.as_path(), SafetensorsFile::path);
        PrepError::tensor(path, &tensor.name, reason)
    }
}
