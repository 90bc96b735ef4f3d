//! The agent against real UCX and real processes, over shared memory and over sockets.

mod support;

use std::time::Duration;

use baton_transfer::{Agent, AgentConfig, PeerKey, Read};
use support::{ROADS, SERVER_TEST, Server, matches};

const MIB: u64 = 1 << 20;
/// Long enough for a machine under load; nothing waits for it unless something is wrong.
const LONG: Duration = Duration::from_secs(20);

#[test]
fn serve_an_arena() {
    assert_eq!(SERVER_TEST, "serve_an_arena");
    support::serve();
}

/// An agent of this process, and a runtime to await it on.
fn agent(
    arena_bytes: u64,
    tls: Option<&str>,
) -> (tokio::runtime::Runtime, Agent, baton_transfer::Arena) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let config = AgentConfig {
        arena_bytes: arena_bytes as usize,
        tls: tls.map(str::to_owned),
    };
    let (agent, arena) = Agent::start(config).expect("UCX works here: install libucx0");
    (runtime, agent, arena)
}

#[test]
fn scattered_blocks_arrive_whole() {
    for tls in ROADS {
        let server = Server::start(64 << 20, 7, tls);
        let (runtime, agent, arena) = agent(64 * MIB, tls);
        runtime.block_on(async {
            let peer = PeerKey(1);
            let report = agent
                .connect(peer, server.descriptor.clone(), LONG)
                .await
                .expect("connects");
            println!("{tls:?}: {} | {report:?}", agent.summary());
            assert!(report.gigabytes_per_second > 0.0);
            let reads: Vec<Read> = (0..512)
                .map(|i| Read {
                    rank: 0,
                    remote_offset: (i * 197 + 13) % 512 * (128 << 10),
                    local_offset: i * (128 << 10),
                    bytes: 128 << 10,
                })
                .collect();
            let (guard, stats) = agent
                .pull(peer, reads.clone(), "guard", LONG)
                .await
                .expect("pulls");
            assert_eq!((guard, stats.bytes), ("guard", 64 * MIB));
            println!(
                "{stats:?} {:.2} GB/s",
                stats.bytes as f32 / stats.seconds / 1e9
            );
            for read in reads {
                assert!(
                    matches(&arena, read.local_offset, 7, read.remote_offset, read.bytes),
                    "{read:?}"
                );
            }
        });
        agent.shutdown();
        drop(arena);
    }
}
