//! Sizes of a worker, said to it or to `baton up`, which passes them on.

use clap::Args;

/// What is not said is left to the worker's own defaults.
#[derive(Args, Clone, Debug, Default)]
pub struct TuningArgs {
    /// Memory for KV of each worker, in MiB, taken whole at the start [default: what a full batch needs, at most 1024; on a GPU a share
    /// of what is free]
    #[arg(long)]
    pub kv_mib: Option<u64>,
    /// Share of the GPU memory left by the model to take for KV, where --kv-mib says nothing [default: 0.9]
    #[arg(long)]
    pub kv_cache_free_gpu_memory_fraction: Option<f64>,
    /// Tokens of a KV block, the same on all workers [default: 32]
    #[arg(long)]
    pub block_tokens: Option<u32>,
    /// Most tokens of one step: longer prompts are computed in chunks [default: 512; on a GPU 8192]
    #[arg(long)]
    pub step_tokens: Option<usize>,
    /// Mean time between tokens to keep steps to, in milliseconds: prompts are computed beside generating sequences only as far as it
    /// allows; 0: as fast as they can be [default: 100; on a GPU 25]
    #[arg(long)]
    pub itl_ms: Option<u32>,
    /// Most sequences of one step [default: 64; on a GPU 256]
    #[arg(long)]
    pub batch: Option<usize>,
    /// Most jobs that may wait; more are refused [default: 256]
    #[arg(long)]
    pub queue: Option<usize>,
    /// Compute every prompt whole, even if its beginning is known
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// Transports for KV, as UCX names them: tcp,self [default: UCX_TLS, else UCX's choice]
    #[arg(long)]
    pub ucx_tls: Option<String>,
}
