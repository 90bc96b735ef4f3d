//! What a worker's KV takes, compared with what there is before anything is mapped, and with what anybody could be served with.

use baton_model::ModelDir;
use baton_protocol::KvGeometry;
use baton_protocol::limits::SEQUENCE_TOKENS_MIN;
use baton_transfer::memory;

use super::HostArena;
use crate::config::{Device, WorkerConfig};
use crate::error::WorkerError;

/// Bytes of main memory that a worker of this configuration fills at its start: its KV arena and, on the CPU, its weights. A
/// GPU's are its own.
///
/// # Errors
/// [`WorkerError`] if the model cannot be read, or the arena could serve nobody.
pub fn host_memory_bytes(config: &WorkerConfig) -> Result<u64, WorkerError> {
    let model = ModelDir::open(&config.model_dir).map_err(|error| WorkerError::Model {
        path: config.model_dir.clone(),
        detail: error.to_string(),
    })?;
    if let Device::Cuda(_) = config.device {
        return Ok(0);
    }
    let arena = HostArena::new(config, &model)?;
    Ok(bytes(config.device, &model, &arena))
}

/// Compares so many bytes with what the machine, its control groups and this process's limits have left.
///
/// # Errors
/// [`WorkerError::Config`] with a sentence on what there is, and what to set.
pub fn check_host_memory(bytes: u64, what: &str) -> Result<(), WorkerError> {
    memory::check(bytes, what).map_err(|detail| WorkerError::Config {
        detail: format!("{detail}; lower --kv-mib, or give it more memory"),
    })
}

/// The same for one worker whose arena is known.
pub(crate) fn check(
    config: &WorkerConfig,
    model: &ModelDir,
    arena: &HostArena,
) -> Result<(), WorkerError> {
    let bytes = bytes(config.device, model, arena);
    let arena = arena.bytes();
    let what = match bytes - arena {
        0 => format!("the KV arena of {} MiB", arena >> 20),
        weights => format!(
            "the KV arena of {} MiB with the weights of {} MiB",
            arena >> 20,
            weights >> 20
        ),
    };
    check_host_memory(bytes, &what)
}

fn bytes(device: Device, model: &ModelDir, arena: &HostArena) -> u64 {
    let is_weight = |name: &str| name.ends_with(".safetensors");
    let weights = match device {
        // They are packed into memory of the worker's own.
        Device::Cpu => {
            let files = model.manifest.files.iter();
            files
                .filter(|file| is_weight(&file.name))
                .map(|file| file.bytes)
                .sum()
        }
        Device::Fake { .. } | Device::Cuda(_) => 0,
    };
    arena.bytes().saturating_add(weights)
}

/// Refuses an arena in which not even a short sequence has room. A block takes `block` bytes.
///
/// # Errors
/// [`WorkerError::Config`] with what sequences take.
pub(crate) fn serves_somebody(
    kv: &KvGeometry,
    block: u64,
    blocks: u32,
    tokens_max: u32,
) -> Result<(), WorkerError> {
    let least = SEQUENCE_TOKENS_MIN.min(tokens_max);
    let takes = |tokens: u32| kv.blocks_for(tokens as usize) as u64;
    if u64::from(blocks) >= takes(least) {
        return Ok(());
    }
    let mib = |tokens| (takes(tokens) * block).div_ceil(1 << 20);
    Err(WorkerError::Config {
        detail: format!(
            "a KV arena of {blocks} blocks holds {} tokens, which serves nobody. A sequence of {least} tokens takes {} MiB, one of \
             the model's longest, {tokens_max} tokens, {} MiB: set --kv-mib to {} at least",
            u64::from(blocks) * u64::from(kv.block_tokens),
            mib(least),
            mib(tokens_max),
            mib(least)
        ),
    })
}

#[cfg(test)]
mod tests {
    use baton_protocol::KvGroup;

    use super::*;

    /// That of SmolLM2-135M: 720 KiB a block.
    fn kv() -> KvGeometry {
        KvGeometry::bf16(
            32,
            vec![KvGroup {
                layers: 30,
                kv_heads: 3,
                head_dim: 64,
            }],
        )
    }

    const BLOCK: u64 = 720 << 10;

    #[test]
    fn an_arena_that_holds_no_sequence_is_refused_with_what_sequences_take() {
        let told = serves_somebody(&kv(), BLOCK, 1, 8192)
            .unwrap_err()
            .to_string();
        for words in [
            "holds 32 tokens",
            "64 tokens takes 2 MiB",
            "8192 tokens, 180 MiB",
            "--kv-mib to 2",
        ] {
            assert!(told.contains(words), "{told}");
        }
        assert!(serves_somebody(&kv(), BLOCK, 2, 8192).is_ok());
        // A model of short sequences needs no more than one of its longest.
        assert!(serves_somebody(&kv(), BLOCK, 1, 32).is_ok());
    }
}
