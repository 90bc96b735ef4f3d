//! What a request was promised, as workers keep to it.

use serde::{Deserialize, Serialize};

/// Who goes first.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Somebody waits for it.
    #[default]
    Interactive,
    /// It takes what interactive requests leave, and in the end its turn.
    Batch,
}

impl Tier {
    /// The name used in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }
}

/// The service level of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    /// Interactive before batch.
    pub tier: Tier,
    /// Within a tier: higher first. 0 unless the client says otherwise.
    pub priority: i32,
    /// Mean time between tokens that it was promised, in milliseconds. `None`: what the worker promises.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub itl_ms: Option<u32>,
}

impl Service {
    /// Whether it is what a request gets that asks for nothing: then it is not written.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
