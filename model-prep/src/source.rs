//! What the user means by a source.

use std::path::Path;

use crate::checkpoint::Checkpoint;
use crate::error::PrepError;
use crate::hub::Want;
use crate::{friendly, gguf, hf_dir, hub};

/// Open a GGUF file, a Hugging Face directory, or a model of the hub by its own or a short name. What is
/// on disk goes first. `want` says whether weights must be fetched.
pub(crate) fn open(source: &str, want: Want) -> Result<Checkpoint, PrepError> {
    let path = Path::new(source);
    if path.is_dir() {
        return hf_dir::open(path);
    }
    if path.is_file() {
        return match path.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("safetensors") => {
                Err(PrepError::file(
                    path,
                    "is one weight file; name the directory it is in, with config.json and tokenizer.json",
                ))
            }
            _ => gguf::open(path),
        };
    }
    if let Some(name) = friendly::hub_name(source) {
        let checkpoint = hub::open(name, want)?;
        return Ok(Checkpoint {
            name: source.to_ascii_lowercase(),
            ..checkpoint
        });
    }
    if is_hub_name(source) {
        return hub::open(source, want);
    }
    let names: Vec<_> = friendly::friendly_names()
        .iter()
        .map(|(name, _)| *name)
        .collect();
    Err(PrepError::Source(format!(
        "there is no file or directory {source:?}, and it is no Hugging Face name (owner/model); short names are {}",
        names.join(", ")
    )))
}

/// `owner/model`, in the characters the hub allows, and nothing that is meant as a path.
fn is_hub_name(source: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    match source.split_once('/') {
        Some((owner, name)) => part(owner) && part(name) && !source.ends_with(".gguf"),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::is_hub_name;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        assert!(is_hub_name("HuggingFaceTB/SmolLM2-135M-Instruct"));
        for path in [
            "model",
            "./model",
            "/models/x",
            "a/b/c",
            "models/x.gguf",
            "../x",
            "a/",
            "/a",
            "a b/c",
        ] {
            assert!(!is_hub_name(path), "{path}");
        }
    }
}
