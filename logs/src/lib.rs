//! Log lines to standard error that never hold the process up and never end it.
//!
//! Standard error may be a full disk, a pipe that nobody reads, or one whose reader is gone. A line that cannot be written is
//! dropped and counted ([`dropped`]); whoever logged it goes on at once. A thread of its own writes, because nothing else keeps
//! a write to a full pipe from blocking: `O_NONBLOCK` would hold for every process that shares the pipe or the terminal, and
//! `poll` says nothing once another process writes to it too. (`tracing-appender` has such a thread, but it reports
//! trouble at its end with `eprintln!`, which panics or blocks in just these cases.)
//!
//! Lines keep their order. What still waits is written at the end of [`Session`] and by [`flush`], within a deadline.
//! No place in the code can fill the log: of its lines at `INFO` and above so many a second are written ([`rate`]).
#![forbid(unsafe_code)]

mod http;
mod panics;
mod queue;
mod rate;
mod writer;

use std::io::{self, IsTerminal};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::queue::Queue;
use crate::rate::Rates;
use crate::writer::Lines;

static QUEUE: Queue = Queue::new();

/// What still waits at a process's end has this long to be written: a pipe that nobody reads never takes it.
const FLUSH_WAIT: Duration = Duration::from_secs(1);

/// Writes what still waits when it is dropped, within a second. Hold it in `main`.
#[derive(Debug)]
#[must_use]
pub struct Session(());

impl Drop for Session {
    fn drop(&mut self) {
        flush(FLUSH_WAIT);
    }
}

/// Starts logging for this process, panics included. `RUST_LOG` chooses what is logged, `default` where it says nothing.
/// Lines are JSON objects if `json`, else for people.
pub fn start(json: bool, default: &str) -> Session {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Lines::new(json, Rates::default()))
        .with_ansi(io::stderr().is_terminal())
        // The library would tell of its own trouble with a macro that panics where standard error cannot be written to.
        .log_internal_errors(false);
    let lines = match json {
        true => lines.json().boxed(),
        false => lines.with_target(false).boxed(),
    };
    // A second start (tests do that) keeps the first logger: nothing to do about it.
    let _ = tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(http::layer())
        .try_init();
    panics::log_them();
    Session(())
}

/// Puts a line, without its line break, behind those that wait, as it is. Never waits.
pub fn line(text: &str) {
    QUEUE.push(format!("{text}\n").into_bytes());
}

/// Waits until all lines so far are written, or dropped because they cannot be, and no longer than `wait`.
pub fn flush(wait: Duration) {
    QUEUE.flush(wait);
}

/// Lines that were not written since the process started, by reason.
pub fn dropped() -> [(&'static str, u64); 3] {
    let (full, failed) = QUEUE.dropped();
    [
        ("queue_full", full),
        ("write_failed", failed),
        ("rate", rate::left_out()),
    ]
}

/// HTTP requests that were no HTTP: answered with 400 by the HTTP library, which tells of them only as log events.
pub fn malformed_http_requests() -> u64 {
    http::malformed()
}
