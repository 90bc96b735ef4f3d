//! Which of CUDA's libraries are here, and whether they work: for people, and for what builds an image. No GPU is needed.

use cudarc::cublaslt::sys::cublasLtGetVersion;

use super::compile::Compiler;
use super::libraries;
use super::sources::QUANTISE;
use crate::error::CudaError;

/// Compiled for the report: Hopper, for which the kernels are made.
const ARCHITECTURE: &str = "sm_90a";

/// A library that is loaded at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CudaLibrary {
    /// The driver, which comes with the machine.
    Driver,
    /// The run-time compiler, with its headers.
    Nvrtc,
    /// Products of many rows.
    CublasLt,
}

impl CudaLibrary {
    /// Loads it and has it do something.
    ///
    /// # Errors
    /// [`CudaError::Library`] where it is missing, else what it failed with.
    pub fn check(self) -> Result<String, CudaError> {
        match self {
            Self::Driver => {
                let version = libraries::driver()?;
                Ok(format!("of CUDA {version}"))
            }
            Self::Nvrtc => {
                let compiler = Compiler::new(ARCHITECTURE, &[])?;
                // Not from the cache: this shows that its other library and the headers are there, those of FP8 too.
                compiler.verbose(&QUANTISE, &[])?;
                let (major, minor) = compiler.version();
                Ok(format!("{major}.{minor}, compiles for {ARCHITECTURE}"))
            }
            Self::CublasLt => {
                libraries::cublaslt()?;
                // SAFETY: it was just loaded; the call takes nothing and needs no GPU.
                let version = unsafe { cublasLtGetVersion() };
                let (major, minor, patch) = (version / 10_000, version / 100 % 100, version % 100);
                Ok(format!("{major}.{minor}.{patch}"))
            }
        }
    }
}
