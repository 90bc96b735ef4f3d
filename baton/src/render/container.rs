//! What Kubernetes and Compose have in common: where files are inside containers, and what each process is told there.

use baton_protocol::Role;

use super::model_directory;
use crate::Failure;
use crate::deployment::{Deployment, Devices, WorkerGroup};

/// Where secrets are mounted: a file by the name of the flag that names it.
pub const SECRETS: &str = "/run/secrets";
/// What a worker in a container of its own moves KV over, unless it is told: neither memory nor processes are shared.
pub const UCX_TLS: &str = "tcp,self";

/// Workers of one group, or one of them.
pub struct Service<'a> {
    /// `context-worker`, and where a role has several groups `context-worker-1`.
    pub name: String,
    pub role: Role,
    pub group: &'a WorkerGroup,
    /// Where the group stands in the file.
    pub path: String,
}

/// The groups, named.
pub fn services(deployment: &Deployment) -> Vec<Service<'_>> {
    let groups: Vec<_> = deployment.groups().collect();
    let of_role = |role| groups.iter().filter(|(_, other, _)| *other == role).count();
    let mut services: Vec<Service<'_>> = Vec::new();
    for (path, role, group) in &groups {
        let index = services.iter().filter(|other| other.role == *role).count();
        let name = match of_role(*role) {
            1 => format!("{}-worker", role.label()),
            _ => format!("{}-worker-{index}", role.label()),
        };
        let (role, path) = (*role, path.clone());
        services.push(Service {
            name,
            role,
            group,
            path,
        });
    }
    services
}

/// The deployment as the processes inside see it, and the secrets each needs: its files are below [`SECRETS`].
pub struct Inside {
    pub deployment: Deployment,
    /// Secrets of every process, and of API servers alone: the flag, and the file outside.
    pub of_all: Vec<(&'static str, String)>,
    pub of_api_servers: Vec<(&'static str, String)>,
}

impl Inside {
    pub fn new(deployment: &Deployment) -> Self {
        let mut inside = Self {
            deployment: deployment.clone(),
            of_all: Vec::new(),
            of_api_servers: Vec::new(),
        };
        let nats = &mut inside.deployment.nats;
        for (flag, file) in [
            (
                "request-plane-credentials",
                &mut nats.request_plane_credentials,
            ),
            ("request-plane-nkey", &mut nats.request_plane_nkey),
            ("request-plane-ca", &mut nats.request_plane_ca),
            (
                "request-plane-certificate",
                &mut nats.request_plane_certificate,
            ),
            (
                "request-plane-certificate-key",
                &mut nats.request_plane_certificate_key,
            ),
        ] {
            inside.of_all.extend(moved(flag, file));
        }
        let servers = &mut inside.deployment.api_server;
        for (flag, file) in [
            ("api-keys-file", &mut servers.api_keys_file),
            ("tls-cert", &mut servers.tls_cert),
            ("tls-key", &mut servers.tls_key),
            ("tls-client-ca", &mut servers.tls_client_ca),
        ] {
            inside.of_api_servers.extend(moved(flag, file));
        }
        // From outside a container only this reaches it; who may is said outside.
        servers.api_server_host = "0.0.0.0".to_owned();
        inside
    }

    /// What an API server is told.
    pub fn api_server_args(&self) -> Result<Vec<String>, Failure> {
        let servers = &self.deployment.api_server;
        let model = model_directory("model", &self.deployment.model)?;
        Ok(self.deployment.api_server_args(None, servers.port(), model))
    }

    /// What a worker called `name` is told; inside, its GPUs are the first there are.
    pub fn worker_args(&self, service: &Service<'_>, name: &str) -> Result<Vec<String>, Failure> {
        let mut group = service.group.clone();
        group.ucx_tls.get_or_insert_with(|| UCX_TLS.to_owned());
        let devices = match (gpus_each(service)?, &group.devices) {
            (0, host) => host.clone(),
            (gpus, _) => Devices::Cuda((0..).take(gpus).collect()),
        };
        let model = match &group.model {
            Some(model) => model_directory(&format!("{}.model", service.path), model)?,
            None => model_directory("model", &self.deployment.model)?,
        };
        let of = &self.deployment;
        Ok(of.worker_args(None, service.role, name, &group, &devices, model))
    }

    /// The directories of all models, each once, in the order of the file.
    pub fn models(&self) -> Result<Vec<&str>, Failure> {
        let mut models = vec![model_directory("model", &self.deployment.model)?];
        for (path, _, group) in self.deployment.groups() {
            let model = self.deployment.model_of(group);
            let model = model_directory(&format!("{path}.model"), model)?;
            if !models.contains(&model) {
                models.push(model);
            }
        }
        Ok(models)
    }
}

fn moved(flag: &'static str, file: &mut Option<String>) -> Option<(&'static str, String)> {
    let outside = file.take()?;
    *file = Some(format!("{SECRETS}/{flag}"));
    Some((flag, outside))
}

/// GPUs of each worker of a group.
pub fn gpus_each(service: &Service<'_>) -> Result<usize, Failure> {
    let gpus = service.group.gpus_each();
    Ok(gpus.map_err(|why| format!("{}.devices: {why}", service.path))?)
}

/// A cluster's name as names of objects and projects may be: lower-case letters, digits and dashes, beginning with a letter.
pub fn plain_name(cluster: &str) -> String {
    let plain = |c: char| match c.is_ascii_alphanumeric() {
        true => c.to_ascii_lowercase(),
        false => '-',
    };
    let name: String = cluster.chars().map(plain).take(NAME_CHARS_MAX).collect();
    let name = name.trim_matches('-');
    match name.starts_with(|c: char| c.is_ascii_lowercase()) {
        true => name.to_owned(),
        false => format!("baton-{name}").trim_end_matches('-').to_owned(),
    }
}

/// With what comes after it, a name stays below Kubernetes' 63.
const NAME_CHARS_MAX: usize = 32;
