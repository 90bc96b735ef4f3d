//! What an answer says, whether it came in one piece or as a stream: one form for both, so that they can be compared.

use std::collections::BTreeMap;

use serde_json::Value;

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// The choices, by their index.
    pub choices: BTreeMap<u64, Choice>,
    /// Tokens used, without how many of them a cache had.
    pub usage: Option<Value>,
}

/// What one choice says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// Its text.
    pub text: String,
    /// The lists that its log-probabilities are made of.
    pub logprobs: BTreeMap<String, Vec<Value>>,
    /// Why it ended; `None` as long as it goes on.
    pub finish: Option<String>,
}

/// How a stream ended.
#[derive(Clone, Debug, PartialEq)]
pub enum StreamEnd {
    /// With `[DONE]`.
    Done,
    /// With an error event.
    Error(Value),
    /// In the middle.
    Cut,
}

impl Said {
    /// An answer in one piece.
    ///
    /// # Errors
    /// What is missing in it.
    pub fn whole(body: &[u8]) -> Result<Self, String> {
        let body = serde_json::from_slice(body).map_err(|e| format!("no JSON: {e}"))?;
        Self::of(&body)
    }

    /// The same, parsed.
    ///
    /// # Errors
    /// What is missing in it.
    pub fn of(body: &Value) -> Result<Self, String> {
        let mut said = Self {
            usage: Some(usage(&body["usage"])?),
            ..Self::default()
        };
        for choice in choices(body)? {
            let text = choice["message"]["content"]
                .as_str()
                .or(choice["text"].as_str());
            said.add(choice, text.ok_or("a choice without text")?)?;
        }
        if said.choices.values().any(|choice| choice.finish.is_none()) {
            return Err("a choice without an end".to_owned());
        }
        Ok(said)
    }

    /// The events of a stream, as far as they came.
    ///
    /// # Errors
    /// Why this is not one uninterrupted stream.
    pub fn streamed(body: &[u8]) -> Result<(Self, StreamEnd), String> {
        let body = String::from_utf8_lossy(body);
        let mut said = Self::default();
        let mut end = StreamEnd::Cut;
        let mut id = None;
        // what follows the last empty line is an event that was cut
        let whole = body.rfind("\n\n").map_or("", |last| &body[..last]);
        for event in whole.split("\n\n") {
            let mut failed = false;
            let mut data = None;
            for line in event.lines() {
                match line.split_once(": ") {
                    Some(("", _)) => {}
                    Some(("event", "error")) => failed = true,
                    Some(("data", text)) if data.is_none() => data = Some(text),
                    _ => return Err(format!("a line that is no event's: {line:?}")),
                }
            }
            let Some(data) = data else { continue };
            if end != StreamEnd::Cut {
                return Err(format!("something follows the end: {data}"));
            }
            if data == "[DONE]" {
                end = StreamEnd::Done;
                continue;
            }
            let value: Value =
                serde_json::from_str(data).map_err(|e| format!("no JSON: {e}: {data}"))?;
            if failed {
                end = StreamEnd::Error(value);
                continue;
            }
            if *id.get_or_insert_with(|| value["id"].clone()) != value["id"] {
                return Err(format!("two ids in one stream: {id:?} and {}", value["id"]));
            }
            said.chunk(&value)?;
        }
        let open = said.choices.values().any(|choice| choice.finish.is_none());
        if end == StreamEnd::Done && (open || said.choices.is_empty()) {
            return Err("[DONE] came before every choice had ended".to_owned());
        }
        Ok((said, end))
    }

    fn chunk(&mut self, chunk: &Value) -> Result<(), String> {
        if self.usage.is_some() {
            return Err(format!("something follows the usage: {chunk}"));
        }
        let choices = choices(chunk)?;
        if choices.is_empty() {
            self.usage = Some(usage(&chunk["usage"])?);
        }
        for choice in choices {
            let delta = &choice["delta"];
            let known = choice["index"]
                .as_u64()
                .is_some_and(|index| self.choices.contains_key(&index));
            if delta.is_object() && delta["role"].is_string() == known {
                return Err(format!("the role must come once, and first: {chunk}"));
            }
            let text = delta["content"].as_str().or(choice["text"].as_str());
            self.add(choice, text.unwrap_or_default())?;
        }
        Ok(())
    }

    fn add(&mut self, from: &Value, text: &str) -> Result<(), String> {
        let index = from["index"].as_u64().ok_or("a choice without index")?;
        let choice = self.choices.entry(index).or_default();
        if let Some(finish) = &choice.finish {
            return Err(format!(
                "choice {index} goes on after its end ({finish}): {from}"
            ));
        }
        choice.text.push_str(text);
        choice.finish = from["finish_reason"].as_str().map(str::to_owned);
        for (name, list) in from["logprobs"].as_object().into_iter().flatten() {
            let list = list.as_array().into_iter().flatten().cloned();
            choice
                .logprobs
                .entry(name.clone())
                .or_default()
                .extend(list);
        }
        Ok(())
    }

    /// In what this differs from what it should be; `None` if in nothing.
    pub fn difference(&self, should: &Self) -> Option<String> {
        if self.usage != should.usage {
            return Some(format!("usage {:?} for {:?}", self.usage, should.usage));
        }
        if self.choices.keys().ne(should.choices.keys()) {
            let (is, should) = (self.choices.keys(), should.choices.keys());
            return Some(format!("choices {is:?} for {should:?}"));
        }
        let mut pairs = self.choices.iter().zip(should.choices.values());
        pairs.find_map(|((index, choice), should)| {
            let difference = choice.difference(should)?;
            Some(format!("choice {index}: {difference}"))
        })
    }

    /// Whether `self` may be how `whole` began.
    pub fn begins(&self, whole: &Self) -> bool {
        self.choices.iter().all(|(index, choice)| {
            whole
                .choices
                .get(index)
                .is_some_and(|whole| choice.begins(whole))
        })
    }
}

impl Choice {
    fn difference(&self, should: &Self) -> Option<String> {
        if self.text != should.text || self.finish != should.finish {
            let (text, finish) = (&self.text, &self.finish);
            return Some(format!(
                "{text:?}, {finish:?} for {:?}, {:?}",
                should.text, should.finish
            ));
        }
        if self.logprobs.keys().ne(should.logprobs.keys()) {
            return Some(format!("log-probabilities with {:?}", self.logprobs.keys()));
        }
        let mut lists = self.logprobs.iter().zip(should.logprobs.values());
        lists.find_map(|((name, list), should)| {
            let place =
                (0..list.len().max(should.len())).find(|at| list.get(*at) != should.get(*at))?;
            let (is, should) = (list.get(place), should.get(place));
            Some(format!("{name}[{place}] is {is:?} for {should:?}"))
        })
    }

    fn begins(&self, whole: &Self) -> bool {
        let listed = |(name, list): (&String, &Vec<Value>)| {
            whole
                .logprobs
                .get(name)
                .is_some_and(|whole| whole.starts_with(list))
        };
        match self.finish {
            Some(_) => self == whole,
            None => whole.text.starts_with(&self.text) && self.logprobs.iter().all(listed),
        }
    }
}

fn choices(value: &Value) -> Result<&Vec<Value>, String> {
    value["choices"]
        .as_array()
        .ok_or_else(|| format!("no choices: {value}"))
}

/// How much of a prompt was cached is no part of what is right.
fn usage(value: &Value) -> Result<Value, String> {
    let mut usage = value.as_object().ok_or("no usage")?.clone();
    usage.remove("prompt_tokens_details");
    Ok(Value::Object(usage))
}

#[cfg(test)]
mod tests {
    use super::{Said, StreamEnd};

    const WHOLE: &str = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"one two"},
        "logprobs":{"content":[1,2],"refusal":null},"finish_reason":"stop"}],
        "usage":{"prompt_tokens":3,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}"#;

    /// The events of the same answer.
    fn events() -> Vec<String> {
        let choice = |delta: &str, logprobs: &str, finish: &str| {
            format!(
                r#"data: {{"id":"a","choices":[{{"index":0,"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}]}}"#
            )
        };
        vec![
            choice(r#"{"role":"assistant","content":""}"#, "null", "null"),
            ": keep-alive".to_owned(),
            choice(
                r#"{"content":"one"}"#,
                r#"{"content":[1],"refusal":null}"#,
                "null",
            ),
            choice(
                r#"{"content":" two"}"#,
                r#"{"content":[2],"refusal":null}"#,
                "null",
            ),
            choice("{}", "null", r#""stop""#),
            r#"data: {"id":"a","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#
                .to_owned(),
            "data: [DONE]".to_owned(),
        ]
    }

    fn read(events: &[String]) -> Result<(Said, StreamEnd), String> {
        let body: String = events.iter().map(|event| format!("{event}\n\n")).collect();
        Said::streamed(body.as_bytes())
    }

    #[test]
    fn a_stream_says_the_same_as_an_answer_in_one_piece() {
        let whole = Said::whole(WHOLE.as_bytes()).expect("an answer");
        assert_eq!(read(&events()), Ok((whole, StreamEnd::Done)));
    }

    #[test]
    fn every_beginning_of_a_stream_begins_the_answer_and_nothing_else_does() {
        let whole = Said::whole(WHOLE.as_bytes()).expect("an answer");
        for count in 0..events().len() {
            let (said, end) = read(&events()[..count]).expect("a stream");
            assert_eq!(end, StreamEnd::Cut);
            assert!(said.begins(&whole), "{said:?}");
        }
        for (from, to) in [("one", "eno"), ("[2]", "[3]"), ("stop", "length")] {
            let mut events = events();
            for event in &mut events {
                *event = event.replace(from, to);
            }
            let (said, _) = read(&events[..5]).expect("a stream");
            assert!(!said.begins(&whole), "{from} was made {to}");
        }
    }

    #[test]
    fn a_lost_event_shows() {
        let whole = Said::whole(WHOLE.as_bytes()).expect("an answer");
        for lost in [0, 2, 3, 4, 5, 6] {
            let mut events = events();
            events.remove(lost);
            let right = (whole.clone(), StreamEnd::Done);
            assert_ne!(read(&events), Ok(right), "event {lost} is missing");
        }
    }

    #[test]
    fn what_comes_twice_or_after_the_end_is_no_stream() {
        for twice in [0, 4, 5, 6] {
            let mut events = events();
            events.insert(twice, events[twice].clone());
            read(&events).expect_err("an event came twice");
        }
        let mut events = events();
        events[3] = events[3].replace(r#""id":"a""#, r#""id":"b""#);
        read(&events).expect_err("two streams in one");
    }

    #[test]
    fn an_error_event_ends_a_stream() {
        let mut events = events();
        events.truncate(3);
        events.push("event: error\ndata: {\"error\":{\"code\":\"busy\"}}".to_owned());
        let (_, end) = read(&events).expect("a stream");
        assert!(matches!(end, StreamEnd::Error(_)), "{end:?}");
        events.push("data: [DONE]".to_owned());
        read(&events).expect_err("an end after the end");
    }
}
