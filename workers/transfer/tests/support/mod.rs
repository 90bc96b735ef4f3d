//! A second process that serves an arena with a known pattern.
//!
//! The program re-executes itself: a test binary as its own test [`SERVER_TEST`], which does nothing
//! unless [`SERVE_VARIABLE`] is set; a benchmark as itself.

#![allow(dead_code, reason = "each user needs a part")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use baton_protocol::TransferDescriptor;
use baton_transfer::{Agent, AgentConfig, AgentHealth, Arena, PeerKey, Read};

/// Set to `<arena bytes>,<seed>,<UCX_TLS or nothing>` in a server.
pub const SERVE_VARIABLE: &str = "BATON_TEST_SERVE";
/// Name of the test that a test binary runs to be a server.
pub const SERVER_TEST: &str = "serve_an_arena";
/// Marks the server's one line that counts: libtest prints others.
const MARK: &str = "DESCRIPTOR ";
/// Printed by a server that reads.
const PULLING: &str = "PULLING";
const DEADLINE: Duration = Duration::from_secs(20);

/// Shared memory and whatever else UCX chooses; or sockets alone.
pub const ROADS: [Option<&str>; 2] = [None, Some("tcp,self")];

/// A server process, killed when dropped.
pub struct Server {
    child: Child,
    pub descriptor: TransferDescriptor,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Server {
    pub fn start(arena_bytes: usize, seed: u64, tls: Option<&str>) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("the program has a path"))
            .args([SERVER_TEST, "--exact", "--nocapture"])
            .env(
                SERVE_VARIABLE,
                format!(
                    "{arena_bytes},{seed},{}",
                    tls.unwrap_or_default().replace(',', "+")
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program can run itself");
        let mut output = BufReader::new(child.stdout.take().expect("it is piped"));
        let descriptor = loop {
            let mut line = String::new();
            let bytes = output.read_line(&mut line).expect("the server prints text");
            assert!(bytes > 0, "the server ended without a descriptor");
            if let Some((_, json)) = line.split_once(MARK) {
                break serde_json::from_str(json).expect("the server prints its descriptor");
            }
        };
        // It goes on reading, or the server would block when it has more to say.
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            output
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self {
            child,
            descriptor,
            lines,
        }
    }

    /// Makes the server read from a peer for ever; returns when it does.
    pub fn pull_from(&mut self, peer: &TransferDescriptor) {
        let json = serde_json::to_string(peer).expect("it is plain data");
        let input = self.child.stdin.as_mut().expect("it is piped");
        writeln!(input, "{json}").expect("the server listens");
        while !self
            .lines
            .recv_timeout(DEADLINE)
            .expect("the server pulls")
            .contains(PULLING)
        {}
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is our child");
    }

    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the process is our child and not yet waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server's body: ends when its parent does. Returns at once if this process is no server.
pub fn serve() -> bool {
    let Ok(value) = std::env::var(SERVE_VARIABLE) else {
        return false;
    };
    let mut parts = value.split(',');
    let mut number = || {
        parts
            .next()
            .and_then(|part| part.parse::<u64>().ok())
            .expect("a number")
    };
    let (bytes, seed) = (number() as usize, number());
    let tls = parts
        .next()
        .filter(|tls| !tls.is_empty())
        .map(|tls| tls.replace('+', ","));
    let (agent, arena) = Agent::start(AgentConfig {
        arena_bytes: bytes,
        gpu: None,
        tls,
    })
    .expect("UCX works here");
    fill(&arena, seed);
    println!(
        "{MARK}{}",
        serde_json::to_string(&agent.descriptor()).expect("it is plain data")
    );
    // Standard input closes when the parent ends, however it ends.
    let mut line = String::new();
    if matches!(std::io::stdin().read_line(&mut line), Ok(bytes) if bytes > 0) {
        let peer = serde_json::from_str(&line).expect("the parent sends a descriptor");
        pull_for_ever(&agent, peer);
    }
    agent.shutdown();
    true
}

/// Until killed, or until the parent or the peer is gone.
fn pull_for_ever(agent: &Agent, descriptor: TransferDescriptor) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let peer = PeerKey(1);
        agent
            .connect(peer, descriptor, DEADLINE)
            .await
            .expect("connects");
        println!("{PULLING}");
        let read = Read {
            rank: 0,
            remote_offset: 0,
            local_offset: 0,
            bytes: 1 << 20,
        };
        while agent.pull(peer, vec![read; 64], (), DEADLINE).await.is_ok() {}
    });
}

/// The word at a byte offset (a multiple of 8) of an arena filled with `seed`.
pub fn pattern(seed: u64, offset: u64) -> u64 {
    (offset ^ seed.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ seed
}

pub fn fill(arena: &Arena, seed: u64) {
    for word in 0..arena.len() as u64 / 8 {
        // SAFETY: within the arena, aligned, and nobody reads or writes it yet.
        unsafe {
            arena
                .base()
                .cast::<u64>()
                .add(word as usize)
                .write(pattern(seed, word * 8))
        };
    }
}

/// Whether `bytes` at `local` of our arena are those at `remote` of one filled with `seed`.
pub fn matches(arena: &Arena, local: u64, seed: u64, remote: u64, bytes: u64) -> bool {
    assert!(local + bytes <= arena.len() as u64);
    (0..bytes / 8).all(|word| {
        // SAFETY: within the arena, aligned; the pull that wrote here has ended.
        let value = unsafe {
            arena
                .base()
                .add((local + word * 8) as usize)
                .cast::<u64>()
                .read()
        };
        value == pattern(seed, remote + word * 8)
    })
}

/// Waits until the agent's health satisfies a condition; it has a deadline and no other clock.
pub fn until(agent: &Agent, what: &str, condition: impl Fn(&AgentHealth) -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition(&agent.health()) {
        assert!(
            Instant::now() < end,
            "never came: {what}; {:?}",
            agent.health()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}
