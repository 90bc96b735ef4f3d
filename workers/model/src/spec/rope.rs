//! Rotary positions: the angle of each pair of a head's numbers.

use serde::{Deserialize, Serialize};

/// Rotary position embedding, in the half-split form of Hugging Face (`rotate_half`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// Stretching of the rotary frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RopeScaling {
    /// As they are.
    None,
    /// All divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1's: long wave lengths divided, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of long wave lengths.
        factor: f64,
        /// Wave lengths over `original_tokens_max / this` are long.
        low_freq_factor: f64,
        /// Wave lengths under `original_tokens_max / this` are short.
        high_freq_factor: f64,
        /// Context length of the unstretched model.
        original_tokens_max: f64,
    },
}

impl Rope {
    /// Angle per position of each of the `head_dim / 2` pairs, in double precision.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let plain = |i: usize| self.theta.powf(-(2.0 * i as f64) / head_dim as f64);
        (0..head_dim / 2)
            .map(|i| {
                let frequency = plain(i);
                match self.scaling {
                    RopeScaling::None => frequency,
                    RopeScaling::Linear { factor } => frequency / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_tokens_max,
                    } => {
                        let wave_length = 2.0 * std::f64::consts::PI / frequency;
                        let low = original_tokens_max / low_freq_factor;
                        let high = original_tokens_max / high_freq_factor;
                        if wave_length < high {
                            frequency
                        } else if wave_length > low {
                            frequency / factor
                        } else {
                            let smooth = (original_tokens_max / wave_length - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * frequency / factor + smooth * frequency
                        }
                    }
                }
            })
            .collect()
    }

    /// Whether frequencies can be made of these numbers.
    pub(super) fn check(&self) -> Result<(), String> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let scaling = match self.scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_tokens_max,
            } => {
                positive(factor)
                    && positive(low_freq_factor)
                    && positive(original_tokens_max)
                    && high_freq_factor.is_finite()
                    && high_freq_factor > low_freq_factor
            }
        };
        match positive(self.theta) && scaling {
            true => Ok(()),
            false => Err(format!("the rotary embedding {self:?} is impossible")),
        }
    }
}
