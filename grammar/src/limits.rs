//! Bounds on what one grammar may cost. They are the parser's own units; what they come to is measured in `tests.rs`.

use llguidance::api::ParserLimits;

/// Bounds of compiling and of following one grammar.
pub(crate) fn limits() -> ParserLimits {
    ParserLimits {
        // Compiling: units of work on the lexer's regular expressions. 2,000,000 take about a second.
        initial_lexer_fuel: 2_000_000,
        max_grammar_size: 500_000,
        // A mask: what it takes at most is milliseconds.
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_items_in_row: 2_000,
        // A state takes up to a kilobyte.
        max_lexer_states: 50_000,
        precompute_large_lexemes: true,
        // Its errors go to clients, who need no dump of the parser.
        verbose_errors: false,
    }
}
