//! The engine: which sequences run, where their KV lies, and how tokens are chosen.
//!
//! It does no arithmetic of its own (that is [`Executor`]'s) and no I/O.
#![forbid(unsafe_code)]
#![allow(dead_code)] // until the scheduler uses the rest of the pool

mod evictable;
mod executor;
mod free_list;
mod pool;
mod prefix;
mod sampling;
mod table;

pub use executor::{
    Executor, ExecutorError, ExecutorInfo, KvMemory, SampleRequest, SampleState, Sampled,
    SequenceOutput, SequenceStep, StepOutput, StepPlan, TokenCount,
};
pub use pool::{BlockPool, PoolStats};
pub use sampling::{LOGPROB_MIN, sample, token_logprobs, uniform};
pub use table::BlockTable;
