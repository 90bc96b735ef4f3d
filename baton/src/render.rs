//! `baton render`: a deployment as a Slurm script, for Kubernetes or for Compose.

use std::path::PathBuf;

use clap::Args;

use crate::Failure;
use crate::deployment::Deployment;

#[derive(Args, Debug)]
pub struct RenderArgs {
    /// File that describes the cluster (YAML, docs/deployment.md)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub fn run(args: RenderArgs) -> Result<(), Failure> {
    let _ = Deployment::read(&args.config)?;
    Ok(())
}
