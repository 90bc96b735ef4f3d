//! Passes over whole rows of logits, written so that the compiler vectorises them with the result fixed, whatever the
//! width of the machine's vectors.

/// Partial results per pass; also the width of the inner loops.
const LANES: usize = 16;

/// Logits whose weights are summed as one before a draw looks for its token.
pub const GROUP: usize = 256;

/// Replace NaN by minus infinity and plus infinity by the largest finite number; the largest
/// number, or minus infinity if there is none.
pub fn clean_and_max(logits: &mut [f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = logits.as_chunks_mut::<LANES>();
    let clean = |x: f32| {
        let x = if x.is_nan() { f32::NEG_INFINITY } else { x };
        if x > f32::MAX { f32::MAX } else { x }
    };
    for chunk in chunks {
        for (x, lane) in chunk.iter_mut().zip(&mut lanes) {
            *x = clean(*x);
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    for (x, lane) in rest.iter_mut().zip(&mut lanes) {
        *x = clean(*x);
        *lane = if *x > *lane { *x } else { *lane };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// The lowest index that holds `value`; 0 if none does.
pub fn position(logits: &[f32], value: f32) -> u32 {
    let (chunks, _) = logits.as_chunks::<LANES>();
    let holds = |chunk: &[f32; LANES]| chunk.iter().fold(false, |any, x| any | (*x == value));
    let first = chunks.iter().position(holds).unwrap_or(chunks.len()) * LANES;
    let within = logits[first..].iter().position(|x| *x == value);
    within.map_or(0, |offset| (first + offset) as u32)
}

/// What a token weighs in a draw: `exp((logit - peak) * scale)` in units of 2^-[`UNIT_BITS`].
///
/// Weights are integers so that their sums do not depend on the order in which they are taken: an executor that samples
/// where the logits are adds them up as it likes and draws the same token. A row of up to 2^19 weights fits in 64 bits.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// The largest logit; it weighs 1.
    pub peak: f32,
    /// Inverse of the temperature.
    pub scale: f32,
    /// Lighter tokens weigh nothing.
    pub weight_min: f32,
}

/// Bits after the point of a weight.
pub const UNIT_BITS: u32 = 44;

impl Weights {
    /// A logit's weight.
    pub fn of(&self, logit: f32) -> u64 {
        units(self.fraction(logit))
    }

    /// The weight of each [`GROUP`] of logits; those under `logit_min` count nothing.
    pub fn groups(&self, logits: &[f32], logit_min: f32) -> Vec<u64> {
        let group = |group: &[f32]| self.sum(group, logit_min);
        logits.chunks(GROUP).map(group).collect()
    }

    /// The weight of all logits.
    pub fn total(&self, logits: &[f32]) -> u64 {
        self.sum(logits, f32::NEG_INFINITY)
    }

    /// The weight of all logits but those under `logit_min`.
    fn sum(&self, logits: &[f32], logit_min: f32) -> u64 {
        let weight = |x: f32| if x < logit_min { 0.0 } else { self.fraction(x) };
        let mut lanes = [0u64; LANES];
        let (chunks, rest) = logits.as_chunks::<LANES>();
        for chunk in chunks {
            // Two loops, each over numbers of one width: in one loop the compiler takes them one at a time, three times slower.
            let mut fractions = [0.0; LANES];
            for (fraction, x) in fractions.iter_mut().zip(chunk) {
                *fraction = weight(*x);
            }
            for (lane, fraction) in lanes.iter_mut().zip(fractions) {
                *lane += units(fraction);
            }
        }
        let rest: u64 = rest.iter().map(|x| units(weight(*x))).sum();
        lanes.iter().sum::<u64>() + rest
    }

    /// A logit's weight, 1 for the best.
    #[inline(always)]
    fn fraction(&self, logit: f32) -> f32 {
        let weight = exp((logit - self.peak) * self.scale);
        if weight < self.weight_min {
            0.0
        } else {
            weight
        }
    }
}

/// A number between 0 and 1 in units.
#[inline(always)]
fn units(fraction: f32) -> u64 {
    /// The lowest bit of a number between 256 and 512 is 2^-44: adding rounds to units.
    const ROUND: f64 = (1u64 << (52 - UNIT_BITS)) as f64;
    (f64::from(fraction) + ROUND).to_bits() - ROUND.to_bits()
}

/// `e^x` for `x <= 0`, relative error under 3e-7, and 0 below -87 where `f32` ends.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, the Taylor polynomial of degree 6 for `e^r` (its remainder is
/// `r^7 / 5040 < 1.2e-7`), and `n` added to the exponent. Only multiplications and additions, so that a row
/// of 150,000 logits takes vector instructions instead of as many calls of libm.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it leaves the nearest integer in the lowest mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let bounded = if x > -87.0 { x } else { -87.0 };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.0 / 720.0;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    // The integer n stands in the low bits of `shifted`; its high bits leave on the left.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_real_one() {
        let mut worst = 0.0f64;
        for i in 0..870_000 {
            let x = -(i as f32) / 10_000.0;
            let truth = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - truth).abs() / truth);
        }
        assert!(worst < 3e-7, "relative error {worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn weights_are_exp_in_units() {
        let weights = Weights {
            peak: 3.0,
            scale: 2.0,
            weight_min: 1e-3,
        };
        assert_eq!(weights.of(3.0), 1 << UNIT_BITS);
        assert_eq!(weights.of(f32::NEG_INFINITY), 0);
        assert_eq!(weights.of(-0.5), 0);
        let units = exp(-6.0) * (1u64 << UNIT_BITS) as f32;
        assert_eq!(weights.of(0.0), units as u64);
        let row: Vec<f32> = (0..1000).map(|i| i as f32 * 0.003).collect();
        let groups = weights.groups(&row, f32::NEG_INFINITY);
        assert_eq!(groups.len(), 4);
        assert_eq!(groups.iter().sum::<u64>(), weights.total(&row));
    }

    #[test]
    fn max_and_position_see_every_element() {
        for len in [1, 15, 16, 17, 255, 1000] {
            for at in [0, len / 2, len - 1] {
                let mut row = vec![-3.0; len];
                row[at] = 2.0;
                if at > 0 {
                    row[0] = f32::NAN;
                }
                assert_eq!(clean_and_max(&mut row), 2.0);
                assert_eq!(position(&row, 2.0) as usize, at);
                assert!(row.iter().all(|x| !x.is_nan()));
            }
        }
        assert_eq!(clean_and_max(&mut [f32::INFINITY]), f32::MAX);
        assert_eq!(clean_and_max(&mut []), f32::NEG_INFINITY);
    }
}
