//! Waiting for events.

use std::future::Future;
use std::time::{Duration, Instant};

/// How long a test waits for something that takes a moment on an idle machine: far longer than a busy one needs. A step of 256 tokens
/// took 5 s on two cores with AVX2 that compiled meanwhile.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// How often a state that sends no event is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Looks until `probe` gives a value.
///
/// # Panics
/// After `deadline`, with `what` was waited for and the reason that the last look gave.
pub async fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        let reason = match probe().await {
            Ok(value) => return value,
            Err(reason) => reason,
        };
        assert!(
            start.elapsed() < deadline,
            "waited {deadline:?} for {what}; last seen: {reason}"
        );
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The future's value.
///
/// # Panics
/// If it takes longer than `deadline`.
pub async fn within<T>(what: &str, deadline: Duration, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(deadline, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took longer than {deadline:?}"),
    }
}
