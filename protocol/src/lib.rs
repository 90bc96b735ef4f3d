//! The contract between Baton's processes: what travels on the bus, and what it means.
//!
//! Everything here is data. There is no I/O, no runtime and no policy, so a worker written in
//! another language can be built from this crate's documentation alone. `README.md` beside this
//! crate tells the story in order, with one real message of each kind.
//!
//! Rules that hold for every message:
//!
//! - It is one JSON object on core NATS, at most [`limits::MESSAGE_BYTES_MAX`] bytes, and of some kinds
//!   less ([`Versioned::BYTES_MAX`]).
//! - It carries `v`, the [`PROTOCOL_VERSION`] of its sender. A receiver refuses another major
//!   version with a sentence ([`decode`]); fields it does not know are ignored, so fields may be
//!   added within a version.
//! - Durations are relative, in milliseconds, and end in `_ms`: clocks of two hosts are never
//!   compared.
//! - Token ids travel packed ([`PackedTokens`]), 128-bit numbers as 32 hexadecimal digits.
#![forbid(unsafe_code)]
#![warn(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods
)]

mod codec;
mod cost;
pub mod deadlines;
mod error;
mod handle;
mod ids;
mod job;
mod kv;
mod lease;
pub mod limits;
mod membership;
mod packed;
mod peers;
mod prefixes;
mod sampling;
mod service;
pub mod subjects;
mod token_frame;
mod token_rules;
mod trace;
mod transfer;

pub use codec::{Versioned, cut, decode, encode};
pub use cost::{CostPoint, ITL_PART, PAUSE_MAX, StepCost, StepShape};
pub use error::{Failure, FailureCode, ProtocolError, Refusal};
pub use handle::{KvHandle, PrefillTimings};
pub use ids::{
    ApiServerId, CacheSalt, HandleId, Incarnation, ModelFingerprint, NAME_BYTES_MAX, Nonce,
    RequestId, SpanId, TraceId, WorkerId,
};
pub use job::{
    Abort, DecodeJob, DecodeReply, Drain, Draining, PrefillJob, PrefillReply, Progress,
    ProgressReply, Release, Released, Renew, Renewed, SequenceSpec,
};
pub use kv::{BlockRun, KvDtype, KvGeometry, KvGroup, KvShare, KvShares};
pub use lease::{LeaseAsk, LeaseReply, PrefixPull, PrefixPullFailure, PrefixSource};
pub use membership::{
    ApiBeat, Beat, Capacity, Hello, Load, ModelInfo, Role, WorkerDescriptor, WorkerState,
};
pub use packed::{Base64Bytes, PackedLinks, PackedTokens};
pub use peers::{PeerChanges, PeerHealth, PeerState, PeersReply};
pub use prefixes::{PrefixPage, PrefixReport, PrefixesAsk, prefix_chain, prefix_link, prefix_root};
pub use sampling::{FinishReason, Generation, Grammar, Sampling, TokenLogprobs, TopLogprob};
pub use service::{Service, Tier};
pub use token_frame::{End, FrameItem, PullParts, PullReport, TokenFrame};
pub use token_rules::TokenRules;
pub use trace::{TRACE_STATE_BYTES_MAX, TraceContext};
pub use transfer::{MemoryType, RankRegion, TransferDescriptor, UcxVersion};

/// Version of the contract. Raised when an old receiver would misread a new message.
pub const PROTOCOL_VERSION: u16 = 2;
