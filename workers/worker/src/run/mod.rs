//! A worker's life: device, engine thread, bus, desk, and all of it backwards.

#[cfg(feature = "simulation")]
mod simulated;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use baton_bus::Wire;
use baton_engine::{Engine, EngineConfig, PROBE_MAX};
use baton_model::{ModelDir, TOKENIZER};
use baton_protocol::limits::SENTENCE_BYTES_MAX;
use baton_protocol::{
    Capacity, CostPoint, Incarnation, ModelFingerprint, ModelInfo, PROTOCOL_VERSION, Role,
    StepCost, WorkerDescriptor,
};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::bus::{self, Outbox, Publisher, Subscriptions};
use crate::checks::Checks;
use crate::common::{Common, Identity};
use crate::desk::{Desk, Parts};
use crate::device::Backend;
use crate::engine_thread::EngineHandle;
use crate::frames::TokenOutbox;
use crate::grammars::Grammars;
use crate::mover::Mover;
use crate::presence::{MicroService, SharedLoad};
use crate::random::random;
use crate::watch::Watching;
use crate::{Device, WorkerConfig, WorkerError};

#[cfg(feature = "simulation")]
pub use simulated::{SimulatedConfig, SimulatedWorker};

/// What is left to publish at the end may take this long.
const FAREWELL: Duration = Duration::from_secs(2);

/// Runs a worker until `shutdown` resolves and what it had is finished. `serving` is told when it takes jobs.
///
/// # Errors
/// [`WorkerError`] if it cannot start, or if its executor broke.
pub async fn run(
    config: WorkerConfig,
    serving: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let mut shutdown = std::pin::pin!(shutdown);
    config.check()?;
    // Before the minutes that a model takes to load.
    config.bus.check().map_err(WorkerError::Bus)?;
    let config = Arc::new(config);
    let incarnation = random()
        .map(|bytes| Incarnation(u64::from_le_bytes(bytes)))
        .map_err(|detail| WorkerError::System {
            what: "drawing a random number",
            detail,
        })?;
    let start = config.clone();
    let loading = blocking("loading the model", move || {
        let model = ModelDir::open(&start.model_dir).map_err(|error| WorkerError::Model {
            path: start.model_dir.clone(),
            detail: error.to_string(),
        })?;
        let backend = Backend::start(&start, &model)?;
        Ok((model, backend))
    });
    // Both this and the first connection may take minutes, and nobody who asks to end waits for them. The thread that loads
    // goes on until the process ends.
    let (model, backend) = tokio::select! {
        loaded = loading => loaded?,
        () = &mut shutdown => return Ok(()),
    };
    let info = backend.executor.info().clone();
    let weights = model.manifest.dtype;
    let model = model_info(&config, &model, &info)?;
    let descriptor = WorkerDescriptor {
        v: PROTOCOL_VERSION,
        worker: config.worker.clone(),
        incarnation,
        role: config.role,
        model: model.clone(),
        kv: info.kv.clone(),
        shares: backend.shares.clone(),
        transfer: backend.descriptor(),
    };
    let Backend {
        executor,
        shares,
        agent,
        transport,
    } = backend;
    // Several lines, each short enough to be read.
    tracing::info!(
        worker = %config.worker,
        %incarnation,
        role = config.role.label(),
        model = model.name,
        device = info.device,
        "starting"
    );
    tracing::info!(
        tokens_max = model.tokens_max,
        ranks = shares.ranks(),
        weights = weights.label(),
        cluster = config.cluster.name(),
        bus = config.bus.url_without_secrets(),
        transport,
        "settings"
    );
    tracing::info!(
        kv_blocks = info.blocks,
        kv_bytes = info.blocks as usize * info.kv.block_bytes(),
        block_tokens = info.kv.block_tokens,
        step_tokens = info.step_tokens_max,
        batch = info.step_sequences_max,
        queue = config.queue,
        prefix_cache = config.prefix_cache,
        lease_ms = config.lease_ms,
        drain_ms = config.drain_ms,
        "limits"
    );
    tracing::debug!(fingerprint = %model.fingerprint, bus = ?config.bus, "further settings");

    let (client, is_up) = tokio::select! {
        connected = bus::connect(&config.bus, &config.worker) => connected?,
        () = &mut shutdown => return Ok(()),
    };
    let engine = Engine::new(
        executor,
        EngineConfig {
            step_tokens_max: info.step_tokens_max,
            sequences_max: info.step_sequences_max,
            queue_max: config.queue,
            prefix_cache: config.prefix_cache,
        },
    );
    let itl = (config.itl_ms > 0).then(|| Duration::from_millis(config.itl_ms.into()));
    let engine = tokio::select! {
        probed = probe(engine.with_itl(itl), config.clone()) => probed?,
        () = &mut shutdown => return Ok(()),
    };
    let pool = engine.pool();
    let tokens = Arc::new(TokenOutbox::default());
    let grammars = Grammars::new(config.model_dir.join(TOKENIZER), info.vocab);
    let (engine, events) = EngineHandle::start(
        engine,
        Some(grammars),
        tokens.clone(),
        // Prompts, generations, and interactive ones that take the places of batch.
        2 * config.queue + info.step_sequences_max,
    )?;
    let (watching, stuck) = Watching::start(&engine.pulse, config.device, agent.as_ref())?;
    let wire = Wire::from(client.clone());
    let (outbox, control) = Outbox::new(wire.clone());
    let publisher = Publisher {
        wire: wire.clone(),
        cluster: config.cluster.clone(),
        worker: config.worker.clone(),
        incarnation,
        control,
        tokens: tokens.clone(),
        is_up: is_up.clone(),
        engine: engine.waker.clone(),
    };
    let mut publisher = tokio::spawn(publisher.run());
    let shared_load = SharedLoad::default();
    let mut subscriptions = Subscriptions::new(
        &wire,
        &config.cluster,
        &config.worker,
        config.role.decodes(),
        &outbox,
    )
    .await?;
    let service = MicroService::start(
        &client,
        &config.cluster,
        &descriptor,
        shared_load.clone(),
        config.tracer.clone(),
    )
    .await?;
    let mut desk = Desk::new(Parts {
        common: Common {
            me: Identity {
                worker: config.worker.clone(),
                incarnation,
                role: config.role,
                device: info.device.clone(),
                ranks: shares.ranks() as u32,
                weights,
                transport,
                capacity: Capacity {
                    blocks: info.blocks,
                    batch: info.step_sequences_max as u32,
                    queue: config.queue as u32,
                },
                itl_ms: (config.itl_ms > 0).then_some(config.itl_ms),
                step_tokens: info.step_tokens_max as u32,
                leases_prefixes: config.prefix_cache && config.role.prefills() && agent.is_some(),
            },
            checks: Checks {
                model,
                kv: info.kv.clone(),
                blocks: info.blocks,
            },
            cluster: config.cluster.clone(),
            wire,
            outbox,
            tokens,
            engine,
            pool,
            mover: agent.clone().map(Mover::Ucx),
            deadlines: BTreeSet::new(),
            next_key: 1,
            tracer: config.tracer.clone(),
        },
        shares,
        lease: Duration::from_millis(config.lease_ms.into()),
        drain: Duration::from_millis(config.drain_ms),
        shared_load,
        // Hosts of GPUs have cores to spare; where the CPU computes it needs them all.
        may_spin: matches!(config.device, Device::Cuda(_)) && config.role != Role::Both,
        pulse: watching.desk.clone(),
        stuck,
    });
    tracing::info!("serving");
    serving();
    let outcome = desk.run(&mut subscriptions, events, is_up, shutdown).await;

    watching.desk.rest();
    watching.leaving.beat();
    desk.send_beat();
    if timeout(FAREWELL, service.stop()).await.is_err() {
        tracing::warn!("the bus did not hear in time that nobody listens here any more");
    }
    desk.answer_latecomers(&mut subscriptions.inbox).await;
    drop(subscriptions);
    let Desk {
        common,
        context,
        decode,
        hangs,
        ..
    } = desk;
    // What they hold of the arena goes back to the engine before it ends.
    drop((context, decode));
    let Common {
        mut engine, outbox, ..
    } = common;
    if hangs {
        engine.leave_behind();
    } else {
        blocking("ending the engine", move || {
            engine.shutdown();
            Ok(())
        })
        .await?;
    }
    // The publisher ends with its last outbox, and not before the engine said its last.
    drop(outbox);
    if timeout(FAREWELL, &mut publisher).await.is_err() {
        tracing::warn!("the last messages did not reach the bus in time");
        publisher.abort();
    }
    if let Some(agent) = agent {
        blocking("ending the transfer agent", move || {
            agent.shutdown();
            Ok(())
        })
        .await?;
    }
    tracing::info!("left");
    outcome
}

fn model_info(
    config: &WorkerConfig,
    model: &ModelDir,
    info: &baton_engine::ExecutorInfo,
) -> Result<ModelInfo, WorkerError> {
    let manifest = &model.manifest;
    let fingerprint = ModelFingerprint::new(manifest.fingerprint.clone()).map_err(|error| {
        WorkerError::Model {
            path: config.model_dir.clone(),
            detail: error.to_string(),
        }
    })?;
    if manifest.name.len() > SENTENCE_BYTES_MAX {
        return Err(WorkerError::Model {
            path: config.model_dir.clone(),
            detail: format!(
                "its name has {} bytes, beats hold {SENTENCE_BYTES_MAX}: give it a shorter one (--model-name of model-prep)",
                manifest.name.len()
            ),
        });
    }
    Ok(ModelInfo {
        name: manifest.name.clone(),
        fingerprint,
        tokens_max: info.tokens_max.min(manifest.tokens_max as u32),
        vocab: info.vocab,
    })
}

/// Runs what blocks beside the async runtime.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    body: impl FnOnce() -> Result<T, WorkerError> + Send + 'static,
) -> Result<T, WorkerError> {
    match spawn_blocking(body).await {
        Ok(outcome) => outcome,
        Err(error) => Err(WorkerError::System {
            what,
            detail: error.to_string(),
        }),
    }
}

/// What steps of the fake device cost, if they cost anything: as it was told.
fn fake_cost(config: &WorkerConfig, step_micros: u64) -> Option<StepCost> {
    let us = step_micros as f32;
    match config.fake_cost.clone() {
        Some(mut cost) => {
            cost.layers.iter_mut().for_each(|point| point.us += us);
            Some(cost)
        }
        None => (step_micros > 0).then(|| StepCost {
            layers: vec![CostPoint { tokens: 1, us }],
            ..StepCost::default()
        }),
    }
}

/// Has the engine measure what its steps cost.
///
/// # Errors
/// [`WorkerError::Device`] if a step fails, or does not end.
async fn probe(mut engine: Engine, config: Arc<WorkerConfig>) -> Result<Engine, WorkerError> {
    if let Device::Fake { step_micros } = config.device {
        return Ok(match fake_cost(&config, step_micros) {
            Some(cost) => engine.with_cost(cost),
            None => engine,
        });
    }
    let device = config.device;
    let failed = move |detail: String| WorkerError::Device {
        device: device.to_string(),
        detail: format!("measuring what its steps cost: {detail}"),
    };
    let measured = blocking("measuring steps", move || {
        engine.probe().map_err(|error| failed(error.message))?;
        Ok(engine)
    });
    // The probe ends when its time is over; what it may be late by is one step.
    let most = PROBE_MAX + device.step_time_max();
    let engine = timeout(most, measured).await.unwrap_or_else(|_| {
        Err(failed(format!(
            "a step did not end within {:.0} s",
            most.as_secs_f32()
        )))
    })?;
    if let Some(cost) = engine.cost() {
        let steps = [1, 32, 256, 2048].map(|tokens| (cost.layers_us(tokens) / 1e3, tokens));
        let steps: Vec<String> = steps
            .iter()
            .map(|(ms, tokens)| format!("{tokens}: {ms:.2} ms"))
            .collect();
        tracing::info!(
            steps = steps.join(", "),
            row_us = three_digits(cost.row_us),
            kv_token_us = three_digits(cost.kv_token_us),
            pair_us = three_digits(cost.pair_us),
            itl_ms = config.itl_ms,
            "measured what steps cost"
        );
    }
    Ok(engine)
}

/// A number for a log line, with three digits.
pub(crate) fn three_digits(number: f32) -> f64 {
    format!("{number:.2e}").parse().unwrap_or_default()
}
