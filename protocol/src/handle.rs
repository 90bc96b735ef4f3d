//! The KV handle: the baton a context worker hands to a decode worker.

use serde::{Deserialize, Serialize};

use crate::{
    BlockRun, FinishReason, HandleId, Incarnation, KvGeometry, ModelFingerprint, Nonce,
    TokenLogprobs, WorkerId,
};

/// Where the prompt's time went, on the context worker's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefillTimings {
    /// From arrival of the job to its first forward step.
    pub queue_ms: f32,
    /// From the first forward step to the first token.
    pub compute_ms: f32,
}

/// A finished prefill whose KV waits in a context worker's arena, leased.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvHandle {
    /// Who holds the KV.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Which staged cache on it.
    pub handle: HandleId,
    /// Must be shown to release it.
    pub nonce: Nonce,
    /// The model that computed it: two models can share a geometry.
    pub model: ModelFingerprint,
    /// How the KV is laid out.
    pub kv: KvGeometry,
    /// The sequence's blocks in order of their tokens, run-length coded: the same on every rank of the worker, whose
    /// descriptor says what each of them holds. Empty when nothing is staged because `finish` is set.
    pub runs: Vec<BlockRun>,
    /// Tokens whose KV is valid: all that the job carried.
    pub valid_tokens: u32,
    /// How long the lease runs from the moment the handle was sent.
    pub lease_ms: u32,
    /// The token that follows the job's tokens.
    pub first_token: u32,
    /// Its log-probabilities, if the job asked for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_logprobs: Option<TokenLogprobs>,
    /// Set when the first token ended the generation; nothing is staged then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<FinishReason>,
    /// Tokens that the prefix index already had.
    pub cached_tokens: u32,
    /// Where the time went.
    pub timings: PrefillTimings,
}
