//! A worker's parts, put together: those of a process, or those of a simulation.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use baton_bus::Wire;
use baton_engine::BlockPool;
use baton_protocol::subjects::Cluster;
use baton_protocol::{KvGeometry, KvShares, ModelInfo};
use baton_watchdog::Pulse;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Desk;
use crate::bus::Outbox;
use crate::checks::Checks;
use crate::common::{Common, Identity};
use crate::context::ContextSide;
use crate::decode::DecodeSide;
use crate::engine_thread::EngineHandle;
use crate::frames::TokenOutbox;
use crate::mover::Mover;
use crate::presence::{Presence, SharedLoad};
use crate::watch::Stuck;

/// What a desk is made of; all else begins empty.
pub(crate) struct Parts {
    pub(crate) me: Identity,
    pub(crate) model: ModelInfo,
    pub(crate) kv: KvGeometry,
    pub(crate) shares: KvShares,
    pub(crate) cluster: Cluster,
    pub(crate) wire: Wire,
    pub(crate) outbox: Outbox,
    pub(crate) tokens: Arc<TokenOutbox>,
    pub(crate) engine: EngineHandle,
    pub(crate) pool: BlockPool,
    pub(crate) mover: Option<Mover>,
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
            me,
            model,
            kv,
            shares,
            cluster,
            wire,
            outbox,
            tokens,
            engine,
            pool,
            mover,
            lease,
            drain,
            shared_load,
            may_spin,
            pulse,
            stuck,
        } = parts;
        let role = me.role;
        let checks = Checks {
            model,
            kv,
            blocks: me.capacity.blocks,
        };
        let common = Common {
            me,
            checks,
            cluster,
            wire,
            outbox,
            tokens,
            engine,
            pool,
            mover,
            deadlines: BTreeSet::new(),
            next_key: 1,
        };
        let now = Instant::now();
        Self {
            context: role.prefills().then(|| ContextSide::new(lease)),
            decode: role.decodes().then(|| DecodeSide::new(&common, shares)),
            common,
            presence: Presence::new(now, drain, shared_load),
            hangs: false,
            stray_beats: 0,
            keys_at_beat: 1,
            pulse,
            stuck,
            may_spin,
            awake_until: now,
        }
    }
}
