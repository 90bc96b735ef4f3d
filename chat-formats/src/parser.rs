//! The parser: pieces of a model's output in, events out.

use std::sync::Arc;

use crate::calls::{self, Calls, Harmony};
use crate::event::{End, Event, Piece};
use crate::format::{Format, Reasoning};
use crate::lexer::{Lexer, Symbol};
use crate::out::Out;
use crate::thinking::{self, Thinking};
use crate::tool::Tools;

/// Reads one output of a model.
#[derive(Debug)]
pub struct Parser {
    lexer: Lexer,
    reader: Reader,
    out: Out,
}

#[derive(Debug)]
struct Reader {
    harmony: Option<Harmony>,
    thinking: Option<Thinking>,
    calls: Option<Box<dyn Calls>>,
}

impl Parser {
    /// A parser for an output in these formats. With [`Format::None`], which is for requests that offer no tools or forbid to call
    /// them, what would be calls is content. Either format being harmony makes both so: it is one.
    pub fn new(format: Format, reasoning: Reasoning, tools: &Arc<Tools>) -> Self {
        let mut out = Out::new();
        let is_harmony = format == Format::Harmony || reasoning == Reasoning::Harmony;
        if is_harmony {
            let reader = Reader {
                harmony: Some(Harmony::new(format != Format::None)),
                thinking: None,
                calls: None,
            };
            let lexer = Lexer::new(calls::HARMONY_MARKS.to_vec());
            return Self { lexer, reader, out };
        }
        let thinking = match reasoning {
            Reasoning::None | Reasoning::Harmony => None,
            Reasoning::Think => Some((thinking::THINK, false)),
            Reasoning::ThinkOpened => Some((thinking::THINK, true)),
            Reasoning::Mistral => Some((thinking::MISTRAL, false)),
            Reasoning::MistralOpened => Some((thinking::MISTRAL, true)),
        };
        let mut marks = Vec::new();
        if let Some((own, is_opened)) = thinking {
            marks.extend(own.all());
            if is_opened {
                out.mark();
            }
        }
        let calls = calls::of(format, tools).map(|(calls, own)| {
            marks.extend(own);
            calls
        });
        if calls.is_none() && thinking.is_none() {
            out.no_marks_follow();
        }
        let thinking = thinking.map(|(marks, is_opened)| Thinking::new(marks, is_opened));
        let reader = Reader {
            harmony: None,
            thinking,
            calls,
        };
        let lexer = Lexer::new(marks);
        Self { lexer, reader, out }
    }

    /// Takes the next piece and appends what is certain.
    pub fn push(&mut self, piece: Piece<'_>, events: &mut Vec<Event>) {
        let (reader, out) = (&mut self.reader, &mut self.out);
        self.lexer
            .push(piece, &mut |symbol| reader.push(symbol, out));
        self.out.take(events);
    }

    /// The output is over: appends what was held back. Nothing may be pushed afterwards.
    pub fn finish(&mut self, events: &mut Vec<Event>) -> End {
        let (reader, out) = (&mut self.reader, &mut self.out);
        self.lexer.finish(&mut |symbol| reader.push(symbol, out));
        reader.finish(out);
        let end = self.out.finish();
        self.out.take(events);
        end
    }
}

impl Reader {
    fn push(&mut self, symbol: Symbol, out: &mut Out) {
        if let Some(harmony) = &mut self.harmony {
            return harmony.push(symbol, out);
        }
        let mut symbol = symbol;
        if let Some(thinking) = &mut self.thinking {
            match thinking.push(symbol, out) {
                Some(left) => symbol = left,
                None => return,
            }
            if thinking.is_over() && self.calls.is_none() {
                out.no_marks_follow();
            }
            if let Symbol::Mark(mark) = symbol
                && thinking.is_own(mark)
            {
                return thinking::as_text(mark, &mut self.calls, out);
            }
        }
        match (&mut self.calls, symbol) {
            (Some(calls), symbol) => calls.push(symbol, out),
            (None, Symbol::Char(c)) => out.content(c),
            (None, Symbol::Mark(mark)) => out.contents(mark.shown()),
        }
    }

    fn finish(&mut self, out: &mut Out) {
        if let Some(harmony) = &mut self.harmony {
            harmony.finish(out);
        }
        if let Some(calls) = &mut self.calls {
            calls.finish(out);
        }
    }
}
