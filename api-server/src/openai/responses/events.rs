//! The answer as a stream of events. Deltas are written by hand around text that alone is escaped; what an item has said is repeated
//! whole at its end, as clients expect.

use super::answer::{Kind, Open, ResponseWriter, Status, code, logprobs, logprobs_field};
use crate::error::ApiError;
use crate::openai::{escape, put};
use crate::output::{Finish, Part, Piece, StreamWriter, Usage};
use crate::text::tokenizer::ModelText;

impl StreamWriter for ResponseWriter {
    fn open(&mut self, _: usize, _: Usage, out: &mut Vec<u8>) {
        for kind in ["response.created", "response.in_progress"] {
            self.event(kind, out);
            out.extend_from_slice(b",\"response\":");
            self.object(Status::InProgress, None, out);
            out.extend_from_slice(b"}\n\n");
        }
    }

    fn text(&mut self, _: usize, piece: Piece<'_>, _: Usage, model: &ModelText, out: &mut Vec<u8>) {
        logprobs(piece.logprobs, model, &mut self.waiting);
        self.say(&Kind::Message, piece.text, out);
    }

    fn part(
        &mut self,
        _: usize,
        part: &Part,
        piece: Piece<'_>,
        _: Usage,
        model: &ModelText,
        out: &mut Vec<u8>,
    ) {
        logprobs(piece.logprobs, model, &mut self.waiting);
        match part {
            Part::Content(text) => self.say(&Kind::Message, text, out),
            Part::Reasoning(text) => self.say(&Kind::Reasoning, text, out),
            Part::Call { id, name, .. } => {
                self.end_item(Status::Completed, out);
                let (id, name) = (id.clone(), name.clone());
                self.begin_item(Kind::Call { id, name }, out);
            }
            Part::Arguments { delta, .. } => {
                if self.open.is_some() {
                    self.delta("response.function_call_arguments.delta", delta, out);
                }
            }
        }
    }

    fn finish(&mut self, _: usize, finish: &Finish, usage: Usage, out: &mut Vec<u8>) {
        let status = Status::of(finish);
        // An answer has an item, and be it an empty one.
        if self.open.is_none() && self.items.is_empty() {
            self.begin_item(Kind::Message, out);
        }
        self.end_item(status, out);
        let response = self.end(finish, usage);
        self.event(
            match status {
                Status::Incomplete => "response.incomplete",
                _ => "response.completed",
            },
            out,
        );
        out.extend_from_slice(b",\"response\":");
        out.extend_from_slice(&response);
        out.extend_from_slice(b"}\n\n");
    }

    fn done(&mut self, _: Usage, _: &mut Vec<u8>) {}

    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        self.event("error", out);
        put(
            out,
            format_args!(
                ",\"code\":\"{}\",\"param\":null,\"message\":\"",
                code(error.kind.row().status)
            ),
        );
        escape(&error.message, out);
        out.extend_from_slice(b"\"}\n\n");
        self.event("response.failed", out);
        out.extend_from_slice(b",\"response\":");
        self.object(Status::Failed(error), None, out);
        out.extend_from_slice(b"}\n\n");
    }
}

impl ResponseWriter {
    /// The beginning of an event, in its object.
    pub(super) fn event(&mut self, kind: &str, out: &mut Vec<u8>) {
        put(
            out,
            format_args!(
                "event: {kind}\ndata: {{\"type\":\"{kind}\",\"sequence_number\":{}",
                self.events
            ),
        );
        self.events += 1;
    }

    /// Of an event about a part of the item under way: where it is.
    pub(super) fn place(&self, id: &str, has_parts: bool, out: &mut Vec<u8>) {
        put(
            out,
            format_args!(
                ",\"item_id\":\"{id}\",\"output_index\":{}",
                self.items.len()
            ),
        );
        if has_parts {
            out.extend_from_slice(b",\"content_index\":0");
        }
    }

    fn say(&mut self, kind: &Kind, text: &str, out: &mut Vec<u8>) {
        if text.is_empty() {
            return;
        }
        if self.open.as_ref().is_none_or(|open| open.kind != *kind) {
            self.end_item(Status::Completed, out);
            self.begin_item(kind.clone(), out);
        }
        let name = match kind {
            Kind::Reasoning => "response.reasoning_text.delta",
            _ => "response.output_text.delta",
        };
        self.delta(name, text, out);
    }

    fn begin_item(&mut self, kind: Kind, out: &mut Vec<u8>) {
        let open = self.begin(kind);
        self.event("response.output_item.added", out);
        put(
            out,
            format_args!(",\"output_index\":{},\"item\":", self.items.len()),
        );
        open.item(Status::InProgress.word(), out);
        out.extend_from_slice(b"}\n\n");
        if has_parts(&open) {
            self.event("response.content_part.added", out);
            self.place(&open.id, true, out);
            out.extend_from_slice(b",\"part\":");
            open.part(out);
            out.extend_from_slice(b"}\n\n");
        }
        self.begin_summary(&open, out);
        self.open = Some(open);
    }

    fn delta(&mut self, name: &str, text: &str, out: &mut Vec<u8>) {
        let Some(mut open) = self.open.take() else {
            return;
        };
        self.event(name, out);
        self.place(&open.id, has_parts(&open), out);
        if open.kind == Kind::Message {
            logprobs_field(&self.waiting, out);
            self.take_waiting(&mut open);
        }
        out.extend_from_slice(b",\"delta\":\"");
        escape(text, out);
        out.extend_from_slice(b"\"}\n\n");
        self.summary_delta(&open, text, out);
        open.text.push_str(text);
        self.open = Some(open);
    }

    /// Puts the log-probabilities that wait with those of this message.
    fn take_waiting(&mut self, message: &mut Open) {
        if !self.waiting.is_empty() && !message.logprobs.is_empty() {
            message.logprobs.push(b',');
        }
        message.logprobs.append(&mut self.waiting);
    }

    /// Ends the item under way, if there is one.
    fn end_item(&mut self, status: Status<'_>, out: &mut Vec<u8>) {
        let Some(mut open) = self.open.take() else {
            return;
        };
        if open.kind == Kind::Message {
            // Of tokens that made no text of their own.
            self.take_waiting(&mut open);
        }
        let (name, field) = match &open.kind {
            Kind::Reasoning => ("response.reasoning_text.done", "text"),
            Kind::Message => ("response.output_text.done", "text"),
            Kind::Call { .. } => ("response.function_call_arguments.done", "arguments"),
        };
        self.event(name, out);
        self.place(&open.id, has_parts(&open), out);
        match &open.kind {
            Kind::Reasoning => {}
            Kind::Message => logprobs_field(&open.logprobs, out),
            Kind::Call { name, .. } => {
                out.extend_from_slice(b",\"name\":\"");
                escape(name, out);
                out.push(b'"');
            }
        }
        put(out, format_args!(",\"{field}\":\""));
        escape(&open.text, out);
        out.extend_from_slice(b"\"}\n\n");
        if has_parts(&open) {
            self.event("response.content_part.done", out);
            self.place(&open.id, true, out);
            out.extend_from_slice(b",\"part\":");
            open.part(out);
            out.extend_from_slice(b"}\n\n");
        }
        self.end_summary(&open, out);
        self.event("response.output_item.done", out);
        put(
            out,
            format_args!(",\"output_index\":{},\"item\":", self.items.len()),
        );
        open.item(status.word(), out);
        out.extend_from_slice(b"}\n\n");
        self.close(&open, status.word());
    }
}

fn has_parts(open: &Open) -> bool {
    !matches!(open.kind, Kind::Call { .. })
}

#[cfg(test)]
mod tests {
    use baton_protocol::FinishReason;
    use serde_json::{Map, Value, json};

    use super::super::reasoned::{Reasoned, sent_back};
    use super::*;
    use crate::error::ErrorKind;
    use crate::output::LogprobEntry;
    use crate::text::tokenizer::tests::opened;

    fn events(bytes: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(bytes).unwrap();
        let event = |block: &str| {
            let (name, data) = block.split_once('\n').unwrap();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(data["type"], name.strip_prefix("event: ").unwrap());
            data
        };
        let events: Vec<Value> = text.split_terminator("\n\n").map(event).collect();
        for (i, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], i);
        }
        events
    }

    #[test]
    fn reasoning_text_and_calls_are_items_one_after_the_other() {
        let model = opened(7, "{}").unwrap();
        let mut writer = ResponseWriter::new("x", "m", &Map::new(), None);
        let (usage, mut out) = (Usage::default(), Vec::new());
        writer.open(0, usage, &mut out);
        let call = |index: usize| Part::Call {
            index,
            id: format!("call_{index}"),
            name: "f".to_owned(),
        };
        let arguments = |index: usize, delta: &str| Part::Arguments {
            index,
            delta: delta.to_owned(),
        };
        for part in [
            Part::Reasoning("Hm".to_owned()),
            Part::Reasoning("\"".to_owned()),
            Part::Content(String::new()),
            Part::Content("é".to_owned()),
            call(0),
            arguments(0, "{\"a\""),
            arguments(0, ": 1}"),
            call(1),
            arguments(1, "{}"),
        ] {
            writer.part(0, &part, Piece::default(), usage, &model, &mut out);
        }
        let finish = Finish {
            reason: FinishReason::Stop,
            has_called: true,
            stop: None,
        };
        writer.finish(0, &finish, usage, &mut out);
        writer.done(usage, &mut out);
        let events = events(&out);
        let names: Vec<&str> = events
            .iter()
            .map(|event| event["type"].as_str().unwrap())
            .collect();
        let item = |deltas: &[&'static str], parts: bool| {
            let mut names = vec!["response.output_item.added"];
            names.extend(parts.then_some("response.content_part.added"));
            names.extend(deltas);
            names.extend(parts.then_some("response.content_part.done"));
            names.push("response.output_item.done");
            names
        };
        let (thought, said) = (
            "response.reasoning_text.delta",
            "response.output_text.delta",
        );
        let called = [
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
        ];
        let expected = [
            vec!["response.created", "response.in_progress"],
            item(&[thought, thought, "response.reasoning_text.done"], true),
            item(&[said, "response.output_text.done"], true),
            item(&[called[0], called[0], called[1]], false),
            item(&called, false),
            vec!["response.completed"],
        ];
        assert_eq!(names, expected.concat());
        let last = &events.last().unwrap()["response"];
        let done: Vec<&Value> = events
            .iter()
            .filter(|event| event["type"] == "response.output_item.done")
            .map(|event| &event["item"])
            .collect();
        assert_eq!(
            last["output"]
                .as_array()
                .unwrap()
                .iter()
                .collect::<Vec<_>>(),
            done
        );
        assert_eq!(last["output"][0]["content"][0]["text"], "Hm\"");
        assert_eq!(last["output"][1]["content"][0]["text"], "é");
        assert_eq!(last["output"][2]["arguments"], "{\"a\": 1}");
        assert_eq!(last["status"], "completed");
        for (event, index) in events
            .iter()
            .filter(|event| event["type"] == "response.output_item.added")
            .zip(0..)
        {
            assert_eq!(event["output_index"], index);
            assert_eq!(event["item"]["status"], "in_progress");
        }
    }

    #[test]
    fn a_summary_that_is_asked_for_is_the_reasoning_once_more() {
        let model = opened(7, "{}").unwrap();
        let reasoned = Reasoned {
            has_summary: true,
            is_sent_back: true,
        };
        let writer = ResponseWriter::new("x", "m", &Map::new(), None);
        let mut writer = writer.with_reasoned(reasoned);
        let (usage, mut out) = (Usage::default(), Vec::new());
        for text in ["Hm", "\""] {
            let part = Part::Reasoning(text.to_owned());
            writer.part(0, &part, Piece::default(), usage, &model, &mut out);
        }
        let part = Part::Content("Yes".to_owned());
        writer.part(0, &part, Piece::default(), usage, &model, &mut out);
        let finish = Finish {
            reason: FinishReason::Stop,
            has_called: false,
            stop: None,
        };
        writer.finish(0, &finish, usage, &mut out);
        let events = events(&out);
        let of_summary: Vec<(&str, &Value)> = events
            .iter()
            .filter_map(|event| {
                let name = event["type"]
                    .as_str()?
                    .strip_prefix("response.reasoning_summary_")?;
                assert_eq!(
                    (&event["item_id"], &event["output_index"]),
                    (&json!("rs_x_0"), &json!(0))
                );
                assert_eq!(event["summary_index"], 0);
                let fields = ["delta", "text", "part"];
                Some((name, fields.iter().find_map(|field| event.get(*field))?))
            })
            .collect();
        let part = |text: &str| json!({"type": "summary_text", "text": text});
        let expected = [
            ("part.added", &part("")),
            ("text.delta", &json!("Hm")),
            ("text.delta", &json!("\"")),
            ("text.done", &json!("Hm\"")),
            ("part.done", &part("Hm\"")),
        ];
        assert_eq!(of_summary, expected);
        let response = &events.last().unwrap()["response"];
        let thought = &response["output"][0];
        assert_eq!(thought["summary"], json!([part("Hm\"")]));
        let sent = thought["encrypted_content"].as_str().unwrap();
        assert_eq!(sent_back(sent).as_deref(), Some("Hm\""));
        assert_eq!(thought["content"][0]["text"], "Hm\"");
    }

    #[test]
    fn log_probabilities_come_with_the_text_of_their_tokens() {
        let model = opened(7, "{}").unwrap();
        let mut writer = ResponseWriter::new("x", "m", &Map::new(), None);
        let (usage, mut out) = (Usage::default(), Vec::new());
        let entry = |token: u32, in_content: bool| LogprobEntry {
            token,
            logprob: Some(-(token as f32)),
            top: Vec::new(),
            offset: 0,
            in_content,
        };
        let mut say = |part: Part, entries: &[LogprobEntry]| {
            let piece = Piece {
                logprobs: entries,
                ..Piece::default()
            };
            writer.part(0, &part, piece, usage, &model, &mut out);
        };
        // What came at once goes with the first part, whosever it is.
        say(
            Part::Reasoning("Hm".to_owned()),
            &[entry(1, false), entry(2, false), entry(3, true)],
        );
        say(Part::Content("a".to_owned()), &[]);
        say(Part::Content(String::new()), &[entry(4, true)]);
        say(Part::Content("b".to_owned()), &[entry(5, true)]);
        say(Part::Content("c".to_owned()), &[]);
        say(Part::Content(String::new()), &[entry(6, true)]);
        let finish = Finish {
            reason: FinishReason::Stop,
            has_called: false,
            stop: None,
        };
        writer.finish(0, &finish, usage, &mut out);
        let events = events(&out);
        let of = |value: &Value| -> Vec<f64> {
            let list = value["logprobs"].as_array().unwrap();
            let numbers = list.iter().map(|one| one["logprob"].as_f64().unwrap());
            numbers.collect()
        };
        let named = |name: &str| {
            let events = events.iter().filter(|event| event["type"] == name);
            events.collect::<Vec<_>>()
        };
        let deltas = named("response.output_text.delta");
        let deltas: Vec<Vec<f64>> = deltas.into_iter().map(of).collect();
        assert_eq!(deltas, [vec![-3.0], vec![-4.0, -5.0], vec![]]);
        let all = [-3.0, -4.0, -5.0, -6.0];
        assert_eq!(of(named("response.output_text.done")[0]), all);
        assert_eq!(of(&named("response.content_part.done")[1]["part"]), all);
        let response = &named("response.completed")[0]["response"];
        assert_eq!(of(&response["output"][1]["content"][0]), all);
        assert!(of(&named("response.content_part.added")[1]["part"]).is_empty());
    }

    #[test]
    fn an_answer_of_nothing_has_an_item_and_a_failure_is_told() {
        let mut writer = ResponseWriter::new("x", "m", &Map::new(), None);
        let mut out = Vec::new();
        let finish = Finish {
            reason: FinishReason::Length,
            has_called: false,
            stop: None,
        };
        writer.finish(0, &finish, Usage::default(), &mut out);
        let all = events(&out);
        let last = all.last().unwrap();
        assert_eq!(last["type"], "response.incomplete");
        assert_eq!(last["response"]["output"][0]["content"][0]["text"], "");
        let mut writer = ResponseWriter::new("x", "m", &Map::new(), None);
        let mut out = Vec::new();
        writer.fail(&ApiError::new(ErrorKind::Worker, "no \"worker\""), &mut out);
        let all = events(&out);
        assert_eq!(
            (&all[0]["type"], &all[0]["message"]),
            (&json!("error"), &json!("no \"worker\""))
        );
        assert_eq!(
            all[1]["response"]["error"],
            json!({"code": "server_error", "message": "no \"worker\""})
        );
        assert_eq!(all[1]["response"]["status"], "failed");
    }
}
