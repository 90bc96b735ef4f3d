//! The JSON types of fields, for descriptions of the API. Fields that take several, or an enumeration's words, are not here.

use super::Door;

const BOOLEANS: &[&str] = &[
    "add_generation_prompt",
    "add_special_tokens",
    "continue_final_message",
    "echo",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "parallel_tool_calls",
    "reasoning.enabled",
    "reasoning.exclude",
    "return_token_ids",
    "return_token_strs",
    "return_tokens_as_token_ids",
    "skip_special_tokens",
    "store",
    "stream",
    "stream_options.continuous_usage_stats",
    "stream_options.include_usage",
    "tool_choice.disable_parallel_tool_use",
];

const INTEGERS: &[&str] = &[
    "max_completion_tokens",
    "max_output_tokens",
    "max_tokens",
    "min_tokens",
    "n",
    "priority",
    "prompt_logprobs",
    "seed",
    "top_k",
    "top_logprobs",
    "truncate_prompt_tokens",
];

const NUMBERS: &[&str] = &[
    "frequency_penalty",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
];

/// What a field's value is, where it is one of these.
pub fn json_type(door: Door, name: &str) -> Option<&'static str> {
    let has = |names: &[&str]| names.contains(&name);
    match (door, name) {
        // Whether, or how many.
        (Door::Chat, "logprobs") => Some("boolean"),
        (_, "logprobs") => Some("integer"),
        _ if has(BOOLEANS) => Some("boolean"),
        _ if has(INTEGERS) => Some("integer"),
        _ if has(NUMBERS) => Some("number"),
        _ => None,
    }
}
