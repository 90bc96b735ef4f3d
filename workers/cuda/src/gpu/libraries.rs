//! Finding the driver, the run-time compiler and cuBLASLt.
//!
//! Nothing of CUDA is linked: one binary runs on machines with and without it. The driver comes with the machine; the
//! other two with a CUDA toolkit or with NVIDIA's Python wheels. A library is first asked for by name, so that
//! `LD_LIBRARY_PATH` and `ldconfig` decide, then looked for where toolkits and wheels put it. What is found stays loaded,
//! and a later search by the same name finds it.

use std::path::{Path, PathBuf};

use libloading::Library;

use crate::error::{CudaError, words};

/// Oldest driver whose interface is used here: that of CUDA 12.8.
const DRIVER_VERSION_MIN: i32 = 12_080;

/// The driver, loaded and started. The result is its version of CUDA.
///
/// # Errors
/// [`CudaError::Library`] where there is none, [`CudaError::Device`] where it is too old or finds no GPU.
pub fn driver() -> Result<Version, CudaError> {
    // SAFETY: loading the driver runs its initialisers and nothing else.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(CudaError::Library {
            what: "the NVIDIA driver (libcuda.so.1)".to_owned(),
            detail: "this machine has no NVIDIA GPU or no driver for it; use --device cpu, or start the \
                     container with its GPUs"
                .to_owned(),
        });
    }
    let failed = |error: cudarc::driver::DriverError| {
        CudaError::Device(format!(
            "the NVIDIA driver does not start: {}",
            words(error.0)
        ))
    };
    cudarc::driver::result::init().map_err(failed)?;
    let mut version = 0;
    // SAFETY: one integer is written.
    unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(failed)?;
    if version < DRIVER_VERSION_MIN {
        return Err(CudaError::Device(format!(
            "the NVIDIA driver is of CUDA {}, this program needs {} or later",
            Version(version),
            Version(DRIVER_VERSION_MIN)
        )));
    }
    Ok(Version(version))
}

/// The run-time compiler; the result is where its headers may be. Searched are the `environments` too, of Python.
///
/// # Errors
/// [`CudaError::Library`].
pub fn nvrtc(environments: &[PathBuf]) -> Result<Vec<PathBuf>, CudaError> {
    let directories = directories(environments);
    // The compiler opens this one by name when it compiles, and finds it only if it is loaded or on the library path.
    for directory in &directories {
        // SAFETY: as in `load`.
        if let Ok(library) = unsafe { Library::new(directory.join("libnvrtc-builtins.so.13.0")) } {
            std::mem::forget(library);
            break;
        }
    }
    load(
        "the CUDA run-time compiler",
        "libnvrtc.so.13",
        "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt",
        &directories,
    )?;
    Ok(directories
        .into_iter()
        .filter_map(|lib| Some(lib.parent()?.join("include")))
        .filter(|include| include.join("cuda_bf16.h").is_file())
        .collect())
}

/// cuBLASLt.
///
/// # Errors
/// [`CudaError::Library`].
pub fn cublaslt() -> Result<(), CudaError> {
    load(
        "cuBLASLt",
        "libcublasLt.so.13",
        "pip install nvidia-cublas",
        &directories(&[]),
    )
}

fn load(what: &str, name: &str, remedy: &str, directories: &[PathBuf]) -> Result<(), CudaError> {
    let paths = directories.iter().map(|directory| directory.join(name));
    for candidate in std::iter::once(PathBuf::from(name)).chain(paths) {
        // SAFETY: NVIDIA's libraries; loading them runs their initialisers and nothing else.
        if let Ok(library) = unsafe { Library::new(&candidate) } {
            std::mem::forget(library); // for the life of the process, as cudarc's own handle
            return Ok(());
        }
    }
    Err(CudaError::Library {
        what: what.to_owned(),
        detail: format!(
            "{name} is neither on the library path nor in a CUDA toolkit or an active Python environment; install \
             the CUDA 13 toolkit, or {remedy} and activate that environment"
        ),
    })
}

/// Where toolkits and wheels put libraries, in this machine's and the active environment's usual places.
fn directories(environments: &[PathBuf]) -> Vec<PathBuf> {
    let home = std::env::var_os("CUDA_HOME").map(PathBuf::from);
    let usual = ["/usr/local/cuda", "/usr/local/cuda-13"].map(PathBuf::from);
    let toolkits = home.into_iter().chain(usual).map(|root| root.join("lib64"));
    let active = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let environments = active.iter().chain(environments);
    toolkits
        .chain(environments.flat_map(|environment| wheels(environment)))
        .collect()
}

/// `nvidia/cu13/lib` of each Python of an environment.
fn wheels(environment: &Path) -> Vec<PathBuf> {
    let pythons = std::fs::read_dir(environment.join("lib"));
    pythons
        .into_iter()
        .flatten()
        .flatten()
        .map(|python| python.path().join("site-packages/nvidia/cu13/lib"))
        .filter(|lib| lib.is_dir())
        .collect()
}

/// A version as CUDA counts: 13,000 is 13.0.
pub struct Version(i32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}
