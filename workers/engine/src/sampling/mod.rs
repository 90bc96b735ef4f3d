//! Choosing a token from logits: the rules, in the order that [`baton_protocol::Sampling`] fixes.
//!
//! Everything here is a function of its arguments alone. No fused multiply-add is used, and what is summed are integers,
//! so equal logits give equal tokens on every x86-64 or Arm host, and on a GPU.

mod numeric;
mod penalties;
mod rng;
mod truncate;

use baton_protocol::{TokenLogprobs, TopLogprob};

use crate::{SampleRequest, Sampled};

pub(crate) use rng::mix;
pub use rng::{random_bits, uniform};

/// Reported in place of any smaller log-probability: JSON has no minus infinity.
pub const LOGPROB_MIN: f32 = -9999.0;

/// Choose one token.
///
/// `logits` has one number per vocabulary id and is used as scratch space: its contents afterwards
/// are unspecified. NaN counts as minus infinity, and plus infinity as the largest finite number. Ties go to
/// the lowest id. `None` when no token is possible, because every logit is NaN or minus infinity: the row is broken, which
/// ends its sequence and nothing else.
///
/// Greedy costs two passes over the logits; anything else some two more and a partial selection,
/// never a full sort.
pub fn sample(logits: &mut [f32], request: &SampleRequest) -> Option<Sampled> {
    let state = &*request.state;
    let sampling = &state.sampling;
    penalties::apply(logits, state, request.ban_stop_ids);
    if let Some(mask) = &request.mask {
        mask.apply(logits);
    }
    let peak = numeric::clean_and_max(logits);
    let peak_token = numeric::position(logits, peak);
    if peak == f32::NEG_INFINITY {
        return None;
    }
    let draw = Draw::of(request, logits.len());
    // Log-probabilities first: top-p may overwrite logits that it drops.
    let report = sampling.logprobs.map(|top| {
        let distribution = Distribution::of(logits, peak);
        let top = distribution.top(logits, usize::from(top));
        (distribution, top)
    });
    let token = draw.map_or(peak_token, |draw| truncate::draw(logits, peak, &draw));
    // A token that was chosen was not dropped.
    let logprobs = report.map(|(distribution, top)| TokenLogprobs {
        logprob: distribution.logprob(logits[token as usize]),
        top,
    });
    Some(Sampled { token, logprobs })
}

/// How a token is drawn, in numbers: what an executor needs that samples where the logits are. [`sample`] says what they mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// What logits are multiplied by.
    pub inverse_temperature: f32,
    /// Of the order of all tokens, how many are kept; 0 keeps all.
    pub top_k: u32,
    /// Of these, the fewest are kept whose weights reach this share of the weight of all, in `[0, 1]`; 1 keeps all.
    pub top_p: f32,
    /// Of these, the ones that weigh less are dropped; the best token weighs 1.
    pub weight_min: f32,
    /// Where in the sum of the kept weights, in order of ids, the token lies, in 2^-53.
    pub bits: u64,
}

impl Draw {
    /// How a request over `vocab` logits draws; `None` if it takes the most likely token.
    pub fn of(request: &SampleRequest, vocab: usize) -> Option<Self> {
        let sampling = &request.state.sampling;
        // A temperature that is no number, or negative, is greedy too.
        if sampling.temperature.is_nan() || sampling.temperature <= 0.0 {
            return None;
        }
        let truncates = (1..vocab).contains(&(sampling.top_k as usize));
        Some(Self {
            // Beyond these bounds the draw is greedy, or all tokens are equal, anyway.
            inverse_temperature: 1.0 / sampling.temperature.clamp(1e-30, 1e30),
            top_k: if truncates { sampling.top_k } else { 0 },
            top_p: match sampling.top_p < 1.0 {
                true => sampling.top_p.max(0.0),
                false => 1.0,
            },
            // The best token stays whatever min-p says.
            weight_min: sampling.min_p.min(1.0),
            bits: random_bits(sampling.seed, request.position),
        })
    }
}

/// Log-probability of a given token under the plain logits, and the `top` most likely ones: what a
/// target of [`crate::SequenceStep::targets`] reports. A token outside the vocabulary gets
/// [`LOGPROB_MIN`]. `logits` is cleaned of NaN and infinity, and otherwise left as it is.
pub fn token_logprobs(logits: &mut [f32], token: u32, top: u8) -> TokenLogprobs {
    let peak = numeric::clean_and_max(logits);
    if peak == f32::NEG_INFINITY {
        return TokenLogprobs {
            logprob: LOGPROB_MIN,
            top: Vec::new(),
        };
    }
    let distribution = Distribution::of(logits, peak);
    TokenLogprobs {
        logprob: logits
            .get(token as usize)
            .map_or(LOGPROB_MIN, |logit| distribution.logprob(*logit)),
        top: distribution.top(logits, usize::from(top)),
    }
}

/// The softmax of some logits, as far as log-probabilities need it.
pub struct Distribution {
    peak: f32,
    log_sum: f64,
}

impl Distribution {
    fn of(logits: &[f32], peak: f32) -> Self {
        let weights = numeric::Weights {
            peak,
            scale: 1.0,
            weight_min: 0.0,
        };
        Self::new(peak, weights.total(logits))
    }

    /// Of logits with this maximum, whose weights `exp(logit - peak)` have this sum in units of 2^-44.
    pub fn new(peak: f32, total: u64) -> Self {
        let sum = total as f64 / (1u64 << numeric::UNIT_BITS) as f64;
        Self {
            peak,
            log_sum: sum.ln(),
        }
    }

    /// The log-probability of a token with this logit.
    pub fn logprob(&self, logit: f32) -> f32 {
        let logprob = (f64::from(logit) - f64::from(self.peak) - self.log_sum) as f32;
        logprob.max(LOGPROB_MIN)
    }

    fn top(&self, logits: &[f32], count: usize) -> Vec<TopLogprob> {
        truncate::largest(logits, count)
            .into_iter()
            .map(|rank| {
                let token = rank.token();
                TopLogprob(token, self.logprob(logits[token as usize]))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
