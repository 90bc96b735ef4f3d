//! The beginning of a prompt, pulled from another worker before the prompt runs.

use serde::{Deserialize, Serialize};

use crate::{
    ApiServerId, CacheSalt, Incarnation, KvHandle, ModelFingerprint, PackedTokens, Refusal,
    RequestId, WorkerId,
};

/// In a [`crate::PrefillJob`]: who has the KV of the prompt's beginning, where it is thought quicker to pull it from there than to
/// compute it anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixSource {
    /// Who.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// KV of so many of the job's tokens, as far as is known.
    pub tokens: u32,
}

/// Worker that is to run a prompt → [`PrefixSource`], request on `lease.<worker>`: hold the KV of these tokens for me. Answered by
/// [`LeaseReply`] within [`crate::deadlines::CONTROL_TIMEOUT_MS`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeaseAsk {
    /// Protocol version.
    pub v: u16,
    /// Which request the prompt is of.
    pub request: RequestId,
    /// Whose request.
    pub api_server: ApiServerId,
    /// Which life of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_incarnation: Option<Incarnation>,
    /// Who asks.
    pub from: WorkerId,
    /// The life of the source that is meant.
    pub incarnation: Incarnation,
    /// The model that is to have computed the KV.
    pub model: ModelFingerprint,
    /// The prompt's beginning.
    pub tokens: PackedTokens,
    /// Whose KV: a worker shares it between sequences of equal salt alone.
    #[serde(default, skip_serializing_if = "CacheSalt::is_none")]
    pub cache_salt: CacheSalt,
    /// The lease need not last longer: who asks has given it up by then.
    pub lease_ms: u32,
}

/// Answer to [`LeaseAsk`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum LeaseReply {
    /// The KV of the first `valid_tokens` tokens is held: whole blocks, one at least. The handle has no first token, is renewed by nobody,
    /// and is released as any other.
    Leased {
        /// Protocol version.
        v: u16,
        /// The handle.
        handle: Box<KvHandle>,
    },
    /// Its prefix index has none of it.
    Absent {
        /// Protocol version.
        v: u16,
    },
    /// Not now, or not here.
    Refused {
        /// Protocol version.
        v: u16,
        /// Why.
        refusal: Refusal,
    },
}

/// In a [`KvHandle`]: what became of pulling the prompt's beginning from the source that its job named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PrefixPull {
    /// Tokens that were pulled and found good. 0 where it failed.
    pub tokens: u32,
    /// Bytes that were read.
    pub bytes: u64,
    /// From the job's arrival to the pull's end, release included.
    pub seconds: f32,
    /// Why nothing came of it: the prompt ran from what its worker had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<PrefixPullFailure>,
}

/// Why the beginning of a prompt was not pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixPullFailure {
    /// The worker that runs the prompt has no connection to the source.
    Unreachable,
    /// It has no blocks for what it would pull.
    NoRoom,
    /// The source has none of it any more.
    Absent,
    /// The source does not lease it, or does not answer.
    Refused,
    /// Computing would have been as quick by then.
    Late,
    /// Reading failed.
    Failed,
    /// The lease had ended before it was released: what was read was thrown away.
    Invalid,
    /// A reason that this release does not know, from a newer worker. Never sent.
    #[serde(other)]
    Unknown,
}

impl PrefixPullFailure {
    /// All that are sent.
    pub const ALL: [Self; 7] = [
        Self::Unreachable,
        Self::NoRoom,
        Self::Absent,
        Self::Refused,
        Self::Late,
        Self::Failed,
        Self::Invalid,
    ];

    /// The name used in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::NoRoom => "no_room",
            Self::Absent => "absent",
            Self::Refused => "refused",
            Self::Late => "late",
            Self::Failed => "failed",
            Self::Invalid => "invalid",
            Self::Unknown => "unknown",
        }
    }
}
