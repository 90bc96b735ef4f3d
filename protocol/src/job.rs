//! What the API server asks of workers, and what a decode worker asks of a context worker.

use serde::{Deserialize, Serialize};

use crate::limits::GRAMMAR_BYTES_MAX;
use crate::{
    ApiServerId, CacheSalt, Failure, FinishReason, Generation, HandleId, Incarnation, KvHandle,
    ModelFingerprint, Nonce, PackedTokens, PrefixSource, Refusal, RequestId, Service,
    TokenLogprobs, TraceContext, WorkerId, trace,
};

/// A sequence as it stands: the prompt, the output so far, and how to go on. A retry carries more
/// output than the first try, and nothing else differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SequenceSpec {
    /// Prompt and output so far.
    pub tokens: PackedTokens,
    /// How many of them are the prompt; at least 1.
    pub prompt_tokens: u32,
    /// How to choose tokens and when to stop.
    pub generation: Generation,
    /// Whose KV it may use, and who may use its KV.
    #[serde(default, skip_serializing_if = "CacheSalt::is_none")]
    pub cache_salt: CacheSalt,
    /// What it was promised.
    #[serde(default, skip_serializing_if = "Service::is_default")]
    pub service: Service,
}

impl SequenceSpec {
    /// Number of output tokens so far; also the output index of the next token.
    pub fn output_tokens(&self) -> u32 {
        (self.tokens.0.len() as u32).saturating_sub(self.prompt_tokens)
    }

    /// Whether the counts make sense: a prompt, no more prompt than tokens, and room for one more.
    ///
    /// # Errors
    /// [`Refusal::Malformed`] with the reason.
    pub fn check(&self) -> Result<(), Refusal> {
        let malformed = |detail: &str| {
            Err(Refusal::Malformed {
                detail: detail.to_owned(),
            })
        };
        let tokens = self.tokens.0.len();
        if self.prompt_tokens == 0 || tokens < self.prompt_tokens as usize {
            return malformed("prompt_tokens must be between 1 and the number of tokens");
        }
        if self.output_tokens() >= self.generation.max_tokens {
            return malformed("the output already has max_tokens tokens");
        }
        if let Some(grammar) = &self.generation.grammar
            && grammar.text().len() > GRAMMAR_BYTES_MAX
        {
            return malformed("the grammar is too long");
        }
        if let Some(rules) = &self.generation.token_rules
            && let Err(detail) = rules.check()
        {
            return malformed(detail);
        }
        Ok(())
    }
}

/// API server → context worker, request on `prefill.<worker>`: run these tokens, choose the next one,
/// keep the KV. Answered by [`PrefillReply`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillJob {
    /// Protocol version.
    pub v: u16,
    /// Which request.
    pub request: RequestId,
    /// Who asks.
    pub api_server: ApiServerId,
    /// Which life of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_incarnation: Option<Incarnation>,
    /// Time left for the whole request.
    pub budget_ms: u32,
    /// The model it is meant for.
    pub model: ModelFingerprint,
    /// The sequence.
    pub sequence: SequenceSpec,
    /// Report log-probabilities of the prompt's tokens too, with this many alternatives (`echo`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<u8>,
    /// The handle may come while the prompt runs ([`PrefillReply::Begun`]): a decode worker reads what is there already. Senders of
    /// old say nothing and want none.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stream: bool,
    /// Who has the KV of the prompt's beginning. Only for workers that say that they lease prefixes; others ignore it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<PrefixSource>,
    /// The span below which the worker's are, where a trace of the request is recorded.
    #[serde(
        default,
        deserialize_with = "trace::taken",
        skip_serializing_if = "Option::is_none"
    )]
    pub trace: Option<TraceContext>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// Answer to [`PrefillJob`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum PrefillReply {
    /// The prompt takes more than one step and the first is over. Its KV is leased from now on; the first token is had with
    /// [`Progress`]. Only for jobs that ask to be streamed.
    Begun {
        /// Protocol version.
        v: u16,
        /// The handle, without first token.
        handle: Box<KvHandle>,
    },
    /// The KV is staged, or the generation already ended with its first token.
    Ready {
        /// Protocol version.
        v: u16,
        /// The handle.
        handle: Box<KvHandle>,
        /// For each prompt token but the first, if asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        prompt_logprobs: Option<Vec<TokenLogprobs>>,
    },
    /// Not taken.
    Refused {
        /// Protocol version.
        v: u16,
        /// Why.
        refusal: Refusal,
    },
    /// Taken and failed; nothing is held.
    Failed {
        /// Protocol version.
        v: u16,
        /// Why.
        failure: Failure,
    },
}

impl PrefillReply {
    /// Most bytes that an answer takes that reports log-probabilities of a prompt of this many tokens, with `top`
    /// alternatives each, of a vocabulary of `vocab` tokens. Known before anything is computed: who asks for more than the
    /// bus carries is told so at once.
    pub const fn bytes_max(prompt_tokens: usize, top: u8, vocab: u32) -> usize {
        /// The handle without its runs: names, numbers, and the first token's log-probabilities.
        const HANDLE: usize = 4 << 10;
        /// A run for each block, and no executor's blocks have fewer tokens than this.
        const BLOCK_TOKENS_MIN: usize = 4;
        let run = r#"{"first":4294967295,"count":1},"#.len();
        let runs = prompt_tokens.div_ceil(BLOCK_TOKENS_MIN) * run;
        HANDLE + runs + prompt_tokens * TokenLogprobs::bytes_max(top, vocab)
    }
}

/// API server → decode worker, request on `decode.<worker>`: pull this KV and go on. Answered by
/// [`DecodeReply`] at once; tokens follow on the API server's token subject.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeJob {
    /// Protocol version.
    pub v: u16,
    /// Which request.
    pub request: RequestId,
    /// Who asks, and where tokens go.
    pub api_server: ApiServerId,
    /// Which life of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_incarnation: Option<Incarnation>,
    /// Which try of this request this is, from 0: token frames carry it back, so frames of a try that
    /// was given up are told from those of the one that replaced it.
    pub attempt: u32,
    /// Time left for the whole request.
    pub budget_ms: u32,
    /// The sequence as the context worker got it, without the handle's first token.
    pub sequence: SequenceSpec,
    /// Where its KV is, and its next token.
    pub handle: KvHandle,
    /// The span below which the worker's are, where a trace of the request is recorded.
    #[serde(
        default,
        deserialize_with = "trace::taken",
        skip_serializing_if = "Option::is_none"
    )]
    pub trace: Option<TraceContext>,
}

/// Answer to [`DecodeJob`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum DecodeReply {
    /// Blocks are reserved and the pull has begun.
    Admitted {
        /// Protocol version.
        v: u16,
        /// Which life of the worker took it.
        incarnation: Incarnation,
    },
    /// Not taken; the handle stays leased.
    Refused {
        /// Protocol version.
        v: u16,
        /// Why.
        refusal: Refusal,
    },
}

/// API server → any worker, published on `abort.<worker>`: end this request in whatever phase it is
/// and free what it holds. Not answered; aborting what is not there is no error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Abort {
    /// Protocol version.
    pub v: u16,
    /// Which request.
    pub request: RequestId,
    /// Why, for the log.
    pub reason: String,
}

/// API server → any worker, request on `drain.<worker>`: leave, as if asked by SIGTERM. Answered at once by [`Draining`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// Protocol version.
    pub v: u16,
    /// The life of the worker that is meant: one that was started again meanwhile stays.
    pub incarnation: Incarnation,
    /// Who asks, for the log.
    pub from: String,
}

/// Answer to [`Drain`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Draining {
    /// Protocol version.
    pub v: u16,
    /// It drains; false if another life of the worker was meant.
    pub draining: bool,
}

/// Decode worker → context worker, request on `release.<worker>`: the pull has ended, free the KV, and
/// say whether it was whole all the time. Answered by [`Released`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// Protocol version.
    pub v: u16,
    /// Which request.
    pub request: RequestId,
    /// The life of the context worker the handle belongs to.
    pub incarnation: Incarnation,
    /// Which staged cache.
    pub handle: HandleId,
    /// Proof.
    pub nonce: Nonce,
    /// Who releases.
    pub decode_worker: WorkerId,
}

/// Answer to [`Release`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Released {
    /// Protocol version.
    pub v: u16,
    /// Whether that lease was alive without a break until now. If not, what was read must be thrown
    /// away. A second release of one handle is not valid.
    pub valid: bool,
    /// From the end of the prompt's last step to this release, on the context worker's clock. Senders of old say none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover_seconds: Option<f32>,
}

/// API server or decode worker → context worker, request on `progress.<worker>`: how far is the prompt of this streamed handle?
/// Answered by [`ProgressReply`] when there is more than the asker has, when the prompt is done or has ended, and after
/// [`crate::deadlines::PROGRESS_WAIT_MS`] at the latest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Protocol version.
    pub v: u16,
    /// Which request.
    pub request: RequestId,
    /// The life of the context worker the handle belongs to.
    pub incarnation: Incarnation,
    /// Which staged cache.
    pub handle: HandleId,
    /// Proof.
    pub nonce: Nonce,
    /// Tokens whose KV the asker has, or has heard to be there. Who waits for the first token alone says all that the job has.
    pub have_tokens: u32,
}

/// Answer to [`Progress`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ProgressReply {
    /// The prompt runs.
    Running {
        /// Protocol version.
        v: u16,
        /// KV of so many tokens is final: the steps that computed it are over. Of a block that is not full nothing is.
        tokens: u32,
    },
    /// It is done: all of its KV is final, and leased like that of any handle unless `finish` is set.
    Done {
        /// Protocol version.
        v: u16,
        /// The token that follows the job's tokens.
        first_token: u32,
        /// Its log-probabilities, if the job asked for them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        first_logprobs: Option<TokenLogprobs>,
        /// Set when that token ended the generation; nothing is held any more.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        finish: Option<FinishReason>,
    },
    /// It has ended without, or its lease has: nothing is held. `handle_invalid` says that no such lease is known.
    Failed {
        /// Protocol version.
        v: u16,
        /// Why.
        failure: Failure,
    },
}

/// API server → context worker, request on `renew.<worker>`: the handle is still wanted, keep its lease for another
/// `lease_ms` from now. Answered by [`Renewed`] within [`crate::deadlines::CONTROL_TIMEOUT_MS`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Renew {
    /// Protocol version.
    pub v: u16,
    /// Which request.
    pub request: RequestId,
    /// The life of the context worker the handle belongs to.
    pub incarnation: Incarnation,
    /// Which staged cache.
    pub handle: HandleId,
    /// Proof.
    pub nonce: Nonce,
}

/// Answer to [`Renew`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// Protocol version.
    pub v: u16,
    /// Whether that lease was alive and is renewed. If not, it has ended and never comes back.
    pub valid: bool,
}
