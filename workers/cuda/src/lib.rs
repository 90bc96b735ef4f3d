//! The executor on NVIDIA GPUs: Llama-type decoders in BF16, their projections in FP8 too.
//!
//! Nothing of CUDA is linked: the driver, the run-time compiler and cuBLASLt are loaded when a device is opened, so the one
//! binary starts on any machine and says what is missing. Kernels are in `kernels/`, one operation a file; they are
//! compiled for the device at the first start and kept in a cache.
//!
//! A step, by file: [`step`](StepArrays) tells the GPU what it is, in one copy; `model` launches embeddings, layers and
//! logits; `attention` chooses among the attention kernels; `chain` multiplies up to 8 rows, `skinny` few and `many` many, whose products `gemm`
//! plans; `graph` captures a decode step whole, once for each size of batch; `executor` puts them together and takes the
//! tokens back.
//!
//! # Numbers
//! Weights, KV and what enters a product are BF16; weights may be FP8, and then what many rows are multiplied as is FP8
//! too. Sums, the residual stream and logits are f32. No sum depends on which block comes first, so the same step gives
//! the same bits again. Another batch size may take another road through a product and differ in rounding: unlike on a
//! CPU, logits are the same within a tolerance, not to the bit, whatever the company.

// Kernels and products have as many arguments as they have.
#![allow(clippy::too_many_arguments)]

mod attention;
mod buffers;
mod chain;
mod compile;
mod device;
mod error;
mod event;
mod executor;
mod gemm;
mod graph;
mod host_slots;
mod kernel;
mod libraries;
mod many;
mod matrix;
mod model;
mod options;
mod sampling;
mod skinny;
pub mod sources;
mod step;
mod tensor_map;
mod weights;

pub use compile::{Compiler, Cubin};
pub use device::{Buffer, CudaMemory, Device, Pinned, Plain};
pub use error::CudaError;
pub use event::Event;
pub use executor::CudaExecutor;
pub use gemm::{Blas, Numbers, Output, Product};
pub use graph::Graph;
pub use host_slots::HostSlots;
pub use kernel::{Kernel, Module, Shape};
pub use matrix::{Format, Matrix, Rows};
pub use model::CudaModel;
pub use options::CudaOptions;
pub use sampling::{Answer, Batch, Sampler};
pub use step::{HEADER_SEQUENCES, StepAddresses, StepArrays, StepShape};
pub use weights::{GATE_UP_ROWS, LayerWeights, ModelWeights};
