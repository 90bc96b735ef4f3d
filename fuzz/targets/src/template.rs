//! Chat templates and the messages that they are given.

use baton_api_server::fuzzing::{ChatPrompt, ChatTemplate, Until};
use serde_json::{Value, json};

/// What stands between template and messages: no byte of UTF-8.
const BETWEEN: u8 = 0xff;

/// Templates of the kinds that models are published with: a plain loop, dates and tools, roles that must alternate.
const PUBLISHED: [&str; 3] = [
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe \
     helpful.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + \
     '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{- bos_token }}{%- set date_string = strftime_now('%d %b %Y') %}{%- if messages[0]['role'] == 'system' %}{%- set \
     system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = \
     '' %}{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' + date_string + system_message }}{%- for message \
     in messages %}{%- if 'tool_calls' in message %}{{- message.tool_calls | tojson(indent=4) }}{%- elif message.role == \
     'tool' or message.role == 'ipython' %}{%- if message.content is mapping or message.content is iterable %}{{- \
     message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}{%- else %}{{- '<|start_header_id|>' + \
     message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}",
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ \
     raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + \
     message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token \
     }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
];

/// Template text, 0xff, messages in JSON: each piece with whatever of the other kind there is.
pub fn template(data: &[u8]) {
    let between = data.iter().position(|byte| *byte == BETWEEN);
    let (source, messages) = data.split_at(between.unwrap_or(data.len()));
    let messages = serde_json::from_slice(messages.get(1..).unwrap_or_default());
    let messages: Value = messages.unwrap_or_else(|_| json!([{"role": "user", "content": "hi"}]));
    if let Ok(source) = std::str::from_utf8(source)
        && let Ok(template) = ChatTemplate::new(source, "<s>", "</s>")
    {
        render(&template, &messages);
    }
    for source in PUBLISHED {
        let template = ChatTemplate::new(source, "<s>", "</s>").expect("published and compiled");
        render(&template, &messages);
    }
}

fn render(template: &ChatTemplate, messages: &Value) {
    let until = Until::forever();
    let mut prompt = ChatPrompt::new(1 << 20, &<[u8]>::len, &until);
    let _ = template.render(messages, true, &json!({}), &mut prompt);
    let _ = prompt.into_text();
}
