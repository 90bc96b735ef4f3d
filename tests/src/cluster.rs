//! A cluster of real processes.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use baton_protocol::subjects::Cluster as Subjects;
use baton_protocol::{Beat, Hello, Load, PROTOCOL_VERSION, PeerState, Role, WorkerState};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::Api;
use crate::fixture::{baton, model_dir};
use crate::nats::Nats;
use crate::process::{Process, Signal};
use crate::tap::Tap;
use crate::trace::Trace;
use crate::turn::Turn;
use crate::wait::{PATIENCE, eventually};

/// Name of the cluster of every test: each has a nats-server of its own.
const NAME: &str = "test";

/// Name of the API server where it has to be known beforehand; else it is a new one at each start.
const API_SERVER: &str = "api-0";

/// What a cluster is made of. The defaults are the cheapest that serve: one thread, little KV.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Context workers, `context-0`, `context-1`, …
    pub context: usize,
    /// Decode workers, `decode-0`, …
    pub decode: usize,
    /// Workers of role `both`, `both-0`, …
    pub both: usize,
    /// `cpu` or `fake`.
    pub device: &'static str,
    /// The model directory of the workers; the API server takes [`model_dir`] in any case.
    pub model: &'static Path,
    /// That of decode workers, if it is another.
    pub decode_model: Option<&'static Path>,
    /// Token budget of a step.
    pub step_tokens: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Jobs that may wait at a worker.
    pub queue: usize,
    /// Megabytes of a worker's KV arena. A block of SmolLM2 takes 0.7.
    pub kv_mib: usize,
    /// UCX transports; `None` leaves the choice to UCX.
    pub ucx_tls: Option<&'static str>,
    /// Lines of nats-server's configuration that make users, named like the processes, with their names as passwords.
    pub users: Option<String>,
    /// More flags of every worker.
    pub worker_args: Vec<String>,
    /// More flags of the API server.
    pub api_args: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            context: 1,
            decode: 1,
            both: 0,
            device: "cpu",
            model: model_dir(),
            decode_model: None,
            step_tokens: 256,
            batch: 32,
            queue: 256,
            kv_mib: 192,
            ucx_tls: None,
            users: None,
            worker_args: Vec::new(),
            api_args: Vec::new(),
        }
    }
}

impl Setup {
    /// The default of `context` context workers and `decode` decode workers.
    pub fn split(context: usize, decode: usize) -> Self {
        Self {
            context,
            decode,
            ..Self::default()
        }
    }

    /// One worker that does both.
    pub fn unsplit() -> Self {
        Self {
            context: 0,
            decode: 0,
            both: 1,
            ..Self::default()
        }
    }

    fn roles(&self) -> Vec<(Role, usize)> {
        vec![
            (Role::Context, self.context),
            (Role::Decode, self.decode),
            (Role::Both, self.both),
        ]
    }
}

/// One worker process.
pub struct Worker {
    /// Its name in the cluster.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// The process.
    pub process: Process,
}

/// A running cluster: nats-server, one API server, workers. Everything is killed when the value is dropped.
pub struct Cluster {
    /// Listens to the bus.
    pub tap: Tap,
    /// The API server's client.
    pub api: Api,
    /// The API server.
    pub api_server: Process,
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
        let nats = Nats::start(dir.path(), setup.users.as_deref().unwrap_or_default()).await;
        let tap = Tap::join(&nats.uri()).await;
        let port = free_port();
        let api_server = Process::start(
            "api-server",
            &api_server_command(&setup, &nats, port),
            dir.path(),
        );
        let mut cluster = Self {
            tap,
            api: Api::new(port),
            api_server,
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

    fn launch(&mut self, name: &str, role: Role, setup: &Setup) {
        let command = worker_command(setup, &self.nats, name, role);
        let process = Process::start(name, &command, self.dir.path());
        self.workers.push(Worker {
            name: name.to_owned(),
            role,
            process,
        });
    }

    /// Starts the API server again on its port.
    pub fn restart_api_server(&mut self) {
        self.api_server.kill();
        let port = self.api.base().rsplit(':').next().expect("a port");
        let port = port.parse().expect("a port");
        let command = api_server_command(&self.setup, &self.nats, port);
        self.api_server = Process::start("api-server", &command, self.dir.path());
    }

    /// Waits until every worker serves, every decode worker can pull from every context worker, and the API server
    /// knows.
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
            let health = self.api.look("/health").await?;
            if health.status != 200 {
                return Err(format!("/health: {} {}", health.status, health.body));
            }
            let known = self.known_workers().await?;
            match self
                .workers
                .iter()
                .find(|worker| !known.contains_key(&worker.name))
            {
                Some(worker) => Err(format!("/cluster does not name {}", worker.name)),
                None => Ok(()),
            }
        })
        .await;
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

    /// Names of processes that have ended.
    fn dead(&mut self) -> Vec<String> {
        let mut dead = Vec::new();
        for worker in &mut self.workers {
            if let Some(status) = worker.process.ended() {
                dead.push(format!("{}: {status}", worker.name));
            }
        }
        if let Some(status) = self.api_server.ended() {
            dead.push(format!("api-server: {status}"));
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

    /// The workers that `/cluster` shows, by name.
    ///
    /// # Errors
    /// If the API server gives no answer.
    pub async fn known_workers(&self) -> Result<BTreeMap<String, Value>, String> {
        let answer = self.api.look("/cluster").await?;
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

    /// Where logs and other files of the cluster lie.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Arguments of `baton` that join this cluster.
    pub fn join_args(&self) -> [String; 4] {
        join_args(&self.setup, &self.nats, "another")
    }
}

/// A port that nobody listened on a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}

fn join_args(setup: &Setup, nats: &Nats, name: &str) -> [String; 4] {
    let uri = match setup.users {
        Some(_) => nats.uri_of(name),
        None => nats.uri(),
    };
    let flag = |name: &str| format!("--{name}");
    [
        flag("request-plane-uri"),
        uri,
        flag("cluster"),
        NAME.to_owned(),
    ]
}

fn api_server_command(setup: &Setup, nats: &Nats, port: u16) -> Command {
    let mut command = Command::new(baton());
    command
        .arg("api-server")
        .args(join_args(setup, nats, API_SERVER))
        .arg("--tokenizer")
        .arg(model_dir())
        .args(["--api-server-host", "127.0.0.1"])
        .args(["--api-server-port", &port.to_string()])
        .args(&setup.api_args);
    if setup.users.is_some() {
        command.args(["--api-server-name", API_SERVER]);
    }
    command
}

fn worker_command(setup: &Setup, nats: &Nats, name: &str, role: Role) -> Command {
    let mut command = Command::new(baton());
    command
        .args(["worker", "--role", role.label(), "--worker-name", name])
        .args(join_args(setup, nats, name))
        .arg("--model")
        .arg(match role {
            Role::Decode => setup.decode_model.unwrap_or(setup.model),
            Role::Context | Role::Both => setup.model,
        })
        .args(["--device", setup.device])
        .args(["--threads", "1"])
        .args(["--kv-mib", &setup.kv_mib.to_string()])
        .args(["--step-tokens", &setup.step_tokens.to_string()])
        .args(["--batch", &setup.batch.to_string()])
        .args(["--queue", &setup.queue.to_string()])
        .args(&setup.worker_args);
    if let Some(tls) = setup.ucx_tls {
        command.args(["--ucx-tls", tls]);
    }
    command
}
