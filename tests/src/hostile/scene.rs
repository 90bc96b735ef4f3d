//! The cluster that is attacked.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_protocol::subjects::Cluster as Subjects;
use baton_protocol::{Beat, Role};
use serde_json::Value;

use super::target::Target;
use crate::cluster::Cluster;
use crate::fixture::long_model_dir;
use crate::metrics::Metrics;
use crate::process::Process;
use crate::setup::{NAME, Setup};
use crate::turn::Turn;

/// Memory of its own that any process may have: a fault of this kind must not end the machine that it is looked for on.
const DATA_BYTES_MAX: usize = 3 << 30;

/// Messages of the bus that are longer are not kept by this process: hostile ones, and frames of hostile requests.
const KEPT_BYTES_MAX: usize = 16 << 10;

/// How often a state that sends no event is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The cluster that is attacked.
pub struct Scene<'a> {
    /// Shows that no other cluster runs.
    pub turn: &'a Turn,
    /// Two context and two decode workers on the fake device, and an API server.
    pub cluster: Cluster,
    /// Where it can be reached.
    pub target: Target,
}

/// What every cluster of the suite is made of.
pub fn setup() -> Setup {
    Setup {
        device: "fake:500",
        model: long_model_dir(),
        tokenizer: long_model_dir(),
        batch: 128,
        kv_mib: 32,
        prefix: limited(),
        api_args: vec!["--api-server-name".to_owned(), "api-0".to_owned()],
        ..Setup::split(2, 2)
    }
}

/// Starts a process whose own memory is limited.
pub fn limited() -> Vec<String> {
    let limit = format!("--data={DATA_BYTES_MAX}");
    vec!["prlimit".to_owned(), limit, "--".to_owned()]
}

impl<'a> Scene<'a> {
    /// Starts it.
    pub async fn start(turn: &'a Turn) -> Self {
        Self::start_with(turn, setup()).await
    }

    /// The same of another setup.
    pub async fn start_with(turn: &'a Turn, setup: Setup) -> Self {
        let cluster = Cluster::start(turn, setup).await;
        cluster.tap.keep_small(KEPT_BYTES_MAX);
        let target = Target {
            base: cluster.api.base().to_owned(),
            bus: cluster.nats.uri(),
            model: cluster.model().await,
        };
        Self {
            turn,
            cluster,
            target,
        }
    }

    /// All processes of Baton's.
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        let workers = self.cluster.workers().iter().map(|worker| &worker.process);
        let servers = self.cluster.api_servers.iter();
        workers.chain(servers.map(|server| &server.process))
    }

    /// The API server's process.
    pub fn api_server(&self) -> &Process {
        &self.cluster.api_servers[0].process
    }

    /// Subjects of the bus.
    pub fn subjects(&self) -> Subjects {
        Subjects::new(NAME).expect("a plain name")
    }

    /// A connection to the bus of somebody who is nobody.
    pub async fn stranger(&self) -> async_nats::Client {
        let client = async_nats::connect(&self.target.bus).await;
        client.unwrap_or_else(|e| panic!("cannot join {}: {e}", self.target.bus))
    }

    /// The last beat of a worker of this role.
    pub async fn beat(&self, role: Role) -> Beat {
        let beats: BTreeMap<_, _> = self.cluster.beats().await;
        let beat = beats.into_values().find(|beat| beat.role == role);
        beat.unwrap_or_else(|| panic!("no beat of a {} worker", role.label()))
    }

    /// The API server's metrics.
    pub async fn metrics(&self) -> Metrics {
        self.cluster.api.metrics().await
    }

    /// Generations in flight at the API server.
    pub async fn in_flight(&self) -> Result<u64, String> {
        let (_, body) = self.target.look("/health").await?;
        let health: Value = serde_json::from_str(&body).map_err(|e| format!("/health: {e}"))?;
        let count = health["in_flight"].as_u64();
        count.ok_or_else(|| format!("/health has no in_flight: {health}"))
    }

    /// Waits until no more than this are in flight; what is wrong if there are after `within`.
    pub async fn few_in_flight(&self, most: u64, within: Duration) -> Option<String> {
        let begun = Instant::now();
        loop {
            let seen = self.in_flight().await;
            if matches!(seen, Ok(count) if count <= most) {
                return None;
            }
            if begun.elapsed() > within {
                return Some(format!(
                    "in flight {within:?} after the last left: {seen:?}"
                ));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
