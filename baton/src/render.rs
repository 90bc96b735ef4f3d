//! `baton render`: a deployment as a Slurm script, for Kubernetes or for Compose. The same file gives the same text, always.

mod compose;
mod container;
mod kubernetes;
mod slurm;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::Failure;
use crate::deployment::{ApiServers, Deployment, WorkerGroup, api_server_drain_s, worker_drain_s};
use crate::shutdown::{END_WAIT, FAREWELL};

#[derive(Args, Debug)]
pub struct RenderArgs {
    /// What for
    #[arg(value_enum)]
    target: Target,
    /// File that describes the cluster (YAML, docs/deployment.md)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// What runs the processes.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Target {
    /// A script for sbatch
    Slurm,
    /// Objects for kubectl apply
    Kubernetes,
    /// A file for docker compose
    Compose,
}

/// Writes it to standard output.
pub fn run(args: RenderArgs) -> Result<(), Failure> {
    let deployment = Deployment::read(&args.config)?;
    let text = render(args.target, &deployment)
        .map_err(|failure| format!("{}: {failure}", args.config.display()))?;
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn render(target: Target, deployment: &Deployment) -> Result<String, Failure> {
    match target {
        Target::Slurm => slurm::render(deployment),
        Target::Kubernetes => kubernetes::render(deployment),
        Target::Compose => compose::render(deployment),
    }
}

/// What NATS listens on.
const NATS_PORT: u16 = 4222;
/// What NATS is told beside where to listen.
const NATS_CONFIG: &str = include_str!("../../container/nats-server.conf");
/// Beyond the time that a process takes by itself, for what starts and watches it, in seconds.
const SPARE_S: u64 = 3;

/// Seconds from SIGTERM on after which a worker may be killed.
fn worker_grace_s(group: &WorkerGroup) -> u64 {
    worker_drain_s(group) + (FAREWELL + END_WAIT).as_secs() + SPARE_S
}

/// The same of an API server.
fn api_server_grace_s(servers: &ApiServers) -> u64 {
    api_server_drain_s(servers) + (FAREWELL + END_WAIT).as_secs() + SPARE_S
}

/// The port of the NATS server that the deployment starts.
fn nats_port(deployment: &Deployment) -> Result<u16, Failure> {
    match &deployment.nats.request_plane_uri {
        None => Ok(NATS_PORT),
        Some(uri) => {
            let listen = crate::up::Listen::parse(uri)
                .map_err(|error| format!("nats.request-plane-uri: {error}"))?;
            Ok(listen.port.unwrap_or(NATS_PORT))
        }
    }
}

/// A model must be a directory that all machines or containers see by one path.
fn model_directory<'a>(path: &str, model: &'a str) -> Result<&'a str, Failure> {
    match model.starts_with('/') {
        true => Ok(model.trim_end_matches('/')),
        false => Err(format!(
            "{path}: {model} is no whole path: prepare the model with `baton model-prep --out DIR`, and name the directory, where every machine has it"
        )
        .into()),
    }
}

#[cfg(test)]
mod tests;
