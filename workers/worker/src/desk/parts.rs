//! A worker's parts, put together: those of a process, or those of a simulation.

use std::sync::Arc;
use std::time::Duration;

use baton_protocol::KvShares;
use baton_watchdog::Pulse;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::Desk;
use crate::common::Common;
use crate::context::ContextSide;
use crate::decode::DecodeSide;
use crate::presence::{Presence, SharedLoad};
use crate::watch::Stuck;

/// What a desk is made of; all else begins empty.
pub(crate) struct Parts {
    pub(crate) common: Common,
    pub(crate) shares: KvShares,
    pub(crate) lease: Duration,
    pub(crate) drain: Duration,
    pub(crate) shared_load: SharedLoad,
    pub(crate) may_spin: bool,
    pub(crate) pulse: Pulse,
    pub(crate) stuck: mpsc::Receiver<Stuck>,
}

impl Desk {
    /// The role says which sides there are.
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            common,
            shares,
            lease,
            drain,
            shared_load,
            may_spin,
            pulse,
            stuck,
        } = parts;
        let role = common.me.role;
        let now = Instant::now();
        let prefix_bell = Arc::<Notify>::default();
        let bell = Arc::clone(&prefix_bell);
        common.pool.on_prefix_change(move || bell.notify_one());
        Self {
            context: role.prefills().then(|| ContextSide::new(lease)),
            decode: role.decodes().then(|| DecodeSide::new(&common, shares)),
            presence: Presence::new(now, drain, shared_load),
            hangs: false,
            stray_beats: 0,
            keys_at_beat: common.next_key,
            common,
            pulse,
            stuck,
            may_spin,
            awake_until: now,
            prefix_bell,
        }
    }
}
