//! One file of the hub, into a `.part` file and from there to its name.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::PathBuf;

use futures::StreamExt;
use hf_hub::HFError;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Hub, Remote, SILENCE_MAX, silence, within};
use crate::error::PrepError;

/// Times in a row that a download may break off without having brought anything.
const FRUITLESS_MAX: u32 = 3;

/// A file to download.
pub(super) struct Download<'a> {
    pub hub: &'a Hub<'a>,
    pub commit: &'a str,
    pub file: &'a str,
    pub remote: &'a Remote,
    /// Where it goes.
    pub path: PathBuf,
}

/// The partial file, locked by this process.
struct Part {
    path: PathBuf,
    file: File,
    have: u64,
}

enum Broke {
    Hub(HFError),
    Disk(std::io::Error),
    /// More came than the file has.
    TooLong,
}

impl Download<'_> {
    pub(super) async fn run(self) -> Result<(), PrepError> {
        let part = self.open_part()?;
        if self.path.exists() {
            return Ok(()); // another process finished it before the lock was ours
        }
        let part = self.complete(part).await?;
        part.file
            .sync_all()
            .map_err(|e| PrepError::io("write", &part.path, e))?;
        if let Some(expected) = &self.remote.sha256 {
            let found = baton_model::hash_file(&part.path)?;
            if !found.eq_ignore_ascii_case(expected) {
                // Going on from these bytes would never make it right.
                fs::remove_file(&part.path).map_err(|e| PrepError::io("remove", &part.path, e))?;
                return Err(PrepError::Source(format!(
                    "{} of {} came with SHA-256 {found}, the hub says {expected}; what came was removed, run again",
                    self.file, self.hub.name
                )));
            }
        }
        fs::rename(&part.path, &self.path).map_err(|e| PrepError::io("rename", &part.path, e))
        // The lock goes with `part`, after the file has its name.
    }

    fn open_part(&self) -> Result<Part, PrepError> {
        let mut path = self.path.clone().into_os_string();
        path.push(".part");
        let path = PathBuf::from(path);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|e| PrepError::io("open", &path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let reason = "is being downloaded by another process; run again when that is done";
                return Err(PrepError::file(&path, reason));
            }
            Err(TryLockError::Error(e)) => return Err(PrepError::io("lock", &path, e)),
        }
        let have = file
            .metadata()
            .map_err(|e| PrepError::io("read the size of", &path, e))?
            .len();
        Ok(Part { path, file, have })
    }

    /// Append to the partial file until it has all bytes.
    async fn complete(&self, mut part: Part) -> Result<Part, PrepError> {
        let (bytes, file, hub) = (self.remote.bytes, self.file, self.hub);
        let disk = |path: &PathBuf, error| PrepError::io("write", path, error);
        let bar = hub.bars.add(progress_bar(file, bytes));
        let mut fruitless = 0;
        while part.have != bytes {
            if part.have > bytes {
                part.clear().map_err(|e| disk(&part.path, e))?; // no beginning of this file
            }
            let before = part.have;
            let broke = self.append(&mut part, &bar).await;
            let fruitful = part.have > before && !matches!(broke, Err(Broke::TooLong));
            fruitless = if fruitful { 0 } else { fruitless + 1 };
            match broke {
                Err(Broke::Disk(error)) => return Err(disk(&part.path, error)),
                _ if fruitless < FRUITLESS_MAX => {}
                Err(Broke::Hub(error)) => return Err(hub.explain(error, file)),
                Err(Broke::TooLong) => {
                    return Err(PrepError::Source(format!(
                        "{} sends more than the {bytes} bytes that {file} of {} should have",
                        hub.endpoint, hub.name
                    )));
                }
                Ok(()) => {
                    return Err(PrepError::Source(format!(
                        "the hub sent {} of the {bytes} bytes of {file}; run again to go on from there",
                        part.have
                    )));
                }
            }
        }
        bar.finish_and_clear();
        Ok(part)
    }

    /// Append what one answer of the hub brings.
    async fn append(&self, part: &mut Part, bar: &ProgressBar) -> Result<(), Broke> {
        let bytes = self.remote.bytes;
        let stream = self
            .hub
            .repo
            .download_file_stream()
            .filename(self.file)
            .revision(self.commit);
        let range = (part.have > 0).then_some(part.have..bytes);
        let (length, mut stream) = within(stream.maybe_range(range).send())
            .await
            .map_err(Broke::Hub)?;
        if part.have > 0 && length == Some(bytes) {
            // The server ignored the range and sends everything.
            part.clear().map_err(Broke::Disk)?;
        }
        loop {
            bar.set_position(part.have);
            let piece = match tokio::time::timeout(SILENCE_MAX, stream.next()).await {
                Ok(Some(piece)) => piece.map_err(Broke::Hub)?,
                Ok(None) => return Ok(()),
                Err(_) => return Err(Broke::Hub(silence())),
            };
            if piece.len() as u64 > bytes - part.have {
                part.clear().map_err(Broke::Disk)?;
                return Err(Broke::TooLong);
            }
            part.file.write_all(&piece).map_err(Broke::Disk)?;
            part.have += piece.len() as u64;
        }
    }
}

impl Part {
    fn clear(&mut self) -> Result<(), std::io::Error> {
        self.have = 0;
        self.file.set_len(0)
    }
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
