//! What came of a load on a mix: shares, times, and the rate that it keeps.

use std::time::Duration;

use baton_api_server::ServiceLevel;
use baton_simulation::planning::{Answer, Ended, Prediction};
use serde::Serialize;

use super::mix::Mix;
use crate::table::Table;

/// A rate is kept if this share of requests gets the level.
const KEPT: f64 = 0.95;

/// One row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outlook {
    pub mix: String,
    /// Requests a second; none of a trace.
    pub rate: Option<f64>,
    pub requests: usize,
    /// Share of all requests whose first token and mean time between tokens came within the level.
    pub attainment: f64,
    pub ttft_ms: Quantiles,
    pub itl_ms: Quantiles,
    pub refused: usize,
    pub failed: usize,
    /// What the workers of each group did.
    pub work: Vec<GroupWork>,
}

/// What the workers of a group did together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupWork {
    /// As it is written in the mix.
    pub group: String,
    /// Tokens of prompts that they ran.
    pub prompt_tokens: u64,
    /// Tokens that they generated, without those that came of prompts.
    pub output_tokens: u64,
}

/// Of those that were answered; 0 if nobody was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
}

/// The highest rate of a mix at which, and at all lower ones, the level was kept.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RateKept {
    pub mix: String,
    pub rate_kept: Option<f64>,
}

impl Outlook {
    /// Of what requests of a load heard.
    pub fn new(
        mix: &Mix,
        rate: Option<f64>,
        level: ServiceLevel,
        Prediction { answers, work }: &Prediction,
    ) -> Self {
        let (ttft, itl) = (level.ttft(), level.itl());
        let count =
            |is: &dyn Fn(&Answer) -> bool| answers.iter().filter(|answer| is(answer)).count();
        let whole = || {
            answers
                .iter()
                .filter(|answer| answer.ended == Some(Ended::Whole))
        };
        let refused = count(&|answer| answer.ended == Some(Ended::Refused));
        let work = mix.groups(work).map(|(group, work)| GroupWork {
            group,
            prompt_tokens: work.iter().map(|work| work.prompt_tokens).sum(),
            output_tokens: work.iter().map(|work| work.output_tokens).sum(),
        });
        Self {
            mix: mix.to_string(),
            rate,
            requests: answers.len(),
            attainment: count(&|answer| answer.is_within(ttft, itl)) as f64
                / answers.len().max(1) as f64,
            ttft_ms: Quantiles::of(whole().filter_map(|answer| answer.first)),
            itl_ms: Quantiles::of(whole().filter_map(Answer::itl)),
            refused,
            failed: answers.len() - refused - whole().count(),
            work: work.collect(),
        }
    }
}

impl Quantiles {
    fn of(times: impl Iterator<Item = Duration>) -> Self {
        let mut times: Vec<Duration> = times.collect();
        times.sort_unstable();
        let at = |part: f64| {
            let at = (times.len() as f64 * part) as usize;
            let time = times.get(at.min(times.len().saturating_sub(1)));
            time.map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        Self {
            p50: at(0.5),
            p99: at(0.99),
        }
    }
}

/// For each mix, in order.
pub fn rates_kept(rows: &[Outlook]) -> Vec<RateKept> {
    let mut kept: Vec<RateKept> = Vec::new();
    for row in rows {
        if kept.last().is_none_or(|last| last.mix != row.mix) {
            let own = rows.iter().filter(|other| other.mix == row.mix);
            let mut own: Vec<_> = own
                .filter_map(|row| Some((row.rate?, row.attainment)))
                .collect();
            own.sort_by(|(one, _), (other, _)| one.total_cmp(other));
            let up_to = own.iter().take_while(|(_, attainment)| *attainment >= KEPT);
            kept.push(RateKept {
                mix: row.mix.clone(),
                rate_kept: up_to.last().map(|(rate, _)| *rate),
            });
        }
    }
    kept
}

/// For people.
pub fn render(rows: &[Outlook], notes: &[String]) -> String {
    let mut table = Table::new(&[
        "mix",
        "requests/s",
        "attainment",
        "TTFT p50",
        "p99",
        "between tokens p50",
        "p99",
        "refused",
        "failed",
    ]);
    for row in rows {
        table.row([
            row.mix.clone(),
            row.rate
                .map_or("as traced".to_owned(), |rate| rate.to_string()),
            format!("{:.1}%", 100.0 * row.attainment),
            format!("{:.0}", row.ttft_ms.p50),
            format!("{:.0}", row.ttft_ms.p99),
            format!("{:.2}", row.itl_ms.p50),
            format!("{:.2}", row.itl_ms.p99),
            row.refused.to_string(),
            row.failed.to_string(),
        ]);
    }
    let mut text = table.render();
    if rows.iter().any(|row| row.rate.is_some()) {
        let mut kept = Table::new(&["mix", "keeps 95% up to"]);
        for RateKept { mix, rate_kept } in rates_kept(rows) {
            kept.row([
                mix,
                rate_kept.map_or("none of these rates".to_owned(), |rate| {
                    format!("{rate} requests/s")
                }),
            ]);
        }
        text += "\n";
        text += &kept.render();
    }
    if !notes.is_empty() {
        text += "\n";
    }
    for note in notes {
        text += &format!("{note}\n");
    }
    text
}
