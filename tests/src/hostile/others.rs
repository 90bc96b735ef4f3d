//! The good clients: they ask all the time, and each must be answered, rightly and in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::target::{CHAT, COMPLETIONS, Target};
use crate::api::Api;
use crate::chaos::client::{Asking, Story};
use crate::chaos::load::{Ask, Reader};
use crate::chaos::said::Said;
use crate::chaos::verdict::{Verdict, judge};

/// Good clients at once: one for each kind of request.
const CLIENTS: usize = 4;

/// Between two requests of one client: it shares two cores with what it watches.
const PAUSE: Duration = Duration::from_millis(30);

/// Nobody may wait longer for the first token, whatever others do. It takes milliseconds on an idle cluster; a server
/// that stands still for a large request, or works off a queue of them, takes longer than this.
const FIRST_TOKEN_MAX: Duration = Duration::from_secs(10);

/// Longest time to the end of an answer. Longer is a hang, even on a machine that also compiles.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// What good clients ask, and the right answers.
#[derive(Clone)]
pub struct Known(Arc<Vec<(Ask, Said)>>);

impl Known {
    /// Asks while nobody else does.
    pub async fn learn(api: &Api, model: &str) -> Self {
        let mut known = Vec::new();
        for ask in asks() {
            let mut body = ask.body.clone();
            body["model"] = json!(model);
            let answer = api.post(ask.path, &body).await.ok();
            let said = Said::of(&answer).unwrap_or_else(|e| panic!("{e}: {answer}"));
            known.push((ask, said));
        }
        Self(Arc::new(known))
    }
}

fn asks() -> Vec<Ask> {
    let ask = |path, body| Ask {
        path,
        body,
        headers: Vec::new(),
    };
    let completion = |prompt: &str, more: Value| {
        let mut body =
            json!({"prompt": prompt, "max_tokens": 24, "ignore_eos": true, "temperature": 0});
        for (name, value) in more.as_object().into_iter().flatten() {
            body[name] = value.clone();
        }
        ask(COMPLETIONS, body)
    };
    let chat = json!({"messages": [{"role": "user", "content": "What does the harbour look like in winter?"}],
                      "max_tokens": 24, "ignore_eos": true, "temperature": 0});
    vec![
        completion("The river froze", json!({"logprobs": 2})),
        ask(CHAT, chat),
        completion(
            "A lamp in the window",
            json!({"n": 2, "temperature": 1, "seed": 7}),
        ),
        completion(&"and the sea ".repeat(150), json!({})),
    ]
}

/// Good clients that are asking.
pub struct Others {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Report>>,
}

/// What became of them.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests answered, every bit right.
    pub answered: usize,
    /// Times that one was asked to come again later (429, 503), and did.
    pub later: usize,
    /// Those that were not answered, or wrongly, or late.
    pub wrong: Vec<String>,
    /// Times to the first token.
    pub first: Vec<Duration>,
}

impl Report {
    /// Half of them waited no longer for their first token.
    pub fn first_median(&self) -> Duration {
        let mut sorted = self.first.clone();
        sorted.sort();
        sorted.get(sorted.len() / 2).copied().unwrap_or_default()
    }

    /// The longest wait for a first token.
    pub fn first_max(&self) -> Duration {
        self.first.iter().max().copied().unwrap_or_default()
    }

    /// Adds another one.
    pub fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.later += other.later;
        self.wrong.extend(other.wrong);
        self.first.extend(other.first);
    }
}

impl Others {
    /// Begin to ask.
    pub fn begin(target: &Target, known: &Known) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let clients = (0..CLIENTS)
            .map(|number| {
                let (target, known, over) = (target.clone(), known.clone(), Arc::clone(&over));
                tokio::spawn(async move {
                    let mut report = Report::default();
                    while !over.load(Relaxed) {
                        let (ask, expected) = &known.0[number % known.0.len()];
                        one(&target, ask, expected, &mut report).await;
                        tokio::time::sleep(PAUSE).await;
                    }
                    report
                })
            })
            .collect();
        Self { over, clients }
    }

    /// Ends them after the answers they wait for.
    pub async fn end(self) -> Report {
        self.over.store(true, Relaxed);
        let mut sum = Report::default();
        for client in self.clients {
            match client.await {
                Ok(report) => sum.add(report),
                Err(error) => sum.wrong.push(format!("a good client: {error}")),
            }
        }
        sum
    }
}

/// One request, sent again when the server asks for it as OpenAI's client does.
async fn one(target: &Target, ask: &Ask, expected: &Said, report: &mut Report) {
    let asked = Instant::now();
    loop {
        let reader = Reader::Stream { usage: true };
        let asking = Asking {
            base: target.base.clone(),
            model: target.model.clone(),
            ask: ask.clone(),
            reader,
            patience: ANSWER_MAX,
        };
        let before = asked.elapsed();
        let story = asking.tell(asked).await;
        if let Some(pause) = asked_to_wait(&story) {
            report.later += 1;
            if asked.elapsed() + pause < FIRST_TOKEN_MAX {
                tokio::time::sleep(pause).await;
                continue;
            }
        }
        let verdict = judge(&story, reader, expected);
        let first = story.first.map(|first| before + first);
        match (verdict, first) {
            (Verdict::Right, Some(first)) if first <= FIRST_TOKEN_MAX => {
                report.answered += 1;
                report.first.push(first);
            }
            (Verdict::Right, first) => {
                report
                    .wrong
                    .push(format!("waited {first:?} for a first token"));
            }
            (verdict, _) => {
                let body = String::from_utf8_lossy(&story.body);
                let body: String = body.chars().take(300).collect();
                let after = asked.elapsed();
                report.wrong.push(format!(
                    "{verdict:?} after {after:.1?}: {:?} {:?} {body}",
                    story.status, story.end
                ));
                // A server that is not there would be asked thousands of times a second.
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
        return;
    }
}

/// For how long, if it is asked to.
fn asked_to_wait(story: &Story) -> Option<Duration> {
    if !matches!(story.status, Some(429 | 503)) {
        return None;
    }
    let seconds = story.retry_after.as_deref()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}
