//! The 8-bit floating-point format e4m3: 1 sign bit, 4 exponent bits with bias 7, 3 mantissa bits.
//!
//! Without infinities, and NaN only where all other bits are set (`S.1111.111`), as NVIDIA, PyTorch
//! (`float8_e4m3fn`) and ONNX have it; Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433.

/// Largest number: `S.1111.110`.
pub const E4M3_MAX: f32 = 448.0;

/// Code of [`E4M3_MAX`].
const MAX_CODE: u8 = 0x7e;
const NAN_CODE: u8 = 0x7f;
const SIGN: u8 = 0x80;
/// Smallest number with an implicit leading one.
const SMALLEST_NORMAL: f32 = 0.015_625; // 2^-6
/// Distance of the numbers below it, 2^-9.
const SUBNORMAL_STEP: f32 = 0.001_953_125;
/// The exponent's bias in `f32` less that in e4m3.
const BIAS_DIFFERENCE: u32 = 127 - 7;
/// Mantissa bits that `f32` has more.
const EXTRA_BITS: u32 = 23 - 3;

/// The nearest e4m3 number, ties to the even one; what is beyond [`E4M3_MAX`] becomes that. NaN stays NaN.
pub fn e4m3_from_f32(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & SIGN;
    let magnitude = value.abs();
    let code = if magnitude.is_nan() {
        NAN_CODE
    } else if magnitude >= E4M3_MAX {
        MAX_CODE
    } else if magnitude < SMALLEST_NORMAL {
        // At most 8, which is the code of the smallest normal number.
        (magnitude / SUBNORMAL_STEP).round_ties_even() as u8
    } else {
        let bits = magnitude.to_bits();
        let below_half = (1 << (EXTRA_BITS - 1)) - 1;
        let odd = (bits >> EXTRA_BITS) & 1;
        // A carry out of the mantissa makes the next power of two. Under 448 it cannot pass MAX_CODE.
        let rounded = (bits + below_half + odd) >> EXTRA_BITS;
        (rounded - (BIAS_DIFFERENCE << 3)) as u8
    };
    sign | code
}

/// The number a code stands for.
pub fn f32_from_e4m3(code: u8) -> f32 {
    let magnitude = code & !SIGN;
    let value = match magnitude {
        NAN_CODE => f32::NAN,
        0..8 => f32::from(magnitude) * SUBNORMAL_STEP,
        _ => f32::from_bits((u32::from(magnitude) + (BIAS_DIFFERENCE << 3)) << EXTRA_BITS),
    };
    if code & SIGN == 0 { value } else { -value }
}

/// Whether a code stands for no number.
pub fn e4m3_is_nan(code: u8) -> bool {
    code & !SIGN == NAN_CODE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_codes() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(f32_from_e4m3(code), value, "{code:#04x}");
        }
        assert!(f32_from_e4m3(0x7f).is_nan() && f32_from_e4m3(0xff).is_nan());
        assert!(f32_from_e4m3(0x80).is_sign_negative());
    }

    #[test]
    fn every_code_is_its_own_nearest() {
        for code in 0..=u8::MAX {
            assert_eq!(e4m3_from_f32(f32_from_e4m3(code)) & !SIGN, code & !SIGN);
            if !e4m3_is_nan(code) {
                assert_eq!(e4m3_from_f32(f32_from_e4m3(code)), code);
            }
        }
    }

    #[test]
    fn halves_go_to_even_and_too_much_to_the_largest() {
        for code in 0..MAX_CODE {
            let half = (f32_from_e4m3(code) + f32_from_e4m3(code + 1)) / 2.0;
            let even = code + (code & 1);
            assert_eq!(e4m3_from_f32(half), even, "{half}");
            assert_eq!(e4m3_from_f32(-half), even | SIGN, "{half}");
            assert_eq!(e4m3_from_f32(half.next_down()), code, "under {half}");
            assert_eq!(e4m3_from_f32(half.next_up()), code + 1, "over {half}");
        }
        for large in [448.0, 464.0, 1e30, f32::INFINITY] {
            assert_eq!(e4m3_from_f32(large), MAX_CODE);
            assert_eq!(e4m3_from_f32(-large), MAX_CODE | SIGN);
        }
        assert!(e4m3_is_nan(e4m3_from_f32(f32::NAN)));
    }

    proptest! {
        #[test]
        fn no_number_is_nearer(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assume!(value.abs() <= E4M3_MAX);
            let chosen = (f64::from(f32_from_e4m3(e4m3_from_f32(value))) - f64::from(value)).abs();
            let nearest = (0..=u8::MAX)
                .filter(|&code| !e4m3_is_nan(code))
                .map(|code| (f64::from(f32_from_e4m3(code)) - f64::from(value)).abs())
                .fold(f64::INFINITY, f64::min);
            prop_assert_eq!(chosen, nearest);
        }
    }
}
