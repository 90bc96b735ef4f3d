//! All that a seed decides.

use std::fmt;
use std::time::Duration;

use super::load::Load;
use super::schedule::Schedule;
use super::shape::Shape;

/// What every seed of a run has in common.
#[derive(Clone, Debug)]
pub struct Options {
    /// `cpu` or `fake`.
    pub device: &'static str,
    /// How long the load goes on.
    pub span: Duration,
    /// Requests a second.
    pub rate: f64,
    /// A fault in some so much time.
    pub fault_every: Duration,
}

impl Options {
    /// What the two devices can bear on two cores.
    pub fn of(device: &'static str) -> Self {
        Self {
            device,
            span: Duration::from_secs(30),
            rate: if device == "fake" { 40.0 } else { 2.0 },
            fault_every: Duration::from_secs(2),
        }
    }
}

/// All that a seed decides. The same seed and the same options give the same plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// The cluster.
    pub shape: Shape,
    /// What is asked of it.
    pub load: Load,
    /// What is done to it.
    pub schedule: Schedule,
}

impl Plan {
    /// The plan of this seed.
    pub fn of(seed: u64, options: &Options) -> Self {
        let shape = Shape::of(seed, options.device);
        Self {
            seed,
            load: Load::of(seed, options.span, options.rate, shape.api_servers)
                .with_classes(seed, shape.promised),
            schedule: Schedule::of(seed, &shape, options.span, options.fault_every),
            shape,
        }
    }
}

impl Plan {
    /// The same cluster and the same load, and nothing happens to them.
    #[must_use]
    pub fn calm(&self) -> Self {
        Self {
            schedule: Schedule(Vec::new()),
            ..self.clone()
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {}", self.seed, self.shape)?;
        let last = self
            .load
            .arrivals
            .last()
            .map(|arrival| arrival.at)
            .unwrap_or_default();
        writeln!(
            f,
            "  {} requests until {last:.1?}",
            self.load.arrivals.len()
        )?;
        for (number, role) in self.shape.roles().iter().enumerate() {
            writeln!(f, "  worker {number} is {}", role.label())?;
        }
        for step in &self.schedule.0 {
            writeln!(f, "  {:>6.1} s  {}", step.at.as_secs_f64(), step.fault)?;
        }
        Ok(())
    }
}
