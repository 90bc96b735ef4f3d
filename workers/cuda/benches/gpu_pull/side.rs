//! The two processes: one has the KV, the other reads it.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_cuda::{
    Algorithm, AllReduce, Buffer, CudaMemory, Device, ExchangeOptions, HostSlots, Sum, SumDtype,
    open_group,
};
use baton_kv_memory::KvMemory;
use baton_protocol::TransferDescriptor;
use baton_transfer::{
    Agent, AgentConfig, Arena, ArenaSource, GpuMemory, PeerKey, Read, STAGING_SLOT_BYTES,
    STAGING_SLOTS, Staging, gpu_allocation_bytes, plan_reads,
};
use cudarc::driver::{result, sys};

use crate::kv::{BLOCK_TOKENS, Shape, bytes, runs};
use crate::{FROM, ROUNDS, SHAPE, TO};

const PEER: PeerKey = PeerKey(1);
const DEADLINE: Duration = Duration::from_secs(60);

/// How long a sum waits for a rank that is late on purpose.
const SUM_WAIT: Duration = Duration::from_secs(4);

/// A process's GPUs, arenas and agent.
struct Side {
    shape: Shape,
    devices: Vec<Arc<Device>>,
    memories: Vec<Arc<CudaMemory>>,
    agent: Agent,
    _arenas: Vec<Arena>,
}

/// The GPUs of a side, as the machine numbers them.
fn gpus(variable: &str) -> Vec<u32> {
    let list = std::env::var(variable).expect("it was set");
    let numbers = list.split(',').map(str::parse);
    numbers.collect::<Result<_, _>>().expect("numbers")
}

impl Side {
    /// `BATON_GPU_PULL_UNREGISTERED` keeps the memory from UCX.
    fn start(ranks: usize, tls: Option<String>) -> Self {
        let shape = Shape::named(&std::env::var(SHAPE).expect("it was set"));
        let ordinals: Vec<u32> = (0..ranks as u32).collect();
        let devices = match ranks {
            1 => vec![Device::open(0).expect("a GPU")],
            _ => open_group(&ordinals).expect("a group of GPUs"),
        };
        let lengths = shape.arena_bytes(ranks);
        let memory = |(device, bytes): (_, &usize)| {
            let memory = CudaMemory::new(device, gpu_allocation_bytes(*bytes));
            Arc::new(memory.expect("memory"))
        };
        let memories: Vec<_> = devices.iter().zip(&lengths).map(memory).collect();
        let arenas = devices.iter().zip(&memories).zip(&lengths);
        let config = AgentConfig {
            arenas: arenas
                .map(|((device, memory), bytes)| ArenaSource::Gpu(arena(device, memory, *bytes)))
                .collect(),
            tls,
        };
        let started = Instant::now();
        let (agent, arenas) = Agent::start(config).unwrap_or_else(|error| panic!("{error}"));
        eprintln!("agent of {ranks} ranks started in {:?}", started.elapsed());
        let side = Self {
            shape,
            devices,
            memories,
            agent,
            _arenas: arenas,
        };
        side.poison();
        side
    }

    /// Nothing of what is read was there before.
    fn poison(&self) {
        for (device, memory) in self.devices.iter().zip(&self.memories) {
            device.bind().expect("bound");
            let at = memory.address().number();
            // SAFETY: the whole allocation.
            unsafe { sys::cuMemsetD8_v2(at, 0xee, memory.len()) }
                .result()
                .expect("filled");
            result::ctx::synchronize().expect("filled");
        }
    }
}

fn arena(device: &Arc<Device>, memory: &Arc<CudaMemory>, bytes: usize) -> GpuMemory {
    let (owner, staged) = (memory.clone(), memory.clone());
    let (device, on) = (device.clone(), device.clone());
    GpuMemory {
        base: memory.address().number(),
        bytes,
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
    }
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

pub(crate) fn serve(tls: Option<String>) {
    let ranks = gpus(FROM).len();
    let side = Side::start(ranks, tls);
    for (rank, memory) in side.memories.iter().enumerate() {
        side.devices[rank].bind().expect("bound");
        let mut at = memory.address().number();
        for block in 0..side.shape.blocks {
            let words = side.shape.words(ranks, rank, block);
            // SAFETY: blocks lie one behind the other in the allocation; plain memory, copied before the vector goes.
            unsafe { result::memcpy_htod_sync(at, &words) }.expect("copied");
            at += words.len() as u64 * 8;
        }
    }
    let descriptor = serde_json::to_string(&side.agent.descriptor()).expect("it is plain data");
    println!("{descriptor}");
    let _ = std::io::stdin().read_line(&mut String::new());
    side.agent.shutdown();
}

pub(crate) fn read(tls: Option<String>) {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a descriptor");
    let descriptor: TransferDescriptor = serde_json::from_str(&line).expect("a descriptor");
    let (from, to) = (gpus(FROM), gpus(TO));
    let reader = Reader {
        side: Side::start(to.len(), tls),
        from,
        to,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(reader.measure(&descriptor));
    reader.side.agent.shutdown();
}

struct Reader {
    side: Side,
    from: Vec<u32>,
    to: Vec<u32>,
}

impl Reader {
    async fn measure(&self, descriptor: &TransferDescriptor) {
        println!("{}", self.side.agent.summary());
        if self.to.len() > 1 {
            self.while_a_sum_waits(descriptor).await;
        }
        for when in ["a", "another"] {
            if !self.connect(when, descriptor).await {
                return self.slow().await;
            }
        }
        println!(
            "| tokens | neighbours | reads | GB/s median | best | µs median | after 5 ms idle, µs | of it between GPUs, GB/s alone |"
        );
        println!("|---|---|---|---|---|---|---|---|");
        for &tokens in self.side.shape.tokens {
            let blocks = tokens / BLOCK_TOKENS;
            let mut lengths = vec![1, 4, blocks];
            lengths.retain(|length| *length <= blocks);
            lengths.dedup();
            for run in lengths {
                self.row(tokens, run).await;
            }
        }
    }

    /// Whether GPU memory is read in place.
    async fn connect(&self, which: &str, descriptor: &TransferDescriptor) -> bool {
        let started = Instant::now();
        let agent = &self.side.agent;
        let report = agent.connect(PEER, descriptor.clone(), DEADLINE).await;
        let report = report.unwrap_or_else(|error| panic!("{error}"));
        println!(
            "{which} connection: reads travel by {}; probe {:.1} GB/s; {:.1} ms in all",
            report.transport,
            report.gigabytes_per_second,
            started.elapsed().as_secs_f64() * 1e3
        );
        report.transport.starts_with("cuda_ipc")
    }

    /// What a peer's first connection and a pull take while a sum of the first rank waits for the others, and whether the sum is
    /// right in the end.
    async fn while_a_sum_waits(&self, descriptor: &TransferDescriptor) {
        let options = ExchangeOptions {
            wait: SUM_WAIT,
            ..ExchangeOptions::default()
        };
        let ends = AllReduce::open(&self.side.devices, options).expect("a group");
        const COUNT: usize = 4096;
        let buffers = self.side.devices.iter().map(|device| {
            let ones = Buffer::of(device, &[0x3f80_u16; COUNT], "a partial").expect("memory");
            let sum = Buffer::<u16>::zeroed(device, COUNT, "a sum").expect("memory");
            (ones, sum)
        });
        let buffers: Vec<_> = buffers.collect();
        for device in &self.side.devices {
            device.synchronize().expect("filled");
        }
        let launch = |rank: usize| {
            let (partial, out) = &buffers[rank];
            let sum = Sum {
                dtype: SumDtype::Bf16,
                partial: partial.at(0),
                out: out.at(0),
                residual: None,
                count: COUNT,
            };
            self.side.devices[rank].bind().expect("bound");
            // SAFETY: buffers that outlive the sum; all ranks do the same in the end.
            unsafe { ends[rank].launch_by(Algorithm::OneShot, &sum) }.expect("launched");
        };
        launch(0);
        let started = Instant::now();
        let ms = || started.elapsed().as_secs_f64() * 1e3;
        let in_place = self.connect("while a sum waits, a", descriptor).await;
        let connected = ms();
        if in_place {
            self.pull(&self.reads(256, 1)).await;
        }
        let pulled = ms();
        (1..ends.len()).for_each(launch);
        let launched = ms();
        let done = ends.iter().try_for_each(AllReduce::check);
        println!(
            "while rank 0's sum waited: connected after {connected:.1} ms, pulled after {pulled:.1}, the others' launched after \
             {launched:.1}; the sum: {done:?}"
        );
        // Two copies at once, for nobody is to wait for them either.
        if done.is_ok() {
            launch(0);
            let started = Instant::now();
            let memory = self.side.memories[0].clone();
            let slots = HostSlots::new(
                &self.side.devices[0],
                memory,
                STAGING_SLOTS,
                STAGING_SLOT_BYTES,
            );
            let made = started.elapsed();
            (1..ends.len()).for_each(launch);
            let done = ends.iter().try_for_each(AllReduce::check);
            println!(
                "while rank 0's sum waited: slots made ({}) in {made:?}; the sum: {done:?}",
                slots.is_ok()
            );
        }
    }

    async fn row(&self, tokens: u32, run: u32) {
        let reads = self.reads(tokens, run);
        self.side.poison();
        self.pull(&reads).await;
        self.check(tokens, run);
        let (mut busy, mut idle, mut crossing) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            busy.push(self.pull(&reads).await);
        }
        for _ in 0..ROUNDS {
            tokio::time::sleep(Duration::from_millis(5)).await;
            idle.push(self.pull(&reads).await);
        }
        let crosses =
            |read: &&Read| self.from[read.source as usize] != self.to[read.destination as usize];
        let far: Vec<Read> = reads.iter().filter(crosses).copied().collect();
        if !far.is_empty() {
            for _ in 0..ROUNDS {
                crossing.push(self.pull(&far).await);
            }
        }
        for times in [&mut busy, &mut idle, &mut crossing] {
            times.sort_by(f64::total_cmp);
        }
        let rate = |bytes: u64, seconds: f64| bytes as f64 / seconds / 1e9;
        let between = match crossing.get(ROUNDS / 2) {
            Some(seconds) => format!("{:.1}", rate(bytes(&far), *seconds)),
            None => "none".to_owned(),
        };
        let (middle, total) = (busy[ROUNDS / 2], bytes(&reads));
        println!(
            "| {tokens} | {run} | {} | {:.1} | {:.1} | {:.0} | {:.0} | {between} |",
            reads.len(),
            rate(total, middle),
            rate(total, busy[0]),
            middle * 1e6,
            idle[ROUNDS / 2] * 1e6
        );
    }

    /// One pull where a table would take minutes.
    async fn slow(&self) {
        for tokens in [256, 1024] {
            let reads = self.reads(tokens, 1);
            let mut times = Vec::new();
            for _ in 0..5 {
                times.push(self.pull(&reads).await);
            }
            self.check(tokens, 1);
            times.sort_by(f64::total_cmp);
            let seconds = times[times.len() / 2];
            let rate = bytes(&reads) as f64 / seconds / 1e9;
            println!("{tokens} tokens: {rate:.2} GB/s, {:.1} ms", seconds * 1e3);
        }
    }

    /// Into the beginning of our arenas, in order.
    fn reads(&self, tokens: u32, run: u32) -> Vec<Read> {
        let (shape, blocks) = (&self.side.shape, tokens / BLOCK_TOKENS);
        let local: Vec<u32> = (0..blocks).collect();
        let (theirs, ours) = (shape.shares(self.from.len()), shape.shares(self.to.len()));
        let runs = runs(blocks, run, shape.blocks);
        plan_reads(&shape.kv(), &theirs, &ours, &runs, &local).expect("a plan")
    }

    /// Seconds of one pull.
    async fn pull(&self, reads: &[Read]) -> f64 {
        let pulled = self.side.agent.pull(PEER, reads.to_vec(), (), DEADLINE);
        let ((), stats) = pulled.await.unwrap_or_else(|error| panic!("{error}"));
        stats.seconds.into()
    }

    /// What arrived is what is there: every head on its rank, every word of it.
    fn check(&self, tokens: u32, run: u32) {
        let (shape, ranks) = (&self.side.shape, self.to.len());
        let runs = runs(tokens / BLOCK_TOKENS, run, shape.blocks);
        let sources = runs.iter().flat_map(|run| run.first..run.first + run.count);
        let sources: Vec<u32> = sources.collect();
        for (rank, memory) in self.side.memories.iter().enumerate() {
            self.side.devices[rank].bind().expect("bound");
            let mut at = memory.address().number();
            for &block in &sources {
                let expected = shape.words(ranks, rank, block);
                let mut words = vec![0_u64; expected.len()];
                // SAFETY: the block is within the allocation, and the pull that wrote it is over.
                unsafe { result::memcpy_dtoh_sync(&mut words, at) }.expect("copied");
                let wrong = words
                    .iter()
                    .zip(&expected)
                    .position(|(is, ought)| is != ought);
                assert_eq!(wrong, None, "block {block} on rank {rank}");
                at += expected.len() as u64 * 8;
            }
        }
    }
}
