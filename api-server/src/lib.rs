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
mod fleet;
mod http;
mod inbox;
mod keys;
mod lifecycle;
mod membership;
mod metrics;
mod openai;
mod router;
mod run;
mod server;
#[cfg(feature = "simulation")]
mod simulated;
mod stop;
mod template;
mod texts;
mod tokenizer;
mod watch;

pub use config::{ApiServerConfig, Limits, SpecialTokensInContent};
pub use error::{ApiServerError, ErrorKind, Row};
pub use keys::ApiKeys;
pub use run::run;

/// What reads bytes from outside or acts upon them, for the fuzz targets and the bench and for nobody else.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::detokenize::{Detokenizer, Vocabulary};
    pub use crate::error::ApiError;
    pub use crate::fleet::Fleet;
    pub use crate::http::worker_rows;
    pub use crate::lifecycle::{Action, Input, Lifecycle, NoReply, Rules, Target};
    pub use crate::membership::{Membership, Taken};
    pub use crate::metrics::Metrics;
    pub use crate::openai::{ChatRequest, CompletionRequest, Params, Prompt};
    pub use crate::router::{Constraints, Outstanding, prefix_chain};
    pub use crate::stop::StopMatcher;
    pub use crate::template::{ChatTemplate, Prompt as ChatPrompt};
    pub use crate::texts::Until;
    pub use crate::tokenizer::{GenerationDefaults, ModelText, TextError};
}
#[cfg(feature = "simulation")]
pub use {
    driver::Sink,
    error::ApiError,
    simulated::{SimulatedGeneration, SimulatedServer},
};
