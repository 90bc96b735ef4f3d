//! `baton up`: a whole cluster on this machine, every part a process of its own.

mod health;
mod nats;
mod plan;
mod restarts;
mod scratch;
mod supervisor;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use self::nats::Listen;
use self::plan::Plan;
use self::restarts::Restarts;
use self::scratch::Scratch;
use self::supervisor::{ProcessSpec, Stage, Supervisor};
use crate::Failure;
use crate::api_server::{AnswerArgs, ApiKeysArgs, ContentArgs};
use crate::logging::LogFormat;
use crate::model_source;
use crate::shutdown::Shutdown;
use crate::tuning::TuningArgs;

#[derive(Args, Debug)]
pub struct UpArgs {
    /// What to serve: a model directory, a GGUF file, a friendly or a Hugging Face name. All but the first
    /// are prepared into the cache first (BATON_CACHE, else ~/.cache/baton)
    #[arg(long)]
    model: String,
    /// Name that clients ask for [default: the model's own]
    #[arg(long)]
    model_name: Option<String>,
    /// Context workers [default: 1; 0 with --both-worker-count]
    #[arg(long)]
    context_worker_count: Option<usize>,
    /// Decode workers [default: 1; 0 with --both-worker-count]
    #[arg(long)]
    generate_worker_count: Option<usize>,
    /// Workers that do both: unsplit serving
    #[arg(long, default_value_t = 0)]
    both_worker_count: usize,
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
    keys: ApiKeysArgs,
    #[command(flatten)]
    content: ContentArgs,
    #[command(flatten)]
    answers: AnswerArgs,
    /// What workers compute on: cpu, cuda:N, fake or fake:MICROSECONDS_PER_STEP
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Tensor-parallel ranks of each worker [default: as the model directory is divided]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    tp_size: Option<u32>,
    /// The same of context workers alone, which need not have as many as decode workers
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    context_tp_size: Option<u32>,
    /// Compute threads of all workers together [default: one for each CPU]; each gets its share, and one at least
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Start a process again that died, instead of ending with it
    #[arg(long)]
    restart: bool,
    /// Give up when the cluster cannot serve after this many seconds
    #[arg(long, default_value_t = 300)]
    start_timeout_s: u64,
    /// Time for requests under way to finish at the end, in seconds; a second Ctrl-C cuts it short
    #[arg(long, default_value_t = 10)]
    drain_s: u64,
    /// Write addresses and process ids to this file (JSON) when the cluster serves; removed at the end
    #[arg(long)]
    ready_file: Option<PathBuf>,
}

/// A process that used up its time to drain says so to whoever is still there, and ends, within this time.
const FAREWELL: Duration = Duration::from_secs(5);

/// What the ready file says.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {
    /// Where the API server answers: `http://127.0.0.1:8000`.
    pub url: String,
    /// Where the bus is.
    pub request_plane_uri: String,
    /// Name that clients ask for.
    pub model: String,
    /// Process ids by name, this process included as `up`.
    pub pids: BTreeMap<String, i32>,
}

/// Runs the cluster until a signal comes (that is no failure) or a process dies.
pub fn run(args: UpArgs, log_format: LogFormat) -> Result<(), Failure> {
    let plan = Plan::new(&args, log_format)?;
    let model = model_source::resolve(&args.model)?;
    plan.check_memory(&model.directory)?;
    // One thread: children die with the thread that started them, so it must be this one.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut shutdown = Shutdown::catch()?;
        let directory = Scratch::new(&std::env::temp_dir())?;
        let mut supervisor = Supervisor::new(Some(std::env::current_exe()?));
        let outcome = tokio::select! {
            signal = shutdown.requested() => {
                tracing::info!("{signal}: stopping; once more to stop at once");
                Ok(())
            }
            failure = serve(&args, &plan, &model, directory.path(), &mut supervisor) => Err(failure),
        };
        if let Err(failure) = &outcome {
            tracing::error!("{failure}; stopping");
        }
        if let Some(file) = &args.ready_file {
            let _ = std::fs::remove_file(file);
        }
        let hurry = async {
            shutdown.requested().await;
        };
        supervisor.stop(Duration::from_secs(args.drain_s) + FAREWELL, hurry).await;
        outcome
    })
}

/// Starts everything and watches over it; returns when it cannot go on.
async fn serve(
    args: &UpArgs,
    plan: &Plan,
    model: &model_source::Prepared,
    directory: &Path,
    supervisor: &mut Supervisor,
) -> Failure {
    match try_serve(args, plan, model, directory, supervisor).await {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

async fn try_serve(
    args: &UpArgs,
    plan: &Plan,
    model: &model_source::Prepared,
    directory: &Path,
    supervisor: &mut Supervisor,
) -> Result<std::convert::Infallible, Failure> {
    let bus = start_bus(args, directory, supervisor).await?;
    for spec in plan.processes(&bus, &model.directory) {
        start(supervisor, spec)?;
    }

    let wait = Duration::from_secs(args.start_timeout_s);
    tokio::select! {
        exit = supervisor.next_exit() => return Err(exit.to_string().into()),
        healthy = health::wait(&plan.url, wait) => healthy?,
    }
    announce(args, plan, model, &bus, supervisor)?;

    let mut restarts = Restarts::default();
    loop {
        tokio::select! {
            exit = supervisor.next_exit() => {
                if !args.restart {
                    return Err(exit.to_string().into());
                }
                let delay = restarts.schedule(exit.spec.clone(), exit.lived);
                tracing::warn!("{exit}; it is started again in {} s", delay.as_secs());
            }
            spec = restarts.due() => {
                start(supervisor, spec)?;
                if let Some(file) = &args.ready_file {
                    write_ready(file, &ready(plan, model, &bus, supervisor))?;
                }
            }
        }
    }
}

/// The bus's address; starts it first unless a running one was named.
async fn start_bus(
    args: &UpArgs,
    directory: &Path,
    supervisor: &mut Supervisor,
) -> Result<String, Failure> {
    let listen = match &args.request_plane_uri {
        Some(uri) if !args.initialize_request_plane => return Ok(uri.clone()),
        Some(uri) => Listen::parse(uri)?,
        None => Listen::local(),
    };
    let program = nats::find(args.nats_server.as_deref())?;
    tracing::info!("the request plane is {}", program.display());
    let spec = ProcessSpec {
        name: "nats-server".to_owned(),
        stage: Stage::Bus,
        program,
        args: nats::configure(directory, &listen)?,
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
    Ok(args.request_plane_uri.clone().unwrap_or(address))
}

fn start(supervisor: &mut Supervisor, spec: ProcessSpec) -> Result<(), Failure> {
    let name = spec.name.clone();
    supervisor
        .start(spec)
        .map_err(|error| format!("cannot start {name}: {error}").into())
}

fn ready(plan: &Plan, model: &model_source::Prepared, bus: &str, supervisor: &Supervisor) -> Ready {
    let mut pids: BTreeMap<_, _> = supervisor
        .pids()
        .map(|(name, pid)| (name.to_owned(), pid))
        .collect();
    pids.extend(i32::try_from(std::process::id()).map(|pid| ("up".to_owned(), pid)));
    Ready {
        url: plan.url.clone(),
        request_plane_uri: bus.to_owned(),
        model: plan
            .model_name
            .clone()
            .unwrap_or_else(|| model.name.clone()),
        pids,
    }
}

/// Says on standard output where the cluster is and how to talk to it.
fn announce(
    args: &UpArgs,
    plan: &Plan,
    model: &model_source::Prepared,
    bus: &str,
    supervisor: &Supervisor,
) -> Result<(), Failure> {
    let ready = ready(plan, model, bus, supervisor);
    if let Some(file) = &args.ready_file {
        write_ready(file, &ready)?;
    }
    let (url, name) = (&ready.url, &ready.model);
    // Whoever closed standard output does not want to know.
    let _ = writeln!(
        std::io::stdout(),
        "\nBaton serves {name} at {url}\n\n  \
         curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
         -d '{{\"model\": \"{name}\", \"stream\": true, \"max_tokens\": 100, \"temperature\": 0.2,\n         \
         \"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}]}}'\n\n  \
         baton chat --url {url}\n  baton status --url {url}\n\nCtrl-C stops it.\n"
    );
    Ok(())
}

/// Written aside and renamed: whoever sees the file sees all of it.
fn write_ready(file: &Path, ready: &Ready) -> Result<(), Failure> {
    let aside = file.with_extension("tmp");
    serde_json::to_vec_pretty(ready)
        .map_err(std::io::Error::from)
        .and_then(|text| std::fs::write(&aside, text))
        .and_then(|()| std::fs::rename(&aside, file))
        .map_err(|error| format!("cannot write {}: {error}", file.display()).into())
}
