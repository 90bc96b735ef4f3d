//! The engine: which sequences run, where their KV lies, and how tokens are chosen.
//!
//! It does no arithmetic of its own (that is [`Executor`]'s), no I/O, and has no threads: one OS thread owns an
//! [`Engine`] and calls [`Engine::step`].
//!
//! A sequence's life:
//!
//! 1. [`Engine::submit`] checks a prompt and queues it, or refuses it.
//! 2. It is admitted when its turn has come and all its blocks are there. Blocks of a known prefix are shared.
//! 3. It runs in chunks, as many tokens a step as the budget gives it. Blocks that are full go into the prefix index.
//! 4. Its last chunk chooses the next token. It leaves as [`Event::Prefilled`] with its [`BlockTable`]: the caller
//!    leases the blocks to a decode worker, or goes on here.
//! 5. [`Engine::resume`] takes a sequence whose KV is in place, computed here or pulled into a table from
//!    [`BlockPool::reserve_reusing`]. Its full blocks go into the prefix index too, and so do those that its output fills.
//! 6. It generates, one token a step or several ([`Event::Token`] for each), until a rule ends it, [`Engine::abort`] takes
//!    it out, or it has to give up its blocks ([`Event::Preempted`]).
//!
//! Run-ahead: on a device that computes while the host plans, a decode step is submitted before the tokens of those in flight
//! are here. Its sequences go on from what the device chooses: [`SequenceStep::follows`] names the step and the sequence in it.
//! One that ends meanwhile has its row thrown away.
//!
//! Speculative decoding: with a [`Drafter`], a sequence's part of a step is its last token and drafts of the next ones, and
//! the executor chooses a token after each ([`SampleRun`]). All choices up to the first that differs from the draft behind it
//! stand, that one too: they are those of single steps, bit for bit where logits do not depend on the batch. Blocks that only
//! rejected drafts needed come back. Until it is known how many choices stand, the sequence is in no further step; the others
//! run ahead.
//!
//! Structured output: a sequence with a [`Constraint`] may only go on with tokens that its mask allows. The mask depends on the
//! token before, so such a sequence is in one step at a time, as one with penalties is.
//!
//! Where things are:
//!
//! - `engine`, `messages`: what the owner sees; `engine/collect`: what a step made, given to its sequences; `engine/refused`: one that
//!   the executor refused.
//! - `scheduler`: which sequences run; `sequence`: one of them; `draft`: guesses of their next tokens; `constraint`: which of
//!   these may come; `flight`: steps submitted and not collected.
//! - `pool`, `table`: who holds which block; `free_list`, `evictable`, `prefix`: the books behind it; `journal`: what changes in the
//!   prefix index, for others.
//! - `cost`: what steps cost, by which they are sized; `engine/probe`: its first measurement.
//! - `sampling`: from logits to a token.
//! - `arena`: how a model's KV lies in memory.
//! - `executor`: the seam to the model; `step`, `output`: what goes through it.
//! - `rows`: what every executor makes of a step first; `follow`: how it finds the token that a sequence follows.
//! - `fake`: an executor without a model; `fake_cells`: its KV as a model's would lie; `fake_drafter`: a drafter for it.
#![forbid(unsafe_code)]

mod arena;
mod constraint;
mod cost;
mod draft;
mod engine;
mod evictable;
mod executor;
mod fake;
mod fake_cells;
mod fake_drafter;
mod flight;
mod follow;
mod free_list;
mod journal;
mod messages;
mod output;
mod pace;
mod pool;
mod prefix;
mod rows;
mod sampling;
mod scheduler;
mod sequence;
mod step;
mod table;

pub use arena::{kv_geometry, uniform_arena};
pub use constraint::{Constraint, Mask, TokenMask};
pub use draft::Drafter;
pub use engine::{Engine, PROBE_MAX};
pub use executor::{Executor, ExecutorError, ExecutorInfo, Fault};
pub use fake::{FakeConfig, FakeExecutor, FakeFaults, FakeKv, FakeMemory};
pub use fake_cells::{FakeCells, RankWords, fake_geometry};
pub use fake_drafter::FakeDrafter;
pub use follow::{Choice, Choices};
pub use journal::PrefixChanges;
pub use messages::{EngineConfig, EngineLoad, Event, NewSequence, ResumedSequence};
pub use output::{Sampled, SampledRun, SequenceOutput, StepOutput};
pub use pool::{BlockPool, PoolStats};
pub use rows::{Rows, SequenceRows, Want, What, add_masks, answer, count_followed, wants};
pub use sampling::{Distribution, Draw, LOGPROB_MIN, random_bits, sample, token_logprobs, uniform};
pub use step::{
    Follows, SampleRequest, SampleRun, SampleState, SequenceStep, StepId, StepPlan, TokenCount,
};
pub use table::BlockTable;
