//! OpenAI's schema: what requests may say, and what answers look like.

mod chat;
mod completions;
mod fields;
mod message;
mod params;
mod shape;
mod size;
mod thinking;
mod tools;
mod usage;

pub use chat::ChatRequest;
pub use completions::{CompletionRequest, Prompt};
pub use message::{Call, Part};
pub use params::Params;
pub use shape::{ApiKind, Finish, LogprobEntry, Shape};
pub use size::{Extent, LOGPROB_BYTES};
pub use usage::{Tally, Usage};
