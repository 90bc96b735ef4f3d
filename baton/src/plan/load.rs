//! When requests come, and how long they are.

use std::path::Path;
use std::time::Duration;

use baton_simulation::planning::Arrival;

use crate::Failure;
use crate::bench::prompt::Random;
use crate::bench::trace;

/// Most requests of one load.
const REQUESTS_MAX: f64 = 1_000_000.0;

/// Requests of one size at random times: so many a second in the mean, for so long.
///
/// # Errors
/// A rate or time of which nothing comes, or too much.
pub fn poisson(
    rate: f64,
    seconds: f64,
    (prompt_tokens, max_tokens): (usize, u32),
    seed: u64,
) -> Result<Vec<Arrival>, Failure> {
    if !(rate > 0.0 && seconds > 0.0 && rate * seconds <= REQUESTS_MAX) {
        return Err(format!(
            "--rate {rate} for --seconds {seconds}: both must be above 0, and no more than {REQUESTS_MAX} requests may come of them"
        )
        .into());
    }
    let mut random = Random::new(seed);
    let mut at = 0.0;
    let mut load = Vec::new();
    loop {
        // Gaps of a Poisson process are exponential. The same gaps at every rate, only shorter: rates differ by nothing else.
        at += -(1.0 - random.unit()).ln() / rate;
        if at >= seconds && !load.is_empty() {
            return Ok(load);
        }
        load.push(Arrival {
            at: Duration::from_secs_f64(at),
            prompt_tokens,
            max_tokens,
        });
    }
}

/// Requests as a file says.
///
/// # Errors
/// What is wrong with it.
pub fn traced(path: &Path) -> Result<Vec<Arrival>, Failure> {
    let arrival = |traced: trace::Traced| Arrival {
        at: traced.at,
        prompt_tokens: traced.prompt_tokens,
        max_tokens: traced.max_tokens,
    };
    Ok(trace::read(path)?.into_iter().map(arrival).collect())
}
