//! The agent against real UCX and real processes, over shared memory and over sockets.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_protocol::{
    BlockRun, KvGeometry, KvGroup, KvShares, MemoryType, TransferDescriptor, UcxVersion,
};
use baton_transfer::fuzzing;
use baton_transfer::{
    Agent, AgentConfig, Arena, ArenaSource, GpuMemory, PeerKey, Read, TransferError, plan_reads,
};
use support::{SERVER_TEST, STAGED, Server, TRANSPORTS, config, fill, matches, range, until};

const MIB: u64 = 1 << 20;
/// Long enough for a machine under load; nothing waits for it unless something is wrong.
const LONG: Duration = Duration::from_secs(20);
const PEER: PeerKey = PeerKey(1);

/// Not a test: what this program does when it is a [`Server`].
#[test]
fn serve_an_arena() {
    assert_eq!(SERVER_TEST, "serve_an_arena");
    support::serve();
}

fn agent(arena_bytes: u64, tls: Option<&str>) -> (Agent, Arena) {
    support::start(config(arena_bytes as usize, tls))
}

/// The arena of a config of [`STAGED`].
fn gpu_of(config: &mut AgentConfig) -> &mut GpuMemory {
    match &mut config.arenas[..] {
        [ArenaSource::Gpu(gpu)] => gpu,
        other => panic!("{other:?} is not staged"),
    }
}

/// Runs a test over each transport.
fn over_each_transport(test: impl AsyncFn(Option<&'static str>)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    for tls in TRANSPORTS {
        println!("UCX_TLS {tls:?}");
        runtime.block_on(test(tls));
    }
}

/// More than can be read while a test runs: seventeen terabytes.
fn endless() -> Vec<Read> {
    range(0, 64 * MIB).repeat(1 << 18)
}

async fn pulls_rightly(agent: &Agent, arena: &Arena, peer: PeerKey, seed: u64) {
    let bytes = 4 * MIB;
    agent
        .pull(peer, range(0, bytes), (), LONG)
        .await
        .expect("the agent is usable");
    assert!(matches(arena, 0, seed, 0, bytes), "the pull was right");
}

#[test]
fn scattered_blocks_arrive_whole() {
    over_each_transport(async |tls| {
        let server = Server::start(64 << 20, 7, tls);
        let (agent, arena) = agent(64 * MIB, tls);
        let report = agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects");
        println!("{}; {report:?}", agent.summary());
        assert!(report.gigabytes_per_second > 0.0);
        assert!(agent.summary().starts_with("ucx 1."), "{}", agent.summary());
        // Only 1.13 reads shared memory in place; later releases are kept from it.
        let UcxVersion(major, minor, _) = server.descriptor.ucx;
        let expected = match tls {
            None if (major, minor) < (1, 14) => ["sysv", "posix"].as_slice(),
            Some(STAGED) => &["tcp staged"],
            _ => &["tcp emulated"],
        };
        assert!(
            expected.iter().any(|name| report.transport.contains(name)),
            "{report:?}"
        );

        let reads: Vec<Read> = (0..512)
            .map(|i| Read {
                source: 0,
                destination: 0,
                remote_offset: (i * 197 + 13) % 512 * (128 << 10),
                local_offset: i * (128 << 10),
                bytes: 128 << 10,
            })
            .collect();
        let (guard, stats) = agent
            .pull(PEER, reads.clone(), "guard", LONG)
            .await
            .expect("pulls");
        assert_eq!((guard, stats.bytes), ("guard", 64 * MIB));
        for read in reads {
            assert!(
                matches(&arena, read.local_offset, 7, read.remote_offset, read.bytes),
                "{read:?}"
            );
        }
        agent.shutdown();
        assert!(!agent.health().running);
        assert!(
            matches(&arena, 0, 7, 13 * (128 << 10), 8),
            "the arena outlives the agent"
        );
    });
}

#[test]
fn a_killed_peer_fails_the_pull_and_nothing_else() {
    over_each_transport(async |tls| {
        let mut server = Server::start(64 << 20, 1, tls);
        let other = Server::start(64 << 20, 2, tls);
        let (agent, arena) = agent(64 * MIB, tls);
        agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects");
        agent
            .connect(PeerKey(2), other.descriptor.clone(), LONG)
            .await
            .expect("connects");

        let guard = Arc::new(());
        let pull = tokio::spawn({
            let (agent, guard) = (agent.clone(), guard.clone());
            async move { agent.pull(PEER, endless(), guard, LONG).await.map(|_| ()) }
        });
        wait_for(&agent, "the pull", |agent| agent.health().in_flight == 1).await;
        server.kill();
        let error = pull.await.expect("no panic").expect_err("the peer is dead");
        println!("{error}");
        assert!(
            matches!(
                error,
                TransferError::PeerFailed { .. } | TransferError::Deadline { .. }
            ),
            "{error}"
        );
        // Released, or counted for as long as UCX might still write.
        until(&agent, "the guard's end", |health| {
            Arc::strong_count(&guard) == 1 + health.quarantined
        });
        println!("{:?}", agent.health());

        let error = agent
            .pull(PEER, range(0, 8), (), LONG)
            .await
            .map(|_| ())
            .expect_err("it is closed");
        assert_eq!(error, TransferError::NotConnected(PEER));
        pulls_rightly(&agent, &arena, PeerKey(2), 2).await;
        // The same worker comes back: another life, another address; the key may be an old one.
        let server = Server::start(64 << 20, 3, tls);
        agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects again");
        pulls_rightly(&agent, &arena, PEER, 3).await;
        agent.shutdown();
    });
}

/// Notes how many requests UCX holds when it is dropped, which happens on the agent's thread.
struct Watch {
    agent: Agent,
    requests: Arc<Mutex<Vec<usize>>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let requests = self.agent.health().requests;
        self.requests.lock().expect("no panic").push(requests);
    }
}

#[test]
fn a_pull_from_a_stopped_peer_ends_at_its_deadline() {
    over_each_transport(async |tls| {
        let server = Server::start(64 << 20, 1, tls);
        let (agent, arena) = agent(64 * MIB, tls);
        agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects");
        server.stop();
        let guard = Arc::new(());
        let watched = Arc::new(Mutex::new(Vec::new()));
        let watch = Watch {
            agent: agent.clone(),
            requests: watched.clone(),
        };
        let deadline = Duration::from_millis(500);
        // Over shared memory a stopped peer is read all the same, so the pull is one that cannot end.
        let error = agent
            .pull(PEER, endless(), (guard.clone(), watch), deadline)
            .await
            .map(|_| ())
            .expect_err("too much");
        assert!(
            matches!(error, TransferError::Deadline { after, .. } if after == deadline),
            "{error}"
        );
        until(&agent, "the guard's end", |health| {
            Arc::strong_count(&guard) == 1 + health.quarantined
        });
        // Nothing else is under way yet, so these were its own.
        for requests in watched.lock().expect("no panic").iter() {
            assert_eq!(
                *requests, 0,
                "a guard was dropped while UCX could still write"
            );
        }
        if tls.is_some() {
            let outcome = agent
                .connect(PEER, server.descriptor.clone(), deadline)
                .await;
            assert!(
                matches!(outcome, Err(TransferError::Deadline { .. })),
                "{outcome:?}"
            );
        }
        server.resume();
        agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects again");
        pulls_rightly(&agent, &arena, PEER, 1).await;
        until(&agent, "all requests' end", |health| {
            health.quarantined == 0
        });
        assert_eq!(Arc::strong_count(&guard), 1);
        agent.shutdown();
    });
}

#[test]
fn an_abandoned_pull_lets_go_of_its_guard() {
    over_each_transport(async |tls| {
        let server = Server::start(64 << 20, 1, tls);
        let (agent, arena) = agent(64 * MIB, tls);
        agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects");
        let guard = Arc::new(());
        let pull = tokio::spawn({
            let (agent, guard) = (agent.clone(), guard.clone());
            async move { agent.pull(PEER, endless(), guard, LONG).await.map(|_| ()) }
        });
        wait_for(&agent, "the pull", |agent| agent.health().in_flight == 1).await;
        pull.abort();
        let _ = pull.await;
        until(&agent, "the guard's end", |_| {
            Arc::strong_count(&guard) == 1
        });
        pulls_rightly(&agent, &arena, PEER, 1).await;
        agent.shutdown();
    });
}

#[test]
fn a_dead_reader_does_no_harm_to_its_target() {
    over_each_transport(async |tls| {
        let (target, arena) = agent(64 * MIB, tls);
        fill(&arena, 5);
        let mut reader = Server::start(64 << 20, 0, tls);
        reader.pull_from(&target.descriptor());
        reader.kill();
        let (second, second_arena) = agent(64 * MIB, tls);
        second
            .connect(PEER, target.descriptor(), LONG)
            .await
            .expect("the target still answers");
        pulls_rightly(&second, &second_arena, PEER, 5).await;
        second.shutdown();
        assert!(target.health().running);
        target.shutdown();
    });
}

#[test]
fn a_stopped_reader_does_not_hinder_others() {
    over_each_transport(async |tls| {
        let (target, arena) = agent(64 * MIB, tls);
        fill(&arena, 5);
        let mut reader = Server::start(64 << 20, 0, tls);
        reader.pull_from(&target.descriptor());
        reader.stop();
        let (second, second_arena) = agent(64 * MIB, tls);
        second
            .connect(PEER, target.descriptor(), LONG)
            .await
            .expect("the target still answers");
        for _ in 0..20 {
            pulls_rightly(&second, &second_arena, PEER, 5).await;
        }
        second.shutdown();
        target.shutdown();
    });
}

/// A worker that computes on a CPU and one that computes on a GPU, either way round.
#[test]
fn host_and_gpu_memory_meet() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    for (theirs, ours) in [("tcp,self", STAGED), (STAGED, "tcp,self")] {
        let server = Server::start(16 << 20, 4, Some(theirs));
        let (agent, arena) = agent(16 * MIB, Some(ours));
        runtime.block_on(async {
            let connected = agent.connect(PEER, server.descriptor.clone(), LONG).await;
            assert_eq!(connected.expect("connects").transport, "tcp staged");
            pulls_rightly(&agent, &arena, PEER, 4).await;
        });
        agent.shutdown();
    }
}

/// No UCX has CUDA on a machine without a GPU, so it must not be told of the memory, which it would take for its own.
#[test]
fn gpu_memory_that_ucx_does_not_know_is_staged() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let registered = || {
        let mut config = config(8 << 20, Some(STAGED));
        gpu_of(&mut config).registered = true;
        support::start(config)
    };
    let (target, arena) = registered();
    if target.summary().contains("cuda") {
        return println!("this machine has a GPU: {}", target.summary());
    }
    assert!(target.descriptor().ranks[0].rkey.0.is_empty());
    fill(&arena, 3);
    let (reader, own) = registered();
    runtime.block_on(async {
        let connected = reader.connect(PEER, target.descriptor(), LONG).await;
        assert_eq!(connected.expect("connects").transport, "tcp staged");
        pulls_rightly(&reader, &own, PEER, 3).await;
    });
    reader.shutdown();
    target.shutdown();
}

#[test]
fn a_peer_without_host_memory_says_so() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let mut poor = config(8 << 20, Some(STAGED));
    gpu_of(&mut poor).staging = Arc::new(|| Err("no memory can be pinned".to_owned()));
    let (target, _arena) = support::start(poor);
    let (reader, _arena) = agent(8 * MIB, Some(STAGED));
    let connected = runtime.block_on(reader.connect(PEER, target.descriptor(), LONG));
    let error = connected.expect_err("it cannot be read").to_string();
    assert!(error.contains("the peer stages no KV"), "{error}");
    reader.shutdown();
    target.shutdown();
}

#[test]
fn shutdown_ends_what_is_under_way() {
    over_each_transport(async |tls| {
        let server = Server::start(64 << 20, 1, tls);
        let (agent, _arena) = agent(64 * MIB, tls);
        agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects");
        let guard = Arc::new(());
        let pull = tokio::spawn({
            let (agent, guard) = (agent.clone(), guard.clone());
            async move { agent.pull(PEER, endless(), guard, LONG).await.map(|_| ()) }
        });
        wait_for(&agent, "the pull", |agent| agent.health().in_flight == 1).await;
        agent.shutdown();
        assert_eq!(pull.await.expect("no panic"), Err(TransferError::Stopped));
        assert_eq!(Arc::strong_count(&guard), 1);
        assert_eq!(
            agent.pull(PEER, range(0, 8), (), LONG).await.map(|_| ()),
            Err(TransferError::Stopped)
        );
        agent.shutdown();
    });
}

/// A peer's own address and key with arenas that cannot be, under whole seals.
fn forged(good: &TransferDescriptor) -> Vec<TransferDescriptor> {
    let arena = &good.ranks[0];
    // A seal is 4 bytes of kind, for a key its place, and a checksum of 8.
    let open = |sealed: &[u8], head: usize| sealed[head..sealed.len() - 8].to_vec();
    let address = open(&good.address.0, 4);
    let key = (!arena.rkey.0.is_empty()).then(|| open(&arena.rkey.0, 20));
    let places = [(arena.base, 0), (0, 4096), (u64::MAX - 4095, 8192)];
    let forged = places
        .map(|place| fuzzing::sealed(good.ucx, &address, key.as_deref(), place, arena.memory));
    let staged = fuzzing::sealed(good.ucx, &address, None, (arena.base, 0), MemoryType::Cuda);
    let keyless = fuzzing::sealed(
        good.ucx,
        &address,
        None,
        (arena.base, 4096),
        MemoryType::Host,
    );
    forged.into_iter().chain([staged, keyless]).collect()
}

#[test]
fn damaged_and_foreign_descriptors_are_refused() {
    over_each_transport(async |tls| {
        let server = Server::start(1 << 20, 1, tls);
        let good = &server.descriptor;
        let (agent, arena) = agent(8 * MIB, tls);
        let UcxVersion(major, minor, release) = good.ucx;
        let foreign = TransferDescriptor {
            ucx: UcxVersion(major, minor + 9, release),
            ..good.clone()
        };
        let error = agent
            .connect(PEER, foreign.clone(), LONG)
            .await
            .expect_err("another UCX");
        assert_eq!(
            error,
            TransferError::Version {
                theirs: foreign.ucx,
                ours: good.ucx
            }
        );

        let damages: [fn(&mut TransferDescriptor); 8] = [
            |d| d.address.0.clear(),
            |d| d.address.0.truncate(20),
            |d| d.address.0[9] ^= 1,
            |d| std::mem::swap(&mut d.address, &mut d.ranks[0].rkey),
            |d| d.ranks[0].rkey.0[25] ^= 128,
            |d| d.ranks[0].bytes *= 2,
            |d| d.ranks[0].base -= 4096,
            |d| d.ranks.clear(),
        ];
        for (index, damage) in damages.into_iter().enumerate() {
            if tls == Some(STAGED) && (3..7).contains(&index) {
                continue; // There is no key to be damaged.
            }
            let mut descriptor = good.clone();
            damage(&mut descriptor);
            let outcome = agent.connect(PEER, descriptor, LONG).await;
            assert!(
                matches!(outcome, Err(TransferError::Descriptor(_))),
                "damage {index}: {outcome:?}"
            );
        }
        for (index, descriptor) in forged(good).into_iter().enumerate() {
            let outcome = agent.connect(PEER, descriptor, LONG).await;
            assert!(
                matches!(outcome, Err(TransferError::Descriptor(_))),
                "forgery {index}: {outcome:?}"
            );
        }
        agent
            .connect(PEER, good.clone(), LONG)
            .await
            .expect("the true one connects");
        agent
            .pull(PEER, range(0, MIB), (), LONG)
            .await
            .expect("and serves");
        assert!(matches(&arena, 0, 1, 0, MIB));
        agent.shutdown();
    });
}

#[test]
fn reads_out_of_bounds_are_refused() {
    over_each_transport(async |tls| {
        let server = Server::start(8 << 20, 1, tls);
        let (agent, arena) = agent(4 * MIB, tls);
        let unknown = agent.pull(PEER, range(0, 8), (), LONG).await.map(|_| ());
        assert_eq!(unknown, Err(TransferError::NotConnected(PEER)));
        agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects");
        for (remote_offset, local_offset, bytes) in [
            (8 * MIB, 0, 1),
            (8 * MIB - 1, 0, 2),
            (0, 4 * MIB - 8, 16),
            (u64::MAX, 0, 8),
            (0, u64::MAX - 4, 8),
            (0, 0, 0),
        ] {
            let read = Read {
                source: 0,
                destination: 0,
                remote_offset,
                local_offset,
                bytes,
            };
            let outcome = agent.pull(PEER, vec![read], (), LONG).await.map(|_| ());
            assert!(
                matches!(outcome, Err(TransferError::Bounds { .. })),
                "{read:?}: {outcome:?}"
            );
        }
        let foreign_rank = vec![Read {
            source: 1,
            destination: 0,
            remote_offset: 0,
            local_offset: 0,
            bytes: 8,
        }];
        let outcome = agent.pull(PEER, foreign_rank, (), LONG).await.map(|_| ());
        assert!(
            matches!(outcome, Err(TransferError::Plan(_))),
            "{outcome:?}"
        );
        assert_eq!(
            agent
                .pull(PEER, vec![], 1, LONG)
                .await
                .map(|(guard, stats)| (guard, stats.bytes)),
            Ok((1, 0))
        );
        pulls_rightly(&agent, &arena, PEER, 1).await;
        agent.disconnect(PEER).await;
        assert_eq!(agent.health().peers, 0);
        agent.shutdown();
    });
}

#[test]
fn a_thousand_small_pulls() {
    over_each_transport(async |tls| {
        let server = Server::start(8 << 20, 9, tls);
        let (agent, arena) = agent(8 * MIB, tls);
        agent
            .connect(PEER, server.descriptor.clone(), LONG)
            .await
            .expect("connects");
        for i in 0..1000 {
            let offset = i * 8192 % (8 * MIB);
            agent
                .pull(PEER, range(offset, 4096), (), LONG)
                .await
                .expect("pulls");
            assert!(matches(&arena, offset, 9, offset, 4096));
        }
        agent.shutdown();
    });
}

#[test]
fn concurrent_pulls_from_two_peers() {
    over_each_transport(async |tls| {
        let servers = [
            Server::start(32 << 20, 1, tls),
            Server::start(32 << 20, 2, tls),
        ];
        let (agent, arena) = agent(64 * MIB, tls);
        for (key, server) in servers.iter().enumerate() {
            agent
                .connect(PeerKey(key as u64), server.descriptor.clone(), LONG)
                .await
                .expect("connects");
        }
        let mut pulls = tokio::task::JoinSet::new();
        for slot in 0..32 {
            let agent = agent.clone();
            pulls.spawn(async move {
                let (peer, local_offset) = (slot % 2, slot * 2 * MIB);
                let remote_offset = slot * 37 % 30 * MIB;
                let read = Read {
                    source: 0,
                    destination: 0,
                    remote_offset,
                    local_offset,
                    bytes: 2 * MIB,
                };
                agent
                    .pull(PeerKey(peer), vec![read], (peer, read), LONG)
                    .await
                    .expect("pulls")
                    .0
            });
        }
        while let Some(outcome) = pulls.join_next().await {
            let (peer, read) = outcome.expect("no panic");
            assert!(
                matches(
                    &arena,
                    read.local_offset,
                    peer + 1,
                    read.remote_offset,
                    read.bytes
                ),
                "{read:?}"
            );
        }
        agent.shutdown();
    });
}

/// Like [`until`], letting tasks of this thread run.
async fn wait_for(agent: &Agent, what: &str, condition: impl Fn(&Agent) -> bool) {
    let waited = tokio::time::timeout(LONG, async {
        while !condition(agent) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    waited
        .await
        .unwrap_or_else(|_| panic!("never came: {what}; {:?}", agent.health()));
}

/// An agent with an arena for each rank of a worker that holds `blocks` blocks, filled with a seed of the rank's own.
fn agent_of_ranks(
    kv: &KvGeometry,
    shares: &KvShares,
    blocks: u64,
    tls: Option<&str>,
) -> (Agent, Vec<Arena>) {
    let arena = |rank| ArenaSource::Host {
        bytes: (shares.block_bytes(kv, rank) * blocks) as usize,
    };
    let config = AgentConfig {
        arenas: (0..shares.ranks()).map(arena).collect(),
        tls: tls.map(str::to_owned),
    };
    Agent::start(config).expect("UCX works here")
}

#[test]
fn workers_of_unequal_sizes_read_each_others_ranks() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let group = KvGroup {
        layers: 4,
        kv_heads: 6,
        head_dim: 64,
    };
    let kv = KvGeometry::bf16(16, vec![group]);
    let runs = [(5, 2), (1, 1)].map(|(first, count)| BlockRun { first, count });
    let local = [2, 3, 7];
    for tls in [None, Some("tcp,self")] {
        for (from, to, stages) in [(2, 1, 1), (1, 2, 1), (4, 2, 1), (3, 1, 2), (8, 3, 1)] {
            let source = KvShares::parallel(&kv, from, stages);
            let destination = KvShares::parallel(&kv, to, 1);
            let (target, theirs) = agent_of_ranks(&kv, &source, 8, tls);
            for (seed, arena) in theirs.iter().enumerate() {
                fill(arena, seed as u64);
            }
            let (reader, own) = agent_of_ranks(&kv, &destination, 8, tls);
            let reads = plan_reads(&kv, &source, &destination, &runs, &local).expect("a plan");
            runtime.block_on(async {
                let connected = reader.connect(PEER, target.descriptor(), LONG).await;
                connected.expect("connects");
                let pulled = reader.pull(PEER, reads.clone(), (), LONG).await;
                let ((), stats) = pulled.expect("pulls");
                let blocks =
                    (0..destination.ranks()).map(|rank| destination.block_bytes(&kv, rank));
                assert_eq!(stats.bytes, local.len() as u64 * blocks.sum::<u64>());
            });
            for read in reads {
                let arena = &own[read.destination as usize];
                let seed = u64::from(read.source);
                let (to, from) = (read.local_offset, read.remote_offset);
                assert!(matches(arena, to, seed, from, read.bytes), "{read:?}");
            }
            reader.shutdown();
            target.shutdown();
        }
    }
}

#[test]
fn arenas_that_one_agent_cannot_have_are_refused() {
    let started = |arenas| match Agent::start(AgentConfig { arenas, tls: None }) {
        Err(TransferError::Arena { detail, .. }) => detail,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it started"),
    };
    assert!(started(Vec::new()).contains("no rank"));
    let mut staged = config(1 << 20, Some(STAGED)).arenas;
    staged.push(ArenaSource::Host { bytes: 1 << 20 });
    assert!(started(staged).contains("host memory"));
}
