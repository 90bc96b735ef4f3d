//! The executor on NVIDIA GPUs: Llama-type decoders in BF16, their projections in FP8 too.
//!
//! Nothing of CUDA is linked: the driver, the run-time compiler and cuBLASLt are loaded when a device is opened, so the one
//! binary starts on any machine and says what is missing. Kernels are in `kernels/`, one operation a file; they are
//! compiled for the device at the first start and kept in a cache.
//!
//! A step, by file: [`step`](StepArrays) tells the GPU what it is, in one copy; `model/steps` launches embeddings, layers and
//! logits; `model/attention` chooses among the attention kernels; `model/chain` multiplies up to 8 rows, `products/skinny`
//! few and `products/prefill_gemm` many; `gpu/graph` captures a decode step whole, once for each size of batch; `executor/rank` puts them
//! together and takes the tokens back; `executor` has one GPU do it, or several as ranks. `gpu/` knows devices, memory and kernels, but no model; `ranks` adds what several GPUs
//! of a host have computed.
//!
//! # Numbers
//! Weights, KV and what enters a product are BF16; weights may be FP8, and then what many rows are multiplied as is FP8
//! too. Sums, the residual stream and logits are f32. No sum depends on which block comes first, so the same step gives
//! the same bits again. Another batch size may take another path through a product and differ in rounding: unlike on a
//! CPU, logits are the same within a tolerance, not to the bit, whatever the company.

// Kernels and products have as many arguments as they have.
#![allow(clippy::too_many_arguments)]

mod error;
mod executor;
mod gpu;
mod model;
mod options;
mod products;
mod ranks;
mod sampling;
mod step;

pub use error::CudaError;
pub use executor::CudaExecutor;
pub use gpu::compile::{Compiler, Cubin};
pub use gpu::device::{Buffer, CudaMemory, Device, Pinned, Plain};
pub use gpu::event::Event;
pub use gpu::graph::Graph;
pub use gpu::host_slots::HostSlots;
pub use gpu::kernel::{Kernel, LaunchConfig, Module};
pub use gpu::report::{CudaLibrary, GpuReport};
pub use gpu::sources;
pub use model::CudaModel;
pub use model::weights::{GATE_UP_ROWS, LayerWeights, ModelWeights};
pub use options::CudaOptions;
pub use products::gemm::{Blas, Dtype, Output, Product};
pub use products::matrix::{Format, Matrix, RowOrder};
pub use ranks::{Algorithm, AllGather, AllReduce, ExchangeOptions, Sum, SumDtype, open_group};
pub use sampling::{Answer, Batch, Sampler};
pub use step::{HEADER_SEQUENCES, StepAddresses, StepArrays, StepShape};
