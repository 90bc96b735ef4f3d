//! The KV handle: the baton a context worker hands to a decode worker.

use serde::{Deserialize, Serialize};

use crate::{
    BlockRun, FinishReason, HandleId, Incarnation, KvGeometry, ModelFingerprint, Nonce, PrefixPull,
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

/// KV in a context worker's arena, leased: that of a finished prefill, or of one that still runs and is streamed.
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
    /// Tokens whose KV is valid once the prompt is done: all that the job carried.
    pub valid_tokens: u32,
    /// How long the lease runs from the moment the handle was sent; while the prompt runs, from its end.
    pub lease_ms: u32,
    /// The token that follows the job's tokens. None while the prompt runs: then [`crate::Progress`] asks for it, and for what of
    /// the KV may be read already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token: Option<u32>,
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
    /// What became of pulling the prompt's beginning, if its job named a source that has more of it than the worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_pull: Option<PrefixPull>,
}

impl KvHandle {
    /// Whether its prompt was still running when it was sent.
    pub fn is_streamed(&self) -> bool {
        self.first_token.is_none() && self.finish.is_none()
    }
}
