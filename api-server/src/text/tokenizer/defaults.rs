//! How tokens are chosen where a request does not say: `generation_config.json`.

use std::fmt;

use serde::Deserialize;

/// Sampling defaults of `generation_config.json`, which stand in where a request says nothing.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct GenerationDefaults {
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Most likely tokens.
    pub top_k: Option<i64>,
    /// Share of the most likely token.
    pub min_p: Option<f32>,
    /// Of prompt and output.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// What is wrong with them, if anything: workers would refuse every request that does not say otherwise.
    pub(super) fn fault(&self) -> Option<String> {
        let positive = |value: f32| value >= f32::MIN_POSITIVE && value.is_finite();
        let share = |value: f32| (0.0..=1.0).contains(&value);
        let top_k = self.top_k.filter(|k| *k > i64::from(u32::MAX));
        [
            (
                "temperature",
                self.temperature,
                self.temperature.is_none_or(|t| t >= 0.0 && t.is_finite()),
            ),
            (
                "top_p",
                self.top_p,
                self.top_p.is_none_or(|p| share(p) && p > 0.0),
            ),
            ("min_p", self.min_p, self.min_p.is_none_or(share)),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty.is_none_or(positive),
            ),
            ("top_k", top_k.map(|k| k as f32), top_k.is_none()),
        ]
        .into_iter()
        .find(|(.., fine)| !fine)
        .map(|(name, value, _)| format!("{name} is {}", value.unwrap_or_default()))
    }
}

/// As a log line has them: those that differ from OpenAI's.
impl fmt::Display for GenerationDefaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: Option<f32>| value.map(|value| value.to_string());
        let given = [
            ("temperature", number(self.temperature)),
            ("top_p", number(self.top_p)),
            ("top_k", self.top_k.map(|k| k.to_string())),
            ("min_p", number(self.min_p)),
            ("repetition_penalty", number(self.repetition_penalty)),
        ];
        let mut before = "";
        for (name, value) in given {
            if let Some(value) = value {
                write!(f, "{before}{name} {value}")?;
                before = ", ";
            }
        }
        match before {
            "" => f.write_str("OpenAI's"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_names_what_is_not_openais() {
        let defaults = GenerationDefaults {
            temperature: Some(0.6),
            top_k: Some(20),
            ..GenerationDefaults::default()
        };
        assert_eq!(defaults.to_string(), "temperature 0.6, top_k 20");
        assert_eq!(GenerationDefaults::default().to_string(), "OpenAI's");
    }
}
