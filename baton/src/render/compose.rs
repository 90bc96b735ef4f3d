//! A file for Compose: containers on one host, on a network of their own.

use serde_json::{Map, Value, json};

use super::container::{Inside, Service, UCX_TLS, plain_name, services};
use super::{api_server_grace_s, nats_port, worker_grace_s};
use crate::Failure;
use crate::deployment::{Deployment, Devices, deal, to_yaml};

/// The file.
pub fn render(deployment: &Deployment) -> Result<String, Failure> {
    let inside = Inside::new(deployment);
    let own_nats = deployment.nats.is_own();
    let bus = match &deployment.nats.request_plane_uri {
        Some(uri) if !own_nats => uri.clone(),
        _ => format!("nats://nats:{}", nats_port(deployment)?),
    };
    let mounts = inside.models()?.into_iter();
    let mounts: Vec<_> = mounts
        .map(|model| {
            json!({"type": "bind", "source": model, "target": model, "read_only": true, "bind": {"create_host_path": false}})
        })
        .collect();
    let common = |words: Vec<String>, grace_s: u64, secrets: Vec<&str>| {
        let mut service = Map::new();
        service.insert("image".into(), json!(deployment.containers.image));
        service.insert("command".into(), json!(words));
        service.insert(
            "environment".into(),
            json!({"BATON_REQUEST_PLANE_URI": bus}),
        );
        service.insert("volumes".into(), json!(mounts));
        if !secrets.is_empty() {
            service.insert("secrets".into(), json!(secrets));
        }
        if own_nats {
            service.insert("depends_on".into(), json!(["nats"]));
        }
        service.insert("stop_grace_period".into(), json!(format!("{grace_s}s")));
        service.insert("restart".into(), json!("on-failure"));
        service
    };
    let names = |secrets: &[(&'static str, String)]| -> Vec<&'static str> {
        secrets.iter().map(|(name, _)| *name).collect()
    };

    let mut all = Map::new();
    if own_nats {
        let program = deployment.nats.nats_server.as_deref();
        let program = program.unwrap_or("nats-server");
        all.insert(
            "nats".into(),
            json!({
                "image": deployment.containers.image,
                "entrypoint": [program, "--config", "/usr/local/lib/baton/nats-server.conf", "--port", nats_port(deployment)?.to_string()],
                "command": [],
                "healthcheck": {"disable": true},
                "restart": "on-failure",
            }),
        );
    }
    let servers = &deployment.api_server;
    let secrets = names(&[inside.of_api_servers.as_slice(), &inside.of_all].concat());
    let mut service = common(
        inside.api_server_args()?,
        api_server_grace_s(servers),
        secrets,
    );
    let port = servers.port();
    let last = usize::from(port) + servers.count - 1;
    let outside = match servers.count {
        1 => port.to_string(),
        _ => format!("{port}-{last}"),
    };
    let host = match servers.api_server_host.as_str() {
        "0.0.0.0" => String::new(),
        host if host.contains(':') => format!("[{}]:", host.trim_matches(['[', ']'])),
        "localhost" => "127.0.0.1:".to_owned(),
        host => format!("{host}:"),
    };
    service.insert("ports".into(), json!([format!("{host}{outside}:{port}")]));
    // The image's asks port 8000; with API keys it would have to know one, and with TLS by what name the certificate calls it.
    let check = match inside.of_api_servers.is_empty() {
        true => {
            json!({"test": ["CMD", "baton", "status", "--url", format!("http://127.0.0.1:{port}")]})
        }
        false => json!({"disable": true}),
    };
    service.insert("healthcheck".into(), check);
    let replicas = |count: usize| json!({"replicas": count});
    service.insert("deploy".into(), replicas(servers.count));
    all.insert("api-server".into(), Value::Object(service));

    let mut dealt = deal(deployment)?.into_iter();
    for group in services(&inside.deployment) {
        let worker = |words| {
            let mut service = common(words, worker_grace_s(group.group), names(&inside.of_all));
            // `baton status` asks an API server, and there is none in these.
            service.insert("healthcheck".into(), json!({"disable": true}));
            // UCX keeps queues in /dev/shm, which is small by default.
            if group
                .group
                .ucx_tls
                .as_deref()
                .is_some_and(|tls| tls != UCX_TLS)
            {
                service.insert("shm_size".into(), json!("2g"));
            }
            service
        };
        let own: Vec<_> = dealt.by_ref().take(group.group.count).collect();
        if own.iter().all(|devices| devices.gpus().is_empty()) {
            // Without a name each container makes one of its own.
            let mut service = worker(nameless(inside.worker_args(&group, "")?));
            let mut deploy = replicas(group.group.count);
            merge(&mut deploy, reserved(&group, None));
            service.insert("deploy".into(), deploy);
            all.insert(group.name.clone(), Value::Object(service));
            continue;
        }
        // GPUs are of one container each, so each is a service of its own.
        for (index, devices) in own.iter().enumerate() {
            let name = match own.len() {
                1 => group.name.clone(),
                _ => format!("{}-{index}", group.name),
            };
            let mut service = worker(inside.worker_args(&group, &name)?);
            service.insert("deploy".into(), reserved(&group, Some(devices)));
            all.insert(name, Value::Object(service));
        }
    }

    for (name, service) in monitoring() {
        all.insert(name.to_owned(), service);
    }

    let mut file = Map::new();
    file.insert("name".into(), json!(plain_name(&deployment.cluster)));
    file.insert("services".into(), Value::Object(all));
    let secrets = inside.of_api_servers.iter().chain(&inside.of_all);
    let secrets: Map<_, _> = secrets
        .map(|(name, path)| ((*name).to_owned(), json!({"file": path})))
        .collect();
    if !secrets.is_empty() {
        file.insert("secrets".into(), Value::Object(secrets));
    }
    let mut file = Value::Object(file);
    escape(&mut file);
    // The one variable that Compose is to fill in.
    let text = to_yaml(&file)?.replace(DASHBOARD, "${BATON_DASHBOARD:-./dashboard}");
    Ok(format!("{HEAD}{text}"))
}

/// Stands for the directory with what Prometheus and Grafana are told.
const DASHBOARD: &str = "@dashboard@";
/// Newest of Prometheus' long-term support, and a Grafana that reads the dashboard's schema.
const PROMETHEUS: &str = "prom/prometheus:v3.5.0";
const GRAFANA: &str = "grafana/grafana:12.1.0";

/// Prometheus and Grafana, which start with `--profile dashboard` alone. Both are for this host: whoever reaches Grafana sees the dashboard.
fn monitoring() -> [(&'static str, Value); 2] {
    let mount = |from: &str, to: &str| json!({"type": "bind", "source": format!("{DASHBOARD}/{from}"), "target": to, "read_only": true, "bind": {"create_host_path": false}});
    let service = |image: &str, port: u16, volumes: &[Value]| json!({"image": image, "profiles": ["dashboard"], "ports": [format!("127.0.0.1:{port}:{port}")], "volumes": volumes, "restart": "on-failure"});
    let mut grafana = service(
        GRAFANA,
        3000,
        &[
            mount("provisioning", "/etc/grafana/provisioning"),
            mount("baton.json", "/etc/grafana/dashboards/baton.json"),
        ],
    );
    grafana["depends_on"] = json!(["prometheus"]);
    grafana["environment"] = json!({
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": "/etc/grafana/dashboards/baton.json",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    });
    let files = ["prometheus.yml", "baton.rules.yml"];
    let files = files.map(|file| mount(file, &format!("/etc/prometheus/{file}")));
    [
        ("prometheus", service(PROMETHEUS, 9090, &files)),
        ("grafana", grafana),
    ]
}

fn nameless(mut words: Vec<String>) -> Vec<String> {
    if let Some(at) = words.iter().position(|word| word == "--worker-name") {
        words.drain(at..at + 2);
    }
    words
}

/// CPUs, memory and GPUs of a worker's container.
fn reserved(group: &Service<'_>, devices: Option<&Devices>) -> Value {
    let mut reservations = Map::new();
    if let Some(cpus) = group.group.cpus {
        reservations.insert("cpus".into(), json!(cpus.to_string()));
    }
    if let Some(mib) = group.group.memory_mib {
        reservations.insert("memory".into(), json!(format!("{mib}M")));
    }
    if let Some(devices) = devices {
        let ids: Vec<_> = devices.gpus().iter().map(u32::to_string).collect();
        reservations.insert(
            "devices".into(),
            json!([{"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}]),
        );
    }
    match reservations.is_empty() {
        true => json!({}),
        false => json!({"resources": {"reservations": reservations}}),
    }
}

fn merge(into: &mut Value, more: Value) {
    if let (Value::Object(into), Value::Object(more)) = (into, more) {
        into.extend(more);
    }
}

/// Compose would put variables in place of what begins with a dollar sign.
fn escape(value: &mut Value) {
    match value {
        Value::String(text) => *text = text.replace('$', "$$"),
        Value::Array(list) => list.iter_mut().for_each(escape),
        Value::Object(fields) => fields.values_mut().for_each(escape),
        _ => {}
    }
}

const HEAD: &str = "\
# A cluster in containers, as `baton render compose --config FILE` writes it: change the file, not this.
#
#   docker compose -f FILE up
#   docker compose -f FILE --profile dashboard up      # with Prometheus and Grafana, http://localhost:3000
#
# BATON_DASHBOARD names the directory with what those two are told, container/dashboard; else it is `dashboard` beside this file.
# Model directories are where the file says on this host, and there inside the containers too. A limit on a worker's memory must
# hold the weights, all of --kv-mib (1024 where nothing is said) and half a GiB. UCX moves KV over TCP between containers: their
# shared memory is apart. A worker that gets SIGTERM finishes what it has, within its grace period.
";
