//! Context and decode workers: the loops between bus, engine thread and KV transfer.
//!
//! A request's way through the files:
//!
//! 1. `desk` gets a prefill job from the worker's inbox (`bus`); `checks` and the context side (`context`) take or refuse it.
//! 2. `engine_thread` runs it, between other sequences, step by step.
//! 3. `context` stages the KV in `context/leases` and answers with the handle.
//! 4. On a decode worker the decode side (`decode`) admits the job, and `decode/pulls` reads the KV, by way of `mover`, from
//!    the context worker that `decode/peers` and `decode/connect` have connected long before.
//! 5. The context worker's leases say whether the release was valid; only then does `decode` hand the
//!    blocks to its `engine_thread`.
//! 6. Tokens go through `frames` to the publisher in `bus`.
//! 7. An abort, a deadline, an API server that is gone, a drain or a broken executor end it in any phase: all in
//!    `desk/ending`.
//!
//! A worker has a context side, a decode side, or both; `common` is what both use, `presence` what others know of it (beats,
//! state, draining) and which API servers are there. Beside that: `config`, `device` (executor and arenas), `run` (start and
//! end; a simulated worker), `watch` (what hangs), `pace` (how long to wait before asking again).
//!
//! Three kinds of threads meet at bounded channels: tokio's, where one task, the desk, owns all state; the
//! engine thread; and the transfer agent's. No lock is held across an await.
#![deny(unsafe_code)]
#![warn(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods
)]

mod bus;
mod checks;
mod common;
mod config;
mod context;
mod decode;
mod desk;
mod device;
mod engine_thread;
mod error;
mod frames;
mod gpus;
mod grammars;
mod mover;
mod pace;
mod presence;
mod random;
mod run;
mod token_rules;
mod watch;

pub use baton_cuda::GpuReport;
pub use baton_transfer::memory::room as host_memory;
pub use config::{
    BLOCK_TOKENS_DEFAULT, DRAIN_MS_DEFAULT, Device, FakeKvShape, KV_BYTES_DEFAULT,
    KV_FREE_GPU_MEMORY_FRACTION_DEFAULT, QUEUE_DEFAULT, WorkerConfig,
};
pub use device::{Library, check_host_memory, cpu_kernel, gpus_seen, host_memory_bytes};
#[cfg(feature = "simulation")]
pub use engine_thread::StepTimes;
pub use error::WorkerError;
pub use gpus::{GPUS_MAX, Gpus};
#[cfg(feature = "simulation")]
pub use mover::{KvFuture, KvNetwork};
pub use run::run;
#[cfg(feature = "simulation")]
pub use run::{SimulatedConfig, SimulatedWorker};

/// What judges jobs from the bus, for the fuzz targets and for nobody else.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::checks::Checks;
}
