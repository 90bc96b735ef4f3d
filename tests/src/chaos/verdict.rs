//! Whether one request was treated rightly.

use serde_json::Value;

use super::client::{End, Story};
use super::load::Reader;
use super::said::{Said, StreamEnd};

/// What is to be said of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Answered, and every bit of it is right.
    Right,
    /// The client left before the end; what it had until then is right.
    Left,
    /// An error of a kind that a client can be told, cleanly told; what came before it is right.
    Error(Failure),
    /// Another text, another error, or no end.
    Wrong(String),
    /// A stream with a hole, or that is no stream.
    Gap(String),
}

/// Errors that faults may lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// 503 `busy`: every worker refused for want of room.
    Busy,
    /// The same, because its first token would come later than promised.
    Promise,
    /// 503 `no_worker`: nobody there to do it.
    NoWorker,
    /// 503 `bus_unavailable`.
    Bus,
    /// 504 `deadline_exceeded`.
    Deadline,
    /// 502 `worker_failed`: so did the retries.
    Worker,
    /// The connection broke, or there was none.
    Connection,
}

impl Failure {
    /// Its status and its code.
    const TABLE: [(u16, &'static str, Self); 5] = [
        (503, "busy", Self::Busy),
        (503, "no_worker", Self::NoWorker),
        (503, "bus_unavailable", Self::Bus),
        (504, "deadline_exceeded", Self::Deadline),
        (502, "worker_failed", Self::Worker),
    ];

    /// Its name in reports.
    pub fn label(self) -> &'static str {
        if self == Self::Promise {
            return "refused";
        }
        let row = Self::TABLE.iter().find(|(_, _, failure)| *failure == self);
        row.map_or("connection", |(_, code, _)| code)
    }
}

/// Judges what came back for a request whose undisturbed answer is `expected`.
pub fn judge(story: &Story, reader: Reader, expected: &Said) -> Verdict {
    match (&story.end, story.status) {
        (End::Hung, _) => Verdict::Wrong("nothing ended it".to_owned()),
        (_, Some(200)) if reader.streams() => streamed(story, reader, expected),
        (End::Complete, Some(200)) => match Said::whole(&story.body) {
            Ok(said) => compare(&said, expected),
            Err(reason) => Verdict::Wrong(reason),
        },
        (End::Complete, Some(status)) => refused(story, status),
        (End::Complete, None) => Verdict::Wrong("an end without a beginning".to_owned()),
        (End::Left, _) => Verdict::Left,
        (End::Broken(_), _) => Verdict::Error(Failure::Connection),
    }
}

fn streamed(story: &Story, reader: Reader, expected: &Said) -> Verdict {
    let (said, end) = match Said::streamed(&story.body) {
        Ok(stream) => stream,
        Err(reason) => return Verdict::Gap(reason),
    };
    if end == StreamEnd::Done {
        let mut expected = expected.clone();
        if !reader.wants_usage() {
            expected.usage = None;
        }
        return compare(&said, &expected);
    }
    if !said.begins(expected) {
        let difference = said.difference(expected);
        return Verdict::Wrong(format!("the stream began otherwise: {difference:?}"));
    }
    match (end, &story.end) {
        (StreamEnd::Error(body), _) => named(&body, None),
        (_, End::Left) => Verdict::Left,
        (_, End::Broken(_)) => Verdict::Error(Failure::Connection),
        (_, _) => Verdict::Gap("the stream ended without [DONE]".to_owned()),
    }
}

fn compare(said: &Said, expected: &Said) -> Verdict {
    match said.difference(expected) {
        None => Verdict::Right,
        Some(difference) => Verdict::Wrong(difference),
    }
}

fn refused(story: &Story, status: u16) -> Verdict {
    let body: Value = match serde_json::from_slice(&story.body) {
        Ok(body) => body,
        Err(e) => return Verdict::Wrong(format!("{status} whose body is no JSON: {e}")),
    };
    let waits = story.retry_after.as_deref().map(str::parse::<u32>);
    if status == 503 && !matches!(waits, Some(Ok(1..))) {
        return Verdict::Wrong(format!(
            "503 with Retry-After {:?}: {body}",
            story.retry_after
        ));
    }
    named(&body, Some(status))
}

/// Whether a request was refused because what was promised cannot be kept.
fn is_for_promise(message: &Value) -> bool {
    message
        .as_str()
        .is_some_and(|message| message.contains("later than promised"))
}

/// An error body in OpenAI's form, of a kind that may be told.
fn named(body: &Value, status: Option<u16>) -> Verdict {
    let error = &body["error"];
    let spoken = error["message"]
        .as_str()
        .is_some_and(|message| message.len() > 8);
    let found = Failure::TABLE.into_iter().find(|(its, code, _)| {
        error["code"] == *code && status.is_none_or(|status| status == *its)
    });
    match found {
        Some((_, _, Failure::Busy)) if is_for_promise(&error["message"]) => {
            Verdict::Error(Failure::Promise)
        }
        Some((_, _, failure)) if spoken && error["type"].is_string() => Verdict::Error(failure),
        _ => Verdict::Wrong(format!(
            "an error that no fault leads to: {status:?} {body}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Failure, Verdict, judge};
    use crate::chaos::client::{End, Story};
    use crate::chaos::load::Reader;
    use crate::chaos::said::Said;

    const BODY: &str = r#"{"choices":[{"index":0,"text":"yes","finish_reason":"stop"}],"usage":{"total_tokens":2}}"#;

    fn story(status: u16, body: &str, end: End) -> Story {
        Story {
            first: None,
            from: Duration::ZERO,
            until: Duration::from_secs(1),
            status: Some(status),
            retry_after: Some("1".to_owned()),
            body: body.as_bytes().to_vec(),
            end,
        }
    }

    fn verdict(story: &Story, reader: Reader) -> Verdict {
        judge(
            story,
            reader,
            &Said::whole(BODY.as_bytes()).expect("an answer"),
        )
    }

    #[test]
    fn only_the_same_answer_is_right() {
        let right = story(200, BODY, End::Complete);
        assert_eq!(verdict(&right, Reader::Whole), Verdict::Right);
        for other in [
            BODY.replace("yes", "no"),
            BODY.replace("stop", "length"),
            BODY.replace(":2}", ":3}"),
            BODY.replace("\"index\":0", "\"index\":1"),
            BODY[..20].to_owned(),
        ] {
            let wrong = story(200, &other, End::Complete);
            assert!(
                matches!(verdict(&wrong, Reader::Whole), Verdict::Wrong(_)),
                "{other}"
            );
        }
        let hung = story(200, BODY, End::Hung);
        assert!(matches!(verdict(&hung, Reader::Whole), Verdict::Wrong(_)));
    }

    #[test]
    fn errors_have_their_status_a_sentence_and_a_time_to_wait() {
        let busy = r#"{"error":{"message":"every worker is full","type":"overloaded_error","code":"busy"}}"#;
        let told = story(503, busy, End::Complete);
        assert_eq!(verdict(&told, Reader::Whole), Verdict::Error(Failure::Busy));
        let late = busy.replace(
            "full",
            "late: its first token would come later than promised",
        );
        let refused = story(503, &late, End::Complete);
        assert_eq!(
            verdict(&refused, Reader::Whole),
            Verdict::Error(Failure::Promise)
        );
        let silent = Story {
            retry_after: None,
            ..told.clone()
        };
        for wrong in [
            silent,
            story(500, busy, End::Complete),
            story(503, &busy.replace("busy", "internal_error"), End::Complete),
            story(
                503,
                &busy.replace("every worker is full", ""),
                End::Complete,
            ),
            story(503, "busy", End::Complete),
        ] {
            assert!(
                matches!(verdict(&wrong, Reader::Whole), Verdict::Wrong(_)),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn a_stream_may_stop_but_only_in_the_right_text() {
        let reader = Reader::Stream { usage: false };
        let begun =
            |text: &str| format!("data: {{\"choices\":[{{\"index\":0,\"text\":\"{text}\"}}]}}\n\n");
        let left = story(200, &begun("ye"), End::Left);
        assert_eq!(verdict(&left, reader), Verdict::Left);
        let other = story(200, &begun("ey"), End::Left);
        assert!(matches!(verdict(&other, reader), Verdict::Wrong(_)));
        let cut = story(200, &begun("ye"), End::Complete);
        assert!(matches!(verdict(&cut, reader), Verdict::Gap(_)));
        let broken = story(200, &begun("ye"), End::Broken("reset".to_owned()));
        assert_eq!(
            verdict(&broken, reader),
            Verdict::Error(Failure::Connection)
        );
    }
}
