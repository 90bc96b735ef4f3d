//! What a sum over several GPUs costs: `cargo bench -p baton-cuda --bench all_reduce` on a machine with two or more.
//!
//! Microseconds of one of 64 sums in a row in a graph, BF16, the slowest rank's; the median of rounds of several replays each.
//! `all_reduce_nccl.py` beside this measures NCCL in the same way. An argument is the MiB of a set of slots.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use baton_cuda::{
    Algorithm, AllReduce, Buffer, Device, ExchangeOptions, Graph, Sum, SumDtype, open_group,
};

const KIB: [usize; 9] = [
    4,
    16,
    64,
    256,
    1 << 10,
    4 << 10,
    16 << 10,
    32 << 10,
    64 << 10,
];
const SUMS: usize = 64;
const ROUNDS: usize = 9;

fn main() {
    let arguments = std::env::args().skip(1);
    let set_mib = arguments
        .filter_map(|argument| argument.parse::<usize>().ok())
        .next();
    let gpus = (0..8).take_while(|gpu| Device::open(*gpu).is_ok()).count();
    for ranks in [2, 4, 8].into_iter().filter(|ranks| *ranks <= gpus) {
        table(ranks, set_mib);
    }
    if gpus < 2 {
        println!("{gpus} GPUs: a sum needs two");
    }
}

fn table(ranks: usize, set_mib: Option<usize>) {
    let ordinals: Vec<u32> = (0..ranks as u32).collect();
    let devices = open_group(&ordinals).unwrap_or_else(|error| panic!("{error}"));
    let mut options = ExchangeOptions::default();
    if let Some(mib) = set_mib {
        options.set_bytes = mib << 20;
    }
    let ends = AllReduce::open(&devices, options).unwrap_or_else(|error| panic!("{error}"));
    println!(
        "\n{ranks} × {}, sets of {} MiB: µs a sum",
        devices[0].name(),
        options.set_bytes >> 20
    );
    println!("| KiB | as chosen | one shot | two shots | added to f32 |");
    println!("|---|---|---|---|---|");
    for kib in KIB {
        let own = ends[0].algorithm(kib << 10);
        let of = |algorithm, dtype| measure(&ends, kib << 10, algorithm, dtype);
        let one = of(Algorithm::OneShot, SumDtype::Bf16);
        let two = of(Algorithm::TwoShot, SumDtype::Bf16);
        let added = of(own, SumDtype::Bf16ToF32);
        let chosen = if own == Algorithm::OneShot { one } else { two };
        println!("| {kib} | {chosen:.2} | {one:.2} | {two:.2} | {added:.2} |");
    }
}

fn measure(ends: &[AllReduce], bytes: usize, algorithm: Algorithm, dtype: SumDtype) -> f64 {
    let count = bytes / 2;
    let replays = ((8 << 20) / bytes).clamp(2, 50);
    let buffers: Vec<_> = ends
        .iter()
        .map(|end| {
            let numbers: Vec<u16> = (0..count).map(|i| 0x3f80 | (i * 37 % 128) as u16).collect();
            let partial = Buffer::of(end.device(), &numbers, "a partial").expect("memory");
            let out = Buffer::<u8>::zeroed(end.device(), count * 4, "a sum").expect("memory");
            (partial, out)
        })
        .collect();
    let barrier = Barrier::new(ends.len());
    let rank = |end: &AllReduce| {
        let (partial, out) = &buffers[end.rank()];
        end.device().bind().expect("bound");
        let sum = Sum {
            dtype,
            partial: partial.at(0),
            out: out.at(0),
            residual: (dtype != SumDtype::Bf16).then(|| out.at(0)),
            count,
        };
        let all = || {
            // SAFETY: buffers that outlive the graph; all ranks do the same.
            (0..SUMS).try_for_each(|_| unsafe { end.launch_by(algorithm, &sum) })
        };
        all().expect("launched");
        end.check().unwrap_or_else(|error| panic!("{error}"));
        let graph = Graph::capture(end.device(), all).expect("captured");
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            barrier.wait();
            let started = Instant::now();
            for _ in 0..replays {
                // SAFETY: as above.
                unsafe { graph.launch() }.expect("launched");
            }
            end.device().synchronize().expect("done");
            times.push(started.elapsed());
        }
        end.check().unwrap_or_else(|error| panic!("{error}"));
        times
    };
    let times: Vec<Vec<Duration>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ends.iter().map(|end| scope.spawn(|| rank(end))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a rank"))
            .collect()
    });
    let slowest = |round: usize| times.iter().map(|t| t[round]).max().expect("ranks");
    let mut rounds: Vec<Duration> = (0..ROUNDS).map(slowest).collect();
    rounds.sort();
    rounds[ROUNDS / 2].as_secs_f64() * 1e6 / (replays * SUMS) as f64
}
