//! What a worker computes on: executor, KV arena and transfer agent, built to fit each other.

use std::sync::Arc;

use baton_cpu::{CpuExecutor, CpuOptions, HeapMemory};
use baton_engine::{Executor, kv_geometry};
use baton_kv_memory::KvMemory;
use baton_model::{ModelDir, ModelError, RankSource, TensorSource};
use baton_protocol::{KvGeometry, KvShares, Role, TransferDescriptor};
use baton_transfer::{Agent, AgentConfig, ArenaSource, TransferError};

use crate::config::{Device, WorkerConfig};
use crate::error::WorkerError;
use loading::Loading;

mod cuda;
mod fake_kv;
mod libraries;
mod loading;
mod memory;

pub use libraries::{Library, cpu_kernel, gpus_seen};
pub use memory::{check_host_memory, host_memory_bytes};

/// A device, ready.
pub(crate) struct Backend {
    pub(crate) executor: Box<dyn Executor>,
    /// What each of its ranks holds of the KV.
    pub(crate) shares: KvShares,
    pub(crate) agent: Option<Agent>,
    /// How KV moves, for people.
    pub(crate) transport: String,
}

impl Backend {
    /// Loads the model and allocates the arena. Takes seconds for a large model: not for the async runtime.
    pub(crate) fn start(config: &WorkerConfig, model: &ModelDir) -> Result<Self, WorkerError> {
        if let Device::Cuda(gpus) = config.device {
            return Self::start_cuda(config, model, gpus);
        }
        let arena = HostArena::new(config, model)?;
        memory::check(config, model, &arena)?;
        let Arenas {
            memories,
            agent,
            transport,
        } = Arenas::start(config, arena.bytes_of_ranks())?;
        let HostArena { kv, shares, blocks } = arena;
        let executor: Box<dyn Executor> = match config.device {
            Device::Fake { step_micros } => Box::new(fake_kv::executor(
                config,
                step_micros,
                model,
                memories,
                (kv, &shares),
                blocks,
            )),
            _ => cpu(config, model, memories, kv)?,
        };
        Ok(Self {
            executor,
            shares,
            agent,
            transport,
        })
    }

    pub(crate) fn descriptor(&self) -> Option<TransferDescriptor> {
        self.agent.as_ref().map(Agent::descriptor)
    }
}

/// The KV arenas of all ranks in main memory, before there are any.
pub(crate) struct HostArena {
    kv: KvGeometry,
    shares: KvShares,
    blocks: u32,
}

impl HostArena {
    /// # Errors
    /// [`WorkerError`] if it could serve nobody, or if the model cannot be shared out as the configuration says.
    pub(crate) fn new(config: &WorkerConfig, model: &ModelDir) -> Result<Self, WorkerError> {
        let spec = model.spec();
        let ranks = config.ranks(model)?;
        let (kv, shares) = match config.device {
            Device::Fake { .. } => {
                let kv = config.fake_kv.geometry(config.block_tokens);
                let shares = config.fake_kv.shares(&kv);
                (kv, shares)
            }
            _ => {
                let kv = kv_geometry(spec, config.block_tokens);
                let shares = KvShares::parallel(&kv, ranks, 1);
                (kv, shares)
            }
        };
        let tokens_max = spec.tokens_max as u32;
        let block = block_bytes(&kv, &shares);
        let blocks = config.kv_blocks(&kv, block, tokens_max)?;
        memory::serves_somebody(&kv, block, blocks, tokens_max)?;
        Ok(Self { kv, shares, blocks })
    }

    fn bytes_of_ranks(&self) -> Vec<usize> {
        let bytes = |rank| self.shares.block_bytes(&self.kv, rank) as usize * self.blocks as usize;
        (0..self.shares.ranks()).map(bytes).collect()
    }

    /// Of all ranks.
    pub(crate) fn bytes(&self) -> u64 {
        block_bytes(&self.kv, &self.shares) * u64::from(self.blocks)
    }
}

/// Bytes of one block on all ranks together: more than the whole geometry's where ranks have the same head.
fn block_bytes(kv: &KvGeometry, shares: &KvShares) -> u64 {
    let of_rank = |rank| shares.block_bytes(kv, rank);
    (0..shares.ranks()).map(of_rank).sum()
}

fn cpu(
    config: &WorkerConfig,
    model: &ModelDir,
    memories: Vec<Arc<dyn KvMemory>>,
    kv: KvGeometry,
) -> Result<Box<dyn Executor>, WorkerError> {
    let options = CpuOptions {
        threads: config.threads(),
        kernel: None,
        step_tokens_max: config.step_tokens,
        step_sequences_max: config.batch,
    };
    let executor = with_sources(model, memories.len(), |sources| {
        CpuExecutor::load(model.spec(), sources, memories, kv, options)
    })?;
    let executor = executor.map_err(|error| WorkerError::Device {
        device: config.device.to_string(),
        detail: error.to_string(),
    })?;
    Ok(Box::new(executor))
}

/// What `load` makes of the model's weights, a source a rank: the files of a directory that is divided over so many, or the parts of
/// a whole one, which is cut here.
fn with_sources<T>(
    model: &ModelDir,
    ranks: usize,
    load: impl FnOnce(&[&dyn TensorSource]) -> T,
) -> Result<T, WorkerError> {
    let unusable = |error: ModelError| WorkerError::Model {
        path: model.path.clone(),
        detail: error.to_string(),
    };
    let files = (0..model.manifest.tp_size).map(|rank| model.weights(rank));
    let files = files.collect::<Result<Vec<_>, _>>().map_err(unusable)?;
    let cut = |rank| RankSource::new(&files[0], model.spec(), rank, ranks);
    let cut: Vec<RankSource<'_>> = match files.len() == ranks {
        true => Vec::new(),
        false => (0..ranks).map(cut).collect(),
    };
    let loading = Loading::new(model.spec().layers.len());
    let watched: Vec<_> = match cut.is_empty() {
        true => files.iter().map(|file| loading.watch(file)).collect(),
        false => cut.iter().map(|source| loading.watch(source)).collect(),
    };
    let sources: Vec<&dyn TensorSource> = watched.iter().map(|source| source as _).collect();
    Ok(load(&sources))
}

/// The KV arenas, and who moves what is in them.
pub(crate) struct Arenas {
    /// By rank.
    pub(crate) memories: Vec<Arc<dyn KvMemory>>,
    pub(crate) agent: Option<Agent>,
    pub(crate) transport: String,
}

impl Arenas {
    /// Of these lengths, registered with UCX where there is one. A worker that does both can do without, but not without the memory.
    fn start(config: &WorkerConfig, bytes: Vec<usize>) -> Result<Self, WorkerError> {
        let agent_config = AgentConfig {
            arenas: bytes
                .iter()
                .map(|&bytes| ArenaSource::Host { bytes })
                .collect(),
            tls: config.ucx_tls.clone(),
        };
        match Agent::start(agent_config) {
            Ok((agent, arenas)) => {
                let transport = agent.summary();
                let memories = arenas.into_iter().map(|arena| Arc::new(arena) as _);
                Ok(Self {
                    memories: memories.collect(),
                    agent: Some(agent),
                    transport,
                })
            }
            Err(error)
                if config.role == Role::Both
                    && !matches!(error, TransferError::Arena { .. } | TransferError::Stopped) =>
            {
                tracing::warn!(%error, "no KV transfer: this worker serves its own prompts only");
                let memory = |bytes| Arc::new(HeapMemory::new(bytes)) as _;
                Ok(Self {
                    memories: bytes.into_iter().map(memory).collect(),
                    agent: None,
                    transport: format!("none: {error}"),
                })
            }
            Err(error) => Err(WorkerError::Transfer {
                detail: error.to_string(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::WorkerId;
    use baton_protocol::subjects::Cluster;

    use super::*;

    #[test]
    fn no_role_starts_without_the_memory_for_its_kv() {
        let (worker, cluster) = (WorkerId::new("w").unwrap(), Cluster::new("c").unwrap());
        for role in [Role::Both, Role::Decode] {
            let config = WorkerConfig::new(worker.clone(), role, "/m", cluster.clone());
            // None at all is what can be asked for without harm and not be had.
            let error = Arenas::start(&config, vec![0]).map(|arenas| arenas.transport);
            let told = error.expect_err("an arena").to_string();
            assert!(told.contains("KV arena"), "{told}");
        }
    }
}
