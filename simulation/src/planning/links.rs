//! Links with a rate: each worker has one, and what is read from it and what it reads take turns in each direction.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_transfer::{PeerKey, PeerReport, PullStats, Read};
use baton_worker::{KvFuture, KvNetwork};
use tokio::time::{Instant, sleep_until};

/// All links of a deployment.
pub struct Links {
    bytes_per_second: f64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Until when what a worker sends, and what it receives, keeps its link busy.
    busy: BTreeMap<(u64, Direction), Instant>,
    /// Who reads from whom.
    connections: BTreeSet<(u64, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Direction {
    Sends,
    Receives,
}

/// One worker's link.
pub struct Link {
    pub links: Arc<Links>,
    /// Its life.
    pub own: u64,
}

impl Links {
    /// Links of this rate in each direction.
    pub fn new(bytes_per_second: f64) -> Arc<Self> {
        let state = Mutex::default();
        Arc::new(Self {
            bytes_per_second,
            state,
        })
    }

    /// How many workers are connected to others, to read from them.
    pub fn connections(&self) -> usize {
        self.lock().connections.len()
    }

    /// Takes the link of both for so many bytes, when both are free. When the last byte is there.
    fn take(&self, from: u64, to: u64, bytes: u64) -> Instant {
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        let mut state = self.lock();
        let ends = [(from, Direction::Sends), (to, Direction::Receives)];
        let free = ends.iter().filter_map(|end| state.busy.get(end)).max();
        let now = Instant::now();
        let done = free.map_or(now, |free| now.max(*free)) + takes;
        for end in ends {
            state.busy.insert(end, done);
        }
        done
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KvNetwork for Link {
    fn pull(
        &self,
        peer: PeerKey,
        reads: Vec<Read>,
        destination: Box<dyn Any + Send>,
        _: Duration,
    ) -> KvFuture<PullStats> {
        let begun = Instant::now();
        let bytes = reads.iter().map(|read| read.bytes).sum();
        let done = self.links.take(peer.0, self.own, bytes);
        Box::pin(async move {
            sleep_until(done).await;
            drop(destination);
            let seconds = begun.elapsed().as_secs_f32();
            Ok(PullStats { bytes, seconds })
        })
    }

    fn connect(&self, peer: PeerKey, _: Duration) -> KvFuture<PeerReport> {
        self.links.lock().connections.insert((self.own, peer.0));
        let report = PeerReport {
            transport: "planned".to_owned(),
            gigabytes_per_second: (self.links.bytes_per_second / 1e9).min(1e6) as f32,
        };
        Box::pin(async move { Ok(report) })
    }

    fn disconnect(&self, peer: PeerKey) {
        self.links.lock().connections.remove(&(self.own, peer.0));
    }

    fn is_connected(&self, peer: PeerKey) -> bool {
        self.links.lock().connections.contains(&(self.own, peer.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_goes_over_one_link_takes_turns() {
        let links = Links::new(1e9);
        let begun = Instant::now();
        let done = |from, to| (links.take(from, to, 10_000_000) - begun).as_millis();
        // 1 and 2 read from 0, which sends one after the other.
        assert_eq!(done(0, 1), 10);
        assert_eq!(done(0, 2), 20);
        // Another sends to 1, which receives since 10 ms ago.
        assert_eq!(done(3, 1), 20);
        // What it receives is not in the way of what it sends.
        assert_eq!(done(1, 4), 10);
    }
}
