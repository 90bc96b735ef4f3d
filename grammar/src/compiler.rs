//! From a grammar's text to a matcher over a model's vocabulary.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use baton_protocol::Grammar;
use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::Value;
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use crate::error::{GrammarError, detail};
use crate::limits::limits;
use crate::matcher::Matcher;

/// A model's vocabulary, ready for grammars. Cheap to share: it is only read.
pub struct Compiler {
    factory: ParserFactory,
    /// Tokens of the model; the parser's own end token is this id.
    vocab: u32,
}

impl Compiler {
    /// Of a `tokenizer.json`, for a model with `vocab` logits. Takes some 100 ms for a large vocabulary.
    ///
    /// # Errors
    /// [`GrammarError::Tokenizer`] if it is not one whose tokens are known bytes.
    pub fn new(tokenizer_json: &[u8], vocab: u32) -> Result<Self, GrammarError> {
        let refused = |detail| Err(GrammarError::Tokenizer(detail));
        let json: Value = match serde_json::from_slice(tokenizer_json) {
            Ok(json) => json,
            Err(error) => return refused(error.to_string()),
        };
        // Of a file that it does not understand the library says so, or panics.
        let tokens = catch_unwind(|| token_bytes_from_tokenizer_json(&json));
        let mut tokens = match tokens {
            Ok(Ok(tokens)) => tokens,
            Ok(Err(error)) => return refused(detail(error)),
            Err(_) => return refused("its tokens have an unknown form".to_owned()),
        };
        // Logits without a token can never be chosen.
        tokens.resize(vocab as usize, Vec::new());
        Self::of_tokens(tokens)
    }

    /// Of the bytes of each token; those of special tokens begin with [`TokTrie::SPECIAL_TOKEN_MARKER`].
    fn of_tokens(mut tokens: Vec<Vec<u8>>) -> Result<Self, GrammarError> {
        let vocab = tokens.len() as u32;
        // The parser sets the bit of its end token where the output may end. Which ids end an output differs from request to
        // request, so it gets one of its own.
        tokens.push([&[TokTrie::SPECIAL_TOKEN_MARKER][..], b"<|end of output|>"].concat());
        let info = TokRxInfo::new(vocab + 1, vocab);
        let trie = TokTrie::from(&info, &tokens);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::json_slices();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|error| GrammarError::Tokenizer(detail(error)))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory, vocab })
    }

    /// A matcher at the beginning of an output. `ends` are the ids that may end the output where the grammar allows an end.
    ///
    /// # Errors
    /// [`GrammarError::Grammar`].
    pub fn compile(&self, grammar: &Grammar, ends: &[u32]) -> Result<Matcher, GrammarError> {
        let parsed = parse(grammar)?;
        let compiled = catch_unwind(AssertUnwindSafe(|| {
            llguidance::Matcher::new(self.factory.create_parser(parsed))
        }));
        let Ok(matcher) = compiled else {
            let panicked = "the parser failed on it, which is a defect of the parser";
            return Err(GrammarError::Grammar(panicked.to_owned()));
        };
        match matcher.get_error() {
            Some(error) => Err(GrammarError::Grammar(detail(error))),
            None => Ok(Matcher::new(matcher, self.vocab, ends)),
        }
    }
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Compiler({} tokens)", self.vocab)
    }
}

/// Ids that a grammar may name when it is checked: more than vocabularies have.
const CHECKED_IDS: usize = 1 << 19;

/// Whether a grammar can be compiled, and followed at least to its first byte. Takes as long as compiling does: at most about a
/// second.
///
/// Tokens of a model that a Lark grammar names are not known here: by its name, none is there; by its id, each may be. A grammar
/// with an id is right or wrong on the worker.
///
/// # Errors
/// [`GrammarError::Grammar`].
pub fn check(grammar: &Grammar) -> Result<(), GrammarError> {
    static BYTES: OnceLock<Result<Compiler, GrammarError>> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| {
        let ids = std::iter::repeat_n(Vec::new(), CHECKED_IDS);
        Compiler::of_tokens(ids.chain((0..=255).map(|byte| vec![byte])).collect())
    });
    let compiler = bytes.as_ref().map_err(Clone::clone)?;
    match compiler.compile(grammar, &[]) {
        Ok(mut matcher) => match matcher.mask() {
            Ok(_) => Ok(()),
            Err(GrammarError::Token(detail)) => Err(GrammarError::Grammar(detail)),
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    }
}

fn parse(grammar: &Grammar) -> Result<TopLevelGrammar, GrammarError> {
    Ok(match grammar {
        Grammar::JsonSchema(text) => {
            let schema: Value = serde_json::from_str(text).map_err(|error| {
                GrammarError::Grammar(format!("the schema is not valid JSON: {error}"))
            })?;
            TopLevelGrammar::from_json_schema(schema)
        }
        Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
        Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
    })
}
