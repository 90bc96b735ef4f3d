//! Sums over several GPUs: right, the same bits on all ranks, however late one is, and over in time where one never comes.
//! Ignored where `cargo test` runs, which need not have a GPU; `tests/gpu.sh` runs it. Groups of more ranks than there are GPUs
//! have several on one.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use baton_cuda::sources::Source;
use baton_cuda::{
    Algorithm, AllReduce, Buffer, Compiler, CudaError, Device, ExchangeOptions, Graph, Kernel,
    LaunchConfig, Module, Sum, SumDtype, launch, open_group,
};
use baton_engine::random_bits;

const ALGORITHMS: [Algorithm; 2] = [Algorithm::OneShot, Algorithm::TwoShot];
const DTYPES: [SumDtype; 3] = [SumDtype::Bf16, SumDtype::Bf16ToF32, SumDtype::F32];
/// Small, so that large sums take several turns.
const SET_BYTES: usize = 4 << 20;

/// Ranks on all GPUs there are, in turn.
fn group(ranks: usize, wait: Duration, hold_back: bool) -> Vec<AllReduce> {
    Device::open(0).unwrap_or_else(|error| panic!("{error}"));
    let gpus = (0..8).take_while(|gpu| Device::open(*gpu).is_ok()).count() as u32;
    let ordinals: Vec<u32> = (0..ranks as u32).map(|rank| rank % gpus).collect();
    let devices = open_group(&ordinals).unwrap_or_else(|error| panic!("{error}"));
    let options = ExchangeOptions {
        set_bytes: SET_BYTES,
        pushed_bytes: 0,
        wait,
        hold_back,
    };
    AllReduce::open(&devices, options).unwrap_or_else(|error| panic!("{error}"))
}

/// What each rank's thread gives.
fn on_each<T: Send>(ends: &[AllReduce], work: impl Fn(&AllReduce, &Barrier) -> T + Sync) -> Vec<T> {
    let barrier = Barrier::new(ends.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = ends
            .iter()
            .map(|end| {
                let (work, barrier) = (&work, &barrier);
                scope.spawn(move || {
                    end.device().bind().expect("bound");
                    work(end, barrier)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a rank"))
            .collect()
    })
}

fn to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounded to nearest even, as the GPU does; NaN as the GPU has it.
fn to_bf16(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7fff;
    }
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Numbers of about 1, of either type as bytes.
fn partial(dtype: SumDtype, seed: u64, count: usize) -> Vec<u8> {
    let number = |i: usize| {
        let bits = random_bits(seed, i as u32);
        (bits % 4_000_001) as f32 / 1e6 - 2.0
    };
    match dtype {
        SumDtype::F32 => (0..count).flat_map(|i| number(i).to_ne_bytes()).collect(),
        _ => (0..count)
            .flat_map(|i| to_bf16(number(i)).to_ne_bytes())
            .collect(),
    }
}

fn number(dtype: SumDtype, bytes: &[u8], i: usize) -> f32 {
    match dtype {
        SumDtype::F32 => f32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().expect("four")),
        _ => to_f32(u16::from_ne_bytes([bytes[2 * i], bytes[2 * i + 1]])),
    }
}

/// The sum as its contract has it: in the order of ranks, in f32.
fn expected(
    dtype: SumDtype,
    algorithm: Algorithm,
    partials: &[Vec<u8>],
    residual: Option<&[f32]>,
    count: usize,
) -> Vec<u8> {
    let mut out = Vec::new();
    for i in 0..count {
        let parts = partials.iter().map(|bytes| number(dtype, bytes, i));
        let mut sum = parts.reduce(|a, b| a + b).expect("ranks");
        if dtype == SumDtype::Bf16ToF32 && algorithm == Algorithm::TwoShot {
            sum = to_f32(to_bf16(sum));
        }
        if let Some(residual) = residual {
            sum += residual[i];
        }
        match dtype {
            SumDtype::Bf16 => out.extend(to_bf16(sum).to_ne_bytes()),
            _ => out.extend(sum.to_bits().to_ne_bytes()),
        }
    }
    out
}

/// What a rank has after one sum; beyond `count` numbers nothing was written.
fn sum_once(
    end: &AllReduce,
    ready: &Barrier,
    dtype: SumDtype,
    algorithm: Algorithm,
    partial: &[u8],
    residual: Option<&[f32]>,
    count: usize,
) -> Result<Vec<u8>, CudaError> {
    const BEYOND: usize = 64;
    let device = end.device();
    let bytes = count * if dtype == SumDtype::Bf16 { 2 } else { 4 };
    let partial = Buffer::of(device, partial, "a partial")?;
    let mut out = Buffer::<u8>::uninitialized(device, bytes + BEYOND, "a sum")?;
    out.fill_bytes(0xa5)?;
    let residual = match residual {
        Some(residual) => Some(Buffer::of(device, residual, "a residual")?),
        None => None,
    };
    let sum = Sum {
        dtype,
        partial: partial.at(0),
        out: out.at(0),
        residual: residual.as_ref().map(|residual| residual.at(0)),
        count,
    };
    ready.wait(); // nobody allocates any more
    // SAFETY: buffers of that size, kept until `check` has waited; all ranks do this.
    unsafe { end.launch_by(algorithm, &sum)? };
    end.check()?;
    let mut read = vec![0; bytes + BEYOND];
    out.read(0, &mut read)?;
    assert_eq!(read[bytes..], [0xa5; BEYOND], "written beyond {count}");
    read.truncate(bytes);
    Ok(read)
}

#[test]
#[ignore = "needs a GPU"]
fn sums_are_right_and_the_same_bits_on_all_ranks() {
    for ranks in [2, 3, 4, 8] {
        let ends = group(ranks, Duration::from_secs(20), false);
        for algorithm in ALGORITHMS {
            for dtype in DTYPES {
                for count in [1, 7, 8, 9, 1023, 2048, 4097, 100_003, 1 << 20, 3_000_001] {
                    if ranks > 2 && count > 1 << 20 {
                        continue;
                    }
                    let seed = |rank: usize| count as u64 * 31 + rank as u64;
                    let partials: Vec<_> = (0..ranks)
                        .map(|rank| partial(dtype, seed(rank), count))
                        .collect();
                    let residual: Option<Vec<f32>> = (dtype != SumDtype::Bf16 && count % 2 == 1)
                        .then(|| (0..count).map(|i| i as f32 * 0.37 - 5.0).collect());
                    let residual = residual.as_deref();
                    let want = expected(dtype, algorithm, &partials, residual, count);
                    for time in 0..2 {
                        let outs = on_each(&ends, |end, ready| {
                            let own = &partials[end.rank()];
                            sum_once(end, ready, dtype, algorithm, own, residual, count)
                                .unwrap_or_else(|error| panic!("{error}"))
                        });
                        for (rank, out) in outs.iter().enumerate() {
                            let wrong = out.iter().zip(&want).position(|(a, b)| a != b);
                            assert_eq!(
                                wrong, None,
                                "byte of {count} {dtype:?} by {algorithm:?} on rank {rank} of {ranks}, time {time}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn any_number_may_be_sent() {
    let ends = group(2, Duration::from_secs(20), false);
    // Words of all bits are what an empty slot holds.
    let f32s = [
        u32::MAX,
        0x7fc0_0000,
        0xff80_0000,
        0x7f80_0000,
        0x8000_0000,
        0,
        1,
    ];
    let bf16s = [0xffffu16, 0x7fc0, 0xff80, 0x7f80, 0x8000, 0, 1];
    let count = 3001;
    for algorithm in ALGORITHMS {
        for dtype in DTYPES {
            let partials: Vec<Vec<u8>> = (0..2)
                .map(|rank| match dtype {
                    SumDtype::F32 => (0..count)
                        .flat_map(|i| f32s[i / (1 + 6 * rank) % 7].to_ne_bytes())
                        .collect(),
                    // In pairs, so that whole words are all bits.
                    _ => (0..count)
                        .flat_map(|i| bf16s[i / (2 + 12 * rank) % 7].to_ne_bytes())
                        .collect(),
                })
                .collect();
            let want = expected(dtype, algorithm, &partials, None, count);
            let outs = on_each(&ends, |end, ready| {
                sum_once(
                    end,
                    ready,
                    dtype,
                    algorithm,
                    &partials[end.rank()],
                    None,
                    count,
                )
                .unwrap_or_else(|error| panic!("{error}"))
            });
            assert!(outs[0] == outs[1], "{dtype:?} by {algorithm:?} differs");
            let out_type = match dtype {
                SumDtype::Bf16 => SumDtype::Bf16,
                _ => SumDtype::F32,
            };
            for i in 0..count {
                let (got, want) = (number(out_type, &outs[0], i), number(out_type, &want, i));
                assert!(
                    got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                    "{i} of {dtype:?} by {algorithm:?}: {got}, not {want}"
                );
            }
        }
    }
}

/// Whole numbers that follow from the sum, the rank and the place; checked on the GPU. One block each.
const STEPS: Source = Source {
    name: "steps.cu",
    text: r#"
typedef unsigned int u32;
__device__ u32 mix(u32 x) {
    x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ x >> 16;
}
__device__ u32 value(u32 step, u32 rank, u32 i) { return mix(step * 0x9e3779b9u + mix(rank + 1) + i) % 30; }

// Late by up to 30 µs, every 64th time by 300.
extern "C" __global__ void fill(unsigned short* bf16, float* f32, const u32* step, u32 salt, u32 rank, u32 count) {
    const u32 chance = mix(*step * 77 + rank * 1000003 + salt);
    const long long cycles = chance % 64 == 0 ? 500000 : chance / 64 % 4 == 0 ? 0 : chance / 256 % 50000;
    const long long start = clock64();
    while (clock64() - start < cycles) {}
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        const float x = value(*step * 8 + salt, rank, i);
        if (bf16) bf16[i] = __float_as_uint(x) >> 16; else f32[i] = x;
    }
}
extern "C" __global__ void verify(
    const unsigned short* bf16, const float* f32, u32* step, u32 salt, u32 ranks, u32 count, u32 last, u32* wrong
) {
    u32 bad = 0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        u32 want = 0;
        for (u32 rank = 0; rank < ranks; rank++) want += value(*step * 8 + salt, rank, i);
        bad += (bf16 ? __uint_as_float((u32)bf16[i] << 16) : f32[i]) != (float)want;
    }
    if (bad) atomicAdd(wrong, bad);
    __syncthreads();
    if (last && threadIdx.x == 0) ++*step;
}
"#,
};

/// One sum of the graph: all types, both algorithms, from one vector to several turns.
const SUMS: [(SumDtype, Algorithm, usize); 4] = [
    (SumDtype::Bf16, Algorithm::OneShot, 4_096),
    (SumDtype::F32, Algorithm::TwoShot, 20_001),
    (SumDtype::Bf16, Algorithm::TwoShot, 13),
    (SumDtype::F32, Algorithm::OneShot, 700),
];

struct Steps {
    fill: Kernel,
    verify: Kernel,
    step: Buffer<u32>,
    wrong: Buffer<u32>,
    buffers: Vec<(Buffer<u8>, Buffer<u8>)>,
}

impl Steps {
    fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let image = Compiler::for_capability(device.capability())?.compile(&STEPS, &[])?;
        let module = Module::load(device, &image)?;
        let buffer = |bytes| Buffer::uninitialized(device, bytes, "numbers");
        let (fill, verify) = (module.kernel("fill", 0)?, module.kernel("verify", 0)?);
        Ok(Self {
            fill,
            verify,
            step: Buffer::zeroed(device, 1, "a counter")?,
            wrong: Buffer::zeroed(device, 1, "a counter")?,
            buffers: SUMS
                .iter()
                .map(|(_, _, count)| Ok((buffer(count * 4)?, buffer(count * 4)?)))
                .collect::<Result<_, CudaError>>()?,
        })
    }

    /// Sums right after each other, between what fills and what verifies them.
    fn launch(&self, end: &AllReduce, ranks: u32) -> Result<(), CudaError> {
        let block = LaunchConfig::row(1, 512);
        let addresses = |dtype, at| match dtype {
            SumDtype::F32 => (0, at),
            _ => (at, 0),
        };
        let sums = || SUMS.iter().zip(&self.buffers).enumerate();
        // SAFETY: the kernels' arguments as above; buffers that outlive the graph.
        unsafe {
            for (salt, ((dtype, _, count), (partial, _))) in sums() {
                let (bf16, f32s) = addresses(*dtype, partial.at(0));
                let (salt, rank, count) = (salt as u32, end.rank() as u32, *count as u32);
                launch!(
                    self.fill,
                    block,
                    bf16,
                    f32s,
                    self.step.at(0),
                    salt,
                    rank,
                    count
                )?;
            }
            for (_, ((dtype, algorithm, count), (partial, out))) in sums() {
                let sum = Sum {
                    dtype: *dtype,
                    partial: partial.at(0),
                    out: out.at(0),
                    residual: None,
                    count: *count,
                };
                end.launch_by(*algorithm, &sum)?;
            }
            for (salt, ((dtype, _, count), (_, out))) in sums() {
                let (bf16, f32s) = addresses(*dtype, out.at(0));
                let last = u32::from(salt + 1 == SUMS.len());
                let (salt, count) = (salt as u32, *count as u32);
                let (step, wrong) = (self.step.at(0), self.wrong.at(0));
                launch!(
                    self.verify,
                    block,
                    bf16,
                    f32s,
                    step,
                    salt,
                    ranks,
                    count,
                    last,
                    wrong
                )?;
            }
        }
        Ok(())
    }
}

#[test]
#[ignore = "needs a GPU"]
fn ten_thousand_sums_of_graphs_are_right_however_late_a_rank_is() {
    const REPLAYS: u32 = 2500;
    for (ranks, hold_back) in [(2u32, false), (2, true), (4, true)] {
        let ends = group(ranks as usize, Duration::from_secs(20), hold_back);
        // Everything is allocated before any rank waits for another.
        let steps: Vec<_> = ends
            .iter()
            .map(|end| Steps::new(end.device()).unwrap_or_else(|error| panic!("{error}")))
            .collect();
        on_each(&ends, |end, ready| {
            let steps = &steps[end.rank()];
            let run = || -> Result<(), CudaError> {
                steps.launch(end, ranks)?;
                end.check()?;
                let graph = Graph::capture(end.device(), || steps.launch(end, ranks))?;
                ready.wait(); // nobody instantiates any more
                for _ in 1..REPLAYS {
                    // SAFETY: the buffers are there until the end of the test.
                    unsafe { graph.launch()? };
                }
                end.check()?;
                let (mut step, mut wrong) = ([0], [1]);
                steps.step.read(0, &mut step)?;
                steps.wrong.read(0, &mut wrong)?;
                assert_eq!((step, wrong), ([REPLAYS], [0]), "steps, wrong numbers");
                Ok(())
            };
            run().unwrap_or_else(|error| panic!("rank {} of {ranks}: {error}", end.rank()));
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_rank_that_never_comes_ends_the_others_sums() {
    for algorithm in ALGORITHMS {
        let wait = Duration::from_millis(200);
        let ends = group(2, wait, false);
        let devices = [ends[0].device(), ends[1].device()];
        let buffers = devices.map(|device| Buffer::<u8>::zeroed(device, 1 << 20, "a sum").unwrap());
        let launch = |rank: usize| {
            let at = buffers[rank].at(0);
            let sum = Sum {
                dtype: SumDtype::Bf16,
                partial: at,
                out: at,
                residual: None,
                count: 1 << 19,
            };
            devices[rank].bind().expect("bound");
            // SAFETY: a buffer that is that long and outlives the wait.
            unsafe { ends[rank].launch_by(algorithm, &sum) }.expect("launched");
        };
        launch(0);
        launch(0); // the next one does not wait again
        let late = CudaError::Rank {
            missing: 1,
            waited: wait,
        };
        assert_eq!(ends[0].check(), Err(late.clone()));
        // NaN, not half a sum.
        let mut out = [0; 2];
        buffers[0].read(0, &mut out).expect("read");
        assert!(to_f32(u16::from_ne_bytes(out)).is_nan(), "{out:?}");
        // Who comes now hears of it, and waits for nobody.
        launch(1);
        assert_eq!(ends[1].check(), Err(late));
        assert!(
            ends[0]
                .check()
                .unwrap_err()
                .to_string()
                .contains("rank 1 did not send")
        );
    }
}
