//! The tile for AMX-BF16: `tdpbf16ps` through inline assembly, 32 rows of 32 columns.
//!
//! Four accumulator tiles (2 × 16 rows by 2 × 16 columns), two of activations, two of the panel: eight, all
//! there are. Tiles always have sixteen rows: fewer rows read the padding of the activation buffer, whose sums
//! are thrown away, so a row sums the same however many stand beside it. An instruction sums 32 numbers of K by
//! themselves and adds that to `C` (Intel SDM, TDPBF16PS): parts of K that are no multiple of 32 would have other
//! bits than the whole ([`Kernel::for_parts`](crate::Kernel::for_parts)).

use std::arch::asm;
use std::sync::OnceLock;

use super::{Prefetch, Tile};

/// Products of weights only; attention uses the AVX512 tile, whose fewer rows fit it better.
pub struct Amx;

/// Layout that `ldtilecfg` reads (Intel SDM, volume 1, 18.3.2).
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Asks the kernel, once per process, for the right to use tile data: 8 KiB more of register state.
pub fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: a system call that takes two numbers; an older kernel answers with an error.
        unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            ) == 0
        }
    })
}

impl Tile for Amx {
    const ROWS: usize = 32;

    #[inline(always)]
    unsafe fn begin() {
        // SAFETY: the configuration is a valid palette 1; the process has permission.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
    }

    #[inline(always)]
    unsafe fn end() {
        // SAFETY: releases what `begin` configured.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    #[inline(always)]
    unsafe fn run(
        rows: usize,
        a: *const u16,
        lda: usize,
        b: *const u16,
        pairs: usize,
        c: *mut f32,
        ldc: usize,
        load: bool,
        _: Prefetch,
    ) {
        debug_assert!(pairs.is_multiple_of(16), "weights have whole tiles of K");
        let steps = pairs / 16;
        // SAFETY: `a` is readable for 16 or 32 rows (the caller pads its buffers to that), a panel is `steps`
        // tiles of 16 rows of 128 bytes, `c` holds 32 rows (the caller's scratch).
        unsafe {
            if rows <= 16 {
                asm!(
                    "test {load:e}, {load:e}",
                    "jnz 3f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "jmp 2f",
                    "3:",
                    "tileloadd tmm0, [{c} + {ldc}*1]",
                    "tileloadd tmm1, [{c} + {ldc}*1 + 64]",
                    "2:",
                    "tileloadd tmm4, [{a} + {lda}*1]",
                    "tileloadd tmm6, [{b} + {ldb}*1]",
                    "tileloadd tmm7, [{b} + {ldb}*1 + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a}, 64",
                    "add {b}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {ldc}*1], tmm0",
                    "tilestored [{c} + {ldc}*1 + 64], tmm1",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    steps = inout(reg) steps => _,
                    load = in(reg) u32::from(load),
                    lda = in(reg) 2 * lda,
                    ldb = in(reg) 128usize,
                    c = in(reg) c,
                    ldc = in(reg) 4 * ldc,
                    options(nostack)
                );
            } else {
                asm!(
                    "test {load:e}, {load:e}",
                    "jnz 3f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 2f",
                    "3:",
                    "tileloadd tmm0, [{c} + {ldc}*1]",
                    "tileloadd tmm1, [{c} + {ldc}*1 + 64]",
                    "tileloadd tmm2, [{c2} + {ldc}*1]",
                    "tileloadd tmm3, [{c2} + {ldc}*1 + 64]",
                    "2:",
                    "tileloadd tmm6, [{b} + {ldb}*1]",
                    "tileloadd tmm4, [{a} + {lda}*1]",
                    "tileloadd tmm7, [{b} + {ldb}*1 + 64]",
                    "tileloadd tmm5, [{a2} + {lda}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 64",
                    "add {a2}, 64",
                    "add {b}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {ldc}*1], tmm0",
                    "tilestored [{c} + {ldc}*1 + 64], tmm1",
                    "tilestored [{c2} + {ldc}*1], tmm2",
                    "tilestored [{c2} + {ldc}*1 + 64], tmm3",
                    a = inout(reg) a => _,
                    a2 = inout(reg) a.add(16 * lda) => _,
                    b = inout(reg) b => _,
                    steps = inout(reg) steps => _,
                    load = in(reg) u32::from(load),
                    lda = in(reg) 2 * lda,
                    ldb = in(reg) 128usize,
                    c = in(reg) c,
                    c2 = in(reg) c.add(16 * ldc),
                    ldc = in(reg) 4 * ldc,
                    options(nostack)
                );
            }
        }
    }
}
