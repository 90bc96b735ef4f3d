//! A cluster hurt in every way that a seed can say.
//!
//! Simulated beside bus and time are the memory and the moving of KV (`kv`, `links`), the device (the engine's fake executor), processes
//! (`process`) and clients (`client`). `plan` and `load` draw what a seed stands for, `world` runs it and looks whether anything is wrong, `judge`
//! says what a request may come to, `classes` who is promised what, `witness` reads along on the bus, `tally` counts what was done, `defects` hears what a process would get over.

mod classes;
mod client;
mod defects;
mod judge;
mod kv;
mod links;
mod load;
mod plan;
mod process;
mod tally;
mod witness;
mod world;

pub use plan::Scenario;
pub use tally::Counts;
pub use world::{Report, run};
