//! Top-k, top-p, min-p and the draw.
//!
//! All three keep the upper end of one order: larger logit first, lower id first among equals. So the
//! kept set is always a prefix of that order, and finding it needs a partial selection, not a sort.

use baton_protocol::Sampling;

use super::numeric;

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

/// It must be a number. Beyond these bounds the draw is greedy, or all tokens are equal, anyway.
pub fn inverse_temperature(sampling: &Sampling) -> f32 {
    1.0 / sampling.temperature.clamp(1e-30, 1e30)
}

/// Draw a token with `u` in `[0, 1)`. Logits are free of NaN, `peak` is their maximum and finite, the
/// temperature is above 0. Overwrites the logits.
pub fn draw(logits: &mut [f32], peak: f32, sampling: &Sampling, u: f64) -> u32 {
    let inverse = inverse_temperature(sampling);
    let top_k = sampling.top_k as usize;
    if (1..logits.len()).contains(&top_k) {
        let ranks = largest(logits, top_k);
        let weight = |rank: &Rank| {
            let logit = logits[rank.token() as usize];
            f64::from(numeric::exp((logit - peak) * inverse))
        };
        let weights: Vec<f64> = ranks.iter().map(weight).collect();
        let total = weights.iter().sum();
        return draw_ranked(&ranks, &weights, total, sampling, u);
    }
    let mut sums = Vec::with_capacity(logits.len().div_ceil(numeric::GROUP));
    numeric::exp_in_place(logits, peak, inverse, &mut sums);
    let weights = logits;
    // The best token weighs 1; it stays whatever min-p says.
    let mut weight_min = sampling.min_p.min(1.0);
    if sampling.top_p < 1.0 {
        let total: f64 = sums.iter().map(|sum| f64::from(*sum)).sum();
        let mass = total * f64::from(sampling.top_p);
        let ranks = largest(weights, NUCLEUS_FIRST);
        let best: Vec<f64> = ranks
            .iter()
            .map(|rank| f64::from(weights[rank.token() as usize]))
            .collect();
        if best.iter().sum::<f64>() >= mass {
            return draw_ranked(&ranks, &best, total, sampling, u);
        }
        weight_min = weight_min.max(cut_nucleus(weights, mass));
    }
    if weight_min > 0.0 {
        numeric::drop_below(weights, weight_min, &mut sums);
    }
    draw_weighted(weights, &sums, u)
}

/// Draw among tokens in order of rank after top-p (of `total`) and min-p.
fn draw_ranked(ranks: &[Rank], weights: &[f64], total: f64, sampling: &Sampling, u: f64) -> u32 {
    let mass = total * f64::from(sampling.top_p.min(1.0));
    let weight_min = f64::from(sampling.min_p.min(1.0)) * weights[0];
    let mut kept = 0;
    let mut sum = 0.0;
    // The first is always kept, so that top_p 0 and min_p 1 mean the best token and not none.
    for weight in weights {
        if kept > 0 && (sum >= mass || *weight < weight_min || *weight == 0.0) {
            break;
        }
        sum += weight;
        kept += 1;
    }
    let target = u * sum;
    let mut cumulative = 0.0;
    for (rank, weight) in ranks.iter().zip(&weights[..kept]) {
        cumulative += weight;
        if target < cumulative {
            return rank.token();
        }
    }
    ranks[kept - 1].token()
}

/// The weight of the last token of the smallest prefix of the order whose weights reach `mass`. Tokens of that same
/// weight that come after it get weight 0.
///
/// One pass sorts the weights into buckets, a power of two cut into 64; then only the bucket in which the mass is reached
/// needs an order.
fn cut_nucleus(weights: &mut [f32], mass: f64) -> f32 {
    /// Lowest mantissa bits that a bucket ignores.
    const IGNORED: u32 = 17;
    /// Buckets from weight 1 down to 2^-32; what is less likely shares the last.
    const BUCKETS: usize = 32 * 64 + 1;
    let top = 1.0f32.to_bits() >> IGNORED;
    let bucket = |weight: f32| ((top - (weight.to_bits() >> IGNORED)) as usize).min(BUCKETS - 1);

    let mut sums = [0.0f64; BUCKETS];
    for weight in weights.iter() {
        sums[bucket(*weight)] += f64::from(*weight);
    }
    let mut missing = mass;
    let mut reached = 0;
    while reached + 1 < BUCKETS && sums[reached] < missing {
        missing -= sums[reached];
        reached += 1;
    }
    let inside = weights
        .iter()
        .enumerate()
        .filter(|(_, weight)| bucket(**weight) == reached);
    let mut ranks: Vec<Rank> = inside
        .map(|(token, weight)| Rank::new(*weight, token))
        .collect();
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    let mut last = None;
    for rank in &ranks {
        let token = rank.token() as usize;
        let weight = weights[token];
        match last {
            Some(last) if missing <= 0.0 && weight < last => break,
            Some(_) if missing <= 0.0 => weights[token] = 0.0,
            _ => last = Some(weight),
        }
        missing -= f64::from(weight);
    }
    last.unwrap_or(0.0)
}

/// Draw a token by its weight, in order of ids. `sums` are those of each group of weights.
fn draw_weighted(weights: &[f32], sums: &[f32], u: f64) -> u32 {
    let total: f64 = sums.iter().map(|sum| f64::from(*sum)).sum();
    let target = u * total;
    let mut before = 0.0;
    let mut last = 0;
    for (index, sum) in sums.iter().enumerate() {
        if *sum == 0.0 {
            continue;
        }
        last = index;
        if target < before + f64::from(*sum) {
            break;
        }
        before += f64::from(*sum);
    }
    // Groups are summed lane by lane and walked one by one: rounding may leave the target a hair beyond the end,
    // and then it is the group's last possible token.
    let first = last * numeric::GROUP;
    let mut token = first;
    for (offset, weight) in weights[first..].iter().take(numeric::GROUP).enumerate() {
        if *weight > 0.0 {
            token = first + offset;
            before += f64::from(*weight);
            if target < before {
                break;
            }
        }
    }
    token as u32
}
