//! Which processes make the cluster, and what each is told. Pure, but for the choice of a free port.

use std::ffi::OsString;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use baton_protocol::subjects::Cluster;
use baton_protocol::{Role, WorkerId};
use baton_worker::{Device, WorkerConfig, check_host_memory, host_memory_bytes};

use super::UpArgs;
use super::supervisor::{ProcessSpec, Stage};
use crate::Failure;
use crate::logging::LogFormat;
use crate::tuning::TuningArgs;
use crate::worker;

/// The port where nothing is said.
const PORT: u16 = 8000;
/// How many ports after it are tried.
const PORTS_TRIED: u16 = 100;

/// The cluster, as far as it can be known before anything runs.
pub struct Plan {
    /// Where the API server will answer on this host.
    pub url: String,
    /// Name that clients ask for, if not the model's own.
    pub model_name: Option<String>,
    baton: PathBuf,
    common: Vec<OsString>,
    front: Vec<OsString>,
    workers: Vec<(WorkerId, Role)>,
    /// Of context workers, and of the others.
    tp_sizes: (Option<u32>, Option<u32>),
    compute: Vec<OsString>,
    device: Device,
    tuning: TuningArgs,
}

impl Plan {
    /// From the command line.
    ///
    /// # Errors
    /// A sentence on what in it cannot work.
    pub fn new(args: &UpArgs, log_format: LogFormat) -> Result<Self, Failure> {
        Cluster::new(args.cluster.as_str()).map_err(|error| format!("--cluster: {error}"))?;
        let workers = workers(args)?;
        let port = port(&args.api_server_host, args.api_server_port)?;
        let host = match args.api_server_host.as_str() {
            "0.0.0.0" => "127.0.0.1".to_owned(),
            "::" | "[::]" => "[::1]".to_owned(),
            host if host.contains(':') && !host.starts_with('[') => format!("[{host}]"),
            host => host.to_owned(),
        };
        let mut common = flags([
            ("--log-format", log_format.label()),
            ("--cluster", &args.cluster),
        ]);
        let drain = args.drain_s.to_string();
        let mut front = flags([
            ("--drain-s", drain.as_str()),
            ("--api-server-host", &args.api_server_host),
            ("--api-server-port", &port.to_string()),
        ]);
        if let Some(name) = &args.model_name {
            front.extend(flags([("--model-name", name)]));
        }
        if let Some(file) = &args.keys.api_keys_file {
            front.extend([OsString::from("--api-keys-file"), file.into()]);
        }
        let rule = args.content.special_tokens_in_content;
        front.extend(flags([("--special-tokens-in-content", rule.label())]));
        let from = args.answers.generation_config;
        front.extend(flags([("--generation-config", from.label())]));
        if let Some(mib) = args.answers.response_store_mib {
            front.extend(flags([("--response-store-mib", &mib.to_string())]));
        }
        for origin in &args.answers.cors_origin {
            front.extend(flags([("--cors-origin", origin)]));
        }
        if let Some(format) = args.content.tool_format {
            front.extend(flags([("--tool-format", format.name())]));
        }
        if let Some(format) = args.content.reasoning_format {
            front.extend(flags([("--reasoning-format", format.name())]));
        }
        if let Some(most) = args.keys.api_key_in_flight_max {
            front.extend(flags([("--api-key-in-flight-max", &most.to_string())]));
        }
        let mut compute = flags([("--device", args.device.as_str()), ("--drain-s", &drain)]);
        if args.device == "cpu" {
            let threads = threads_each(args.threads, workers.len());
            compute.extend(flags([("--threads", &threads.to_string())]));
        }
        compute.extend(args.tuning.to_args());
        common.shrink_to_fit();
        Ok(Self {
            url: format!("http://{host}:{port}"),
            model_name: args.model_name.clone(),
            baton: std::env::current_exe()?,
            common,
            front,
            workers,
            tp_sizes: (args.context_tp_size.or(args.tp_size), args.tp_size),
            compute,
            device: args.device.parse()?,
            tuning: args.tuning.clone(),
        })
    }

    /// Compares what all workers together take of main memory with what there is: each for itself would find room, and the last
    /// of them would not.
    ///
    /// # Errors
    /// A sentence on what there is.
    pub fn check_memory(&self, model: &Path) -> Result<(), Failure> {
        let mut bytes = 0_u64;
        for (worker, role) in &self.workers {
            let cluster = Cluster::new("any")?;
            let mut config = WorkerConfig::new(worker.clone(), *role, model, cluster);
            config.device = self.device;
            config.tp_size = self.tp_size(*role);
            worker::apply(self.tuning.clone(), &mut config);
            bytes = bytes.saturating_add(host_memory_bytes(&config)?);
        }
        let workers = self.workers.len();
        let what = format!("the cluster of {workers} workers, with their KV and weights,");
        Ok(check_host_memory(bytes, &what)?)
    }

    fn tp_size(&self, role: Role) -> Option<u32> {
        let (context, others) = self.tp_sizes;
        match role {
            Role::Context => context,
            _ => others,
        }
    }

    /// What to start, in this order, once the bus and the model are there.
    pub fn processes(&self, bus: &str, model: &Path) -> Vec<ProcessSpec> {
        let bus = flags([("--request-plane-uri", bus)]);
        let process = |name: &str, stage, subcommand: &str, own: &[&[OsString]]| {
            let mut args = vec![OsString::from(subcommand)];
            args.extend(self.common.iter().chain(&bus).cloned());
            args.extend(own.iter().copied().flatten().cloned());
            ProcessSpec {
                name: name.to_owned(),
                stage,
                program: self.baton.clone(),
                args,
            }
        };
        let tokenizer = [OsString::from("--tokenizer"), model.into()];
        let mut processes = vec![process(
            "api-server",
            Stage::Front,
            "api-server",
            &[&self.front, &tokenizer],
        )];
        for (worker, role) in &self.workers {
            let mut own = flags([("--role", role.label()), ("--worker-name", worker.as_str())]);
            if let Some(ranks) = self.tp_size(*role) {
                own.extend(flags([("--tp-size", &ranks.to_string())]));
            }
            let model = [OsString::from("--model"), model.into()];
            processes.push(process(
                worker.as_str(),
                Stage::Worker,
                "worker",
                &[&own, &model, &self.compute],
            ));
        }
        processes
    }
}

fn flags<const N: usize>(pairs: [(&str, &str); N]) -> Vec<OsString> {
    pairs
        .iter()
        .flat_map(|(flag, value)| [OsString::from(flag), OsString::from(value)])
        .collect()
}

fn workers(args: &UpArgs) -> Result<Vec<(WorkerId, Role)>, Failure> {
    let split_default = usize::from(args.both_worker_count == 0);
    let context = args.context_worker_count.unwrap_or(split_default);
    let decode = args.generate_worker_count.unwrap_or(split_default);
    let counts = [
        (Role::Context, context),
        (Role::Decode, decode),
        (Role::Both, args.both_worker_count),
    ];
    let any = |does: fn(Role) -> bool| counts.iter().any(|&(role, count)| count > 0 && does(role));
    if !any(Role::prefills) {
        return Err(
            "nobody would run prompts: give --context-worker-count 1 or --both-worker-count 1"
                .into(),
        );
    }
    if !any(Role::decodes) {
        return Err(
            "nobody would generate: give --generate-worker-count 1 or --both-worker-count 1".into(),
        );
    }
    let prefix = args
        .worker_name
        .as_ref()
        .map(|name| format!("{name}-"))
        .unwrap_or_default();
    let mut workers = Vec::new();
    for (role, count) in counts {
        for index in 0..count {
            let name = format!("{prefix}{}-{index}", role.label());
            workers.push((
                WorkerId::new(name).map_err(|error| format!("--worker-name: {error}"))?,
                role,
            ));
        }
    }
    Ok(workers)
}

/// Context and decode workers are busy at the same time, so threads are divided over all of them.
fn threads_each(threads: Option<usize>, workers: usize) -> usize {
    let threads =
        threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    (threads / workers.max(1)).max(1)
}

/// The named port if it is free, or a free one.
fn port(host: &str, named: Option<u16>) -> Result<u16, Failure> {
    let host = host.trim_matches(['[', ']']);
    let bind = |port| TcpListener::bind((host, port)).and_then(|listener| listener.local_addr());
    match named {
        // The system's choice could be given away before the API server takes it, but it goes round before it repeats.
        Some(0) => Ok(bind(0)
            .map_err(|error| format!("cannot listen on {host}: {error}"))?
            .port()),
        Some(port) => match bind(port) {
            Ok(_) => Ok(port),
            Err(error) => {
                Err(format!("cannot listen on {host}:{port} (--api-server-port): {error}").into())
            }
        },
        None => {
            let mut last = None;
            for port in PORT..PORT + PORTS_TRIED {
                match bind(port) {
                    Ok(_) => return Ok(port),
                    Err(error) => last = Some(error),
                }
            }
            let error = last.map(|error| error.to_string()).unwrap_or_default();
            Err(format!("no port of {host} from {PORT} on is free: {error}").into())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        up: UpArgs,
    }

    fn args(line: &str) -> UpArgs {
        Line::parse_from(
            ["up", "--model", "m"]
                .into_iter()
                .chain(line.split_whitespace()),
        )
        .up
    }

    fn names(line: &str) -> Vec<String> {
        workers(&args(line))
            .unwrap()
            .iter()
            .map(|(worker, _)| worker.to_string())
            .collect()
    }

    #[test]
    fn counts_make_workers() {
        assert_eq!(names(""), ["context-0", "decode-0"]);
        assert_eq!(names("--both-worker-count 1"), ["both-0"]);
        assert_eq!(
            names("--context-worker-count 2 --generate-worker-count 1 --worker-name a"),
            ["a-context-0", "a-context-1", "a-decode-0"]
        );
        assert_eq!(
            names("--both-worker-count 1 --generate-worker-count 1"),
            ["decode-0", "both-0"]
        );
    }

    #[test]
    fn a_cluster_that_could_not_serve_is_refused() {
        for line in [
            "--context-worker-count 0",
            "--generate-worker-count 0",
            "--worker-name a.b",
        ] {
            assert!(workers(&args(line)).is_err(), "{line}");
        }
    }

    #[test]
    fn context_workers_have_a_tensor_parallel_size_of_their_own() {
        for (line, context, decode) in [
            ("", None, None),
            ("--tp-size 2", Some(2), Some(2)),
            ("--tp-size 2 --context-tp-size 4", Some(4), Some(2)),
            ("--context-tp-size 4", Some(4), None),
        ] {
            let plan = Plan::new(
                &args(&format!("--api-server-port 0 {line}")),
                LogFormat::Json,
            );
            let processes = plan.unwrap().processes("nats://h:1", Path::new("/m"));
            let told = processes.iter().skip(1).map(|process| {
                let at = process.args.iter().position(|arg| arg == "--tp-size")?;
                process.args[at + 1].to_str()?.parse().ok()
            });
            let told: Vec<Option<u32>> = told.collect();
            assert_eq!(told, [context, decode], "{line}");
        }
    }

    #[test]
    fn threads_are_divided_and_nobody_goes_without() {
        assert_eq!(threads_each(Some(8), 2), 4);
        assert_eq!(threads_each(Some(2), 4), 1);
        assert!(threads_each(None, 1) >= 1);
    }

    #[test]
    fn a_taken_port_is_refused_when_named_and_passed_over_when_not() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let number = taken.local_addr().unwrap().port();
        let error = port("127.0.0.1", Some(number)).unwrap_err().to_string();
        assert!(error.contains(&number.to_string()), "{error}");
        assert_ne!(port("127.0.0.1", None).unwrap(), number);
    }

    #[test]
    fn every_process_is_told_the_cluster_and_the_bus() {
        let args = args(
            "--cluster c1 --api-server-port 0 --threads 2 --kv-mib 64 --drain-s 7 \
             --special-tokens-in-content allow --generation-config none --cors-origin https://a.example",
        );
        let plan = Plan::new(&args, LogFormat::Json).unwrap();
        let processes = plan.processes("nats://h:1", Path::new("/m"));
        assert_eq!(processes.len(), 3);
        for process in &processes {
            let line: Vec<_> = process
                .args
                .iter()
                .map(|arg| arg.to_str().unwrap())
                .collect();
            let line = line.join(" ");
            assert!(
                line.contains("--log-format json --cluster c1 --request-plane-uri nats://h:1"),
                "{line}"
            );
            match process.stage {
                Stage::Front => assert!(
                    line.contains("--drain-s 7")
                        && line.contains("--special-tokens-in-content allow")
                        && line
                            .contains("--generation-config none --cors-origin https://a.example")
                        && line.ends_with("--tokenizer /m"),
                    "{line}"
                ),
                _ => assert!(
                    line.contains("--model /m --device cpu --drain-s 7 --threads 1 --kv-mib 64"),
                    "{line}"
                ),
            }
        }
    }
}
