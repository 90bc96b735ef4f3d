//! GGML's number formats, to f32.
//!
//! The arithmetic is that of the reference (`dequantize_row_*` in ggml-quants.c, and `gguf.quants` in
//! Python): products and sums in f32, each rounded, in the same order.

use std::fmt;

use half::{bf16, f16};

/// A number format that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q8_0,
    Q6K,
}

/// Names of the formats by number, to say which one cannot be read.
const NAMES: [&str; 31] = [
    "F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K",
    "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S",
    "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16",
];

impl Format {
    pub(crate) fn from_id(id: u32) -> Result<Self, String> {
        Ok(match id {
            0 => Format::F32,
            1 => Format::F16,
            2 => Format::Q4_0,
            3 => Format::Q4_1,
            8 => Format::Q8_0,
            14 => Format::Q6K,
            30 => Format::Bf16,
            _ => {
                let name = NAMES.get(id as usize).copied().unwrap_or("unknown");
                return Err(format!(
                    "has the number format {name} ({id}), which is not supported; F32, F16, BF16, Q8_0, Q4_0, Q4_1 and Q6_K are"
                ));
            }
        })
    }

    /// Elements that are stored together; rows are whole blocks.
    pub(crate) fn block_elements(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q8_0 => 32,
            Format::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub(crate) fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q8_0 => 34,
            Format::Q6K => 210,
        }
    }

    /// Append the elements of whole blocks.
    pub(crate) fn dequantize(self, blocks: &[u8], out: &mut Vec<f32>) {
        let blocks = blocks.chunks_exact(self.block_bytes());
        assert!(blocks.remainder().is_empty(), "whole blocks only");
        match self {
            Format::F32 => out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            Format::F16 => out.extend(blocks.map(|b| half_at(b, 0))),
            Format::Bf16 => out.extend(blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
            Format::Q4_0 => blocks.for_each(|b| q4_0(b, out)),
            Format::Q4_1 => blocks.for_each(|b| q4_1(b, out)),
            Format::Q8_0 => blocks.for_each(|b| q8_0(b, out)),
            Format::Q6K => blocks.for_each(|b| q6_k(b, out)),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::Bf16 => "BF16",
            Format::Q4_0 => "Q4_0",
            Format::Q4_1 => "Q4_1",
            Format::Q8_0 => "Q8_0",
            Format::Q6K => "Q6_K",
        })
    }
}

/// `[scale f16][16 bytes]`: low nibbles are elements 0..16, high ones 16..32; `(q - 8) * scale`.
fn q4_0(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    let quants = &block[2..18];
    out.extend(quants.iter().map(|q| f32::from((q & 15) as i8 - 8) * scale));
    out.extend(quants.iter().map(|q| f32::from((q >> 4) as i8 - 8) * scale));
}

/// `[scale f16][minimum f16][16 bytes]`, nibbles as in Q4_0; `q * scale + minimum`.
fn q4_1(block: &[u8], out: &mut Vec<f32>) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let quants = &block[4..20];
    out.extend(quants.iter().map(|q| f32::from(q & 15) * scale + minimum));
    out.extend(quants.iter().map(|q| f32::from(q >> 4) * scale + minimum));
}

/// `[scale f16][32 × i8]`; `q * scale`.
fn q8_0(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    out.extend(block[2..34].iter().map(|&q| f32::from(q as i8) * scale));
}

/// `[128 bytes of low nibbles][64 bytes of high bit pairs][16 scales i8][scale f16]`: 256 elements in two
/// halves of four runs of 32; `(scale * scales[run of 16]) * (q - 32)`.
fn q6_k(block: &[u8], out: &mut Vec<f32>) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, scale) = rest.split_at(16);
    let scale = half_at(scale, 0);
    for half in 0..2 {
        let (low, high, scales) = (&low[half * 64..], &high[half * 32..], &scales[half * 8..]);
        for run in 0..4 {
            for i in 0..32 {
                let nibble = (low[i + 32 * (run % 2)] >> (4 * (run / 2))) & 15;
                let pair = (high[i] >> (2 * run)) & 3;
                let quant = (nibble | (pair << 4)) as i8 - 32;
                let scale = scale * f32::from(scales[2 * run + i / 16] as i8);
                out.push(scale * f32::from(quant));
            }
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}
