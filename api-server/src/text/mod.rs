//! From text to token ids and back: chat templates, the tokeniser, control tokens, detokenising, stop strings, echo.

pub mod control_tokens;
pub mod detokenize;
pub mod echo;
pub mod reader;
pub mod stop;
pub mod template;
pub mod texts;
pub mod tokenizer;
