//! Workers on a real nats-server with real UCX between them, and an API server played by hand.

mod faults;
mod handover;
mod hostile;
mod leases;
mod leaving;
mod prefixes;
mod refusals;
mod requests;
mod shares;
mod streaming;
mod support;
