//! A chat's output as its message: content, reasoning and calls, told apart by the model's formats.

use baton_chat_formats::{Event, Format, Parser, Piece, Reasoning, Tools, call_id};

use std::sync::Arc;

use crate::output::Part;

/// How to read the outputs of a request.
#[derive(Clone, Debug)]
pub struct Reading {
    /// How calls are written; [`Format::None`] if none are to be looked for.
    pub format: Format,
    /// How reasoning is written, after this prompt.
    pub reasoning: Reasoning,
    /// The tools.
    pub tools: Arc<Tools>,
    /// Whether the client wants the reasoning.
    pub include_reasoning: bool,
    /// Whether more than one call is wanted.
    pub parallel: bool,
    /// Whether the output is calls, after reasoning if there is any, and no answer. What is neither is then a call that was cut before
    /// its name was known, and is left out.
    pub is_forced: bool,
}

impl Reading {
    /// Whether all of the output is content, so that there is nothing to read.
    pub fn is_plain(&self) -> bool {
        self.format == Format::None && self.reasoning == Reasoning::None
    }
}

/// Reads one output.
#[derive(Debug)]
pub struct Reader {
    reading: Reading,
    parser: Parser,
    events: Vec<Event>,
    calls: usize,
    is_over: bool,
    /// Tokens of which no text has been told apart yet.
    undecided: u64,
    reasoning_tokens: u64,
    in_content: bool,
}

impl Reader {
    /// A reader before its first token.
    pub fn new(reading: Reading) -> Self {
        Self {
            parser: Parser::new(reading.format, reading.reasoning, &reading.tools),
            reading,
            events: Vec::new(),
            calls: 0,
            is_over: false,
            undecided: 0,
            reasoning_tokens: 0,
            in_content: false,
        }
    }

    /// The text that is pushed next is that of one more token.
    pub fn count_token(&mut self) {
        self.undecided += 1;
    }

    /// Tokens of the reasoning so far, with the marker before it. A token counts as what was last read up to its end.
    pub fn reasoning_tokens(&self) -> u64 {
        self.reasoning_tokens
    }

    /// Whether what was last read is text of the answer.
    pub fn is_in_content(&self) -> bool {
        self.in_content
    }

    /// Takes text and appends the parts that it makes. True if the output is over: one call was wanted, and it has ended.
    pub fn push(&mut self, piece: Piece<'_>, parts: &mut Vec<Part>) -> bool {
        self.parser.push(piece, &mut self.events);
        self.take(parts);
        self.is_over
    }

    /// The output is over: appends the rest.
    pub fn finish(&mut self, parts: &mut Vec<Part>) {
        self.parser.finish(&mut self.events);
        self.take(parts);
    }

    /// Whether a tool was called.
    pub fn has_called(&self) -> bool {
        self.calls > 0
    }

    fn take(&mut self, parts: &mut Vec<Part>) {
        if let Some(last) = self.events.last() {
            let tokens = std::mem::take(&mut self.undecided);
            if matches!(last, Event::Reasoning(_)) {
                self.reasoning_tokens += tokens;
            }
            self.in_content = matches!(last, Event::Content(_)) && !self.reading.is_forced;
        }
        for event in self.events.drain(..) {
            if self.is_over {
                continue;
            }
            match event {
                Event::Reasoning(text) if self.reading.include_reasoning => {
                    parts.push(Part::Reasoning(text))
                }
                Event::Reasoning(_) => {}
                Event::Content(_) if self.reading.is_forced => {}
                Event::Content(text) => parts.push(Part::Content(text)),
                Event::CallBegins { index, id, name } => {
                    self.calls += 1;
                    let id = id.unwrap_or_else(|| {
                        let mut random = [0; 16];
                        // Without random numbers calls of different answers have the same ids: no reason to fail.
                        let _ = getrandom::fill(&mut random);
                        call_id(
                            self.reading.format,
                            &name,
                            index,
                            u128::from_le_bytes(random),
                        )
                    });
                    parts.push(Part::Call { index, id, name });
                }
                Event::CallArguments { index, delta } => {
                    parts.push(Part::Arguments { index, delta })
                }
                Event::CallEnds { .. } => self.is_over = !self.reading.parallel,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_chat_formats::Tool;

    use super::*;

    #[test]
    fn it_knows_what_it_is_in() {
        let mut reader = Reader::new(Reading {
            format: Format::Hermes,
            reasoning: Reasoning::Think,
            tools: Arc::default(),
            include_reasoning: false,
            parallel: true,
            is_forced: false,
        });
        for (text, in_content) in [
            ("<think>", false),
            ("Hm", false),
            ("</think>", false),
            ("It", true),
            (" is.", true),
            ("<tool_call>{\"name\": \"f\", \"arguments\": {", false),
        ] {
            reader.push(Piece::text(text), &mut Vec::new());
            assert_eq!(reader.is_in_content(), in_content, "{text}");
        }
    }

    fn read(parallel: bool, include_reasoning: bool, text: &str) -> (Vec<Part>, bool) {
        let mut reader = Reader::new(Reading {
            format: Format::Hermes,
            reasoning: Reasoning::Think,
            tools: Arc::default(),
            include_reasoning,
            parallel,
            is_forced: false,
        });
        let mut parts = Vec::new();
        let is_over = reader.push(Piece::text(text), &mut parts);
        reader.finish(&mut parts);
        (parts, is_over)
    }

    #[test]
    fn one_call_if_no_more_are_wanted() {
        let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
        let count = |parts: &[Part]| {
            parts
                .iter()
                .filter(|part| matches!(part, Part::Call { .. }))
                .count()
        };
        let (parts, is_over) = read(true, true, &call.repeat(2));
        assert_eq!((count(&parts), is_over), (2, false));
        let (parts, is_over) = read(false, true, &format!("{call}{call}more"));
        assert_eq!((count(&parts), is_over), (1, true));
        assert!(
            matches!(parts.last(), Some(Part::Arguments { .. })),
            "{parts:?}"
        );
    }

    #[test]
    fn tokens_of_the_reasoning_are_counted() {
        let mut reader = Reader::new(Reading {
            format: Format::None,
            reasoning: Reasoning::Think,
            tools: Arc::default(),
            include_reasoning: false,
            parallel: true,
            is_forced: false,
        });
        let mut parts = Vec::new();
        let mut counts = Vec::new();
        for token in ["<think>", "a", "b", "</th", "ink>", "c", "d"] {
            reader.count_token();
            reader.push(Piece::text(token), &mut parts);
            counts.push(reader.reasoning_tokens());
        }
        reader.finish(&mut parts);
        counts.push(reader.reasoning_tokens());
        assert_eq!(counts, [0, 2, 3, 3, 3, 3, 3, 3]);
    }

    #[test]
    fn a_forced_call_that_is_cut_is_no_content() {
        let go = Tool::new("go", serde_json::Value::Null);
        for (text, calls) in [
            (r#"[{"name": "go", "arguments": {}}, {"na"#, 1),
            (r#"[{"name": "g"#, 0),
        ] {
            for is_forced in [true, false] {
                let mut reader = Reader::new(Reading {
                    format: Format::Json,
                    reasoning: Reasoning::None,
                    tools: Arc::new(Tools::new(vec![go.clone()])),
                    include_reasoning: true,
                    parallel: true,
                    is_forced,
                });
                let mut parts = Vec::new();
                reader.push(Piece::text(text), &mut parts);
                reader.finish(&mut parts);
                let count = |of: fn(&Part) -> bool| parts.iter().filter(|part| of(part)).count();
                assert_eq!(count(|part| matches!(part, Part::Call { .. })), calls);
                let is_text = count(|part| matches!(part, Part::Content(_))) > 0;
                assert_eq!(is_text, !is_forced, "{text}: {parts:?}");
            }
        }
    }

    #[test]
    fn reasoning_is_left_out_if_not_wanted() {
        let reasoning = Part::Reasoning("a".to_owned());
        let content = Part::Content("b".to_owned());
        assert_eq!(
            read(true, true, "<think>a</think>b").0,
            [reasoning, content.clone()]
        );
        assert_eq!(read(true, false, "<think>a</think>b").0, [content]);
    }
}
