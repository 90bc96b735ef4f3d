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
    Err(PrepError::Source(unknown(source)))
}

/// Says what else could have been meant: of a path nothing, of a name the short names that begin like it, or else all.
fn unknown(source: &str) -> String {
    let missing = format!("there is no file or directory {source:?}");
    if source.contains('/') || source.starts_with(['.', '~']) || source.ends_with(".gguf") {
        return missing;
    }
    let names = friendly::friendly_names().iter().map(|(name, _)| *name);
    let near: Vec<_> = names
        .clone()
        .map(|name| (alike(source, name), name))
        .collect();
    let most = near.iter().map(|(alike, _)| *alike).max().unwrap_or(0);
    let (means, names) = match most >= ALIKE_MIN {
        true => {
            let near = near.iter().filter(|(alike, _)| *alike == most);
            (
                "did you mean",
                near.map(|(_, name)| *name).collect::<Vec<_>>(),
            )
        }
        false => ("short names are", names.collect()),
    };
    let names = names.join(", ");
    format!("{missing}, and it is no Hugging Face name (owner/model); {means} {names}")
}

/// Letters that two names have to share at their beginning for one to be meant by the other.
const ALIKE_MIN: usize = 3;

/// How many letters and digits two names share at their beginning, whatever is between them.
fn alike(one: &str, other: &str) -> usize {
    fn plain(name: &str) -> impl Iterator<Item = char> {
        let plain = name.chars().filter(char::is_ascii_alphanumeric);
        plain.map(|c| c.to_ascii_lowercase())
    }
    let shared = plain(one).zip(plain(other));
    shared.take_while(|(a, b)| a == b).count()
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
    use super::{is_hub_name, unknown};

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
    #[test]
    fn an_unknown_name_brings_those_that_begin_like_it() {
        let meant = |source: &str| {
            let text = unknown(source);
            let names = text.split_once("did you mean ").map(|(_, names)| names);
            names.map(|names| names.split(", ").map(str::to_owned).collect::<Vec<_>>())
        };
        let smol = [
            "smollm2-135m-instruct",
            "smollm2-360m-instruct",
            "smollm2-1.7b-instruct",
        ];
        assert_eq!(meant("smollm2").unwrap(), smol);
        assert_eq!(meant("SmolM2").unwrap(), smol);
        assert_eq!(meant("qwen3:8b").unwrap(), ["qwen3-8b"]);
        assert!(unknown("gpt-4").contains("short names are llama-2-7b-chat, "));
        for path in ["./model", "/models/x", "a/b/c", "x.gguf"] {
            assert_eq!(
                unknown(path),
                format!("there is no file or directory {path:?}")
            );
        }
    }
}
