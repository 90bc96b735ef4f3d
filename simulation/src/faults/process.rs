//! Processes: workers that crash, freeze, drain and come back, and API servers that do so too.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use baton_api_server::{Promises, SimulatedServer};
use baton_engine::{
    BlockPool, Drafter, Executor, ExecutorError, ExecutorInfo, FakeCells, FakeConfig, FakeDrafter,
    FakeExecutor, StepOutput, StepPlan, TokenMask, fake_geometry,
};
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    ApiServerId, CostPoint, Incarnation, KvGeometry, KvShares, ModelFingerprint, ModelInfo, Role,
    StepCost, WorkerId,
};
use baton_worker::{SimulatedConfig, SimulatedWorker, StepTimes, WorkerError};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::Instant;

use crate::dice::Dice;
use crate::faults::client::VOCAB;
use crate::faults::kv::KvFabric;
use crate::network::{Connectivity, Network, Port};

/// Longest sequence of the simulated model.
pub const TOKENS_MAX: u32 = 120;

/// Most ranks of a worker.
pub const RANKS_MAX: u32 = 4;

/// What an executor says that was to break.
const BROKEN: &str = "the simulated device is gone";

/// What stays of a worker through all its lives.
#[derive(Clone, Debug)]
pub struct WorkerSetup {
    /// Its name.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Blocks of its arena.
    pub blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Key/value heads of the model: the same for all workers.
    pub kv_heads: u32,
    /// Ranks among which its first life shares out the heads; 0 where every life has one rank.
    pub ranks: u32,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of a step.
    pub step_tokens: usize,
    /// Steps under way.
    pub steps_in_flight: usize,
    /// Its engine has a drafter.
    pub drafts: bool,
    /// Prompts that may wait.
    pub queue: usize,
    /// Keeps prefixes.
    pub prefix_cache: bool,
    /// Every life of it knows what steps cost; else every other.
    pub knows_cost: bool,
    /// Longest step.
    pub step_max_ms: u64,
    /// Time between tokens that its steps are kept to; 0 for that of a step.
    pub itl_ms: u64,
    /// Of staged KV.
    pub lease: Duration,
    /// Of a drain.
    pub drain: Duration,
    /// Of a thousand lives, so many end with a broken executor.
    pub breaks_per_mille: u64,
}

impl WorkerSetup {
    /// What its steps cost, about: how long one takes is drawn.
    fn cost(&self) -> StepCost {
        let point = |tokens, part: f32| CostPoint {
            tokens,
            us: part * 1000.0 * self.step_max_ms as f32,
        };
        StepCost {
            layers: vec![point(1, 0.3), point(16, 0.5), point(64, 1.0)],
            row_us: 1.0,
            kv_token_us: 1.0,
            pair_us: 0.1,
        }
    }

    /// How KV is laid out.
    pub fn kv(&self) -> KvGeometry {
        fake_geometry(self.block_tokens, self.kv_heads, 1)
    }

    /// What the ranks of a life hold: another life has another number of them.
    fn shares(&self, incarnation: u64) -> KvShares {
        let ranks = match self.ranks {
            0 => 1,
            ranks => 1 + (ranks + incarnation as u32) % RANKS_MAX,
        };
        KvShares::parallel(&self.kv(), ranks, 1)
    }
}

/// One life of a worker.
pub struct WorkerLife {
    /// Its connection.
    pub port: Arc<Port>,
    /// Its blocks.
    pub pool: BlockPool,
    gate: Rc<Gate>,
    is_up: watch::Sender<bool>,
    shutdown: Rc<Notify>,
    is_spared: Arc<AtomicBool>,
    task: JoinHandle<Result<Option<String>, WorkerError>>,
}

/// The world that processes share.
pub struct Ground {
    /// The bus.
    pub network: Arc<Network>,
    /// Where KV moves.
    pub fabric: Arc<KvFabric>,
    /// The cluster.
    pub cluster: Cluster,
    /// Lives so far.
    pub lives: Cell<u64>,
}

impl Ground {
    /// The model that all serve.
    pub fn model(&self) -> ModelFingerprint {
        ModelFingerprint::new("5a".repeat(32)).expect("64 hexadecimal digits")
    }

    fn next_life(&self) -> u64 {
        self.lives.set(self.lives.get() + 1);
        self.lives.get()
    }
}

impl WorkerLife {
    /// A worker comes up.
    pub async fn start(ground: &Ground, setup: &WorkerSetup, dice: &mut Dice) -> Self {
        let incarnation = ground.next_life();
        let port = ground.network.port(&setup.name);
        let (kv, shares) = (setup.kv(), setup.shares(incarnation));
        let memory = Arc::new(FakeCells::in_memory(&kv, &shares, setup.blocks));
        let agent = ground.fabric.join(
            &setup.name,
            incarnation,
            Arc::clone(&memory),
            Arc::clone(&port),
        );
        let fake = FakeConfig {
            kv,
            blocks: setup.blocks,
            vocab: VOCAB,
            tokens_max: TOKENS_MAX,
            step_sequences_max: setup.batch,
            step_tokens_max: setup.step_tokens,
            steps_in_flight: setup.steps_in_flight,
            ..FakeConfig::default()
        };
        let breaks = dice.chance(setup.breaks_per_mille);
        let is_spared = Arc::<AtomicBool>::default();
        let executor = Mortal {
            is_spared: Arc::clone(&is_spared),
            inner: FakeExecutor::with_memory(fake, memory),
            steps_left: breaks.then(|| dice.range(1..120)),
        };
        let config = SimulatedConfig {
            worker: WorkerId::new(setup.name.as_str()).expect("a plain name"),
            incarnation: Incarnation(incarnation),
            role: setup.role,
            cluster: ground.cluster.clone(),
            model: ModelInfo {
                name: "simulated".to_owned(),
                fingerprint: ground.model(),
                tokens_max: TOKENS_MAX,
                vocab: VOCAB,
            },
            shares,
            lease: setup.lease,
            drain: setup.drain,
            queue: setup.queue,
            prefix_cache: setup.prefix_cache,
            // It knows what steps cost, about, and sizes them by it.
            cost: (setup.knows_cost || incarnation.is_multiple_of(2)).then(|| setup.cost()),
            itl: Some(Duration::from_millis(match setup.itl_ms {
                0 => setup.step_max_ms,
                itl_ms => itl_ms,
            })),
            drafter: setup.drafts.then(|| {
                Box::new(FakeDrafter {
                    block_tokens: setup.block_tokens,
                    vocab: VOCAB,
                }) as Box<dyn Drafter>
            }),
            clock: || Instant::now().into_std(),
            // So few that even here most beats tell changes only, and some not all of them.
            peers_told: Some(1),
        };
        let (is_up, up) = watch::channel(true);
        let worker = SimulatedWorker::new(config, port.wire(), Box::new(executor), agent, up)
            .await
            .expect("a simulated bus takes subscriptions");
        let pool = worker.pool();
        let gate = Rc::<Gate>::default();
        let shutdown = Rc::new(Notify::new());
        let told = Rc::clone(&shutdown);
        let mut pace = dice.fork();
        let step_max_ms = setup.step_max_ms;
        let draw = move || Duration::from_millis(pace.range(1..step_max_ms + 1));
        let life = worker.run(
            async move { told.notified().await },
            StepTimes::Drawn(Box::new(draw)),
        );
        let task = spawn_local(Behind {
            gate: Rc::clone(&gate),
            inner: Box::pin(life),
        });
        Self {
            port,
            pool,
            gate,
            is_up,
            shutdown,
            is_spared,
            task,
        }
    }

    /// Its executor will not break any more.
    pub fn spare(&self) {
        self.is_spared.store(true, Relaxed);
    }

    /// `kill -9`.
    pub fn crash(&self) {
        self.port.set(Connectivity::Dead);
        self.task.abort();
    }

    /// `kill -STOP` and `kill -CONT`.
    pub fn freeze(&self, is_frozen: bool) {
        self.port.set(if is_frozen {
            Connectivity::Frozen
        } else {
            Connectivity::Up
        });
        self.gate.set(is_frozen);
    }

    /// Its connection to the bus breaks, or is there again.
    pub fn cut(&self, is_cut: bool) {
        self.port.set(if is_cut {
            Connectivity::Cut
        } else {
            Connectivity::Up
        });
        self.is_up.send_replace(!is_cut);
    }

    /// `kill -TERM`.
    pub fn drain(&self) {
        self.shutdown.notify_one();
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Its end: what was left in its books if it left by itself.
    pub async fn ended(self) -> Option<String> {
        self.port.set(Connectivity::Dead);
        match self.task.await {
            Ok(Ok(books)) => books,
            Ok(Err(error)) => {
                let error = error.to_string();
                (!error.contains(BROKEN)).then_some(error)
            }
            // It was killed.
            Err(error) if error.is_cancelled() => None,
            Err(error) => Some(format!("it panicked: {error}")),
        }
    }
}

/// One life of an API server.
pub struct ApiLife {
    /// Its connection.
    pub port: Arc<Port>,
    /// It.
    pub server: SimulatedServer,
}

impl ApiLife {
    /// An API server comes up; after a crash under the name that it had.
    pub async fn start(ground: &Ground, name: &str, promises: Promises) -> Self {
        let incarnation = Incarnation(ground.next_life());
        let port = ground.network.port(name);
        let name = ApiServerId::new(name).expect("a plain name");
        let cluster = ground.cluster.clone();
        let server = SimulatedServer::start(
            name,
            incarnation,
            cluster,
            port.wire(),
            (ground.model(), TOKENS_MAX),
            promises,
        )
        .await;
        let server = server.expect("a simulated bus takes subscriptions");
        Self { port, server }
    }

    /// Its connection to the bus breaks, or is there again.
    pub fn cut(&self, is_cut: bool) {
        self.port.set(if is_cut {
            Connectivity::Cut
        } else {
            Connectivity::Up
        });
        self.server.set_connected(!is_cut);
    }
}

/// A future that stands still while its gate is shut.
struct Behind<F> {
    gate: Rc<Gate>,
    inner: Pin<Box<F>>,
}

#[derive(Default)]
struct Gate {
    is_shut: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Gate {
    fn set(&self, is_shut: bool) {
        self.is_shut.set(is_shut);
        if !is_shut && let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl<F: Future> Future for Behind<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        if self.gate.is_shut.get() {
            *self.gate.waker.borrow_mut() = Some(context.waker().clone());
            return Poll::Pending;
        }
        self.inner.as_mut().poll(context)
    }
}

/// An executor that may break.
struct Mortal {
    inner: FakeExecutor,
    steps_left: Option<u64>,
    is_spared: Arc<AtomicBool>,
}

impl Executor for Mortal {
    fn info(&self) -> &ExecutorInfo {
        self.inner.info()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.inner.submit(plan)
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        self.inner.choose(masks)
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let spared = self.is_spared.load(Relaxed);
        if let Some(left) = self.steps_left.as_mut().filter(|_| !spared) {
            if *left == 0 {
                return Err(ExecutorError::failed(BROKEN));
            }
            *left -= 1;
        }
        self.inner.collect()
    }
}
