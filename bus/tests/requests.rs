//! Requests that nobody answers.

use std::task::Poll;
use std::time::Duration;

use baton_bus::{RequestError, Wire};
use baton_tests::{Nats, PATIENCE};
use bytes::Bytes;
use futures::StreamExt;
use tempfile::TempDir;
use tokio::time::timeout;

const REQUESTS: usize = 20_000;

/// Each takes some 400 bytes for as long as it is remembered.
const BYTES_MAX: usize = REQUESTS * 100;

#[tokio::test]
async fn a_request_that_was_given_up_leaves_nothing_behind() {
    let directory = TempDir::new().unwrap();
    let nats = Nats::start(directory.path(), "").await;
    let deaf = async_nats::connect(nats.uri()).await.unwrap();
    let mut heard = deaf.subscribe("deaf").await.unwrap();
    deaf.flush().await.unwrap();
    let wire: Wire = async_nats::connect(nats.uri()).await.unwrap().into();
    let mut before = 0;
    for number in 0..REQUESTS {
        // What the first ones take is kept and used again.
        if number == REQUESTS / 10 {
            before = resident();
        }
        // Half of them wait no longer, those who asked the others have left.
        let allowed = [PATIENCE, Duration::ZERO][number % 2];
        let mut request = Box::pin(wire.request_within("deaf", Bytes::new(), allowed));
        match futures::poll!(&mut request) {
            Poll::Pending if allowed == PATIENCE => drop(request),
            Poll::Pending => assert_eq!(request.await.err(), Some(RequestError::TimedOut)),
            Poll::Ready(answer) => assert_eq!(answer.err(), Some(RequestError::TimedOut)),
        }
        let message = timeout(PATIENCE, heard.next()).await;
        assert!(message.unwrap().is_some());
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < BYTES_MAX, "{grown} bytes for {REQUESTS} requests");
}

/// Bytes that this process has in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
    kibibytes.parse::<usize>().unwrap() << 10
}
