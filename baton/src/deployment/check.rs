//! What in a deployment cannot work, found before anything of it runs.

use std::fmt;

use baton_protocol::Role;
use baton_protocol::subjects::Cluster;
use clap::error::{ContextKind, ErrorKind};
use clap::{Args, FromArgMatches};

use super::{Deployment, Devices, WorkerGroup};
use crate::api_server::ApiServerArgs;
use crate::worker::{self, RoleWorkerArgs};

/// Most workers of one file, and most API servers.
const COUNT_MAX: usize = 1024;
/// Most ranks of a worker.
const RANKS_MAX: u32 = 64;

/// What is wrong, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    path: String,
    why: String,
}

impl Refusal {
    /// `path` is the field's: `decode[0].tp-size`; empty for the whole.
    pub fn new(path: impl Into<String>, why: impl fmt::Display) -> Self {
        Self {
            path: path.into(),
            why: why.to_string(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => f.write_str(&self.why),
            path => write!(f, "{path}: {}", self.why),
        }
    }
}

impl std::error::Error for Refusal {}

impl Deployment {
    /// Everything that holds wherever it runs.
    ///
    /// # Errors
    /// The first thing that cannot work.
    pub fn check(&self) -> Result<(), Refusal> {
        if self.model.is_empty() {
            return Err(Refusal::new("model", "it is empty: name a model"));
        }
        Cluster::new(self.cluster.as_str()).map_err(|error| Refusal::new("cluster", error))?;
        self.check_counts()?;
        self.workers()?;
        for (path, role, group) in self.groups() {
            check_group(self, &path, role, group)?;
        }
        self.check_api_servers()?;
        self.check_nats()
    }

    /// Nothing of it is a secret: files are copied, shown and kept.
    ///
    /// # Errors
    /// If an address has a password or token in it.
    pub fn check_secrets(&self) -> Result<(), Refusal> {
        match &self.nats.request_plane_uri {
            Some(uri) if uri.contains('@') => Err(Refusal::new(
                "nats.request-plane-uri",
                "it has a password or token, and a file is no place for one: give request-plane-credentials or request-plane-nkey",
            )),
            _ => Ok(()),
        }
    }

    /// The files that it names can be used on this host.
    ///
    /// # Errors
    /// The first that cannot.
    pub fn check_files(&self) -> Result<(), Refusal> {
        // The address of one that is started is not known yet.
        let uri = match self.nats.is_own() {
            true => Some("nats://127.0.0.1"),
            false => self.nats.request_plane_uri.as_deref(),
        };
        let words = self.api_server_args(uri, self.api_server.port(), &self.model);
        let args: ApiServerArgs = parsed("api-server", &words)?;
        args.check_files().map_err(|error| Refusal::new("", error))
    }

    fn check_counts(&self) -> Result<(), Refusal> {
        let mut workers = 0_usize;
        for (path, _, group) in self.groups() {
            if group.count == 0 {
                return Err(Refusal::new(
                    format!("{path}.count"),
                    "it is 0: leave the group away",
                ));
            }
            workers = workers.saturating_add(group.count);
            if workers > COUNT_MAX {
                return Err(Refusal::new(
                    format!("{path}.count"),
                    format!("that makes more than {COUNT_MAX} workers: make two clusters"),
                ));
            }
        }
        let any = |does: fn(Role) -> bool| self.groups().any(|(_, role, _)| does(role));
        if !any(Role::prefills) {
            return Err(Refusal::new(
                "",
                "nobody would run prompts: give a context group (--context-worker-count 1) or one of both (--both-worker-count 1)",
            ));
        }
        if !any(Role::decodes) {
            return Err(Refusal::new(
                "",
                "nobody would generate: give a decode group (--decode-worker-count 1) or one of both (--both-worker-count 1)",
            ));
        }
        Ok(())
    }

    fn check_api_servers(&self) -> Result<(), Refusal> {
        let servers = &self.api_server;
        let refused =
            |field: &str, why: &str| Err(Refusal::new(format!("api-server.{field}"), why));
        if servers.count == 0 || servers.count > COUNT_MAX {
            return refused("count", &format!("it must be from 1 to {COUNT_MAX}"));
        }
        if servers.api_server_host.is_empty() {
            return refused("api-server-host", "it is empty: give an address");
        }
        let last = usize::from(servers.port()) + servers.count - 1;
        if servers.api_server_port != Some(0) && last > usize::from(u16::MAX) {
            return refused(
                "api-server-port",
                "the last API server's port would be above 65535: begin lower",
            );
        }
        let words = self.api_server_args(None, servers.port(), &self.model);
        let args: ApiServerArgs = parsed("api-server", &words)?;
        args.check_values()
            .map_err(|error| Refusal::new("api-server", error))
    }

    fn check_nats(&self) -> Result<(), Refusal> {
        let nats = &self.nats;
        let refused = |field: &str, why: &str| Err(Refusal::new(format!("nats.{field}"), why));
        if !nats.is_own() {
            return Ok(());
        }
        if nats.initialize_request_plane && nats.request_plane_uri.is_none() {
            return refused(
                "initialize-request-plane",
                "it says to start a NATS server at an address, and there is none: give request-plane-uri, or leave it away",
            );
        }
        for (field, value) in [
            ("request-plane-credentials", &nats.request_plane_credentials),
            ("request-plane-nkey", &nats.request_plane_nkey),
            ("request-plane-ca", &nats.request_plane_ca),
            ("request-plane-certificate", &nats.request_plane_certificate),
            (
                "request-plane-certificate-key",
                &nats.request_plane_certificate_key,
            ),
        ] {
            if value.is_some() {
                return refused(
                    field,
                    "the NATS server that the deployment starts asks for none: give the request-plane-uri of yours",
                );
            }
        }
        Ok(())
    }
}

fn check_group(
    deployment: &Deployment,
    path: &str,
    role: Role,
    group: &WorkerGroup,
) -> Result<(), Refusal> {
    let refused = |field: &str, why: &str| Err(Refusal::new(format!("{path}.{field}"), why));
    match (&group.devices, group.tp_size) {
        (_, Some(ranks)) if ranks == 0 || ranks > RANKS_MAX => {
            return refused("tp-size", &format!("it must be from 1 to {RANKS_MAX}"));
        }
        (Devices::Host(device), Some(2..)) if device != "cpu" => {
            return refused(
                "tp-size",
                "the fake device has no model to share out: leave it away",
            );
        }
        (Devices::Host(_), _) if group.share_devices => {
            return refused(
                "share-devices",
                "it is for GPUs, and what is no GPU is always shared: leave it away",
            );
        }
        _ => {}
    }
    let gpus = group.gpus_each();
    let gpus = gpus.map_err(|why| Refusal::new(format!("{path}.devices"), why))?;
    if !matches!(gpus, 0 | 1 | 2 | 4 | 8) {
        return refused(
            if group.tp_size.is_some() {
                "tp-size"
            } else {
                "devices"
            },
            &format!("that makes {gpus} GPUs for each worker: a worker runs on 1, 2, 4 or 8"),
        );
    }
    if group.model.as_deref() == Some("") {
        return refused("model", "it is empty: name a model, or leave it away");
    }
    // The worker's own rules hold for what is passed on to it; how many GPUs it has is settled above.
    let mut group = group.clone();
    let device = match &group.devices {
        Devices::Host(_) => group.devices.clone(),
        Devices::Cuda(_) => {
            group.tp_size = None;
            Devices::Cuda(vec![0])
        }
    };
    let model = deployment.model_of(&group);
    let words = deployment.worker_args(None, role, "w", &group, &device, model);
    let args: RoleWorkerArgs = parsed(path, &words)?;
    worker::config_of(args)
        .and_then(|config| Ok(config.check()?))
        .map_err(|error| Refusal::new(path, error))
}

/// What a command line means to a subcommand; an error names the field.
pub fn parsed<A: Args + FromArgMatches>(path: &str, words: &[String]) -> Result<A, Refusal> {
    let command = A::augment_args(clap::Command::new("baton"));
    command
        .try_get_matches_from(words)
        .and_then(|mut matches| A::from_arg_matches_mut(&mut matches))
        .map_err(|error| {
            let flag = error.get(ContextKind::InvalidArg).map(ToString::to_string);
            let field = flag
                .as_deref()
                .and_then(|flag| flag.strip_prefix("--"))
                .and_then(|flag| flag.split([' ', '=']).next());
            let path = match field {
                Some(field) if field.starts_with("request-plane-") => format!("nats.{field}"),
                Some(field @ "otlp-endpoint") => format!("traces.{field}"),
                Some(field) => format!("{path}.{field}"),
                None => path.to_owned(),
            };
            if error.kind() == ErrorKind::MissingRequiredArgument {
                return Refusal::new(path, "it is missing, and another field needs it: give both");
            }
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            Refusal::new(path, line.strip_prefix("error: ").unwrap_or(line))
        })
}
