//! A cluster of real processes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_protocol::subjects::Cluster as Subjects;
use baton_protocol::{Beat, Hello, Load, PROTOCOL_VERSION, PeerState, Role, WorkerState};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::Api;
use crate::nats::Nats;
use crate::ports::free_port;
use crate::process::{Process, Signal};
use crate::setup::{NAME, Setup, api_server_command, join_args, worker_command};
use crate::tap::Tap;
use crate::trace::Trace;
use crate::turn::Turn;
use crate::wait::{PATIENCE, eventually};

/// One worker process.
pub struct Worker {
    /// Its name in the cluster.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// The process.
    pub process: Process,
}

/// One API server process.
pub struct ApiServer {
    /// Its client.
    pub api: Api,
    /// The process.
    pub process: Process,
    name: String,
    port: u16,
    args: Vec<String>,
}

/// A running cluster: nats-server, API servers, workers. Everything is killed when the value is dropped.
pub struct Cluster {
    /// Listens to the bus.
    pub tap: Tap,
    /// The first API server's client.
    pub api: Api,
    /// The API servers: the first, and those that were added.
    pub api_servers: Vec<ApiServer>,
    workers: Vec<Worker>,
    /// The bus.
    pub nats: Nats,
    setup: Setup,
    subjects: Subjects,
    started: BTreeMap<&'static str, usize>,
    dir: TempDir,
}

impl Cluster {
    /// Starts a cluster and waits until every worker serves and every decode worker can pull from every context worker.
    /// `_turn` shows that no other test's cluster runs.
    pub async fn start(_turn: &Turn, setup: Setup) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        let users = setup.users.as_deref().unwrap_or_default();
        let nats = Nats::start_at(setup.bus_address(), dir.path(), users).await;
        let tap = Tap::join(&nats.uri()).await;
        let first = launch_api_server(&setup, &nats, dir.path(), 0, setup.api_args.clone());
        let mut cluster = Self {
            tap,
            api: first.api.clone(),
            api_servers: vec![first],
            workers: Vec::new(),
            nats,
            subjects: Subjects::new(NAME).expect("a plain name"),
            started: BTreeMap::new(),
            dir,
            setup: setup.clone(),
        };
        for (role, count) in setup.roles() {
            for _ in 0..count {
                cluster.add(role);
            }
        }
        cluster.ready().await;
        cluster
    }

    /// Starts one more worker, without waiting for it, and gives its name.
    pub fn add(&mut self, role: Role) -> String {
        let setup = self.setup.clone();
        self.add_with(role, &setup)
    }

    /// Starts one more worker with other settings than the cluster's.
    pub fn add_with(&mut self, role: Role, setup: &Setup) -> String {
        let number = self.started.entry(role.label()).or_default();
        let name = format!("{}-{number}", role.label());
        *number += 1;
        self.launch(&name, role, setup);
        name
    }

    /// Starts a worker that was killed or taken out again under its name, as a new incarnation.
    pub fn restart(&mut self, name: &str, role: Role) {
        let setup = self.setup.clone();
        self.launch(name, role, &setup);
    }

    fn launch(&mut self, name: &str, role: Role, setup: &Setup) {
        let command = worker_command(setup, &self.nats, name, role);
        let process = Process::start(name, &command, self.dir.path());
        self.workers.push(Worker {
            name: name.to_owned(),
            role,
            process,
        });
    }

    /// Starts one more API server over the same workers, with flags of its own, and gives its client. Nobody waits
    /// for it: [`Self::ready`] does.
    pub fn add_api_server(&mut self, args: &[&str]) -> Api {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let number = self.api_servers.len();
        let added = launch_api_server(&self.setup, &self.nats, self.dir.path(), number, args);
        let api = added.api.clone();
        self.api_servers.push(added);
        api
    }

    /// Starts the API server of this number again on its port.
    pub fn restart_api_server(&mut self, number: usize) {
        let server = &mut self.api_servers[number];
        server.process.kill();
        let command = api_server_command(
            &self.setup,
            &self.nats,
            &server.name,
            server.port,
            &server.args,
        );
        server.process = Process::start(&server.name, &command, self.dir.path());
    }

    /// Waits until every worker serves, every decode worker can pull from every context worker, and every API
    /// server knows.
    pub async fn ready(&mut self) {
        let deadline = 2 * PATIENCE;
        eventually("the cluster to be ready", deadline, async || {
            let dead = self.dead();
            assert!(dead.is_empty(), "ended at start: {dead:?}");
            let beats = self.beats().await;
            for worker in &self.workers {
                let beat = beats
                    .get(&worker.name)
                    .ok_or_else(|| format!("no beat of {}", worker.name))?;
                self.serves(worker, beat)?;
            }
            for server in &self.api_servers {
                self.knows_all(&server.api).await?;
            }
            Ok(())
        })
        .await;
    }

    async fn knows_all(&self, api: &Api) -> Result<(), String> {
        let health = api.look("/health").await?;
        if health.status != 200 {
            return Err(format!("/health: {} {}", health.status, health.body));
        }
        let known = known_workers(api).await?;
        match self
            .workers
            .iter()
            .find(|worker| !known.contains_key(&worker.name))
        {
            Some(worker) => Err(format!("/cluster does not name {}", worker.name)),
            None => Ok(()),
        }
    }

    fn serves(&self, worker: &Worker, beat: &Beat) -> Result<(), String> {
        if beat.state != WorkerState::Serving {
            return Err(format!("{} is {:?}", worker.name, beat.state));
        }
        if worker.role != Role::Decode {
            return Ok(());
        }
        let sources = self.workers.iter().filter(|other| other.role.prefills());
        for source in sources {
            let ready = beat
                .peers
                .iter()
                .any(|peer| peer.worker.as_str() == source.name && peer.state == PeerState::Ready);
            if !ready {
                return Err(format!(
                    "{} cannot pull from {}: {:?}",
                    worker.name, source.name, beat.peers
                ));
            }
        }
        Ok(())
    }

    /// Names of processes that have ended, and how.
    pub fn dead(&mut self) -> Vec<String> {
        let mut dead = Vec::new();
        for worker in &mut self.workers {
            if let Some(status) = worker.process.ended() {
                dead.push(format!("{}: {status}", worker.name));
            }
        }
        for server in &mut self.api_servers {
            if let Some(status) = server.process.ended() {
                dead.push(format!("{}: {status}", server.name));
            }
        }
        dead
    }

    /// The workers, in the order in which they were started.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// A worker by its name.
    pub fn worker(&mut self, name: &str) -> &mut Worker {
        self.workers
            .iter_mut()
            .find(|worker| worker.name == name)
            .unwrap_or_else(|| panic!("no worker {name}"))
    }

    /// Sends a signal to a worker.
    pub fn signal(&mut self, name: &str, signal: Signal) {
        self.worker(name).process.signal(signal);
    }

    /// kill -9, and forgets it.
    pub fn kill(&mut self, name: &str) {
        self.worker(name).process.kill();
        self.workers.retain(|worker| worker.name != name);
    }

    /// Takes a worker out, alive.
    pub fn take(&mut self, name: &str) -> Worker {
        let place = self
            .workers
            .iter()
            .position(|worker| worker.name == name)
            .unwrap_or_else(|| panic!("no worker {name}"));
        self.workers.remove(place)
    }

    /// Asks every worker to beat now and gives the fresh beats that came within a second.
    pub async fn beats(&self) -> BTreeMap<String, Beat> {
        let from = self.tap.now();
        let hello = Hello {
            v: PROTOCOL_VERSION,
            from: "tests".to_owned(),
        };
        let hello = serde_json::to_vec(&hello).expect("a message");
        // while the bus is down there is nobody to hear it
        let _ = self
            .tap
            .client()
            .publish(self.subjects.hello(), hello.into())
            .await;
        let _ = self.tap.client().flush().await;
        let fresh = || -> BTreeMap<String, Beat> {
            let beats = self.tap.beats(from).into_iter();
            beats.map(|beat| (beat.worker.to_string(), beat)).collect()
        };
        let all = async {
            while self
                .workers
                .iter()
                .any(|worker| !fresh().contains_key(&worker.name))
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), all).await;
        fresh()
    }

    /// Waits until no worker holds anything: no sequence, no lease, no pull, no block.
    pub async fn drained(&self, deadline: Duration) {
        eventually("all pools to be empty", deadline, async || {
            let beats = self.beats().await;
            for worker in &self.workers {
                let beat = beats
                    .get(&worker.name)
                    .ok_or_else(|| format!("no beat of {}", worker.name))?;
                let held = Load {
                    blocks_cached: 0,
                    ..beat.load
                };
                if held != Load::default() {
                    return Err(format!("{} holds {held:?}", worker.name));
                }
            }
            Ok(())
        })
        .await;
        // what the API server shows to `baton status` says the same, a beat later
        eventually("/cluster to show empty pools", deadline, async || {
            let known = self.known_workers().await?;
            for worker in &self.workers {
                let shown = known
                    .get(&worker.name)
                    .ok_or_else(|| format!("/cluster does not name {}", worker.name))?;
                let held = ["running", "waiting", "leased", "pulling", "blocks_used"]
                    .into_iter()
                    .filter(|key| shown["load"][*key] != 0)
                    .collect::<Vec<_>>();
                if !held.is_empty() {
                    return Err(format!("{}: {held:?} in {shown}", worker.name));
                }
            }
            Ok(())
        })
        .await;
    }

    /// The workers that the first API server's `/cluster` shows, by name.
    ///
    /// # Errors
    /// If the API server gives no answer.
    pub async fn known_workers(&self) -> Result<BTreeMap<String, Value>, String> {
        known_workers(&self.api).await
    }

    /// Name of the model that it serves.
    pub async fn model(&self) -> String {
        let models = self.api.look("/v1/models").await.expect("/v1/models").ok();
        models["data"][0]["id"]
            .as_str()
            .expect("a model's id")
            .to_owned()
    }

    /// Asks for the capital of France; the answer is right, and its KV came from another worker.
    pub async fn tells_the_capital(&self) {
        let from = self.tap.now();
        let question = json!({"model": self.model().await, "max_tokens": 40, "temperature": 0, "messages":
                              [{"role": "user", "content": "What is the capital of France?"}]});
        let answer = self.api.chat(&question).await;
        let text = answer["choices"][0]["message"]["content"]
            .as_str()
            .expect("text");
        assert!(text.contains("Paris"), "{text}");
        let trace = Trace::only(&self.tap, from).await;
        assert!(trace.pulled[0] > 0, "nothing was pulled");
    }

    /// Keeps the cluster's files when it is gone, and says where.
    pub fn keep_files(&mut self) -> PathBuf {
        self.dir.disable_cleanup(true);
        self.dir.path().to_owned()
    }

    /// Where logs and other files of the cluster lie.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Arguments of `baton` that join this cluster.
    pub fn join_args(&self) -> [String; 4] {
        join_args(&self.setup, &self.nats, "another")
    }
}

async fn known_workers(api: &Api) -> Result<BTreeMap<String, Value>, String> {
    let answer = api.look("/cluster").await?;
    if answer.status != 200 {
        return Err(format!("/cluster: {} {}", answer.status, answer.body));
    }
    let workers = answer.body["workers"]
        .as_array()
        .ok_or_else(|| format!("/cluster has no workers: {}", answer.body))?;
    Ok(workers
        .iter()
        .filter_map(|worker| Some((worker["worker"].as_str()?.to_owned(), worker.clone())))
        .collect())
}

fn launch_api_server(
    setup: &Setup,
    nats: &Nats,
    dir: &Path,
    number: usize,
    args: Vec<String>,
) -> ApiServer {
    let name = format!("api-{number}");
    let port = free_port();
    let command = api_server_command(setup, nats, &name, port, &args);
    ApiServer {
        api: Api::new(port),
        process: Process::start(&name, &command, dir),
        name,
        port,
        args,
    }
}
