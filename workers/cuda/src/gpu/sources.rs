//! The kernel files. Each begins with its idea, its floor, its launch shape, and a line
//! `// kernel NAME spill_bytes_max=N` for each kernel in it; the tests compile them all.

/// A kernel file.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! source {
    ($constant:ident, $file:literal) => {
        #[doc = concat!("`kernels/", $file, "`.")]
        pub const $constant: Source = Source {
            name: $file,
            text: include_str!(concat!("../../kernels/", $file)),
        };
    };
}

source!(EMBED, "embed.cu");
source!(RMS_NORM, "rms_norm.cu");
source!(ROPE, "rope.cu");
source!(SWIGLU, "swiglu.cu");
source!(QUANTISE, "quantise.cu");
source!(ALL_GATHER, "all_gather.cu");
source!(ALL_REDUCE, "all_reduce.cu");
source!(ARGMAX, "argmax.cu");
source!(SAMPLE, "sample.cu");
source!(ATTENTION_DECODE, "attention_decode.cu");
source!(ATTENTION_PREFILL, "attention_prefill.cu");
source!(ATTENTION_PREFILL_SM90, "attention_prefill_sm90.cu");
source!(ATTENTION_PLAIN, "attention_plain.cu");
source!(GEMM_SKINNY, "gemm_skinny.cu");
source!(GEMM_CHAIN, "gemm_chain.cu");

macro_rules! headers {
    ($($file:literal),* $(,)?) => {
        &[$(($file, include_str!(concat!("../../kernels/", $file)))),*]
    };
}

/// What kernel files include.
pub const HEADERS: &[(&str, &str)] = headers![
    "attention.cuh",
    "attention_deal.cuh",
    "attention_sums.cuh",
    "attention_turn.cuh",
    "attention_wgmma.cuh",
    "cluster.cuh",
    "common.cuh",
    "e4m3.cuh",
    "exchange.cuh",
    "gemm_ampere.cuh",
    "gemm_chain.cuh",
    "gemm_epilogue.cuh",
    "gemm_hopper.cuh",
    "gemm_skinny.cuh",
    "pushed_sum.cuh",
    "ranks.cuh",
    "sample_block.cuh",
    "sample_search.cuh",
    "scalar.cuh",
    "wgmma.cuh",
];
