//! From what a person calls a model to a prepared directory: as it is if it is one, else prepared into the cache.

use std::path::{Path, PathBuf};

use baton_model_prep::{PrepError, PrepareOptions, prepare};

use crate::Failure;

/// A model directory that workers can serve.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Where it is.
    pub directory: PathBuf,
    /// The name in its manifest.
    pub name: String,
}

/// Finds or makes the directory for a prepared directory, a GGUF file, a friendly or a Hugging Face name.
///
/// # Errors
/// What is wrong with the model, or why it could not be had.
pub fn resolve(model: &str) -> Result<Prepared, Failure> {
    let path = Path::new(model);
    if path.join("manifest.json").is_file() {
        let opened = baton_model::ModelDir::open(path)?;
        return Ok(Prepared {
            directory: path.canonicalize()?,
            name: opened.manifest.name,
        });
    }
    let out = cache()?.join(directory_name(model));
    tracing::info!("preparing {model} in {}", out.display());
    let options = PrepareOptions::new(model, &out);
    let report = match prepare(options.clone()) {
        // The cache is this program's own, and what it makes of a source may be another with each release.
        Err(PrepError::Output { .. }) => {
            tracing::info!(
                "{} is of another release: it is prepared again",
                out.display()
            );
            prepare(PrepareOptions {
                force: true,
                ..options
            })
        }
        outcome => outcome,
    }?;
    Ok(Prepared {
        directory: out,
        name: report.plan.name,
    })
}

/// Where prepared models are kept: `BATON_CACHE`, else where the user's caches are.
fn cache() -> Result<PathBuf, Failure> {
    let named = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    named("BATON_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|cache| cache.join("baton")))
        .or_else(|| named("HOME").map(|home| home.join(".cache/baton")))
        .map(|cache| cache.join("models"))
        .ok_or_else(|| "no place for prepared models: set BATON_CACHE or HOME".into())
}

/// One directory for each source: a readable stem, and for files and directories a checksum of the whole path,
/// since many are called `model.gguf`.
fn directory_name(model: &str) -> String {
    let path = Path::new(model);
    let readable = |text: &str| {
        text.replace(
            |c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c),
            "-",
        )
    };
    match path.canonicalize() {
        Err(_) => readable(model).to_lowercase(),
        Ok(whole) => {
            let stem = path
                .file_stem()
                .unwrap_or(path.as_os_str())
                .to_string_lossy();
            // FNV-1a: stable over builds, and good enough to tell a user's paths apart.
            let hash = whole
                .as_os_str()
                .as_encoded_bytes()
                .iter()
                .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                    (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
                });
            format!("{}-{:08x}", readable(&stem).to_lowercase(), hash as u32)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable_and_paths_told_apart() {
        assert_eq!(
            directory_name("HuggingFaceTB/SmolLM2-135M"),
            "huggingfacetb-smollm2-135m"
        );
        let directory = tempfile::tempdir().unwrap();
        let file = |folder: &str| {
            let folder = directory.path().join(folder);
            std::fs::create_dir(&folder).unwrap();
            let file = folder.join("Model Q4.gguf");
            std::fs::write(&file, "").unwrap();
            directory_name(file.to_str().unwrap())
        };
        let (a, b) = (file("a"), file("b"));
        assert!(a.starts_with("model-q4-"), "{a}");
        assert_ne!(a, b);
    }
}
