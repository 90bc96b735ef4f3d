//! A worker without NATS, UCX, threads and a device of its own: what the simulation runs. Desk, leases, pulls,
//! peers, publisher and engine are the real thing.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use baton_bus::{Subscription, Wire};
use baton_engine::{BlockPool, Drafter, Engine, EngineConfig, Executor};
use baton_model::WeightFormat;
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    Base64Bytes, Capacity, Incarnation, KvShares, MemoryType, ModelInfo, PROTOCOL_VERSION,
    RankRegion, Role, StepCost, TransferDescriptor, UcxVersion, WorkerDescriptor, WorkerId, encode,
};
use baton_traces::Tracer;
use baton_watchdog::Pulse;
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{mpsc, watch};

use crate::WorkerError;
use crate::bus::{Outbox, Publisher, Subscriptions};
use crate::checks::Checks;
use crate::common::{Common, Identity};
use crate::desk::{Desk, Parts};
use crate::engine_thread::{EngineEvent, EngineTask, StepTimes};
use crate::frames::TokenOutbox;
use crate::mover::{KvNetwork, Mover};
use crate::presence::SharedLoad;

/// What a simulated worker is told at start.
pub struct SimulatedConfig {
    /// Its name.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// What it does.
    pub role: Role,
    /// Its cluster.
    pub cluster: Cluster,
    /// What it serves.
    pub model: ModelInfo,
    /// What its ranks hold of the KV.
    pub shares: KvShares,
    /// How long staged KV is kept.
    pub lease: Duration,
    /// How long a drain may take.
    pub drain: Duration,
    /// Prompts that may wait.
    pub queue: usize,
    /// Keep finished prefixes.
    pub prefix_cache: bool,
    /// What steps cost, if it is to know. It learns from what they take by its clock.
    pub cost: Option<StepCost>,
    /// Mean time between tokens that its steps are kept to.
    pub itl: Option<Duration>,
    /// Guesses tokens for the engine.
    pub drafter: Option<Box<dyn Drafter>>,
    /// The engine's clock.
    pub clock: fn() -> std::time::Instant,
    /// Of so many peers a beat tells all, and only changes of more; as many as of any worker if nothing is said.
    pub peers_told: Option<usize>,
}

/// A worker that was made and does not run yet.
pub struct SimulatedWorker {
    desk: Desk,
    subscriptions: Subscriptions,
    events: mpsc::Receiver<EngineEvent>,
    is_up: watch::Receiver<bool>,
    engine: EngineTask,
    publisher: Publisher,
    describe: Subscription,
    description: Bytes,
    wire: Wire,
}

impl SimulatedWorker {
    /// Makes one.
    ///
    /// # Errors
    /// [`WorkerError`] if the wire takes no subscriptions.
    pub async fn new(
        mut config: SimulatedConfig,
        wire: Wire,
        executor: Box<dyn Executor>,
        network: Arc<dyn KvNetwork>,
        is_up: watch::Receiver<bool>,
    ) -> Result<Self, WorkerError> {
        let info = executor.info().clone();
        let engine = EngineConfig {
            step_tokens_max: info.step_tokens_max,
            sequences_max: info.step_sequences_max,
            queue_max: config.queue,
            prefix_cache: config.prefix_cache,
        };
        let mut engine = Engine::new(executor, engine)
            .with_clock(config.clock)
            .with_itl(config.itl);
        if let Some(cost) = config.cost.take() {
            engine = engine.with_cost(cost);
        }
        if let Some(drafter) = config.drafter.take() {
            engine = engine.with_drafter(drafter);
        }
        let pool = engine.pool();
        let tokens = Arc::new(TokenOutbox::default());
        let sequences_max = 2 * config.queue + info.step_sequences_max;
        let (handle, engine, events) = EngineTask::new(engine, tokens.clone(), sequences_max);
        let (outbox, control) = Outbox::new(wire.clone());
        let SimulatedConfig {
            worker,
            incarnation,
            role,
            cluster,
            model,
            shares,
            ..
        } = config;
        let publisher = Publisher {
            wire: wire.clone(),
            cluster: cluster.clone(),
            worker: worker.clone(),
            incarnation,
            control,
            tokens: tokens.clone(),
            is_up: is_up.clone(),
            engine: handle.waker.clone(),
        };
        // Nobody reads at an address here.
        let arena = |rank| RankRegion {
            rkey: Base64Bytes(Vec::new()),
            base: 0,
            bytes: shares.block_bytes(&info.kv, rank) * u64::from(info.blocks),
            memory: MemoryType::Host,
        };
        let description = WorkerDescriptor {
            v: PROTOCOL_VERSION,
            worker: worker.clone(),
            incarnation,
            role,
            model: model.clone(),
            kv: info.kv.clone(),
            transfer: Some(TransferDescriptor {
                ucx: UcxVersion(0, 0, 0),
                address: Base64Bytes(Vec::new()),
                ranks: (0..shares.ranks()).map(arena).collect(),
            }),
            shares: shares.clone(),
        };
        let system = |what: &'static str, detail: String| WorkerError::System { what, detail };
        let description = encode(&description)
            .map_err(|error| system("describing itself", error.to_string()))?
            .into();
        let describe = wire
            .subscribe(cluster.describe(&worker))
            .await
            .map_err(|error| system("subscribing on the bus", error.to_string()))?;
        let subscriptions =
            Subscriptions::new(&wire, &cluster, &worker, role.decodes(), &outbox).await?;
        let mut desk = Desk::new(Parts {
            common: Common {
                me: Identity {
                    worker,
                    incarnation,
                    role,
                    device: info.device.clone(),
                    ranks: shares.ranks() as u32,
                    weights: WeightFormat::Bf16,
                    transport: "simulated".to_owned(),
                    capacity: Capacity {
                        blocks: info.blocks,
                        batch: info.step_sequences_max as u32,
                        queue: config.queue as u32,
                    },
                    itl_ms: config.itl.map(|itl| itl.as_millis() as u32),
                    step_tokens: info.step_tokens_max as u32,
                    leases_prefixes: config.prefix_cache && role.prefills(),
                },
                checks: Checks {
                    model,
                    kv: info.kv,
                    blocks: info.blocks,
                },
                cluster,
                wire: wire.clone(),
                outbox,
                tokens,
                engine: handle,
                pool,
                mover: Some(Mover::Simulated(network)),
                deadlines: BTreeSet::new(),
                next_key: 1,
                tracer: Tracer::off(),
            },
            shares,
            lease: config.lease,
            drain: config.drain,
            shared_load: SharedLoad::default(),
            may_spin: false,
            pulse: Pulse::default(),
            stuck: mpsc::channel(1).1,
        });
        if let Some(peers) = config.peers_told {
            desk.presence.tell_at_once(peers);
        }
        Ok(Self {
            desk,
            subscriptions,
            events,
            is_up,
            engine,
            publisher,
            describe,
            description,
            wire,
        })
    }

    /// The blocks of its arena.
    pub fn pool(&self) -> BlockPool {
        self.desk.common.pool.clone()
    }

    /// Runs until `shutdown` resolves and what it had is finished. What is left in its books then, or why it broke.
    ///
    /// # Errors
    /// [`WorkerError`] if its executor broke.
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()>,
        step_times: StepTimes,
    ) -> Result<Option<String>, WorkerError> {
        let Self {
            mut desk,
            mut subscriptions,
            events,
            is_up,
            engine,
            publisher,
            mut describe,
            description,
            wire,
        } = self;
        let desk = async move {
            let outcome = desk.run(&mut subscriptions, events, is_up, shutdown).await;
            desk.send_beat();
            desk.answer_latecomers(&mut subscriptions.inbox).await;
            let books = books(&desk);
            let Common {
                mut engine, outbox, ..
            } = desk.common;
            engine.shutdown();
            drop(outbox);
            outcome.map(|()| books)
        };
        let described = async move {
            while let Some(message) = describe.next().await {
                if let Some(reply) = message.reply {
                    // Who asked asks again.
                    let _ = wire.publish(reply, description.clone()).await;
                }
            }
        };
        let all = async { tokio::join!(biased; desk, engine.run(step_times), publisher.run()) };
        let (outcome, engine, ()) = tokio::select! {
            biased;
            all = all => all,
            () = described => std::future::pending().await,
        };
        let mut books = outcome?;
        if let Some(mut engine) = engine {
            // A step may be under way whose sequences have all been ended: it holds their blocks.
            let _ = engine.settle();
            if engine.has_work() {
                books = books.or_else(|| Some(format!("the engine still has work: {engine:?}")));
            }
            books = books.or_else(|| engine.check().err());
        }
        Ok(books)
    }
}

/// What is left in the books of a worker that has nothing to do.
fn books(desk: &Desk) -> Option<String> {
    let held = desk.held();
    let counts = [
        ("prefills", held.prefills),
        ("decodes", held.decodes),
        ("leases", held.leases),
        ("leases of prefixes", held.lent),
        ("deadlines", desk.common.deadlines.len()),
    ];
    let left: Vec<_> = counts.iter().filter(|(_, count)| *count > 0).collect();
    (!left.is_empty()).then(|| format!("left over: {left:?}"))
}
