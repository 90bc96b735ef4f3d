//! The formats and their names.

use std::fmt;
use std::str::FromStr;

/// How a family writes tool calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    /// Not at all, or nobody asked: all text is content.
    #[default]
    None,
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5 and 3, and many others.
    Hermes,
    /// `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`: Qwen3-Coder.
    QwenXml,
    /// `{"name": …, "parameters": {…}}` as the whole answer, or after `<|python_tag|>`: Llama 3.1 to 3.3.
    LlamaJson,
    /// `[NAME(KEY=VALUE), …]` as the whole answer: Llama 4 and others.
    Pythonic,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}]`: Mistral to v7 of its tokenizer. The parser reads [`Self::MistralArgs`] too.
    Mistral,
    /// `[TOOL_CALLS]NAME[ARGS]{…}`: Mistral from v11 of its tokenizer on. The parser reads [`Self::Mistral`] too.
    MistralArgs,
    /// `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME` and a fenced JSON: DeepSeek V3 and R1. The parser reads both of DeepSeek's.
    DeepSeekV3,
    /// `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}`: DeepSeek V3.1. The parser reads both of DeepSeek's.
    DeepSeekV31,
    /// `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}`: Kimi K2.
    Kimi,
    /// Channels: `<|channel|>commentary to=functions.NAME<|message|>{…}<|call|>`: gpt-oss.
    Harmony,
    /// `{"name": …, "arguments": {…}}` or a list of these as the whole answer, without any marker.
    Json,
}

/// How a family writes reasoning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reasoning {
    /// Not at all.
    #[default]
    None,
    /// `<think>…</think>` at the beginning, if the model wants to.
    Think,
    /// From the first token on, until `</think>`: the prompt ends with `<think>`, or the model always begins so (DeepSeek R1).
    ThinkOpened,
    /// `[THINK]…[/THINK]`: Magistral.
    Mistral,
    /// As [`Self::Mistral`], with `[THINK]` at the end of the prompt.
    MistralOpened,
    /// The channel `analysis`: gpt-oss.
    Harmony,
}

const FORMATS: [(Format, &str); 12] = [
    (Format::None, "none"),
    (Format::Hermes, "hermes"),
    (Format::QwenXml, "qwen-xml"),
    (Format::LlamaJson, "llama-json"),
    (Format::Pythonic, "pythonic"),
    (Format::Mistral, "mistral"),
    (Format::MistralArgs, "mistral-args"),
    (Format::DeepSeekV3, "deepseek-v3"),
    (Format::DeepSeekV31, "deepseek-v31"),
    (Format::Kimi, "kimi"),
    (Format::Harmony, "harmony"),
    (Format::Json, "json"),
];

const REASONINGS: [(Reasoning, &str); 6] = [
    (Reasoning::None, "none"),
    (Reasoning::Think, "think"),
    (Reasoning::ThinkOpened, "think-opened"),
    (Reasoning::Mistral, "mistral"),
    (Reasoning::MistralOpened, "mistral-opened"),
    (Reasoning::Harmony, "harmony"),
];

impl Format {
    /// All formats.
    pub fn all() -> impl Iterator<Item = Self> {
        FORMATS.into_iter().map(|(format, _)| format)
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        name(&FORMATS, self)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        named("tool format", &FORMATS, text)
    }
}

impl Reasoning {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        name(&REASONINGS, self)
    }

    /// What it is after this prompt: a template may have opened the reasoning itself, for one request and not for another.
    pub fn after_prompt(self, prompt: &str) -> Self {
        let end = prompt.trim_end();
        match self {
            Self::Think if end.ends_with("<think>") => Self::ThinkOpened,
            Self::Mistral if end.ends_with("[THINK]") => Self::MistralOpened,
            // The template of a model that always thinks was told not to.
            Self::ThinkOpened if end.ends_with("</think>") => Self::Think,
            Self::MistralOpened if end.ends_with("[/THINK]") => Self::Mistral,
            other => other,
        }
    }
}

impl fmt::Display for Reasoning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Reasoning {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        named("reasoning format", &REASONINGS, text)
    }
}

fn name<T: PartialEq>(all: &[(T, &'static str)], which: T) -> &'static str {
    let found = all.iter().find(|(value, _)| *value == which);
    found.map_or("none", |(_, name)| name)
}

fn named<T: Copy>(what: &str, all: &[(T, &str)], text: &str) -> Result<T, String> {
    let found = all.iter().find(|(_, name)| *name == text);
    found.map(|(value, _)| *value).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|(_, name)| *name).collect();
        format!(
            "there is no {what} {text:?}; there are {}",
            names.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for format in Format::all() {
            assert_eq!(format.name().parse(), Ok(format));
        }
        for (reasoning, name) in REASONINGS {
            assert_eq!(reasoning.to_string(), name);
            assert_eq!(name.parse(), Ok(reasoning));
        }
        assert_eq!(Format::Hermes.name(), "hermes");
        let error = "hermse".parse::<Format>().unwrap_err();
        assert!(
            error.contains("\"hermse\"") && error.contains("llama-json"),
            "{error}"
        );
    }

    #[test]
    fn a_prompt_may_open_the_reasoning() {
        use Reasoning::{Mistral, MistralOpened, Think, ThinkOpened};
        let cases = [
            (Think, "<|im_start|>assistant\n<think>\n", ThinkOpened),
            (
                Think,
                "<|im_start|>assistant\n<think>\n\n</think>\n\n",
                Think,
            ),
            (Think, "<|im_start|>assistant\n", Think),
            (ThinkOpened, "<｜Assistant｜>", ThinkOpened),
            (ThinkOpened, "<｜Assistant｜></think>", Think),
            (Mistral, "[/INST][THINK]", MistralOpened),
            (Reasoning::None, "<think>", Reasoning::None),
        ];
        for (before, prompt, after) in cases {
            assert_eq!(before.after_prompt(prompt), after, "{prompt}");
        }
    }
}
