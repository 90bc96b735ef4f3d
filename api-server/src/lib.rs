//! The API server: OpenAI's HTTP API in front of a cluster of context and decode workers.
//!
//! A request's way through the modules: [`http`] takes it in, [`openai`] checks it, [`template`] and
//! [`tokenizer`] make token ids of it, [`driver`] carries it through its [`lifecycle`] with workers that
//! the [`router`] picks from the [`membership`], over the [`bus`]; tokens come back through
//! [`detokenize`] and [`stop`] and leave as server-sent events or as one answer.
#![forbid(unsafe_code)]
#![warn(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods
)]

mod admission;
mod bound;
mod bus;
mod config;
mod control_tokens;
mod decode_room;
mod detokenize;
mod driver;
mod echo;
mod error;
mod http;
mod inbox;
mod keys;
mod lifecycle;
mod membership;
mod metrics;
mod openai;
mod router;
mod server;
mod stop;
mod template;
mod texts;
mod tokenizer;
mod watch;

pub use config::{ApiServerConfig, Limits, SpecialTokensInContent};
pub use error::{ApiServerError, ErrorKind, Row};
pub use keys::ApiKeys;
pub use server::run;

/// What reads bytes from outside or acts upon them, for the fuzz targets and for nobody else.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::detokenize::{Detokenizer, Vocabulary};
    pub use crate::error::ApiError;
    pub use crate::lifecycle::{Action, Input, Lifecycle, NoReply, Rules, Target};
    pub use crate::membership::Membership;
    pub use crate::openai::{ChatRequest, CompletionRequest, Params, Prompt};
    pub use crate::router::{Constraints, Outstanding, Router};
    pub use crate::stop::StopMatcher;
    pub use crate::template::{ChatTemplate, Prompt as ChatPrompt};
    pub use crate::texts::Until;
    pub use crate::tokenizer::{GenerationDefaults, ModelText, TextError};
}
#[cfg(feature = "simulation")]
pub use {
    driver::Sink,
    error::ApiError,
    server::simulated::{SimulatedGeneration, SimulatedServer},
};
