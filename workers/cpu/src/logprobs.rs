//! Log-probabilities of prompt tokens.

use baton_protocol::{TokenLogprobs, TopLogprob};

/// The log-probability of `token` and the `top` most likely tokens; ties go to the smaller id.
pub fn of_target(logits: &[f32], log_sum_exp: f32, token: u32, top: usize) -> TokenLogprobs {
    let mut best: Vec<TopLogprob> = Vec::with_capacity(top + 1);
    if top > 0 {
        for (id, logit) in (0u32..).zip(logits) {
            if best.len() == top && *logit <= best[top - 1].1 {
                continue;
            }
            let at = best.partition_point(|b| b.1 >= *logit);
            best.insert(at, TopLogprob(id, *logit));
            best.truncate(top);
        }
    }
    for candidate in &mut best {
        candidate.1 -= log_sum_exp;
    }
    TokenLogprobs {
        logprob: logits[token as usize] - log_sum_exp,
        top: best,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_ties_in_order_of_id() {
        let logits = [1.0, 3.0, 2.0, 3.0, -1.0];
        let lse = crate::math::log_sum_exp(&logits);
        let of = of_target(&logits, lse, 2, 3);
        assert_eq!(of.logprob, 2.0 - lse);
        let ids: Vec<u32> = of.top.iter().map(|t| t.0).collect();
        assert_eq!(ids, [1, 3, 2]);
        assert_eq!(of.top[0].1, 3.0 - lse);
        assert!(of_target(&logits, lse, 0, 0).top.is_empty());
        assert_eq!(of_target(&logits, lse, 0, 9).top.len(), 5);
    }
}
