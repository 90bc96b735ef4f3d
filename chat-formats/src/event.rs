//! What goes into a parser and what comes out.

/// A piece of a model's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The text. Of a special token all of it, whether or not the client is to see special tokens.
    pub text: &'a str,
    /// Whether it is one special token of the vocabulary.
    pub special: bool,
}

impl<'a> Piece<'a> {
    /// Ordinary text, cut between any two characters.
    pub fn text(text: &'a str) -> Self {
        let special = false;
        Self { text, special }
    }

    /// One special token.
    pub fn special(text: &'a str) -> Self {
        let special = true;
        Self { text, special }
    }
}

/// What a parser found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The model thinks.
    Reasoning(String),
    /// The model answers.
    Content(String),
    /// The model calls a tool. Calls come one after the other: the one before has ended.
    CallBegins {
        /// Number of the call, from 0.
        index: usize,
        /// The id that the model gave it, in the families whose models do.
        id: Option<String>,
        /// The tool's name.
        name: String,
    },
    /// A part of the JSON text of the arguments.
    CallArguments {
        /// Number of the call.
        index: usize,
        /// The part.
        delta: String,
    },
    /// The call is over: by its own end, or because the output is.
    CallEnds {
        /// Number of the call.
        index: usize,
        /// Whether its arguments are whole. Else their text is no JSON: the output was cut short, or the model broke off.
        is_whole: bool,
    },
}

/// How a parsed output ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// How many calls there were. With any, an output that stopped of its own accord has the finish reason `tool_calls`.
    pub calls: usize,
}
