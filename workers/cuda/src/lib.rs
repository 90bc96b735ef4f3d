//! The executor on NVIDIA GPUs.

mod compile;
mod device;
mod error;
mod kernel;
mod libraries;
pub mod sources;

pub use compile::{Compiler, Cubin};
pub use device::{Buffer, CudaMemory, Device, Pinned, Plain};
pub use error::CudaError;
pub use kernel::{Kernel, Module, Shape};
