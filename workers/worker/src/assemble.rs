//! A worker's parts, put together: those of a process, or those of a simulation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use baton_bus::{Presence, Wire};
use baton_engine::BlockPool;
use baton_protocol::deadlines::SUSPECT_AFTER_MS;
use baton_protocol::subjects::Cluster;
use baton_protocol::{KvGeometry, ModelInfo, WorkerState};
use baton_watchdog::Pulse;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::api_servers::ApiServers;
use crate::beat::SharedLoad;
use crate::bus::Outbox;
use crate::checks::Checks;
use crate::desk::{Desk, Identity};
use crate::engine_thread::EngineHandle;
use crate::frames::TokenOutbox;
use crate::leases::LeaseTable;
use crate::line::Line;
use crate::mover::Mover;
use crate::pace::Pace;
use crate::peers::Peers;
use crate::peers_told::PeersTold;
use crate::pulls::Places;
use crate::watch::Stuck;

/// What a desk is made of; all else begins empty.
pub(crate) struct Parts {
    pub(crate) me: Identity,
    pub(crate) model: ModelInfo,
    pub(crate) kv: KvGeometry,
    pub(crate) cluster: Cluster,
    pub(crate) wire: Wire,
    pub(crate) outbox: Outbox,
    pub(crate) tokens: Arc<TokenOutbox>,
    pub(crate) engine: EngineHandle,
    pub(crate) pool: BlockPool,
    pub(crate) agent: Option<Mover>,
    pub(crate) lease: Duration,
    pub(crate) drain: Duration,
    pub(crate) shared_load: SharedLoad,
    pub(crate) may_spin: bool,
    pub(crate) pulse: Pulse,
    pub(crate) stuck: mpsc::Receiver<Stuck>,
}

impl Desk {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            me,
            model,
            kv,
            cluster,
            wire,
            outbox,
            tokens,
            engine,
            pool,
            agent,
            lease,
            drain,
            shared_load,
            may_spin,
            pulse,
            stuck,
        } = parts;
        Self {
            peers: Peers::new(me.worker.clone(), model.clone(), kv.clone()),
            peers_told: PeersTold::default(),
            checks: Checks {
                model,
                kv,
                blocks: me.capacity.blocks,
            },
            me,
            cluster,
            wire,
            outbox,
            tokens,
            engine,
            pool,
            lease,
            drain,
            state: WorkerState::Serving,
            failure: None,
            hangs: false,
            drain_deadline: None,
            has_ended_drain: false,
            deadlines: BTreeSet::new(),
            next_key: 1,
            prefills: BTreeMap::new(),
            leases: LeaseTable::new(),
            prefill_pace: Pace::default(),
            decode_pace: Pace::default(),
            decodes: BTreeMap::new(),
            line: Line::default(),
            pulls: JoinSet::new(),
            pull_places: Places::default(),
            agent,
            links: JoinSet::new(),
            api_servers: ApiServers::default(),
            presence: Presence::new(Instant::now(), Duration::from_millis(SUSPECT_AFTER_MS)),
            beat_due: None,
            last_beat: Instant::now(),
            shared_load,
            stray_beats: 0,
            end_after_failure: None,
            may_spin,
            awake_until: Instant::now(),
            pulse,
            stuck,
        }
    }
}
