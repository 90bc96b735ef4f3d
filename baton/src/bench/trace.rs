//! A load that is written down: when requests come, and how long their prompts and answers are.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::Failure;

/// Most requests of a trace.
const REQUESTS_MAX: usize = 1_000_000;

/// One line of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// Seconds from the beginning.
    at: f64,
    /// Tokens of its prompt.
    prompt_tokens: usize,
    /// Tokens of its answer, at most.
    max_tokens: u32,
}

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traced {
    /// From the beginning.
    pub at: Duration,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Tokens of its answer, at most.
    pub max_tokens: u32,
}

/// Reads a trace: a JSON object a line, `{"at": 0.25, "prompt_tokens": 2048, "max_tokens": 128}`, in the order of time.
///
/// # Errors
/// The file, the line and what is wrong with it.
pub fn read(path: &Path) -> Result<Vec<Traced>, Failure> {
    let at = |error: &dyn std::fmt::Display| format!("--trace {}: {error}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| at(&error))?;
    Ok(parse(&text).map_err(|error| at(&error))?)
}

fn parse(text: &str) -> Result<Vec<Traced>, String> {
    let mut all: Vec<Traced> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |what: &str| format!("line {}: {what}", number + 1);
        let line: Line = serde_json::from_str(line).map_err(|error| wrong(&error.to_string()))?;
        let at = Duration::try_from_secs_f64(line.at)
            .map_err(|_| wrong("at must be a number of seconds, 0 or more"))?;
        if all.last().is_some_and(|before| before.at > at) {
            return Err(wrong(
                "it is before the line above: lines stand in the order of time",
            ));
        }
        if line.prompt_tokens == 0 || line.max_tokens == 0 {
            return Err(wrong("prompt_tokens and max_tokens must be at least 1"));
        }
        if all.len() == REQUESTS_MAX {
            return Err(wrong(&format!(
                "a trace has {REQUESTS_MAX} requests at most"
            )));
        }
        all.push(Traced {
            at,
            prompt_tokens: line.prompt_tokens,
            max_tokens: line.max_tokens,
        });
    }
    match all.is_empty() {
        true => Err("it has no requests".to_owned()),
        false => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_requests_and_what_is_wrong_is_named() {
        let good = "{\"at\": 0, \"prompt_tokens\": 3, \"max_tokens\": 4}\n\n{\"at\": 1.5, \"prompt_tokens\": 1, \"max_tokens\": 1}\n";
        let all = parse(good).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(
            (all[1].at, all[0].prompt_tokens),
            (Duration::from_millis(1500), 3)
        );
        for (wrong, part) in [
            ("", "no requests"),
            (
                "{\"at\": -1, \"prompt_tokens\": 3, \"max_tokens\": 4}",
                "line 1: at",
            ),
            (
                "{\"at\": 1, \"prompt_tokens\": 0, \"max_tokens\": 4}",
                "at least 1",
            ),
            ("{\"at\": 1}", "prompt_tokens"),
            (
                "{\"at\": 1, \"prompt_tokens\": 3, \"max_tokens\": 4, \"x\": 1}",
                "x",
            ),
            (
                &format!("{good}{{\"at\": 1, \"prompt_tokens\": 3, \"max_tokens\": 4}}"),
                "line 4",
            ),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(part), "{wrong}: {error}");
        }
    }
}
