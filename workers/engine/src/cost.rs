//! What steps cost: a model that a probe begins and every step corrects.

use std::time::Duration;

use baton_protocol::{StepCost, StepShape};

/// How much of a step's error is corrected at once: enough to follow a device that gets slower within some tens of steps, too little
/// for one late step to matter.
const RATE: f32 = 0.1;

/// An error is taken for no more than this part of what was predicted: a step during which the host slept teaches little.
const ERROR_MAX: f32 = 0.5;

/// Steps over which the error is told.
const ERRORS_KEPT: usize = 256;

/// Parts are never taken for less than this, in microseconds a unit, when a correction is shared out: a part that the probe found to be
/// nothing can grow.
const PART_MIN_US: f32 = 1e-6;

/// A [`StepCost`] that follows what steps take.
#[derive(Clone, Debug)]
pub struct CostModel {
    cost: StepCost,
    /// Of the last steps, how far the prediction was off, as a part of what the step took.
    errors: Vec<f32>,
    /// Where the next error goes.
    next: usize,
}

impl CostModel {
    /// Begins with `cost`, which has been [checked](StepCost::check).
    pub fn new(cost: StepCost) -> Self {
        Self {
            cost,
            errors: Vec::new(),
            next: 0,
        }
    }

    /// As it stands.
    pub fn cost(&self) -> &StepCost {
        &self.cost
    }

    /// A step of this shape took so long. What was predicted is compared with it, and each term moves by its share of the step
    /// (normalised least mean squares, with the terms as they stand for scale).
    pub fn learn(&mut self, shape: StepShape, took: Duration) {
        let took = took.as_secs_f32() * 1e6;
        let predicted = self.cost.step_us(shape);
        if !(took > 0.0 && predicted.is_finite()) {
            return;
        }
        self.note_error((predicted - took).abs() / took);
        let most = ERROR_MAX * predicted.max(1.0);
        let error = (took - predicted).clamp(-most, most);

        let [low, high] = self.around(shape.tokens);
        let mut parts: [(&mut f32, f32); 3] = [
            (&mut self.cost.row_us, shape.rows as f32),
            (&mut self.cost.kv_token_us, shape.kv_tokens as f32),
            (&mut self.cost.pair_us, shape.pairs as f32),
        ];
        let of_layers = [low, high].map(|(at, weight)| self.cost.layers[at].us * weight);
        let of_parts = parts
            .each_ref()
            .map(|(us, count)| us.max(PART_MIN_US) * count);
        let squares: f32 = of_layers
            .iter()
            .chain(&of_parts)
            .map(|part| part * part)
            .sum();
        if squares <= 0.0 {
            return;
        }
        let step = RATE * error / squares;
        for ((us, _), share) in parts.iter_mut().zip(of_parts) {
            **us = (**us + step * share * us.max(PART_MIN_US)).max(0.0);
        }
        for ((at, _), share) in [low, high].into_iter().zip(of_layers) {
            let us = &mut self.cost.layers[at].us;
            *us = (*us + step * share * *us).max(0.0);
        }
    }

    /// The points that a step of so many tokens lies between, and the weight of each in its cost.
    fn around(&self, tokens: u64) -> [(usize, f32); 2] {
        let points = &self.cost.layers;
        let after = points.partition_point(|point| u64::from(point.tokens) < tokens);
        match (after, points.len()) {
            (0, _) | (_, 1) => [(0, 1.0), (0, 0.0)],
            // Behind the last one its own cost a token is what steps say most of.
            (after, count) if after == count => [(count - 1, 1.0), (count - 2, 0.0)],
            (after, _) => {
                let (from, to) = (points[after - 1].tokens, points[after].tokens);
                let weight = (tokens - u64::from(from)) as f32 / (to - from) as f32;
                [(after - 1, 1.0 - weight), (after, weight)]
            }
        }
    }

    fn note_error(&mut self, error: f32) {
        match self.errors.get_mut(self.next) {
            Some(slot) => *slot = error,
            None => self.errors.push(error),
        }
        self.next = (self.next + 1) % ERRORS_KEPT;
    }

    /// Nine of ten of the last steps were predicted this well or better: the error as a part of what the step took. `None` before
    /// the first.
    pub fn error_p90(&self) -> Option<f32> {
        let mut errors = self.errors.clone();
        errors.sort_unstable_by(f32::total_cmp);
        let at = (errors.len() * 9).div_ceil(10).checked_sub(1)?;
        errors.get(at).copied()
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::CostPoint;
    use proptest::prelude::*;

    use super::*;

    fn of(points: &[(u32, f32)], row_us: f32, kv_token_us: f32, pair_us: f32) -> StepCost {
        let point = |&(tokens, us): &(u32, f32)| CostPoint { tokens, us };
        StepCost {
            layers: points.iter().map(point).collect(),
            row_us,
            kv_token_us,
            pair_us,
        }
    }

    fn device() -> StepCost {
        of(
            &[(1, 4e3), (128, 4e3), (512, 11e3), (2048, 43e3)],
            2.0,
            0.03,
            1e-3,
        )
    }

    fn shape(rows: u64, context: u64, prompt: u64, before: u64) -> StepShape {
        let decode = StepShape::decode(rows, rows * context);
        decode.and_prompt(prompt, before)
    }

    proptest! {
        /// Whatever it began with, up to four times off, it comes to predict a device's steps within some percent.
        #[test]
        fn it_comes_to_predict_what_steps_take(
            off in proptest::collection::vec(0.25_f32..4.0, 7),
            steps in proptest::collection::vec((0_u64..64, 100_u64..4000, 0_u64..2000, 0_u64..8000), 100),
        ) {
            let device = device();
            let mut began = device.clone();
            for (point, off) in began.layers.iter_mut().zip(&off) {
                point.us *= off;
            }
            began.row_us *= off[4];
            began.kv_token_us *= off[5];
            began.pair_us *= off[6];
            let mut model = CostModel::new(began);
            let steps: Vec<StepShape> = steps
                .into_iter()
                .map(|(rows, context, prompt, before)| shape(rows.max(u64::from(prompt == 0)), context, prompt, before))
                .collect();
            for _ in 0..100 {
                for step in &steps {
                    model.learn(*step, Duration::from_secs_f32(device.step_us(*step) * 1e-6));
                }
            }
            prop_assert!(model.error_p90().unwrap() < 0.1, "{:?} {model:?}", model.error_p90());
            prop_assert_eq!(model.cost().check(), Ok(()));
        }

        /// Nothing that a step can say makes it absurd.
        #[test]
        fn it_stays_a_cost(
            steps in proptest::collection::vec((0_u64..256, 0_u64..10_000_000, 0_u64..9000, 0_u64..1_000_000, 0_u64..10_000_000), 1..50),
        ) {
            let mut model = CostModel::new(device());
            for (rows, kv_tokens, prompt, before, us) in steps {
                let shape = StepShape::decode(rows, kv_tokens).and_prompt(prompt, before);
                model.learn(shape, Duration::from_micros(us));
                prop_assert_eq!(model.cost().check(), Ok(()));
            }
        }
    }

    #[test]
    fn a_late_step_changes_little() {
        let mut model = CostModel::new(device());
        let step = shape(32, 1000, 0, 0);
        let before = model.cost().step_us(step);
        model.learn(step, Duration::from_secs(1));
        let after = model.cost().step_us(step);
        assert!(before < after && after < before * 1.06, "{before} {after}");
    }

    #[test]
    fn the_error_is_that_of_nine_in_ten() {
        let mut model = CostModel::new(of(&[(1, 100.0)], 0.0, 0.0, 0.0));
        assert_eq!(model.error_p90(), None);
        let step = StepShape {
            tokens: 1,
            ..StepShape::default()
        };
        for late in [false, true] {
            let us = model.cost().step_us(step);
            let took = if late { us * 2.0 } else { us };
            for _ in 0..9 {
                model.learn(step, Duration::from_secs_f32(took * 1e-6));
            }
        }
        assert!(model.error_p90().unwrap() > 0.2);
    }
}
