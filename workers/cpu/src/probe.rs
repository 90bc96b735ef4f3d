//! What this machine can do, and single operations, for benchmarks. Not part of the API.

use crate::gemm::{Epilogue, Part, ROW_STEP};
use crate::kernel::Kernel;
use crate::math::bf16_of;
use crate::memory::{Carver, Pages, Shared};
use crate::pack::{PANEL, Packed};
use crate::threads::Pool;

/// A clock in seconds: of this process's processor time if it computes on one thread, else of the wall.
pub fn seconds(threads: usize) -> f64 {
    let clock = if threads == 1 {
        libc::CLOCK_PROCESS_CPUTIME_ID
    } else {
        libc::CLOCK_MONOTONIC
    };
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec; both clocks exist on every Linux.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Bytes per second that `threads` threads read from `bytes` of memory: best of `tries`.
pub fn read_bandwidth(threads: usize, bytes: usize, tries: usize) -> f64 {
    let mut pool = Pool::new(threads);
    let mut memory = Pages::<u8>::zeroed(bytes);
    memory.fill(1);
    const PIECE: usize = 1 << 20;
    let pieces = bytes / PIECE;
    let mut sums = vec![0u64; pieces];
    let best = (0..tries)
        .map(|_| {
            let since = seconds(threads);
            let out = Shared::new(&mut sums);
            pool.run(pieces, &|_, piece| {
                let (words, _) = memory[piece * PIECE..][..PIECE].as_chunks::<64>();
                let mut lanes = [0u64; 8];
                for line in words {
                    let (line, _) = line.as_chunks::<8>();
                    for i in 0..8 {
                        lanes[i] ^= u64::from_le_bytes(line[i]);
                    }
                }
                // SAFETY: one element per piece.
                unsafe { out.slice(piece, 1)[0] = lanes.iter().sum() };
            });
            (pieces * PIECE) as f64 / (seconds(threads) - since)
        })
        .fold(0.0, f64::max);
    std::hint::black_box(&sums);
    best
}

/// Floating-point operations per second of one thread's products when everything is in the first-level cache:
/// the ceiling of [`Gemm`], measured with the instruction of its kernel; for the portable one with AVX2's, if there is one.
pub fn peak_flops(kernel: Kernel) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if kernel <= Kernel::Avx512Bf16 && kernel.available() {
        // SAFETY: the features are there.
        return unsafe { peak_avx512() };
    }
    #[cfg(target_arch = "x86_64")]
    if Kernel::Avx2.available() {
        // SAFETY: as above.
        return unsafe { peak_avx2() };
    }
    let _ = kernel;
    f64::NAN
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn peak_avx512() -> f64 {
    use std::arch::x86_64::*;
    const CHAINS: usize = 20;
    const ROUNDS: usize = 2_000_000;
    let mut acc = [_mm512_set1_ps(0.5); CHAINS];
    // SAFETY: both are 64-byte vectors.
    let x: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(std::hint::black_box(1))) };
    let mut best = 0.0f64;
    for _ in 0..5 {
        let since = seconds(1);
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm512_dpbf16_ps(*acc, x, x);
            }
        }
        let flops = (ROUNDS * CHAINS * 64) as f64 / (seconds(1) - since);
        best = best.max(flops);
    }
    std::hint::black_box(acc);
    best
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn peak_avx2() -> f64 {
    use std::arch::x86_64::*;
    const CHAINS: usize = 12;
    const ROUNDS: usize = 2_000_000;
    let mut acc = [_mm256_set1_ps(0.5); CHAINS];
    let x = _mm256_set1_ps(std::hint::black_box(1e-30));
    let mut best = 0.0f64;
    for _ in 0..5 {
        let since = seconds(1);
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(x, x, *acc);
            }
        }
        let flops = (ROUNDS * CHAINS * 16) as f64 / (seconds(1) - since);
        best = best.max(flops);
    }
    std::hint::black_box(acc);
    best
}

/// A product `[rows][k] × [k][columns]` on random numbers.
pub struct Gemm {
    pool: Pool,
    kernel: Kernel,
    a: Pages<u16>,
    c: Pages<f32>,
    weights: Vec<Packed>,
    rows: usize,
    turn: usize,
}

impl Gemm {
    /// `copies` weight matrices used in turn: enough of them defeat the caches.
    pub fn new(
        kernel: Kernel,
        threads: usize,
        (rows, k, columns): (usize, usize, usize),
        copies: usize,
    ) -> Self {
        let (mut pool, mut memory) = (Pool::new(threads), Carver::default());
        let mut seed = 1u32;
        let mut random = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16_of((seed >> 8) as f32 / 16_777_216.0 - 0.5)
        };
        let column: Vec<u16> = (0..k).map(|_| random()).collect();
        let weights: Vec<Packed> = (0..copies)
            .map(|_| Packed::new(&mut pool, &mut memory, columns, k, |_| Some(&column)))
            .collect();
        let k_padded = weights[0].k;
        let mut a = Pages::zeroed((rows + ROW_STEP) * k_padded);
        a.iter_mut().for_each(|a| *a = random());
        let c = Pages::zeroed((rows + ROW_STEP) * weights[0].panels * PANEL);
        Self {
            pool,
            kernel,
            a,
            c,
            weights,
            rows,
            turn: 0,
        }
    }

    /// Computes it once; seconds.
    pub fn run(&mut self) -> f64 {
        let weights = &self.weights[self.turn % self.weights.len()];
        self.turn += 1;
        let then = &self.weights[self.turn % self.weights.len()];
        let epilogue = Epilogue::Store {
            c: self.c.as_mut_ptr(),
            ldc: weights.panels * PANEL,
            bias: None,
        };
        let since = seconds(self.pool.threads());
        let part = Part {
            a: self.a.as_ptr(),
            lda: weights.k,
            weights,
        };
        crate::gemm::multiply(
            &mut self.pool,
            self.kernel.ops(),
            &[part],
            then,
            epilogue,
            self.rows,
        );
        seconds(self.pool.threads()) - since
    }
}
