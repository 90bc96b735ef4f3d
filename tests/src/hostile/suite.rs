//! One attack after the other, and what every one of them must leave.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures::FutureExt;

use super::attacks::Attack;
use super::others::{Known, Others, Report};
use super::scene::Scene;
use crate::chaos::audit::{Findings, Pulse, pulse};
use crate::turn::Turn;

/// An attack that takes longer is stuck.
const ATTACK_MAX: Duration = Duration::from_secs(90);

/// How long memory may take to come back: allocators and connections need a moment.
const BACK_WITHIN: Duration = Duration::from_secs(40);

/// Memory of its own that a process may have more than before.
const RESIDENT_KIB_MORE: u64 = 64 << 10;

/// Connections, and what the runtime keeps for blocking calls for ten seconds.
const FILES_MORE: u64 = 16;

/// The most that any process may hold during an attack, shared memory included.
const RESIDENT_BYTES_MAX: usize = 1 << 30;

/// Bytes that all processes together may log during an attack.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Leases of the suite's cluster.
const LEASE: Duration = Duration::from_secs(30);

/// Undisturbed clients, to compare with.
const QUIET: Duration = Duration::from_secs(3);

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Attacks carried out.
    pub attacks: usize,
    /// Those that did no harm.
    pub held: usize,
    /// Requests of other clients that were answered.
    pub answered: usize,
    /// Those that were not, or wrongly, or late.
    pub errors: usize,
    /// The highest ratio of a median time to the first token, during an attack to undisturbed.
    pub ttft_ratio: f64,
    /// Pools, processes and requests that hold what nobody needs any more.
    pub leaked: usize,
    /// Names of attacks that did harm.
    pub broken: Vec<&'static str>,
}

impl Summary {
    /// Whether every attack was held, and nobody else was harmed.
    pub fn clean(&self) -> bool {
        self.attacks > 0 && self.broken.is_empty() && self.errors == 0 && self.leaked == 0
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "attacks={} held={} broken={} others: answered={} errors={} ttft_ratio={:.1} leaked={}",
            self.attacks,
            self.held,
            self.broken.len(),
            self.answered,
            self.errors,
            self.ttft_ratio,
            self.leaked
        )
    }
}

/// Carries the attacks out, prints a line for each and what did not hold, and gives the numbers.
pub async fn run(turn: &Turn, attacks: &[Attack]) -> Summary {
    let mut summary = Summary::default();
    let mut scene = Scene::start(turn).await;
    let known = Known::learn(&scene.cluster.api, &scene.target.model).await;
    let others = Others::begin(&scene.target, &known);
    tokio::time::sleep(QUIET).await;
    let quiet = others.end().await;
    let quiet_ms = quiet.first_median().as_secs_f64() * 1000.0;
    println!(
        "undisturbed: {} answered, median time to first token {quiet_ms:.1} ms",
        quiet.answered
    );
    if !quiet.wrong.is_empty() {
        println!("undisturbed clients were not answered: {:?}", quiet.wrong);
        summary.errors += quiet.wrong.len();
    }
    for attack in attacks {
        let begun = Instant::now();
        let before = Before::look(&scene);
        let others = Others::begin(&scene.target, &known);
        let mut findings = Findings::default();
        findings.wrong.extend(carry(attack, &mut scene).await);
        let took = begun.elapsed();
        let report = others.end().await;
        // Peaks are of processes that are alive, and what settles is looked at with nobody asking.
        let peak = before.audit(&mut scene, &mut findings).await;

        let ratio = report.first_median().as_secs_f64() * 1000.0 / quiet_ms.max(0.1);
        let broken =
            !(findings.wrong.is_empty() && findings.leaked.is_empty() && report.wrong.is_empty());
        println!(
            "{:<15} {:<6} {}: {:.1} s and {:.1} s after it; others: {}; {peak}",
            attack.name,
            if broken { "BROKEN" } else { "held" },
            attack.what,
            took.as_secs_f64(),
            (begun.elapsed() - took).as_secs_f64(),
            told(&report, ratio),
        );
        tell(&findings.wrong);
        tell(&findings.leaked);
        tell(&report.wrong);
        summary.attacks += 1;
        summary.answered += report.answered;
        summary.errors += report.wrong.len();
        summary.leaked += findings.leaked.len();
        summary.ttft_ratio = summary.ttft_ratio.max(ratio);
        if broken {
            summary.broken.push(attack.name);
            println!(
                "    logs are kept in {}",
                scene.cluster.keep_files().display()
            );
            // The next one finds a cluster that this one has not touched.
            drop(scene);
            scene = Scene::start(turn).await;
        } else {
            summary.held += 1;
        }
    }
    let mut findings = Findings::default();
    findings.ended(&mut scene.cluster).await;
    tell(&findings.wrong);
    tell(&findings.leaked);
    summary.leaked += findings.leaked.len();
    // What does not leave when it is told to stays.
    summary.leaked += findings.wrong.len();
    summary
}

/// Carries one attack out, in its time; a panic of the harness is a finding too.
async fn carry(attack: &Attack, scene: &mut Scene<'_>) -> Vec<String> {
    let carried = AssertUnwindSafe((attack.carry)(scene)).catch_unwind();
    match tokio::time::timeout(ATTACK_MAX, carried).await {
        Ok(Ok(sentences)) => sentences,
        Ok(Err(panic)) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            vec![text.unwrap_or_else(|| "a panic without words".to_owned())]
        }
        Err(_) => vec![format!("not over after {ATTACK_MAX:?}")],
    }
}

fn told(report: &Report, ratio: f64) -> String {
    format!(
        "{} answered, {} asked again, {} wrong, first token median {:.1} ms (×{ratio:.1}), longest {:.0} ms",
        report.answered,
        report.later,
        report.wrong.len(),
        report.first_median().as_secs_f64() * 1000.0,
        report.first_max().as_secs_f64() * 1000.0
    )
}

/// Prints sentences, the first few.
fn tell(sentences: &[String]) {
    const SHOWN: usize = 8;
    for sentence in sentences.iter().take(SHOWN) {
        let sentence: String = sentence.chars().take(600).collect();
        println!("    {sentence}");
    }
    if sentences.len() > SHOWN {
        println!("    … and {} more", sentences.len() - SHOWN);
    }
}

/// What the cluster held before an attack.
struct Before {
    pulse: Pulse,
    log_bytes: u64,
}

impl Before {
    fn look(scene: &Scene<'_>) -> Self {
        for process in scene.processes() {
            process.forget_resident_max();
        }
        Self {
            pulse: pulse(&scene.cluster),
            log_bytes: scene.processes().map(|process| process.log_bytes()).sum(),
        }
    }

    /// Looks at the cluster after it, and gives a word on the most that anybody held.
    async fn audit(&self, scene: &mut Scene<'_>, findings: &mut Findings) -> String {
        let dead = scene.cluster.dead();
        if !dead.is_empty() {
            findings.wrong.push(format!("ended: {dead:?}"));
            findings.logs(&scene.cluster);
            return "no peaks".to_owned();
        }
        let peaks = scene
            .processes()
            .map(|process| (process.resident_max(), process.name()));
        let (peak, of) = peaks.max().unwrap_or_default();
        let of = of.to_owned();
        if peak > RESIDENT_BYTES_MAX {
            findings.wrong.push(format!("{of} held {} MiB", peak >> 20));
        }
        let logged: u64 = scene.processes().map(|process| process.log_bytes()).sum();
        let logged = logged.saturating_sub(self.log_bytes);
        if logged > LOG_BYTES_MAX {
            findings
                .wrong
                .push(format!("{} KiB were logged", logged >> 10));
        }
        findings.settled(&mut scene.cluster, LEASE).await;
        findings.logs(&scene.cluster);
        if let Some(sentence) = self.memory_back(scene).await {
            findings.leaked.push(sentence);
        }
        format!(
            "peak {} MiB ({of}), {} KiB logged",
            peak >> 20,
            logged >> 10
        )
    }

    /// Waits until every process that lived through it holds what it held before.
    async fn memory_back(&self, scene: &Scene<'_>) -> Option<String> {
        let begun = Instant::now();
        loop {
            let now = pulse(&scene.cluster);
            let grown = self.pulse.iter().find_map(|(process, was)| {
                let is = now.get(process)?;
                let more = is.resident_kib > was.resident_kib + RESIDENT_KIB_MORE
                    || is.files > was.files + FILES_MORE;
                more.then(|| format!("{} grew from {was:?} to {is:?}", process.1))
            });
            if grown.is_none() || begun.elapsed() > BACK_WITHIN {
                return grown;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn a_summary_is_clean_only_where_nobody_was_harmed() {
        let held = Summary {
            attacks: 2,
            held: 2,
            answered: 100,
            ttft_ratio: 1.5,
            ..Summary::default()
        };
        assert!(held.clean());
        assert_eq!(
            held.to_string(),
            "attacks=2 held=2 broken=0 others: answered=100 errors=0 ttft_ratio=1.5 leaked=0"
        );
        let broken = Summary {
            broken: vec!["echo"],
            ..held.clone()
        };
        let unanswered = Summary {
            errors: 1,
            ..held.clone()
        };
        let leaked = Summary {
            leaked: 1,
            ..held.clone()
        };
        for harmed in [broken, unanswered, leaked, Summary::default()] {
            assert!(!harmed.clean(), "{harmed}");
        }
    }
}
