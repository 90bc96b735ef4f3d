//! Tokens on their way back to an API server.

use serde::{Deserialize, Serialize};

use crate::{Failure, FinishReason, Incarnation, PackedTokens, RequestId, TokenLogprobs, WorkerId};

/// Worker → API server, published on `tokens.<api-server>.<worker>`: all tokens that one engine step made for that API
/// server, in one message. The cost on the bus grows with steps, not with tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenFrame {
    /// Protocol version.
    pub v: u16,
    /// Who sends.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// One item per request that has something to say.
    pub items: Vec<FrameItem>,
    /// Requests of that API server whose prompts wait or run on this worker and are not answered yet. A worker that runs prompts
    /// publishes them every [`crate::deadlines::JOB_REPORT_INTERVAL_MS`], so that a prompt that takes long is not taken for a lost job.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<RequestId>,
}

/// One request's share of a frame. Its tokens are numbered, so a lost frame shows as a gap.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FrameItem {
    /// Which request.
    pub request: RequestId,
    /// Which try of it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attempt: u32,
    /// Output index of the first token here: the number of output tokens before it. An end without tokens may have a lower one:
    /// whoever ends a try for an engine that hangs does not know how far it was.
    pub index: u32,
    /// The tokens; empty in an item that only reports an end or a pull. One that reports neither says that the worker still has the
    /// job: it is sent every [`crate::deadlines::JOB_REPORT_INTERVAL_MS`] from the admission to the end.
    pub tokens: PackedTokens,
    /// One for each token, if asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprobs>,
    /// Set once, in the first item after the pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulled: Option<PullReport>,
    /// Set in the last item of this try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
}

/// How a try of a generation ended on a decode worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// By its own rules.
    Finished(FinishReason),
    /// Not to its end; the worker holds nothing any more.
    Failed(Failure),
}

/// What the KV pull of a request cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PullReport {
    /// Bytes read from the context worker; 0 when the KV was already in place.
    pub bytes: u64,
    /// From the first read posted to the release answered. Of KV that was streamed, the time of the reads and the release alone.
    pub seconds: f32,
    /// [`crate::Released::handover_seconds`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover_seconds: Option<f32>,
    /// What the pull's time was made of. Senders of old say nothing, and neither do those that had nothing to pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<PullParts>,
}

/// The parts of a pull on the decode worker's clock, in seconds. A part of several waits or reads is their sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PullParts {
    /// Waits for its turn at the context worker: a few pulls read from one at the same time.
    pub turn: f32,
    /// Waits for the context worker to say how far a prompt that still runs is.
    pub progress: f32,
    /// Reads.
    pub read: f32,
    /// From the last read to the release answered.
    pub release: f32,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}
