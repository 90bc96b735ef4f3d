//! The executor on CPUs: Llama-type decoders in BF16.
//!
//! Weights are packed once into panels of 32 columns with pairs of K interleaved ([`pack`]), which is what
//! `vdpbf16ps` and AMX tiles both want. Matrix products, scores and weighted sums of values all go through
//! one tile per kernel ([`gemm`]); everything else is plain Rust compiled once per kernel ([`kernel`]).
//!
//! # One reduction order
//! On one machine and kernel, logits are bitwise the same whatever the batch, the chunking of the prompt,
//! the neighbours and the thread count:
//! - every element of a product is one accumulator that runs over K from first to last, however many rows
//!   stand beside it;
//! - every query row walks the KV in steps of 32 tokens at absolute positions, in order, in prefill and in
//!   decode; what a row must not see is masked by selection, not by arithmetic, and weighs exactly zero;
//! - activations are rounded to BF16 where they enter a product, always at the same places;
//! - no sum is split over threads, so work can be handed out in any order;
//! - nor over ranks: the parts of K that tensor-parallel ranks have are added in their order by the same accumulator ([`rank`]).

// Lanes and registers are counted: `acc[r][v]` beside `b[v]` reads better than zipped iterators, and a tile
// has as many arguments as a product has.
#![allow(clippy::needless_range_loop, clippy::too_many_arguments)]

mod attention;
mod error;
mod executor;
mod gemm;
mod kernel;
mod math;
mod memory;
mod pack;
mod qkv;
mod rank;
mod threads;
mod weights;

#[doc(hidden)]
pub mod probe;

pub use error::CpuError;
pub use executor::{CpuExecutor, CpuOptions};
pub use kernel::{KERNEL_VARIABLE, Kernel};
pub use memory::HeapMemory;
