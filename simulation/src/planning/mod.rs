//! A cluster of healthy workers under a load that is said: who gets which service level. For `baton plan`.
//!
//! What runs is what runs under faults: the API server's driver and router, the workers' desks, leases and pulls, and the engine's scheduler.
//! The device (`device`) takes as long for a step as its cost says and computes nothing, links (`links`) have a rate, nothing is lost and
//! nobody dies. Messages take no time of their own: the runtime's timers know whole milliseconds, so what waits for a time that is none goes
//! on up to a millisecond late, which is about what a message takes. The device's own times are exact to the nanosecond.
//!
//! The same load gives the same answers: nothing is drawn but prompts, by the seed.

mod device;
mod ear;
mod links;
mod worker;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use baton_api_server::{Class, Promises, SimulatedServer};
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    ApiServerId, CacheSalt, Generation, Incarnation, KvGeometry, ModelFingerprint, ModelInfo,
    RequestId, Role, Sampling, StepCost,
};
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep, sleep_until};

use self::ear::Ear;
use self::links::Links;
use self::worker::Worker;
use crate::dice::Dice;
use crate::network::Network;
use crate::trace::Trace;
use crate::weather::Weather;

pub use self::device::Work;
pub use self::ear::{Answer, Ended};

/// Token ids are below this.
const VOCAB: u32 = 32_000;

/// Workers know each other, and the API server knows them, within this time.
const UP_WITHIN: Duration = Duration::from_secs(30);

/// By then the API server has heard two beats of everybody.
const BEATS: Duration = Duration::from_millis(2_500);

/// How often it is looked whether something has come about.
const LOOK: Duration = Duration::from_millis(100);

/// A cluster to be planned.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// Its workers: one at least that runs prompts, one at least that generates.
    pub workers: Vec<PlannedWorker>,
    /// How the model's KV is laid out, the same on all of them.
    pub kv: KvGeometry,
    /// Longest sequence of the model, in tokens.
    pub tokens_max: u32,
    /// What requests are promised, and what becomes of those for which it cannot be kept.
    pub promises: Promises,
    /// What a worker's link moves in each direction, in bytes a second. Above 0; infinite where KV moves in no time.
    pub link_bytes_per_second: f64,
    /// A request that has not ended after this is given up.
    pub budget: Duration,
}

/// One worker of it.
#[derive(Clone, Debug)]
pub struct PlannedWorker {
    /// What it does.
    pub role: Role,
    /// What its steps cost. It has been [checked](StepCost::check).
    pub cost: StepCost,
    /// Mean time between tokens that its steps are kept to.
    pub itl: Option<Duration>,
    /// Most tokens of a step.
    pub step_tokens: usize,
    /// Most sequences of a step.
    pub batch: usize,
    /// Steps that may be under way: 2 where a device computes while the host plans, as GPUs do, 1 where they are the same.
    pub steps_in_flight: usize,
    /// Blocks of its arena.
    pub blocks: u32,
    /// Jobs that may wait.
    pub queue: usize,
}

/// One request of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// From the beginning.
    pub at: Duration,
    /// Tokens of its prompt, which no other begins like; at least 1.
    pub prompt_tokens: usize,
    /// Tokens of its answer, exactly; at least 1.
    pub max_tokens: u32,
}

/// What comes of a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// What each request hears, in order of time.
    pub answers: Vec<Answer>,
    /// What each worker did, in the order of the deployment.
    pub work: Vec<Work>,
}

/// What comes of a load, in order of time, on this deployment. Blocks for seconds.
///
/// # Errors
/// Why the deployment does not come up or stay up, as a sentence.
pub fn predict(deployment: &Deployment, load: &[Arrival], seed: u64) -> Result<Prediction, String> {
    // Whoever would log here logs the times of another world.
    let _quiet = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .map_err(|error| format!("the runtime does not start: {error}"))?;
    LocalSet::new().block_on(&runtime, async {
        let cluster = Planned::start(deployment).await?;
        let answers = cluster.answer(load, &mut Dice::new(seed)).await?;
        let work = cluster.workers.iter().map(Worker::work).collect();
        Ok(Prediction { answers, work })
    })
}

/// A deployment that is up.
struct Planned<'a> {
    deployment: &'a Deployment,
    server: SimulatedServer,
    workers: Vec<Worker>,
}

/// What all workers and the API server of a deployment share.
struct Ground {
    network: Arc<Network>,
    links: Arc<Links>,
    cluster: Cluster,
    model: ModelInfo,
}

impl<'a> Planned<'a> {
    async fn start(deployment: &'a Deployment) -> Result<Self, String> {
        let network = Network::new(Weather::none(), Dice::new(0), Trace::new(false), None);
        tokio::spawn(network.clone().carry());
        let fingerprint = ModelFingerprint::new("5a".repeat(32)).expect("64 hexadecimal digits");
        let ground = Ground {
            network,
            links: Links::new(deployment.link_bytes_per_second),
            cluster: Cluster::new("plan").expect("a plain name"),
            model: ModelInfo {
                name: "planned".to_owned(),
                fingerprint: fingerprint.clone(),
                tokens_max: deployment.tokens_max,
                vocab: VOCAB,
            },
        };
        let mut workers = Vec::new();
        for (planned, number) in deployment.workers.iter().zip(1..) {
            workers.push(Worker::start(&ground, planned, &deployment.kv, number).await?);
        }
        let server = SimulatedServer::start(
            ApiServerId::new("api").expect("a plain name"),
            Incarnation(u64::MAX),
            ground.cluster.clone(),
            ground.network.port("api").wire(),
            (fingerprint, deployment.tokens_max),
            deployment.promises,
        );
        let server = server.await.map_err(|error| error.to_string())?;
        let planned = Self {
            deployment,
            server,
            workers,
        };
        planned.come_up(&ground.links).await?;
        Ok(planned)
    }

    /// Waits until every worker that generates can read from every other that runs prompts, and all is known.
    async fn come_up(&self, links: &Links) -> Result<(), String> {
        let who = |does: fn(Role) -> bool| -> BTreeSet<usize> {
            let all = self.deployment.workers.iter().enumerate();
            all.filter(|(_, worker)| does(worker.role))
                .map(|(at, _)| at)
                .collect()
        };
        let (contexts, decoders) = (who(Role::prefills), who(Role::decodes));
        let pairs = contexts.len() * decoders.len() - contexts.intersection(&decoders).count();
        let begun = Instant::now();
        while links.connections() < pairs || !self.server.faults().is_empty() {
            if begun.elapsed() > UP_WITHIN {
                let (connected, faults) = (links.connections(), self.server.faults());
                return Err(format!(
                    "the planned cluster does not come up: {connected} of {pairs} connections, {faults:?}"
                ));
            }
            sleep(LOOK).await;
        }
        sleep(BEATS).await;
        Ok(())
    }

    async fn answer(&self, load: &[Arrival], dice: &mut Dice) -> Result<Vec<Answer>, String> {
        let begun = Instant::now();
        let answers: Vec<_> = load
            .iter()
            .map(|_| Rc::<RefCell<Answer>>::default())
            .collect();
        // Held until they are over: who drops one lets it go.
        let mut generations = Vec::with_capacity(load.len());
        for ((arrival, answer), number) in load.iter().zip(&answers).zip(0_u128..) {
            sleep_until(begun + arrival.at).await;
            let prompt: Vec<u32> = (0..arrival.prompt_tokens)
                .map(|_| dice.range(0..VOCAB.into()) as u32)
                .collect();
            let generation = Generation {
                sampling: Sampling::default(),
                stop_token_ids: Vec::new(),
                min_tokens: 0,
                max_tokens: arrival.max_tokens,
                grammar: None,
                token_rules: None,
            };
            generations.push(self.server.generate(
                RequestId(number),
                (CacheSalt::default(), &prompt),
                generation,
                (Class::default(), None),
                self.deployment.budget,
                Ear::new(Rc::clone(answer)),
            ));
        }
        let is_open = |answer: &Rc<RefCell<Answer>>| answer.borrow().ended.is_none();
        // Drivers end each of them by its budget.
        let over = Instant::now() + self.deployment.budget + UP_WITHIN;
        while answers.iter().any(is_open) && Instant::now() < over {
            if let Some(at) = self.workers.iter().position(Worker::has_ended) {
                let role = self.deployment.workers[at].role.label();
                return Err(format!(
                    "worker {} ({role}) of the planned cluster has ended: a defect",
                    at + 1
                ));
            }
            sleep(LOOK).await;
        }
        Ok(answers
            .iter()
            .map(|answer| answer.borrow().clone())
            .collect())
    }
}

#[cfg(test)]
mod tests;
