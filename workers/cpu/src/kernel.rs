//! Which instructions to use, and one table of functions compiled for each choice.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::attention::{Attention, Piece, Scratch, attend};
use crate::error::CpuError;
use crate::gemm::{Product, portable::Portable, product};
use crate::math;
use crate::pack::K_STEP;
use crate::qkv::{Qkv, rotate};

/// The environment variable that names the kernel to take instead of the best one: to measure, or to test what other machines
/// compute with.
pub const KERNEL_VARIABLE: &str = "BATON_CPU_KERNEL";

/// A set of instructions, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    /// AMX tiles in BF16 for the weights, AVX512-BF16 for the rest (Intel, Sapphire Rapids and later).
    Amx,
    /// `vdpbf16ps` (AMD Zen 4 and later, Intel Cooper Lake and later).
    Avx512Bf16,
    /// Eight f32 lanes with fused multiply-add.
    Avx2,
    /// Plain Rust, with AVX's registers where there are any: the same bits with and without.
    Portable,
}

impl Kernel {
    /// All of them, best first.
    pub const ALL: [Self; 4] = [Self::Amx, Self::Avx512Bf16, Self::Avx2, Self::Portable];

    /// Whether this CPU and operating system can run it.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bf16");
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            match self {
                Self::Amx => avx512 && amx_bf16() && crate::gemm::amx::permitted(),
                Self::Avx512Bf16 => avx512,
                Self::Avx2 => avx2,
                Self::Portable => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// The best one available.
    pub fn best() -> Self {
        Self::ALL
            .into_iter()
            .find(|k| k.available())
            .unwrap_or(Self::Portable)
    }

    /// The one that [`KERNEL_VARIABLE`] names, or the best one available.
    ///
    /// # Errors
    /// [`CpuError::KernelName`] if it names none, [`CpuError::Kernel`] if this CPU does not have it.
    pub fn chosen() -> Result<Self, CpuError> {
        let Some(name) = std::env::var_os(KERNEL_VARIABLE).filter(|name| !name.is_empty()) else {
            return Ok(Self::best());
        };
        let kernel: Self = name
            .to_string_lossy()
            .parse()
            .map_err(CpuError::KernelName)?;
        kernel.usable()
    }

    /// This one, if this CPU has it.
    ///
    /// # Errors
    /// [`CpuError::Kernel`].
    pub fn usable(self) -> Result<Self, CpuError> {
        match self.available() {
            true => Ok(self),
            false => Err(CpuError::Kernel(self.to_string())),
        }
    }

    /// This one, or the next best for ranks with these parts of K: where they are no whole tiles of AMX, its bits
    /// would depend on the number of ranks.
    pub fn for_parts(self, parts: &[usize]) -> Self {
        match self {
            Self::Amx if !parts.iter().all(|k| k.is_multiple_of(K_STEP)) => Self::Avx512Bf16,
            kernel => kernel,
        }
    }

    pub(crate) fn ops(self) -> &'static Ops {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => &amx::OPS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => &avx512::OPS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => &avx2::OPS,
            #[cfg(target_arch = "x86_64")]
            Self::Portable if is_x86_feature_detected!("avx") => &portable_avx::OPS,
            _ => &portable::OPS,
        }
    }
}

/// Plain Rust as it was compiled for the least and for the most that this CPU may have.
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) fn portable_ops() -> [&'static Ops; 2] {
    [&portable::OPS, Kernel::Portable.ops()]
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amx => "amx-bf16",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        })
    }
}

impl FromStr for Kernel {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|k| k.to_string() == s)
            .ok_or_else(|| format!("no kernel {s:?}: amx-bf16, avx512-bf16, avx2 or portable"))
    }
}

/// CPUID leaf 7: AMX-BF16 and AMX-TILE. The standard library's detection of them is not stable.
#[cfg(target_arch = "x86_64")]
fn amx_bf16() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && {
        let edx = __cpuid_count(7, 0).edx;
        edx & (1 << 22) != 0 && edx & (1 << 24) != 0
    }
}

/// The operations of a step, compiled for one kernel.
pub struct Ops {
    pub product: unsafe fn(&Product<'_>, Range<usize>, Range<usize>, &[u16]),
    pub attend: unsafe fn(&Attention<'_>, &Piece, Option<&Piece>, &mut Scratch),
    pub rotate: unsafe fn(&Qkv<'_>, Range<usize>),
    pub rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [u16]),
    pub widen: unsafe fn(&[u16], &mut [f32]),
}

/// Compiles the operations with some target features on. The bodies are `#[inline(always)]`, so they are
/// compiled, and vectorised, again inside each of these functions.
macro_rules! compile {
    ($name:ident, $features:meta, $weights:ty, $attention:ty) => {
        mod $name {
            use super::*;

            pub static OPS: Ops = Ops {
                product: run_product,
                attend: run_attend,
                rotate: run_rotate,
                rms_norm,
                widen,
            };

            #[$features]
            unsafe fn run_product(
                job: &Product<'_>,
                rows: Range<usize>,
                panels: Range<usize>,
                next: &[u16],
            ) {
                // SAFETY: the caller's promise.
                unsafe { product::<$weights>(job, rows, panels, next) }
            }

            #[$features]
            unsafe fn run_attend(
                job: &Attention<'_>,
                piece: &Piece,
                next: Option<&Piece>,
                scratch: &mut Scratch,
            ) {
                // SAFETY: the caller's promise.
                unsafe { attend::<$attention>(job, piece, next, scratch) }
            }

            #[$features]
            unsafe fn run_rotate(job: &Qkv<'_>, rows: Range<usize>) {
                // SAFETY: the caller's promise.
                unsafe { rotate(job, rows) }
            }

            #[$features]
            unsafe fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [u16]) {
                math::rms_norm(x, weight, eps, out)
            }

            #[$features]
            unsafe fn widen(x: &[u16], out: &mut [f32]) {
                for (out, x) in out.iter_mut().zip(x) {
                    *out = math::f32_of(*x);
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
use crate::gemm::{amx::Amx, avx2::Avx2, avx512::Avx512};

#[cfg(target_arch = "x86_64")]
compile!(
    amx,
    target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"),
    Amx,
    Avx512
);
#[cfg(target_arch = "x86_64")]
compile!(
    avx512,
    target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"),
    Avx512,
    Avx512
);
#[cfg(target_arch = "x86_64")]
compile!(avx2, target_feature(enable = "avx2,fma"), Avx2, Avx2);
#[cfg(target_arch = "x86_64")]
compile!(
    portable_avx,
    target_feature(enable = "avx"),
    Portable,
    Portable
);
compile!(portable, cfg(all()), Portable, Portable);
