//! The processes of the cluster on this host, with their arguments. Pure, except that it opens the sockets of the API servers.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;

use baton_protocol::subjects::Cluster;
use baton_worker::{WorkerConfig, check_host_memory, host_memory_bytes};

use super::supervisor::{ProcessSpec, Stage};
use crate::Failure;
use crate::deployment::{
    ApiServers, Deployment, Devices, Worker, api_server_drain_s, deal, worker_drain_s,
};
use crate::logging::LogFormat;
use crate::model_source::Prepared;
use crate::worker;

/// By what the deployment calls them.
pub type Models = BTreeMap<String, Prepared>;

/// How many ports after the first are tried where none is named.
const PORTS_TRIED: u16 = 100;

/// The cluster, as far as it can be known before anything runs.
pub struct Plan {
    /// What it is made of.
    pub deployment: Deployment,
    /// By worker.
    devices: Vec<Devices>,
    /// By API server.
    ports: Vec<u16>,
    /// By API server, until they start. They listen from the moment a port is chosen: another cluster that starts meanwhile would take it.
    listeners: RefCell<Vec<TcpListener>>,
    /// Where `baton` is.
    baton: PathBuf,
    log_format: LogFormat,
}

impl Plan {
    /// A checked deployment, on this host.
    ///
    /// # Errors
    /// A sentence on what in it cannot work here.
    pub fn new(mut deployment: Deployment, log_format: LogFormat) -> Result<Self, Failure> {
        let devices = deal(&deployment)?;
        share_threads(&mut deployment);
        let listeners = listeners(&deployment.api_server)?;
        let port = |listener: &TcpListener| Ok(listener.local_addr()?.port());
        let ports: Result<Vec<_>, Failure> = listeners.iter().map(port).collect();
        Ok(Self {
            devices,
            ports: ports?,
            listeners: RefCell::new(listeners),
            deployment,
            baton: std::env::current_exe()?,
            log_format,
        })
    }

    /// Where the API servers answer on this host.
    pub fn urls(&self) -> Vec<String> {
        let host = match self.deployment.api_server.api_server_host.as_str() {
            "0.0.0.0" => "127.0.0.1".to_owned(),
            "::" | "[::]" => "[::1]".to_owned(),
            host if host.contains(':') && !host.starts_with('[') => format!("[{host}]"),
            host => host.to_owned(),
        };
        let scheme = self.deployment.api_server.scheme();
        let url = |port| format!("{scheme}://{host}:{port}");
        self.ports.iter().map(url).collect()
    }

    /// The longest that any process takes to finish what is under way, in seconds.
    pub fn drain_s(&self) -> u64 {
        let groups = self.deployment.groups();
        let workers = groups.map(|(_, _, group)| worker_drain_s(group));
        workers.fold(api_server_drain_s(&self.deployment.api_server), u64::max)
    }

    /// Compares what all workers together take of main memory with what there is: each for itself would find room, and the last
    /// of them would not.
    ///
    /// # Errors
    /// A sentence on what there is.
    pub fn check_memory(&self, models: &Models) -> Result<(), Failure> {
        let mut bytes = 0_u64;
        let workers = self.deployment.workers()?;
        for (worker, devices) in workers.iter().zip(&self.devices) {
            // What is on a GPU takes none of it.
            let Devices::Host(device) = devices else {
                continue;
            };
            let (group, cluster) = (worker.group, Cluster::new("any")?);
            let model = &prepared(models, self.deployment.model_of(group))?.directory;
            let mut config = WorkerConfig::new(worker.name.clone(), worker.role, model, cluster);
            config.device = device.parse()?;
            config.tp_size = group.tp_size;
            worker::apply(group.tuning(), &mut config);
            bytes = bytes.saturating_add(host_memory_bytes(&config)?);
        }
        let what = format!(
            "the cluster of {} workers, with their KV and weights,",
            workers.len()
        );
        Ok(check_host_memory(bytes, &what)?)
    }

    /// What to start, in this order, once the bus and the models are there. The first call hands the sockets over.
    ///
    /// # Errors
    /// If a directory cannot stand on a command line of text.
    pub fn processes(&self, bus: &str, models: &Models) -> Result<Vec<ProcessSpec>, Failure> {
        let directory = |model: &str| -> Result<String, Failure> {
            let directory = &prepared(models, model)?.directory;
            let text = directory.to_str().map(str::to_owned);
            text.ok_or_else(|| format!("{} is no UTF-8: rename it", directory.display()).into())
        };
        let process = |name: &str, stage, words: Vec<String>| {
            let log_format = ["--log-format", self.log_format.label()];
            let mut args: Vec<_> = log_format.map(Into::into).into();
            args.extend(words.into_iter().map(Into::into));
            ProcessSpec {
                name: name.to_owned(),
                stage,
                program: self.baton.clone(),
                args,
                listener: None,
            }
        };
        let deployment = &self.deployment;
        let tokenizer = directory(&deployment.model)?;
        let mut processes = Vec::new();
        let mut listeners = self.listeners.take().into_iter();
        for (index, port) in self.ports.iter().enumerate() {
            let name = match self.ports.len() {
                1 => "api-server".to_owned(),
                _ => format!("api-server-{index}"),
            };
            let words = deployment.api_server_args(Some(bus), *port, &tokenizer);
            let listener = listeners.next().map(Arc::new);
            processes.push(ProcessSpec {
                listener,
                ..process(&name, Stage::Front, words)
            });
        }
        for (worker, devices) in deployment.workers()?.iter().zip(&self.devices) {
            let Worker { name, role, group } = worker;
            let model = directory(deployment.model_of(group))?;
            let words =
                deployment.worker_args(Some(bus), *role, name.as_str(), group, devices, &model);
            processes.push(process(name.as_str(), Stage::Worker, words));
        }
        Ok(processes)
    }
}

fn prepared<'a>(models: &'a Models, name: &str) -> Result<&'a Prepared, Failure> {
    models
        .get(name)
        .ok_or_else(|| format!("{name} was not prepared").into())
}

/// Workers on the CPU that were told no number of threads share the machine's CPUs, each having one at least.
fn share_threads(deployment: &mut Deployment) {
    let on_cpu = |devices: &Devices| *devices == Devices::default();
    let workers: usize = deployment
        .groups()
        .filter(|(_, _, group)| on_cpu(&group.devices))
        .map(|(_, _, group)| group.count)
        .sum();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let each = (cpus / workers.max(1)).max(1);
    let roles = [
        &mut deployment.context,
        &mut deployment.decode,
        &mut deployment.both,
    ];
    for group in roles.into_iter().flatten() {
        if on_cpu(&group.devices) {
            group.threads.get_or_insert(each);
        }
    }
}

/// A socket for each API server: at the named port and those after it, or at free ones.
fn listeners(servers: &ApiServers) -> Result<Vec<TcpListener>, Failure> {
    let host = bare(&servers.api_server_host);
    let mut listeners = Vec::new();
    let mut next = servers.api_server_port.unwrap_or(ApiServers::PORT);
    for _ in 0..servers.count {
        let listener = match servers.api_server_port {
            // With 0 the system chooses. check() has seen to it that there are so many.
            Some(_) => TcpListener::bind((host, next)).map_err(|error| {
                format!("cannot listen on {host}:{next} (--api-server-port): {error}")
            })?,
            None => first_free(host, next)?,
        };
        if servers.api_server_port != Some(0) {
            next = listener.local_addr()?.port().saturating_add(1);
        }
        listeners.push(listener);
    }
    Ok(listeners)
}

/// An address without the brackets that URLs have around one of IPv6.
fn bare(host: &str) -> &str {
    host.trim_matches(['[', ']'])
}

/// Listens at the first port from this one on that is free.
fn first_free(host: &str, first: u16) -> Result<TcpListener, Failure> {
    let mut last = None;
    for port in first..first.saturating_add(PORTS_TRIED) {
        match TcpListener::bind((host, port)) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    let error = last.map(|error| error.to_string()).unwrap_or_default();
    Err(format!("no port of {host} from {first} on is free: {error}").into())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::flags;
    use super::super::tests::{args, plan};
    use super::*;

    fn models(deployment: &Deployment) -> Models {
        let mut models = Models::new();
        let groups = deployment.groups();
        let names = groups.map(|(_, _, group)| deployment.model_of(group));
        for name in names.chain([deployment.model.as_str()]) {
            let directory = PathBuf::from(format!("/{name}"));
            let prepared = Prepared {
                directory,
                name: name.to_owned(),
            };
            models.insert(name.to_owned(), prepared);
        }
        models
    }

    /// The command line of each process.
    fn lines(plan: &Plan) -> Vec<String> {
        let processes = plan.processes("nats://h:1", &models(&plan.deployment));
        let line = |process: &ProcessSpec| {
            let words = process.args.iter().map(|word| word.to_str().unwrap());
            words.collect::<Vec<_>>().join(" ")
        };
        processes.unwrap().iter().map(line).collect()
    }

    fn value<'a>(line: &'a str, flag: &str) -> Option<&'a str> {
        let mut words = line.split(' ').skip_while(|word| *word != flag);
        words.nth(1)
    }

    fn names(line: &str) -> Vec<String> {
        let deployment = flags::deployment(&args(line)).unwrap();
        let workers = deployment.workers().unwrap();
        workers
            .iter()
            .map(|worker| worker.name.to_string())
            .collect()
    }

    fn refusal(line: &str) -> String {
        flags::deployment(&args(line)).unwrap_err().to_string()
    }

    #[test]
    fn counts_make_workers() {
        assert_eq!(names("--both-worker-count 1"), ["both-0"]);
        for line in [
            "--context-worker-count 1 --decode-worker-count 1",
            "--context-worker-count 1",
            "--decode-worker-count 1",
            "--both-worker-count 0",
        ] {
            assert_eq!(names(line), ["context-0", "decode-0"], "{line}");
        }
        assert_eq!(
            names("--context-worker-count 2 --decode-worker-count 1 --worker-name a"),
            ["a-context-0", "a-context-1", "a-decode-0"]
        );
        assert_eq!(
            names("--both-worker-count 1 --decode-worker-count 1"),
            ["decode-0", "both-0"]
        );
    }

    #[test]
    fn without_counts_workers_do_both() {
        for (line, workers) in [
            ("", 2),
            ("--device fake", 2),
            ("--tp-size 2", 2),
            ("--device cuda:1", 1),
            ("--device cuda:0-3", 4),
            ("--device cuda:0-3 --tp-size 2", 2),
            ("--device cuda:0-3 --tp-size 4", 1),
        ] {
            let wanted: Vec<_> = (0..workers).map(|n| format!("both-{n}")).collect();
            assert_eq!(names(line), wanted, "{line}");
        }
        for (line, why) in [
            (
                "--device cuda:0-2 --tp-size 2",
                "is 3 GPUs, which workers of 2 ranks",
            ),
            (
                "--device cuda:0-1 --tp-size 4",
                "is 2 GPUs, which workers of 4 ranks",
            ),
            ("--device cuda:0 --tp-size 2", "is one GPU"),
        ] {
            let said = refusal(line);
            assert!(said.contains(why), "{line}: {said}");
        }
    }

    #[test]
    fn a_cluster_that_could_not_serve_is_refused() {
        for (line, why) in [
            ("--context-worker-count 0", "nobody would run prompts"),
            ("--decode-worker-count 0", "nobody would generate"),
            (
                "--context-worker-count 0 --decode-worker-count 0",
                "nobody would run prompts",
            ),
            ("--worker-name a.b", "a.b"),
        ] {
            let said = refusal(line);
            assert!(said.contains(why), "{line}: {said}");
        }
    }

    #[test]
    fn context_workers_have_a_tensor_parallel_size_of_their_own() {
        for (line, context, decode) in [
            ("", None, None),
            ("--tp-size 2", Some("2"), Some("2")),
            ("--tp-size 2 --context-tp-size 4", Some("4"), Some("2")),
            ("--context-tp-size 4", Some("4"), None),
        ] {
            let lines = lines(&plan(&format!("--context-worker-count 1 {line}")));
            let told: Vec<_> = lines[1..]
                .iter()
                .map(|line| value(line, "--tp-size"))
                .collect();
            assert_eq!(told, [context, decode], "{line}");
        }
        // Where nobody is a context worker it means nothing.
        for line in [
            "--context-tp-size 4",
            "--context-tp-size 4 --both-worker-count 2",
        ] {
            let said = refusal(line);
            assert!(
                said.contains("--context-tp-size is for context workers"),
                "{said}"
            );
        }
    }

    #[test]
    fn gpus_are_dealt_out_in_order_and_one_is_for_all() {
        for (line, devices) in [
            ("--device cuda:0", vec!["cuda:0"]),
            ("--device cuda:1,0", vec!["cuda:1", "cuda:0"]),
            (
                "--device cuda:0 --decode-worker-count 1",
                vec!["cuda:0", "cuda:0"],
            ),
            (
                "--device cuda:0-3 --tp-size 2",
                vec!["cuda:0-1", "cuda:2-3"],
            ),
            (
                "--device cuda:0-7 --tp-size 2 --context-tp-size 4 --decode-worker-count 2",
                vec!["cuda:0-3", "cuda:4-5", "cuda:6-7"],
            ),
        ] {
            let lines = lines(&plan(line));
            let told: Vec<_> = lines[1..]
                .iter()
                .filter_map(|line| value(line, "--device"))
                .collect();
            assert_eq!(told, devices, "{line}");
        }
        for line in ["", "--tp-size 2"] {
            let error = refusal(&format!("--device cuda:0-2 --decode-worker-count 1 {line}"));
            assert!(error.contains("GPUs"), "{error}");
        }
    }

    #[test]
    fn threads_are_divided_and_nobody_goes_without() {
        let threads = |line: &str| {
            let lines = lines(&plan(line));
            value(&lines[1], "--threads").map(str::to_owned)
        };
        assert_eq!(threads("--threads 8").as_deref(), Some("4"));
        let line = "--threads 2 --context-worker-count 3";
        assert_eq!(threads(line).as_deref(), Some("1"));
        assert!(threads("--both-worker-count 1").is_some());
        assert_eq!(threads("--device fake --threads 8"), None);
    }

    #[test]
    fn a_chosen_port_is_taken_until_its_api_server_has_it() {
        let plan = plan("--device fake");
        let url = &plan.urls()[0];
        let address = url.strip_prefix("http://").unwrap();
        assert!(TcpListener::bind(address).is_err(), "{url} could be taken");
        let servers = |plan: &Plan| {
            let mut processes = plan
                .processes("nats://h:1", &models(&plan.deployment))
                .unwrap();
            processes.retain(|process| process.stage == Stage::Front);
            processes
        };
        let first = servers(&plan);
        let socket = first[0].listener.as_ref().expect("a socket");
        assert_eq!(socket.local_addr().unwrap().to_string(), address);
        // One that is started again listens by itself.
        assert!(servers(&plan)[0].listener.is_none());
        drop(first);
        assert!(TcpListener::bind(address).is_ok());
    }

    #[test]
    fn a_taken_port_is_refused_when_named_and_passed_over_when_not() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let number = taken.local_addr().unwrap().port();
        let named = ApiServers {
            api_server_port: Some(number),
            ..ApiServers::default()
        };
        let error = listeners(&named).unwrap_err().to_string();
        assert!(error.contains(&number.to_string()), "{error}");
        let free = first_free("127.0.0.1", number).unwrap();
        assert!(free.local_addr().unwrap().port() > number);
    }

    #[test]
    fn every_process_is_told_the_cluster_and_the_bus() {
        let plan = plan(
            "--cluster c1 --threads 2 --kv-mib 64 --drain-s 7 \
             --special-tokens-in-content allow --generation-config none --cors-origin https://a.example",
        );
        let lines = lines(&plan);
        assert_eq!(lines.len(), 3);
        for line in &lines {
            assert!(line.starts_with("--log-format json "), "{line}");
            let bus = " --cluster c1 --request-plane-uri nats://h:1 ";
            assert!(line.contains(bus), "{line}");
            assert_eq!(value(line, "--drain-s"), Some("7"), "{line}");
        }
        for (flag, wanted) in [
            ("--special-tokens-in-content", "allow"),
            ("--generation-config", "none"),
            ("--cors-origin", "https://a.example"),
            ("--tokenizer", "/m"),
        ] {
            assert_eq!(value(&lines[0], flag), Some(wanted), "{lines:?}");
        }
        for (flag, wanted) in [
            ("--model", "/m"),
            ("--device", "cpu"),
            ("--threads", "1"),
            ("--kv-mib", "64"),
        ] {
            assert_eq!(value(&lines[2], flag), Some(wanted), "{lines:?}");
        }
    }

    #[test]
    fn a_file_has_several_api_servers_and_groups_with_weights_of_their_own() {
        let text = "model: m\napi-server: {count: 2, api-server-port: 0}\ncontext: [{devices: fake}]\n\
                    decode: [{devices: fake}, {devices: fake, model: m-fp8, count: 2}]\n";
        let deployment = Deployment::of_yaml(text).unwrap();
        let plan = Plan::new(deployment, LogFormat::Json).unwrap();
        let lines = lines(&plan);
        let model = |line: &String| value(line, "--model").map(str::to_owned);
        let models: Vec<_> = lines.iter().filter_map(model).collect();
        assert_eq!(models, ["/m", "/m", "/m-fp8", "/m-fp8"]);
        let urls = plan.urls();
        assert_eq!(urls.len(), 2);
        assert_ne!(urls[0], urls[1]);
    }

    #[test]
    fn what_is_printed_starts_the_same() {
        let line = "--device fake --kv-mib 64 --worker-name a --both-worker-count 2 --drain-s 3";
        let flags = flags::deployment(&args(line)).unwrap();
        let file = Deployment::of_yaml(&flags.to_yaml().unwrap()).unwrap();
        let lines = |deployment| {
            let mut plan = Plan::new(deployment, LogFormat::Text).unwrap();
            plan.ports = vec![1];
            lines(&plan)
        };
        assert_eq!(lines(flags), lines(file));
    }
}
