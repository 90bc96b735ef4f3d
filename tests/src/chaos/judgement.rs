//! Every request of a run, judged, counted, and told of if it was treated wrongly.

use std::time::Duration;

use baton_protocol::Role;

use super::client::Story;
use super::excuse::{Life, Window, excused};
use super::load::{Arrival, Ask};
use super::said::Said;
use super::schedule::Target;
use super::tally::Tally;
use super::verdict::{Failure, Verdict, judge};

/// Bytes of a body that a report shows.
const SHOWN_BYTES: usize = 3000;

/// What requests are judged by.
pub struct Judgement<'a> {
    /// Under which number they are reported.
    pub seed: u64,
    /// What was asked.
    pub asks: &'a [Ask],
    /// The undisturbed answers.
    pub expected: &'a [Said],
    /// What was disturbed when.
    pub windows: &'a [Window],
    /// The workers.
    pub roles: &'a [Role],
    /// What a request may take at each API server.
    pub budgets: &'a [Duration],
    /// Whether anything was promised: then requests may be refused for it.
    pub promised: bool,
}

impl Judgement<'_> {
    /// Counts one request, and tells its story if it was treated wrongly.
    pub fn count(&self, arrival: &Arrival, story: &Story, tally: &mut Tally) {
        let verdict = self.verdict(arrival, story);
        tally.firsts.note(arrival.reader, story, &verdict);
        match verdict {
            Verdict::Right => tally.answered += 1,
            Verdict::Left => tally.left += 1,
            Verdict::Error(failure) => {
                *tally.errors.entry(failure).or_default() += 1;
                println!(
                    "  {:>6.1} s  {} until {:.1} s: {}",
                    story.from.as_secs_f64(),
                    failure.label(),
                    story.until.as_secs_f64(),
                    sentence(story)
                );
            }
            Verdict::Wrong(reason) => {
                tally.wrong += 1;
                self.tell("wrong", &reason, arrival, story);
            }
            Verdict::Gap(reason) => {
                tally.gaps += 1;
                self.tell("gap", &reason, arrival, story);
            }
        }
    }

    fn verdict(&self, arrival: &Arrival, story: &Story) -> Verdict {
        let verdict = judge(story, arrival.reader, &self.expected[arrival.ask]);
        let Verdict::Error(failure) = verdict else {
            return verdict;
        };
        let life = Life {
            from: story.from,
            until: story.until,
            server: arrival.server,
            budget: self.budgets[arrival.server],
        };
        if failure == Failure::Promise && !self.promised {
            return Verdict::Wrong("refused for a promise that nobody made".to_owned());
        }
        match excused(failure, life, self.windows, self.roles) {
            Ok(()) => verdict,
            Err(reason) => Verdict::Wrong(format!("{}, but {reason}", failure.label())),
        }
    }

    /// The story of a request that was treated wrongly.
    fn tell(&self, what: &str, reason: &str, arrival: &Arrival, story: &Story) {
        let Ask {
            path,
            body,
            headers,
        } = &self.asks[arrival.ask];
        let came = String::from_utf8_lossy(&story.body);
        let shown = came
            .char_indices()
            .nth(SHOWN_BYTES)
            .map_or(&*came, |(end, _)| &came[..end]);
        println!(
            "seed {}, a request at {:.3?}: {what}: {reason}",
            self.seed, arrival.at
        );
        println!("  asked: {path} {headers:?} {body}");
        println!(
            "  at API server {}, by {:?}",
            arrival.server, arrival.reader
        );
        println!(
            "  from {:.3?} to {:.3?}, status {:?}, {:?}",
            story.from, story.until, story.status, story.end
        );
        for (index, choice) in &self.expected[arrival.ask].choices {
            println!(
                "  choice {index} should be: {:?}, {:?}",
                choice.text, choice.finish
            );
        }
        println!("  what came: {shown}");
        for window in self.windows {
            if window.from <= story.until && story.from <= window.until {
                let target = match window.target {
                    Target::Worker(worker) => format!("worker {worker}"),
                    Target::Way(context, decode) => {
                        format!("the way between workers {context} and {decode}")
                    }
                    Target::Bus => "the bus".to_owned(),
                    Target::Api(server) => format!("API server {server}"),
                };
                println!(
                    "  {target} was disturbed from {:.3?} to {:.3?}",
                    window.from, window.until
                );
            }
        }
    }
}

/// What the client was told, in the end.
fn sentence(story: &Story) -> String {
    let body = String::from_utf8_lossy(&story.body);
    let said = body
        .rsplit_once("\"message\":\"")
        .map(|(_, message)| message);
    let said = said.and_then(|message| message.split('"').next());
    said.map_or_else(|| format!("{:?}", story.end), str::to_owned)
}
