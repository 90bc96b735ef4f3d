//! What a worker computes on: executor, KV arena and transfer agent, built to fit each other.

use std::sync::Arc;

use baton_cpu::{CpuExecutor, CpuOptions, HeapMemory};
use baton_engine::{Executor, KvMemory, kv_geometry};
use baton_model::ModelDir;
use baton_protocol::{KvGeometry, Role, TransferDescriptor};
use baton_transfer::{Agent, AgentConfig, TransferError};

use crate::{Device, WorkerConfig, WorkerError, fake_kv, memory};

/// A device, ready.
pub(crate) struct Backend {
    pub(crate) executor: Box<dyn Executor>,
    pub(crate) agent: Option<Agent>,
    /// How KV moves, for people.
    pub(crate) transport: String,
}

impl Backend {
    /// Loads the model and allocates the arena. Takes seconds for a large model: not for the async runtime.
    pub(crate) fn start(config: &WorkerConfig, model: &ModelDir) -> Result<Self, WorkerError> {
        if let Device::Cuda(ordinal) = config.device {
            return Self::start_cuda(config, model, ordinal);
        }
        let (kv, blocks) = host_arena(config, model)?;
        memory::check(config, model, &kv, blocks)?;
        let Arena {
            memory,
            agent,
            transport,
        } = Arena::start(config, kv.block_bytes() * blocks as usize)?;
        let executor: Box<dyn Executor> = match config.device {
            Device::Fake { step_micros } => Box::new(fake_kv::executor(
                config,
                step_micros,
                model,
                memory,
                kv,
                blocks,
            )),
            _ => cpu(config, model, memory, kv)?,
        };
        Ok(Self {
            executor,
            agent,
            transport,
        })
    }

    pub(crate) fn descriptor(&self) -> Option<TransferDescriptor> {
        self.agent.as_ref().map(Agent::descriptor)
    }
}

/// Geometry and blocks of an arena in main memory.
///
/// # Errors
/// [`WorkerError::Config`] if it could serve nobody.
pub(crate) fn host_arena(
    config: &WorkerConfig,
    model: &ModelDir,
) -> Result<(KvGeometry, u32), WorkerError> {
    let spec = model.spec();
    let kv = match config.device {
        Device::Fake { .. } => fake_kv::geometry(config.block_tokens),
        _ => kv_geometry(spec, config.block_tokens),
    };
    let tokens_max = spec.tokens_max as u32;
    let blocks = config.kv_blocks(&kv, tokens_max)?;
    memory::serves_somebody(&kv, blocks, tokens_max)?;
    Ok((kv, blocks))
}

fn cpu(
    config: &WorkerConfig,
    model: &ModelDir,
    memory: Arc<dyn KvMemory>,
    kv: KvGeometry,
) -> Result<Box<dyn Executor>, WorkerError> {
    let failed = |detail: String| WorkerError::Model {
        path: model.path.clone(),
        detail,
    };
    if model.manifest.tp_size != 1 {
        return Err(failed(format!(
            "it is divided over {} ranks; the CPU executor runs one: prepare it with --tp-size 1",
            model.manifest.tp_size
        )));
    }
    let weights = model
        .weights(0)
        .map_err(|error| failed(error.to_string()))?;
    let options = CpuOptions {
        threads: config.threads(),
        kernel: None,
        step_tokens_max: config.step_tokens,
        step_sequences_max: config.batch,
    };
    let executor =
        CpuExecutor::load(model.spec(), &weights, memory, kv, options).map_err(|error| {
            WorkerError::Device {
                device: config.device.to_string(),
                detail: error.to_string(),
            }
        })?;
    Ok(Box::new(executor))
}

/// The KV arena, and who moves what is in it.
pub(crate) struct Arena {
    pub(crate) memory: Arc<dyn KvMemory>,
    pub(crate) agent: Option<Agent>,
    pub(crate) transport: String,
}

impl Arena {
    /// Registered with UCX where there is one. A worker that does both can do without, but not without the memory.
    fn start(config: &WorkerConfig, bytes: usize) -> Result<Self, WorkerError> {
        let agent_config = AgentConfig {
            arena_bytes: bytes,
            gpu: None,
            tls: config.ucx_tls.clone(),
        };
        match Agent::start(agent_config) {
            Ok((agent, arena)) => {
                let transport = agent.summary();
                Ok(Self {
                    memory: Arc::new(RegisteredMemory(arena)),
                    agent: Some(agent),
                    transport,
                })
            }
            Err(error)
                if config.role == Role::Both
                    && !matches!(error, TransferError::Arena { .. } | TransferError::Stopped) =>
            {
                tracing::warn!(%error, "no KV transfer: this worker serves its own prompts only");
                let memory = Arc::new(HeapMemory::new(bytes));
                Ok(Self {
                    memory,
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

/// The transfer agent's registered memory, as executors know memory.
struct RegisteredMemory(baton_transfer::Arena);

impl KvMemory for RegisteredMemory {
    fn base(&self) -> *mut u8 {
        self.0.base()
    }

    fn len(&self) -> usize {
        self.0.len()
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
            let error = Arena::start(&config, 0).map(|arena| arena.transport);
            let told = error.expect_err("an arena").to_string();
            assert!(told.contains("KV arena"), "{told}");
        }
    }
}
