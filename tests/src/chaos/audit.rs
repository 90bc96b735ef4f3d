//! What is looked at when the load is over: nothing may be held, nothing broken, nothing left.

use std::collections::BTreeMap;
use std::fs;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use baton_protocol::Role;
use futures::FutureExt;

use super::client::Asking;
use super::load::{Ask, Reader};
use super::said::Said;
use super::tally::Tally;
use super::verdict::{Verdict, judge};
use super::vitals::{Vitals, processes_with};
use crate::cluster::{Cluster, Worker};
use crate::process::Signal;
use crate::trace::Trace;
use crate::wait::{PATIENCE, eventually};

/// What is wrong with a cluster.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// It does not serve as it should.
    pub wrong: Vec<String>,
    /// It holds what nobody needs any more.
    pub leaked: Vec<String>,
}

/// How much a process may hold more than before the load besides KV: caches of the allocator, buffers of connections.
const RESIDENT_KIB_MORE: u64 = 48 << 10;

/// How many files more: a connection that is being closed, one to a peer that was replaced.
const FILES_MORE: u64 = 8;

/// How many threads more: Tokio's blocking threads stay for ten seconds.
const THREADS_MORE: u64 = 8;

/// How long a worker may take to leave: what it has, and 25 s at most.
const LEAVES_WITHIN: Duration = Duration::from_secs(40);

/// Memory, files and threads of the processes of a cluster, by process id and name.
pub type Pulse = BTreeMap<(u32, String), Vitals>;

/// Those of now.
pub fn pulse(cluster: &Cluster) -> Pulse {
    let workers = cluster.workers().iter().map(|worker| &worker.process);
    let servers = cluster.api_servers.iter().map(|server| &server.process);
    workers
        .chain(servers)
        .filter_map(|process| {
            Some((
                (process.id(), process.name().to_owned()),
                Vitals::of(process.id())?,
            ))
        })
        .collect()
}

/// The harness panics when what it waits for does not come: that is a finding too.
async fn caught(future: impl Future<Output = ()>) -> Result<(), String> {
    AssertUnwindSafe(future)
        .catch_unwind()
        .await
        .map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "a panic without words".to_owned())
        })
}

impl Findings {
    /// Workers that were told to leave have left, well.
    pub async fn leaving(&mut self, workers: Vec<Worker>) {
        for mut worker in workers {
            let name = worker.name.clone();
            let ended = caught(async {
                let status = worker.process.end(LEAVES_WITHIN).await;
                assert!(status.success(), "{status}");
            });
            if let Err(reason) = ended.await {
                self.wrong.push(format!("{name} was to leave: {reason}"));
            }
        }
    }

    /// Everything serves again, and holds nothing.
    pub async fn settled(&mut self, cluster: &mut Cluster, lease: Duration) {
        if let Err(reason) = caught(cluster.ready()).await {
            self.wrong.push(format!("not whole again: {reason}"));
        }
        if let Err(reason) = caught(cluster.drained(lease + PATIENCE)).await {
            self.leaked.push(reason);
        }
        for server in &cluster.api_servers {
            let what = format!("no request to be in flight at {}", server.api.base());
            // A disconnect is only noticed at the next write to the client, and a request that is still being tokenised is in no worker's
            // pools.
            let over = eventually(&what, PATIENCE, async || {
                let health = server.api.look("/health").await?;
                match health.body["in_flight"].as_u64() {
                    Some(0) => Ok(()),
                    _ => Err(health.body.to_string()),
                }
            });
            if let Err(reason) = caught(over).await {
                self.leaked.push(reason);
            }
        }
    }

    /// Every API server answers, rightly.
    pub async fn serves(&mut self, cluster: &Cluster, model: &str, ask: &Ask, expected: &Said) {
        for server in &cluster.api_servers {
            let asking = Asking {
                base: server.api.base().to_owned(),
                model: model.to_owned(),
                ask: ask.clone(),
                reader: Reader::Whole,
                patience: PATIENCE,
            };
            let story = asking.tell(std::time::Instant::now()).await;
            let verdict = judge(&story, Reader::Whole, expected);
            if verdict != Verdict::Right {
                self.wrong
                    .push(format!("after all is over: {verdict:?} {story:?}"));
            }
        }
    }

    /// All tries of one generation made the same tokens.
    pub async fn same_tokens(&mut self, cluster: &Cluster) {
        let traces = async { drop(Trace::all(&cluster.tap, 0).await) };
        if let Err(reason) = caught(traces).await {
            self.wrong.push(reason);
        }
    }

    /// Processes that lived through it hold what they held before, and KV.
    pub fn grown(&mut self, before: &Pulse, after: &Pulse, kv_mib: usize, roles: &[Role]) {
        let kv_kib = (kv_mib as u64) << 10;
        for ((process, name), was) in before {
            let Some(is) = after.get(&(*process, name.clone())) else {
                continue;
            };
            let worker = roles.iter().any(|role| name.starts_with(role.label()));
            let resident = was.resident_kib + RESIDENT_KIB_MORE + if worker { kv_kib } else { 0 };
            let files = was.files + FILES_MORE;
            let threads = was.threads + THREADS_MORE;
            if is.resident_kib > resident || is.files > files || is.threads > threads {
                self.leaked
                    .push(format!("{name} grew from {was:?} to {is:?}"));
            }
        }
    }

    /// Nothing panicked.
    pub fn logs(&mut self, cluster: &Cluster) {
        for entry in fs::read_dir(cluster.dir()).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "log") {
                continue;
            }
            let log = fs::read(&path).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let panics = log.lines().filter(|line| line.contains("panicked at"));
            self.wrong
                .extend(panics.map(|line| format!("{}: {line}", path.display())));
        }
    }

    /// Everybody leaves when told to, and nobody stays.
    pub async fn ended(&mut self, cluster: &mut Cluster) {
        let uri = cluster.nats.uri();
        let names: Vec<String> = cluster
            .workers()
            .iter()
            .map(|worker| worker.name.clone())
            .collect();
        let workers: Vec<Worker> = names.iter().map(|name| cluster.take(name)).collect();
        for worker in &workers {
            worker.process.signal(Signal::Terminate);
        }
        self.leaving(workers).await;
        for mut server in cluster.api_servers.drain(..) {
            server.process.signal(Signal::Terminate);
            let ended = caught(async {
                let status = server.process.end(LEAVES_WITHIN).await;
                assert!(status.success(), "{status}");
            });
            if let Err(reason) = ended.await {
                self.wrong
                    .push(format!("{}: {reason}", server.process.name()));
            }
        }
        for process in processes_with(&uri) {
            self.leaked
                .push(format!("process {process} of {uri} is still there"));
        }
    }

    /// Prints them and counts them.
    pub fn report(&self, of: &str, tally: &mut Tally) {
        for sentence in self.wrong.iter().chain(&self.leaked) {
            println!("{of}: {sentence}");
        }
        tally.wrong += self.wrong.len();
        tally.leaked += self.leaked.len();
    }
}
