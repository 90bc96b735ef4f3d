//! What a command line of `baton up` describes, looked at before anything starts.

use std::path::{Path, PathBuf};

use super::{UpArgs, flags, nats};
use crate::Failure;
use crate::deployment::Deployment;

/// What the file says, or else the flags.
pub fn described(args: &UpArgs) -> Result<Deployment, Failure> {
    let Some(file) = &args.config else {
        return flags::deployment(args);
    };
    // The variable is the API server's too, and holds where the file names no keys.
    let variable = std::env::var_os("BATON_API_KEYS_FILE").map(PathBuf::from);
    if args.keys.api_keys_file != variable {
        let why = "--api-keys-file cannot be used with --config: write api-server.api-keys-file";
        return Err(why.into());
    }
    // The variables are the processes' too, and hold where the file says nothing.
    let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
    let endpoint = variable("OTEL_EXPORTER_OTLP_ENDPOINT");
    if args.otlp.endpoint() != endpoint.as_deref() {
        let why = "--otlp-endpoint cannot be used with --config: write traces.otlp-endpoint";
        return Err(why.into());
    }
    let sample = variable("OTEL_TRACES_SAMPLER_ARG").and_then(|part| part.parse().ok());
    if args.sample.trace_sample != sample {
        let why = "--trace-sample cannot be used with --config: write api-server.trace-sample";
        return Err(why.into());
    }
    Deployment::read(file)
}

/// Looks at every file and program that is named, before a model is prepared or anything starts.
pub fn check_here(args: &UpArgs, deployment: &Deployment) -> Result<(), Failure> {
    deployment.check_files()?;
    if deployment.nats.is_own() {
        nats::find(deployment.nats.nats_server.as_deref().map(Path::new))?;
    }
    if let Some(file) = &args.ready_file {
        let directory = file.parent().filter(|path| !path.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        if file.file_name().is_none() || !directory.is_dir() {
            let why = "no file can be there: name one in a directory that exists";
            return Err(format!("--ready-file {}: {why}", file.display()).into());
        }
    }
    Ok(())
}
