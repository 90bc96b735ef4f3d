//! Rate of pulls between the memories of two GPUs, each process seeing its own GPU only, and within one GPU, beside the
//! peer copy of one process that sees both.
//!
//! `cargo bench -p baton-cuda --bench gpu_pull` on a machine with two GPUs and UCX with CUDA (`BATON_UCX_LIB_DIR`); elsewhere
//! copy the binary that `--no-run` names. `UCX_TLS` given as an argument is that of both agents.
//!
//! KV of the Llama-3.1-8B shape: 131,072 bytes a token, blocks of 32 tokens. What arrived is compared with what was sent.

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_cuda::{Buffer, CudaMemory, Device, HostSlots};
use baton_kv_memory::KvMemory;
use baton_protocol::TransferDescriptor;
use baton_transfer::{
    Agent, AgentConfig, Arena, ArenaSource, GpuMemory, PeerKey, Read, STAGING_SLOT_BYTES,
    STAGING_SLOTS, Staging, gpu_allocation_bytes,
};
use cudarc::driver::{result, sys};

/// Which side this process is: nothing, `serve` or `read`.
const SIDE: &str = "BATON_GPU_PULL_SIDE";
const ARENA_BYTES: usize = 2 << 30;
const BLOCK_BYTES: u64 = 4 << 20;
const TOKEN_BYTES: u64 = 128 << 10;
const ROUNDS: usize = 15;
const SEED: u64 = 11;
const PEER: PeerKey = PeerKey(1);
const DEADLINE: Duration = Duration::from_secs(60);

fn main() {
    let tls = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    match std::env::var(SIDE).as_deref() {
        Ok("serve") => serve(tls),
        Ok("read") => read(tls),
        _ => run(tls),
    }
}

/// Starts both sides for each pair of GPUs.
fn run(tls: Option<String>) {
    let gpus = Device::open(0).and_then(|_| Device::open(1)).is_ok();
    if gpus {
        ceiling();
    }
    let pairs: &[[&str; 2]] = match gpus {
        true => &[["0", "1"], ["0", "0"]],
        false => &[["0", "0"]],
    };
    for [from, to] in pairs {
        println!("\nfrom GPU {from} to GPU {to}");
        let mut server = side("serve", from, tls.as_deref());
        let mut output = BufReader::new(server.stdout.take().expect("it is piped"));
        let mut descriptor = String::new();
        output
            .read_line(&mut descriptor)
            .expect("the server speaks");
        if descriptor.is_empty() {
            let status = server.wait().expect("it is our child");
            panic!("the server failed: {status}");
        }
        let mut reader = side("read", to, tls.as_deref());
        let mut input = reader.stdin.take().expect("it is piped");
        input.write_all(descriptor.as_bytes()).expect("it listens");
        let printed = BufReader::new(reader.stdout.take().expect("it is piped"));
        for line in printed.lines().map_while(Result::ok) {
            println!("{line}");
        }
        let status = reader.wait().expect("it is our child");
        // Its standard input closes, which ends it.
        drop(server.stdin.take());
        let _ = server.wait();
        assert!(status.success(), "the reader failed: {status}");
    }
}

fn side(side: &str, gpu: &str, tls: Option<&str>) -> Child {
    Command::new(std::env::current_exe().expect("the program has a path"))
        .args(tls)
        .env(SIDE, side)
        .env("CUDA_VISIBLE_DEVICES", gpu)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program can run itself")
}

/// An agent whose arena is in GPU memory, and that memory. `BATON_GPU_PULL_UNREGISTERED` keeps it from UCX.
fn agent(tls: Option<String>) -> (Agent, Arena, Arc<CudaMemory>) {
    let device = Device::open(0).expect("a GPU");
    let bytes = gpu_allocation_bytes(ARENA_BYTES);
    let mut memory = CudaMemory::new(&device, bytes).expect("memory");
    memory.fill_bytes(0xee).expect("filled");
    device.synchronize().expect("filled");
    let memory = Arc::new(memory);
    let (owner, staged, on) = (memory.clone(), memory.clone(), device.clone());
    let config = AgentConfig {
        arenas: vec![ArenaSource::Gpu(GpuMemory {
            base: memory.address().number(),
            bytes: ARENA_BYTES,
            bind: Arc::new(move || {
                let _keep = &owner;
                device.bind().map_err(|error| error.to_string())
            }),
            staging: Arc::new(move || {
                let slots = HostSlots::new(&on, staged.clone(), STAGING_SLOTS, STAGING_SLOT_BYTES);
                let slots = slots.map_err(|error| error.to_string())?;
                Ok(Box::new(Slots(slots)) as Box<dyn Staging>)
            }),
            registered: std::env::var_os("BATON_GPU_PULL_UNREGISTERED").is_none(),
        })],
        tls,
    };
    let started = Instant::now();
    let (agent, mut arenas) = Agent::start(config).unwrap_or_else(|error| panic!("{error}"));
    eprintln!("agent started in {:?}", started.elapsed());
    (agent, arenas.remove(0), memory)
}

struct Slots(HostSlots);

impl Staging for Slots {
    fn slot(&mut self, slot: usize) -> &mut [u8] {
        self.0.slot(slot)
    }

    fn fetch(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        self.0
            .fetch(slot, ranges)
            .map_err(|error| error.to_string())
    }

    fn store(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        self.0
            .store(slot, ranges)
            .map_err(|error| error.to_string())
    }

    fn is_done(&mut self, slot: usize) -> Result<bool, String> {
        self.0.is_done(slot).map_err(|error| error.to_string())
    }
}

/// The word at a byte offset of the server's arena.
fn pattern(offset: u64) -> u64 {
    (offset ^ SEED.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ SEED
}

fn serve(tls: Option<String>) {
    let (agent, _arena, memory) = agent(tls);
    let words: Vec<u64> = (0..ARENA_BYTES as u64 / 8)
        .map(|word| pattern(word * 8))
        .collect();
    // SAFETY: the allocation is that long; plain memory, copied before the vector goes.
    unsafe { result::memcpy_htod_sync(memory.address().number(), &words) }.expect("copied");
    drop(words);
    let descriptor = serde_json::to_string(&agent.descriptor()).expect("it is plain data");
    println!("{descriptor}");
    let _ = std::io::stdin().read_line(&mut String::new());
    agent.shutdown();
}

fn read(tls: Option<String>) {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a descriptor");
    let descriptor: TransferDescriptor = serde_json::from_str(&line).expect("a descriptor");
    let (agent, arena, memory) = agent(tls);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(measure(&agent, &descriptor, &memory));
    agent.shutdown();
    drop(arena);
}

async fn measure(agent: &Agent, descriptor: &TransferDescriptor, memory: &CudaMemory) {
    println!("{}", agent.summary());
    for when in ["first", "second"] {
        let started = Instant::now();
        let report = agent
            .connect(PEER, descriptor.clone(), DEADLINE)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        println!(
            "{when} connection: reads travel by {}; probe {:.1} GB/s; {:.1} ms in all",
            report.transport,
            report.gigabytes_per_second,
            started.elapsed().as_secs_f64() * 1e3
        );
        if !report.transport.starts_with("cuda_ipc") {
            return slow(agent, memory).await;
        }
    }
    println!("| tokens | reads of | pull GB/s median | best | µs median | after 5 ms idle, µs |");
    println!("|---|---|---|---|---|---|");
    for tokens in [32, 256, 1024, 2048, 8192u64] {
        let bytes = tokens * TOKEN_BYTES;
        let mut lengths = vec![BLOCK_BYTES, 4 * BLOCK_BYTES, 16 * BLOCK_BYTES, bytes];
        lengths.retain(|length| *length <= bytes);
        lengths.dedup();
        for length in lengths {
            let reads = scattered(bytes, length);
            pull(agent, &reads).await;
            let mut busy = Vec::new();
            for _ in 0..ROUNDS {
                busy.push(pull(agent, &reads).await);
            }
            let mut idle = Vec::new();
            for _ in 0..ROUNDS {
                tokio::time::sleep(Duration::from_millis(5)).await;
                idle.push(pull(agent, &reads).await);
            }
            check(memory, &reads);
            busy.sort_by(f64::total_cmp);
            idle.sort_by(f64::total_cmp);
            let (middle, best) = (busy[ROUNDS / 2], busy[0]);
            let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
            println!(
                "| {tokens} | {} MiB | {:.1} | {:.1} | {:.0} | {:.0} |",
                length >> 20,
                rate(middle),
                rate(best),
                middle * 1e6,
                idle[ROUNDS / 2] * 1e6
            );
        }
    }
}

/// One pull where a table would take minutes.
async fn slow(agent: &Agent, memory: &CudaMemory) {
    for tokens in [256, 1024u64] {
        let reads = scattered(tokens * TOKEN_BYTES, BLOCK_BYTES);
        let mut times = Vec::new();
        for _ in 0..5 {
            times.push(pull(agent, &reads).await);
        }
        check(memory, &reads);
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let rate = (tokens * TOKEN_BYTES) as f64 / seconds / 1e9;
        println!("{tokens} tokens: {rate:.2} GB/s, {:.1} ms", seconds * 1e3);
    }
}

/// Seconds of one pull.
async fn pull(agent: &Agent, reads: &[Read]) -> f64 {
    let pulled = agent.pull(PEER, reads.to_vec(), (), DEADLINE).await;
    let ((), stats) = pulled.unwrap_or_else(|error| panic!("{error}"));
    stats.seconds.into()
}

/// Ranges in no order, into the beginning of our arena in order.
fn scattered(bytes: u64, length: u64) -> Vec<Read> {
    let places = ARENA_BYTES as u64 / length;
    let count = bytes / length;
    // 197 is prime to every power of two, so no range is read twice.
    let read = |i| Read {
        source: 0,
        destination: 0,
        remote_offset: (i * 197 + 13) % places * length,
        local_offset: i * length,
        bytes: length,
    };
    (0..count).map(read).collect()
}

/// What arrived is what is there.
fn check(memory: &CudaMemory, reads: &[Read]) {
    let mut words = vec![0u64; reads[0].bytes as usize / 8];
    for read in reads {
        // SAFETY: the range is within the allocation, and the pull that wrote it is over.
        unsafe {
            result::memcpy_dtoh_sync(&mut words, memory.address().number() + read.local_offset)
                .expect("copied");
        }
        let wrong = words
            .iter()
            .enumerate()
            .position(|(i, word)| *word != pattern(read.remote_offset + i as u64 * 8));
        assert_eq!(wrong, None, "{read:?} differs");
    }
}

/// Peer copies of one process that sees both GPUs: what the hardware gives.
fn ceiling() {
    let devices = [0, 1].map(|gpu| Device::open(gpu).expect("a GPU"));
    let bytes = 1usize << 30;
    let buffers = devices.each_ref().map(|device| {
        let mut buffer = Buffer::<u8>::uninitialized(device, bytes, "a copy").expect("memory");
        buffer.fill_bytes(0x5a).expect("filled");
        device.synchronize().expect("filled");
        buffer
    });
    let contexts = devices.each_ref().map(|device| {
        device.bind().expect("bound");
        let mut context = std::ptr::null_mut();
        // SAFETY: a place to write to.
        unsafe { sys::cuCtxGetCurrent(&mut context) }
            .result()
            .expect("a context");
        context
    });
    devices[1].bind().expect("bound");
    // SAFETY: a live context of another device.
    let peers = unsafe { sys::cuCtxEnablePeerAccess(contexts[0], 0) };
    println!("peer access: {peers:?}");
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).expect("a stream");
    for (size, copies) in [
        (4 << 20, 8),
        (16 << 20, 8),
        (128 << 20, 1),
        (256 << 20, 1),
        (bytes, 1),
        (bytes, 4),
    ] {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let started = Instant::now();
            for copy in 0..copies {
                let at = copy * size % bytes;
                // SAFETY: both ranges are within their allocations.
                unsafe {
                    sys::cuMemcpyPeerAsync(
                        buffers[1].at(at),
                        contexts[1],
                        buffers[0].at(at),
                        contexts[0],
                        size,
                        stream,
                    )
                    .result()
                    .expect("a peer copy");
                }
            }
            // SAFETY: a live stream.
            unsafe { result::stream::synchronize(stream) }.expect("copied");
            times.push(started.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let middle = times[ROUNDS / 2];
        println!(
            "peer copy, {copies} of {} MiB: {:.1} GB/s, {:.0} µs",
            size >> 20,
            (size * copies) as f64 / middle / 1e9,
            middle * 1e6
        );
    }
}
