//! Models of the Hugging Face hub.
//!
//! Files go to `baton/<owner>--<model>/<commit>` under Hugging Face's home (`HF_HOME`), except those that
//! its own cache holds already. A download that breaks off leaves a `.part` file and goes on from its end
//! the next time. `HF_TOKEN` and `HF_ENDPOINT` are honoured.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_model::{CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG};
use futures::StreamExt;
use hf_hub::repository::{HFRepository, RepoTypeModel};
use hf_hub::{HFClient, HFError};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::checkpoint::Checkpoint;
use crate::error::PrepError;
use crate::hf_dir::{self, INDEX, Index, SINGLE};

/// Longest wait for an answer or for the next bytes of a file.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Times in a row that a download may break off without having brought anything.
const FRUITLESS_MAX: u32 = 3;

/// Fetch a model and open it.
pub(crate) fn open(name: &str) -> Result<Checkpoint, PrepError> {
    // A thread and runtime of its own: the caller may be inside another runtime.
    let dir = std::thread::scope(|scope| scope.spawn(|| fetch_blocking(name)).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let checkpoint = hf_dir::open(&dir.path)?;
    Ok(Checkpoint {
        name: name.to_owned(),
        source: format!("Hugging Face {name}, commit {}", dir.commit),
        ..checkpoint
    })
}

struct Fetched {
    path: PathBuf,
    commit: String,
}

fn fetch_blocking(name: &str) -> Result<Fetched, PrepError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| PrepError::Source(format!("cannot start the download: {e}")))?
        .block_on(Hub::new(name)?.fetch())
}

struct Hub<'a> {
    name: &'a str,
    endpoint: String,
    home: PathBuf,
    repo: HFRepository<RepoTypeModel>,
    bars: MultiProgress,
}

impl<'a> Hub<'a> {
    fn new(name: &'a str) -> Result<Self, PrepError> {
        let client = HFClient::builder()
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| PrepError::Source(format!("cannot reach the Hugging Face hub: {e}")))?;
        let (owner, model) = hf_hub::split_id(name);
        // The cache is `<home>/hub`, wherever the environment puts it.
        let cache = client.cache_dir();
        Ok(Hub {
            name,
            endpoint: client.endpoint().to_owned(),
            home: cache.parent().unwrap_or(cache).join("baton"),
            repo: client.model(owner, model),
            bars: MultiProgress::new(),
        })
    }

    async fn fetch(self) -> Result<Fetched, PrepError> {
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

        for file in [CONFIG, TOKENIZER] {
            self.fetch_file(&path, &commit, file).await?;
        }
        for file in [TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE] {
            if has(file) {
                self.fetch_file(&path, &commit, file).await?;
            }
        }
        if has(INDEX) {
            self.fetch_file(&path, &commit, INDEX).await?;
            let index_path = path.join(INDEX);
            let text = fs::read(&index_path).map_err(|e| PrepError::io("read", &index_path, e))?;
            for file in Index::parse(&index_path, &text)?.1 {
                self.fetch_file(&path, &commit, &file).await?;
            }
        } else {
            self.fetch_file(&path, &commit, SINGLE).await?;
        }
        Ok(Fetched { path, commit })
    }

    /// Make sure that a file is in the directory, whole.
    async fn fetch_file(&self, dir: &Path, commit: &str, file: &str) -> Result<(), PrepError> {
        let path = dir.join(file);
        if path.exists() {
            return Ok(());
        }
        let cached = self
            .repo
            .download_file()
            .filename(file)
            .revision(commit)
            .local_files_only(true);
        if let Ok(cached) = within(cached.send()).await {
            let cached = cached
                .canonicalize()
                .map_err(|e| PrepError::io("find", &cached, e))?;
            return std::os::unix::fs::symlink(&cached, &path)
                .map_err(|e| PrepError::io("link", &path, e));
        }
        let metadata = within(
            self.repo
                .get_file_metadata()
                .filepath(file)
                .revision(commit)
                .send(),
        )
        .await
        .map_err(|e| self.explain(e, file))?;
        let part = dir.join(format!("{file}.part"));
        self.download(&part, commit, file, metadata.file_size)
            .await?;
        fs::rename(&part, &path).map_err(|e| PrepError::io("rename", &part, e))
    }

    /// Append to the partial file until it has all bytes.
    async fn download(
        &self,
        part: &Path,
        commit: &str,
        file: &str,
        bytes: u64,
    ) -> Result<(), PrepError> {
        let io = |doing| move |e| PrepError::io(doing, part, e);
        let mut target = OpenOptions::new()
            .create(true)
            .append(true)
            .open(part)
            .map_err(io("open"))?;
        let mut have = target.metadata().map_err(io("read the size of"))?.len();
        let bar = self.bars.add(progress_bar(file, bytes));
        let mut fruitless = 0;
        while have != bytes {
            if have > bytes {
                target.set_len(0).map_err(io("truncate"))?; // not a beginning of this file
                have = 0;
            }
            bar.set_position(have);
            let before = have;
            let broke = self
                .download_from(&mut target, part, commit, file, &mut have, bytes, &bar)
                .await;
            fruitless = if have > before { 0 } else { fruitless + 1 };
            match broke {
                Err(Broke::Disk(error)) => return Err(PrepError::io("write", part, error)),
                Err(Broke::Hub(error)) if fruitless >= FRUITLESS_MAX => {
                    return Err(self.explain(error, file));
                }
                Ok(()) if fruitless >= FRUITLESS_MAX => {
                    let reason = format!(
                        "the hub sent {have} of the {bytes} bytes of {file}; run again to go on from there"
                    );
                    return Err(PrepError::Source(reason));
                }
                _ => {}
            }
        }
        bar.finish_and_clear();
        target.sync_all().map_err(io("write"))
    }

    #[allow(clippy::too_many_arguments)] // one stream's whole state, used once
    async fn download_from(
        &self,
        target: &mut fs::File,
        part: &Path,
        commit: &str,
        file: &str,
        have: &mut u64,
        bytes: u64,
        bar: &ProgressBar,
    ) -> Result<(), Broke> {
        let _ = part;
        let stream = self
            .repo
            .download_file_stream()
            .filename(file)
            .revision(commit);
        let range = (*have > 0).then_some(*have..bytes);
        let (length, mut stream) = within(stream.maybe_range(range).send())
            .await
            .map_err(Broke::Hub)?;
        if *have > 0 && length.is_some_and(|length| length != bytes - *have) {
            // The server ignored the range and sends everything.
            target.set_len(0).map_err(Broke::Disk)?;
            *have = 0;
        }
        while let Some(piece) = within_next(&mut stream).await {
            let piece = piece.map_err(Broke::Hub)?;
            target.write_all(&piece).map_err(Broke::Disk)?;
            *have += piece.len() as u64;
            bar.set_position(*have);
        }
        Ok(())
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
            HFError::EntryNotFound { .. } => format!(
                "{name} has no {file}; only models with {TOKENIZER} and safetensors weights can be used"
            ),
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

enum Broke {
    Hub(HFError),
    Disk(std::io::Error),
}

/// The answer, or an error when nothing comes for too long.
async fn within<T>(answer: impl Future<Output = Result<T, HFError>>) -> Result<T, HFError> {
    match tokio::time::timeout(SILENCE_MAX, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(silence()),
    }
}

async fn within_next<T>(
    stream: &mut (impl futures::Stream<Item = Result<T, HFError>> + Unpin),
) -> Option<Result<T, HFError>> {
    match tokio::time::timeout(SILENCE_MAX, stream.next()).await {
        Ok(next) => next,
        Err(_) => Some(Err(silence())),
    }
}

fn silence() -> HFError {
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

fn progress_bar(file: &str, bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left",
    )
    .expect("the template is well-formed");
    ProgressBar::new(bytes)
        .with_style(style)
        .with_message(file.to_owned())
}
