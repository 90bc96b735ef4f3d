//! A worker that lives as long as the plan.

use std::sync::Arc;
use std::time::Duration;

use baton_engine::ExecutorInfo;
use baton_protocol::{Incarnation, KvGeometry, KvShares, WorkerId, deadlines};
use baton_worker::{SimulatedConfig, SimulatedWorker, StepTimes, WorkerError};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::Instant;

use super::device::{Device, Steps, Work, clock};
use super::links::Link;
use super::{Ground, PlannedWorker, VOCAB};

/// A running worker.
pub struct Worker {
    _is_up: watch::Sender<bool>,
    task: JoinHandle<Result<Option<String>, WorkerError>>,
    steps: Steps,
}

impl Worker {
    /// The `number`th worker of a deployment comes up.
    pub async fn start(
        ground: &Ground,
        planned: &PlannedWorker,
        kv: &KvGeometry,
        number: u64,
    ) -> Result<Self, String> {
        let name = format!("{}-{number}", planned.role.label());
        let steps = Steps::default();
        let device = Device {
            info: ExecutorInfo {
                device: "planned".to_owned(),
                kv: kv.clone(),
                blocks: planned.blocks,
                vocab: VOCAB,
                tokens_max: ground.model.tokens_max,
                step_sequences_max: planned.batch,
                step_tokens_max: planned.step_tokens,
                steps_in_flight: planned.steps_in_flight,
                run_max: 1,
            },
            cost: planned.cost.clone(),
            steps: steps.clone(),
            busy_until: Instant::now(),
        };
        let config = SimulatedConfig {
            worker: WorkerId::new(name.as_str()).map_err(|error| error.to_string())?,
            incarnation: Incarnation(number),
            role: planned.role,
            cluster: ground.cluster.clone(),
            model: ground.model.clone(),
            shares: KvShares::parallel(kv, 1, 1),
            lease: Duration::from_millis(deadlines::LEASE_MS.into()),
            drain: Duration::ZERO,
            queue: planned.queue,
            prefix_cache: true,
            cost: Some(planned.cost.clone()),
            itl: planned.itl,
            drafter: None,
            clock,
            peers_told: None,
        };
        let link = Arc::new(Link {
            links: Arc::clone(&ground.links),
            own: number,
        });
        let wire = ground.network.port(&name).wire();
        let (is_up, up) = watch::channel(true);
        let worker = SimulatedWorker::new(config, wire, Box::new(device), link, up).await;
        let worker = worker.map_err(|error| error.to_string())?;
        let own = steps.clone();
        let times = StepTimes::Device(Box::new(move || own.left()));
        let task = spawn_local(worker.run(std::future::pending(), times));
        Ok(Self {
            _is_up: is_up,
            task,
            steps,
        })
    }

    /// What it did so far.
    pub fn work(&self) -> Work {
        self.steps.work()
    }

    /// Whether it has ended, which is a defect.
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }
}
