//! OpenAI's schema: what requests may say, and what answers look like.

mod chat;
mod class;
mod completions;
mod events;
pub mod fields;
pub mod grammar;
mod logprobs;
mod message;
mod params;
pub mod responses;
mod shape;
mod size;
pub mod table;
mod thinking;
mod token_wishes;
mod tokenize;
mod tool_grammar;
pub mod tools;

pub use chat::{ChatRequest, rendering};
pub use completions::{CompletionRequest, Prompt};
pub use logprobs::logprob_object;
pub use params::{Params, alternatives, stops};
pub use shape::{ApiKind, Shape, Shown, escape, put};
pub use size::{Extent, ID_BYTES, LOGPROB_BYTES};
pub use tokenize::{DetokenizeRequest, ToTokenize, TokenizeRequest};
