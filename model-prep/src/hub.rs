//! Models of the Hugging Face hub.
//!
//! Files go to `baton/<owner>--<model>/<commit>` under Hugging Face's home (`HF_HOME`), except those that
//! its own cache holds already. A download that breaks off leaves a `.part` file and goes on from its end
//! the next time; one process at a time appends to it. `HF_TOKEN` and `HF_ENDPOINT` are honoured.

mod download;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_model::{
    CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, TensorSpec, WeightFormat,
};
use hf_hub::repository::{HFRepository, RepoTreeEntry, RepoTypeModel};
use hf_hub::{HFClient, HFError};
use indicatif::MultiProgress;

use crate::checkpoint::{Checkpoint, WeightSource};
use crate::error::PrepError;
use crate::hf_dir::{self, INDEX, Index, SINGLE};
use download::Download;

/// Longest wait for an answer or for the next bytes of a file.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// What to have of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// All of it.
    Everything,
    /// All but the weights, which are only looked up: enough for a plan.
    Plan,
}

/// Fetch a model and open it.
pub(crate) fn open(name: &str, want: Want) -> Result<Checkpoint, PrepError> {
    let client = HFClient::builder()
        .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|e| PrepError::Source(format!("cannot reach the Hugging Face hub: {e}")))?;
    open_with(client, name, want)
}

fn open_with(client: HFClient, name: &str, want: Want) -> Result<Checkpoint, PrepError> {
    // A thread and runtime of its own: the caller may be inside another runtime.
    let fetch = || fetch_blocking(client, name, want);
    let fetched = std::thread::scope(|scope| scope.spawn(fetch).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let checkpoint = match fetched.unfetched {
        None => hf_dir::open(&fetched.path)?,
        Some(weights) => hf_dir::open_without_weights(&fetched.path, Box::new(weights))?,
    };
    // The directory has a commit's name.
    let family = name.rsplit('/').next().unwrap_or(name);
    Ok(Checkpoint {
        name: name.to_owned(),
        family: family.to_owned(),
        source: format!("Hugging Face {name}, commit {}", fetched.commit),
        ..checkpoint
    })
}

struct Fetched {
    path: PathBuf,
    commit: String,
    /// What is known of weights that were not fetched.
    unfetched: Option<Unfetched>,
}

fn fetch_blocking(client: HFClient, name: &str, want: Want) -> Result<Fetched, PrepError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| PrepError::Source(format!("cannot start the download: {e}")))?
        .block_on(Hub::new(client, name).fetch(want))
}

/// Weights that lie on the hub, of which the index at most was read.
struct Unfetched {
    place: PathBuf,
    /// Names of the tensors, where there is an index.
    tensors: Option<BTreeSet<String>>,
}

impl WeightSource for Unfetched {
    fn check(&self, tensor: &TensorSpec, _kept: Option<WeightFormat>) -> Result<(), PrepError> {
        match &self.tensors {
            Some(names) if !names.contains(&tensor.name) => Err(self.fault(tensor, "is missing")),
            _ => Ok(()),
        }
    }

    fn read(&self, tensor: &TensorSpec, _: Range<usize>, _: &mut Vec<u8>) -> Result<(), PrepError> {
        Err(self.fault(tensor, "was not fetched"))
    }

    fn fault(&self, tensor: &TensorSpec, reason: &str) -> PrepError {
        PrepError::tensor(&self.place, &tensor.name, reason)
    }
}

/// What the hub says of a file.
struct Remote {
    bytes: u64,
    /// SHA-256 of its content; known for large files alone.
    sha256: Option<String>,
}

struct Hub<'a> {
    name: &'a str,
    endpoint: String,
    home: PathBuf,
    repo: HFRepository<RepoTypeModel>,
    bars: MultiProgress,
}

impl<'a> Hub<'a> {
    fn new(client: HFClient, name: &'a str) -> Self {
        let (owner, model) = hf_hub::split_id(name);
        // The cache is `<home>/hub`, wherever the environment puts it.
        let cache = client.cache_dir();
        Hub {
            name,
            endpoint: client.endpoint().to_owned(),
            home: cache.parent().unwrap_or(cache).join("baton"),
            repo: client.model(owner, model),
            bars: MultiProgress::new(),
        }
    }

    async fn fetch(self, want: Want) -> Result<Fetched, PrepError> {
        let info = within(self.repo.info().send())
            .await
            .map_err(|e| self.explain(e, ""))?;
        let commit = info.sha.unwrap_or_default();
        if commit.is_empty() || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(PrepError::Source(format!(
                "{} names no commit of {}",
                self.endpoint, self.name
            )));
        }
        let siblings = info.siblings.unwrap_or_default();
        let has = |file: &str| siblings.iter().any(|s| s.rfilename == file);
        let path = self.home.join(self.name.replace('/', "--")).join(&commit);
        fs::create_dir_all(&path).map_err(|e| PrepError::io("create", &path, e))?;

        let optional = [TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE, INDEX];
        let small = [CONFIG, TOKENIZER]
            .into_iter()
            .chain(optional.into_iter().filter(|file| has(file)));
        let small: Vec<String> = small.map(str::to_owned).collect();
        self.fetch_files(&path, &commit, &small).await?;

        let (weights, tensors) = if has(INDEX) {
            let index_path = path.join(INDEX);
            let text = fs::read(&index_path).map_err(|e| PrepError::io("read", &index_path, e))?;
            let (index, files) = Index::parse(&index_path, &text)?;
            (
                Vec::from_iter(files),
                Some(index.weight_map.into_keys().collect()),
            )
        } else {
            (vec![SINGLE.to_owned()], None)
        };
        let mut unfetched = None;
        match want {
            Want::Everything => self.fetch_files(&path, &commit, &weights).await?,
            Want::Plan if weights.iter().all(|file| path.join(file).exists()) => {}
            Want::Plan => {
                self.look_up(&commit, &weights).await?;
                let place = PathBuf::from(format!("{}/{}", self.endpoint, self.name));
                unfetched = Some(Unfetched { place, tensors });
            }
        }
        Ok(Fetched {
            path,
            commit,
            unfetched,
        })
    }

    /// Make sure that files are in the directory, whole.
    async fn fetch_files(
        &self,
        dir: &Path,
        commit: &str,
        files: &[String],
    ) -> Result<(), PrepError> {
        let mut missing = Vec::new();
        for file in files {
            if !dir.join(file).exists() && !self.link_cached(dir, commit, file).await? {
                missing.push(file.clone());
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let remote = self.look_up(commit, &missing).await?;
        for (file, remote) in missing.iter().zip(&remote) {
            let download = Download {
                hub: self,
                commit,
                file,
                remote,
                path: dir.join(file),
            };
            download.run().await?;
        }
        Ok(())
    }

    /// Link to a file of the hub's own cache, if it is there.
    async fn link_cached(&self, dir: &Path, commit: &str, file: &str) -> Result<bool, PrepError> {
        let cached = self
            .repo
            .download_file()
            .filename(file)
            .revision(commit)
            .local_files_only(true);
        let Ok(cached) = within(cached.send()).await else {
            return Ok(false);
        };
        let cached = cached
            .canonicalize()
            .map_err(|e| PrepError::io("find", &cached, e))?;
        let path = dir.join(file);
        match std::os::unix::fs::symlink(&cached, &path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(true),
            Err(e) => Err(PrepError::io("link", &path, e)),
            Ok(()) => Ok(true),
        }
    }

    /// Sizes and checksums of files, in their order. The hub's answer to a request for the file itself
    /// would not do: for large files it leads elsewhere, where the hub's own headers are missing.
    async fn look_up(&self, commit: &str, files: &[String]) -> Result<Vec<Remote>, PrepError> {
        let entries = self
            .repo
            .get_paths_info()
            .paths(files.to_vec())
            .revision(commit);
        let entries = within(entries.send())
            .await
            .map_err(|e| self.explain(e, &files.join(", ")))?;
        let find = |file: &String| {
            let found = entries.iter().find_map(|entry| match entry {
                RepoTreeEntry::File {
                    path, size, lfs, ..
                } if path == file => Some(Remote {
                    bytes: *size,
                    sha256: lfs.as_ref().and_then(|lfs| lfs.sha256.clone()),
                }),
                _ => None,
            });
            found.ok_or_else(|| self.no_such_file(file))
        };
        files.iter().map(find).collect()
    }

    fn no_such_file(&self, file: &str) -> PrepError {
        PrepError::Source(format!(
            "{} has no {file}; only models with {TOKENIZER} and safetensors weights can be used",
            self.name
        ))
    }

    /// A sentence that says what to do.
    fn explain(&self, error: HFError, file: &str) -> PrepError {
        let name = self.name;
        let what = if file.is_empty() {
            name.to_owned()
        } else {
            format!("{file} of {name}")
        };
        PrepError::Source(match error {
            HFError::AuthRequired { .. } | HFError::Forbidden { .. } => format!(
                "{what} may not be read: the model is gated or private, or does not exist; accept its terms at \
                 {}/{name} and set HF_TOKEN to a token of an account that may read it",
                self.endpoint
            ),
            HFError::RepoNotFound { .. } => {
                format!("there is no model {name} at {}", self.endpoint)
            }
            HFError::EntryNotFound { .. } => return self.no_such_file(file),
            HFError::RateLimited { .. } => format!(
                "{} asks to wait before fetching {what}; run again later",
                self.endpoint
            ),
            HFError::Request { source, .. } => format!(
                "cannot reach {} to fetch {what} ({}); without a network, name a local directory or GGUF file",
                self.endpoint,
                root_cause(&source)
            ),
            other => format!("cannot fetch {what} from {}: {other}", self.endpoint),
        })
    }
}

/// The answer, or an error when nothing comes for too long.
pub(super) async fn within<T>(
    answer: impl Future<Output = Result<T, HFError>>,
) -> Result<T, HFError> {
    match tokio::time::timeout(SILENCE_MAX, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(silence()),
    }
}

pub(super) fn silence() -> HFError {
    HFError::Other(format!(
        "nothing came for {} seconds",
        SILENCE_MAX.as_secs()
    ))
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
