//! Attacks on a running cluster: hostile clients, hostile senders on the bus, machines without room.
//!
//! [`suite`] runs the attacks of [`attacks`] one after the other on one cluster of real processes while good clients
//! ([`others`]) ask all the time, and looks after each at what every attack must leave: nothing held, nobody dead, memory
//! back, logs short, and each good client answered, rightly and in time. What an attack itself must see is said beside it:
//! large bodies ([`bodies`]), clients that leave ([`leaving`]), large answers ([`answers`]), full workers ([`full`]), messages
//! of others' making ([`jobs`], [`flood`], [`descriptors`]), logs that cannot be written ([`logs`]), memory that is not there
//! ([`memory`]), text ([`text`]) and signals ([`ending`]). [`soak()`] lets the milder of them go on for long.
//!
//! Slow links are not here: they need hosts of their own (`tests/e2e`).

mod answers;
mod attacks;
mod bodies;
mod descriptors;
mod ending;
mod flood;
mod forged;
mod full;
mod jobs;
mod leaving;
mod logs;
mod memory;
mod others;
mod scene;
mod soak;
mod suite;
mod target;
mod text;

pub use attacks::{ATTACKS, Attack};
pub use soak::soak;
pub use suite::{Summary, run};
