//! How fast a worker is in its present state: what a choice reads of its step cost.

use baton_protocol::{Beat, PAUSE_MAX, StepShape};

/// Part of the promised time between tokens that generating sequences may take alone: a block's tokens of prompts, and what is not predicted, have the rest.
const DECODE_PART: f32 = 0.9;

/// Tokens before those of a prompt's chunk, where one has to be assumed.
const CONTEXT: u64 = 1024;

/// Of a worker whose beat tells what its steps cost. Times in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// For each token of a prompt, where nothing generates.
    pub alone_us: f32,
    /// For each token of a prompt beside the sequences that generate, and beside one if none did.
    pub beside_us: f32,
    /// The same in the longest steps that there are: what generates pauses in them, as long as it has time to spare.
    pub burst_us: f32,
    /// For each pair of a prompt's token and one before it.
    pub pair_us: f32,
    /// A step of the sequences that generated when it beat.
    pub decode_us: f32,
    /// What one more sequence adds to that, without its KV.
    pub row_us: f32,
    /// What each token of its KV adds.
    pub kv_token_us: f32,
    /// Longest step that keeps the time between tokens which the worker promises; infinite if it promises none.
    pub limit_us: f32,
}

impl Speed {
    /// What a beat says; `None` if it says nothing of what steps cost. Beats are [checked](Beat::check) before.
    pub(in crate::fleet) fn of(beat: &Beat) -> Option<Self> {
        let cost = beat.cost.as_ref()?;
        let most = u64::from(beat.step_tokens.unwrap_or(u32::MAX)).clamp(1, 1 << 20);
        let block = u64::from(beat.kv.block_tokens.max(1));
        let limit_us = beat.itl_ms.map_or(f32::INFINITY, limit_us);
        let load = &beat.load;
        let rows = u64::from(load.decoding);
        let decoding = StepShape::decode(rows, load.decoding_tokens);
        let enough = cost.efficient_tokens(most);
        let alone_us = cost.layers_us(enough) / enough as f32;

        let shape = match rows {
            0 => StepShape::decode(1, CONTEXT),
            _ => decoding,
        };
        let in_steps_of = |limit_us: f32| {
            let fits = match limit_us.is_finite() {
                true => cost.prompt_tokens_within(limit_us, shape, CONTEXT, most),
                false => enough,
            };
            let fits = fits.max(block);
            cost.step_us(shape.and_prompt(fits, CONTEXT)) / fits as f32
        };
        // In steps that keep the promised time, with a block of a prompt at least;
        let mut beside_us = in_steps_of(limit_us);
        // or in few large ones, in the part of the time that generating leaves.
        let left = 1.0 - cost.step_us(shape) / limit_us;
        if left > 0.0 {
            beside_us = beside_us.min(alone_us / left);
        }

        let decode_us = match rows {
            0 => cost.layers_us(1),
            _ => cost.step_us(decoding),
        };
        let more = cost.layers_us(rows + 1) - cost.layers_us(rows.max(1));
        Some(Self {
            alone_us,
            beside_us: beside_us.max(alone_us),
            burst_us: in_steps_of(limit_us * PAUSE_MAX as f32).max(alone_us),
            pair_us: cost.pair_us,
            decode_us,
            row_us: cost.row_us + more.max(0.0),
            kv_token_us: cost.kv_token_us,
            limit_us,
        })
    }

    /// A step with `more` sequences that generate than when it beat, or fewer, of `tokens` tokens each.
    pub fn step_us(&self, more: f32, tokens: f32) -> f32 {
        (self.decode_us + more * (self.row_us + self.kv_token_us * tokens)).max(0.0)
    }

    /// How many sequences of `tokens` tokens may generate more than when it beat, or must fewer, for steps to stay within `limit_us`.
    pub fn room(&self, limit_us: f32, tokens: f32) -> f32 {
        let each = self.row_us + self.kv_token_us * tokens;
        (limit_us - self.decode_us) / each.max(1e-3)
    }
}

/// The longest step that keeps this mean time between tokens.
pub fn limit_us(itl_ms: u32) -> f32 {
    itl_ms as f32 * 1e3 * DECODE_PART
}

#[cfg(test)]
mod tests {
    use baton_protocol::{CostPoint, Role, StepCost};

    use super::super::tests::beat;
    use super::*;

    fn told(decoding: u32, tokens: u64, itl_ms: Option<u32>) -> Beat {
        let mut told = beat("w", Role::Both, &[]);
        let point = |tokens, us| CostPoint { tokens, us };
        told.cost = Some(StepCost {
            layers: vec![
                point(1, 4_000.0),
                point(128, 4_000.0),
                point(1024, 22_000.0),
                point(2048, 43_000.0),
            ],
            row_us: 2.0,
            kv_token_us: 0.03,
            pair_us: 0.001,
        });
        told.load.decoding = decoding;
        told.load.decoding_tokens = tokens;
        told.itl_ms = itl_ms;
        told.step_tokens = Some(8192);
        told
    }

    #[test]
    fn a_beat_without_a_cost_tells_no_speed() {
        assert_eq!(Speed::of(&beat("w", Role::Both, &[])), None);
    }

    #[test]
    fn prompts_are_slower_beside_generating_sequences_and_the_more_so_the_more_there_are() {
        let speed =
            |decoding| Speed::of(&told(decoding, u64::from(decoding) * 2_000, Some(10))).unwrap();
        let (few, many) = (speed(4), speed(64));
        assert!(few.alone_us < few.beside_us && few.beside_us < many.beside_us);
        assert_eq!(few.alone_us, many.alone_us);
        // The longest steps are quicker for each token than those that keep the promised time.
        for speed in [&few, &many] {
            assert!(
                (speed.alone_us..speed.beside_us).contains(&speed.burst_us),
                "{speed:?}"
            );
        }
        // Even where generating takes all the time a prompt gets a block a step.
        let full = speed(1000);
        assert!(full.beside_us.is_finite() && full.decode_us > full.limit_us);
    }

    #[test]
    fn room_is_what_fits_into_the_promised_time() {
        let speed = Speed::of(&told(32, 32_000, Some(10))).unwrap();
        let room = speed.room(speed.limit_us, 1_000.0);
        assert!(room > 0.0);
        let at_the_limit = speed.step_us(room, 1_000.0);
        assert!(
            (at_the_limit - speed.limit_us).abs() < 1.0,
            "{at_the_limit}"
        );
        assert!(
            Speed::of(&told(32, 32_000, None))
                .unwrap()
                .limit_us
                .is_infinite()
        );
        assert!(speed.room(limit_us(1), 1_000.0) < 0.0);
    }
}
