//! Bounds and intervals that both ends of the bus must agree on. Nothing else in Baton repeats them.

/// Largest message on the bus. The shipped NATS configuration allows as much. A prompt of a million
/// tokens takes 5.4 MB.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// A worker beats this often.
pub const BEAT_INTERVAL_MS: u64 = 1_000;

/// A worker silent for this long gets no new jobs.
pub const SUSPECT_AFTER_MS: u64 = 2_500;

/// A worker or API server silent for this long is gone: its requests go elsewhere, or are ended.
pub const GONE_AFTER_MS: u64 = 4_500;

/// A staged handle is kept this long for its release.
pub const LEASE_MS: u32 = 30_000;

/// A worker answers a control request (decode admission, release, describe) within this time or is
/// taken not to answer at all.
pub const CONTROL_TIMEOUT_MS: u64 = 3_000;

/// One KV pull may take this long, or what is left of the request's budget if that is less.
pub const PULL_TIMEOUT_MS: u64 = 10_000;

/// Budget of a request whose client named none.
pub const REQUEST_BUDGET_MS: u32 = 600_000;

/// Most alternatives reported with a token.
pub const TOP_LOGPROBS_MAX: u8 = 20;
