//! What each fuzz target does with its bytes, as plain functions: cargo-fuzz calls them from `fuzz/fuzz_targets/`, and an
//! ordinary test replays the corpus through them.
//!
//! A target takes bytes the way they come in from outside, and fails by a panic, by taking long or by taking much memory.
//! Beyond that each states what must hold of whatever was let in: an HTTP body that was taken is a job that workers take, a
//! checked job runs to its end and holds no block, a plan reads each byte once.
#![forbid(unsafe_code)]

mod bus_jobs;
mod bus_message;
mod fixture;
mod fleet;
mod gguf;
mod http_body;
mod lifecycle;
mod lines;
mod model_config;
mod model_text;
mod safetensors;
mod template;
mod text;
mod transfer;

pub use bus_jobs::bus_jobs;
pub use bus_message::bus_message;
pub use fleet::fleet;
pub use gguf::gguf;
pub use http_body::http_body;
pub use lifecycle::lifecycle;
pub use lines::lines;
pub use model_config::model_config;
pub use model_text::model_text;
pub use safetensors::safetensors;
pub use template::template;
pub use text::text;
pub use transfer::transfer;

/// A target: bytes in, a panic if something is wrong.
pub type Target = fn(&[u8]);

/// All targets by the names of their corpora.
pub const TARGETS: [(&str, Target); 13] = [
    ("bus_jobs", bus_jobs),
    ("bus_message", bus_message),
    ("fleet", fleet),
    ("gguf", gguf),
    ("http_body", http_body),
    ("lifecycle", lifecycle),
    ("lines", lines),
    ("model_config", model_config),
    ("model_text", model_text),
    ("safetensors", safetensors),
    ("template", template),
    ("text", text),
    ("transfer", transfer),
];
