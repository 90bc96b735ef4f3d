//! What a worker loads at run time, and whether this machine has it.

use baton_cpu::Kernel;
use baton_cuda::{CudaLibrary, GpuReport};
use baton_transfer::{Agent, AgentConfig, ArenaSource};

/// A library that is loaded at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// Moves KV.
    Ucx,
    /// NVIDIA's driver, which comes with the machine.
    Driver,
    /// NVIDIA's run-time compiler, with its headers.
    Nvrtc,
    /// NVIDIA's products of matrices.
    CublasLt,
}

/// Of the arena that UCX is asked to share.
const ARENA_BYTES: usize = 1 << 20;

impl Library {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ucx, Self::Driver, Self::Nvrtc, Self::CublasLt];

    /// The name used in flags and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ucx => "ucx",
            Self::Driver => "driver",
            Self::Nvrtc => "nvrtc",
            Self::CublasLt => "cublaslt",
        }
    }

    /// Loads it and has it do something small, as a worker would: version and the like. Takes up to some seconds.
    ///
    /// # Errors
    /// A sentence that says what is missing and what would help.
    pub fn check(self) -> Result<String, String> {
        let cuda = match self {
            Self::Ucx => return ucx(),
            Self::Driver => CudaLibrary::Driver,
            Self::Nvrtc => CudaLibrary::Nvrtc,
            Self::CublasLt => CudaLibrary::CublasLt,
        };
        cuda.check().map_err(|error| error.to_string())
    }
}

/// The kernels that a worker on this CPU computes with: `amx-bf16`, `avx512-bf16`, `avx2` or `portable`.
///
/// # Errors
/// If `BATON_CPU_KERNEL` names one that is none, or that this CPU does not have.
pub fn cpu_kernel() -> Result<String, String> {
    let kernel = Kernel::chosen().map_err(|error| error.to_string())?;
    Ok(kernel.to_string())
}

/// The GPUs that this process sees.
///
/// # Errors
/// Why nobody can tell: there is no driver, or it does not answer.
pub fn gpus_seen() -> Result<Vec<GpuReport>, String> {
    GpuReport::all().map_err(|error| error.to_string())
}

fn ucx() -> Result<String, String> {
    let config = AgentConfig {
        arenas: vec![ArenaSource::Host { bytes: ARENA_BYTES }],
        tls: None,
    };
    let started = Agent::start(config).map_err(|error| error.to_string())?;
    Ok(started.0.summary())
}
