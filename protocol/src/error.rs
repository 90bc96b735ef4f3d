//! What can go wrong, as values: refusals (nothing was begun) and failures (something was).

use std::fmt;

use serde::{Deserialize, Serialize};

/// A worker's answer that it did not take a job. Nothing was begun and nothing is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Refusal {
    /// No blocks or no place in the queue now; another worker, or later, may do.
    Busy {
        /// When it may be worth asking again.
        retry_after_ms: u32,
    },
    /// The worker is leaving.
    Draining,
    /// The worker serves another model or another KV geometry.
    WrongModel {
        /// What differs.
        detail: String,
    },
    /// The sequence can never fit this worker.
    TooLong {
        /// Longest sequence, prompt and output, in tokens.
        tokens_max: u32,
    },
    /// The message is not one this worker understands.
    Malformed {
        /// What is wrong with it.
        detail: String,
    },
    /// The decode worker has no live connection to the handle's context worker.
    Unreachable {
        /// Which worker, and why.
        detail: String,
    },
    /// The job is for another role than the worker has: it was restarted with another one since its last beat.
    WrongRole {
        /// The role that it has.
        detail: String,
    },
    /// A reason that this release does not know, from a newer worker. Never sent.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy { retry_after_ms } => write!(f, "busy, try again in {retry_after_ms} ms"),
            Self::Draining => f.write_str("draining"),
            Self::WrongModel { detail } => write!(f, "other model: {detail}"),
            Self::TooLong { tokens_max } => {
                write!(
                    f,
                    "the sequence is longer than the {tokens_max} tokens this worker can hold"
                )
            }
            Self::Malformed { detail } => write!(f, "malformed message: {detail}"),
            Self::Unreachable { detail } => write!(f, "no KV connection: {detail}"),
            Self::WrongRole { detail } => write!(f, "other role: {detail}"),
            Self::Unknown => f.write_str("refused for a reason that this release does not know"),
        }
    }
}

/// Kind of a failure; also the metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The lease was gone when the pull had ended: what was read may be another prompt's.
    HandleInvalid,
    /// The pull failed or ran out of time.
    PullFailed,
    /// No blocks were left for the next token; the sequence gave up its own.
    Preempted,
    /// The executor failed, or refused the step that the sequence was to be in.
    Executor,
    /// No next token could be chosen: the model gave no finite logit.
    NoToken,
    /// The request's budget ran out.
    Deadline,
    /// The worker left before the generation ended.
    Draining,
    /// What the request asks for makes a message over the bus's bound; it would for every worker.
    TooLarge,
    /// Anything else; a defect.
    Internal,
    /// A code that this release does not know, from a newer worker. Never sent.
    #[serde(other)]
    Unknown,
}

impl FailureCode {
    /// Whether prefilling prompt and output so far again, maybe elsewhere, is the right answer.
    pub fn retryable(self) -> bool {
        !matches!(self, Self::Deadline | Self::NoToken | Self::TooLarge)
    }

    /// The name used in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::HandleInvalid => "handle_invalid",
            Self::PullFailed => "pull_failed",
            Self::Preempted => "preempted",
            Self::Executor => "executor",
            Self::NoToken => "no_token",
            Self::Deadline => "deadline",
            Self::Draining => "draining",
            Self::TooLarge => "too_large",
            Self::Internal => "internal",
            Self::Unknown => "unknown",
        }
    }
}

/// Something that was begun and did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Kind.
    pub code: FailureCode,
    /// What failed, where, and what to do: one sentence for a log or an error body.
    pub message: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.label(), self.message)
    }
}

/// A message or a name that breaks the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// A name that cannot be a subject token.
    Name {
        /// Of what.
        what: &'static str,
        /// The offending text, cut short.
        name: String,
    },
    /// A hexadecimal number of the wrong form.
    Hex {
        /// Of what.
        what: &'static str,
        /// How many digits were expected.
        digits: usize,
        /// The offending text, cut short.
        text: String,
    },
    /// Another protocol version.
    Version {
        /// What the message says.
        theirs: u16,
        /// What this crate speaks.
        ours: u16,
    },
    /// Not JSON, or not this message.
    Json {
        /// Which message was expected.
        what: &'static str,
        /// What the parser said.
        detail: String,
    },
    /// Over the bound of its kind.
    TooLarge {
        /// Which message.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { what, name } => {
                write!(f, "{what} name {name:?} must be 1 to 64 of A-Z a-z 0-9 - _")
            }
            Self::Hex { what, digits, text } => {
                write!(f, "{what} {text:?} must be {digits} hexadecimal digits")
            }
            Self::Version { theirs, ours } => write!(
                f,
                "the message speaks protocol version {theirs}, this process speaks {ours}: run the same Baton release on every host"
            ),
            Self::Json { what, detail } => write!(f, "not a valid {what} message: {detail}"),
            Self::TooLarge {
                what,
                bytes,
                bytes_max,
            } => write!(
                f,
                "a {what} message of {bytes} bytes is over the bound of {bytes_max} bytes"
            ),
        }
    }
}

impl std::error::Error for ProtocolError {}
