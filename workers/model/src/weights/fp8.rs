//! Matrices of e4m3 numbers with scales: `weight[o][i] = e4m3(codes[o][i]) * scale(o, i)`.

use std::borrow::Cow;

use half::bf16;

use super::e4m3::{E4M3_MAX, e4m3_from_f32, f32_from_e4m3};

/// Rows and columns that share a scale in [`Fp8Scales::Block`].
pub const BLOCK: usize = 128;

/// A matrix `[out][in]` of e4m3 numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Matrix<'a> {
    /// Output channels.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// `rows * columns` codes, row after row.
    pub codes: Cow<'a, [u8]>,
    /// What they are multiplied by.
    pub scales: Fp8Scales,
}

/// Scales of a matrix `[out][in]`.
#[derive(Clone, Debug, PartialEq)]
pub enum Fp8Scales {
    /// One for each output channel, `[out]`.
    Channel(Vec<f32>),
    /// One for each block of [`BLOCK`]×[`BLOCK`], `[ceil(out / 128)][ceil(in / 128)]`, row after row.
    Block(Vec<f32>),
}

impl Fp8Matrix<'static> {
    /// The nearest matrix with a scale for each output channel: the row's largest magnitude becomes 448.
    /// `weights` are little-endian BF16, `[rows][columns]`, and finite.
    pub fn per_channel(weights: &[u8], rows: usize, columns: usize) -> Self {
        let mut codes = Vec::with_capacity(rows * columns);
        let scales = weights
            .chunks_exact(columns * 2)
            .map(|row| quantize_row(row, &mut codes))
            .collect();
        Fp8Matrix {
            rows,
            columns,
            codes: codes.into(),
            scales: Fp8Scales::Channel(scales),
        }
    }

    /// The same with a scale for each block.
    pub fn per_block(weights: &[u8], rows: usize, columns: usize) -> Self {
        let across = columns.div_ceil(BLOCK);
        let mut largest = vec![0f32; rows.div_ceil(BLOCK) * across];
        let numbers = || numbers(weights).enumerate();
        let block = |i: usize| i / columns / BLOCK * across + i % columns / BLOCK;
        for (i, number) in numbers() {
            let largest = &mut largest[block(i)];
            *largest = largest.max(number.abs());
        }
        let scales: Vec<f32> = largest.into_iter().map(scale_for).collect();
        let codes: Vec<u8> = numbers()
            .map(|(i, number)| e4m3_from_f32(number / scales[block(i)]))
            .collect();
        Fp8Matrix {
            rows,
            columns,
            codes: codes.into(),
            scales: Fp8Scales::Block(scales),
        }
    }
}

impl Fp8Matrix<'_> {
    /// What the code of an output channel and an input is multiplied by.
    pub fn scale(&self, row: usize, column: usize) -> f32 {
        self.scales.at(self.columns, row, column)
    }

    /// Appends the whole matrix as little-endian BF16: each number times its scale, rounded to nearest, ties to even.
    pub fn dequantize(&self, out: &mut Vec<u8>) {
        out.reserve(self.rows * self.columns * 2);
        for (row, codes) in self.codes.chunks_exact(self.columns).enumerate() {
            dequantize_row(codes, |column| self.scale(row, column), out);
        }
    }
}

impl Fp8Scales {
    /// The scale of an output channel and an input of a matrix with so many columns.
    pub fn at(&self, columns: usize, row: usize, column: usize) -> f32 {
        match self {
            Fp8Scales::Channel(scales) => scales[row],
            Fp8Scales::Block(scales) => {
                scales[row / BLOCK * columns.div_ceil(BLOCK) + column / BLOCK]
            }
        }
    }
}

/// Appends the codes of a row of little-endian BF16 numbers, all finite, and returns their scale.
pub fn quantize_row(row: &[u8], codes: &mut Vec<u8>) -> f32 {
    let scale = scale_for(numbers(row).fold(0f32, |largest, number| largest.max(number.abs())));
    codes.extend(numbers(row).map(|number| e4m3_from_f32(number / scale)));
    scale
}

/// Appends a row of codes times their scales as little-endian BF16, rounded to nearest, ties to even.
pub fn dequantize_row(codes: &[u8], scale: impl Fn(usize) -> f32, out: &mut Vec<u8>) {
    out.extend(codes.iter().enumerate().flat_map(|(column, &code)| {
        bf16::from_f32(f32_from_e4m3(code) * scale(column)).to_le_bytes()
    }));
}

/// The scale that maps the largest magnitude of a channel or block to the largest e4m3 number. Zeros alone
/// get 1. A scale is never so small that `f32` loses digits of it.
fn scale_for(largest: f32) -> f32 {
    match largest {
        0.0 => 1.0,
        _ => (largest / E4M3_MAX).max(f32::MIN_POSITIVE),
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes
        .as_chunks::<2>()
        .0
        .iter()
        .map(|&bytes| bf16::from_le_bytes(bytes).to_f32())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(numbers: &[f32]) -> Vec<u8> {
        numbers
            .iter()
            .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
            .collect()
    }

    /// Half the distance of the e4m3 numbers around this one.
    fn half_ulp(number: f32) -> f32 {
        let exponent = number.abs().max(0.015_625).log2().floor() as i32;
        2f32.powi(exponent - 4)
    }

    /// Finite BF16 numbers of all sizes, zeros and subnormal ones too.
    fn finite() -> impl Strategy<Value = f32> {
        any::<u16>().prop_filter_map("finite", |bits| {
            let number = bf16::from_bits(bits).to_f32();
            number.is_finite().then_some(number)
        })
    }

    fn matrix() -> impl Strategy<Value = (usize, usize, Vec<f32>)> {
        let near = (-1e3f32..1e3).prop_map(|x| bf16::from_f32(x * x * x).to_f32());
        (1usize..5, 1usize..300).prop_flat_map(move |(rows, columns)| {
            let numbers = proptest::collection::vec(
                prop_oneof![4 => near.clone(), 1 => finite()],
                rows * columns,
            );
            (Just(rows), Just(columns), numbers)
        })
    }

    proptest! {
        #[test]
        fn each_number_is_off_by_half_an_ulp_times_the_scale((rows, columns, numbers) in matrix()) {
            let bytes = bytes(&numbers);
            for matrix in [
                Fp8Matrix::per_channel(&bytes, rows, columns),
                Fp8Matrix::per_block(&bytes, rows, columns),
            ] {
                for (i, (&number, &code)) in numbers.iter().zip(matrix.codes.iter()).enumerate() {
                    let scale = matrix.scale(i / columns, i % columns);
                    prop_assert!(scale.is_normal() && scale > 0.0);
                    let (number, scale) = (f64::from(number), f64::from(scale));
                    let error = (f64::from(f32_from_e4m3(code)) * scale - number).abs();
                    // The division by the scale rounds once in f32 before it rounds in e4m3.
                    let bound = f64::from(half_ulp((number / scale) as f32)) * scale * (1.0 + 1e-5);
                    prop_assert!(error <= bound, "{number} became {code:#04x} × {scale}");
                }
            }
        }

        #[test]
        fn a_matrix_that_was_fp8_comes_back((rows, columns, numbers) in matrix()) {
            let once = Fp8Matrix::per_channel(&bytes(&numbers), rows, columns);
            let mut bf16 = Vec::new();
            once.dequantize(&mut bf16);
            prop_assert_eq!(bf16.len(), rows * columns * 2);
            let twice = Fp8Matrix::per_channel(&bf16, rows, columns);
            prop_assert_eq!(once.codes, twice.codes);
        }
    }

    #[test]
    fn scales_are_where_they_belong() {
        let (rows, columns) = (BLOCK + 1, 2 * BLOCK + 3);
        let mut numbers = vec![0.0; rows * columns];
        numbers[0] = 448.0;
        numbers[BLOCK * columns + 2 * BLOCK] = -896.0;
        let bytes = bytes(&numbers);
        let blocks = Fp8Matrix::per_block(&bytes, rows, columns);
        assert_eq!(
            blocks.scales,
            Fp8Scales::Block(vec![1.0, 1.0, 1.0, 1.0, 1.0, 2.0])
        );
        assert_eq!(blocks.codes[BLOCK * columns + 2 * BLOCK], 0xfe);
        assert_eq!(blocks.scale(BLOCK, 2 * BLOCK + 2), 2.0);
        assert_eq!(blocks.scale(BLOCK - 1, 2 * BLOCK + 2), 1.0);
        let channels = Fp8Matrix::per_channel(&bytes, rows, columns);
        let Fp8Scales::Channel(scales) = &channels.scales else {
            panic!("{:?}", channels.scales)
        };
        assert_eq!(scales.len(), rows);
        assert_eq!((scales[0], scales[1], scales[BLOCK]), (1.0, 1.0, 2.0));
    }

    #[test]
    fn numbers_at_the_edges_of_bf16_survive() {
        for number in [f32::MIN_POSITIVE, 1e-40, 3.3e38, -3.3e38] {
            let bytes = bytes(&[number, 0.0]);
            let matrix = Fp8Matrix::per_channel(&bytes, 1, 2);
            let mut out = Vec::new();
            matrix.dequantize(&mut out);
            assert!(numbers(&out).all(f32::is_finite), "{number}");
        }
    }
}
