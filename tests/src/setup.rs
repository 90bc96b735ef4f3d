//! What a cluster is made of, and the commands that make it.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use baton_protocol::Role;

use crate::fixture::{baton, model_dir};
use crate::nats::Nats;
use crate::netns::Network;

/// Name of the cluster of every test: each has a nats-server of its own.
pub(crate) const NAME: &str = "test";

/// What a cluster is made of. The defaults are the cheapest that serve: one thread, little KV.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Context workers, `context-0`, `context-1`, …
    pub context: usize,
    /// Decode workers, `decode-0`, …
    pub decode: usize,
    /// Workers of role `both`, `both-0`, …
    pub both: usize,
    /// `cpu` or `fake`.
    pub device: &'static str,
    /// The model directory of the workers.
    pub model: &'static Path,
    /// That of the API server.
    pub tokenizer: &'static Path,
    /// That of decode workers, if it is another.
    pub decode_model: Option<&'static Path>,
    /// Tensor-parallel ranks of context workers, and of the others.
    pub tp_sizes: [Option<u32>; 2],
    /// Token budget of a step.
    pub step_tokens: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Jobs that may wait at a worker.
    pub queue: usize,
    /// Megabytes of a worker's KV arena. A block of SmolLM2 takes 0.7.
    pub kv_mib: usize,
    /// UCX transports; `None` leaves the choice to UCX.
    pub ucx_tls: Option<&'static str>,
    /// Workers each on a host of its own in this network, and the bus where all reach it. KV moves over TCP then.
    pub network: Option<Arc<Network>>,
    /// Lines of nats-server's configuration that make users, named like the processes, with their names as passwords.
    pub users: Option<String>,
    /// What each process of Baton's is started by, and its arguments: `prlimit`, a shell that redirects. It must `exec`.
    pub prefix: Vec<String>,
    /// More flags of every worker.
    pub worker_args: Vec<String>,
    /// More flags of the first API server.
    pub api_args: Vec<String>,
    /// Where Baton's processes write their logs to instead of a file, in the words of bash: `2>/dev/full`. They log all there is.
    pub standard_error: Option<&'static str>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            context: 1,
            decode: 1,
            both: 0,
            device: "cpu",
            model: model_dir(),
            tokenizer: model_dir(),
            decode_model: None,
            tp_sizes: [None; 2],
            step_tokens: 256,
            batch: 32,
            queue: 256,
            kv_mib: 192,
            ucx_tls: None,
            network: None,
            users: None,
            prefix: Vec::new(),
            worker_args: Vec::new(),
            api_args: Vec::new(),
            standard_error: None,
        }
    }
}

impl Setup {
    /// The default of `context` context workers and `decode` decode workers.
    pub fn split(context: usize, decode: usize) -> Self {
        Self {
            context,
            decode,
            ..Self::default()
        }
    }

    /// One worker that does both.
    pub fn unsplit() -> Self {
        Self {
            context: 0,
            decode: 0,
            both: 1,
            ..Self::default()
        }
    }

    pub(crate) fn bus_address(&self) -> Ipv4Addr {
        self.network
            .as_ref()
            .map_or(Ipv4Addr::LOCALHOST, |network| network.hub())
    }

    pub(crate) fn roles(&self) -> Vec<(Role, usize)> {
        vec![
            (Role::Context, self.context),
            (Role::Decode, self.decode),
            (Role::Both, self.both),
        ]
    }
}

/// Arguments of any process of Baton's that joins the cluster.
pub(crate) fn join_args(setup: &Setup, nats: &Nats, name: &str) -> [String; 4] {
    let uri = match setup.users {
        Some(_) => nats.uri_of(name),
        None => nats.uri(),
    };
    let flag = |name: &str| format!("--{name}");
    [
        flag("request-plane-uri"),
        uri,
        flag("cluster"),
        NAME.to_owned(),
    ]
}

/// `name` is said only where permissions want it: without, each start has one of its own.
pub(crate) fn api_server_command(
    setup: &Setup,
    nats: &Nats,
    name: &str,
    port: u16,
    args: &[String],
) -> Command {
    let mut command = started_by(&setup.prefix);
    command
        .arg("api-server")
        .args(join_args(setup, nats, name))
        .arg("--tokenizer")
        .arg(setup.tokenizer)
        .args(["--api-server-host", "127.0.0.1"])
        .args(["--api-server-port", &port.to_string()])
        .args(args);
    if setup.users.is_some() {
        command.args(["--api-server-name", name]);
    }
    logging_to(setup, command)
}

/// The same command with its standard error where the setup says.
fn logging_to(setup: &Setup, command: Command) -> Command {
    let Some(redirection) = setup.standard_error else {
        return command;
    };
    let mut bash = Command::new("bash");
    bash.arg("-c")
        .arg(format!("exec \"$@\" {redirection}"))
        .arg("bash")
        .arg(command.get_program())
        .args(command.get_args())
        .env("RUST_LOG", "trace");
    bash
}

pub(crate) fn worker_command(setup: &Setup, nats: &Nats, name: &str, role: Role) -> Command {
    let mut command = started_by(&setup.prefix);
    command
        .args(["worker", "--role", role.label(), "--worker-name", name])
        .args(join_args(setup, nats, name))
        .arg("--model")
        .arg(match role {
            Role::Decode => setup.decode_model.unwrap_or(setup.model),
            Role::Context | Role::Both => setup.model,
        })
        .args(["--device", setup.device])
        .args(["--threads", "1"])
        .args(["--kv-mib", &setup.kv_mib.to_string()])
        .args(["--step-tokens", &setup.step_tokens.to_string()])
        .args(["--batch", &setup.batch.to_string()])
        .args(["--queue", &setup.queue.to_string()])
        .args(&setup.worker_args);
    let [context, others] = setup.tp_sizes;
    let ranks = match role {
        Role::Context => context,
        Role::Decode | Role::Both => others,
    };
    if let Some(ranks) = ranks {
        command.args(["--tp-size", &ranks.to_string()]);
    }
    // Shared memory knows nothing of network namespaces: UCX would go round the network.
    let tls = setup.ucx_tls.or(setup.network.as_ref().map(|_| "tcp,self"));
    if let Some(tls) = tls {
        command.args(["--ucx-tls", tls]);
    }
    match &setup.network {
        Some(network) => network.on_host(name, &command),
        None => {
            let mut command = logging_to(setup, command);
            // Other tests create and delete network bridges: a UCX connection over one of them would break with it.
            command.env("UCX_NET_DEVICES", "lo");
            command
        }
    }
}

/// The binary, started by this.
pub(crate) fn started_by(prefix: &[String]) -> Command {
    let mut words = prefix.iter();
    let Some(first) = words.next() else {
        return Command::new(baton());
    };
    let mut command = Command::new(first);
    command.args(words).arg(baton());
    command
}
