//! Whole clusters in one thread and in virtual time.
//!
//! What runs is the real thing: the API server's driver, lifecycle, router and membership, the workers' desk, leases,
//! pulls, peers, publisher and engine. Simulated are the bus (`network`, `weather`) and time itself, which is tokio's paused clock.
//!
//! - `faults`: a cluster hurt in every way that a seed can say, and looked at for whether anything is wrong.
//! - [`planning`]: a healthy cluster whose devices take as long as was measured, to say what service level a load would get.
//! - [`scale`]: a thousand workers and a day, over membership and router alone, to say whether choices are stable and cheap.
//! - [`two_pools`]: a small model of the protocol between the pools that is explored to its end.
//! - [`prefix_lease`]: another, of leases without a prompt.
//!
//! A run is a function of its seed: the same seed gives the same events at the same times, in every process. What the operating
//! system draws all the same, nonces and the seeds of hash maps, changes no event. So nothing here may wait where tokio draws
//! who is woken: no `select!` without `biased`, no `watch` channel that several wait for.
#![forbid(unsafe_code)]

mod dice;
mod faults;
mod network;
pub mod planning;
pub mod prefix_lease;
pub mod scale;
mod trace;
pub mod two_pools;
mod weather;

pub use faults::{Counts, Report, Scenario, run};
