//! Rate of pulls between two processes by length of a read, beside the start-up probe's and memcpy's.
//!
//! `cargo bench -p baton-transfer`. `BATON_UCX_LIB_DIR` chooses another UCX.

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use baton_transfer::{Agent, Arena, PeerKey, Read};
use support::{Server, TRANSPORTS, matches};

const ARENA_BYTES: u64 = 256 << 20;
/// Read in one pull: some 500 tokens of an 8-billion-parameter model.
const PULL_BYTES: u64 = 64 << 20;
const ROUNDS: usize = 12;
const SEED: u64 = 11;
const DEADLINE: Duration = Duration::from_secs(60);

fn main() {
    if support::serve() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    for tls in TRANSPORTS {
        runtime.block_on(measure(tls));
    }
}

async fn measure(tls: Option<&str>) {
    let server = Server::start(ARENA_BYTES as usize, SEED, tls);
    let (agent, arena) = support::start(support::config(ARENA_BYTES as usize, tls));
    let peer = PeerKey(1);
    println!(
        "\n{} (UCX_TLS {})",
        agent.summary(),
        tls.unwrap_or("not set")
    );
    let first = agent
        .connect(peer, server.descriptor.clone(), DEADLINE)
        .await
        .expect("connects");
    let again = agent
        .connect(peer, server.descriptor.clone(), DEADLINE)
        .await
        .expect("connects");
    println!(
        "reads travel by {}; probe {:.2} GB/s at first, {:.2} GB/s on a second connection",
        first.transport, first.gigabytes_per_second, again.gigabytes_per_second
    );
    let lone = [Read {
        source: 0,
        destination: 0,
        remote_offset: 0,
        local_offset: 0,
        bytes: 4096,
    }];
    let mut micros: Vec<f32> = Vec::new();
    for _ in 0..2000 {
        micros.push(pull(&agent, peer, &lone).await * 1e6);
    }
    micros.sort_by(f32::total_cmp);
    println!(
        "one 4 KiB pull, call to return: p50 {:.0} µs, p99 {:.0} µs",
        micros[1000], micros[1980]
    );

    println!(
        "| read | reads a pull | pull GB/s median | best | memcpy GB/s median | pull / memcpy |"
    );
    println!("|---|---|---|---|---|---|");
    for length in [16 << 10, 64 << 10, 128 << 10, 1 << 20, 4 << 20, 16 << 20] {
        let reads = scattered(length);
        pull(&agent, peer, &reads).await;
        // Interleaved, because machines drift.
        let (mut pulls, mut copies) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            pulls.push(PULL_BYTES as f32 / pull(&agent, peer, &reads).await / 1e9);
            copies.push(PULL_BYTES as f32 / copy(&arena, &reads) / 1e9);
        }
        pull(&agent, peer, &reads).await;
        assert!(reads.iter().all(|read| matches(
            &arena,
            read.local_offset,
            SEED,
            read.remote_offset,
            read.bytes
        )));
        let ((median, best), (copied, _)) = (summary(pulls), summary(copies));
        println!(
            "| {} KiB | {} | {median:.2} | {best:.2} | {copied:.2} | {:.2} |",
            length >> 10,
            reads.len(),
            median / copied
        );
    }
    agent.shutdown();
}

/// Seconds of one pull.
async fn pull(agent: &Agent, peer: PeerKey, reads: &[Read]) -> f32 {
    let ((), stats) = agent
        .pull(peer, reads.to_vec(), (), DEADLINE)
        .await
        .expect("pulls");
    stats.seconds
}

/// Blocks in no order, into the lower half of our arena in order.
fn scattered(length: u64) -> Vec<Read> {
    let blocks = ARENA_BYTES / length;
    (0..PULL_BYTES / length)
        .map(|i| Read {
            source: 0,
            destination: 0,
            // 197 is prime to every power of two, so no block is read twice.
            remote_offset: (i * 197 + 13) % blocks * length,
            local_offset: i * length,
            bytes: length,
        })
        .collect()
}

/// Seconds of the same copies within our own arena, from its upper half.
fn copy(arena: &Arena, reads: &[Read]) -> f32 {
    let started = Instant::now();
    for read in reads {
        let from = ARENA_BYTES / 2 + read.remote_offset % (ARENA_BYTES / 2);
        // SAFETY: both are within the arena and in different halves; no pull is under way.
        unsafe {
            let from = support::base(arena).add(from as usize);
            support::base(arena)
                .add(read.local_offset as usize)
                .copy_from_nonoverlapping(from, read.bytes as usize);
        }
    }
    started.elapsed().as_secs_f32()
}

fn summary(mut rates: Vec<f32>) -> (f32, f32) {
    rates.sort_by(f32::total_cmp);
    (rates[rates.len() / 2], rates[rates.len() - 1])
}
