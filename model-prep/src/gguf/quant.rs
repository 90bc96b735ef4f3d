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

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes whose low nibbles count up from 0 and whose high nibbles count down from 15.
    fn nibbles() -> impl Iterator<Item = u8> {
        (0..16).map(|i| i | ((15 - i) << 4))
    }

    fn f16_bytes(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }

    fn dequantized(format: Format, block: &[u8]) -> Vec<f32> {
        assert_eq!(block.len() % format.block_bytes(), 0);
        let mut out = Vec::new();
        format.dequantize(block, &mut out);
        out
    }

    #[test]
    fn q4_0_is_a_scale_times_a_nibble_less_8() {
        let block: Vec<u8> = f16_bytes(0.5).into_iter().chain(nibbles()).collect();
        let expected = [
            -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5,
            3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -3.5, -4.0,
        ];
        assert_eq!(dequantized(Format::Q4_0, &block), expected);
    }

    #[test]
    fn q4_1_is_a_scale_times_a_nibble_plus_a_minimum() {
        let header = [f16_bytes(0.5), f16_bytes(-3.0)].concat();
        let block: Vec<u8> = header.into_iter().chain(nibbles()).collect();
        let expected = [
            -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5,
            4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0,
        ];
        assert_eq!(dequantized(Format::Q4_1, &block), expected);
    }

    #[test]
    fn q8_0_is_a_scale_times_a_signed_byte() {
        let quants = (0..32).map(|i| (i * 8 - 121) as i8 as u8);
        let block: Vec<u8> = f16_bytes(-0.125).into_iter().chain(quants).collect();
        let expected: Vec<f32> = (0..32).map(|i| 15.125 - i as f32).collect();
        assert_eq!(dequantized(Format::Q8_0, &block), expected);
    }

    /// The values come from the Python package `gguf` 0.19, times four.
    #[test]
    fn q6_k_agrees_with_the_reference() {
        let mut state = 12345u32;
        let mut block: Vec<u8> = (0..208)
            .map(|_| {
                state = state.wrapping_mul(1_103_515_245).wrapping_add(12345) & 0x7FFF_FFFF;
                (state >> 16) as u8
            })
            .collect();
        block.extend(f16_bytes(0.25));
        #[rustfmt::skip]
        let expected = [
            -3024, -432, -2268, -1080, 1836, 2052, 324, 2376, -2808, 2916, -3024, -1188, 1944,
            -1620, -324, 3456, -2599, 3164, 3277, -3616, 3503, 1017, -1921, -3616, 1469, -1356,
            3164, 2260, -339, -3390, -2373, 2486, 1440, -1140, 1320, -120, -900, 1020, -1800, -420,
            -480, -540, -1020, -840, 420, 1920, 1260, -1440, 210, -462, 504, 1050, -294, 42, -42,
            252, -1092, -588, 588, 630, 1176, -966, 882, -126, -2436, 2688, -1848, 1848, -1428, 504,
            1260, -420, -2436, -2520, 504, -1428, -84, -1764, 1260, -1932, -954, -2756, 3286, -1590,
            -1802, 1802, 2756, 2332, 1802, 0, -636, -530, 1802, -1696, 1908, 2120, -2001, -2001,
            -261, 1479, -2523, -1827, -2262, 435, 0, -1827, 261, -2610, 2523, -1479, -2436, -1740,
            -1288, 616, 1568, -448, 112, 56, 840, -1792, -1176, 336, 112, -1064, -1624, -952, -728,
            1736, 1260, -240, -1440, -600, 420, 1200, 720, 780, 840, -840, -1320, 60, -1140, -600,
            180, -1680, 468, 1521, -1755, -2106, 1053, -1989, 1872, -1170, -2925, -2340, 3276, 468,
            -1053, -1638, -1170, 1521, -684, 912, -1425, 1254, -1140, -513, 1482, 1482, 0, -1539,
            1653, 570, -228, 1710, 798, 627, -2407, -913, 2407, 747, 913, -830, 498, -830, -1992,
            498, -1162, -2241, -332, 664, 2158, 1494, 1000, -350, 900, 600, 0, 1150, -600, -250, 0,
            1050, -350, -550, -1050, -100, -1300, -300, -1064, -784, 1344, -560, -560, -336, -112,
            -112, 1344, -1568, -392, 896, -112, 728, 1064, 280, -28, 44, -8, 60, -2, 46, -34, 16,
            -44, -4, 18, 4, 60, -52, 34, -6, 496, -124, 837, 713, -961, -806, 682, -899, 186, -651,
            -248, -93, 217, -496, 620, 279,
        ];
        let expected = expected.map(|n| n as f32 / 4.0);
        assert_eq!(dequantized(Format::Q6K, &block), expected);
    }

    /// By hand: every quant 0 but one in each run, every scale 1 but one.
    #[test]
    fn q6_k_takes_low_nibbles_high_pairs_and_scales_from_where_the_format_says() {
        let mut block = [0u8; 210];
        block[192..208].fill(1);
        block[192 + 3] = 2; // elements 48..64
        block[192 + 8] = 0xFF; // -1: elements 128..144
        block[208..].copy_from_slice(&f16_bytes(1.0));
        block[0] = 0x5A; // element 0: low nibble 10; element 64: 5
        block[128] = 0b11_10_01_00; // high pairs of elements 0, 32, 64 and 96
        let values = dequantized(Format::Q6K, &block);
        assert_eq!(values[0], 10.0 - 32.0);
        assert_eq!(values[32], 16.0 - 32.0);
        assert_eq!(values[64], (5 + 32) as f32 - 32.0);
        assert_eq!(values[96], 48.0 - 32.0);
        assert_eq!(values[1], -32.0);
        assert_eq!(values[47..49], [-32.0, -64.0]);
        assert_eq!(values[127..129], [-32.0, 32.0]);
        assert_eq!(values[143..145], [32.0, -32.0]);
    }

    #[test]
    fn plain_formats_are_little_endian() {
        assert_eq!(dequantized(Format::F32, &[0, 0, 0x20, 0xC1]), [-10.0]);
        assert_eq!(
            dequantized(Format::F16, &[0x00, 0x3C, 0x01, 0x00]),
            [1.0, f32::powi(2.0, -24)]
        );
        assert_eq!(
            dequantized(Format::Bf16, &[0x80, 0x3F, 0x49, 0x40]),
            [1.0, 3.140625]
        );
    }

    #[test]
    fn blocks_follow_each_other() {
        let one: Vec<u8> = f16_bytes(1.0).into_iter().chain([0x88; 16]).collect();
        let two: Vec<u8> = f16_bytes(2.0).into_iter().chain([0x99; 16]).collect();
        let values = dequantized(Format::Q4_0, &[one, two].concat());
        assert_eq!(values[..32], [0.0; 32]);
        assert_eq!(values[32..], [2.0; 32]);
    }

    #[test]
    fn other_formats_are_named() {
        let error = Format::from_id(12).unwrap_err();
        assert!(error.contains("Q4_K (12)"), "{error}");
        let error = Format::from_id(u32::MAX).unwrap_err();
        assert!(error.contains("unknown (4294967295)"), "{error}");
    }
}
