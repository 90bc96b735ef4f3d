//! Which formats a model writes, from what its directory says.

use crate::format::{Format, Reasoning};

/// What is known of a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts<'a> {
    /// Its chat template's text.
    pub template: Option<&'a str>,
    /// Texts of the tokens that its tokenizer has beside its vocabulary.
    pub added_tokens: &'a [&'a str],
    /// `architectures` of its `config.json`.
    pub architectures: &'a [&'a str],
    /// The name or path under which it was prepared.
    pub name: &'a str,
}

/// A model's formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// How it calls tools. [`Format::None`] if its template does not show tools, or in no known way.
    pub format: Format,
    /// How it thinks. A prompt may change it: [`Reasoning::after_prompt`].
    pub reasoning: Reasoning,
}

/// The formats of a model. The template decides, because it is what the model was trained to see: it writes earlier calls in the
/// model's format, or describes the format in words. Tokens, architecture and name count where templates are silent.
pub fn choose(facts: &Facts<'_>) -> Choice {
    let format = format(facts);
    let reasoning = match format {
        Format::Harmony => Reasoning::Harmony,
        _ => reasoning(facts),
    };
    Choice { format, reasoning }
}

fn format(facts: &Facts<'_>) -> Format {
    let template = facts.template.unwrap_or("");
    let says = |text: &str| template.contains(text);
    let is = |name: &str| facts.architectures.iter().any(|one| one.starts_with(name));
    let has_token = |text: &str| facts.added_tokens.contains(&text);
    if says("<|channel|>") || is("GptOss") {
        return Format::Harmony;
    }
    // Without a word about tools the model would not see them.
    if !says("tool") {
        return Format::None;
    }
    if says("<|tool_calls_section_begin|>") {
        return Format::Kimi;
    }
    if says("<｜tool▁calls▁begin｜>") || says("<｜tool▁call▁begin｜>") {
        return match says("```json") {
            true => Format::DeepSeekV3,
            false => Format::DeepSeekV31,
        };
    }
    if says("[TOOL_CALLS]") || has_token("[TOOL_CALLS]") && says("[AVAILABLE_TOOLS]") {
        return match says("[ARGS]") || has_token("[ARGS]") {
            true => Format::MistralArgs,
            false => Format::Mistral,
        };
    }
    if says("<function=") && says("<parameter=") {
        return Format::QwenXml;
    }
    // Others, such as GLM, write tags of their own inside the same markers.
    if says("<tool_call>") && !says("<arg_key>") {
        return Format::Hermes;
    }
    let is_llama =
        is("Llama") || is("MllamaFor") || has_token("<|python_tag|>") || says("<|python_tag|>");
    if says("[func_name1(") || says("func_name1(params_name1") || says("<|python_start|>") {
        return Format::Pythonic;
    }
    let writes_json = says("\"name\"") && (says("\"parameters\"") || says("\"arguments\""));
    match (writes_json, is_llama) {
        (true, true) => Format::LlamaJson,
        (true, false) => Format::Json,
        (false, true) if says("ipython") => Format::LlamaJson,
        (false, _) => Format::None,
    }
}

fn reasoning(facts: &Facts<'_>) -> Reasoning {
    let template = facts.template.unwrap_or("");
    let says = |text: &str| template.contains(text);
    let has_token = |text: &str| facts.added_tokens.contains(&text);
    if says("[THINK]") || has_token("[THINK]") {
        return Reasoning::Mistral;
    }
    if !says("<think>") && !says("</think>") && !has_token("<think>") {
        return Reasoning::None;
    }
    // R1 thinks first whether or not its template says so.
    let name = facts.name.to_ascii_lowercase();
    match name.contains("deepseek-r1") || name.contains("deepseek_r1") {
        true => Reasoning::ThinkOpened,
        false => Reasoning::Think,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str =
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";

    /// What tells a family's template, in as few words.
    const QWEN3: &str = "{%- if tools %}# Tools\nFor each function call, return a json object with function name and arguments \
        within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": \
        <args-json-object>}\n</tool_call>{%- endif %}{%- if enable_thinking is false %}<think>\n\n</think>\n\n{%- endif %}";
    const QWEN_CODER: &str = "{%- if tools %}If you choose to call a function ONLY reply in the following format:\n<tool_call>\n\
        <function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n</function>\n\
        </tool_call>{%- endif %}";
    const LLAMA31: &str = "{%- if tools is not none %}Respond in the format {\"name\": function name, \"parameters\": dictionary \
        of argument name and its value}.{%- endif %}{{- \"<|python_tag|>\" + tool_call.name }}";
    const LLAMA4: &str = "{%- if tools is defined %}you SHOULD put it in the format of [func_name1(params_name1=params_value1, \
        params_name2=params_value2...), func_name2(params)]{%- endif %}{{ '\"name\"\"parameters\"' }}";
    const MISTRAL: &str = "{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif %}\
        {{- \"[TOOL_CALLS] [\" }}{{- '{\"name\": \"' }}";
    const MAGISTRAL: &str = "{%- if tools %}[AVAILABLE_TOOLS]{%- endif %}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}\
        [THINK][/THINK]";
    const DEEPSEEK_V3: &str = "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + \
        tool['function']['name'] + '\\n' + '```json' + '\\n'}}";
    const DEEPSEEK_V31: &str = "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>'}}\
        {{'</think>'}}";
    const KIMI: &str =
        "{%- if tools -%}<|im_system|>tool_declare{%- endif -%}<|tool_calls_section_begin|>";
    const HARMONY: &str = "{{- \"<|start|>assistant<|channel|>final<|message|>\" }}";
    const GLM: &str = "{% if tools %}<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>{% endif %}<think></think>";
    const GENERIC: &str =
        "{% if tools %}Answer with {\"name\": \"...\", \"arguments\": {...}}{% endif %}";

    #[test]
    fn each_family_is_known_by_its_template() {
        let cases = [
            (QWEN3, Format::Hermes, Reasoning::Think),
            (QWEN_CODER, Format::QwenXml, Reasoning::None),
            (LLAMA31, Format::LlamaJson, Reasoning::None),
            (LLAMA4, Format::Pythonic, Reasoning::None),
            (MISTRAL, Format::Mistral, Reasoning::None),
            (MAGISTRAL, Format::MistralArgs, Reasoning::Mistral),
            (DEEPSEEK_V3, Format::DeepSeekV3, Reasoning::None),
            (DEEPSEEK_V31, Format::DeepSeekV31, Reasoning::Think),
            (KIMI, Format::Kimi, Reasoning::None),
            (HARMONY, Format::Harmony, Reasoning::Harmony),
            (GLM, Format::None, Reasoning::Think),
            (GENERIC, Format::Json, Reasoning::None),
            (CHATML, Format::None, Reasoning::None),
        ];
        for (template, format, reasoning) in cases {
            let facts = Facts {
                template: Some(template),
                ..Facts::default()
            };
            assert_eq!(choose(&facts), Choice { format, reasoning }, "{template}");
        }
        assert_eq!(choose(&Facts::default()), Choice::default());
    }

    #[test]
    fn tokens_architecture_and_name_speak_where_the_template_does_not() {
        let facts = Facts {
            template: Some("{% if tools %}[AVAILABLE_TOOLS]{% endif %}"),
            added_tokens: &["[TOOL_CALLS]", "[ARGS]", "[THINK]"],
            ..Facts::default()
        };
        let magistral = Choice {
            format: Format::MistralArgs,
            reasoning: Reasoning::Mistral,
        };
        assert_eq!(choose(&facts), magistral);
        let facts = Facts {
            template: Some("{{ '<think>' in content }}"),
            name: "deepseek-ai/DeepSeek-R1",
            ..Facts::default()
        };
        assert_eq!(choose(&facts).reasoning, Reasoning::ThinkOpened);
        let facts = Facts {
            architectures: &["GptOssForCausalLM"],
            ..Facts::default()
        };
        assert_eq!(choose(&facts).format, Format::Harmony);
        let facts = Facts {
            template: Some(GENERIC),
            architectures: &["LlamaForCausalLM"],
            ..Facts::default()
        };
        assert_eq!(choose(&facts).format, Format::LlamaJson);
    }
}
