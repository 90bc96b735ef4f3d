//! Answers that are not streams: gathered whole, rendered in pieces. A large one takes gigabytes of JSON and a second of work, so
//! neither is done at once: between pieces the thread's other requests have their turn.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use actix_web::HttpResponse;
use actix_web::body::{BodySize, MessageBody};
use actix_web::http::{StatusCode, header};
use bytes::Bytes;

use super::presence::Presence;
use crate::bound::Bound;
use crate::http::respond;
use crate::openai::Shape;
use crate::output::{AnswerWriter, Call, Finish, LogprobEntry, Outcome, Tally, Usage};
use crate::server::Server;
use crate::text::tokenizer::ModelText;

/// Bytes that are rendered at once: a fraction of a millisecond.
const PIECE_BYTES: usize = 64 << 10;

/// More than one step of rendering writes, but for a token of many bytes.
const STEP_BYTES: usize = 4 << 10;

/// A finished choice.
pub struct Whole {
    /// Its text.
    pub text: String,
    /// Its reasoning, if there is any and it is wanted.
    pub reasoning: String,
    /// Its calls of tools.
    pub calls: Vec<Call>,
    /// Log-probabilities, if asked for.
    pub logprobs: Vec<LogprobEntry>,
    /// Those of its prompt, if asked for.
    pub prompt_logprobs: Vec<LogprobEntry>,
    /// Token ids, if asked for.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Output tokens, and prompt tokens that were cached.
    pub usage: Usage,
    /// Memory of the above, given back with it.
    pub _held: Held,
}

/// A part of the memory that all answers may hold together, until it is dropped.
#[derive(Debug)]
pub struct Held {
    all: Arc<Bound>,
    bytes: usize,
}

impl Held {
    /// Nothing yet.
    pub fn nothing(all: &Arc<Bound>) -> Self {
        Self {
            all: Arc::clone(all),
            bytes: 0,
        }
    }

    /// Takes so many bytes more, if there are.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let taken = self.all.take(bytes);
        if taken {
            self.bytes += bytes;
        }
        taken
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.give(self.bytes);
    }
}

/// The response with these choices. `client` is kept until all of it is written.
pub fn response(
    server: Arc<Server>,
    shape: Shape,
    tally: Tally,
    choices: Vec<Whole>,
    client: Presence,
) -> HttpResponse {
    let mut answer = Answer::new(shape, tally, choices);
    let mut first = Vec::with_capacity(1 << 10);
    answer.render(&server.model, &mut first);
    if answer.is_over() {
        return respond::json(StatusCode::OK, first);
    }
    HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "application/json"))
        .body(WholeBody {
            server,
            answer,
            ready: Some(first),
            _client: client,
        })
}

/// The response with the one choice of a door that writes it at once.
pub fn document(
    writer: Box<dyn AnswerWriter>,
    tally: Tally,
    choice: &Whole,
    model: &ModelText,
) -> HttpResponse {
    let mut tally = tally;
    tally.add(0, choice.usage);
    let outcome = Outcome {
        content: &choice.text,
        reasoning: &choice.reasoning,
        calls: &choice.calls,
        logprobs: &choice.logprobs,
        finish: &choice.finish,
        usage: tally.usage(),
    };
    respond::json(StatusCode::OK, writer.whole(outcome, model))
}

/// The body of a large answer.
struct WholeBody {
    server: Arc<Server>,
    answer: Answer,
    /// The first piece, until it is taken.
    ready: Option<Vec<u8>>,
    _client: Presence,
}

impl MessageBody for WholeBody {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let this = self.get_mut();
        if let Some(piece) = this.ready.take() {
            return Poll::Ready(Some(Ok(piece.into())));
        }
        if this.answer.is_over() {
            return Poll::Ready(None);
        }
        // A reader that takes all there is would keep the thread: after each piece it is everybody's turn.
        let mut piece = Vec::with_capacity(PIECE_BYTES + STEP_BYTES);
        this.answer.render(&this.server.model, &mut piece);
        this.ready = Some(piece);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// An answer and how far it is rendered.
struct Answer {
    shape: Shape,
    tally: Tally,
    choices: std::iter::Enumerate<std::vec::IntoIter<Whole>>,
    /// The number of the choice that is being written.
    index: usize,
    /// What is being written of a prompt.
    prompt: Vec<LogprobEntry>,
    step: Step,
}

/// What is written next.
enum Step {
    Open,
    Choice,
    /// Of a choice, its text from this byte on.
    Text(Whole, usize),
    /// Of a choice, its reasoning under this of its two names, from this byte on.
    Reasoning(Whole, usize, usize),
    /// Of a choice, the arguments of this call from this byte on.
    Calls(Whole, usize, usize),
    /// Of a choice, this entry in this array of its log-probabilities.
    Logprobs(Whole, usize, usize),
    /// Of the prompt of a choice, or of all, this entry of its log-probabilities.
    Prompt(Option<Whole>, usize),
    Finish(Whole),
    Over,
}

impl Answer {
    fn new(shape: Shape, tally: Tally, mut choices: Vec<Whole>) -> Self {
        let first = choices.first_mut().filter(|_| shape.has_one_prompt());
        let prompt = first.map(|choice| std::mem::take(&mut choice.prompt_logprobs));
        Self {
            prompt: prompt.unwrap_or_default(),
            shape,
            tally,
            choices: choices.into_iter().enumerate(),
            index: 0,
            step: Step::Open,
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.step, Step::Over)
    }

    /// Appends the next piece.
    fn render(&mut self, model: &ModelText, out: &mut Vec<u8>) {
        while out.len() < PIECE_BYTES && !self.is_over() {
            let step = std::mem::replace(&mut self.step, Step::Over);
            self.step = self.take(step, model, out);
        }
    }

    /// Takes one step and gives back the next. A choice is dropped with its last.
    fn take(&mut self, step: Step, model: &ModelText, out: &mut Vec<u8>) -> Step {
        let shape = &self.shape;
        match step {
            Step::Open => {
                shape.open_answer(out);
                match shape.has_one_prompt() {
                    true => Step::Prompt(None, 0),
                    false => {
                        shape.open_choices(out);
                        Step::Choice
                    }
                }
            }
            Step::Choice => match self.choices.next() {
                Some((index, whole)) => {
                    self.tally.add(index, whole.usage);
                    self.index = index;
                    let has_content = !whole.text.is_empty() || whole.calls.is_empty();
                    shape.open_choice(index, has_content, out);
                    match has_content {
                        true => Step::Text(whole, 0),
                        false => Step::Reasoning(whole, 0, 0),
                    }
                }
                None => {
                    shape.close_answer(self.tally.usage(), out);
                    Step::Over
                }
            },
            Step::Text(whole, from) => {
                let to = write_some(shape, &whole.text, from, out);
                match to == whole.text.len() {
                    true => {
                        shape.close_string(out);
                        Step::Reasoning(whole, 0, 0)
                    }
                    false => Step::Text(whole, to),
                }
            }
            Step::Reasoning(whole, 0 | 1, _) if whole.reasoning.is_empty() => {
                Step::Calls(whole, 0, 0)
            }
            Step::Reasoning(whole, name @ (0 | 1), from) => {
                if from == 0 {
                    shape.open_reasoning(name == 0, out);
                }
                let to = write_some(shape, &whole.reasoning, from, out);
                match to == whole.reasoning.len() {
                    true => {
                        shape.close_string(out);
                        Step::Reasoning(whole, name + 1, 0)
                    }
                    false => Step::Reasoning(whole, name, to),
                }
            }
            Step::Reasoning(whole, ..) => Step::Calls(whole, 0, 0),
            Step::Calls(whole, number, from) => {
                let Some(call) = whole.calls.get(number) else {
                    shape.close_message(out);
                    return Step::Logprobs(whole, 0, 0);
                };
                if from == 0 {
                    shape.open_call(number, call, out);
                }
                let to = write_some(shape, &call.arguments, from, out);
                match to == call.arguments.len() {
                    true => {
                        shape.close_call(number + 1 == whole.calls.len(), out);
                        Step::Calls(whole, number + 1, 0)
                    }
                    false => Step::Calls(whole, number, to),
                }
            }
            Step::Logprobs(mut whole, array, entry) => {
                if entry == 0 && !shape.open_logprobs(array, out) {
                    if shape.has_one_prompt() {
                        return Step::Finish(whole);
                    }
                    self.prompt = std::mem::take(&mut whole.prompt_logprobs);
                    return Step::Prompt(Some(whole), 0);
                }
                if let Some(logprob) = whole.logprobs.get(entry) {
                    shape.logprob(array, entry, logprob, model, out);
                }
                match entry + 1 < whole.logprobs.len() {
                    true => Step::Logprobs(whole, array, entry + 1),
                    false => Step::Logprobs(whole, array + 1, 0),
                }
            }
            Step::Prompt(whole, entry) => {
                let is_shown = entry > 0 || shape.open_prompt(out);
                if let Some(logprob) = self.prompt.get(entry) {
                    shape.prompt_logprob(entry, logprob, model, out);
                }
                if entry + 1 < self.prompt.len() {
                    return Step::Prompt(whole, entry + 1);
                }
                if is_shown {
                    shape.close_prompt(out);
                }
                self.prompt = Vec::new();
                match whole {
                    Some(whole) => Step::Finish(whole),
                    None => {
                        shape.open_choices(out);
                        Step::Choice
                    }
                }
            }
            Step::Finish(whole) => {
                shape.close_choice(self.index, &whole.token_ids, &whole.finish, out);
                Step::Choice
            }
            Step::Over => Step::Over,
        }
    }
}

/// Writes some of a text from this byte on, and says up to which.
fn write_some(shape: &Shape, text: &str, from: usize, out: &mut Vec<u8>) -> usize {
    let to = text.floor_char_boundary(from + STEP_BYTES);
    shape.text(&text[from..to], out);
    to
}

#[cfg(test)]
mod tests {
    use baton_protocol::{FinishReason, TopLogprob};
    use serde_json::Value;

    use super::*;
    use crate::openai::{ApiKind, Shown};
    use crate::text::tokenizer::tests::opened;

    /// Choices of much text and many log-probabilities.
    fn choices(all: &Arc<Bound>, count: usize, tokens: usize) -> Vec<Whole> {
        let entry = |offset: usize| LogprobEntry {
            token: 7,
            logprob: (offset > 0).then_some(-0.5),
            top: (0..20).map(|i| TopLogprob(7, -0.5 - i as f32)).collect(),
            offset,
            in_content: true,
        };
        let prompt = |at: usize| LogprobEntry {
            token: [7, 99][at % 2],
            top: (5..8).map(|id| TopLogprob(id, -0.5)).collect(),
            ..entry(at)
        };
        let whole = |_| {
            let mut held = Held::nothing(all);
            assert!(held.grow(tokens));
            Whole {
                // Whose characters lie across the ends of steps.
                text: "aü\"\n".repeat(20 * tokens),
                logprobs: (0..tokens).map(entry).collect(),
                prompt_logprobs: (0..tokens).map(prompt).collect(),
                reasoning: String::new(),
                calls: Vec::new(),
                token_ids: Vec::new(),
                finish: Finish {
                    reason: FinishReason::Length,
                    has_called: false,
                    stop: None,
                },
                usage: Usage {
                    completion: tokens as u64,
                    ..Usage::default()
                },
                _held: held,
            }
        };
        (0..count).map(whole).collect()
    }

    #[test]
    fn an_answer_is_rendered_in_small_pieces_that_make_one_document() {
        let model = opened(7, "{}").unwrap();
        for kind in [ApiKind::Chat, ApiKind::Completion] {
            let all = Arc::new(Bound::new(1 << 20));
            let shown = Shown {
                logprobs: true,
                prompt_logprobs: true,
                ..Shown::default()
            };
            let shape = Shape::new(kind, "1", "m", "f", shown);
            let tally = Tally::new(1, 1, 3);
            let mut answer = Answer::new(shape, tally, choices(&all, 3, 3_000));
            let mut document = Vec::new();
            let mut held = Vec::new();
            while !answer.is_over() {
                let mut piece = Vec::new();
                answer.render(&model, &mut piece);
                assert!(
                    piece.len() < PIECE_BYTES + 2 * STEP_BYTES,
                    "{}",
                    piece.len()
                );
                document.extend(piece);
                held.push(all.taken());
            }
            assert!(held.len() > 5, "{held:?}");
            assert!(
                held.is_sorted_by(|a, b| a >= b) && held.contains(&3_000),
                "{held:?}"
            );
            assert_eq!(all.taken(), 0);
            let document: Value = serde_json::from_slice(&document).unwrap();
            assert_eq!(document["usage"]["completion_tokens"], 9_000);
            for index in 0..3 {
                let choice = &document["choices"][index];
                let (prompt, other) = match kind {
                    ApiKind::Chat => (&document, choice),
                    ApiKind::Completion => (choice, &document),
                };
                assert_eq!(other.get("prompt_logprobs"), None);
                let prompt = prompt["prompt_logprobs"].as_array().unwrap();
                assert_eq!((prompt.len(), &prompt[0]), (3_000, &Value::Null));
                let ranks = |at: usize| -> Vec<_> {
                    let entry = prompt[at].as_object().unwrap();
                    let rank = |(id, one): (&String, &Value)| (id.clone(), one["rank"].as_u64());
                    entry.iter().map(rank).collect()
                };
                let ranked = |id: &str, rank| (id.to_owned(), rank);
                let top = [
                    ranked("5", Some(1)),
                    ranked("6", Some(2)),
                    ranked("7", Some(3)),
                ];
                let mut known = ranks(2_998);
                known.sort();
                assert_eq!(known, top);
                // One that is none of the alternatives is there too, its rank not known.
                let mut unknown = ranks(2_999);
                unknown.sort();
                assert_eq!(unknown[..3], top);
                assert_eq!(unknown[3..], [ranked("99", None)]);
                assert!(prompt[1]["99"]["decoded_token"].is_string());
                assert_eq!(prompt[1]["99"]["logprob"], -0.5);
                assert_eq!(choice["stop_reason"], Value::Null);
                assert_eq!(choice["index"], index);
                assert_eq!(choice["finish_reason"], "length");
                let (text, count) = match kind {
                    ApiKind::Chat => {
                        let entries = &choice["logprobs"]["content"];
                        assert_eq!(entries[1]["top_logprobs"][19]["logprob"], -19.5);
                        (
                            &choice["message"]["content"],
                            entries.as_array().unwrap().len(),
                        )
                    }
                    ApiKind::Completion => {
                        let logprobs = &choice["logprobs"];
                        assert_eq!(logprobs["token_logprobs"][0], Value::Null);
                        let lengths = ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
                            .map(|array| logprobs[array].as_array().unwrap().len());
                        assert_eq!(lengths, [3_000; 4]);
                        (&choice["text"], lengths[0])
                    }
                };
                assert_eq!(text.as_str().unwrap(), "aü\"\n".repeat(20 * 3_000));
                assert_eq!(count, 3_000);
            }
        }
    }

    #[test]
    fn reasoning_and_calls_are_parts_of_the_message() {
        let model = opened(7, "{}").unwrap();
        let all = Arc::new(Bound::new(1 << 20));
        let long = "é\"\n".repeat(5_000);
        let call = |arguments: &str| Call {
            id: "call_1".to_owned(),
            name: "f".to_owned(),
            arguments: arguments.to_owned(),
        };
        for (text, reasoning, calls) in [
            ("", "", vec![call("{}")]),
            ("a", long.as_str(), vec![call(&long), call("")]),
            ("", "b", vec![]),
        ] {
            let shape = Shape::new(ApiKind::Chat, "1", "m", "f", Shown::default());
            let whole = Whole {
                text: text.to_owned(),
                prompt_logprobs: Vec::new(),
                reasoning: reasoning.to_owned(),
                calls: calls.clone(),
                finish: Finish {
                    reason: FinishReason::Stop,
                    has_called: !calls.is_empty(),
                    stop: None,
                },
                ..choices(&all, 1, 0).remove(0)
            };
            let mut answer = Answer::new(shape, Tally::new(1, 1, 1), vec![whole]);
            let mut document = Vec::new();
            while !answer.is_over() {
                answer.render(&model, &mut document);
                document.reserve(PIECE_BYTES);
                if document.len() >= PIECE_BYTES {
                    let mut rest = Vec::new();
                    answer.render(&model, &mut rest);
                    document.extend(rest);
                }
            }
            let document: Value = serde_json::from_slice(&document).unwrap();
            let choice = &document["choices"][0];
            let message = &choice["message"];
            assert_eq!(
                message["content"].is_null(),
                text.is_empty() && !calls.is_empty()
            );
            assert_eq!(message["content"].as_str().unwrap_or(""), text);
            for name in ["reasoning", "reasoning_content"] {
                assert_eq!(message[name].as_str().unwrap_or(""), reasoning);
            }
            let written = message["tool_calls"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            assert_eq!(written.len(), calls.len());
            for (written, call) in written.iter().zip(&calls) {
                assert_eq!(written["id"], call.id);
                assert_eq!(written["type"], "function");
                assert_eq!(written["function"]["name"], call.name);
                assert_eq!(written["function"]["arguments"], call.arguments);
            }
            let expected = if calls.is_empty() {
                "stop"
            } else {
                "tool_calls"
            };
            assert_eq!(choice["finish_reason"], expected);
        }
    }

    #[test]
    fn what_is_held_has_a_bound() {
        let all = Arc::new(Bound::new(10));
        let mut one = Held::nothing(&all);
        let mut other = Held::nothing(&all);
        assert!(one.grow(7) && !other.grow(4) && other.grow(3));
        drop(one);
        assert!(other.grow(7));
    }
}
