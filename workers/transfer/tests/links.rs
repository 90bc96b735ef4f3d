//! Links that are slow, links that are broken, and what several pulls over one link have to do with each other: nothing but
//! turns. Real UCX, real processes.

mod support;

use std::sync::Arc;
use std::time::Duration;

use baton_transfer::{Agent, Arena, PeerKey, Read, TransferError};
use support::{SERVER_TEST, STAGED, Server, TRANSPORTS, config, matches, range, until};
use tokio::task::JoinSet;
use tokio::time::sleep;

const MIB: u64 = 1 << 20;
/// Long enough for a machine under load; nothing waits for it unless something is wrong.
const LONG: Duration = Duration::from_secs(30);
const PEER: PeerKey = PeerKey(1);
/// Where the peer has to answer, so that a peer that stands still keeps everybody waiting.
const ANSWERED: [Option<&str>; 2] = [Some("tcp,self"), Some(STAGED)];

/// Not a test: what this program does when it is a [`Server`].
#[test]
fn serve_an_arena() {
    assert_eq!(SERVER_TEST, "serve_an_arena");
    support::serve();
}

/// Runs a test over each of these transports, connected to a server of 64 MiB filled with 1. Connections stall after `stall`.
fn over(
    transports: &[Option<&'static str>],
    stall: Duration,
    test: impl AsyncFn(Server, Agent, Arena, Option<&'static str>),
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    for &tls in transports {
        println!("UCX_TLS {tls:?}");
        let server = Server::start(64 << 20, 1, tls);
        let config = config(64 << 20, tls);
        let (agent, arena) = support::one(Agent::start_impatient(config, stall));
        runtime.block_on(async {
            let connected = agent.connect(PEER, server.descriptor.clone(), LONG).await;
            connected.expect("connects");
            test(server, agent.clone(), arena, tls).await;
        });
        agent.shutdown();
    }
}

/// More than can be read while a test runs: seventeen terabytes, into the upper half.
fn endless() -> Vec<Read> {
    range(32 * MIB, 32 * MIB).repeat(1 << 19)
}

/// Pulls as a task of its own.
fn pull(
    agent: &Agent,
    reads: Vec<Read>,
    guard: Arc<()>,
    deadline: Duration,
) -> tokio::task::JoinHandle<Result<u64, TransferError>> {
    let agent = agent.clone();
    tokio::spawn(async move {
        let (_, stats) = agent.pull(PEER, reads, guard, deadline).await?;
        Ok(stats.bytes)
    })
}

/// Lets other tasks run until the agent has this many transfers under way.
async fn under_way(agent: &Agent, transfers: usize) {
    let waited = tokio::time::timeout(LONG, async {
        while agent.health().in_flight != transfers {
            sleep(Duration::from_millis(1)).await;
        }
    });
    waited.await.expect("it begins");
}

/// The peer stands still most of the time, in all for longer than a connection may stall.
#[test]
fn a_slow_peer_is_read_for_as_long_as_it_delivers() {
    const STALL: Duration = Duration::from_secs(4);
    const STILL: Duration = Duration::from_millis(700);
    over(&ANSWERED, STALL, async |server, agent, arena, _| {
        let long = pull(&agent, endless(), Arc::new(()), 100 * LONG);
        under_way(&agent, 1).await;
        for _ in 0..8 {
            server.stop();
            sleep(STILL).await;
            assert!(!long.is_finished(), "it was given up");
            server.resume();
            // It goes on, in turn with another.
            let pulled = agent.pull(PEER, range(0, MIB), (), LONG).await;
            pulled.expect("the link is well");
        }
        assert!(!long.is_finished(), "it was given up");
        assert!(matches(&arena, 0, 1, 0, MIB));
        assert!(agent.pulled_rate(PEER).expect("it pulled") > 0.0);
        let bytes = agent.pulled_bytes(PEER);
        assert!(bytes >= 8 * MIB, "{bytes} bytes, and one still brings more");
        long.abort();
    });
}

#[test]
fn a_peer_that_delivers_nothing_is_given_up_long_before_the_deadline() {
    const STALL: Duration = Duration::from_secs(2);
    over(&ANSWERED, STALL, async |server, agent, arena, _| {
        let guard = Arc::new(());
        server.stop();
        let pulls: Vec<_> = (0..3)
            .map(|_| pull(&agent, range(0, MIB), guard.clone(), 100 * LONG))
            .collect();
        for pull in pulls {
            let outcome = tokio::time::timeout(LONG, pull).await.expect("given up");
            let error = outcome.expect("no panic").expect_err("it stands still");
            assert!(
                matches!(error, TransferError::Stalled { after, .. } if after == STALL),
                "{error}"
            );
        }
        let again = agent.pull(PEER, range(0, MIB), (), LONG).await.map(drop);
        assert_eq!(again, Err(TransferError::NotConnected(PEER)));
        assert_eq!(agent.pulled_bytes(PEER), 0);
        server.resume();
        let connected = agent.connect(PEER, server.descriptor.clone(), LONG).await;
        connected.expect("connects again");
        assert_eq!(agent.pulled_bytes(PEER), 0, "the probe is no pull");
        let pulled = agent.pull(PEER, range(0, MIB), (), LONG).await;
        pulled.expect("and pulls");
        assert_eq!(agent.pulled_bytes(PEER), MIB);
        assert!(matches(&arena, 0, 1, 0, MIB));
        until(&agent, "the guards' end", |_| {
            Arc::strong_count(&guard) == 1
        });
    });
}

#[test]
fn a_pull_that_is_given_up_leaves_the_others_and_the_link() {
    const SOON: Duration = Duration::from_millis(300);
    over(&TRANSPORTS, LONG, async |_server, agent, arena, _| {
        let guard = Arc::new(());
        let aborted = pull(&agent, endless(), guard.clone(), 100 * LONG);
        under_way(&agent, 1).await;
        let late = pull(&agent, endless(), guard.clone(), SOON);
        let other = pull(&agent, range(0, 32 * MIB), Arc::new(()), LONG);
        aborted.abort();
        let error = late.await.expect("no panic").expect_err("it is endless");
        assert!(
            matches!(error, TransferError::Deadline { after, .. } if after == SOON),
            "{error}"
        );
        assert_eq!(other.await.expect("no panic"), Ok(32 * MIB));
        assert!(matches(&arena, 0, 1, 0, 32 * MIB));
        // The guards go right after the last read has ended, on the agent's thread.
        until(&agent, "what was given up to end", |health| {
            let idle = health.quarantined == 0 && health.in_flight == 0;
            idle && Arc::strong_count(&guard) == 1
        });
        // The same connection.
        assert_eq!(agent.health().peers, 1);
        for _ in 0..20 {
            let pulled = agent.pull(PEER, range(0, 4 * MIB), (), LONG).await;
            pulled.expect("the link is well");
        }
    });
}

#[test]
fn pulls_of_one_link_take_turns() {
    over(&TRANSPORTS, LONG, async |_server, agent, arena, _| {
        // One that never ends keeps nobody from ending.
        let forever = pull(&agent, endless(), Arc::new(()), 100 * LONG);
        under_way(&agent, 1).await;
        let mut pulls = JoinSet::new();
        for slot in 0..8 {
            let agent = agent.clone();
            pulls.spawn(async move {
                let reads = range(slot * 4 * MIB, 4 * MIB);
                let pulled = agent.pull(PEER, reads, slot, LONG).await;
                pulled.expect("it has its turns").0
            });
        }
        while let Some(slot) = pulls.join_next().await {
            let at = slot.expect("no panic") * 4 * MIB;
            assert!(matches(&arena, at, 1, at, 4 * MIB));
        }
        forever.abort();

        // And who comes later, again and again, keeps nobody who came before.
        let long = pull(&agent, range(0, 32 * MIB), Arc::new(()), LONG);
        under_way(&agent, 1).await;
        while !long.is_finished() {
            while pulls.len() < 4 {
                let (agent, reads) = (agent.clone(), range(32 * MIB, MIB));
                pulls.spawn(async move {
                    let pulled = agent.pull(PEER, reads, 0, LONG).await;
                    pulled.expect("it has its turns").0
                });
            }
            pulls.join_next().await.expect("several").expect("no panic");
        }
        assert_eq!(long.await.expect("no panic"), Ok(32 * MIB));
        pulls.join_all().await;
    });
}

/// Equal pulls, one behind the other: each is served as often as those before it, so none ends before them.
#[test]
fn who_came_first_ends_first() {
    over(&ANSWERED[..1], LONG, async |_server, agent, _arena, _| {
        let mut pulls = JoinSet::new();
        for number in 0..16 {
            let agent = agent.clone();
            pulls.spawn(async move {
                let reads = range(number * 4 * MIB, 4 * MIB);
                let pulled = agent.pull(PEER, reads, number, LONG).await;
                pulled.expect("pulls").0
            });
        }
        let mut order = Vec::new();
        while let Some(number) = pulls.join_next().await {
            order.push(number.expect("no panic"));
        }
        assert_eq!(order, (0..16).collect::<Vec<_>>());
    });
}
