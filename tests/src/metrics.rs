//! Reading `/metrics`.

use std::collections::BTreeMap;

/// The samples of one look at `/metrics`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: BTreeMap<String, f64>,
}

impl Metrics {
    /// Reads the Prometheus text format.
    ///
    /// # Panics
    /// If a line is not in that format.
    pub fn parse(text: &str) -> Self {
        let samples = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| {
                let (name, value) = line
                    .rsplit_once(' ')
                    .unwrap_or_else(|| panic!("no sample: {line}"));
                let value = value
                    .parse()
                    .unwrap_or_else(|e| panic!("no number: {line}: {e}"));
                (name.to_owned(), value)
            })
            .collect();
        Self { samples }
    }

    /// Sum over all samples of the metric `name` whose labels contain every one of `labels`, each written
    /// `key="value"`; `None` if there is no such sample.
    pub fn sum(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let found: Vec<f64> = self
            .samples
            .iter()
            .filter(|(sample, _)| {
                let (metric, rest) = sample.split_once('{').unwrap_or((sample, ""));
                metric == name && labels.iter().all(|label| rest.contains(label))
            })
            .map(|(_, value)| *value)
            .collect();
        (!found.is_empty()).then(|| found.iter().sum())
    }

    /// Names and labels of all samples.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.samples.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::Metrics;

    #[test]
    fn sums_the_samples_that_match() {
        let text = "# HELP x y\nx{a=\"1\",b=\"2\"} 3\nx{a=\"1\",b=\"3\"} 4.5\nxy 9\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.sum("x", &["a=\"1\""]), Some(7.5));
        assert_eq!(metrics.sum("x", &["b=\"3\""]), Some(4.5));
        assert_eq!(metrics.sum("x", &["b=\"4\""]), None);
        assert_eq!(metrics.sum("xy", &[]), Some(9.0));
    }
}
