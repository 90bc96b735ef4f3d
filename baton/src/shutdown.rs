//! The signals that ask a process to end.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A process that has nothing left to do is gone within this time, or something keeps it.
pub const END_WAIT: Duration = Duration::from_secs(10);

/// SIGINT and SIGTERM, caught from the moment of creation.
pub struct Shutdown {
    interrupt: Signal,
    terminate: Signal,
}

impl Shutdown {
    /// Catches the signals from now on; needs a running Tokio runtime.
    ///
    /// # Errors
    /// If the operating system refuses the handlers.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for the next signal and names it.
    pub async fn requested(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_api_server::Limits;
    use baton_protocol::subjects::Cluster;
    use baton_protocol::{Role, WorkerId};
    use baton_worker::WorkerConfig;

    use super::END_WAIT;

    /// Saying good-bye, at both.
    const FAREWELL: u64 = 2;

    /// The seconds after this word, wherever it stands.
    fn seconds(text: &str, word: &str) -> Vec<u64> {
        let number = |line: &str| line.trim().strip_prefix(word)?.trim().parse().ok();
        let bare = |line: &str| number(line.trim_end_matches('s'));
        text.lines().filter_map(bare).collect()
    }

    #[test]
    fn the_files_of_the_container_directory_give_time_to_leave() {
        let (id, cluster) = (WorkerId::new("w"), Cluster::new("c"));
        let worker = WorkerConfig::new(id.unwrap(), Role::Both, "/m", cluster.unwrap());
        let after = FAREWELL + END_WAIT.as_secs();
        let worker = worker.drain_ms / 1000 + after;
        let api_server = Limits::default().drain.as_secs() + after;
        // In Compose workers stand first; in Kubernetes the API server, which waits 5 s before.
        let compose = include_str!("../../container/compose.yaml");
        let compose = seconds(compose, "stop_grace_period:");
        let kubernetes = include_str!("../../container/k8s.yaml");
        let kubernetes = seconds(kubernetes, "terminationGracePeriodSeconds:");
        for (given, wanted) in [
            (compose, vec![worker, api_server]),
            (kubernetes, vec![5 + api_server, worker, worker]),
        ] {
            assert_eq!(given.len(), wanted.len(), "{given:?}");
            let is_enough = given
                .iter()
                .zip(&wanted)
                .all(|(given, wanted)| given >= wanted);
            assert!(is_enough, "{given:?} s where {wanted:?} are wanted");
        }
    }
}
