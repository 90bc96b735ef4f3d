//! Chat templates of the families that are served, in what is essential of them, each with a tokenizer of its kind.

use std::sync::OnceLock;

use crate::text::tokenizer::ModelText;
use crate::text::tokenizer::fixtures::{
    BOS, EOS_TEXT, byte_level, metaspace, prepending, with_template,
};

/// A family.
pub struct Family {
    pub name: &'static str,
    pub model: ModelText,
    /// The same template where control tokens in messages are allowed.
    pub allowing: ModelText,
    /// Its special tokens.
    pub special: &'static [&'static str],
}

const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}\
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const LLAMA3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}\
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

const QWEN25: &str = r#"{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"#;

const QWEN3: &str = r#"{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"#;

const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}\
    {% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}\
    {% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}";

const ZEPHYR: &str = "{% for message in messages %}\n{% if message['role'] == 'user' %}\n\
    {{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n\
    {{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n\
    {{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n\
    {% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}";

/// Writes roles between brackets, as Phi 3 does: a role can be the middle of a control token.
const BRACKETED_ROLES: &str = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + \
    '<|end|>\n' }}{% endfor %}{{ '<|assistant|>\n' }}";

/// Changes the case of what it is given, and writes strings with nothing between them.
const CHANGING: &str = "{% for message in messages %}{{ bos_token }}{{ message.role | upper }}{{ message.content.lower() }}\
    {{ message.content }}{{ message.name }}{{ message.tool_calls | tojson }}{{ eos_token }}{% endfor %}";

/// All of them.
pub fn families() -> &'static [Family] {
    static FAMILIES: OnceLock<Vec<Family>> = OnceLock::new();
    FAMILIES.get_or_init(|| {
        const CHATML: &[&str] = &["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
        const HEADERS: &[&str] = &[
            "<|begin_of_text|>",
            BOS,
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ];
        const INSTRUCTIONS: &[&str] = &[BOS, EOS_TEXT, "[INST]", "[/INST]"];
        const ENDS: &[&str] = &["<unk>", BOS, EOS_TEXT];
        const ROLES: &[&str] = &["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"];
        let thinks = ["<think>", "</think>", "<tool_call>", "</tool_call>"];
        let families = [
            ("SmolLM2", byte_level(CHATML, &[]), SMOLLM2, CHATML),
            ("Llama 3", byte_level(HEADERS, &[]), LLAMA3, HEADERS),
            ("Qwen 2.5", byte_level(CHATML, &thinks), QWEN25, CHATML),
            ("Qwen 3", byte_level(CHATML, &thinks), QWEN3, CHATML),
            ("Mistral", metaspace(INSTRUCTIONS), MISTRAL, INSTRUCTIONS),
            ("Zephyr", prepending(ENDS, false), ZEPHYR, ENDS),
            ("Vicuna", prepending(ENDS, true), ZEPHYR, ENDS),
            // Not special, but written as control tokens are.
            (
                "roles in brackets",
                byte_level(&[], ROLES),
                BRACKETED_ROLES,
                ROLES,
            ),
            ("changing", byte_level(ENDS, &[]), CHANGING, ENDS),
        ];
        let family = |(name, tokenizer, template, special)| Family {
            name,
            model: with_template(&tokenizer, template),
            allowing: with_template(&tokenizer, template)
                .with_special_tokens_in_content(crate::SpecialTokensInContent::Allow),
            special,
        };
        families.map(family).into()
    })
}
