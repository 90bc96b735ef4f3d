//! Baton without processes: small models of its protocols, explored to their ends.
//!
//! `two_pools`: context pool, decode pool, leases and everything that can come between.
#![forbid(unsafe_code)]

pub mod two_pools;
