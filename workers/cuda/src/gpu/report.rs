//! Which of CUDA's libraries are here, and whether they work: for people, and for what builds an image. No GPU is needed.

use std::fmt;

use cudarc::cublaslt::sys::cublasLtGetVersion;
use cudarc::driver::{result, sys};

use super::compile::Compiler;
use super::device::CAPABILITY_MIN;
use super::libraries;
use super::sources::QUANTISE;
use crate::error::{CudaError, driver};

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

/// A GPU as the driver tells of it: nothing is begun on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuReport {
    /// Its number in `cuda:N`.
    pub ordinal: u32,
    /// What NVIDIA calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory_bytes: u64,
}

impl GpuReport {
    /// Those that this process sees; `CUDA_VISIBLE_DEVICES` decides which.
    ///
    /// # Errors
    /// [`CudaError::Library`] without a driver, [`CudaError::Driver`] if it fails.
    pub fn all() -> Result<Vec<Self>, CudaError> {
        libraries::driver()?;
        let count = result::device::get_count().map_err(|error| driver("counting GPUs", error))?;
        (0..count).map(Self::of).collect()
    }

    fn of(ordinal: i32) -> Result<Self, CudaError> {
        let failed = |error| driver("asking for a GPU", error);
        let handle = result::device::get(ordinal).map_err(failed)?;
        let attribute = |attribute| {
            // SAFETY: `handle` is a device.
            let value = unsafe { result::device::get_attribute(handle, attribute) };
            value.map(|value| value as u32).map_err(failed)
        };
        use sys::CUdevice_attribute as A;
        Ok(Self {
            ordinal: ordinal as u32,
            name: result::device::get_name(handle).map_err(failed)?,
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            // SAFETY: `handle` is a device.
            memory_bytes: unsafe { result::device::total_mem(handle) }.map_err(failed)? as u64,
        })
    }

    /// Whether workers can compute on it.
    pub fn is_usable(&self) -> bool {
        self.capability >= CAPABILITY_MIN
    }
}

impl fmt::Display for GpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        let gib = self.memory_bytes >> 30;
        write!(
            f,
            "{} of {gib} GiB, compute capability {major}.{minor}",
            self.name
        )
    }
}
