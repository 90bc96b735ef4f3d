//! What a worker is told at start, and the values it resolves from it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use baton_bus::BusConfig;
use baton_engine::{FakeFaults, fake_geometry};
use baton_model::ModelDir;
use baton_protocol::subjects::Cluster;
use baton_protocol::{KvGeometry, KvShares, Role, StepCost, WorkerId, deadlines};
use baton_traces::Tracer;

use crate::WorkerError;
use crate::gpus::Gpus;

/// Everything a worker is told at start.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Its name, unique in the cluster.
    pub worker: WorkerId,
    /// What it does.
    pub role: Role,
    /// Model directory as `baton model-prep` writes it.
    pub model_dir: PathBuf,
    /// Which cluster it joins.
    pub cluster: Cluster,
    /// How to reach the bus.
    pub bus: BusConfig,
    /// What it computes on.
    pub device: Device,
    /// Tensor-parallel ranks; `None` takes as many as there are GPUs, or on a CPU as the model directory is divided over.
    pub tp_size: Option<u32>,
    /// Compute threads; 0 takes one for each CPU it may run on.
    pub threads: usize,
    /// Bytes of the KV arena, rounded down to whole blocks; `None` takes what a full batch of longest
    /// sequences needs, and at most [`KV_BYTES_DEFAULT`].
    pub kv_bytes: Option<u64>,
    /// Share of the GPU memory that is free once the model is loaded to take for KV, where no bytes are said.
    pub kv_free_gpu_memory_fraction: f64,
    /// Tokens of one KV block. Both sides of a pull must agree.
    pub block_tokens: u32,
    /// Most tokens of one engine step; longer prompts run in chunks.
    pub step_tokens: usize,
    /// Most sequences of one engine step.
    pub batch: usize,
    /// Most jobs that may wait or be under way in each of prefill and pull before jobs are refused.
    pub queue: usize,
    /// Keep finished prompts' blocks for later prompts that begin the same.
    pub prefix_cache: bool,
    /// How long staged KV waits for its release, in milliseconds.
    pub lease_ms: u32,
    /// How long a draining worker goes on with what it has, in milliseconds.
    pub drain_ms: u64,
    /// Overrides UCX's choice of transports (`UCX_TLS`): `tcp,self`.
    pub ucx_tls: Option<String>,
    /// Mean time between tokens that steps are kept to, in milliseconds; 0: steps are as large as is efficient.
    pub itl_ms: u32,
    /// Who makes spans of requests; nobody where nothing is said.
    pub tracer: Tracer,
    /// What steps of the fake device cost; as much as its name says where nothing is said here.
    pub fake_cost: Option<StepCost>,
    /// What goes wrong on the fake device; nothing, but in tests.
    pub fake_faults: FakeFaults,
    /// How the fake device's KV is divided; not at all, but in tests.
    pub fake_kv: FakeKvShape,
}

/// How the fake device's KV is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeKvShape {
    /// Key/value heads of the whole model.
    pub heads: u32,
    /// Its layers.
    pub layers: u32,
    /// Ranks among which the heads are shared out.
    pub tensor: u32,
    /// Stages among which the layers are, each of `tensor` ranks.
    pub pipeline: u32,
}

impl Default for FakeKvShape {
    /// One head of one layer on one rank: 8 bytes a token.
    fn default() -> Self {
        Self {
            heads: 1,
            layers: 1,
            tensor: 1,
            pipeline: 1,
        }
    }
}

impl FakeKvShape {
    pub(crate) fn geometry(&self, block_tokens: u32) -> KvGeometry {
        fake_geometry(block_tokens, self.heads, self.layers)
    }

    pub(crate) fn shares(&self, kv: &KvGeometry) -> KvShares {
        KvShares::parallel(kv, self.tensor, self.pipeline)
    }
}

/// KV arena where nothing is said.
pub const KV_BYTES_DEFAULT: u64 = 1 << 30;

/// Share of free GPU memory for KV where nothing is said: the rest is for what the driver and other programs take.
pub const KV_FREE_GPU_MEMORY_FRACTION_DEFAULT: f64 = 0.9;

/// Tokens of a KV block where nothing is said.
pub const BLOCK_TOKENS_DEFAULT: u32 = 32;

/// Jobs that may wait where nothing is said.
pub const QUEUE_DEFAULT: usize = 256;

/// Drain time where nothing is said: within the grace that Kubernetes and Slurm give by default.
pub const DRAIN_MS_DEFAULT: u64 = 25_000;

impl WorkerConfig {
    /// A worker of this name with defaults for everything else: the NATS server of this host, the CPU.
    pub fn new(
        worker: WorkerId,
        role: Role,
        model_dir: impl Into<PathBuf>,
        cluster: Cluster,
    ) -> Self {
        Self {
            worker,
            role,
            model_dir: model_dir.into(),
            cluster,
            bus: BusConfig::default(),
            device: Device::Cpu,
            tp_size: None,
            threads: 0,
            kv_bytes: None,
            kv_free_gpu_memory_fraction: KV_FREE_GPU_MEMORY_FRACTION_DEFAULT,
            block_tokens: BLOCK_TOKENS_DEFAULT,
            step_tokens: Device::Cpu.step_tokens_default(),
            batch: Device::Cpu.batch_default(),
            queue: QUEUE_DEFAULT,
            prefix_cache: true,
            lease_ms: deadlines::LEASE_MS,
            drain_ms: DRAIN_MS_DEFAULT,
            ucx_tls: None,
            itl_ms: Device::Cpu.itl_ms_default(),
            tracer: Tracer::off(),
            fake_cost: None,
            fake_faults: FakeFaults::default(),
            fake_kv: FakeKvShape::default(),
        }
    }

    /// Refuses values that could not work, before anything is started.
    ///
    /// # Errors
    /// [`WorkerError::Config`] with what is wrong.
    pub fn check(&self) -> Result<(), WorkerError> {
        let positive = [
            ("block tokens", self.block_tokens as usize),
            ("step token budget", self.step_tokens),
            ("batch", self.batch),
            ("queue", self.queue),
            ("lease", self.lease_ms as usize),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(WorkerError::Config {
                    detail: format!("{name} must be at least 1"),
                });
            }
        }
        if let (Device::Cuda(gpus), Some(ranks)) = (self.device, self.tp_size)
            && gpus.count() != ranks
        {
            return Err(WorkerError::Config {
                detail: format!(
                    "--device {} names {} GPUs and --tp-size is {ranks}: a rank has a GPU of its own, so the two agree, or \
                     --tp-size is left out",
                    self.device,
                    gpus.count()
                ),
            });
        }
        if !(self.kv_free_gpu_memory_fraction > 0.0 && self.kv_free_gpu_memory_fraction <= 1.0) {
            return Err(WorkerError::Config {
                detail: format!(
                    "the share of free GPU memory for KV is {}, it must be above 0 and at most 1",
                    self.kv_free_gpu_memory_fraction
                ),
            });
        }
        if let Some(Err(detail)) = self.fake_cost.as_ref().map(StepCost::check) {
            return Err(WorkerError::Config {
                detail: format!("of the fake device: {detail}"),
            });
        }
        if self.step_tokens < self.batch {
            return Err(WorkerError::Config {
                detail: format!(
                    "a step of {} tokens cannot hold a batch of {} sequences: raise the step token budget or lower the batch",
                    self.step_tokens, self.batch
                ),
            });
        }
        Ok(())
    }

    /// Tensor-parallel ranks that this model runs on.
    ///
    /// # Errors
    /// [`WorkerError`] if the model cannot be shared out over so many, or is divided over another number.
    pub(crate) fn ranks(&self, model: &ModelDir) -> Result<u32, WorkerError> {
        let unusable = |detail: String| WorkerError::Model {
            path: model.path.clone(),
            detail,
        };
        let divided = model.manifest.tp_size;
        let ranks = match self.device {
            Device::Cuda(gpus) => gpus.count() as usize,
            _ => self.tp_size.map_or(divided, |ranks| ranks as usize),
        };
        if divided != 1 && ranks != divided {
            let remedy = match self.device {
                Device::Cuda(_) => format!("name {divided} GPUs with --device"),
                _ => format!("give --tp-size {divided}"),
            };
            return Err(unusable(format!(
                "it is divided over {divided} ranks, and the tensor-parallel size is {ranks}: {remedy}, or prepare it with \
                 --tp-size 1, which runs on any number of ranks"
            )));
        }
        match self.device {
            Device::Fake { .. } if self.tp_size.is_some_and(|ranks| ranks != 1) => {
                Err(WorkerError::Config {
                    detail: format!("the fake device has no model to share out over {ranks} ranks"),
                })
            }
            Device::Fake { .. } => Ok(1),
            _ => {
                model.spec().of_rank(ranks).map_err(unusable)?;
                Ok(ranks as u32)
            }
        }
    }

    /// Blocks of the arena, each of which takes `block` bytes on all ranks together.
    ///
    /// # Errors
    /// [`WorkerError::Config`] if not even one block fits.
    pub(crate) fn kv_blocks(
        &self,
        kv: &KvGeometry,
        block: u64,
        tokens_max: u32,
    ) -> Result<u32, WorkerError> {
        let full = kv.blocks_for(tokens_max as usize) as u64 * self.batch as u64;
        let bytes = self
            .kv_bytes
            .unwrap_or_else(|| KV_BYTES_DEFAULT.min(full * block));
        Self::whole_blocks(bytes, block)
    }

    /// Blocks of the arenas on GPUs: for each rank the bytes of its part of a block, and those that its GPU has free, the model
    /// loaded. All ranks have the same blocks, so the GPU with the least room decides.
    ///
    /// # Errors
    /// [`WorkerError::Config`] if not even one block fits.
    pub(crate) fn kv_blocks_of_gpus(&self, ranks: &[(u64, u64)]) -> Result<u32, WorkerError> {
        if let Some(bytes) = self.kv_bytes {
            let block = ranks.iter().map(|(block, _)| block).sum();
            return Self::whole_blocks(bytes, block);
        }
        let share = |free: u64| (free as f64 * self.kv_free_gpu_memory_fraction) as u64;
        let blocks = |&(block, free): &(u64, u64)| Self::whole_blocks(share(free), block);
        let blocks = ranks.iter().map(blocks).collect::<Result<Vec<_>, _>>()?;
        Ok(blocks.into_iter().min().unwrap_or(0))
    }

    fn whole_blocks(bytes: u64, block: u64) -> Result<u32, WorkerError> {
        match u32::try_from(bytes / block) {
            Ok(0) => Err(WorkerError::Config {
                detail: format!("{bytes} bytes of KV hold no block: one block takes {block} bytes"),
            }),
            Ok(blocks) => Ok(blocks),
            Err(_) => Err(WorkerError::Config {
                detail: format!("{bytes} bytes of KV are more than 2^32 blocks of {block} bytes"),
            }),
        }
    }

    /// Compute threads.
    pub(crate) fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}

/// What a worker computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The CPU.
    Cpu,
    /// Nothing: tokens are a hash of those before. For tests and for measuring the orchestration alone.
    Fake {
        /// How long each step takes, in microseconds; 0 is full speed.
        step_micros: u64,
    },
    /// NVIDIA GPUs, a rank on each.
    Cuda(Gpus),
}

impl Device {
    /// Tokens of a step where nothing is said: as many as make a step's products fill the device, and no more, so that
    /// sequences that generate need not wait long.
    pub fn step_tokens_default(self) -> usize {
        match self {
            Self::Cuda(_) => 8192,
            Self::Cpu | Self::Fake { .. } => 512,
        }
    }

    /// Mean time between tokens where nothing is said, in milliseconds. People read some 5 to 10 words a second, a token each 100 ms; agents and
    /// programs read faster, so a GPU keeps to a quarter of that: 40 tokens a second, which leaves half of its steps to prompts with
    /// models that decode in some 12 ms.
    pub fn itl_ms_default(self) -> u32 {
        match self {
            Self::Cuda(_) => 25,
            Self::Cpu | Self::Fake { .. } => 100,
        }
    }

    /// Sequences of a step where nothing is said.
    pub fn batch_default(self) -> usize {
        match self {
            Self::Cuda(_) => 256,
            Self::Cpu | Self::Fake { .. } => 64,
        }
    }
}

impl Device {
    /// A step that takes longer than this hangs, and so does the device. A GPU's longest takes seconds. A CPU may run minutes on
    /// a large model's prompt, and has nothing in it that could hang.
    pub(crate) fn step_time_max(self) -> Duration {
        match self {
            Self::Cuda(_) => Duration::from_millis(deadlines::STEP_MAX_GPU_MS),
            Self::Cpu => Duration::from_millis(deadlines::STEP_MAX_CPU_MS),
            Self::Fake { step_micros } => {
                Duration::from_secs(5) + Duration::from_micros(step_micros)
            }
        }
    }
}

impl Device {
    fn cuda(list: &str) -> Result<Self, WorkerError> {
        let gpus = Gpus::parse(list).map_err(|detail| WorkerError::Config {
            detail: format!("device cuda:{list}: {detail}"),
        });
        gpus.map(Self::Cuda)
    }
}

impl FromStr for Device {
    type Err = WorkerError;

    fn from_str(text: &str) -> Result<Self, WorkerError> {
        let unknown = || WorkerError::Config {
            detail: format!(
                "device {text:?} is not one of cpu, cuda:GPUS, fake, fake:MICROSECONDS_PER_STEP"
            ),
        };
        match text {
            "cpu" => Ok(Self::Cpu),
            "fake" => Ok(Self::Fake { step_micros: 0 }),
            "cuda" => Self::cuda("0"),
            _ => match text.split_once(':') {
                Some(("cuda", list)) => Self::cuda(list),
                Some(("fake", micros)) => match micros.parse() {
                    Ok(step_micros) => Ok(Self::Fake { step_micros }),
                    Err(_) => Err(unknown()),
                },
                _ => Err(unknown()),
            },
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Fake { step_micros: 0 } => f.write_str("fake"),
            Self::Fake { step_micros } => write!(f, "fake:{step_micros}"),
            Self::Cuda(gpus) => write!(f, "cuda:{gpus}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_one_spelling() {
        for text in ["cpu", "fake", "fake:250", "cuda:3", "cuda:0-3", "cuda:0,2"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "fake:", "CPU"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
        assert_eq!("cuda".parse::<Device>().unwrap().to_string(), "cuda:0");
        let told = "cuda:0,0".parse::<Device>().unwrap_err().to_string();
        assert!(told.contains("cuda:0,0: GPU 0 is named twice"), "{told}");
    }

    fn on(device: &str) -> WorkerConfig {
        let (worker, cluster) = (WorkerId::new("w").unwrap(), Cluster::new("c").unwrap());
        let mut config = WorkerConfig::new(worker, Role::Both, "/m", cluster);
        config.device = device.parse().unwrap();
        config
    }

    #[test]
    fn the_tensor_parallel_size_is_the_number_of_gpus_or_is_refused() {
        for (device, tp_size, fits) in [
            ("cuda:0-1", None, true),
            ("cuda:0-1", Some(2), true),
            ("cuda:0-1", Some(1), false),
            ("cuda:0", Some(2), false),
            ("cpu", Some(3), true),
        ] {
            let mut config = on(device);
            config.tp_size = tp_size;
            let checked = config.check();
            assert_eq!(checked.is_ok(), fits, "{device} {tp_size:?}");
            if let Err(error) = checked {
                let told = error.to_string();
                assert!(
                    told.contains(device) && told.contains("--tp-size is"),
                    "{told}"
                );
            }
        }
    }

    #[test]
    fn the_gpu_with_the_least_room_decides_how_many_blocks_there_are() {
        let mut config = on("cuda:0-1");
        config.kv_free_gpu_memory_fraction = 0.5;
        let blocks = |config: &WorkerConfig, ranks: &[(u64, u64)]| config.kv_blocks_of_gpus(ranks);
        assert_eq!(blocks(&config, &[(10, 2000)]).unwrap(), 100);
        assert_eq!(blocks(&config, &[(10, 2000), (10, 800)]).unwrap(), 40);
        // A rank may hold more of a block than another.
        assert_eq!(blocks(&config, &[(20, 2000), (10, 2000)]).unwrap(), 50);
        assert!(blocks(&config, &[(10, 2000), (10, 19)]).is_err());
        // What is said is of all ranks together.
        config.kv_bytes = Some(100);
        assert_eq!(blocks(&config, &[(10, 0), (10, 0)]).unwrap(), 5);
    }
}
