//! OpenAI's schema: what requests may say, and what answers look like.

mod chat;
mod completions;
mod fields;
pub mod grammar;
mod params;
mod shape;
mod size;
mod table;
mod tokenize;
mod usage;

pub use chat::ChatRequest;
pub use completions::{CompletionRequest, Prompt};
pub use params::Params;
pub use shape::{ApiKind, LogprobEntry, Piece, Shape, Shown};
pub use size::{Extent, ID_BYTES, LOGPROB_BYTES};
pub use tokenize::{DetokenizeRequest, ToTokenize, TokenizeRequest};
pub use usage::{Tally, Usage};
