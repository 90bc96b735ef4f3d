//! Scalar and lane arithmetic, written so that the compiler vectorises it for whichever kernel inlines it.
//!
//! Everything here is `#[inline(always)]`: inside a function with `#[target_feature]` it is compiled for
//! that feature. Sums over a row use sixteen partial sums, whatever the vector length, so that all kernels
//! but their products agree to the bit.

/// Partial sums of a reduction over a row.
pub const LANES: usize = 16;

/// BF16 to f32, exactly.
#[inline(always)]
pub fn f32_of(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 to BF16, to nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub fn bf16_of(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    (if x.is_nan() { 0x7fc0 } else { rounded }) as u16
}

/// `2^x` to about one unit in the last place; zero below -126, infinity from 128.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves an integer in the low bits
    let clamped = x.clamp(-126.0, 127.0);
    let shifted = clamped + ROUND;
    let f = clamped - (shifted - ROUND);
    // Taylor series of 2^f on [-0.5, 0.5]; the first dropped term is under 2e-7.
    let mut p = 1.540_353e-4;
    p = p * f + 1.333_355_8e-3;
    p = p * f + 9.618_129e-3;
    p = p * f + 5.550_411e-2;
    p = p * f + 2.402_265e-1;
    p = p * f + std::f32::consts::LN_2;
    p = p * f + 1.0;
    // The integer lies in [-126, 127], so the exponent field lies in [1, 254].
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127);
    let scale = f32::from_bits(exponent << 23);
    let y = p * scale;
    let y = if x < -126.0 { 0.0 } else { y };
    if x >= 128.0 { f32::INFINITY } else { y }
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp2(x * -std::f32::consts::LOG2_E))
}

/// Adds sixteen partial sums in a fixed tree.
#[inline(always)]
pub fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut s = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            s[i] += s[i + width];
        }
        width /= 2;
    }
    s[0]
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            lanes[i] += chunk[i] * chunk[i];
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += value * value;
    }
    1.0 / (sum_lanes(lanes) / x.len() as f32 + eps).sqrt()
}

/// RMSNorm of one row, rounded to BF16: `out = bf16(x / rms(x) * weight)`.
#[inline(always)]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [u16]) {
    let scale = inverse_rms(x, eps);
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = bf16_of(x * scale * w);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even() {
        for bits in (0..u32::MAX).step_by(65_521) {
            let x = f32::from_bits(bits);
            let (ours, theirs) = (bf16_of(x), half::bf16::from_f32(x));
            if x.is_nan() {
                assert!(f32_of(ours).is_nan());
            } else {
                assert_eq!(ours, theirs.to_bits(), "{x:e}");
                assert_eq!(f32_of(ours), theirs.to_f32());
            }
        }
    }

    #[test]
    fn exp2_is_close_everywhere_and_exact_at_its_ends() {
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp2(-127.0), 0.0);
        assert_eq!(exp2(f32::INFINITY), f32::INFINITY);
        let mut x = -125.9f32;
        while x < 127.0 {
            let truth = f64::from(x).exp2();
            let error = (f64::from(exp2(x)) - truth).abs() / truth;
            assert!(error < 4e-7, "2^{x}: relative error {error:e}");
            x += 0.0137;
        }
    }

    #[test]
    fn silu_has_its_limits() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(200.0), 200.0);
        assert_eq!(silu(-200.0), 0.0);
        assert!((f64::from(silu(1.5)) - 1.5 / (1.0 + (-1.5f64).exp())).abs() < 1e-6);
    }

    #[test]
    fn reductions_take_any_length() {
        for n in [1usize, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
            assert!((f64::from(inverse_rms(&x, 1e-5)) * (mean + 1e-5).sqrt() - 1.0).abs() < 1e-6);
        }
    }
}
