//! A local directory in Hugging Face's layout.

mod weights;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use baton_model::{
    CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, ModelError, ModelSpec, SafetensorsFile, TOKENIZER,
    TOKENIZER_CONFIG, WeightFormat, checkpoint_format, eos_token_ids, parse_config,
};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::checkpoint::{Checkpoint, SmallFile, WeightSource, stamp};
use crate::error::PrepError;
use weights::Safetensors;
pub(crate) use weights::{INDEX, Index, SINGLE};

/// Largest configuration, tokenizer or index that is read; real ones stay under 40 MB.
const SMALL_FILE_BYTES_MAX: u64 = 128 << 20;

/// Open a directory with `config.json`, `tokenizer.json` and safetensors.
pub(crate) fn open(dir: &Path) -> Result<Checkpoint, PrepError> {
    let Configuration { spec, format, text } = Configuration::read(dir)?;
    let weights = Safetensors::open(dir, &spec, format)?;
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
    let configuration = Configuration { spec, format, text };
    checkpoint(dir, configuration, stamp, Box::new(weights))
}

/// Open a directory in which the weights are still missing; `weights` stands for them.
pub(crate) fn open_without_weights(
    dir: &Path,
    weights: Box<dyn WeightSource>,
) -> Result<Checkpoint, PrepError> {
    checkpoint(dir, Configuration::read(dir)?, String::new(), weights)
}

fn checkpoint(
    dir: &Path,
    configuration: Configuration,
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
    let Configuration { spec, format, text } = configuration;
    Ok(Checkpoint {
        source: format!("Hugging Face directory {name}"),
        family: name.clone(),
        name,
        stamp,
        bos_token_id: text.bos_token_id,
        eos_token_ids: text.eos_token_ids,
        format,
        files: text.files,
        weights,
        spec,
    })
}

/// All that a directory says of a model besides its weights.
struct Configuration {
    spec: ModelSpec,
    format: WeightFormat,
    text: TextFiles,
}

impl Configuration {
    fn read(dir: &Path) -> Result<Self, PrepError> {
        let config = read_small(&dir.join(CONFIG))?.ok_or_else(|| {
            PrepError::file(
                dir,
                format!("has no {CONFIG}, so it is no Hugging Face model directory"),
            )
        })?;
        let explain = |error| match error {
            ModelError::Config(reason) => PrepError::file(dir, reason),
            other => other.into(),
        };
        let spec = parse_config(&config).map_err(explain)?;
        let value = serde_json::from_slice(&config).expect("it was parsed as JSON before");
        let format = checkpoint_format(&value).map_err(explain)?;
        let text = read_text_files(dir, &spec, config, &value)?;
        Ok(Configuration { spec, format, text })
    }
}

// === configuration and tokenizer ===

struct TextFiles {
    files: Vec<SmallFile>,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
}

fn read_text_files(
    dir: &Path,
    spec: &ModelSpec,
    config: Vec<u8>,
    config_value: &Value,
) -> Result<TextFiles, PrepError> {
    let tokenizer_path = dir.join(TOKENIZER);
    let tokenizer_json = read_small(&tokenizer_path)?.ok_or_else(|| {
        let reason =
            format!("has no {TOKENIZER}; models with a slow tokenizer alone are not supported");
        PrepError::file(dir, reason)
    })?;
    let unusable = |error: &dyn std::fmt::Display| {
        PrepError::file(&tokenizer_path, format!("is no usable tokenizer: {error}"))
    };
    // First, because the tokenizers crate panics over some texts that are no JSON.
    serde_json::from_slice::<serde_json::Value>(&tokenizer_json).map_err(|e| unusable(&e))?;
    let tokenizer = Tokenizer::from_bytes(&tokenizer_json).map_err(|e| unusable(&e))?;

    let tokenizer_config = read_json(&dir.join(TOKENIZER_CONFIG))?;
    let generation_config = read_json(&dir.join(GENERATION_CONFIG))?;
    let template = match read_small(&dir.join(CHAT_TEMPLATE))? {
        Some(template) => Some(template),
        None => tokenizer_config
            .as_ref()
            .and_then(|(_, config)| template_in(config))
            .map(String::into_bytes),
    };

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
        eos = eos_token_ids(config_value);
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
    let bos = [generation, config_value]
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
