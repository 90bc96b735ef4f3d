//! Every subject on the bus. No other file spells one.

use std::fmt;

use crate::ids::check_name;
use crate::{ApiServerId, ProtocolError, WorkerId};

/// First token of every subject.
pub const ROOT: &str = "baton";

/// Who speaks on this subject of beats and token frames. A NATS server can see to it that each speaks on its own alone, so
/// a message that names another is a forgery.
pub fn speaker(subject: &str) -> &str {
    subject.rsplit('.').next().unwrap_or_default()
}

/// The subjects of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster(String);

impl Cluster {
    /// The subjects of the cluster of this name.
    ///
    /// # Errors
    /// [`ProtocolError::Name`] if the name cannot be a subject token.
    pub fn new(name: impl Into<String>) -> Result<Self, ProtocolError> {
        let name = name.into();
        check_name("cluster", &name)?;
        Ok(Self(name))
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A worker's [`crate::Beat`].
    pub fn beat(&self, worker: &WorkerId) -> String {
        self.of("beat", worker)
    }

    /// All workers' beats.
    pub fn beats(&self) -> String {
        self.of("beat", &"*")
    }

    /// An API server's [`crate::ApiBeat`].
    pub fn api_beat(&self, api_server: &ApiServerId) -> String {
        self.of("api-beat", api_server)
    }

    /// All API servers' beats.
    pub fn api_beats(&self) -> String {
        self.of("api-beat", &"*")
    }

    /// [`crate::Hello`].
    pub fn hello(&self) -> String {
        format!("{ROOT}.{}.hello", self.0)
    }

    /// Requests for a [`crate::WorkerDescriptor`].
    pub fn describe(&self, worker: &WorkerId) -> String {
        self.of("describe", worker)
    }

    /// Requests for all of a worker's peers: a [`crate::Hello`], answered with a [`crate::PeersReply`].
    pub fn peers(&self, worker: &WorkerId) -> String {
        self.of("peers", worker)
    }

    /// A worker's [`crate::PrefixReport`]s.
    pub fn prefixes(&self, worker: &WorkerId) -> String {
        self.of("prefixes", worker)
    }

    /// All workers' [`crate::PrefixReport`]s.
    pub fn all_prefixes(&self) -> String {
        self.of("prefixes", &"*")
    }

    /// [`crate::PrefixesAsk`]s for a worker, each answered with a [`crate::PrefixPage`].
    pub fn prefix_pages(&self, worker: &WorkerId) -> String {
        self.of("prefix-pages", worker)
    }

    /// Everything that is sent to one worker: one subscription, so that what one sender sent in order
    /// (a job, then its abort) is also received in order. Holds the worker's own beats and prefix reports too.
    pub fn inbox(&self, worker: &WorkerId) -> String {
        format!("{ROOT}.{}.*.{worker}", self.0)
    }

    /// [`crate::PrefillJob`]s.
    pub fn prefill(&self, worker: &WorkerId) -> String {
        self.of("prefill", worker)
    }

    /// [`crate::DecodeJob`]s.
    pub fn decode(&self, worker: &WorkerId) -> String {
        self.of("decode", worker)
    }

    /// [`crate::Abort`]s.
    pub fn abort(&self, worker: &WorkerId) -> String {
        self.of("abort", worker)
    }

    /// [`crate::Drain`]s.
    pub fn drain(&self, worker: &WorkerId) -> String {
        self.of("drain", worker)
    }

    /// [`crate::Release`]s.
    pub fn release(&self, worker: &WorkerId) -> String {
        self.of("release", worker)
    }

    /// [`crate::LeaseAsk`]s.
    pub fn lease(&self, worker: &WorkerId) -> String {
        self.of("lease", worker)
    }

    /// [`crate::Renew`]s.
    pub fn renew(&self, worker: &WorkerId) -> String {
        self.of("renew", worker)
    }

    /// [`crate::Progress`]: questions after prompts that are streamed.
    pub fn progress(&self, worker: &WorkerId) -> String {
        self.of("progress", worker)
    }

    /// A worker's [`crate::TokenFrame`]s for an API server. Each worker has a subject of its own, so that a NATS server can see
    /// to it that none speaks for another.
    pub fn tokens(&self, api_server: &ApiServerId, worker: &WorkerId) -> String {
        self.of("tokens", &format_args!("{api_server}.{worker}"))
    }

    /// All workers' [`crate::TokenFrame`]s for an API server.
    pub fn all_tokens(&self, api_server: &ApiServerId) -> String {
        self.of("tokens", &format_args!("{api_server}.*"))
    }

    /// What the subjects of answers to `name`'s requests begin with: its own, so that nobody else need be let listen to them.
    pub fn inbox_prefix(name: &dyn fmt::Display) -> String {
        format!("_INBOX.{name}")
    }

    fn of(&self, kind: &str, whom: &dyn fmt::Display) -> String {
        format!("{ROOT}.{}.{kind}.{whom}", self.0)
    }
}
