//! A second process that serves an arena with a known pattern.
//!
//! The program re-executes itself: a test binary as its own test [`SERVER_TEST`], which does nothing
//! unless [`SERVE_VARIABLE`] is set; a benchmark as itself.

#![allow(dead_code, reason = "each user needs a part")]

use std::alloc::{Layout, alloc_zeroed};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_kv_memory::KvMemory;
use baton_protocol::TransferDescriptor;
use baton_transfer::{
    Agent, AgentConfig, AgentHealth, Arena, ArenaSource, GpuMemory, PeerKey, Read,
    STAGING_SLOT_BYTES, STAGING_SLOTS, Staging, TransferError, gpu_allocation_bytes,
};

/// Set to `<arena bytes>,<seed>,<UCX_TLS or nothing>` in a server.
pub const SERVE_VARIABLE: &str = "BATON_TEST_SERVE";
/// Name of the test that a test binary runs to be a server.
pub const SERVER_TEST: &str = "serve_an_arena";
/// Marks the server's one line that counts: libtest prints others.
const MARK: &str = "DESCRIPTOR ";
/// Printed by a server that reads.
const PULLING: &str = "PULLING";
const DEADLINE: Duration = Duration::from_secs(20);

/// Shared memory and whatever else UCX chooses; sockets alone; or sockets, with arenas that UCX does not know, as if on GPUs.
pub const TRANSPORTS: [Option<&str>; 3] = [None, Some("tcp,self"), Some(STAGED)];
pub const STAGED: &str = "staged";

/// What an agent on one of the [`TRANSPORTS`] is made of.
pub fn config(arena_bytes: usize, transport: Option<&str>) -> AgentConfig {
    if transport != Some(STAGED) {
        return AgentConfig {
            arenas: vec![ArenaSource::Host { bytes: arena_bytes }],
            tls: transport.map(str::to_owned),
        };
    }
    let bytes = gpu_allocation_bytes(arena_bytes);
    let layout = Layout::from_size_align(bytes, 4096).expect("a size");
    // Never freed: an arena may outlive the agent, and the process is short.
    // SAFETY: the size is not zero.
    let base = unsafe { alloc_zeroed(layout) }.expose_provenance();
    assert_ne!(base, 0, "no memory");
    AgentConfig {
        arenas: vec![ArenaSource::Gpu(GpuMemory {
            base: base as u64,
            bytes: arena_bytes,
            bind: Arc::new(|| Ok(())),
            staging: Arc::new(move || Ok(Box::new(SlowStaging::new(base, bytes)))),
            registered: false,
        })],
        tls: Some("tcp,self".to_owned()),
    }
}

/// An agent with one arena.
pub fn start(config: AgentConfig) -> (Agent, Arena) {
    one(Agent::start(config))
}

/// The one arena of an agent.
pub fn one(started: Result<(Agent, Vec<Arena>), TransferError>) -> (Agent, Arena) {
    let (agent, mut arenas) = started.expect("UCX works here: install libucx0");
    assert_eq!(arenas.len(), 1);
    (agent, arenas.remove(0))
}

/// An arena's first byte. One that stands for a GPU's is in main memory too.
pub fn base(arena: &Arena) -> *mut u8 {
    let address = arena.address().number() as usize;
    std::ptr::with_exposed_provenance_mut(address)
}

/// Copies that take place when they have been asked for a few times: as a GPU's, they have not happened before they are over.
struct SlowStaging {
    base: usize,
    bytes: usize,
    slots: Vec<u8>,
    pending: HashMap<usize, Pending>,
}

struct Pending {
    asked: usize,
    to_arena: bool,
    ranges: Vec<Range<u64>>,
}

impl SlowStaging {
    fn new(base: usize, bytes: usize) -> Self {
        Self {
            base,
            bytes,
            slots: vec![0; STAGING_SLOTS * STAGING_SLOT_BYTES],
            pending: HashMap::new(),
        }
    }

    fn start(&mut self, slot: usize, ranges: &[Range<u64>], to_arena: bool) -> Result<(), String> {
        let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        assert!(total <= STAGING_SLOT_BYTES as u64 && total > 0);
        assert!(ranges.iter().all(|range| range.end <= self.bytes as u64));
        let pending = Pending {
            asked: 0,
            to_arena,
            ranges: ranges.to_vec(),
        };
        let before = self.pending.insert(slot, pending);
        assert!(before.is_none(), "slot {slot} has two copies under way");
        Ok(())
    }
}

impl Staging for SlowStaging {
    fn slot(&mut self, slot: usize) -> &mut [u8] {
        assert!(
            !self.pending.contains_key(&slot),
            "slot {slot} is being copied"
        );
        &mut self.slots[slot * STAGING_SLOT_BYTES..][..STAGING_SLOT_BYTES]
    }

    fn fetch(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        self.start(slot, ranges, false)
    }

    fn store(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        self.start(slot, ranges, true)
    }

    fn is_done(&mut self, slot: usize) -> Result<bool, String> {
        let pending = self.pending.get_mut(&slot).expect("a copy is under way");
        pending.asked += 1;
        if pending.asked < 3 {
            return Ok(false);
        }
        let Pending {
            to_arena, ranges, ..
        } = self.pending.remove(&slot).expect("it was there");
        let base = std::ptr::with_exposed_provenance_mut::<u8>(self.base);
        let mut bytes = self.slot(slot);
        for range in ranges {
            let here;
            (here, bytes) = bytes.split_at_mut((range.end - range.start) as usize);
            // SAFETY: within the arena, as was checked; slots are memory of their own.
            unsafe {
                let there = base.add(range.start as usize);
                match to_arena {
                    true => there.copy_from_nonoverlapping(here.as_ptr(), here.len()),
                    false => here
                        .as_mut_ptr()
                        .copy_from_nonoverlapping(there, here.len()),
                }
            }
        }
        Ok(true)
    }
}

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

    /// Stops it; returns when it stands still. The signal alone promises nothing: on another core the process may go on for a moment, and
    /// answer what was asked after it.
    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let mut seen = MaybeUninit::<libc::siginfo_t>::uninit();
        let what = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT;
        // SAFETY: `seen` is one `siginfo_t`; the process is our child and not yet waited for, nor is it by this (`WNOWAIT`).
        let rc = unsafe { libc::waitid(libc::P_PID, self.child.id(), seen.as_mut_ptr(), what) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
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
    let (agent, arena) = start(config(bytes, tls.as_deref()));
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
            source: 0,
            destination: 0,
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
            base(arena)
                .cast::<u64>()
                .add(word as usize)
                .write(pattern(seed, word * 8))
        };
    }
}

/// One read that is the same range on both sides.
pub fn range(offset: u64, bytes: u64) -> Vec<Read> {
    vec![Read {
        source: 0,
        destination: 0,
        remote_offset: offset,
        local_offset: offset,
        bytes,
    }]
}

/// Whether `bytes` at `local` of our arena are those at `remote` of one filled with `seed`.
pub fn matches(arena: &Arena, local: u64, seed: u64, remote: u64, bytes: u64) -> bool {
    assert!(local + bytes <= arena.len() as u64);
    (0..bytes / 8).all(|word| {
        // SAFETY: within the arena, aligned; the pull that wrote here has ended.
        let value = unsafe {
            base(arena)
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
