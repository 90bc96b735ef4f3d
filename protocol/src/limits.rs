//! Bounds on sizes that both ends of the bus must agree on. Nothing else in Baton repeats them.

/// Largest message on the bus. The shipped NATS configuration allows as much. A prompt of a million
/// tokens takes 5.4 MB.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Longest text of a grammar, in bytes.
pub const GRAMMAR_BYTES_MAX: usize = 256 << 10;

/// Most sequences of tokens that an output may not hold.
pub const BAD_WORDS_MAX: usize = 2_048;

/// Most tokens that these have together.
pub const BAD_WORD_TOKENS_MAX: usize = 16_384;

/// Most alternatives reported with a token.
pub const TOP_LOGPROBS_MAX: u8 = 20;

/// Largest beat. One with [`PEERS_TOLD_MAX`] peers, each with the longest error, takes half of it.
pub const BEAT_BYTES_MAX: usize = 128 << 10;

/// Largest message that holds a few names and numbers and nothing else: a hello, an API server's beat, a release, an abort.
pub const SMALL_BYTES_MAX: usize = 16 << 10;

/// Most peers that one beat tells of, those that are gone included. A worker that has no more tells all of them each time.
pub const PEERS_TOLD_MAX: usize = 16;

/// Most peers of a worker: context workers that one decode worker connects to.
pub const PEERS_MAX: usize = 1_024;

/// Most blocks whose entering or leaving the prefix index one report tells.
pub const PREFIX_CHANGES_MAX: usize = 8_192;

/// Most blocks on one page of a prefix index.
pub const PREFIX_PAGE_MAX: usize = 8_192;

/// Largest report or page of these: 10.7 characters a link.
pub const PREFIXES_BYTES_MAX: usize = 128 << 10;

/// A worker tells of so many blocks of its arena, the first ones. Of what lies in others nobody knows.
pub const PREFIX_BLOCKS_MAX: u32 = 1 << 17;

/// Longest sentence, name of a device, of a model or of transports in a beat, in bytes. Senders cut theirs ([`crate::cut`]).
pub const SENTENCE_BYTES_MAX: usize = 256;

/// A worker whose KV arena cannot hold a sequence of this many tokens (or of the model's longest, if that is shorter) serves
/// nobody: it does not start, and an API server whose workers hold less says so under `degraded`.
pub const SEQUENCE_TOKENS_MIN: u32 = 64;
