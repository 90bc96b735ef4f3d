//! When processes that died are started again: soon, but later each time.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::supervisor::ProcessSpec;

const FIRST_DELAY: Duration = Duration::from_secs(1);
const DELAY_MAX: Duration = Duration::from_secs(30);
/// A process that lived this long before is not failing at its start.
const SOUND_AFTER: Duration = Duration::from_secs(60);

/// Processes that wait to be started again.
#[derive(Default)]
pub struct Restarts {
    waiting: Vec<(Instant, ProcessSpec)>,
    delays: HashMap<String, Duration>,
}

impl Restarts {
    /// Takes a process that ended after so long; says when it will be due.
    pub fn schedule(&mut self, spec: ProcessSpec, lived: Duration) -> Duration {
        let delay = match self.delays.get(&spec.name) {
            Some(last) if lived < SOUND_AFTER => (*last * 2).min(DELAY_MAX),
            _ => FIRST_DELAY,
        };
        self.delays.insert(spec.name.clone(), delay);
        self.waiting.push((Instant::now() + delay, spec));
        delay
    }

    /// Waits for the next process that is due; for ever if none waits. Nothing is lost when dropped.
    pub async fn due(&mut self) -> ProcessSpec {
        let next = self
            .waiting
            .iter()
            .enumerate()
            .min_by_key(|(_, (at, _))| *at)
            .map(|(index, (at, _))| (index, *at));
        match next {
            None => std::future::pending().await,
            Some((index, at)) => {
                sleep_until(at).await;
                self.waiting.swap_remove(index).1
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::up::supervisor::Stage;

    fn spec(name: &str) -> ProcessSpec {
        ProcessSpec {
            name: name.to_owned(),
            stage: Stage::Worker,
            program: "x".into(),
            args: Vec::new(),
            listener: None,
        }
    }

    #[test]
    fn delays_grow_to_a_bound_and_start_over_after_a_sound_life() {
        let mut restarts = Restarts::default();
        let soon = Duration::from_millis(1);
        let seconds: Vec<_> = (0..7)
            .map(|_| restarts.schedule(spec("a"), soon).as_secs())
            .collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(restarts.schedule(spec("b"), soon).as_secs(), 1);
        assert_eq!(restarts.schedule(spec("a"), SOUND_AFTER).as_secs(), 1);
    }

    #[tokio::test]
    async fn the_earliest_is_due_first() {
        let mut restarts = Restarts::default();
        let now = Instant::now();
        restarts
            .waiting
            .push((now + Duration::from_millis(20), spec("later")));
        restarts.waiting.push((now, spec("sooner")));
        assert_eq!(restarts.due().await.name, "sooner");
        assert_eq!(restarts.due().await.name, "later");
    }
}
