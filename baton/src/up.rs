//! `baton up`: a whole cluster on this machine, every part a process of its own.

mod announce;
mod described;
mod flags;
mod health;
mod nats;
mod plan;
mod reason;
mod restarts;
mod scratch;
mod supervisor;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgGroup, Args};
use futures::future::try_join_all;
use serde::{Deserialize, Serialize};

use self::described::{check_here, described};
pub use self::nats::Listen;
use self::plan::{Models, Plan};
use self::restarts::Restarts;
use self::scratch::Scratch;
use self::supervisor::{ProcessSpec, Stage, Supervisor};
use crate::Failure;
use crate::api_server::{AnswerArgs, ApiKeysArgs, ContentArgs, PromiseArgs, TlsArgs};
use crate::deployment::{Deployment, Nats};
use crate::logging::LogFormat;
use crate::model_source;
use crate::shutdown::Shutdown;
use crate::systemd::{ServiceManager, refuse_listeners};
use crate::trace_args::{OtlpArgs, SampleArgs};
use crate::tuning::TuningArgs;

/// The flags that say what the cluster is: a file says it whole. `--api-keys-file` is looked at apart, for its variable, and
/// so are those of traces.
const OF_THE_DEPLOYMENT: [&str; 38] = [
    "model",
    "model_name",
    "context_worker_count",
    "decode_worker_count",
    "both_worker_count",
    "worker_name",
    "cluster",
    "initialize_request_plane",
    "request_plane_uri",
    "nats_server",
    "api_server_host",
    "api_server_port",
    "api_key_in_flight_max",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "special_tokens_in_content",
    "tool_format",
    "reasoning_format",
    "generation_config",
    "default_max_tokens",
    "cors_origin",
    "response_store_mib",
    "device",
    "tp_size",
    "context_tp_size",
    "threads",
    "kv_mib",
    "kv_cache_free_gpu_memory_fraction",
    "block_tokens",
    "ttft_ms",
    "overload",
    "step_tokens",
    "itl_ms",
    "batch",
    "queue",
    "no_prefix_cache",
    "ucx_tls",
];

const EXAMPLES: &str = "Examples:
  baton up qwen3-0.6b
  baton up ./model --api-server-port 9000
  baton up model.gguf --context-worker-count 1 --decode-worker-count 2";

#[derive(Args, Debug)]
#[command(group(ArgGroup::new("what").args(["what_to_serve", "config", "model"]).required(true)))]
#[command(after_help = EXAMPLES)]
pub struct UpArgs {
    /// What to serve: a model directory, a GGUF file, a short or a Hugging Face name; the same as --model MODEL
    #[arg(value_name = "MODEL")]
    what_to_serve: Option<String>,
    /// File that describes the whole cluster (YAML, docs/deployment.md), instead of the flags that do
    #[arg(long, value_name = "FILE", conflicts_with_all = OF_THE_DEPLOYMENT)]
    config: Option<PathBuf>,
    /// Print what the flags or the file mean as such a file, with the defaults, and start nothing
    #[arg(long)]
    print_config: bool,
    /// What to serve: a model directory, a GGUF file, a short or a Hugging Face name. All but the first
    /// are prepared into the cache first (BATON_CACHE, else ~/.cache/baton)
    #[arg(long)]
    model: Option<String>,
    /// Name that clients ask for [default: the model's own]; given several times the model has several, and answers have the first
    #[arg(long)]
    model_name: Vec<String>,
    /// Context workers: they run prompts alone [default: none; 1 where --decode-worker-count is given without --both-worker-count]
    #[arg(long)]
    context_worker_count: Option<usize>,
    /// Decode workers: they generate alone [default: none; 1 where --context-worker-count is given without --both-worker-count]
    #[arg(long, alias = "generate-worker-count")]
    decode_worker_count: Option<usize>,
    /// Workers that do both, as the router decides for each request [default: if no count is given, as many as the GPUs of
    /// --device are enough for, and 2 on a CPU; otherwise none]
    #[arg(long)]
    both_worker_count: Option<usize>,
    /// Put before workers' names
    #[arg(long)]
    worker_name: Option<String>,
    /// Name of the cluster: clusters that share a NATS server tell each other apart by it
    #[arg(long, default_value = "baton")]
    cluster: String,
    /// Start a NATS server even though --request-plane-uri is given, listening there
    #[arg(long)]
    initialize_request_plane: bool,
    /// NATS server to use, nats://HOST:PORT [default: one is started, on this host only, on a free port]
    #[arg(long)]
    request_plane_uri: Option<String>,
    /// The nats-server program [default: looked for in virtual environments, PATH and /usr/sbin]
    #[arg(long)]
    nats_server: Option<PathBuf>,
    /// Address for HTTP
    #[arg(long, default_value = "127.0.0.1")]
    api_server_host: String,
    /// Port for HTTP [default: 8000, or the next free one]
    #[arg(long)]
    api_server_port: Option<u16>,
    #[command(flatten)]
    promises: PromiseArgs,
    #[command(flatten)]
    keys: ApiKeysArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    content: ContentArgs,
    #[command(flatten)]
    answers: AnswerArgs,
    #[command(flatten)]
    otlp: OtlpArgs,
    #[command(flatten)]
    sample: SampleArgs,
    /// What workers compute on: cpu, fake, fake:MICROSECONDS_PER_STEP, a GPU for all of them (cuda:N), or the GPUs that are shared
    /// out in order to context workers, then decode workers, then those that do both (cuda:0-3, cuda:0,2)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Tensor-parallel ranks of each worker [default: as the model directory is divided]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    tp_size: Option<u32>,
    /// The same of context workers alone, which need not have as many as decode workers; with --context-worker-count or
    /// --decode-worker-count
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    context_tp_size: Option<u32>,
    /// Compute threads of all workers together [default: one for each CPU]; each gets its share, and one at least
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Once the cluster serves, end with the first process that dies; without this it is started again
    #[arg(long)]
    no_restart: bool,
    /// What happens anyway: it had to be asked for once.
    #[arg(long, hide = true, conflicts_with = "no_restart")]
    restart: bool,
    /// Give up when the cluster cannot serve after this many seconds
    #[arg(long, default_value_t = 300)]
    start_timeout_s: u64,
    /// Time for requests under way to finish at the end, in seconds; a second Ctrl-C cuts it short
    #[arg(long, default_value_t = 10, conflicts_with = "config")]
    drain_s: u64,
    /// Write addresses and process ids to this file (JSON, what --json is elsewhere) when the cluster serves; removed at the end
    #[arg(long)]
    ready_file: Option<PathBuf>,
}

/// A process that used up its time to drain says so to whoever is still there, and ends, within this time.
const FAREWELL: Duration = Duration::from_secs(5);

/// What the ready file says.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {
    /// Where the first API server answers: `http://127.0.0.1:8000`, or `https://…`.
    pub url: String,
    /// Where the bus is.
    pub request_plane_uri: String,
    /// Name that clients ask for.
    pub model: String,
    /// Process ids by name, this process included as `up`.
    pub pids: BTreeMap<String, i32>,
}

/// Runs the cluster until a signal comes (that is no failure) or a process dies.
pub fn run(mut args: UpArgs, log_format: LogFormat) -> Result<(), Failure> {
    args.model = args.model.or(args.what_to_serve.take());
    let manager = ServiceManager::from_env();
    refuse_listeners()?;
    let deployment = described(&args)?;
    if args.print_config {
        deployment.check_secrets()?;
        let text = deployment.filled().to_yaml()?;
        return Ok(std::io::stdout().write_all(text.as_bytes())?);
    }
    check_here(&args, &deployment)?;
    let models = prepare(&deployment)?;
    let plan = Plan::new(deployment, log_format)?;
    plan.check_memory(&models)?;
    // One thread: children die with the thread that started them, so it must be this one.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut shutdown = Shutdown::catch()?;
        tokio::spawn(manager.clone().show_life());
        let directory = Scratch::new(&std::env::temp_dir())?;
        let mut supervisor = Supervisor::new(Some(std::env::current_exe()?));
        let outcome = tokio::select! {
            signal = shutdown.requested() => {
                tracing::info!("{signal}: stopping; once more to stop at once");
                Ok(())
            }
            failure = serve(&args, &plan, &models, directory.path(), &mut supervisor, &manager) => Err(failure),
        };
        manager.stopping();
        // Why is said once, at the end, where it is not lost among the lines of those who end.
        if outcome.is_err() {
            tracing::error!("stopping: the cluster cannot go on");
        }
        if let Some(file) = &args.ready_file {
            let _ = std::fs::remove_file(file);
        }
        let hurry = async {
            shutdown.requested().await;
        };
        supervisor.stop(Duration::from_secs(plan.drain_s()) + FAREWELL, hurry).await;
        outcome
    })
}

/// The nats-server program that a cluster would be started with.
///
/// # Errors
/// Where it was looked for.
pub fn find_nats_server() -> Result<PathBuf, Failure> {
    nats::find(None)
}

/// Finds or makes the directories of all models of a deployment.
fn prepare(deployment: &Deployment) -> Result<Models, Failure> {
    let mut models = Models::new();
    let of_groups = deployment.groups();
    let of_groups = of_groups.map(|(_, _, group)| deployment.model_of(group));
    for name in std::iter::once(deployment.model.as_str()).chain(of_groups) {
        if !models.contains_key(name) {
            models.insert(name.to_owned(), model_source::resolve(name)?);
        }
    }
    Ok(models)
}

/// Starts everything and watches over it; returns when it cannot go on.
async fn serve(
    args: &UpArgs,
    plan: &Plan,
    models: &Models,
    directory: &Path,
    supervisor: &mut Supervisor,
    manager: &ServiceManager,
) -> Failure {
    match try_serve(args, plan, models, directory, supervisor, manager).await {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

async fn try_serve(
    args: &UpArgs,
    plan: &Plan,
    models: &Models,
    directory: &Path,
    supervisor: &mut Supervisor,
    manager: &ServiceManager,
) -> Result<std::convert::Infallible, Failure> {
    let bus = start_bus(&plan.deployment.nats, directory, supervisor).await?;
    for spec in plan.processes(&bus, models)? {
        start(supervisor, spec)?;
    }

    let wait = Duration::from_secs(args.start_timeout_s);
    let urls = plan.urls();
    tokio::select! {
        exit = supervisor.next_exit() => return Err(exit.to_string().into()),
        healthy = try_join_all(urls.iter().map(|url| health::wait(url, wait))) => healthy?,
    };
    let ready = |supervisor: &Supervisor| ready(plan, models, &bus, supervisor);
    if let Some(file) = &args.ready_file {
        announce::write_ready(file, &ready(supervisor))?;
    }
    manager.ready(&format!("serving at {}", urls.join(", ")));
    announce::print(&ready(supervisor)).await;

    let mut restarts = Restarts::default();
    loop {
        tokio::select! {
            exit = supervisor.next_exit() => {
                // It was asked to leave, over the bus or by a signal.
                if exit.spec.stage == Stage::Worker && exit.status.success() {
                    tracing::info!("{} has left", exit.spec.name);
                    continue;
                }
                if args.no_restart {
                    return Err(exit.to_string().into());
                }
                let delay = restarts.schedule(exit.spec.clone(), exit.lived);
                tracing::warn!("{exit}; it is started again in {} s", delay.as_secs());
            }
            spec = restarts.due() => {
                start(supervisor, spec)?;
                if let Some(file) = &args.ready_file {
                    announce::write_ready(file, &ready(supervisor))?;
                }
            }
        }
    }
}

/// The bus's address; starts it first unless a running one was named.
async fn start_bus(
    bus: &Nats,
    directory: &Path,
    supervisor: &mut Supervisor,
) -> Result<String, Failure> {
    let listen = match &bus.request_plane_uri {
        Some(uri) if !bus.is_own() => return Ok(uri.clone()),
        Some(uri) => Listen::parse(uri)?,
        None => Listen::local(),
    };
    let program = nats::find(bus.nats_server.as_deref().map(Path::new))?;
    tracing::info!("the request plane is {}", program.display());
    let spec = ProcessSpec {
        name: "nats-server".to_owned(),
        stage: Stage::Bus,
        program,
        args: nats::configure(directory, &listen)?,
        listener: None,
    };
    start(supervisor, spec)?;
    let address = tokio::select! {
        exit = supervisor.next_exit() => return Err(exit.to_string().into()),
        address = nats::address(directory) => address?,
    };
    // Started again, it must be found where it was.
    nats::configure(
        directory,
        &Listen {
            port: Listen::parse(&address)?.port,
            ..listen
        },
    )?;
    Ok(bus.request_plane_uri.clone().unwrap_or(address))
}

fn start(supervisor: &mut Supervisor, spec: ProcessSpec) -> Result<(), Failure> {
    let name = spec.name.clone();
    supervisor
        .start(spec)
        .map_err(|error| format!("cannot start {name}: {error}").into())
}

fn ready(plan: &Plan, models: &Models, bus: &str, supervisor: &Supervisor) -> Ready {
    let mut pids: BTreeMap<_, _> = supervisor
        .pids()
        .map(|(name, pid)| (name.to_owned(), pid))
        .collect();
    pids.extend(i32::try_from(std::process::id()).map(|pid| ("up".to_owned(), pid)));
    let deployment = &plan.deployment;
    let own_name = || {
        models
            .get(&deployment.model)
            .map(|model| model.name.clone())
    };
    let name = deployment.api_server.model_name.first().cloned();
    Ready {
        url: plan.urls().into_iter().next().unwrap_or_default(),
        request_plane_uri: bus.to_owned(),
        model: name.or_else(own_name).unwrap_or_default(),
        pids,
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        up: UpArgs,
    }

    pub fn args(line: &str) -> UpArgs {
        let words = ["up", "--model", "m"].into_iter();
        Line::parse_from(words.chain(line.split_whitespace())).up
    }

    /// What dies is started again unless it is said otherwise, and lines from when it had to be asked for go on.
    #[test]
    fn what_dies_is_started_again() {
        assert!(!args("").no_restart && !args("--restart").no_restart);
        assert!(args("--no-restart").no_restart);
        let words = ["up", "--model", "m", "--restart", "--no-restart"];
        assert!(Line::try_parse_from(words).is_err());
    }

    /// Of a line of flags, on whatever port is free.
    pub fn plan(line: &str) -> Plan {
        let deployment = flags::deployment(&args(&format!("--api-server-port 0 {line}")));
        Plan::new(deployment.unwrap(), LogFormat::Json).unwrap()
    }

    #[test]
    fn a_file_goes_with_no_flag_that_says_what_the_cluster_is() {
        // Of this run, and not of what runs.
        let beside = [
            "config",
            "print_config",
            "no_restart",
            "restart",
            "start_timeout_s",
            "ready_file",
        ];
        let command = Line::command();
        for arg in command.get_arguments() {
            let id = arg.get_id().as_str();
            let apart = ["help", "api_keys_file", "otlp_endpoint", "trace_sample"];
            if beside.contains(&id) || apart.contains(&id) || arg.is_positional() {
                continue;
            }
            let flag = format!("--{}", arg.get_long().unwrap());
            let values: &[&str] = match arg.get_action().takes_values() {
                false => &[],
                true => &["1", "plain", "model", "none", "refuse"],
            };
            let refused = |value: Option<&&str>| {
                let line = ["up", "--config", "f", &flag];
                let error = Line::try_parse_from(line.iter().chain(value)).err();
                error.is_some_and(|error| {
                    error.kind() == clap::error::ErrorKind::ArgumentConflict
                        && error.to_string().contains("--config")
                })
            };
            let any = match values {
                [] => refused(None),
                values => values.iter().any(|value| refused(Some(value))),
            };
            assert!(any, "{flag} goes with --config");
        }
        let mut up = Line::parse_from(["up", "--config", "f"]).up;
        up.keys.api_keys_file = Some("keys".into());
        let error = described(&up).unwrap_err().to_string();
        assert!(error.contains("--api-keys-file"), "{error}");
        for flag in ["--otlp-endpoint", "--trace-sample"] {
            let value = ["http://h", "0.5"][usize::from(flag == "--trace-sample")];
            let up = Line::parse_from(["up", "--config", "f", flag, value]).up;
            let error = described(&up).unwrap_err().to_string();
            assert!(error.contains(flag), "{error}");
        }
        assert!(Line::try_parse_from(["up"]).is_err());
        for line in [["up", "m", "--config", "f"], ["up", "m", "--model", "n"]] {
            let error = Line::try_parse_from(line).err().unwrap();
            assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict);
        }
    }

    #[test]
    fn files_that_are_not_there_are_missed_before_anything_starts() {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path().display();
        let bus = "--request-plane-uri nats://127.0.0.1:1";
        let missed = |line: &str| {
            let args = args(line);
            let deployment = flags::deployment(&args).unwrap();
            check_here(&args, &deployment)
                .err()
                .map(|error| error.to_string())
        };
        assert_eq!(missed(&format!("{bus} --ready-file {here}/ready")), None);
        assert_eq!(missed(&format!("{bus} --ready-file ready")), None);
        for (line, named) in [
            (
                format!("{bus} --api-keys-file {here}/keys"),
                format!("{here}/keys"),
            ),
            (format!("--nats-server {here}/nats"), format!("{here}/nats")),
            (
                format!("{bus} --ready-file {here}/no/ready"),
                "--ready-file".to_owned(),
            ),
        ] {
            let missed = missed(&line).unwrap_or_else(|| panic!("{line} is taken"));
            assert!(missed.contains(&named), "{missed}");
        }
        let file = format!(
            "model: m\ncontext: [{{}}]\ndecode: [{{}}]\nnats: {{request-plane-uri: 'nats://h:1', request-plane-nkey: {here}/seed}}\n"
        );
        let deployment = Deployment::of_yaml(&file).unwrap();
        let missed = check_here(&args(""), &deployment).unwrap_err().to_string();
        assert!(missed.contains(&format!("{here}/seed")), "{missed}");
    }
}
