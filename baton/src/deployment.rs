//! A whole deployment as one value: the model, NATS, API servers, and groups of workers.
//!
//! `baton up` makes it of its flags or reads it from a file (`--config`), and starts it; `baton render` writes it down for Slurm,
//! Kubernetes and Compose. A field of the file that is a flag of `baton worker`, `baton api-server` or `baton up` has the flag's name
//! and its meaning, so that [`args`] is all that stands between the two. `docs/deployment.md` lists the fields.

mod args;
mod check;
mod devices;
mod file;
mod filled;
mod one_host;
mod one_or_more;

use baton_protocol::{Role, WorkerId};
use serde::{Deserialize, Serialize};

pub use self::check::Refusal;
pub use self::devices::Devices;
pub use self::file::to_yaml;
pub use self::filled::{api_server_drain_s, worker_drain_s};
pub use self::one_host::deal;
use crate::tuning::TuningArgs;

/// Everything that belongs to one cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Deployment {
    /// What is served, as `baton up --model` takes it.
    pub model: String,
    /// Name of the cluster.
    #[serde(default = "cluster_default")]
    pub cluster: String,
    /// Put before workers' names.
    #[serde(default)]
    pub worker_name: Option<String>,
    /// The bus.
    #[serde(default)]
    pub nats: Nats,
    /// Where traces of requests go.
    #[serde(default)]
    pub traces: Traces,
    /// What takes requests.
    #[serde(default)]
    pub api_server: ApiServers,
    /// Groups of workers that compute prompts.
    #[serde(default)]
    pub context: Vec<WorkerGroup>,
    /// Groups of workers that generate.
    #[serde(default)]
    pub decode: Vec<WorkerGroup>,
    /// Groups of workers that do both.
    #[serde(default)]
    pub both: Vec<WorkerGroup>,
    /// What containers are made of; for `baton render` alone.
    #[serde(default)]
    pub containers: Containers,
    /// The Slurm job; for `baton render` alone.
    #[serde(default)]
    pub slurm: Slurm,
}

fn cluster_default() -> String {
    "baton".to_owned()
}

/// The NATS server: one of the deployment's own, or one that runs already.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Nats {
    /// Where it is.
    pub request_plane_uri: Option<String>,
    /// Start one though an address is given, listening there.
    pub initialize_request_plane: bool,
    /// The program.
    pub nats_server: Option<String>,
    /// File with credentials.
    pub request_plane_credentials: Option<String>,
    /// File with the seed of an NKey.
    pub request_plane_nkey: Option<String>,
    /// File with certificates.
    pub request_plane_ca: Option<String>,
    /// File with the processes' certificate.
    pub request_plane_certificate: Option<String>,
    /// File with its key.
    pub request_plane_certificate_key: Option<String>,
    /// Seconds that a process waits for it at its start.
    pub request_plane_wait_s: Option<u64>,
}

impl Nats {
    /// Whether the deployment starts one.
    pub fn is_own(&self) -> bool {
        self.initialize_request_plane || self.request_plane_uri.is_none()
    }

    /// The fields that are flags of `baton up` alone, and not of the processes it starts.
    pub const NOT_PASSED_ON: [&str; 3] = [
        "request-plane-uri",
        "initialize-request-plane",
        "nats-server",
    ];
}

/// Traces of requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Traces {
    /// The collector that all processes send to.
    pub otlp_endpoint: Option<String>,
}

/// The API servers, all alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ApiServers {
    /// How many.
    pub count: usize,
    /// Address to listen on.
    pub api_server_host: String,
    /// Port of the first; further ones on this host take those after it.
    pub api_server_port: Option<u16>,
    /// Names that clients ask for: one, or a list.
    #[serde(deserialize_with = "one_or_more::read")]
    pub model_name: Vec<String>,
    /// Seconds a request may take.
    pub request_budget_s: Option<u64>,
    /// Time to the first token that is promised, in milliseconds.
    pub ttft_ms: Option<u32>,
    /// Mean time between tokens that is promised, in milliseconds.
    pub itl_ms: Option<u32>,
    /// What becomes of requests that would come too late.
    pub overload: Option<String>,
    /// File of API keys.
    pub api_keys_file: Option<String>,
    /// Answers under way for one key.
    pub api_key_in_flight_max: Option<usize>,
    /// File of the certificate for HTTPS.
    pub tls_cert: Option<String>,
    /// File of its key.
    pub tls_key: Option<String>,
    /// File of the certificates that clients' must come from.
    pub tls_client_ca: Option<String>,
    /// Whether messages may contain control tokens.
    pub special_tokens_in_content: Option<String>,
    /// How tool calls are written.
    pub tool_format: Option<String>,
    /// How reasoning is written.
    pub reasoning_format: Option<String>,
    /// Where sampling defaults come from.
    pub generation_config: Option<String>,
    /// Most tokens of an answer where a request does not say.
    pub default_max_tokens: Option<u32>,
    /// Pages that may ask.
    pub cors_origin: Vec<String>,
    /// Memory for responses that are kept, in MiB.
    pub response_store_mib: Option<usize>,
    /// Part of the requests that are traced.
    pub trace_sample: Option<f64>,
    /// Answers under way.
    pub in_flight_max: Option<usize>,
    /// Threads that serve HTTP.
    pub http_threads: Option<usize>,
    /// Seconds to finish at the end.
    pub drain_s: Option<u64>,
}

impl Default for ApiServers {
    fn default() -> Self {
        Self {
            count: 1,
            api_server_host: "127.0.0.1".to_owned(),
            api_server_port: None,
            model_name: Vec::new(),
            request_budget_s: None,
            ttft_ms: None,
            itl_ms: None,
            overload: None,
            api_keys_file: None,
            api_key_in_flight_max: None,
            tls_cert: None,
            tls_key: None,
            tls_client_ca: None,
            special_tokens_in_content: None,
            tool_format: None,
            reasoning_format: None,
            generation_config: None,
            default_max_tokens: None,
            cors_origin: Vec::new(),
            response_store_mib: None,
            trace_sample: None,
            in_flight_max: None,
            http_threads: None,
            drain_s: None,
        }
    }
}

impl ApiServers {
    /// The fields that are no flags, or that differ between API servers.
    pub const NOT_PASSED_ON: [&str; 2] = ["count", "api-server-port"];
    /// The port where nothing is said.
    pub const PORT: u16 = 8000;

    /// What their addresses begin with: `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        match self.tls_cert {
            Some(_) => "https",
            None => "http",
        }
    }

    /// The first one's port.
    pub fn port(&self) -> u16 {
        self.api_server_port.unwrap_or(Self::PORT)
    }
}

/// Workers that are alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct WorkerGroup {
    /// How many.
    pub count: usize,
    /// What they compute on: shared out in order on one host.
    pub devices: Devices,
    /// Every worker runs on all of the devices, and other groups may have them too.
    pub share_devices: bool,
    /// Weights of its own: another precision of the same model.
    pub model: Option<String>,
    /// Ranks of each worker.
    pub tp_size: Option<u32>,
    /// Compute threads of each worker.
    pub threads: Option<usize>,
    /// Seconds to finish at the end.
    pub drain_s: Option<u64>,
    /// How long finished prompts' KV waits, in milliseconds.
    pub lease_ms: Option<u32>,
    /// Memory for KV of each worker, in MiB.
    pub kv_mib: Option<u64>,
    /// Share of the GPU memory left for KV.
    pub kv_cache_free_gpu_memory_fraction: Option<f64>,
    /// Tokens of a KV block.
    pub block_tokens: Option<u32>,
    /// Tokens of a step.
    pub step_tokens: Option<usize>,
    /// Mean time between tokens, in milliseconds.
    pub itl_ms: Option<u32>,
    /// Sequences of a step.
    pub batch: Option<usize>,
    /// Jobs that may wait.
    pub queue: Option<usize>,
    /// Compute every prompt whole.
    pub no_prefix_cache: bool,
    /// Transports for KV.
    pub ucx_tls: Option<String>,
    /// CPUs that a scheduler reserves for each worker; for `baton render` alone.
    pub cpus: Option<u32>,
    /// Memory that a scheduler reserves for each worker, in MiB; for `baton render` alone.
    pub memory_mib: Option<u64>,
}

impl Default for WorkerGroup {
    fn default() -> Self {
        Self {
            count: 1,
            devices: Devices::default(),
            share_devices: false,
            model: None,
            tp_size: None,
            threads: None,
            drain_s: None,
            lease_ms: None,
            kv_mib: None,
            kv_cache_free_gpu_memory_fraction: None,
            block_tokens: None,
            step_tokens: None,
            itl_ms: None,
            batch: None,
            queue: None,
            no_prefix_cache: false,
            ucx_tls: None,
            cpus: None,
            memory_mib: None,
        }
    }
}

impl WorkerGroup {
    /// The fields that are no flags of a worker, or that differ between a group's workers.
    pub const NOT_PASSED_ON: [&str; 6] = [
        "count",
        "devices",
        "share-devices",
        "model",
        "cpus",
        "memory-mib",
    ];

    /// Its sizes, as a worker's command line has them.
    pub fn tuning(&self) -> TuningArgs {
        TuningArgs {
            kv_mib: self.kv_mib,
            kv_cache_free_gpu_memory_fraction: self.kv_cache_free_gpu_memory_fraction,
            block_tokens: self.block_tokens,
            step_tokens: self.step_tokens,
            itl_ms: self.itl_ms,
            batch: self.batch,
            queue: self.queue,
            no_prefix_cache: self.no_prefix_cache,
            ucx_tls: self.ucx_tls.clone(),
        }
    }

    /// GPUs of each worker; 0 where it computes on none.
    ///
    /// # Errors
    /// Why nobody can tell: no `tp-size`, and devices that cannot be shared out evenly.
    pub fn gpus_each(&self) -> Result<usize, String> {
        let Devices::Cuda(gpus) = &self.devices else {
            return Ok(0);
        };
        let there = gpus.len();
        let each = match (self.tp_size, self.share_devices) {
            (Some(ranks), false) => return Ok(ranks as usize),
            (_, true) => there,
            (None, false) if there.is_multiple_of(self.count.max(1)) => there / self.count.max(1),
            (None, false) => 0,
        };
        if each == 0 {
            return Err(format!(
                "{there} devices cannot be shared out evenly among {} workers: give tp-size, or as many devices as count × tp-size",
                self.count
            ));
        }
        match self.tp_size {
            Some(ranks) if ranks as usize != each => Err(format!(
                "share-devices puts every worker on all {each} devices, and tp-size is {ranks}: give the group {ranks} devices"
            )),
            _ => Ok(each),
        }
    }
}

/// What containers are made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Containers {
    /// The image, as `container/build.sh` makes it.
    pub image: String,
    /// Kubernetes: the PersistentVolumeClaim with the model directories.
    pub model_claim: String,
    /// Kubernetes: the Secret with the files that the deployment names (keys, credentials).
    pub secret: String,
}

impl Default for Containers {
    fn default() -> Self {
        Self {
            image: "baton:latest".to_owned(),
            model_claim: "baton-model".to_owned(),
            secret: "baton".to_owned(),
        }
    }
}

/// The Slurm job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Slurm {
    /// Nodes of the job; one for each worker where nothing is said.
    pub nodes: Option<usize>,
}

/// One worker of a deployment.
#[derive(Clone, Debug)]
pub struct Worker<'a> {
    /// Its name on the bus.
    pub name: WorkerId,
    /// What it does.
    pub role: Role,
    /// Its group.
    pub group: &'a WorkerGroup,
}

impl Deployment {
    /// All groups, each with its role and its place in the file: `decode[0]`.
    pub fn groups(&self) -> impl Iterator<Item = (String, Role, &WorkerGroup)> {
        let roles = [
            (Role::Context, &self.context),
            (Role::Decode, &self.decode),
            (Role::Both, &self.both),
        ];
        roles.into_iter().flat_map(|(role, groups)| {
            groups
                .iter()
                .enumerate()
                .map(move |(index, group)| (format!("{}[{index}]", role.label()), role, group))
        })
    }

    /// All workers in the order in which they are named and given devices: numbered by role, over groups.
    ///
    /// # Errors
    /// If `worker-name` makes no names.
    pub fn workers(&self) -> Result<Vec<Worker<'_>>, Refusal> {
        let prefix = match &self.worker_name {
            Some(name) => format!("{name}-"),
            None => String::new(),
        };
        let mut workers: Vec<Worker<'_>> = Vec::new();
        for (_, role, group) in self.groups() {
            for _ in 0..group.count {
                let index = workers.iter().filter(|other| other.role == role).count();
                let name = WorkerId::new(format!("{prefix}{}-{index}", role.label()))
                    .map_err(|error| Refusal::new("worker-name", error))?;
                workers.push(Worker { name, role, group });
            }
        }
        Ok(workers)
    }

    /// The model that a group serves.
    pub fn model_of<'a>(&'a self, group: &'a WorkerGroup) -> &'a str {
        group.model.as_deref().unwrap_or(&self.model)
    }
}

#[cfg(test)]
mod tests;
