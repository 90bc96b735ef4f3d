//! How answers are shown: as text, on a terminal with Markdown, reasoning and tool calls, or as JSON.

use std::io::{self, IsTerminal, Write};

use serde_json::json;

use super::answer::{Answer, Call};
use super::markdown::Markdown;

const DIM: &str = "\x1b[2m";
const CALL: &str = "\x1b[33m";
const RESET: &str = "\x1b[0m";

/// Who sees the answers.
pub enum Show {
    /// Whoever reads a file or a pipe: the text alone, as it is.
    Plain(Shown),
    /// A person.
    Terminal(Shown, Markdown),
    /// A script: an object for each answer, on a line, when it is whole.
    Json,
}

/// How much of an answer was shown.
#[derive(Debug, Default)]
pub struct Shown {
    content: usize,
    reasoning: usize,
}

impl Show {
    /// For standard output as it is.
    pub fn for_stdout(json: bool) -> Self {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let is_plain = is_set("NO_COLOR") || is_dumb || !io::stdout().is_terminal();
        match (json, is_plain) {
            (true, _) => Self::Json,
            (false, true) => Self::Plain(Shown::default()),
            (false, false) => Self::Terminal(Shown::default(), Markdown::default()),
        }
    }

    /// More of it came.
    pub fn more(&mut self, answer: &Answer) -> io::Result<()> {
        let text = match self {
            Self::Json => return Ok(()),
            Self::Plain(shown) => shown.content(answer).to_owned(),
            Self::Terminal(shown, markdown) => {
                let mut text = String::new();
                let reasoning = shown.reasoning(answer);
                if !reasoning.is_empty() {
                    text += &format!("{DIM}{}{RESET}", harmless(reasoning));
                }
                let begins = shown.content == 0 && !answer.content.is_empty();
                if begins && !answer.reasoning.is_empty() {
                    text += "\n\n";
                }
                text + &markdown.push(shown.content(answer))
            }
        };
        write(&text)
    }

    /// That was all of it, or of what there will be.
    pub fn end(&mut self, answer: &Answer, model: &str) -> io::Result<()> {
        let text = match self {
            Self::Json if answer.done => format!("{}\n", answer.to_json(model)),
            Self::Json => String::new(),
            Self::Plain(shown) => {
                *shown = Shown::default();
                "\n".to_owned()
            }
            Self::Terminal(shown, markdown) => {
                *shown = Shown::default();
                let mut text = markdown.finish();
                let has_text = !answer.content.is_empty() || !answer.reasoning.is_empty();
                if has_text || answer.calls.is_empty() {
                    text += "\n";
                }
                text.extend(answer.calls.iter().map(call));
                if answer.finish.as_deref() == Some("length") {
                    text += &format!("{DIM}(it ends at --max-tokens){RESET}\n");
                }
                text
            }
        };
        write(&text)
    }

    /// None came, or not all of it.
    pub fn failed(&mut self, answer: &Answer, model: &str, sentence: &str) -> io::Result<()> {
        match self {
            Self::Json => write(&format!("{}\n", json!({"error": {"message": sentence}}))),
            // What was begun is a line of its own.
            _ if answer.content.is_empty() && answer.reasoning.is_empty() => Ok(()),
            _ => self.end(answer, model),
        }
    }
}

impl Shown {
    fn content<'a>(&mut self, answer: &'a Answer) -> &'a str {
        let from = std::mem::replace(&mut self.content, answer.content.len());
        answer.content.get(from..).unwrap_or_default()
    }

    fn reasoning<'a>(&mut self, answer: &'a Answer) -> &'a str {
        let from = std::mem::replace(&mut self.reasoning, answer.reasoning.len());
        answer.reasoning.get(from..).unwrap_or_default()
    }
}

fn call(call: &Call) -> String {
    let (name, arguments) = (harmless(&call.name), harmless(&call.arguments));
    format!("{CALL}→ {name}({arguments}){RESET}\n")
}

/// Without what could steer a terminal.
fn harmless(text: &str) -> String {
    let is_fine = |char: &char| !char.is_control() || ['\n', '\t'].contains(char);
    text.chars().filter(is_fine).collect()
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
