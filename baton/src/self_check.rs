//! `baton self-check`: what this machine has, what each of it means, and whether it can serve.

use std::io::Write;
use std::time::Duration;

use async_nats::ConnectOptions;
use baton_worker::{Library, cpu_kernel, gpus_seen, host_memory};
use clap::Args;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::Failure;
use crate::api_client::ApiServerArg;
use crate::bus_args::BusArgs;
use crate::served;
use crate::up;

#[derive(Args, Debug)]
pub struct SelfCheckArgs {
    #[command(flatten)]
    bus: BusArgs,
    #[command(flatten)]
    server: ApiServerArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A NATS server that is there answers within this time.
const NATS_WAIT: Duration = Duration::from_secs(2);

/// The same of an API server.
const API_SERVER_WAIT: Duration = Duration::from_secs(2);

/// Below this, the kernel's limit of open files bounds the clients of an API server.
const FILES_MIN: u64 = 4096;

/// A worker of a small model takes as much.
const MEMORY_MIN: u64 = 1 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// Nothing can be served like this.
    Fails,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    says: String,
}

/// Looks at everything and prints it; fails if the machine cannot serve.
pub fn run(args: SelfCheckArgs) -> Result<(), Failure> {
    let mut findings = vec![cpu(), memory()];
    findings.extend(gpus());
    findings.push(ucx());
    findings.push(nats_server());
    findings.push(nats(args.bus)?);
    findings.push(api_server(&args.server)?);
    findings.extend(limits());
    let failed: Vec<_> = findings
        .iter()
        .filter(|it| it.state == State::Fails)
        .collect();
    let text = match args.json {
        true => {
            let all = serde_json::json!({"can_serve": failed.is_empty(), "checks": findings});
            format!("{all:#}\n")
        }
        false => findings.iter().map(line).collect(),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    let names: Vec<_> = failed.iter().map(|it| it.check).collect();
    match names.is_empty() {
        true => Ok(()),
        false => Err(format!("this machine cannot serve: {}", names.join(", ")).into()),
    }
}

fn line(finding: &Finding) -> String {
    let mark = match finding.state {
        State::Ok => "ok",
        State::Note => "note",
        State::Fails => "FAILS",
    };
    format!("{:<13} {mark:<6} {}\n", finding.check, finding.says)
}

fn finding(check: &'static str, state: State, says: impl Into<String>) -> Finding {
    let says = says.into();
    Finding { check, state, says }
}

fn cpu() -> Finding {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = match cpu_kernel() {
        Ok(kernel) => kernel,
        Err(reason) => return finding("cpu", State::Fails, reason),
    };
    let (state, means) = match kernel.as_str() {
        "amx-bf16" => (
            State::Ok,
            "matrix units for BF16, the fastest that CPUs have",
        ),
        "avx512-bf16" => (State::Ok, "BF16 products of 512 bits"),
        "avx2" => (
            State::Ok,
            "products in F32, a fraction of what CPUs with BF16 instructions reach",
        ),
        _ => (
            State::Note,
            "no vector instructions that are known: slow, for tests",
        ),
    };
    finding(
        "cpu",
        state,
        format!("{cpus} CPUs for this process; kernels {kernel}: {means}"),
    )
}

fn memory() -> Finding {
    let Some((bytes, whose)) = host_memory() else {
        return finding(
            "memory",
            State::Note,
            "neither the machine nor a control group says how much there is",
        );
    };
    let gib = bytes as f64 / (1_u64 << 30) as f64;
    let (state, means) = match bytes < MEMORY_MIN {
        true => (
            State::Note,
            "little: a worker takes its weights and --kv-mib at its start",
        ),
        false => (State::Ok, "for weights and KV of workers on CPUs"),
    };
    finding(
        "memory",
        state,
        format!("{gib:.1} GiB can be had ({whose}): {means}"),
    )
}

fn gpus() -> Vec<Finding> {
    let gpus = match gpus_seen() {
        Ok(gpus) if !gpus.is_empty() => gpus,
        Ok(_) => {
            return vec![finding(
                "gpu",
                State::Note,
                "NVIDIA's driver is here and shows no GPU: workers run on CPUs",
            )];
        }
        Err(why) => {
            return vec![finding(
                "gpu",
                State::Note,
                format!("none, workers run on CPUs: {why}"),
            )];
        }
    };
    let mut findings = Vec::new();
    for gpu in &gpus {
        let (state, means) = match gpu.is_usable() {
            true => (State::Ok, format!("--device cuda:{}", gpu.ordinal)),
            false => (
                State::Note,
                "too old: BF16 needs compute capability 8.0".to_owned(),
            ),
        };
        findings.push(finding("gpu", state, format!("{gpu}: {means}")));
    }
    for library in [Library::Nvrtc, Library::CublasLt] {
        findings.push(match library.check() {
            Ok(text) => finding(library.name(), State::Ok, text),
            Err(why) => finding(
                library.name(),
                State::Note,
                format!("workers on GPUs do not start without it: {why}"),
            ),
        });
    }
    findings
}

fn ucx() -> Finding {
    match Library::Ucx.check() {
        Ok(text) => finding(
            "ucx",
            State::Ok,
            format!("{text}: what KV can be moved over from this process"),
        ),
        Err(why) => {
            let means = "without it only workers of role both serve, each by itself (baton up without counts)";
            finding("ucx", State::Fails, format!("{why}; {means}"))
        }
    }
}

fn nats_server() -> Finding {
    match up::find_nats_server() {
        Ok(path) => finding(
            "nats-server",
            State::Ok,
            format!("{}: baton up starts it", path.display()),
        ),
        Err(why) => finding(
            "nats-server",
            State::Note,
            format!("baton up cannot start one: {why}"),
        ),
    }
}

fn nats(args: BusArgs) -> Result<Finding, Failure> {
    let named = args.is_named();
    let mut config = args.config();
    config.connect_wait = Some(if named { NATS_WAIT } else { Duration::ZERO });
    let url = config.url_without_secrets();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let reached = runtime.block_on(async { config.connect(ConnectOptions::new).await.map(drop) });
    Ok(match reached {
        Ok(()) => finding("nats", State::Ok, format!("{url} lets us in")),
        Err(error) if named => finding("nats", State::Fails, error.to_string()),
        Err(_) => {
            let means = "name another with --request-plane-uri, or let baton up start one";
            finding(
                "nats",
                State::Note,
                format!("nobody answers at {url}: {means}"),
            )
        }
    })
}

/// Whether a cluster runs already, and what its model can do.
fn api_server(server: &ApiServerArg) -> Result<Finding, Failure> {
    let client = server.client(|builder| builder.timeout(API_SERVER_WAIT))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let models = runtime.block_on(client.get("/v1/models"));
    let (base, check) = (client.base(), "api-server");
    Ok(match models.map(|models| served::summary(&models)) {
        Ok(Some(model)) => finding(check, State::Ok, format!("{base} serves {model}")),
        Ok(None) if server.is_named() => {
            finding(check, State::Fails, format!("{base} names no model"))
        }
        Err(error) if server.is_named() => finding(check, State::Fails, error.to_string()),
        Ok(None) | Err(_) => {
            let means = "baton up starts a cluster, --url names another address";
            let says = format!("no cluster answers at {base}: {means}");
            finding(check, State::Note, says)
        }
    })
}

fn limits() -> [Finding; 2] {
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let (state, means) = match files < FILES_MIN {
        true => (
            State::Note,
            "each client is one: raise it (LimitNOFILE= of systemd, ulimit -Hn)",
        ),
        false => (State::Ok, "each client is one"),
    };
    let count = match files {
        u64::MAX => "as many as the system has".to_owned(),
        files => files.to_string(),
    };
    let files = finding("open-files", state, format!("{count} at most: {means}"));
    let locked = match getrlimit(Resource::Memlock).maximum {
        None => finding(
            "locked-memory",
            State::Ok,
            "without bound: adapters of RDMA can register all KV",
        ),
        Some(bytes) => finding(
            "locked-memory",
            State::Note,
            format!(
                "{} MiB at most: enough without RDMA, whose adapters lock all KV (LimitMEMLOCK=infinity of systemd, --ulimit memlock=-1 of docker)",
                bytes >> 20
            ),
        ),
    };
    [files, locked]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tests' machine has a CPU, UCX and nats-server, as every machine that serves.
    #[test]
    fn this_machine_is_told_in_sentences() {
        for found in [cpu(), memory(), ucx(), nats_server()] {
            assert_ne!(found.state, State::Fails, "{found:?}");
            assert!(line(&found).starts_with(found.check), "{found:?}");
        }
        assert!(ucx().says.starts_with("ucx 1."));
        assert!(!gpus().is_empty());
        for found in limits() {
            assert_ne!(found.state, State::Fails, "{found:?}");
        }
    }
}
