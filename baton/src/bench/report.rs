//! What came of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::client::Streamed;

/// Figures of a run. Times are kept in microseconds, to three digits.
pub struct Report {
    started: Instant,
    elapsed: Duration,
    succeeded: u64,
    output_tokens: u64,
    /// Chunks with text: a server may put tokens that come together into one.
    chunks: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    first: Histogram<u64>,
    between: Histogram<u64>,
    longest_pause: Histogram<u64>,
    whole: Histogram<u64>,
    failures: BTreeMap<String, u64>,
    /// Of each answer: time to its first token, mean and longest time between two.
    each: Vec<[Duration; 3]>,
    /// Whether these are wanted.
    pub each_wanted: bool,
    /// CPU time by process.
    pub cpu: Vec<(String, Option<Duration>)>,
    /// Whether JSON was asked for.
    pub json_wanted: bool,
}

/// An hour: longer times count as that.
const MICROS_MAX: u64 = 3_600_000_000;
/// Kinds of failures told apart; the rest is counted together.
const FAILURE_KINDS_MAX: usize = 20;

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

impl Report {
    fn new() -> Self {
        let histogram =
            || Histogram::new_with_max(MICROS_MAX, 3).expect("the bounds are within what it takes");
        Self {
            started: Instant::now(),
            elapsed: Duration::ZERO,
            succeeded: 0,
            output_tokens: 0,
            chunks: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            first: histogram(),
            between: histogram(),
            longest_pause: histogram(),
            whole: histogram(),
            failures: BTreeMap::new(),
            each: Vec::new(),
            each_wanted: false,
            cpu: Vec::new(),
            json_wanted: false,
        }
    }

    /// The clock starts.
    pub fn begin(&mut self) {
        self.started = Instant::now();
    }

    /// The clock stops.
    pub fn end(&mut self) {
        self.elapsed = self.started.elapsed();
    }

    /// Adds a request that began to count at `since` and has just ended. With `wanted`, an answer of another length is a failure.
    pub fn add(&mut self, since: Instant, wanted: Option<u64>, outcome: Result<Streamed, String>) {
        let streamed = match outcome {
            Ok(streamed) => streamed,
            Err(failure) => return self.fail(failure),
        };
        if let Some(wanted) = wanted
            && streamed.output_tokens != wanted
        {
            return self.fail(format!(
                "an answer of {} tokens, not {wanted}",
                streamed.output_tokens
            ));
        }
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.succeeded += 1;
        self.output_tokens += streamed.output_tokens;
        self.chunks += streamed.chunks.len() as u64;
        self.prompt_tokens += streamed.prompt_tokens;
        self.cached_tokens += streamed.cached_tokens;
        self.whole.saturating_record(micros(since.elapsed()));
        let mut longest = 0;
        for pair in streamed.chunks.windows(2) {
            let gap = micros(pair[1] - pair[0]);
            longest = longest.max(gap);
            self.between.saturating_record(gap);
        }
        self.longest_pause.saturating_record(longest);
        if let (Some(first), Some(last)) = (streamed.chunks.first(), streamed.chunks.last()) {
            self.first.saturating_record(micros(*first - since));
            let tokens_after = streamed.output_tokens.saturating_sub(1).max(1);
            let mean = (*last - *first).div_f64(tokens_after as f64);
            self.each
                .push([*first - since, mean, Duration::from_micros(longest)]);
        }
    }

    fn fail(&mut self, failure: String) {
        let full =
            self.failures.len() >= FAILURE_KINDS_MAX && !self.failures.contains_key(&failure);
        *self
            .failures
            .entry(if full { "others".to_owned() } else { failure })
            .or_default() += 1;
    }

    /// Requests that failed.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// All requests.
    pub fn requests(&self) -> u64 {
        self.succeeded + self.failed()
    }

    /// The figures for programs: times in milliseconds, rates a second.
    pub fn to_json(&self) -> Value {
        let seconds = self.elapsed.as_secs_f64();
        let cpu: serde_json::Map<_, _> = self
            .cpu
            .iter()
            .map(|(name, time)| {
                let seconds = time.map(|time| time.as_secs_f64());
                (name.clone(), json!({"seconds": seconds, "micros_per_token": seconds.and_then(|s| self.per_token(s))}))
            })
            .collect();
        let ms = |time: &Duration| time.as_secs_f64() * 1e3;
        let each: Option<Vec<_>> = self.each_wanted.then(|| {
            let each = self.each.iter();
            each.map(|times| times.each_ref().map(ms)).collect()
        });
        json!({
            "requests": self.requests(), "succeeded": self.succeeded, "failed": self.failed(),
            "failures": self.failures, "seconds": seconds,
            "output_tokens": self.output_tokens, "chunks": self.chunks, "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens_per_second": self.output_tokens as f64 / seconds,
            "prompt_tokens_per_second": self.prompt_tokens as f64 / seconds,
            "requests_per_second": self.succeeded as f64 / seconds,
            "ttft_ms": quantiles(&self.first), "between_chunks_ms": quantiles(&self.between),
            "longest_pause_ms": quantiles(&self.longest_pause), "request_ms": quantiles(&self.whole),
            "cpu": cpu, "each_ttft_mean_longest_ms": each,
        })
    }

    fn per_token(&self, seconds: f64) -> Option<f64> {
        (self.output_tokens > 0).then(|| seconds * 1e6 / self.output_tokens as f64)
    }
}

fn quantiles(histogram: &Histogram<u64>) -> Value {
    let ms = |micros: u64| micros as f64 / 1000.0;
    json!({
        "mean": histogram.mean() / 1000.0, "p50": ms(histogram.value_at_quantile(0.5)),
        "p90": ms(histogram.value_at_quantile(0.9)), "p99": ms(histogram.value_at_quantile(0.99)),
        "max": ms(histogram.max()),
    })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.elapsed.as_secs_f64();
        writeln!(
            f,
            "requests       {} answered, {} failed, in {seconds:.2} s",
            self.succeeded,
            self.failed()
        )?;
        for (failure, count) in &self.failures {
            writeln!(f, "  {count:>6} x    {failure}")?;
        }
        let rate = |count: u64| count as f64 / seconds;
        writeln!(
            f,
            "output         {} tokens in {} chunks, {:.1} tok/s",
            self.output_tokens,
            self.chunks,
            rate(self.output_tokens)
        )?;
        writeln!(
            f,
            "prompts        {} tokens ({} from prefix caches), {:.1} tok/s, {:.2} requests/s",
            self.prompt_tokens,
            self.cached_tokens,
            rate(self.prompt_tokens),
            rate(self.succeeded)
        )?;
        writeln!(
            f,
            "{:<14} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "ms", "mean", "p50", "p90", "p99", "max"
        )?;
        let rows = [
            ("TTFT", &self.first),
            ("between chunks", &self.between),
            ("longest pause", &self.longest_pause),
            ("request", &self.whole),
        ];
        for (name, histogram) in rows {
            let ms = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
            let (mean, max) = (histogram.mean() / 1000.0, histogram.max() as f64 / 1000.0);
            writeln!(
                f,
                "{name:<14} {mean:>9.3} {:>9.3} {:>9.3} {:>9.3} {max:>9.3}",
                ms(0.5),
                ms(0.9),
                ms(0.99)
            )?;
        }
        for (name, time) in &self.cpu {
            match time.map(|time| time.as_secs_f64()) {
                None => writeln!(f, "CPU {name:<14} ended during the run")?,
                Some(seconds) => {
                    let each = self
                        .per_token(seconds)
                        .map_or(String::new(), |each| format!(", {each:.2} us/token"));
                    writeln!(f, "CPU {name:<14} {seconds:>6.2} s{each}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streamed(since: Instant, tokens: u64, at_ms: &[u64]) -> Streamed {
        let chunks = at_ms
            .iter()
            .map(|&ms| since + Duration::from_millis(ms))
            .collect();
        Streamed {
            chunks,
            output_tokens: tokens,
            prompt_tokens: 10,
            cached_tokens: 0,
        }
    }

    #[test]
    fn figures_are_those_of_the_streams() {
        let mut report = Report::default();
        let since = Instant::now();
        report.add(since, None, Ok(streamed(since, 4, &[10, 20, 30, 60])));
        report.add(since, None, Err("HTTP 503".to_owned()));
        report.elapsed = Duration::from_secs(2);
        report.cpu = vec![("api".to_owned(), Some(Duration::from_micros(40)))];
        let json = report.to_json();
        assert_eq!(json["output_tokens_per_second"], 2.0);
        assert_eq!(json["failures"]["HTTP 503"], 1);
        assert_eq!(json["cpu"]["api"]["micros_per_token"], 10.0);
        let near = |value: &Value, ms: f64| {
            assert!(
                (value.as_f64().unwrap() / ms - 1.0).abs() < 0.01,
                "{value} {ms}"
            )
        };
        near(&json["ttft_ms"]["p50"], 10.0);
        near(&json["between_chunks_ms"]["p50"], 10.0);
        near(&json["longest_pause_ms"]["p50"], 30.0);
        assert!(json["each_ttft_mean_longest_ms"].is_null());
        report.each_wanted = true;
        let each = &report.to_json()["each_ttft_mean_longest_ms"][0];
        for (value, ms) in each
            .as_array()
            .unwrap()
            .iter()
            .zip([10.0, 50.0 / 3.0, 30.0])
        {
            near(value, ms);
        }
        assert!(report.to_string().contains("1 x    HTTP 503"), "{report}");
    }

    #[test]
    fn a_short_answer_is_a_failure_when_its_length_is_known() {
        let mut report = Report::default();
        let since = Instant::now();
        report.add(since, Some(5), Ok(streamed(since, 4, &[1])));
        assert_eq!((report.failed(), report.requests()), (1, 1));
    }

    #[test]
    fn kinds_of_failures_are_bounded() {
        let mut report = Report::default();
        for index in 0..100 {
            report.fail(index.to_string());
        }
        assert_eq!(report.failures.len(), FAILURE_KINDS_MAX + 1);
        assert_eq!(report.failed(), 100);
    }
}
