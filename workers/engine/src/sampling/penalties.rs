//! What changes logits before anything else: bias, bans, penalties.

use crate::SampleState;

/// Apply, in this order: `logit_bias`; the ban of stop ids; for every counted token the repetition
/// penalty, then the frequency and presence penalties. Ids outside the vocabulary are ignored.
pub fn apply(logits: &mut [f32], state: &SampleState, ban_stop_ids: bool) {
    let sampling = &state.sampling;
    for (token, bias) in &sampling.logit_bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    if ban_stop_ids {
        for token in &state.stop_token_ids {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    for count in &state.counts {
        let Some(logit) = logits.get_mut(count.token as usize) else {
            continue;
        };
        let penalty = sampling.repetition_penalty;
        if *logit > 0.0 {
            *logit /= penalty;
        } else {
            *logit *= penalty;
        }
        if count.output > 0 {
            *logit -= sampling.frequency_penalty * count.output as f32;
            *logit -= sampling.presence_penalty;
        }
    }
}
