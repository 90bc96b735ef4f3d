//! A network of several hosts on this machine: a network namespace for each worker, and links that a test can cut.
//!
//! Every host hangs by a veth pair on one bridge. The bus, the API server and the test stay in the namespace that they
//! are in and are reached at the bridge's address. UCX inside a host sees that host's one interface and is given no
//! shared memory, so what passes between two workers passes over the bridge.
//!
//! A cut is silent, as on a real network: frames are sent and nobody gets them. Nothing is refused, nothing is reset.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Networks are taken from the addresses that are set aside for tests of networks, 198.18.0.0/15.
const ADDRESSES: u32 = 0xC612_0000;

/// Addresses of one network.
const ADDRESSES_EACH: u32 = 32;

/// Networks that fit.
const NETWORKS_MAX: u32 = (1 << 17) / ADDRESSES_EACH;

/// Most hosts of one network: its own address, the bridge's and the last one are not for hosts.
const HOSTS_MAX: u32 = ADDRESSES_EACH - 3;

/// The interface of each host.
const INTERFACE: &str = "eth0";

/// A hardware address that no host has.
const NOBODY: &str = "02:00:00:00:00:00";

static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// A bridge and its hosts. All of it is taken down when the value is dropped.
#[derive(Debug)]
pub struct Network {
    /// The bridge; hosts' interfaces on it are named after it.
    bridge: String,
    /// Its first address.
    base: u32,
    hosts: Mutex<BTreeMap<String, Host>>,
}

/// One host as the machine knows it.
#[derive(Clone, Debug)]
struct Host {
    namespace: String,
    /// Its end on the bridge.
    port: String,
    address: Ipv4Addr,
}

impl Network {
    /// A network without hosts. `None` where this process may not make one, with a line on the error output that the
    /// test did not run, and why: not being root, or being in a container without `CAP_NET_ADMIN` and `CAP_SYS_ADMIN`.
    pub fn new() -> Option<Arc<Self>> {
        match Self::build() {
            Ok(network) => Some(Arc::new(network)),
            Err(reason) => {
                let test = std::thread::current();
                let test = test.name().unwrap_or("a test").to_owned();
                // past the test runner's capture: a test that did not run must not look like one that passed
                let _ = writeln!(
                    std::io::stderr(),
                    "DID NOT RUN: {test}: no network namespaces here: {reason}"
                );
                None
            }
        }
    }

    fn build() -> Result<Self, String> {
        sweep();
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let bridge = format!("bt{pid}x{number}");
        let used = ip(&["-4", "-o", "address", "show"])?;
        let base = (0..NETWORKS_MAX)
            .map(|offset| ADDRESSES + (pid + number + offset) % NETWORKS_MAX * ADDRESSES_EACH)
            .find(|base| !used.contains(&format!(" {}/", Ipv4Addr::from(base + 1))))
            .ok_or("every network of 198.18.0.0/15 is taken")?;
        let network = Self {
            bridge,
            base,
            hosts: Mutex::default(),
        };
        let bridge = network.bridge.as_str();
        ip(&["link", "add", bridge, "type", "bridge"])?;
        ip(&[
            "address",
            "add",
            &format!("{}/27", network.hub()),
            "dev",
            bridge,
        ])?;
        ip(&["link", "set", bridge, "up"])?;
        // What makes a host is tried now, while the test can still say that it does not run.
        let trial = network.add("trial")?;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &trial.namespace, "true"]);
        run(&mut command)?;
        Self::limit(&trial, Some(1))?;
        network.remove("trial");
        Ok(network)
    }

    /// Where hosts reach what runs outside of them.
    pub fn hub(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 1)
    }

    /// The command, to be run on the host of this name. Here as everywhere, a host is made when it is first named.
    pub fn on_host(&self, name: &str, command: &Command) -> Command {
        let host = self.host(name);
        let mut there = Command::new("ip");
        there
            .args(["netns", "exec", &host.namespace])
            .arg(command.get_program())
            .args(command.get_args())
            .env("UCX_NET_DEVICES", INTERFACE);
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => there.env(key, value),
                None => there.env_remove(key),
            };
        }
        there
    }

    /// From now on nothing passes between these two hosts. Both still reach everybody else.
    pub fn cut(&self, one: &str, other: &str) {
        let nobody = ["lladdr", NOBODY, "nud", "permanent"];
        self.neighbours(one, other, "replace", &nobody);
    }

    /// Ends a [`Self::cut`].
    pub fn heal(&self, one: &str, other: &str) {
        self.neighbours(one, other, "delete", &[]);
    }

    /// What each of the two takes the other's hardware address for.
    fn neighbours(&self, one: &str, other: &str, verb: &str, is: &[&str]) {
        let (one, other) = (self.host(one), self.host(other));
        for (from, to) in [(&one, &other), (&other, &one)] {
            let address = to.address.to_string();
            let of = ["-n", &from.namespace, "neighbour", verb, &address];
            must(&[&of, is, &["dev", INTERFACE]].concat());
        }
    }

    /// Pulls a host's cable: it reaches nobody, the bus neither.
    pub fn unplug(&self, name: &str) {
        must(&["link", "set", &self.host(name).port, "down"]);
    }

    /// Puts it back.
    pub fn plug(&self, name: &str) {
        must(&["link", "set", &self.host(name).port, "up"]);
    }

    /// Bounds what a host can receive, in megabits a second; `None` takes the bound away.
    pub fn throttle(&self, name: &str, megabits: Option<u32>) {
        let host = self.host(name);
        Self::limit(&host, megabits).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Bytes sent to a host since it was made.
    pub fn received(&self, name: &str) -> u64 {
        let port = self.host(name).port;
        let path = format!("/sys/class/net/{port}/statistics/tx_bytes");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        text.trim()
            .parse()
            .unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    fn add(&self, name: &str) -> Result<Host, String> {
        let mut hosts = self.known();
        let taken = |number: &u32| {
            hosts
                .values()
                .any(|host| host.address == Ipv4Addr::from(self.base + 2 + number))
        };
        let number = (0..HOSTS_MAX)
            .find(|number| !taken(number))
            .ok_or("it has no place for another host")?;
        let host = Host {
            namespace: format!("{}-{number}", self.bridge),
            port: format!("{}-{number}", self.bridge),
            address: Ipv4Addr::from(self.base + 2 + number),
        };
        // noted before it is whole, so that what there is of it will be taken down
        hosts.insert(name.to_owned(), host.clone());
        drop(hosts);
        let (namespace, port) = (host.namespace.as_str(), host.port.as_str());
        ip(&["netns", "add", namespace])?;
        ip(&[
            "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace,
        ])?;
        ip(&["link", "set", port, "master", &self.bridge, "up"])?;
        ip(&["-n", namespace, "link", "set", "lo", "up"])?;
        let address = format!("{}/27", host.address);
        ip(&[
            "-n", namespace, "address", "add", &address, "dev", INTERFACE,
        ])?;
        ip(&["-n", namespace, "link", "set", INTERFACE, "up"])?;
        Ok(host)
    }

    fn limit(host: &Host, megabits: Option<u32>) -> Result<(), String> {
        let mut command = Command::new("tc");
        match megabits {
            Some(megabits) => {
                let rate = format!("{megabits}mbit");
                command.args(["qdisc", "replace", "dev", &host.port, "root", "tbf"]);
                command.args(["rate", &rate, "burst", "128k", "latency", "100ms"]);
            }
            None => {
                command.args(["qdisc", "delete", "dev", &host.port, "root"]);
            }
        }
        run(&mut command).map(drop)
    }

    fn remove(&self, name: &str) {
        if let Some(host) = self.known().remove(name) {
            // with one end of the pair both are gone, whoever still is in the namespace
            let _ = ip(&["link", "delete", &host.port]);
            let _ = ip(&["netns", "delete", &host.namespace]);
        }
    }

    fn host(&self, name: &str) -> Host {
        let known = self.known().get(name).cloned();
        known.unwrap_or_else(|| {
            self.add(name)
                .unwrap_or_else(|e| panic!("cannot make a host for {name}: {e}"))
        })
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Host>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let names: Vec<String> = self.known().keys().cloned().collect();
        for name in names {
            self.remove(&name);
        }
        let _ = ip(&["link", "delete", &self.bridge]);
    }
}

/// Takes down what a test left that was killed.
fn sweep() {
    let owner = |name: &str| -> Option<u32> {
        let (pid, _) = name.strip_prefix("bt")?.split_once('x')?;
        pid.parse().ok()
    };
    let is_left = |name: &&str| {
        owner(name).is_some_and(|pid| {
            pid != std::process::id() && !Path::new(&format!("/proc/{pid}")).exists()
        })
    };
    let namespaces = ip(&["netns", "list"]).unwrap_or_default();
    for name in namespaces.lines().filter_map(|line| line.split(' ').next()) {
        if is_left(&name) {
            let _ = ip(&["netns", "delete", name]);
        }
    }
    let links = ip(&["-o", "link", "show"]).unwrap_or_default();
    for line in links.lines() {
        let name = line.split([':', '@']).nth(1).unwrap_or_default().trim();
        if is_left(&name) {
            let _ = ip(&["link", "delete", name]);
        }
    }
}

fn must(args: &[&str]) {
    ip(args).unwrap_or_else(|e| panic!("{e}"));
}

fn ip(args: &[&str]) -> Result<String, String> {
    run(Command::new("ip").args(args))
}

fn run(command: &mut Command) -> Result<String, String> {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    match status.success() {
        true => Ok(String::from_utf8_lossy(&stdout).into_owned()),
        false => Err(format!(
            "{command:?}: {status}: {}",
            String::from_utf8_lossy(&stderr).trim()
        )),
    }
}
