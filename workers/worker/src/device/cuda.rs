//! A worker on NVIDIA GPUs, a rank on each: the model first, then as much KV as is left.

use std::ops::Range;
use std::sync::Arc;

use baton_cuda::{CudaError, CudaExecutor, CudaMemory, CudaModel, CudaOptions, Device, HostSlots};
use baton_kv_memory::{FirstBytes, KvMemory};
use baton_model::ModelDir;
use baton_protocol::{KvShares, Role};
use baton_transfer::{
    Agent, AgentConfig, ArenaSource, GpuMemory, MakeStaging, STAGING_SLOT_BYTES, STAGING_SLOTS,
    Staging, gpu_allocation_bytes,
};

use super::{Arenas, Backend, memory, with_sources};
use crate::config::WorkerConfig;
use crate::error::WorkerError;
use crate::gpus::Gpus;

impl Backend {
    /// Loads the model onto GPUs, a rank on each, and takes its share of what is left for KV.
    pub(crate) fn start_cuda(
        config: &WorkerConfig,
        model: &ModelDir,
        gpus: Gpus,
    ) -> Result<Self, WorkerError> {
        let failed = |error: CudaError| WorkerError::Device {
            device: config.device.to_string(),
            detail: sentence(&error),
        };
        // The GPUs first: without them, nothing of the model is worth reading.
        let devices = open(gpus).map_err(failed)?;
        let ranks = config.ranks(model)?;
        let options = CudaOptions {
            step_tokens_max: config.step_tokens,
            step_sequences_max: config.batch,
        };
        let loaded = with_sources(model, ranks as usize, |sources| {
            CudaModel::load(&devices, model.spec(), sources, options)
        })?;
        let loaded = loaded.map_err(failed)?;
        tracing::info!(weights = loaded.weights_text(), "the model is on the GPU");
        let kv = baton_engine::kv_geometry(model.spec(), config.block_tokens);
        let shares = KvShares::parallel(&kv, ranks, 1);
        let parts: Vec<u64> = (0..devices.len())
            .map(|rank| shares.block_bytes(&kv, rank))
            .collect();
        let blocks = blocks(config, &devices, &parts, failed)?;
        let tokens_max = model.spec().tokens_max as u32;
        memory::serves_somebody(&kv, parts.iter().sum(), blocks, tokens_max)?;
        let arenas = devices.iter().zip(&parts).map(|(device, part)| {
            let bytes = *part as usize * blocks as usize;
            let memory = CudaMemory::new(device, gpu_allocation_bytes(bytes));
            let memory = memory.map_err(|error| failed(on(device, error)))?;
            Ok(GpuArena {
                device: device.clone(),
                memory: Arc::new(memory),
                bytes,
            })
        });
        let arenas = arenas.collect::<Result<Vec<_>, WorkerError>>()?;
        let Arenas {
            memories,
            agent,
            transport,
        } = share(config, &arenas)?;
        let executor = CudaExecutor::new(loaded, memories, kv).map_err(failed)?;
        Ok(Self {
            executor: Box::new(executor),
            shares,
            agent,
            transport,
        })
    }
}

/// The GPUs by rank. Those of several ranks reach each other's memory.
fn open(gpus: Gpus) -> Result<Vec<Arc<Device>>, CudaError> {
    // One by one first: whatever is wrong with one is said of that one.
    let open = |&ordinal| {
        Device::open(ordinal).map_err(|error| match error {
            CudaError::Driver { .. } => CudaError::On {
                gpu: ordinal,
                error: Box::new(error),
            },
            error => error,
        })
    };
    let devices = gpus.ordinals().iter().map(open);
    let devices = devices.collect::<Result<Vec<_>, _>>()?;
    match devices.len() {
        1 => Ok(devices),
        _ => baton_cuda::open_group(gpus.ordinals()),
    }
}

fn on(device: &Device, error: CudaError) -> CudaError {
    CudaError::On {
        gpu: device.ordinal(),
        error: Box::new(error),
    }
}

/// What is wrong, and where somebody can do something about it, what.
fn sentence(error: &CudaError) -> String {
    let remedy = match innermost(error) {
        CudaError::Memory { .. } => {
            "; `nvidia-smi` shows who has the rest: end that, set --kv-mib lower, or name other or more GPUs with --device"
        }
        CudaError::Driver { detail, .. } if detail.contains("CUDA_ERROR_DEVICE_UNAVAILABLE") => {
            "; another process has it for itself (`nvidia-smi` shows which): end that, or name other GPUs with --device"
        }
        _ => "",
    };
    format!("{error}{remedy}")
}

fn innermost(error: &CudaError) -> &CudaError {
    match error {
        CudaError::On { error, .. } => innermost(error),
        error => error,
    }
}

/// Blocks for which there is room on all GPUs, of which each rank holds a part of `parts` bytes.
fn blocks(
    config: &WorkerConfig,
    devices: &[Arc<Device>],
    parts: &[u64],
    failed: impl Fn(CudaError) -> WorkerError,
) -> Result<u32, WorkerError> {
    let room = devices.iter().zip(parts).map(|(device, part)| {
        device.bind()?;
        let (free, _) = device.memory()?;
        Ok((*part, free as u64))
    });
    let room = room.collect::<Result<Vec<_>, CudaError>>();
    config.kv_blocks_of_gpus(&room.map_err(failed)?)
}

/// A rank's arena on its GPU.
struct GpuArena {
    device: Arc<Device>,
    memory: Arc<CudaMemory>,
    bytes: usize,
}

impl GpuArena {
    fn source(&self) -> ArenaSource {
        let (owner, bound) = (self.memory.clone(), self.device.clone());
        ArenaSource::Gpu(GpuMemory {
            base: self.memory.address().number(),
            bytes: self.bytes,
            bind: Arc::new(move || {
                let _keep = &owner;
                bound.bind().map_err(|error| error.to_string())
            }),
            staging: staging(&self.device, &self.memory),
            registered: true,
        })
    }
}

/// The arenas by rank, registered with UCX where there is one. A worker that does both can do without.
fn share(config: &WorkerConfig, arenas: &[GpuArena]) -> Result<Arenas, WorkerError> {
    let agent_config = AgentConfig {
        arenas: arenas.iter().map(GpuArena::source).collect(),
        tls: config.ucx_tls.clone(),
    };
    match Agent::start(agent_config) {
        Ok((agent, arenas)) => {
            let transport = agent.summary();
            let memories = arenas.into_iter().map(|arena| Arc::new(arena) as _);
            Ok(Arenas {
                memories: memories.collect(),
                agent: Some(agent),
                transport,
            })
        }
        Err(error) if config.role == Role::Both => {
            tracing::warn!(%error, "no KV transfer: this worker serves its own prompts only");
            let memory = |arena: &GpuArena| {
                Arc::new(FirstBytes::new(arena.memory.clone(), arena.bytes)) as _
            };
            Ok(Arenas {
                memories: arenas.iter().map(memory).collect(),
                agent: None,
                transport: format!("none: {error}"),
            })
        }
        Err(error) => Err(WorkerError::Transfer {
            detail: error.to_string(),
        }),
    }
}

/// Host memory for peers that cannot read the GPU's, made when the first of them comes. A worker of several GPUs has none: to make it
/// would wait for a GPU that may wait for another ([`GpuMemory::staging`]).
fn staging(device: &Arc<Device>, memory: &Arc<CudaMemory>) -> MakeStaging {
    let (device, memory) = (device.clone(), memory.clone());
    Arc::new(move || {
        let slots = HostSlots::new(&device, memory.clone(), STAGING_SLOTS, STAGING_SLOT_BYTES);
        let slots = slots.map_err(|error| error.to_string())?;
        Ok(Box::new(Slots(slots)) as Box<dyn Staging>)
    })
}

/// A GPU's slots, as the transfer agent knows them.
struct Slots(HostSlots);

impl Staging for Slots {
    fn slot(&mut self, slot: usize) -> &mut [u8] {
        self.0.slot(slot)
    }

    fn fetch(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        self.0
            .fetch(slot, ranges)
            .map_err(|error| error.to_string())
    }

    fn store(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        self.0
            .store(slot, ranges)
            .map_err(|error| error.to_string())
    }

    fn is_done(&mut self, slot: usize) -> Result<bool, String> {
        self.0.is_done(slot).map_err(|error| error.to_string())
    }
}
