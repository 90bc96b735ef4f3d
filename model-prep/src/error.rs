//! Why a model could not be prepared.

use std::fmt;
use std::path::{Path, PathBuf};

use baton_model::ModelError;

/// Why a model could not be prepared. Every variant reads as one sentence that names the file, the tensor
/// where there is one, and the reason.
#[derive(Debug)]
pub enum PrepError {
    /// The operating system refused.
    Io {
        /// What was being done: `open`, `read`, `write`.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Its answer.
        error: std::io::Error,
    },
    /// A file is truncated, corrupt or not supported.
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is missing, corrupt or not supported.
    Tensor {
        /// The file it is or should be in.
        path: PathBuf,
        /// Its name in that file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration or the weights of the source, as the model crate sees them.
    Model(ModelError),
    /// The source cannot be found or fetched.
    Source(String),
    /// An option is out of bounds for this model.
    Option(String),
    /// The output directory holds something that will not be overwritten.
    Output {
        /// Which directory.
        path: PathBuf,
        /// What it holds, and what to do.
        reason: String,
    },
}

impl PrepError {
    pub(crate) fn io(doing: &'static str, path: &Path, error: std::io::Error) -> Self {
        PrepError::Io {
            doing,
            path: path.to_owned(),
            error,
        }
    }

    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        PrepError::File {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        PrepError::Tensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn output(path: &Path, reason: impl Into<String>) -> Self {
        PrepError::Output {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

impl fmt::Display for PrepError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PrepError::Io { doing, path, error } => {
                write!(f, "cannot {doing} {}: {error}", path.display())
            }
            PrepError::File { path, reason } => write!(f, "{}: {reason}", path.display()),
            PrepError::Tensor {
                path,
                tensor,
                reason,
            } => {
                write!(f, "{}: tensor `{tensor}` {reason}", path.display())
            }
            PrepError::Model(error) => error.fmt(f),
            PrepError::Source(reason) | PrepError::Option(reason) => f.write_str(reason),
            PrepError::Output { path, reason } => {
                write!(f, "cannot write the model to {}: {reason}", path.display())
            }
        }
    }
}

impl std::error::Error for PrepError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            PrepError::Io { error, .. } => Some(error),
            PrepError::Model(error) => Some(error),
            _ => None,
        }
    }
}

impl From<ModelError> for PrepError {
    fn from(error: ModelError) -> Self {
        PrepError::Model(error)
    }
}
