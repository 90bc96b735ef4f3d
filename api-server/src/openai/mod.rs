//! OpenAI's schema: what requests may say, and what answers look like.

mod chat;
mod completions;
mod fields;
mod params;
mod shape;
mod size;
mod usage;

pub use chat::ChatRequest;
pub use completions::{CompletionRequest, Prompt};
pub use params::Params;
pub use shape::{ApiKind, LogprobEntry, Shape};
pub use size::{Extent, LOGPROB_BYTES};
pub use usage::{Tally, Usage};
