//! Why a process ended: its exit status, and the line of its output that explains it.
//!
//! The status comes first, because the last line of a killed process is whatever it logged before. A line is added only if it
//! reports trouble: the sentence with which `baton` ends, a panic, an error, a warning, or text on standard error that is no log line.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tokio::time::Instant;

/// Older lines are not the reason, unless the process ended with a sentence of its own.
const LAST_MOMENTS: Duration = Duration::from_secs(10);

/// Longest reason, in characters: a process may print anything.
const CHARACTERS_MAX: usize = 1000;

/// Where a line was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output: only log lines in it matter.
    Output,
    /// Standard error.
    Error,
}

/// What a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `baton: …`, the sentence with which `baton` ends.
    Farewell,
    /// `thread '…' panicked at …:`; the next line has the message.
    Panic,
    /// A log line at `WARN` or above.
    Trouble,
    /// A log line below `WARN`.
    Progress,
    /// No log line.
    Plain,
}

/// The lines of a running process that may explain its end: the last of each kind.
#[derive(Debug, Default)]
pub struct LastLines {
    farewell: Option<(Instant, String)>,
    panic: Option<(Instant, String)>,
    trouble: Option<(Instant, String)>,
    is_in_panic: bool,
}

impl LastLines {
    /// Takes a line that was just written.
    pub fn push(&mut self, stream: Stream, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        let now = Instant::now();
        let (kind, text) = read(line);
        if kind == Kind::Plain && std::mem::take(&mut self.is_in_panic) {
            if let Some((_, panic)) = &mut self.panic {
                *panic = format!("{panic} {text}");
            }
            return;
        }
        self.is_in_panic = kind == Kind::Panic;
        match kind {
            Kind::Farewell => self.farewell = Some((now, text)),
            Kind::Panic => self.panic = Some((now, text)),
            Kind::Trouble => self.trouble = Some((now, text)),
            Kind::Plain if stream == Stream::Error => self.trouble = Some((now, text)),
            Kind::Plain | Kind::Progress => {}
        }
    }

    /// The line that explains an end at this time.
    pub fn reason(self, ended: Instant) -> Option<String> {
        let is_recent =
            |(at, _): &(Instant, String)| ended.saturating_duration_since(*at) <= LAST_MOMENTS;
        let line = self
            .farewell
            .or(self.panic.filter(is_recent))
            .or(self.trouble.filter(is_recent));
        line.map(|(_, text)| text.chars().take(CHARACTERS_MAX).collect())
    }
}

/// How a process ended, after its name: `was killed by signal 9 (SIGKILL) after 5.4 s …`.
pub fn sentence(status: ExitStatus, lived: Duration, reason: Option<&str>) -> String {
    let seconds = lived.as_secs_f32();
    let signal = status.signal();
    let how = match signal {
        Some(_) => {
            let named = status.to_string().replacen("signal: ", "signal ", 1);
            format!("was killed by {named} after {seconds:.1} s")
        }
        None => format!("ended with {status} after {seconds:.1} s"),
    };
    let is = |named: Signal| signal == Some(named.as_raw());
    let cause = match () {
        () if is(Signal::KILL) => ": out of memory (see dmesg), or killed by hand",
        () if is(Signal::ILL) => ": this CPU lacks an instruction of the program",
        () if is(Signal::BUS) => ": memory that it had mapped could not be had",
        () => "",
    };
    match reason {
        Some(line) => format!("{how}{cause}; it said: {line}"),
        None if signal.is_some() => format!("{how}{cause}"),
        None => format!("{how} and gave no reason"),
    }
}

/// What a line is, and its text without time and level.
fn read(line: &str) -> (Kind, String) {
    let line = line.trim();
    if let Some(text) = line.strip_prefix("baton: ") {
        return (Kind::Farewell, text.to_owned());
    }
    if line.starts_with("thread '") && line.contains(" panicked at ") {
        return (Kind::Panic, line.to_owned());
    }
    if let Some(read) = read_json(line) {
        return read;
    }
    // Baton's lines begin with time and level, those of nats-server with process, day, time and level.
    let mut rest = line;
    for _ in 0..4 {
        let (word, after) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        rest = after.trim_start();
        if let Some(kind) = of_level(word) {
            return (kind, rest.to_owned());
        }
    }
    (Kind::Plain, line.to_owned())
}

fn of_level(word: &str) -> Option<Kind> {
    match word {
        "ERROR" | "WARN" | "[ERR]" | "[WRN]" | "[FTL]" => Some(Kind::Trouble),
        "INFO" | "DEBUG" | "TRACE" | "[INF]" | "[DBG]" | "[TRC]" => Some(Kind::Progress),
        _ => None,
    }
}

/// A line of `--log-format json`: its message, and its other fields as `name=value`.
fn read_json(line: &str) -> Option<(Kind, String)> {
    let json: Value = serde_json::from_str(line).ok()?;
    let kind = of_level(json["level"].as_str()?)?;
    let fields = json["fields"].as_object()?;
    let message = fields.get("message").and_then(Value::as_str);
    let mut text = message.unwrap_or_default().to_owned();
    for (name, value) in fields.iter().filter(|(name, _)| *name != "message") {
        text += &format!(" {name}={value}");
    }
    Some((kind, text.trim_start().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reason after these lines on standard error, and after a time.
    fn reason_after(lines: &[&str], waited: Duration) -> Option<String> {
        let mut last = LastLines::default();
        for line in lines {
            last.push(Stream::Error, line);
        }
        last.reason(Instant::now() + waited)
    }

    fn reason(lines: &[&str]) -> Option<String> {
        reason_after(lines, Duration::ZERO)
    }

    const INFO: &str =
        "2026-11-25T07:05:57.208673Z  INFO KV peer connected worker=both-0 error=none";
    const WARN: &str = "2026-11-25T07:05:59.983558Z  WARN the connection failed peer=083d";

    #[test]
    fn a_line_that_only_reports_progress_is_no_reason() {
        let json =
            r#"{"timestamp":"t","level":"INFO","fields":{"message":"an error was expected"}}"#;
        let nats = "[30549] 2026/11/25 07:05:53.761767 [INF] Server is ready";
        for line in [INFO, json, nats, ""] {
            assert_eq!(reason(&[line]), None, "{line}");
        }
    }

    #[test]
    fn trouble_is_the_reason_without_its_time_and_level() {
        assert_eq!(
            reason(&[WARN, INFO]).unwrap(),
            "the connection failed peer=083d"
        );
        let json = r#"{"timestamp":"t","level":"ERROR","fields":{"message":"no room","bytes":7}}"#;
        assert_eq!(reason(&[json]).unwrap(), "no room bytes=7");
        let nats = "[30549] 2026/11/25 07:05:53.761767 [FTL] Error listening on port";
        assert_eq!(reason(&[nats]).unwrap(), "Error listening on port");
        let plain = "free(): invalid pointer";
        assert_eq!(reason(&[WARN, plain]).unwrap(), plain);
        // What a program prints on standard output is no trouble.
        let mut last = LastLines::default();
        last.push(Stream::Output, "hello");
        assert_eq!(last.reason(Instant::now()), None);
    }

    #[test]
    fn a_panic_is_the_reason_with_its_message() {
        let lines = [
            "thread 'engine' panicked at src/engine.rs:7:9:",
            "index out of bounds",
            "stack backtrace:",
            "   0: rust_begin_unwind",
        ];
        let expected = "thread 'engine' panicked at src/engine.rs:7:9: index out of bounds";
        assert_eq!(reason(&lines).unwrap(), expected);
    }

    #[test]
    fn the_sentence_at_the_end_goes_first_and_old_trouble_is_forgotten() {
        let farewell = "baton: cannot listen on 127.0.0.1:8000";
        let lines = [farewell, WARN];
        let hour = Duration::from_secs(3600);
        for waited in [Duration::ZERO, hour] {
            let reason = reason_after(&lines, waited).unwrap();
            assert_eq!(reason, "cannot listen on 127.0.0.1:8000");
        }
        assert_eq!(reason_after(&[WARN], hour), None);
        assert_eq!(
            reason(&["x".repeat(70_000).as_str()]).unwrap().len(),
            CHARACTERS_MAX
        );
    }

    #[test]
    fn a_signal_is_named_with_what_sends_it() {
        let lived = Duration::from_millis(5400);
        let killed = sentence(ExitStatus::from_raw(9), lived, None);
        let expected = "was killed by signal 9 (SIGKILL) after 5.4 s: out of memory (see dmesg), or killed by hand";
        assert_eq!(killed, expected);
        let aborted = sentence(
            ExitStatus::from_raw(6),
            lived,
            Some("free(): invalid pointer"),
        );
        let expected =
            "was killed by signal 6 (SIGABRT) after 5.4 s; it said: free(): invalid pointer";
        assert_eq!(aborted, expected);
        let ended = sentence(ExitStatus::from_raw(3 << 8), lived, None);
        assert_eq!(
            ended,
            "ended with exit status: 3 after 5.4 s and gave no reason"
        );
    }
}
