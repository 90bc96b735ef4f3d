//! Random numbers as a function of (seed, position).

/// Increment of SplitMix64: 2^64 divided by the golden ratio, made odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A number in `[0, 1)`, evenly spread, that depends on the seed and the position of the token in its
/// sequence and on nothing else. There is no state: the first token on one worker, the rest on another
/// and a retry on a third draw the same numbers.
///
/// `mix(mix(seed + G) + (position + 1) G)`, its upper 53 bits as a fraction, where `mix` is the finaliser of
/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014) and `G` its
/// increment. The inner `mix` keeps neighbouring seeds from being shifted copies of each other.
pub fn uniform(seed: u64, position: u32) -> f64 {
    random_bits(seed, position) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The 53 bits of [`uniform`].
pub fn random_bits(seed: u64, position: u32) -> u64 {
    let stream = mix(seed.wrapping_add(GOLDEN));
    mix(stream.wrapping_add(GOLDEN.wrapping_mul(u64::from(position) + 1))) >> 11
}

/// A bijection of 64-bit numbers in which every output bit depends on every input bit.
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
