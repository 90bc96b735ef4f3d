//! `baton context-worker`, `decode-worker` and `worker --role`: one worker of a cluster.

use std::path::PathBuf;

use baton_protocol::subjects::Cluster;
use baton_protocol::{Role, WorkerId};
use baton_worker::WorkerConfig;
use clap::{Args, ValueEnum};

use crate::Failure;
use crate::bus_args::BusArgs;
use crate::own_name::own_name;
use crate::shutdown::{END_WAIT, Shutdown};
use crate::systemd::{ServiceManager, refuse_listeners};
use crate::trace_args::{self, OtlpArgs, SampleArgs};
use crate::tuning::TuningArgs;

#[derive(Args, Debug)]
pub struct WorkerArgs {
    /// Model directory, as `baton model-prep` makes it
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    bus: BusArgs,
    /// Name of the cluster to join
    #[arg(long, default_value = "baton")]
    cluster: String,
    /// Name of this worker, its own in the cluster [default: role, host, process id and a random number]
    #[arg(long)]
    worker_name: Option<String>,
    /// What to compute on: cpu, cuda:GPUS (0, 0-3 or 0,2: a rank on each), fake or fake:MICROSECONDS_PER_STEP
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Tensor-parallel ranks the model is shared out over [default: as many as there are GPUs, or as the model directory is divided]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    tp_size: Option<u32>,
    /// Compute threads of all ranks [default: one for each CPU]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Time for requests under way to finish at the end, in seconds [default: 25]
    #[arg(long)]
    drain_s: Option<u64>,
    /// How long finished prompts' KV waits to be fetched, in milliseconds [default: 30000]
    #[arg(long)]
    lease_ms: Option<u32>,
    #[command(flatten)]
    tuning: TuningArgs,
    #[command(flatten)]
    otlp: OtlpArgs,
    /// JSON file with what steps of the fake device cost
    #[arg(long, hide = true)]
    fake_cost: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct RoleWorkerArgs {
    /// What it may do
    #[arg(long, value_enum, default_value_t = RoleArg::Both)]
    role: RoleArg,
    #[command(flatten)]
    worker: WorkerArgs,
}

/// A worker's role on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleArg {
    /// Computes prompts and stages their KV
    Context,
    /// Pulls KV and generates
    Decode,
    /// Does both: unsplit serving
    Both,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Context => Self::Context,
            RoleArg::Decode => Self::Decode,
            RoleArg::Both => Self::Both,
        }
    }
}

/// Runs a worker of the role that the command line names.
pub fn run_role(args: RoleWorkerArgs) -> Result<(), Failure> {
    run(args.worker, args.role.into())
}

/// Runs a worker until a signal comes and it has drained.
pub fn run(args: WorkerArgs, role: Role) -> Result<(), Failure> {
    let manager = ServiceManager::from_env();
    refuse_listeners()?;
    let otlp = args.otlp.clone();
    let mut config = config(args, role)?;
    let named = (config.worker.as_str(), config.cluster.name());
    let (tracer, exporter) =
        trace_args::start(&otlp, SampleArgs::default(), service_name(role), named)?;
    config.tracer = tracer;
    // The bus is all that Tokio carries here; computing and moving KV have threads of their own. On one thread, because a
    // hand-over from thread to thread takes 0.2 ms on a machine that has gone to sleep, and a request has many.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let mut shutdown = Shutdown::catch()?;
        tokio::spawn(manager.clone().show_life());
        let (tells, name) = (manager.clone(), config.worker.to_string());
        let serving = move || tells.ready(&format!("serving as {name}"));
        let drain = async move {
            let signal = shutdown.requested().await;
            manager.stopping();
            tracing::info!("{signal}: draining");
        };
        let ended = baton_worker::run(config, serving, drain).await;
        baton_watchdog::end_within(END_WAIT);
        Ok(ended?)
    });
    // A thread that still loads a model is not waited for.
    runtime.shutdown_background();
    drop(exporter);
    outcome
}

/// What a worker is called in traces, unless OTEL_SERVICE_NAME says otherwise.
fn service_name(role: Role) -> &'static str {
    match role {
        Role::Context => "baton-context-worker",
        Role::Decode => "baton-decode-worker",
        Role::Both => "baton-worker",
    }
}

/// What a command line means.
///
/// # Errors
/// A value that means nothing.
pub fn config_of(args: RoleWorkerArgs) -> Result<WorkerConfig, Failure> {
    config(args.worker, args.role.into())
}

fn config(args: WorkerArgs, role: Role) -> Result<WorkerConfig, Failure> {
    let name = match args.worker_name {
        Some(name) => name,
        None => own_name(role.label())?,
    };
    let worker = WorkerId::new(name).map_err(|error| format!("--worker-name: {error}"))?;
    let cluster = Cluster::new(args.cluster).map_err(|error| format!("--cluster: {error}"))?;
    let mut config = WorkerConfig::new(worker, role, args.model, cluster);
    config.bus = args.bus.config();
    config.device = args.device.parse()?;
    config.tp_size = args.tp_size;
    config.threads = args.threads;
    if let Some(seconds) = args.drain_s {
        config.drain_ms = seconds.saturating_mul(1000);
    }
    config.lease_ms = args.lease_ms.unwrap_or(config.lease_ms);
    apply(args.tuning, &mut config);
    if let Some(path) = args.fake_cost {
        let at = |error: &dyn std::fmt::Display| format!("--fake-cost {}: {error}", path.display());
        let text = std::fs::read(&path).map_err(|error| at(&error))?;
        config.fake_cost = Some(serde_json::from_slice(&text).map_err(|error| at(&error))?);
    }
    Ok(config)
}

/// What the tuning flags say, and defaults of the device for what they do not.
pub fn apply(tuning: TuningArgs, config: &mut WorkerConfig) {
    if let Some(mib) = tuning.kv_mib {
        config.kv_bytes = Some(mib.saturating_mul(1 << 20));
    }
    config.block_tokens = tuning.block_tokens.unwrap_or(config.block_tokens);
    let device = config.device;
    let step_tokens = tuning.step_tokens;
    config.step_tokens = step_tokens.unwrap_or_else(|| device.step_tokens_default());
    config.itl_ms = tuning.itl_ms.unwrap_or_else(|| device.itl_ms_default());
    config.batch = tuning.batch.unwrap_or_else(|| device.batch_default());
    if let Some(fraction) = tuning.kv_cache_free_gpu_memory_fraction {
        config.kv_free_gpu_memory_fraction = fraction;
    }
    config.queue = tuning.queue.unwrap_or(config.queue);
    config.prefix_cache = !tuning.no_prefix_cache;
    config.ucx_tls = tuning.ucx_tls;
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        worker: WorkerArgs,
    }

    fn parse<'a>(line: impl IntoIterator<Item = &'a str>) -> WorkerConfig {
        let line = ["w", "--model", "/m"].into_iter().chain(line);
        config(Line::parse_from(line).worker, Role::Decode).unwrap()
    }

    #[test]
    fn what_is_not_said_is_left_to_the_worker() {
        let config = parse([]);
        let worker = WorkerId::new("w").unwrap();
        let default = WorkerConfig::new(worker, Role::Decode, "/m", Cluster::new("baton").unwrap());
        assert_eq!(
            format!(
                "{:?}",
                WorkerConfig {
                    worker: config.worker.clone(),
                    ..default
                }
            ),
            format!("{config:?}")
        );
        assert!(
            config.worker.as_str().starts_with("decode-"),
            "{}",
            config.worker
        );
    }

    #[test]
    fn tuning_is_taken_over() {
        let line = "--kv-mib 64 --block-tokens 16 --step-tokens 128 --batch 4 --queue 9 --ucx-tls tcp,self --no-prefix-cache";
        let config = parse(line.split(' '));
        assert_eq!(
            (
                config.kv_bytes,
                config.block_tokens,
                config.step_tokens,
                config.batch,
                config.queue,
                config.prefix_cache
            ),
            (Some(64 << 20), 16, 128, 4, 9, false)
        );
        assert_eq!(config.ucx_tls.as_deref(), Some("tcp,self"));
    }
}
