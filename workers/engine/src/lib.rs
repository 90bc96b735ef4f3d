//! The engine: which sequences run, where their KV lies, and how tokens are chosen.
//!
//! It does no arithmetic of its own (that is [`Executor`]'s) and no I/O.
#![forbid(unsafe_code)]

mod executor;

pub use executor::{
    Executor, ExecutorError, ExecutorInfo, KvMemory, SampleRequest, SampleState, Sampled,
    SequenceOutput, SequenceStep, StepOutput, StepPlan, TokenCount,
};
