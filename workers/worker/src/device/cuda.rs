//! A worker on an NVIDIA GPU: the model first, then as much KV as is left.

use std::ops::Range;
use std::sync::Arc;

use baton_cuda::{CudaError, CudaExecutor, CudaMemory, CudaModel, CudaOptions, HostSlots};
use baton_kv_memory::{FirstBytes, KvMemory};
use baton_model::ModelDir;
use baton_protocol::{KvShares, Role};
use baton_transfer::{
    Agent, AgentConfig, ArenaSource, GpuMemory, MakeStaging, STAGING_SLOT_BYTES, STAGING_SLOTS,
    Staging, gpu_allocation_bytes,
};

use super::{Arenas, Backend, memory};
use crate::config::WorkerConfig;
use crate::error::WorkerError;

impl Backend {
    /// Loads the model onto a GPU and takes its share of what is left for KV.
    pub(crate) fn start_cuda(
        config: &WorkerConfig,
        model: &ModelDir,
        ordinal: u32,
    ) -> Result<Self, WorkerError> {
        let failed = |error: CudaError| WorkerError::Device {
            device: config.device.to_string(),
            detail: error.to_string(),
        };
        let unusable = |detail: String| WorkerError::Model {
            path: model.path.clone(),
            detail,
        };
        // The device first: without one, nothing of the model is worth reading.
        let device = baton_cuda::Device::open(ordinal).map_err(failed)?;
        let ranks = config.ranks(model)?;
        if ranks != 1 {
            return Err(unusable(format!(
                "it is to run on {ranks} ranks; the CUDA executor runs one: prepare the model with --tp-size 1, and start \
                 the worker with --tp-size 1"
            )));
        }
        let weights = model
            .weights(0)
            .map_err(|error| unusable(error.to_string()))?;
        let options = CudaOptions {
            step_tokens_max: config.step_tokens,
            step_sequences_max: config.batch,
        };
        let loaded = CudaModel::load(
            std::slice::from_ref(&device),
            model.spec(),
            &[&weights],
            options,
        );
        let loaded = loaded.map_err(failed)?;
        tracing::info!(weights = loaded.weights_text(), "the model is on the GPU");
        let kv = baton_engine::kv_geometry(model.spec(), config.block_tokens);
        let (free, _) = device.memory().map_err(failed)?;
        let blocks = config.kv_blocks_of_gpu(&kv, free as u64)?;
        memory::serves_somebody(
            &kv,
            kv.block_bytes() as u64,
            blocks,
            model.spec().tokens_max as u32,
        )?;
        let bytes = kv.block_bytes() * blocks as usize;
        let memory = CudaMemory::new(&device, gpu_allocation_bytes(bytes)).map_err(failed)?;
        let memory = Arc::new(memory);
        let Arenas {
            memories,
            agent,
            transport,
        } = share(config, &device, memory, bytes)?;
        let Ok([memory]) = <[_; 1]>::try_from(memories) else {
            unreachable!("one rank has one arena");
        };
        let shares = KvShares::whole(&kv);
        let executor = CudaExecutor::new(loaded, vec![memory], kv).map_err(failed)?;
        Ok(Self {
            executor: Box::new(executor),
            shares,
            agent,
            transport,
        })
    }
}

/// The arena, registered with UCX where there is one. A worker that does both can do without.
fn share(
    config: &WorkerConfig,
    device: &Arc<baton_cuda::Device>,
    memory: Arc<CudaMemory>,
    bytes: usize,
) -> Result<Arenas, WorkerError> {
    let owner = memory.clone();
    let bound = device.clone();
    let agent_config = AgentConfig {
        arenas: vec![ArenaSource::Gpu(GpuMemory {
            base: memory.address().number(),
            bytes,
            bind: Arc::new(move || {
                let _keep = &owner;
                bound.bind().map_err(|error| error.to_string())
            }),
            staging: staging(device, &memory),
            registered: true,
        })],
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
            Ok(Arenas {
                memories: vec![Arc::new(FirstBytes::new(memory, bytes))],
                agent: None,
                transport: format!("none: {error}"),
            })
        }
        Err(error) => Err(WorkerError::Transfer {
            detail: error.to_string(),
        }),
    }
}

/// Host memory for peers that cannot read the GPU's, made when the first of them comes.
fn staging(device: &Arc<baton_cuda::Device>, memory: &Arc<CudaMemory>) -> MakeStaging {
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
