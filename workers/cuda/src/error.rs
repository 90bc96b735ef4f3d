//! What can go wrong on a GPU, as sentences.

use std::fmt;

use baton_engine::ExecutorError;
use cudarc::driver::{DriverError, sys};

/// Why something could not be done on a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CudaError {
    /// A library is not there.
    Library {
        /// What it is: `the NVIDIA driver (libcuda.so.1)`.
        what: String,
        /// What was tried, and what would help.
        detail: String,
    },
    /// The device, or the machine, is not one this executor runs on.
    Device(String),
    /// A call of the driver failed.
    Driver {
        /// What was being done.
        what: String,
        /// The driver's name and words for it.
        detail: String,
    },
    /// A kernel did not compile.
    Compile {
        /// Its file.
        file: String,
        /// The compiler's words.
        log: String,
    },
    /// cuBLASLt refused or failed.
    Blas {
        /// Which product.
        what: String,
        /// Its status.
        detail: String,
    },
    /// There is not enough memory on the GPU.
    Memory {
        /// What it was for.
        what: String,
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free then.
        free: usize,
    },
    /// A weight could not be read.
    Weight {
        /// Its name in the checkpoint.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model is of a kind that this executor does not compute.
    Unsupported(String),
    /// A rank's part of a sum did not come in time. The group's sums are over: it has to be opened again.
    Rank {
        /// Whose part was waited for first, as far as the others can tell.
        missing: u32,
        /// How long a rank waits.
        waited: std::time::Duration,
    },
    /// The arena does not fit the model.
    Arena(String),
    /// One of several GPUs failed.
    On {
        /// Which.
        gpu: u32,
        /// How.
        error: Box<Self>,
    },
}

impl CudaError {
    /// The error of one of several GPUs.
    pub(crate) fn on(self, gpu: u32) -> Self {
        Self::On {
            gpu,
            error: Box::new(self),
        }
    }
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library { what, detail } => write!(f, "{what} cannot be loaded: {detail}"),
            Self::Device(detail) => f.write_str(detail),
            Self::Driver { what, detail } => write!(f, "{what} failed: {detail}"),
            Self::Compile { file, log } => write!(f, "the kernel {file} does not compile: {log}"),
            Self::Blas { what, detail } => write!(f, "cuBLASLt cannot do {what}: {detail}"),
            Self::Memory { what, bytes, free } => write!(
                f,
                "the GPU has no memory for {what}: it takes {}, {} are free",
                Mebibytes(*bytes),
                Mebibytes(*free)
            ),
            Self::Weight { name, reason } => write!(f, "weight {name}: {reason}"),
            Self::Unsupported(what) => {
                write!(f, "the CUDA executor cannot run this model: {what}")
            }
            Self::Rank { missing, waited } => write!(
                f,
                "rank {missing} did not send its part of a sum within {waited:?}: it failed, hangs, or was given other steps than \
                 its peers"
            ),
            Self::On { gpu, error } => write!(f, "GPU {gpu}: {error}"),
            Self::Arena(what) => write!(f, "the KV arena does not fit the model: {what}"),
        }
    }
}

impl std::error::Error for CudaError {}

impl From<CudaError> for ExecutorError {
    fn from(error: CudaError) -> Self {
        Self::failed(error.to_string())
    }
}

struct Mebibytes(usize);

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB", self.0 as f64 / f64::from(1 << 20))
    }
}

/// A failed driver call, as an error.
pub(crate) fn driver(what: &str, error: DriverError) -> CudaError {
    CudaError::Driver {
        what: what.to_owned(),
        detail: words(error.0),
    }
}

/// The driver's name and words for a result.
pub(crate) fn words(result: sys::CUresult) -> String {
    let error = DriverError(result);
    let text = |c: Result<&std::ffi::CStr, _>| c.map(|c| c.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(words)) => format!("{words} ({name})"),
        _ => format!("{result:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needed_how_much_is_said() {
        let error = CudaError::Memory {
            what: "the KV arena".to_owned(),
            bytes: 3 << 20,
            free: 1 << 19,
        };
        let text = error.to_string();
        assert!(
            text.contains("the KV arena: it takes 3.0 MiB, 0.5 MiB are free"),
            "{text}"
        );
    }
}
