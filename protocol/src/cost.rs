//! What a worker's steps cost: its own measurement, by which it sizes them and by which routers weigh it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// No step with generating sequences in it takes longer than so many times what one of them was promised between tokens.
pub const PAUSE_MAX: u32 = 2;

/// Sequences are kept to this part of the time that they were promised between tokens: prediction and host take the rest. With
/// [`PAUSE_MAX`] and how much a sequence may use before it is due it was chosen by a model of one worker and runs on a GPU
/// (docs/notes/2026-11-23-steps-by-time.md).
pub const ITL_PART: f32 = 0.94;

/// How long a step takes, in microseconds:
/// `layers(tokens) + row_us · rows + kv_token_us · kv_tokens + pair_us · pairs` of its [`StepShape`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepCost {
    /// Points of `layers`, by ascending tokens: straight between them, as at the first before it, on with the last slope behind
    /// the last. [`StepCost::POINTS_MAX`] at most.
    pub layers: Vec<CostPoint>,
    /// For each sequence that chooses a token.
    pub row_us: f32,
    /// For each token of KV that generating sequences attend to.
    pub kv_token_us: f32,
    /// For each pair of a prompt's token and a token before it.
    pub pair_us: f32,
}

/// What the linear layers take for so many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CostPoint {
    /// Tokens of the step.
    pub tokens: u32,
    /// Microseconds.
    pub us: f32,
}

/// What a step consists of, as far as it costs time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepShape {
    /// All tokens: of generating sequences and of prompts.
    pub tokens: u64,
    /// Sequences that choose a token.
    pub rows: u64,
    /// Tokens of KV that generating sequences attend to, over all of them.
    pub kv_tokens: u64,
    /// For each prompt token the tokens before it, over all of them.
    pub pairs: u64,
}

impl StepShape {
    /// A step of `rows` generating sequences that have `kv_tokens` tokens together.
    pub fn decode(rows: u64, kv_tokens: u64) -> Self {
        Self {
            tokens: rows,
            rows,
            kv_tokens,
            pairs: 0,
        }
    }

    /// With `tokens` more of a prompt of which `context` are computed.
    #[must_use]
    pub fn and_prompt(mut self, tokens: u64, context: u64) -> Self {
        self.tokens += tokens;
        self.pairs += tokens * context + tokens * tokens.saturating_sub(1) / 2;
        self
    }
}

impl StepCost {
    /// Most points of the curve.
    pub const POINTS_MAX: usize = 24;

    /// Tokens of a step are worth more of them until the time of each is within this much of the best.
    const EFFICIENT: f32 = 1.05;

    /// Whether it says anything, and nothing absurd: points by ascending tokens, all numbers finite and not negative. What
    /// comes from outside is not to be used before.
    ///
    /// # Errors
    /// What is wrong, as a sentence.
    pub fn check(&self) -> Result<(), String> {
        let points = &self.layers;
        if points.is_empty() || points.len() > Self::POINTS_MAX {
            let (count, most) = (points.len(), Self::POINTS_MAX);
            return Err(format!(
                "its step cost has {count} points, 1 to {most} are allowed"
            ));
        }
        if !points
            .windows(2)
            .all(|pair| pair[0].tokens < pair[1].tokens)
        {
            return Err("the points of its step cost are not in order".to_owned());
        }
        let others = [self.row_us, self.kv_token_us, self.pair_us];
        let numbers = points.iter().map(|point| point.us).chain(others);
        match numbers.into_iter().find(|us| !us.is_finite() || *us < 0.0) {
            Some(us) => Err(format!("its step cost has a part of {us} microseconds")),
            None => Ok(()),
        }
    }

    /// How long a step takes, in microseconds. 0 without points.
    pub fn step_us(&self, shape: StepShape) -> f32 {
        self.layers_us(shape.tokens)
            + self.row_us * shape.rows as f32
            + self.kv_token_us * shape.kv_tokens as f32
            + self.pair_us * shape.pairs as f32
    }

    /// The same as a duration, of an hour at most.
    pub fn step_time(&self, shape: StepShape) -> Duration {
        const MOST: f32 = 3_600.0;
        Duration::from_secs_f32((self.step_us(shape) * 1e-6).clamp(0.0, MOST))
    }

    /// What the linear layers take.
    pub fn layers_us(&self, tokens: u64) -> f32 {
        let points = &self.layers;
        let after = points.partition_point(|point| u64::from(point.tokens) < tokens);
        let (from, to) = match (after, points.len()) {
            (_, 0) => return 0.0,
            (0, _) | (_, 1) => return points[0].us,
            (after, count) if after == count => (points[count - 2], points[count - 1]),
            (after, _) => (points[after - 1], points[after]),
        };
        let slope = (to.us - from.us) / (to.tokens - from.tokens) as f32;
        (from.us + slope * (tokens as f32 - from.tokens as f32)).max(0.0)
    }

    /// How many tokens of a prompt, of which `context` are computed, fit into a step beside what is in it: so many that it takes
    /// no more than `limit_us`, at most `most`. 0 if it takes more than that already.
    pub fn prompt_tokens_within(
        &self,
        limit_us: f32,
        step: StepShape,
        context: u64,
        most: u64,
    ) -> u64 {
        let fits = |tokens| self.step_us(step.and_prompt(tokens, context)) <= limit_us;
        if !fits(0) {
            return 0;
        }
        if fits(most) {
            return most;
        }
        // `fits(low)` and not `fits(high)`.
        let (mut low, mut high) = (0, most);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match fits(middle) {
                true => low = middle,
                false => high = middle,
            }
        }
        low
    }

    /// The fewest tokens of a step, at most `most`, that take no more than 1.05 times as long each as those of the best step. `most`
    /// without points.
    pub fn efficient_tokens(&self, most: u64) -> u64 {
        let each = |tokens: u64| self.layers_us(tokens) / tokens.max(1) as f32;
        let known = self.layers.iter().map(|point| u64::from(point.tokens));
        let mut sizes: Vec<u64> = known.filter(|tokens| (1..most).contains(tokens)).collect();
        sizes.push(most.max(1));
        let best = sizes
            .iter()
            .copied()
            .map(each)
            .fold(f32::INFINITY, f32::min);
        let enough = sizes
            .iter()
            .find(|tokens| each(**tokens) <= best * Self::EFFICIENT);
        enough.copied().unwrap_or(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost() -> StepCost {
        let point = |tokens, us| CostPoint { tokens, us };
        StepCost {
            layers: vec![
                point(1, 4_000.0),
                point(128, 4_000.0),
                point(1024, 22_000.0),
                point(2048, 43_000.0),
            ],
            row_us: 2.0,
            kv_token_us: 0.03,
            pair_us: 0.001,
        }
    }

    #[test]
    fn the_curve_is_straight_between_points_and_goes_on_behind_the_last() {
        let cost = cost();
        assert_eq!(cost.layers_us(0), 4_000.0);
        assert_eq!(cost.layers_us(64), 4_000.0);
        assert_eq!(cost.layers_us(576), 13_000.0);
        assert_eq!(cost.layers_us(2048), 43_000.0);
        assert_eq!(cost.layers_us(4096), 85_000.0);
        assert_eq!(StepCost::default().layers_us(7), 0.0);
    }

    #[test]
    fn a_step_is_the_sum_of_its_terms() {
        let shape = StepShape::decode(32, 10_000).and_prompt(96, 1_000);
        assert_eq!(shape.tokens, 128);
        assert_eq!(shape.pairs, 96 * 1_000 + 96 * 95 / 2);
        let us = cost().step_us(shape);
        let expected = 4_000.0 + 64.0 + 300.0 + 0.001 * shape.pairs as f32;
        assert!((us - expected).abs() < 0.1, "{us}");
    }

    #[test]
    fn as_many_prompt_tokens_as_the_time_allows() {
        let (cost, step) = (cost(), StepShape::decode(32, 10_000));
        for limit in [5_000.0, 10_000.0, 20_000.0] {
            let tokens = cost.prompt_tokens_within(limit, step, 500, 8_192);
            assert!(cost.step_us(step.and_prompt(tokens, 500)) <= limit);
            assert!(cost.step_us(step.and_prompt(tokens + 1, 500)) > limit);
        }
        assert_eq!(cost.prompt_tokens_within(1_000.0, step, 0, 8_192), 0);
        assert_eq!(cost.prompt_tokens_within(1e9, step, 0, 8_192), 8_192);
    }

    #[test]
    fn an_efficient_step_is_no_larger_than_it_must_be() {
        assert_eq!(cost().efficient_tokens(8_192), 1_024);
        assert_eq!(cost().efficient_tokens(512), 512);
        assert_eq!(StepCost::default().efficient_tokens(512), 512);
    }

    #[test]
    fn no_step_takes_longer_than_an_hour() {
        let mut cost = cost();
        cost.row_us = f32::MAX;
        let hour = Duration::from_secs(3_600);
        assert_eq!(cost.step_time(StepShape::decode(8, 8)), hour);
        assert!(cost.step_time(StepShape::default()) < hour);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(cost().check(), Ok(()));
        assert!(StepCost::default().check().is_err());
        let wrong: [fn(&mut StepCost); 4] = [
            |cost| cost.layers.swap(0, 1),
            |cost| cost.row_us = -1.0,
            |cost| cost.layers[2].us = f32::NAN,
            |cost| cost.layers = vec![cost.layers[0]; 25],
        ];
        for alter in wrong {
            let mut cost = cost();
            alter(&mut cost);
            assert!(cost.check().is_err(), "{cost:?}");
        }
    }
}
