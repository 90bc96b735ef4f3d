//! What can be wrong with a model on disk.

use std::fmt;
use std::path::{Path, PathBuf};

/// A model file or directory that cannot be used, and why. Every variant reads as one sentence.
#[derive(Debug)]
pub enum ModelError {
    /// The operating system refused.
    Io {
        /// What was being done: `open`, `read`, `map`.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Its answer.
        error: std::io::Error,
    },
    /// The directory is not a whole model directory.
    Directory {
        /// Which directory.
        path: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// A file does not hold what it should.
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor does not hold what it should.
    Tensor {
        /// The file it is or should be in.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A configuration that is malformed, or describes a model that is not supported.
    Config(String),
    /// The model cannot be divided over so many ranks.
    TensorParallel(String),
}

impl ModelError {
    pub(crate) fn io(doing: &'static str, path: &Path, error: std::io::Error) -> Self {
        ModelError::Io {
            doing,
            path: path.to_owned(),
            error,
        }
    }

    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        ModelError::File {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn directory(path: &Path, reason: impl Into<String>) -> Self {
        ModelError::Directory {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        ModelError::Tensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            reason: reason.into(),
        }
    }
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelError::Io { doing, path, error } => {
                write!(f, "cannot {doing} {}: {error}", path.display())
            }
            ModelError::Directory { path, reason } => {
                write!(
                    f,
                    "{} is not a usable model directory: {reason}",
                    path.display()
                )
            }
            ModelError::File { path, reason } => write!(f, "{}: {reason}", path.display()),
            ModelError::Tensor {
                path,
                tensor,
                reason,
            } => {
                write!(f, "{}: tensor `{tensor}` {reason}", path.display())
            }
            ModelError::Config(reason) | ModelError::TensorParallel(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for ModelError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ModelError::Io { error, .. } => Some(error),
            _ => None,
        }
    }
}
