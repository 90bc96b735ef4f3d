//! Top-k, top-p, min-p and the draw.
//!
//! All three keep the upper end of one order: larger logit first, lower id first among equals. So the
//! kept set is always a prefix of that order, and finding it needs a partial selection, not a sort.

use super::Draw;
use super::numeric::{self, Weights};

/// Candidates that top-p looks at before it sorts all tokens into buckets. Models are rarely so unsure that
/// the nucleus holds more.
const NUCLEUS_FIRST: usize = 128;

/// A token's place in the order, as one integer: larger is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank(u64);

impl Rank {
    /// `logit` is not NaN.
    fn new(logit: f32, token: usize) -> Self {
        // Adding 0 makes -0 into 0: they are equal as numbers and must be as ranks.
        let bits = (logit + 0.0).to_bits();
        let ordered = if bits >> 31 == 1 {
            !bits
        } else {
            bits | 1 << 31
        };
        Self(u64::from(ordered) << 32 | u64::from(!(token as u32)))
    }

    pub fn token(self) -> u32 {
        !(self.0 as u32)
    }

    fn logit(self, logits: &[f32]) -> f32 {
        logits[self.token() as usize]
    }
}

/// The `count` best tokens, best first. Logits must be free of NaN.
pub fn largest(logits: &[f32], count: usize) -> Vec<Rank> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let capacity = (2 * count).max(count + 64);
    let mut ranks: Vec<Rank> = Vec::with_capacity(capacity + 16);
    // What is below the floor cannot be among the best: at least `count` ranks above it were seen.
    let mut floor = f32::NEG_INFINITY;
    for (index, chunk) in logits.chunks(16).enumerate() {
        if !chunk.iter().fold(false, |any, x| any | (*x >= floor)) {
            continue;
        }
        for (offset, logit) in chunk.iter().enumerate() {
            if *logit >= floor {
                ranks.push(Rank::new(*logit, index * 16 + offset));
            }
        }
        if ranks.len() >= capacity {
            keep_largest(&mut ranks, count);
            floor = logits[ranks[count - 1].token() as usize];
        }
    }
    keep_largest(&mut ranks, count);
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    ranks
}

/// Shorten to the `count` best; the worst of them stands last.
fn keep_largest(ranks: &mut Vec<Rank>, count: usize) {
    ranks.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
    ranks.truncate(count);
}

/// Draw a token. Logits are free of NaN, `peak` is their maximum and finite. May overwrite logits that top-p drops.
///
/// Tokens are kept in the order of their ranks: the first `top_k`, of those the fewest whose weights reach `top_p` of the
/// weight of all, of those the ones not lighter than `weight_min`. Of the kept weights, laid out in order of ids, the one
/// that holds the point `bits / 2^53` of their sum is drawn.
pub fn draw(logits: &mut [f32], peak: f32, draw: &Draw) -> u32 {
    let all = Weights {
        peak,
        scale: draw.inverse_temperature,
        weight_min: 0.0,
    };
    let kept = Weights {
        weight_min: draw.weight_min,
        ..all
    };
    let mut logit_min = f32::NEG_INFINITY;
    if draw.top_k > 0 {
        let mut ranks = largest(logits, draw.top_k as usize);
        let total = ranks.iter().map(|rank| all.of(rank.logit(logits))).sum();
        shorten(&mut ranks, logits, &all, mass(total, draw.top_p));
        return draw_ranked(ranks, logits, &kept, draw.bits);
    }
    if draw.top_p < 1.0 {
        let mass = mass(all.total(logits), draw.top_p);
        let mut ranks = largest(logits, NUCLEUS_FIRST);
        if shorten(&mut ranks, logits, &all, mass) {
            return draw_ranked(ranks, logits, &kept, draw.bits);
        }
        logit_min = cut_nucleus(logits, &all, mass);
    }
    draw_weighted(logits, &kept, logit_min, draw.bits)
}

/// The weight that top-p keeps at least.
fn mass(total: u64, top_p: f32) -> u64 {
    match top_p < 1.0 {
        true => (total as f64 * f64::from(top_p)) as u64,
        false => total,
    }
}

/// Shorten to the fewest, and one at least, that weigh `mass`; whether all together do.
fn shorten(ranks: &mut Vec<Rank>, logits: &[f32], weights: &Weights, mass: u64) -> bool {
    let mut sum = 0;
    let reached = ranks.iter().position(|rank| {
        sum += weights.of(rank.logit(logits));
        sum >= mass
    });
    if let Some(last) = reached {
        ranks.truncate(last + 1);
    }
    reached.is_some()
}

/// Draw among these tokens.
fn draw_ranked(mut ranks: Vec<Rank>, logits: &[f32], weights: &Weights, bits: u64) -> u32 {
    ranks.sort_unstable_by_key(|rank| rank.token());
    let weight = |rank: &Rank| weights.of(rank.logit(logits));
    let mut target = share(bits, ranks.iter().map(weight).sum());
    let drawn = ranks.iter().find(|rank| passes(&mut target, weight(rank)));
    drawn.map_or(0, |rank| rank.token())
}

/// Draw among all tokens whose logits are not under `logit_min`.
fn draw_weighted(logits: &[f32], weights: &Weights, logit_min: f32, bits: u64) -> u32 {
    let groups = weights.groups(logits, logit_min);
    let mut target = share(bits, groups.iter().sum());
    let group = groups.iter().position(|sum| passes(&mut target, *sum));
    let first = group.unwrap_or(0) * numeric::GROUP;
    let token = logits[first..].iter().position(|logit| {
        let counts = *logit >= logit_min;
        passes(&mut target, if counts { weights.of(*logit) } else { 0 })
    });
    (first + token.unwrap_or(0)) as u32
}

/// The point `bits / 2^53` of a weight: below it, if it is not 0.
fn share(bits: u64, weight: u64) -> u64 {
    ((u128::from(bits) * u128::from(weight)) >> 53) as u64
}

/// Whether the point lies in this weight; if not, goes on to what is left of it after this one.
fn passes(target: &mut u64, weight: u64) -> bool {
    if *target < weight {
        return true;
    }
    *target -= weight;
    false
}

/// The logit of the last token of the smallest prefix of the order whose weights reach `mass`, which is more than the best
/// token's and at most that of all. Tokens of that same logit that come after it get minus infinity.
///
/// One pass sorts the weights into buckets by their distance from the peak; then only the bucket in which the mass is
/// reached needs an order.
fn cut_nucleus(logits: &mut [f32], weights: &Weights, mass: u64) -> f32 {
    /// Buckets for a factor of e.
    const FINENESS: f32 = 64.0;
    /// Buckets down to e^-31, where weights end; what is less likely shares the last.
    const BUCKETS: usize = 31 * 64 + 1;
    let distance = |logit: f32| (weights.peak - logit) * weights.scale;
    let bucket = |logit: f32| ((distance(logit) * FINENESS) as usize).min(BUCKETS - 1);

    let mut sums = [0; BUCKETS];
    for logit in logits.iter() {
        sums[bucket(*logit)] += weights.of(*logit);
    }
    let mut sum = 0;
    let mut reached = 0;
    while reached + 1 < BUCKETS && sum + sums[reached] < mass {
        sum += sums[reached];
        reached += 1;
    }
    let inside = logits
        .iter()
        .enumerate()
        .filter(|(_, logit)| bucket(**logit) == reached);
    let mut ranks: Vec<Rank> = inside
        .map(|(token, logit)| Rank::new(*logit, token))
        .collect();
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    let mut last = f32::NEG_INFINITY;
    for rank in &ranks {
        let logit = rank.logit(logits);
        if sum < mass {
            last = logit;
            sum += weights.of(logit);
        } else if logit == last {
            logits[rank.token() as usize] = f32::NEG_INFINITY;
        } else {
            break;
        }
    }
    last
}
