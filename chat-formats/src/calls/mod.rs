//! Tool calls: one state machine for each way to write them. They read what is not reasoning.

mod harmony;
mod hermes;
mod json_calls;
mod json_text;
mod mistral;
mod pythonic;
mod qwen_xml;
mod sections;
mod whole_answer;

use std::sync::Arc;

use crate::format::Format;
use crate::lexer::Symbol;
use crate::out::Out;
use crate::tool::Tools;

pub(crate) use harmony::{Harmony, MARKS as HARMONY_MARKS};

/// A format's state machine.
pub(crate) trait Calls: std::fmt::Debug + Send {
    /// Takes the next symbol.
    fn push(&mut self, symbol: Symbol, out: &mut Out);

    /// The output is over: what was held back is content.
    fn finish(&mut self, out: &mut Out);
}

/// The state machine of a format, and its markers. None for those that have none of their own.
pub(crate) fn of(
    format: Format,
    tools: &Arc<Tools>,
) -> Option<(Box<dyn Calls>, Vec<&'static str>)> {
    let tools = Arc::clone(tools);
    Some(match format {
        Format::None | Format::Harmony => return None,
        Format::Hermes => (Box::new(hermes::Hermes::new()), hermes::MARKS.to_vec()),
        Format::QwenXml => (
            Box::new(qwen_xml::QwenXml::new(tools)),
            qwen_xml::MARKS.to_vec(),
        ),
        Format::LlamaJson => (
            Box::new(whole_answer::WholeAnswer::new(tools, ';')),
            whole_answer::MARKS.to_vec(),
        ),
        Format::Json => (
            Box::new(whole_answer::WholeAnswer::new(tools, ',')),
            Vec::new(),
        ),
        Format::Pythonic => (
            Box::new(pythonic::Pythonic::new(tools)),
            pythonic::MARKS.to_vec(),
        ),
        Format::Mistral | Format::MistralArgs => {
            (Box::new(mistral::Mistral::new()), mistral::MARKS.to_vec())
        }
        Format::DeepSeekV3 | Format::DeepSeekV31 => (
            Box::new(sections::Sections::new(&sections::DEEPSEEK)),
            sections::DEEPSEEK.all(),
        ),
        Format::Kimi => (
            Box::new(sections::Sections::new(&sections::KIMI)),
            sections::KIMI.all(),
        ),
    })
}
