//! The API server: OpenAI's HTTP API in front of a cluster of context and decode workers.
//!
//! A request's way through the modules: [`http`] takes it in, [`openai`] checks it, [`text::template`] and
//! [`text::tokenizer`] make token ids of it, [`request::driver`] carries it through its [`request::lifecycle`] with workers that
//! the [`fleet::router`] picks from the [`fleet::membership`], over the [`bus`]; tokens come back through
//! [`text::detokenize`] and [`text::stop`] and leave as server-sent events or as one answer.
#![forbid(unsafe_code)]
#![warn(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods
)]

mod admission;
mod anthropic;
mod bound;
mod bus;
mod config;
mod cors;
mod error;
mod fleet;
mod http;
mod keys;
mod metrics;
mod model_names;
mod openai;
mod output;
mod request;
mod run;
mod server;
mod service;
#[cfg(feature = "simulation")]
mod simulated;
mod text;
mod tls;
mod watch;

pub use baton_chat_formats::{Format, Reasoning};
pub use config::{ApiServerConfig, GenerationConfig, Inherited, Limits, SpecialTokensInContent};
pub use cors::Origins;
pub use error::{ApiServerError, ErrorKind, Row};
pub use keys::ApiKeys;
pub use run::run;
pub use service::{Class, Overload, Promises, ServiceLevel};
pub use tls::TlsFiles;

/// What reads bytes from outside or acts upon them, for the fuzz targets and the bench and for nobody else.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::anthropic::{CountRequest, read as read_messages};
    pub use crate::error::ApiError;
    pub use crate::fleet::Fleet;
    pub use crate::fleet::membership::{Membership, Taken};
    pub use crate::fleet::router::{Constraints, FirstToken, Outstanding};
    pub use crate::http::worker_rows;
    pub use crate::metrics::Metrics;
    pub use crate::openai::{ChatRequest, CompletionRequest, Params, Prompt};
    pub use crate::request::lifecycle::{
        Action, Input, Lifecycle, NoReply, Overbooked, Rules, Target,
    };
    pub use crate::text::detokenize::{Detokenizer, Vocabulary};
    pub use crate::text::stop::StopMatcher;
    pub use crate::text::template::{ChatTemplate, Prompt as ChatPrompt};
    pub use crate::text::texts::Until;
    pub use crate::text::tokenizer::{
        GenerationDefaults, Keep, ModelText, Rendering, Side, TextError,
    };
}
#[cfg(feature = "simulation")]
pub use {
    error::ApiError,
    request::driver::Sink,
    simulated::{SimulatedGeneration, SimulatedServer},
};
