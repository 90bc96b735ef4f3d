//! GGUF files of Llama-type models: container, number formats, names and order of weights, tokenizer.

mod container;
mod llama;
mod metadata;
mod quant;
mod tokenizer;
mod weights;

use std::path::Path;

use baton_model::{
    CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, ModelSpec, TOKENIZER, TOKENIZER_CONFIG, WeightFormat,
};

use crate::checkpoint::{Checkpoint, SmallFile};
use crate::error::PrepError;
use container::Container;
use weights::GgufWeights;

/// Open a GGUF file and rebuild from its metadata what a Hugging Face directory would hold.
pub(crate) fn open(path: &Path) -> Result<Checkpoint, PrepError> {
    let container = Container::open(path)?;
    let refuse = |reason: String| PrepError::file(path, reason);
    let spec = llama::spec(&container).map_err(refuse)?;
    let tokenizer = tokenizer::rebuild(&container.metadata, &spec).map_err(refuse)?;
    let head_dim = spec.head_dim;
    let config = llama::config_json(&spec, &tokenizer);
    let generation_config =
        llama::generation_config_json(&container.metadata, &tokenizer).map_err(refuse)?;
    let spec = ModelSpec::try_from(spec).map_err(refuse)?;
    let family = container.metadata.text("general.basename");
    let family = family.map_err(refuse)?.map(str::to_owned);

    let file_name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let mut files = vec![
        SmallFile {
            name: CONFIG,
            content: pretty(&config),
        },
        SmallFile {
            name: GENERATION_CONFIG,
            content: pretty(&generation_config),
        },
        SmallFile {
            name: TOKENIZER,
            content: tokenizer.json,
        },
        SmallFile {
            name: TOKENIZER_CONFIG,
            content: pretty(&tokenizer.config),
        },
    ];
    if let Some(template) = tokenizer.chat_template {
        files.push(SmallFile {
            name: CHAT_TEMPLATE,
            content: template.into_bytes(),
        });
    }
    let name = served_name(&file_name);
    Ok(Checkpoint {
        family: family.unwrap_or_else(|| name.clone()),
        name,
        source: format!("GGUF file {file_name}"),
        stamp: crate::checkpoint::stamp([path])?,
        bos_token_id: tokenizer.bos_token_id,
        eos_token_ids: tokenizer.eos_token_ids,
        format: WeightFormat::Bf16,
        files,
        weights: Box::new(GgufWeights::new(container, &spec, head_dim)?),
        spec,
    })
}

fn pretty(value: &serde_json::Value) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("a JSON value can be written");
    text.push(b'\n');
    text
}

/// `SmolLM2-135M-Instruct.Q4_1.gguf` is served as `smollm2-135m-instruct`.
fn served_name(file_name: &str) -> String {
    let stem = file_name.strip_suffix(".gguf").unwrap_or(file_name);
    let is_format = |part: &str| {
        let part = part.to_ascii_uppercase();
        matches!(part.as_str(), "F16" | "F32" | "BF16")
            || part
                .strip_prefix("IQ")
                .or(part.strip_prefix('Q'))
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let stem = match stem.rsplit_once(['.', '-']) {
        Some((stem, format)) if is_format(format) => stem,
        _ => stem,
    };
    stem.to_ascii_lowercase()
}
