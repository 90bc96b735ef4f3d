//! Objects for Kubernetes: a Deployment for each kind of process, with what probes it and what it takes.

use serde_json::{Value, json};

use super::container::{Inside, SECRETS, Service, UCX_TLS, gpus_each, plain_name, services};
use super::{api_server_grace_s, nats_port, worker_grace_s};
use crate::Failure;
use crate::deployment::{Deployment, to_yaml};

/// An API server refuses connections as soon as it leaves; before that its Service has to learn of it, in seconds.
const UNLISTED_S: u64 = 5;
/// CPUs and memory of a worker where nothing is said: for a model of 135 million parameters.
const CPUS_DEFAULT: u32 = 2;
const MEMORY_MIB_DEFAULT: u64 = 2048;

/// The objects.
pub fn render(deployment: &Deployment) -> Result<String, Failure> {
    let all = Objects::new(deployment)?;
    let mut text = HEAD.replace("CLAIM", &deployment.containers.model_claim);
    if !all.secret_files.is_empty() {
        let files = all.secret_files.iter();
        let files = files.map(|(name, file)| format!(" \\\n#     --from-file={name}={file}"));
        let files: String = files.collect();
        let secret = &deployment.containers.secret;
        text += &format!(
            "# The files with secrets:\n#   kubectl create secret generic {secret}{files}\n"
        );
    }
    for (comment, object) in all.objects {
        let comment: String = comment.lines().map(|line| format!("# {line}\n")).collect();
        text += &format!("---\n{comment}{}", to_yaml(&object)?);
    }
    Ok(text)
}

struct Objects<'a> {
    deployment: &'a Deployment,
    name: String,
    bus: String,
    /// Where the claim is mounted: the directory that all models are in.
    models: String,
    secret_files: Vec<(&'static str, String)>,
    /// Each with what is to be said of it.
    objects: Vec<(&'static str, Value)>,
}

impl<'a> Objects<'a> {
    fn new(deployment: &'a Deployment) -> Result<Self, Failure> {
        let mut inside = Inside::new(deployment);
        literal(&mut inside.deployment);
        let name = plain_name(&deployment.cluster);
        let own_nats = deployment.nats.is_own();
        let bus = match &deployment.nats.request_plane_uri {
            Some(uri) if !own_nats => uri.clone(),
            _ => format!("nats://{name}-nats:{}", nats_port(deployment)?),
        };
        let mut all = Self {
            deployment,
            name,
            bus,
            models: parent(&inside.models()?)?,
            secret_files: [inside.of_api_servers.clone(), inside.of_all.clone()].concat(),
            objects: Vec::new(),
        };
        if own_nats {
            all.nats()?;
        }
        all.api_servers(&inside)?;
        for service in services(&inside.deployment) {
            all.workers(&inside, &service)?;
        }
        Ok(all)
    }

    fn nats(&mut self) -> Result<(), Failure> {
        let port = nats_port(self.deployment)?;
        let app = format!("{}-nats", self.name);
        let program = self.deployment.nats.nats_server.as_deref();
        let program = program.unwrap_or("nats-server");
        self.objects.push(("", service(&app, &app, port)));
        let container = json!({
            "name": "nats",
            "image": self.deployment.containers.image,
            "command": [program, "--config", "/usr/local/lib/baton/nats-server.conf", "--port", port.to_string()],
            "ports": [{"containerPort": port}],
            "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 2},
        });
        let pod = json!({"securityContext": {"runAsNonRoot": true}, "containers": [container]});
        let mut object = deployment_object(&app, 1, pod);
        object["spec"]["strategy"] = json!({"type": "Recreate"});
        let comment = "Never two at a time: they would split the cluster.";
        self.objects.push((comment, object));
        Ok(())
    }

    fn api_servers(&mut self, inside: &Inside) -> Result<(), Failure> {
        let servers = &self.deployment.api_server;
        let (port, app) = (servers.port(), format!("{}-api-server", self.name));
        let probe = |path: &str| match servers.scheme() {
            "https" => json!({"path": path, "port": port, "scheme": "HTTPS"}),
            _ => json!({"path": path, "port": port}),
        };
        let name = self.name.clone();
        self.objects.push(("", service(&name, &app, port)));
        let secrets = [inside.of_api_servers.as_slice(), &inside.of_all].concat();
        let mut container = json!({
            "name": "api-server",
            "image": self.deployment.containers.image,
            "args": inside.api_server_args()?,
            "env": self.environment(),
            "ports": [{"containerPort": port}],
            "readinessProbe": {"httpGet": probe("/health"), "periodSeconds": 2},
            "livenessProbe": {"httpGet": probe("/live"), "periodSeconds": 10, "timeoutSeconds": 5},
            "lifecycle": {"preStop": {"exec": {"command": ["sleep", UNLISTED_S.to_string()]}}},
            "resources": {"requests": {"cpu": "1", "memory": "256Mi"}},
        });
        let grace_s = UNLISTED_S + api_server_grace_s(servers);
        let pod = self.pod(&mut container, &secrets, grace_s, &[]);
        let comment = "Ready: a request could be served now. Live: the process answers; a missing worker is no reason to kill it.";
        let object = deployment_object(&app, servers.count, pod);
        self.objects.push((comment, object));
        Ok(())
    }

    fn workers(&mut self, inside: &Inside, service: &Service<'_>) -> Result<(), Failure> {
        let group = service.group;
        let mut env = self.environment();
        env.push(json!({"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}));
        let memory_mib = group.memory_mib.unwrap_or(MEMORY_MIB_DEFAULT);
        let mut resources = json!({"requests": {
            "cpu": group.cpus.unwrap_or(CPUS_DEFAULT).to_string(),
            "memory": format!("{memory_mib}Mi"),
        }});
        let gpus = gpus_each(service)?;
        if gpus > 0 {
            resources["limits"] = json!({"nvidia.com/gpu": gpus.to_string()});
        }
        let mut container = json!({
            "name": service.name,
            "image": self.deployment.containers.image,
            "args": inside.worker_args(service, "$(POD)")?,
            "env": env,
            "resources": resources,
        });
        // UCX keeps queues in /dev/shm, which is small by default.
        let shared_memory =
            json!({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}});
        let volumes = match group.ucx_tls.as_deref() {
            Some(tls) if tls != UCX_TLS => vec![(shared_memory, "/dev/shm")],
            _ => Vec::new(),
        };
        let pod = self.pod(
            &mut container,
            &inside.of_all,
            worker_grace_s(group),
            &volumes,
        );
        let app = format!("{}-{}", self.name, service.name);
        self.objects
            .push(("", deployment_object(&app, group.count, pod)));
        Ok(())
    }

    fn environment(&self) -> Vec<Value> {
        vec![json!({"name": "BATON_REQUEST_PLANE_URI", "value": self.bus})]
    }

    /// A pod of one container, to which the model, its secrets and more volumes are mounted.
    fn pod(
        &self,
        container: &mut Value,
        secrets: &[(&'static str, String)],
        grace_s: u64,
        more: &[(Value, &str)],
    ) -> Value {
        let claim = &self.deployment.containers.model_claim;
        let mut mounts =
            vec![json!({"name": "models", "mountPath": self.models, "readOnly": true})];
        let mut volumes = vec![
            json!({"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": true}}),
        ];
        if !secrets.is_empty() {
            let items: Vec<_> = secrets
                .iter()
                .map(|(name, _)| json!({"key": name, "path": name}))
                .collect();
            let secret = &self.deployment.containers.secret;
            volumes
                .push(json!({"name": "secrets", "secret": {"secretName": secret, "items": items}}));
            mounts.push(json!({"name": "secrets", "mountPath": SECRETS, "readOnly": true}));
        }
        for (volume, path) in more {
            mounts.push(json!({"name": volume["name"], "mountPath": path}));
            volumes.push(volume.clone());
        }
        container["volumeMounts"] = json!(mounts);
        json!({
            "securityContext": {"runAsNonRoot": true},
            "terminationGracePeriodSeconds": grace_s,
            "containers": [container],
            "volumes": volumes,
        })
    }
}

fn service(name: &str, app: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": app}, "ports": [{"port": port}]},
    })
}

fn deployment_object(app: &str, replicas: usize, pod: Value) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": app},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": app}},
            "template": {"metadata": {"labels": {"app": app}}, "spec": pod},
        },
    })
}

/// The directory that all models are in.
fn parent(models: &[&str]) -> Result<String, Failure> {
    let parent = |model: &str| {
        model
            .rsplit_once('/')
            .map_or("", |(parent, _)| parent)
            .to_owned()
    };
    let first = models
        .first()
        .map(|model| parent(model))
        .unwrap_or_default();
    for model in models {
        if first.is_empty() || parent(model) != first {
            return Err(format!(
                "model: Kubernetes mounts one claim with all models, and {model} is not in a directory with the others: name them like /models/NAME"
            )
            .into());
        }
    }
    Ok(first)
}

/// Kubernetes would put variables in place of `$(NAME)`.
fn literal(deployment: &mut Deployment) {
    let mut value = serde_json::to_value(&*deployment).unwrap_or_default();
    escape(&mut value);
    if let Ok(escaped) = serde_json::from_value(value) {
        *deployment = escaped;
    }
}

fn escape(value: &mut Value) {
    match value {
        Value::String(text) => *text = text.replace("$(", "$$("),
        Value::Array(list) => list.iter_mut().for_each(escape),
        Value::Object(fields) => fields.values_mut().for_each(escape),
        _ => {}
    }
}

const HEAD: &str = "\
# A cluster on Kubernetes, as `baton render kubernetes --config FILE` writes it: change the file, not this.
#
#   kubectl apply -f FILE
#
# Wants the image, and a PersistentVolumeClaim CLAIM with the model directories. Memory of a worker (memory-mib): the weights, all of
# --kv-mib (1024 where nothing is said; taken whole at the start) and half a GiB. Workers have no probes: one that hangs or fails
# ends by itself. Pods share no memory, so KV goes over TCP, or over RDMA where ucx-tls names it. A pod that gets SIGTERM
# finishes what it has, within its grace period.
";
