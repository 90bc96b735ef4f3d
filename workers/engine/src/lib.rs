//! The engine: which sequences run, where their KV lies, and how tokens are chosen.
//!
//! It does no arithmetic of its own (that is [`Executor`]'s) and no I/O.
#![forbid(unsafe_code)]

mod engine;
mod evictable;
mod executor;
mod fake;
mod free_list;
mod pool;
mod prefix;
mod sampling;
mod scheduler;
mod sequence;
mod table;

pub use engine::{Engine, EngineConfig, EngineLoad, Event, NewSequence, ResumedSequence};
pub use executor::{
    Executor, ExecutorError, ExecutorInfo, KvMemory, SampleRequest, SampleState, Sampled,
    SequenceOutput, SequenceStep, StepOutput, StepPlan, TokenCount,
};
pub use fake::{FakeConfig, FakeExecutor, FakeKv, FakeMemory};
pub use pool::{BlockPool, PoolStats};
pub use sampling::{LOGPROB_MIN, sample, token_logprobs, uniform};
pub use table::BlockTable;
