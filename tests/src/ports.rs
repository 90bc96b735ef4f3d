//! Ports for who must be told one before it listens.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// Below those that Linux chooses from (`net.ipv4.ip_local_port_range`, from 32768 on): a connection that is made meanwhile, or another
/// test's server, gets none of these by chance.
const PORTS: Range<u16> = 20_000..32_000;

/// A port of this machine that nobody listens on, and that this process has not been given before. Where a server can choose its port
/// itself, let it.
///
/// # Panics
/// If all are taken.
pub fn free_port() -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    // Test programs that run at the same time begin far from each other.
    let begin = std::process::id().wrapping_mul(127);
    let count = u32::from(PORTS.end - PORTS.start);
    (0..count)
        .map(|_| begin.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % count)
        .map(|offset| PORTS.start + u16::try_from(offset).expect("less than all ports"))
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("a free port")
}
