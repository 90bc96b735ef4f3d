//! Context and decode workers: the loops between bus, engine thread and KV transfer.
//!
//! A request's way through the files:
//!
//! 1. `desk` gets a prefill job from the worker's inbox; `checks` and `context` take or refuse it.
//! 2. `engine_thread` runs it, between other sequences, step by step.
//! 3. `context` stages the KV in `leases` and answers with the handle.
//! 4. On a decode worker `decode` admits the job, and `pulls` reads the KV from the context worker that
//!    `peers` and `connect` have connected long before.
//! 5. The context worker's `leases` say whether the release was valid; only then does `decode` hand the
//!    blocks to its `engine_thread`.
//! 6. Tokens go through `frames` to the publisher in `bus`.
//! 7. An abort, a deadline, an API server that is gone, a drain or a broken executor end it in any phase:
//!    all through `desk`'s `end_key`.
//!
//! Beside that road: `api_servers` (who asks, and which life of it), `config`, `device` (with `cuda` and `fake_kv`), `memory`, `run` and `assemble` (start and end), `beat`, `service`, `drain`, `failing`, `hearing`, `watch`.
//!
//! Three kinds of threads meet at bounded channels: tokio's, where one task, the desk, owns all state; the
//! engine thread; and the transfer agent's. No lock is held across an await.
#![deny(unsafe_code)]

mod api_servers;
mod assemble;
mod beat;
mod bus;
mod checks;
mod config;
mod connect;
mod context;
mod cuda;
mod decode;
mod desk;
mod device;
mod drain;
mod engine_thread;
mod error;
mod failing;
mod fake_kv;
mod frames;
mod hearing;
mod leases;
mod line;
mod memory;
mod mover;
mod pace;
mod peers;
mod peers_told;
mod pulls;
mod random;
mod run;
mod service;
#[cfg(feature = "simulation")]
mod simulated;
mod watch;

pub use config::{
    DRAIN_MS_DEFAULT, Device, KV_BYTES_DEFAULT, KV_FREE_GPU_MEMORY_FRACTION_DEFAULT, WorkerConfig,
};
pub use error::WorkerError;
pub use memory::{check_host_memory, host_memory_bytes};
pub use run::run;

/// What judges jobs from the bus, for the fuzz targets and for nobody else.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::checks::Checks;
}
#[cfg(feature = "simulation")]
pub use simulated::{KvFuture, KvNetwork, SimulatedConfig, SimulatedWorker};
