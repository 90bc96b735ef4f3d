//! The acceptance test of an executor, the same for every device. A crate like `workers/cpu` calls these from its tests
//! with a function that builds its executor; what an error may cost is its own to state.
//!
//! - [`families()`](families::families): every model family against a plain decoder in f64 ([`Tiny::reference`]), and
//!   [`fp8_families`](families::fp8_families) the same with FP8 weights.
//! - [`company`]: logits with and without neighbours, in any chunks.
//! - [`ahead`]: steps submitted before the last was collected, and what they may follow.
//! - [`runs`]: several tokens of a sequence chosen in one step, by an executor that says it can.
//! - [`masks`]: tokens chosen among those that a mask allows.
//! - [`broken`]: a row of NaN among others.
//! - [`worlds()`](worlds::worlds): all that the engine asks of an executor, in random requests.
//! - [`probe`]: steps take about as long as the measurement before the first of them says.
//! - [`golden`]: real weights against Transformers.
#![forbid(unsafe_code)]

pub mod ahead;
pub mod broken;
pub mod company;
pub mod families;
pub mod golden;
pub mod masks;
mod plain;
pub mod probe;
pub mod runs;
mod steps;
mod tiny;
pub mod worlds;

use baton_engine::Executor;
use baton_model::{ModelSpec, TensorSource};

pub use steps::{Part, step};
pub use tiny::{Random, Tiny, families as tiny_families};

/// What an executor is built of.
pub struct Build<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Its weights.
    pub weights: &'a dyn TensorSource,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks of the arena, whose bytes must be NaN everywhere: what is read and was not written shows.
    pub blocks: usize,
}

/// Whether a test applies to an executor. A crate's tests say which of them do, so that none passes for nothing unseen.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applies {
    /// It ran.
    Yes,
    /// It did not, for this reason.
    No(&'static str),
}

/// Most tokens and most sequences of a step that these tests run.
pub const STEP_TOKENS_MAX: usize = 512;
/// As above.
pub const STEP_SEQUENCES_MAX: usize = 64;

/// Builds an executor with steps of [`STEP_TOKENS_MAX`] and [`STEP_SEQUENCES_MAX`].
pub type Builder<'a> = &'a dyn Fn(Build<'_>) -> Box<dyn Executor>;
