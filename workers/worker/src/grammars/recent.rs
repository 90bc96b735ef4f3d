//! Grammars that were compiled lately: agents send the same few again and again.

use std::collections::VecDeque;

use baton_grammar::{Compiler, GrammarError, Matcher};
use baton_protocol::Grammar;

/// How many are kept. Each takes its text and up to some megabytes.
const RECENT_MAX: usize = 32;

/// Matchers at the beginning of an output, the one used last in front.
#[derive(Default)]
pub(super) struct Recent(VecDeque<Compiled>);

struct Compiled {
    grammar: Grammar,
    ends: Vec<u32>,
    matcher: Matcher,
}

impl Recent {
    /// A matcher at the beginning of an output, if the grammar was compiled lately.
    pub(super) fn find(&mut self, grammar: &Grammar, ends: &[u32]) -> Option<Matcher> {
        let is = |compiled: &Compiled| compiled.ends == ends && compiled.grammar == *grammar;
        let at = self.0.iter().position(is)?;
        let compiled = self.0.remove(at)?;
        let matcher = compiled.matcher.branch();
        self.0.push_front(compiled);
        Some(matcher)
    }

    /// Keeps one; the one that was not used for longest goes if there are too many.
    pub(super) fn keep(&mut self, grammar: &Grammar, ends: &[u32], matcher: Matcher) {
        self.0.push_front(Compiled {
            grammar: grammar.clone(),
            ends: ends.to_vec(),
            matcher,
        });
        self.0.truncate(RECENT_MAX);
    }
}

/// Compiles a grammar, and makes its first mask once, so that what that learns of the lexer is kept too.
pub(super) fn compile(
    compiler: &Compiler,
    grammar: &Grammar,
    ends: &[u32],
) -> Result<Matcher, GrammarError> {
    let mut matcher = compiler.compile(grammar, ends)?;
    matcher.mask()?;
    Ok(matcher)
}
