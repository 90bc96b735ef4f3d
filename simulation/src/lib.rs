//! A cluster in one thread and in virtual time, hurt in every way that a seed can say.
//!
//! What runs is the real thing: the API server's driver, lifecycle, router and membership, the workers' desk, leases,
//! pulls, peers, publisher and engine. Simulated are the bus (`network`, `weather`), the memory and the moving of KV
//! (`kv`), the device (the engine's fake executor), processes (`process`), clients (`client`) and time itself, which is
//! tokio's paused clock. `plan` draws what a seed stands for, `world` runs it and looks whether anything is wrong,
//! `defects` hears what a process would get over, `trace` records it.
//!
//! Beside it stands `two_pools`, a small model of the protocol between the pools that is explored to its end.
//!
//! A run is a function of its seed: the same seed gives the same events at the same times, in every process. What the operating
//! system draws all the same, nonces and the seeds of hash maps, changes no event. So nothing here may wait where tokio draws
//! who is woken: no `select!` without `biased`, no `watch` channel that several wait for.
#![forbid(unsafe_code)]

mod client;
mod defects;
mod dice;
mod judge;
mod kv;
mod links;
mod load;
mod network;
mod plan;
mod process;
mod trace;
pub mod two_pools;
mod weather;
mod witness;
mod world;

pub use plan::Scenario;
pub use world::{Report, run};
